"""Every network by its name."""

import difflib
import fnmatch
import importlib
import inspect
import math
from functools import cache, partial
from pathlib import Path

# The files of `kvision.models`; each has its variants. Importing them imports Keras, so it waits until somebody asks.
PAPERS = ("mlp", "cnn", "airbench", "cifar_resnet", "wide_resnet", "vgg")


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


def create_model(
    name: str,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    weights: str | None = None,
    **own,
):
    """Build a network of the zoo.

    Args:
        name: one of `list_models()`.
        input_shape: (height, width, channels) of the images; the network reads float (n, height, width, channels).
        classes: how many logits; 0 leaves the head off, and the network ends in its pooled features.
        weights: path of a weights file of this network (see `kvision.weights.load`); None leaves the initial weights.
        own: arguments of the network's own, see `arguments(name)`.

    Returns:
        A functional `keras.Model` named `name`.

    Raises:
        ValueError: an unknown name, an unknown argument, or a size the network cannot take.
        kvision.weights.WeightsError: the file does not fit the network.
    """
    row = _row(name)
    if unknown := own.keys() - arguments(name).keys():
        raise ValueError(
            f"{name} takes no argument {', '.join(sorted(unknown))}; it takes {', '.join(arguments(name)) or 'none'}"
        )
    if len(input_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in input_shape):
        raise ValueError(f"input_shape must be three positive integers (height, width, channels), got {input_shape!r}")
    if not isinstance(classes, int) or classes < 0:
        raise ValueError(f"classes must be 0 or a positive integer, got {classes!r}")
    # JSON knows lists alone; a manifest's arguments come back as such.
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    model = row(tuple(input_shape), classes, **own)
    if weights is not None:
        from kvision.weights import load  # here, because verifying a weights file builds its network by name

        load(model, weights)
    return model


def markdown_table(shipped: str = "weights") -> str:
    """The zoo as a Markdown table: parameters at 32x32x3 and ten classes, and the scores of the weights that ship.

    Args:
        shipped: folder of weights files, whose manifests name their network and accuracy.
    """
    from kvision.weights import inspect as inspect_weights

    scores: dict[str, list[str]] = {}
    for path in sorted(Path(shipped).glob("*.npz")):
        manifest = inspect_weights(path)["manifest"] or {}
        accuracy = ", ".join(f"{value:.2%} ({backend})" for backend, value in sorted(manifest["accuracy"].items()))
        scores.setdefault(manifest["architecture"], []).append(f"`{path.stem}`: {accuracy}")
    rows = ["| model | paper's file | trainable parameters | weights that ship |", "| --- | --- | ---: | --- |"]
    for paper in PAPERS:
        for name in importlib.import_module(f"kvision.models.{paper}").VARIANTS:
            model = create_model(name)
            count = sum(math.prod(variable.shape) for variable in model.trainable_variables)
            rows.append(f"| `{name}` | `models/{paper}.py` | {count:,} | {'; '.join(scores.get(name, []))} |")
    return "\n".join(rows)
