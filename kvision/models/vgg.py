"""VGG.

Simonyan and Zisserman 2014, "Very deep convolutional networks for large-scale image recognition",
https://arxiv.org/abs/1409.1556: stages of 3x3 convolutions, each ended by a 2x2 max pooling, then two wide fully
connected layers. The variants are the paper's table 1, configurations A, B, D and E; the `_bn` variants have a batch
norm after each convolution, as in torchvision. The convolutions have biases in both.

The paper's 4,096 hidden units expect images of 224 pixels, whose last maps have 7x7 pixels. Larger maps are averaged to
this size, as in torchvision; smaller ones stay, unless `maps` is 7x7 (torchvision repeats their pixels). For small
images use a smaller `hidden`: 512 is usual on CIFAR-10.
"""

from functools import partial

import keras

from kvision.layers import (
    AdaptiveAveragePooling2D,
    VarianceScaling,
    activation,
    batch_norm,
    conv,
    dense,
    dropout,
    least_side,
    logits,
    max_pool,
)
from kvision.models import Paper

PAPER = Paper(
    "Very deep convolutional networks for large-scale image recognition",
    "Simonyan and Zisserman",
    2014,
    "https://arxiv.org/abs/1409.1556",
    input_shape=(224, 224, 3),
    classes=1000,
)


def head_maps(input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return the default (height, width) of the maps that the fully connected layers read."""
    return tuple(min(7, size // 32) for size in input_shape[:2])


def vgg(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    convolutions: tuple[int, ...],
    normalized: bool = False,
    width: int = 64,
    hidden: int = 4096,
    maps: tuple[int, int] | None = None,
    dropout_rate: float = 0.5,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 8 * `width` pooled features if
    `classes` is 0.

    Args:
        convolutions: number of convolutions in each of the five stages.
        normalized: add a batch norm after each convolution.
        width: filters of the first stage; the others have 2, 4, 8 and 8 times as many.
        hidden: units of each of the two fully connected layers.
        maps: (height, width) of the maps that these read; others are averaged, or their pixels repeated. None is 7x7,
            or less for smaller images; weights made for 224 pixels need (7, 7) at any other size.
        dropout_rate: after each of the fully connected layers.

    Raises:
        ValueError: images smaller than 32 pixels, which five poolings need.
    """
    if least_side(input_shape) < 32:
        raise ValueError(f"VGG needs images of at least 32x32 pixels, got {input_shape[0]}x{input_shape[1]}")
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    for i, (filters, count) in enumerate(zip((1, 2, 4, 8, 8), convolutions, strict=True), start=1):
        for j in range(1, count + 1):
            x = conv(filters * width, 3, name=f"stage{i}_{j}_conv", use_bias=True)(x)
            if normalized:
                x = batch_norm(name=f"stage{i}_{j}_bn")(x)
            x = activation("relu", name=f"stage{i}_{j}_relu")(x)
        x = max_pool(2, name=f"stage{i}")(x)
    if not classes:
        return keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x), name=name)
    maps = maps or head_maps(input_shape)
    if tuple(x.shape[1:3]) != tuple(maps):
        x = AdaptiveAveragePooling2D(maps, name="head_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for i in (1, 2):
        x = dense(hidden, name=f"head_{i}_dense")(x)
        x = activation("relu", name=f"head_{i}_relu")(x)
        x = dropout(dropout_rate, name=f"head_{i}_dropout")(x)
    return keras.Model(inputs, logits(classes, initializer=VarianceScaling(1.0, "average"))(x), name=name)


CONFIGURATIONS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

VARIANTS = {name: partial(vgg, convolutions=row, name=name) for name, row in CONFIGURATIONS.items()} | {
    f"{name}_bn": partial(vgg, convolutions=row, normalized=True, name=f"{name}_bn")
    for name, row in CONFIGURATIONS.items()
}
