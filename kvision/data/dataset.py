"""The `Dataset` type: images, labels and class names in memory, validated on construction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvision.untrusted import name_fault, printable

# Only a publisher's own layout, or this package's generators, may give a data set one of these names.
RESERVED = ("cifar10", "cifar100", "mnist", "fashion_mnist", "shapes10", "digits", "synthetic_digits")

# Bytes in memory that a data set may take; a file that claims more is broken or hostile.
MAX_BYTES = 4 << 30
MAX_CLASSES = 100_000


class DataError(ValueError):
    """A data set that cannot be read: one line with what was expected and what was found.

    Unprintable characters, which names from a file may contain, are replaced in the message.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(str(message)))


class DataUnavailable(DataError):  # noqa: N818  (callers catch it as a condition)
    """A data set that is neither on disk nor downloadable, if no path was given."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, split into training and test.

    Args:
        name: "cifar10", "cifar100", "mnist", "fashion_mnist", "shapes10", "digits", "synthetic_digits", or the
            stem of the folder or file that was read.
        x_train, x_test: uint8, (n, height, width, channels), values 0..255, one gray channel or three in RGB
            order.
        y_train, y_test: int32, (n,), indices into `classes`.
        classes: the classes' names.
        source: the path that was read, or a description such as "synthetic, seed 0".

    Raises:
        DataError: a wrong type or shape, a label outside `classes`, unequal lengths, an empty split, an unprintable
            class name.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    source: str

    def __post_init__(self):
        object.__setattr__(self, "classes", check_classes(self.classes, f"{self.name} ({self.source})"))
        if fault := name_fault(self.name):
            raise DataError(f"{self.source}: the data set's name {fault}; rename it")
        for split, images, labels in (
            ("training", self.x_train, self.y_train),
            ("test", self.x_test, self.y_test),
        ):
            where = f"{self.name} ({self.source}): {split}"
            if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
                raise DataError(f"{where} images must be a uint8 array, got {_kind(images)}")
            if images.ndim != 4 or images.shape[3] not in (1, 3):
                raise DataError(f"{where} images must be (n, height, width, 1 or 3), got shape {images.shape}")
            if not isinstance(labels, np.ndarray) or labels.dtype != np.int32 or labels.ndim != 1:
                raise DataError(f"{where} labels must be a vector of int32, got {_kind(labels)}")
            if len(images) != len(labels):
                raise DataError(f"{where} split has {len(images)} images but {len(labels)} labels")
            if not images.size:
                raise DataError(f"{where} split is empty, shape {images.shape}")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                found = f"{labels.min()} to {labels.max()}"
                raise DataError(f"{where} labels must be 0 to {len(self.classes) - 1}, got {found}")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"{self.name} ({self.source}): training images have shape {self.x_train.shape[1:]}, "
                f"test images {self.x_test.shape[1:]}"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.x_train.shape[1:]

    def select(self, classes: Sequence[str]) -> "Dataset":
        """Return the images of these classes alone, in both splits, with labels renumbered in the given order.

        4 classes of "cifar10" are named "cifar10-4of10".

        Raises:
            DataError: an unknown or repeated class, or none; a class without an image.
        """
        classes = tuple(classes)
        unknown = [name for name in classes if name not in self.classes]
        if unknown or not classes or len(set(classes)) != len(classes):
            raise DataError(f"expected distinct classes among {', '.join(self.classes)}; got {list(classes)}")
        numbers = np.full(len(self.classes), -1, np.int32)
        numbers[[self.classes.index(name) for name in classes]] = np.arange(len(classes))
        train, test = numbers[self.y_train] >= 0, numbers[self.y_test] >= 0
        for name in classes:
            index = self.classes.index(name)
            if not (self.y_train == index).any() or not (self.y_test == index).any():
                raise DataError(f"{self.name} ({self.source}) lacks a training or a test image of class {name!r}")
        return Dataset(
            name=f"{self.name}-{len(classes)}of{len(self.classes)}",
            x_train=self.x_train[train],
            y_train=numbers[self.y_train[train]],
            x_test=self.x_test[test],
            y_test=numbers[self.y_test[test]],
            classes=classes,
            source=f"{self.source} (classes {', '.join(classes)})",
        )

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> "Dataset":
        """Return a random part with `train` and `test` images, balanced over the classes; None keeps all.

        The images keep their order. A count above the number of images keeps all. The name stays; `source` states the
        counts.

        Raises:
            DataError: a count below 1.
        """
        for count in (train, test):
            if count is not None and count < 1:
                raise DataError(f"a subset needs at least 1 image, got {count}")
        # Separate generators: the number of training images does not change which test images are chosen.
        train_part = balanced_indices(self.y_train, train, np.random.default_rng([seed, 0]))
        test_part = balanced_indices(self.y_test, test, np.random.default_rng([seed, 1]))
        if len(train_part) == len(self.y_train) and len(test_part) == len(self.y_test):
            return self
        sizes = (len(train_part), len(self.y_train)), (len(test_part), len(self.y_test))
        return replace(
            self,
            x_train=self.x_train[train_part],
            y_train=self.y_train[train_part],
            x_test=self.x_test[test_part],
            y_test=self.y_test[test_part],
            source=describe_subset(self.source, *sizes),
        )

    def per_class(self, n: int, seed: int = 0) -> "Dataset":
        """Return `n` random training images of each class, in their order, and all test images.

        Raises:
            DataError: n below 1, or a class with fewer training images.
        """
        counts = np.bincount(self.y_train, minlength=len(self.classes))
        if n < 1 or counts.min() < n:
            scarcest = self.classes[int(counts.argmin())]
            raise DataError(
                f"{self.name} has {counts.min()} training images of class {scarcest!r}; "
                f"expected 1 to {counts.min()} per class, got {n}"
            )
        return self.subset(train=n * len(self.classes), seed=seed)


def describe_subset(source: str, train: tuple[int, int], test: tuple[int, int]) -> str:
    """Append (chosen, all) counts of training and test images to `source`, unless all were chosen."""
    if train[0] == train[1] and test[0] == test[1]:
        return source
    return f"{source} ({train[0]} of {train[1]} training and {test[0]} of {test[1]} test images)"


def check_classes(classes: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        DataError: a name that a page, manifest or terminal cannot show: empty, not Unicode (a folder's name may be any
            bytes), or with control characters.
    """
    for name in classes:
        if fault := name_fault(str(name)) or ("" if name else "'' is empty"):
            raise DataError(f"{where}: the class name {fault}; rename it")
    return tuple(classes)


def balanced_indices(labels: np.ndarray, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """Return sorted indices of `count` random labels, spread evenly over the classes; None selects all."""
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    # The rank of each image within its class. The lowest ranks come first, one from every class in turn; once a class
    # is exhausted, the others fill its quota.
    starts = np.cumsum(np.bincount(labels)) - np.bincount(labels)
    rank = np.arange(len(labels)) - starts[labels[by_class]]
    tie = rng.permutation(len(labels))
    return np.sort(by_class[np.lexsort((tie, rank))[:count]])


def derive_name(stem: str, kind: str) -> str:
    """Return the name of a data set read from a general format: its stem, or `stem_kind` if the stem is reserved."""
    plain = "".join(filter(str.isalnum, stem.lower()))
    taken = plain in {name.replace("_", "") for name in RESERVED}
    return f"{stem}_{kind}" if taken or not plain else stem


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__
