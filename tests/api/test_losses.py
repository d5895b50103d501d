"""Loss modules, their vectors, denominators, and class counts."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from classfair import (
    ClassBalancedLoss,
    CrossEntropyLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    MixedTarget,
    class_counts,
    cross_entropy,
)

COUNTS = [80, 15, 5]
WEIGHT = torch.tensor([0.5, 1.0, 2.0])
#: One of each that does something in training.
LOSSES = {
    "LogitAdjustedLoss": lambda **k: LogitAdjustedLoss(COUNTS, **k),
    "LDAMLoss": lambda **k: LDAMLoss(COUNTS, scale=4.0, **k),
    "ClassBalancedLoss": lambda **k: ClassBalancedLoss(COUNTS, beta=0.99, gamma=1.0, **k),
    "FocalLoss": lambda **k: FocalLoss(2.0, **k),
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=g, requires_grad=True), torch.randint(0, 3, (12,), generator=g)


def test_training_loss_is_cross_entropy_of_adjusted_logits(batch):
    logits, target = batch
    loss = LogitAdjustedLoss(COUNTS, tau=0.7)(logits, target)
    expected = F.cross_entropy(logits + 0.7 * torch.tensor(COUNTS).div(100).log(), target)
    torch.testing.assert_close(loss, expected)


def test_balanced_counts_change_nothing(batch):
    logits, target = batch
    torch.testing.assert_close(LogitAdjustedLoss([7, 7, 7])(logits, target), F.cross_entropy(logits, target))


@each_loss
@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
def test_evaluation_is_plain_cross_entropy_and_leaves_the_state(batch, make, mode):
    logits, target = batch
    criterion = make(weight=WEIGHT)
    before = copy.deepcopy(criterion.state_dict())
    assert not torch.allclose(criterion(logits, target), F.cross_entropy(logits, target, WEIGHT))
    if mode == "eval":
        loss, stats = criterion.eval().with_stats(logits, target)
        total = criterion.total_weight(target)
    else:
        with getattr(torch, mode)():
            loss, stats = criterion.with_stats(logits.detach(), target)
            total = criterion.total_weight(target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, WEIGHT))
    assert torch.equal(total, WEIGHT[target].sum())
    torch.testing.assert_close(stats.mass.sum(0), logits.softmax(1).sum(0))
    assert all(torch.equal(before[k], v) for k, v in criterion.state_dict().items())


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


@each_loss
def test_losses_have_no_parameters_and_state_keeps_its_precision(batch, make):
    criterion = make(weight=torch.tensor([1.0, 1 / 3, 0.1]))
    assert list(criterion.parameters()) == []
    before = copy.deepcopy(criterion.state_dict())
    for moved in (criterion.half(), criterion.to(torch.bfloat16)):
        for name, value in moved.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])
    assert all(v.dtype == torch.float64 for v in make(weight=WEIGHT).double().state_dict().values())


@pytest.mark.parametrize("name", LOSSES)
def test_state_loads_into_a_loss_of_other_counts(batch, name):
    logits, target = batch
    criterion = LOSSES[name](weight=WEIGHT)
    other = type(criterion)(3.0) if name == "FocalLoss" else type(criterion)([1, 1, 1])
    other.gamma = criterion.gamma
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(logits, target), criterion(logits, target))


@each_loss
def test_gradient(make):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 3, (2, 5), generator=g)
    criterion = make(label_smoothing=0.1).double()
    assert torch.autograd.gradcheck(lambda z: criterion(z, y[0]), logits)
    assert torch.autograd.gradcheck(lambda z: criterion(z, MixedTarget(y[0], y[1], 0.3)), logits)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_keywords_reach_the_loss(batch, make, reduction):
    logits, target = batch
    criterion = make(weight=WEIGHT, ignore_index=1, reduction=reduction, label_smoothing=0.2, backend="reference")
    reweight = WEIGHT if criterion.reweight is None else WEIGHT * criterion.reweight
    expected = cross_entropy(
        logits,
        target,
        offset=criterion.offset,
        margin=criterion.margin,
        weight=reweight,
        gamma=criterion.gamma,
        ignore_index=1,
        reduction=reduction,
        label_smoothing=0.2,
        backend="reference",
    )
    assert torch.equal(criterion(logits, target), expected)


# ---- LDAM


def test_ldam_subtracts_from_cosines_and_scales_after():
    """Cao et al., section 3.2: s (cos - m) at the true class; not s cos - m, as without the scale."""
    g = torch.Generator().manual_seed(2)
    features, rows = torch.randn(12, 7, generator=g), torch.randn(3, 7, generator=g)
    target = torch.randint(0, 3, (12,), generator=g)
    cosine = F.normalize(features) @ F.normalize(rows).T
    margins = np.array([0.5 * (5 / n) ** 0.25 for n in COUNTS])
    adjusted = cosine.clone()
    for n, y in enumerate(target.tolist()):
        adjusted[n, y] -= float(margins[y])
    got = LDAMLoss(COUNTS)((30 * cosine).requires_grad_(), target)
    torch.testing.assert_close(got, F.cross_entropy(30 * adjusted, target), rtol=1e-5, atol=1e-5)


# ---- Class-balanced weights and focal loss


def by_hand(logits, target, weight, gamma):
    """Mean over the weights of w (1 - p)^gamma (-log p), sample by sample."""
    total = denominator = 0.0
    for z, y in zip(logits.tolist(), target.tolist(), strict=True):
        p = math.exp(z[y]) / sum(map(math.exp, z))
        total += weight[y] * (1 - p) ** gamma * -math.log(p)
        denominator += weight[y]
    return total / denominator


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_class_balanced_loss(batch, gamma):
    """The weight is outside of the focal term (LDAM-DRW's code has it inside: p = exp(-w * nll))."""
    logits, target = batch
    own = [1 / (1 - 0.99**n) for n in COUNTS]  # up to a factor, which the mean does not see
    user = WEIGHT.tolist()
    got = ClassBalancedLoss(COUNTS, beta=0.99, gamma=gamma)(logits, target).item()
    assert got == pytest.approx(by_hand(logits, target, own, gamma), rel=1e-5)
    got = ClassBalancedLoss(COUNTS, beta=0.99, gamma=gamma, weight=WEIGHT)(logits, target).item()
    assert got == pytest.approx(
        by_hand(logits, target, [a * b for a, b in zip(own, user, strict=True)], gamma), rel=1e-5
    )


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_focal_loss(batch, weight):
    logits, target = batch
    expected = by_hand(logits, target, [1.0] * 3 if weight is None else weight.tolist(), 2.0)
    assert FocalLoss(weight=weight)(logits, target).item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(FocalLoss(0.0, weight=weight)(logits, target), F.cross_entropy(logits, target, weight))


# ---- State of the optional weights


def states(weight, reweight):
    criterion = CrossEntropyLoss(weight)
    criterion.put("reweight", reweight)
    return criterion


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("saved", "here"), list(itertools.product(itertools.product([None, WEIGHT], repeat=2), repeat=2))
)
def test_weights_load_as_they_were_saved(batch, tmp_path, saved, here, nested):
    saving, loading = states(*saved), states(*(None if h is None else h + 1 for h in here))
    wrap = torch.nn.Sequential if nested else (lambda m: m)
    torch.save(wrap(saving).state_dict(), tmp_path / "state.pt")
    wrap(loading).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, expected in zip(("weight", "reweight"), saved, strict=True):
        got = getattr(loading, name)
        assert (got is None) if expected is None else torch.equal(got, expected)
    logits, target = batch
    assert torch.equal(loading(logits, target), saving(logits, target))


