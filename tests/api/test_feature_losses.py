"""ISDA and MetaLAD: exact reductions, the published formulation, gradients, state and processes."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import classfair
from classfair import ClassStatistics, ISDALoss, LogitAdjustedLoss, MetaLADLoss, MixedTarget
from tests.support.processes import run_processes

N, C, D = 40, 7, 5
COUNTS = [50, 30, 20, 10, 5, 3, 1]


def problem(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(N, D, generator=g, dtype=dtype)
    weight = torch.randn(C, D, generator=g, dtype=dtype)
    bias = torch.randn(C, generator=g, dtype=dtype)
    target = torch.randint(0, C - 1, (N,), generator=g)  # the last class is never seen
    target[3] = -100
    return features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


def warm(criterion, seed=9):
    """Statistics of another batch, in float64 so that the formulas are what is compared."""
    criterion.double()
    features, weight, bias, target = problem(seed=seed)
    criterion(features, weight, target, linear_bias=bias)
    return criterion


def published_isda(features, weight, bias, target, cov, strength):
    """The authors' way: a difference of weights for every sample, class and feature, (N, C, D)."""
    keep = target != -100
    features, target = features[keep], target[keep]
    difference = weight[None] - weight[target][:, None]  # (N, C, D)
    variance = (difference.square() * cov[target][:, None]).sum(2)
    return F.cross_entropy(F.linear(features, weight, bias) + 0.5 * strength * variance, target)


def ratios(weight, cov):
    difference = weight[None] - weight[:, None]  # (C, C, D), row y
    square = difference.square().sum(2)
    return (difference.square() * cov[:, None]).sum(2) / torch.where(square > 0, square, 1)


def margins(mean, seen):
    distance = torch.cdist(mean, mean)
    pairs = [(i, j) for i in range(C) for j in range(i) if seen[i] and seen[j]]
    average = torch.stack([distance[i, j] for i, j in pairs]).mean()
    both = seen[:, None] & seen & ~torch.eye(C, dtype=torch.bool)
    return torch.where(both, (average / torch.where(both, distance, 1)).log(), 0)


