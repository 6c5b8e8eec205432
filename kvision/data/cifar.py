"""CIFAR-10 and CIFAR-100 as published (https://www.cs.toronto.edu/~kriz/cifar.html, Krizhevsky 2009).

Both come in a Python version (pickled batches) and a binary one, each as a folder inside a .tar.gz. An image is a row
of 3,072 bytes: 1,024 red, then green, then blue. CIFAR-100 is read with its 100 fine labels.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvision.data.dataset import DataError, Dataset
from kvision.data.tar import read_tar
from kvision.data.unpickle import unpickle
from kvision.untrusted import open_regular

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_FINE_LABELS = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
    dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
    road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_FINE_LABELS.split())

# Training and test images; a folder with other counts is not the published data set.
COUNTS = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}

# Published archives, and the names that Keras's cache gives them.
ARCHIVES = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-py.tar.gz",
        "cifar-10-batches-py-target_archive",
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "cifar-100-binary.tar.gz",
        "cifar-100-python-target_archive",
    ),
}

# The published files take at most 155 MB; other pickle protocols need up to half as much again.
MAX_FILE = 300 << 20


@dataclass(frozen=True)
class Layout:
    """One published version: its files and the position of the labels in them.

    Args:
        name: the data set.
        folder: the folder's published name.
        train, test: the files of each split, in order.
        meta: the file with the class names; it may be missing.
        label: in pickles, the key of the labels; in binary records, the label's index among the `label_bytes`.
        label_bytes: bytes before each image in a binary record; 0 for pickles.
        classes: the official class names.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label: str | int
    label_bytes: int
    classes: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout(
        "cifar10",
        "cifar-10-batches-py",
        _BATCHES,
        ("test_batch",),
        "batches.meta",
        "labels",
        0,
        CIFAR10_CLASSES,
    ),
    Layout(
        "cifar10",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        0,
        1,
        CIFAR10_CLASSES,
    ),
    Layout("cifar100", "cifar-100-python", ("train",), ("test",), "meta", "fine_labels", 0, CIFAR100_CLASSES),
    Layout(
        "cifar100",
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        1,
        2,
        CIFAR100_CLASSES,
    ),
)
_NAMES_KEY = {"cifar10": "label_names", "cifar100": "fine_label_names"}


def find_layout(folder: Path) -> Layout | None:
    """Return the layout of a folder, complete or broken; None if it has none."""
    return _match_layout(folder.name, {name for name in _all_names() if (folder / name).is_file()})


def read_folder(folder: Path) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 from an unpacked folder.

    Raises:
        DataError: a file is missing, truncated or broken.
    """
    layout = find_layout(folder)
    if layout is None:
        raise DataError(f"{folder} has none of CIFAR's layouts, such as {LAYOUTS[0].folder}/data_batch_1")
    present = {name for name in _all_names() if (folder / name).is_file()}
    return _read(layout, present, lambda name: _read_file(folder / name), str(folder))


def read_archive(path: Path) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 from a .tar.gz without unpacking it.

    Raises:
        DataError: another archive, or a broken one.
    """
    for folder, files in read_tar(path, _all_names().__contains__).items():
        layout = _match_layout(folder, files)
        if layout:
            return _read(layout, files, files.__getitem__, str(path))
    raise DataError(
        f"{path} contains none of CIFAR's layouts; expected one of the folders "
        f"{', '.join(layout.folder for layout in LAYOUTS)} with its batches"
    )


def _all_names() -> set[str]:
    return {name for layout in LAYOUTS for name in (*layout.files, layout.meta)}


def _match_layout(folder: str, files: Collection[str]) -> Layout | None:
    # Two files are required: CIFAR-100's are just "train" and "test", and one alone may be anything.
    for layout in LAYOUTS:
        if sum(name in files for name in layout.files) >= 2 or (folder == layout.folder and files):
            return layout
    return None


def _read_file(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise DataError(f"{path} has {size} bytes, more than any CIFAR file")
            return file.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _read(layout: Layout, present: Collection[str], read: Callable[[str], bytes], source: str) -> Dataset:
    missing = [name for name in layout.files if name not in present]
    if missing:
        raise DataError(f"{source} is not a complete {layout.folder}: it lacks {', '.join(missing)}; download it again")
    if layout.meta in present:
        _check_meta(layout, read(layout.meta), source)
    splits = []
    for split, files, count in zip(("training", "test"), (layout.train, layout.test), COUNTS[layout.name], strict=True):
        images = np.empty((count, 32, 32, 3), np.uint8)
        labels = np.empty(count, np.int32)
        done = 0
        for name in files:
            rows, numbers = _read_batch(layout, read(name), f"{source}: {name}")
            if done + len(rows) <= count:
                images[done : done + len(rows)] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                labels[done : done + len(rows)] = numbers
            done += len(rows)
        if done != count:
            raise DataError(
                f"{source} is not {layout.name}: expected {count} {split} images, got {done}; download it again"
            )
        splits += [images, labels]
    return Dataset(layout.name, *splits, classes=layout.classes, source=source)


def _read_batch(layout: Layout, content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, uint8 (n, 3072), and labels, int32 (n,), of one file."""
    if layout.label_bytes:
        width = layout.label_bytes + 3072
        if not content or len(content) % width:
            raise DataError(f"{where}: expected complete records of {width} bytes, got {len(content)} bytes in all")
        records = np.frombuffer(content, np.uint8).reshape(-1, width)
        rows, labels = records[:, layout.label_bytes :], records[:, layout.label].tolist()
    else:
        batch = unpickle(content, where)
        rows, labels = batch.get("data"), batch.get(layout.label)
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
            kind = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise DataError(f"{where}: expected under 'data' a uint8 array of shape (n, 3072), got {kind}")
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise DataError(f"{where}: expected under {layout.label!r} a list of integers")
        if len(labels) != len(rows):
            raise DataError(f"{where}: {len(rows)} images but {len(labels)} labels")
    outside = [label for label in labels if not 0 <= label < len(layout.classes)]
    if outside:
        raise DataError(f"{where}: expected labels 0 to {len(layout.classes) - 1}, got {outside[0]}")
    return rows, np.asarray(labels, np.int32)


def _check_meta(layout: Layout, content: bytes, source: str) -> None:
    """Raise DataError if the class names are not CIFAR's: other data sets use the same layout."""
    where = f"{source}: {layout.meta}"
    if layout.label_bytes:
        names = content.decode("latin-1").split()
    else:
        names = unpickle(content, where).get(_NAMES_KEY[layout.name])
        if not isinstance(names, list):
            raise DataError(f"{where}: expected a list under {_NAMES_KEY[layout.name]!r}")
        names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]
    if tuple(names) != layout.classes:
        raise DataError(
            f"{where} does not list the classes of {layout.name} ({', '.join(layout.classes[:3])}, ...); "
            "provide your own data set as an .npz or a folder of images by class"
        )
