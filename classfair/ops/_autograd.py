"""Calling an autograd Function at the price of its own work."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def transformed() -> bool:
    """Whether a function transform, a tracer or the compiler looks on, who must see every tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient * upstream``, in place where it can be: nobody else may hold ``gradient``."""
    batched = transformed() or torch._C._functorch.is_legacy_batchedtensor(upstream)
    return gradient * upstream if batched else gradient.mul_(upstream)


def quick_apply(function: type[Function], *, first_only: bool = False) -> Callable[..., Any]:
    """``function.apply`` without what only transforms and the compiler need.

    first_only: return the first output. The others are outputs only because transforms save nothing else.

    For a Function with ``setup_context`` torch binds the arguments through ``inspect`` on every call: 50 to 120
    microseconds, as much as a loss on a small batch. One whose ``forward`` takes ``ctx`` is spared that, but neither
    transforms nor ``torch.compile`` would have its vmap rule, so that they get the original.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output[0] if first_only else output

    undefined = Function.setup_context  # how torch knows that `forward` does its work
    members = {"forward": staticmethod(forward), "setup_context": staticmethod(undefined)}
    eager: type[Function] = type(function.__name__, (function,), {"__doc__": function.__doc__, **members})

    def apply(*inputs: Any) -> Any:
        if not transformed():
            return eager.apply(*inputs)
        output = function.apply(*inputs)
        return output[0] if first_only else output

    return apply
