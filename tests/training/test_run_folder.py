"""The run folder: one owner, whole files on a full disk, and what is damaged, forged or somebody else's."""

import contextlib
import errno
import fcntl
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from classfair import cli
from classfair.cli import main
from classfair.training import CheckpointError, RunFolder, TrainConfig, engine, saved_config
from classfair.training.ownership import LOCK, Lock, remove_unfinished, unfinished_name
from classfair.training.schema import check, read_json, schema_of
from tests.training.test_resume import JOB, ONE_THREAD, assert_equal, change, contents, interrupt

HOLDER = """
import sys, time
from pathlib import Path
from classfair.training import RunFolder
import multiprocessing
with RunFolder(Path(sys.argv[1])) as folder:
    folder.write("config.json", b"{}")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "whole"
    assert main([*JOB, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return interrupt(tmp_path_factory.mktemp("folder") / "run", 3, patch)


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A job that stopped after two of four epochs."""
    return shutil.copytree(interrupted, tmp_path / "run")


def resume(path, *flags):
    return main(["train", "--no-progress", "--resume", str(path), *map(str, flags)])


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# One owner


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to a run folder, with a child as workers that load images are."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "held")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_a_running_job_is_not_resumed_and_its_death_frees_the_folder(holder, tmp_path):
    path = tmp_path / "held"
    for arguments in ({"resume": True}, {}):
        with pytest.raises(BlockingIOError, match=f"no other job writes to, got {path}, which process {holder.pid} on"):
            RunFolder(path, **arguments)
    holder.kill()
    holder.wait()  # its child lives
    with RunFolder(path, resume=True):
        assert (path / LOCK).exists()
    assert [entry.name for entry in path.iterdir()] == ["config.json"]


