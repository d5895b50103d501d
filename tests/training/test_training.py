"""The training job as a library: data, pairing, determinism, results, run folder."""

import math
import os

import numpy as np
import pytest
import torch

import classfair
from classfair.training import (
    DeviceUnavailableError,
    Processes,
    RunFolder,
    TrainConfig,
    resolve_device,
    summarise,
    train,
)
from classfair.training.digits import digits_long_tailed, long_tailed_counts
from classfair.training.engine import Run
from classfair.training.jobs import fit
from classfair.training.models import mlp
from classfair.training.report import accuracy_chart
from classfair.training.sources import load_data
from classfair.training.totals import RunResult, Totals

CPU = torch.device("cpu")


def ignore(epoch):
    pass


def run_one(loss, seed, config):
    run = Run(loss, seed, load_data(config, seed), config, CPU, Processes())
    return fit(run, None, ignore), run.state_dict()


@pytest.fixture(scope="module")
def default_job():
    """The job of ``classfair train`` without flags: three paired seeds, both losses."""
    config = TrainConfig()
    return config, [run_one(loss, seed, config) for seed in range(3) for loss in config.loss]


@pytest.mark.slow
def test_logit_adjustment_helps_the_few_shot_classes(default_job):
    config, runs = default_job
    results = [result for result, _ in runs]
    summary = summarise(results, config)
    ce, la = summary["ce"], summary["la"]
    assert la["few"]["mean"] > ce["few"]["mean"] + 0.04
    assert la["all"]["mean"] > ce["all"]["mean"]
    assert la["geometric_mean"]["mean"] > ce["geometric_mean"]["mean"]
    assert ce["many"]["mean"] > 0.93
    assert 0.72 < ce["all"]["mean"] < 0.85
    for seed in range(config.seeds):
        few = {r.loss: r.columns(config)["few"] for r in results if r.seed == seed}
        assert few["la"] >= few["ce"]


def test_summary_is_mean_and_sample_sd(default_job):
    config, runs = default_job
    summary = summarise([result for result, _ in runs], config)
    few = [result.columns(config)["few"] for result, _ in runs if result.loss == "la"]
    assert summary["la"]["few"]["mean"] == pytest.approx(sum(few) / 3)
    sd = math.sqrt(sum((x - sum(few) / 3) ** 2 for x in few) / 2)
    assert summary["la"]["few"]["sd"] == pytest.approx(sd)


def test_checkpoint_predicts_what_was_reported(default_job):
    config, runs = default_job
    result, checkpoint = runs[1]
    model = mlp((64, 64, 32, 10), torch.Generator())
    model.load_state_dict(checkpoint["model"])
    split = digits_long_tailed(result.seed, config.imbalance)
    hits = split.test_y[model(split.test_x).argmax(1) == split.test_y]
    assert torch.bincount(hits, minlength=10).tolist() == result.correct.tolist()
    criterion = classfair.LogitAdjustedLoss(torch.ones(10))
    criterion.load_state_dict(checkpoint["criterion"])
    expected = classfair.logit_adjustment(torch.from_numpy(result.train_count))
    torch.testing.assert_close(criterion.state_dict()["offset"], expected)


@pytest.mark.parametrize("loss", ["ce", "la"])
def test_same_seed_gives_the_same_bits(loss):
    config = TrainConfig(epochs=3)
    first, first_state = run_one(loss, 5, config)
    torch.rand(1)  # whatever else draws random numbers in between
    second, second_state = run_one(loss, 5, config)
    assert first.train_loss == second.train_loss
    assert first.correct.tolist() == second.correct.tolist()
    for name, value in first_state["model"].items():
        assert torch.equal(value, second_state["model"][name])


def test_losses_of_a_seed_are_paired():
    """With tau = 0 logit adjustment is cross-entropy: same weights and batches, same model."""
    config = TrainConfig(epochs=3, seeds=1, tau=0.0)
    ce, la = train(config, None, ignore)
    np.testing.assert_allclose(ce.train_loss, la.train_loss, rtol=1e-5)
    assert ce.correct.tolist() == la.correct.tolist()


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(TrainConfig(epochs=1, seeds=1), None, ignore)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_long_tailed_profile():
    assert long_tailed_counts(40).tolist() == [80, 53, 35, 23, 15, 10, 6, 4, 3, 2]
    assert long_tailed_counts(1).tolist() == [80] * 10
    assert long_tailed_counts(80)[-1] == 1
    for imbalance in (0.5, 81, math.nan):
        with pytest.raises(ValueError, match="expected imbalance from 1 to 80"):
            long_tailed_counts(imbalance)


