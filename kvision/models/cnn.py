"""Small convolutional networks for MNIST and CIFAR-10.

LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition",
https://doi.org/10.1109/5.726791, introduced the pattern: convolutions and subsampling, then fully connected layers.
These are its present forms, known from Keras's examples for MNIST and CIFAR-10: 3x3 convolutions, rectified linear
units, max pooling, and dropout (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html) after every
stage. `dropout_rate` is that of the convolutional stages; the fully connected layer has twice that rate.
"""

from functools import partial

import keras

from kvision.layers import VarianceScaling, activation, conv, dense, dropout, logits, max_pool
from kvision.models import Paper

PAPER = Paper(
    "Gradient-based learning applied to document recognition",
    "LeCun, Bottou, Bengio and Haffner",
    1998,
    "https://doi.org/10.1109/5.726791",
    shapes={"mnist_cnn": (28, 28, 1)},
)


def convolutional_network(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    stages: tuple[tuple[int, ...], ...],
    hidden: int,
    first_padding: str,
    dropout_rate: float = 0.25,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the fully connected layer's features if
    `classes` is 0.

    Args:
        stages: the filters of each stage's convolutions; every stage ends in a 2x2 max pooling.
        hidden: units of the fully connected layer.
        first_padding: "valid" or "same", of the first convolution of a stage.

    Raises:
        ValueError: the images are too small for the poolings.
    """
    inputs = keras.Input(input_shape, name="image")
    glorot = VarianceScaling(1.0, "average", "uniform")
    x = inputs
    for i, filters in enumerate(stages, start=1):
        for j, width in enumerate(filters, start=1):
            padding = "valid" if j > 1 else first_padding
            layer = conv(width, 3, name=f"stage{i}_{j}_conv", use_bias=True, padding=padding, initializer=glorot)
            x = activation("relu", name=f"stage{i}_{j}_relu")(layer(x))
        x = max_pool(2, name=f"stage{i}")(x)
        x = dropout(dropout_rate, name=f"stage{i}_dropout")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = dense(hidden, name="hidden_dense", initializer=glorot)(x)
    x = activation("relu", name="hidden")(x)
    x = dropout(2 * dropout_rate, name="hidden_dropout")(x)
    outputs = logits(classes)(x) if classes else x
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "mnist_cnn": partial(
        convolutional_network, stages=((32, 64),), hidden=128, first_padding="valid", name="mnist_cnn"
    ),
    "cifar_cnn": partial(
        convolutional_network, stages=((32, 32), (64, 64)), hidden=512, first_padding="same", name="cifar_cnn"
    ),
}
