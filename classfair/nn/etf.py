"""Classifiers whose weights are a simplex from the start and stay so, and the loss that pulls features to them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classfair import _validate as check

LEAST_NORM = 1e-8  # of a feature, in the loss


class ETFLinear(nn.Module):
    r"""A fixed classifier: class vectors of equal length, all at the same, largest possible angle.

    The rows are those of a simplex equiangular tight frame, :math:`\sqrt{C/(C-1)}\,U(I - \tfrac1C 11^\top)` with
    orthonormal columns U: unit vectors whose cosines are all :math:`-1/(C-1)`. So no class gets a longer vector or a
    wider angle for being frequent. Nothing here is trained: the features have to come to the vectors. Batch norm on the
    features before it, as the authors use it, keeps them at the scale of the logits.
    Source: Yang et al. 2022, "Inducing neural collapse in imbalanced learning", definition 1; as a baseline in
    Cui et al. 2024, "Classes are not equal", definition 1, which prints the bound on D wrongly.

    Args:
        in_features: D >= C.
        num_classes: C >= 2.
        seed: of the orthonormal columns; the same seed gives the same classifier on every machine and device.
        device, dtype: of the weight, as for :class:`torch.nn.Linear`.

    Shape: ``(..., D)`` to ``(..., C)``, of the dtype of the input.
    State: ``weight`` ``(C, D)``, a buffer: no parameters, no bias.
    Gradients: input, every order.

    Raises:
        TypeError, ValueError: sizes or seed that are no integers or too small, and fewer features than classes.

    Example:
        >>> head = classfair.nn.ETFLinear(8, 3, seed=0)
        >>> (head.weight @ head.weight.T).round(decimals=4).abs().tolist()  # the others are negative
        [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "ETFLinear"
        check.check_range(name, "num_classes", check.integer(name, "num_classes", num_classes), 2)
        check.check_range(name, "seed", check.integer(name, "seed", seed), 0)
        if check.integer(name, "in_features", in_features) < num_classes:
            raise ValueError(
                f"{name}: expected at least as many features as classes ({num_classes}), got in_features={in_features}"
            )
        self.in_features, self.num_classes, self.seed = in_features, num_classes, seed
        weight = torch.empty(num_classes, in_features, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The vectors of the seed."""
        self.weight.copy_(_simplex(self.in_features, self.num_classes, self.seed))

    def forward(self, input: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., C)``."""
        return F.linear(input, self.weight.to(input.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, seed={self.seed}"


def _simplex(dim: int, classes: int, seed: int) -> Tensor:
    """(C, D) float64 on the CPU: rows are unit vectors, pairwise at cosine -1/(C-1)."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(dim, classes, generator=generator, dtype=torch.float64, device="cpu")
    basis, triangle = torch.linalg.qr(random)
    basis = basis * triangle.diagonal().sign()  # unique, whatever the library's signs
    centred = basis.T - basis.T.mean(0)
    return (classes / (classes - 1)) ** 0.5 * centred


def dot_regression_loss(
    features: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Pull features to the direction of their class vector, and push them from no other.

    .. math:: \frac{1}{2\,\lVert h\rVert}\left(w_y^\top h - \lVert w_y\rVert\,\lVert h\rVert\right)^2

    :math:`\lVert h\rVert` counts as a constant, so that only the direction of a feature is trained. It is made for
    :class:`classfair.nn.ETFLinear`, whose vectors are apart already: cross-entropy's push from the other classes, of
    which rare classes receive the most, is not needed then.
    Source: Yang et al. 2022, "Inducing neural collapse in imbalanced learning", eq. 8, with their code's normalisation
    by :math:`\lVert h\rVert`.

    Args:
        features: ``(N, D)`` floating, e.g. from :func:`classfair.nn.with_features`.
        weight: ``(C, D)``, the class vectors.
        target: ``(N,)`` int64 or uint8 labels.
        ignore_index: rows with this label have loss and gradient 0 and are not in the mean.
        reduction: "none", "mean" or "sum".

    Returns:
        ``(N,)`` or a scalar, at least float32; the mean over no row is NaN, as torch's. Gradient: ``features`` and
        ``weight``, every order; that of a feature of norm below 1e-8 is that of the norm 1e-8.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes, devices or reduction.
        IndexError: a label out of range, on the CPU; elsewhere the loss of that row is NaN.

    Example:
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> classfair.dot_regression_loss(torch.tensor([[2.0, 0.0], [0.0, -2.0]]), head, torch.tensor([0, 1]),
        ...                               reduction="none").tolist()
        [0.0, 4.0]
    """
    name = "dot_regression_loss"
    check.check_choice(name, "reduction", reduction, check.REDUCTIONS)
    check.check_matrix(name, "weight", weight)
    rows = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else -1
    check.check_floats(name, "features", features, (max(rows, 0), weight.shape[1]))
    check.check_device(name, "weight", weight, features.device, of="features")
    target = check.flat_labels(name, "target", target, (rows,))
    check.check_device(name, "target", target, features.device, of="features")
    counted = target != ignore_index
    valid = (target >= 0) & (target < weight.shape[0])
    if features.device.type == "cpu" and not bool((valid | ~counted).all()):
        row = int((~valid & counted).long().argmax())
        raise IndexError(f"{name}: expected labels in [0, {weight.shape[0]}), got {int(target[row])} in row {row}")
    acc = check.acc_dtype(features)
    h, own = features.to(acc), weight.to(acc)[target.where(valid, 0)]  # (N, D)
    length = h.detach().norm(dim=1).clamp_min(LEAST_NORM)
    each = ((h * own).sum(1) - own.norm(dim=1) * length).square() / (2 * length)
    each = torch.where(counted, torch.where(valid, each, torch.nan), 0.0)
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / counted.sum()
