"""The estimated offset: head, centres, losses and measures against formulas of the papers in float64 NumPy."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import classfair
from classfair import (
    EstimatedOffsetLoss,
    MixedTarget,
    boundary_distance,
    center_loss,
    empirical_offset,
    uniform_constraint,
)
from classfair.nn import EstimatedOffsetLinear
from classfair.ops import label_index
from tests.support.processes import run_processes

N, C, D = 12, 5, 4
IGNORED = -100


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(rows=N, seed=0):
    """Of all classes but the last one; two are ignored."""
    target = torch.randint(0, C - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    target[2:4] = IGNORED
    return target


def head_with_centers(seed=0, **options):
    head = EstimatedOffsetLinear(D, C, dtype=torch.float64, **options)
    with torch.no_grad():
        head.weight.copy_(normal(C, D, seed=seed))
        head.centers.copy_(normal(C, D, seed=seed + 1))
    return head


# The formulas, of real or complex arrays.


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def logits_of(x, w, c, bias=True):
    return x @ w.T - (0.5 * (c * w).sum(1) if bias else 0)


def uniform(w, c):
    """Kim and Kim 2021: the sum of q log q, q the softmax of the negative offsets, plus log K."""
    log_q = log_softmax(-0.5 * (c * w).sum(1))
    return (np.exp(log_q) * log_q).sum() + np.log(len(log_q))


def objective(x, w, c, y, l1, l2, bias=True, class_weight=None, sample_weight=None):
    keep = y != IGNORED
    x, y = x[keep], y[keep]
    omega = np.ones(len(y)) if class_weight is None else class_weight[y]
    if sample_weight is not None:
        omega = omega * sample_weight[keep]
    each = -log_softmax(logits_of(x, w, c, bias))[np.arange(len(y)), y] + l1 * ((x - c[y]) ** 2).sum(1)
    return (omega * each).sum() / omega.sum() + l2 * uniform(w, c)


def wen(c, x, y, alpha=0.5):
    """Wen et al. 2016, eq. 4, class by class."""
    moved = c.copy()
    for j in range(len(c)):
        mine = x[y == j]
        moved[j] = c[j] - alpha * (c[j] - mine).sum(0) / (1 + len(mine))
    return moved


def complex_step(function, array):
    gradient = np.zeros(array.shape)
    for place in np.ndindex(*array.shape):
        moved = array.astype(complex)
        moved[place] += 1e-30j
        gradient[place] = function(moved).imag / 1e-30
    return torch.from_numpy(gradient)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(D,), (N, D), (2, 3, D), (0, D)])
def test_logits_have_the_offset_in_training_and_evaluation(shape, bias):
    head, x = head_with_centers(bias=bias), normal(*shape, seed=7)
    expected = logits_of(x.numpy(), head.weight.detach().numpy(), head.centers.numpy(), bias)
    for mode in (True, False):
        torch.testing.assert_close(head.train(mode)(x).detach(), torch.from_numpy(expected))


@pytest.mark.parametrize(("l1", "l2"), [(1.0, 1.0), (0.1, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_the_formulas(bias, l1, l2):
    head, x, y = head_with_centers(bias=bias), normal(N, D, seed=7).requires_grad_(), labels()
    weight, centers = head.weight.detach().numpy().copy(), head.centers.numpy().copy()
    loss = EstimatedOffsetLoss(l1, l2)(x, head, y)
    loss.backward()  # after the centres have moved
    points, targets = x.detach().numpy(), y.numpy()
    assert loss.item() == pytest.approx(objective(points, weight, centers, targets, l1, l2, bias), rel=1e-12)
    expected = complex_step(lambda v: objective(v, weight, centers, targets, l1, l2, bias), points)
    torch.testing.assert_close(x.grad, expected, rtol=1e-11, atol=1e-13)
    expected = complex_step(lambda w: objective(points, w, centers, targets, l1, l2, bias), weight)
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-11, atol=1e-13)
    kept = targets != IGNORED
    moved = wen(centers, points[kept], targets[kept])
    np.testing.assert_allclose(head.centers, moved, rtol=1e-12)
    assert np.array_equal(moved[C - 1], centers[C - 1])  # absent


def test_centres_as_parameters_get_the_gradient_of_every_term_and_do_not_move_by_themselves():
    head, x, y = head_with_centers(centre_grad="full"), normal(N, D, seed=7), labels()
    before = head.centers.detach().clone()
    EstimatedOffsetLoss(0.5, 2.0)(x, head, y).backward()
    weight = head.weight.detach().numpy()
    expected = complex_step(lambda c: objective(x.numpy(), weight, c, y.numpy(), 0.5, 2.0), before.numpy())
    torch.testing.assert_close(head.centers.grad, expected, rtol=1e-11, atol=1e-13)
    assert torch.equal(head.centers, before)
    assert [name for name, _ in head.named_parameters()] == ["weight", "centers"]


def test_second_derivatives():
    head, y = head_with_centers(), labels()
    criterion = EstimatedOffsetLoss(0.3, 2.0)

    def loss(x, weight):
        return torch.func.functional_call(Both(head, criterion), {"head.weight": weight}, (x, y))

    inputs = (normal(N, D, seed=7).requires_grad_(), head.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


class Both(nn.Module):
    def __init__(self, head, criterion):
        super().__init__()
        self.head, self.criterion = head, criterion

    def forward(self, x, y):
        return self.criterion(x, self.head, y, update=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_weigh_all_terms_and_reductions_agree(reduction):
    head, x, y = head_with_centers(), normal(N, D, seed=7), labels()
    class_weight, sample_weight = normal(C, seed=3).abs() + 0.1, normal(N, seed=4).abs()
    expected = objective(
        x.numpy(),
        head.weight.detach().numpy(),
        head.centers.numpy(),
        y.numpy(),
        0.3,
        2.0,
        class_weight=class_weight.numpy(),
        sample_weight=sample_weight.numpy(),
    )
    criterion = EstimatedOffsetLoss(0.3, 2.0, weight=class_weight, reduction=reduction)
    loss = criterion(x, head, y, sample_weight=sample_weight, update=False)
    total = criterion.total_weight(y, sample_weight=sample_weight)
    got = {"mean": loss, "sum": loss / total, "none": loss.sum() / total}[reduction]
    assert got.item() == pytest.approx(expected, rel=1e-6)  # "total" is a float32
    with_stats, stats = criterion.with_stats(x, head, y, sample_weight=sample_weight, update=False)
    assert torch.equal(with_stats, loss)
    assert torch.equal(stats.prediction, head(x).argmax(1))
    if reduction == "none":
        assert not loss[y == IGNORED].any()


def test_the_mixture_of_two_labels_is_the_mixture_of_their_losses():
    head, x = head_with_centers(), normal(N, D, seed=7)
    y_a, y_b, share = labels(seed=1), labels(seed=2), 0.75
    y_b[0] = IGNORED
    criterion = EstimatedOffsetLoss(0.3, 2.0, reduction="sum")
    one, two = (criterion(x, head, y, update=False) for y in (y_a, y_b))
    before = head.centers.clone()
    mixed = criterion(x, head, MixedTarget(y_a, y_b, share))
    torch.testing.assert_close(mixed, share * one + (1 - share) * two)
    kept = (y_a != IGNORED).numpy()  # y_a has the larger share
    np.testing.assert_allclose(head.centers, wen(before.numpy(), x.numpy()[kept], y_a.numpy()[kept]), rtol=1e-12)


def test_evaluation_is_plain_cross_entropy_and_moves_nothing():
    head, x, y = head_with_centers(), normal(N, D, seed=7), labels()
    criterion, before = EstimatedOffsetLoss(), head.centers.clone()
    expected = F.cross_entropy(head(x), y)
    assert criterion.eval()(x, head, y).item() == pytest.approx(expected.item())
    with torch.no_grad():
        assert criterion.train()(x, head, y).item() == pytest.approx(expected.item())
        assert criterion.with_stats(x, head, y)[0].item() == pytest.approx(expected.item())
    assert torch.equal(head.centers, before)
    assert list(criterion.parameters()) == []
    assert all(isinstance(value, torch.Tensor) for value in head.state_dict().values())


def test_a_recomputation_does_not_move_the_centres_again():
    head, y = head_with_centers(), labels()
    once, x = copy.deepcopy(head), normal(N, D, seed=7).requires_grad_()
    EstimatedOffsetLoss()(x, once, y).backward()
    criterion = EstimatedOffsetLoss()
    torch.utils.checkpoint.checkpoint(lambda x: criterion(x, head, y), x, use_reentrant=False).backward()
    assert torch.equal(head.centers, once.centers)


def test_batches_without_a_sample_and_one_class():
    head, nothing = head_with_centers(), torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    before, empty = head.centers.clone(), torch.zeros(0, dtype=torch.int64)
    assert EstimatedOffsetLoss()(nothing, head, empty).isnan()
    assert EstimatedOffsetLoss(reduction="sum")(nothing, head, empty).item() == 0
    x, ignored = normal(3, D).requires_grad_(), torch.full((3,), IGNORED)
    EstimatedOffsetLoss(reduction="sum")(x, head, ignored).backward()
    assert not x.grad.any()
    assert torch.equal(head.centers, before)
    single, target = EstimatedOffsetLinear(D, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    loss = EstimatedOffsetLoss(1.0, 1.0)(x, single, target)  # cross-entropy and constraint are 0
    assert loss.item() == pytest.approx(x.detach().square().sum(1).mean().item())


def test_rows_that_are_not_finite_do_not_reach_the_centres():
    head, x, y = head_with_centers(), normal(N, D, seed=7), labels()
    kept = (y != IGNORED).numpy()
    kept[0] = False
    expected = wen(head.centers.numpy(), x.numpy()[kept], y.numpy()[kept])
    x[0, 1] = math.inf
    head.update(x, y)
    np.testing.assert_allclose(head.centers, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_head_in_other_precisions_and_as_a_module(dtype):
    head = head_with_centers().to(dtype)
    centers = head.centers
    assert (head.weight.dtype, centers.dtype) == (dtype, torch.float64)  # what counts is not rounded
    x = normal(N, D, seed=7).to(dtype)
    assert head(x).dtype == dtype
    expected = logits_of(x.double().numpy(), head.weight.detach().double().numpy(), centers.numpy())
    torch.testing.assert_close(head(x).detach().double(), torch.from_numpy(expected), rtol=0.03, atol=0.1)
    EstimatedOffsetLoss()(x, head, labels()).backward()
    assert head.weight.grad.isfinite().all()
    other = EstimatedOffsetLinear(D, C, dtype=dtype)
    assert other.centers.dtype == torch.float32
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.centers, head.centers.float())
    with torch.device("meta"):
        made = EstimatedOffsetLinear(D, C)
    made.to_empty(device="cpu").reset_parameters()
    assert not made.centers.any()
    assert made.weight.abs().max() <= D**-0.5
    head.update(x[:3], label_index(labels()[:3], C))
    assert not torch.equal(head.centers, centers)


def test_a_step_under_the_compiler():
    torch._dynamo.reset()
    heads = [head_with_centers(), head_with_centers()]
    criterion, y = EstimatedOffsetLoss(0.3, 2.0), labels()

    def loss(head, x):
        return criterion(x, head, y, logits=head(x))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(3):
        gradients = []
        for head, function in zip(heads, (loss, compiled), strict=True):
            x = normal(N, D, seed=step).requires_grad_()
            gradients.append(torch.autograd.grad(function(head, x), (x, head.weight)))
        torch.testing.assert_close(gradients[0], gradients[1])
        torch.testing.assert_close(heads[0].centers, heads[1].centers)
    assert counter.frame_count == 1


def test_the_gradient_of_a_compiled_head_is_at_the_centres_of_its_forward_pass():
    """A compiler may save the centres themselves where their copy is asked for: they must not change in place."""
    torch._dynamo.reset()
    gradients, counter = [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        head = head_with_centers()
        forward = torch.compile(head, backend=counter) if compiled else head
        for step in range(3):  # whose gradients add up
            x = normal(N, D, seed=step)
            EstimatedOffsetLoss(0.3, 2.0)(x, head, labels(), logits=forward(x)).backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, D).double(), EstimatedOffsetLinear(D, C).double()

    def forward(self, images):
        features = self.body(images).tanh()
        return features, self.head(features)


def after_steps(parts, how=None):
    """Weights and centres after two steps with these rows; everything else is the same in every process."""
    model, world = Classifier(), 1
    net = model
    if how is not None:
        world = torch.distributed.get_world_size()
        if how == "sharded":
            mesh = init_device_mesh("cpu", (world,))
            fully_shard(model.head, mesh=mesh)  # the weight is a DTensor again when the head has run
            net = fully_shard(model, mesh=mesh)
        else:
            net = DistributedDataParallel(model)
    criterion = EstimatedOffsetLoss(0.3, 2.0, reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        images, y = normal(N, 6, seed=step), labels(seed=step)
        share = world / criterion.total_weight(y)
        features, logits = net(images[parts])
        loss = share * criterion(features, model.head, y[parts], logits=logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = model.state_dict()
    return {name: v.full_tensor() if isinstance(v, DTensor) else v.clone() for name, v in state.items()}


def of_one_process(rank, parts, how):
    return after_steps(parts[rank], how)


@pytest.mark.parametrize(
    ("how", "cut"),
    [
        ("replicated", 5),
        pytest.param("replicated", 12, marks=pytest.mark.slow),  # the second one has no sample
        pytest.param("sharded", 5, marks=pytest.mark.slow),
    ],
)
def test_two_processes_with_unequal_batches_are_one(how, cut, tmp_path):
    expected = after_steps(slice(0, N))
    assert expected["head.centers"].any()
    for got in run_processes(of_one_process, 2, tmp_path, [slice(0, cut), slice(cut, N)], how):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)  # the total is a float32


# Measures


def test_constraint_and_centre_loss_of_the_formulas():
    w, c, x, y = normal(C, D), normal(C, D, seed=1), normal(N, D, seed=2), labels()
    assert uniform_constraint(empirical_offset(w, c)).item() == pytest.approx(uniform(w.numpy(), c.numpy()), rel=1e-12)
    kept = y != IGNORED
    each = ((x.numpy() - c.numpy()[y.clamp_min(0)]) ** 2).sum(1) * kept.numpy()
    np.testing.assert_allclose(center_loss(x, c, y, reduction="none"), each, rtol=1e-12)
    assert center_loss(x, c, y, reduction="sum").item() == pytest.approx(each.sum(), rel=1e-12)
    assert center_loss(x, c, y).item() == pytest.approx(each.sum() / kept.sum().item(), rel=1e-12)
    assert center_loss(x[:0], c, y[:0]).isnan()
    inputs = (x.requires_grad_(), c.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, c: center_loss(x, c, y), inputs)
    assert torch.autograd.gradgradcheck(lambda x, c: center_loss(x, c, y), inputs)
    offset = normal(C, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(uniform_constraint, offset)
    assert torch.autograd.gradgradcheck(uniform_constraint, offset)
    log_q = np.log(np.exp(-offset.detach().numpy()) / np.exp(-offset.detach().numpy()).sum())
    (gradient,) = torch.autograd.grad(uniform_constraint(offset), offset)
    expected = -np.exp(log_q) * (log_q - (np.exp(log_q) * log_q).sum())
    np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("classes", [1, 2, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_equal_offsets_are_the_least(classes, value):
    offset = torch.full((classes,), value, dtype=torch.float64, requires_grad=True)
    loss = uniform_constraint(offset)
    loss.backward()
    assert abs(loss.item()) < 1e-13  # of exp and log
    assert offset.grad.abs().max() < 1e-15
    far = torch.tensor([0.0, 1e4], requires_grad=True)
    uniform_constraint(far).backward()
    assert uniform_constraint(far).item() == pytest.approx(math.log(2))
    assert far.grad.isfinite().all()


def test_equation_4_distances_from_a_boundary_are_symmetric():
    """Where w is the inverse covariance times the mean, in float64 to rounding; elsewhere they are not."""
    mean, root = normal(C, D), normal(D, D, seed=1)
    weight = torch.linalg.solve(root @ root.T + torch.eye(D), mean.T).T
    offset = empirical_offset(weight, mean)
    got = boundary_distance(weight, offset, mean)
    torch.testing.assert_close(got, got.T, rtol=1e-12, atol=1e-13)
    for j in range(C):
        for k in range(C):
            gap = weight[j] - weight[k]
            if j != k:
                expected = (mean[j] @ gap - offset[j] + offset[k]).abs() / gap.norm()
                assert got[j, k].item() == pytest.approx(expected.item(), rel=1e-11)
            else:
                assert got[j, k] == 0
    other = boundary_distance(weight, offset.roll(1), mean)
    assert (other - other.T).abs().max() > 0.01


def test_equation_3_a_uniform_offset_leaves_features_of_zero_undecided():
    head = head_with_centers()
    posterior = head(torch.zeros(1, D, dtype=torch.float64)).softmax(1)
    torch.testing.assert_close(posterior[0], (-head.offset).softmax(0))
    with torch.no_grad():
        head.weight.copy_(head.weight / (head.centers * head.weight).sum(1, keepdim=True))
    assert uniform_constraint(head.offset).item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(head(torch.zeros(D, dtype=torch.float64)).softmax(0), torch.full((C,), 1 / C).double())


def test_classes_with_equal_weights_have_no_boundary():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    distance = boundary_distance(weight, torch.zeros(3), weight)
    assert distance.isnan().tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert not distance.diag().any()


HEAD = EstimatedOffsetLinear(D, C)
X, Y = torch.zeros(3, D), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EstimatedOffsetLinear(0, 3), ValueError, "EstimatedOffsetLinear: expected in_features >= 1, got 0"),
        (lambda: EstimatedOffsetLinear(3, 2.0), TypeError, "EstimatedOffsetLinear: expected num_classes as an int"),
        (lambda: EstimatedOffsetLinear(3, 2, 1), TypeError, "EstimatedOffsetLinear: expected bias as a bool, got int"),
        (lambda: EstimatedOffsetLinear(3, 2, alpha=0), ValueError, "EstimatedOffsetLinear: expected alpha in (0, 1]"),
        (
            lambda: EstimatedOffsetLinear(3, 2, centre_grad="none"),
            ValueError,
            "EstimatedOffsetLinear: expected centre_grad 'wen' or 'full', got 'none'",
        ),
        (
            lambda: HEAD.update(X[:, :2], Y),
            ValueError,
            "EstimatedOffsetLinear.update: expected features of shape (3, 4)",
        ),
        (lambda: HEAD.update(X, Y + 3), IndexError, "label_index: expected"),
        (
            lambda: HEAD.update(X, label_index(Y, 9)),
            ValueError,
            "EstimatedOffsetLinear.update: expected a LabelIndex of 5 classes, got one of 9",
        ),
        (lambda: EstimatedOffsetLoss(-1.0), ValueError, "EstimatedOffsetLoss: expected l1 >= 0, got -1"),
        (lambda: EstimatedOffsetLoss(l2=math.nan), ValueError, "EstimatedOffsetLoss: expected l2 >= 0, got nan"),
        (lambda: EstimatedOffsetLoss(l1="1"), TypeError, "EstimatedOffsetLoss: expected l1 as a number, got str"),
        (
            lambda: EstimatedOffsetLoss()(X, nn.Linear(D, C), Y),
            TypeError,
            "EstimatedOffsetLoss: expected head as an EstimatedOffsetLinear, got Linear",
        ),
        (lambda: EstimatedOffsetLoss()(X[0], HEAD, Y), ValueError, "EstimatedOffsetLoss: expected features of shape"),
        (
            lambda: EstimatedOffsetLoss()(X, HEAD, torch.zeros(3, C)),
            TypeError,
            "EstimatedOffsetLoss: expected hard labels or MixedTarget, got probabilities",
        ),
        (lambda: EstimatedOffsetLoss()(X, HEAD, Y + 3), IndexError, "softmax_loss: expected label in [0, 5)"),
        (lambda: center_loss(X, torch.zeros(C, 2), Y), ValueError, "center_loss: expected features of shape (3, 2)"),
        (lambda: center_loss(X, torch.zeros(C), Y), ValueError, "center_loss: expected centers of shape (C, D)"),
        (
            lambda: center_loss(X, HEAD.centers, Y[:2]),
            ValueError,
            "center_loss: expected target of shape (3,), got (2,)",
        ),
        (
            lambda: center_loss(X, HEAD.centers, Y + 3),
            IndexError,
            "center_loss: expected labels in [0, 5), got 5 in row 2",
        ),
        (
            lambda: center_loss(X, HEAD.centers, Y, reduction="max"),
            ValueError,
            "center_loss: expected reduction 'none', 'mean' or 'sum'",
        ),
        (lambda: uniform_constraint([1.0]), TypeError, "uniform_constraint: expected offset as a floating tensor"),
        (
            lambda: uniform_constraint(torch.zeros(2, 2)),
            ValueError,
            "uniform_constraint: expected offset of shape (4,)",
        ),
        (lambda: uniform_constraint(torch.zeros(0)), ValueError, "uniform_constraint: expected offset of shape (C,)"),
        (lambda: empirical_offset(X, X[:2]), ValueError, "empirical_offset: expected mean of shape (3, 4), got (2, 4)"),
        (lambda: empirical_offset(X.long(), X), TypeError, "empirical_offset: expected weight as a floating tensor"),
        (
            lambda: boundary_distance(X, torch.zeros(2), X),
            ValueError,
            "boundary_distance: expected offset of shape (3,), got (2,)",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    before = HEAD.centers.clone()
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
    assert torch.equal(HEAD.centers, before)


def test_the_function_names_are_public():
    assert {"EstimatedOffsetLoss", "boundary_distance", "center_loss", "empirical_offset", "uniform_constraint"} <= set(
        classfair.__all__
    )
