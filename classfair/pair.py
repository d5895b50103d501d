"""Additive logit terms that depend on the true class and the competitor."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends, ops
from classfair.ops.label_index import check_index

#: Distances of one block of rows: 16 MB in float32.
BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class PairTerms:
    """Rows of a (class, competitor) table for the labels of one batch only.

    ``rows[slot[n], c]`` is added to logit c of sample n. At C = 1000 and N = 256 this holds a quarter of the full
    (C, C) table; at C = 8142 a thirtieth. Build the slots with :func:`classfair.ops.label_index`.

    Args:
        rows: ``(M, C)`` floating; receives gradient, the sum over the samples of a slot.
        slot: ``(N,)`` int64 in [0, M); -1 (ignored samples) adds nothing.
        label_of_slot: ``(M,)`` int64, the label whose row it is.
        num_slots: ``()`` int64, slots in use.

    Two terms of the same batch add up, and scale by a number or a 0-d tensor.

    Example:
        >>> table = torch.zeros(5, 5).fill_diagonal_(-1.0)
        >>> target = torch.tensor([3, 1, 3])
        >>> index = classfair.ops.label_index(target, num_classes=5)
        >>> pair = PairTerms(table[index.key_of_slot], index.slot, index.key_of_slot, index.num_slots)
        >>> logits = torch.zeros(3, 5)
        >>> same = classfair.cross_entropy(logits, target, pair=table)
        >>> torch.equal(classfair.cross_entropy(logits, target, pair=0.5 * pair + 0.5 * pair), same)
        True
    """

    rows: Tensor
    slot: Tensor
    label_of_slot: Tensor
    num_slots: Tensor

    def _with(self, rows: Tensor) -> Self:
        return type(self)(rows, self.slot, self.label_of_slot, self.num_slots)

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, PairTerms):
            return NotImplemented
        if self.rows.shape != other.rows.shape:
            raise ValueError(
                f"PairTerms: expected rows of shape {tuple(self.rows.shape)}, got {tuple(other.rows.shape)}"
            )
        return self._with(self.rows + other.rows)

    def __mul__(self, scale: float | Tensor) -> Self:
        return self._with(self.rows * scale)

    __rmul__ = __mul__


def _index(function: str, target: Any, num_classes: int, device: torch.device) -> ops.LabelIndex | None:
    if target is None:
        return None
    if isinstance(target, ops.LabelIndex):
        check_index(function, target, num_classes, device)
        return target
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: expected target as a tensor or a LabelIndex, got {type(target).__name__}")
    check.check_labels_tensor(function, "target", target, (target.numel(),), check.LABELS)
    check.check_device(function, "target", target, device, "classes")
    return ops.label_index(target, num_classes)


def _labels(index: ops.LabelIndex | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the rows to compute and how many of them count: those of the batch, or all."""
    if index is not None:
        return index.key_of_slot, index.num_slots
    classes = like.shape[0]
    return torch.arange(classes, device=like.device), torch.full((), classes, device=like.device)


def _result(rows: Tensor, index: ops.LabelIndex | None) -> Tensor | PairTerms:
    return rows if index is None else PairTerms(rows, index.slot, index.key_of_slot, index.num_slots)


