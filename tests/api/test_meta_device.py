"""Losses made without memory: under ``torch.device("meta")``, as a model of a hub is before its weights are there."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import classfair
from tests.support.losses import COUNTS, LOSSES, C, D, loss_of, problem

ON_META = {
    "logit adjusted": lambda counts: classfair.LogitAdjustedLoss(counts),
    "ldam": lambda counts: classfair.LDAMLoss(counts),
    "class balanced": lambda counts: classfair.ClassBalancedLoss(counts),
    "metalad": lambda counts: classfair.MetaLADLoss(counts, D),
}


def made_on_meta(name):
    with torch.device("meta"):
        criterion = LOSSES[name]()
    assert all(buffer.is_meta for buffer in criterion.buffers())
    return criterion


def assert_same_buffers(criterion, expected):
    got = dict(criterion.named_buffers())
    wanted = dict(expected.named_buffers())
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
        assert got[name].dtype == value.dtype, name


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("name", ON_META)
def test_counts_may_be_of_any_kind(name, kind):
    counts = kind(COUNTS)
    with torch.device("meta"):
        criterion = ON_META[name](counts)
    criterion.to_empty(device="cpu").reset_parameters()
    assert_same_buffers(criterion, ON_META[name](COUNTS))


@pytest.mark.parametrize("name", LOSSES)
def test_reset_parameters_restores_what_the_constructor_made(name):
    criterion = made_on_meta(name).to_empty(device="cpu")
    for buffer in criterion.buffers():  # memory that nobody has written
        buffer.fill_(77)
    criterion.reset_parameters()
    assert_same_buffers(criterion, LOSSES[name]())
    assert torch.equal(loss_of(criterion, *problem()), loss_of(LOSSES[name](), *problem()))


@pytest.mark.parametrize("name", LOSSES)
def test_reset_parameters_forgets_a_training(name):
    criterion = LOSSES[name](weight=torch.arange(1.0, C + 1))
    for seed in range(3):
        loss_of(criterion, *problem(seed))
    criterion.put("reweight", torch.full((C,), 3.0))
    criterion.reset_parameters()
    assert_same_buffers(criterion, LOSSES[name](weight=torch.arange(1.0, C + 1)))


class Classifier(nn.Module):
    """A model that holds its loss, as those of Hugging Face do."""

    def __init__(self, name):
        super().__init__()
        self.body, self.head = nn.Linear(3, D), nn.Linear(D, C)
        self.criterion = LOSSES[name]()

    def forward(self, images, target):
        return loss_of(self.criterion, self.body(images).relu(), self.head.weight, self.head.bias, target)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pretrained_model_takes_its_state_in_place_of_its_own(name):
    torch.manual_seed(0)
    images, target = torch.randn(16, 3), torch.randint(0, C, (16,))
    trained = Classifier(name)
    for _ in range(3):
        trained(images, target)
    with torch.device("meta"):
        model = Classifier(name)
    model.state_dict()  # loaders read the names from it
    model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for _ in range(2):
        expected, loss = trained(images, target), model(images, target)
        assert torch.equal(loss, expected)
        gradients = [torch.autograd.grad(x, m.head.weight)[0] for x, m in ((loss, model), (expected, trained))]
        assert torch.equal(*gradients)


def test_a_loader_that_sets_tensors_one_by_one_restores_the_others_by_reset_parameters():
    """transformers: what is in the file is set, the rest is made empty, then the model initialises it."""
    trained, model = LOSSES["metalad"](), made_on_meta("metalad")
    loss_of(trained, *problem())
    state = trained.state_dict()
    for name, buffer in list(model.named_buffers()):
        if name not in state:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = torch.full_like(buffer, 77, device="cpu")
    model.to_empty(device="cpu").reset_parameters()
    model.load_state_dict(state)
    assert_same_buffers(model, trained)


def test_a_weight_made_on_the_meta_device_is_nan_until_a_state_is_loaded():
    with torch.device("meta"):
        criterion = classfair.CrossEntropyLoss(torch.ones(C))
    criterion.to_empty(device="cpu").reset_parameters()
    assert criterion.weight.isnan().all()
    weight = torch.arange(1.0, C + 1)
    criterion.load_state_dict(classfair.CrossEntropyLoss(weight).state_dict())
    assert torch.equal(criterion.weight, weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: classfair.LogitAdjustedLoss(torch.ones(C, device="meta")),
            "logit_adjustment: expected class_counts with values, got a tensor on the meta device",
        ),
        (
            lambda: classfair.Warmup(made_on_meta("ldam"), epochs=2),
            "Warmup: expected criterion with values, got one on the meta device",
        ),
        (
            lambda: classfair.DeferredReweighting(made_on_meta("plain"), COUNTS, start=1),
            "DeferredReweighting: expected criterion with values, got one on the meta device",
        ),
        (
            lambda: classfair.ISDARamp(made_on_meta("isda"), epochs=2),
            "ISDARamp: expected criterion with values, got one on the meta device",
        ),
    ],
)
def test_what_needs_values_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_statistics_are_restored_as_nothing_seen():
    with torch.device("meta"):
        statistics = classfair.ClassStatistics(C, D, covariance="full")
    statistics.to_empty(device="cpu").reset_parameters()
    assert all((buffer == 0).all() for buffer in statistics.buffers())
    assert_same_buffers(statistics, classfair.ClassStatistics(C, D, covariance="full"))
