"""Two Gaussian classes in closed form, by simulation and by brute force (Wu et al. 2023, section III-B)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from classfair.losses import FeatureLoss


def phi(x: float | Tensor) -> Tensor:
    """Distribution function of the standard normal distribution."""
    return torch.special.ndtr(torch.as_tensor(x, dtype=torch.float64))


@dataclass(frozen=True)
class TwoGaussians:
    """Class +1 is N(theta, sd_pos^2 I), class -1 is N(-theta, sd_neg^2 I), theta = (eta, ..., eta), priors 1 : v.

    Eq. 2 with v = 1, eq. 18 otherwise. A classifier says +1 where w^T x + b > 0.
    """

    sd_pos: float
    sd_neg: float
    v: float = 1.0
    eta: float = 1.0
    dim: int = 2

    def sample(self, n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """n samples of each class, (n, dim) each; priors are for :meth:`mean_error` to weigh."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, n, self.dim, generator=generator, dtype=dtype)
        return self.eta + self.sd_pos * noise[0], -self.eta + self.sd_neg * noise[1]

    def errors(self, w: Tensor, b: float | Tensor) -> tuple[Tensor, Tensor]:
        """Exact error of either class under a linear classifier; b may be of any shape."""
        w, b = w.double(), torch.as_tensor(b, dtype=torch.float64)
        shift, length = self.eta * w.sum(), w.norm()
        return phi(-(shift + b) / (length * self.sd_pos)), phi((b - shift) / (length * self.sd_neg))

    def mean_error(self, errors: tuple[Tensor, Tensor]) -> Tensor:
        return (errors[0] + self.v * errors[1]) / (1 + self.v)

    def minimise(self, w: Tensor | None = None) -> tuple[float, float, float]:
        """The threshold of least 0-1 error among all, by brute force, and both errors there; w = 1 by default."""
        w = torch.ones(self.dim) if w is None else w
        centre, width = 0.0, 10 * self.dim * (self.eta + self.sd_pos + self.sd_neg)
        for _ in range(4):  # the last grid is 1e-9 of the first
            b = torch.linspace(centre - width, centre + width, 4001, dtype=torch.float64)
            centre = float(b[self.mean_error(self.errors(w, b)).argmin()])
            width /= 1000
        pos, neg = self.errors(w, centre)
        return centre, float(pos), float(neg)


def theorem3_errors(a: float, k: float, v: float) -> tuple[float, float]:
    """Eq. 20, with a = sqrt(d) eta / sigma and sigma_1 : sigma_2 = 1 : k, the ratio of standard deviations.

    nan where no threshold is stationary: then the best classifier always says -1.
    """
    if k == 1:  # the limit: b = -sqrt(d) sigma log(v) / 2a
        shift = math.log(v) / (2 * a)
        return float(phi(shift - a)), float(phi(-shift - a))
    big_b, q = -2 * a / (k**2 - 1), 2 * math.log(k / v) / (k**2 - 1)
    if big_b**2 + q < 0:
        return math.nan, math.nan
    root = math.sqrt(big_b**2 + q)
    return float(phi(-k * root - big_b)), float(phi(k * big_b + root))


def theorem3_threshold(a: float, k: float, v: float) -> float:
    """Eq. 22, corrected, in units of sqrt(d) sigma. Written with the root below, it has no limit to take at k = 1."""
    log = 2 * k**2 * math.log(k / v)
    square = 4 * k**2 * a**2 + (k**2 - 1) * log
    if square < 0:
        return math.nan
    return (log - a**2 * (k**2 - 1)) / (a * (k**2 + 1) + math.sqrt(square))


def theorem2_accuracies(a: float) -> tuple[float, float, float]:
    """Eq. 10, corrected, with a = sqrt(d) eta / sigma the distance of neighbouring means in standard deviations."""
    tail = float(phi(-a / 2))
    return 1 - tail, 1 - 2 * tail, 1 - tail


def fit_linear(criterion, x, y, num_classes, steps=300):
    """A linear classifier of fixed features, by gradient descent on all samples at once."""
    head = torch.nn.Linear(x.shape[1], num_classes)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(criterion, FeatureLoss):
            loss = criterion(x, head.weight, y, linear_bias=head.bias)
        else:
            loss = criterion(F.linear(x, head.weight, head.bias), y)
        loss.backward()
        optimizer.step()
    return head.weight.detach(), head.bias.detach()
