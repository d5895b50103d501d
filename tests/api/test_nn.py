"""``CosineLinear``, ``with_features`` and ``replace_head``: values, state, copies, compilers, several processes."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from classfair.nn import CosineLinear, replace_head, with_features
from tests.support.processes import run_processes


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# CosineLinear


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_logits_are_scaled_cosines(shape):
    head = CosineLinear(6, 4, scale=7.0, dtype=torch.float64)
    x = normal(*shape, dtype=torch.float64)
    expected = 7 * F.cosine_similarity(x.unsqueeze(-2), head.weight, dim=-1)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(3 * x), expected)  # no norm of a feature enters


def test_derivatives_of_cosine_logits():
    x, weight = normal(3, 5, dtype=torch.float64), normal(4, 5, seed=1, dtype=torch.float64)
    head = CosineLinear(5, 4)

    def logits(x, weight):
        return torch.func.functional_call(head, {"weight": weight}, (x,))

    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(logits, inputs)
    assert torch.autograd.gradgradcheck(logits, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_give_logit_zero_and_the_gradient_at_norm_one(dtype):
    head = CosineLinear(3, 2, scale=10.0, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    x = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    logits = head(x)
    assert logits.tolist() == [[0, 0], [0, 0]]
    logits.sum().backward()
    assert x.grad.tolist() == [[0, 10, 0], [0, 2.5, 0]]
    assert head.weight.grad.tolist() == [[10, 0, 0], [5, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_do_not_overflow(dtype):
    head = CosineLinear(64, 5).to(dtype)
    x = (3e4 * normal(8, 64)).clamp(-6e4, 6e4).to(dtype)
    assert x.double().norm(dim=1).min() > torch.finfo(torch.float16).max
    expected = 30 * F.cosine_similarity(x.double().unsqueeze(1), head.weight.double(), dim=-1)
    logits = head(x)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=30 * 4 * torch.finfo(dtype).eps)


def test_autocast_rounds_the_product_only():
    head = CosineLinear(64, 5)
    x = 1e4 * normal(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), head(x), rtol=0, atol=0.2)  # scale 30, 8 bits
    logits.float().square().sum().backward()
    assert head.weight.grad.dtype == torch.float32


def test_cosine_linear_as_a_module():
    head = CosineLinear(6, 4, scale=12.5)
    assert list(head.state_dict()) == ["weight"]
    assert repr(head) == "CosineLinear(in_features=6, out_features=4, scale=12.5)"
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4))
    before = head.weight.clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, before)
    x = normal(3, 6)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "CosineLinear: expected in_features >= 1, got 0"),
        ((3, -1), "CosineLinear: expected out_features >= 1, got -1"),
        ((3, 3, 0.0), "CosineLinear: expected a finite scale > 0, got 0.0"),
        ((3, 3, float("nan")), "CosineLinear: expected a finite scale > 0, got nan"),
    ],
)
def test_wrong_arguments_of_cosine_linear(arguments, message):
    with pytest.raises(ValueError, match=message):
        CosineLinear(*arguments)


# with_features


class Net(nn.Module):
    """A model with everything that a state dict can hold, at its root as well; counts its forward passes."""

    def __init__(self, head=None, attribute="fc"):
        super().__init__()
        self.token = nn.Parameter(normal(5))
        self.register_buffer("shift", normal(5, seed=1))
        self.register_buffer("cache", normal(5, seed=2), persistent=False)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.attribute = attribute
        self.add_module(attribute, nn.Linear(5, 3) if head is None else head)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return getattr(self, self.attribute)(self.body(x) * self.token + self.shift + self.cache)


class NetThatTells(Net):
    """As timm's models."""

    def get_classifier(self):
        return self.last


def assert_head_maps_features_to_logits(net, x):
    with torch.no_grad():
        features, logits = net(x)
    bias = getattr(net.head, "bias", None)
    torch.testing.assert_close(features @ net.head.weight.T + (0 if bias is None else bias), logits)
    return features, logits


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (Net(), "fc"),
        (Net(attribute="classifier"), "classifier"),
        (Net(attribute="head"), "head"),
        (Net(nn.Sequential(nn.Dropout(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "heads"), "heads.3"),
        (nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))), "1.1"),
        (nn.Sequential(nn.BatchNorm1d(6), Net()), "1.fc"),
        (NetThatTells(attribute="last"), "last"),
        (nn.Linear(6, 2, bias=False), ""),
    ],
    ids=["fc", "classifier", "head", "container", "nested Sequential", "model within", "told", "bare"],
)
def test_finds_the_head(model, head):
    model.eval()
    net = with_features(model)
    assert net.head is model.get_submodule(head)
    assert_head_maps_features_to_logits(net, normal(4, 6))


