"""The classifier of the embedded job: a small multi-layer perceptron."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them, initialised from ``generator``.

    The distribution is that of ``nn.Linear``: uniform in +-1/sqrt(inputs). The draw leaves the
    global random state alone: a model depends on its own seed and on nothing that ran before.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        _uniform(linear.weight, inputs, generator)
        _uniform(linear.bias, inputs, generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # the last layer gives logits


def _uniform(parameter: Tensor, inputs: int, generator: torch.Generator) -> None:
    bound = inputs**-0.5
    nn.init.uniform_(parameter, -bound, bound, generator=generator)
