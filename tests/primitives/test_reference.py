"""The oracle itself, pinned to values that share no code with it: hand tables, NumPy transcriptions, identities."""

import math

import numpy as np
import pytest
import torch

from classfair.ops import label_index, softmax_loss


def numpy_loss(z, y, offset, margin, pair, weight, smoothing, gamma):
    """The formula of cross_entropy's docstring, a loop over samples and classes."""
    losses = []
    for n in range(len(y)):
        x = [z[n][c] + offset[c] + pair[y[n]][c] - (margin[c] if c == y[n] else 0) for c in range(z.shape[1])]
        total = math.fsum(math.exp(v) for v in x)
        p = [math.exp(v) / total for v in x]
        own = -math.log(p[y[n]])
        smooth = sum(weight[c] * -math.log(p[c]) for c in range(len(p))) / len(p)
        losses.append((1 - smoothing) * weight[y[n]] * (1 - p[y[n]]) ** gamma * own + smoothing * smooth)
    return np.array(losses)


def test_loss_equals_a_transcription_in_numpy():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(7, 4)), rng.integers(0, 4, 7)
    offset, margin, weight = rng.normal(size=4), rng.random(4), rng.random(4)
    pair = rng.random((4, 4))
    expected = numpy_loss(z, y, offset, margin, pair, weight, 0.1, 1.5)
    t = torch.as_tensor
    out = softmax_loss(
        t(z),
        target=t(y),
        offset=t(offset),
        margin=t(margin),
        pair=t(pair),
        weight=t(weight),
        label_smoothing=0.1,
        gamma=1.5,
    )
    np.testing.assert_allclose(out.loss, expected, rtol=1e-13)
    assert out.total_weight.item() == pytest.approx(weight[y].sum())


def test_hand_table():
    """logits log 1, log 2, log 5: p = 1/8, 2/8, 5/8."""
    logits = torch.tensor([[1.0, 2.0, 5.0]] * 4, dtype=torch.float64).log()
    target = torch.tensor([0, 1, 2, -100])
    out = softmax_loss(logits, target=target, group=torch.tensor([0, 1, -1, 0]), num_groups=2, stats=2)
    assert out.loss.tolist() == pytest.approx([math.log(8), math.log(4), math.log(8 / 5), 0])
    assert out.mass.tolist() == [pytest.approx([1 / 8, 2 / 8, 5 / 8])] * 2
    assert out.hit.tolist() == [pytest.approx([1 / 8, 0, 0]), pytest.approx([0, 2 / 8, 0])]
    count, correct, predicted = out.counts[:-2].view(3, 2, 3).tolist()
    assert count == [[1, 0, 0], [0, 1, 0]]
    assert correct == [[0, 0, 0], [0, 0, 0]]
    assert predicted == [[0, 0, 1], [0, 0, 1]]
    assert out.counts[-2:].tolist() == [0, 0]
    assert out.prediction.tolist() == [2, 2, 2, 2]
    assert out.total_weight.item() == 3


def test_joint_rows_sum_to_mass_and_contain_hit():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=g, dtype=torch.float64)
    target, group = torch.randint(0, 4, (30,), generator=g), torch.randint(0, 2, (30,), generator=g)
    index = label_index(target, 4, group, 2, backend="reference")
    out = softmax_loss(logits, target=target, group=group, num_groups=2, cell=index.slot, num_cells=8, stats=2)
    for cell in range(int(index.num_slots)):
        y, g_ = divmod(int(index.key_of_slot[cell]), 2)
        rows = (target == y) & (group == g_)
        expected = logits[rows].softmax(1).sum(0)
        torch.testing.assert_close(out.joint[cell], expected)
        torch.testing.assert_close(out.hit[g_, y], expected[y])
    torch.testing.assert_close(out.joint.sum(0), out.mass.sum(0))


def test_invariances():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 5, generator=g, dtype=torch.float64)
    target = torch.randint(0, 5, (12,), generator=g)
    out = softmax_loss(logits, target=target, stats=2)
    shifted = softmax_loss(logits + 3.0, target=target, stats=2)
    torch.testing.assert_close(out.loss, shifted.loss)
    order = torch.randperm(12, generator=g)
    permuted = softmax_loss(logits[order], target=target[order], stats=2)
    torch.testing.assert_close(out.loss[order], permuted.loss)
    torch.testing.assert_close(out.mass, permuted.mass)
    assert torch.equal(out.counts, permuted.counts)
    split = softmax_loss(logits, target=target, group=order % 3, num_groups=3, stats=2)
    torch.testing.assert_close(split.mass.sum(0), out.mass[0])
    torch.testing.assert_close(split.hit.sum(0), out.hit[0])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_label_index_against_numpy(backend):
    from classfair import backends

    if backend not in backends.available("label_index", "cpu"):
        pytest.skip("no compiled CPU kernels")
    rng = np.random.default_rng(2)
    # The last has too many rows for a GPU to sort them by comparing each with all.
    sizes = [(0, 4, 1), (1, 1, 1), (50, 7, 1), (50, 300, 3), (5, 70_000, 2), (400, 3, 2), (5000, 40, 3)]
    for rows, classes, groups in sizes:
        target, group = rng.integers(0, classes, rows), rng.integers(-1, groups, rows)
        target[rng.random(rows) < 0.1] = -100
        index = label_index(torch.tensor(target), classes, torch.tensor(group), groups, backend=backend)
        placed = (target >= 0) & (group >= 0)
        keys = target * groups + group
        unique, inverse = np.unique(keys[placed], return_inverse=True)
        capacity = min(rows, classes * groups)
        slot = np.full(rows, -1)
        slot[placed] = inverse
        assert index.num_slots.item() == len(unique)
        assert index.slot.tolist() == slot.tolist()
        assert index.key_of_slot.tolist() == [*unique, *[0] * (capacity - len(unique))]
        order = sorted(range(rows), key=lambda i: slot[i] if slot[i] >= 0 else rows)
        assert index.order.tolist() == order
        starts = [int((slot[placed] < s).sum()) for s in range(capacity + 1)]
        assert index.start.tolist() == starts
