"""``total_weight`` is the denominator of ``reduction="mean"``, for every kind of target."""

import pytest
import torch

from classfair import MixedTarget, cross_entropy, total_weight
from classfair.targets import flat_mixture, major_first, major_label

WEIGHT = torch.tensor([0.5, 1.0, 2.0])
EIGHTHS = torch.tensor([0.0, 0.125, 0.5, 0.75, 1.0, 0.375])  # every sum is exact, in any order
SIX = torch.tensor([0, 2, 1, -100, -100, 2])
KINDS = {
    "labels": SIX,
    "mixed": MixedTarget(SIX, SIX.roll(1), EIGHTHS),
    "mixed number": MixedTarget(SIX, SIX.roll(2), 0.25),
    "probabilities": torch.rand(6, 3, generator=torch.Generator().manual_seed(3)),
}


EXTRA = [{}, {"label_smoothing": 0.3}, {"gamma": 2.0}, {"margin": WEIGHT}]
ACCEPTED = [
    (kind, extra, ignore_index)
    for kind in KINDS
    for extra in EXTRA
    for ignore_index in (-100, 2)
    if kind != "probabilities" or (ignore_index < 0 and not {"gamma", "margin"} & set(extra))
]


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize(("kind", "extra", "ignore_index"), ACCEPTED)
def test_it_is_what_the_mean_divides_by(kind, weight, extra, ignore_index):
    g = torch.Generator().manual_seed(4)
    target = KINDS[kind]
    if ignore_index >= 0:
        y = [y.clamp_min(0) for y in (target[:2] if isinstance(target, MixedTarget) else (target,))]
        target = MixedTarget(*y, target.lam) if isinstance(target, MixedTarget) else y[0]
    for dtype in (torch.float32, torch.float64):
        logits, w = torch.randn(6, 3, generator=g, dtype=dtype), None if weight is None else weight.to(dtype)
        keywords = {"weight": w, "ignore_index": ignore_index}
        total = total_weight(target, **keywords)
        assert total.shape == ()
        assert total.dtype == (torch.float32 if w is None else dtype)
        extra = {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in extra.items()}
        mean = cross_entropy(logits, target, **keywords, **extra)
        assert torch.equal(cross_entropy(logits, target, reduction="sum", **keywords, **extra) / total, mean)
        assert bool(mean.isfinite())


def test_total_weight_of_many_pixels():
    g = torch.Generator().manual_seed(5)
    weight, lam = torch.rand(4, generator=g), torch.rand(50, generator=g)
    y = torch.randint(0, 4, (2, 50, 9, 5), generator=g)
    y[:, ::7, 3] = -100
    logits = torch.randn(50, 4, 9, 5, generator=g)
    for target in (y[0], MixedTarget(y[0], y[1], lam), logits.softmax(1)):
        mean = cross_entropy(logits, target, weight=weight)
        total = total_weight(target, weight=weight)
        assert torch.equal(cross_entropy(logits, target, weight=weight, reduction="sum") / total, mean)
    assert total == 50 * 9 * 5
    assert total_weight(logits[0, :, 0, 0].softmax(0)) == 1
    assert total_weight(torch.tensor(2)) == 1


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_invalid_labels_are_outside_of_the_total(ignore_index):
    target = torch.tensor([0, 7, -3, 1, 2])
    kept = [0, 2] if ignore_index == 1 else [0, 1, 2]
    assert total_weight(target, weight=WEIGHT, ignore_index=ignore_index) == WEIGHT[kept].sum()
    assert total_weight(target, num_classes=3, ignore_index=ignore_index) == len(kept)
    # An invalid label takes the other share of its sample with it, as in the loss; an ignored one does not.
    mixed = MixedTarget(torch.tensor([0, 9, -100]), torch.tensor([1, 1, 2]), 0.25)
    assert total_weight(mixed, weight=WEIGHT) == 0.25 * WEIGHT[0] + 0.75 * WEIGHT[1] + 0.75 * WEIGHT[2]


def test_total_weight_reads_nothing():
    """A meta tensor has no values to read: what needs one raises."""
    y = SIX.to("meta")
    for target in (y, MixedTarget(y, y, torch.rand(6, device="meta")), torch.rand(6, 3, device="meta")):
        assert total_weight(target, weight=WEIGHT.to("meta")).device.type == "meta"


def test_totals_of_empty_and_ignored_batches_are_zero():
    for target in (SIX[:0], SIX[3:5], MixedTarget(SIX[:0], SIX[:0], 0.5), torch.rand(0, 3)):
        assert total_weight(target) == 0


@pytest.mark.parametrize("lam", [0.25, 0.5, torch.tensor([0.25, 0.5]), torch.tensor([[[0.25]], [[0.5]]])])
def test_one_place_turns_lam_into_shares_and_a_major_label(lam):
    y = torch.arange(12).view(2, 2, 3)
    flat = flat_mixture("f", MixedTarget(y, y + 100, lam), y.shape, torch.float64)
    first, second = (lam, lam) if isinstance(lam, float) else (0.25, 0.5)
    assert flat.lam.tolist() == [first] * 6 + [second] * 6
    swapped = torch.tensor([share < 0.5 for share in flat.lam.tolist()])
    expected = torch.where(swapped, flat.y_b, flat.y_a)
    assert torch.equal(major_label(flat), expected)
    ordered, swap = major_first(flat)
    assert torch.equal(swap, swapped)
    assert torch.equal(ordered.y_a, expected)
    assert torch.equal(ordered.y_b + ordered.y_a, flat.y_a + flat.y_b)
    assert torch.equal(ordered.lam, torch.where(swapped, 0.75, flat.lam))
    assert major_label(y) is y
    if isinstance(lam, float):
        assert torch.equal(major_label(MixedTarget(y, y + 100, lam)).reshape(-1), expected)


BAD = [
    (lambda: total_weight([0]), TypeError, r"total_weight: expected target as a tensor, got list"),
    (lambda: total_weight(SIX.int()), TypeError, r"total_weight: expected target of dtype torch.int64"),
    (lambda: total_weight(SIX, weight=WEIGHT.long()), TypeError, r"total_weight: expected weight as a floating"),
    (lambda: total_weight(SIX, weight=WEIGHT[None]), ValueError, r"total_weight: expected weight of shape \(3,\)"),
    (lambda: total_weight(MixedTarget(SIX, SIX[:2], 0.5)), ValueError, r"expected target.y_b of shape \(6,\)"),
    (lambda: total_weight(MixedTarget(0, SIX, 0.5)), TypeError, r"expected target.y_a as a tensor, got int"),
    (lambda: total_weight(MixedTarget(SIX, SIX, 1.5)), ValueError, r"expected target.lam in \[0, 1\], got 1.5"),
    (
        lambda: total_weight(MixedTarget(SIX, SIX, EIGHTHS.clone().requires_grad_())),
        ValueError,
        r"total_weight: expected target.lam without gradient",
    ),
    (
        lambda: total_weight(MixedTarget(SIX, SIX, WEIGHT)),
        ValueError,
        r"total_weight: expected target.lam that broadcasts to \(6,\), got \(3,\)",
    ),
    (
        lambda: total_weight(SIX, weight=WEIGHT.to("meta")),
        ValueError,
        r"total_weight: expected weight on the device of the target, got meta",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match[:60] for _, _, match in BAD])
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
