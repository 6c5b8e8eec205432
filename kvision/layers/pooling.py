"""Pooling with symmetric padding, and adaptive pooling."""

import math
from collections.abc import Callable

import keras
from keras import ops

from kvision.layers.conv import PADDINGS, ConstantPad2D, _padded


def max_pool(
    size: int, strides: int | None = None, *, name: str, padding: str = "valid", ceil: bool = False
) -> Callable:
    """Create max pooling; a window that does not fit at the border is dropped, as in torchvision.

    Args:
        strides: the default is `size`.
        padding: "valid"; "same", half a window of minus infinity on every side; "tensorflow" as for `conv`.
        ceil: keep a last window that crosses the lower or right border if it starts inside the image (torchvision's
            `ceil_mode`).
    """
    strides = strides or size
    if padding not in PADDINGS:
        raise ValueError(f"{name}: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    layer = keras.layers.MaxPooling2D(size, strides, padding=PADDINGS[padding], name=name)
    if padding == "same":
        return _padded(layer, (size, size), -math.inf)
    if not ceil:
        return layer

    def pool(x):
        beyond = [max(0, -(-(side - size) // strides) * strides + size - side) for side in x.shape[1:3]]
        if any(beyond):
            x = ConstantPad2D(tuple((0, side) for side in beyond), -math.inf, name=f"{name}_pad")(x)
        return layer(x)

    return pool


def avg_pool(size: int, strides: int | None = None, *, name: str, padding: str = "valid") -> Callable:
    """Create average pooling.

    Args:
        strides: the default is `size`.
        padding: "valid"; "same", half a window of zeros on every side, which count, as in torchvision; "tensorflow",
            which counts only the image's own pixels.
    """
    layer = keras.layers.AveragePooling2D(size, strides or size, padding=PADDINGS[padding], name=name)
    return _padded(layer, (size, size)) if padding == "same" else layer


def global_pool(*, name: str = "pool") -> keras.layers.Layer:
    """Create a layer that averages over all pixels: (n, h, w, c) to (n, c)."""
    return keras.layers.GlobalAveragePooling2D(name=name)


@keras.saving.register_keras_serializable("kvision")
class AdaptiveAveragePooling2D(keras.layers.Layer):
    """Averages over a grid of `size` (height, width) cells: (n, h, w, c) to (n, *size, c).

    Cell i of n spans floor(i h / n) to ceil((i + 1) h / n): cells overlap if n does not divide h, and repeat pixels if
    h is less than n, as in PyTorch. Keras's own layer gives NaN on JAX.
    """

    def __init__(self, size: tuple[int, int], **options):
        super().__init__(**options)
        self.size = tuple(size)

    def call(self, x):
        for axis, cells in enumerate(self.size, start=1):
            length = int(x.shape[axis])  # PyTorch's tracer for ONNX makes it a tensor
            ends = [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]
            parts = [x[:, start:end] if axis == 1 else x[:, :, start:end] for start, end in ends]
            x = ops.concatenate([ops.mean(part, axis, keepdims=True) for part in parts], axis)
        return x

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.size, input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "size": self.size}
