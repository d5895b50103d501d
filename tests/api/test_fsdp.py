"""Sharded weights and distributed tensors: several processes equal one."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import classfair
from classfair import MixedTarget
from classfair.losses import FeatureLoss
from tests.project.test_docs import ROOT, python_blocks, run_block
from tests.support.losses import LOSSES, C, D
from tests.support.processes import run_processes

RECIPES = ROOT / "docs" / "recipes.md"

ROWS, STEPS = 23, 2
SHARDED = {
    2: {"root": LOSSES, "layers": LOSSES, "loss inside": ("class balanced", "isda", "metalad")},
    3: {"layers": ("class balanced", "isda", "metalad")},  # enough for unequal parts of the weights
}


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 6, generator=g), torch.randint(0, C, (ROWS,), generator=g)


def parts(rank, world):
    """Unequal ones: the first process has a single row."""
    ends = [0, 1, *(1 + (ROWS - 1) * i // (world - 1) for i in range(1, world))]
    return slice(ends[rank], ends[rank + 1])


class Classifier(nn.Module):
    """The recipe of feature losses; the loss in the model, as it is in those of Lightning."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, D), nn.Linear(D, C)
        self.criterion = LOSSES[name](reduction="sum")

    def features(self, images):
        features = self.body(images).relu()
        return features, self.head(features)

    def loss(self, features, logits, target):
        if isinstance(self.criterion, FeatureLoss):
            arguments = {"logits": logits, "linear_bias": self.head.bias}
            return self.criterion(features, self.head.weight, target, **arguments)
        return self.criterion(logits, target)

    def forward(self, images, target=None):
        features, logits = self.features(images)
        return (features, logits) if target is None else self.loss(features, logits, target)


def train(model, images, target, scale, *, inside):
    """Gradients of each step and the state of the loss."""
    results = []
    for _ in range(STEPS):
        loss = model(images, target) if inside else model.loss(*model(images), target)
        (loss * scale).backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        results += [g.clone() for g in gradients]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.05 * parameter.grad)
                parameter.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MetaLADLoss perturbs strongly here
        return results, dict(model.criterion.state_dict())


def sharded(name, how, mesh):
    model = Classifier(name)
    if how != "root":
        for layer in (model.body, model.head):
            fully_shard(layer, mesh=mesh)  # the weight is a DTensor again when the head has run
    return fully_shard(model, mesh=mesh)


def _train_sharded(rank, world):
    torch.set_num_threads(1)
    results = {}
    mesh = init_device_mesh("cpu", (world,))
    images, target = (x[parts(rank, world)] for x in data())
    for how, names in SHARDED[world].items():
        for name in names:
            model = sharded(name, how, mesh)
            results[how, name] = train(model, images, target, world / ROWS, inside=how == "loss inside")
    return results


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_fully_sharded_processes_equal_one(world, tmp_path):
    results = run_processes(_train_sharded, world, tmp_path, world)
    for name in LOSSES:
        gradients, state = train(Classifier(name), *data(), 1 / ROWS, inside=True)
        for how in (how for how, names in SHARDED[world].items() if name in names):
            for result in results:
                got, got_state = result[how, name]
                for a, b in zip(got, gradients, strict=True):
                    # Sums of 23 rows in another order, twice through a step of descent.
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, at=(how, name): f"{at} {m}")
                for key, value in state.items():
                    torch.testing.assert_close(got_state[key], value, rtol=1e-4, atol=1e-5, msg=f"{how} {name} {key}")


def logits_problem():
    g = torch.Generator().manual_seed(2)
    return (
        torch.randn(ROWS, C, generator=g),
        torch.randint(0, C, (ROWS,), generator=g),
        torch.randint(0, 2, (ROWS,), generator=g),
        torch.rand(ROWS, generator=g),
    )


def losses_of(logits, target, group, sample_weight):
    """Loss by loss with their gradients, statistics among them."""
    weighted = LOSSES["class balanced"]()
    loss, stats = weighted.with_stats(logits, target, group=group, num_groups=2, sample_weight=sample_weight)
    roll = (
        target.roll(1)
        if not isinstance(target, DTensor)
        else distribute_tensor(target.full_tensor().roll(1), target.device_mesh, target.placements)
    )
    values = [
        weighted(logits, target),
        LOSSES["logit adjusted"](label_smoothing=0.1)(logits, target),
        LOSSES["ldam"]()(logits, MixedTarget(target, roll, 0.25)),
        loss + (stats.mass[0] / stats.mass[0].sum()).square().sum(),
    ]
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values]
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return [v.detach() for v in values], gradients, stats.count


