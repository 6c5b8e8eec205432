"""Our own names, for formats that are not ours: safetensors, or an `.npz` without manifest."""

import numpy as np

from kvision.convert.mapping import TensorMap
from kvision.data.preprocessing import Preprocessing
from kvision.weights.npz import named_variables


def find(model) -> dict[str, TensorMap]:
    """Every variable under its own name, as it is."""
    shapes = {key: tuple(variable.shape) for key, variable in named_variables(model).items()}
    return {key: TensorMap(key, shape, tuple(range(len(shape)))) for key, shape in shapes.items()}


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as they are."""
    return arrays


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """What a file has besides: nothing."""
    return {}


def preprocessing(name: str) -> Preprocessing | None:
    """Unknown."""
    return None
