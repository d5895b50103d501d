"""What batch statistics tell of the predictions: how well classes are learnt, and which take others' samples."""

from typing import NamedTuple

from torch import Tensor

from classfair import _validate as check
from classfair.statistics.batch import BatchStats


def effective_frequency(stats: BatchStats) -> Tensor:
    """Mean probability that the samples of a class give to it: how well it is learnt, 1 at best.

    Measure it on validation data: a network that fits all of its training data has 1 everywhere there. Statistics of
    several batches add up (``stats + stats``), and those of groups are summed. :func:`effective_counts` makes class
    counts of it that a re-weighted loss can use.
    Source: Cui et al. 2024, "Classes are not equal: an empirical study on image recognition fairness", eq. 11.

    Args:
        stats: with hard labels (under ``MixedTarget`` a hit is shared between two labels and a count is not).

    Returns:
        ``(C,)`` of the dtype of ``stats.hit``, in [0, 1]; NaN for classes without a sample. Gradient: ``stats.hit``.

    Raises:
        TypeError: ``stats`` that are no BatchStats.

    Example:
        >>> logits, target = torch.zeros(2, 3), torch.tensor([0, 2])
        >>> _, stats = classfair.cross_entropy_with_stats(logits, target)
        >>> effective_frequency(stats)
        tensor([0.3333,    nan, 0.3333])
    """
    if not isinstance(stats, BatchStats):
        raise TypeError(f"effective_frequency: expected stats as BatchStats, got {type(stats).__name__}")
    return stats.hit.sum(0) / stats.count.sum(0)


#: What :func:`prediction_bias` can divide by.
NORMALIZE = ("none", "sum", "samples")


class PredictionBias(NamedTuple):
    """Probability that classes receive, ``(C,)`` or by group ``(G, C)``; see :func:`prediction_bias`.

    Example:
        >>> _, stats = classfair.cross_entropy_with_stats(torch.zeros(1, 2), torch.tensor([0]))
        >>> prediction_bias(stats).negative
        tensor([0.0000, 0.5000])
    """

    negative: Tensor
    positive: Tensor


def prediction_bias(stats: BatchStats, *, normalize: str = "none", by_group: bool = False) -> PredictionBias:
    r"""Probability mass that each class receives from samples of other classes, and from its own.

    :math:`G_n(c) = \sum_{i: y_i \ne c} p(c|x_i)` and :math:`G_p(c) = \sum_{i: y_i = c} p(c|x_i)`. A class with much
    negative mass takes others' samples. With a classifier bias, plain cross-entropy makes :math:`G_n + G_p` the class
    counts of the training set at convergence (lemma 1).
    Source: Cui et al. 2024, "Classes are not equal: an empirical study on image recognition fairness", section 4.2,
    definition 2 (eq. 3 and 4).

    Args:
        stats: with hard labels, of one batch or a sum of many.
        normalize: ``"none"``; ``"sum"``: each of the two sums to 1 over the classes; ``"samples"``: divided by the
            number of samples.
        by_group: for each group, as for the easy, medium and hard classes' samples, instead of over all.

    Returns:
        :class:`PredictionBias` of the dtype of ``stats.mass``; NaN where it is divided by 0. Gradient: ``stats.mass``
        and ``stats.hit``.

    Raises:
        TypeError, ValueError: stats that are no BatchStats; an unknown normalize.

    Example:
        >>> logits, target = torch.zeros(3, 2), torch.tensor([0, 0, 1])
        >>> _, stats = classfair.cross_entropy_with_stats(logits, target)
        >>> prediction_bias(stats)
        PredictionBias(negative=tensor([0.5000, 1.0000]), positive=tensor([1.0000, 0.5000]))
    """
    if not isinstance(stats, BatchStats):
        raise TypeError(f"prediction_bias: expected stats as BatchStats, got {type(stats).__name__}")
    check.check_choice("prediction_bias", "normalize", normalize, NORMALIZE)
    mass, hit, count = stats.mass, stats.hit, stats.count
    if not by_group:
        mass, hit, count = mass.sum(0), hit.sum(0), count.sum(0)
    negative, positive = (mass - hit).clamp_min(0), hit  # a difference of sums may round to less than nothing
    if normalize == "sum":
        return PredictionBias(negative / negative.sum(-1, keepdim=True), positive / positive.sum(-1, keepdim=True))
    if normalize == "samples":
        samples = count.sum(-1, keepdim=True)
        return PredictionBias(negative / samples, positive / samples)
    return PredictionBias(negative, positive)
