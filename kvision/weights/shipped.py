"""The weights files that come with the library, by their names."""

import difflib
import os
import sys
from pathlib import Path

from kvision.data.preprocessing import Preprocessing
from kvision.weights import keras_applications, slim, torchvision
from kvision.weights.archive import WeightsError
from kvision.weights.npz import inspect

# In a clone, and where a wheel puts its data files.
FOLDERS = (Path(__file__).resolve().parents[2] / "weights", Path(sys.prefix) / "share" / "kvision" / "weights")


def shipped() -> dict[str, Path]:
    """The files that ship, by names such as "airbench_small.cifar10": the network and its data set."""
    return {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.npz"))}


def find(weights: str | os.PathLike) -> Path:
    """The weights file at a path, or of the name of one that ships.

    Raises:
        WeightsError: there is neither; the message lists the names.
    """
    if os.path.exists(weights):
        return Path(weights)
    files = shipped()
    if (name := os.fspath(weights).removesuffix(".npz")) in files:
        return files[name]
    near = difflib.get_close_matches(name, files, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; those are {', '.join(files) or 'none'}"
    raise WeightsError(f"{os.fspath(weights)}: there is no such file, and no weights of that name ship{hint}")


def published_preprocessing(architecture: str) -> Preprocessing | None:
    """What the weights that a network was published with expect of images; None where nobody published any."""
    for lineage in (torchvision, keras_applications, slim):
        try:
            return lineage.preprocessing(architecture)
        except WeightsError:
            continue
    return None


def preprocess(weights: str | os.PathLike) -> Preprocessing:
    """How images are prepared for a weights file: `kvision.preprocess("resnet20.cifar10").images(pictures)`.

    Args:
        weights: a path, or the name of a file that ships.

    Returns:
        The manifest's preprocessing, or one that brings 0..255 to 0..1 where it states none. Call it on a batch of
        images of the network's size, or its `images` on images of any size, which are resized and cropped first.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    manifest = inspect(find(weights))["manifest"] or {}
    stated = manifest.get("preprocessing")
    return Preprocessing() if stated is None else Preprocessing.from_json(stated)
