"""AlexNet.

Krizhevsky, Sutskever and Hinton 2012, "ImageNet classification with deep convolutional neural networks",
https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks: five convolutions,
max poolings whose windows of 3 overlap at a stride of 2, three dense layers.

- `alexnet`: the network of Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks",
  https://arxiv.org/abs/1404.5997, as in torchvision: one tower, no normalization, dropout before the hidden layers.
- `alexnet_2012`: the paper's. The second, fourth and fifth convolutions are in two groups, for the two GPUs of its
  training; local response normalization follows the first two ReLUs; dropout follows the hidden layers. The paper's
  map sizes require images of 227 pixels, not the 224 it states.

The dense layers expect maps of 6x6 pixels; others are averaged or repeated to this size, as in torchvision. Kernels
use He's initializer, not the paper's deviation of 0.01, which suits only its widths and its biases of 1.
"""

from functools import partial

import keras

from kvision.layers import (
    AdaptiveAveragePooling2D,
    ConstantPad2D,
    LocalResponseNorm,
    VarianceScaling,
    activation,
    conv,
    dense,
    dropout,
    global_pool,
    least_side,
    logits,
    max_pool,
)
from kvision.models import Paper

PAPER = Paper(
    "ImageNet classification with deep convolutional neural networks",
    "Krizhevsky, Sutskever and Hinton",
    2012,
    "https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
    input_shape=(224, 224, 3),
    classes=1000,
    shapes={"alexnet_2012": (227, 227, 3)},
)

# The convolutions of each stage: the window, and whether the two towers are separate. A pooling ends each stage.
STAGES = (((11, False),), ((5, True),), ((3, False), (3, True), (3, True)))


def alexnet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    filters: tuple[int, int, int, int, int],
    towers: int = 1,
    hidden: int = 4096,
    dropout_rate: float = 0.5,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the last convolution's pooled features if
    `classes` is 0.

    Args:
        filters: of each convolution.
        towers: 1 for the network of 2014, 2 for that of 2012.
        hidden: units of each of the two hidden dense layers.
        dropout_rate: of the two dropouts.

    Raises:
        ValueError: not 1 or 2 towers; images too small for the poolings: 63 pixels with one tower, 67 with two.
    """
    if towers not in (1, 2):
        raise ValueError(f"{name} has 1 or 2 towers, got {towers}")
    least = 63 if towers == 1 else 67
    if least_side(input_shape) < least:
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels, got {input_shape[0]}x{input_shape[1]}"
        )
    inputs = keras.Input(input_shape, name="image")
    x = inputs if towers == 2 else ConstantPad2D(((2, 2), (2, 2)), name="stage1_1_conv_pad")(inputs)
    convolution, widths = partial(conv, use_bias=True, initializer=VarianceScaling(2.0, "in")), iter(filters)
    for i, convolutions in enumerate(STAGES, start=1):
        for j, (size, separate) in enumerate(convolutions, start=1):
            strides, padding = (4, "valid") if size == 11 else (1, "same")
            groups = towers if separate else 1
            x = convolution(next(widths), size, strides, name=f"stage{i}_{j}_conv", padding=padding, groups=groups)(x)
            x = activation("relu", name=f"stage{i}_{j}_relu")(x)
        if towers == 2 and i < 3:
            x = LocalResponseNorm(name=f"stage{i}_lrn")(x)
        x = max_pool(3, 2, name=f"stage{i}")(x)
    if not classes:
        return keras.Model(inputs, global_pool()(x), name=name)
    if x.shape[1:3] != (6, 6):
        x = AdaptiveAveragePooling2D((6, 6), name="head_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i in (1, 2):
        if towers == 1:
            x = dropout(dropout_rate, name=f"head_{i}_dropout")(x)
        x = dense(hidden, name=f"head_{i}_dense")(x)
        x = activation("relu", name=f"head_{i}_relu")(x)
        if towers == 2:
            x = dropout(dropout_rate, name=f"head_{i}_dropout")(x)
    return keras.Model(inputs, logits(classes)(x), name=name)


VARIANTS = {
    "alexnet": partial(alexnet, filters=(64, 192, 384, 256, 256), name="alexnet"),
    "alexnet_2012": partial(alexnet, filters=(96, 256, 384, 384, 256), towers=2, name="alexnet_2012"),
}
