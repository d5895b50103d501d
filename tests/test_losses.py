"""Loss modules, their vectors, and class counts."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import classfair
from classfair import CrossEntropyLoss, LogitAdjustedLoss, class_counts, logit_adjustment

COUNTS = [80, 15, 5]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=g, requires_grad=True), torch.randint(0, 3, (12,), generator=g)


def test_logit_adjustment_is_the_log_prior():
    expected = 1.5 * np.log(np.array(COUNTS) / 100)
    np.testing.assert_allclose(logit_adjustment(COUNTS, tau=1.5), expected, rtol=1e-6)


def test_training_loss_is_cross_entropy_of_adjusted_logits(batch):
    logits, target = batch
    loss = LogitAdjustedLoss(COUNTS, tau=0.7)(logits, target)
    expected = F.cross_entropy(logits + 0.7 * torch.tensor(COUNTS).div(100).log(), target)
    torch.testing.assert_close(loss, expected)


def test_balanced_counts_change_nothing(batch):
    logits, target = batch
    torch.testing.assert_close(LogitAdjustedLoss([7, 7, 7])(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
def test_evaluation_is_plain_cross_entropy_and_leaves_the_state(batch, mode):
    logits, target = batch
    criterion = LogitAdjustedLoss(COUNTS)
    before = copy.deepcopy(criterion.state_dict())
    if mode == "eval":
        loss = criterion.eval()(logits, target)
    else:
        with getattr(torch, mode)():
            loss = criterion(logits.detach(), target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    assert all(torch.equal(before[k], v) for k, v in criterion.state_dict().items())


def test_posthoc_adjustment_moves_predictions_to_rare_classes():
    logits = torch.zeros(2, 3, 4)
    adjusted = classfair.posthoc_logit_adjustment(logits, COUNTS, tau=2.0)
    torch.testing.assert_close(adjusted[0, :, 0], -2 * torch.tensor(COUNTS).div(100).log())
    assert adjusted.argmax(1).unique().tolist() == [2]
    assert classfair.posthoc_logit_adjustment(logits.bfloat16(), COUNTS).dtype == torch.bfloat16


@pytest.mark.parametrize("keywords", [{"label_smoothing": 0.1}, {"ignore_index": 1}, {"reduction": "sum"}, {}])
def test_keywords_of_nn_cross_entropy_loss(batch, keywords):
    logits, target = batch
    weight = torch.tensor([0.5, 1.0, 2.0])
    ours = CrossEntropyLoss(weight, **keywords)(logits, target)
    torch.testing.assert_close(ours, torch.nn.CrossEntropyLoss(weight, **keywords)(logits, target))


def test_with_stats_is_one_call_for_loss_and_statistics(batch):
    logits, target = batch
    criterion = LogitAdjustedLoss(COUNTS)
    loss, stats = criterion.with_stats(logits, target, group=target % 2, num_groups=2)
    torch.testing.assert_close(loss, criterion(logits, target))
    assert torch.equal(stats.count.sum(0), torch.bincount(target, minlength=3))
    # The statistics are those of the logits the model predicts with, not of the adjusted ones.
    torch.testing.assert_close(stats.mass.sum(0), logits.softmax(1).sum(0))
    assert torch.equal(stats.prediction, logits.argmax(1))


def test_losses_have_no_parameters_and_state_keeps_its_precision(batch):
    criterion = LogitAdjustedLoss(COUNTS, weight=torch.tensor([1.0, 1 / 3, 0.1]))
    assert list(criterion.parameters()) == []
    before = copy.deepcopy(criterion.state_dict())
    for moved in (criterion.half(), criterion.to(torch.bfloat16)):
        for name, value in moved.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])
    other = LogitAdjustedLoss([1, 1, 1], weight=torch.ones(3))
    other.load_state_dict(before)
    logits, target = batch
    torch.testing.assert_close(other(logits, target), criterion(logits, target))


class _Labelled:
    """As torchvision's data sets: labels in an attribute, samples expensive."""

    def __init__(self, **labels):
        self.__dict__.update(labels)

    def __len__(self):
        return 5

    def __getitem__(self, i):
        raise AssertionError("a sample was loaded")


@pytest.mark.parametrize(
    "source",
    [
        [0, 2, 2, 1, 2],
        np.array([0, 2, 2, 1, 2], dtype=np.uint8),
        torch.tensor([[0, 2, 2, 1, 2]], dtype=torch.int32),
        _Labelled(targets=[0, 2, 2, 1, 2]),
        _Labelled(labels=np.array([0, 2, 2, 1, 2])),
        TensorDataset(torch.zeros(5, 1), torch.tensor([0, 2, 2, 1, 2])),
        Subset(_Labelled(targets=[2, 9, 0, 2, 2, 1]), [0, 2, 3, 4, 5]),
        ConcatDataset([_Labelled(targets=[0, 2, 2]), _Labelled(targets=torch.tensor([1, 2]))]),
    ],
    ids=["list", "uint8", "int32", "targets", "labels", "TensorDataset", "Subset", "ConcatDataset"],
)
def test_class_counts(source):
    assert class_counts(source, 4).tolist() == [1, 1, 3, 0]


def test_class_counts_of_nothing():
    assert class_counts([], 2).tolist() == [0, 0]