def test_a_state_without_the_loss_takes_no_weights_away():
    criterion = states(WEIGHT, WEIGHT)
    model = torch.nn.ModuleDict({"criterion": criterion, "head": torch.nn.Linear(2, 3)})
    head = {k: v for k, v in model.state_dict().items() if k.startswith("head")}
    model.load_state_dict(head, strict=False)
    assert criterion.weight is not None
    assert criterion.reweight is not None
    with pytest.raises(RuntimeError, match=r"Missing key.*criterion.weight"):
        model.load_state_dict(head)


def test_the_state_of_another_loss_is_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*margin"):
        LDAMLoss(COUNTS).load_state_dict(LogitAdjustedLoss(COUNTS).state_dict())


def test_new_weights_are_made_on_the_device_of_the_loss():
    criterion = CrossEntropyLoss().to("meta")
    criterion.put("reweight", WEIGHT)
    assert criterion.reweight.device.type == "meta"
    other = CrossEntropyLoss().to("meta")
    with pytest.warns(UserWarning, match="no-op"):
        other.load_state_dict(states(WEIGHT, None).state_dict())
    assert other.weight.device.type == "meta"


def test_weights_are_set_in_place():
    criterion, mine = CrossEntropyLoss(), WEIGHT.clone()
    criterion.put("reweight", mine)
    held = criterion.reweight
    criterion.put("reweight", WEIGHT + 1)
    assert criterion.reweight is held
    assert torch.equal(held, WEIGHT + 1)
    assert torch.equal(mine, WEIGHT)  # the caller's tensor is not the buffer


