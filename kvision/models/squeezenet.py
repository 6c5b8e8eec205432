"""SqueezeNet.

Iandola, Han, Moskewicz, Ashraf, Dally and Keutzer 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters
and < 0.5MB model size", https://arxiv.org/abs/1602.07360, table 1: "fire" modules, where a 1x1 convolution squeezes the
channels for parallel 1x1 and 3x3 convolutions. `squeezenet1_0` is the paper's. `squeezenet1_1` is the authors' later
network, https://github.com/forresti/SqueezeNet, which costs 2.4 times less: a smaller first convolution, and earlier
poolings.

Both as in torchvision: the first convolution of 1.0 is not padded, and poolings keep a last window that crosses the
border. There are no dense layers: `logits` is a 1x1 convolution, and the logits are the mean of its ReLU over all
pixels. There is no batch norm.
"""

from functools import partial

import keras

from kvision.layers import VarianceScaling, activation, conv, dropout, global_pool, least_side, max_pool
from kvision.models import Paper

PAPER = Paper(
    "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5MB model size",
    "Iandola, Han, Moskewicz, Ashraf, Dally and Keutzer",
    2016,
    "https://arxiv.org/abs/1602.07360",
    input_shape=(224, 224, 3),
    classes=1000,
)

convolution = partial(conv, use_bias=True, initializer=VarianceScaling(2.0, "in", "uniform"))


def fire(x, squeeze: int, expand: int, *, name: str, output_name: str):
    """Apply `squeeze` filters of 1x1, then `expand` of 1x1 and `expand` of 3x3; `output_name` names the output."""
    x = convolution(squeeze, 1, name=f"{name}_squeeze_conv")(x)
    x = activation("relu", name=f"{name}_squeeze_relu")(x)
    sides = []
    for size in (1, 3):
        y = convolution(expand, size, name=f"{name}_expand{size}_conv")(x)
        sides.append(activation("relu", name=f"{name}_expand{size}_relu")(y))
    return keras.layers.Concatenate(name=output_name)(sides)


def squeezenet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    stem: tuple[int, int],
    stages: tuple[tuple[tuple[int, int], ...], ...],
    dropout_rate: float = 0.5,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the pooled features of the last fire
    module if `classes` is 0.

    Args:
        stem: filters and size of the first convolution.
        stages: the fire modules (squeeze, expand) of each stage; a pooling precedes each stage.
        dropout_rate: before the last convolution.

    Raises:
        ValueError: images smaller than 14 pixels plus the first window, which three poolings need.
    """
    filters, size = stem
    if least_side(input_shape) < size + 14:
        raise ValueError(
            f"{name} needs images of at least {size + 14}x{size + 14} pixels, got {input_shape[0]}x{input_shape[1]}"
        )
    inputs = keras.Input(input_shape, name="image")
    x = convolution(filters, size, 2, name="stem_conv", padding="valid")(inputs)
    x = activation("relu", name="stem")(x)
    for i, fires in enumerate(stages, start=1):
        x = max_pool(3, 2, name=f"stage{i}_pool", ceil=True)(x)
        for j, (squeeze, expand) in enumerate(fires, start=1):
            output_name = f"stage{i}" if j == len(fires) else f"stage{i}_fire{j}"
            x = fire(x, squeeze, expand, name=f"stage{i}_fire{j}", output_name=output_name)
    if not classes:
        return keras.Model(inputs, global_pool()(x), name=name)
    x = dropout(dropout_rate, name="head_dropout")(x)
    # The published standard deviation is 0.01. The head computes in full precision, as in every network.
    dtype, initializer = keras.config.floatx(), VarianceScaling(0.01**2 * x.shape[-1], "in")
    x = conv(classes, 1, name="logits", use_bias=True, initializer=initializer, dtype=dtype)(x)
    x = keras.layers.ReLU(name="logits_relu", dtype=dtype)(x)
    outputs = keras.layers.GlobalAveragePooling2D(name="logits_pool", dtype=dtype)(x)
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "squeezenet1_0": partial(
        squeezenet,
        stem=(96, 7),
        stages=(
            ((16, 64), (16, 64), (32, 128)),
            ((32, 128), (48, 192), (48, 192), (64, 256)),
            ((64, 256),),
        ),
        name="squeezenet1_0",
    ),
    "squeezenet1_1": partial(
        squeezenet,
        stem=(64, 3),
        stages=(
            ((16, 64), (16, 64)),
            ((32, 128), (32, 128)),
            ((48, 192), (48, 192), (64, 256), (64, 256)),
        ),
        name="squeezenet1_1",
    ),
}
