"""Images in folders, one folder a class: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvision.data.dataset import DataError, Dataset, balanced, check_classes, own_name, part_of
from kvision.data.images import read_fitted, size_of
from kvision.untrusted import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
TEST_SHARE = 0.2
# Bytes of decoded images unless more are allowed: with a border, and once more on the device, still far from 2 GB.
MEMORY = 384 << 20
THREADS = 4  # at most; the decoders release the interpreter's lock
_TOLD = 10.0  # seconds from one line about the decoding to the next


def is_image_folder(folder: Path) -> bool:
    """Whether the folder holds images by class, at least one class."""
    return bool(_classes(folder) or _classes(folder / "train"))


def read_image_folder(
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    grey: bool = False,
    seed: int = 0,
    limit: tuple[int | None, int | None] = (None, None),
    memory: int = MEMORY,
    log: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The data set of a folder of images by class, decoded by Pillow, whatever their sizes and modes.

    Each image is turned upright, its shorter side is resized (bilinear, anti-aliased), and its centre is cut out. A few
    threads decode, each one image at a time, so that the result is nearly all the memory that is taken.

    Without a `test` (or `val`) folder, a fifth of each class, drawn by `seed`, is the test split. Classes are
    sorted by name, images by file name. The result's name is the folder's.

    Args:
        folder: holds `train/<class>/*` and `test/<class>/*`, or `<class>/*`.
        size: (height, width) in pixels of every image in the result; default: the size that all images have.
        grey: whether to make one grey channel instead of RGB.
        seed: of the split, and of what `limit` leaves.
        limit: how many training and how many test images are read, those of `Dataset.subset`; None reads all.
        memory: bytes that the result's images may take.
        log: is told, before images are decoded, how much memory they take, and then now and again how many are.

    Raises:
        DataError: no images, a broken one (it is named), fewer than 2 classes, a class with fewer than 2
            images to split, a class name that cannot be printed, a test class that training lacks, images of several
            sizes without `size`, or more bytes than `memory`.
    """
    train = _classes(folder / "train")
    root = folder / "train" if train else folder
    train = train or _classes(folder)
    test = _classes(folder / "test") or _classes(folder / "val") if root != folder else {}
    if not train:
        raise DataError(
            f"{folder} holds no images by class: expected train/<class>/ and test/<class>/, or <class>/, "
            f"with files such as {', '.join(SUFFIXES[:4])}"
        )
    if len(train) < 2:
        raise DataError(f"{root} holds images of one class only, {next(iter(train))!r}; expected two or more")
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise DataError(f"{folder}: test holds classes that {root} lacks: {', '.join(unknown[:5])}")
    classes = check_classes(sorted(train), str(root))
    if not test:
        train, test = _split(train, root, seed)
    splits, whole = [], []
    for i, files in enumerate((train, test)):
        pairs = [(path, index) for index, name in enumerate(classes) for path in files.get(name, ())]
        part = balanced(np.array([index for _, index in pairs]), limit[i], np.random.default_rng([seed, i]))
        splits.append([pairs[number] for number in part])
        whole.append(len(pairs))
    paths = [path for pairs in splits for path, _ in pairs]
    if size is None:
        size = _common_size(folder, paths)
    shape = (*size, 1 if grey else 3)
    _check_memory(folder, len(paths), shape, memory, log)
    arrays = []
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        # `open_image` changes the filters of warnings, in threads of which none knows which came last.
        for pairs in splits:
            labels = np.array([label for _, label in pairs], np.int32)
            arrays += [_decode(pool, [path for path, _ in pairs], shape, log), labels]
    source = part_of(printable(str(folder)), *(pair for pair in zip(map(len, splits), whole, strict=True)))
    return Dataset(own_name(printable(folder.resolve().name), "folder"), *arrays, classes=classes, source=source)


def _common_size(folder: Path, paths: Sequence[Path]) -> tuple[int, int]:
    """The size that all images have."""
    first = size_of(paths[0])
    for path in paths[1:]:
        if (other := size_of(path)) != first:
            raise DataError(
                f"{folder} holds images of several sizes, such as {paths[0].name} of {first[0]}x{first[1]} and "
                f"{path.name} of {other[0]}x{other[1]}; give the size that all are brought to"
            )
    return first


def _check_memory(folder: Path, count: int, shape: tuple[int, int, int], memory: int, log: Callable) -> None:
    """Tell how much memory the images will take, or refuse to take it."""
    size = f"{shape[0]}x{shape[1]}"
    if min(shape) < 1:
        raise DataError(f"{folder}: images cannot be brought to {size} pixels; expected at least 1x1")
    each = shape[0] * shape[1] * shape[2]
    text = f"{count:,} images of {size} pixels take {count * each / 2**20:,.0f} MiB of memory"
    if count * each > memory:
        side = int((memory / count / shape[2]) ** 0.5)
        raise DataError(
            f"{folder}: {text}, more than the {memory / 2**20:,.0f} MiB that are allowed: make them smaller "
            f"(--image-size {max(side, 1)}), take fewer (--max-train-samples, --max-test-samples: "
            f"{memory // each:,} in all), or allow "
            f"more (--data-memory {np.ceil(10 * count * each / 2**30) / 10:g}, in GiB)"
        )
    log(f"decoding {folder}: {text}")


def _decode(pool: ThreadPoolExecutor, paths: Sequence[Path], shape: tuple[int, int, int], log: Callable) -> np.ndarray:
    """The images at `paths`, uint8 (n, *shape)."""
    images = np.empty((len(paths), *shape), np.uint8)

    def read(place: int) -> None:
        images[place] = read_fitted(paths[place], shape[:2], grey=shape[2] == 1)

    told = time.monotonic()
    try:
        for done, _ in enumerate(pool.map(read, range(len(paths))), 1):
            if time.monotonic() - told >= _TOLD:
                log(f"decoded {done:,} of {len(paths):,} images")
                told = time.monotonic()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return images


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Sorted image files of each subfolder that has any."""
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
        # A generator for each class: another class that gains an image does not move this one's split.
        order = np.random.default_rng([seed, index]).permutation(len(paths))
        count = max(1, round(TEST_SHARE * len(paths)))
        test[name] = [paths[i] for i in sorted(order[:count])]
        train[name] = [paths[i] for i in sorted(order[count:])]
    return train, test
