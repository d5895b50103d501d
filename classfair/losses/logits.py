"""Losses of logits and labels alone: vectors of class counts on top of :func:`classfair.cross_entropy`."""

from typing import Any, Unpack

from classfair import _validate as check
from classfair.losses._buffers import Keywords
from classfair.losses.base import CrossEntropyLoss
from classfair.priors import effective_number_weights, ldam_margins, logit_adjustment


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

    def __init__(self, class_counts: Any, tau: float = 1.0, **keywords: Unpack[Keywords]) -> None:
        super().__init__(**keywords)
        self.tau = tau
        self._make_own("offset", logit_adjustment(class_counts, tau))

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"


class LDAMLoss(CrossEntropyLoss):
    r"""Label-distribution-aware margins: :math:`s\,m_y` off the true logit, :math:`m_c \propto n_c^{-1/4}`.

    Made for a cosine head, whose logits :math:`z_c = s \cos\theta_c` carry the scale already:
    :math:`s(\cos\theta_y - m_y) = z_y - s\,m_y`. ``scale`` must be that head's; for an ordinary linear head it is 1,
    and the margins are distances between logits. In evaluation it is plain cross-entropy.
    Source: Cao et al. 2019, section 3.2; with :class:`DeferredReweighting` it is LDAM-DRW.

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence.
        max_margin: margin >= 0 of the rarest class, as a difference of cosines.
        scale: s > 0 of the head.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; labels or :class:`MixedTarget` (probabilities have no true class).
    State: ``margin`` ``(C,)``, a buffer: ``scale * ldam_margins(class_counts, max_margin)``. No parameters.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension; max_margin or scale out of
            range.

    Example:
        >>> criterion = classfair.LDAMLoss([10000, 1], scale=10.0)
        >>> criterion.margin.tolist()
        [0.5, 5.0]
        >>> cosine = torch.tensor([[0.2, 0.9]], requires_grad=True)
        >>> round(criterion(10 * cosine, torch.tensor([1])).item(), 4)  # log(1 + exp(2 - (9 - 5)))
        0.1269
    """

    def __init__(
        self, class_counts: Any, max_margin: float = 0.5, *, scale: float = 30.0, **keywords: Unpack[Keywords]
    ) -> None:
        super().__init__(**keywords)
        check.check_real("LDAMLoss", "scale", scale)
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"LDAMLoss: expected finite scale > 0, got {scale}")
        self.max_margin, self.scale = max_margin, scale
        self._make_own("margin", scale * ldam_margins(class_counts, max_margin))

    def extra_repr(self) -> str:
        return f"max_margin={self.max_margin}, scale={self.scale}, {super().extra_repr()}"


class ClassBalancedLoss(CrossEntropyLoss):
    r"""Cross-entropy or focal loss with weights one over the effective number of samples of a class.

    "mean" divides by the weights of the labels present, as torch does. With gamma the weight stays outside of the
    focal term, whose :math:`p` is that of the unweighted loss: :math:`w_y (1 - p_y)^\gamma (-\log p_y)`. In
    evaluation it is plain cross-entropy.
    Source: Cui et al. 2019, section 4.

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence.
        beta: in [0, 1), see :func:`effective_number_weights`.
        gamma: focusing exponent >= 0; 0 is plain cross-entropy.
        weight: further class weights, multiplied with these; unlike these, they apply in evaluation as well.
        ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; target as in :func:`classfair.cross_entropy`.
    State: ``reweight`` ``(C,)``, a buffer. No parameters.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension; beta or gamma out of range.

    Example:
        >>> criterion = classfair.ClassBalancedLoss([100, 1], beta=0.99)
        >>> [round(w, 4) for w in criterion.reweight.tolist()]
        [0.0311, 1.9689]
    """

    def __init__(
        self, class_counts: Any, beta: float = 0.9999, gamma: float = 0.0, **keywords: Unpack[Keywords]
    ) -> None:
        super().__init__(**keywords)
        check.check_number("ClassBalancedLoss", "gamma", gamma, 0.0)
        self.beta, self.gamma = beta, float(gamma)
        self._make_own("reweight", effective_number_weights(class_counts, beta))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, {super().extra_repr()}"


class FocalLoss(CrossEntropyLoss):
    r"""Focal loss :math:`(1 - p_y)^\gamma (-\log p_y)` over the softmax: what is learnt already counts less.

    In evaluation it is plain cross-entropy.
    Source: Lin et al. 2017, "Focal loss for dense object detection", eq. 4; their alpha is ``weight``.

    Args:
        gamma: focusing exponent >= 0; 0 is plain cross-entropy.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`. ``weight`` stays
            outside: :math:`p_y` is that of the unweighted loss. Smoothing adds its term unfocused.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; labels or :class:`MixedTarget` (probabilities have no true class).
    State: none of its own. No parameters.

    Raises:
        TypeError, ValueError: gamma < 0 or no number.

    Example:
        >>> criterion = classfair.FocalLoss(gamma=2.0)
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> round(criterion(logits, torch.tensor([1])).item(), 4)  # 0.5 ** 2 * log 2
        0.1733
    """

    def __init__(self, gamma: float = 2.0, **keywords: Unpack[Keywords]) -> None:
        super().__init__(**keywords)
        check.check_number("FocalLoss", "gamma", gamma, 0.0)
        self.gamma = float(gamma)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"
