"""Folders of images, one folder per class: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvision.data.dataset import DataError, Dataset, balanced_indices, check_classes, derive_name, describe_subset
from kvision.data.images import read_fitted, read_size
from kvision.untrusted import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
TEST_FRACTION = 0.2
# Default limit on bytes of decoded images: with padding and a copy on the device still far below 2 GB.
MEMORY = 384 << 20
THREADS = 4  # at most; the decoders release the interpreter's lock
_LOG_INTERVAL = 10.0  # seconds between progress lines


def is_image_folder(folder: Path) -> bool:
    """Return whether the folder contains at least one class folder with images."""
    return bool(_classes(folder) or _classes(folder / "train"))


def read_image_folder(
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    gray: bool = False,
    seed: int = 0,
    limit: tuple[int | None, int | None] = (None, None),
    memory: int = MEMORY,
    log: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Read a folder of images by class, of any sizes and modes, decoded by Pillow.

    Each image is rotated upright by its EXIF tag, its shorter side is resized (bilinear, anti-aliased), and it is
    center-cropped. A few threads decode one image each, so that memory use is close to that of the result.

    Without a `test` (or `val`) folder, a random fifth of each class, sampled by `seed`, is the test split. Classes are
    sorted by name, images by file name. The result is named after the folder.

    Args:
        folder: holds `train/<class>/*` and `test/<class>/*`, or `<class>/*`.
        size: (height, width) in pixels of every image in the result; default: the common size of all images.
        gray: make one gray channel instead of RGB.
        seed: of the split, and of the subset that `limit` selects.
        limit: maximum numbers of training and test images, selected as by `Dataset.subset`; None reads all.
        memory: bytes that the result's images may take.
        log: called with one line about the memory required before decoding, and then with progress lines.

    Raises:
        DataError: no images, a broken image (named in the message), fewer than 2 classes, a class with fewer than 2
            images to split, an unprintable class name, a test class missing from training, images of several sizes
            without `size`, or more bytes than `memory`.
    """
    train = _classes(folder / "train")
    root = folder / "train" if train else folder
    train = train or _classes(folder)
    test = _classes(folder / "test") or _classes(folder / "val") if root != folder else {}
    if not train:
        raise DataError(
            f"{folder} contains no images by class: expected train/<class>/ and test/<class>/, or <class>/, "
            f"with files such as {', '.join(SUFFIXES[:4])}"
        )
    if len(train) < 2:
        raise DataError(f"{root} contains images of one class only, {next(iter(train))!r}; expected two or more")
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise DataError(f"{folder}: test has classes that {root} lacks: {', '.join(unknown[:5])}")
    classes = check_classes(sorted(train), str(root))
    if not test:
        train, test = _split(train, root, seed)
    splits, totals = [], []
    for i, files in enumerate((train, test)):
        pairs = [(path, index) for index, name in enumerate(classes) for path in files.get(name, ())]
        part = balanced_indices(np.array([index for _, index in pairs]), limit[i], np.random.default_rng([seed, i]))
        splits.append([pairs[number] for number in part])
        totals.append(len(pairs))
    paths = [path for pairs in splits for path, _ in pairs]
    if size is None:
        size = _common_size(folder, paths)
    shape = (*size, 1 if gray else 3)
    _check_memory(folder, len(paths), shape, memory, log)
    arrays = []
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        # `open_image` changes the warning filters, which are shared by all threads: restore them here.
        for pairs in splits:
            labels = np.array([label for _, label in pairs], np.int32)
            arrays += [_decode(pool, [path for path, _ in pairs], shape, log), labels]
    source = describe_subset(printable(str(folder)), *zip(map(len, splits), totals, strict=True))
    return Dataset(derive_name(printable(folder.resolve().name), "folder"), *arrays, classes=classes, source=source)


def _common_size(folder: Path, paths: Sequence[Path]) -> tuple[int, int]:
    """Return the size that all images have."""
    first = read_size(paths[0])
    for path in paths[1:]:
        if (other := read_size(path)) != first:
            raise DataError(
                f"{folder} contains images of several sizes, such as {paths[0].name} of {first[0]}x{first[1]} and "
                f"{path.name} of {other[0]}x{other[1]}; give the size to resize them to"
            )
    return first


def _check_memory(folder: Path, count: int, shape: tuple[int, int, int], memory: int, log: Callable) -> None:
    """Log the memory that the images need; raise DataError if it exceeds the limit."""
    size = f"{shape[0]}x{shape[1]}"
    if min(shape) < 1:
        raise DataError(f"{folder}: images cannot be resized to {size} pixels; expected at least 1x1")
    each = shape[0] * shape[1] * shape[2]
    text = f"{count:,} images of {size} pixels take {count * each / 2**20:,.0f} MiB of memory"
    if count * each > memory:
        side = int((memory / count / shape[2]) ** 0.5)
        raise DataError(
            f"{folder}: {text}, more than the limit of {memory / 2**20:,.0f} MiB: reduce their size "
            f"(--image-size {max(side, 1)}) or their number (--max-train-samples, --max-test-samples: "
            f"{memory // each:,} in all), or raise the limit "
            f"(--data-memory {np.ceil(10 * count * each / 2**30) / 10:g}, in GiB)"
        )
    log(f"decoding {folder}: {text}")


def _decode(pool: ThreadPoolExecutor, paths: Sequence[Path], shape: tuple[int, int, int], log: Callable) -> np.ndarray:
    """Decode the images at `paths` to uint8 (n, *shape)."""
    images = np.empty((len(paths), *shape), np.uint8)

    def read(i: int) -> None:
        images[i] = read_fitted(paths[i], shape[:2], gray=shape[2] == 1)

    logged = time.monotonic()
    try:
        for done, _ in enumerate(pool.map(read, range(len(paths))), 1):
            if time.monotonic() - logged >= _LOG_INTERVAL:
                log(f"decoded {done:,} of {len(paths):,} images")
                logged = time.monotonic()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return images


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the sorted image files of each subfolder that has any, by the subfolder's name."""
    try:
        subfolders = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
        )
    except OSError:
        return {}
    found = {path.name: sorted(filter(_is_image, path.iterdir())) for path in subfolders}
    return {name: files for name, files in found.items() if files}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _split(files: dict[str, list[Path]], root: Path, seed: int) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, test = {}, {}
    for index, (name, paths) in enumerate(sorted(files.items())):
        if len(paths) < 2:
            raise DataError(f"{root}: class {name!r} has one image; a split into training and test needs two or more")
        # One generator per class: adding an image to another class does not change this one's split.
        order = np.random.default_rng([seed, index]).permutation(len(paths))
        count = max(1, round(TEST_FRACTION * len(paths)))
        test[name] = [paths[i] for i in sorted(order[:count])]
        train[name] = [paths[i] for i in sorted(order[count:])]
    return train, test
