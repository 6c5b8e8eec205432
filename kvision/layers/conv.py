"""Convolutions with symmetric padding, as in torchvision, so that weights trained there give the same outputs.

At stride 2, Keras's "same" pads one row more below than above. A convolution before a batch norm has no bias.
"""

import math
from collections.abc import Callable
from functools import partial

import keras
from keras import ops

from kvision.layers.initializers import Constant, VarianceScaling


@keras.saving.register_keras_serializable("kvision")
class ConstantPad2D(keras.layers.Layer):
    """Pads images with a constant: `pads` is ((above, below), (left, right)). Keras's own layer pads with 0 alone."""

    def __init__(self, pads: tuple[tuple[int, int], tuple[int, int]], value: float = 0.0, **options):
        super().__init__(**options)
        self.pads, self.value = tuple(map(tuple, pads)), value

    def call(self, x):
        return ops.pad(x, ((0, 0), *self.pads, (0, 0)), constant_values=self.value)

    def compute_output_shape(self, input_shape):
        n, *sizes, channels = input_shape
        grow = lambda size, pads: None if size is None else size + sum(pads)  # noqa: E731
        return (n, *map(grow, sizes, self.pads), channels)

    def get_config(self):
        return {**super().get_config(), "pads": self.pads, "value": self.value}


def least_side(input_shape: tuple[int | None, int | None, int]) -> float:
    """Return the shorter side of images in pixels, as far as it is known; infinity if both sides are None."""
    return min((side for side in input_shape[:2] if side is not None), default=math.inf)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _padded(layer: keras.layers.Layer, size: tuple[int, int], value: float = 0.0) -> Callable:
    """Put a padding of half a window on every side before `layer`; the window's sides must be odd."""
    if any(side % 2 == 0 for side in size):
        raise ValueError(f"{layer.name}: symmetric padding needs an odd window, got {size}; use padding='valid'")
    pads = tuple((side // 2, side // 2) for side in size)
    pad = ConstantPad2D(pads, value, name=f"{layer.name}_pad")
    return lambda x: layer(pad(x))


PADDINGS = {"same": "valid", "valid": "valid", "tensorflow": "same"}  # to the padding of Keras's layer


def _convolution(make: Callable, size, strides, padding: str, name: str) -> Callable:
    size, strides = _pair(size), _pair(strides)
    if padding not in PADDINGS:
        raise ValueError(f"{name}: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if padding == "same" and strides == (1, 1) and all(side % 2 for side in size):
        return make(size, strides, padding="same", name=name)  # here Keras's padding is symmetric
    layer = make(size, strides, padding=PADDINGS[padding], name=name)
    return _padded(layer, size) if padding == "same" and size != (1, 1) else layer


def conv(
    filters: int,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    name: str,
    use_bias: bool = False,
    padding: str = "same",
    initializer: keras.initializers.Initializer | None = None,
    **options,
) -> Callable:
    """Create a 2-D convolution, padded symmetrically: (n, h, w, c) to (n, ceil(h / strides), ..., filters).

    Args:
        padding: "same", `kernel_size // 2` zeros on every side; "valid", none; "tensorflow", TensorFlow's and Keras's
            "same", which at stride 2 pads one more below than above: for weights trained there.
        initializer: of the kernel; the default is He's normal initializer over the outputs, as in torchvision.
        options: further arguments of `keras.layers.Conv2D`.

    Raises:
        ValueError: "same" with an even kernel, which has no center; an unknown padding.
    """
    initializer = initializer or VarianceScaling(2.0, "out")
    options = {"kernel_initializer": initializer, "bias_initializer": Constant(), **options}
    make = partial(keras.layers.Conv2D, filters, use_bias=use_bias, **options)
    return _convolution(make, kernel_size, strides, padding, name)


def depthwise_conv(
    kernel_size: int, strides: int = 1, *, name: str, use_bias: bool = False, padding: str = "same", **options
) -> Callable:
    """Create a depthwise convolution; padding as for `conv`."""
    initializer = VarianceScaling(2.0, "out")  # of the kernel (h, w, c, 1): 2 / (h w)
    options = {"depthwise_initializer": initializer, "bias_initializer": Constant(), **options}
    make = partial(keras.layers.DepthwiseConv2D, use_bias=use_bias, **options)
    return _convolution(make, kernel_size, strides, padding, name)


def up_conv(filters: int, *, name: str, use_bias: bool = False, **options) -> keras.layers.Layer:
    """A 2x2 transposed convolution of stride 2: (n, h, w, c) to (n, 2 h, 2 w, filters). No output pixels overlap.

    Its kernel (2, 2, filters, c) starts from He's normal initializer: variance 2 / c, as each output reads c numbers.
    """
    options = {
        "kernel_initializer": VarianceScaling(8.0, "out"),  # of a transposed kernel "out" is 4 c
        "bias_initializer": Constant(),
        **options,
    }
    return keras.layers.Conv2DTranspose(filters, 2, 2, use_bias=use_bias, name=name, **options)
