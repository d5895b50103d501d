"""Several processes train as one does: ``torchrun -m classfair train`` on the CPU."""

import csv
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from classfair.cli import main
from classfair.training import Processes, TrainConfig
from classfair.training.batches import EvaluationOrder, TrainingOrder

# 231 images in steps of 60: the last step has 51, and its parts differ. Class weights make denominators differ too.
JOB = ["train", "--no-progress", "--epochs", "2", "--seeds", "1", "--loss", "cb", "metalad", "--beta", "0.9"]


def torchrun(world, *arguments, timeout=120):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "classfair", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def read(path, loss):
    state = torch.load(path / "checkpoints" / f"{loss}-seed0.pt", weights_only=True)
    with (path / "statistics" / f"{loss}-seed0.csv").open() as file:
        return state, list(csv.DictReader(file))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    assert main([*JOB, "-b", "60", "--output", str(path)]) == 0
    return path


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_train_and_count_as_one(world, alone, tmp_path):
    process = torchrun(world, *JOB, "-b", 60 // world, "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Run folder") == 1  # one process speaks
    for loss in ("cb", "metalad"):
        mine, my_rows = read(tmp_path / "run", loss)
        one, one_rows = read(alone, loss)
        torch.testing.assert_close(mine["model"], one["model"], rtol=2e-4, atol=2e-5)
        assert torch.equal(mine["val"]["counts"][0], one["val"]["counts"][0])  # every image exactly once
        for mine_row, one_row in zip(my_rows, one_rows, strict=True):
            assert mine_row["train_count"] == one_row["train_count"]
            for name in ("train_mass", "train_hit", "val_mass", "val_hit"):
                assert float(mine_row[name]) == pytest.approx(float(one_row[name]), rel=1e-3, abs=1e-3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == world


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_process_that_fails_ends_the_run_with_its_error(part, tmp_path):
    """One process reads an image that the other never sees."""
    pytest.importorskip("torchvision", reason="image folders need torchvision")
    pytest.importorskip("timm", reason="the small model is timm's")
    from PIL import Image

    for folder in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32)).save(tmp_path / folder / name / f"{i}.png")
    (tmp_path / part / "b" / "7.png").write_text("no image")
    job = ["train", "--data", f"imagefolder:{tmp_path}", "--model", "timm:test_resnet", "--img-size", 32, "-j", 0]
    start = time.monotonic()
    process = torchrun(2, *job, "--epochs", 3, "--no-progress", "--output", tmp_path / "run")
    assert process.returncode == 1
    assert f"classfair train: expected an image, got {tmp_path}/{part}/b/7.png" in process.stderr
    assert time.monotonic() - start < 90  # and not the half hour that the others would wait


@pytest.mark.slow
def test_an_output_folder_that_is_refused_ends_all_processes(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    process = torchrun(2, *JOB, "--output", tmp_path, timeout=90)
    assert process.returncode == 1
    assert "expected a new or empty output folder" in process.stderr


@pytest.mark.slow
def test_evaluation_has_the_running_averages_of_the_checkpoint(tmp_path):
    """Batch norm sees other images on every process; the model that is evaluated is the one that is kept."""
    pytest.importorskip("torchvision", reason="image folders need torchvision")
    timm = pytest.importorskip("timm", reason="the small model is timm's")
    from PIL import Image

    from classfair.training.image_folder import load_images

    g = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f"{i}.png")
    job = ["train", "--data", f"imagefolder:{tmp_path}", "--model", "timm:test_resnet", "--img-size", 32, "-j", 0]
    assert torchrun(2, *job, "-b", 4, "--epochs", 2, "--no-progress", "--output", tmp_path / "run").returncode == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "ce-seed0.pt", weights_only=True)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    model.load_state_dict(state["model"])
    config = TrainConfig.for_data(f"imagefolder:{tmp_path}", img_size=32)
    images, target = load_images(config, seed=0).val[0, list(range(24))]
    loss = torch.nn.functional.cross_entropy(model(images), target)
    assert float(state["val"]["loss"][0] / state["val"]["loss"][1]) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("world", range(1, 9))
