"""``classfair train --meta-per-class``: the meta set, what a run with it leaves, resuming, and what is refused."""

import csv
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from classfair.cli import main
from classfair.training import Processes, TrainConfig, engine, jobs
from classfair.training.batches import Data, TensorBatches
from classfair.training.engine import Run
from classfair.training.jobs import fit
from classfair.training.meta_learning import MetaOrder, meta_indices
from classfair.training.sources import load_data
from tests.support.processes import run_processes
from tests.training.test_resume import assert_equal, interrupt

CPU = torch.device("cpu")
JOB = ["train", "--no-progress", "--seeds", "1", "--save-every", "1", "--loss", "metalad", "--meta-per-class", "5"]
JOB += ["--epochs", "4", "--meta-start", "1"]


def config(**changes):
    return TrainConfig(**{"loss": ("ce", "metalad"), "meta_per_class": 5, "epochs": 3, "seeds": 1, **changes})


def run(given, loss="metalad", data=None, processes=Processes()):  # noqa: B008  (frozen)
    one = Run(loss, 0, data or load_data(given, 0), given, CPU, processes)
    return one, fit(one, None, lambda epoch: None)


def rows(path):
    with (path / "statistics" / "metalad-seed0-omega.csv").open() as file:
        return list(csv.DictReader(file))


# The meta set


def test_held_out_digits_are_balanced_and_on_no_other_side():
    with_meta, without = load_data(config(meta_per_class=10), 3), load_data(TrainConfig(), 3)
    assert without.meta is None
    assert with_meta.meta.target.bincount().tolist() == [10] * 10
    assert with_meta.num_meta == 100
    raw = [part for data in (with_meta.train.images, with_meta.val.images, with_meta.meta.images) for part in data]
    assert len(torch.stack(raw).unique(dim=0)) == len(raw)
    # Classes other than the most frequent one keep their images, so that runs with and without can be compared.
    counts, before = (data.train_targets.bincount(minlength=10) for data in (with_meta, without))
    assert torch.equal(counts[before < 80], before[before < 80])
    assert 75 <= int(counts.max()) <= 80


def test_meta_images_may_be_training_images():
    given = config(meta_per_class=2, meta_from="train")
    data, without = load_data(given, 0), load_data(TrainConfig(), 0)
    assert torch.equal(data.train.images, without.train.images)
    chosen = meta_indices(given, data.train_targets, 0, data.class_names)
    assert torch.equal(data.meta.images, data.train.images[chosen])
    assert data.meta.target.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("batch_size", [8, 30, 64])
def test_meta_batches_take_every_image_equally_often(batch_size):
    given, seen = config(batch_size=batch_size), []
    for epoch in range(3):
        order = MetaOrder(50, 10, given, 0, epoch, Processes())
        assert len(order) == len(list(order)) == 10
        seen += order
    drawn = torch.tensor([i for _, indices in seen for i in indices]).bincount(minlength=50)
    assert all(len(set(indices)) == len(indices) for _, indices in seen)
    assert int(drawn.max() - drawn.min()) <= 3  # one for each epoch, whose last pass ends in the middle
    numbers = [{number for number, _ in seen[10 * epoch : 10 * epoch + 10]} for epoch in range(3)]
    assert not (numbers[0] & numbers[1]) | (numbers[1] & numbers[2])  # an image is augmented in its own way in each


def test_processes_deal_out_the_same_meta_batches():
    one = list(MetaOrder(50, 10, config(batch_size=30), 0, 1, Processes()))
    parts = [MetaOrder(50, 10, config(batch_size=15), 0, 1, Processes(rank, 2)) for rank in range(2)]
    for (number, indices), *dealt in zip(one, *parts, strict=True):
        assert [n for n, _ in dealt] == [number] * 2
        assert sorted(i for _, part in dealt for i in part) == sorted(indices)
    few = [MetaOrder(3, 4, config(batch_size=2), 0, 0, Processes(rank, 3)) for rank in range(3)]
    assert [order.counts[:4] for order in few] == [[True] * 4, [False] * 4, [False] * 4]
    assert all(len(indices) == 2 for order in few[1:] for _, indices in order)  # which stand in for none


# Training


