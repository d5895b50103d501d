"""``classfair doctor``: what is installed, which back-end serves which device and why, and whether it is right."""

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

import classfair
from classfair import backends
from classfair.ops import (
    class_moments,
    class_moments_merge,
    dependence,
    iou_penalty,
    label_index,
    pair_terms,
    softmax_loss,
)

_PACKAGES = ("torch", "numpy", "triton", "scikit-learn", "matplotlib", "rich", "tyro")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "classfair": classfair.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _build() -> dict[str, Any]:
    if "_C" in backends.load_errors:
        return {"compiled": f"no ({backends.load_errors['_C']})"}
    return importlib.import_module("classfair._C").build_info()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none present"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _compare(compute: Callable[[str, str, torch.dtype], list[torch.Tensor]], backend: str, device: str) -> None:
    """A back-end in float32 against the reference in float64."""
    expected = compute("reference", "cpu", torch.float64)
    for got, want in zip(compute(backend, device, torch.float32), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _test_softmax_loss(backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 17, generator=g)
    target = torch.randint(0, 17, (33,), generator=g)
    offset = torch.rand(17, generator=g)

    def compute(name: str, where: str, dtype: torch.dtype) -> list[torch.Tensor]:
        z = logits.to(where, dtype).requires_grad_()
        out = softmax_loss(z, target=target.to(where), offset=offset.to(where, dtype), stats=2, backend=name)
        assert out.mass is not None
        (gradient,) = torch.autograd.grad(out.loss.sum() + out.mass.square().sum(), z)
        return [t.cpu().double() for t in (out.loss.detach(), out.mass.detach(), gradient)]

    _compare(compute, backend, device)


def _test_label_index(backend: str, device: str) -> None:
    target = torch.tensor([4, 1, -100, 4, 0])
    index = label_index(target.to(device), 6, backend=backend)
    expected = label_index(target, 6, backend="reference")
    for got, want in zip(index, expected, strict=True):
        if not torch.equal(got.cpu(), want):
            raise AssertionError(f"{got.tolist()} instead of {want.tolist()}")


def _test_class_moments(backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    features = 3 + torch.randn(33, 17, generator=g)
    target = torch.randint(0, 5, (33,), generator=g)

    def compute(name: str, where: str, dtype: torch.dtype) -> list[torch.Tensor]:
        index = label_index(target.to(where), 5, backend="reference")
        batch = class_moments(features.to(where, dtype), index, backend=name)
        count = torch.zeros(5, dtype=torch.int64, device=where)
        mean, variance = torch.zeros(2, 5, 17, dtype=dtype, device=where)
        for _ in range(2):
            class_moments_merge(batch, index.key_of_slot, count, mean, variance, backend=name)
        return [t.cpu().double() for t in (count, mean, variance)]

    _compare(compute, backend, device)


def _test_pair_terms(backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows, diagonals = torch.randn(17, 33, generator=g), torch.rand(17, 33, generator=g)

    def compute(name: str, where: str, dtype: torch.dtype) -> list[torch.Tensor]:
        weight, cov = rows.to(where, dtype).requires_grad_(), diagonals.to(where, dtype)
        label, count = torch.tensor([2, 5, 11, 0], device=where), torch.tensor(3, device=where)
        ratio = pair_terms(weight, cov, label, count, normalize=True, backend=name).variance
        assert ratio is not None
        (gradient,) = torch.autograd.grad(ratio.square().sum(), weight)
        return [t.cpu().double() for t in (ratio.detach(), gradient)]

    _compare(compute, backend, device)


def _test_penalties(backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    count = torch.randint(0, 5, (3, 17), generator=g)
    share = torch.rand(3, 17, generator=g)

    def compute(name: str, where: str, dtype: torch.dtype) -> list[torch.Tensor]:
        counts = count.to(where)
        hit = (share.to(where, dtype) * counts).requires_grad_()
        mass = hit + 1
        information = dependence(mass, counts, mutual_information=True, backend=name)
        total = dependence(mass, counts, backend=name) + information + iou_penalty(mass, hit, counts, backend=name)
        (gradient,) = torch.autograd.grad(total, hit)
        return [t.cpu().double() for t in (total.detach(), gradient)]

    _compare(compute, backend, device)


_SELF_TESTS: dict[str, Callable[[str, str], None]] = {
    "softmax_loss": _test_softmax_loss,
    "label_index": _test_label_index,
    "class_moments": _test_class_moments,
    "pair_terms": _test_pair_terms,
    "penalties": _test_penalties,
}


def _check(primitive: str, device: str, backend: str) -> dict[str, str]:
    """One row: status is ok, unavailable or broken."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"status": "unavailable", "detail": "no CUDA device"}
    here = torch.device(device)
    if backend not in backends.usable(primitive, here):
        return {"status": "unavailable", "detail": backends.why_missing(primitive, here, backend)}
    try:
        _SELF_TESTS[primitive](backend, device)
    except Exception as error:  # whatever a broken install throws is what doctor is there to show
        return {"status": "broken", "detail": f"{type(error).__name__}: {error}".splitlines()[0]}
    default = backends.choose(primitive, here, None) == backend
    return {"status": "ok", "detail": "default" if default else ""}


def examine() -> dict[str, Any]:
    """Everything doctor prints, as JSON types; ``"healthy"`` is False when something installed is broken."""
    rows = [
        {"primitive": p, "device": d, "backend": b, **_check(p, d, b)}
        for p in backends.PRIMITIVES
        for d in ("cpu", "cuda")
        for b in backends.BACKENDS
    ]
    # A module that was built but cannot be imported is broken even if another back-end serves in its place.
    unloadable = {m: e for m, e in backends.load_errors.items() if "import failed" in e}
    healthy = not unloadable and all(row["status"] != "broken" for row in rows)
    return {
        "versions": _versions(),
        "build": _build(),
        "devices": {d: _device_name(d) for d in ("cpu", "cuda")},
        "backends": rows,
        "unloadable": unloadable,
        "healthy": healthy,
    }


def _print(report: dict[str, Any]) -> None:
    for title in ("versions", "build", "devices"):
        print(title)
        for name, value in report[title].items():
            print(f"  {name:<22}{', '.join(value) if isinstance(value, list) else value}")
    print("back-ends (a small numeric self-test each)")
    for row in report["backends"]:
        line = f"  {row['primitive']:<14}{row['device']:<6}{row['backend']:<11}{row['status']:<13}{row['detail']}"
        print(line.rstrip())
    for module, error in report["unloadable"].items():
        print(f"classfair.{module}: {error}")
    print("healthy" if report["healthy"] else "BROKEN: see above")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if everything installed works, 1 if something is broken, 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="classfair doctor", description=__doc__.partition(":")[2].strip())
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(sys.argv[2:] if argv is None else argv)
    report = examine()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["healthy"] else 1
