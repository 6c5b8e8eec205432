"""Rules for `vgg16_weights.npz`, a VGG-16 of TensorFlow 0.x: https://www.cs.toronto.edu/~frossard/post/vgg16.

Caffe's weights, transposed: arrays `conv1_1_W`, `conv1_1_b` ... `fc8_b` in TensorFlow's layouts, for RGB images minus
ImageNet's mean.
"""

import numpy as np

from kvision.convert.mapping import TensorMap, same_layout_map, tensor_maps
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = {"kernel": "W", "bias": "b"}
RULES = (
    (r"stage(\d)_(\d)_conv", "conv{1}_{2}"),
    (r"head_(\d)_dense", "fc{1+5}"),
    (r"logits", "fc8"),
)


def _check_name(name: str) -> None:
    if name != "vgg16":
        raise WeightsError(f"vgg16_weights.npz contains vgg16, not {name}")


def find(model) -> dict[str, TensorMap]:
    """Map every variable of vgg16 to its array in the file.

    Raises:
        WeightsError: another network.
    """
    _check_name(model.name)
    return tensor_maps(model, RULES, LEAVES, same_layout_map, "_")


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays unchanged."""
    return arrays


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the buffers of the file: none."""
    return {}


def preprocessing(name: str) -> Preprocessing:
    """Return RGB minus ImageNet's mean."""
    _check_name(name)
    mean = (123.68, 116.779, 103.939)
    return Preprocessing(mean=mean, std=(1, 1, 1), scale=1.0, size=(224, 224))
