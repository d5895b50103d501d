"""How each primitive runs, and how large the rounding errors of its results may be."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from classfair import ops
from classfair._schema import Scalars, Tensors
from tests.support import moment_cases, pair_cases, softmax_cases
from tests.support.conformance import (
    Inputs,
    Primitive,
    Results,
    Rule,
    assert_as_accurate,
    assert_within,
    by_id,
    cast,
    upstream,
)
from tests.support.penalties import Dependence, IoU

ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _present(**results: Any) -> Results:
    return {name.replace("_", " "): value for name, value in results.items() if value is not None}


class SoftmaxLoss(Primitive):
    name = "softmax_loss"
    operators = ("softmax_loss_fwd", "softmax_loss_bwd")
    cases = softmax_cases.CASES
    dtypes = ALL_DTYPES
    strided = ("logits",)
    layouts = (
        softmax_cases.Case("layout", (67, 35), ("offset", "rows", "smoothing"), 2),
        softmax_cases.Case("layout-narrow", (67, 3), ("group", "joint"), 2),
    )
    repeated = by_id(cases, "all-many-rows")
    threaded = (
        *repeated,
        softmax_cases.Case("threads", (301, 77), softmax_cases.ALL_HARD, 2),
        softmax_cases.Case("threads-wide", (150, 301), ("group", "joint"), 2),
        softmax_cases.Case("threads-by-group", (150, 301), ("many_groups", "joint"), 2),
        softmax_cases.Case("threads-narrow", (3000, 2), ("ignore", "group", "joint"), 2),
    )
    witnesses = by_id(cases, "all", "all-sum")

    #: Outputs that receive gradient.
    sources = ("loss", "lse", "mass", "hit", "joint")

    def inputs(self, case: Any, dtype: torch.dtype, device: str) -> Inputs:
        if dtype == torch.float16 and case.id in ("huge", "shifted-1e4", "shifted-1e4-perturbed"):
            case = softmax_cases.Case(case.id, case.shape, case.features, case.stats, 1e3)  # in the range of float16
        return super().inputs(case, dtype, device)

    def run(self, inputs: Inputs, backend: str, wanted: tuple[str, ...] = softmax_cases.DIFFERENTIABLE) -> Results:
        leaves = {n: inputs[n].detach().requires_grad_() for n in wanted if isinstance(inputs.get(n), Tensor)}
        out = ops.softmax_loss(**{**inputs, **leaves}, backend=backend)
        values = self._sources(out)
        gradients = torch.autograd.grad(values, list(leaves.values()), upstream(values), allow_unused=True)
        pulled = {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
        return _present(**out._asdict()) | {n: g for n, g in pulled.items() if g is not None}

    def _sources(self, out: ops.SoftmaxLoss) -> list[Tensor]:
        values = [getattr(out, name) for name in self.sources]
        return [v for v in values if v is not None and v.requires_grad]

    def rule(self, exact: Inputs, truth: Results, dtype: torch.dtype) -> Rule:
        rows = truth["lse"].numel()
        finite = truth["lse"][truth["lse"].isfinite()].abs()
        options = {"acc": _acc(dtype), "lse": finite.amax().item() if len(finite) else 0.0}
        sums = {"mass", "hit", "joint", "gradient of offset", "gradient of margin", "gradient of pair"}

        def compare(name: str, *values: Tensor) -> None:
            if name == "gradient of logits":  # classes last, so that a row is a sample
                values = tuple(v.movedim(1, -1) for v in values)
            assert_as_accurate(name, *values, terms=rows if name in sums else 1, **options)

        return compare

    def function(self, inputs: Inputs, backend: str) -> tuple[Callable, tuple[Tensor, ...]]:
        leaves = {n: inputs[n].requires_grad_() for n in softmax_cases.DIFFERENTIABLE if n in inputs}

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(leaves, values, strict=True))
            return tuple(self._sources(ops.softmax_loss(**{**inputs, **given}, backend=backend)))

        return function, tuple(leaves.values())

    def gradcheck_options(self, backend: str) -> dict[str, dict[str, bool]]:
        return {"first": {"fast_mode": True}, "second": {"fast_mode": True}}

    def calls(self, namespace: Any, device: str) -> Iterator[tuple[str, tuple]]:
        for case in by_id(self.cases, "plain-3x31", "all", "dense-all", "strided-3d", "mixed-stats", "plain-0x5"):
            t, s = schema_arguments(cast(case.build(), torch.float32, device))
            yield "softmax_loss_fwd", (*t, *s)
            out = namespace.softmax_loss_fwd(*t, *s)
            loss, lse, _, _, mass, hit, joint, *_ = (torch.rand_like(o) if o.is_floating_point() else o for o in out)
            if not s.stats:
                mass = hit = None
            if t.cell is None:
                joint = None
            given = (loss, lse, mass, hit, joint, None if mass is None else mass.new_tensor(2.0))
            wants = [tensor is not None for tensor in (t.offset, t.margin, t.pair)]
            yield "softmax_loss_bwd", (*given, *t, out[1], out[2], out[8], *s, *wants)


def schema_arguments(inputs: Inputs) -> tuple[Tensors, Scalars]:
    """Arguments of the operators."""
    tensors = Tensors(**{name: inputs[name] for name in Tensors._fields if name in inputs})
    return tensors, Scalars(**{name: inputs[name] for name in Scalars._fields if name in inputs})


class ClassMoments(Primitive):
    """Three batches and the state after them."""

    name = "class_moments"
    operators = ("class_moments", "class_moments_merge")
    cases = (*moment_cases.CASES, *moment_cases.EXPONENTIAL)
    dtypes = ALL_DTYPES
    strided = ("features",)
    layouts = (moment_cases.Case("layout", (67, 35), 6),)
    repeated = (moment_cases.Case("r", (300, 70), 5),)
    threaded = tuple(
        moment_cases.Case("threads", shape, classes, moment_cases.nan_at)
        for *shape, classes in [(301, 77, 9), (256, 2048, 100), (40_000, 12, 2)]
    )
    witnesses = by_id(cases, "nonfinite")

    def run(self, inputs: Inputs, backend: str) -> Results:
        features, classes, momentum = inputs["features"], inputs["num_classes"], inputs["momentum"]
        acc = torch.float64 if features.dtype == torch.float64 else torch.float32
        state = moment_cases.zero_state((classes, features.shape[2]), acc, features.device.type)
        used, results = state if momentum is None else state[:4], {}
        for i, (values, target) in enumerate(zip(features, inputs["target"], strict=True)):
            index = ops.label_index(target, classes, ignore_index=-1, backend="reference")
            batch = ops.class_moments(values, index, backend=backend)
            ops.class_moments_merge(batch, index.key_of_slot, *used, momentum=momentum, backend=backend)
            results |= {f"{name} {i}": value for name, value in batch._asdict().items()}
        return results | {f"state {name}": v for name, v in zip(moment_cases.STATE, used, strict=False)}

    def rule(self, exact: Inputs, truth: Results, dtype: torch.dtype) -> Rule:
        """Means and variances are sums over the rows of a class, in which rounding errors walk. Means in float32 are
        off by the rounding of their own size, and their differences enter the variances of the state at first order.
        """
        terms = max(1, exact["features"].shape[1])
        means = truth["state mean"].abs()
        size = float(means.amax().clamp_min(1)) if terms > 1 and means.numel() else 1.0

        def compare(name: str, *values: Tensor) -> None:
            if name.endswith("error"):
                return  # what rounding has left out of the state: its own, different for every order of sums
            number = max(terms, int(size**2)) if name == "state variance" else terms
            assert_as_accurate(name, *values, acc=_acc(dtype), terms=number)
            if name.startswith("variance"):
                single = truth[name.replace("variance", "count")] == 1
                assert bool((values[0][single] == 0).all()), "variance of a single row"

        return compare

    def calls(self, namespace: Any, device: str) -> Iterator[tuple[str, tuple]]:
        features, target = (t.to(device) for t in moment_cases.Case("opcheck", (40, 9), 5).batch())
        index = ops.label_index(target, 5, ignore_index=-1, backend="reference")
        for variance in (True, False):
            yield "class_moments", (features.float(), index.slot, index.order, index.start, variance)
        count, mean, own, _ = namespace.class_moments(features.float(), index.slot, index.order, index.start, True)
        for momentum in (None, 0.25):
            state = moment_cases.zero_state((5, 9), torch.float32, device)
            state[4] = state[4] if momentum is None else None
            means = [*state[:2], None, state[3], None]
            for rows, given in ((own, state), (None, means), (None, [*means[:3], None, None])):
                yield "class_moments_merge", (count, mean, rows, index.key_of_slot, *given, momentum)


class PairTerms(Primitive):
    name = "pair_terms"
    operators = ("pair_terms_fwd", "pair_terms_bwd")
    cases = pair_cases.CASES
    repeated = pair_cases.REPEATED
    threaded = pair_cases.THREADED
    witnesses = pair_cases.WITNESSES
    visible = 1e-3  # of gradients of about 30, sums over 72 terms

    def run(self, inputs: Inputs, backend: str) -> Results:
        """Outputs and gradients of weight and cov from both outputs together."""
        leaves = {n: inputs[n].detach().requires_grad_() for n in ("weight", "cov") if inputs[n] is not None}
        out = ops.pair_terms(**{**inputs, **leaves}, backend=backend)
        values = [t for t in out if t is not None]
        gradients = torch.autograd.grad(values, list(leaves.values()), upstream(values, seed=5))
        return _present(**out._asdict()) | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}

    def rule(self, exact: Inputs, truth: Results, dtype: torch.dtype) -> Rule:
        classes, features = exact["weight"].shape

        def compare(name: str, *values: Tensor) -> None:
            # A gradient adds up pairs; a value adds up features, a vector of them at a time.
            terms = classes * features if name.startswith("gradient") else 1 + features // 64
            assert_as_accurate(name, *values, acc=dtype, terms=terms)

        return compare

    def function(self, inputs: Inputs, backend: str) -> tuple[Callable, tuple[Tensor, ...]]:
        def function(weight: Tensor, cov: Tensor) -> tuple:
            return tuple(ops.pair_terms(**{**inputs, "weight": weight, "cov": cov}, backend=backend))

        return function, (inputs["weight"].requires_grad_(), inputs["cov"].requires_grad_())

    def gradcheck_options(self, backend: str) -> dict[str, dict[str, bool]]:
        batched = backend != "triton"
        forward = {"check_forward_ad": True, "check_batched_grad": batched, "check_batched_forward_grad": batched}
        return {"first": forward, "second": {"check_fwd_over_rev": True, "fast_mode": not batched}}

    def calls(self, namespace: Any, device: str) -> Iterator[tuple[str, tuple]]:
        for normalize in (False, True):
            weight, cov, label, count, *_ = cast(pair_cases.pairs(9, 5, 4), torch.float32, device).values()
            out = namespace.pair_terms_fwd(weight, cov, label, count, normalize, normalize)
            yield "pair_terms_fwd", (weight, cov, label, count, normalize, normalize)
            yield "pair_terms_fwd", (weight, None, label, count, False, True)
            g = torch.rand_like(out[0])
            for given, want_cov in (((g, None), False), ((g, g), True)):
                yield "pair_terms_bwd", (*given, weight, cov, label, count, *out, normalize, want_cov)


class LabelIndexed(Primitive):
    name = "label_index"
    operators = ("label_index",)
    cases = pair_cases.LABELS
    dtypes = (torch.int64,)
    repeated = threaded = pair_cases.MANY_LABELS
    witnesses = by_id(cases, "50x7x1")

    def run(self, inputs: Inputs, backend: str) -> Results:
        results = ops.label_index(**inputs, backend=backend)._asdict()
        assert results.pop("num_keys") == inputs["num_classes"] * inputs["num_groups"]
        return results

    def rule(self, exact: Inputs, truth: Results, dtype: torch.dtype) -> Rule:
        return assert_within  # never called: an index has no floats

    def calls(self, namespace: Any, device: str) -> Iterator[tuple[str, tuple]]:
        target, group = torch.tensor([[3, 1, -100, 3], [0, 1, 0, -1]], device=device)
        yield "label_index", (target, None, 5, 1, -100)
        yield "label_index", (target, group, 5, 2, -100)


SOFTMAX_LOSS, CLASS_MOMENTS, PAIR_TERMS = SoftmaxLoss(), ClassMoments(), PairTerms()
DEPENDENCE, IOU, LABEL_INDEX = Dependence(), IoU(), LabelIndexed()
PRIMITIVES = (SOFTMAX_LOSS, CLASS_MOMENTS, PAIR_TERMS, DEPENDENCE, IOU, LABEL_INDEX)
