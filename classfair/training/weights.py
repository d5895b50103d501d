"""Initial weights from files: of this package, torchvision's and timm's scripts, DDP, torch.compile and Lightning."""

from __future__ import annotations

import argparse
import math
import pathlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classfair._names import say_once
from classfair.nn.features import _find_head
from classfair.training.schema import CheckpointError, check_regular

State = dict[str, Tensor]

#: Where checkpoints keep the weights, by the training script that wrote them.
ENTRIES = ("model", "state_dict", "model_state_dict")
#: What wrappers put before names: DDP, torch.compile, a LightningModule with its network as ``model``.
PREFIXES = ("module.", "_orig_mod.", "model.")
#: Auxiliary classifiers of torchvision's Inception and GoogLeNet, which a model may be made without.
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
AUXILIARY_HEADS = ("AuxLogits.fc", "aux1.fc2", "aux2.fc2")
POSITIONS = "encoder.pos_embedding"  # of torchvision's ViT: (1, 1 + positions, D)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file with a state dict, bare or in a checkpoint; ValueError where more than the head differs."""
    content = _read(path)
    for key in ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not (isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise ValueError(f"expected a state dict in {path}, got something else")
    fit_weights(model, _peeled(content, set(model.state_dict())), str(path))


def _read(path: Path) -> Any:
    try:
        check_regular(path)
        with torch.serialization.safe_globals(_safe_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"expected weights in a readable file, got {path} ({error.strerror})") from None
    except CheckpointError:
        raise
    except Exception as error:  # torch.load fails in many ways on what is no checkpoint, and refuses pickled code
        needs = re.search(r"GLOBAL (\S+)", str(error))
        why = f", which needs {needs[1]} and" if needs else ", which"
        raise ValueError(
            f"expected weights in a file of plain tensors, got {path}{why} is not safe to load as such"
        ) from None


def _safe_types() -> list[Any]:
    """What training scripts put beside weights and cannot run code: options, paths, NumPy's numbers and arrays."""
    scalar, reconstruct = (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0])
    types: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, pathlib.PosixPath, pathlib.PurePosixPath]
    types += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    for package in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
        types += [(scalar, f"{package}.multiarray.scalar"), (reconstruct, f"{package}.multiarray._reconstruct")]
    for package in ("lightning.fabric", "lightning_fabric", "pytorch_lightning"):
        types.append((_Options, f"{package}.utilities.data.AttributeDict"))
    return types


class _Options(dict[str, Any]):
    """In the place of Lightning's hyperparameters."""


def _peeled(state: State, own: set[str], depth: int = 3) -> State:
    """Without the prefixes of wrappers: as many names as possible are the model's own."""
    state = {name.replace("._orig_mod.", "."): value for name, value in state.items()}
    variants = [state]
    for prefix in PREFIXES if depth else ():
        inner = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        if inner:
            variants.append(_peeled(inner, own, depth - 1))
    return max(variants, key=lambda variant: len(own & variant.keys()))


def fit_weights(model: nn.Module, state: State, source: str) -> None:
    """Load everything but a head of another kind, resized as timm does; ValueError that names what else differs."""
    given = state
    own = model.state_dict()
    if not any(name.startswith(AUXILIARY) for name in own):
        state = {name: value for name, value in state.items() if not name.startswith(AUXILIARY)}
    state = _adapted_stem(model, _resized(model, state, source))
    new = _new_heads(model, own, state)
    state = {name: value for name, value in state.items() if not _within(name, new)}
    for name in sorted(own.keys() | state.keys()):
        if not _within(name, new):
            _check_tensor(name, own, state, source)
    model.load_state_dict(state, strict=False)
    stays = [name for name in own if _within(name, new)]
    resized = [name for name in state if name in given and given[name].shape != state[name].shape]
    parts = {"new, not from it": stays, "resized": resized}
    if said := "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names):
        say_once(f"weights {source}: {said}")


def _check_tensor(name: str, own: State, state: State, source: str) -> None:
    if name not in state:
        if name.endswith("num_batches_tracked"):  # old files lack it, and torch does without
            return
        why = f"lacks {name}"
    elif name not in own:
        why = f"has {name} besides"
    elif own[name].shape != state[name].shape:
        why = f"has {name} of {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
    else:
        return
    raise ValueError(f"expected weights of the same architecture, got {source}, which {why}")


def _heads(model: nn.Module) -> list[str]:
    """Dotted names of the classifiers."""
    head = _find_head(model)
    found = [name for name, module in model.named_modules() if module is head]
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()  # timm's
    return [*found, *((named,) if isinstance(named, str) else named), *AUXILIARY_HEADS]


def _new_heads(model: nn.Module, own: State, state: State) -> list[str]:
    """Those of which a tensor has another shape, or is in one of both only."""
    shapes = [{name: value.shape for name, value in part.items()} for part in (own, state)]
    differ = {name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)}
    return [head for head in _heads(model) if any(_within(name, [head]) for name in differ)]


def _within(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _resized(model: nn.Module, state: State, source: str) -> State:
    """Position embeddings of another image size, and whatever else timm converts for the architecture."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        if type(model).__module__.startswith("timm.") and convert is not None:
            return convert(dict(state), model)
        wanted = model.state_dict().get(POSITIONS)
        if wanted is None or POSITIONS not in state or state[POSITIONS].shape == wanted.shape:
            return state
        from timm.layers.pos_embed import resample_abs_pos_embed

        side = math.isqrt(wanted.shape[1] - 1)
        return {**state, POSITIONS: resample_abs_pos_embed(state[POSITIONS], [side, side])}
    except Exception as error:  # of shapes and names that are those of another architecture
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected weights of the same architecture, got {source}, which timm cannot convert ({reason})"
        ) from None


def _adapted_stem(model: nn.Module, state: State) -> State:
    """The first convolution for another number of channels, as timm does: repeated, and scaled to the same sum."""
    name = next((f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    if name not in state or state[name].dim() != 4:
        return state
    wanted, weight = model.get_parameter(name), state[name]
    (out, channels, *kernel), (given_out, given, *given_kernel) = wanted.shape, weight.shape
    if (out, kernel) != (given_out, given_kernel) or channels == given or not given:
        return state
    repeated = weight.float().repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)
    return {**state, name: repeated.to(weight.dtype)}