@pytest.mark.parametrize("by_name", [True, False])
def test_head_given_by_the_user(by_name):
    model = Net(attribute="prediction").eval()
    net = with_features(model, "prediction" if by_name else model.prediction)
    assert net.head is model.prediction
    features, _ = assert_head_maps_features_to_logits(net, normal(4, 6))
    assert features.shape == (4, 5)


# Families by their own classes where the named models are large.
TORCHVISION = {
    "fc": lambda models: models.resnet18(num_classes=7),
    "classifier": lambda models: models.densenet121(num_classes=7),
    "classifier.3": lambda models: models.mobilenet_v3_small(num_classes=7),
    "classifier.2": lambda models: models.ConvNeXt([models.convnext.CNBlockConfig(16, None, 2)], num_classes=7),
    "head": lambda models: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=7),
    "heads.head": lambda models: models.VisionTransformer(64, 16, 1, 2, 16, 32, num_classes=7),
}


@pytest.mark.parametrize("head", TORCHVISION)
def test_torchvision_models(head):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    model = TORCHVISION[head](models).eval()
    nn.init.normal_(model.get_submodule(head).weight)  # that of the ViT is zero at first
    net = with_features(model)
    assert net.head is model.get_submodule(head)
    assert list(net.state_dict()) == list(model.state_dict())
    features, logits = assert_head_maps_features_to_logits(net, normal(2, 3, 64, 64))
    assert features.dim() == 2
    assert logits.shape == (2, 7)
    assert logits.std() > 0


def test_torchvision_model_without_linear_layer():
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    with pytest.raises(ValueError, match="known classifier, got SqueezeNet"):
        with_features(models.squeezenet1_1(num_classes=7))


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext", "test_efficientnet"])
def test_timm_models(name):
    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.create_model(name, num_classes=7).eval()
    net = with_features(model)
    assert net.head is model.get_classifier()
    assert list(net.state_dict()) == list(model.state_dict())
    size = model.default_cfg["input_size"][-1]
    features, logits = assert_head_maps_features_to_logits(net, normal(2, 3, size, size))
    assert features.dim() == 2
    assert logits.shape == (2, 7)
    replace_head(model, lambda head: CosineLinear(head.in_features, 5))
    net = with_features(model)
    features, logits = net(normal(2, 3, size, size))
    assert type(net.head) is CosineLinear
    assert torch.equal(net.head(features), logits)


def test_timm_model_without_classifier():
    timm = pytest.importorskip("timm", reason="needs timm")
    with pytest.raises(ValueError, match="with head="):
        with_features(timm.create_model("test_efficientnet", num_classes=0))


def test_one_forward_pass_for_both():
    model = Net()
    net = with_features(model)
    net(normal(4, 6))
    assert model.passes == 1


def test_the_model_itself_still_returns_logits_and_nothing_is_kept():
    model = Net().eval()
    net = with_features(model)
    features, logits = net(normal(4, 6))
    assert torch.equal(model(normal(4, 6)), logits)
    kept = weakref.ref(features)
    del features, logits
    gc.collect()
    assert kept() is None


