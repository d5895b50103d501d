"""What trains a second time or a second model: upweighted samples, scaled classes, relative difficulty."""

from collections import Counter

import numpy as np
import pytest
import torch

from classfair import RelativeDifficulty
from classfair.data import UpweightedSampler
from classfair.nn import CosineLinear, ScaledLinear, replace_head, with_features
from tests.support.processes import run_processes


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# UpweightedSampler

MASK = torch.tensor([False, True, False, True, False, False, True])


@pytest.mark.parametrize("times", [0, 1, 20])
def test_every_sample_once_and_some_more_often(times):
    sampler = UpweightedSampler(MASK, MASK, times, seed=1)
    assert Counter(sampler) == {i: 1 + times * bool(m) for i, m in enumerate(MASK)}
    assert list(sampler) == list(sampler)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(UpweightedSampler(MASK, MASK.numpy(), times, seed=1)) == first


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_one_order(world):
    order = list(UpweightedSampler(MASK, MASK, 3, seed=2))
    shares = [list(UpweightedSampler(MASK, MASK, 3, seed=2, num_replicas=world, rank=r)) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    dealt = [shares[i % world][i // world] for i in range(world * len(shares[0]))]
    assert dealt == (order + order)[: len(dealt)]
    assert len(dealt) < len(order) + world


def test_bad_input_to_the_sampler():
    with pytest.raises(TypeError, match="UpweightedSampler: expected upweighted as booleans, one for each sample, got"):
        UpweightedSampler(MASK, [1, 3], 2)
    with pytest.raises(ValueError, match=r"expected upweighted for 7 > 0 samples, got \(6,\)"):
        UpweightedSampler(MASK, MASK[:6], 2)
    with pytest.raises(ValueError, match="for 0 > 0 samples"):
        UpweightedSampler([], MASK[:0], 2)
    with pytest.raises(ValueError, match="UpweightedSampler: expected times >= 0, got -1"):
        UpweightedSampler(MASK, MASK, -1)
    with pytest.raises(TypeError, match="expected times as an int"):
        UpweightedSampler(MASK, MASK, 1.5)
    with pytest.raises(TypeError, match="expected dataset with a length"):
        UpweightedSampler(iter([1]), MASK, 1)


# ScaledLinear


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_classifier_starts_as_it_was_and_trains_its_scale_alone(bias):
    linear = torch.nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    head, x = ScaledLinear(linear), normal(4, 5)
    torch.testing.assert_close(head(x), linear(x))
    assert [n for n, p in head.named_parameters() if p.requires_grad] == ["scale"]
    with torch.no_grad():
        head.scale.copy_(torch.tensor([2.0, 0.5, -1.0]))
    expected = linear(x).detach().numpy() * np.array([2.0, 0.5, -1.0])
    np.testing.assert_allclose(head(x).detach().numpy(), expected)
    folded = torch.nn.functional.linear(x, head.weight, head.bias)
    torch.testing.assert_close(folded, head(x))
    head(x).sum().backward()
    assert linear.weight.grad is None
    np.testing.assert_allclose(head.scale.grad.numpy(), linear(x).detach().numpy().sum(0))

    def logits(scale, x):
        return torch.func.functional_call(head, {"scale": scale}, (x,))

    inputs = head.scale.detach().clone().requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(logits, inputs)
    assert torch.autograd.gradgradcheck(logits, inputs)


def test_a_scaled_classifier_is_a_head():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    replace_head(model, ScaledLinear)
    features, logits = with_features(model)(normal(2, 6, dtype=torch.float32))
    assert (features.shape, logits.shape) == ((2, 4), (2, 3))
    assert ScaledLinear(CosineLinear(4, 3)).bias is None
    assert ScaledLinear(torch.nn.Linear(4, 3).half()).scale.dtype == torch.float32
    with pytest.raises(TypeError, match=r"ScaledLinear: expected a module with a weight of shape \(C, D\), got ReLU"):
        ScaledLinear(torch.nn.ReLU())


# RelativeDifficulty


class NumPyDifficulty:
    """Nam et al.'s code, image by image, in float64."""

    def __init__(self, labels, alpha):
        self.labels, self.alpha = np.array(labels), alpha
        self.average = [{}, {}]

    def update(self, index, *losses):
        for average, loss in zip(self.average, losses, strict=True):
            for i, value in zip(index, loss, strict=True):
                if i >= 0:
                    average[i] = self.alpha * average[i] + (1 - self.alpha) * value if i in average else value
        weights = []
        for i in index:
            b, d = 0.0, 0.0
            if i >= 0:
                b, d = (
                    average[i] / max(average.get(j, 0) for j in np.flatnonzero(self.labels == self.labels[i]))
                    for average in self.average
                )
            weights.append(b / (b + d + 1e-8))
        return weights


LABELS = [0, 0, 1, 1, 2, 2, 2, 0]
BATCHES = [[0, 2, 4], [1, 0, 3, 5], [7, 2, -1], [], [4, 5, 6, 0]]


def batches():
    g = np.random.default_rng(0)
    return [(index, g.exponential(size=len(index)), g.exponential(size=len(index))) for index in BATCHES]


def test_weights_are_those_of_the_authors():
    mine, theirs = RelativeDifficulty(LABELS, 3, momentum=0.6), NumPyDifficulty(LABELS, 0.6)
    for index, biased, debiased in batches():
        arguments = torch.tensor(index, dtype=torch.int64), torch.tensor(biased), torch.tensor(debiased)
        np.testing.assert_allclose(mine.update(*arguments), theirs.update(index, biased, debiased), rtol=1e-5)
    assert mine.seen.all()


def test_averages_follow_the_image_not_the_batch():
    one, other = RelativeDifficulty(LABELS, 3), RelativeDifficulty(LABELS, 3)
    loss = torch.arange(1.0, 9.0)
    one.update(torch.arange(8), loss, loss.flip(0))
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    for part in order.split(3):
        other.update(part, loss[part], loss.flip(0)[part])
    assert torch.equal(one.average, other.average)
    other.load_state_dict(one.state_dict())
    assert list(one.state_dict()) == ["average", "seen"]


def test_what_has_no_loss_has_weight_zero():
    difficulty = RelativeDifficulty(LABELS, 3)
    nan = torch.tensor([torch.nan, 1.0, 0.0])
    weights = difficulty.update(torch.tensor([0, -1, 2]), nan, torch.tensor([1.0, 1.0, 0.0]))
    assert weights.tolist() == [0.0, 0.0, 0.0]
    assert difficulty.seen.tolist() == [i == 2 for i in range(8)]
    difficulty.update(torch.tensor([0]), torch.ones(1), torch.ones(1))
    before = difficulty.average.clone()
    difficulty.update(torch.tensor([0]), torch.tensor([torch.inf]), torch.ones(1))
    assert torch.equal(difficulty.average, before)


def _rank(rank, world):
    difficulty = RelativeDifficulty(LABELS, 3)
    weights = []
    for index, biased, debiased in batches():
        mine = slice(rank, None, world)
        part = torch.tensor(index, dtype=torch.int64)[mine]
        weights.append(difficulty.update(part, torch.tensor(biased)[mine], torch.tensor(debiased)[mine]))
    return weights, difficulty.state_dict()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_weight_as_one(world, tmp_path):
    alone = RelativeDifficulty(LABELS, 3)
    expected = [alone.update(torch.tensor(i, dtype=torch.int64), *map(torch.tensor, x)) for i, *x in batches()]
    for rank, (weights, state) in enumerate(run_processes(_rank, world, tmp_path, world)):
        for mine, whole in zip(weights, expected, strict=True):
            assert torch.equal(mine, whole[rank::world])
        assert torch.equal(state["average"], alone.average)


def test_bad_input_to_difficulty():
    difficulty, one = RelativeDifficulty(LABELS, 3), torch.ones(1)
    before = difficulty.average.clone()
    with pytest.raises(IndexError, match=r"RelativeDifficulty\.update: expected index below 8, got 8"):
        difficulty.update(torch.tensor([8]), one, one)
    with pytest.raises(ValueError, match="expected biased of shape"):
        difficulty.update(torch.tensor([0, 1]), one, one)
    with pytest.raises(TypeError, match="expected index of dtype"):
        difficulty.update(one, one, one)
    assert torch.equal(difficulty.average, before)
    with pytest.raises(ValueError, match="RelativeDifficulty: expected momentum"):
        RelativeDifficulty(LABELS, 3, momentum=1.0)
    with pytest.raises(ValueError, match="RelativeDifficulty: expected labels in"):
        RelativeDifficulty([0, 3], 3)
