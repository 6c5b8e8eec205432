"""Loading data sets by name or path: a given path, the Keras cache, ./data, or the publisher's server."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kvision.data import cifar, mnist
from kvision.data.dataset import DataError, Dataset, DataUnavailable
from kvision.data.download import REMOTES
from kvision.data.download import download as fetch
from kvision.data.folder import MEMORY, is_image_folder, read_image_folder
from kvision.data.npz import read_npz
from kvision.data.sklearn_digits import load_digits
from kvision.data.synthetic import load_shapes10, load_synthetic_digits

PUBLISHED = ("cifar10", "cifar100", "mnist", "fashion_mnist")
SYNTHETIC: dict[str, Callable[[int], Dataset]] = {
    "shapes10": load_shapes10,
    "digits": lambda seed: load_digits(),
    "synthetic_digits": load_synthetic_digits,
}
NAMES = (*PUBLISHED, *SYNTHETIC)
_GRAY = ("mnist", "fashion_mnist", "digits", "synthetic_digits")


def load(
    name: str,
    path: str | os.PathLike | None = None,
    *,
    download: bool = True,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    limit: tuple[int | None, int | None] = (None, None),
    memory: int = MEMORY,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Load a data set by its name, or the data set at `path`.

    Args:
        name: one of `NAMES`.
        path: the only place to look at, if given: a folder that is or contains (up to one level down) a published
            layout, one of CIFAR's archives, an .npz with x_train, y_train, x_test, y_test, or a folder of images by
            class. The last two work for every `name`; the result is then named after the file or folder. Default: the
            Keras cache ($KERAS_HOME or ~/.keras, in `datasets`), then ./data, then the network.
        download: whether to use the network.
        seed: of synthetic data sets, and of the split of an image folder without a test folder.
        size, limit, memory: for an image folder: (height, width) of each image, maximum numbers of training and test
            images, and maximum bytes; see `read_image_folder`.
        log: called with one line about each download, each broken file that is skipped, and the memory that an image
            folder requires.

    Raises:
        DataUnavailable: without a path, if the data set is neither on disk nor downloadable.
        DataError: an unknown name; a path that does not exist, or contains nothing known or something broken; a
            download that is not the published file.
    """
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")
    if path is not None:
        if not str(path).strip():
            raise DataError("the path of the data is empty; expected a file or a folder")
        path = Path(os.path.expanduser(path))
        if not path.exists():
            raise DataError(f"{path} does not exist; expected a file or a folder with {name} or images by class")
        try:
            if path.is_file():
                return _read_file(path)
            options = {"size": size, "seed": seed, "limit": limit, "memory": memory, "log": log}
            return _read_any_folder(path, name, options)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    if name in SYNTHETIC:
        return SYNTHETIC[name](seed)

    cache = keras_cache()
    for root in (cache, Path("data")):
        for place in _find_candidates(root, name):
            try:
                dataset = _read_candidate(place, name)
            except DataError as error:
                log(f"skipping {place}: {error}")
                continue
            if dataset.name == name:
                return dataset
            log(f"skipping {place}: it is not the complete {name}")
    files = ", ".join(remote.file for remote in REMOTES[name])
    remedy = f"give a path to it, or put {files} into {cache}"
    if not download:
        raise DataUnavailable(f"{name} is neither in {cache} nor in {Path('data').resolve()}; {remedy}")
    try:
        place = fetch(name, cache, log)
    except DataUnavailable as error:
        raise DataUnavailable(f"{name} is neither on disk nor downloadable: {error}; {remedy}") from None
    return _read_candidate(place, name)


def keras_cache() -> Path:
    """Return the folder of Keras's data sets, by Keras's rules, without importing Keras."""
    home = os.environ.get("KERAS_HOME")
    if home:
        return Path(os.path.expanduser(home)) / "datasets"
    user = os.path.expanduser("~")  # stays "~" if neither $HOME nor the system defines a home (some containers)
    known = user != "~" and os.access(user, os.W_OK)
    return Path(user if known else tempfile.gettempdir()) / ".keras" / "datasets"


def _read_file(path: Path) -> Dataset:
    """Read a data set from a file, recognized by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PK") or path.suffix == ".npz":
        return mnist.read_mnist_npz(path)
    if path.name.startswith(mnist.FILES):
        raise DataError(f"{path} is one of MNIST's four files; give the folder that contains all four")
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        return cifar.read_archive(path)
    raise DataError(
        f"{path} is not a data set: expected an .npz with x_train, y_train, x_test, y_test, one of CIFAR's "
        ".tar.gz archives, or a folder"
    )


def _read_any_folder(folder: Path, name: str, options: dict) -> Dataset:
    # The folder is a data set, whatever name was requested.
    if cifar.find_layout(folder):
        return cifar.read_folder(folder)
    if mnist.is_idx_folder(folder):
        return mnist.read_idx_folder(folder, name)
    if mnist.is_idx_folder(folder / "raw"):
        return mnist.read_idx_folder(folder / "raw", name)
    # The folder contains the requested data set.
    for place in _find_candidates(folder, name):
        return _read_candidate(place, name)
    # The folder is, or contains, the user's own data set.
    arrays = [path for path in sorted(folder.glob("*.npz")) if path.name != "mnist.npz"]
    if len(arrays) == 1:
        return read_npz(arrays[0])
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if len(inner) == 1 and not is_image_folder(folder) and is_image_folder(inner[0]):
        folder = inner[0]
    if is_image_folder(folder):
        return read_image_folder(folder, gray=name in _GRAY, **options)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise DataError(
        f"{folder} contains no {name}, no .npz and no images by class, but {found}; expected "
        f"{' or '.join(_expected(name))}, one .npz, or <class>/ folders with images"
    )


def _expected(name: str) -> list[str]:
    layouts = [f"{layout.folder}/" for layout in cifar.LAYOUTS if layout.name == name]
    if name == "mnist":
        layouts.append("mnist.npz")
    if name in mnist.CLASSES:
        layouts.append(f"{mnist.FILES[0]}.gz and its three companions")
    return layouts or ["a published data set"]


def _find_candidates(root: Path, name: str) -> Iterator[Path]:
    """Yield files and folders in `root`, up to one level down, with a layout of the published data set `name`,
    complete or broken.

    Searches one level deeper where Keras (cifar-10-batches-py-target) and torchvision (MNIST/raw) add one.
    """
    try:
        children = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    folders = [root, *children]
    for child in children:
        folders += [child / "raw", *(child / layout.folder for layout in cifar.LAYOUTS)]
    for folder in folders:
        layout = cifar.find_layout(folder)
        if layout and layout.name == name:
            yield folder
        if name in mnist.CLASSES and mnist.is_idx_folder(folder) and mnist.idx_name(folder, name) == name:
            yield folder
    files = cifar.ARCHIVES.get(name, ()) + (("mnist.npz",) if name == "mnist" else ())
    for folder in (root, *children):
        for file in files:
            if (folder / file).is_file():
                yield folder / file


def _read_candidate(place: Path, name: str) -> Dataset:
    if place.is_file():
        return _read_file(place)
    return cifar.read_folder(place) if cifar.find_layout(place) else mnist.read_idx_folder(place, name)
