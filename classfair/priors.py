"""Vectors made from class counts: offsets, margins and weights per class, and what they do to a finished head."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.statistics import BatchStats, effective_frequency

# Stands for a class without a sample, as in the authors' code (Menon et al. 2021): log(1e-12) = -27.6, never -inf.
_MIN_PRIOR = 1e-12
# A class that is never recognised would otherwise get all the weight there is.
MIN_FREQUENCY = 1e-3


def _warn_of_absent(counts: Tensor, consequence: str) -> None:
    if missing := int((counts == 0).sum()):
        warnings.warn(
            f"classfair: {missing} of {counts.numel()} classes have no sample; {consequence}",
            UserWarning,
            stacklevel=3,
        )


def logit_adjustment(class_counts: Any, tau: float = 1.0) -> Tensor:
    r"""Training offset of logit adjustment: :math:`\tau \log \pi_c`, :math:`\pi_c = n_c / \sum_j n_j`.

    Source: Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 10.

    Args:
        class_counts: ``(C,)`` counts >= 0 of the training set, in any unit: tensor, array or sequence.
        tau: strength; 1 is consistent for the balanced error.

    Returns:
        ``(C,)`` float32, <= 0 for tau >= 0, to be added to the logits in training: ``cross_entropy(offset=...)``.

    Warns:
        UserWarning: a class has no sample; its prior is taken as 1e-12.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension.

    Example:
        >>> logit_adjustment([90, 10]).tolist()
        [-0.10536051541566849, -2.3025851249694824]
    """
    check.check_number("logit_adjustment", "tau", tau)
    counts = check.check_counts("logit_adjustment", class_counts)
    _warn_of_absent(counts, "their prior is taken as 1e-12")
    return (tau * (counts / counts.sum()).clamp_min(_MIN_PRIOR).log()).float()


def posthoc_logit_adjustment(logits: Tensor, class_counts: Any, tau: float = 1.0) -> Tensor:
    r"""Logits to predict with from a model trained with plain cross-entropy: :math:`z_c - \tau \log \pi_c`.

    Never for a model that was trained with :class:`LogitAdjustedLoss`: it would be adjusted twice.
    Source: Menon et al. 2021, eq. 9.

    Args:
        logits: ``(N, C)`` or ``(N, C, d1, ...)`` floating.
        class_counts: ``(C,)`` counts of the training set, as in :func:`logit_adjustment`.
        tau: strength.

    Returns:
        Adjusted logits, of the shape and dtype of ``logits``. Gradient: ``logits``.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]])
        >>> posthoc_logit_adjustment(logits, [90, 10]).argmax(1)
        tensor([1])
    """
    check.check_logits("posthoc_logit_adjustment", logits)
    offset = logit_adjustment(class_counts, tau).to(logits.device, logits.dtype)
    num_classes = logits.shape[min(1, logits.dim() - 1)]
    if offset.numel() != num_classes:
        raise ValueError(
            f"posthoc_logit_adjustment: expected class_counts of shape ({num_classes},), got ({offset.numel()},)"
        )
    return logits - (offset if logits.dim() == 1 else offset.view(-1, *(1,) * (logits.dim() - 2)))


def ldam_margins(class_counts: Any, max_margin: float = 0.5) -> Tensor:
    r"""Margins of LDAM, larger for rarer classes: :math:`m_c = m_{\max}\, n_c^{-1/4} / \max_j n_j^{-1/4}`.

    They are distances between cosines: on logits :math:`s \cos\theta` the margin to subtract is :math:`s\,m_c`, which
    is what :class:`LDAMLoss` does.
    Source: Cao et al. 2019, "Learning imbalanced datasets with label-distribution-aware margin loss", section 3.2.

    Args:
        class_counts: ``(C,)`` counts >= 0 of the training set: tensor, array or sequence.
        max_margin: margin >= 0 of the rarest class.

    Returns:
        ``(C,)`` float32 in (0, max_margin], to be subtracted from the true class's logit:
        ``cross_entropy(margin=scale * ...)``.

    Warns:
        UserWarning: a class has no sample; it is treated as if it had one.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension; max_margin < 0.

    Example:
        >>> ldam_margins([10000, 16, 1]).tolist()
        [0.05000000074505806, 0.25, 0.5]
    """
    check.check_number("ldam_margins", "max_margin", max_margin, 0.0)
    counts = check.check_counts("ldam_margins", class_counts)
    _warn_of_absent(counts, "they are treated as if they had one")
    # With counts below 1 (shares of the data, say) an absent class is as rare as the rarest one, not rarer than none.
    rarest = counts[counts > 0].min().clamp_max(1.0)
    relative = torch.where(counts == 0, rarest, counts) ** -0.25
    return (max_margin * relative / relative.max()).float()


def effective_number_weights(class_counts: Any, beta: float) -> Tensor:
    r"""Class-balanced weights :math:`w_c \propto (1 - \beta) / (1 - \beta^{n_c})`, one over the effective number.

    beta = 0 gives 1 for every class, beta towards 1 gives :math:`1 / n_c`. They sum to the number of classes with
    samples, so that a present class weighs 1 in the mean.
    Source: Cui et al. 2019, "Class-balanced loss based on effective number of samples", sections 3 and 4.

    Args:
        class_counts: ``(C,)`` counts >= 0 of the training set: tensor, array or sequence.
        beta: in [0, 1); the authors use 0.9, 0.99, 0.999 and 0.9999.

    Returns:
        ``(C,)`` float32 >= 0, for ``cross_entropy(weight=...)`` in training.

    Warns:
        UserWarning: a class has no sample; its weight is 0.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension; beta out of range.

    Example:
        >>> [round(w, 4) for w in effective_number_weights([100, 10, 1], beta=0.9).tolist()]
        [0.2393, 0.3674, 2.3932]
    """
    check.check_number("effective_number_weights", "beta", beta)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"effective_number_weights: expected beta in [0, 1), got {beta}")
    counts = check.check_counts("effective_number_weights", class_counts)
    _warn_of_absent(counts, "their weight is 0")
    present = counts > 0
    # 1 - beta^n as it stands is 0 in float32 from beta = 1 - 1e-8 on.
    log_beta = math.log(beta) if beta else -math.inf
    covered = -torch.expm1(torch.where(present, counts, 1.0) * log_beta)
    weights = torch.where(present, 1.0 / covered, 0.0)
    return (weights * (present.sum() / weights.sum())).float()


def effective_counts(stats: BatchStats, class_counts: Any = None) -> Tensor:
    r"""Class counts by which a class is as rare as it is hard: :math:`n_c \max(EF_c, 10^{-3})`.

    :math:`EF` is :func:`effective_frequency`, the mean probability of the true class, of a previous run on validation
    data. Two re-weightings of the next run use it, and a class that is never recognised must not get infinite weight
    in either:

    - logit adjustment with EF in the place of counts:
      ``LogitAdjustedLoss(effective_counts(stats, torch.ones(C)))``;
    - class-balanced weights with EF times the number of samples it was measured on:
      ``ClassBalancedLoss(effective_counts(stats))``.

    Source: Cui et al. 2024, "Classes are not equal", eq. 11 (which leaves open how it enters the two: both forms, and
    the bound, are this library's reading).

    Args:
        stats: of a whole validation set with hard labels, e.g. the sum of ``criterion.with_stats(...)[1]`` over it.
        class_counts: ``(C,)`` the :math:`n_c`; None: the samples in ``stats``.

    Returns:
        ``(C,)`` float32. A class that ``stats`` has not seen counts as one of mean EF and, without ``class_counts``, of
        as many samples as the others have on average: it must not lose its weight in training.

    Raises:
        TypeError, ValueError: ``stats`` that are no BatchStats or hold no sample; counts of another size.

    Example:
        >>> logits, target = torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1])
        >>> _, stats = classfair.cross_entropy_with_stats(logits, target)
        >>> [round(n, 3) for n in effective_counts(stats).tolist()]
        [0.982, 0.018]
    """
    frequency = effective_frequency(stats).detach().double()
    if bool(frequency.isnan().all()):
        raise ValueError("effective_counts: expected statistics of at least one sample, got none")
    counts = stats.count.sum(0) if class_counts is None else check.check_counts("effective_counts", class_counts)
    if counts.shape != frequency.shape:
        expected, got = tuple(frequency.shape), tuple(counts.shape)
        raise ValueError(f"effective_counts: expected class_counts of shape {expected}, got {got}")
    return counts_of_frequency(frequency, counts.to(frequency), measured=class_counts is None).float()


def counts_of_frequency(frequency: Tensor, counts: Tensor, measured: bool) -> Tensor:
    """:func:`effective_counts` of (C,) EF, NaN for classes not seen, and counts: ``measured`` if of its samples."""
    unseen = frequency.isnan()
    if measured:
        counts = torch.where(unseen, counts.sum() / (~unseen).sum(), counts)
    return counts * torch.where(unseen, frequency.nanmean(), frequency).clamp_min(MIN_FREQUENCY)


def tau_normalize(weight: Tensor, tau: float) -> Tensor:
    r"""Rows of a trained classifier with their norms evened out: :math:`w_c / \lVert w_c \rVert^\tau`.

    Rare classes end up with shorter rows; tau = 1 makes all of them unit vectors, tau = 0 changes nothing. Choose tau
    on validation data; leave out the bias, as the authors do.
    Source: Kang et al. 2020, "Decoupling representation and classifier", section 4.

    Args:
        weight: ``(C, D)`` floating, e.g. ``linear.weight``.
        tau: finite, usually in [0, 1].

    Returns:
        ``(C, D)`` of the dtype of ``weight``; rows of zeros stay zero. Gradient: ``weight``, any order.

    Raises:
        TypeError, ValueError: a weight that is no floating matrix; a tau that is no finite number.

    Example:
        >>> tau_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.5]]), tau=1.0).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """
    check.check_number("tau_normalize", "tau", tau)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise (ValueError if isinstance(weight, Tensor) else TypeError)(
            f"tau_normalize: expected weight as a (C, D) tensor, got {got}"
        )
    check.check_floats("tau_normalize", "weight", weight, weight.shape)
    rows = weight.to(check.acc_dtype(weight))
    squared = rows.square().sum(1, keepdim=True)  # (C, 1)
    # Masked before the power, which has no derivative at 0.
    return (rows * torch.where(squared == 0, 1.0, squared) ** (-tau / 2)).to(weight.dtype)
