"""How a back-end of a primitive is compared with its oracle: one frame for all primitives.

:mod:`tests.support.primitives` says how each primitive runs and how large its rounding errors may be.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Results = dict[str, Tensor]
#: Compares one result, by name: the one of the back-end, the true one, and the oracle's in the tested dtype.
Rule = Callable[[str, Tensor, Tensor, Tensor], None]

#: Inputs that may be of a low precision; every other float is of its accumulate dtype.
STORED = ("logits", "features")


@dataclass(frozen=True)
class Case:
    """Inputs on the CPU, floats in float64; ``small`` ones serve gradcheck."""

    id: str
    build: Callable[[], Inputs]
    small: bool = False


def by_id(cases: Sequence[Any], *ids: str) -> list[Any]:
    found = [c for c in cases if c.id in ids]
    assert len(found) == len(ids), ids
    return found


class Primitive:
    """What the suite needs to know of a primitive."""

    name: str  # of classfair.backends.PRIMITIVES
    operators: tuple[str, ...]
    cases: Sequence[Any]  # with the attributes of Case
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    strided: tuple[str, ...] = ()  # inputs whose layout is free
    layouts: Sequence[Any] = ()  # cases for layouts
    repeated: Sequence[Any] = ()  # cases that have to give the same bits again
    threaded: Sequence[Any] = ()  # cases that have to give the same bits with any number of threads
    witnesses: Sequence[Any] = ()  # cases that together see every output of every operator
    visible: float = 1e-4  # an error of this size in one element is seen in float32

    def inputs(self, case: Any, dtype: torch.dtype, device: str) -> Inputs:
        return cast(case.build(), dtype, device)

    def run(self, inputs: Inputs, backend: str) -> Results:
        """Every output, every state that is written and every gradient, by name; without what was not asked for."""
        raise NotImplementedError

    def oracle(self, inputs: Inputs) -> Results:
        return self.run(inputs, "reference")

    def rule(self, exact: Inputs, truth: Results, dtype: torch.dtype) -> Rule:
        raise NotImplementedError

    def function(self, inputs: Inputs, backend: str) -> tuple[Callable, tuple[Tensor, ...]]:
        """A function of the differentiable inputs alone, and these."""
        raise NotImplementedError

    def gradcheck_options(self, backend: str) -> dict[str, dict[str, bool]]:
        """Arguments of gradcheck and of gradgradcheck."""
        return {"first": {}, "second": {}}

    def calls(self, namespace: Any, device: str) -> Iterator[tuple[str, tuple]]:
        """Operators and their arguments, for opcheck."""
        raise NotImplementedError


def cast(inputs: Inputs, dtype: torch.dtype, device: str) -> Inputs:
    """The inputs in :data:`STORED` in ``dtype``, other floats in its accumulate dtype, all on a device."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    result = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            floating = dtype if name in STORED else acc
            result[name] = value.to(device, floating if value.is_floating_point() else value.dtype)
    return result


