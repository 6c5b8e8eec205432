"""Every network by its name."""

import difflib
import fnmatch
import gc
import importlib
import inspect
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvision.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    import keras

# The files of `kvision.models`; each has its variants. Importing them imports Keras, so it waits until somebody asks.
PAPERS = (
    "mlp",
    "cnn",
    "airbench",
    "cifar_resnet",
    "wide_resnet",
    "cifar_densenet",
    "alexnet",
    "vgg",
    "inception_v1",
    "inception_v2",
    "inception_v3",
    "resnet",
    "squeezenet",
    "densenet",
    "mobilenet_v2",
    "mnasnet",
    "spatial_transformer",
)


@cache
def _variants() -> dict[str, partial]:
    variants = {}
    for paper in PAPERS:
        rows = importlib.import_module(f"kvision.models.{paper}").VARIANTS
        if twice := variants.keys() & rows.keys():
            raise RuntimeError(f"two papers name a network {sorted(twice)}")
        variants |= rows
    return variants


def list_models(pattern: str = "*") -> list[str]:
    """The names of the zoo that match a shell pattern, in the order of the papers: `list_models("resnet*")`."""
    return [name for name in _variants() if fnmatch.fnmatchcase(name, pattern)]


class UnknownModelError(ValueError):
    """The zoo has no network of that name."""


