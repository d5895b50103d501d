"""``zero_uniformity_loss`` against its formulas, and ``ZeroUniformity``: probes, batch norm, processes, compilers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import classfair
from classfair import ZeroUniformity, zero_uniformity_loss
from tests.support.processes import run_processes

CASES = [("std", 0), ("std", 1), ("mean", 0), ("entropy", 0)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def oracle(v, kind, correction=0):
    """Pan et al. 2025, eq. 1 to 3, of one response (C,), real or complex."""
    classes = len(v)
    if kind == "std":
        return np.sqrt(((v - v.sum() / classes) ** 2).sum() / (classes - correction))
    if kind == "mean":
        return (v * np.sign(v.real)).sum() / classes
    p = np.exp(v) / np.exp(v).sum()
    return (p * np.log(p)).sum() + np.log(classes)


def complex_step(v, kind, correction):
    gradient = np.zeros(len(v))
    for i in range(len(v)):
        moved = v.astype(complex)
        moved[i] += 1e-30j
        gradient[i] = oracle(moved, kind, correction).imag / 1e-30
    return gradient


@pytest.mark.parametrize(("kind", "correction"), CASES)
@pytest.mark.parametrize("classes", [2, 7, 150])
def test_values_and_gradients_are_those_of_the_formulas(classes, kind, correction):
    v = (3 * normal(classes)).requires_grad_()
    loss = zero_uniformity_loss(v, kind=kind, correction=correction)
    assert loss.item() == pytest.approx(oracle(v.detach().numpy(), kind, correction), rel=1e-13)
    (gradient,) = torch.autograd.grad(loss, v)
    expected = torch.from_numpy(complex_step(v.detach().numpy(), kind, correction))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "correction"), CASES)
def test_derivatives(kind, correction):
    def loss(v):
        return zero_uniformity_loss(v, kind=kind, correction=correction)

    v = normal(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(loss, v, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, v)


@pytest.mark.parametrize(("kind", "correction"), CASES)
def test_the_mean_over_responses_and_over_pixels_first(kind, correction):
    v = normal(4, 6)
    expected = np.mean([oracle(row, kind, correction) for row in v.numpy()])
    options = {"kind": kind, "correction": correction}
    assert zero_uniformity_loss(v, **options).item() == pytest.approx(expected, rel=1e-12)
    assert zero_uniformity_loss(v.view(2, 2, 6), **options).item() == pytest.approx(expected, rel=1e-12)
    dense = normal(1, 6, 3, 5)
    expected = oracle(dense.numpy()[0].mean((1, 2)), kind, correction)
    assert zero_uniformity_loss(dense, **options).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kind", "correction"), CASES)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_have_no_gradient(kind, correction, value, dtype):
    """0.1 ten times has not the mean 0.1: the deviation of rounding errors would have a gradient of full size."""
    v = torch.full((10,), value, dtype=dtype, requires_grad=True)
    loss = zero_uniformity_loss(v, kind=kind, correction=correction)
    (gradient,) = torch.autograd.grad(loss, v)
    if kind == "mean":  # not invariant to a shift
        assert loss.item() == pytest.approx(abs(value), rel=1e-6)
        assert gradient.tolist() == pytest.approx([math.copysign(0.1, value) if value else 0.0] * 10)
    else:
        rounding = 0 if kind == "std" else 4 * torch.finfo(dtype).eps  # of exp and log
        assert abs(loss.item()) <= rounding
        assert gradient.abs().max() <= rounding


@pytest.mark.parametrize(("kind", "correction"), CASES)
def test_masked_classes_take_no_part(kind, correction):
    v = normal(2, 6).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]).bool()
    loss = zero_uniformity_loss(v.masked_fill(~mask, -torch.inf), kind=kind, correction=correction)
    first = oracle(v.detach().numpy()[0][mask[0].numpy()], kind, correction)
    second = abs(v[1, 3].item()) if kind == "mean" else 0.0  # a single class
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()
    (second,) = torch.autograd.grad(gradient.square().sum(), v)
    assert second.isfinite().all()
    nothing = torch.full((3,), -torch.inf, requires_grad=True)
    loss = zero_uniformity_loss(nothing, kind=kind, correction=correction)
    loss.backward()
    assert (loss.item(), nothing.grad.tolist()) == (0.0, [0.0] * 3)


@pytest.mark.parametrize(("kind", "correction"), CASES)
def test_one_class_far_logits_and_nan(kind, correction):
    one = torch.tensor([[3.0]], requires_grad=True)
    loss = zero_uniformity_loss(one, kind=kind, correction=correction)
    loss.backward()
    assert (loss.item(), one.grad.item()) == ((3.0, 1.0) if kind == "mean" else (0.0, 0.0))
    far = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)  # probabilities of 0
    loss = zero_uniformity_loss(far, kind=kind, correction=correction)
    loss.backward()
    assert loss.isfinite()
    assert far.grad.isfinite().all()
    for bad in (math.nan, math.inf):
        expected = math.inf if (kind, bad) == ("mean", math.inf) else math.nan
        got = zero_uniformity_loss(torch.tensor([1.0, bad, 0.0]), kind=kind, correction=correction).item()
        assert got == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "correction"), CASES)
def test_half_precision_is_widened(kind, correction, dtype):
    v = (100 * normal(3, 9)).to(dtype).requires_grad_()
    loss = zero_uniformity_loss(v, kind=kind, correction=correction)
    expected = np.mean([oracle(row, kind, correction) for row in v.detach().double().numpy()])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert v.grad.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(3).long(),), {}, TypeError, "expected logits as a floating tensor, got torch.int64"),
        (([1.0, 2.0],), {}, TypeError, "expected logits as a floating tensor, got list"),
        ((torch.zeros(()),), {}, ValueError, "got ()"),
        ((torch.zeros(0, 3),), {}, ValueError, "with all sizes >= 1, got (0, 3)"),
        ((torch.zeros(1, 3, 2, 2, 2),), {}, ValueError, "got (1, 3, 2, 2, 2)"),
        ((torch.zeros(3),), {"kind": "max"}, ValueError, "expected kind 'std', 'mean' or 'entropy', got 'max'"),
        ((torch.zeros(3),), {"correction": 2}, ValueError, "expected correction 0 or 1, got 2"),
        (
            (torch.zeros(3),),
            {"kind": "mean", "correction": 1},
            ValueError,
            "expected correction 0 with kind 'mean', got 1",
        ),
    ],
)
def test_wrong_arguments_of_the_loss(arguments, options, error, message):
    with pytest.raises(error) as raised:
        zero_uniformity_loss(*arguments, **options)
    assert str(raised.value).startswith("zero_uniformity_loss: expected ")
    assert str(raised.value).endswith(message)


@pytest.mark.parametrize("kind", ["std", "mean", "entropy"])
def test_the_loss_compiles_without_a_break(kind):
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: zero_uniformity_loss(v, kind=kind), fullgraph=True, backend="aot_eager")
    v = normal(2, 5).requires_grad_()
    (got,) = torch.autograd.grad(compiled(v), v)
    (expected,) = torch.autograd.grad(zero_uniformity_loss(v, kind=kind), v)
    torch.testing.assert_close(got, expected)


# ZeroUniformity


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(*layers)


IMAGES = normal(6, 3, 8, 8, dtype=torch.float32)
PROBES = {
    "zero": torch.zeros(1, 3, 8, 8),
    "one": torch.ones(1, 3, 8, 8),
    "mean": IMAGES.mean(0, keepdim=True),
    "tensor": normal(3, 8, 8, seed=1, dtype=torch.float32),
    "tensors": normal(2, 3, 8, 8, seed=2, dtype=torch.float32),
}


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("mode", ["concat", "separate"])
def test_answers_to_the_images_and_to_the_probe(mode, name):
    model = convolutions().eval()  # without batch norm both modes are the model itself
    probe = PROBES[name]
    net = ZeroUniformity(model, probe if "tensor" in name else name, mode)
    logits, response = net(IMAGES)
    torch.testing.assert_close(logits, model(IMAGES))
    torch.testing.assert_close(response, model(probe.view(-1, 3, 8, 8)))
    assert list(net.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    nothing, response = net(IMAGES[:0])
    assert nothing.shape == (0, 5)
    assert len(response) == (2 if name == "tensors" else 1)


def test_random_probes_are_of_the_generator():
    net = ZeroUniformity(nn.Flatten(), "random")
    torch.manual_seed(3)
    first, second = net(IMAGES)[1], net(IMAGES)[1]
    torch.manual_seed(3)
    assert torch.equal(net(IMAGES)[1], first)
    assert not torch.equal(first, second)


def test_batch_norm_sees_the_probe_in_one_mode_and_not_in_the_other():
    together, alone, images_only = convolutions(), convolutions(), convolutions()
    ZeroUniformity(together)(IMAGES)
    expected = convolutions()
    expected(torch.cat([torch.zeros(1, 3, 8, 8), IMAGES]))  # the probe in front, with the weight of an image
    assert all(torch.equal(a, b) for a, b in zip(together.buffers(), expected.buffers(), strict=True))

    logits, response = ZeroUniformity(alone, mode="separate")(IMAGES)
    torch.testing.assert_close(logits, images_only(IMAGES))
    for mine, plain in zip(alone.buffers(), images_only.buffers(), strict=True):
        assert torch.equal(mine, plain)
    assert alone[1].training
    assert response.requires_grad
    torch.testing.assert_close(response, images_only.eval()(torch.zeros(1, 3, 8, 8)))
    assert not torch.equal(together[1].running_mean, alone[1].running_mean)


def test_batch_norm_trains_again_after_an_error():
    model = convolutions()
    net = ZeroUniformity(model, mode="separate")
    model[5].register_forward_hook(lambda module, args, output: 1 / len(args[0][1:]))  # fails for the probe alone
    with pytest.raises(ZeroDivisionError):
        net(IMAGES)
    assert model[1].training


def test_features_dicts_and_memory_format():
    net = classfair.nn.with_features(convolutions())
    (features, logits), (own, response) = ZeroUniformity(net)(IMAGES)
    assert [t.shape for t in (features, logits, own, response)] == [(6, 4), (6, 5), (1, 4), (1, 5)]

    class Segmentation(nn.Module):
        def forward(self, images):
            assert images.is_contiguous(memory_format=torch.channels_last)
            return {"out": images, "names": None}

    images, response = ZeroUniformity(Segmentation(), "one")(IMAGES.to(memory_format=torch.channels_last))
    assert torch.equal(images["out"], IMAGES)
    assert zero_uniformity_loss(response["out"]).item() == 0
    assert response["names"] is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ZeroUniformity(F.relu),
            TypeError,
            "expected model as a torch.nn.Module, got function",
        ),
        (lambda: ZeroUniformity(nn.Flatten(), "gray"), ValueError, "expected probe 'zero', 'one', 'mean' or 'random'"),
        (lambda: ZeroUniformity(nn.Flatten(), torch.zeros(3).long()), TypeError, "expected probe as a floating tensor"),
        (lambda: ZeroUniformity(nn.Flatten(), mode="twice"), ValueError, "expected mode 'concat' or 'separate'"),
        (
            lambda: ZeroUniformity(nn.BatchNorm2d(3, track_running_stats=False), mode="separate"),
            ValueError,
            "expected batch norm with running statistics",
        ),
        (
            lambda: ZeroUniformity(nn.Flatten(), torch.zeros(3, 4, 4))(IMAGES),
            ValueError,
            "expected a probe of the shape of an image, (3, 8, 8), got (3, 4, 4)",
        ),
        (lambda: ZeroUniformity(nn.Flatten())(IMAGES.long()), TypeError, "expected images as a floating tensor"),
        (
            lambda: ZeroUniformity(nn.Flatten(0, 1))(IMAGES),
            RuntimeError,
            "expected outputs of the model with 7 rows, of images and probe, got shape (21, 8, 8)",
        ),
    ],
)
def test_wrong_arguments_of_the_module(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value).startswith(f"ZeroUniformity: {message}")


@pytest.mark.parametrize("mode", ["concat", "separate"])
def test_a_step_compiles_without_a_break(mode):
    torch._dynamo.reset()
    eager, compiled = ZeroUniformity(convolutions(), mode=mode), ZeroUniformity(convolutions(), mode=mode)

    def loss(net, images):
        logits, response = net(images)
        return classfair.cross_entropy(logits, torch.arange(6) % 5) + zero_uniformity_loss(response)

    loss(eager, IMAGES).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, IMAGES).backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def gradient(images, target, share, mode):
    """Of cross-entropy and the answer to the probe, with the same model and images everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5))
    net = ZeroUniformity(model, mode=mode)
    if torch.distributed.is_initialized():
        net = DistributedDataParallel(net)
    logits, response = net(images)
    (share * F.cross_entropy(logits, target, reduction="sum") + 2 * zero_uniformity_loss(response)).backward()
    return [p.grad.clone() for p in model.parameters()]


def of_one_process(rank, mode):
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    return gradient(IMAGES[mine], (torch.arange(6) % 5)[mine], 2 / 6, mode)


@pytest.mark.parametrize("mode", ["concat", "separate"])
def test_two_processes_with_a_probe_each_are_one(mode, tmp_path):
    expected = gradient(IMAGES, torch.arange(6) % 5, 1 / 6, mode)
    for got in run_processes(of_one_process, 2, tmp_path, mode):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