def as_truth(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU."""
    return cast(inputs, torch.float64, "cpu")


def _bits(value: Tensor) -> Tensor:
    """The value, of which NaN equals NaN."""
    return value.nan_to_num(nan=7.0) if value.is_floating_point() else value


def assert_same_bits(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(_bits(got[name]), _bits(value)), f"{name} differs"


def check(primitive: Primitive, inputs: Inputs, backend: str, dtype: torch.dtype) -> None:
    """All results of inputs on their device, against the oracle with the same numbers in float64."""
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    got, exact = primitive.run(inputs, backend), as_truth(inputs)
    truth, same = primitive.oracle(exact), primitive.oracle(cast(inputs, dtype, "cpu"))
    assert got.keys() == truth.keys(), f"results {sorted(got)}, expected {sorted(truth)}"
    rule = primitive.rule(exact, truth, dtype)
    for name, expected in same.items():
        value = got[name].detach()
        assert value.dtype == expected.dtype, f"{name}: {value.dtype}, expected {expected.dtype}"
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        if value.is_floating_point():
            rule(name, value.cpu(), truth[name].detach(), expected.detach())
        else:
            assert torch.equal(value.cpu(), expected), f"{name}: {value.flatten()[:20]}, not {expected.flatten()[:20]}"
    for name, value in before.items():
        assert torch.equal(_bits(value), _bits(inputs[name])), f"input {name} was written"


def check_case(primitive: Primitive, case: Any, backend: str, device: str, dtype: torch.dtype) -> None:
    check(primitive, primitive.inputs(case, dtype, device), backend, dtype)


def assert_as_accurate(
    name: str, got: Tensor, truth: Tensor, same: Tensor, *, acc: torch.dtype, terms: int = 1, lse: float = 0.0
) -> None:
    """|got - truth| <= 2 |same - truth| + 1 ulp + 8 eps * scale, element by element; NaN and infinities must coincide.

    ``same`` is the reference in the tested dtype, the ulp that of the output's dtype, eps that of the accumulate
    dtype. The scale is 1 (upstream gradients and logits are of order 1, and a small result is a difference of such
    numbers) or the largest value of the row, times sqrt(terms) for a sum over that many rows, whose rounding errors
    walk randomly. In float64 log-sum-exp is stored in the precision of everything else, which costs |lse| eps.
    """
    eps, ulp = torch.finfo(acc).eps, torch.finfo(got.dtype).eps
    got, truth, same = got.double(), truth.double(), same.double()
    if got.numel() == 0:
        return
    special = ~truth.isfinite()
    assert torch.equal(_bits(got[special]), _bits(truth[special])), (
        f"{name}: NaN or infinities differ: {got[special]} instead of {truth[special]}"
    )
    assert bool(got[~special].isfinite().all()), f"{name}: not finite where the truth is"
    finite = torch.where(special, 0.0, truth).abs()
    scale = (finite.amax(-1, keepdim=True) if finite.dim() > 1 else finite).clamp_min(1.0)
    scale = scale * terms**0.5 * (1 + lse if acc == torch.float64 else 1)
    bound = 2 * torch.where(special, 0.0, same - truth).abs() + ulp * finite + 8 * eps * scale
    assert_within(name, torch.where(special, 0.0, got), torch.where(special, 0.0, truth), bound)


def assert_within(name: str, got: Tensor, truth: Tensor, bound: Tensor) -> None:
    error = (got - truth).abs()
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{name}: {got[wrong][:5].tolist()} instead of {truth[wrong][:5].tolist()}, error {error[wrong][:5].tolist()}"
        f" above {bound[wrong][:5].tolist()} at {wrong.nonzero()[:5].tolist()}"
    )


def upstream(values: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Non-uniform gradients for these outputs, the same for every back-end and dtype."""
    result = []
    for i, value in enumerate(values):
        g = torch.Generator().manual_seed(seed + i)
        result.append(torch.randn(value.shape, generator=g, dtype=torch.float64).to(value.device, value.dtype))
    return result


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrices (..., N, C) in storage of another layout."""
    shape = x.shape
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every-second-row":
        return x.repeat_interleave(2, -2)[..., ::2, :]
    if layout == "column-slice":
        return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
    assert layout == "misaligned"
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(shape)


LAYOUTS = ("transposed", "column-slice", "misaligned", "every-second-row")


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outputs(backend: str, operator: str) -> list[int]:
    """Places of what an operator returns or, if it returns nothing, of the arguments that it writes."""
    schema = getattr(getattr(torch.ops, f"classfair_{backend}"), operator).default._schema
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return list(range(len(schema.returns))) or written


class Corrupt:
    """A back-end's namespace with the first element of one output of one operator slightly off, or left unwritten.

    Of an operator that returns nothing the output is an argument that it has written.
    """

    def __init__(self, inner: Any, operator: str, output: int, fill: Callable[[Tensor], Tensor]):
        self.inner, self.operator, self.output, self.fill = inner, operator, output, fill

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.inner, name)
        if name != self.operator:
            return function

        def corrupted(*arguments: Any) -> Any:
            result = function(*arguments)
            if result is None:
                self._spoil(arguments[self.output])
                return None
            single = isinstance(result, Tensor)
            result = [result] if single else list(result)
            result[self.output] = self._spoil(result[self.output].clone())
            return result[0] if single else tuple(result)

        return corrupted

    def _spoil(self, value: Tensor | None) -> Tensor | None:
        if value is not None and value.numel():
            first = value.view(-1)[:1]
            first.copy_(self.fill(first))
        return value
