"""Heads, methods and second stages from the command line: what they train, resume, and what excludes what."""

import json
from dataclasses import replace

import pytest
import torch

from classfair.cli import main
from classfair.priors import tau_normalize
from classfair.training import TrainConfig, engine
from classfair.training.batches import Draw, derived_seed
from classfair.training.distributed import SINGLE
from classfair.training.jobs import prepare
from classfair.training.models import build_model
from classfair.training.sources import load_data
from tests.training.test_resume import interrupt

CPU = torch.device("cpu")
JOB = ["train", "--no-progress", "--epochs", "3", "--seeds", "1", "--save-every", "1", "--imbalance", "20"]
METHODS = {
    "etf": ("--head", "etf", "--loss", "ce", "isda"),
    "lff": ("--method", "lff", "--loss", "ce"),
    "jtt": ("--method", "jtt", "--jtt-epochs", "2", "--loss", "ce"),
    "crt": ("--stage2", "crt", "--stage2-epochs", "2", "--loss", "la"),
    "lws": ("--stage2", "lws", "--stage2-epochs", "2", "--loss", "metalad", "--drw-start", "1"),
    "tau": ("--stage2", "tau-norm", "--loss", "ce", "--lr-warmup-epochs", "1"),
}


def a_run(loss="ce", seed=0, **options):
    config = TrainConfig(**{"epochs": 2, "loss": (loss,), "seeds": 1, **options})
    return prepare(loss, seed, load_data(config, seed), config, CPU, SINGLE, None)


def train_on(run, epochs):
    for _ in range(epochs):
        run.next_epoch()
    return run


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


# What is trained


def test_a_fixed_head_stays_as_it_is():
    run = a_run(head="etf")
    before = copy_of(run.model)
    train_on(run, 1)
    moved = changed(run.model, before)
    assert "4.1.weight" not in moved
    assert {"0.weight", "2.weight", "4.0.weight"} <= moved
    rows = before["4.1.weight"]
    torch.testing.assert_close(rows @ rows.T, torch.full((10, 10), -1 / 9) + torch.eye(10) * 10 / 9)


@pytest.mark.parametrize(("stage2", "trained"), [("crt", {"4.weight", "4.bias"}), ("lws", {"4.scale"})])
@pytest.mark.parametrize("loss", ["ce", "isda"])
def test_a_second_stage_trains_the_classifier_alone(stage2, trained, loss):
    run = train_on(a_run(loss, stage2=stage2, stage2_epochs=3), 2)
    features = {name: value for name, value in copy_of(run.model).items() if not name.startswith("4.")}
    first_head = run.model.state_dict()["4.weight"].clone()
    run.prepare_second()
    run._switch(restored=False)
    start = copy_of(run.model)
    if stage2 == "crt":
        assert not torch.allclose(start["4.weight"], first_head)
    else:
        assert torch.equal(start["4.linear.weight"], first_head)
    engine.Run.next_epoch(run)
    assert changed(run.model, start) == trained
    assert not changed(run.model, features)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.75)  # a cosine of its own, of three epochs


def test_a_second_stage_draws_classes_equally_often():
    run = train_on(a_run(stage2="crt", stage2_epochs=1), 3)
    counts = run.train.count
    assert counts.sum() == 231
    assert counts.min() > 8  # of 231 / 10 with a standard deviation of 4.6; the rarest class has two images
    assert run.counts.min() == 2


def test_tau_normalisation_changes_the_rows_and_drops_the_bias():
    run = train_on(a_run(stage2="tau-norm", stage2_tau=0.5), 2)
    before = copy_of(run.model)
    train_on(run, 1)
    assert changed(run.model, before) == {"4.weight", "4.bias"}
    assert torch.equal(run.model.state_dict()["4.weight"], tau_normalize(before["4.weight"], 0.5))
    assert not run.model.state_dict()["4.bias"].any()
    assert run.train.count.tolist() == run.counts.tolist()


