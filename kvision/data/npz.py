"""A data set in one NumPy file: x_train, y_train, x_test, y_test (Keras's own layout of MNIST, and
anyone's)."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from kvision.data.dataset import MAX_BYTES, MAX_CLASSES, DataError, Dataset, own_name

KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> Dataset:
    """The data set of an .npz with uint8 images, (n, h, w) or (n, h, w, 1 or 3), and labels, (n,) or (n, 1).

    Its name is the file's stem; its classes are called "0", "1", ... up to the highest label.

    Raises:
        DataError: not an .npz, a missing array, a wrong type or shape, a pickled object, a size beyond its
            bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            missing = [key for key in KEYS if f"{key}.npy" not in entries]
            if missing:
                found = ", ".join(sorted(entries)[:6]) or "nothing"
                raise DataError(f"{path}: expected {', '.join(KEYS)}; {', '.join(missing)} missing among {found}")
            arrays = {key: _read_array(archive, entries[f"{key}.npy"], f"{path}: {key}") for key in KEYS}
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    # zipfile raises RuntimeError for an encrypted member and NotImplementedError for an unknown compression.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise DataError(f"{path} is not a whole .npz file ({error or type(error).__name__})") from None
    splits = []
    for split in ("train", "test"):
        splits += [
            _images(arrays[f"x_{split}"], f"{path}: x_{split}"),
            _labels(arrays[f"y_{split}"], f"{path}: y_{split}"),
        ]
    classes = 1 + max(int(labels.max(initial=0)) for labels in splits[1::2])
    return Dataset(own_name(path.stem, "npz"), *splits, classes=tuple(map(str, range(classes))), source=str(path))


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> np.ndarray:
    """One member, only after its header and the directory of the zip agree on its size."""
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "ui":
            raise DataError(f"{where}: expected whole numbers (images uint8), got {dtype}")
        if size > MAX_BYTES:
            raise DataError(f"{where}: shape {shape} takes {size} bytes, more than the {MAX_BYTES} that are allowed")
        if member.tell() + size != entry.file_size:
            raise DataError(f"{where}: shape {shape} takes {size} bytes, but the file holds {entry.file_size}")
        values = np.empty(math.prod(shape), dtype)
        # readinto a memory that is exactly as large as the header said, however much the member would inflate
        # to.
        left = memoryview(values).cast("B") if size else memoryview(b"")
        while left:
            count = member.readinto(left)
            if not count:
                raise DataError(f"{where}: cut short")
            left = left[count:]
        # Only at the end of a member does zipfile compare its checksum.
        if member.read(1):
            raise DataError(f"{where}: longer than its header says")
    return np.ascontiguousarray(values.reshape(shape, order="F" if fortran else "C"))


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
