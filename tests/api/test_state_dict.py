"""What is in a state_dict is tensors, of full precision, and every tool that copies or saves states can have it."""

import copy
import warnings

import pytest
import torch
from torch import nn

import classfair
from tests.support.losses import COUNTS, LOSSES, WITH_STATE, C, D, loss_of, problem


class Classifier(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, D), nn.Linear(D, C)
        self.criterion = LOSSES[name](weight=torch.arange(1.0, C + 1))

    def forward(self, images, target):
        return loss_of(self.criterion, self.body(images).relu(), self.head.weight, self.head.bias, target)


def trained(name, steps=3):
    model, g = Classifier(name), torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(16, 3, generator=g), torch.randint(0, C, (16,), generator=g))
    return model


def next_loss(model):
    g = torch.Generator().manual_seed(2)
    return model(torch.randn(16, 3, generator=g), torch.randint(0, C, (16,), generator=g))


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", LOSSES)
def test_everything_in_a_state_is_a_tensor(name):
    for key, value in trained(name).state_dict().items():
        assert type(value) is torch.Tensor, key


@pytest.mark.parametrize("name", LOSSES)
def test_a_copy_continues_as_the_original(name):
    model = trained(name)
    again = copy.deepcopy(model)
    assert_same_state(again.state_dict(), model.state_dict())
    assert torch.equal(next_loss(again), next_loss(model))
    assert_same_state(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", LOSSES)
def test_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, again = trained(name), Classifier(name)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(again, str(tmp_path / "model.safetensors"))
    assert torch.equal(next_loss(again), next_loss(model))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_exponential_averages_of_timm(name, kind):
    utils = pytest.importorskip("timm.utils", reason="timm is not installed")
    model = trained(name)
    average = getattr(utils, kind)(model, decay=0.5)
    for seed in range(2):
        loss_of(model.criterion, *problem(seed))
        average.update(model)
    state = (average.ema if kind == "ModelEma" else average.module).state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", LOSSES)
def test_accelerate_saves_and_loads(name, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, other = trained(name), Classifier(name)
    criterion = LOSSES[name]()
    loss_of(criterion, *problem())
    expected = copy.deepcopy((model.state_dict(), criterion.state_dict()))
    accelerator.prepare(model)
    accelerator.register_for_checkpointing(criterion)
    accelerator.save_state(str(tmp_path / "state"))
    model.load_state_dict(other.state_dict())
    loss_of(criterion, *problem(1))
    accelerator.load_state(str(tmp_path / "state"))
    assert_same_state(model.state_dict(), expected[0])
    assert_same_state(criterion.state_dict(), expected[1])


SCHEDULES = {
    "warmup": lambda: classfair.Warmup(LOSSES["ldam"](), epochs=3),
    "deferred": lambda: classfair.DeferredReweighting(LOSSES["focal"](), COUNTS, start=2),
    "ramp": lambda: classfair.ISDARamp(LOSSES["isda"](), epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_states_of_schedules_are_numbers_and_tensors(name, tmp_path):
    schedule, again = SCHEDULES[name](), SCHEDULES[name]()
    schedule.step()
    state = schedule.state_dict()
    assert all(type(value) in (int, float, torch.Tensor) for value in state.values())
    torch.save(state, tmp_path / "schedule.pt")
    again.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    assert_same_state(again.criterion.state_dict(), schedule.criterion.state_dict())


def test_a_warmup_loads_the_state_of_older_versions():
    """Its vectors were a dictionary in the state."""
    schedule, again = SCHEDULES["warmup"](), SCHEDULES["warmup"]()
    schedule.step()
    state = schedule.state_dict()
    again.load_state_dict({"last_epoch": 1, "epochs": 3, "full": {"margin": state["margin"]}})
    assert_same_state(again.criterion.state_dict(), schedule.criterion.state_dict())


def as_once(state):
    """A state as the first version had it: a dictionary among the tensors, and what came later missing."""
    updates = int(state.pop("updates"))
    for key in ("largest", "distances", "statistics.mean_error", "statistics.cov_error"):
        state.pop(key, None)
    state["_extra_state"] = {"updates": updates}
    return state


@pytest.mark.parametrize("prefix", ["", "criterion."])
@pytest.mark.parametrize("name", WITH_STATE)
def test_states_of_older_versions_load(name, prefix):
    model, again = trained(name), Classifier(name)
    old = as_once(copy.deepcopy(model.criterion.state_dict()))
    if prefix:
        rest = {key: value for key, value in model.state_dict().items() if not key.startswith(prefix)}
        again.load_state_dict({prefix + key: value for key, value in old.items()} | rest)
    else:
        again.criterion.load_state_dict(old)
    assert again.criterion.updates == 3
    assert again.criterion.updates.dtype == torch.int64
    assert torch.equal(again.criterion.statistics.cov, model.criterion.statistics.cov)
    if "metalad" in name:
        assert torch.equal(again.criterion.mean_distance, model.criterion.mean_distance)
    again, model = again.criterion, model.criterion
    assert torch.equal(loss_of(again, *problem(), update=False), loss_of(model, *problem(), update=False))
    loss_of(again, *problem())  # and goes on


@pytest.fixture
def narrow_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


STATES = {
    **{name: make().state_dict() for name, make in LOSSES.items()},
    **{name: make().state_dict() for name, make in SCHEDULES.items()},
    "fractions": classfair.LogitAdjustedLoss([0.7003, 0.2001, 0.0996]).state_dict(),
    "statistics": classfair.ClassStatistics(C, D, "full").state_dict(),
}


@pytest.mark.parametrize("name", STATES)
def test_a_narrow_default_dtype_rounds_no_state(name, narrow_default):
    make = {
        **LOSSES,
        **SCHEDULES,
        "fractions": lambda: classfair.LogitAdjustedLoss([0.7003, 0.2001, 0.0996]),
        "statistics": lambda: classfair.ClassStatistics(C, D, "full"),
    }[name]
    for key, value in make().state_dict().items():
        wanted = STATES[name][key]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(wanted)), key
        assert getattr(value, "dtype", None) == getattr(wanted, "dtype", None), key


@pytest.mark.parametrize("name", LOSSES)
def test_a_narrow_default_dtype_changes_no_training(name, request):
    expected = LOSSES[name]()
    losses = [loss_of(expected, *problem(seed)).detach() for seed in range(2)]
    arguments = [problem(seed) for seed in range(2)]
    request.getfixturevalue("narrow_default")
    criterion = LOSSES[name]()
    assert all(torch.equal(loss_of(criterion, *a), loss) for a, loss in zip(arguments, losses, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_state(criterion.state_dict(), expected.state_dict())


def test_a_narrow_default_dtype_rounds_no_number_of_pairs(request):
    mean = torch.randn(61, D, generator=torch.Generator().manual_seed(0))
    expected = classfair.mean_class_distance(mean)
    request.getfixturevalue("narrow_default")
    assert torch.equal(classfair.mean_class_distance(mean), expected)
