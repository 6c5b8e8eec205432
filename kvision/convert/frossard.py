"""`vgg16_weights.npz`, VGG-16 from the years of TensorFlow 0.x: https://www.cs.toronto.edu/~frossard/post/vgg16.

Caffe's weights, transposed: arrays `conv1_1_W`, `conv1_1_b` ... `fc8_b`, in the layouts of TensorFlow, for images of
red, green and blue less ImageNet's mean.
"""

import numpy as np

from kvision.convert.mapping import TensorMap, same_layout_map, tensor_maps
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = {"kernel": "W", "bias": "b"}
ROWS = (
    (r"stage(\d)_(\d)_conv", "conv{1}_{2}"),
    (r"head_(\d)_dense", "fc{1+5}"),
    (r"logits", "fc8"),
)


def _expect(name: str) -> None:
    if name != "vgg16":
        raise WeightsError(f"vgg16_weights.npz is of vgg16, not of {name}")


def find(model) -> dict[str, TensorMap]:
    """The place of every variable of vgg16.

    Raises:
        WeightsError: another network.
    """
    _expect(model.name)
    return tensor_maps(model, ROWS, LEAVES, same_layout_map, "_")


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as they are."""
    return arrays


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """What the file has besides: nothing."""
    return {}


def preprocessing(name: str) -> Preprocessing:
    """Red, green, blue, less ImageNet's mean."""
    _expect(name)
    mean = (123.68, 116.779, 103.939)
    return Preprocessing(mean=mean, std=(1, 1, 1), scale=1.0, size=(224, 224))
