"""Residual networks for CIFAR-10.

He, Zhang, Ren and Sun 2015, "Deep residual learning for image recognition", https://arxiv.org/abs/1512.03385, section
4.2: three stages of 16, 32 and 64 filters on maps of 32, 16 and 8 pixels, `depth = 6 n + 2`. The shortcut has no
parameters (option A): where the shape changes it takes every second pixel and fills the new channels with zeros, half
of them before and half after the old channels, as in the PyTorch weights in circulation; the paper leaves this open.
"""

from functools import partial

import keras
from keras import ops

from kvision.layers import activation, batch_norm, conv, logits
from kvision.models import Paper

PAPER = Paper(
    "Deep residual learning for image recognition", "He, Zhang, Ren and Sun", 2015, "https://arxiv.org/abs/1512.03385"
)


@keras.saving.register_keras_serializable("kvision")
class PaddedShortcut(keras.layers.Layer):
    """Option A: takes every `strides`-th pixel and fills missing channels with zeros."""

    def __init__(self, filters: int, strides: int, **options):
        super().__init__(**options)
        self.filters, self.strides = filters, strides

    def call(self, x):
        missing = self.filters - x.shape[-1]
        x = x[:, :: self.strides, :: self.strides, :]
        return ops.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))

    def compute_output_shape(self, input_shape):
        n, height, width, _ = input_shape
        reduce = lambda size: None if size is None else -(-size // self.strides)  # noqa: E731
        return (n, reduce(height), reduce(width), self.filters)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}


def block(x, filters: int, strides: int, *, name: str, output_name: str):
    """Apply two 3x3 convolutions and add a shortcut; `output_name` names the block's output."""
    y = conv(filters, 3, strides, name=f"{name}_1_conv")(x)
    y = batch_norm(name=f"{name}_1_bn")(y)
    y = activation("relu", name=f"{name}_1_relu")(y)
    y = conv(filters, 3, name=f"{name}_2_conv")(y)
    y = batch_norm(name=f"{name}_2_bn")(y)
    if x.shape != y.shape:
        x = PaddedShortcut(filters, strides, name=f"{name}_shortcut")(x)
    y = keras.layers.Add(name=f"{name}_add")([x, y])
    return activation("relu", name=output_name)(y)


def cifar_resnet(input_shape: tuple[int, int, int], classes: int, *, depth: int, name: str) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 64 pooled features if `classes` is 0.

    Raises:
        ValueError: `depth` is not 6 n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has depth 6 n + 2 (20, 32, 44, 56, 110 ...), got {depth}")
    blocks = (depth - 2) // 6
    inputs = keras.Input(input_shape, name="image")
    x = conv(16, 3, name="stem_conv")(inputs)
    x = batch_norm(name="stem_bn")(x)
    x = activation("relu", name="stem")(x)
    for i, filters in enumerate((16, 32, 64), start=1):
        for j in range(1, blocks + 1):
            strides = 2 if i > 1 and j == 1 else 1
            output_name = f"stage{i}" if j == blocks else f"stage{i}_block{j}"
            x = block(x, filters, strides, name=f"stage{i}_block{j}", output_name=output_name)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = logits(classes)(x) if classes else x
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    f"resnet{depth}": partial(cifar_resnet, depth=depth, name=f"resnet{depth}") for depth in (20, 32, 44, 56, 110)
}
