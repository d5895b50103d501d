"""Drop-in losses that are vectors on top of :func:`classfair.cross_entropy`, and those vectors."""

import warnings
from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair._state import KeepsPrecision
from classfair.functional import cross_entropy, cross_entropy_with_stats
from classfair.statistics import BatchStats
from classfair.targets import MixedTarget

# Stands for a class without a sample, as in the authors' code (Menon et al. 2021): log(1e-12) = -27.6, never -inf.
_MIN_PRIOR = 1e-12


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
    counts = check.check_counts("logit_adjustment", class_counts)
    if bool((counts == 0).any()):
        missing = int((counts == 0).sum())
        warnings.warn(
            f"classfair: {missing} of {counts.numel()} classes have no sample; their prior is taken as 1e-12",
            UserWarning,
            stacklevel=2,
        )
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


class CrossEntropyLoss(KeepsPrecision):
    """:class:`torch.nn.CrossEntropyLoss` with focal gamma and per-class statistics from the same pass.

    In evaluation (``criterion.eval()``, or under ``no_grad`` or ``inference_mode``) the losses built on this class
    compute plain cross-entropy: what they perturb is for training only.

    Args:
        weight: ``(C,)`` class weights >= 0, a buffer.
        ignore_index, reduction, label_smoothing: as in :func:`classfair.cross_entropy`.
        backend: as in :func:`classfair.cross_entropy`.

    Example:
        >>> criterion = classfair.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss, stats = criterion.with_stats(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]))
        >>> stats.count.tolist()
        [[2, 1, 1]]
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check.check_choice(name, "reduction", reduction, check.REDUCTIONS)
        check.check_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend

    def perturbation(self) -> dict[str, Any]:
        """Keyword arguments of :func:`classfair.cross_entropy` that apply in training only."""
        return {}

    def _arguments(self) -> dict[str, Any]:
        active = self.training and torch.is_grad_enabled()
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "backend": self.backend,
            **(self.perturbation() if active else {}),
        }

    def forward(self, logits: Tensor, target: Tensor | MixedTarget) -> Tensor:
        """The loss; shapes as in :func:`classfair.cross_entropy`."""
        return cross_entropy(logits, target, **self._arguments())

    def with_stats(
        self,
        logits: Tensor,
        target: Tensor | MixedTarget,
        *,
        group: Tensor | None = None,
        num_groups: int | None = None,
        joint: bool = False,
        **options: Any,
    ) -> tuple[Tensor, BatchStats]:
        """The loss and the :class:`BatchStats` of the same pass, as :func:`classfair.cross_entropy_with_stats`.

        ``options``: its ``label``, ``confusion`` and ``differentiable``.
        """
        return cross_entropy_with_stats(
            logits,
            target,
            group=group,
            num_groups=num_groups,
            joint=joint,
            **options,
            **self._arguments(),
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class LogitAdjustedLoss(CrossEntropyLoss):
    r"""Cross-entropy on :math:`z_c + \tau \log \pi_c`: every class costs the same, however rare it is.

    In evaluation it is plain cross-entropy; ``model(x).argmax(1)`` is the prediction, without any adjustment.
    Source: Menon et al. 2021, eq. 10 (tau = 1: also known as balanced softmax, Ren et al. 2020).

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence, see
            :func:`classfair.class_counts`.
        tau: strength.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; target as in :func:`classfair.cross_entropy`.
    State: ``offset`` ``(C,)``, a buffer. No parameters.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension.

    Example:
        >>> criterion = classfair.LogitAdjustedLoss([90, 10])
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> round(criterion(logits, torch.tensor([1])).item(), 4)  # -log 0.1
        2.3026
    """

    offset: Tensor

    def __init__(
        self,
        class_counts: Any,
        tau: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )
        self.tau = tau
        self.register_buffer("offset", logit_adjustment(class_counts, tau))

    def perturbation(self) -> dict[str, Any]:
        return {"offset": self.offset}

    def extra_repr(self) -> str:
        return f"num_classes={self.offset.numel()}, tau={self.tau}, {super().extra_repr()}"
