"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747).

Both are published as the same four IDX files, so only the folder's name, or else the requested name, distinguishes
them. Keras distributes MNIST as one mnist.npz. The IDX format: a magic number 0x0000 08 0d (unsigned bytes,
d dimensions), d big-endian 32-bit lengths, the bytes.
"""

import gzip
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvision.data.dataset import MAX_BYTES, DataError, Dataset, derive_name
from kvision.data.npz import read_npz
from kvision.untrusted import Budget, open_regular, translate_errors

DIGITS = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CLASSES = {"mnist": DIGITS, "fashion_mnist": FASHION_CLASSES}

# Training and test images; files with other counts are not the published data set.
COUNTS = {"mnist": (60_000, 10_000), "fashion_mnist": (60_000, 10_000)}

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def is_idx_folder(folder: Path) -> bool:
    """Return whether a folder contains any of the four files, gzipped or not, complete or broken."""
    return any(_file(folder, name) for name in FILES)


def idx_name(folder: Path, requested: str) -> str:
    """Return the name of the data set in a folder of IDX files: by the folder's name (its parent's for torchvision's
    "raw"), or else `requested`.

    KMNIST and other relatives use the same file names; a folder with such a name is never read as MNIST.
    """
    folder = folder.resolve()
    named = folder.parent if folder.name == "raw" else folder
    plain = "".join(filter(str.isalnum, named.name.lower()))
    if plain in ("mnist", "fashionmnist"):
        return "fashion_mnist" if plain == "fashionmnist" else "mnist"
    if "mnist" in plain or requested not in CLASSES:
        return derive_name(named.name, "idx")
    return requested


def read_idx_folder(folder: Path, requested: str) -> Dataset:
    """Read a data set from a folder with the four IDX files, gzipped or not.

    Raises:
        DataError: a missing or broken file, or a folder named for MNIST or Fashion-MNIST without their
            counts.
    """
    missing = [name for name in FILES if not _file(folder, name)]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} (or the same with .gz); all four IDX files are needed")
    x_train, y_train, x_test, y_test = (_read_idx(_file(folder, name)) for name in FILES)
    name = idx_name(folder, requested)
    if name in CLASSES:
        expected = [(count, 28, 28) for count in COUNTS[name]]
        if [x_train.shape, x_test.shape] != expected:
            raise DataError(
                f"{folder} is not {name}: expected {expected[0]} training and {expected[1]} test images, "
                f"got {x_train.shape} and {x_test.shape}"
            )
    classes = CLASSES.get(name, tuple(map(str, range(1 + int(max(y_train.max(initial=0), y_test.max(initial=0)))))))
    return Dataset(
        name,
        x_train[..., None],
        y_train.astype(np.int32),
        x_test[..., None],
        y_test.astype(np.int32),
        classes=classes,
        source=str(folder),
    )


def read_mnist_npz(path: Path) -> Dataset:
    """Read an .npz; it is MNIST if its name is mnist.npz and it has MNIST's counts of 28x28 images."""
    dataset = read_npz(path)
    shapes = [dataset.x_train.shape, dataset.x_test.shape]
    complete = shapes == [(count, 28, 28, 1) for count in COUNTS["mnist"]] and len(dataset.classes) == 10
    return replace(dataset, name="mnist") if complete and path.name == "mnist.npz" else dataset


def _file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _read_idx(path: Path) -> np.ndarray:
    """Read the uint8 array of one IDX file; the file's name says whether it holds images or labels."""
    dimensions = 3 if "idx3" in path.name else 1
    with (
        translate_errors(lambda message: DataError(f"cannot read {path}: it {message}"), "IDX file", "fetch it again"),
        open_regular(path) as raw,
        gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as file,
    ):
        budget = Budget(os.fstat(raw.fileno()).st_size)
        header = file.read(4 + 4 * dimensions)
        expected = bytes([0, 0, 8, dimensions])
        if header[:4] != expected or len(header) < 4 + 4 * dimensions:
            raise DataError(f"{path} is not an IDX file: it begins with {header[:4].hex()}, not {expected.hex()}")
        shape = tuple(np.frombuffer(header, ">u4")[1:].tolist())
        size = math.prod(shape)
        if size > MAX_BYTES:
            raise DataError(f"{path}: shape {shape} takes more than the limit of {MAX_BYTES} bytes")
        content = bytearray()
        # Read in blocks, so that neither a false header nor a gzip bomb allocates more than the file contains.
        while len(content) <= size and (block := file.read(min(1 << 20, size + 1 - len(content)))):
            budget.take(2 * len(block), "unpacking it")  # twice, because a growing bytearray is copied
            content += block
    if len(content) != size:
        more = "more" if len(content) > size else len(content)
        raise DataError(f"{path}: shape {shape} takes {size} bytes, but the file holds {more}")
    return np.frombuffer(content, np.uint8).reshape(shape)
