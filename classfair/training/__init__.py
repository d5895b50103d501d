"""The training job behind ``classfair train``; needs the extra ``classfair[train]``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from classfair.training import interruption
from classfair.training.batches import ResourceError
from classfair.training.class_folders import check_output
from classfair.training.config import TrainConfig, defaults
from classfair.training.distributed import SINGLE, Processes, joined
from classfair.training.engine import DeviceUnavailableError, resolve_device
from classfair.training.group_measures import GROUP_COLUMNS
from classfair.training.image_folder import BadImageError
from classfair.training.jobs import run_all
from classfair.training.models import MissingPackageError
from classfair.training.report import resolved_config, write_report
from classfair.training.run_folder import CONFIG, RunFolder, json_ready
from classfair.training.saved import check_resumable, saved_config
from classfair.training.schema import CheckpointError
from classfair.training.sweep import sweep
from classfair.training.tables import print_results, print_sweep
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
    "ResourceError",
    "RunFolder",
    "RunResult",
    "TrainConfig",
    "check_output",
    "check_resumable",
    "defaults",
    "interruption",
    "joined",
    "json_ready",
    "print_results",
    "print_sweep",
    "resolve_device",
    "saved_config",
    "summarise",
    "sweep",
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
