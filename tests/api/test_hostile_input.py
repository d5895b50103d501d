"""Arguments that somebody once passed and that read other memory, hung, or passed for something else."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import classfair
from classfair import MixedTarget, PairTerms, cross_entropy, cross_entropy_with_stats, fairness, ops
from classfair.ops import label_index
from classfair.statistics import ClassStatistics, class_moments
from tests.support.pairs import runnable

X = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.1, 0.2], [-1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
Y = torch.tensor([0, 1, 2, 0])
BACKENDS = [b for b, d in runnable("softmax_loss") if d == "cpu"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def zero(*shape, dtype=torch.int64):
    """A tensor without memory, which torch replaces by an expanded zero when an operator is called."""
    return torch._efficientzerotensor(shape, dtype=dtype)


class TestIndexOfOtherClasses:
    """Its keys lead out of a table of these classes."""

    index = label_index(torch.tensor([5000, 7, 3]), 9000)

    def test_pair_variance(self):
        with pytest.raises(ValueError, match=r"^pair_variance: expected a LabelIndex of 3 classes, got one of 9000$"):
            classfair.pair_variance(torch.ones(3, 2), torch.ones(3, 2), self.index)

    def test_distance_margin(self):
        with pytest.raises(ValueError, match=r"^distance_margin: expected a LabelIndex of 3 classes, got one of 9000"):
            classfair.distance_margin(torch.ones(3, 2), self.index)

    def test_statistics(self):
        statistics = ClassStatistics(3, 2)
        with pytest.raises(ValueError, match=r"^ClassStatistics.update: expected a LabelIndex of 3 classes"):
            statistics.update(torch.ones(3, 2), self.index)
        assert statistics.count.sum() == 0

    def test_groups_are_keys_too(self):
        index = label_index(torch.tensor([0, 1]), 3, torch.tensor([1, 0]), 2)
        with pytest.raises(ValueError, match=r"expected a LabelIndex of 3 classes, got one of 6"):
            classfair.pair_variance(torch.ones(3, 2), torch.ones(3, 2), index)

    @pytest.mark.parametrize("label", [-1, 3, 2**40])
    @backends
    def test_the_primitive_looks_itself(self, label, backend):
        if backend == "triton":
            pytest.skip("its kernels are given what others have checked")
        labels, used = torch.tensor([0, label]), torch.tensor(2)
        with pytest.raises(IndexError):
            ops.pair_terms(torch.ones(3, 2), torch.ones(3, 2), labels, used, backend=backend).variance.sum().item()

    def test_merge_writes_nothing(self):
        state = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2), torch.zeros(3, 2)
        batch = ops.class_moments(torch.ones(2, 2), label_index(torch.tensor([0, 1]), 3), backend="native")
        with pytest.raises(IndexError, match=r"^class_moments_merge: expected key in \[0, 3\), got 3000"):
            ops.class_moments_merge(batch, torch.tensor([0, 3000]), *state, backend="native")
        assert all(not s.any() for s in state)

    def test_moments_of_other_rows(self):
        index = label_index(torch.arange(9), 9)
        with pytest.raises(IndexError, match=r"^class_moments: expected an index of these features"):
            ops.class_moments(torch.ones(2, 2), index, backend="native")


@pytest.mark.parametrize(
    ("classes", "groups", "error", "match"),
    [
        (2**60, 2, ValueError, "at most 2.60 pairs of class and group, got 1152921504606846976 . 2"),
        (2**70, 1, ValueError, "num_classes that fits in 64 bits"),
        (3, 2**62, ValueError, "at most 2.60 pairs"),
        (0, 1, ValueError, "num_classes >= 1, got 0"),
        (3, 0, ValueError, "num_groups >= 1, got 0"),
        (2.0, 1, TypeError, "num_classes as an int, got float"),
    ],
)
@backends
def test_absurd_sizes_of_an_index(classes, groups, error, match, backend):
    with pytest.raises(error, match=r"^label_index: expected " + match):
        label_index(Y, classes, torch.zeros_like(Y), groups, backend=backend)


@backends
def test_an_index_of_very_many_classes_returns(backend):
    """Keys of more than 56 bits used to be sorted for ever."""
    target = torch.tensor([2**58, 7, 2**58, 2**59 - 1])
    index = label_index(target, 2**59, torch.tensor([1, 0, 1, 1]), 2, backend=backend)
    assert index.slot.tolist() == [1, 0, 1, 2]
    assert index.key_of_slot.tolist()[:3] == [14, 2**59 + 1, 2**60 - 1]


@pytest.mark.parametrize("groups", [2**55, 2**61, 2**63])
@backends
def test_absurd_numbers_of_groups(groups, backend):
    with pytest.raises((ValueError, RuntimeError), match=r"memory|num_groups|overflow|allocate|too large|expected"):
        cross_entropy_with_stats(X, Y, group=torch.zeros_like(Y), num_groups=groups, backend=backend)


@backends
class TestTensorsWithoutMemory:
    def test_labels(self, backend):
        expected = cross_entropy(X, torch.zeros(4, dtype=torch.int64), backend=backend)
        assert cross_entropy(X, zero(4), backend=backend).item() == expected.item()

    def test_vectors(self, backend):
        none = zero(3, dtype=torch.float32)
        assert cross_entropy(X, Y, offset=none, margin=none, backend=backend) == cross_entropy(X, Y, backend=backend)

    def test_groups_and_index(self, backend):
        _, stats = cross_entropy_with_stats(X, Y, group=zero(4), num_groups=2, joint=True, backend=backend)
        assert stats.count.tolist() == [[2, 1, 1], [0, 0, 0]]
        assert label_index(zero(4), 3, backend=backend).slot.tolist() == [0, 0, 0, 0]

    def test_features(self, backend):
        moments = class_moments(X, zero(4), 3, backend=backend)
        assert moments.count.tolist() == [4, 0, 0]

    def test_expanded_labels(self, backend):
        one = torch.tensor([1])
        expected = cross_entropy(X, one.repeat(4), backend=backend)
        assert cross_entropy(X, one.expand(4), backend=backend).item() == expected.item()


class TestMappedStatistics:
    """A penalty trusts the dtype and the shape of statistics."""

    def stats(self, **options):
        return cross_entropy_with_stats(X, Y, group=Y % 2, num_groups=2, joint=True, **options)[1]

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (torch.Tensor.double, TypeError, "expected stats.count of dtype torch.int64, got torch.float64"),
            (torch.Tensor.half, TypeError, "expected stats.mass of dtype torch.float32, got torch.float16"),
            (torch.Tensor.int, TypeError, "expected stats.mass of dtype torch.float32, got torch.int32"),
            (lambda t: t[None], ValueError, r"expected stats.mass of shape \(G, C\), got \(1, 2, 3\)"),
        ],
    )
    @pytest.mark.parametrize(
        "penalty",
        [
            fairness.demographic_parity_loss,
            fairness.equalized_odds_loss,
            fairness.iou_loss,
            fairness.intersection_over_union,
        ],
    )
    def test_maps(self, penalty, change, error, match):
        with pytest.raises(error, match=f"^{penalty.__name__}: {match}"):
            penalty(pytree.tree_map(change, self.stats()))

    @backends
    def test_cells_of_another_table_have_no_samples(self, backend):
        stats = self.stats()
        fewer = pytree.tree_map(lambda t: t[:1].clone() if t.shape == (2, 3) else t, stats)
        value = fairness.equalized_odds_loss(fewer, backend=backend)
        assert math.isfinite(value.item())

    @pytest.mark.parametrize("name", ["hit", "count"])
    def test_a_table_of_another_shape(self, name):
        import dataclasses

        stats = self.stats()
        with pytest.raises(ValueError, match=rf"stats.{name} of shape \(2, 3\), got \(2, 2\)"):
            fairness.iou_loss(dataclasses.replace(stats, **{name: getattr(stats, name)[:, :2]}))


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (None, TypeError, "as an int, got NoneType"),
        (2.0, TypeError, "as an int, got float"),
        (True, TypeError, "as an int, got bool"),
        ("0", TypeError, "as an int, got str"),
        (torch.tensor(0.5), TypeError, "as an int, got a tensor of torch.float32"),
        (2**63, ValueError, "that fits in 64 bits, got 9223372036854775808"),
    ],
)
class TestIgnoreIndex:
    @backends
    def test_cross_entropy(self, value, error, match, backend):
        with pytest.raises(error, match=r"^cross_entropy: expected ignore_index " + match):
            cross_entropy(X, Y, ignore_index=value, backend=backend)

    def test_others(self, value, error, match):
        for call in (
            lambda: label_index(Y, 3, ignore_index=value),
            lambda: class_moments(X, Y, 3, ignore_index=value),
            lambda: classfair.total_weight(Y, ignore_index=value),
            lambda: classfair.FocalLoss(ignore_index=value)(X, Y),
        ):
            with pytest.raises(error, match=r"expected ignore_index " + match):
                call()


@pytest.mark.parametrize("value", [1, np.int64(1), torch.tensor(1)])
def test_an_integer_of_any_library_is_an_ignore_index(value):
    assert cross_entropy(X, Y, ignore_index=value).item() == pytest.approx(F.cross_entropy(X, Y, ignore_index=1).item())


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"gamma": math.inf}, ValueError, r"expected gamma in \[0, 1000\], got inf"),
        ({"gamma": 10**400}, ValueError, r"expected gamma in \[0, 1000\], got inf"),
        ({"gamma": math.nan}, ValueError, r"expected gamma in \[0, 1000\], got nan"),
        ({"gamma": None}, TypeError, "expected gamma as a number, got NoneType"),
        ({"gamma": "2"}, TypeError, "expected gamma as a number, got str"),
        ({"gamma": torch.tensor([1.0, 2.0])}, TypeError, "expected gamma as a number, got Tensor"),
        ({"label_smoothing": None}, TypeError, "expected label_smoothing as a number, got NoneType"),
        ({"label_smoothing": "0.1"}, TypeError, "expected label_smoothing as a number, got str"),
        ({"label_smoothing": torch.tensor(math.nan)}, ValueError, r"expected label_smoothing in \[0, 1\], got nan"),
        ({"label_smoothing": torch.tensor([0.1])}, TypeError, "expected label_smoothing as a number, got Tensor"),
        ({"offset": torch.ones(3).to_sparse()}, TypeError, "expected dense .* offset, got layout torch.sparse_coo"),
        ({"weight": torch.ones(3).to_sparse()}, TypeError, "expected dense .* weight, got layout torch.sparse_coo"),
        ({"sample_weight": torch.ones(4).to_sparse()}, TypeError, "expected dense .* sample_weight, got layout"),
        ({"pair": torch.ones(3, 3).to_sparse_csr()}, TypeError, "expected dense .* pair, got layout torch.sparse_csr"),
    ],
)
def test_odd_keywords(keywords, error, match):
    with pytest.raises(error, match=r"^cross_entropy: " + match):
        cross_entropy(X, Y, **keywords)


def test_numbers_in_tensors_as_torch_takes_them():
    smoothing = torch.tensor(0.1)
    expected = F.cross_entropy(X, Y, label_smoothing=smoothing)
    assert cross_entropy(X, Y, label_smoothing=smoothing).item() == pytest.approx(expected.item())
    assert cross_entropy(X, Y, gamma=torch.tensor(2.0)).item() == cross_entropy(X, Y, gamma=2.0).item()


@pytest.mark.parametrize(
    ("lam", "error", "match"),
    [
        (torch.tensor(5.0), ValueError, r"in \[0, 1\], got 5.0"),
        (torch.tensor(math.nan), ValueError, r"in \[0, 1\], got nan"),
        (torch.tensor([0.5, -0.25, 1.0, 0.0]), ValueError, r"in \[0, 1\], got -0.25"),
        (math.nan, ValueError, r"in \[0, 1\], got nan"),
        ("0.5", TypeError, "as a number, got str"),
        (None, TypeError, "as a number, got NoneType"),
        (np.full(4, 0.5), TypeError, "as a number, got ndarray"),
        (torch.tensor(0.5j), TypeError, "as a number or a real tensor, got torch.complex64"),
        (torch.full((4, 4), 0.5), ValueError, r"that broadcasts to \(4,\), got \(4, 4\)"),
    ],
)
@backends
def test_odd_shares(lam, error, match, backend):
    with pytest.raises(error, match=f"^cross_entropy: expected target.lam {match}"):
        cross_entropy(X, MixedTarget(Y, Y.flip(0), lam), backend=backend)


def test_sparse_shares():
    with pytest.raises(TypeError, match=r"expected dense .* target.lam, got layout torch.sparse_coo"):
        cross_entropy(X, MixedTarget(Y, Y, torch.ones(4).to_sparse()))


def test_shares_that_nobody_may_look_at_give_nan():
    """As on a GPU."""
    losses = torch.func.vmap(
        lambda lam: cross_entropy(X[:2], MixedTarget(Y[:2], Y[2:], lam), reduction="none", backend="reference")
    )(torch.tensor([0.5, 5.0]))
    assert losses.isnan().tolist() == [[False, False], [True, True]]


def _nested(layout):
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)], layout=layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
class TestNestedTensors:
    def test_logits(self, layout):
        with pytest.raises(TypeError, match=r"expected dense .* logits, got a nested tensor"):
            cross_entropy(_nested(layout), Y[:2])

    def test_probabilities(self, layout):
        with pytest.raises(TypeError, match=r"expected dense .* target .*, got a nested tensor"):
            cross_entropy(X[:2], _nested(layout))

    def test_labels(self, layout):
        with pytest.raises(TypeError, match=r"expected dense .* target, got a nested tensor"):
            cross_entropy(X, torch.nested.nested_tensor([Y[:2], Y[2:]], layout=layout))

    def test_features(self, layout):
        with pytest.raises(TypeError, match=r"expected dense .* features, got a nested tensor"):
            class_moments(_nested(layout), Y[:2], 3)


def test_sparse_labels_and_groups():
    with pytest.raises(TypeError, match=r"expected dense .* target, got layout torch.sparse_coo"):
        cross_entropy(X, Y.to_sparse())
    with pytest.raises(TypeError, match=r"expected dense .* group, got layout torch.sparse_coo"):
        cross_entropy_with_stats(X, Y, group=Y.to_sparse(), num_groups=3)
    with pytest.raises(TypeError, match=r"expected dense .* target, got layout torch.sparse_coo"):
        label_index(Y.to_sparse(), 3)


def test_tensors_of_another_device():
    with pytest.raises(ValueError, match=r"expected label on the device of the logits, cpu, got meta"):
        cross_entropy_with_stats(X, X.softmax(1), label=Y.to("meta"))
    pair = PairTerms(torch.zeros(3, 3), Y.to("meta"), torch.arange(3), torch.tensor(3))
    with pytest.raises(ValueError, match=r"expected pair.slot on the device of the logits, cpu, got meta"):
        cross_entropy(X, Y, pair=pair)
    with pytest.raises(ValueError, match=r"expected group on the device of the target, cpu, got meta"):
        label_index(Y, 3, Y.to("meta"), 3)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16]


@pytest.mark.parametrize("dtype", INTEGERS)
@backends
class TestLabelsOfAnyInteger:
    """What torch's cross_entropy takes, and nothing else."""

    def test_cross_entropy(self, dtype, backend):
        target, logits, own = (Y % 2).to(dtype), X.clone().requires_grad_(), X.clone().requires_grad_()
        try:
            expected = F.cross_entropy(logits, target)
        except RuntimeError:
            with pytest.raises(TypeError, match=re.escape(f"int64 or torch.uint8, got {dtype}")):
                cross_entropy(X, target, backend=backend)
            return
        loss = cross_entropy(own, target, backend=backend)
        (loss + 0).backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(own.grad, logits.grad)

    def test_everything_else_that_takes_labels(self, dtype, backend):
        if dtype not in (torch.uint8, torch.int64):
            pytest.skip("refused, as above")
        target = Y.to(dtype)
        mixed = MixedTarget(target, target.flip(0), 0.3)
        assert cross_entropy(X, mixed, backend=backend).isfinite()
        assert label_index(target, 3, backend=backend).slot.tolist() == Y.tolist()
        assert class_moments(X, target, 3, backend=backend).count.tolist() == [2, 1, 1]
        assert classfair.pair_variance(X.T.contiguous(), X.T.abs(), target, backend=backend).slot.tolist() == Y.tolist()
        _, stats = cross_entropy_with_stats(X, X.softmax(1), label=target, backend=backend)
        assert stats.count.tolist() == [[2, 1, 1]]


def test_a_byte_is_never_a_negative_label():
    target = torch.tensor([0, 1, 255, 2], dtype=torch.uint8)
    assert cross_entropy(X, target, ignore_index=255).item() == pytest.approx(
        F.cross_entropy(X, target, ignore_index=255).item()
    )
    with pytest.raises(IndexError, match=r"got 255 at row 2"):
        cross_entropy(X, target, ignore_index=-1)
