"""Where each variable of ours lies in another framework's file: its name there, and its axes.

A source (torchvision, Keras, TF-Slim) is a table: for each family of networks, rows from our layers' names to its own.
Every layout is a permutation of the same numbers, so what goes there and back is the same to the bit.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kvision.weights.archive import WeightsError
from kvision.weights.npz import named_variables


@dataclass(frozen=True)
class TensorMap:
    """One variable's place in a foreign file.

    Args:
        key: its name there.
        shape: its shape there.
        axes: our axes in the order of the foreign ones, after our array was viewed as `view`.
        view: what our array is first reshaped to; None leaves it.
    """

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    view: tuple[int, ...] | None = None

    def export_(self, array: np.ndarray) -> np.ndarray:
        """The foreign array of our array."""
        array = array if self.view is None else array.reshape(self.view)
        return np.ascontiguousarray(array.transpose(self.axes)).reshape(self.shape)

    def import_(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our array, of `shape`, of the foreign array."""
        viewed = shape if self.view is None else self.view
        array = array.reshape([viewed[axis] for axis in self.axes])
        return np.ascontiguousarray(array.transpose(np.argsort(self.axes))).reshape(shape)


def rename(name: str, rows: Iterable[tuple[str, str]]) -> str | None:
    r"""The foreign name of a layer by the first row whose pattern matches all of it, or None.

    In a row's template `{1}` is the pattern's first group and `{1-1}` that number less one:
    `(r"stage(\d)_block(\d+)_(\d)_conv", "layer{1}.{2-1}.conv{3}")`.
    """
    for pattern, template in rows:
        if match := re.fullmatch(pattern, name):
            fill = lambda found, match=match: (  # noqa: E731
                str(int(match[int(found[1])]) + int(found[2])) if found[2] else match[int(found[1])] or ""
            )
            return re.sub(r"\{(\d)([+-]\d+)?\}", fill, template)
    return None


def layers_of(model) -> dict[str, object]:
    """Each layer that owns variables, by its name."""
    return {layer.name: layer for layer in model._flatten_layers(include_self=False) if layer.variables}


def flattened(layer) -> tuple[int, ...] | None:
    """(height, width, channels) of the maps that a dense layer reads flattened, or None where it reads features."""
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
    """The place of a variable in PyTorch's layouts: convolutions (out, in, h, w), dense (out, in), channels first."""
    kind = type(layer).__name__
    if kind == "DepthwiseConv2D" and variable == "kernel":
        height, width, inputs, multiplier = shape
        return TensorMap(key, (inputs * multiplier, 1, height, width), (2, 3, 0, 1))
    if variable == "kernel" and len(shape) == 4:
        return TensorMap(key, tuple(shape[axis] for axis in (3, 2, 0, 1)), (3, 2, 0, 1))
    if variable == "kernel" and len(shape) == 2:
        if maps := flattened(layer):
            return TensorMap(key, (shape[1], shape[0]), (3, 2, 0, 1), (*maps, shape[1]))
        return TensorMap(key, (shape[1], shape[0]), (1, 0))
    return TensorMap(key, shape, tuple(range(len(shape))))


def same_layout_map(layer, variable: str, shape: tuple[int, ...], key: str) -> TensorMap:
    """The place of a variable in Keras's and TensorFlow's layouts, which are ours."""
    return TensorMap(key, shape, tuple(range(len(shape))))


def tensor_maps(
    model, rows: Iterable[tuple[str, str]], leaves: Mapping[str, str], place, separator: str
) -> dict[str, TensorMap]:
    """The place of every variable of `model` in a foreign file, by our names.

    Args:
        rows: from our layers' names to the foreign ones, see `rename`.
        leaves: from our variables' names (kernel, bias, gamma, beta, moving_mean, moving_variance) to the foreign ones.
        place: `torch_map` or `same_layout_map`.
        separator: between layer and variable there.

    Raises:
        WeightsError: a layer or a variable that the table does not know; the message names it.
    """
    rows, layers, found = list(rows), layers_of(model), {}
    for key, variable in named_variables(model).items():
        name, leaf = key.rsplit("/", 1)
        foreign = rename(name, rows)
        if foreign is None or leaf not in leaves:
            raise WeightsError(f"{key} of {model.name} has no name in that source")
        found[key] = place(layers[name], leaf, tuple(variable.shape), f"{foreign}{separator}{leaves[leaf]}")
    return found