def test_split():
    split, other = digits_long_tailed(0, 40), digits_long_tailed(1, 40)
    counts = classfair.class_counts(split.train_y, 10)
    assert sorted(counts.tolist()) == [2, 3, 4, 6, 10, 15, 23, 35, 53, 80]
    assert counts.tolist() != classfair.class_counts(other.train_y, 10).tolist()
    tested = classfair.class_counts(split.test_y, 10)
    assert 87 <= tested.min() <= tested.max() <= 92
    torch.testing.assert_close(split.train_x.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    # No image is on both sides.
    both = torch.cat([split.train_x, split.test_x]).unique(dim=0)
    assert len(both) == len(split.train_x) + len(split.test_x)


def test_model_has_the_initial_distribution_of_linear():
    model = mlp((64, 64, 32, 10), torch.Generator().manual_seed(0))
    for linear, inputs in ((model[0], 64), (model[2], 64), (model[4], 32)):
        weight = linear.weight.detach()
        bound = inputs**-0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert model(torch.zeros(2, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "expected epochs of at least 1, got 0"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"lr": 0.0}, "expected lr greater than 0, got 0.0"),
        ({"lr": math.nan}, "expected lr greater than 0, got nan"),
        ({"tau": math.inf}, "expected tau of at least 0, got inf"),
        ({"momentum": 1.0}, "expected momentum from 0 up to but excluding 1, got 1.0"),
        ({"weight_decay": -1.0}, "expected weight_decay of at least 0, got -1.0"),
        ({"seed": -1}, r"expected seed from 0 up to 2\*\*32 - seeds, got -1"),
        ({"seeds": 0}, "expected seeds of at least 1, got 0"),
        ({"imbalance": 0.5}, "expected imbalance from 1 to 80 .*, got 0.5"),
        ({"imbalance": 81.0}, "expected imbalance from 1 to 80 .*, got 81.0"),
        ({"few_shot": 26}, r"expected few_shot from 0 to many_shot \(25\), got 26"),
        (
            {"loss": ()},
            "expected loss to be one or several of ce, la, ldam, cb, focal, isda, nisda, distance, metalad, "
            "estimated-offset, got none",
        ),
        (
            {"loss": ("ce", "mse")},
            "expected loss to be one or several of ce, la, ldam, cb, focal, isda, nisda, distance, metalad, "
            "estimated-offset, got ce mse",
        ),
        ({"data": "mnist"}, "expected data to be digits, .* or csv:FILE.csv, got mnist"),
        ({"data": "imagefolder:"}, "expected data to be digits, .* or csv:FILE.csv, got imagefolder:"),
        ({"opt": "lion"}, "expected opt to be sgd or adamw, got lion"),
        ({"beta": 1.0}, "expected beta from 0 up to but excluding 1, got 1.0"),
        ({"scale": (0.5, 0.1)}, "expected scale as two ascending shares of 1, got 0.5 0.1"),
        ({"mixup": 0.2}, "expected mixup to be left out with digits, got 0.2"),
        ({"drw_start": 150}, r"expected drw_start below epochs \(150\), got 150"),
        ({"drw_start": 1, "loss": ("cb",)}, "expected drw_start without cb, which has class weights of its own, got 1"),
        ({"loss_warmup": 1}, r"expected loss_warmup with losses that have something to ramp \(la, ldam, cb\), got 1"),
        ({"fairness": "dp"}, "expected fairness to be none, dp-l2, dp-mi, eo-l2, eo-mi or iou, got dp"),
        (
            {"fairness": "iou"},
            "expected fairness with groups: data digits-groups, or groups and group_column, got iou",
        ),
        ({"fairness_weight": 3.0}, "expected fairness_weight to be left out without fairness, got 3.0"),
        ({"fairness_weight": -1.0}, "expected fairness_weight of at least 0, got -1.0"),
        (
            {"groups": "/g.csv", "group_column": "a"},
            "expected groups with --data imagefolder:DIR or list:FILE, got /g.csv",
        ),
        ({"group_column": "a"}, "expected group_column together with groups, a CSV file, got a"),
        (
            {"data": "imagefolder:x", "model": "resnet50", "groups": "/g.csv"},
            "expected group_column together with groups, a CSV file, got nothing",
        ),
        (
            {"data": "imagefolder:x", "model": "resnet50", "groups": "/g.csv", "group_column": "a", "mixup": 0.2},
            "expected mixup to be left out with groups, got 0.2",
        ),
        ({"model": "resnet50"}, "expected model to be mlp for digits, and another one for image folders, got resnet50"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**changes)


def test_device():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="expected device to be auto, cpu"):
        resolve_device("toaster")
    with pytest.raises(DeviceUnavailableError, match="got cuda:99"):
        resolve_device("cuda:99")


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.write("a", b"old")
    before = sorted(folder.path.iterdir())

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        folder.write("a", b"new and longer")
    assert sorted(folder.path.iterdir()) == before
    assert (folder.path / "a").read_bytes() == b"old"


