"""Autoencoders of digits: an image through a short code and back.

Hinton and Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks",
https://doi.org/10.1126/science.1127647.

- `autoencoder`: one dense layer each way, 784-32-784.
- `deep_autoencoder`: the paper's 784-1000-500-250-2, whose code of two numbers is a map of the digits. The paper trains
  it layer by layer as Boltzmann machines with logistic units first; here its units are rectified, and it is trained as
  a whole.
- `conv_autoencoder`: two convolutions in, a code of 32 numbers, transposed convolutions back (Masci, Meier, Ciresan and
  Schmidhuber 2011, "Stacked convolutional auto-encoders for hierarchical feature extraction",
  https://doi.org/10.1007/978-3-642-21735-7_7). It has strides instead of max pooling, a batch norm after each
  convolution, and a 3x3 convolution after the transposed one, whose 2x2 blocks do not overlap.

All return the logits of the pixels: their sigmoid is the image. The layer `code` is linear.
"""

import math
from functools import partial

import keras

from kvision.layers import VarianceScaling, activation, batch_norm, conv, dense, logits, up_conv
from kvision.models import Paper

PAPER = Paper(
    "Reducing the dimensionality of data with neural networks",
    "Hinton and Salakhutdinov",
    2006,
    "https://doi.org/10.1126/science.1127647",
    input_shape=(28, 28, 1),
    classes=None,
)


def to_code(x, code: int):
    """Apply the linear layer `code` with `code` units."""
    return dense(code, name="code", initializer=VarianceScaling(1.0, "in"))(x)


def dense_autoencoder(
    input_shape: tuple[int, int, int], classes: int | None, *, hidden: tuple[int, ...] = (), code: int = 32, name: str
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, h, w, c), or to the code (n, code) if `classes` is 0.

    Args:
        hidden: units of the layers between the image and the code; after it in reverse order.
        code: size of the code.
    """
    inputs = keras.Input(input_shape, name="image")
    x = keras.layers.Flatten(name="flatten")(inputs)
    for i, units in enumerate(hidden, start=1):
        x = dense(units, name=f"stage{i}_dense")(x)
        x = activation("relu", name=f"stage{i}")(x)
    x = to_code(x, code)
    if classes == 0:
        return keras.Model(inputs, x, name=name)
    for i, units in reversed(list(enumerate(hidden, start=1))):
        x = dense(units, name=f"up{i}_dense")(x)
        x = activation("relu", name=f"up{i}")(x)
    x = logits(math.prod(input_shape))(x)
    outputs = keras.layers.Reshape(input_shape, name="reshape", dtype=x.dtype)(x)
    return keras.Model(inputs, outputs, name=name)


def conv_autoencoder(
    input_shape: tuple[int, int, int],
    classes: int | None,
    *,
    widths: tuple[int, ...] = (32, 64),
    code: int = 32,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, h, w, c), or to the code (n, code) if `classes` is 0.

    Args:
        widths: filters of the stages; each halves the maps, and on the way back each doubles them.
        code: size of the code.

    Raises:
        ValueError: a side of the images cannot be halved by every stage.
    """
    step = 2 ** len(widths)
    if any(side % step for side in input_shape[:2]):
        raise ValueError(f"{name} needs images whose sides are multiples of {step}, got {input_shape[:2]}")
    inputs = x = keras.Input(input_shape, name="image")
    for i, filters in enumerate(widths, start=1):
        x = conv(filters, 3, 2, name=f"stage{i}_conv")(x)
        x = batch_norm(name=f"stage{i}_bn")(x)
        x = activation("relu", name=f"stage{i}")(x)
    maps = x.shape[1:]
    x = to_code(keras.layers.Flatten(name="flatten")(x), code)
    if classes == 0:
        return keras.Model(inputs, x, name=name)
    i = len(widths)
    x = dense(math.prod(maps), name=f"up{i}_dense")(x)
    x = activation("relu", name=f"up{i}_relu")(x)
    x = keras.layers.Reshape(maps, name=f"up{i}")(x)
    for i in range(len(widths) - 1, 0, -1):
        x = up_conv(widths[i - 1], name=f"up{i}_1_conv")(x)
        x = batch_norm(name=f"up{i}_1_bn")(x)
        x = activation("relu", name=f"up{i}_1_relu")(x)
        x = conv(widths[i - 1], 3, name=f"up{i}_2_conv")(x)
        x = batch_norm(name=f"up{i}_2_bn")(x)
        x = activation("relu", name=f"up{i}")(x)
    outputs = up_conv(input_shape[-1], name="logits", use_bias=True, dtype=keras.config.floatx())(x)
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "autoencoder": partial(dense_autoencoder, name="autoencoder"),
    "deep_autoencoder": partial(dense_autoencoder, hidden=(1000, 500, 250), code=2, name="deep_autoencoder"),
    "conv_autoencoder": partial(conv_autoencoder, name="conv_autoencoder"),
}
