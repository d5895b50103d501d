"""Cross-entropy that trusts a label the less, the less the model believes it."""

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.functional import cross_entropy


def generalized_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    q: float = 0.7,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Between cross-entropy (q to 0) and the mean absolute error (q = 1): :math:`(1 - p_y^q)/q`.

    Its gradient is that of cross-entropy times :math:`p_y^q`: samples that the model finds easy count more, hard ones,
    and wrong labels, less. So a model trained with it takes up what is easiest, such as a colour that goes along with
    the classes: the biased model of "learning from failure" (whose code multiplies the loss by q).
    Source: Zhang and Sabuncu 2018, eq. 6; Nam et al. 2020, "Learning from failure", eq. 1.

    Args:
        logits: ``(N, C)`` or ``(N, C, d1, ...)`` floating.
        target: ``(N,)`` or ``(N, d1, ...)`` int64 or uint8 labels; mixtures and probabilities are refused.
        q: in (0, 1].
        ignore_index, reduction, backend: as in :func:`classfair.cross_entropy`.

    Returns:
        A loss in [0, 1/q] of each label, or their mean or sum, at least float32. Gradient: ``logits``, every order.
        Deterministic.

    Raises:
        TypeError, ValueError: as :func:`classfair.cross_entropy`; a q out of range; a target that is not of labels.
        IndexError: a label out of range, on the CPU.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> classfair.generalized_cross_entropy(logits, torch.tensor([2]), q=0.5).item()  # (1 - 0.5) / 0.5
        1.0
    """
    name = "generalized_cross_entropy"
    check.check_choice(name, "reduction", reduction, check.REDUCTIONS)
    check.check_number(name, "q", q, 0.0, 1.0)
    if q == 0:
        raise ValueError(f"{name}: expected q > 0, got {q}: that is cross-entropy")
    if not isinstance(target, Tensor) or target.is_floating_point():
        got = "probabilities" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"{name}: expected target as a tensor of labels, got {got}")
    plain = cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", backend=backend)
    each = -torch.expm1(-q * plain) / q  # p_y is exp(-plain): no digit is lost near 1
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / (target != ignore_index).sum()