def test_failed_job_removes_the_folders_it_made_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    folder = RunFolder(tmp_path / "mine" / "new" / "run")

    def fail():
        with folder:
            folder.write("config.json", b"{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_chart_of_many_classes_some_of_them_without_images():
    config = TrainConfig.for_data("imagefolder:x", loss=("ce", "focal"), seeds=2)
    totals = Totals(100)
    totals.stats.count[0, :90], totals.stats.correct[0, :90] = 50, torch.arange(90) % 50
    names, counts = [str(c) for c in range(100)], np.arange(100, 0, -1)
    runs = [RunResult(loss, seed, names, counts, totals, totals, [1.0]) for loss in config.loss for seed in (0, 1)]
    assert accuracy_chart(runs, config).startswith(b"\x89PNG")


class _Nans(torch.nn.Module):
    """A model whose logits are not finite for every third image of an evaluation."""

    def __init__(self, model, value):
        super().__init__()
        self.model, self.value = model, value

    def forward(self, x):
        logits = self.model(x)
        if not self.training:
            logits[::3, 2] = self.value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("data", ["digits", "digits-groups"])
def test_validation_rows_without_finite_logits_are_wrong_predictions(value, data, capsys):
    config = TrainConfig.for_data(data, epochs=1, val_batch_size=300)
    run = Run("ce", 0, load_data(config, 0), config, CPU, Processes())
    run.next_epoch()
    right = run.val
    capsys.readouterr()
    run.model = _Nans(run.model, value)
    found = run.evaluate()
    assert found.count.tolist() == right.count.tolist()
    assert found.correct.sum() < right.correct.sum()
    lost = int(found.count.sum() - found.predicted.sum())
    assert lost == sum(-(-n // 3) for n in (300, 300, len(run.data.val.target) - 600))
    assert f"ce seed 0, epoch 1: {lost} validation images without finite logits" in capsys.readouterr().err
    if found.groups:
        assert found.stats.count.sum(1).tolist() == right.stats.count.sum(1).tolist()
    assert 0 <= found.summary("val", run.group_names)["val_accuracy"] < 0.7


def test_the_last_step_of_an_epoch_diverging_is_called_that(monkeypatch):
    config = TrainConfig(epochs=2)
    run = Run("ce", 0, load_data(config, 0), config, CPU, Processes())
    step, steps = run.optimizer.step, []

    def last_diverges(*arguments, **keywords):
        steps.append(step(*arguments, **keywords))
        if len(steps) == 4:
            for parameter in run.model.parameters():
                parameter.data.fill_(math.nan)

    monkeypatch.setattr(run.optimizer, "step", last_diverges)
    with pytest.raises(FloatingPointError, match="expected finite weights after epoch 1 of ce, got nan or inf: try a"):
        run.next_epoch()
    assert len(steps) == 4


def test_the_first_step_diverging_is_not_called_unreadable():
    config = TrainConfig(epochs=1)
    run = Run("ce", 0, load_data(config, 0), config, CPU, Processes())
    for parameter in run.model.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="expected finite ce loss, got nan in epoch 1"):
        run.next_epoch()