def _distributed_logits(rank, world):
    torch.set_num_threads(1)
    results = {}
    mesh = init_device_mesh("cpu", (world,))
    for name, placement in {"replicated": Replicate(), "sharded": Shard(0)}.items():
        inputs = [distribute_tensor(x, mesh, [placement]) for x in logits_problem()]
        results[name] = losses_of(inputs[0].requires_grad_(), *inputs[1:])
    logits, target, *_ = logits_problem()
    local = DTensor.from_local(logits / world, mesh, [Partial()]).requires_grad_()
    results["partial"] = classfair.cross_entropy(local, target).detach()
    errors = []
    for call in (classfair.cross_entropy, classfair.cross_entropy_with_stats, LOSSES["ldam"]()):
        try:
            call(distribute_tensor(logits, mesh, [Shard(1)]), target)
        except ValueError as error:
            errors.append(str(error))
    try:
        criterion, rows = LOSSES["isda"](), distribute_tensor(torch.randn(ROWS, D), mesh, [Shard(0)])
        criterion(rows, torch.randn(C, D), target)
    except TypeError as error:
        errors.append(str(error))
    results["errors"] = errors
    results["weights"] = [_weight_gradient(rank, world, where) for where in _meshes(world)]
    (block,) = (block for block in python_blocks(RECIPES) if "fully_shard" in block)
    results["recipe"] = _recipe(parts(rank, world), world / ROWS, run_block(block)["shard"])
    return results


def _meshes(world):
    return [
        (init_device_mesh("cpu", (world,)), [Replicate()]),
        (init_device_mesh("cpu", (1, world)), [Replicate(), Shard(0)]),
        (init_device_mesh("cpu", (world, 1)), [Replicate(), Shard(0)]),
    ]


def _weight_problem(part):
    g = torch.Generator().manual_seed(3)
    weight, features = torch.randn(C, D, generator=g), torch.randn(ROWS, D, generator=g)
    return weight, features[part], torch.randint(0, C, (ROWS,), generator=g)[part]


def _recipe(part, scale, prepare=None):
    """Gradients of the classifier of docs/recipes.md, sharded as it says or not at all."""
    torch.manual_seed(0)
    images, target = (x[part] for x in data())
    model = nn.Sequential(nn.Linear(6, D), nn.ReLU(), nn.Linear(D, C))
    net = classfair.nn.with_features(model) if prepare is None else prepare(model)
    features, logits = net(images)
    criterion = LOSSES["isda"](reduction="sum")
    loss = criterion(features, net.head.weight, target, logits=logits, linear_bias=net.head.bias)
    (loss * scale).backward()
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in net.parameters()]


def _weight_gradient(rank, world, where):
    weight, features, target = _weight_problem(parts(rank, world))
    weight = distribute_tensor(weight, *where).requires_grad_()
    loss = LOSSES["isda"](reduction="sum")(features, weight, target) * world / ROWS
    return torch.autograd.grad(loss, weight)[0].full_tensor()


def test_distributed_tensors(tmp_path):
    world = 2
    results = run_processes(_distributed_logits, world, tmp_path, world)
    logits, target, *others = logits_problem()
    expected = losses_of(logits.requires_grad_(), target, *others)
    weight, features, labels = _weight_problem(slice(None))
    loss = LOSSES["isda"](reduction="sum")(features, weight.requires_grad_(), labels) / ROWS
    (weight_gradient,) = torch.autograd.grad(loss, weight)
    for result in results:
        for name in ("replicated", "sharded"):
            values, gradients, count = result[name]
            torch.testing.assert_close(values, expected[0])
            torch.testing.assert_close(gradients, expected[1])
            assert torch.equal(count, expected[2])
        torch.testing.assert_close(result["partial"], classfair.cross_entropy(logits, target).detach())
        for got, wanted in zip(result["recipe"], _recipe(slice(None), 1 / ROWS), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        *sharded_classes, sharded_features = result["errors"]
        assert len(sharded_classes) == 3
        for message in sharded_classes:
            assert "expected logits with all classes on each process, got a DTensor with placements" in message
        assert "ISDALoss: expected features as a plain tensor of this process's samples, got a DTensor" in (
            sharded_features
        )
        for gradient in result["weights"]:
            torch.testing.assert_close(gradient, weight_gradient, rtol=1e-4, atol=1e-5)
