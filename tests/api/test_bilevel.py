"""MetaLADStep against formulas of the paper in plain torch, and against differences of the whole procedure."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import classfair
from classfair import MetaLADLoss, MetaLADStep, MixedTarget
from tests.support.processes import run_processes

N, K, INPUTS, D, C = 24, 10, 7, 6, 5
COUNTS = [40, 20, 10, 4, 2]
LR = 0.3
EVERY = ("jvp", "double_backward", "finite_difference")


def layers():
    return nn.Sequential(nn.Linear(INPUTS, D), nn.Tanh(), nn.Linear(D, C))


def batch(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, C, (N,), generator=g)
    target[5] = -100
    images, meta = (torch.randn(size, INPUTS, generator=g, dtype=dtype) for size in (N, K))
    return images, target, meta, torch.arange(K) % C


def problem(method="jvp", *, model=None, per="class", dtype=torch.float64, seed=0, lr=LR, **options):
    """A step in the middle of a training: class statistics, momentum and weights of terms that are not 1."""
    torch.manual_seed(seed)
    model = (layers() if model is None else model).to(dtype)
    net = classfair.nn.with_features(model)
    criterion_options = {k: options.pop(k) for k in ("weight", "label_smoothing", "reduction") if k in options}
    criterion = MetaLADLoss(COUNTS, net.head.weight.shape[1], per=per, **criterion_options).to(dtype)
    criterion.omega += 0.3 * torch.randn_like(criterion.omega)
    criterion.statistics.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    images, target, *_ = batch(seed + 1, dtype)
    features, logits = net(images)
    criterion(features, net.head.weight, target, logits=logits).backward()
    optimizer.step()
    optimizer.zero_grad()
    return MetaLADStep(net, criterion, optimizer, method=method, **options)


def table(omega, weight, criterion):
    """Eq. 33 with the corrected sign, row y and column c, in loops over classes and in differences of weights."""
    prior = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    mean, cov = criterion.statistics.mean, criterion.statistics.cov
    distance = torch.tensor([[float((mean[a] - mean[b]).norm()) for a in range(C)] for b in range(C)])
    average = distance.sum().double() / (C * (C - 1))
    omega = omega.reshape(3, *(1,) * (3 - omega.dim()), *omega.shape[1:])
    rows = []
    for y in range(C):
        row = []
        for c in range(C):
            if c == y:
                row.append(torch.zeros((), dtype=torch.float64))
                continue
            # scalar: one for all; by class: that of y; by pair: that of (y, c)
            w = omega.expand(3, C, C)[:, y, c] if omega.shape[1:] != (1, C) else omega[:, 0, y]
            gap = weight[c] - weight[y]
            variance = (gap * cov[y] * gap).sum() / (gap * gap).sum()
            row.append(w[0] * (prior[c] / prior[y]).log() + w[1] * variance + w[2] * (average / distance[y, c]).log())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def forward(parameters, images):
    (w1, b1, w2, b2) = parameters
    return torch.tanh(images @ w1.T + b1) @ w2.T + b2


def train_loss(parameters, omega, images, target, criterion):
    keep = target != -100
    perturbed = forward(parameters, images[keep]) + table(omega, parameters[2], criterion)[target[keep]]
    return F.cross_entropy(perturbed, target[keep])


def meta_loss(omega, step, data, outer="ce"):
    """The whole procedure: eq. 34, and the meta loss at its end."""
    images, target, meta, meta_target = data
    parameters = [p.detach().clone().requires_grad_() for p in step.model.parameters()]
    grads = torch.autograd.grad(train_loss(parameters, omega, images, target, step.criterion), parameters)
    virtual = [(p - LR * g).detach() for p, g in zip(parameters, grads, strict=True)]
    if outer == "perturbed":
        return train_loss(virtual, omega, meta, meta_target, step.criterion).detach()
    return F.cross_entropy(forward(virtual, meta), meta_target)


def differences(step, data, outer="ce", size=1e-5):
    omega = step.criterion.omega
    result = torch.zeros_like(omega)
    for i in range(omega.numel()):
        shift = torch.zeros_like(omega)
        shift.view(-1)[i] = size
        ends = [meta_loss(omega + sign * shift, step, data, outer) for sign in (1, -1)]
        result.view(-1)[i] = (ends[0] - ends[1]) / (2 * size)
    return result


def assert_close(got, expected, relative=1e-6):
    assert float((got - expected).norm() / expected.norm()) < relative


@pytest.mark.parametrize("per", ["scalar", "class", "pair"])
@pytest.mark.parametrize("outer", ["ce", "perturbed"])
def test_hypergradient_is_the_difference_of_the_whole_procedure(per, outer):
    data = batch()
    expected = differences(problem(per=per), data, outer)
    for method in EVERY:
        step = problem(method, per=per, outer=outer)
        got = step.hypergradient(*data)
        assert got.shape == step.criterion.omega.shape
        assert_close(got, expected)
