"""Offsets of a linear classifier as its weights and class means imply them, and how far means lie from boundaries."""

from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends, ops


def empirical_offset(weight: Tensor, mean: Tensor) -> Tensor:
    r"""Offset that a Gaussian classifier would subtract from its logits: :math:`w_{c0} = \tfrac12\, \mu_c \cdot w_c`.

    In linear discriminant analysis with equal priors :math:`w_c = \Sigma^{-1}\mu_c`, and the logit of class c is
    :math:`w_c \cdot x - \tfrac12 \mu_c^\top \Sigma^{-1} \mu_c`. A network trained on a long tail has larger offsets for
    frequent classes; :class:`classfair.nn.EstimatedOffsetLinear` computes its own in the same way from its centres.
    Source: Kim and Kim 2021, "Imbalanced image classification with estimated offset", section 3.1.

    Args:
        weight: ``(C, D)`` rows w of a classifier, any float.
        mean: ``(C, D)`` means of the features of each class, e.g. of ``class_moments`` or ``ClassStatistics``.

    Returns:
        ``(C,)`` float32, or float64 where one of both is float64; 0 for a mean of 0, as of a class never seen.

    Gradient: both, any order.

    Raises:
        TypeError, ValueError: ``empirical_offset: expected X, got Y``.

    Example:
        >>> classfair.empirical_offset(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 5.0], [0.0, 4.0]]))
        tensor([3., 2.])
    """
    _check("empirical_offset", weight, mean)
    acc = torch.promote_types(check.acc_dtype(weight), check.acc_dtype(mean))
    return 0.5 * (weight.to(acc) * mean.to(acc)).sum(1)


@torch.no_grad()
def boundary_distance(weight: Tensor, offset: Tensor, mean: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Distance of the mean of each class from its boundary with each other class.

    .. math:: d_{jk} = \frac{\lvert \mu_j \cdot (w_j - w_k) - w_{j0} + w_{k0} \rvert}{\lVert w_j - w_k \rVert}

    With :math:`w_c = \Sigma^{-1}\mu_c` and the offsets of :func:`empirical_offset` the table is symmetric: the boundary
    lies in the middle. Source: Kim and Kim 2021, eq. 4.

    Args:
        weight: ``(C, D)`` rows w of the classifier, any float.
        offset: ``(C,)`` what the classifier subtracts from its logits: ``head.offset``, or ``-linear.bias``.
        mean: ``(C, D)`` means of the features of each class.
        backend: as in :func:`pair_variance`.

    Returns:
        ``(C, C)`` float32, or float64 where one of them is float64. 0 at j = k; NaN for two classes with equal weights,
        which have no boundary. No gradient.

    Raises:
        TypeError, ValueError: ``boundary_distance: expected X, got Y``.

    Example:
        >>> mean = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # and so, with unit covariance, the weights
        >>> classfair.boundary_distance(mean, classfair.empirical_offset(mean, mean), mean).square().round()
        tensor([[0., 2.],
                [2., 0.]])
    """
    function = "boundary_distance"
    _check(function, weight, mean)
    check.check_floats(function, "offset", offset, weight.shape[:1])
    check.check_device(function, "offset", offset, weight.device, "weight")
    backend = backends.choose("pair_terms", weight.device, backend)
    acc = check.acc_dtype(weight)
    for other in (offset, mean):
        acc = torch.promote_types(acc, check.acc_dtype(other))
    weight, offset, mean = weight.to(acc), offset.to(acc), mean.to(acc)
    classes = torch.arange(len(weight), device=weight.device)
    count = torch.full((), len(weight), device=weight.device)
    square = ops.pair_terms(weight.contiguous(), None, classes, count, want_square=True, backend=backend).square
    assert square is not None
    # What all rows share drops out of every difference, and would only cancel.
    centred = weight - weight.mean(0)
    with torch.autocast(weight.device.type, enabled=False):
        product = mean @ centred.T  # (C, C)
    gap = (product.diag() - offset)[:, None] - (product - offset)
    distance = torch.where(square > 0, gap.abs() / square.sqrt(), torch.nan)
    return distance.fill_diagonal_(0.0)


def _check(function: str, weight: Any, mean: Any) -> None:
    check.check_matrix(function, "weight", weight)
    check.check_floats(function, "mean", mean, weight.shape)
    check.check_device(function, "mean", mean, weight.device, "weight")
