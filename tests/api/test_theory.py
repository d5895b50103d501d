"""Theorems 1 to 3 and Corollary 1 of Wu et al. 2023, "Rethinking Class Imbalance in Machine Learning".

They are about linear rules of least 0-1 error, so that is what is minimised here, over the threshold b. A fit by
cross-entropy does not follow them under imbalance of both proportion and variance.

Samples: N of each class. The rate of an event of probability p then has standard error sqrt(p (1 - p) / N), at most
0.0011; rates may be off by five of them, which chance exceeds once in 1.7 million. The seeds are fixed anyway.
"""

import itertools
import math

import pytest
import torch

import classfair
from classfair.pair import pair_variance
from tests.support.theory import TwoGaussians, phi, theorem2_accuracies, theorem3_errors, theorem3_threshold

N = 200_000


def tolerance(p):
    return 5 * math.sqrt(max(p * (1 - p), 1 / N) / N)


def check_simulated(task, b):
    """The rates of errors of x_1 + ... + x_d + b > 0 in a sample are those of the closed form."""
    x_pos, x_neg = task.sample(N, seed=0)
    expected = task.errors(torch.ones(task.dim), b)
    for simulated, exact in zip((x_pos.sum(1) + b <= 0, x_neg.sum(1) + b > 0), map(float, expected), strict=True):
        assert abs(float(simulated.double().mean()) - exact) < tolerance(exact)


def least_simulated_error(task):
    """Least weighted 0-1 error in a sample over every threshold there is."""
    scores = torch.cat([x.sum(1) for x in task.sample(N, seed=1)])
    label = torch.arange(2).repeat_interleave(N)[scores.argsort()]
    pos_below = (label == 0).cumsum(0) / N  # thresholds behind each score: misses of +1, false alarms of -1
    neg_above = 1 - (label == 1).cumsum(0) / N
    return float(task.mean_error((pos_below, neg_above)).min())


# Definition 1


