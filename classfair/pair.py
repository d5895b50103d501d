"""Additive logit terms that depend on the true class and the competitor."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class PairTerms:
    """Rows of a (class, competitor) table for the labels of one batch only.

    ``rows[slot[n], c]`` is added to logit c of sample n. At C = 1000 and N = 256 this holds a quarter of the full
    (C, C) table; at C = 8142 a thirtieth. Build the slots with :func:`classfair.ops.label_index`.

    Args:
        rows: ``(M, C)`` floating; receives gradient, the sum over the samples of a slot.
        slot: ``(N,)`` int64 in [0, M); -1 (ignored samples) adds nothing.
        label_of_slot: ``(M,)`` int64, the label whose row it is.
        num_slots: ``()`` int64, slots in use.

    Two terms of the same batch add up, and scale by a number or a 0-d tensor.

    Example:
        >>> table = torch.zeros(5, 5).fill_diagonal_(-1.0)
        >>> target = torch.tensor([3, 1, 3])
        >>> index = classfair.ops.label_index(target, num_classes=5)
        >>> pair = PairTerms(table[index.key_of_slot], index.slot, index.key_of_slot, index.num_slots)
        >>> logits = torch.zeros(3, 5)
        >>> same = classfair.cross_entropy(logits, target, pair=table)
        >>> torch.equal(classfair.cross_entropy(logits, target, pair=0.5 * pair + 0.5 * pair), same)
        True
    """

    rows: Tensor
    slot: Tensor
    label_of_slot: Tensor
    num_slots: Tensor

    def _with(self, rows: Tensor) -> Self:
        return type(self)(rows, self.slot, self.label_of_slot, self.num_slots)

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, PairTerms):
            return NotImplemented
        if self.rows.shape != other.rows.shape:
            raise ValueError(
                f"PairTerms: expected rows of shape {tuple(self.rows.shape)}, got {tuple(other.rows.shape)}"
            )
        return self._with(self.rows + other.rows)

    def __mul__(self, scale: float | Tensor) -> Self:
        return self._with(self.rows * scale)

    __rmul__ = __mul__
