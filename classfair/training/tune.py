"""``classfair tune``: options of a training job searched for with optuna, in a study that can be gone on with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classfair.training.batches import Draw, derived_seed
from classfair.training.config import TrainConfig
from classfair.training.distributed import SINGLE
from classfair.training.jobs import run_all
from classfair.training.report import resolved_config
from classfair.training.run_folder import CONFIG, RunFolder
from classfair.training.schema import CheckpointError
from classfair.training.totals import Epoch, RunResult

JOURNAL, TRIALS, BEST, NAME = "study.journal", "trials.csv", "best.json", "classfair"
BEST_VERSION = 1
#: Columns of the closing table by objective, and whether less is better.
OBJECTIVES = {
    "worst_class": ("worst_class", False),
    "geometric_mean": ("geometric_mean", False),
    "balanced": ("all", False),
    "iou_sd": ("iou_sd", True),
}
#: What is searched for: option, who uses it, range, and whether its logarithm is uniform.
SPACE: tuple[tuple[str, Callable[[TrainConfig], bool], float, float, bool], ...] = (
    ("fairness_weight", lambda config: config.fairness != "none", 0.1, 1000.0, True),
    ("tau", lambda config: "la" in config.loss, 0.0, 2.0, False),
    ("strength", lambda config: "isda" in config.loss, 0.1, 30.0, True),
    ("meta_lr", lambda config: config.meta_per_class > 0, 1.0, 100.0, True),
    ("stage2_tau", lambda config: config.stage2 == "tau-norm", 0.0, 2.0, False),
)
STARTUP = 5  # trials before any is stopped


class StudyError(ValueError):
    """A study that cannot be made or gone on with."""


def space(config: TrainConfig) -> list[tuple[str, float, float, bool]]:
    """Options of this configuration that there is something to search for in."""
    return [(name, low, high, log) for name, used, low, high, log in SPACE if used(config)]


def check(config: TrainConfig, objective: str, trials: int) -> None:
    """StudyError unless there is something to search for."""
    if objective not in OBJECTIVES:
        raise StudyError(f"expected objective to be one of {', '.join(OBJECTIVES)}, got {objective}")
    if trials < 1:
        raise StudyError(f"expected trials of at least 1, got {trials}")
    if len(config.loss) != 1 or config.fairness_sweep:
        raise StudyError(f"expected one loss and no fairness_sweep to tune, got {' '.join(config.loss)}")
    if objective == "iou_sd" and not config.has_groups:
        raise StudyError("expected objective iou_sd with groups, got data without")
    if not space(config):
        used = "la (tau), isda (strength), fairness (fairness_weight), meta_per_class (meta_lr) or stage2 tau-norm"
        raise StudyError(f"expected something to tune: {used}, got {config.loss[0]} alone")


def tune(
    config: TrainConfig,
    folder: RunFolder,
    *,
    objective: str,
    trials: int,
    device: torch.device,
    on_trial: Callable[[Any], None] = lambda trial: None,
) -> dict[str, Any]:
    """Search until the study has so many finished trials; returns the content of best.json.

    A trial trains with every seed; its value is the mean of the objective on validation images after the last epoch.
    One that is worse than the median of those before at the same epoch of the same seed is stopped. What is suggested
    follows from the finished trials alone, so that an interrupted study ends as an uninterrupted one does.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with folder, _study(config, folder, objective) as study:
        while len(done := _finished(study)) < trials:
            seed = derived_seed(Draw.TRIAL, config.seed, len(done)) % 2**32
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = study.ask()
            try:
                value = _value(config, trial, objective, device)
                study.tell(trial, value)
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except BaseException:  # an interrupt too
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            folder.has_checkpoint = True
            folder.write(TRIALS, _table(study, config).encode())
            on_trial(study.trials[-1])
        result = _best(study, config, objective)
        folder.write_json(BEST, result)
    return result


@contextmanager
def _study(config: TrainConfig, folder: RunFolder, objective: str) -> Iterator[Any]:
    """The study in the folder, or a new one."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = folder.path / JOURNAL
    new = not journal.exists()
    if new:
        folder.write_json(CONFIG, {**resolved_config(config, folder.path, 1), "objective": objective})
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    less = OBJECTIVES[objective][1]
    pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=config.total_epochs // 5)
    study = optuna.create_study(
        storage=storage,
        study_name=NAME,
        direction="minimize" if less else "maximize",
        pruner=pruner,
        load_if_exists=True,
    )
    if new:
        study.set_user_attr("objective", objective)
    if (before := study.user_attrs.get("objective")) != objective:
        raise CheckpointError(f"expected objective {before} as in the study, got {objective}")
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):  # of a killed process
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    yield study


def _value(config: TrainConfig, trial: Any, objective: str, device: torch.device) -> float:
    """Train with the options that are suggested; TrialPruned where they are bad."""
    import optuna

    chosen = {name: trial.suggest_float(name, low, high, log=log) for name, low, high, log in space(config)}
    steps = 0

    def on_epoch(now: Epoch) -> None:
        nonlocal steps
        steps += 1
        count = np.zeros(len(now.val.count), dtype=np.int64)  # of training images: only shots ask for it
        so_far = RunResult(now.loss, now.seed, [], count, now.train, now.val, [], now.groups)
        value = so_far.columns(config)[OBJECTIVES[objective][0]]
        trial.report(value, steps)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        results = run_all(replace(config, **chosen), None, on_epoch, device, SINGLE)
    except FloatingPointError:  # of options under which training diverges: bad ones, not an error of the job
        raise optuna.TrialPruned from None
    value = float(np.mean([result.columns(config)[OBJECTIVES[objective][0]] for result in results]))
    if math.isnan(value):
        raise optuna.TrialPruned
    return value


def _finished(study: Any) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _table(study: Any, config: TrainConfig) -> str:
    text, names = io.StringIO(), [name for name, *_ in space(config)]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", "value", *names])
    for number, trial in enumerate(_finished(study)):
        value = "" if trial.state.name == "PRUNED" else trial.value
        rows.writerow([number, trial.state.name.lower(), value, *(trial.params.get(name, "") for name in names)])
    return text.getvalue()


def _best(study: Any, config: TrainConfig, objective: str) -> dict[str, Any]:
    done = _finished(study)
    complete = [trial for trial in done if trial.state.name == "COMPLETE"]
    if not complete:
        raise FloatingPointError("expected a trial that ends with a finite objective, got none: try a smaller lr")
    sign = 1 if OBJECTIVES[objective][1] else -1
    best = min(complete, key=lambda trial: sign * trial.value)
    flags = " ".join(f"--{name.replace('_', '-')} {value:.6g}" for name, value in best.params.items())
    return {
        "format_version": BEST_VERSION,
        "objective": objective,
        "value": best.value,
        "options": best.params,
        "flags": flags,
        "trials": len(done),
        "pruned": len(done) - len(complete),
        "loss": config.loss[0],
    }


def check_same_study(path: Path) -> None:
    """CheckpointError for a folder without a study."""
    if not (path / JOURNAL).is_file():
        raise CheckpointError(f"expected a folder of classfair tune to resume, got {path}, which has no {JOURNAL}")