def test_errors_are_those_of_the_first_model_in_evaluation():
    run = train_on(a_run(method="jtt", jtt_epochs=2, epochs=3, jtt_weight=4), 2)
    data, first = run.data, run.model
    train_on(run, 1)
    with torch.no_grad():
        wrong = first.eval()(data.train.images).argmax(1) != data.train_targets
    assert 10 < wrong.sum() < len(wrong)  # two epochs leave the rare classes out
    assert torch.equal(run.errors.wrong, wrong)
    again = torch.bincount(data.train_targets[wrong], minlength=10)
    assert run.train.count.tolist() == (run.counts + 4 * again).tolist()
    fresh = build_model(run.config, 10, 0)
    assert run.model is not first
    other = a_run(method="jtt", jtt_epochs=1)
    torch.testing.assert_close(other.model.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_learning_from_failure_is_two_models_by_hand():
    """One step: the authors' losses, written again."""
    run = a_run(method="lff", batch_size=500, momentum=0.0, weight_decay=0.0)
    x, y = run.data.train.images, run.data.train_targets
    models = [build_model(run.config, 10, seed) for seed in (0, derived_seed(Draw.BIASED, 0) % 2**63)]
    losses = [torch.nn.functional.cross_entropy(model(x), y, reduction="none") for model in models]
    shares = []
    for loss in losses:
        largest = torch.stack([loss[y == c].max() for c in range(10)]).detach()
        shares.append(loss.detach() / largest[y])
    weight = shares[1] / (shares[0] + shares[1] + 1e-8)
    (weight * losses[0]).mean().backward()
    p = models[1](x).softmax(1)[torch.arange(len(y)), y]
    ((1 - p**0.7) / 0.7).mean().backward()
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.sub_(0.1 * parameter.grad)
    train_on(run, 1)
    torch.testing.assert_close(run.model.state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(run.pair.biased.state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-6)
    assert run.difficulty.seen.all()


# Resume


@pytest.mark.parametrize("name", METHODS)
def test_resumed_is_uninterrupted(name, tmp_path, monkeypatch):
    """Stopped in every epoch, those of the second stage and the first of it among them."""
    job = [*JOB, *METHODS[name]]
    assert main([*job, "--output", str(tmp_path / "whole")]) == 0
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "statistics").iterdir()}
    epochs = TrainConfig(**json_options(tmp_path / "whole")).total_epochs
    assert epochs == {"etf": 3, "lff": 3, "jtt": 5, "crt": 5, "lws": 5, "tau": 4}[name]
    assert next(iter(whole.values())).count(b"\n") == 10 * epochs + 1
    for at in range(2, epochs + 1):
        path = interrupt(tmp_path / str(at), at, monkeypatch, job=job)
        assert main(["train", "--no-progress", "--resume", str(path)]) == 0
        assert {p.name: p.read_bytes() for p in (path / "statistics").iterdir()} == whole
        assert (path / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()


def json_options(path):
    content = json.loads((path / "config.json").read_text())
    return {name: value for name, value in content.items() if name in TrainConfig.__dataclass_fields__}


def test_a_damaged_second_stage_is_refused(tmp_path, capsys):
    path = tmp_path / "run"
    assert main([*JOB, *METHODS["jtt"], "--output", str(path)]) == 0
    file = path / "checkpoints" / "ce-seed0.pt"
    state = torch.load(file, weights_only=True)
    for part, value in {"errors": {"wrong": torch.zeros(3, dtype=torch.bool)}, "epoch": 6}.items():
        torch.save({**state, part: value}, file)
        capsys.readouterr()
        assert main(["train", "--no-progress", "--resume", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "of the checkpoint" in error or "in the checkpoint" in error


# What excludes what


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "etf", "loss": ("ldam",)}, "expected head to be plain with ldam, which has a cosine head, got etf"),
        ({"head": "etf", "stage2": "crt"}, "expected head to be plain with stage2 crt"),
        ({"head": "etf", "batch_size": 1}, "expected batch_size of at least 2 with head etf"),
        ({"head": "cosine"}, "expected head to be plain or etf, got cosine"),
        ({"method": "lff"}, "expected loss to be ce with method lff, which weights samples itself, got ce la"),
        ({"method": "jtt", "loss": ("cb",)}, "expected loss to be ce with method jtt"),
        ({"method": "jtt", "loss": ("ce",), "stage2": "crt"}, "expected stage2 to be none with method jtt, got crt"),
        ({"method": "lff", "loss": ("ce",), "sampler": "class-balanced"}, "expected sampler to be shuffle with method"),
        ({"method": "jtt", "loss": ("ce",), "drw_start": 3}, "expected drw_start to be left out with method jtt"),
        ({"stage2": "tau-norm", "loss": ("ldam",)}, "expected stage2 other than tau-norm with ldam"),
        ({"head": "etf", "loss": ("estimated-offset",)}, "expected head to be plain with estimated-offset"),
        ({"stage2": "lws", "loss": ("estimated-offset",)}, "expected stage2 to be none with estimated-offset"),
        ({"stage2": "crt", "zero_uniformity": 0.1}, "expected zero_uniformity to be left out with stage2 crt"),
        (
            {"stage2": "crt", "loss": ("metalad",), "meta_per_class": 1},
            "expected meta_per_class to be left out with st",
        ),
        (
            {"method": "lff", "loss": ("ce",), "zero_uniformity": 0.1},
            "expected zero_uniformity to be left out with meth",
        ),
        ({"stage2": "crt", "stage2_epochs": 0}, "expected stage2_epochs of at least 1, got 0"),
        ({"stage2_tau": -0.1}, "expected stage2_tau from 0 to 2"),
        ({"method": "jtt", "loss": ("ce",), "jtt_epochs": 0}, "expected jtt_epochs of at least 1"),
    ],
)
def test_what_excludes_each_other_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_penalty_and_learning_from_failure_exclude_each_other(tmp_path, capsys):
    assert main([*JOB, "--method", "lff", "--fairness", "iou", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "expected fairness to be none with method lff, got iou" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_too_narrow_a_model_for_a_fixed_head(monkeypatch):
    from classfair.training import models

    monkeypatch.setattr(models, "DIGITS_WIDTHS", (64, 64, 9))
    with pytest.raises(ValueError, match="ETFLinear: expected at least as many features as classes"):
        a_run(head="etf")


def test_groups_and_their_penalty_go_with_stages(tmp_path):
    job = [*JOB, "--fairness", "dp-l2", "--imbalance", "1", "--loss", "ce"]
    assert main([*job, "--method", "jtt", "--jtt-epochs", "1", "--output", str(tmp_path / "jtt")]) == 0
    assert main([*job, "--stage2", "tau-norm", "--output", str(tmp_path / "tau")]) == 0
    job = [*JOB, "--data", "digits-groups", "--method", "lff", "--output", str(tmp_path / "lff")]
    assert main([*job, "--imbalance", "1"]) == 0


def test_options_of_methods_are_kept_by_a_resume():
    config = TrainConfig(loss=("ce",), method="jtt")
    assert replace(config, jtt_epochs=5).total_epochs == 155
    assert TrainConfig(stage2="tau-norm").total_epochs == 151
    assert TrainConfig().total_epochs == 150
