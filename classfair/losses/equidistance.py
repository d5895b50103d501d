"""Classes at equal distances from each other."""

import torch
from torch import Tensor

from classfair import _validate as check


def equidistance_loss(mean: Tensor, *, normalize: bool = True) -> Tensor:
    r"""How unequal the squared distances between classes are.

    .. math:: \sum_{c<j}\left(\lVert\mu_c-\mu_j\rVert^2-u\right)^2, \qquad
              u = \tfrac{2}{C(C-1)}\sum_{c<j}\lVert\mu_c-\mu_j\rVert^2

    Normalised, it is divided by the number of pairs and by :math:`u^2`: the squared coefficient of variation, which
    neither the number of classes nor the scale of the vectors changes. The plain sum grows with the fourth power of
    that scale, so that shrinking all vectors meets it. Distances are computed from centred vectors: a common offset,
    however large, costs no digits.
    Source: Hayat et al. 2019, "Gaussian affinity for max-margin class imbalanced learning", eq. 8; Wu et al. 2023,
    eq. 16.

    Args:
        mean: ``(C, D)`` floating: centres, class means or rows of a classifier.
        normalize: see above; False is the sum as it is printed.

    Returns:
        A scalar, at least float32, >= 0. With fewer than three classes, and where all vectors are equal, it is 0 with
        gradient 0. Gradient: ``mean``, every order, through u too. Deterministic.

    Raises:
        TypeError, ValueError: a ``mean`` that is no floating matrix with a row; a ``normalize`` that is no bool.

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [2.0]])  # squared distances 1, 1 and 4, mean 2
        >>> classfair.losses.equidistance_loss(line).item(), classfair.equidistance_loss(line, normalize=False).item()
        (0.5, 6.0)
    """
    check.check_matrix("equidistance_loss", "mean", mean)
    check.check_flag("equidistance_loss", "normalize", normalize)
    classes = mean.shape[0]
    centred = mean.to(check.acc_dtype(mean))
    centred = centred - centred.mean(0)
    if classes < 3:
        return centred.sum() * 0.0
    pairs = classes * (classes - 1) / 2
    squared = centred.square().sum(1)
    distance = squared[:, None] + squared - 2 * centred @ centred.T  # (C, C), every pair twice
    # Its diagonal is 0 up to rounding; without it the mean distance is that of pairs.
    off = ~torch.eye(classes, dtype=torch.bool, device=mean.device)
    average = classes * squared.sum() / pairs  # of all pairs, because the vectors are centred
    spread = torch.where(off, distance - average, 0.0).square().sum() / 2
    if not normalize:
        return spread
    apart = average > 0
    return torch.where(apart, spread / (pairs * torch.where(apart, average, 1.0).square()), 0.0)
