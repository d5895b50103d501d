"""What is made of ``pair_terms``: variances, distance margins, and their errors."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import classfair
from classfair import PairTerms, distance_margin, mean_class_distance, ops, pair_variance
from tests.support.pairs import runnable

formula = sys.modules["classfair.reference.pair_terms"]  # the package has a function of this name

CPU = [b for b, d in runnable("pair_terms") if d == "cpu" and b != "triton"]
each_normalize = pytest.mark.parametrize("normalize", [False, True], ids=["variance", "ratio"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestPairVariance:
    weight, cov = draw(7, 5), draw(7, 5, seed=1).square()
    target = torch.tensor([4, 1, -100, 4, 6])

    @each_normalize
    @pytest.mark.parametrize("backend", CPU)
    def test_rows_are_those_of_the_table(self, backend, normalize):
        table = pair_variance(self.weight, self.cov, normalize=normalize, backend=backend)
        pair = pair_variance(self.weight, self.cov, self.target, normalize=normalize, backend=backend)
        assert isinstance(pair, PairTerms)
        assert pair.num_slots.item() == 3
        assert pair.label_of_slot.tolist() == [1, 4, 6, 0, 0]
        torch.testing.assert_close(pair.rows[:3], table[[1, 4, 6]])
        assert not pair.rows[3:].any()
        assert pair.slot.tolist() == [1, 0, -1, 1, 2]
        shared = pair_variance(self.weight, self.cov, ops.label_index(self.target, 7), normalize=normalize)
        torch.testing.assert_close(shared.rows, pair.rows)

    def test_the_loss_and_its_gradient_are_those_of_the_table(self):
        logits = draw(5, 7, seed=9)

        def loss(pair_of):
            weight = self.weight.clone().requires_grad_()
            pair = 0.5 * pair_of(weight, False) + 2.0 * pair_of(weight, True)
            value = classfair.cross_entropy(logits, self.target, pair=pair)
            return value.detach(), torch.autograd.grad(value, weight)[0]

        rows = loss(lambda w, n: pair_variance(w, self.cov, self.target, normalize=n))
        table = loss(lambda w, n: pair_variance(w, self.cov, normalize=n))
        torch.testing.assert_close(rows, table)

    @each_normalize
    def test_full_covariance(self, normalize):
        root = draw(7, 5, 5, seed=3)
        full = (root @ root.mT).requires_grad_()
        weight = self.weight.clone().requires_grad_()
        pair = pair_variance(weight, full, self.target, normalize=normalize)
        difference = weight - weight[[1, 4, 6]][:, None]
        form = torch.einsum("kcd,kde,kce->kc", difference, full[[1, 4, 6]], difference)
        square = difference.square().sum(-1)
        expected = torch.where(square > 0, form / torch.where(square > 0, square, 1), 0) if normalize else form
        torch.testing.assert_close(pair.rows[:3], expected)
        g = draw(5, 7, seed=4)
        got = torch.autograd.grad(pair.rows, (weight, full), g)
        torch.testing.assert_close(got, torch.autograd.grad(expected, (weight, full), g[:3]))
        diagonal = pair_variance(self.weight, torch.diag_embed(self.cov), normalize=normalize)
        torch.testing.assert_close(diagonal, pair_variance(self.weight, self.cov, normalize=normalize))

    def test_full_covariance_of_one_direction_is_not_negative(self):
        weight = 1e3 + draw(20, 30).float()
        direction = draw(20, 30, seed=1).float()
        flat = direction[:, :, None] * direction[:, None]
        assert (pair_variance(weight, flat) >= 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_widened(self, dtype):
        weight, cov = self.weight.to(dtype).requires_grad_(), self.cov.float()
        with torch.autocast("cpu", torch.bfloat16):
            table = pair_variance(weight, cov)
            full = pair_variance(weight, torch.diag_embed(cov))
        expected = pair_variance(weight.detach().double(), cov.double())
        torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full.double(), expected, rtol=1e-5, atol=1e-6)
        assert table.dtype == torch.float32
        (gradient,) = torch.autograd.grad(table.sum(), weight)
        assert gradient.dtype == dtype

    def test_strided_weights(self):
        wide = draw(7, 10)
        got = pair_variance(wide[:, ::2], self.cov.T.contiguous().T)
        torch.testing.assert_close(got, pair_variance(wide[:, ::2].contiguous(), self.cov))

    def test_covariance_without_gradient_gets_none(self):
        weight = self.weight.clone().requires_grad_()
        pair_variance(weight, self.cov).sum().backward()
        assert weight.grad is not None
        cov = self.cov.clone().requires_grad_()
        pair_variance(self.weight, cov).sum().backward()
        assert cov.grad is not None
        assert not pair_variance(self.weight, self.cov).requires_grad

    def test_no_tensor_of_all_differences(self, monkeypatch):
        """A step needs memory for rows and gradients, a second derivative for those of a few rows."""
        monkeypatch.setattr(formula, "CHUNK_NUMBERS", 50_000)
        classes, features, labels = 150, 128, 64
        weight = draw(classes, features).float().requires_grad_()
        cov, target = torch.rand(classes, features), torch.arange(labels)
        rows = pair_variance(weight, cov, target).rows
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                out = function(*args, **(kwargs or {}))
                for t in torch.utils._pytree.tree_leaves(out):
                    largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
                return out

        with Watch():
            rows = pair_variance(weight, cov, target).rows
            torch.autograd.grad(rows.sum(), weight)
        if "native" in CPU:
            assert largest <= max(classes * features, labels * classes)
        with Watch():
            (gradient,) = torch.autograd.grad(
                pair_variance(weight, cov, target).rows.square().mean(), weight, create_graph=True
            )
            torch.autograd.grad(gradient.square().sum(), weight)
        assert largest <= 50_000


class TestDistanceMargin:
    mean = draw(6, 4)
    target = torch.tensor([3, 0, 3])

    def test_table(self):
        distance = torch.cdist(self.mean, self.mean)
        average = F.pdist(self.mean).mean()
        expected = torch.where(distance > 0, (average / distance).log(), 0)
        torch.testing.assert_close(mean_class_distance(self.mean), average)
        torch.testing.assert_close(distance_margin(self.mean), expected)
        pair = distance_margin(self.mean, self.target)
        torch.testing.assert_close(pair.rows[pair.slot], expected[self.target])
        shifted = distance_margin(self.mean, self.target, mean_distance=2 * average)
        torch.testing.assert_close(shifted.rows[0, 1] - pair.rows[0, 1], torch.tensor(2.0).double().log())

    def test_many_classes_in_blocks(self, monkeypatch):
        from classfair import pair

        monkeypatch.setattr(pair, "BLOCK_NUMBERS", 100)
        mean = draw(37, 5)
        seen = torch.arange(37) % 3 > 0
        torch.testing.assert_close(mean_class_distance(mean), F.pdist(mean).mean())
        torch.testing.assert_close(mean_class_distance(mean, seen=seen), F.pdist(mean[seen]).mean())

    def test_classes_not_seen(self):
        seen = torch.tensor([True, True, False, True, True, False])
        got = distance_margin(self.mean, seen=seen)
        assert not got[~seen].any()
        assert not got[:, ~seen].any()
        torch.testing.assert_close(got[seen][:, seen], distance_margin(self.mean[seen]))

    @pytest.mark.parametrize("count", [0, 1])
    def test_before_two_classes_are_seen(self, count):
        seen = torch.arange(6) < count
        assert mean_class_distance(self.mean, seen=seen).item() == 0
        assert not distance_margin(self.mean, seen=seen).any()
        assert not distance_margin(torch.zeros(6, 4)).any()
        assert not distance_margin(torch.zeros(1, 4), torch.tensor([0])).rows.any()

    def test_equal_and_nearly_equal_means(self):
        mean = self.mean.float()
        mean[1] = mean[0]
        mean[3] = mean[2] * (1 + 1e-7)
        margin = distance_margin(mean)
        assert margin[0, 1] == 0
        assert margin[2, 3].item() == pytest.approx(6 * 2.302585, rel=1e-5)

    def test_no_gradient(self):
        mean = self.mean.clone().requires_grad_()
        assert not distance_margin(mean, self.target).rows.requires_grad

    def test_adds_to_variances(self):
        both = 0.1 * pair_variance(self.mean, self.mean.square(), self.target) + distance_margin(self.mean, self.target)
        assert both.rows.shape == (3, 6)


W, V, Y = torch.zeros(4, 3), torch.ones(4, 3), torch.tensor([0, 3])
BAD = [
    (pair_variance, ([1.0], V), {}, TypeError, "expected linear_weight as a floating tensor, got list"),
    (pair_variance, (W.long(), V), {}, TypeError, "expected linear_weight as a floating tensor, got torch.int64"),
    (pair_variance, (W[0], V), {}, ValueError, r"expected linear_weight of shape \(C, D\) with C >= 1, got \(3,\)"),
    (pair_variance, (W[:0], V[:0]), {}, ValueError, r"with C >= 1, got \(0, 3\)"),
    (pair_variance, (W.to_sparse(), V), {}, TypeError, "expected dense"),
    (pair_variance, (W, None), {}, TypeError, "expected cov as a floating tensor, got NoneType"),
    (pair_variance, (W, V[:, :2]), {}, ValueError, r"expected cov of shape \(4, 3\), got \(4, 2\)"),
    (pair_variance, (W, torch.ones(4, 3, 2)), {}, ValueError, r"of shape \(4, 3, 3\), got \(4, 3, 2\)"),
    (pair_variance, (W, V.to("meta")), {}, ValueError, "expected cov on the device of the weight, cpu, got meta"),
    (pair_variance, (W, V, [0]), {}, TypeError, "expected target as a tensor or a LabelIndex, got list"),
    (pair_variance, (W, V, Y.int()), {}, TypeError, "dtype torch.int64 or torch.uint8, got torch.int32"),
    (pair_variance, (W, V, Y[None]), {}, ValueError, r"expected target of shape \(2,\), got \(1, 2\)"),
    (pair_variance, (W, torch.ones(4, 3, 3)), {"backend": "native"}, ValueError, r"with cov of shape \(C, D, D\)"),
    (distance_margin, (None,), {}, TypeError, "expected mean as a floating tensor, got NoneType"),
    (distance_margin, (W,), {"seen": [True] * 4}, TypeError, "expected seen as a tensor of dtype torch.bool, got list"),
    (distance_margin, (W,), {"seen": torch.ones(4)}, TypeError, "torch.bool, got torch.float32"),
    (distance_margin, (W,), {"seen": torch.ones(3).bool()}, ValueError, r"expected seen of shape \(4,\), got \(3,\)"),
    (distance_margin, (W,), {"mean_distance": torch.ones(1)}, ValueError, r"of shape \(\), got \(1,\)"),
    (distance_margin, (W,), {"mean_distance": 1.0}, TypeError, "expected mean_distance as a floating tensor"),
    (mean_class_distance, (W,), {"seen": Y}, TypeError, "torch.bool, got torch.int64"),
]


@pytest.mark.parametrize(("function", "arguments", "keywords", "error", "match"), BAD)
def test_wrong_arguments(function, arguments, keywords, error, match):
    with pytest.raises(error, match=f"^{function.__name__}: .*{match}"):
        function(*arguments, **keywords)


def test_labels_and_backends_that_do_not_exist():
    with pytest.raises(IndexError, match=r"label_index: expected label in \[0, 4\) .* got 4 at row 1"):
        pair_variance(W, V, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="pair_terms: expected backend 'native', 'triton' or 'reference', got 'cuda'"):
        pair_variance(W, V, backend="cuda")
