"""The ``classfair`` command. Only ``train`` needs the extra dependencies, imported when it runs."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if TYPE_CHECKING:
    from classfair.training import Epoch, RunResult, TrainConfig

OK, FAILURE, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

HELP = """\
usage: classfair [-h] [--version] {train,doctor} ...

Class-fair losses and statistics for image classifiers.

commands:
  train       train on long-tailed digits, compare the losses, write a run folder
  doctor      show versions and back-ends, and check that they compute correctly

options:
  -h, --help  show this help message and exit
  --version   show the version and exit

"classfair COMMAND --help" explains the flags of a command.
"""

TRAIN_DESCRIPTION = """\
Train a small classifier on long-tailed digits, once per loss and seed, and
compare how well it does on frequent and on rare classes. It needs no download
and no GPU and takes well under a minute. It writes a run folder: configuration,
metrics, per-class accuracies, a chart and checkpoints.
"""

HEADINGS = {
    "many": "many",
    "medium": "medium",
    "few": "few",
    "all": "all",
    "geometric_mean": "geo. mean",
    "worst_class": "worst",
}


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
    if command == "doctor":
        from classfair.doctor import main as doctor_main

        return doctor_main(arguments[1:])
    print(f"classfair: expected a command (train, doctor), got {command}", file=sys.stderr)
    return USAGE


def entry() -> None:
    """The console script."""
    sys.exit(main())


def train(argv: Sequence[str]) -> int:
    """``classfair train``: parse, check everything that can be checked, train, report."""
    if missing := _missing_extras():
        needs = 'needs the "train" extra: pip install "classfair[train]"'
        return _fail(f"{needs} (missing: {', '.join(missing)})", ENVIRONMENT)
    from classfair import training

    try:
        options = _parse(argv)
    except SystemExit as stop:  # --help, or wrong usage that has been reported
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        names = [f.name for f in fields(training.TrainConfig)]
        config = training.TrainConfig(**{name: getattr(options, name) for name in names})
        training.resolve_device(config.device)
        folder = training.RunFolder(Path(options.output or _default_output(config)))
    except training.DeviceUnavailableError as error:
        return _fail(error, ENVIRONMENT)
    except (ValueError, OSError) as error:
        return _fail(error, USAGE)
    try:
        with _progress(config, shown=not options.no_progress) as on_epoch:
            results = training.train(config, folder, on_epoch)
    except KeyboardInterrupt:
        runs = len(config.loss) * config.seeds
        kept = f"{len(folder.checkpoints)} of {runs} checkpoints in {folder.path}"
        return _fail(f"interrupted; kept {kept if folder.checkpoints else 'nothing'}", INTERRUPTED)
    except (FloatingPointError, OSError) as error:
        return _fail(error, FAILURE)
    _print_results(results, config, folder.path, as_json=options.json)
    return OK


def _fail(message: object, code: int) -> int:
    print(f"classfair train: {message}", file=sys.stderr)
    return code


def _missing_extras() -> list[str]:
    missing = []
    for module, package in {
        "tyro": "tyro",
        "rich": "rich",
        "sklearn": "scikit-learn",
        "matplotlib": "matplotlib",
    }.items():
        try:
            import_module(module)
        except ImportError:
            missing.append(package)
    return missing


def _default_output(config: TrainConfig) -> str:
    return time.strftime(f"runs/{config.data}-%Y%m%d-%H%M%S")


def _options_type() -> type:
    """TrainConfig plus what only the command line needs, annotated for tyro."""
    import tyro

    from classfair.training import TrainConfig

    hints = get_type_hints(TrainConfig)
    options: list[Any] = []
    for f in fields(TrainConfig):
        arg = tyro.conf.arg(**f.metadata)
        options.append((f.name, Annotated[hints[f.name], arg], field(default=f.default)))
    output = tyro.conf.arg(
        help="Run folder to write, new or empty.",
        metavar="DIR",
        help_behavior_hint="(default: runs/digits-YYYYmmdd-HHMMSS)",
    )
    json_flag = tyro.conf.arg(help="Print the summary as JSON instead of a table.")
    quiet = tyro.conf.arg(help="Show no progress bar.")
    options += [
        ("output", Annotated[str, output], field(default="")),
        ("json", Annotated[bool, json_flag], field(default=False)),
        ("no_progress", Annotated[bool, quiet], field(default=False)),
    ]
    return make_dataclass("TrainOptions", options)


def _parse(argv: Sequence[str]) -> Any:
    """The options; SystemExit after --help, or after one line about what is wrong."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                _options_type(),
                args=argv,
                prog="classfair train",
                description=TRAIN_DESCRIPTION,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code not in (0, None):
            _fail(_first_section(box.getvalue()), USAGE)
        raise


def _first_section(box: str) -> str:
    """tyro frames its errors and adds advice below a rule: keep the message, as one line."""
    lines: list[str] = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if lines and set(text) <= {"─"}:
            break
        if text and "─" not in text:
            lines.append(text)
    return f"{' '.join(lines)} (see classfair train --help)"


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
        task = bar.add_task("starting", total=config.epochs * config.seeds * len(config.loss))

        def on_epoch(now: Epoch) -> None:
            accuracy = metrics.per_class_accuracy(now.correct, now.test_count)
            balanced = metrics.balanced_accuracy(accuracy)
            worst = metrics.worst_class_accuracy(accuracy)
            text = f"{now.loss} seed {now.seed} loss {now.train_loss:.3f} "
            bar.update(task, advance=1, description=text + f"balanced {balanced:.1%} worst {worst:.1%}")

        yield on_epoch


def _print_results(results: list[RunResult], config: TrainConfig, path: Path, *, as_json: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from classfair import training

    summary = training.summarise(results, config)
    if as_json:
        print(json.dumps(training.json_ready(summary), indent=2, allow_nan=False))
        return
    spread = f"mean ± sd over {config.seeds} seeds" if config.seeds > 1 else "1 seed"
    table = Table(
        title=f"Test accuracy in %, {spread}",
        caption="ce: cross-entropy, la: logit adjustment. many: classes with more than "
        f"{config.many_shot} training images, few: fewer than {config.few_shot}. "
        "all: mean of all classes.",
        box=SIMPLE_HEAD,
    )
    table.add_column("loss")
    for column in training.COLUMNS:
        table.add_column(HEADINGS[column], justify="right", no_wrap=True)
    for loss in config.loss:
        table.add_row(loss, *(_cell(**summary[loss][column]) for column in training.COLUMNS))
    console = Console()
    console.print(table)
    console.print(f"Run folder: {path}", soft_wrap=True, highlight=False, markup=False)


def _cell(mean: float, sd: float) -> str:
    if mean != mean:  # nan: a group without classes
        return "\N{EN DASH}"
    return f"{100 * mean:.1f}" + (f"±{100 * sd:.1f}" if sd == sd else "")
