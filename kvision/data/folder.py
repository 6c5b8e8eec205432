"""Images in folders, one folder a class: `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone."""

from pathlib import Path

import numpy as np
from PIL import Image

from kvision.data.dataset import MAX_BYTES, DataError, Dataset, own_name
from kvision.data.images import read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
TEST_SHARE = 0.2


def is_image_folder(folder: Path) -> bool:
    """Whether the folder holds images by class, at least one class."""
    return bool(_classes(folder) or _classes(folder / "train"))


def read_image_folder(
    folder: Path, *, size: tuple[int, int] | None = None, grey: bool = False, seed: int = 0
) -> Dataset:
    """The data set of a folder of images by class, decoded by Pillow, whatever their sizes and modes.

    Without a `test` (or `val`) folder, a fifth of each class, drawn by `seed`, is the test split. Classes are
    sorted by name, images by file name. The result's name is the folder's.

    Args:
        folder: holds `train/<class>/*` and `test/<class>/*`, or `<class>/*`.
        size: (height, width) in pixels that all images are resized to (bilinear); default: the first image's.
        grey: whether to make one grey channel instead of RGB.
        seed: of the split.

    Raises:
        DataError: no images, a broken one (it is named), fewer than 2 classes, a class with fewer than 2
            images to split, a test class that training lacks, or more pixels than fit.
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
    if not test:
        train, test = _split(train, root, seed)
    classes = tuple(sorted(train))
    if size is None:
        first = read_image(train[classes[0]][0], grey)
        size = (first.height, first.width)
    count = sum(map(len, train.values())) + sum(map(len, test.values()))
    channels = 1 if grey else 3
    if min(size) < 1 or count * size[0] * size[1] * channels > MAX_BYTES:
        raise DataError(
            f"{folder}: {count} images of {size[0]}x{size[1]} do not fit; give a smaller size, at least 1x1"
        )
    splits = []
    for files in (train, test):
        images = np.empty((sum(map(len, files.values())), *size, channels), np.uint8)
        labels = []
        for index, name in enumerate(classes):
            for path in files.get(name, ()):
                image = read_image(path, grey)
                if (image.height, image.width) != tuple(size):
                    image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
                images[len(labels)] = np.asarray(image).reshape(*size, channels)
                labels.append(index)
        splits += [images, np.asarray(labels, np.int32)]
    return Dataset(own_name(folder.resolve().name, "folder"), *splits, classes=classes, source=str(folder))


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
