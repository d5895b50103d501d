"""How an implementation is compared with the oracle: values, gradients, second gradients."""

from typing import Any

import torch
from torch import Tensor

from classfair.ops import SoftmaxLoss, softmax_loss
from tests.support.cases import DIFFERENTIABLE, Case, Inputs

FLOAT_OUTPUTS = ("loss", "lse", "lse_raw", "mass", "hit", "joint", "total_weight")
INTEGER_OUTPUTS = ("prediction", "counts")
GRADIENT_SOURCES = ("loss", "lse", "mass", "hit", "joint")


def cast(inputs: Inputs, dtype: torch.dtype, device: str, acc: torch.dtype | None = None) -> Inputs:
    """Logits in ``dtype``, other floats in its accumulate dtype, on a device."""
    acc = acc or (torch.float64 if dtype == torch.float64 else torch.float32)
    result = {}
    for name, value in inputs.items():
        result[name] = value
        if isinstance(value, Tensor):
            floating = dtype if name == "logits" else acc
            result[name] = value.to(device, floating if value.is_floating_point() else value.dtype)
    return result


def as_truth(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU."""
    return {
        k: v.double().cpu()
        if isinstance(v, Tensor) and v.is_floating_point()
        else v.cpu()
        if isinstance(v, Tensor)
        else v
        for k, v in inputs.items()
    }


def upstream(out: SoftmaxLoss) -> list[Tensor]:
    """Non-uniform gradients for every differentiable output, the same for every back-end and dtype."""
    result = []
    for i, name in enumerate(GRADIENT_SOURCES):
        value = getattr(out, name)
        shape = (0,) if value is None else value.shape
        g = torch.Generator().manual_seed(i)
        result.append(torch.randn(shape, generator=g, dtype=torch.float64))
    return result


def run(
    inputs: Inputs, backend: str, wanted: tuple[str, ...] = DIFFERENTIABLE
) -> tuple[SoftmaxLoss, dict[str, Tensor]]:
    """Outputs, and gradients of the ``wanted`` inputs from all differentiable outputs together."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in wanted if isinstance(inputs.get(n), Tensor)}
    out = softmax_loss(**{**inputs, **leaves}, backend=backend)
    pairs = [
        (o, g.to(o.device, o.dtype))
        for o, g in zip((getattr(out, n) for n in GRADIENT_SOURCES), upstream(out), strict=True)
        if o is not None and o.requires_grad
    ]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
    )
    return out, dict(zip(leaves, gradients, strict=True))


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
    got, truth, same = got.detach().double().cpu(), truth.double().cpu(), same.detach().double().cpu()
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if got.numel() == 0:
        return
    special = ~truth.isfinite()
    assert torch.equal(got[special].nan_to_num(nan=7.0), truth[special].nan_to_num(nan=7.0)), (
        f"{name}: NaN or infinities differ: {got[special]} instead of {truth[special]}"
    )
    assert bool(got[~special].isfinite().all()), f"{name}: not finite where the truth is"
    finite = torch.where(special, 0.0, truth).abs()
    scale = (finite.amax(-1, keepdim=True) if finite.dim() > 1 else finite).clamp_min(1.0)
    scale = scale * terms**0.5 * (1 + lse if acc == torch.float64 else 1)
    error = torch.where(special, 0.0, got - truth).abs()
    bound = 2 * torch.where(special, 0.0, same - truth).abs() + ulp * finite + 8 * eps * scale
    worst = (error - bound).flatten().argmax()
    assert bool((error <= bound).all()), (
        f"{name}: error {error.flatten()[worst]:.3g} above {bound.flatten()[worst]:.3g} at flat index {int(worst)}:"
        f" got {got.flatten()[worst]:.9g}, truth {truth.flatten()[worst]:.9g}"
    )


def check_case(case: Case, backend: str, device: str, dtype: torch.dtype, **changes: Any) -> None:
    """Values and first gradients of one case against the float64 oracle."""
    check_inputs(cast({**case.build(), **changes}, dtype, device), backend, dtype)


def check_inputs(inputs: Inputs, backend: str, dtype: torch.dtype) -> None:
    """The same of inputs on their device."""
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    out, gradients = run(inputs, backend)
    truth, true_gradients = run(as_truth(inputs), "reference")
    same, same_gradients = run(cast(inputs, dtype, "cpu"), "reference")
    rows = truth.loss.numel()
    lse = truth.lse[truth.lse.isfinite()].abs().amax().item() if rows else 0.0
    tolerance = {"acc": torch.float64 if dtype == torch.float64 else torch.float32, "lse": lse}
    for name in FLOAT_OUTPUTS:
        terms = rows if name in ("mass", "hit", "joint") else 1
        values = [getattr(o, name) for o in (out, truth, same)]
        if values[1] is None:
            assert values[0] is None, f"{name} was not asked for"
            continue
        assert_as_accurate(name, *values, terms=terms, **tolerance)
    for name in INTEGER_OUTPUTS:
        got, expected = getattr(out, name), getattr(same, name)
        if expected is None:
            assert got is None, f"{name} was not asked for"
            continue
        got = got.cpu()
        assert torch.equal(got, expected), f"{name}: {got.tolist()[:20]} instead of {expected.tolist()[:20]}"
    for name, gradient in gradients.items():
        if true_gradients[name] is None:
            assert gradient is None, f"gradient of {name} where the reference has none"
            continue
        values = _by_rows(gradient, true_gradients[name], same_gradients[name])
        terms = 1 if name == "logits" else rows
        assert_as_accurate(f"gradient of {name}", *values, terms=terms, **tolerance)
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(nan=7.0), inputs[name].nan_to_num(nan=7.0)), f"input {name} was written"


def _by_rows(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Classes last, so that a row is a sample."""
    return tuple(g.movedim(1, -1) if g.dim() == 3 else g for g in gradients)


class Corrupt:
    """A back-end's namespace with the first element of one output of one operator slightly off, or left unwritten."""

    def __init__(self, inner, operator, output, fill):
        self.inner, self.operator, self.output, self.fill = inner, operator, output, fill

    def __getattr__(self, name):
        function = getattr(self.inner, name)
        if name != self.operator:
            return function

        def corrupted(*arguments):
            result = list(function(*arguments))
            wrong = result[self.output].clone()
            wrong.view(-1)[0] = self.fill(wrong.view(-1)[0])
            result[self.output] = wrong
            return tuple(result)

        return corrupted
