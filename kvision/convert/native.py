"""Our own names in foreign formats: safetensors, or an `.npz` without manifest."""

import numpy as np

from kvision.convert.mapping import TensorMap
from kvision.data.preprocessing import Preprocessing
from kvision.weights.npz import named_variables


def find(model) -> dict[str, TensorMap]:
    """Map every variable to an array of the same name, shape and layout."""
    shapes = {key: tuple(variable.shape) for key, variable in named_variables(model).items()}
    return {key: TensorMap(key, shape, tuple(range(len(shape)))) for key, shape in shapes.items()}


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays unchanged."""
    return arrays


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the buffers of a file: none."""
    return {}


def preprocessing(name: str) -> Preprocessing | None:
    """Return None: unknown."""
    return None
