"""MetaLADStep against formulas of the paper in plain torch, and against differences of the whole procedure."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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


def problem(method="jvp", *, make=layers, per="class", dtype=torch.float64, seed=0, lr=LR, **options):
    """A step in the middle of a training: class statistics, momentum and weights of terms that are not 1."""
    torch.manual_seed(seed)
    model = make().to(dtype)
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


def smooth_net():
    """What moves by itself in training: running averages and random numbers."""
    return nn.Sequential(
        nn.Linear(INPUTS, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.Linear(8, D),
        nn.Softplus(),
        nn.Linear(D, C),
    )


def procedure(step, omega, images, target, meta, meta_target):
    """Eq. 34 with torch's own optimizer on a copy of everything."""
    net, criterion = copy.deepcopy((step.model, step.criterion))
    criterion.omega.copy_(omega)
    optimizer = torch.optim.SGD(net.parameters(), LR)
    torch.manual_seed(3)
    features, logits = net(images)
    total = criterion.total_weight(target) if criterion.reduction == "sum" else 1.0
    (criterion(features, net.head.weight, target, logits=logits, update=False) / total).backward()
    optimizer.step()
    torch.manual_seed(3)
    with torch.no_grad():
        return F.cross_entropy(net(meta)[1], meta_target)


def whole_differences(step, data, size=1e-5):
    omega = step.criterion.omega.clone()
    result = torch.zeros_like(omega)
    for i in range(omega.numel()):
        shift = torch.zeros_like(omega)
        shift.view(-1)[i] = size
        ends = [procedure(step, omega + sign * shift, *data) for sign in (1, -1)]
        result.view(-1)[i] = (ends[0] - ends[1]) / (2 * size)
    return result


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass, when whoever lends it parameters may have taken them back."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


def checkpointed_net():
    first = Checkpointed(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4))
    return nn.Sequential(first, Checkpointed(nn.Linear(8, D), nn.Softplus()), nn.Linear(D, C))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, C)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.fc(torch.tanh(self.b(torch.tanh(self.a(x)))))


def mixed_batch():
    images, target, *rest = batch()
    lam = torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return images, MixedTarget(target, target.roll(1), lam), *rest


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("make", [checkpointed_net, Tied])
def test_activation_checkpoints_and_tied_weights(method, make):
    step = problem(method, make=make, per="scalar")
    before = state_of(step)
    expected = whole_differences(step, batch())
    torch.manual_seed(3)
    assert_close(step.hypergradient(*batch()), expected)
    torch.manual_seed(3)
    step.hypergradient(*batch())
    after = state_of(step)
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({}, batch()),
        ({"reduction": "sum"}, batch()),
        ({"label_smoothing": 0.1, "weight": torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0]).double()}, batch()),
        ({}, mixed_batch()),
    ],
    ids=["plain", "sum", "weights", "mixed"],
)
def test_batch_norm_dropout_weights_and_mixtures(method, options, data):
    step = problem(method, make=smooth_net, per="scalar", **options)
    expected = whole_differences(step, data)
    torch.manual_seed(3)
    assert_close(step.hypergradient(*data), expected)


@pytest.mark.parametrize("outer", ["ce", "perturbed"])
def test_last_layer_is_the_others_where_only_the_head_is_trained(outer):
    def only_head(method):
        step = problem(method, outer=outer)
        for p in list(step.model.parameters())[:2]:
            p.requires_grad_(False)
        return step.hypergradient(*batch())

    expected = only_head("double_backward")
    for method in ("jvp", "finite_difference", "last_layer"):
        assert_close(only_head(method), expected)
    # And with a whole network that is trained it takes the head's virtual step alone.
    assert_close(problem("last_layer", outer=outer).hypergradient(*batch()), expected)
    whole = problem(outer=outer).hypergradient(*batch())
    assert float((whole - expected).norm() / expected.norm()) > 1e-3


def test_each_parameter_has_the_learning_rate_of_its_group():
    step = problem()
    first, *rest = step.model.parameters()
    step.optimizer = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest}], LR)
    got = step.hypergradient(*batch())
    first.requires_grad_(False)
    step.optimizer = torch.optim.SGD(rest, LR)
    torch.testing.assert_close(got, step.hypergradient(*batch()))
    step.optimizer.param_groups[0]["lr"] = 2 * LR
    assert float((step.hypergradient(*batch()) - got).norm()) > 0


