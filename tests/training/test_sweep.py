"""A sweep over weights of a penalty: its measures, its choice, its resume."""

import itertools
import json

import numpy as np
import pytest
import torch

from classfair.cli import main
from classfair.training import TrainConfig
from classfair.training.sweep import COST, calibration_error, compare
from tests.support.training import stopped_where

JOB = ["train", "--no-progress", "--epochs", "3", "--seeds", "1", "--save-every", "1", "--fairness", "iou"]


def result_of(path):
    return json.loads((path / "sweep.json").read_text())


def test_a_sweep_is_a_job_for_each_weight(tmp_path, capsys):
    path = tmp_path / "sweep"
    assert main([*JOB, "--fairness-sweep", "1", "50", "--output", str(path)]) == 0
    assert "Weights of iou" in capsys.readouterr().out
    assert main([*JOB, "--fairness-weight", "50", "--output", str(tmp_path / "alone")]) == 0
    one, other = (p / "statistics" / "ce-seed0.csv" for p in (path / "weight-50", tmp_path / "alone"))
    assert one.read_bytes() == other.read_bytes()
    result = result_of(path)
    points = result["points"]["ce"]
    assert [point["weight"] for point in points] == [0.0, 1.0, 50.0]
    metrics = json.loads((path / "weight-50" / "metrics.json").read_text())["runs"][0]
    # Halves of 450 and 449 images: their accuracies bracket that of all.
    halves = [points[2][half]["all"] for half in ("validation", "test")]
    assert min(halves) - 0.02 < metrics["all"] < max(halves) + 0.02
    assert points[2]["test"] != points[2]["validation"]
    assert points[2]["test"]["penalty"] < points[0]["test"]["penalty"]
    assert (path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch, capsys):
    job = [*JOB, "--fairness-sweep", "1", "50"]
    assert main([*job, "--output", str(tmp_path / "whole")]) == 0
    path, epochs = tmp_path / "run", itertools.count(1)
    # In the second epoch of the second of three jobs.
    with stopped_where(lambda run: next(epochs) == 5, monkeypatch):
        assert main([*job, "--output", str(path)]) == 130
    assert f"kept 1 of 3 finished runs in {path}; go on with --resume {path}" in capsys.readouterr().err
    assert main(["train", "--no-progress", "--json", "--resume", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == result_of(tmp_path / "whole")
    assert result_of(path) == result_of(tmp_path / "whole")


def point(validation, test=0.5):
    names = ("all", "penalty", "iou_sd", "worst_group", "calibration_error")
    return {
        "ce": {half: dict(zip(names, v, strict=True)) for half, v in (("validation", validation), ("test", [test] * 5))}
    }


def test_the_choice_is_made_on_validation_images():
    config = TrainConfig.for_data("digits-groups", fairness="iou", fairness_sweep=(1.0, 10.0, 100.0))
    measured = {
        0.0: point([0.80, 1, 0.30, 0, 0], test=0.0),
        1.0: point([0.79, 1, 0.20, 0, 0], test=0.9),
        10.0: point([0.80 - COST / 2, 1, 0.10, 0, 0], test=0.5),
        100.0: point([0.80 - 2 * COST, 1, 0.01, 0, 0], test=0.0),  # fair, but it costs too much
    }
    assert compare(measured, config)["chosen"] == {"ce": 10.0}


def test_calibration_error_is_its_definition():
    g = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(500, 4, generator=g), torch.randint(0, 4, (500,), generator=g)
    p = logits.double().softmax(1).numpy()
    confidence, hit = p.max(1), p.argmax(1) == target.numpy()
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert calibration_error(logits, target) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(torch.tensor([[100.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fairness": "iou", "fairness_sweep": (0.0, 1.0)}, "expected fairness_sweep as weights greater than 0, got 0"),
        ({"fairness": "iou", "fairness_sweep": (float("nan"),)}, "expected fairness_sweep as weights greater than 0"),
        ({"fairness_sweep": (1.0,)}, "expected fairness_sweep to be left out without fairness"),
        (
            {"fairness": "iou", "fairness_sweep": (1.0,), "fairness_weight": 3.0},
            "fairness_weight to be left out with fai",
        ),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_data("digits-groups", **options)
