"""What a run folder holds, read back: options, list of images, checkpoints."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from classfair._names import say
from classfair.training.config import CHANGEABLE, TrainConfig, defaults
from classfair.training.image_list import SIDES, ImageList, changes, paths_of
from classfair.training.report import CONFIG_VERSION
from classfair.training.run_folder import (
    CHECKPOINT_VERSION,
    CONFIG,
    IMAGES,
    IMAGES_VERSION,
    checkpoint_files,
)
from classfair.training.schema import CheckpointError, Number, check, check_regular, read_json, schema_of, short
from classfair.training.totals import Totals


def saved_config(path: Path) -> dict[str, Any]:
    """The options of the job in a run folder, and its number of processes as ``processes``."""
    file = path / CONFIG
    if not file.exists():
        raise CheckpointError(f"expected a run folder to resume, got {path}, which has no {CONFIG}")
    content = read_json(file, {"data": str}, CONFIG_VERSION)
    known = {"processes": 1, **defaults(content["data"])}  # options that came later had their defaults
    saved = {name: value for name, value in content.items() if name in known}
    options = _options(saved, str(file))
    processes = options.pop("processes", 1)
    if processes < 1:
        raise CheckpointError(f"expected processes of at least 1 in {file}, got {processes}")
    try:
        TrainConfig(**{**defaults(content["data"]), **options})
    except ValueError as error:
        raise CheckpointError(f"{error} in {file}") from None
    return {**known, **options, "processes": processes}


def _options(saved: dict[str, Any], where: str) -> dict[str, Any]:
    """Options of the right types, tuples and floats again."""
    hints = {**get_type_hints(TrainConfig), "processes": int}
    check(saved, {name: _schema(hints[name]) for name in saved}, where)
    return {name: _restored(value, hints[name]) for name, value in saved.items()}


def _schema(hint: Any) -> Any:
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return [_schema(kinds[0])] if Ellipsis in kinds else tuple(map(_schema, kinds))
    return Number if hint is float else hint


def _restored(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item, get_args(hint)[0]) for item in value)
    return float(value) if hint is float else value


def check_resumable(config: TrainConfig, saved: dict[str, Any], world: int) -> None:
    """CheckpointError where a job would go on as another one."""
    _check_same_options(config, saved, "the run folder")
    old_step = saved["processes"] * saved["batch_size"] * saved["grad_accum"]
    new_step = world * config.batch_size * config.grad_accum
    of_a_pass = config.fairness != "none" or config.method == "lff"
    if of_a_pass and config.grad_accum != saved["grad_accum"]:
        raise CheckpointError(
            f"expected grad_accum {saved['grad_accum']}: a penalty is of the images of a pass, got {config.grad_accum}"
        )
    if old_step != new_step:
        raise CheckpointError(
            f"expected processes * batch_size * grad_accum to stay {old_step}, the images of a step, got {new_step}"
        )


def _check_same_options(config: TrainConfig, saved: dict[str, Any], where: str) -> None:
    now = config.as_dict()
    for name, value in saved.items():
        new, old = (tuple(v) if isinstance(v, list) else v for v in (now.get(name), value))
        if name not in (*CHANGEABLE, "processes") and new != old:
            raise CheckpointError(f"expected {name} {old} as in {where}, got {new}")


def newest_checkpoint(path: Path, loss: str, seed: int) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, None if there is none; CheckpointError for one of another version."""
    name = f"{loss}-seed{seed}"
    files = [file for file in checkpoint_files(path, name) if file.exists()]
    for file in files:
        state = _read_checkpoint(file)
        if state is None:
            say(f"{file} is damaged")
            continue
        version = state.get("format_version")
        if type(version) is not int or version != CHECKPOINT_VERSION:
            age = "a newer" if isinstance(version, int) and version > CHECKPOINT_VERSION else "an older"
            raise CheckpointError(
                f"expected a checkpoint of format {CHECKPOINT_VERSION}, got {file} of format {short(version)}, which"
                f" {age} classfair wrote"
            )
        if (state.get("loss"), state.get("seed")) != (loss, seed):
            raise CheckpointError(f"expected a checkpoint of {name}, got {file} of another run")
        return state
    if files:
        raise CheckpointError(f"expected a whole checkpoint of {name} in {path}, got damaged ones only")
    return None


def _read_checkpoint(file: Path) -> dict[str, Any] | None:
    try:
        check_regular(file)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load checks no checksum
        state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch.load fails in many ways on what is no checkpoint, and refuses pickled code
        return None
    return state if isinstance(state, dict) else None


def check_state(
    state: dict[str, Any], config: TrainConfig, like: dict[str, Any], totals: dict[str, Totals], stage_start: int = 0
) -> None:
    """CheckpointError unless a checkpoint has the types, shapes and numbers that a run would write there.

    Args:
        state: content of the checkpoint.
        config: the options of the job.
        like: model, optimizer and the like of the run, which have a ``state_dict``.
        totals: of training and validation images, as the run makes them.
        stage_start: epochs done when the optimizer and its schedule began.
    """
    where = "the checkpoint"
    parts = {name: schema_of(part.state_dict()) for name, part in like.items()}
    parts |= {"model": {str: Tensor}, "criterion": {str: object}}  # which load_state_dict compares
    parts["optimizer"]["state"] = {int: {str: object}}
    tables = {side: schema_of(empty.state_dict()) for side, empty in totals.items()}
    check(
        state,
        {
            "epoch": int,
            "config": {"data": str, "epochs": int, "loss": [str]},
            "class_names": [str],
            "train_loss": [Number],
            **tables,
            **parts,
        },
        where,
    )
    _check_same_options(config, _options(_known(state["config"]), where), where)
    epoch, epochs = state["epoch"], config.total_epochs
    if not 1 <= epoch <= epochs:
        raise CheckpointError(f"expected epoch from 1 to {epochs} in {where}, got {epoch}")
    done = state["lr_schedule"]["last_epoch"] + stage_start
    if len(state["train_loss"]) != epoch or done != epoch:
        raise CheckpointError(
            f"expected {epoch} epochs in all of {where}, got {len(state['train_loss'])} losses and a schedule at {done}"
        )
    for side in tables:
        count, correct, _ = state[side]["counts"]
        if (state[side]["counts"] < 0).any() or (correct > count).any():
            raise CheckpointError(f"expected counts of images as {side} of {where}, got impossible ones")
    _check_optimizer(like["optimizer"], state["optimizer"], where)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name in get_type_hints(TrainConfig)}


def _check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], where: str) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, buffers in state["state"].items():
        if not 0 <= i < len(parameters):
            raise CheckpointError(f"expected {len(parameters)} parameters in the optimizer of {where}, got number {i}")
        for name, value in buffers.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameters[i].shape:
                raise CheckpointError(
                    f"expected {name} of {tuple(parameters[i].shape)} in the optimizer of {where}, got {short(value)}"
                )


def check_same_images(images: ImageList | None, state: dict[str, Any], folder: Path) -> None:
    """CheckpointError that names what was added, removed or moved since the checkpoint was written."""
    if images is None:
        return
    check(state, {"images": dict.fromkeys(SIDES, str)}, "the checkpoint")
    if state["images"] == images.digests:
        return
    try:
        saved = read_json(folder / IMAGES, {"folders": {str: [str]}}, IMAGES_VERSION)
        what = changes(paths_of(saved["folders"]), images.paths)
    except CheckpointError as error:
        what = f"others: {error}"
    what = what or "the same ones on other sides (another version of scikit-learn splits them)"
    raise CheckpointError(f"expected the images that the job in {folder} began with, got {what}")
