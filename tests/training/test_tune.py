"""``classfair tune``: what is searched for, stopped, kept and gone on with."""

import csv
import itertools
import json

import pytest

optuna = pytest.importorskip("optuna", reason="tune needs optuna")

from classfair.cli import main  # noqa: E402
from classfair.training import TrainConfig, engine, tune  # noqa: E402
from tests.support.training import stopped_where  # noqa: E402

JOB = ["tune", "--no-progress", "--loss", "la", "--epochs", "5", "--seeds", "1", "--trials", "9"]


def run(path, *flags):
    assert main([*JOB, "--output", str(path), *map(str, flags)]) == 0
    return path


def rows(path):
    with (path / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("tune") / "whole")


def test_the_best_trial_is_what_training_with_it_gives(whole, tmp_path, capsys):
    best = json.loads((whole / "best.json").read_text())
    done = rows(whole)
    assert len(done) == best["trials"] == 9
    complete = [row for row in done if row["state"] == "complete"]
    assert len(complete) == 9 - best["pruned"] >= tune.STARTUP
    assert best["value"] == max(float(row["value"]) for row in complete)
    assert all(0 <= float(row["tau"]) <= 2 for row in done)
    assert len({row["tau"] for row in done}) == 9
    job = ["train", "--no-progress", "--loss", "la", "--epochs", "5", "--seeds", "1", "--tau", best["options"]["tau"]]
    assert main([*map(str, job), "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["runs"][0]["worst_class"] == best["value"]


def test_an_interrupted_study_ends_as_an_uninterrupted_one(whole, tmp_path, monkeypatch, capsys):
    path, epochs = tmp_path / "study", itertools.count(1)
    # In the second epoch of the fourth trial.
    with stopped_where(lambda run: next(epochs) == 17, monkeypatch):
        assert main([*JOB, "--output", str(path)]) == 130
    assert f"classfair tune: interrupted; go on with classfair tune --resume {path}" in capsys.readouterr().err
    assert len(rows(path)) == 3
    resume = ["tune", "--no-progress", "--resume", str(path)]
    assert main([*resume, "--trials", "9"]) == 0
    assert rows(path) == rows(whole)
    assert (path / "best.json").read_bytes() == (whole / "best.json").read_bytes()
    for flags, message in {
        ("--epochs", "6"): "expected epochs 5 as in the run folder, got 6",
        ("--loss", "isda"): "expected loss ('la',) as in the run folder",
        ("--objective", "balanced"): "expected objective worst_class as in the study, got balanced",
    }.items():
        capsys.readouterr()
        assert main([*resume, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main([*resume, "--trials", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 10


def test_bad_trials_are_stopped_early(whole, tmp_path, monkeypatch):
    """With pruning, hopeless trials take fewer epochs; those that diverge are no error of the job."""
    next_epoch, epochs = engine.Run.next_epoch, []

    def counting(self):
        epochs.append(self.config.tau)
        if self.config.tau > 1.5:
            raise FloatingPointError("expected finite loss")
        return next_epoch(self)

    monkeypatch.setattr(engine.Run, "next_epoch", counting)
    path = run(tmp_path / "study")
    stopped = [float(row["tau"]) for row in rows(path) if row["state"] == "pruned"]
    assert any(tau > 1.5 for tau in stopped)
    assert all(row["state"] == "pruned" for row in rows(path) if float(row["tau"]) > 1.5)
    for tau in stopped:
        assert epochs.count(tau) <= 5


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"loss": ("la",)}, ["tau"]),
        ({"loss": ("isda",)}, ["strength"]),
        ({"loss": ("ce",), "stage2": "tau-norm"}, ["stage2_tau"]),
        ({"loss": ("metalad",), "meta_per_class": 2}, ["meta_lr"]),
        ({"data": "digits-groups", "loss": ("la",), "fairness": "iou"}, ["fairness_weight", "tau"]),
    ],
)
def test_what_is_searched_for(options, names):
    config = TrainConfig(**options)
    assert [name for name, *_ in tune.space(config)] == names
    tune.check(config, "balanced", 1)


def test_a_spread_is_minimised(tmp_path):
    job = ["tune", "--no-progress", "--fairness", "iou", "--epochs", "2", "--seeds", "2", "--trials", "3"]
    path = tmp_path / "study"
    assert main([*job, "--objective", "iou_sd", "--output", str(path)]) == 0
    values = [float(row["value"]) for row in rows(path)]
    assert json.loads((path / "best.json").read_text())["value"] == min(values)
    assert all(0.1 <= float(row["fairness_weight"]) <= 1000 for row in rows(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "ce"], "expected something to tune: la (tau)"),
        (["--loss", "ce", "la"], "expected one loss and no fairness_sweep to tune, got ce la"),
        (["--loss", "la", "--objective", "loss"], "expected objective to be one of worst_class"),
        (["--loss", "la", "--objective", "iou_sd"], "expected objective iou_sd with groups"),
        (["--loss", "la", "--trials", "0"], "expected trials of at least 1, got 0"),
        (["--loss", "la", "--tau", "-1"], "expected tau of at least 0"),
        (["--resume", "nowhere"], "expected a run folder to resume, got nowhere"),
    ],
)
def test_what_is_refused(flags, message, tmp_path, capsys):
    output = [] if "--resume" in flags else ["--output", str(tmp_path / "study")]
    assert main(["tune", *flags, *output]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("classfair tune: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_run_folder_of_training_is_no_study(tmp_path, capsys):
    job = ["train", "--no-progress", "--loss", "la", "--epochs", "1", "--seeds", "1"]
    assert main([*job, "--output", str(tmp_path / "run")]) == 0
    assert main(["tune", "--resume", str(tmp_path / "run")]) == 2
    assert "expected a folder of classfair tune to resume" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(monkeypatch, capsys):
    from classfair import cli

    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "optuna" else object())
    assert main(["tune"]) == 3
    assert 'needs the "tune" extra: pip install "classfair[tune]" (missing: optuna)' in capsys.readouterr().err