@each_loss
def test_accumulated_micro_batches_are_one_batch(batch, make):
    logits, target = batch
    expected = torch.autograd.grad(make(weight=WEIGHT)(logits, target), logits)[0]
    criterion = make(weight=WEIGHT, reduction="sum")
    total = criterion.total_weight(target)
    got = torch.zeros_like(expected)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        got += torch.autograd.grad(criterion(logits[part], target[part]) / total, logits)[0]
    torch.testing.assert_close(got, expected)


# ---- Wrong arguments

BAD = [
    (lambda: LDAMLoss(COUNTS, scale=0), ValueError, r"LDAMLoss: expected finite scale > 0, got 0"),
    (lambda: LDAMLoss(COUNTS, scale=math.inf), ValueError, r"LDAMLoss: expected finite scale > 0, got inf"),
    (lambda: ClassBalancedLoss(COUNTS, -0.1), ValueError, r"expected beta in \[0, 1\), got -0.1"),
    (lambda: ClassBalancedLoss(COUNTS, gamma=-1), ValueError, r"ClassBalancedLoss: expected gamma >= 0, got -1"),
    (lambda: FocalLoss(-1), ValueError, r"FocalLoss: expected gamma >= 0, got -1"),
    (lambda: FocalLoss(WEIGHT), TypeError, r"FocalLoss: expected gamma as a number, got Tensor"),
    (lambda: FocalLoss(label_smoothing=2), ValueError, r"FocalLoss: expected label_smoothing in \[0, 1\], got 2"),
    (lambda: FocalLoss(reduction="avg"), ValueError, r"FocalLoss: expected reduction 'none', 'mean' or 'sum'"),
    (lambda: CrossEntropyLoss([1.0]), TypeError, r"CrossEntropyLoss: expected weight as a floating tensor, got list"),
    (lambda: CrossEntropyLoss(WEIGHT[None]), ValueError, r"expected weight of shape \(3,\), got \(1, 3\)"),
    (
        lambda: ClassBalancedLoss([1, 2], weight=WEIGHT),
        ValueError,
        r"ClassBalancedLoss: expected reweight of the shape of weight, \(3,\), got \(2,\)",
    ),
    (lambda: LogitAdjustedLoss([1, 2], weight=WEIGHT), ValueError, r"expected offset of the shape of weight"),
    (lambda: LogitAdjustedLoss(COUNTS, "1"), TypeError, r"logit_adjustment: expected tau as a number, got str"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match[:60] for _, _, match in BAD])
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- Class counts


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
        _Labelled(targets=[5, 7, 7, 6, 7], target_transform=lambda label: label - 5),
        _Labelled(targets=torch.tensor([5, 7, 7, 6, 7]), target_transform={5: 0, 6: 1, 7: 2}.get),
        Subset(
            _Labelled(labels=np.array([7, 9, 5, 7, 7, 6]), target_transform=lambda y: torch.tensor(y - 5)),
            [0, 2, 3, 4, 5],
        ),
        ConcatDataset([_Labelled(targets=[0, 2, 2]), _Labelled(targets=torch.tensor([1, 2]))]),
    ],
    ids=[
        "list",
        "uint8",
        "int32",
        "targets",
        "labels",
        "TensorDataset",
        "Subset",
        "moved",
        "mapped",
        "moved subset",
        "ConcatDataset",
    ],
)
def test_class_counts(source):
    assert class_counts(source, 4).tolist() == [1, 1, 3, 0]


def test_class_counts_of_nothing():
    assert class_counts([], 2).tolist() == [0, 0]
