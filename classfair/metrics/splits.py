"""Mean accuracy of groups of classes: by training images, by difficulty."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from classfair.metrics._inputs import as_accuracies, as_class_counts, check_shots
from classfair.metrics.base import ClassMetric
from classfair.metrics.counts import SHOTS, THIRDS
from classfair.statistics import rates


class _SplitAccuracy(ClassMetric):
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    members: Tensor

    _names: tuple[str, ...]

    def compute(self) -> dict[str, Tensor]:
        means = rates.mean_of_members(self.accuracies(), self.members)
        return dict(zip(self._names, means.unbind(-1), strict=True))


class ShotAccuracy(_SplitAccuracy):
    """Mean class accuracy of the many-, medium- and few-shot classes, by training images.

    Groups of Liu et al. 2019 with the boundaries of Kang et al. 2020: many > ``many``, few < ``few``, medium between.

    Args:
        train_count: ``(C,)`` training images per class; tensor, array or sequence. It says what C is.
        many: upper boundary of medium, in images.
        few: lower boundary of medium, in images; at most ``many``.
        num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.

    Returns:
        dict of float64 scalars ``many``, ``medium``, ``few``, or ``(G,)`` where G > 1, in [0, 1]; NaN for a
        group without a class that has samples.

    Example:
        >>> metric = classfair.metrics.ShotAccuracy([500, 50, 5])
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'many': 1.0, 'medium': 0.5, 'few': nan}
    """

    _names = SHOTS

    def __init__(self, train_count: Any, *, many: float = 100, few: float = 20, **kwargs: Any) -> None:
        counts = as_class_counts(train_count, "ShotAccuracy", "train_count")
        check_shots("ShotAccuracy", many, few)
        super().__init__(counts.numel(), **kwargs)
        self.register_buffer("members", rates.shot_members(counts, many, few), persistent=False)


class DifficultyAccuracy(_SplitAccuracy):
    """Mean class accuracy of the easy, medium and hard classes, as a reference model finds them.

    Classes sorted by the reference's accuracy from high to low (ties by class id) and cut into thirds, the first ones
    larger where C is no multiple of three (Cui et al. 2024, Table 1).

    Args:
        reference_accuracy: ``(C,)`` accuracies of the reference model in [0, 1], or NaN: in no third. It says what C
            is.
        num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.

    Returns:
        dict of float64 scalars ``easy``, ``medium``, ``hard``, or ``(G,)`` where G > 1, in [0, 1]; NaN for a
        third without a class that has samples.

    Example:
        >>> metric = classfair.metrics.DifficultyAccuracy([0.5, 0.7, 0.9])
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'easy': nan, 'medium': 0.5, 'hard': 1.0}
    """

    _names = THIRDS

    def __init__(self, reference_accuracy: Any, **kwargs: Any) -> None:
        reference = as_accuracies(reference_accuracy, "DifficultyAccuracy", "reference_accuracy")
        super().__init__(reference.numel(), **kwargs)
        self.register_buffer("members", rates.difficulty_members(reference), persistent=False)
