"""Interrupted jobs end as uninterrupted ones do, to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

from classfair.cli import main
from tests.support.training import stopped_where

JOB = ["train", "--no-progress", "--epochs", "4", "--seeds", "1", "--save-every", "1", "--imbalance", "20"]
FILES = ("metrics.json", "per_class.csv", "statistics/ce-seed0.csv", "statistics/la-seed0.csv")
SCHEDULED = ["--loss", "la", "ldam", "--loss-warmup", "2", "--drw-start", "2", "--lr-warmup-epochs", "1"]

# Forks before any thread exists; the child is killed at the given system call of its job.
KILLER = """
import os, signal, sys
import matplotlib.figure, rich.progress, sklearn.datasets, sklearn.model_selection, torch, tyro
import classfair.training
from classfair.cli import main
try:
    import torch.utils.tensorboard
except ImportError:
    pass

def kill_at(number):
    calls = []
    def wrap(function):
        def counted(*arguments, **keywords):
            calls.append(function)
            if len(calls) == number:
                if function is torch.save:  # half of the file is on the disk
                    arguments[1].write(b"PK half of a checkpoint")
                    arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return counted
    os.fsync, os.replace, torch.save = wrap(os.fsync), wrap(os.replace), wrap(torch.save)
    os.rename, os.unlink = wrap(os.rename), wrap(os.unlink)

def child(arguments, number=0):
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if number:
            kill_at(number)
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

root, stride, job = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for number in range(2, 200, stride):
    path = f"{root}/{number}"
    code = child([*job, "--output", path], number)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    if os.path.exists(f"{path}/config.json"):
        assert child(["train", "--no-progress", "--resume", path]) == 0, number
        print(path)
"""


# As in this process: sums of another number of threads differ in the last bit.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(output, *flags):
    assert main([*JOB, "--output", str(output), *map(str, flags)]) == 0
    return output


def contents(path):
    return {name: (path / name).read_bytes() for name in FILES if (path / name).exists()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("resume") / "whole")


def interrupt(path, at_epoch, monkeypatch, *flags, job=JOB):
    """Stop a job by Ctrl-C in the first loss's epoch of that number."""
    with stopped_where(lambda run: run.epoch + 1 == at_epoch, monkeypatch):
        assert main([*job, "--output", str(path), *map(str, flags)]) == 130
    return path


def assert_equal(a, b):
    """Nested dicts and lists of tensors and numbers, to the bit."""
    a, structure = tree_flatten(a)
    b, other = tree_flatten(b)
    assert structure == other
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("at_epoch", [2, 4])
def test_resumed_is_uninterrupted(at_epoch, whole, tmp_path, monkeypatch, capsys):
    path = interrupt(tmp_path / "run", at_epoch, monkeypatch)
    assert f"go on with --resume {path}" in capsys.readouterr().err
    torch.rand(5)  # the state of the world does not matter
    assert main(["train", "--resume", str(path), "--no-progress"]) == 0
    assert contents(path) == contents(whole)
    for name in ("ce-seed0.pt", "la-seed0.pt"):
        assert_equal(*(torch.load(p / "checkpoints" / name, weights_only=True) for p in (path, whole)))
    files = [{str(p.relative_to(root)) for p in root.rglob("*") if "tfevents" not in p.name} for root in (path, whole)]
    assert files[0] == files[1]


@pytest.mark.parametrize("flags", [SCHEDULED, ["--loss", "isda", "metalad"]])
def test_schedules_and_class_statistics_are_restored(flags, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", *flags)
    for at_epoch in (2, 3, 4):
        path = interrupt(tmp_path / str(at_epoch), at_epoch, monkeypatch, *flags)
        assert main(["train", "--resume", str(path), "--no-progress"]) == 0
        assert (path / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stride", [5, 1])
def test_a_kill_at_any_moment_of_saving_costs_nothing(stride, tmp_path):
    small = ["--epochs", "3", "--loss", "la"]
    whole = run(tmp_path / "whole", *small)
    script = [sys.executable, "-c", KILLER, str(tmp_path), str(stride), *JOB, *small]
    printed = subprocess.run(script, capture_output=True, text=True, check=True, env=ONE_THREAD).stdout.split()
    assert len(printed) > 20 / stride  # system calls that save
    for path in map(Path, printed):
        assert contents(path) == contents(whole), path
        assert not [p for p in path.rglob("*") if p.name.startswith(".")]


def test_the_newest_whole_checkpoint_is_taken(whole, tmp_path, monkeypatch, capsys):
    path = interrupt(tmp_path / "run", 4, monkeypatch)
    newest = path / "checkpoints" / "ce-seed0.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a tensor, which torch.load would not notice
    newest.write_bytes(content)
    assert main(["train", "--resume", str(path), "--no-progress"]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert contents(path) == contents(whole)


def test_nothing_is_overwritten_when_no_checkpoint_is_whole(tmp_path, monkeypatch, capsys):
    path = interrupt(tmp_path / "run", 4, monkeypatch)
    for file in (path / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(path), "--no-progress"]) == 2
    assert "expected a whole checkpoint of ce-seed0" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_finished_job_is_left_as_it_is(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "copy")
    assert main(["train", "--resume", str(path), "--no-progress"]) == 0
    assert contents(path) == contents(whole)


def change(path, **entries):
    name = path / "checkpoints" / "ce-seed0.pt"
    state = torch.load(name, weights_only=True)
    for key, value in entries.items():
        state[key] = value
    torch.save(state, name)


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ((), {"format_version": 99}, "of format 99, which a newer classfair wrote"),
        ((), {"format_version": 3}, "of format 3, which an older classfair wrote"),
        ((), {"class_names": ["cat"]}, "expected a checkpoint with the classes of the data"),
        ((), {"seed": 7}, "ce-seed0.pt of another run"),
        (("--output", "elsewhere"), {}, "expected output to be left out with resume"),
        ((), {"model": {"weight": torch.zeros(1)}}, "expected a checkpoint of model mlp, got another one"),
        (("--epochs", "9"), {}, "expected epochs 4 as in the run folder, got 9"),
        (("--batch-size", "32"), {}, "expected processes * batch_size * grad_accum to stay 64"),
    ],
)
def test_foreign_checkpoints_are_refused(flags, changes, message, tmp_path, monkeypatch, capsys):
    path = interrupt(tmp_path / "run", 3, monkeypatch)
    change(path, **changes)
    capsys.readouterr()
    assert main(["train", "--resume", str(path), "--no-progress", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_step_may_be_dealt_out_in_another_way(whole, tmp_path, monkeypatch):
    path = interrupt(tmp_path / "run", 3, monkeypatch)
    assert main(["train", "--resume", str(path), "--no-progress", "-b", "16", "--grad-accum", "4"]) == 0
    a, b = (json.loads((p / "metrics.json").read_text())["runs"][0]["train_loss"] for p in (path, whole))
    assert a == pytest.approx(b, rel=1e-5)


def test_no_run_folder(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "expected a run folder to resume" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[]")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "of format 1, got None" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"format_version": 77}')
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "of format 1, got 77" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["config.json"]
