"""Models by name: the embedded multi-layer perceptron, torchvision's and timm's."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classfair.nn import CosineLinear, EstimatedOffsetLinear, ETFLinear, replace_head
from classfair.training.batches import Draw, derived_seed
from classfair.training.config import TrainConfig
from classfair.training.weights import fit_weights, load_weights

#: Inputs and hidden layers of the multi-layer perceptron, by data set.
WIDTHS = {"mnist-lt": (784, 100, 100, 100), "mnist-colour": (3 * 784, 100, 100, 100)}
DIGITS_WIDTHS = (64, 64, 32)


class MissingPackageError(RuntimeError):
    """A model's package is not installed, or weights or data cannot be had."""


def build_model(config: TrainConfig, num_classes: int, seed: int, loss: str = "ce") -> nn.Module:
    """The model with ``num_classes`` logits, initialised from the seed, with the head that the loss is made for."""
    if config.model == "mlp":
        model: nn.Module = mlp(
            (*WIDTHS.get(config.kind, DIGITS_WIDTHS), num_classes), torch.Generator().manual_seed(seed)
        )
    else:
        torch.manual_seed(seed)
        arguments, pretrained = _arguments(config), config.weights == "pretrained"
        try:
            model = _by_name(config.model, num_classes, arguments, pretrained)
            _check_logits(model, config, num_classes)
        except (TypeError, AssertionError, RuntimeError) as error:
            if isinstance(error, MissingPackageError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"expected a model for images of {config.img_size} pixels, got {reason}") from None
    if loss == "ldam":
        torch.manual_seed(derived_seed(Draw.HEAD, seed))
        replace_head(model, lambda head: CosineLinear(head.in_features, num_classes, config.cosine_scale))
    if loss == "estimated-offset":
        replace_head(model, lambda head: _estimated_offset(head, config))
    if config.head == "etf":
        replace_head(model, lambda head: _etf(head.in_features, num_classes, derived_seed(Draw.HEAD, seed)))
    if config.weights and config.weights != "pretrained":
        load_weights(model, Path(config.weights))
    return model


def _etf(features: int, num_classes: int, seed: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(features), ETFLinear(features, num_classes, seed % 2**63))


@torch.no_grad()
def _estimated_offset(head: nn.Linear, config: TrainConfig) -> EstimatedOffsetLinear:
    """With the weights of the head in whose place it comes: runs of all losses begin with the same."""
    new = EstimatedOffsetLinear(head.in_features, head.out_features, config.offset == "estimated")
    new.weight.copy_(head.weight)
    return new


@torch.no_grad()
def _check_logits(model: nn.Module, config: TrainConfig, num_classes: int) -> None:
    """What the model returns in evaluation and in training, before hours of loading images for it."""
    images = torch.zeros(min(2, config.batch_size), 3, config.img_size, config.img_size)  # as few as a pass may have
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for training in (False, True):
        try:
            logits = model.train(training)(images)
        except ValueError as error:
            if training and len(images) == 1:
                raise RuntimeError("one image, too few for its batch norm: batch_size must be 2 or more") from None
            raise RuntimeError(str(error)) from None
        if not isinstance(logits, Tensor):
            when, hint = ("in training", "; try --model-kwargs aux_logits=False") if training else ("in evaluation", "")
            raise RuntimeError(f"{type(logits).__name__} instead of logits {when}{hint}")
        if logits.shape != (len(images), num_classes):
            raise RuntimeError(
                f"logits of shape {tuple(logits.shape)} for {len(images)} images of {num_classes} classes"
            )
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _by_name(name: str, num_classes: int, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    plain = name.removeprefix("timm:")
    if plain == name:
        import torchvision

        if name in torchvision.models.list_models(module=torchvision.models):
            make = torchvision.models.get_model
            model = make(name, weights=None, num_classes=num_classes, **arguments)
            if pretrained:  # through torchvision's own model, which knows the old names in its files
                fit_weights(model, _download(make, name, weights="DEFAULT").state_dict(), "torchvision's weights")
            return model
    try:
        import timm
    except ImportError:
        raise MissingPackageError(f'model {name} needs timm: pip install "classfair[vision]"') from None
    if not timm.is_model(plain.split(".")[0]):
        raise ValueError(f"expected model to be a name that torchvision or timm knows, got {name}")
    if pretrained:
        return _download(timm.create_model, plain, pretrained=True, num_classes=num_classes, **arguments)
    return timm.create_model(plain, num_classes=num_classes, **arguments)


def _download(function: Any, *arguments: Any, **keywords: Any) -> Any:
    try:
        return function(*arguments, **keywords)
    except Exception as error:  # every hub fails in its own ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingPackageError(f"pretrained weights cannot be had ({reason}); --weights PATH takes a file") from None


def _arguments(config: TrainConfig) -> dict[str, Any]:
    """``img_size=64`` as a keyword argument; what is no Python literal is a string."""
    result: dict[str, Any] = {}
    for item in config.model_kwargs:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"expected model_kwargs as NAME=VALUE, got {item}")
        try:
            result[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[name] = text
    return result


def mlp(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them, initialised from ``generator``.

    The distribution is that of ``nn.Linear``: uniform in +-1/sqrt(inputs). The draw leaves the
    global random state alone: a model depends on its own seed and on nothing that ran before.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        _uniform(linear.weight, inputs, generator)
        _uniform(linear.bias, inputs, generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # the last layer gives logits


def _uniform(parameter: Tensor, inputs: int, generator: torch.Generator) -> None:
    bound = inputs**-0.5
    nn.init.uniform_(parameter, -bound, bound, generator=generator)
