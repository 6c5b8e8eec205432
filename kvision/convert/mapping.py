"""Maps from our variables to arrays in other frameworks' files: names and axes.

A source (torchvision, Keras, TF-Slim) is a table: for each family of networks, rules from our layers' names to its own.
Every layout is a permutation of the same numbers, so that a round trip is bit-exact.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kvision.weights.archive import WeightsError
from kvision.weights.npz import named_variables


@dataclass(frozen=True)
class TensorMap:
    """The array of one variable in a foreign file.

    Args:
        key: its name in the file.
        shape: its shape in the file.
        axes: our axes in the order of the foreign ones, after our array is reshaped to `view`.
        view: first reshape our array to this; None keeps its shape.
    """

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    view: tuple[int, ...] | None = None

    def export_(self, array: np.ndarray) -> np.ndarray:
        """Convert our array to the foreign one."""
        array = array if self.view is None else array.reshape(self.view)
        return np.ascontiguousarray(array.transpose(self.axes)).reshape(self.shape)

    def import_(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Convert the foreign array to ours, of `shape`."""
        viewed = shape if self.view is None else self.view
        array = array.reshape([viewed[axis] for axis in self.axes])
        return np.ascontiguousarray(array.transpose(np.argsort(self.axes))).reshape(shape)


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    r"""Return the foreign name of a layer by the first rule whose pattern matches all of it, or None.

    In a rule's template `{1}` is the pattern's first group and `{1-1}` that number minus one:
    `(r"stage(\d)_block(\d+)_(\d)_conv", "layer{1}.{2-1}.conv{3}")`.
    """
    for pattern, template in rules:
        if match := re.fullmatch(pattern, name):
            fill = lambda found, match=match: (  # noqa: E731
                str(int(match[int(found[1])]) + int(found[2])) if found[2] else match[int(found[1])] or ""
            )
            return re.sub(r"\{(\d)([+-]\d+)?\}", fill, template)
    return None


def layers_with_variables(model) -> dict[str, object]:
    """Return the layers that have variables, by name."""
    return {layer.name: layer for layer in model._flatten_layers(include_self=False) if layer.variables}


def flattened_shape(layer) -> tuple[int, ...] | None:
    """Return (height, width, channels) of the flattened maps that a dense layer reads; None if it reads features."""
    tensor = layer.input
    while (source := tensor._keras_history.operation) is not None:
        kind = type(source).__name__
        if kind == "Flatten":
            shape = tuple(source.input.shape[1:])
            return shape if len(shape) == 3 else None
        if kind not in ("Activation", "Dropout", "ReLU", "BatchNormalization"):
            return None
        tensor = source.input
    return None


def torch_map(layer, variable: str, shape: tuple[int, ...], key: str) -> TensorMap:
    """Map a variable to PyTorch's layouts: convolutions (out, in, h, w), dense (out, in), channels first."""
    kind = type(layer).__name__
    if kind == "DepthwiseConv2D" and variable == "kernel":
        height, width, inputs, multiplier = shape
        return TensorMap(key, (inputs * multiplier, 1, height, width), (2, 3, 0, 1))
    if variable == "kernel" and len(shape) == 4:
        return TensorMap(key, tuple(shape[axis] for axis in (3, 2, 0, 1)), (3, 2, 0, 1))
    if variable == "kernel" and len(shape) == 2:
        if maps := flattened_shape(layer):
            return TensorMap(key, (shape[1], shape[0]), (3, 2, 0, 1), (*maps, shape[1]))
        return TensorMap(key, (shape[1], shape[0]), (1, 0))
    return TensorMap(key, shape, tuple(range(len(shape))))


def same_layout_map(layer, variable: str, shape: tuple[int, ...], key: str) -> TensorMap:
    """Map a variable to Keras's and TensorFlow's layouts, which are ours."""
    return TensorMap(key, shape, tuple(range(len(shape))))


def tensor_maps(
    model, rules: Iterable[tuple[str, str]], leaves: Mapping[str, str], make_map, separator: str
) -> dict[str, TensorMap]:
    """Map every variable of `model`, by our names, to its array in a foreign file.

    Args:
        rules: from our layers' names to the foreign ones, see `rename`.
        leaves: from our variables' names (kernel, bias, gamma, beta, moving_mean, moving_variance) to the foreign ones.
        make_map: `torch_map` or `same_layout_map`.
        separator: between layer and variable in the foreign names.

    Raises:
        WeightsError: a layer or variable without a rule; the message names it.
    """
    rules, layers, found = list(rules), layers_with_variables(model), {}
    for key, variable in named_variables(model).items():
        name, leaf = key.rsplit("/", 1)
        foreign = rename(name, rules)
        if foreign is None or leaf not in leaves:
            raise WeightsError(f"{key} of {model.name} has no name in that source")
        found[key] = make_map(layers[name], leaf, tuple(variable.shape), f"{foreign}{separator}{leaves[leaf]}")
    return found
