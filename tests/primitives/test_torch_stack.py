"""The primitives inside torch's machinery: opcheck, compile, export, function transforms, autocast."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import classfair
from classfair._schema import Scalars, Tensors
from classfair.ops import softmax_loss
from tests.support.cases import CASES
from tests.support.conformance import cast
from tests.support.pairs import runnable

KERNELS = [p for p in runnable("softmax_loss") if p[0] != "reference"]
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=["-".join(p) for p in KERNELS])
CPU = [b for b, d in runnable("softmax_loss") if d == "cpu" and b != "triton"]
OPCHECK = [c for c in CASES if c.id in ("plain-3x31", "all", "dense-all", "strided-3d", "mixed-stats", "plain-0x5")]


def _raw_arguments(case, device):
    x = cast(case.build(), torch.float32, device)
    tensors = Tensors(**{name: x[name] for name in Tensors._fields if name in x})
    return tensors, Scalars(**{name: x[name] for name in Scalars._fields if name in x})


@each_kernel
@pytest.mark.parametrize("case", OPCHECK, ids=lambda c: c.id)
def test_opcheck(case, backend, device):
    ops = getattr(torch.ops, f"classfair_{backend}")
    t, s = _raw_arguments(case, device)
    torch.library.opcheck(ops.softmax_loss_fwd.default, (*t, *s))
    out = ops.softmax_loss_fwd(*t, *s)
    loss, lse, _, _, mass, hit, joint, *_ = (torch.rand_like(o) if o.is_floating_point() else o for o in out)
    if not s.stats:
        mass = hit = None
    if t.cell is None:
        joint = None
    wants = [tensor is not None for tensor in (t.offset, t.margin, t.pair)]
    tensors = (tensor.detach() if tensor is not None else None for tensor in t)
    upstream = (loss, lse, mass, hit, joint, None if mass is None else mass.new_tensor(2.0))
    torch.library.opcheck(ops.softmax_loss_bwd.default, (*upstream, *tensors, out[1], out[2], *s, *wants))


@each_kernel
def test_label_index_opcheck(backend, device):
    target, group = torch.tensor([[3, 1, -100, 3], [0, 1, 0, -1]], device=device)
    op = getattr(torch.ops, f"classfair_{backend}").label_index.default
    torch.library.opcheck(op, (target, None, 5, 1, -100))
    torch.library.opcheck(op, (target, group, 5, 2, -100))


def _step(logits, offset, target, group):
    loss, stats = classfair.cross_entropy_with_stats(
        logits, target, offset=offset, label_smoothing=0.1, group=group, num_groups=2, joint=True
    )
    return loss + stats.mass.square().sum() + stats.joint.rows.square().sum(), stats.detach()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(compiler, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (8, 5):
        g = torch.Generator().manual_seed(rows)
        logits, offset = torch.randn(rows, 6, generator=g), torch.randn(6, generator=g)
        target, group = torch.randint(0, 6, (rows,), generator=g), torch.randint(0, 2, (rows,), generator=g)

        def gradients(function, logits=logits, offset=offset, target=target, group=group):
            leaves = logits.clone().requires_grad_(), offset.clone().requires_grad_()
            value, stats = function(*leaves, target, group)
            return value, *torch.autograd.grad(value, leaves), *pytree.tree_leaves(stats)

        for got, expected in zip(gradients(compiled), gradients(_step), strict=True):
            torch.testing.assert_close(got, expected)


def test_one_compilation_serves_batches_of_many_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(classfair.cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 7, 9, 12, 31):
        compiled(torch.randn(rows, 5), torch.zeros(rows, dtype=torch.int64))
    assert counter.frame_count == 1


def test_export():
    class Head(torch.nn.Module):
        def forward(self, logits, target):
            return classfair.cross_entropy(logits, target)

    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    program = torch.export.export(Head(), (logits, target))
    torch.testing.assert_close(program.module()(logits, target), Head()(logits, target))


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