def test_every_image_is_evaluated_exactly_once(world):
    for images in (0, 1, 7, 8, 50, 51):
        orders = [EvaluationOrder(images, 4, Processes(rank, world)) for rank in range(world)]
        seen = [i for order in orders for _, indices in order for i in indices]
        assert sorted(seen) == list(range(images))


@pytest.mark.parametrize("sampler", ["shuffle", "class-balanced"])
@pytest.mark.parametrize("images", [1, 5, 24, 53])
def test_a_step_has_the_same_images_however_it_is_dealt_out(images, sampler):
    targets = torch.arange(images) % 3

    def steps(world, batch_size, grad_accum):
        config = TrainConfig(sampler=sampler, batch_size=batch_size, grad_accum=grad_accum)
        orders = [TrainingOrder(targets, config, 7, 2, Processes(rank, world)) for rank in range(world)]
        assert len({(order.steps, len(order)) for order in orders}) == 1
        result = [[] for _ in range(orders[0].steps)]
        for order in orders:
            for i, (epoch, indices) in enumerate(order):
                assert epoch == 2
                assert indices  # no process is left without a batch
                if order.counts(i // grad_accum, i % grad_accum):
                    result[i // grad_accum] += indices
        return [sorted(step) for step in result]

    expected = steps(1, 12, 1)
    assert sum(map(len, expected)) == images
    assert all(len(step) > 1 for step in expected) or images == 1  # batch norm needs two
    for world, batch_size, grad_accum in ((2, 6, 1), (3, 4, 1), (1, 4, 3), (2, 2, 3), (4, 3, 1), (6, 2, 1)):
        assert steps(world, batch_size, grad_accum) == expected


METHODS = {
    "jtt": ("--method", "jtt", "--jtt-epochs", 1, "--loss", "ce"),
    "lff": ("--method", "lff", "--loss", "ce"),
    "crt": ("--stage2", "crt", "--stage2-epochs", 1, "--loss", "ce"),
    "lws": ("--stage2", "lws", "--stage2-epochs", 1, "--loss", "ce"),
    "tau-norm": ("--stage2", "tau-norm", "--loss", "ce"),
}


@pytest.mark.parametrize("name", ["lff", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "lff")])
def test_methods_of_two_processes_train_as_one(name, tmp_path):
    job = ["train", "--no-progress", "--epochs", "2", "--seeds", "1", *map(str, METHODS[name])]
    assert main([*job, "-b", "60", "--output", str(tmp_path / "alone")]) == 0
    process = torchrun(2, *job, "-b", 30, "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    (mine, my_rows), (one, one_rows) = read(tmp_path / "run", "ce"), read(tmp_path / "alone", "ce")
    assert mine["epoch"] == one["epoch"]
    torch.testing.assert_close(mine["model"], one["model"], rtol=2e-4, atol=2e-5)
    for mine_row, one_row in zip(my_rows, one_rows, strict=True):
        assert mine_row["train_count"] == one_row["train_count"]
    for part in ("difficulty", "errors"):
        if part in one:
            torch.testing.assert_close(mine[part], one[part], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_sweep_of_two_processes(tmp_path):
    job = ["train", "--no-progress", "--epochs", "2", "--seeds", "1", "--fairness", "dp-l2", "--fairness-sweep", "50"]
    assert main([*job, "-b", "60", "--output", str(tmp_path / "alone")]) == 0
    process = torchrun(2, *job, "-b", 30, "--output", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    mine, one = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("run", "alone"))
    for point, other in zip(mine["points"]["ce"], one["points"]["ce"], strict=True):
        assert point["test"] == pytest.approx(other["test"], rel=0.02, abs=0.01)
    assert torchrun(2, "train", "--no-progress", "--resume", tmp_path / "run").returncode == 0
