"""``python -m tests.fuzz [SEED] [SECONDS]``: random calls on back-end native against reference.

Both raise the same type of exception or both return, and then the values and gradients of native are as near to those
of float64 as the conformance suite asks. What disagrees is printed with the seed that makes the call again.
"""

import faulthandler
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.fuzz.calls import KINDS, Call, Draw
from tests.support.conformance import assert_as_accurate


def leaves(value: Any) -> list[Any]:
    """Tensors and constants of arguments or results; of a data class those of its fields."""
    flat = pytree.tree_leaves(value)
    return [x for v in flat for x in (leaves(list(vars(v).values())) if hasattr(v, "__dataclass_fields__") else [v])]


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if hasattr(value, "__dataclass_fields__") and not hasattr(value, "mass"):
        return type(value)(*(_mapped(v, function) for v in vars(value).values()))
    return pytree.tree_map_only(Tensor, function, value)


def _strided_float(t: Tensor) -> bool:
    return t.layout is torch.strided and t.is_floating_point() and t.device.type == "cpu"


def attempt(call: Call, backend: str, double: bool = False) -> tuple[str, list[Tensor], list[Tensor | None]]:
    """What happened: the type of the exception, or the results and the gradients of those that have one."""
    function, arguments = call
    arguments = {
        name: _mapped(v, lambda t: t.double() if double and _strided_float(t) else t) for name, v in arguments.items()
    }
    differentiable = [
        n for n in ("logits", "linear_weight", "offset", "margin") if isinstance(arguments.get(n), Tensor)
    ]
    differentiable = [n for n in differentiable if _strided_float(arguments[n])]
    arguments |= {n: arguments[n].detach().requires_grad_() for n in differentiable}
    try:
        results = [r for r in leaves(function(backend=backend, **arguments)) if isinstance(r, Tensor)]
    except Exception as error:  # what is compared
        return type(error).__name__, [], []
    sources = [r for r in results if r.requires_grad and r.grad_fn is not None]
    if not sources or not differentiable:
        return "", [r.detach() for r in results], []
    total = torch.stack([(r.double() * torch.arange(r.numel()).cos().view_as(r)).sum() for r in sources]).sum()
    gradients = torch.autograd.grad(total, [arguments[n] for n in differentiable], allow_unused=True)
    return "", [r.detach() for r in results], list(gradients)


def _is_double(call: Call) -> bool:
    """Whether the logits, features or weights, which come first, are float64."""
    floats = [v for v in leaves(call[1]) if isinstance(v, Tensor) and v.is_floating_point()]
    return bool(floats) and floats[0].dtype == torch.float64


def check(call: Call) -> str:
    """The exception that both raise, or an empty string. AssertionError where they disagree."""
    (error, got, gradients), (expected, same, same_gradients) = attempt(call, "native"), attempt(call, "reference")
    assert error == expected, f"native raises {error or 'nothing'}, reference {expected or 'nothing'}"
    if error:
        return error
    _, truth, true_gradients = attempt(call, "reference", double=True)
    named = [(f"result {i}", *v) for i, v in enumerate(zip(got, truth, same, strict=True))]
    both = zip(gradients, true_gradients, same_gradients, strict=True)
    if call[1].get("normalize") is True:
        both = ()  # it is as large as the inverse of the least distance, and so is its error
    if not all(v.isfinite().all() for v in got if v.is_floating_point()):
        both = ()  # a row that is NaN spoils sums over rows, in an order that nobody promises
    named += [(f"gradient {i}", *v) for i, v in enumerate(both) if v[0] is not None or v[2] is not None]
    double = _is_double(call)
    terms = max([v.shape[0] for v in leaves(call[1]) if isinstance(v, Tensor) and v.dim()] + [1])
    size = max(map(_largest, leaves(call[1])))
    for values in named:
        # A gradient comes from up to four results. A probability exp(z - lse) is as exact as its exponent.
        _compare(*values, double=double, terms=4 * terms, size=size)
    return ""


def _largest(value: Any) -> float:
    """The largest finite size of a number in a tensor of floats; 1 where there is none."""
    if not (isinstance(value, Tensor) and _strided_float(value)):
        return 1.0
    finite = value.detach()[value.detach().isfinite()].abs()
    return finite.amax().item() if finite.numel() else 1.0


def _compare(
    name: str,
    value: Tensor | None,
    exact: Tensor | None,
    likewise: Tensor | None,
    *,
    double: bool,
    terms: int,
    size: float,
) -> None:
    """Native's value with reference's in float64 and in its own dtype."""
    assert value is not None, f"{name}: native has none"
    assert likewise is not None, f"{name}: reference has none"
    assert value.dtype == likewise.dtype, f"{name}: {value.dtype}, reference {likewise.dtype}"
    if not value.is_floating_point():
        assert torch.equal(value, likewise), f"{name}: {value.tolist()}, reference {likewise.tolist()}"
        return
    if exact is None or not torch.equal(likewise.isfinite(), exact.isfinite()):
        exact = likewise.double()  # it overflows in its own dtype, not in float64
    acc = torch.float64 if value.dtype == torch.float64 and double else torch.float32
    size = max(size, _largest(exact))
    # The gradient of a float64 vector of float32 logits is as exact as those.
    assert_as_accurate(name, value.to(acc), exact, likewise.to(acc), acc=acc, terms=terms, lse=size)


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape) if not value.is_nested else '(nested)'} {value.dtype} {value.layout}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(described, value))})"
    if hasattr(value, "__dataclass_fields__"):
        return f"{type(value).__name__}({', '.join(described(v) for v in vars(value).values())})"
    return repr(value)


def call_of(seed: int) -> Call:
    d = Draw(seed)
    return d.one(KINDS)(d)


def run(seed: int, seconds: float, last: Path) -> Counter[str]:
    """Calls from the seed on; how often which function returned or raised what."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        last.write_text(str(seed))  # for whoever finds this process dead
        call = call_of(seed)
        try:
            error = check(call)
        except AssertionError as disagreement:
            print(f"\nseed {seed}: {call[0].__module__}.{call[0].__name__}: {disagreement}")
            for name, value in call[1].items():
                print(f"    {name} = {described(value)}")
            print(f"again: python -m tests.fuzz {seed} 0")
            raise SystemExit(1) from None
        seen[f"{call[0].__name__} {error or 'returns'}"] += 1
        seed += 1
    return seen


def main() -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given = [float(a) for a in sys.argv[1:]]
    seed = int(given[0]) if given else int(time.time())
    seconds = given[1] if len(given) > 1 else 600.0
    last = Path("build/fuzz-last-seed")
    last.parent.mkdir(exist_ok=True)
    if seconds == 0:
        print(f"seed {seed}: {check(call_of(seed)) or 'agrees'}")
        return
    print(f"seed {seed}, {seconds:g} s; the seed of a call that ends the process is in {last}", flush=True)
    seen = run(seed, seconds, last)
    for what, count in sorted(seen.items()):
        print(f"{count:8} {what}")


if __name__ == "__main__":
    main()
