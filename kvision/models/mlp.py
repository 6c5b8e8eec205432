"""The perceptron and the multilayer perceptron.

- Rosenblatt 1958, "The perceptron: a probabilistic model for information storage and organization in the brain",
  https://doi.org/10.1037/h0042519. `softmax` is its form with one output per class, trained by maximum likelihood.
- Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating errors",
  https://doi.org/10.1038/323533a0. `mlp` is two hidden layers of rectified linear units, each followed by dropout, the
  textbook network for MNIST.
"""

from functools import partial

import keras

from kvision.layers import activation, dense, dropout, logits
from kvision.models import Paper

PAPER = Paper(
    "Learning representations by back-propagating errors",
    "Rumelhart, Hinton and Williams",
    1986,
    "https://doi.org/10.1038/323533a0",
    input_shape=(28, 28, 1),
)


def multilayer_perceptron(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    hidden: tuple[int, ...] = (),
    dropout_rate: float = 0.0,
    name: str = "softmax",
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the last hidden layer's features if
    `classes` is 0."""
    inputs = keras.Input(input_shape, name="image")
    x = keras.layers.Flatten(name="flatten")(inputs)
    for i, units in enumerate(hidden, start=1):
        x = dense(units, name=f"stage{i}_dense")(x)
        x = activation("relu", name=f"stage{i}")(x)
        x = dropout(dropout_rate, name=f"stage{i}_dropout")(x)
    outputs = logits(classes)(x) if classes else x
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "softmax": partial(multilayer_perceptron, name="softmax"),
    "mlp": partial(multilayer_perceptron, hidden=(512, 512), dropout_rate=0.2, name="mlp"),
}
