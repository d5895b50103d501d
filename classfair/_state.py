"""Modules that hold statistics."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module whose state keeps its precision: ``.half()`` and ``.to(bfloat16)`` move it but do not round it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype.itemsize < old.dtype.itemsize:
                self._buffers[name] = old.to(new.device)
        return self
