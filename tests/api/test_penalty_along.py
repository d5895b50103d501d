"""A loss that takes a penalty along is the loss plus the penalty, whichever way it is computed."""

from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import classfair
from classfair import (
    MixedTarget,
    backends,
    cross_entropy_with_stats,
    demographic_parity_loss,
    equalized_odds_loss,
    iou_loss,
)
from tests.support.conformance import Corrupt

native_only = pytest.mark.skipif(
    "native" not in backends.available("softmax_loss", "cpu"), reason="no compiled CPU kernels"
)
WEIGHT = 3.0
#: Of the group penalties those that the loss's own operator computes, and others, which it calls.
CARRIED = {
    "dp-l2": demographic_parity_loss,
    "dp-mi": partial(demographic_parity_loss, kind="mi"),
    "eo-l2": equalized_odds_loss,
    "eo-mi-weighted": partial(equalized_odds_loss, kind="mi", weighted=True),
    "iou": iou_loss,
}
CALLED = {
    "iou-paired": partial(iou_loss, paired=True),
    "dp-zero": partial(demographic_parity_loss, empty="zero"),
    "own": lambda stats: stats.mass.square().sum(),
}
PENALTIES = CARRIED | CALLED


def batch(rows=60, classes=4, groups=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(rows)
    logits = (2 * torch.randn(rows, classes, generator=g, dtype=dtype)).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=g)
    target[::7] = -100
    options = {"group": torch.randint(-1, groups, (rows,), generator=g), "num_groups": groups}
    return logits, target, options


def both_ways(penalty, logits, target, *, joint=True, **options):
    """(loss, statistics) with the penalty taken along, and added afterwards."""
    taken = cross_entropy_with_stats(logits, target, joint=joint, penalty=penalty, penalty_weight=WEIGHT, **options)
    loss, stats = cross_entropy_with_stats(logits, target, joint=joint, **options)
    return taken, (loss + WEIGHT * penalty(stats), stats)


VARIANTS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "offset": {"offset": torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()},
    "weight": {"weight": torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64), "label_smoothing": 0.1},
    "contested": {"joint": "contested"},
    "reference": {"backend": "reference"},
}


def check(penalty, logits, target, **options):
    """With the operator that computes all at once against the one that returns single rows."""
    taken, stats = cross_entropy_with_stats(logits, target, penalty=penalty, penalty_weight=WEIGHT, **options)
    reduction = options.pop("reduction", "mean")
    rows, same = cross_entropy_with_stats(logits, target, reduction="none", **options)
    total = classfair.total_weight(target, weight=options.get("weight")) if reduction == "mean" else 1
    added = rows.sum() / total + WEIGHT * penalty(same)
    torch.testing.assert_close(taken, added)
    for field in ("mass", "hit", "count", "correct", "predicted", "prediction", "nonfinite"):
        torch.testing.assert_close(getattr(stats, field), getattr(same, field), rtol=0, atol=0)
    torch.testing.assert_close(stats.joint.rows, same.joint.rows, rtol=0, atol=0)
    leaves = [logits, *(v for v in options.values() if isinstance(v, torch.Tensor) and v.requires_grad)]
    for found, expected in zip(torch.autograd.grad(taken, leaves), torch.autograd.grad(added, leaves), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PENALTIES)
def test_is_the_loss_plus_the_penalty(name, variant):
    logits, target, options = batch()
    check(PENALTIES[name], logits, target, **{"joint": True} | options | VARIANTS[variant])


#: All of the pass but the losses of single rows, which are not looked at; of the penalty; of the backward.
OUTPUTS = [
    *(("softmax_loss_fwd", i) for i in range(1, 10)),
    *(("iou_penalty", i) for i in range(3)),
    *(("softmax_loss_bwd", i) for i in range(4)),
]


