"""Every public loss on a GPU: a training step never waits for the device, and may be captured in a graph, which also
refuses a wait inside of our own kernels' launches that torch cannot see."""

from functools import partial

import pytest
import torch

import classfair
from classfair import MixedTarget
from tests.support.gpu import backend_fixture, captured, no_sync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ROWS, CLASSES, DIM = 40, 12, 24
COUNTS = torch.arange(1, CLASSES + 1)
PLAIN = {
    "cross-entropy": lambda b: classfair.CrossEntropyLoss(label_smoothing=0.1, backend=b),
    "logit-adjusted": lambda b: classfair.LogitAdjustedLoss(COUNTS, backend=b),
    "ldam": lambda b: classfair.LDAMLoss(COUNTS, backend=b),
    "class-balanced": lambda b: classfair.ClassBalancedLoss(COUNTS, backend=b),
    "focal": lambda b: classfair.FocalLoss(gamma=2.0, backend=b),
}
WITH_FEATURES = {
    "isda": lambda b: classfair.ISDALoss(CLASSES, DIM, strength=0.5, backend=b),
    "metalad": lambda b: classfair.MetaLADLoss(COUNTS, DIM, backend=b),
}
PENALTIES = {
    "dp": classfair.demographic_parity_loss,
    "eo": partial(classfair.equalized_odds_loss, kind="mi"),
    "iou": classfair.iou_loss,
}


backend = backend_fixture("softmax_loss")


def _batch():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (ROWS,), generator=g)
    batch = torch.randn(ROWS, DIM, generator=g), target, torch.randint(0, 2, (ROWS,), generator=g)
    return [t.cuda() for t in batch]


def _step(kind, name, backend):
    """A function that does forward and backward, and returns loss and gradient."""
    features, target, group = _batch()
    head = torch.nn.Linear(DIM, CLASSES, device="cuda")
    torch.nn.init.constant_(head.bias, 0.1)
    with torch.no_grad():
        head.weight.copy_(features[:CLASSES] / 3)
    if kind == "penalty":
        criterion = classfair.CrossEntropyLoss(backend=backend)
        options = {"group": group, "num_groups": 2, "penalty": PENALTIES[name], "joint": name == "eo"}
    else:
        criterion = {**PLAIN, **WITH_FEATURES}[name](backend).cuda()
    if kind == "mixed":
        target = MixedTarget(target, target.roll(1), 0.3)

    def step():
        head.zero_grad()
        if kind == "penalty":
            loss, _ = criterion.with_stats(head(features), target, **options)
        elif name in WITH_FEATURES:
            loss = criterion(features, head.weight, target, linear_bias=head.bias)
        else:
            loss = criterion(head(features), target)
        loss.backward()
        return [loss.detach(), head.weight.grad]

    return step


STEPS = [
    *(("labels", name) for name in (*PLAIN, *WITH_FEATURES)),
    *(("mixed", name) for name in ("cross-entropy", *WITH_FEATURES)),
    *(("penalty", name) for name in PENALTIES),
]
each_step = pytest.mark.parametrize(("kind", "name"), STEPS, ids=["-".join(s) for s in STEPS])


@each_step
def test_a_training_step_never_waits_for_the_device(kind, name, backend):
    step = _step(kind, name, backend)
    step()  # compiles and loads
    with no_sync():
        step()


@each_step
def test_a_training_step_in_a_graph(kind, name, backend):
    eager, repeated = _step(kind, name, backend), _step(kind, name, backend)
    graph, result = captured(repeated)
    graph.replay()
    eager()  # the step that the warm-up took: running statistics change with each
    for got, expected in zip(result, eager(), strict=True):
        torch.testing.assert_close(got, expected)
