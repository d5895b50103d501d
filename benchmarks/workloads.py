"""What is measured: shapes of real training jobs, and losses from plain to everything on."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from classfair import PairTerms
from classfair.ops import label_index

#: Share of the probability that label smoothing moves: the usual ImageNet recipe.
LABEL_SMOOTHING = 0.1

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Workload(NamedTuple):
    """A batch of logits."""

    rows: int
    classes: int
    reason: str


WORKLOADS = {
    "imagenet": Workload(256, 1000, "ImageNet, batch of one GPU: fits in cache, overhead of a call shows"),
    "imagenet-global": Workload(1024, 1000, "ImageNet, global batch: labels repeat within the batch"),
    "inaturalist": Workload(256, 8142, "iNaturalist 2018: long-tailed, rows of no round length"),
    "imagenet21k": Workload(512, 21841, "ImageNet-21K: an odd row length, larger than any cache"),
}


@dataclass(frozen=True)
class Objective:
    """Which terms a training step uses on top of cross-entropy."""

    reason: str
    offset: bool = False
    pair: bool = False
    label_smoothing: float = 0.0
    mixed: bool = False  # every sample has two labels
    stats: str = "none"  # "values": for monitoring; "differentiable": part of the loss
    trains_terms: bool = False  # offset and pair rows receive gradients


OBJECTIVES = {
    "plain": Objective("the drop-in"),
    "logit-adjusted": Objective("LogitAdjustedLoss: a constant offset", offset=True),
    "mixed": Objective(
        "MixUp or CutMix: two labels and a share; torch reads probabilities made by the loader", mixed=True
    ),
    "monitor": Objective("per-class statistics of each batch for a log, no gradient", stats="values"),
    "all-on": Objective(
        "every term at once, all constant",
        offset=True,
        pair=True,
        label_smoothing=LABEL_SMOOTHING,
        stats="differentiable",
    ),
    "all-on-trained": Objective(
        "the same, and the offset and the pair rows are learned",
        offset=True,
        pair=True,
        label_smoothing=LABEL_SMOOTHING,
        stats="differentiable",
        trains_terms=True,
    ),
}


class Case(NamedTuple):
    """One comparison: all providers of one objective on one workload."""

    workload: str
    dtype: str
    objective: str

    @property
    def key(self) -> str:
        return "/".join(self)

    @property
    def logits_bytes(self) -> int:
        rows, classes, _ = WORKLOADS[self.workload]
        return rows * classes * DTYPES[self.dtype].itemsize

    @classmethod
    def parse(cls, key: str) -> "Case":
        return cls(*key.split("/"))


CASES = tuple(Case(w, d, o) for w in WORKLOADS for d in DTYPES for o in OBJECTIVES)
#: The drop-in everywhere, other objectives in the dtype that GPUs train in: each case costs seconds of compilation.
GPU_CASES = tuple(
    c
    for c in CASES
    if c.objective == "plain"
    or (c.dtype == "bfloat16" and c.workload == "imagenet-global")
    or (c.dtype == "bfloat16" and c.workload == "imagenet21k" and c.objective in ("monitor", "all-on-trained"))
)


class Inputs(NamedTuple):
    """Everything any objective reads, so that all objectives of a workload share one set of numbers."""

    logits: Tensor  # (N, C), the case's dtype; other floats are float32
    target: Tensor  # (N,) int64
    target_b: Tensor  # (N,) int64, the second label where labels are mixed
    lam: Tensor  # (N,) share of target
    offset: Tensor  # (C,)
    pair: PairTerms  # rows (min(N, C), C) of the labels present
    mass_weight: Tensor  # (C,) upstream gradient of mass
    hit_weight: Tensor  # (C,) upstream gradient of hit
    probabilities: Tensor  # (N, C) of the mixed labels, or (0, C) where none are: they are as large as the logits

    def labels(self, objective: Objective) -> Tensor:
        """Labels of each sample: (N, 1), or (N, 2) where they are mixed."""
        return torch.stack([self.target, self.target_b][: 1 + objective.mixed], dim=1)

    def leaves(self, objective: Objective) -> list[Tensor]:
        """The tensors whose gradients a step computes."""
        learned = [self.offset, self.pair.rows] if objective.trains_terms else []
        return [self.logits, *learned]

    def map(self, change: Callable[[Tensor], Tensor], objective: Objective) -> "Inputs":
        """A copy with every tensor changed, as fresh leaves."""
        pair = PairTerms(*(change(getattr(self.pair, f.name).detach()) for f in fields(PairTerms)))
        others = {k: change(v.detach()) for k, v in self._asdict().items() if k != "pair"}
        copy = Inputs(**others, pair=pair)
        for leaf in copy.leaves(objective):
            leaf.requires_grad_()
        return copy

    def exact(self, objective: Objective) -> "Inputs":
        """The same numbers in float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t, objective)


def make_inputs(case: Case, device: str) -> Inputs:
    """Seeded, and drawn on the CPU, so that every device gets the same numbers."""
    rows, classes, _ = WORKLOADS[case.workload]
    objective = OBJECTIVES[case.objective]
    generator = torch.Generator().manual_seed(rows * classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    target = torch.randint(classes, (rows,), generator=generator)
    index = label_index(target, classes)
    pair_rows = 0.5 * normal(min(rows, classes), classes)
    inputs = Inputs(
        logits=(2 * normal(rows, classes)).to(DTYPES[case.dtype]),
        target=target,
        target_b=target.roll(1),  # the neighbour in the batch, as torchvision mixes
        offset=normal(classes),
        pair=PairTerms(pair_rows, index.slot, index.key_of_slot, index.num_slots),
        # Of order 1/N, as a mean over the batch has: statistics and loss pull about equally hard.
        mass_weight=normal(classes) / rows,
        hit_weight=normal(classes) / rows,
        lam=torch.rand(rows, generator=generator),
        probabilities=torch.zeros(0, classes),
    )
    if objective.mixed:
        inputs = inputs._replace(probabilities=_probabilities(inputs))
    return inputs.map(lambda t: t.to(device), objective)


def _probabilities(inputs: Inputs) -> Tensor:  # (N, C)
    """What torchvision's MixUp and CutMix return as labels."""
    one_hot_a, one_hot_b = (F.one_hot(t, inputs.logits.shape[1]) for t in (inputs.target, inputs.target_b))
    return torch.lerp(one_hot_b.float(), one_hot_a.float(), inputs.lam.unsqueeze(1))
