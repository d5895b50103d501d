"""Modules that hold state: statistics, and constants of a constructor."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
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


class Restorable(KeepsPrecision):
    """A module that can give its buffers the values that they had when it was made.

    Under ``torch.device("meta")``, and after ``to_empty``, a buffer has no values. Constants are therefore computed on
    the CPU and kept there as well, outside of the state.
    """

    _place: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Knows the device of the module where nothing else is there to know it.
        self.register_buffer("_place", torch.empty(0, dtype=torch.float32), persistent=False)
        self._constants: dict[str, Tensor] = {"_place": torch.empty(0, dtype=torch.float32, device="cpu")}

    def _keep(self, name: str, value: Tensor | float) -> Tensor:
        """Note a constant, which :meth:`reset_parameters` restores; a float becomes float32."""
        if isinstance(value, Tensor):
            kept = value.detach().to("cpu", copy=True)
        else:
            kept = torch.tensor(value, dtype=torch.float32, device="cpu")
        self._constants[name] = kept
        return kept

    def _register_constant(
        self, name: str, value: Tensor | float, shape: Sequence[int] | None = None, persistent: bool = True
    ) -> None:
        """A buffer that begins with a constant, expanded to a shape."""
        kept = self._keep(name, value)
        start = kept if shape is None else kept.expand(*shape)
        buffer = start.to(self._place.device, copy=True, memory_format=torch.contiguous_format)
        self.register_buffer(name, buffer, persistent)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give the buffers the values that they had when the module was made, as after ``to_empty``."""
        for name, value in self._constants.items():
            buffer = getattr(self, name)
            if buffer is None:
                setattr(self, name, value.to(self._place.device, copy=True))
            else:
                buffer.copy_(value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """``assign=True`` is for modules on the meta device; what is not in the state has to leave it, too."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if local_metadata.get("assign_to_params_buffers", False) and self._place.is_meta:
            device = next((value.device for value in state_dict.values()), "cpu")
            for name in self._non_persistent_buffers_set:
                self._buffers[name] = self._constants[name].to(device, copy=True)
