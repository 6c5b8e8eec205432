"""Reader of a data set in one NumPy file with x_train, y_train, x_test, y_test, as in Keras's MNIST."""

import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kvision.data import zipped
from kvision.data.dataset import MAX_BYTES, MAX_CLASSES, DataError, Dataset, derive_name
from kvision.data.npy import MAX_HEADER, parse_header
from kvision.untrusted import Budget, open_regular, translate_errors

KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> Dataset:
    """Read an .npz with uint8 images, (n, h, w) or (n, h, w, 1 or 3), and labels, (n,) or (n, 1).

    The data set is named after the file; its classes are "0", "1", ... up to the highest label.

    Raises:
        DataError: not an .npz, a missing array, a wrong type or shape, a pickled object, or arrays larger than the file
            allows.
    """
    with translate_errors(lambda message: DataError(f"{path} {message}"), ".npz file", "write it again with np.savez"):
        if not path.exists():
            raise DataError(f"{path} does not exist")
        with open_regular(path) as file:
            arrays = _read_arrays(file, Budget(os.fstat(file.fileno()).st_size), path)
    splits = []
    for split in ("train", "test"):
        splits += [
            _images(arrays[f"x_{split}"], f"{path}: x_{split}"),
            _labels(arrays[f"y_{split}"], f"{path}: y_{split}"),
        ]
    classes = 1 + max(int(labels.max(initial=0)) for labels in splits[1::2])
    return Dataset(derive_name(path.stem, "npz"), *splits, classes=tuple(map(str, range(classes))), source=str(path))


def _read_arrays(file: BinaryIO, budget: Budget, path: Path) -> dict[str, np.ndarray]:
    entries = {entry.name: entry for entry in zipped.directory(file)}
    if missing := [key for key in KEYS if f"{key}.npy" not in entries]:
        found = ", ".join(sorted(entries)[:6]) or "nothing"
        raise DataError(f"{path}: expected {', '.join(KEYS)}; {', '.join(missing)} missing among {found}")
    return {key: _read_array(file, entries[f"{key}.npy"], budget, f"{path}: {key}") for key in KEYS}


def _read_array(file: BinaryIO, entry: zipped.Entry, budget: Budget, where: str) -> np.ndarray:
    """Read one member after checking that its header and the zip directory agree on its size."""
    file.seek(entry.start)
    head = file.read(min(entry.packed_size, 2 * MAX_HEADER))
    if entry.deflated:
        head = zlib.decompressobj(-15).decompress(head, MAX_HEADER + 12)
    try:
        start, shape, dtype, fortran = parse_header(head)
    except ValueError as error:
        raise DataError(f"{where} {error}") from None
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "ui":
        raise DataError(f"{where}: expected integers (images uint8), got {dtype}")
    if size > MAX_BYTES:
        raise DataError(f"{where}: shape {shape} takes {size} bytes, more than the limit of {MAX_BYTES}")
    if start + size != entry.size:
        raise DataError(f"{where}: shape {shape} takes {size} bytes, but the file holds {entry.size - start}")
    values = zipped.content(file, entry, budget)
    if zlib.crc32(values) != entry.crc:
        raise DataError(f"{where} does not match its checksum: the file is damaged")
    array = values[start:].view(dtype).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape)


def _images(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype != np.uint8:
        raise DataError(f"{where}: expected uint8 images, 0 to 255, got {values.dtype}")
    if values.ndim not in (3, 4):
        raise DataError(f"{where}: expected shape (n, height, width) or (n, height, width, 1 or 3), got {values.shape}")
    return values[..., None] if values.ndim == 3 else values


def _labels(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim not in (1, 2) or values.shape[1:] not in ((), (1,)):
        raise DataError(f"{where}: expected labels of shape (n,) or (n, 1), got {values.shape}")
    if values.size and (int(values.min()) < 0 or int(values.max()) >= MAX_CLASSES):
        raise DataError(f"{where}: expected labels 0 to {MAX_CLASSES - 1}, got {values.min()} to {values.max()}")
    return values.reshape(-1).astype(np.int32)
