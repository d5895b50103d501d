"""The training job behind ``classfair train``; needs the extra ``classfair[train]``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from classfair.training import interruption
from classfair.training.config import CHANGEABLE, TrainConfig, defaults
from classfair.training.distributed import SINGLE, Processes, joined
from classfair.training.engine import DeviceUnavailableError, resolve_device, run_all
from classfair.training.group_measures import GROUP_COLUMNS
from classfair.training.image_folder import BadImageError
from classfair.training.models import MissingPackageError
from classfair.training.report import CONFIG_VERSION, resolved_config, write_report
from classfair.training.run_folder import CONFIG, CheckpointError, RunFolder, json_ready
from classfair.training.tables import print_results
from classfair.training.totals import COLUMNS, Epoch, RunResult, summarise

__all__ = [
    "COLUMNS",
    "GROUP_COLUMNS",
    "BadImageError",
    "CheckpointError",
    "DeviceUnavailableError",
    "Epoch",
    "MissingPackageError",
    "Processes",
    "RunFolder",
    "RunResult",
    "TrainConfig",
    "check_resumable",
    "defaults",
    "interruption",
    "joined",
    "json_ready",
    "print_results",
    "resolve_device",
    "saved_config",
    "summarise",
    "train",
]


def train(
    config: TrainConfig,
    folder: RunFolder | None,
    on_epoch: Callable[[Epoch], None],
    *,
    device: torch.device | None = None,
    processes: Processes = SINGLE,
    resume: Path | None = None,
) -> list[RunResult]:
    """Train every loss with every seed and fill the folder; returns the results.

    Args:
        config: what to train.
        folder: where to leave configuration, checkpoints and reports; None on all but the main process.
        on_epoch: called after every epoch.
        device: where to compute; None: what ``config.device`` names.
        processes: this process among all, see :func:`joined`.
        resume: run folder whose checkpoints to go on from.
    """
    device = device or resolve_device(config.device)
    if folder is None:
        return run_all(config, None, on_epoch, device, processes, resume)
    with folder:
        if resume is None:
            folder.write_json(CONFIG, resolved_config(config, folder.path, processes.world))
        results = run_all(config, folder, on_epoch, device, processes, resume)
        write_report(folder, results, config)
    return results


def saved_config(path: Path) -> dict[str, Any]:
    """The options of the job in a run folder, and its number of processes as ``processes``."""
    try:
        content = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a run folder to resume, got {path} ({error})") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != CONFIG_VERSION or not isinstance(content.get("data"), str):
        raise CheckpointError(f"expected {path / CONFIG} of format {CONFIG_VERSION}, got {version}")
    known = {"processes": 1, **defaults(content["data"])}  # options that came later had their defaults
    saved = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items() if name in known}
    return {**known, **saved}


def check_resumable(config: TrainConfig, saved: dict[str, Any], world: int) -> None:
    """CheckpointError where a job would go on as another one."""
    now = {**config.as_dict(), "processes": world}
    for name, value in saved.items():
        new = tuple(now[name]) if isinstance(now[name], list) else now[name]
        if name not in (*CHANGEABLE, "processes") and new != value:
            raise CheckpointError(f"expected {name} {value} as in the run folder, got {new}")
    old_step = saved["processes"] * saved["batch_size"] * saved["grad_accum"]
    new_step = world * config.batch_size * config.grad_accum
    if config.fairness != "none" and config.grad_accum != saved["grad_accum"]:
        raise CheckpointError(
            f"expected grad_accum {saved['grad_accum']}: a penalty is of the images of a pass, got {config.grad_accum}"
        )
    if old_step != new_step:
        raise CheckpointError(
            f"expected processes * batch_size * grad_accum to stay {old_step}, the images of a step, got {new_step}"
        )
