"""The runs of all seeds and losses, each from its beginning or its newest checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from classfair.training.batches import Data, resource_errors
from classfair.training.config import TrainConfig
from classfair.training.distributed import Processes
from classfair.training.engine import Run
from classfair.training.run_folder import RunFolder
from classfair.training.run_types import run_type
from classfair.training.saved import check_same_images, newest_checkpoint
from classfair.training.sources import load_data
from classfair.training.totals import Epoch, RunResult


def run_all(
    config: TrainConfig,
    folder: RunFolder | None,
    on_epoch: Callable[[Epoch], None],
    device: torch.device,
    processes: Processes,
    resume: Path | None = None,
) -> list[RunResult]:
    """Train every loss with every seed. Only the main process has a folder; all read ``resume``."""
    results = []
    with _own_random_state(device), resource_errors():
        for seed in range(config.seed, config.seed + config.seeds):
            data = load_data(config, seed)
            if folder is not None and data.images is not None:
                folder.keep_images(data.images)
            for loss in config.loss:
                # One run at a time: models of two would take twice the memory.
                results.append(fit(prepare(loss, seed, data, config, device, processes, resume), folder, on_epoch))
    return results


def prepare(
    loss: str,
    seed: int,
    data: Data,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
    resume: Path | None,
) -> Run:
    """A new run, or one that stands where its newest checkpoint does."""
    state = None if resume is None else newest_checkpoint(resume, loss, seed)
    new = run_type(config)
    if resume is None or state is None:
        return new(loss, seed, data, config, device, processes)
    check_same_images(data.images, state, resume)
    # What the checkpoint replaces need not be there any more.
    run = new(loss, seed, data, replace(config, weights="", effective_frequency=""), device, processes)
    run.config = config
    run.load_state_dict(state)
    return run


def fit(run: Run, folder: RunFolder | None, on_epoch: Callable[[Epoch], None]) -> RunResult:
    """Train until the last epoch, with a checkpoint every ``save_every`` epochs and at the end."""
    name = f"{run.loss}-seed{run.seed}"
    if folder is not None:
        classes, finished = len(run.data.class_names), run.epoch == run.config.total_epochs
        folder.begin(name, run.epoch, classes, run.group_names, finished=finished)
    while run.epoch < run.config.total_epochs:
        now = run.next_epoch()
        last = run.epoch == run.config.total_epochs
        if folder is not None:
            folder.log(name, now)
            if last or run.epoch % run.config.save_every == 0:
                if run.meta is not None:
                    run.meta.write(folder, name, run.epoch)
                folder.write_checkpoint(name, run.state_dict(), last=last)
        on_epoch(now)
    return run.result()


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