@pytest.mark.parametrize(
    ("pos", "neg", "expected"),
    [([2.0, 8.0], [2.0, 4.0], 1.0), ([8.0, 2.0], [2.0, 8.0], 4.0)],
    ids=["left", "right"],
)
def test_variance_imbalance_of_figure_9(pos, neg, expected):
    """Eq. 4 is the ratio of the projected variances of eq. 29, of NISDA; w* = (1, 0)."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    projected = pair_variance(weight, torch.tensor([pos, neg]), normalize=True)
    assert float(projected[0, 1] / projected[1, 0]) == pytest.approx(expected)


def test_variance_imbalance_is_the_square_of_k():
    """Eq. 5, with the variances that ClassStatistics measures. A variance of N normal values, and so of 2N that two
    features average, is off by a relative 1 / sqrt(N); a ratio of two by sqrt(2 / N), 0.003."""
    task = TwoGaussians(sd_pos=3.0, sd_neg=1.0)
    statistics = classfair.ClassStatistics(2, task.dim)
    statistics.update(torch.cat(task.sample(N, seed=0, dtype=torch.float32)), torch.arange(2).repeat_interleave(N))
    mapped = pair_variance(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), statistics.cov)
    assert float(mapped[0, 1] / mapped[1, 0]) == pytest.approx(9, rel=5 * math.sqrt(2 / N))


# Theorem 1: eq. 2, +1 has K times the standard deviation of -1. It is Theorem 3 with V = 1 and the classes swapped.


@pytest.mark.parametrize("k", [1.5, 2.0, 4.0])
def test_theorem_1(k):
    task = TwoGaussians(sd_pos=k, sd_neg=1.0)
    b, pos, neg = task.minimise()
    assert (neg, pos) == pytest.approx(theorem3_errors(math.sqrt(2), k, 1.0), abs=1e-7)
    assert pos > neg + 0.03
    check_simulated(task, b)
    # The least error over all thresholds of a sample is off by at most the largest deviation e of the two empirical
    # distribution functions from the exact ones, each exceeded with a probability of at most 2 exp(-2 N e^2) = 1e-8.
    assert abs(least_simulated_error(task) - float(task.mean_error((pos, neg)))) < math.sqrt(math.log(2e8) / (2 * N))


def test_theorem_1_direction():
    """Among all linear classifiers w = 1 is the best: the proof minimises over b alone."""
    task = TwoGaussians(sd_pos=2.0, sd_neg=1.0)
    angles = torch.arange(0, 91, 5, dtype=torch.float64).deg2rad()
    least = [task.mean_error(task.minimise(torch.stack([a.cos(), a.sin()]))[1:]) for a in angles]
    assert int(torch.tensor(least).argmin()) == 9  # 45 degrees


def test_gap_grows_with_k():
    """Figure 6."""
    gaps = []
    for k in torch.linspace(1, 8, 29).tolist():
        _, pos, neg = TwoGaussians(sd_pos=k, sd_neg=1.0).minimise()
        gaps.append(pos - neg)
    assert gaps[0] == pytest.approx(0, abs=1e-7)
    assert all(later > earlier for earlier, later in itertools.pairwise(gaps))


# Theorem 2: eq. 8, three classes of equal variance at theta, 0 and -theta. Printed, eq. 10 has 3 sqrt(d) eta / 2 sigma
# where the threshold of eq. 14, half way between two means, gives sqrt(d) eta / 2 sigma. (Eq. 12 lacks the inverse of
# the covariance and the factor -1/2; eq. 13 is right again.)


@pytest.mark.parametrize(("eta", "sigma", "dim"), [(1.0, 1.0, 2), (1.5, 1.0, 3), (1.0, 0.5, 1)])
def test_theorem_2(eta, sigma, dim):
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([eta, 0.0, -eta], dtype=torch.float64)[:, None].expand(3, dim)
    x = means[:, None] + sigma * torch.randn(3, N, dim, generator=generator, dtype=torch.float64)
    # Bayes' rule of equal priors and equal spherical covariances: the nearest mean.
    hits = (x[:, :, None] - means).square().sum(-1).argmin(-1) == torch.arange(3)[:, None]
    a = math.sqrt(dim) * eta / sigma
    simulated, corrected, printed = hits.double().mean(1).tolist(), theorem2_accuracies(a), theorem2_accuracies(3 * a)
    for accuracy, right, wrong in zip(simulated, corrected, printed, strict=True):
        assert abs(accuracy - right) < tolerance(right)
        assert accuracy < wrong - 10 * tolerance(right)
    # Directly: the least mean error over both thresholds, at t and -u along theta.
    t = torch.linspace(0, 2 * a, 2001, dtype=torch.float64)
    outer, inner = phi(t - a), phi(-t)
    total = (outer + inner)[:, None] + (outer + inner)  # errors of 0 and of 1 towards it; of 2 and of 1 towards that
    best = divmod(int(total.argmin()), len(t))
    assert best == (500, 500)
    assert 1 - float(outer[500]) == pytest.approx(theorem2_accuracies(a)[0])
    assert 1 - 2 * float(inner[500]) == pytest.approx(theorem2_accuracies(a)[1])


def test_average_distances_of_theorem_2():
    """For d = 2: sqrt(2) eta of class 1, 3 eta / sqrt(2) of the others; printed is (sqrt(2) + sqrt(5)) eta / 2."""
    means = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]], dtype=torch.float64)
    average = torch.cdist(means, means).sum(1) / 2
    assert average.tolist() == pytest.approx([3 / math.sqrt(2), math.sqrt(2), 3 / math.sqrt(2)])
    assert float(classfair.pair.mean_class_distance(means)) == pytest.approx(4 * math.sqrt(2) / 3)


# Theorem 3: eq. 18 with priors 1 : V and standard deviations 1 : K. Printed is sigma_1^2 : sigma_2^2 = 1 : K, but
# eq. 20 holds for standard deviations only; and the second term of eq. 22 lacks its division by K^2 - 1.


def theorem3_task(a, k, v, sigma=1.0, dim=2):
    return TwoGaussians(sigma, k * sigma, v, eta=a * sigma / math.sqrt(dim), dim=dim)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize(("a", "k", "v"), [(2, 3, 1.5), (2, 3, 4), (1, 1.5, 1.2), (3, 5, 5), (2, 1, 3), (1.5, 1.01, 2)])
def test_theorem_3(a, k, v, sigma, dim):
    task = theorem3_task(a, k, v, sigma, dim)
    b, *errors = task.minimise()
    # Around its minimum the error is flat: brute force finds b to the square root of the precision.
    assert b == pytest.approx(math.sqrt(dim) * sigma * theorem3_threshold(a, k, v), abs=1e-5)
    assert tuple(errors) == pytest.approx(theorem3_errors(a, k, v), abs=1e-6)
    check_simulated(task, b)


def test_theorem_3_as_printed():
    a, k, v = 2.0, 3.0, 2.0
    task = theorem3_task(a, k, v, dim=1)
    least = float(task.mean_error(theorem3_errors(a, k, v)))
    root = k * math.sqrt(4 * a**2 + 2 * (k**2 - 1) * math.log(k / v))
    corrected, printed = (-a * (k**2 + 1) + root) / (k**2 - 1), -a * (k**2 + 1) / (k**2 - 1) + root
    assert corrected == pytest.approx(theorem3_threshold(a, k, v))
    assert float(task.mean_error(task.errors(torch.ones(1), corrected))) == pytest.approx(least)
    assert float(task.mean_error(task.errors(torch.ones(1), printed))) > least + 0.3
    # Variances 1 : K and V = K do not balance the classes, standard deviations do.
    _, pos, neg = theorem3_task(a, math.sqrt(3), 3.0).minimise()
    assert abs(pos - neg) > 0.01
    _, pos, neg = theorem3_task(a, 3.0, 3.0).minimise()
    assert pos == pytest.approx(neg, abs=1e-6)


def test_limit_of_theorem_3():
    """At K = 1, B and q divide by 0."""
    for v in (1.0, 2.0, 5.0):
        assert theorem3_errors(2.0, 1 + 1e-6, v) == pytest.approx(theorem3_errors(2.0, 1.0, v), abs=1e-5)
        assert theorem3_threshold(2.0, 1.0, v) == pytest.approx(-math.log(v) / 4)


def test_degenerate_cases_of_theorem_3():
    """With few of +1 the best classifier never says +1, which the theorem does not exclude."""
    assert all(map(math.isnan, theorem3_errors(1.0, 3.0, 6.0)))  # B^2 + q < 0
    assert math.isnan(theorem3_threshold(1.0, 3.0, 6.0))
    assert theorem3_task(1.0, 3.0, 6.0).minimise()[1:] == pytest.approx((1, 0), abs=1e-7)
    # Even where eq. 20 is defined its threshold may be but a local minimum; so may be that of equal errors, K = V.
    for k, v in ((3.0, 6.0), (5.0, 5.0)):
        task = theorem3_task(2.0, k, v)
        assert float(task.mean_error(theorem3_errors(2.0, k, v))) > 1 / (1 + v)
        assert task.minimise()[1:] == pytest.approx((1, 0), abs=1e-7)


# Corollary 1, for a = 3, where none of the cases is degenerate


def gap(k, v):
    """E(+1) - E(-1) of the best classifier, by brute force."""
    _, pos, neg = theorem3_task(3.0, k, v).minimise()
    assert (pos, neg) == pytest.approx(theorem3_errors(3.0, k, v), abs=1e-6)
    return pos - neg


def rises(values):
    return [later > earlier for earlier, later in itertools.pairwise(values)]


@pytest.mark.parametrize("k", [1.2, 2.0, 3.0, 5.0])
def test_corollary_1_equal_degrees_cancel(k):
    assert gap(k, k) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("k", [2.0, 3.0])
def test_corollary_1_fixed_variances(k):
    below = [gap(k, v) for v in torch.linspace(1, k, 12).tolist()]
    above = [gap(k, v) for v in torch.linspace(k, 2 * k, 12).tolist()]
    assert not any(rises(map(abs, below)))
    assert all(rises(map(abs, above)))
    assert max(below[:-1]) < 0 < min(above[1:])  # the wide class is worse, then the rare one


@pytest.mark.parametrize("v", [2.0, 3.0])
def test_corollary_1_fixed_proportions(v):
    above = [abs(gap(k, v)) for k in torch.linspace(v, 8, 20).tolist()]
    assert all(rises(above))
    below = rises([abs(gap(k, v)) for k in torch.linspace(1, v, 20).tolist()])
    peak = below.index(False)
    assert peak > 0
    assert not any(below[peak:])


def test_reweighting_after_corollary_1():
    """Weighting +1 by r is V / r. The text says that this widens the gap for V > K; it does so for V < K."""
    k, r = 3.0, 1.5
    assert 0 < gap(k, 6.0 / r) < gap(k, 6.0) - 0.02  # V > K: +1 is the worse class, and gains
    assert gap(k, 2.0 / r) < gap(k, 2.0) - 0.02 < 0  # V < K: -1 is the worse class, and loses
