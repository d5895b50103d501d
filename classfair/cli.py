"""The ``classfair`` command. Only ``train`` needs the extra dependencies, imported when it runs."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields, make_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from classfair import _names
from classfair._names import printable, say
from classfair._usage import first_section

if TYPE_CHECKING:
    from classfair.training import Epoch, Processes, RunFolder, TrainConfig

OK, FAILURE, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

HELP = """\
usage: classfair [-h] [--version] {train,tune,doctor} ...

Class-fair losses and statistics for image classifiers.

commands:
  train       train a classifier with one or several losses, write a run folder
  tune        search for good options of a training job
  doctor      show versions and back-ends, and check that they compute correctly

options:
  -h, --help  show this help message and exit
  --version   show the version and exit

"classfair COMMAND --help" explains the flags of a command.
"""

TRAIN_DESCRIPTION = """\
Train a classifier, once per loss and seed, and compare how well it does on
frequent and on rare classes. Without flags: a small one on long-tailed digits,
which needs no download and no GPU and takes well under a minute. With --data
imagefolder:DIR: a torchvision or timm model on your images; the defaults below
change with it (add --help to see them). Under torchrun all processes train
together. It writes a run folder: configuration, metrics, per-class statistics
of every epoch, a chart and checkpoints to --resume from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: failure. 2: wrong usage. 3: something is missing on this machine. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else None
    if command is None:
        print(HELP, end="", file=sys.stderr)
        return USAGE
    if command in ("-h", "--help"):
        print(HELP, end="")
        return OK
    if command == "--version":
        from classfair import __version__

        print(f"classfair {__version__}")
        return OK
    if command == "train":
        return train(arguments[1:])
    if command == "tune":
        return tune(arguments[1:])
    if command == "doctor":
        from classfair.doctor import main as doctor_main

        return doctor_main(arguments[1:])
    print(f"classfair: expected a command (train, tune, doctor), got {printable(command)}", file=sys.stderr)
    return USAGE


def entry() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the encoding of a terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before there is anything to keep
        sys.exit(INTERRUPTED)


def train(argv: Sequence[str]) -> int:
    """``classfair train``: parse, check everything that can be checked, train, report."""
    if missing := _missing(_TRAIN_EXTRA, find_spec):
        return _needs("train", missing)
    from classfair import training

    try:
        options = _parse(argv)
    except SystemExit as stop:  # --help, or wrong usage that has been reported
        return stop.code if isinstance(stop.code, int) else USAGE
    except ValueError as error:
        return _fail(error, USAGE)
    try:
        names = [f.name for f in fields(training.TrainConfig)]
        config = training.TrainConfig(**{name: getattr(options, name) for name in names})
        extra, modules = ("vision", _VISION_EXTRA) if config.needs_torchvision else ("train", _TRAIN_EXTRA)
        if missing := _missing(modules, import_module):
            return _needs(extra, missing)
        device = training.resolve_device(config.device)
        if options.resume and options.output:
            raise ValueError("expected output to be left out with resume, which goes on in its own folder")
    except training.DeviceUnavailableError as error:
        return _fail(error, ENVIRONMENT)
    except ValueError as error:
        return _fail(error, USAGE)
    with training.joined(device) as processes, training.interruption.noted():
        code = _train(options, config, device, processes)
        if code != OK:
            processes.leave(code)
    processes.leave(code)
    return code


def tune(argv: Sequence[str]) -> int:
    """``classfair tune``."""
    if missing := _missing(_TUNE_EXTRA, find_spec):
        return _needs("tune", missing)
    from classfair.training.tune_command import run

    with _names.speaking_as("tune"):
        return run(argv)


def _train(options: Any, config: TrainConfig, device: Any, processes: Processes) -> int:
    """The job of one process among all that train together; only the main one writes and prints."""
    from classfair import training

    resume = Path(options.resume) if options.resume else None
    folder = None
    try:
        if resume is not None:
            training.check_resumable(config, training.saved_config(resume), processes.world)
        if processes.is_main:
            path = resume or Path(options.output or _default_output(config))
            training.check_output(config, path)
            folder = training.RunFolder(path, resume=resume is not None, unique=not (resume or options.output))
    except (OSError, ValueError) as error:
        return _fail(error, USAGE)
    try:
        with _progress(config, shown=processes.is_main and not options.no_progress) as on_epoch:
            job: Any = training.sweep if config.fairness_sweep else training.train
            results = job(config, folder, on_epoch, device=device, processes=processes, resume=resume)
        if folder is not None:
            show: Any = training.print_sweep if config.fairness_sweep else training.print_results
            show(results, config, folder.path, as_json=options.json)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail(_interrupted(folder, config.runs), INTERRUPTED)
    except training.MissingPackageError as error:
        return _fail(error, ENVIRONMENT)
    except ValueError as error:
        return _fail(error, USAGE)
    except (FloatingPointError, OSError, training.BadImageError, training.ResourceError) as error:
        return _fail(error, FAILURE)
    return OK