def state_of(step):
    """All that an iteration may move, as copies."""
    parts = [step.model, step.criterion]
    tensors = [t.clone() for part in parts for t in part.state_dict().values() if t is not None]
    tensors += [t.clone() for t in step.criterion.buffers()]
    tensors += [b.clone() for s in step.optimizer.state.values() for b in s.values() if isinstance(b, torch.Tensor)]
    grads = [None if p.grad is None else p.grad.clone() for p in step.model.parameters()]
    return [*tensors, torch.get_rng_state(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("method", [*EVERY, "last_layer"])
def test_hypergradient_moves_nothing(method):
    step = problem(method, make=smooth_net)
    for p in step.model.parameters():
        p.grad = torch.randn_like(p)
    before = state_of(step)
    step.hypergradient(*batch())
    after = state_of(step)
    assert len(before) == len(after) > 20
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not step.criterion.omega.requires_grad
    assert step.criterion.reduction == "mean"


@pytest.mark.parametrize("method", [*EVERY, "last_layer"])
def test_an_iteration_is_the_update_of_omega_and_a_plain_step(method):
    """Parameters, momentum, running averages, class statistics and random numbers move as in one plain step."""
    data = batch()
    step = problem(method, make=smooth_net, meta_lr=2.0)
    torch.manual_seed(11)
    hypergradient = copy.deepcopy(step).hypergradient(*data)
    net, criterion = copy.deepcopy((step.model, step.criterion))
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=1e-3)
    optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    torch.manual_seed(11)
    criterion.omega -= 2.0 * hypergradient
    features, logits = net(data[0])
    expected = criterion(features, net.head.weight, data[1], logits=logits)
    expected.backward()
    optimizer.step()
    after = torch.get_rng_state()

    torch.manual_seed(11)
    updates = step.criterion.updates.clone()
    loss = step(*data)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert torch.equal(torch.get_rng_state(), after)
    assert int(step.criterion.updates) == int(updates) + 1
    for got, want in ((step.model, net), (step.criterion, criterion)):
        for name, value in want.state_dict().items():
            if value is not None:
                torch.testing.assert_close(got.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)
    for p, q in zip(step.model.parameters(), net.parameters(), strict=True):
        momentum = step.optimizer.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"]
        torch.testing.assert_close(*momentum, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", [*EVERY, "last_layer"])
def test_autocast_gives_the_same_to_its_precision(method):
    data = batch(dtype=torch.float32)
    exact = problem(method, dtype=torch.float32, lr=0.1).hypergradient(*data)
    for dtype, scaler in ((torch.bfloat16, None), (torch.float16, torch.amp.GradScaler("cpu"))):
        step = problem(method, dtype=torch.float32, lr=0.1, scaler=scaler)
        with torch.autocast("cpu", dtype):
            got = step.hypergradient(*data)
            assert got.dtype == torch.float32
            assert step(*data).isfinite()
        # bfloat16 has three digits; differences of forward passes lose some of them.
        assert_close(got, exact, {"finite_difference": 0.5}.get(method, 0.1))


def test_small_gradients_survive_float16():
    """1e-6 of a mean over many images: float16 has nothing between 0 and 6e-8, and little below 6e-5."""
    images, target, meta, meta_target = batch(dtype=torch.float32)

    def net():
        return nn.Sequential(nn.Linear(INPUTS, D), nn.Tanh(), Small(), nn.Linear(D, C))

    def hypergradient(scaler, *, autocast):
        step = problem(make=net, dtype=torch.float32, scaler=scaler)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return step.hypergradient(images, target, meta, meta_target)

    exact = hypergradient(None, autocast=False)
    assert_close(hypergradient(torch.amp.GradScaler("cpu"), autocast=True), exact, 0.1)


class Small(nn.Module):
    def forward(self, x):
        return x * 2e-4


def test_gradients_are_clipped_in_the_real_step_only():
    data, norms = batch(), []
    step = problem(meta_lr=2.0)
    step.optimizer.zero_grad()

    def clip(optimizer, args, kwargs):
        norms.append(nn.utils.clip_grad_norm_(step.model.parameters(), 1e-3))

    step.optimizer.register_step_pre_hook(clip)
    expected = step.hypergradient(*data)
    omega = step.criterion.omega.clone()
    step(*data)
    assert len(norms) == 1
    assert float(norms[0]) > 0.01
    torch.testing.assert_close(step.criterion.omega, omega - 2.0 * expected)
    assert float(nn.utils.get_total_norm([p.grad for p in step.model.parameters()])) == pytest.approx(1e-3, rel=1e-5)


def test_an_update_to_a_non_finite_omega_is_refused_and_counted():
    images, target, meta, meta_target = batch()
    step = problem()
    omega = step.criterion.omega.clone()
    for bad in (torch.nan, torch.inf):
        meta[0] = bad
        step.update_omega(images, target, meta, meta_target)
    assert torch.equal(step.criterion.omega, omega)
    assert int(step.refused) == 2
    other = problem()
    other.load_state_dict(step.state_dict())
    assert int(other.refused) == 2
    other.update_omega(*batch())
    assert int(other.refused) == 2
    assert not torch.equal(other.criterion.omega, omega)


def test_meta_lr_zero_is_a_plain_step():
    step = problem(meta_lr=0.0)
    omega = step.criterion.omega.clone()
    step.hypergradient = None  # is not asked
    step(*batch())
    assert torch.equal(step.criterion.omega, omega)


# What lacks a derivative


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):  # (N, 32): 4 tokens of 8
        q, k, v = self.qkv(x.view(len(x), 1, 4, 8)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


def attention_net():
    return nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), Attention(), nn.Linear(32, D), nn.Tanh(), nn.Linear(D, C))