def _row(name: str) -> partial:
    try:
        return _variants()[name]
    except KeyError:
        near = difflib.get_close_matches(name, _variants(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownModelError(f"unknown model {name!r}{hint or '.'} The zoo has: {', '.join(_variants())}") from None


def arguments(name: str) -> dict[str, object]:
    """The arguments of its own that a network takes, with their defaults: `{"dropout_rate": 0.25, ...}`.

    Raises:
        UnknownModelError: the zoo has no such network.
    """
    row = _row(name)
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(row).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "name"
    }
    return defaults


def paper(name: str):
    """The `kvision.models.Paper` of a network."""
    return importlib.import_module(_row(name).func.__module__).PAPER


def default_shape(name: str) -> tuple[int, int, int]:
    """(height, width, channels) of the images that a network was published for."""
    return paper(name).shapes.get(name, paper(name).input_shape)


def head_maps(name: str, made_for, input_shape) -> tuple[int, int] | None:
    """The maps that the head of weights made for images of one shape needs at another; None where those are its own."""
    own = importlib.import_module(_row(name).func.__module__).head_maps
    return None if input_shape is None or own(made_for) == own(input_shape) else own(made_for)


def create_model(
    name: str,
    input_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    weights: str | os.PathLike | None = None,
    *,
    adapt_input: bool = False,
    **own: object,
) -> "keras.Model":
    """Build a network of the zoo.

    Args:
        name: one of `list_models()`.
        input_shape: (height, width, channels) of the images; the network reads float (n, height, width, channels). The
            default is what the weights were made for, or else the size it was published for. Of most networks without
            a head height and width may be None: images of any size.
        classes: how many logits; 0 leaves the head off, and the network ends in its pooled features. The default is
            that of the weights, or else the published number.
        weights: a weights file of this network: its path, or the name of one that ships, such as "resnet20.cifar10"
            (see `kvision.weights.shipped`). None leaves the initial weights.
        adapt_input: let weights made for images of other channels fit, see `kvision.weights.adapt_kernel`.
        own: arguments of the network's own, see `arguments(name)`; those that the weights state are the defaults.

    Returns:
        A functional `keras.Model` named `name`.

    Raises:
        ValueError: an unknown name, an unknown argument, or a size the network cannot take.
        kvision.weights.WeightsError: no such file, or it does not fit the network.
    """
    row = _row(name)
    if unknown := own.keys() - arguments(name).keys():
        raise ValueError(
            f"{name} takes no argument {', '.join(sorted(unknown))}; it takes {', '.join(arguments(name)) or 'none'}"
        )
    stated = {}
    if weights is not None:
        # Here, because verifying a weights file builds its network by name.
        from kvision.weights import find
        from kvision.weights import inspect as inspect_weights

        weights = find(weights)
        held = inspect_weights(weights)
        manifest = held["manifest"] or {}
        stated = manifest.get("arguments", {}) if manifest.get("architecture") == name else {}
        own = {key: stated[key] for key in arguments(name) if key in stated} | own
        if "maps" in arguments(name) and own.get("maps") is None and "input_shape" in stated:
            own["maps"] = head_maps(name, stated["input_shape"], input_shape)
    if input_shape is None:
        input_shape = stated.get("input_shape", default_shape(name))
    if classes is None:
        classes = stated.get("classes", paper(name).classes)
    input_shape = tuple(input_shape)
    sizes = [size for size in input_shape[:2] if size is not None] + list(input_shape[2:])
    if len(input_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"input_shape must be three positive integers (height, width, channels), got {input_shape!r}")
    if not isinstance(classes, int) or classes < 0:
        raise ValueError(f"classes must be 0 or a positive integer, got {classes!r}")
    # JSON knows lists alone; a manifest's arguments come back as such.
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    if weights is None:
        return _built(row, input_shape, classes, own)

    from kvision.layers import blank
    from kvision.weights import load, named_variables
    from kvision.weights.manifest import room_for

    with blank(room_for(held["parameters"])):
        model = _built(row, input_shape, classes, own)
    # A network without head takes what it has of the file.
    named = named_variables(model)
    skip = [re.escape(key) for key in manifest["arrays"] if key not in named] if classes == 0 and manifest else ()
    load(model, weights, skip, adapt_input=adapt_input)
    return model


def _built(row: partial, input_shape, classes: int, own: dict) -> "keras.Model":
    """The network; images of any size, where it cannot be built for those, are refused."""
    try:
        return row(input_shape, classes, **own)
    except (TypeError, ValueError):
        if None in input_shape:
            head = " with a head" if classes else ""
            raise ValueError(
                f"{row.keywords['name']}{head} must know the size of its images: expected three positive integers "
                f"(height, width, channels), got input_shape={input_shape}"
            ) from None
        raise


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a network without training it.

    Args:
        title, authors, year, address: of the paper.
        file: of `kvision.models`.
        input_shape, classes: what it reads and gives unless told otherwise; the figures below are for these.
        parameters: trainable numbers.
        flops: multiply-adds of the convolutions and dense layers for one image, as He et al. 2015 count FLOPs.
        stages: the taps and the shapes (height, width, channels) of their maps.
        preprocessing: what its published or shipped weights expect of images; None where there are none.
        arguments: those of its own, with their defaults.
        weights: names of the weights that ship.
    """

    name: str
    title: str
    authors: str
    year: int
    address: str
    file: str
    input_shape: tuple[int, int, int]
    classes: int
    parameters: int
    flops: int
    stages: dict[str, tuple[int, ...]]
    preprocessing: Preprocessing | None
    arguments: dict[str, object]
    weights: tuple[str, ...]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        lines = {
            "paper": f"{self.authors} {self.year}, {self.title}, {self.address}",
            "file": self.file,
            "images": f"{shape}, {self.classes} classes",
            "parameters": f"{self.parameters:,}",
            "FLOPs": f"{self.flops:,} multiply-adds an image",
            "stages": ", ".join(f"{tap} {'x'.join(map(str, size))}" for tap, size in self.stages.items()),
            "preprocessing": json.dumps(self.preprocessing.to_json()) if self.preprocessing else "of the weights",
            "arguments": ", ".join(f"{key}={value!r}" for key, value in self.arguments.items()),
            "weights": ", ".join(self.weights),
        }
        return "\n".join([self.name, *(f"  {key:<13} {text}" for key, text in lines.items() if text)])


def _flops(layer) -> int:
    """Multiply-adds of one layer for one image."""
    kind = type(layer).__name__
    if kind == "Dense":
        return math.prod(layer.kernel.shape)
    if kind == "Conv2D":
        return math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape)
    if kind == "DepthwiseConv2D":
        return math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape)
    return 0


def multiply_adds(model) -> int:
    """Multiply-adds of a model's convolutions and dense layers for one image."""
    return sum(_flops(layer) for layer in model.layers)


def model_info(name: str) -> ModelInfo:
    """Paper, size and cost of a network; it is built for that, without initial values.

    Raises:
        UnknownModelError: the zoo has no such network.
    """
    from kvision.layers import blank
    from kvision.weights import inspect as inspect_weights
    from kvision.weights import published_preprocessing, shipped

    with blank():
        model = create_model(name)
    published = paper(name)
    files = {key: path for key, path in shipped().items() if key.partition(".")[0] == name}
    preprocessing = published_preprocessing(name)
    if files and preprocessing is None:
        preprocessing = Preprocessing.from_json(
            inspect_weights(next(iter(files.values())))["manifest"]["preprocessing"] or {}
        )
    taps = [layer for layer in model.layers if re.fullmatch(r"stage\d+", layer.name)]
    return ModelInfo(
        name=name,
        title=published.title,
        authors=published.authors,
        year=published.year,
        address=published.address,
        file=f"kvision/models/{_row(name).func.__module__.rsplit('.', 1)[-1]}.py",
        input_shape=default_shape(name),
        classes=published.classes,
        parameters=sum(math.prod(variable.shape) for variable in model.trainable_variables),
        flops=multiply_adds(model),
        stages={layer.name: tuple(layer.output.shape[1:]) for layer in taps},
        preprocessing=preprocessing,
        arguments=arguments(name),
        weights=tuple(files),
    )


def markdown_table(folder: str | os.PathLike = "weights") -> str:
    """The zoo as a Markdown table: each network at its default size, and the scores of the weights that ship.

    Args:
        folder: of weights files, whose manifests name their network and accuracy.
    """
    from kvision.weights import inspect as inspect_weights

    scores: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob("*.npz")):
        manifest = inspect_weights(path)["manifest"] or {}
        accuracy = ", ".join(f"{value:.2%} ({backend})" for backend, value in sorted(manifest["accuracy"].items()))
        scores.setdefault(manifest["architecture"], []).append(f"`{path.stem}`: {accuracy}")
    rows = [
        "| model | paper's file | images | trainable parameters | multiply-adds | weights that ship |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for name in list_models():
        info = model_info(name)
        gc.collect()  # models are full of cycles, and some take half a gigabyte
        shape = "x".join(map(str, info.input_shape))
        rows.append(
            f"| `{name}` | `{info.file.removeprefix('kvision/')}` | {shape} | {info.parameters:,} | "
            f"{info.flops / 1e6:,.0f} M | {'; '.join(scores.get(name, []))} |"
        )
    return "\n".join(rows)
