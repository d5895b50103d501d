"""Every loss of the library, small, and one way to call them."""

import torch
import torch.nn.functional as F

import classfair
from classfair.losses import FeatureLoss

N, C, D = 24, 5, 4
COUNTS = [50, 30, 20, 10, 5]
LOSSES = {
    "plain": lambda **k: classfair.CrossEntropyLoss(**k),
    "logit adjusted": lambda **k: classfair.LogitAdjustedLoss(COUNTS, **k),
    "ldam": lambda **k: classfair.LDAMLoss(COUNTS, scale=3.0, **k),
    "class balanced": lambda **k: classfair.ClassBalancedLoss(COUNTS, beta=0.9, gamma=1.0, **k),
    "focal": lambda **k: classfair.FocalLoss(**k),
    "isda": lambda **k: classfair.ISDALoss(C, D, strength=2.0, **k),
    "metalad": lambda **k: classfair.MetaLADLoss(COUNTS, D, **k),
    "metalad per pair": lambda **k: classfair.MetaLADLoss(COUNTS, D, per="pair", omega=(1.0, 0.5, 0.25), **k),
}
PLAIN = {"plain"}  # whose training is its evaluation
WITH_STATE = ("isda", "metalad", "metalad per pair")


def problem(seed=0):
    """Features (N, D), weights (C, D), bias (C,) and labels (N,)."""
    g = torch.Generator().manual_seed(seed)
    features, weight, bias = (torch.randn(*shape, generator=g) for shape in ((N, D), (C, D), (C,)))
    target = torch.randint(0, C, (N,), generator=g)
    target[3] = -100
    return features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


def loss_of(criterion, features, weight, bias, target, **options):
    """The loss of a linear head."""
    if isinstance(criterion, FeatureLoss):
        return criterion(features, weight, target, linear_bias=bias, **options)
    return criterion(F.linear(features, weight, bias), target, **options)
