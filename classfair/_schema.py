"""The operators of ``softmax_loss``: what they take and return, named once for Python (in C++: csrc/arguments.h).

R = N (or N * L) rows, C classes, M pair rows. Floats other than ``logits`` are float32 (float64 for float64 logits);
all but ``logits`` and ``soft_target`` are contiguous.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import _library
from classfair._validate import acc_dtype


class Tensors(NamedTuple):
    """The tensors of both passes, in the order of the schema."""

    logits: Tensor  # (N, C) or (N, C, L)
    offset: Tensor | None = None  # (C,)
    margin: Tensor | None = None  # (C,)
    pair: Tensor | None = None  # (M, C)
    target: Tensor | None = None  # (R,) int64
    target_b: Tensor | None = None  # (R,) int64
    mix: Tensor | None = None  # (R,) share of `target`
    soft_target: Tensor | None = None  # shape of logits
    slot: Tensor | None = None  # (R,) int64 row of `pair`; None: the label
    weight: Tensor | None = None  # (C,)
    sample_weight: Tensor | None = None  # (R,)
    group: Tensor | None = None  # (R,) int64
    cell: Tensor | None = None  # (R,) int64 row of `joint`

    @property
    def perturbed(self) -> bool:
        """Whether the loss is of other logits than the statistics."""
        return self.offset is not None or self.margin is not None or self.pair is not None


class Scalars(NamedTuple):
    """The scalars of both passes, in the order of the schema."""

    num_groups: int = 1
    num_cells: int = 0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    gamma: float = 0.0
    stats: int = 0
    mean: bool = False  # whether `reduced` is divided by total_weight


class SoftmaxLoss(NamedTuple):
    """Outputs of the primitive. R = N (or N * L) rows; what statistics were not asked for is None."""

    loss: Tensor  # (R,) or reduced to (); float32, or float64 for float64 logits, as all below unless said
    lse: Tensor  # (R,) float64: at logits of 1e4 a float32 log-sum-exp would put 5e-4 on every probability
    total_weight: Tensor  # ()
    lse_raw: Tensor | None = None  # (R,) float64, of the unperturbed logits; size 0 where it equals lse
    prediction: Tensor | None = None  # (R,) int64
    mass: Tensor | None = None  # (G, C)
    hit: Tensor | None = None  # (G, C)
    joint: Tensor | None = None  # (num_cells, C), size 0 without cells
    counts: Tensor | None = None  # (3 * G * C + 2,) int64: count, correct, predicted, invalid and nonfinite rows


class Options(NamedTuple):
    """What is done with the rows' losses; constants, flat because autograd looks for tensors at the top only."""

    reduced: bool = False
    backend: str = "reference"
    kind: str | None = None  # of a penalty; None: there is none
    penalty_weight: float = 1.0
    weighted: bool = False
    of_cells: bool = False


class Call(NamedTuple):
    """What the Function is called with."""

    t: Tensors
    s: Scalars
    key: Tensor | None  # of the penalty's cells
    num_cells: Tensor | None
    options: Options

    @classmethod
    def of(cls, inputs: tuple) -> "Call":
        """From flat inputs, as autograd and transforms need them."""
        tensors, rest = inputs[:NUM_TENSORS], inputs[NUM_TENSORS:]
        end = len(Scalars._fields)
        scalars, key, num_cells, options = rest[:end], rest[end], rest[end + 1], rest[end + 2 :]
        return cls(Tensors._make(tensors), Scalars._make(scalars), key, num_cells, Options._make(options))

    def flat(self) -> tuple:
        return *self.t, *self.s, self.key, self.num_cells, *self.options


def _schema(arguments: type[Tensors] | type[Scalars]) -> str:
    names: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
    return ", ".join(f"{names[kind]} {name}" for name, kind in arguments.__annotations__.items())


NUM_TENSORS = len(Tensors._fields)


def mean_denominator(total_weight: Tensor, label_smoothing: float) -> Tensor:
    """What "mean" divides by. NaN for 0 with smoothing, as torch, whose hard part is then 0 / 0."""
    return torch.where(total_weight == 0, torch.nan, total_weight) if label_smoothing else total_weight


def _fwd_fake(*inputs: Any) -> tuple[Tensor, ...]:
    t, s = Tensors._make(inputs[:NUM_TENSORS]), Scalars._make(inputs[NUM_TENSORS:])
    logits, classes, acc = t.logits, t.logits.shape[1], acc_dtype(t.logits)
    rows = logits.shape[0] * (logits.shape[2] if logits.dim() == 3 else 1)

    def new(*shape: Any, dtype: torch.dtype = acc) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    table = (s.num_groups, classes) if s.stats else (0, 0)
    return (
        new(rows),
        new(rows, dtype=torch.float64),
        new(rows if s.stats and t.perturbed else 0, dtype=torch.float64),
        new(rows if s.stats else 0, dtype=torch.int64),
        new(*table),
        new(*table),
        new(*((s.num_cells, classes) if s.stats and t.cell is not None else (0, 0))),
        new(3 * s.num_groups * classes + 2 if s.stats else 0, dtype=torch.int64),
        new(),
        new(),
    )


def _bwd_fake(*inputs: Any) -> tuple[Tensor, ...]:
    t, (want_offset, want_margin, want_pair) = Tensors._make(inputs[6 : 6 + NUM_TENSORS]), inputs[-3:]
    classes, acc = t.logits.shape[1], acc_dtype(t.logits)
    pair = (t.pair.shape[0], classes) if want_pair and t.pair is not None else (0, 0)
    return (
        torch.empty_like(t.logits),
        t.logits.new_empty(classes if want_offset else 0, dtype=acc),
        t.logits.new_empty(classes if want_margin else 0, dtype=acc),
        t.logits.new_empty(pair, dtype=acc),
    )


_library.define(
    f"softmax_loss_fwd({_schema(Tensors)}, {_schema(Scalars)})"
    " -> (Tensor loss, Tensor lse, Tensor lse_raw, Tensor prediction, Tensor mass, Tensor hit,"
    " Tensor joint, Tensor counts, Tensor total_weight, Tensor reduced)",
    _fwd_fake,
)
# Gradients of the statistics count `stats_scale` times; `grad_loss` is of each row, or of `reduced`.
_library.define(
    "softmax_loss_bwd(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_mass, Tensor? grad_hit, Tensor? grad_joint,"
    f" Tensor? stats_scale, {_schema(Tensors)}, Tensor lse, Tensor lse_raw, Tensor total_weight,"
    f" {_schema(Scalars)}, bool want_offset, bool want_margin, bool want_pair)"
    " -> (Tensor grad_logits, Tensor grad_offset, Tensor grad_margin, Tensor grad_pair)",
    _bwd_fake,
)