def test_a_lock_within_one_process(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    lock.release()
    lock.release()  # once is enough
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking the file the owner before ends, and removes it."""
    flock, opened = fcntl.flock, []

    def late(descriptor, operation):
        if not opened:
            (tmp_path / LOCK).unlink()
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = Lock(tmp_path)
    monkeypatch.undo()
    assert len(opened) == 2
    with pytest.raises(BlockingIOError):
        Lock(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    Lock(tmp_path).release()
    assert f"{tmp_path} cannot be locked (No locks available)" in one_line(capsys)


def test_default_folders_of_jobs_of_one_second_differ(tmp_path):
    paths = []
    for _ in range(3):
        with RunFolder(tmp_path / "runs" / "digits-1", unique=True) as folder:
            folder.write("config.json", b"{}")
            paths.append(folder.path.name)
    assert paths == ["digits-1", "digits-1-2", "digits-1-3"]


def test_two_jobs_of_one_command_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_default_output", lambda config: "runs/digits-now")
    for _ in range(2):
        assert main([*JOB, "--epochs", "1", "--loss", "ce"]) == 0
    names = {path.name: saved_config(path)["epochs"] for path in (tmp_path / "runs").iterdir()}
    assert names == {"digits-now": 1, "digits-now-2": 1}


# Unfinished files


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_our_own_unfinished_files_of_dead_processes_are_removed(stopped, whole, tmp_path):
    ours = unfinished_name("ce-seed0.pt")
    of_dead = ours.replace(str(os.getpid()), str(dead_process()))
    of_living = ours.replace(str(os.getpid()), str(os.getppid()))
    of_another_machine = re.sub("-[0-9a-f]{8}-", "-00000000-", of_dead)
    (stopped / "mine").mkdir()
    kept = [".notes.2024", ".config.json.123", of_living, of_another_machine, "checkpoints/.draft.7", f"mine/{of_dead}"]
    for name in [*kept, of_dead, f"checkpoints/{of_dead}", f"statistics/{ours}"]:
        (stopped / name).write_text("mine")
    assert resume(stopped) == 0
    assert contents(stopped) == contents(whole)
    hidden = {str(p.relative_to(stopped)) for p in stopped.rglob("*") if p.name.startswith(".")}
    assert hidden == set(kept)


def test_links_and_folders_of_such_a_name_are_left_alone(tmp_path):
    (tmp_path / "target").write_text("mine")
    name = unfinished_name("x")
    (tmp_path / name).symlink_to("target")
    (tmp_path / f"{name}y").mkdir()
    remove_unfinished(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path / "missing")


# A full disk


class Full:
    """The quota is reached after a number of files."""

    def __init__(self, after):
        self.left = after
        self.fsync = os.fsync

    def __call__(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)


@pytest.mark.parametrize(
    "after", [0, 2, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5, 9, 14, 22, 30))]
)
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(after, whole, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", Full(after))
    code = main([*JOB, "--output", str(path)])
    error = capsys.readouterr().err
    monkeypatch.undo()
    if code == 0:  # so many writes there are not
        assert contents(path) == contents(whole)
        return
    assert code == 1
    assert error.count("\n") == 1
    assert "No space left on device" in error
    if path.exists():
        assert not [p for p in path.rglob("*") if p.name.startswith(".")]
        assert resume(path) == 0
        assert contents(path) == contents(whole)


@contextlib.contextmanager
def small_files():
    """No file may grow above 2000 bytes: for a few lines only, because the terminal may be a file, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_names_the_reason(tmp_path):
    """torch.save turns the error of the file into one about positions."""
    with small_files(), RunFolder(tmp_path / "run") as folder:
        with pytest.raises(OSError, match=r"expected to write .*/a.pt, got File too large"):
            folder.write("a.pt", lambda file: torch.save({"a": torch.zeros(10_000)}, file))
        assert [p.name for p in folder.path.iterdir()] == [LOCK]


def test_rows_that_do_not_fit_are_taken_back(tmp_path):
    with small_files(), RunFolder(tmp_path / "run") as folder:
        folder._append("a.csv", "header\n", [[1, 2]])
        with pytest.raises(OSError, match=r"expected to write .*a\.csv, got File too large"):
            folder._append("a.csv", "header\n", [[3, 4]] * 1000)
        assert (folder.path / "a.csv").read_text() == "header\n1,2\n"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_standard_output_is_one_sentence(tmp_path):
    job = [sys.executable, "-m", "classfair", *JOB, "--epochs", "1", "--output", str(tmp_path / "run")]
    with open("/dev/full", "w") as full:
        process = subprocess.run(job, stdout=full, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, check=False)
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1, process.stderr
    assert "No space left on device" in process.stderr
    assert (tmp_path / "run" / "metrics.json").exists()


# Damaged and forged files


def edit(path, **entries):
    content = json.loads((path / "config.json").read_text())
    content.update(entries)
    (path / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"epochs": "many"}, "expected int as epochs of"),
        ({"epochs": True}, "expected int as epochs of"),
        ({"epochs": 4.5}, "expected int as epochs of"),
        ({"epochs": 0}, "expected epochs of at least 1, got 0 in"),
        ({"epochs": 10**9}, "expected epochs 4 as in the checkpoint, got 1000000000"),
        ({"loss": "ce"}, "expected a list as loss of"),
        ({"loss": ["ce", 3]}, "expected str as loss of"),
        ({"scale": [0.1]}, "expected 2 values as scale of"),
        ({"omega": {}}, "expected 3 values as omega of"),
        ({"lr": None}, "expected int or float as lr of"),
        ({"lr": [[[]]]}, "expected int or float as lr of"),
        ({"processes": 0}, "expected processes of at least 1"),
        ({"data": 7}, "expected str as data of"),
        ({"device": "toaster"}, "expected device to be auto, cpu"),
        ({"momentum": float("nan")}, "expected momentum from 0 up to but excluding 1, got nan"),
        ({"format_version": True}, "of format 1, got True"),
        ({"tau": 2.0}, "expected tau 1.0 as in the checkpoint, got 2.0"),
    ],
)
def test_options_that_were_forged_are_one_sentence(entries, message, stopped, capsys):
    edit(stopped, **entries)
    capsys.readouterr()
    assert resume(stopped) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"[" * 900 + b"]" * 900, b"null"])
