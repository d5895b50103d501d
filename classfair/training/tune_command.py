"""The command ``classfair tune``: flags, progress, what it prints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import field, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from classfair import cli
from classfair._names import printable, say
from classfair.training import interruption, tune
from classfair.training.batches import ResourceError
from classfair.training.class_folders import check_output
from classfair.training.config import TrainConfig
from classfair.training.engine import DeviceUnavailableError, resolve_device
from classfair.training.image_folder import BadImageError
from classfair.training.models import MissingPackageError
from classfair.training.run_folder import RunFolder
from classfair.training.saved import check_resumable, saved_config

DESCRIPTION = """\
Search for good options of a training job: of --fairness its weight, of la tau, of
isda strength, of --meta-per-class its --meta-lr, of --stage2 tau-norm its tau. All
flags of "classfair train" say what is trained. The objective is measured on validation images after the last epoch, as
the mean over the seeds; report on other images. Bad trials are stopped early. The
folder holds the study, which --resume goes on with, trials.csv and best.json.
"""


def run(argv: Sequence[str]) -> int:
    """Parse, check, search, print; returns the exit code of :func:`classfair.cli.main`."""
    try:
        options = cli._parse(argv, DESCRIPTION, _more())
        config = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)})
        if config.needs_torchvision and (missing := cli._missing(cli._VISION_EXTRA, import_module)):
            return cli._needs("vision", missing)
        device = resolve_device(config.device)
        tune.check(config, options.objective, options.trials)
        folder = _folder(options, config)
    except SystemExit as stop:  # --help, or wrong usage that has been reported
        return stop.code if isinstance(stop.code, int) else cli.USAGE
    except DeviceUnavailableError as error:
        return cli._fail(error, cli.ENVIRONMENT)
    except (OSError, ValueError) as error:
        return cli._fail(error, cli.USAGE)
    try:
        what: dict[str, Any] = {"objective": options.objective, "trials": options.trials, "device": device}
        with interruption.noted():
            result = tune.tune(config, folder, **what, on_trial=lambda trial: _show(trial, options))
    except KeyboardInterrupt:
        kept = f"go on with classfair tune --resume {folder.path}" if folder.has_checkpoint else "kept nothing"
        return cli._fail(f"interrupted; {kept}", cli.INTERRUPTED)
    except MissingPackageError as error:
        return cli._fail(error, cli.ENVIRONMENT)
    except ValueError as error:
        return cli._fail(error, cli.USAGE)
    except (FloatingPointError, OSError, BadImageError, ResourceError) as error:
        return cli._fail(error, cli.FAILURE)
    _print(result, folder.path, as_json=options.json)
    return cli.OK


def _more() -> list[Any]:
    """Flags that only tune has."""
    import tyro

    names = "{" + ",".join(tune.OBJECTIVES) + "}"
    objective = tyro.conf.arg(help="What is best: accuracy (highest), or the spread of IoU (lowest).", metavar=names)
    trials = tyro.conf.arg(help="Finished trials after which the study ends, stopped ones among them.")
    return [
        ("objective", Annotated[str, objective], field(default="worst_class")),
        ("trials", Annotated[int, trials], field(default=30)),
    ]


def _folder(options: Any, config: TrainConfig) -> RunFolder:
    """A new folder, or that of a study of the same job."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("expected one process to tune, got several: trials of a study follow each other")
    if not options.resume:
        path = Path(options.output or time.strftime("runs/tune-%Y%m%d-%H%M%S"))
        check_output(config, path)
        return RunFolder(path, unique=not options.output)
    if options.output:
        raise ValueError("expected output to be left out with resume, which goes on in its own folder")
    path = Path(options.resume)
    tune.check_same_study(path)
    check_resumable(config, saved_config(path), 1)
    return RunFolder(path, resume=True)


def _show(trial: Any, options: Any) -> None:
    if not options.no_progress:
        chosen = ", ".join(f"{name} {value:.4g}" for name, value in trial.params.items())
        outcome = "stopped" if trial.state.name == "PRUNED" else f"{options.objective} {trial.value:.4f}"
        say(f"{chosen}: {outcome}")


def _print(result: dict[str, Any], path: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    print(f"Best {result['objective']} of {result['trials']} trials, {result['pruned']} of them stopped early:")
    print(f"  {result['value']:.4f} with {result['flags']}")
    print(f"Run folder: {printable(path)}")
