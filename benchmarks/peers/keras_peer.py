"""Plain Keras: its layers, its initializers, `model.compile` and `model.fit`.

Two liberties are not taken, so that the network is the same: strided convolutions pad one pixel on every side, where
Keras's "same" would pad one below and to the right, and batch norm has PyTorch's momentum and epsilon. Accuracy is
counted, and XLA left to Keras's own choice. `fit` sees all images once, so those that it sees again are there again. On
PyTorch they are on the device; of JAX's arrays `fit` makes NumPy's and brings every batch from there.
"""

import math
from itertools import pairwise

import keras
import numpy as np
from keras import layers, ops

from benchmarks.peers import CLASSES, LEARNING_RATES, MOMENTUM, RESNET50, VGG, WEIGHT_DECAY


def _norm():
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)


def _conv(x, filters, strides=1, use_bias=False, size=3):
    options = {"strides": strides, "use_bias": use_bias, "kernel_initializer": "he_normal"}
    if strides > 1 and size > 1:
        return layers.Conv2D(filters, size, **options)(layers.ZeroPadding2D(size // 2)(x))
    return layers.Conv2D(filters, size, padding="same", **options)(x)


def _logits(x, network):
    # In float32 under a mixed policy too, as Keras's guide to mixed precision has it.
    return layers.Dense(CLASSES[network], dtype="float32")(x)


def _block(x, filters, strides):
    y = layers.ReLU()(_norm()(_conv(x, filters, strides)))
    y = _norm()(_conv(y, filters))
    if strides > 1:
        missing = filters - x.shape[-1]
        x = ops.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (missing // 2, missing // 2)))
    return layers.ReLU()(layers.Add()([x, y]))


def resnet20(shape) -> keras.Model:
    inputs = keras.Input(shape)
    x = layers.ReLU()(_norm()(_conv(inputs, 16)))
    for stage, filters in enumerate((16, 32, 64)):
        for i in range(3):
            x = _block(x, filters, 2 if stage and i == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, _logits(x, "resnet20"))


def vgg_small(shape) -> keras.Model:
    x = inputs = keras.Input(shape)
    for factor, count in zip((1, 2, 4, 8, 8), VGG["convolutions"], strict=True):
        for _ in range(count):
            x = layers.ReLU()(_norm()(_conv(x, factor * VGG["width"], use_bias=True)))
        x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(VGG["hidden"], activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, _logits(x, "vgg_small"))


def _bottleneck(x, filters, strides):
    y = layers.ReLU()(_norm()(_conv(x, filters, size=1)))
    y = layers.ReLU()(_norm()(_conv(y, filters, strides)))
    y = _norm()(_conv(y, 4 * filters, size=1))
    if x.shape != y.shape:
        x = _norm()(_conv(x, 4 * filters, strides, size=1))
    return layers.ReLU()(layers.Add()([x, y]))


def resnet50(shape) -> keras.Model:
    inputs = keras.Input(shape)
    x = layers.ReLU()(_norm()(_conv(inputs, RESNET50["width"], 2, size=7)))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))  # behind a ReLU a zero is as good as no pixel
    for stage, count in enumerate(RESNET50["blocks"]):
        for i in range(count):
            x = _bottleneck(x, RESNET50["width"] * 2**stage, 2 if stage and i == 0 else 1)
    return keras.Model(inputs, _logits(layers.GlobalAveragePooling2D()(x), "resnet50"))


NETWORKS = {"resnet20": resnet20, "vgg_small": vgg_small, "resnet50": resnet50}


class _Steps(keras.callbacks.Callback):
    """Tells the clock of every step, with the mean loss of the epoch until then, which is what Keras reports."""

    async_safe = True  # a callback that is not would make Keras wait for the device, which `fit` by itself does not

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_end(self, batch, logs=None):
        self.clock.step(logs["loss"])


def _again(array, n):
    """`n` rows of a NumPy array, from the first again when all were taken; on the GPU where PyTorch has one."""
    if keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            array = torch.from_numpy(array).cuda()
    return array if len(array) == n else array[(np.arange(n) % len(array)).tolist()]


def train(network, images, labels, batch_size, clock, *, steps, dtype="float32", weights=None) -> int:
    keras.config.set_dtype_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[dtype])
    model = NETWORKS[network](images.shape[1:])
    if weights is not None:
        for variable, value in zip(model.trainable_variables, weights.values(), strict=True):
            variable.assign(value)
    optimizer = keras.optimizers.SGD(
        LEARNING_RATES[network], momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    images, labels = (_again(array, steps * batch_size) for array in (images, labels))
    clock.start()
    model.fit(images, labels, batch_size=batch_size, epochs=1, shuffle=False, verbose=0, callbacks=[_Steps(clock)])
    clock.finish()
    before = [0.0, *(count * mean for count, mean in enumerate(clock.losses, start=1))]
    clock.losses = [after - total for total, after in pairwise(before)]
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)
