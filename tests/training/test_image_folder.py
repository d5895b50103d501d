"""Training on a folder of real digit images, from the command line: models, augmentation, bad input."""

import csv
import gzip
import json
import os
import shutil

import numpy as np
import pytest
import torch

from classfair import cross_entropy_with_stats, effective_counts, effective_frequency, effective_number_weights
from classfair.cli import main

pytest.importorskip("torchvision", reason="image folders need torchvision")
timm = pytest.importorskip("timm", reason="timm's models need timm")

from classfair.training import TrainConfig, saved_config  # noqa: E402
from classfair.training.image_folder import _val_transform, load_images  # noqa: E402
from classfair.training.objective import read_effective_counts  # noqa: E402
from classfair.training.report import METRICS_VERSION  # noqa: E402
from tests.support.training import stopped_where  # noqa: E402

CLASSES = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]  # as folders sort
COUNTS = dict(zip(CLASSES, (30, 20, 16, 12, 10, 8, 6, 5, 4, 3), strict=True))
DIGITS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
TINY = ("--model", "timm:test_resnet", "--img-size", "32", "--scale", "0.7", "1", "--hflip", "0", "-j", "0")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Long-tailed training folders and balanced validation folders of scikit-learn's digits as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("images")
    images, labels = load_digits(return_X_y=True)
    for name, digit in DIGITS.items():
        mine = images[labels == digit].reshape(-1, 8, 8)
        for part, chosen in (("train", mine[: COUNTS[name]]), ("val", mine[100:108])):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(chosen):
                picture = Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
                picture.save(root / part / name / f"{i:03}.png")
    return root


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to damage."""
    return shutil.copytree(folder, tmp_path / "images")


def train(folder, output, *flags):
    job = ("train", "--data", f"imagefolder:{folder}", *TINY, "--no-progress", "--output", output, *flags)
    return main([str(argument) for argument in job])


def read_metrics(output):
    return json.loads((output / "metrics.json").read_text())


def weights(output, name="ce-seed0"):
    return torch.load(output / "checkpoints" / f"{name}.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_it_learns_and_reports_by_class_name(folder, tmp_path):
    assert train(folder, tmp_path, "--epochs", 12, "--lr", 0.05, "-b", 16, "--loss", "ce", "la", "--few-shot", 5) == 0
    metrics = read_metrics(tmp_path)
    assert metrics["class_names"] == CLASSES
    by_loss = {run["loss"]: run for run in metrics["runs"]}
    assert by_loss["ce"]["all"] > 0.4  # chance is 0.1
    assert by_loss["ce"]["train_count"] == list(COUNTS.values())
    with (tmp_path / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows[:10]] == CLASSES
    assert all(row["test_count"] == "8" for row in rows)
    assert sum(int(row["predicted"]) for row in rows[:10]) == 80


def test_statistics_of_every_epoch_come_from_the_training_pass(folder, tmp_path):
    assert train(folder, tmp_path, "--epochs", 2, "-b", 16) == 0
    with (tmp_path / "statistics" / "ce-seed0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["epoch"]), int(r["class"])) for r in rows] == [(e, c) for e in (1, 2) for c in range(10)]
    for epoch in ("1", "2"):
        mine = [r for r in rows if r["epoch"] == epoch]
        assert [int(r["train_count"]) for r in mine] == list(COUNTS.values())
        assert sum(float(r["train_mass"]) for r in mine) == pytest.approx(sum(COUNTS.values()), rel=1e-5)
        assert all(0 < float(r["train_hit"]) <= int(r["train_count"]) for r in mine)
        assert sum(int(r["val_predicted"]) for r in mine) == 80


OPTIONS = (
    ("--mixup", 0.2, "--cutmix", 1.0, "--auto-augment", "ta_wide", "--random-erase", 0.5),
    ("--loss", "ldam", "--drw-start", 1, "--lr-scheduler", "step", "--lr-warmup-epochs", 1),
    ("--loss", "cb", "--sampler", "class-balanced", "--opt", "adamw", "--lr", 1e-3, "--loss-warmup", 1),
    ("--auto-augment", "ra", "--amp", "--amp-dtype", "float16", "--lr-scheduler", "constant"),
    ("--model", "resnet18", "--loss", "ldam", "--max-margin", 0.3),
    ("--loss", "isda", "--strength", 1, "--grad-accum", 2, "--model", "resnet18"),
    ("--model", "timm:test_vit", "--model-kwargs", "img_size=32", "--loss", "la", "--tau", 2),
)


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss", "metalad", "--omega", 1, 0.1, 0.5, "--mixup", 0.2, "--amp"),
        ("--loss", "focal", "--label-smoothing", 0.1, "--amp", "--clip-grad", 1.0, "--grad-accum", 2),
        *(pytest.param(flags, marks=pytest.mark.slow) for flags in OPTIONS),
    ],
)
def test_options_train(flags, folder, tmp_path):
    assert train(folder, tmp_path, "--epochs", 2, "-b", 32, *flags) == 0
    (run,) = read_metrics(tmp_path)["runs"]
    assert all(np.isfinite(run["train_loss"]))


def test_augmentation_depends_on_neither_workers_nor_batches(folder, tmp_path):
    flags = ("--epochs", 1, "--auto-augment", "ta_wide", "--random-erase", 0.5)
    for name, more in {"a": ("-j", 0), "b": ("-j", 2), "c": ("-j", 0, "-b", 16, "--grad-accum", 2)}.items():
        assert train(folder, tmp_path / name, *flags, *(("-b", 32) if name != "c" else ()), *more) == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)  # batch norm sees other batches; but the images are the same:
    config = TrainConfig.for_data(f"imagefolder:{folder}", img_size=32, auto_augment="ta_wide")
    data = load_images(config, seed=0)
    images, target = data.train[3, [5, 60, 7]]
    again, _ = data.train[3, [60]]
    assert torch.equal(images[1:2], again)
    assert not torch.equal(data.train[4, [60]][0], again)
    assert target.tolist() == [0, 2, 0]


def test_loading_images_leaves_the_random_state_alone(folder):
    data = load_images(TrainConfig.for_data(f"imagefolder:{folder}", img_size=32, mixup=0.2), seed=0)
    before = torch.get_rng_state()
    data.train[0, [1, 2, 3]]
    assert torch.equal(torch.get_rng_state(), before)


def test_split_holds_out_a_share_of_every_class(folder):
    config = TrainConfig.for_data(f"imagefolder:{folder / 'train'}", split=0.34)
    data = load_images(config, seed=1)
    other = load_images(config, seed=2)
    assert len(data.train_targets) + data.num_val == sum(COUNTS.values())
    assert not {path for path, _ in data.train.samples} & {path for path, _ in data.val.samples}
    assert [path for path, _ in data.val.samples] != [path for path, _ in other.val.samples]
    assert {label for _, label in data.val.samples} == set(range(10))


def test_effective_frequency_of_an_earlier_run(folder, tmp_path):
    assert train(folder, tmp_path / "first", "--epochs", 2, "-b", 32, "--loss", "ce", "la") == 0
    second = ("--epochs", 1, "-b", 32, "--loss", "la", "cb", "--effective-frequency", tmp_path / "first")
    assert train(folder, tmp_path / "second", *second) == 0
    run = read_metrics(tmp_path / "first")["runs"][0]
    frequency = torch.tensor(run["effective_frequency"]).clamp_min(1e-3)
    checkpoint = torch.load(tmp_path / "second/checkpoints/la-seed0.pt", weights_only=True)
    torch.testing.assert_close(checkpoint["criterion"]["offset"], (frequency / frequency.sum()).log())
    checkpoint = torch.load(tmp_path / "second/checkpoints/cb-seed0.pt", weights_only=True)
    counts = frequency * torch.tensor(run["val_count"])
    assert run["val_count"] != run["train_count"]
    torch.testing.assert_close(checkpoint["criterion"]["reweight"], effective_number_weights(counts, 0.9999))


def test_effective_frequency_of_a_class_without_validation_images(tmp_path):
    """One rule, in the command and in the function."""
    logits, target = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 5 % 3
    _, stats = cross_entropy_with_stats(logits, target)
    frequency = [None if value != value else value for value in effective_frequency(stats).tolist()]
    run = {"loss": "ce", "seed": 0, "effective_frequency": frequency, "val_count": stats.count[0].tolist()}
    metrics = {"format_version": METRICS_VERSION, "class_names": ["a", "b", "c", "d"], "runs": [run]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    la, cb = (read_effective_counts(tmp_path, loss, 0, ["a", "b", "c", "d"]).float() for loss in ("la", "cb"))
    torch.testing.assert_close(la, effective_counts(stats, torch.ones(4)))
    torch.testing.assert_close(cb, effective_counts(stats))
    torch.testing.assert_close(la[3], la[:3].mean())
    assert cb.min() > 0


def test_weights_of_an_earlier_run_start_the_next(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "first", "--epochs", 1, "-b", 32) == 0
    path = tmp_path / "first" / "checkpoints" / "ce-seed0.pt"
    assert train(folder, tmp_path / "second", "--epochs", 1, "-b", 200, "--lr", 1e-9, "--weights", path) == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in first if "running" not in k and "num_" not in k)
    capsys.readouterr()
    assert train(folder, tmp_path / "third", "--epochs", 1, "--model", "timm:test_vit", "--weights", path) == 2
    assert "expected weights of the same architecture" in one_line(capsys)
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert train(folder, tmp_path / "third", "--weights", tmp_path / "evil.pt") == 2
    assert "not safe to load" in one_line(capsys)
    assert train(folder, tmp_path / "third", "--weights", tmp_path / "nowhere.pt") == 2
    assert "expected weights in a readable file" in one_line(capsys)
    assert not (tmp_path / "third").exists()


def test_a_head_of_another_shape_stays_new(folder, tmp_path, copy):
    assert train(folder, tmp_path / "first", "--epochs", 1, "-b", 32) == 0
    for part in ("train", "val"):
        shutil.rmtree(copy / part / "zero")
    path = tmp_path / "first" / "checkpoints" / "ce-seed0.pt"
    assert train(copy, tmp_path / "second", "--epochs", 1, "-b", 300, "--lr", 1e-9, "--weights", path) == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert second["fc.weight"].shape[0] == 9
    kept = [k for k in first if k.endswith("weight") and not k.startswith("fc")]
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in kept)


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


def test_a_corrupt_image_is_named(copy, tmp_path, capsys):
    damage(copy / "train" / "one" / "002.png")
    assert train(copy, tmp_path / "run", "--epochs", 1, "-j", 2) == 1
    error = one_line(capsys)
    assert str(copy / "train" / "one" / "002.png") in error
    assert "--bad-images skip" in error
    assert not (tmp_path / "run").exists()


def test_a_corrupt_image_is_skipped_by_name_on_request(copy, tmp_path, capfd):
    damage(copy / "train" / "one" / "002.png")
    (copy / "val" / "two" / "000.png").write_text("no image at all")
    flags = ("--epochs", 1, "-b", 16, "--bad-images", "skip", "--mixup", 0.2)
    assert train(copy, tmp_path / "run", *flags) == 0
    error = capfd.readouterr().err
    assert f"skipped {copy}/train/one/002.png" in error
    assert f"skipped {copy}/val/two/000.png" in error
    with (tmp_path / "run" / "statistics" / "ce-seed0.csv").open() as file:
        rows = {int(row["class"]): row for row in csv.DictReader(file)}
    assert int(rows[CLASSES.index("two")]["val_count"]) == 7
    assert sum(int(row["val_count"]) for row in rows.values()) == 79


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f / "val"), "expected val_dir, split, or folders train and val"),
        (shutil.rmtree, "expected val_dir, split, or folders train and val"),
        (lambda f: [p.unlink() for p in (f / "train" / "one").iterdir()], "training images of every class in"),
        (lambda f: shutil.rmtree(f / "val" / "one"), "expected validation images of every class, got none of one"),
        (lambda f: (f / "val" / "eleven").mkdir(), "got eleven as well"),
        (lambda f: os.mkdir(os.fsencode(f / "train") + b"/caf\xe9"), "expected class folders with printable names"),
        (lambda f: [shutil.rmtree(p) for p in (f / "train").iterdir()], "expected one folder of images per class"),
    ],
)
def test_what_is_missing_is_named(break_it, message, copy, tmp_path, capsys):
    break_it(copy)
    assert train(copy, tmp_path / "run", "--epochs", 1) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1), (3, 1000)])
def test_an_image_of_one_row_of_pixels_is_not_scaled_to_millions(size):
    from PIL import Image

    image = Image.new("RGB", size)
    middle = [(side - 8 * min(size)) // 2 if side > 8 * min(size) else 0 for side in size]
    for x in range(middle[0], size[0] - middle[0]):
        for y in range(middle[1], size[1] - middle[1]):
            image.putpixel((x, y), (255, 255, 255))
    pixels = _val_transform(TrainConfig.for_data("imagefolder:x", img_size=32))(image)
    assert pixels.shape == (3, 32, 32)
    assert pixels.min() > 2  # white: the middle


def test_an_image_that_is_not_so_long_is_scaled_as_ever():
    from PIL import Image
    from torchvision.transforms import v2

    image = Image.effect_noise((41, 320), 90).convert("RGB")
    plain = v2.CenterCrop(32)(v2.Resize(37, antialias=True)(image))
    config = TrainConfig.for_data("imagefolder:x", img_size=32)
    expected = v2.Compose(_val_transform(config).transforms[3:])(plain)
    torch.testing.assert_close(_val_transform(config)(image), expected, rtol=0, atol=0)


def test_what_the_scan_leaves_out_is_said_once_and_recorded(copy, tmp_path, capsys):
    (copy / "train" / "one" / ".cache").mkdir()
    for name in ("a.gif", "b.txt"):
        (copy / "train" / "one" / name).write_text("text")
    os.mkfifo(copy / "val" / "two" / "pipe.png")
    assert train(copy, tmp_path / "run", "--epochs", 1, "--seeds", 2) == 0
    error = one_line(capsys)
    assert "left out 1 hidden (train/one/.cache), 2 of unknown extensions (train/one/a.gif, train/one/b.txt)" in error
    assert "1 not regular files (val/two/pipe.png)" in error
    record = json.loads(gzip.decompress((tmp_path / "run" / "images.json.gz").read_bytes()))
    assert record["left_out"]["of unknown extensions"]["count"] == 2
    assert len(record["folders"]["training/zero"]) == COUNTS["zero"]


@pytest.mark.parametrize(("data", "val"), [(".", "val"), ("train", ".")])
def test_validation_images_within_those_of_training_are_refused(data, val, copy, tmp_path, capsys):
    """They would be a class."""
    assert train(copy / data, tmp_path / "run", "--val-dir", copy / val) == 2
    assert "expected validation images apart from those of training, got " in one_line(capsys)


def test_nothing_but_corrupt_images_is_an_error(copy, tmp_path, capfd):
    for path in (copy / "val").rglob("*.png"):
        path.write_text("no image")
    assert train(copy, tmp_path / "run", "--epochs", 1, "--bad-images", "skip") == 1
    assert "expected validation images that can be read, got none" in capfd.readouterr().err


def test_a_last_step_of_one_image_joins_the_one_before(copy, tmp_path):
    (copy / "train" / "zero" / "000.png").unlink()  # 113 images
    assert train(copy, tmp_path / "run", "--epochs", 1, "-b", 16, "--model", "resnet18") == 0


def test_a_run_goes_on_where_its_data_has_moved_to(copy, tmp_path, monkeypatch):
    whole = ("--epochs", 2, "-b", 64)
    assert train(copy, tmp_path / "whole", *whole) == 0
    monkeypatch.chdir(copy.parent)
    with stopped_where(lambda run: run.epoch == 1, monkeypatch):
        assert train("images", tmp_path / "run", *whole) == 130
    copy.rename(tmp_path / "elsewhere")
    resume = ["train", "--no-progress", "--resume", str(tmp_path / "run")]
    assert main(resume) == 2
    assert main([*resume, "--data", "imagefolder:elsewhere"]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_weights_with_a_cosine_head_start_another(folder, tmp_path):
    assert train(folder, tmp_path / "first", "--epochs", 1, "--loss", "ldam") == 0
    path = tmp_path / "first" / "checkpoints" / "ldam-seed0.pt"
    assert train(folder, tmp_path / "second", "--epochs", 1, "--loss", "ldam", "--weights", path) == 0


def test_a_class_without_validation_images_is_left_out_on_request(copy, tmp_path):
    shutil.rmtree(copy / "val" / "five")
    assert train(copy, tmp_path / "run", "--epochs", 1, "--allow-missing") == 0
    (run,) = read_metrics(tmp_path / "run")["runs"]
    assert run["accuracy"][1] is None
    rest = [a for a in run["accuracy"] if a is not None]
    assert len(rest) == 9  # and the labels of the others have not shifted:
    assert run["all"] == pytest.approx(sum(rest) / 9)
    with (tmp_path / "run" / "per_class.csv").open() as file:
        assert [row["test_count"] for row in csv.DictReader(file)] == ["8", "0", *["8"] * 8]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--model", "resnet1"), 2, "expected model to be a name that torchvision or timm knows, got resnet1"),
        (("--model", "vit_b_16"), 2, "expected a model for images of 32 pixels, got Wrong image height"),
        (("--model-kwargs", "no_such_thing=3"), 2, "expected a model for images of 32 pixels, got"),
        (("--model", "mlp"), 2, "expected model to be mlp for digits"),
        (("--val-dir", "/nowhere"), 2, "expected a folder of images, got /nowhere, which is missing"),
        (("--split", "0.001"), 2, "expected a split that leaves images"),
        (("--auto-augment", "magic"), 2, "expected auto_augment to be none, ra, ta_wide, augmix or imagenet"),
        (("--model-kwargs", "depth"), 2, "expected model_kwargs as NAME=VALUE, got depth"),
        (
            ("--loss", "la", "--effective-frequency", "/nowhere"),
            2,
            "expected effective_frequency to name a finished run folder",
        ),
    ],
)
def test_bad_options_are_one_line(flags, code, message, folder, tmp_path, capsys):
    data = folder / "train" if "--split" in flags or "--val-dir" in flags else folder
    assert train(data, tmp_path / "run", "--epochs", 1, *flags) == code
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_but_for_the_head(folder, tmp_path, capsys, monkeypatch):
    import torchvision

    thousand = torchvision.models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda self, *_, **__: thousand)
    flags = ("--model", "resnet18", "--epochs", 1, "--lr", 1e-12, "--weights", "pretrained")
    assert train(folder, tmp_path / "run", *flags) == 0
    state = weights(tmp_path / "run")
    assert state["fc.weight"].shape == (10, 512)
    assert torch.allclose(state["layer3.0.conv1.weight"], thousand["layer3.0.conv1.weight"], atol=1e-9)
    capsys.readouterr()

    def no_network(self, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", no_network)
    assert train(folder, tmp_path / "other", *flags) == 3
    assert "pretrained weights cannot be had (no network); --weights PATH takes a file" in one_line(capsys)
    assert not (tmp_path / "other").exists()


def test_help_shows_the_defaults_of_image_folders(capsys):
    assert main(["train", "--data", "imagefolder:x", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "resnet50" in text
    assert TrainConfig.for_data("imagefolder:x").epochs == 90


@pytest.fixture
def stopped(copy, tmp_path, monkeypatch):
    """A job stopped after its first epoch, with --split; train and val of the images are two classes more or less."""

    def start(*flags, data=copy):
        with stopped_where(lambda run: run.epoch == 1, monkeypatch):
            assert train(data, tmp_path / "run", "--epochs", 2, "-b", 64, *flags) == 130
        return tmp_path / "run"

    return start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.copy(f / "one" / "001.png", f / "one" / "new.png"), "got 1 added (one/new.png)"),
        (lambda f: (f / "one" / "001.png").unlink(), "got 1 removed (one/001.png)"),
        (lambda f: (f / "eight" / "029.png").rename(f / "one" / "029.png"), "1 moved (eight/029.png to one/029.png)"),
        (lambda f: (f / "one" / "001.png").rename(f / "one" / ".001.png"), "got 1 removed (one/001.png)"),
    ],
)
def test_images_that_changed_since_the_job_began_are_named(change, message, stopped, copy, capsys):
    run = stopped("--split", 0.34, data=copy / "train")
    change(copy / "train")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["train", "--no-progress", "--resume", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"expected the images that the job in {run} began with, got" in error
    assert message in error
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_an_image_that_moved_from_validation_to_training_is_named(stopped, copy, capsys):
    run = stopped()
    (copy / "val" / "one" / "007.png").rename(copy / "train" / "one" / "abc.png")
    (copy / "val" / "two" / "006.png").rename(copy / "train" / "two" / "006.png")
    capsys.readouterr()
    assert main(["train", "--no-progress", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "1 added (training/one/abc.png); 1 removed (validation/one/007.png)" in error
    assert "1 moved (validation/two/006.png to training/two/006.png)" in error


def test_another_split_of_the_same_images_is_noticed(stopped, copy, capsys, monkeypatch):
    """As of another version of scikit-learn."""
    from classfair.training import class_folders

    split = class_folders.split_samples
    run = stopped("--split", 0.34, data=copy / "train")
    monkeypatch.setattr(class_folders, "split_samples", lambda samples, share, seed: split(samples, share, seed + 1))
    assert main(["train", "--no-progress", "--resume", str(run)]) == 2
    assert "got the same ones on other sides" in capsys.readouterr().err


def test_a_list_of_images_that_is_damaged_is_named(stopped, copy, capsys):
    run = stopped()
    (copy / "val" / "one" / "007.png").unlink()
    record = run / "images.json.gz"
    content = record.read_bytes()
    for damaged in (content[: len(content) // 2], b"no gzip", gzip.compress(b"[" * 100_000), gzip.compress(b"{}")):
        record.write_bytes(damaged)
        capsys.readouterr()
        assert main(["train", "--no-progress", "--resume", str(run)]) == 2
        assert "began with, got others: expected" in one_line(capsys)


@pytest.mark.parametrize("output", [None, "runs/1", "one"])
def test_a_run_folder_among_the_classes_is_refused(output, copy, capsys, monkeypatch):
    """It would be a class, or a class a run folder."""
    monkeypatch.chdir(copy / "train")
    flags = ["--output", output] if output else []
    assert main(["train", "--data", "imagefolder:.", "--split", "0.34", "--no-progress", *flags]) == 2
    assert "expected output outside of the folders of classes, got " in one_line(capsys)
    assert sorted(path.name for path in copy.joinpath("train").iterdir()) == CLASSES


def test_a_run_folder_beside_train_and_val_is_welcome(copy, monkeypatch):
    monkeypatch.chdir(copy)
    assert train(".", "runs/1", "--epochs", 1) == 0


def test_a_loading_process_that_dies_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    def die(samples):
        os.kill(os.getpid(), 9)

    monkeypatch.setattr("classfair.training.image_folder.default_collate", die)
    assert train(folder, tmp_path / "run", "--epochs", 1, "-j", 2) == 1
    assert "expected the processes that load images to live, one ended (DataLoader worker" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_loading_process_out_of_memory_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    def no_memory(samples):
        raise MemoryError

    monkeypatch.setattr("classfair.training.image_folder.default_collate", no_memory)
    assert train(folder, tmp_path / "run", "--epochs", 1, "-j", 1) == 1
    assert "one ended (MemoryError)" in one_line(capsys)
    assert train(folder, tmp_path / "run", "--epochs", 1, "-j", 0) == 1
    assert "expected memory enough (MemoryError)" in one_line(capsys)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(folder, tmp_path, capsys, monkeypatch):
    """The quota is reached while the third checkpoint is written."""
    fsync, calls = os.fsync, []

    def quota(descriptor):
        calls.append(descriptor)
        if len(calls) == 9:
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", quota)
    assert train(folder, tmp_path / "run", "--epochs", 8, "-b", 64) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    left = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(".")]
    assert main(["train", "--resume", str(tmp_path / "run"), "--no-progress"]) == 0
    assert train(folder, tmp_path / "whole", "--epochs", 8, "-b", 64) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert saved_config(tmp_path / "run")["epochs"] == 8


METHODS = (
    ("--method", "jtt", "--jtt-epochs", 1, "--loss", "ce"),
    ("--head", "etf", "--loss", "la", "metalad"),
    ("--stage2", "crt", "--stage2-epochs", 1, "--mixup", 0.2, "--loss", "isda"),
    ("--stage2", "lws", "--stage2-epochs", 1, "--model", "resnet18", "--amp"),
    ("--stage2", "tau-norm", "--model", "timm:test_vit", "--model-kwargs", "img_size=32"),
    ("--method", "lff", "--loss", "ce", "--grad-accum", 2, "--clip-grad", 1, "--amp", "--amp-dtype", "float16"),
)


@pytest.mark.parametrize("flags", [METHODS[0], *(pytest.param(flags, marks=pytest.mark.slow) for flags in METHODS[1:])])
def test_methods_on_models_of_images(flags, folder, tmp_path):
    assert train(folder, tmp_path / "run", "--epochs", 1, "-b", 16, *flags) == 0
    assert main(["train", "--no-progress", "--resume", str(tmp_path / "run")]) == 0


def test_errors_of_a_first_model_are_of_images_without_augmentation(folder):
    config = TrainConfig.for_data(f"imagefolder:{folder}", img_size=32, auto_augment="ra", random_erase=1.0)
    data = load_images(config, seed=0)
    images, target = data.train_plain[5, [3, 40]]
    again, _ = data.train_plain[6, [3, 40]]
    assert torch.equal(images, again)
    assert not torch.equal(images, data.train[5, [3, 40]][0])
    assert target.tolist() == data.train_targets[[3, 40]].tolist()
    assert data.train_plain.samples == data.train.samples


META = ("--loss", "ce", "metalad", "--meta-per-class", 2)


def test_meta_images_are_held_out_of_training(folder, tmp_path, capsys):
    config = TrainConfig.for_data(
        f"imagefolder:{folder}", model="timm:test_resnet", loss=("metalad",), meta_per_class=2, img_size=32
    )
    data = load_images(config, seed=0)
    whole = load_images(TrainConfig.for_data(f"imagefolder:{folder}"), seed=0)
    meta, kept, every = (set(d.samples) for d in (data.meta, data.train, whole.train))
    assert not meta & kept
    assert meta | kept == every
    assert torch.tensor([label for _, label in data.meta.samples]).bincount().tolist() == [2] * 10
    assert data.train_targets.tolist() == [label for _, label in data.train.samples]
    assert data.images.digests == whole.images.digests  # of what was there, on whichever side of training
    images, target = data.meta[7, [0, 1, 2]]
    assert images.shape == (3, 3, 32, 32)
    assert isinstance(target, torch.Tensor)

    flags = ("--epochs", 1, "-b", 16, *META, "--mixup", 0.2)  # batch norm, and mixtures
    assert train(folder, tmp_path / "run", *flags) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "metalad-seed0.pt", weights_only=True)
    assert (state["criterion"]["omega"] != 1).any()
    per_class = [run["train_count"] for run in read_metrics(tmp_path / "run")["runs"]]
    assert per_class == [[COUNTS[name] - 2 for name in CLASSES]] * 2  # of both losses
    capsys.readouterr()
    assert train(folder, tmp_path / "other", "--epochs", 1, "--loss", "metalad", "--meta-per-class", 3) == 2
    assert "expected 4 training images or more of every class with meta_per_class 3 from heldout" in one_line(capsys)
    assert not (tmp_path / "other").exists()