def test_gradient_of_both_outputs():
    model = Net().double().eval()
    x = normal(4, 6, dtype=torch.float64)
    features, logits = with_features(model)(x)
    (features.square().sum() + logits.pow(3).sum()).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    features = model.body(x) * model.token + model.shift + model.cache
    (features.square().sum() + model.fc(features).pow(3).sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


def test_names_are_those_of_the_model():
    model = Net()
    net = with_features(model)
    for listing in ("named_parameters", "named_buffers", "named_children"):
        assert list(getattr(net, listing)()) == list(getattr(model, listing)()), listing
    assert list(net.state_dict()) == list(model.state_dict())
    assert "cache" not in net.state_dict()
    assert net.state_dict()._metadata == model.state_dict()._metadata


@pytest.mark.parametrize("nest", ["itself", "submodule", "twice"])
def test_state_dicts_load_both_ways(nest):
    def wrap(module):
        if nest == "itself":
            return module
        module = nn.ModuleDict({"module": module})  # the prefix that DDP gives
        return module if nest == "submodule" else nn.ModuleList([nn.ReLU(), module])

    trained, fresh = Net(), Net()
    nn.init.normal_(trained.fc.weight)
    trained.body[1].running_mean.fill_(3.0)
    for source, target in ((wrap(trained), wrap(with_features(fresh))), (wrap(with_features(trained)), wrap(Net()))):
        state = copy.deepcopy(source.state_dict())
        before = list(state)
        target.load_state_dict(state)
        assert list(state) == before  # loading has changed nothing in it
        assert all(torch.equal(state[k], v) for k, v in target.state_dict().items())
    assert torch.equal(fresh.fc.weight, trained.fc.weight)
    assert fresh.body[1].running_mean[0] == 3


def test_loading_names_what_does_not_fit():
    net = with_features(Net())
    state = net.state_dict()
    state["other"] = state.pop("token")
    assert net.load_state_dict(state, strict=False) == (["token"], ["other"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "token"'):
        net.load_state_dict(state)


def test_mode_dtype_and_hooks_reach_the_model():
    model = Net()
    net = with_features(model)
    assert net.training
    net.eval()
    assert not any(m.training for m in (net, *model.modules()))
    net.train()
    assert all(m.training for m in (net, *model.modules()))
    net.double()
    assert model.token.dtype == model.shift.dtype == model.fc.weight.dtype == torch.float64
    model.half()
    assert net.head.weight.dtype == torch.float16
    assert not with_features(Net().eval()).training


class Particular(Net):
    """A model that does at its root what torch lets modules do."""

    _version = 3
    applied = 0

    def get_extra_state(self):
        return self.passes

    def set_extra_state(self, state):
        self.passes = state

    def _apply(self, fn, recurse=True):
        self.applied += 1
        return super()._apply(fn, recurse)


def test_methods_that_a_model_overrides_are_its_own():
    source, target = Particular(), Particular()
    source.passes = 5
    state = with_features(source).state_dict()
    assert state._metadata[""]["version"] == 3
    net = with_features(target)
    net.load_state_dict(state)
    assert target.passes == 5
    net.float()
    assert target.applied == 1


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_have_their_own_head(duplicate):
    net = with_features(Net().eval())
    x = normal(4, 6)
    features, logits = net(x)
    twin = duplicate(net)
    with torch.no_grad():
        twin.body[0].weight.zero_()
        twin.head.weight.zero_()
        twin.head.bias.fill_(5.0)
    twin_features, twin_logits = twin(x)
    assert twin.head is twin.fc
    assert bool((twin_logits == 5).all())
    assert_head_maps_features_to_logits(twin, x)
    assert not torch.equal(twin_features, features)
    for old, new in zip((features, logits), net(x), strict=True):
        assert torch.equal(old, new)
    # A copy of the wrapped model alone is a plain model.
    assert torch.equal(duplicate(net._model)(x), logits)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiles_into_one_graph(mode):
    torch.compiler.reset()
    net = with_features(Net())
    plain = copy.deepcopy(net)
    x = normal(4, 6)
    with mode():
        compiled, eager = torch.compile(net, fullgraph=True, backend="aot_eager")(x), plain(x)
    torch.testing.assert_close(compiled, eager)
    if mode is torch.enable_grad:
        for features, logits in (compiled, eager):
            (features.sum() + logits.square().sum()).backward()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exports(strict):
    net = with_features(Net().eval())
    x = normal(4, 6)
    exported = torch.export.export(net, (x,), strict=strict)
    assert set(exported.state_dict) == set(net.state_dict())
    torch.testing.assert_close(exported.module()(x), net(x))


def test_functional_call_replaces_parameters_of_the_root():
    net = with_features(Net().eval())
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    features, logits = torch.func.functional_call(net, zeros, (normal(4, 6),))
    torch.testing.assert_close(features, (net._model.shift + net._model.cache).expand(4, 5))
    assert bool((logits == 0).all())


def test_features_of_sequences_are_passed_as_they_are():
    net = with_features(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    features, logits = net(normal(2, 7, 6))
    assert features.shape == (2, 7, 5)
    assert torch.equal(net.head(features), logits)


class Twice(Net):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


def test_head_that_does_not_run_once():
    model = Twice()
    net = with_features(model)
    with pytest.raises(RuntimeError, match=r"expected the head \(fc\) to run once in a forward pass, got 2 runs"):
        net(normal(4, 6))
    assert model(normal(4, 6)).shape == (4, 3)
    model = Net()
    net = with_features(model)
    model.fc = nn.Linear(5, 3)
    with pytest.raises(RuntimeError, match="got 0 runs; if it was replaced, call with_features again"):
        net(normal(4, 6))
    features, logits = with_features(model)(normal(4, 6))
    assert torch.equal(model.fc(features), logits)


def test_a_forward_that_fails_leaves_the_wrapper_usable():
    net = with_features(Net())
    net._model.fc = nn.Sequential(net.head, nn.Linear(4, 3))  # fails after the head has run
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(normal(4, 6))
    assert net._recorder.inputs is None
    net._model.fc = net._model.fc[0]
    assert_head_maps_features_to_logits(net, normal(4, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: with_features(3), TypeError, "expected model as a torch.nn.Module, got int"),
        (lambda: with_features(nn.ReLU()), ValueError, "known classifier, got ReLU; name its last linear layer"),
        (lambda: with_features(nn.Sequential()), ValueError, "known classifier, got Sequential"),
        (lambda: with_features(Net(nn.Conv2d(5, 3, 1))), ValueError, "known classifier, got Net"),
        (lambda: with_features(Net(), "body.1"), ValueError, r"weight of shape \(C, D\), got BatchNorm1d with weight"),
        (lambda: with_features(Net(), "body"), ValueError, r"weight of shape \(C, D\), got Sequential"),
        (lambda: with_features(Net(), "fd"), ValueError, "a module of the Net or its dotted name, got 'fd'"),
        (lambda: with_features(Net(), nn.Linear(5, 3)), ValueError, "its dotted name, got another Linear"),
        (lambda: with_features(with_features(Net())), ValueError, "expected a plain model, got WithFeatures"),
    ],
)
def test_wrong_arguments_of_with_features(call, error, message):
    with pytest.raises(error, match=f"^with_features: .*{message}"):
        call()


# replace_head


def test_replace_head():
    model = Net().double().eval()
    old = model.fc
    new = replace_head(model, lambda head: CosineLinear(head.in_features, 9))
    assert model.fc is new
    assert new is not old
    assert new.weight.dtype == torch.float64
    features, logits = with_features(model)(normal(4, 6, dtype=torch.float64))
    assert torch.equal(new(features), logits)
    assert logits.shape == (4, 9)


def test_replace_head_within_a_container():
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3)))
    replace_head(model, lambda head: nn.Linear(head.in_features, 2))
    assert model(normal(4, 6)).shape == (4, 2)
    replace_head(model, lambda head: nn.Linear(head.in_features, 8), head="1.1")
    assert model(normal(4, 6)).shape == (4, 8)


