"""Features beside logits from one forward pass of any model, and another classifier in the place of its own."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

#: Where torchvision's and timm's models keep their classifier, or the container that it ends.
_HEAD_NAMES = ("fc", "classifier", "head", "heads")


class WithFeatures(nn.Module):
    """What :func:`with_features` returns."""

    _model: nn.Module

    def __init__(self, model: nn.Module, head_name: str) -> None:
        super().__init__()
        # The wrapper holds the model's own dictionaries, not the model as a submodule: parameters keep their names
        # for state dicts, parameter groups, DDP and export, and a module that is replaced is replaced in both.
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[name] = model.__dict__[name]
        self.__dict__["_model"] = model
        self.training = model.training
        self._head_name = head_name
        self._recorder = _Recorder()
        self.head.register_forward_pre_hook(self._recorder)

    @property
    def head(self) -> nn.Module:
        """The classifier, e.g. for ``net.head.weight`` ``(C, D)``."""
        return self._model.get_submodule(self._head_name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Features ``(N, D)`` and what the model returns, e.g. logits ``(N, C)``."""
        inputs: list[Tensor] = []
        self._recorder.inputs = inputs
        try:
            logits = self._model(*args, **kwargs)
        finally:
            self._recorder.inputs = None
        if len(inputs) != 1:
            raise RuntimeError(
                f"with_features: expected the head ({self._head_name or 'the model itself'}) to run once in a forward"
                f" pass, got {len(inputs)} runs; if it was replaced, call with_features again"
            )
        return inputs[0], logits

    # What torch applies to the root of a model has to reach the model, which is no submodule.

    def train(self, mode: bool = True) -> "WithFeatures":
        self._model.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WithFeatures":
        self._model._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._model._load_from_state_dict(*args)


class _Recorder:
    """Hook of the head that keeps its inputs while a wrapper runs the model; an object, so that copies have their own.

    Outside of that (the model called directly, a recomputation in backward) nothing is kept.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.inputs is not None:
            self.inputs.append(args[0])


def with_features(model: nn.Module, head: nn.Module | str | None = None) -> WithFeatures:
    """A module that returns ``(features, logits)`` from one forward pass of ``model``.

    Wrap this module in DistributedDataParallel or torch.compile, and call only what came out: calling parts of a DDP
    model by oneself silently leaves gradients unsynchronised. ``model`` itself still returns its logits; both share
    all parameters and buffers.

    Args:
        model: any model that runs one classifier once. Found are the classifiers of timm (``get_classifier()``) and
            torchvision (``fc``, ``classifier``, ``head`` or ``heads``: a linear layer, or a container that ends with
            one), an ``nn.Sequential`` that ends with a linear layer, and a linear layer itself.
        head: the classifier, a module with ``weight`` ``(C, D)``, or its dotted name: for all other models.

    Returns:
        A module with the arguments of ``model``. Features are the input of the classifier, ``(N, D)`` as a rule, after
        any dropout; logits are what the model returns. ``.head`` is the classifier. Its parameters, buffers and state
        dict have the names of the model's.

    Gradients: through both outputs, as if the model returned them.

    Raises:
        ValueError: no classifier found, or ``head`` is none of this model, or ``model`` is wrapped already.
        RuntimeError: in a forward pass in which the classifier does not run exactly once.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.ReLU(),
        ...                             torch.nn.Linear(4, 3))
        >>> net = classfair.nn.with_features(model)
        >>> features, logits = net(torch.randn(2, 3, 2, 2))
        >>> features.shape, torch.allclose(net.head(features), logits)
        (torch.Size([2, 4]), True)
    """
    return WithFeatures(model, _head_name("with_features", model, head))


def replace_head(model: nn.Module, make: Callable[[Any], nn.Module], head: nn.Module | str | None = None) -> nn.Module:
    """Replace the classifier of a model in place, before :func:`with_features` and before an optimizer sees it.

    Args:
        model: see :func:`with_features`; not a bare classifier.
        make: receives the present classifier and returns the new one, on any device, or a container that ends with it.
        head: see :func:`with_features`.

    Returns:
        The new classifier, moved to the device and dtype of the old one.

    Raises:
        ValueError: as :func:`with_features`; the new classifier takes another number of features.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> classfair.nn.replace_head(model, lambda head: classfair.nn.CosineLinear(head.in_features, 3))
        CosineLinear(in_features=12, out_features=3, scale=30.0)
    """
    function = "replace_head"
    name = _head_name(function, model, head)
    if not name:
        raise ValueError(f"{function}: expected a model that contains its head, got a bare {type(model).__name__}")
    old = model.get_submodule(name)
    new, dim = make(old), _weight_shape(old)[1]
    if (found := _find_head(new)) is None or _weight_shape(found)[1] != dim:
        raise ValueError(f"{function}: expected make to return a head for {dim} features, got {_description(new)}")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.to(cast(Tensor, old.weight)))
    return new


def _head_name(function: str, model: Any, head: nn.Module | str | None) -> str:
    """Dotted name of the classifier in the model; empty if it is the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected model as a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if isinstance(model, WithFeatures | nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{function}: expected a plain model, got {kind}; the order is DistributedDataParallel(with_features(...))"
        )
    modules = dict(model.named_modules())
    found = modules.get(head) if isinstance(head, str) else head
    if head is None:
        found = _find_head(model)
        if found is None:
            raise ValueError(
                f"{function}: expected a model with a known classifier, got {kind}; name its last linear layer with"
                " head=, a module of the model or its dotted name"
            )
    for name, module in modules.items():
        if module is found:
            if not _is_head(module):
                raise ValueError(f"{function}: expected head with a weight of shape (C, D), got {_description(module)}")
            return name
    got = repr(head) if isinstance(head, str) else f"another {type(found).__name__}"
    raise ValueError(f"{function}: expected head as a module of the {kind} or its dotted name, got {got}")


def _find_head(model: Any) -> nn.Module | None:
    """The classifier of a model whose way to name it is known."""
    if not isinstance(model, nn.Module):
        return None
    if _is_head(model):
        return model
    if isinstance(model, nn.Sequential):
        return _find_head(model[-1]) if len(model) else None
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        return _find_head(get_classifier())
    for name in _HEAD_NAMES:
        found = _find_head(getattr(model, name, None))
        if found is not None:
            return found
    return None


def _is_head(module: Any) -> bool:
    return isinstance(module, nn.Module) and len(_weight_shape(module)) == 2


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _description(module: Any) -> str:
    shape = _weight_shape(module) if isinstance(module, nn.Module) else ()
    return type(module).__name__ + (f" with weight {shape}" if shape else "")
