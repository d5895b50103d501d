"""One of each torchmetrics class, how tests compare them, and what a process does with them (it imports this)."""

import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import classfair.metrics as cm
from classfair import cross_entropy_with_stats, demographic_parity_loss, effective_frequency, iou_loss

NAN = float("nan")
CLASSES, GROUPS = 5, 3
TRAIN_COUNT = [20, 500, 3, 101, 50]
REFERENCE = [0.5, 0.9, NAN, 0.9, 0.1]

MAKERS = {
    "per-class": lambda **k: cm.PerClassAccuracy(CLASSES, **k),
    "per-class-group": lambda **k: cm.PerClassAccuracy(CLASSES, GROUPS, **k),
    "interval": lambda **k: cm.PerClassAccuracy(CLASSES, confidence=0.9, **k),
    "balanced": lambda **k: cm.BalancedAccuracy(CLASSES, **k),
    "balanced-group": lambda **k: cm.BalancedAccuracy(CLASSES, GROUPS, **k),
    "worst": lambda **k: cm.WorstClassAccuracy(CLASSES, **k),
    "best": lambda **k: cm.BestClassAccuracy(CLASSES, **k),
    "geometric": lambda **k: cm.GeometricMeanAccuracy(CLASSES, **k),
    "shot": lambda **k: cm.ShotAccuracy(TRAIN_COUNT, **k),
    "shot-group": lambda **k: cm.ShotAccuracy(TRAIN_COUNT, num_groups=GROUPS, **k),
    "difficulty": lambda **k: cm.DifficultyAccuracy(REFERENCE, **k),
    "bias": lambda **k: cm.PredictionBias(CLASSES, normalize="sum", **k),
    "frequency": lambda **k: cm.EffectiveFrequency(CLASSES, **k),
    "false-positives": lambda **k: cm.CumulativeFalsePositives(TRAIN_COUNT, **k),
    "confusion": lambda **k: cm.ConfusionMatrix(CLASSES, **k),
    "parity": lambda **k: cm.DemographicParity(CLASSES, GROUPS, **k),
    "parity-overall": lambda **k: cm.DemographicParity(CLASSES, GROUPS, reduction="overall", **k),
    "parity-soft": lambda **k: cm.DemographicParity(CLASSES, GROUPS, soft=True, reduction="ratio", **k),
    "odds": lambda **k: cm.EqualizedOdds(CLASSES, GROUPS, **k),
    "odds-group": lambda **k: cm.EqualizedOdds(CLASSES, GROUPS, reduction="by_group", soft=True, **k),
    "iou": lambda **k: cm.GroupIoU(CLASSES, GROUPS, **k),
    "iou-group": lambda **k: cm.GroupIoU(CLASSES, GROUPS, reduction="by_group", soft=True, **k),
    "stats": lambda **k: cm.StatsMetric(CLASSES, effective_frequency, **k),
}


def samples(rows=200, classes=CLASSES, groups=GROUPS, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (rows,), generator=g)
    logits = torch.randn(rows, classes, generator=g) + torch.nn.functional.one_hot(target, classes)
    return logits, target, torch.randint(0, groups, (rows,), generator=g)


def values(result):
    """A list of NumPy arrays."""
    return [v.numpy() for v in (result.values() if isinstance(result, dict) else [result])]


def assert_same(a, b, exact=False):
    for x, y in zip(values(a), values(b), strict=True):
        if exact:
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-6)  # probabilities of float32 logits are added up per batch


class Forbidden(TorchDispatchMode):
    """What waits for the device, or has a shape that depends on values."""

    names = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.names), func
        if "aten.index.Tensor" in str(func):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), func
        return func(*args, **(kwargs or {}))


class Own(cm.ClassMetric):
    """A user's metric with states of its own."""

    def __init__(self, **kwargs):
        super().__init__(CLASSES, **kwargs)
        self.add_state("largest", torch.zeros(()), dist_reduce_fx="max")
        self.add_state("batches", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def _add(self, stats):
        super()._add(stats)
        self.largest = torch.maximum(self.largest, stats.mass.amax())
        self.batches = self.batches + 1
        self.rows.append(stats.prediction.float())  # torchmetrics fills an empty list with floats

    def compute(self):
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        return torch.cat([self.largest[None], self.batches, rows.double().mean()[None]])


AVERAGED = {**MAKERS, "own": Own, "average": lambda **k: cm.BatchAverage(cm.DemographicParity(CLASSES, GROUPS), **k)}
SPLITS = ([(0, 200)], [(0, 50), (50, 200)], [(0, 150), (0, 0), (150, 200)])  # rows of each process: one, two, three


def run_rank(rank):
    """Every metric on the rows of this process, in groups of one, two and three processes."""
    warnings.simplefilter("ignore")
    logits, target, group = samples()
    found = {}
    for splits in SPLITS:
        processes = dist.new_group(range(len(splits)))
        if rank >= len(splits):
            continue
        start, stop = splits[rank]
        for name, make in AVERAGED.items():
            metric = make(process_group=processes)
            for first in range(start, stop, 50):
                rows = slice(first, min(first + 50, stop))
                metric.update(logits[rows], target[rows], group[rows])
            found[len(splits), name] = values(metric.compute())
            if name != "average":  # its own again after compute
                assert metric.count.sum() == stop - start
    return found


PENALTIES = {"iou": iou_loss, "parity": demographic_parity_loss}
UNEQUAL = ([(0, 30), (30, 80)], [(80, 100), (100, 150), (150, 200)])  # batches of each process: two and three


def penalties_of(batches, **kwargs):
    """Penalties of all rows, and of batches averaged, as metrics."""
    logits, target, group = samples()
    found = {}
    for name, penalty in PENALTIES.items():
        whole = cm.StatsMetric(CLASSES, penalty, num_groups=GROUPS, **kwargs)
        average = cm.BatchAverage(cm.StatsMetric(CLASSES, penalty, num_groups=GROUPS), **kwargs)
        for kind, metric in (("whole", whole), ("average", average)):
            for start, stop in batches:
                metric.update(logits[start:stop], target[start:stop], group[start:stop])
            found[name, kind] = metric.compute().item()
    return found


def _error(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def run_unequal_rank(rank):
    """Penalties as metrics where processes have unequal numbers of batches; and statistics of all processes."""
    warnings.simplefilter("ignore")
    alone = penalties_of(UNEQUAL[0], sync_on_compute=False) if rank == 0 else None
    together = penalties_of(UNEQUAL[rank])
    stats = cross_entropy_with_stats(*samples()[:2])[1].all_reduce()
    metrics = {
        "BalancedAccuracy": cm.BalancedAccuracy(CLASSES),
        "BatchAverage": cm.BatchAverage(cm.BalancedAccuracy(CLASSES)),
        "not synced": cm.BalancedAccuracy(CLASSES, sync_on_compute=False),
        "one process": cm.BalancedAccuracy(CLASSES, process_group=[dist.new_group([r]) for r in range(2)][rank]),
    }
    refused = {
        name: (_error(lambda m=m: m.update_from(stats)), _error(lambda m=m: m.update(stats)))
        for name, m in metrics.items()
    }
    return alone, together, refused