@pytest.mark.parametrize(
    ("model", "make", "message"),
    [
        (Net(), lambda head: nn.Linear(4, 3), "make to return a head for 5 features, got Linear with weight"),
        (Net(), lambda head: None, "make to return a head for 5 features, got NoneType"),
        (nn.Linear(3, 2), lambda head: nn.Linear(3, 2), "a model that contains its head, got a bare Linear"),
        (nn.ReLU(), lambda head: head, "known classifier, got ReLU"),
    ],
)
def test_wrong_arguments_of_replace_head(model, make, message):
    with pytest.raises(ValueError, match=f"^replace_head: .*{message}"):
        replace_head(model, make)


# Several processes


def feature_loss(features, logits, weight, target):
    """Uses everything that a feature loss does: a sum, so that parts of a batch add up."""
    centre = weight[target]
    return F.cross_entropy(logits, target, reduction="sum") + (features - centre).square().sum()


def _rank(rank, world):
    torch.manual_seed(rank)  # DDP must make the weights equal
    model = small_model()
    with pytest.raises(ValueError, match="expected a plain model, got DistributedDataParallel"):
        with_features(DistributedDataParallel(model))
    net = DistributedDataParallel(with_features(model))
    x, target = normal(10, 6, dtype=torch.float64), torch.arange(10) % 3
    part = slice(rank, None, world)
    features, logits = net(x[part])
    loss = feature_loss(features, logits, net.module.head.weight, target[part])
    (loss * world).backward()  # DDP averages
    state = {name: p.detach() for name, p in model.named_parameters()}
    return list(net.state_dict()), state, {name: p.grad for name, p in model.named_parameters()}


def small_model():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.slow
def test_gradients_of_processes_equal_one(tmp_path):
    (names, state, gradients), other = run_processes(_rank, 2, tmp_path, 2)
    model = small_model()
    assert names == [f"module.{name}" for name in model.state_dict()]
    model.load_state_dict(state)
    x, target = normal(10, 6, dtype=torch.float64), torch.arange(10) % 3
    features, logits = with_features(model)(x)
    feature_loss(features, logits, model[2].weight, target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
        assert torch.equal(other[2][name], gradients[name])
