"""All networks by name."""

import difflib
import fnmatch
import importlib
import inspect
import math
from functools import cache, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

# The modules of `kvision.models`, each with its variants. Importing them imports Keras, so it is deferred.
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
    "autoencoder",
    "unet",
)


@cache
def _variants() -> dict[str, partial]:
    variants = {}
    for paper in PAPERS:
        rows = importlib.import_module(f"kvision.models.{paper}").VARIANTS
        if twice := variants.keys() & rows.keys():
            raise RuntimeError(f"two papers define a network {sorted(twice)}")
        variants |= rows
    return variants


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the zoo that match a shell pattern, in the order of the papers: `list_models("resnet*")`."""
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
    """Return the model-specific arguments of a network with their defaults: `{"dropout_rate": 0.25, ...}`.

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


def module(name: str):
    """Return the module of `kvision.models` that defines a network."""
    return importlib.import_module(_row(name).func.__module__)


def paper(name: str):
    """Return the `kvision.models.Paper` of a network."""
    return module(name).PAPER


def default_shape(name: str) -> tuple[int, int, int]:
    """Return (height, width, channels) of the images that a network was published for."""
    return paper(name).shapes.get(name, paper(name).input_shape)


def head_maps(name: str, made_for, input_shape) -> tuple[int, int] | None:
    """Return the head's map size that weights made for `made_for` need at `input_shape`; None if it is the default."""
    maps = module(name).head_maps
    return None if input_shape is None or maps(made_for) == maps(input_shape) else maps(made_for)


def build_model(
    name: str, input_shape: tuple[int | None, int | None, int] | None = None, classes: int | None = None, **model_kwargs
) -> "keras.Model":
    """Build a network of the zoo with initial weights; `kvision.create_model` also loads weights.

    Args:
        name: one of `list_models()`.
        input_shape: (height, width, channels) of the images; the network reads float (n, height, width, channels). The
            default is the published size. Most networks without a head accept None for height and width: any size.
        classes: the number of logits; 0 omits the head, and the network ends in its pooled features. The default is
            the published number. An autoencoder has no classes: with None it returns an image, with 0 its code.
        model_kwargs: model-specific arguments, see `arguments(name)`.

    Returns:
        A functional `keras.Model` named `name`.

    Raises:
        UnknownModelError: the zoo has no such network.
        ValueError: an unknown argument, or an unsupported size.
    """
    row = _row(name)
    check_arguments(name, model_kwargs)
    input_shape = tuple(default_shape(name) if input_shape is None else input_shape)
    classes = paper(name).classes if classes is None else classes
    sizes = [size for size in input_shape[:2] if size is not None] + list(input_shape[2:])
    if len(input_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"input_shape must be three positive integers (height, width, channels), got {input_shape!r}")
    if classes is not None and (not isinstance(classes, int) or classes < 0):
        raise ValueError(f"classes must be 0 or a positive integer, got {classes!r}")
    if classes and paper(name).classes is None:
        raise ValueError(f"{name} returns images, not logits: expected classes=None, or 0 for its code, got {classes}")
    # JSON has only lists, so arguments from a manifest contain lists for tuples.
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in model_kwargs.items()}
    try:
        return row(input_shape, classes, **options)
    except (TypeError, ValueError):
        if None in input_shape:
            head = " with a head" if classes else ""
            raise ValueError(
                f"{row.keywords['name']}{head} needs a known image size: expected three positive integers "
                f"(height, width, channels), got input_shape={input_shape}"
            ) from None
        raise


def check_arguments(name: str, model_kwargs) -> None:
    """Check that a network accepts these model-specific arguments.

    Raises:
        UnknownModelError: the zoo has no such network.
        ValueError: an unknown argument; the message lists the known ones.
    """
    if unknown := set(model_kwargs) - arguments(name).keys():
        raise ValueError(
            f"{name} has no argument {', '.join(sorted(unknown))}; it has {', '.join(arguments(name)) or 'none'}"
        )


def _flops(layer) -> int:
    """Return the multiply-adds of one layer for one image."""
    kind = type(layer).__name__
    if kind == "Dense":
        return math.prod(layer.kernel.shape)
    if kind == "Conv2D":
        return math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape)
    if kind == "DepthwiseConv2D":
        return math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape)
    if kind == "Conv2DTranspose":  # each pixel of the input meets the whole kernel
        return math.prod(layer.input.shape[1:3]) * math.prod(layer.kernel.shape)
    return 0


def multiply_adds(model) -> int:
    """Return the multiply-adds of a model's convolutions and dense layers for one image."""
    return sum(_flops(layer) for layer in model.layers)