def _interrupted(folder: RunFolder | None, runs: int) -> str:
    if folder is None or not folder.has_checkpoint:
        return "interrupted; kept nothing"
    kept = f"kept {len(folder.finished)} of {runs} finished runs in {folder.path}"
    return f"interrupted; {kept}; go on with --resume {folder.path}"


def _fail(message: object, code: int) -> int:
    say(message)
    return code


_TRAIN_EXTRA = {"tyro": "tyro", "rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
_TUNE_EXTRA = {**_TRAIN_EXTRA, "optuna": "optuna"}
_VISION_EXTRA = {**_TRAIN_EXTRA, "torchvision": "torchvision"}


def _missing(modules: dict[str, str], find: Callable[[str], object]) -> list[str]:
    """Packages that are not there: ``find_spec`` looks for them, ``import_module`` knows, and takes seconds."""
    missing = []
    for module, package in modules.items():
        try:
            found = find(module)
        except ImportError:
            found = None
        if found is None:
            missing.append(package)
    return missing


def _needs(extra: str, missing: list[str]) -> int:
    needs = f'needs the "{extra}" extra: pip install "classfair[{extra}]"'
    return _fail(f"{needs} (missing: {', '.join(missing)})", ENVIRONMENT)


def _default_output(config: TrainConfig) -> str:
    return time.strftime(f"runs/{Path(config.place).stem if config.reads_images else config.kind}-%Y%m%d-%H%M%S")


def _value_of(flag: str, argv: Sequence[str]) -> str:
    """What a flag is set to, looked up before parsing because the defaults of the others depend on it."""
    for i, argument in enumerate(argv):
        if argument == flag and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return ""


def _options_type(defaults: dict[str, Any], more: Sequence[Any]) -> type:
    """TrainConfig with these defaults plus what only the command line needs, annotated for tyro."""
    import tyro

    from classfair.training import TrainConfig

    hints = get_type_hints(TrainConfig)
    options: list[Any] = []
    for f in fields(TrainConfig):
        arg = tyro.conf.arg(help=f.metadata["help"], **f.metadata["cli"])
        options.append((f.name, Annotated[hints[f.name], arg], field(default=defaults[f.name])))
    output = tyro.conf.arg(
        help="Run folder to write, new or empty.",
        metavar="DIR",
        help_behavior_hint="(default: runs/digits-YYYYmmdd-HHMMSS)",
    )
    resume = tyro.conf.arg(
        help="Run folder of an interrupted job to finish; its options are the defaults.",
        metavar="DIR",
        help_behavior_hint="(default: none)",
    )
    json_flag = tyro.conf.arg(help="Print the summary as JSON instead of a table.")
    quiet = tyro.conf.arg(help="Show no progress bar.")
    options += [
        ("output", Annotated[str, output], field(default="")),
        ("resume", Annotated[str, resume], field(default="")),
        ("json", Annotated[bool, json_flag], field(default=False)),
        ("no_progress", Annotated[bool, quiet], field(default=False)),
    ]
    return make_dataclass("TrainOptions", [*options, *more])


def _parse(argv: Sequence[str], description: str = TRAIN_DESCRIPTION, more: Sequence[Any] = ()) -> Any:
    """The options, with the fields ``more``; SystemExit after --help, or after one line about what is wrong."""
    import tyro

    from classfair import training

    resume = _value_of("--resume", argv)
    data = _value_of("--data", argv)
    if not data and _value_of("--fairness", argv) not in ("", "none"):
        data = "digits-groups"
    defaults = training.saved_config(Path(resume)) if resume else training.defaults(data)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                _options_type(defaults, more),
                args=argv,
                prog=f"classfair {_names.command}",
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code not in (0, None):
            _fail(first_section(box.getvalue()), USAGE)
        raise


@contextlib.contextmanager
def _progress(config: TrainConfig, *, shown: bool) -> Iterator[Any]:
    """A progress bar over all epochs of all runs, on stderr; yields its ``on_epoch``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from classfair import metrics

    columns = (  # 80 characters in all
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("starting", total=config.total_epochs * config.runs)

        def on_epoch(now: Epoch) -> None:
            accuracy = now.val.accuracy
            balanced = metrics.balanced_accuracy(accuracy)
            worst = metrics.worst_class_accuracy(accuracy)
            text = f"{now.loss} seed {now.seed} loss {now.train.mean_loss:.3f} "
            bar.update(task, advance=1, description=text + f"balanced {balanced:.1%} worst {worst:.1%}")

        yield on_epoch
