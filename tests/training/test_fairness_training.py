"""What the group penalties do to a classifier: slow, because 8 seeds of 6 trainings each are compared in pairs."""

import pytest
import torch
from torch import nn

from classfair import cross_entropy_with_stats, demographic_parity_loss, equalized_odds_loss, iou_loss

PENALTIES = {
    "dp-l2": demographic_parity_loss,
    "dp-mi": lambda s: demographic_parity_loss(s, kind="mi"),
    "eo-l2": equalized_odds_loss,
    "eo-mi": lambda s: equalized_odds_loss(s, kind="mi"),
    "iou": iou_loss,
}
WEIGHT, STEPS, BATCH = 10.0, 500, 1024


def make_samples(seed, count):
    """Three classes, two groups. Group 1 has 30 % of the samples, other class proportions and twice the noise, and one
    feature tells the groups apart."""
    g = torch.Generator().manual_seed(seed)
    group = (torch.rand(count, generator=g) < 0.3).long()
    proportions = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    target = torch.multinomial(proportions[group], 1, generator=g)[:, 0]
    centres = torch.tensor([[0.0, 2.0], [1.8, -1.0], [-1.8, -1.0]])
    noise = torch.tensor([0.9, 1.8])[group, None]
    shift = torch.tensor([[0.0, 0.0], [0.8, 0.4]])[group]
    position = centres[target] + shift + noise * torch.randn(count, 2, generator=g)
    tell = group[:, None] * 2.0 - 1 + 0.3 * torch.randn(count, 1, generator=g)
    return torch.cat([position, tell, torch.randn(count, 5, generator=g)], 1), target, group


def train(seed, penalty, start=None):
    torch.manual_seed(seed)
    features, target, group = make_samples(seed, 20_000)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        i = torch.randint(0, len(target), (BATCH,))
        options = {"group": group[i], "num_groups": 2, "joint": True}
        loss, stats = cross_entropy_with_stats(model(features[i]), target[i], **options)
        if penalty is not None:
            loss = loss + WEIGHT * penalty(stats)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def evaluate(seed, model):
    """Accuracy and every penalty on a set of its own, as a whole."""
    features, target, group = make_samples(1000 + seed, 8_000)
    logits = model(features)
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=2, joint=True)
    values = {name: float(penalty(stats)) for name, penalty in PENALTIES.items()}
    return {**values, "accuracy": float((logits.argmax(1) == target).float().mean())}


@pytest.mark.slow
def test_each_penalty_reduces_its_own_measure_tenfold():
    """And demographic parity costs accuracy where labels depend on the group, which the others need not."""
    change = {name: [] for name in PENALTIES}
    for seed in range(8):
        plain = train(seed, None)
        before = evaluate(seed, plain)
        for name, penalty in PENALTIES.items():
            after = evaluate(seed, train(seed, penalty, plain.state_dict()))
            assert after[name] < before[name] / 10, (seed, name)
            change[name].append(after["accuracy"] - before["accuracy"])
    mean = {name: sum(values) / len(values) for name, values in change.items()}
    assert max(change["dp-l2"]) < -0.04
    assert mean["dp-l2"] < -0.05
    assert mean["iou"] > -0.01
    assert mean["eo-mi"] > -0.02
