"""The primitives inside torch's machinery: compile, export, function transforms, autocast."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import classfair
from classfair import distance_margin, pair_variance
from classfair.ops import softmax_loss
from tests.support.pair_cases import draw
from tests.support.pairs import runnable

CPU = [b for b, d in runnable("softmax_loss") if d == "cpu" and b != "triton"]


def _statistics(rows, backend):
    """A step of the loss with statistics, and its leaves."""
    g = torch.Generator().manual_seed(rows)
    target, group = torch.randint(0, 6, (rows,), generator=g), torch.randint(0, 2, (rows,), generator=g)

    def step(logits, offset, target, group):
        loss, stats = classfair.cross_entropy_with_stats(
            logits,
            target,
            offset=offset,
            label_smoothing=0.1,
            group=group,
            num_groups=2,
            joint=True,
            backend=backend,
        )
        return loss + stats.mass.square().sum() + stats.joint.rows.square().sum(), stats.detach()

    return step, (torch.randn(rows, 6, generator=g), torch.randn(6, generator=g)), (target, group)


def _pair_terms(rows, backend):
    """A step of the loss with both pair terms, and its leaves."""
    target = torch.randint(0, 6, (rows,), generator=torch.Generator().manual_seed(rows))

    def step(weight, cov, mean, target, logits):
        index = classfair.ops.label_index(target, weight.shape[0])
        pair = 0.5 * pair_variance(weight, cov, index, normalize=True, backend=backend) + distance_margin(
            mean, index, mean_distance=mean.new_tensor(1.0), backend=backend
        )
        return classfair.cross_entropy(logits, target, pair=pair), ()

    leaves = draw(6, 4), draw(6, 4, seed=1).square()
    return step, leaves, (draw(6, 4, seed=2), target, draw(rows, 6, seed=4))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [pytest.param(b, marks=[pytest.mark.slow] * (b == "reference")) for b in CPU])
@pytest.mark.parametrize("make", [_statistics, _pair_terms])
def test_compile_without_graph_breaks(make, backend, compiler, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(make(8, backend)[0], fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (8, 5):
        step, leaves, rest = make(rows, backend)

        def results(function, leaves=leaves, rest=rest):
            given = [leaf.clone().requires_grad_() for leaf in leaves]
            value, others = function(*given, *rest)
            return value, *torch.autograd.grad(value, given), *pytree.tree_leaves(others)

        for got, expected in zip(results(compiled), results(step), strict=True):
            torch.testing.assert_close(got, expected)


PENALTIES = {
    "dp": classfair.demographic_parity_loss,
    "eo": classfair.equalized_odds_loss,
    "iou": classfair.iou_loss,
}


@pytest.mark.parametrize("name", PENALTIES)
def test_compiles_where_nothing_needs_a_gradient(name):
    def evaluate(logits, target, group):
        loss, stats = classfair.cross_entropy_with_stats(logits, target, group=group, num_groups=2, joint=True)
        return loss, PENALTIES[name](stats)

    torch._dynamo.reset()
    batch = torch.randn(8, 3), torch.arange(8) % 3, torch.arange(8) // 2 % 2
    compiled = torch.compile(evaluate, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch), evaluate(*batch))


def test_one_compilation_serves_batches_of_many_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(classfair.cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 7, 9, 12, 31):
        compiled(torch.randn(rows, 5), torch.zeros(rows, dtype=torch.int64))
    assert counter.frame_count == 1


class _Trained(torch.nn.Module):
    """A head with its loss, as one would export it to train elsewhere."""

    def __init__(self, criterion):
        super().__init__()
        self.head, self.criterion = torch.nn.Linear(5, 4), criterion

    def forward(self, features, target):
        if isinstance(self.criterion, classfair.losses.FeatureLoss):
            weight, bias = self.head.weight, self.head.bias
            return self.criterion(features, weight, target, linear_bias=bias, update=False)
        options = {"group": target % 2, "num_groups": 2, "penalty": classfair.iou_loss}
        loss, stats = self.criterion.with_stats(self.head(features), target, **options)
        return loss + classfair.demographic_parity_loss(stats)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: classfair.LogitAdjustedLoss([4, 3, 2, 1]),
        lambda: classfair.ISDALoss(4, 5),
        lambda: classfair.MetaLADLoss([4, 3, 2, 1], 5),
    ],
    ids=["logit-adjusted", "isda", "metalad"],
)
def test_an_exported_loss_trains_as_the_loss_does(make, strict):
    torch.manual_seed(0)
    trained = _Trained(make())
    features, target = torch.randn(12, 5), torch.arange(12) % 4
    if isinstance(trained.criterion, classfair.losses.FeatureLoss):
        trained.criterion.statistics.update(features, target)
        trained.criterion.refresh()
    exported = torch.export.export(trained, (features, target), strict=strict).module()
    losses = [module(features, target) for module in (exported, trained)]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, [*m.parameters()]) for loss, m in zip(losses, (exported, trained), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_a_named_back_end_is_refused_in_an_export():
    class Head(torch.nn.Module):
        def forward(self, logits, target):
            return classfair.cross_entropy(logits, target, backend="native")

    with pytest.raises(RuntimeError, match="expected backend None or 'reference' in an export, got 'native'"):
        torch.export.export(Head(), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), strict=False)


@pytest.mark.parametrize("backend", CPU)
class TestFunctionTransforms:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([0, 3, 2, 1, 0])

    def loss(self, backend):
        return lambda z: softmax_loss(z, target=self.target, stats=2, backend=backend).loss.sum()

    def test_grad_and_nested_grad(self, backend):
        p = self.logits.softmax(1)
        gradient = p - torch.nn.functional.one_hot(self.target, 4)
        torch.testing.assert_close(torch.func.grad(self.loss(backend))(self.logits), gradient)
        norm = torch.func.grad(lambda z: torch.func.grad(self.loss(backend))(z).square().sum())
        expected = 2 * (p * gradient - p * (p * gradient).sum(1, keepdim=True))
        torch.testing.assert_close(norm(self.logits), expected)

    def test_jacrev(self, backend):
        jacobian = torch.func.jacrev(lambda z: softmax_loss(z, target=self.target, backend=backend).loss)
        expected = self.logits.softmax(1) - torch.nn.functional.one_hot(self.target, 4)
        torch.testing.assert_close(jacobian(self.logits).diagonal(dim1=0, dim2=1).T, expected)

    def test_vmap_over_offsets(self, backend):
        offsets = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def loss(offset):
            return softmax_loss(self.logits, target=self.target, offset=offset, backend=backend).loss.mean()

        expected = torch.stack([torch.func.grad(loss)(o) for o in offsets])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(offsets), expected)


def _plain(logits, offset):
    return classfair.cross_entropy(logits, TARGET, offset=offset, label_smoothing=0.1)


def _with_penalty_along(logits, offset):
    loss, stats = classfair.cross_entropy_with_stats(
        logits, TARGET, offset=offset, group=TARGET % 2, num_groups=2, joint=True, penalty=classfair.equalized_odds_loss
    )
    return loss + stats.mass.square().sum() + stats.joint.rows.square().sum()


def _with_penalties_added(logits, offset):
    options = {"group": TARGET % 2, "num_groups": 2, "joint": True}
    loss, stats = classfair.cross_entropy_with_stats(logits, TARGET, offset=offset, **options)
    information = classfair.demographic_parity_loss(stats, kind="mi")
    return loss + classfair.iou_loss(stats) + classfair.equalized_odds_loss(stats) + information


TARGET = torch.arange(6) % 4


@pytest.mark.filterwarnings("ignore")  # torch's own, of linearize
@pytest.mark.parametrize("function", [_plain, _with_penalty_along, _with_penalties_added])
def test_forward_mode_and_what_is_built_on_it(function):
    """Against reverse mode of the same function, whose derivatives the conformance suite checks."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 4, dtype=torch.float64, generator=g), torch.randn(4, dtype=torch.float64, generator=g)]
    tangents = [torch.randn(v.shape, dtype=torch.float64, generator=g) for v in values]
    gradients = torch.func.grad(function, argnums=(0, 1))(*values)
    expected = sum((a * b).sum() for a, b in zip(gradients, tangents, strict=True))
    found = torch.func.jvp(function, tuple(values), tuple(tangents))[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.linearize(function, *values)[1](*tangents), expected)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*dual)).tangent, expected)
    torch.testing.assert_close(torch.func.jacfwd(function)(*values), gradients[0])
    twice = torch.func.jacrev(torch.func.jacrev(function))(*values)
    torch.testing.assert_close(torch.func.hessian(function)(*values), twice)
    leaves = [v.clone().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


def test_a_gradient_norm_of_a_gradient_norm():
    def norm_of(function):
        return lambda z, offset: torch.func.grad(function)(z, offset).square().sum()

    g = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 4, dtype=torch.float64, generator=g), torch.randn(4, dtype=torch.float64, generator=g)]

    def torchs(logits, offset):
        return torch.nn.functional.cross_entropy(logits + offset, TARGET, label_smoothing=0.1)

    found, expected = (torch.func.grad(norm_of(norm_of(f)))(*values) for f in (_plain, torchs))
    torch.testing.assert_close(found, expected)


def test_autocast_gives_a_float32_loss():
    weight = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.randn(5, 6) @ weight.T
        loss = classfair.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 0]))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32
