"""Plain Keras: its layers, its initialisers, `model.compile` and `model.fit`.

Two liberties are not taken, so that the network is the same: strided convolutions pad one pixel on every side, where
Keras's "same" would pad one below and to the right, and batch norm has PyTorch's momentum and epsilon. Accuracy is
counted, and XLA left to Keras's own choice.
"""

import math
from itertools import pairwise

import keras
from keras import layers, ops

from benchmarks.peers import CLASSES, LEARNING_RATE, MOMENTUM, VGG, WEIGHT_DECAY


def _norm():
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)


def _conv(x, filters, strides=1, use_bias=False):
    options = {"strides": strides, "use_bias": use_bias, "kernel_initializer": "he_normal"}
    if strides > 1:
        return layers.Conv2D(filters, 3, **options)(layers.ZeroPadding2D(1)(x))
    return layers.Conv2D(filters, 3, padding="same", **options)(x)


def _block(x, filters, strides):
    y = layers.ReLU()(_norm()(_conv(x, filters, strides)))
    y = _norm()(_conv(y, filters))
    if strides > 1:
        missing = filters - x.shape[-1]
        x = ops.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (missing // 2, missing // 2)))
    return layers.ReLU()(layers.Add()([x, y]))


def resnet20() -> keras.Model:
    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(_norm()(_conv(inputs, 16)))
    for stage, filters in enumerate((16, 32, 64)):
        for i in range(3):
            x = _block(x, filters, 2 if stage and i == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def vgg_small() -> keras.Model:
    x = inputs = keras.Input((32, 32, 3))
    for factor, count in zip((1, 2, 4, 8, 8), VGG["convolutions"], strict=True):
        for _ in range(count):
            x = layers.ReLU()(_norm()(_conv(x, factor * VGG["width"], use_bias=True)))
        x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(VGG["hidden"], activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


NETWORKS = {"resnet20": resnet20, "vgg_small": vgg_small}


class _Steps(keras.callbacks.Callback):
    """Tells the clock of every step, with the mean loss of the epoch until then, which is what Keras reports."""

    async_safe = True  # a callback that is not would make Keras wait for the device, which `fit` by itself does not

    def __init__(self, clock):
        super().__init__()
        self.clock, self.means = clock, []

    def on_train_batch_end(self, batch, logs=None):
        self.clock.stamp()
        self.means.append(logs["loss"])


def train(network, images, labels, batch_size, clock, weights=None) -> int:
    model = NETWORKS[network]()
    if weights is not None:
        for variable, value in zip(model.trainable_variables, weights.values(), strict=True):
            variable.assign(value)
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    steps = _Steps(clock)
    clock.start()
    model.fit(images, labels, batch_size=batch_size, epochs=1, shuffle=False, verbose=0, callbacks=[steps])
    before = [0.0, *(count * mean for count, mean in enumerate(steps.means, start=1))]
    clock.losses += [after - total for total, after in pairwise(before)]
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)