def with_pair(features, weight, bias, target, table):
    return classfair.cross_entropy(F.linear(features, weight, bias), target, pair=table)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_same(loss, expected, *inputs):
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(loss, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("raw", [False, True])
def test_isda_is_the_published_loss(raw):
    criterion = warm(ISDALoss(C, D, strength=1.5))
    features, weight, bias, target = problem()
    logits = F.linear(features, weight, bias) if raw else None
    loss = criterion(features, weight, target, logits=logits, linear_bias=bias, update=False)
    expected = published_isda(features, weight, bias, target, criterion.statistics.cov, 1.5)
    assert_same(loss, expected, features, weight, bias)


def test_isda_with_matrices_is_the_published_loss():
    statistics = ClassStatistics(C, D, covariance="full")
    criterion = warm(ISDALoss(C, D, strength=1.5, statistics=statistics))
    features, weight, bias, target = problem()
    keep = target != -100
    difference = weight[None] - weight[target[keep]][:, None]
    variance = torch.einsum("ncd,nde,nce->nc", difference, statistics.cov[target[keep]], difference)
    expected = F.cross_entropy(F.linear(features, weight, bias)[keep] + 0.75 * variance, target[keep])
    loss = criterion(features, weight, target, linear_bias=bias, update=False)
    assert_same(loss, expected, features, weight, bias)


def test_statistics_are_updated_and_then_used():
    criterion = ISDALoss(C, D, strength=2.0)
    criterion.statistics.double()
    features, weight, bias, target = problem()
    loss = criterion(features, weight, target, linear_bias=bias)
    moments = classfair.class_moments(features.detach(), target, C)
    torch.testing.assert_close(criterion.statistics.cov, moments.cov)
    assert_same(loss, published_isda(features, weight, bias, target, moments.cov, 2.0), features, weight)


@pytest.mark.parametrize("per", ["scalar", "class", "pair"])
def test_metalad_reduces_to_its_terms(per):
    features, weight, bias, target = problem()

    def loss(*omega, **options):
        criterion = warm(MetaLADLoss(COUNTS, D, omega=omega, per=per, **options))
        return criterion, criterion(features, weight, target, linear_bias=bias, update=False)

    _, proportion = loss(1.0, 0.0, 0.0)
    la = LogitAdjustedLoss(COUNTS).double()
    assert_same(proportion, la(F.linear(features, weight, bias), target), features, weight, bias)
    criterion, variance = loss(0.0, 0.75, 0.0)
    table = ratios(weight, criterion.statistics.cov)
    assert_same(variance, with_pair(features, weight, bias, target, 0.75 * table), features, weight)
    criterion, distance = loss(0.0, 0.0, 0.5)
    margin = margins(criterion.statistics.mean, criterion.statistics.count > 0)
    assert_same(distance, with_pair(features, weight, bias, target, 0.5 * margin), features, weight)
    _, everything = loss(1.0, 0.75, 0.5)
    log_prior = criterion.log_prior.double()
    table = log_prior - log_prior[:, None] + 0.75 * table + 0.5 * margin
    assert_same(everything, with_pair(features, weight, bias, target, table), features, weight)


def test_terms_left_out_are_those_with_weight_zero():
    features, weight, bias, target = problem()
    arguments = {"linear_bias": bias, "update": False}
    for i, term in enumerate(("proportion", "variance", "distance")):
        omega = [0.0, 0.0, 0.0]
        omega[i] = 0.5
        alone = warm(MetaLADLoss(COUNTS, D, omega=omega, terms=(term,)))
        among = warm(MetaLADLoss(COUNTS, D, omega=omega))
        assert_same(alone(features, weight, target, **arguments), among(features, weight, target, **arguments), weight)


def test_nisda_is_isda_where_all_weights_are_equally_far_apart():
    """|w_c - w_y| = k: R = S / k^2."""
    weight = (3.0 * torch.eye(C, C, dtype=torch.float64)).requires_grad_()  # k^2 = 18
    features = torch.randn(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.arange(N) % C
    nisda = MetaLADLoss(COUNTS, C, omega=(0, 0.9, 0), terms=("variance",))
    isda = ISDALoss(C, C, strength=2 * 0.9 / 18)
    for criterion in (nisda, isda):
        criterion.statistics.double()
    torch.testing.assert_close(
        nisda(features, weight, target), isda(features, weight, target), rtol=1e-7, atol=0
    )  # of a float32 strength


def test_the_printed_sign_favours_frequent_classes():
    features, weight, bias, target = problem()
    omega = {"omega": (1.0, 0.0, 0.0), "terms": ("proportion",)}
    printed = MetaLADLoss(COUNTS, D, paper_sign=True, **omega)
    expected = LogitAdjustedLoss(COUNTS, tau=-1.0).double()(F.linear(features, weight, bias), target)
    printed.statistics.double()
    assert_same(printed(features, weight, target, linear_bias=bias), expected, weight)


@pytest.mark.parametrize("make", [lambda: ISDALoss(C, D), lambda: MetaLADLoss(COUNTS, D)])
def test_second_derivatives(make):
    criterion = warm(make())
    features, weight, bias, target = problem()
    features, weight = (0.5 * x.detach()[:9] for x in (features, weight))
    weight = torch.cat([weight, weight.new_ones(C - len(weight), D)]) if len(weight) < C else weight

    def loss(f, w):
        return criterion(f, w, target[:9], logits=F.linear(f, w, bias.detach()), update=False)

    inputs = (features.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_learnable_weights_get_gradient():
    criterion = warm(MetaLADLoss(COUNTS, D))
    features, weight, bias, target = problem()
    omega = criterion.omega.double().requires_grad_()
    criterion.omega = omega
    loss = criterion(features, weight, target, linear_bias=bias, update=False)
    (gradient,) = torch.autograd.grad(loss, omega)
    assert gradient.shape == (3, C)
    assert (gradient[:, :-1].abs() > 0).any(1).all()
    assert (gradient[:, -1] == 0).all()  # no sample has the last label
    assert list(criterion.parameters()) == []


MAKERS = {
    "isda": lambda **k: ISDALoss(C, D, strength=3.0, **k),
    "metalad": lambda **k: MetaLADLoss(COUNTS, D, **k),
}


@pytest.mark.parametrize("name", MAKERS)
def test_evaluation_is_plain_and_changes_nothing(name):
    criterion = MAKERS[name](label_smoothing=0.1)
    features, weight, bias, target = problem(torch.float32)
    criterion(features, weight, target, linear_bias=bias)
    before = copy.deepcopy(criterion.state_dict())
    expected = F.cross_entropy(F.linear(features, weight, bias), target, label_smoothing=0.1)
    with torch.no_grad():  # and criterion.eval() forgotten
        torch.testing.assert_close(criterion(features, weight, target, linear_bias=bias), expected)
    with torch.inference_mode():
        criterion.with_stats(features, weight, target, linear_bias=bias)
    criterion.eval()
    torch.testing.assert_close(criterion(features, weight, target, linear_bias=bias), expected)
    assert before.keys() == criterion.state_dict().keys()
    for key, value in criterion.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]


@pytest.mark.parametrize("name", MAKERS)
def test_statistics_of_the_batch_are_those_of_the_unperturbed_logits(name):
    criterion = MAKERS[name]()
    features, weight, bias, target = problem(torch.float32)
    loss, stats = criterion.with_stats(features, weight, target, linear_bias=bias)
    _, plain = classfair.cross_entropy_with_stats(F.linear(features, weight, bias), target)
    torch.testing.assert_close(stats.mass, plain.mass)
    assert torch.equal(stats.prediction, plain.prediction)
    alone = criterion(features, weight, target, linear_bias=bias, update=False)
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_state_round_trip_and_precision(name):
    criterion, other = MAKERS[name](), MAKERS[name]()
    features, weight, bias, target = problem(torch.float32)
    for _ in range(3):
        criterion(features, weight, target, linear_bias=bias)
    other.load_state_dict(criterion.state_dict())
    assert other.updates == 3
    arguments = (features, weight, target)
    assert torch.equal(criterion(*arguments, linear_bias=bias), other(*arguments, linear_bias=bias))
    half = copy.deepcopy(criterion).to(torch.bfloat16)
    assert all(b.dtype in (torch.float32, torch.int64) for b in half.buffers())
    assert torch.equal(half.statistics.cov, criterion.statistics.cov)


@pytest.mark.parametrize("name", MAKERS)
def test_mixtures_mix_the_losses_of_both_labels(name):
    criterion = warm(MAKERS[name]())
    features, weight, bias, target = problem()
    target[3] = 1
    other = target.roll(1)
    lam = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    common = {"linear_bias": bias, "update": False}
    mixed = criterion(features, weight, MixedTarget(target, other, lam), **common)
    criterion.reduction = "none"
    a, b = (criterion(features, weight, y, logits=F.linear(features, weight, bias), **common) for y in (target, other))
    assert_same(mixed, (lam * a + (1 - lam) * b).mean(), features, weight)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    criterion = MAKERS[name]()
    features, weight, bias, target = problem(torch.float32)
    expected = criterion(features, weight, target, linear_bias=bias)
    half = [x.detach().to(dtype).requires_grad_() for x in (features, weight, bias)]
    loss = criterion(half[0], half[1], target, linear_bias=half[2], update=False)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    assert all(x.grad.isfinite().all() for x in half)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("case", ["zero head", "equal rows", "one label", "empty", "all ignored", "never seen"])
def test_corner_cases_are_finite(name, case):
    criterion = MAKERS[name]()
    features, weight, bias, target = (x.detach() for x in problem(torch.float32))
    weight = {"zero head": torch.zeros(C, D), "equal rows": torch.ones(C, D)}.get(case, weight).requires_grad_()
    if case == "one label":
        target = torch.full((N,), 2)
    if case == "all ignored":
        target = torch.full((N,), -100)
    if case == "empty":
        features, target = features[:0], target[:0]
    if case == "never seen":
        criterion(features, weight, torch.full((N,), 2), linear_bias=bias)
        target = torch.full((N,), C - 1)
    loss = criterion(features, weight, target, linear_bias=bias, update=case != "never seen")
    (gradient,) = torch.autograd.grad(loss, weight)
    if case in ("empty", "all ignored"):  # as torch
        assert loss.isnan()
        assert (torch.nan_to_num(gradient) == 0).all()
    else:
        assert loss.isfinite()
        assert gradient.isfinite().all()
    if case == "zero head":
        table = torch.zeros(C, C)
        if name == "metalad":  # the variance term is 0
            mean, seen = criterion.statistics.mean, criterion.statistics.count > 0
            distance = torch.cdist(mean, mean)
            there = seen[:, None] & seen & (distance > 0)
            table = criterion.log_prior - criterion.log_prior[:, None]
            table = table + torch.where(there, (criterion.mean_distance / torch.where(there, distance, 1)).log(), 0)
        torch.testing.assert_close(loss, with_pair(features, weight, bias, target, table))


def test_ramp():
    criterion = ISDALoss(C, D, strength=0.8)
    ramp = classfair.ISDARamp(criterion, epochs=4)
    seen = []
    for _ in range(6):
        seen.append(round(criterion.strength.item(), 6))
        ramp.step()
    assert seen == [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    again = classfair.ISDARamp(ISDALoss(C, D, strength=0.1), epochs=9)
    again.load_state_dict(ramp.state_dict())
    assert again.criterion.strength.item() == pytest.approx(0.8)
    with pytest.raises(TypeError, match="ISDARamp: expected criterion as ISDALoss, got FocalLoss"):
        classfair.ISDARamp(classfair.FocalLoss(), epochs=2)


def test_a_large_perturbation_is_reported_where_state_is_read():
    criterion = ISDALoss(C, D, strength=1000.0)
    features, weight, bias, target = problem(torch.float32)
    criterion(features, weight, target, linear_bias=bias)  # no reading, no warning
    with pytest.warns(UserWarning, match="ISDALoss perturbed logits by up to"):
        criterion.state_dict()
    small = ISDALoss(C, D, strength=0.1)
    small(features, weight, target, linear_bias=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.state_dict()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, w, b, t: ISDALoss(C, D)(f[:, :3], w, t), ValueError, "ISDALoss: expected features of shape"),
        (lambda f, w, b, t: ISDALoss(C, D)(f, w[:3], t), ValueError, "ISDALoss: expected linear_weight of shape"),
        (lambda f, w, b, t: ISDALoss(C, D)(f, w, f @ w.T), TypeError, "ISDALoss: expected hard labels or MixedTarget"),
        (lambda *_: ISDALoss(C, D, strength=-1), ValueError, "ISDALoss: expected strength >= 0, got -1"),
        (lambda *_: ISDALoss(C, D, statistics=ClassStatistics(C, 9)), ValueError, "expected statistics of 7 classes"),
        (
            lambda *_: ISDALoss(C, D, statistics=ClassStatistics(C, D, covariance="none")),
            ValueError,
            "expected statistics with a covariance",
        ),
        (lambda *_: MetaLADLoss([1] * 2001, D, per="pair"), ValueError, "whose weights would take 48 MB"),
        (lambda *_: MetaLADLoss(COUNTS, D, omega=(1, 2)), ValueError, "expected omega as three numbers, got 2"),
        (lambda *_: MetaLADLoss(COUNTS, D, omega="123"), TypeError, "expected omega as a number, got str"),
        (lambda *_: MetaLADLoss(COUNTS, D, omega=(1, 1, float("inf"))), ValueError, "expected finite omega, got inf"),
        (lambda *_: MetaLADLoss(COUNTS, D, distance_every=2.5), TypeError, "distance_every as an int, got float"),
        (lambda *_: ISDALoss(C, D, strength=float("inf")), ValueError, "ISDALoss: expected finite strength, got inf"),
        (lambda *_: ISDALoss("5", D), TypeError, "expected num_classes as an int, got str"),
        (lambda *_: MetaLADLoss(COUNTS, D, terms=("shape",)), ValueError, "expected terms among proportion, variance"),
        (lambda *_: MetaLADLoss(COUNTS, D, per="class_"), ValueError, "expected per 'scalar', 'class' or 'pair'"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(*problem(torch.float32))


def _rank(rank, splits):
    results = {}
    for name, make in MAKERS.items():
        criterion = make(reduction="sum")
        features, weight, bias, target = problem(torch.float32)
        part = slice(*splits[rank])
        for _ in range(2):
            loss = criterion(features[part], weight, target[part], linear_bias=bias)
        gradient = torch.autograd.grad(loss, weight)[0]
        dist.all_reduce(gradient)
        results[name] = (gradient, {k: v for k, v in criterion.state_dict().items() if torch.is_tensor(v)})
    return results


@pytest.mark.parametrize(
    "splits",
    [
        [(0, 11), (11, 40)],
        *(pytest.param(s, marks=pytest.mark.slow) for s in ([(0, 40)], [(0, 25), (25, 25), (25, 40)])),
    ],
    ids=len,
)
def test_processes_equal_one(splits, tmp_path):
    results = run_processes(_rank, len(splits), tmp_path, splits)
    for name, make in MAKERS.items():
        criterion = make(reduction="sum")
        features, weight, bias, target = problem(torch.float32)
        for _ in range(2):
            loss = criterion(features, weight, target, linear_bias=bias)
        expected = torch.autograd.grad(loss, weight)[0]
        for result in results:
            gradient, state = result[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
            for key, value in criterion.state_dict().items():
                if torch.is_tensor(value):
                    torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("ignore_index", [255, 0])
@pytest.mark.parametrize("mixed", [False, True])
def test_statistics_leave_out_what_the_loss_ignores(name, ignore_index, mixed):
    criterion = MAKERS[name](ignore_index=ignore_index)
    assert criterion.statistics.ignore_index == ignore_index
    features, weight, bias, target = problem(torch.float32)
    target = torch.where(target == -100, ignore_index, target)
    given = MixedTarget(target, target.roll(1), 0.75) if mixed else target
    criterion(features, weight, given, linear_bias=bias)
    kept = target != ignore_index
    expected = classfair.class_moments(features.detach()[kept], target[kept], C)
    assert torch.equal(criterion.statistics.count, expected.count)
    torch.testing.assert_close(criterion.statistics.cov, expected.cov)


@pytest.mark.parametrize("name", MAKERS)
def test_statistics_run_on_the_back_end_of_the_loss(name):
    assert MAKERS[name](backend="reference").statistics.backend == "reference"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_variances_beyond_half_precision(dtype, autocast):
    """Features of 500 have variances of 250 000, where float16 ends at 65 504."""
    features, weight, bias, target = problem(torch.float32)
    given = [(500 * features), weight / 500, bias]
    given = [x.detach().to(torch.float32 if autocast else dtype).requires_grad_() for x in given]
    criterion, expected = ISDALoss(C, D, strength=3.0), ISDALoss(C, D, strength=3.0)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = criterion(given[0], given[1], target, linear_bias=given[2])
    wide = [x.detach().float().requires_grad_() for x in given]
    wanted = expected(wide[0], wide[1], target, linear_bias=wide[2])
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)  # logits are rounded to three digits
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, given))
    assert torch.equal(criterion.statistics.cov, expected.statistics.cov)


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("name", MAKERS)
def test_autocast_does_not_round_the_perturbation(name, covariance):
    criterion = MAKERS[name](statistics=ClassStatistics(C, D, covariance))
    features, weight, bias, target = problem(torch.float32)
    criterion(features, weight, target, linear_bias=bias)
    index = classfair.ops.label_index(target, C)
    with torch.autocast("cpu", torch.bfloat16):
        rows = criterion.pair(weight, index).rows
    assert torch.equal(rows, criterion.pair(weight, index).rows)


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("make", [ISDALoss, lambda c, d, **options: MetaLADLoss(COUNTS, d, **options)])
def test_one_huge_feature_does_not_spoil_later_losses(make, covariance):
    """Finite, but its square is not: the sample stays out of the statistics, and every later loss is as without it."""
    features, weight, bias, target = problem(torch.float32)
    given, clean = (make(C, D, statistics=ClassStatistics(C, D, covariance)) for _ in range(2))
    with torch.no_grad():
        spoiled, ignored = features.clone(), target.clone()
        spoiled[7, 2], ignored[7] = 3e19, -100
    given(spoiled.requires_grad_(), weight, target, linear_bias=bias)
    clean(features, weight, ignored, linear_bias=bias)
    assert int(given.statistics.nonfinite) == 1
    for seed in (1, 2):
        features, weight, bias, target = problem(torch.float32, seed)
        losses = [criterion(features, weight, target, linear_bias=bias) for criterion in (given, clean)]
        torch.testing.assert_close(*losses)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(losses[0], (features, weight, bias)))
