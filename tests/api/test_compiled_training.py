"""Feature losses in a compiled step: their state changes with every step, and nothing is compiled again for it."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from classfair import ISDALoss, MetaLADLoss, MixedTarget, cross_entropy

CLASSES, DIM = 7, 5
COUNTS = [50, 30, 20, 10, 5, 3, 1]
LOSSES = {
    "isda": (lambda: ISDALoss(CLASSES, DIM, strength=0.5), False),
    "isda-logits": (lambda: ISDALoss(CLASSES, DIM, strength=0.5), True),
    "metalad-3": (lambda: MetaLADLoss(COUNTS, DIM, distance_every=3), True),
    "metalad-100": (lambda: MetaLADLoss(COUNTS, DIM, distance_every=100), False),
}
#: Sizes of batches, what compile() is told of them, and how many compilations they may take.
SIZES = {"static": ((24,), False, 2), "dynamic": ((24, 17, 31), True, 2), "automatic": ((24, 17, 31), None, 3)}
STEPS = 250  # well past the limits of recompilation, and twice past distance_every
QUICK = {("isda-logits", "static"), ("metalad-3", "automatic")}


def batch(rows, seed):
    g = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(rows, DIM, generator=g), torch.randn(CLASSES, DIM, generator=g)
    return features.requires_grad_(), weight.requires_grad_(), torch.randint(0, CLASSES - 1, (rows,), generator=g)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(n, s, marks=[pytest.mark.slow] * ((n, s) not in QUICK)) for n in LOSSES for s in SIZES],
)
def test_nothing_is_compiled_again(name, sizes):
    torch._dynamo.reset()
    (make, with_logits), (rows, dynamic, most) = LOSSES[name], SIZES[sizes]
    criterion, eager, counter = make(), make(), CompileCounter()
    compiled, frames = torch.compile(criterion, fullgraph=True, dynamic=dynamic, backend=counter), []
    for step in range(STEPS):
        features, weight, target = batch(rows[step % len(rows)], step)
        results = []
        for function in (compiled, eager):
            logits = {"logits": features @ weight.T} if with_logits else {}
            loss = function(features, weight, target, **logits)
            results.append((loss.detach(), *torch.autograd.grad(loss, (features, weight))))
        torch.testing.assert_close(*results)
        frames.append(counter.frame_count)
    for (key, got), expected in zip(criterion.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, msg=key)
    assert frames[most - 1 :] == [frames[most - 1]] * (STEPS + 1 - most), frames
    assert frames[-1] <= most
    torch._dynamo.reset()


@pytest.mark.parametrize("made_outside", [True, False])
def test_a_share_from_numpy_changes_without_a_compilation(made_outside):
    """MixUp draws it by NumPy, anew for every batch."""
    torch._dynamo.reset()
    g, target, counter = np.random.default_rng(0), torch.arange(12) % CLASSES, CompileCounter()
    isda = ISDALoss(CLASSES, DIM).eval()

    def losses(features, weight, lam):
        mixed = lam if isinstance(lam, MixedTarget) else MixedTarget(target, target.flip(0), lam)
        return cross_entropy(features @ weight.T, mixed) + isda(features, weight, mixed)

    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    features, weight, _ = batch(12, 0)
    for lam in g.beta(0.4, 0.4, 6):
        given = MixedTarget(target, target.flip(0), lam) if made_outside else lam
        torch.testing.assert_close(compiled(features, weight, given), losses(features, weight, given))
    assert counter.frame_count == 1
    torch._dynamo.reset()
