"""The ``classfair`` command from end to end."""

import ast
import csv
import errno
import json
import os
import subprocess
import sys
import types
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from classfair import __version__, training
from classfair._usage import first_section
from classfair.cli import main
from classfair.training import TrainConfig, jobs

TINY = ["train", "--epochs", "2", "--seeds", "2", "--no-progress"]
EXTRAS = ("tyro", "rich", "sklearn", "matplotlib")


def run(*extra):
    return main([*TINY, *map(str, extra)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "runs" / "tiny"
    assert run("--output", path) == 0
    return path


@pytest.fixture
def no_extras(monkeypatch):
    for module in EXTRAS:
        monkeypatch.setitem(sys.modules, module, None)


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("classfair")
    assert "Traceback" not in captured.err
    return captured.err


def test_run_folder_is_complete(tiny):
    files = {str(path.relative_to(tiny)) for path in tiny.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{loss}-seed{seed}.pt" for loss in ("ce", "la") for seed in (0, 1)}
    statistics = {f"statistics/{loss}-seed{seed}.csv" for loss in ("ce", "la") for seed in (0, 1)}
    reports = {"config.json", "metrics.json", "per_class.csv", "per_class_accuracy.png"}
    board = {name for name in files if name.startswith("tensorboard/")}
    assert files - board == reports | checkpoints | statistics
    assert len(board) == (1 if find_spec("tensorboard") else 0)


def test_config(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert config["epochs"] == 2
    assert config["loss"] == ["ce", "la"]
    assert config["lr"] == 0.1
    assert config["output"] == str(tiny)
    assert config["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "classfair"} <= set(config["versions"])


def test_metrics_agree_with_the_per_class_table(tiny):
    metrics = json.loads((tiny / "metrics.json").read_text())
    with (tiny / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 10
    assert [(r["loss"], r["seed"]) for r in metrics["runs"]] == [
        ("ce", 0),
        ("la", 0),
        ("ce", 1),
        ("la", 1),
    ]
    for record in metrics["runs"]:
        mine = [r for r in rows if (r["loss"], int(r["seed"])) == (record["loss"], record["seed"])]
        assert [int(r["class"]) for r in mine] == list(range(10))
        accuracy = [int(r["correct"]) / int(r["test_count"]) for r in mine]
        assert accuracy == [float(r["accuracy"]) for r in mine] == record["accuracy"]
        assert record["all"] == pytest.approx(sum(accuracy) / 10)
        assert record["worst_class"] == min(accuracy)
        few = [a for a, r in zip(accuracy, mine, strict=True) if int(r["train_count"]) < 5]
        assert record["few"] == pytest.approx(sum(few) / 3)
        assert len(record["train_loss"]) == 2
        assert sum(int(r["train_count"]) for r in mine) == 231
    both = [record["few"] for record in metrics["runs"] if record["loss"] == "ce"]
    assert metrics["summary"]["ce"]["few"]["mean"] == pytest.approx(sum(both) / 2)


def test_chart_is_a_png_with_something_on_it(tiny):
    from matplotlib.image import imread

    chart = tiny / "per_class_accuracy.png"
    assert chart.read_bytes().startswith(b"\x89PNG\r\n")
    image = imread(chart)
    assert image.shape[:2] == (720, 1200)
    assert len({tuple(pixel) for pixel in image.reshape(-1, image.shape[2])[::7]}) > 20


def test_checkpoint_loads_safely(tiny):
    checkpoint = torch.load(tiny / "checkpoints" / "la-seed1.pt", weights_only=True)
    assert checkpoint["format_version"] == 4
    assert checkpoint["epoch"] == checkpoint["config"]["epochs"] == 2
    assert checkpoint["model"]["0.weight"].shape == (64, 64)
    assert checkpoint["criterion"]["offset"].shape == (10,)
    assert checkpoint["optimizer"]["param_groups"]


def test_same_command_gives_the_same_metrics(tiny, tmp_path):
    assert run("--output", tmp_path) == 0  # an empty folder is welcome
    for name in ("metrics.json", "per_class.csv"):
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()


def test_table_and_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--few-shot", 0, "--loss", "la") == 0
    output = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-20")
    assert f"runs/{folder.name}" in output
    header, row = (next(x for x in output.splitlines() if x.startswith(s)) for s in ("  loss", "  la"))
    assert header.split() == ["loss", "many", "medium", "few", "all", "geo.", "mean", "worst"]
    cells = row.split()
    assert cells[3] == "\N{EN DASH}"  # no class has fewer than 0 images
    assert all("±" in cell for cell in (*cells[1:3], *cells[4:]))
    assert json.loads((folder / "metrics.json").read_text())["summary"]["la"]["few"]["mean"] is None


def test_json_and_short_flags(tmp_path, capsys):
    flags = ["-b", "32", "--wd", "0", "--json", "--seeds", "1", "--output", str(tmp_path / "run")]
    assert main([*TINY, *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary) == {"ce", "la"}
    assert 0 <= summary["ce"]["all"]["mean"] <= 1
    assert summary["ce"]["all"]["sd"] is None  # one seed has no spread
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["batch_size"], config["weight_decay"]) == (32, 0)


@pytest.mark.slow
def test_compiled_training_is_the_same_up_to_rounding(tiny, tmp_path):
    assert run("--compile", "--output", tmp_path) == 0
    a, b = (json.loads((path / "metrics.json").read_text())["runs"] for path in (tiny, tmp_path))
    for mine, theirs in zip(a, b, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_progress_goes_to_stderr(tmp_path, capsys):
    assert main(["train", "--epochs", "1", "--seeds", "1", "--json", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    for part in ("100%", "ETA", "la seed 0", "loss", "balanced", "worst"):
        assert part in captured.err


def test_help_explains_every_flag(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in ("data", "loss", "tau", "epochs", "batch-size", "lr", "momentum", "weight-decay"):
        assert f"--{name} " in text
    for name in ("seed", "seeds", "imbalance", "many-shot", "few-shot", "device", "output"):
        assert f"--{name} " in text
    assert text.count("(default: ") == len(fields(TrainConfig)) + 4
    assert "-b INT" in text
    assert "--wd FLOAT" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "classfair train: expected epochs of at least 1, got 0"),
        (["--lr", "0"], "classfair train: expected lr greater than 0, got 0.0"),
        (["--imbalance", "500"], "classfair train: expected imbalance from 1 to 80"),
        (["--loss", "ce", "mse"], "classfair train: expected loss to be one or several of ce, la"),
        (["--seeds", "0"], "classfair train: expected seeds of at least 1, got 0"),
        (["--device", "toaster"], "classfair train: expected device to be auto, cpu"),
        (["--epochs", "many"], "many"),
        (["--nonsense"], "--nonsense"),
        (["--lr"], "--lr"),
    ],
)
def test_bad_usage_is_one_line(flags, message, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "--no-progress", "--output", str(output), *flags]) == 2
    assert message in one_line(capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    "box",
    [
        "\x1b[31m╭─\x1b[0m Missing ─╮\n│ Missing value for '--lr'. │\n│ ───── │\n│ For full helptext │\n╰──────╯\n",
        "Missing\n-------\nMissing value for '--lr'.\n-------\nFor full helptext\n",
        "Missing value for '--lr'.\n",
    ],
)
def test_the_message_of_the_parser_alone(box):
    assert first_section(box) == "Missing value for '--lr'. (see classfair train --help)"


def test_folder_with_files_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "fit", None)  # training would fail
    (tmp_path / "precious.txt").write_text("mine")
    assert run("--output", tmp_path) == 2
    assert "expected a new or empty output folder" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("name", ["file", "file/run", "file/deeper/run", "x" * 300, "new/" + "x" * 300])
def test_unwritable_folder_is_refused_before_training(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "fit", None)
    (tmp_path / "file").write_text("mine")
    assert run("--output", tmp_path / name) == 2
    assert "expected a writable output folder" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def stop_at_run(number, error, monkeypatch):
    fit, calls = jobs.fit, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return fit(*args)

    monkeypatch.setattr(jobs, "fit", stopping)


def test_interruption_keeps_finished_runs(tmp_path, capsys, monkeypatch):
    stop_at_run(3, KeyboardInterrupt(), monkeypatch)
    assert run("--output", tmp_path / "run") == 130
    assert "interrupted; kept 2 of 4 finished runs in" in one_line(capsys)
    kept = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    kept = {name for name in kept if "tfevents" not in name}
    assert kept == {"config.json", "ce-seed0.pt", "la-seed0.pt", "ce-seed0.csv", "la-seed0.csv"}


def test_interruption_of_the_first_run_leaves_nothing(tmp_path, capsys, monkeypatch):
    stop_at_run(1, KeyboardInterrupt(), monkeypatch)
    assert run("--output", tmp_path / "deep" / "run") == 130
    assert "interrupted; kept nothing" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_a_failure_that_leaves_nothing(tmp_path, capsys):
    assert run("--lr", "1e30", "--output", tmp_path / "run") == 1
    assert "expected finite ce loss, got" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_failure_that_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    assert run("--output", tmp_path / "run") == 1
    assert "No space left on device" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_missing_device_is_an_environment_problem(tmp_path, capsys):
    assert run("--device", "cuda:99", "--output", tmp_path / "run") == 3
    assert "expected a device of this machine, got cuda:99" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_missing_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert run("--output", tmp_path / "run") == 3
    assert one_line(capsys) == (
        'classfair train: needs the "train" extra: pip install "classfair[train]" (missing: tyro)\n'
    )
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("--output", tmp_path / "run") == 3
    assert "(missing: tyro, scikit-learn)" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_extras")
def test_the_command_itself_needs_no_extra(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"classfair {__version__}\n"
    assert main([]) == 2
    assert "usage: classfair" in capsys.readouterr().err
    assert main(["dance"]) == 2
    assert "got dance" in one_line(capsys)


@pytest.mark.usefixtures("no_extras")
def test_doctor_gets_its_arguments(monkeypatch):
    doctor = types.ModuleType("classfair.doctor")
    doctor.main = len
    monkeypatch.setitem(sys.modules, "classfair.doctor", doctor)
    assert main(["doctor", "--json", "-v"]) == 2


def test_python_m_imports_no_extra():
    command = [sys.executable, "-X", "importtime", "-m", "classfair", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == f"classfair {__version__}\n"
    loaded = {line.rsplit("|", 1)[-1].strip() for line in process.stderr.splitlines()}
    assert not loaded & set(EXTRAS)


#: What takes long to import. torch.utils.tensorboard and torch._dynamo are torch's own, and are not part of its import.
HEAVY = {
    *("matplotlib", "sklearn", "scipy", "pandas", "torchvision", "timm", "PIL", "torchmetrics", "lightning"),
    *("tensorboard", "torch.utils.tensorboard", "torch._dynamo", "torch._inductor", "torch.onnx"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import classfair", HEAVY | {"rich", "tyro"}),
        ("import classfair.training", HEAVY | {"tyro"}),
        ("from classfair.cli import main; main(['train', '--help'])", HEAVY),
        ("from classfair.cli import main; main(['train', '--data', 'imagefolder:x', '--help'])", HEAVY),
    ],
)
def test_what_takes_seconds_to_import_waits_until_it_is_used(statement, heavy):
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = process.stdout.splitlines()[-1].split()
    assert any(name.startswith("classfair") for name in loaded)
    assert not [name for name in loaded if name in heavy or name.partition(".")[0] in heavy]


def test_no_module_of_training_imports_itself_through_others():
    imports = {}
    for file in Path(training.__file__).parent.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        imports[file.stem] = {n.module.removeprefix("classfair.training.") for n in nodes if n.module} - {file.stem}

    def circles(module, path):
        if module in path:
            return [[*path[path.index(module) :], module]]
        return [circle for other in imports.get(module, ()) for circle in circles(other, [*path, module])]

    assert imports["engine"]
    assert not [circle for module in imports for circle in circles(module, [])]


def test_a_package_that_is_there_and_cannot_be_imported_is_missing(tmp_path, capsys, monkeypatch):
    broken = tmp_path / "sklearn"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libgfortran.so.5: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert run("--output", tmp_path / "run") == 3
    assert "(missing: scikit-learn)" in one_line(capsys)
    assert not (tmp_path / "run").exists()
