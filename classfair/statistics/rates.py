"""Rates of predictions by class and group, one formula each: of counts or of sums of probabilities, in float64.

Every function takes tensors of one device and returns such; classes are the last dimension and groups, where a
function compares them, the one before it. A class or group without a sample has rate NaN, which means and extremes
leave out; they are NaN where nothing is left. No function waits for the device.
"""

import torch
from torch import Tensor


def accuracies(correct: Tensor, count: Tensor) -> Tensor:
    """Share of the samples of each class that are predicted right."""
    return correct.double() / count


def mean(accuracy: Tensor) -> Tensor:
    """Balanced accuracy: the mean over classes (Brodersen et al. 2010)."""
    return accuracy.nanmean(-1)


def worst(accuracy: Tensor) -> Tensor:
    """Accuracy of the worst class (Cui et al. 2024, Table 1)."""
    return _without_infinities(accuracy.nan_to_num(nan=torch.inf).amin(-1))


def best(accuracy: Tensor) -> Tensor:
    """Accuracy of the best class (Cui et al. 2024, Table 1)."""
    return _without_infinities(accuracy.nan_to_num(nan=-torch.inf).amax(-1))


def geometric_mean(accuracy: Tensor, eps: float) -> Tensor:
    """exp(mean(log a)) with exact zeros as ``eps`` (Kim et al. 2021)."""
    return torch.where(accuracy == 0, eps, accuracy).log().nanmean(-1).exp()


def mean_of_members(accuracy: Tensor, members: Tensor) -> Tensor:
    """(..., K) means over the classes of each of K sets, for members (K, C) bool."""
    accuracy = accuracy.unsqueeze(-2)
    return torch.where(members, accuracy, torch.nan).nanmean(-1)


def shot_members(train_count: Tensor, many: float, few: float) -> Tensor:
    """(3, C) bool: classes with more than ``many`` training images, those between, and those with fewer than ``few``.

    Source: Liu et al. 2019.
    """
    is_many, is_few = train_count > many, train_count < few
    return torch.stack([is_many, ~(is_many | is_few), is_few])


def difficulty_members(reference: Tensor) -> Tensor:
    """(3, C) bool: thirds of the classes from high to low reference accuracy, ties by class id, NaN in none.

    The first thirds are larger where the number of classes is no multiple of three (Cui et al. 2024, Table 1).
    """
    known = (~reference.isnan()).sum()
    rank = reference.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True).argsort()  # NaN last
    larger, size = known % 3, known // 3
    ends = torch.stack([(i + 1) * size + torch.clamp(larger, max=i + 1) for i in range(3)])
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (rank >= starts[:, None]) & (rank < ends[:, None])


def frequency_order(train_count: Tensor) -> Tensor:
    """Classes from many to few training images, ties by class id."""
    return train_count.argsort(descending=True, stable=True)


def false_positive_curve(predicted: Tensor, correct: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """F(j), the false positives of the first j classes in ``order``, and the mean over j of F(j) / F(C) - j / C.

    Source: Kim et al. 2021; the area is ours, NaN without a false positive.
    """
    curve = (predicted - correct)[order].cumsum(0)
    line = torch.arange(1, curve.numel() + 1, dtype=torch.float64, device=curve.device) / curve.numel()
    return curve, (curve.double() / curve[-1] - line).mean()


def wilson_bounds(accuracy: Tensor, count: Tensor, z: float) -> tuple[Tensor, Tensor]:
    """Wilson's interval (1927) for z standard deviations, within [0, 1]."""
    count = count.double()
    scale = 1 + z**2 / count
    middle = (accuracy + z**2 / (2 * count)) / scale
    half = z / scale * (accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2).sqrt()
    return (middle - half).clamp(0, 1), (middle + half).clamp(0, 1)


def selection_rates(count: Tensor, chosen: Tensor) -> Tensor:
    """(G, C) shares of the samples of a group that are predicted as each class, for (G, C) samples and predictions."""
    return chosen.double() / count.sum(1, keepdim=True)


def odds_rates(count: Tensor, chosen: Tensor, hit: Tensor) -> Tensor:
    """(2, G, C) true and false positive rates of each class, for samples, predictions, and the right ones of these.

    Source: Hardt et al. 2016.
    """
    others = count.sum(1, keepdim=True) - count
    false = (chosen - hit).double().clamp_min(0)  # each sum of probabilities is rounded on its own
    return torch.stack([hit.double() / count, false / others])


def between_groups(rates: Tensor, reduction: str) -> Tensor:
    """The largest difference, or the smallest ratio, between groups (dimension -2) over all other dimensions.

    Groups without a rate are left out, and so is what fewer than two groups have a rate of: it cannot be compared.
    """
    missing = rates.isnan()
    comparable = (~missing).sum(-2) > 1
    high = rates.masked_fill(missing, -torch.inf).amax(-2)
    low = rates.masked_fill(missing, torch.inf).amin(-2)
    if reduction == "difference":
        return _without_infinities(torch.where(comparable, high - low, -torch.inf).amax())
    # 0 / 0 is NaN: no group has a rate above 0.
    ratio = torch.where(comparable, low / high, torch.nan).nan_to_num(nan=torch.inf).amin()
    return _without_infinities(ratio)


def spread(rates: Tensor) -> Tensor:
    """Standard deviation over groups (G,) with Bessel's correction; NaN for fewer than two groups with a rate."""
    present = ~rates.isnan()
    groups = present.sum()
    deviation = torch.where(present, rates - rates.nanmean(), 0.0)
    return torch.where(groups > 1, (deviation.square().sum() / (groups - 1)).sqrt(), torch.nan)


def _without_infinities(value: Tensor) -> Tensor:
    """NaN where an extreme had nothing to choose from."""
    return torch.where(value.isinf(), torch.nan, value)