def check_against_the_oracle(penalty, logits, target, **options):
    """Loss, statistics and gradients of the fused pass against plain torch and its autograd."""
    leaves = [logits, *(v for v in options.values() if isinstance(v, torch.Tensor) and v.requires_grad)]
    found = []
    for backend in ("native", "reference"):
        taken, stats = cross_entropy_with_stats(
            logits, target, penalty=penalty, penalty_weight=WEIGHT, backend=backend, **options
        )
        tables = [getattr(stats, n) for n in ("mass", "hit", "count", "correct", "predicted", "prediction")]
        found.append([taken, *tables, stats.joint.rows, *torch.autograd.grad(taken, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@native_only
@pytest.mark.parametrize(("operator", "output"), OUTPUTS)
def test_a_corrupted_result_is_caught(operator, output, monkeypatch):
    logits, target, options = batch()
    g = torch.Generator().manual_seed(0)
    perturbation = {"offset": (4,), "margin": (4,), "pair": (4, 4)}
    options |= {k: torch.rand(*s, generator=g, dtype=torch.float64).requires_grad_() for k, s in perturbation.items()}
    target[0], options["group"][0] = 0, 0  # the first row counts
    check_against_the_oracle(iou_loss, logits, target, joint=True, **options)
    real = backends.namespace
    monkeypatch.setattr(backends, "namespace", lambda name: Corrupt(real(name), operator, output, lambda v: v + 1))
    with pytest.raises(AssertionError):
        check_against_the_oracle(iou_loss, logits, target, joint=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CARRIED)
def test_other_dtypes_many_classes(name, dtype):
    logits, target, options = batch(80, 300, 4, dtype)
    (taken, _), (added, _) = both_ways(CARRIED[name], logits, target, **options)
    torch.testing.assert_close(taken, added)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (taken, added)))


@native_only
@pytest.mark.parametrize("name", CARRIED)
def test_it_is_one_autograd_node_where_it_can_be(name):
    logits, target, options = batch()
    (taken, _), (added, _) = both_ways(CARRIED[name], logits, target, **options)
    assert "SoftmaxLoss" in taken.grad_fn.name()
    assert added.grad_fn.name() == "AddBackward0"
    (called, _), _ = both_ways(CALLED["iou-paired"], logits, target, **options)
    assert called.grad_fn.name() == "AddBackward0"


@pytest.mark.parametrize("name", CARRIED)
def test_every_order(name):
    logits, target, options = batch(12, 3, 2)

    def loss(z, offset):
        return both_ways(CARRIED[name], z, target, offset=offset, **options)[0][0]

    inputs = (logits, torch.randn(3, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("name", CARRIED)
def test_statistics_have_a_gradient_of_their_own_besides(name):
    """The loss's, the penalty's and another one's, together, alone, twice from one graph and as a batch."""
    logits, target, options = batch()
    (taken, stats), (added, same) = both_ways(CARRIED[name], logits, target, **options)

    def gradient(loss, stats, a, b, c):
        total = a * loss + b * stats.mass[0].square().sum() + c * stats.joint.rows[1].sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    for factors in [(2.0, 3.0, 5.0), (2.0, 0.0, 0.0), (0.0, 3.0, 5.0), (2.0, 3.0, 5.0)]:
        torch.testing.assert_close(gradient(taken, stats, *factors), gradient(added, same, *factors))
    (found,) = torch.autograd.grad(stats.hit.sum(), logits, retain_graph=True)  # not of the loss at all
    torch.testing.assert_close(found, torch.autograd.grad(same.hit.sum(), logits, retain_graph=True)[0])
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (rows,) = torch.autograd.grad(taken, logits, upstream, is_grads_batched=True)
    torch.testing.assert_close(rows[1], gradient(added, same, -2.0, 0.0, 0.0))


@pytest.mark.parametrize("name", ["iou", "eo-l2", "own"])
def test_targets_of_two_passes_and_of_probabilities(name):
    logits, target, options = batch()
    target = target.clamp_min(0)
    mixed = MixedTarget(target, target.roll(1), 0.7)
    pair = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = target.new_zeros(60, 4).scatter(1, target[:, None], 1).double().requires_grad_()
    for given, more in ((mixed, {}), (mixed, {"pair": pair}), (dense, {"label": target})):
        (taken, _), (added, _) = both_ways(PENALTIES[name], logits, given, **options, **more)
        torch.testing.assert_close(taken, added)
        leaves = [logits, *([given] if given is dense else [])]
        for a, b in zip(torch.autograd.grad(taken, leaves), torch.autograd.grad(added, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_without_gradient():
    logits, target, options = batch()
    for differentiable in (False, True):
        (taken, stats), (added, _) = both_ways(iou_loss, logits, target, differentiable=differentiable, **options)
        torch.testing.assert_close(taken, added)
        assert stats.mass.requires_grad == differentiable
        found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (taken, added))
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        (taken, _), (added, _) = both_ways(iou_loss, logits, target, **options)
    torch.testing.assert_close(taken, added)
    assert not taken.requires_grad


def test_empty_batches():
    logits = torch.zeros(0, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for reduction in ("mean", "sum"):
        options = {"group": none, "num_groups": 2, "reduction": reduction}
        (taken, _), (added, _) = both_ways(iou_loss, logits, none, **options)
        torch.testing.assert_close(taken, added, equal_nan=True)  # as torch, the mean of nothing is NaN
        assert torch.autograd.grad(taken, logits)[0].shape == (0, 3)


def test_transforms_and_the_compiler():
    logits, target, options = batch(32, 5, 3, torch.float32)

    def loss(z):
        return both_ways(equalized_odds_loss, z, target, **options)[0][0]

    (expected,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), expected)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits), logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(mode.from_tensor(logits)).shape == ()


def test_every_loss_takes_one():
    logits, target, options = batch(dtype=torch.float32)
    criterion = classfair.LogitAdjustedLoss([9, 5, 2, 1])
    taken, _ = criterion.with_stats(logits, target, **options, penalty=iou_loss, penalty_weight=np.float32(3))
    loss, stats = criterion.with_stats(logits, target, **options)
    torch.testing.assert_close(taken, loss + WEIGHT * iou_loss(stats))
    head = torch.nn.Linear(6, 4)
    features = torch.randn(60, 6)
    isda = classfair.ISDALoss(4, 6)
    taken, _ = isda.with_stats(features, head.weight, target, linear_bias=head.bias, **options, penalty=iou_loss)
    loss, stats = isda.with_stats(features, head.weight, target, linear_bias=head.bias, **options)
    torch.testing.assert_close(taken, loss + iou_loss(stats))


def test_wrong_use_is_an_error_before_any_work():
    logits, target, options = batch()
    wrong = [
        (TypeError, "expected penalty as a function of BatchStats, got str", {"penalty": "iou"}),
        (TypeError, r"expected penalty to return a scalar tensor, got \(3,\)", {"penalty": lambda s: s.mass.sum(1)}),
        (TypeError, "expected penalty to return a scalar tensor, got float", {"penalty": lambda s: 0.0}),
        (ValueError, "expected penalty_weight that is no NaN", {"penalty": iou_loss, "penalty_weight": float("nan")}),
        (
            ValueError,
            "expected group and num_groups with this penalty, got None",
            {"penalty": partial(iou_loss, reduction="mean"), "group": None, "num_groups": None},
        ),
        (TypeError, "expected num_groups as an int, got float", {"num_groups": 2.0}),
        (TypeError, "expected num_groups as an int, got bool", {"num_groups": True}),
        (TypeError, "expected penalty_weight as a number, got str", {"penalty": iou_loss, "penalty_weight": "1"}),
        (
            ValueError,
            "expected reduction 'mean' or 'sum' with penalty, got 'none'",
            {"penalty": iou_loss, "reduction": "none"},
        ),
        (
            ValueError,
            "equalized_odds_loss: expected stats of with_stats\\(..., joint=True\\)",
            {"penalty": equalized_odds_loss},
        ),
        (
            ValueError,
            "demographic_parity_loss: expected kind 'l2' or 'mi', got 'l1'",
            {"penalty": partial(demographic_parity_loss, kind="l1")},
        ),
        (TypeError, "unexpected keyword argument 'weigthed'", {"penalty": partial(iou_loss, weigthed=True)}),
    ]
    for error, message, more in wrong:
        with pytest.raises(error, match=message):
            cross_entropy_with_stats(logits, target, **{**options, **more})