def test_omega_is_learnt_and_without_a_meta_lr_nothing_else_differs():
    given = config()
    learnt, _ = run(given)
    fixed, result = run(replace(given, meta_lr=0.0))
    plain, expected = run(TrainConfig(loss=("metalad",), epochs=3), data=replace(load_data(given, 0), meta=None))
    assert plain.meta is None
    assert torch.equal(fixed.criterion.omega, torch.ones(3, 10))
    assert result.train_loss == expected.train_loss
    moved = (learnt.criterion.omega - 1).abs()
    assert 1e-3 < float(moved.max()) < 10
    assert torch.equal(learnt.meta.history[-1], learnt.criterion.omega)
    assert int(learnt.criterion.updates) == int(fixed.criterion.updates)


def test_until_meta_start_the_loss_is_cross_entropy():
    given = config(meta_start=2, omega=(1.0, 0.5, 0.25))
    ce, metalad = (run(given, loss)[1].train_loss for loss in ("ce", "metalad"))
    assert ce[:2] == pytest.approx(metalad[:2], rel=1e-4)
    assert ce[2] != pytest.approx(metalad[2], rel=1e-2)
    one, _ = run(replace(given, meta_lr=0.0))
    assert not one.meta.history[:2].any()
    assert torch.equal(one.meta.history[2], torch.tensor([1.0, 0.5, 0.25])[:, None].expand(3, 10))
    assert int(one.criterion.statistics.count.sum()) == 3 * len(one.data.train_targets)


@pytest.mark.parametrize("method", ["double_backward", "finite_difference", "last_layer"])
def test_methods(method):
    omega = run(config(epochs=1))[0].criterion.omega
    other = run(config(epochs=1, meta_method=method))[0].criterion.omega
    change = (omega - 1).norm()
    difference = float((other - omega).norm() / change)
    assert (0.1 < difference < 2) if method == "last_layer" else difference < 0.02


@pytest.mark.parametrize("changes", [{"amp": True}, {"clip_grad": 0.1}, {"opt": "adamw", "lr": 1e-3}, {"drw_start": 1}])
def test_with_other_options(changes):
    one, result = run(config(**changes))
    assert (one.criterion.omega != 1).any()
    assert math.isfinite(result.train_loss[-1])


@pytest.mark.slow
def test_the_perturbed_outer_loss_drives_the_weights_down():
    """What the paper prints: the loss falls with the weights themselves, so they do, and rare classes pay for it."""
    given = config(epochs=40, meta_per_class=10)
    ce, result = run(given)
    perturbed = Run("metalad", 0, load_data(given, 0), given, CPU, Processes())
    perturbed.meta.step.outer = "perturbed"
    other = fit(perturbed, None, lambda epoch: None)
    assert bool((ce.criterion.omega.mean(1) > 0.5).all())
    assert bool((perturbed.criterion.omega.mean(1) < 0).all())
    few = [r.columns(given)["few"] for r in (result, other)]
    assert few[0] > few[1] + 0.1