def test_options_that_are_no_object_are_one_sentence(content, stopped, capsys):
    (stopped / "config.json").write_bytes(content)
    capsys.readouterr()
    assert resume(stopped) == 2
    assert "expected " in one_line(capsys)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def test_a_pipe_is_not_waited_for(stopped, capsys):
    pipe(stopped / "checkpoints" / "ce-seed0.pt")
    (stopped / "checkpoints" / "ce-seed0.previous.pt").unlink()
    capsys.readouterr()
    assert resume(stopped) == 2
    assert "ce-seed0.pt is damaged" in capsys.readouterr().err
    pipe(stopped / "config.json")
    assert resume(stopped) == 2
    assert "expected a regular file" in one_line(capsys)


def test_a_log_that_is_a_pipe_is_not_waited_for(stopped, capsys):
    pipe(stopped / "statistics" / "ce-seed0.csv")
    assert resume(stopped) == 0
    assert "lacks 20 of 20 rows up to epoch 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"epoch": 10**9}, "expected epoch from 1 to 4 in the checkpoint, got 1000000000"),
        ({"epoch": 4}, "expected 4 epochs in all of the checkpoint, got 2 losses and a schedule at 2"),
        ({"epoch": 0}, "expected epoch from 1 to 4"),
        ({"epoch": "2"}, "expected int as epoch of the checkpoint"),
        ({"epoch": None}, "expected int as epoch of the checkpoint"),
        ({"train_loss": [0.1]}, "got 1 losses"),
        ({"train_loss": ["0.1", "0.2"]}, "expected int or float as train_loss of the checkpoint, item 0"),
        ({"train_loss": 3}, "expected a list as train_loss"),
        ({"class_names": None}, "expected a checkpoint with the classes of the data"),
        ({"config": {}}, "expected data in config of the checkpoint, got none"),
        ({"config": []}, "expected named values as config of the checkpoint"),
        ({"train": {}}, "expected counts in train of the checkpoint, got none"),
        ({"val": {"counts": torch.zeros(3, 10), "sums": torch.zeros(2, 10), "loss": torch.zeros(2)}}, "torch.int64"),
        ({"optimizer": {}}, "expected state in optimizer of the checkpoint, got none"),
        ({"lr_schedule": {"last_epoch": 2}}, "of the checkpoint, got none"),
        ({"criterion": 3}, "expected named values as criterion of the checkpoint"),
        ({"model": {"0.weight": "text"}}, "expected Tensor as 0.weight of model of the checkpoint"),
        ({"scaler": None}, "expected named values as scaler of the checkpoint"),
        ({"format_version": "4"}, "of format '4', which"),
    ],
)
def test_checkpoints_that_were_forged_are_one_sentence(entries, message, stopped, capsys):
    change(stopped, **entries)
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert resume(stopped) == 2
    assert message in one_line(capsys)
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before


def forge(path, forgery):
    state = torch.load(path / "checkpoints" / "ce-seed0.pt", weights_only=True)
    forgery(state)
    torch.save(state, path / "checkpoints" / "ce-seed0.pt")


def missing(name):
    return lambda state: state.pop(name)


def wrong_momentum(state):
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)


def unknown_parameter(state):
    state["optimizer"]["state"][99] = {"momentum_buffer": torch.zeros(3)}


def more_hits_than_images(state):
    state["val"]["counts"][1] += 1000


def other_options(state):
    state["config"]["weight_decay"] = 0.5


def other_schedule(state):
    state["lr_schedule"]["last_epoch"] = 10**9


@pytest.mark.parametrize(
    ("forgery", "message"),
    [
        (wrong_momentum, "expected momentum_buffer of (64, 64) in the optimizer"),
        (unknown_parameter, "expected 6 parameters in the optimizer of the checkpoint, got number 99"),
        (more_hits_than_images, "expected counts of images as val of the checkpoint, got impossible ones"),
        (other_options, "expected weight_decay 0.5 as in the checkpoint, got 0.0005"),
        (other_schedule, "got 2 losses and a schedule at 1000000000"),
        *[(missing(name), "expected ") for name in ("epoch", "config", "train", "val", "optimizer", "lr_schedule")],
        *[
            (missing(name), "expected ")
            for name in ("model", "criterion", "scaler", "train_loss", "class_names", "loss")
        ],
    ],
)
def test_forged_parts_of_checkpoints_are_one_sentence(forgery, message, stopped, capsys):
    forge(stopped, forgery)
    capsys.readouterr()
    assert resume(stopped) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("1,0,", "1,zero,", 1),
        lambda text: text.replace("\n2,3,", "\n", 1),
        lambda text: "epoch,class\n",
        lambda text: text[: len(text) // 2],
        lambda text: "",
    ],
)
def test_damaged_statistics_are_named_and_kept(damage, stopped, capsys):
    log = stopped / "statistics" / "ce-seed0.csv"
    damaged = damage(log.read_text())
    log.write_text(damaged)
    assert resume(stopped) == 0
    assert re.search(r"ce-seed0\.csv lacks \d+ of 20 rows up to epoch 2; what it had is in", capsys.readouterr().err)
    assert log.with_name("ce-seed0.csv.damaged").read_text() == damaged