def pair_variance(
    linear_weight: Tensor,
    cov: Tensor,
    target: Tensor | ops.LabelIndex | None = None,
    *,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor | PairTerms:
    r"""Variance of a class's features along the direction to another class, for every pair of classes.

    .. math:: S_{yc} = (w_c - w_y)^\top \Sigma_y (w_c - w_y), \qquad R_{yc} = S_{yc} / \|w_c - w_y\|^2

    :math:`\frac{\lambda}{2} S` added to the logits is implicit semantic data augmentation (ISDA, Wang et al. 2019,
    eq. 6); :math:`R` (NISDA, Wu et al. 2023, eq. 29) is a Rayleigh quotient.

    Args:
        linear_weight: ``(C, D)`` rows w of the classifier, any float; receives gradient. Half precision is widened.
        cov: ``(C, D)`` diagonals of the covariances :math:`\Sigma`, or ``(C, D, D)`` matrices (in plain torch, one
            label at a time). Receives gradient if it requires one. Not negative: for matrices S is clamped at 0.
        target: ``(K,)`` int64 in ``[0, C)`` or -100 (no row), or a ``LabelIndex`` of them, so that several terms of
            one batch share it. None: all classes.
        normalize: R instead of S.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (see :mod:`classfair.backends`).

    Returns:
        :class:`PairTerms` with rows ``(M, C)``, M = min(K, C), for the labels in ``target``; the ``(C, C)`` table
        without. float32, or float64 for float64 weights. Exactly 0, value and gradient, at c = y; R also where
        :math:`\|w_c - w_y\|^2` is at most 1e-12 of the larger of 1 and its mean over c (equal rows, a head that starts
        at zero). For diagonals R lies between the least and the largest number of :math:`\Sigma_y`.

    Raises:
        TypeError, ValueError: ``pair_variance: expected X, got Y``.
        IndexError: on the CPU, for a label out of range. On other devices its slot is -1.

    Gradients of every order; forward-mode once (torch drops the tangents of a tangent). Computed from differences of
    rows, which stay exact where rows are close. No synchronisation, nothing larger than ``(M, C)`` or ``(C, D)``
    (second derivatives: a few rows of ``(C, D)``). Determinism: bitwise, any number of threads.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
        >>> cov = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.5, 4.0]])
        >>> classfair.pair_variance(weight, cov).tolist()
        [[0.0, 3.0, 4.0], [2.0, 0.0, 10.0], [2.0, 8.5, 0.0]]
        >>> target = torch.tensor([2, 0, 2])
        >>> pair = classfair.pair_variance(weight, cov, target, normalize=True)
        >>> pair.rows[pair.slot].tolist()
        [[0.5, 0.8500000238418579, 0.0], [0.0, 1.5, 1.0], [0.5, 0.8500000238418579, 0.0]]
        >>> loss = classfair.cross_entropy(torch.zeros(3, 3), target, pair=0.5 * pair)
    """
    name = "pair_variance"
    check.check_matrix(name, "linear_weight", linear_weight)
    classes, features = linear_weight.shape
    check.check_flag(name, "normalize", normalize)
    full = isinstance(cov, Tensor) and not cov.is_nested and cov.dim() == 3
    check.check_floats(name, "cov", cov, (classes, features, features) if full else (classes, features))
    check.check_device(name, "cov", cov, linear_weight.device, "weight")
    if full and backend not in (None, "reference"):
        raise ValueError(f"{name}: expected backend 'reference' or None with cov of shape (C, D, D), got {backend!r}")
    backend = "reference" if full else backends.choose("pair_terms", linear_weight.device, backend)
    index = _index(name, target, classes, linear_weight.device)
    acc = check.acc_dtype(linear_weight)
    weight, cov = linear_weight.to(acc).contiguous(), cov.to(acc).contiguous()
    terms = ops.pair_terms(weight, cov, *_labels(index, weight), normalize=normalize, backend=backend)
    assert terms.variance is not None
    return _result(terms.variance, index)


def _means(function: str, mean: Any, seen: Any) -> tuple[Tensor, Tensor]:
    """Means in the accumulate dtype, without gradient, and which of them exist."""
    check.check_matrix(function, "mean", mean)
    if seen is None:
        seen = torch.ones(mean.shape[0], dtype=torch.bool, device=mean.device)
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
        raise TypeError(f"{function}: expected seen as a tensor of dtype torch.bool, got {got}")
    if seen.shape != mean.shape[:1]:
        raise ValueError(f"{function}: expected seen of shape {tuple(mean.shape[:1])}, got {tuple(seen.shape)}")
    check.check_device(function, "seen", seen, mean.device, "means")
    return mean.detach().to(check.acc_dtype(mean)).contiguous(), seen


@torch.no_grad()
def mean_class_distance(mean: Tensor, *, seen: Tensor | None = None, backend: str | None = None) -> Tensor:
    r"""Mean Euclidean distance :math:`\bar\Delta` of the means of two classes, over all pairs of seen classes.

    Takes :math:`C^2 D / 2` steps, in blocks of rows: worth keeping between the steps of a training.

    Args:
        mean: ``(C, D)`` class means, any float; no gradient.
        seen: ``(C,)`` bool, classes whose mean exists; None: all.
        backend: as in :func:`pair_variance`.

    Returns:
        ``()`` float32, or float64 for float64 means; 0 with fewer than two classes. No synchronisation.

    Raises:
        TypeError, ValueError: ``mean_class_distance: expected X, got Y``.

    Example:
        >>> classfair.mean_class_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])).item()
        6.0
    """
    mean, seen = _means("mean_class_distance", mean, seen)
    backend = backends.choose("pair_terms", mean.device, backend)
    classes = mean.shape[0]
    size = max(1, BLOCK_NUMBERS // classes)
    total = torch.zeros((), dtype=torch.float64, device=mean.device)
    for begin in range(0, classes, size):
        rows = min(size, classes - begin)
        # Distances are symmetric: the block's rows against themselves and the classes after them.
        label, count = torch.arange(rows, device=mean.device), torch.full((), rows, device=mean.device)
        square = ops.pair_terms(mean[begin:], None, label, count, want_square=True, backend=backend).square
        assert square is not None
        both = seen[begin : begin + rows, None] & seen[begin:]
        total += torch.where(both, square.sqrt(), 0).triu_(1).sum(dtype=torch.float64)
    number = seen.sum(dtype=torch.float64)  # of integers torch would make the default dtype
    return (total / (number * (number - 1) / 2).clamp_min(1)).to(mean.dtype)


@torch.no_grad()
def distance_margin(
    mean: Tensor,
    target: Tensor | ops.LabelIndex | None = None,
    *,
    seen: Tensor | None = None,
    mean_distance: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | PairTerms:
    r"""How much closer than average two classes lie, :math:`\log(\bar\Delta / \Delta_{yc})` with
    :math:`\Delta_{yc} = \|\mu_c - \mu_y\|` (Wu et al. 2023, eq. 31): positive for neighbours.

    Args:
        mean: ``(C, D)`` class means, any float; no gradient.
        target: ``(K,)`` int64 in ``[0, C)`` or -100, a ``LabelIndex``, or None for all classes.
        seen: ``(C,)`` bool, classes whose mean exists; None: all.
        mean_distance: ``()`` :math:`\bar\Delta`; None: :func:`mean_class_distance`, which costs as much as the rows of
            half of all classes.
        backend: as in :func:`pair_variance`.

    Returns:
        As :func:`pair_variance`. 0 at c = y, for classes not seen, where two means are equal, and where
        :math:`\bar\Delta` is 0. Distances below 1e-6 of :math:`\bar\Delta` count as that.

    Raises:
        TypeError, ValueError: ``distance_margin: expected X, got Y``.
        IndexError: on the CPU, for a label out of range. On other devices its slot is -1.

    No synchronisation. Determinism: bitwise, any number of threads.

    Example:
        >>> mean = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
        >>> margin = classfair.distance_margin(mean, torch.tensor([2, 2]))
        >>> margin.rows[margin.slot].mul(100).round().tolist()
        [[-29.0, 18.0, 0.0], [-29.0, 18.0, 0.0]]
    """
    name = "distance_margin"
    mean, seen = _means(name, mean, seen)
    index = _index(name, target, mean.shape[0], mean.device)
    backend = backends.choose("pair_terms", mean.device, backend)
    if mean_distance is None:
        mean_distance = mean_class_distance(mean, seen=seen, backend=backend)
    check.check_floats(name, "mean_distance", mean_distance, ())
    label, count = _labels(index, mean)
    square = ops.pair_terms(mean, None, label, count, want_square=True, backend=backend).square
    assert square is not None
    return _result(ops.log_distance_ratio(square, mean_distance, seen[label, None] & seen), index)