def test_fused_attention_is_refused_with_the_methods_that_work():
    for method in ("jvp", "double_backward"):
        step = problem(method, make=attention_net, dtype=torch.float32)
        before = state_of(step)
        with pytest.raises(RuntimeError, match=r"; here 'finite_difference', 'last_layer' work$"):
            step(*batch(dtype=torch.float32))
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
    data = batch()
    step = problem("finite_difference", make=attention_net, per="scalar")
    assert_close(step.hypergradient(*data), whole_differences(step, data))
    assert problem("last_layer", make=attention_net).hypergradient(*data).any()


@torch.library.custom_op("classfair_test::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Cube(nn.Module):
    def forward(self, x):
        return cube(x)


def test_an_operator_that_drops_tangents_is_noticed():
    """torch gives custom operators with a registered gradient no forward mode, and no error for it."""

    def net():
        return nn.Sequential(nn.Linear(INPUTS, D), Cube(), nn.Linear(D, C))

    with pytest.raises(
        RuntimeError, match=r"drops tangents.*'double_backward', 'finite_difference', 'last_layer' work"
    ):
        problem("jvp", make=net).hypergradient(*batch())
    data = batch()
    step = problem("double_backward", make=net, per="scalar")
    assert_close(step.hypergradient(*data), whole_differences(step, data))


# Arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_lr": -1.0}, r"expected meta_lr in \[0, "),
        ({"meta_lr": float("nan")}, r"expected meta_lr in \[0, "),
        ({"outer": "mse"}, "expected outer 'ce' or 'perturbed', got 'mse'"),
        ({"method": "hessian"}, "expected method 'jvp', 'double_backward', 'finite_difference' or 'last_layer'"),
        ({"model": layers()}, "expected model from nn.with_features, got Sequential"),
        ({"criterion": nn.CrossEntropyLoss()}, "expected criterion as MetaLADLoss, got CrossEntropyLoss"),
        ({"optimizer": 0.1}, "expected optimizer as Optimizer, got float"),
        ({"optimizer": torch.optim.SGD(layers().parameters(), 0.1)}, "expected an optimizer of the model's parameters"),
    ],
)
def test_wrong_arguments(changes, message):
    good = problem()
    arguments = {"model": good.model, "criterion": good.criterion, "optimizer": good.optimizer, **changes}
    with pytest.raises((TypeError, ValueError), match=f"^MetaLADStep: {message}"):
        MetaLADStep(**arguments)


def test_last_layer_needs_the_heads_parameters():
    good = problem()
    optimizer = torch.optim.SGD(list(good.model.parameters())[:2], LR)
    with pytest.raises(ValueError, match="expected an optimizer of the head's parameters"):
        MetaLADStep(good.model, good.criterion, optimizer, method="last_layer")


def test_a_criterion_in_evaluation_is_refused():
    step = problem()
    step.criterion.eval()
    with pytest.raises(ValueError, match=r"expected a criterion that perturbs, got one without criterion\.train\(\)"):
        step(*batch())
    step.criterion.train()
    with torch.no_grad(), pytest.raises(ValueError, match="got one without gradients"):
        step.hypergradient(*batch())


# Several processes

SPLITS = ((slice(0, 17), slice(0, 3)), (slice(17, N), slice(3, K)))
EMPTY = ((slice(0, N), slice(0, 0)), (slice(0, 0), slice(0, K)))


def two_iterations(step, images, target, meta, meta_target):
    losses = [step(images, target, meta, meta_target) for _ in range(2)]
    state = [*step.model.state_dict().values(), step.criterion.omega, step.criterion.statistics.mean]
    return torch.stack(losses), step.hypergradient(images, target, meta, meta_target), state


WEIGHT = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0]).double()


CASES = [*((method, SPLITS) for method in (*EVERY, "last_layer")), ("jvp", EMPTY)]


def in_process(rank, states):
    results = []
    for (method, splits), saved in zip(CASES, copy.deepcopy(states), strict=True):  # processes share their arguments
        step = problem(method, weight=WEIGHT)
        for part, state in zip((step.model, step.criterion, step.optimizer), saved, strict=True):
            part.load_state_dict(state)
        net = DistributedDataParallel(step.model)
        step = MetaLADStep(net, step.criterion, step.optimizer, method=method, meta_lr=2.0)
        images, target, meta, meta_target = batch()
        part, meta_part = splits[rank]
        results.append(two_iterations(step, images[part], target[part], meta[meta_part], meta_target[meta_part]))
    return results, refusal()


def refusal():
    step = problem()
    try:
        step(*batch())
    except ValueError as error:
        return str(error)


def test_two_processes_are_one(tmp_path):
    every = [problem(method, weight=WEIGHT, meta_lr=2.0) for method, _ in CASES]
    states = [[copy.deepcopy(p.state_dict()) for p in (s.model, s.criterion, s.optimizer)] for s in every]
    expected = [two_iterations(step, *batch()) for step in every]
    for got, refused in run_processes(in_process, 2, tmp_path, states):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        assert refused == "MetaLADStep: expected model in DistributedDataParallel with several processes"