def test_a_whole_log_is_not_called_damaged(stopped, whole, capsys):
    with (stopped / "statistics" / "ce-seed0.csv").open("a") as file:
        file.write("3,0,1,1,1,0.5")  # a kill
    capsys.readouterr()
    assert resume(stopped) == 0
    assert "lacks" not in capsys.readouterr().err
    assert contents(stopped) == contents(whole)


@pytest.mark.parametrize(
    ("change_it", "message"),
    [
        (lambda m: m.update(format_version=1), "of format 2, got 1"),
        (lambda m: m["runs"][0].update(effective_frequency=[2.0] * 10), "effective frequencies from 0 to 1"),
        (lambda m: m["runs"][0].update(effective_frequency=["a"] * 10), "expected int or float or NoneType"),
        (lambda m: m["runs"][0].update(effective_frequency=[0.5]), "10 effective frequencies"),
        (lambda m: m["runs"][0].update(val_count=[0] * 10), "images where there are effective frequencies"),
        (lambda m: m["runs"][0].pop("seed"), "expected seed in"),
        (lambda m: m.update(runs=7), "expected a list as runs of"),
    ],
)
def test_metrics_that_were_forged_are_one_sentence(change_it, message, whole, tmp_path, capsys):
    path = shutil.copytree(whole, tmp_path / "copy")
    metrics = json.loads((path / "metrics.json").read_text())
    change_it(metrics)
    (path / "metrics.json").write_text(json.dumps(metrics))
    flags = ["--loss", "la", "--effective-frequency", str(path), "--output", str(tmp_path / "run")]
    capsys.readouterr()
    assert main([*JOB, *flags]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_schema():
    like = {"a": [1, 2.0], "b": {"c": torch.zeros(2)}, "d": None, "e": True}
    check(like, schema_of(like), "x")
    check({**like, "a": (3.0, 4), "more": 1}, schema_of(like), "x")
    for wrong in ({"a": [1]}, {"b": {"c": torch.zeros(3)}}, {"b": {"c": torch.zeros(2).half()}}, {"d": 1}, {"e": 1}):
        with pytest.raises(CheckpointError):
            check({**like, **wrong}, schema_of(like), "x")
    with pytest.raises(CheckpointError, match="expected names as x, got 3"):
        check({3: "a"}, {str: str}, "x")


def test_a_bomb_of_zeros_is_refused(tmp_path, monkeypatch):
    from classfair.training import schema

    monkeypatch.setattr(schema, "MAX_BYTES", 1000)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b" " * 100_000))
    with pytest.raises(CheckpointError, match="expected at most 1000 bytes"):
        read_json(tmp_path / "x.json.gz", {}, 1)


def test_every_kind_of_option_survives_the_file(tmp_path):
    config = TrainConfig.for_data("imagefolder:/x", scale=(0.5, 1), model_kwargs=("a=1",), omega=(1, 0.5, 2), lr=1)
    with RunFolder(tmp_path / "run") as folder:
        folder.write_json("config.json", {"format_version": 1, **config.as_dict()})
        assert TrainConfig(**{k: v for k, v in saved_config(folder.path).items() if k != "processes"}) == config


def test_resumed_states_are_equal(stopped, whole):
    assert resume(stopped) == 0
    states = [torch.load(p / "checkpoints" / "la-seed0.pt", weights_only=True) for p in (stopped, whole)]
    assert_equal(*states)
    assert states[0]["format_version"] == engine.CHECKPOINT_VERSION
