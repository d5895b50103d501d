"""MNIST in long tails and in colours, on files of torchvision's form that stand in for the real ones."""

import json
import math

import numpy as np
import pytest
import torch

from classfair.cli import main

torchvision = pytest.importorskip("torchvision", reason="its files are read by torchvision")

from classfair.training import TrainConfig, mnist  # noqa: E402
from classfair.training.sources import load_data  # noqa: E402

HEAD = 5000


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_mnist(raw, per_class=HEAD, tests=20):
    """Every image is noise with a bar at a height that depends on its digit."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, number in (("train", per_class), ("t10k", tests)):
        labels = rng.permutation(np.repeat(np.arange(10), number))
        images = rng.integers(0, 90, (len(labels), 28, 28), dtype=np.uint8)
        images[np.arange(len(labels)), 2 * labels + 4] = 255
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root / "MNIST" / "raw")
    return root


@pytest.mark.parametrize(("imbalance", "smallest"), [(100, 50), (10, 500)])
def test_an_exponential_tail_of_digits_drawn_by_seed(folder, imbalance, smallest):
    counts = []
    for seed in (0, 1):
        data = load_data(TrainConfig.for_data(f"mnist-lt:{folder}", imbalance=float(imbalance)), seed)
        counts.append(torch.bincount(data.train_targets).tolist())
        expected = [math.floor(HEAD * imbalance ** (-rank / 9) + 1e-6) for rank in range(10)]
        assert sorted(counts[-1], reverse=True) == expected
        assert min(expected) == smallest
        assert data.num_val == 200
        assert data.groups is None
    assert counts[0] != counts[1]


def test_training_ties_colours_to_digits_and_the_test_does_not(folder):
    data = load_data(TrainConfig.for_data(f"mnist-colour:{folder}"), 3)
    assert len(data.groups.names) == 10
    table = torch.zeros(10, 10)
    table.index_put_((data.train_targets, data.groups.train), torch.ones(()), accumulate=True)
    assert torch.bincount(table.argmax(1), minlength=10).tolist() == [1] * 10  # every digit has a colour of its own
    sd = math.sqrt(0.95 * 0.05 * HEAD)
    assert ((table.amax(1) - 0.95 * HEAD).abs() < 5 * sd).all()
    other = 0.05 / 9 * HEAD  # of each other colour, a Poisson number
    assert ((table[table < 1000] - other).abs() < 5 * math.sqrt(other)).all()
    test = torch.bincount(data.groups.val, minlength=10)
    assert ((test - 20).abs() < 5 * math.sqrt(20)).all()
    again = load_data(TrainConfig.for_data(f"mnist-colour:{folder}"), 4)
    assert not torch.equal(again.groups.val, data.groups.val)


def test_batches_are_standardised_bytes_in_the_colour_of_their_image(folder):
    gray = load_data(TrainConfig.for_data(f"mnist-lt:{folder}"), 0)
    images, target = gray.val[0, [3, 5]]
    pixels = gray.val.images[[3, 5]].numpy() / 255
    np.testing.assert_allclose(images.numpy(), ((pixels - 0.1307) / 0.3081).reshape(2, -1), rtol=1e-5, atol=1e-6)
    assert target.tolist() == gray.val.target[[3, 5]].tolist()
    data = load_data(TrainConfig.for_data(f"mnist-colour:{folder}"), 0)
    images, _ = data.val[0, [3, 5]]
    for row, index in enumerate((3, 5)):
        colour = np.array(mnist.PALETTE[data.groups.names[int(data.groups.val[index])]])
        expected = colour[:, None, None] * data.val.images[index].numpy() / 255
        np.testing.assert_allclose(images[row].numpy(), ((expected - 0.1307) / 0.3081).ravel(), rtol=1e-5, atol=1e-6)


def test_jobs_on_both(folder, tmp_path):
    job = ["train", "--no-progress", "--seeds", "1", "--epochs", "1", "--imbalance", "2000"]
    assert main([*job, "--data", f"mnist-lt:{folder}", "--output", str(tmp_path / "lt")]) == 0
    assert main([*job, "--data", f"mnist-colour:{folder}", "--fairness", "iou", "--output", str(tmp_path / "c")]) == 0
    tail = json.loads((tmp_path / "lt" / "metrics.json").read_text())
    assert [run["loss"] for run in tail["runs"]] == ["ce", "la"]
    assert tail["runs"][0]["many"] > 0.9
    colour = json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert colour["group_names"] == mnist.COLOURS
    assert sum(colour["runs"][0]["groups"]["val"]["count"]) == 200
    assert (tmp_path / "c" / "per_class_accuracy.png").exists()


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_a_meta_set_of_mnist(source, folder):
    options = {"loss": ("metalad",), "meta_per_class": 10, "meta_from": source}
    data = load_data(TrainConfig.for_data(f"mnist-lt:{folder}", **options), 0)
    whole = load_data(TrainConfig.for_data(f"mnist-lt:{folder}"), 0)
    assert data.num_meta == 100
    assert torch.bincount(data.meta.target).tolist() == [10] * 10
    taken = 10 if source == "heldout" else 0
    assert torch.bincount(data.train_targets).tolist() == (torch.bincount(whole.train_targets) - taken).tolist()
    assert len(data.train.images) == len(data.train_targets)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_without_the_files_both_ways_are_named(tmp_path, capsys, monkeypatch):
    assert main(["train", "--no-progress", "--data", f"mnist-lt:{tmp_path}", "--output", str(tmp_path / "run")]) == 2
    error = one_line(capsys)
    assert "name a folder" in error
    assert "torchvision downloads them" in error
    assert not (tmp_path / "run").exists()

    def no_network(*arguments, **keywords):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried many")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    assert main(["train", "--no-progress", "--data", "mnist-colour", "--output", str(tmp_path / "run")]) == 3
    error = one_line(capsys)
    assert "a download failed (Error downloading train-images-idx3-ubyte.gz)" in error
    assert "name a folder" in error
    assert list((tmp_path / "cache" / "classfair").iterdir()) == []


def test_a_download_is_kept_and_found_again(tmp_path, monkeypatch):
    calls = []

    def download(root, download):
        assert download
        calls.append(root)
        write_mnist(mnist.Path(root) / "MNIST" / "raw", tests=1)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    for _ in range(2):
        assert len(mnist.read_mnist("")[0]) == 10 * HEAD
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "classfair").iterdir()] == ["MNIST"]


@pytest.mark.parametrize("damage", ["short", "half", "labels", "classes"])
def test_other_files_are_refused(damage, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    if damage == "short":
        write_mnist(raw, per_class=100)
    else:
        write_mnist(raw)
        images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
        if damage == "half":
            images.write_bytes(images.read_bytes()[: HEAD * 28])
        else:
            write_idx(labels, np.full(50_000 if damage == "classes" else 7, 3, np.uint8))
    with pytest.raises(ValueError, match="expected training images and labels of MNIST in"):
        mnist.read_mnist(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("mnist-lt:", "expected data to be digits, .* mnist-lt"),
        ("mnist", "expected data to be digits"),
        ("digits:here", "expected data to be digits"),
    ],
)
def test_wrong_names(data, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_data(data)


def test_options_of_image_files_are_refused():
    with pytest.raises(ValueError, match="expected mixup to be left out with mnist-lt"):
        TrainConfig.for_data("mnist-lt", mixup=0.2)
    with pytest.raises(ValueError, match="expected imbalance from 1 to 5000"):
        TrainConfig.for_data("mnist-lt", imbalance=5001.0)
