"""Group penalties against the formulas of the paper in NumPy, in float64 and from single samples."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import classfair
from classfair import (
    backends,
    cross_entropy_with_stats,
    demographic_parity_loss,
    equalized_odds_loss,
    intersection_over_union,
    iou_loss,
)
from tests.support.processes import run_processes

BACKENDS = backends.available("penalties", "cpu")


def batch(rows=60, classes=4, groups=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=g, dtype=dtype)
    target = torch.randint(0, classes, (rows,), generator=g)
    return logits, target, torch.randint(-1, groups, (rows,), generator=g)


def statistics(logits, target, group, groups=3, *, joint=True, **options):
    return cross_entropy_with_stats(logits, target, group=group, num_groups=groups, joint=joint, **options)[1]


def probabilities(logits, target, group):
    """p, labels and groups of the samples that are in a group, as NumPy arrays."""
    z = logits.detach().double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    placed = group.numpy() >= 0
    return p[placed], target.numpy()[placed], group.numpy()[placed]


def entropy(p):
    return -sum(v * math.log(v) for v in np.ravel(p) if v > 0)


def expected_dp(p, y, s, kind):
    present = sorted(set(s.tolist()))
    if kind == "l2":
        return sum(((p[s == b].mean(0) - p.mean(0)) ** 2).sum() for b in present)
    joint = np.stack([p[s == b].sum(0) / len(p) for b in present])
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)


def expected_eo(p, y, s, kind, weighted=False):
    total = 0.0
    for label in sorted(set(y.tolist())):
        own = y == label
        share = own.mean() if weighted else 1.0
        total += share * expected_dp(p[own], y[own], s[own], kind)
    return total


def iou(p, y, classes):
    """Mean over the classes with a true sample: eq. 10 of the paper without its 0 / 0."""
    values = []
    for a in classes:
        intersection = p[y == a, a].sum()
        values.append(intersection / (p[:, a].sum() + (y == a).sum() - intersection))
    return np.mean(values)


def group_ious(p, y, s):
    every = [iou(p[s == b], y[s == b], sorted(set(y[s == b].tolist()))) for b in sorted(set(s.tolist()))]
    # The overall value sums intersections and unions over groups.
    return every, iou(p, y, sorted(set(y.tolist())))


PENALTIES = {
    "dp-l2": (demographic_parity_loss, lambda *x: expected_dp(*x, "l2")),
    "dp-mi": (lambda s, **k: demographic_parity_loss(s, kind="mi", **k), lambda *x: expected_dp(*x, "mi")),
    "eo-l2": (equalized_odds_loss, lambda *x: expected_eo(*x, "l2")),
    "eo-mi": (lambda s, **k: equalized_odds_loss(s, kind="mi", **k), lambda *x: expected_eo(*x, "mi")),
    "eo-cmi": (
        lambda s, **k: equalized_odds_loss(s, kind="mi", weighted=True, **k),
        lambda *x: expected_eo(*x, "mi", weighted=True),
    ),
    "eo-l2-weighted": (
        lambda s, **k: equalized_odds_loss(s, weighted=True, **k),
        lambda *x: expected_eo(*x, "l2", weighted=True),
    ),
    "iou": (
        iou_loss,
        lambda *x: sum((v - group_ious(*x)[1]) ** 2 for v in group_ious(*x)[0]),
    ),
    "iou-mean": (
        lambda s, **k: iou_loss(s, reduction="mean", **k),
        lambda *x: np.mean([(v - group_ious(*x)[1]) ** 2 for v in group_ious(*x)[0]]),
    ),
    "iou-paired": (
        lambda s, **k: iou_loss(s, paired=True, **k),
        lambda *x: np.mean([(a - b) ** 2 for a, b in itertools.combinations(group_ious(*x)[0], 2)]),
    ),
}
OWN = {"dp-l2", "dp-mi"}  # not zero for a perfect classifier whose labels depend on the group


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("shape", [(60, 4, 3), (200, 2, 2), (40, 30, 5), (7, 3, 4)])
def test_values_from_single_samples(name, shape, backend):
    """Few samples of many classes and groups leave cells, classes and groups without any."""
    rows, classes, groups = shape
    logits, target, group = batch(rows, classes, groups)
    penalty, expected = PENALTIES[name]
    found = penalty(statistics(logits, target, group, groups), backend=backend)
    assert found.item() == pytest.approx(expected(*probabilities(logits, target, group)), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_against_differences_of_the_formula(name):
    logits, target, group = batch(12, 3, 2)
    penalty, expected = PENALTIES[name]
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(statistics(logits, target, group, 2)), logits)
    step = 1e-6
    for i, c in itertools.product(range(12), range(3)):
        with torch.no_grad():
            moved = [logits.clone(), logits.clone()]
            moved[0][i, c] += step
            moved[1][i, c] -= step
        high, low = (expected(*probabilities(z, target, group)) for z in moved)
        assert gradient[i, c].item() == pytest.approx((high - low) / (2 * step), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PENALTIES)
def test_first_and_second_derivatives(name, backend):
    logits, target, group = batch(9, 3, 2)
    logits.requires_grad_()

    def penalty(z):
        return PENALTIES[name][0](statistics(z, target, group, 2), backend=backend)

    assert torch.autograd.gradcheck(penalty, logits)
    assert torch.autograd.gradgradcheck(penalty, logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_perfect_classifier_costs_exactly_nothing(name, groups, backend):
    """p exactly one-hot, whatever classes and cells the batch lacks; the gradient is finite and 0."""
    _, target, group = batch(50, 6, groups)
    logits = torch.where(torch.nn.functional.one_hot(target, 6) > 0, 0.0, -1e4).requires_grad_()
    value = PENALTIES[name][0](statistics(logits, target, group, groups), backend=backend)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    if name not in OWN or groups == 1:
        assert value.item() == 0.0
    else:
        assert value.item() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iou", "eo-l2", "eo-mi"])
def test_more_samples_than_a_float_can_count(name):
    """Pixels are samples: a running sum in float32 would stop at 2^24, and a perfect classifier would pay for it."""
    rows = 2**24 + 5000
    logits = torch.tensor([[0.0, -1e4]]).expand(rows, 2)
    group = (torch.arange(rows) % 4000 == 0).long()
    stats = statistics(logits, torch.zeros(rows, dtype=torch.int64), group, 2)
    assert stats.hit[0, 0].item() == stats.count[0, 0].item() > 2**24
    assert PENALTIES[name][0](stats).item() == 0


@pytest.mark.parametrize("name", ["iou", "iou-paired"])
def test_squeezing_towards_uniform_hides_the_difference(name):
    """p = a one-hot(argmax) + (1 - a) / C keeps every decision: soft fairness alone says little."""
    logits, target, group = batch(400, 2, 3)
    hard = torch.nn.functional.one_hot(logits.argmax(1), 2).double()
    values, ious = [], []
    for a in (0.99, 0.1, 0.01):
        stats = statistics((a * hard + (1 - a) / 2).log(), target, group)
        values.append(PENALTIES[name][0](stats).item())
        ious.append(intersection_over_union(stats).overall.item())
    assert values[0] > 50 * values[1] > 50 * 50 * values[2]  # it falls as a^2, decisions do not change
    assert ious[2] == pytest.approx(1 / 3, abs=0.02)  # labels are nearly balanced


@pytest.mark.parametrize("kind", ["l2", "mi"])
def test_demographic_parity_with_two_groups_of_hand(kind):
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64).log()
    stats = statistics(logits, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
    mean = np.array([0.5, 0.5])
    l2 = ((np.array([0.7, 0.3]) - mean) ** 2).sum() + ((np.array([0.1, 0.9]) - mean) ** 2).sum()
    mi = 1.4 / 3 * math.log(1.4) + 0.6 / 3 * math.log(0.6) + 0.1 / 3 * math.log(0.2) + 0.9 / 3 * math.log(1.8)
    assert demographic_parity_loss(stats, kind=kind).item() == pytest.approx({"l2": l2, "mi": mi}[kind])


def test_what_is_empty():
    """skip leaves it out; zero is a constant; nan says so."""
    logits, target, group = batch(40, 3, 3)
    missing = torch.where(group == 2, 1, group)  # no sample of group 2
    absent = torch.where(target == 2, 1, target)  # none of class 2
    cell = torch.where((target == 2) & (group == 1), 0, group)  # no sample of class 2 in group 1
    logits.requires_grad_()

    def values(target, group, name):
        stats = statistics(logits, target, group)
        return [PENALTIES[name][0](stats, empty=e).item() for e in ("skip", "zero", "nan")]

    for name in ("dp-l2", "dp-mi", "iou", "eo-l2"):
        skip, zero, nan = values(target, missing, name)
        assert skip > 0
        assert zero == 0
        assert math.isnan(nan)
        full = values(target, group, name)
        assert full[0] == full[2] if "iou" in name else full[0] == full[1] == full[2]
    for name in ("eo-l2", "eo-mi"):
        assert values(absent, group, name)[1] == 0
    assert values(target, cell, "eo-mi")[1] > 0  # 0 log 0: only a label without any sample is undefined
    assert values(target, cell, "eo-l2")[1] == 0
    assert values(target, cell, "dp-l2")[1] > 0
    # An absent class counts as an IoU of 0 in the authors' code, even for a perfect classifier.
    perfect = torch.where(torch.nn.functional.one_hot(target, 3) > 0, 0.0, -1e4)
    stats = statistics(perfect, target, cell)
    assert iou_loss(stats).item() == 0
    assert iou_loss(stats, empty="zero").item() == pytest.approx((2 / 3 - 1) ** 2)
    value = iou_loss(statistics(logits, target, missing), empty="zero")
    assert torch.equal(torch.autograd.grad(value, logits)[0], torch.zeros_like(logits))


@pytest.mark.parametrize("name", PENALTIES)
def test_edges(name):
    """No sample, no group, one class, one group, many classes of which the batch has few: finite, with gradients."""
    for rows, classes, groups in ((0, 3, 2), (5, 3, 2), (5, 1, 2), (5, 3, 1), (20, 1000, 8)):
        logits, target, group = batch(rows, classes, groups, dtype=torch.float32)
        logits.requires_grad_()
        for placed in (group, torch.full_like(group, -1)):
            value = PENALTIES[name][0](statistics(logits, target, placed, groups))
            (gradient,) = torch.autograd.grad(value, logits)
            assert math.isfinite(value.item())
            assert bool(gradient.isfinite().all())


def test_many_classes_stay_small():
    """21 841 classes: what demographic parity and IoU keep is of the size of the statistics."""
    logits, target, group = batch(8, 21841, 4, dtype=torch.float32)
    stats = cross_entropy_with_stats(logits.requires_grad_(), target, group=group, num_groups=4)[1]
    assert stats.joint is None
    for penalty in (demographic_parity_loss, iou_loss):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            value = penalty(stats)
        assert max(saved) <= 4 * 21841
        assert value.item() >= 0


def test_ties_to_the_loss_are_of_one_softmax():
    """A binary head with one logit: the same probability in the loss and in the penalty."""
    z = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    target, group = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    columns = classfair.binary_logits(z)
    loss, stats = cross_entropy_with_stats(columns, target, group=group, num_groups=2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, target.double())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats.mass[:, 1], torch.stack([z[0].sigmoid(), z[1:].sigmoid().sum()]))
    assert torch.equal(classfair.binary_logits(z[:, None]), columns)
    with pytest.raises(ValueError, match=r"binary_logits: expected logit of shape \(N,\) or \(N, 1\), got \(3, 2\)"):
        classfair.binary_logits(columns)
    with pytest.raises(TypeError, match=r"binary_logits: expected logit as a floating tensor, got torch\.int64"):
        classfair.binary_logits(target)


def test_wrong_use_is_an_error_before_any_work():
    logits, target, group = batch()
    stats = statistics(logits, target, group)
    plain = cross_entropy_with_stats(logits, target, group=group, num_groups=3)[1]
    with pytest.raises(ValueError, match=r"equalized_odds_loss: expected stats of with_stats\(..., joint=True\)"):
        equalized_odds_loss(plain)
    for penalty in (demographic_parity_loss, equalized_odds_loss, iou_loss, intersection_over_union):
        with pytest.raises(TypeError, match=f"{penalty.__name__}: expected stats as BatchStats, got Tensor"):
            penalty(stats.mass)
    for penalty in (demographic_parity_loss, equalized_odds_loss):
        with pytest.raises(ValueError, match=f"{penalty.__name__}: expected kind 'l2' or 'mi', got 'l1'"):
            penalty(stats, kind="l1")
    for penalty in (demographic_parity_loss, equalized_odds_loss, iou_loss):
        with pytest.raises(ValueError, match=f"{penalty.__name__}: expected empty 'skip', 'zero' or 'nan', got 'no'"):
            penalty(stats, empty="no")
    with pytest.raises(ValueError, match="iou_loss: expected reduction 'sum' or 'mean', got 'none'"):
        iou_loss(stats, reduction="none")
    with pytest.raises(ValueError, match="iou_loss: expected paired False or True, got 'yes'"):
        iou_loss(stats, paired="yes")
    with pytest.raises(ValueError, match="equalized_odds_loss: expected weighted False or True, got 'none'"):
        equalized_odds_loss(stats, weighted="none")
    with pytest.raises(ValueError, match="expected joint False, True or 'contested', got 'all'"):
        cross_entropy_with_stats(logits, target, joint="all")
    with pytest.raises(ValueError, match="cross_entropy_with_stats: expected group with num_groups=3, got None"):
        cross_entropy_with_stats(logits, target, num_groups=3)


def test_intersection_over_union_hard_and_soft():
    logits, target, group = batch(80, 4, 2)
    p, y, s = probabilities(logits, target, group)
    stats = statistics(logits, target, group, 2)
    by_group, overall = group_ious(p, y, s)
    soft = intersection_over_union(stats)
    np.testing.assert_allclose(soft.by_group, by_group)
    np.testing.assert_allclose(soft.overall, overall)
    by_group, overall = group_ious(np.eye(4)[p.argmax(1)], y, s)
    hard = intersection_over_union(stats, hard=True)
    np.testing.assert_allclose(hard.by_group, by_group)
    np.testing.assert_allclose(hard.overall, overall)
    alone = intersection_over_union(statistics(logits, target, torch.zeros_like(group), 2))
    assert bool(alone.by_group[1].isnan())


def test_prediction_bias():
    logits, target, group = batch(80, 4, 2)
    p, y, s = probabilities(logits, target, group)
    stats = statistics(logits, target, group, 2)
    own = np.eye(4)[y]
    negative, positive = (p * (1 - own)).sum(0), (p * own).sum(0)
    for normalize, scale in {"none": (1, 1), "sum": (negative.sum(), positive.sum()), "samples": (len(p),) * 2}.items():
        bias = classfair.prediction_bias(stats, normalize=normalize)
        np.testing.assert_allclose(bias.negative, negative / scale[0])
        np.testing.assert_allclose(bias.positive, positive / scale[1])
    bias = classfair.prediction_bias(stats, by_group=True)
    np.testing.assert_allclose(bias.negative[1], (p * (1 - own))[s == 1].sum(0))
    with pytest.raises(ValueError, match="prediction_bias: expected normalize 'none', 'sum' or 'samples', got 'max'"):
        classfair.prediction_bias(stats, normalize="max")
    with pytest.raises(TypeError, match="prediction_bias: expected stats as BatchStats, got None"):
        classfair.prediction_bias(None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "classes", "groups"), [(60, 4, 3), (60, 40, 3), (7, 3, 1), (0, 3, 2)])
def test_contested_cells_are_all_that_equalized_odds_needs(rows, classes, groups, backend):
    logits, target, group = batch(rows, classes, groups)
    logits.requires_grad_()
    whole = statistics(logits, target, group, groups, backend=backend)
    stats = statistics(logits, target, group, groups, joint="contested", backend=backend)
    seen = {b: {s.item() for s in group[(target == b) & (group >= 0)]} for b in range(classes)}
    cells = [b * groups + s for b in range(classes) for s in sorted(seen[b]) if len(seen[b]) > 1]
    assert stats.joint.cell.tolist() == cells
    assert stats.joint.num_cells.item() == len(cells)
    used = whole.joint.cell[: whole.joint.num_cells]
    torch.testing.assert_close(stats.joint.rows, whole.joint.rows[torch.searchsorted(used, torch.tensor(cells).long())])
    for options in ({}, {"kind": "mi"}, {"weighted": True}, {"empty": "nan"}):
        values = [equalized_odds_loss(s, backend=backend, **options) for s in (stats, whole)]
        torch.testing.assert_close(*values, equal_nan=True)
        torch.testing.assert_close(*(torch.autograd.grad(v, logits, retain_graph=True)[0] for v in values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_graph_that_is_kept_gives_the_same_gradient_again(name, backend):
    """The first backward may use up what forward saved for it."""
    logits, target, group = batch()
    logits.requires_grad_()
    value = PENALTIES[name][0](statistics(logits, target, group, backend=backend), backend=backend)
    once, twice = (torch.autograd.grad(value, logits, 3 * torch.ones_like(value), retain_graph=True)[0] for _ in "ab")
    assert torch.equal(once, twice)
    (batched,) = torch.autograd.grad(value, logits, torch.tensor([3.0, 6.0]).to(value), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([once, 2 * once]))


@pytest.mark.slow
def test_contested_cells_keep_their_capacity_where_nobody_may_look():
    logits, target, group = batch(20, 9, 2)

    def loss(z, target=target, group=group):
        stats = statistics(z, target, group, 2, joint="contested")
        assert stats.joint.rows.shape[0] == min(20, 9 * 2)
        return equalized_odds_loss(stats)

    expected = torch.func.grad(lambda z: equalized_odds_loss(statistics(z, target, group, 2)))(logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
    z = logits.float().requires_grad_()
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z), z)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    with FakeTensorMode() as mode:
        assert loss(*map(mode.from_tensor, (logits, target, group))).shape == ()


def test_contested_cells_of_two_mixed_labels_are_those_of_the_larger_share():
    logits, y_a, group = batch()
    mixed = classfair.MixedTarget(y_a, y_a.roll(7), torch.linspace(0, 1, 60))
    values = [equalized_odds_loss(statistics(logits, mixed, group, joint=j)) for j in ("contested", True)]
    torch.testing.assert_close(*values)
    assert values[0] > 0


def _rank(rank, splits):
    results = {}
    logits, target, group = batch()
    part = slice(*splits[rank])
    for name, (penalty, _) in PENALTIES.items():
        z = logits[part].clone().requires_grad_()
        stats = statistics(z, target[part], group[part])
        value = penalty(stats)
        (gradient,) = torch.autograd.grad(value, z)
        again = penalty(stats.all_reduce())
        local = penalty(stats, sync=False)
        options = {"group": group[part], "num_groups": 3, "joint": True, "reduction": "sum"}
        taken, _ = cross_entropy_with_stats(z, target[part], penalty=penalty, **options)  # is of all processes, too
        assert (taken - cross_entropy_with_stats(z, target[part], **options)[0]).item() == pytest.approx(value.item())
        results[name] = (value.item(), gradient / len(splits), again.item(), local.item())
    torch.func.grad(lambda z: iou_loss(statistics(z, target[part], group[part])))(logits[part])  # transforms, too
    with pytest.raises(ValueError, match="expected statistics of this process, got those of all"):
        stats.all_reduce().all_reduce()
    contested = statistics(logits[part], target[part], group[part], joint="contested")
    if len(splits) > 1:
        with pytest.raises(ValueError, match="expected joint=True, got joint='contested'"):
            equalized_odds_loss(contested)
    local = [equalized_odds_loss(s, sync=False).item() for s in (contested, stats)]
    assert local[0] == pytest.approx(local[1])
    with pytest.raises(ValueError, match="expected both of all processes or both of this one"):
        stats + stats.all_reduce()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("splits", [[(0, 60)], [(0, 17), (17, 60)], [(0, 40), (40, 40), (40, 60)]], ids=len)
def test_processes_equal_one(splits, tmp_path):
    """Unequal and empty batches; DDP averages what each process computes of the whole."""
    logits, target, group = batch()
    logits.requires_grad_()
    results = run_processes(_rank, len(splits), tmp_path, splits)
    for name, (penalty, _) in PENALTIES.items():
        value = penalty(statistics(logits, target, group))
        (expected,) = torch.autograd.grad(value, logits)
        found = [result[name] for result in results]
        torch.testing.assert_close(torch.cat([f[1] for f in found]), expected, msg=name)
        assert all(f[0] == pytest.approx(value.item()) and f[2] == f[0] for f in found), name
        for (begin, end), f in zip(splits, found, strict=True):
            part = slice(begin, end)
            assert f[3] == pytest.approx(penalty(statistics(logits[part], target[part], group[part])).item()), name


def test_compiles_without_a_break():
    logits, target, group = batch(32, 5, 3, dtype=torch.float32)

    def loss(z):
        loss, stats = cross_entropy_with_stats(z, target, group=group, num_groups=3, joint=True)
        return loss + iou_loss(stats) + demographic_parity_loss(stats, kind="mi") + equalized_odds_loss(stats)

    z = logits.requires_grad_()
    (expected,) = torch.autograd.grad(loss(z), z)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z), z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_function_transforms():
    logits, target, group = batch(12, 3, 2)

    def loss(z):
        return iou_loss(statistics(z, target, group, 2)) + equalized_odds_loss(statistics(z, target, group, 2))

    expected = torch.autograd.functional.hessian(loss, logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits), torch.autograd.functional.jacobian(loss, logits))
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(logits), expected)