def test_the_run_folder_has_omega_over_the_epochs(tmp_path):
    assert main([*JOB, "--output", str(tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "metalad-seed0.pt", weights_only=True)
    table = rows(tmp_path / "run")
    assert [(row["epoch"], row["class"]) for row in table] == [(str(e), str(c)) for e in range(1, 5) for c in range(10)]
    last = [[float(row[term]) for row in table[-10:]] for term in ("proportion", "variance", "distance")]
    torch.testing.assert_close(torch.tensor(last), state["criterion"]["omega"], rtol=1e-6, atol=0)
    assert {row["refused"] for row in table} == {"0"}
    assert (tmp_path / "run" / "metalad-seed0-omega.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("at_epoch", [2, 3])
def test_resumed_is_uninterrupted(at_epoch, tmp_path, monkeypatch):
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert main([*JOB, "--output", str(whole)]) == 0
    interrupt(path, at_epoch, monkeypatch, job=JOB)
    assert main(["train", "--resume", str(path), "--no-progress"]) == 0
    for name in ("metrics.json", "statistics/metalad-seed0-omega.csv", "statistics/metalad-seed0.csv"):
        assert (path / name).read_bytes() == (whole / name).read_bytes()
    assert_equal(*(torch.load(p / "checkpoints" / "metalad-seed0.pt", weights_only=True) for p in (path, whole)))


def test_updates_that_are_refused_are_reported(tmp_path, capsys, monkeypatch):
    load = load_data

    def with_bad_meta_images(given, seed):
        data = load(given, seed)
        images = data.meta.images.clone()
        images[2:] = torch.inf  # the first two are tried before training
        return replace(data, meta=TensorBatches(images, data.meta.target))

    monkeypatch.setattr(jobs, "load_data", with_bad_meta_images)
    assert main([*JOB, "--output", str(tmp_path / "run")]) == 0
    steps = 4  # 231 images in batches of 64
    error = capsys.readouterr().err
    assert f"metalad-seed0: {3 * steps} updates of omega refused, not finite: try a smaller --meta-lr" in error
    assert {row["proportion"] for row in rows(tmp_path / "run")} == {"0.0", "1.0"}
    assert [row["refused"] for row in rows(tmp_path / "run")][::10] == ["0", "4", "8", "12"]


def in_process(rank):
    one, result = run(config(batch_size=30, loss=("metalad",), beta=0.9), processes=Processes(rank, 2))
    return one.criterion.omega, one.model.state_dict(), result.train_loss


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one, result = run(config(batch_size=60, loss=("metalad",), beta=0.9))
    for omega, weights, losses in run_processes(in_process, 2, tmp_path):
        torch.testing.assert_close(omega, one.criterion.omega, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weights, dict(one.model.state_dict()), rtol=1e-3, atol=1e-4)
        assert losses == pytest.approx(result.train_loss, rel=1e-4)


# What is refused


class Attention(nn.Module):
    """The pixels of a row are a token."""

    def __init__(self):
        super().__init__()
        self.qkv, self.fc = nn.Linear(8, 24), nn.Linear(64, 10)

    def forward(self, x):
        q, k, v = self.qkv(x.view(len(x), 1, 8, 8)).chunk(3, -1)
        return self.fc(F.scaled_dot_product_attention(q, k, v).flatten(1))


def test_a_model_without_the_derivative_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "build_model", lambda *args, **keywords: Attention())
    assert main([*JOB, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "meta_method 'jvp' needs" in error
    assert "here 'finite_difference', 'last_layer' work" in error
    assert not (tmp_path / "run").exists()
    assert main([*JOB, "--output", str(tmp_path / "run"), "--meta-method", "finite_difference"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_per_class": -1}, "expected meta_per_class of at least 0, got -1"),
        ({"loss": ("ce", "nisda")}, "expected meta_per_class with loss metalad, got 5"),
        ({"meta_lr": -1.0}, "expected meta_lr of at least 0, got -1.0"),
        ({"meta_lr": math.inf}, "expected meta_lr of at least 0, got inf"),
        ({"meta_start": 3}, r"expected meta_start below epochs \(3\), got 3"),
        ({"meta_start": -1}, "expected meta_start of at least 0, got -1"),
        ({"meta_from": "val"}, "expected meta_from to be heldout or train, got val"),
        (
            {"meta_method": "hessian"},
            "expected meta_method to be jvp, double_backward, finite_difference or last_layer, got hessian",
        ),
        ({"grad_accum": 2}, "expected grad_accum to be left out with meta_per_class, got 2"),
        (
            {"data": "digits-groups", "fairness": "iou"},
            "expected fairness to be left out with meta_per_class, got iou",
        ),
        ({"data": "digits-groups"}, "expected data without groups with meta_per_class, got digits-groups"),
        ({"meta_per_class": 0, "meta_lr": 1.0}, "expected meta_lr to be left out without meta_per_class, got 1.0"),
        ({"meta_per_class": 0, "meta_start": 1}, "expected meta_start to be left out without meta_per_class, got 1"),
        ({"meta_per_class": 0, "meta_from": "train"}, "expected meta_from to be left out without .*, got train"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(**changes)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match=r"^expected meta_per_class below 9[0-9], the images of [0-9], got 95$"):
        load_data(config(meta_per_class=95), 0)
    data = load_data(TrainConfig(), 0)
    for meta_from, least in (("train", 3), ("heldout", 4)):
        given = config(meta_per_class=3, meta_from=meta_from)
        wanted = f"^expected {least} training images or more .* from {meta_from}, got 2 of class [0-9]$"
        with pytest.raises(ValueError, match=wanted):
            meta_indices(given, data.train_targets, 0, data.class_names)
    assert isinstance(data, Data)
