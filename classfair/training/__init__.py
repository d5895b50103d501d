"""The embedded training job behind ``classfair train``; needs the extra ``classfair[train]``."""

from __future__ import annotations

from collections.abc import Callable

from classfair.training.engine import (
    COLUMNS,
    DeviceUnavailableError,
    Epoch,
    RunResult,
    TrainConfig,
    resolve_device,
    run_all,
    summarise,
)
from classfair.training.run_folder import RunFolder, json_ready, resolved_config

__all__ = [
    "COLUMNS",
    "DeviceUnavailableError",
    "Epoch",
    "RunFolder",
    "RunResult",
    "TrainConfig",
    "json_ready",
    "resolve_device",
    "summarise",
    "train",
]


def train(config: TrainConfig, folder: RunFolder, on_epoch: Callable[[Epoch], None]) -> list[RunResult]:
    """Train every loss with every seed and fill the folder; returns the results."""
    results = []
    with folder:
        folder.write_json("config.json", resolved_config(config, folder.path))
        for result, checkpoint in run_all(config, on_epoch):
            folder.write_checkpoint(checkpoint)
            results.append(result)
        folder.write_report(results, config)
    return results
