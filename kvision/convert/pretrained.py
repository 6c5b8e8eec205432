"""Networks with pretrained weights, by the names of the library's files or by any file's path."""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvision import zoo
from kvision.convert import keras_applications, slim, torchvision
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError
from kvision.weights.manifest import max_parameters
from kvision.weights.npz import inspect, load, named_variables

if TYPE_CHECKING:
    import keras

# In a clone, and where a wheel installs its data files.
FOLDERS = (Path(__file__).resolve().parents[2] / "weights", Path(sys.prefix) / "share" / "kvision" / "weights")


def pretrained_weights() -> dict[str, Path]:
    """Return the library's weights files, by names such as "airbench_small.cifar10": network and data set."""
    return {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.npz"))}


def find(weights: str | os.PathLike) -> Path:
    """Return the path of a weights file, given its path or the name of pretrained weights.

    Raises:
        WeightsError: neither exists; the message lists the names.
    """
    if os.path.exists(weights):
        return Path(weights)
    files = pretrained_weights()
    if (name := os.fspath(weights).removesuffix(".npz")) in files:
        return files[name]
    near = difflib.get_close_matches(name, files, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; expected one of {', '.join(files) or 'none'}"
    raise WeightsError(f"{os.fspath(weights)}: no such file, and no pretrained weights of that name{hint}")


def create_model(
    name: str,
    input_shape: tuple[int | None, int | None, int] | None = None,
    classes: int | None = None,
    weights: str | os.PathLike | None = None,
    *,
    adapt_input: bool = False,
    **model_kwargs: object,
) -> "keras.Model":
    """Build a network of the zoo, with initial or pretrained weights.

    Args:
        name: one of `list_models()`.
        input_shape: (height, width, channels) of the images; the network reads float (n, height, width, channels). The
            default is that of the weights, or else the published size. Most networks without a head accept None for
            height and width: any size.
        classes: the number of logits; 0 omits the head, and the network ends in its pooled features. The default is
            that of the weights, or else the published number.
        weights: a weights file of this network: its path, or the name of pretrained weights, such as "resnet20.cifar10"
            (see `pretrained_weights`). None keeps the initial weights.
        adapt_input: adapt weights made for another number of channels, see `kvision.weights.adapt_kernel`.
        model_kwargs: model-specific arguments, see `kvision.zoo.arguments`; the defaults are those of the weights.

    Returns:
        A functional `keras.Model` named `name`.

    Raises:
        ValueError: an unknown name, an unknown argument, or an unsupported size.
        kvision.weights.WeightsError: no such file, or it does not fit the network.
    """
    from kvision.layers import skip_init  # here, because it imports Keras

    zoo.check_arguments(name, model_kwargs)
    if weights is None:
        return zoo.build_model(name, input_shape, classes, **model_kwargs)
    weights = find(weights)
    held = inspect(weights)
    manifest = held["manifest"] or {}
    stated = manifest.get("arguments", {}) if manifest.get("architecture") == name else {}
    options = {key: stated[key] for key in zoo.arguments(name) if key in stated} | model_kwargs
    if "maps" in zoo.arguments(name) and options.get("maps") is None and "input_shape" in stated:
        options["maps"] = zoo.head_maps(name, stated["input_shape"], input_shape)
    input_shape = stated.get("input_shape") if input_shape is None else input_shape
    classes = stated.get("classes") if classes is None else classes
    with skip_init(max_parameters(held["parameters"])):
        model = zoo.build_model(name, input_shape, classes, **options)
    # A network without head skips the file's head.
    named = named_variables(model)
    skip = [re.escape(key) for key in manifest["arrays"] if key not in named] if classes == 0 and manifest else ()
    load(model, weights, skip, adapt_input=adapt_input)
    return model


def published_preprocessing(architecture: str) -> Preprocessing | None:
    """Return the preprocessing of a network's published weights; None if there are none."""
    for source in (torchvision, keras_applications, slim):
        try:
            return source.preprocessing(architecture)
        except WeightsError:
            continue
    return None


def preprocess(weights: str | os.PathLike) -> Preprocessing:
    """Return the preprocessing of a weights file: `kvision.preprocess("resnet20.cifar10").images(images)`.

    Args:
        weights: a path, or the name of pretrained weights.

    Returns:
        The manifest's preprocessing; if it states none, one that maps 0..255 to 0..1. Call it on a batch of images of
        the network's size, or its `images` on images of any size, which are resized and cropped first.

    Raises:
        WeightsError: the file does not exist or is damaged.
    """
    manifest = inspect(find(weights))["manifest"] or {}
    stated = manifest.get("preprocessing")
    return Preprocessing() if stated is None else Preprocessing.from_json(stated)
