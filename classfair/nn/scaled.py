"""Learnable weight scaling: a trained classifier whose classes get a factor each."""

from typing import Any

import torch
from torch import Tensor, nn

from classfair import _validate as check


class ScaledLinear(nn.Module):
    r"""A trained classifier that stays as it is, with a factor for each class: :math:`z_c = s_c\,(w_c^\top h + b_c)`.

    The second stage of learnable weight scaling: features and directions are kept, the lengths of the class vectors are
    trained, on class-balanced batches. It starts as the classifier that it is given.
    Source: Kang et al. 2020, "Decoupling representation and classifier", section 4; their code scales the bias too.

    Args:
        linear: the classifier, with ``weight`` ``(C, D)``. Its parameters are frozen.

    Shape: ``(..., D)`` to ``(..., C)``.
    State: ``scale`` ``(C,)``, a parameter, at least float32, and what ``linear`` has.
    Gradients: input and ``scale``, every order.

    Raises:
        TypeError: ``linear`` is no module with a weight of two dimensions.

    Example:
        >>> head = classfair.nn.ScaledLinear(torch.nn.Linear(4, 3))
        >>> [name for name, p in head.named_parameters() if p.requires_grad]
        ['scale']
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight = getattr(linear, "weight", None)
        if not isinstance(linear, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(
                f"ScaledLinear: expected a module with a weight of shape (C, D), got {type(linear).__name__}"
            )
        self.linear = linear.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(len(weight), dtype=check.acc_dtype(weight), device=weight.device))

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """``(C, D)``, scaled."""
        weight: Any = self.linear.weight
        return (self.scale[:, None] * weight).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """``(C,)``, scaled."""
        bias: Any = getattr(self.linear, "bias", None)
        return None if bias is None else (self.scale * bias).to(bias.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., C)``."""
        logits = self.linear(input)
        return (self.scale * logits).to(logits.dtype)
