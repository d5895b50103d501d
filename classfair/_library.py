"""The schemas of the primitives, defined once for every back-end that has kernels.

A back-end is an operator namespace: ``torch.ops.classfair_native`` and ``torch.ops.classfair_triton`` hold
functions of the same names and schemas. C++ registers its implementations under the first, Triton under the second.
"""

from collections.abc import Callable, Sequence

import torch

NAMESPACES = ("classfair_native", "classfair_triton")
_libraries = {name: torch.library.Library(name, "DEF") for name in NAMESPACES}


def define(schema: str, fake: Callable, namespaces: Sequence[str] = NAMESPACES) -> None:
    """Define one operator, with its fake kernel, in every namespace that has it."""
    for name in namespaces:
        library = _libraries[name]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        operator = schema.partition("(")[0]
        torch.library.register_fake(f"{name}::{operator}", fake, lib=library)
        # The Functions around the operators are their autograd. What torch asks every argument otherwise, to warn where
        # a gradient is missing, takes 1.5 microseconds a call.
        library.impl(operator, torch.library.fallthrough_kernel, "Autograd")
