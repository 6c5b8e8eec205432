"""Models for the tests of `kvision.parity`, some with an error on one backend."""

import keras
from keras import ops

from kvision.layers import activation, batch_norm, conv, dropout, global_pool, logits
from kvision.models.cifar_resnet import block

SHAPE = (32, 32, 3)


def resnet20_dropout(rate: float = 0.2, size: int = 32) -> keras.Model:
    """ResNet-20 with dropout after each stage."""
    inputs = keras.Input((size, size, 3), name="image")
    x = conv(16, 3, name="stem_conv")(inputs)
    x = batch_norm(name="stem_bn")(x)
    x = activation("relu", name="stem")(x)
    for i, filters in enumerate((16, 32, 64), start=1):
        for j in (1, 2, 3):
            name = f"stage{i}_block{j}"
            x = block(x, filters, 2 if i > 1 and j == 1 else 1, name=name, output_name=f"{name}_relu")
        x = dropout(rate, name=f"stage{i}_dropout")(x)
    x = global_pool()(x)
    return keras.Model(inputs, logits(10)(x), name="resnet20_dropout")


class Passing(keras.layers.Layer):
    """The identity, in a lower precision, or with a tenth of its gradient missing."""

    def __init__(self, through: str | None = None, kept: float = 1.0, **options):
        super().__init__(**options)
        self.through, self.kept = through, kept

    def call(self, x):
        if self.through:
            x = ops.cast(ops.cast(x, self.through), x.dtype)
        return x if self.kept == 1 else ops.stop_gradient(x) + self.kept * (x - ops.stop_gradient(x))


def small(padding: str = "", epsilon: str = "", rounding: str = "", gradient: str = "") -> keras.Model:
    """Two convolutions; each argument names a backend on which that detail differs."""
    backend = keras.backend.backend()
    inputs = keras.Input(SHAPE, name="image")
    x = conv(8, 3, name="first_conv")(inputs)
    x = batch_norm(name="first_bn", epsilon=1e-3 if backend == epsilon else 1e-5)(x)
    x = Passing("float32" if backend == rounding else None, 0.9 if backend == gradient else 1.0, name="passing")(x)
    x = activation("relu", name="first_relu")(x)
    x = conv(16, 3, 2, name="second_conv", padding="tensorflow" if backend == padding else "same")(x)
    x = batch_norm(name="second_bn")(x)
    x = activation("relu", name="second_relu")(x)
    return keras.Model(inputs, logits(10)(global_pool()(x)), name="small")


def softmax(size: int | None = 8) -> keras.Model:
    """A `keras.Sequential` with a softmax; of any size if `size` is None."""
    return keras.Sequential(
        [
            keras.Input((size, size, 3)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.GlobalMaxPooling2D(name="pool"),
            keras.layers.Dense(5, activation="softmax", name="classes"),
        ],
        name="softmax",
    )


def maps(classes: int = 4) -> keras.Model:
    """A model without classes: maps out."""
    inputs = keras.Input((8, 8, 3), name="image")
    return keras.Model(inputs, conv(classes, 3, name="conv")(inputs), name="maps")


class Subclass(keras.Model):
    """A model that is no graph."""

    def __init__(self):
        super().__init__(name="subclass")
        self.conv = keras.layers.Conv2D(4, 3, name="conv")
        self.pool = keras.layers.GlobalMaxPooling2D(name="pool")
        self.classes = keras.layers.Dense(3, name="classes")

    def call(self, images):
        return self.classes(self.pool(self.conv(images)))


def subclass(input_shape: tuple[int, int, int]) -> keras.Model:
    """A model that is built when it first sees images."""
    return Subclass()


def vector() -> keras.Model:
    """A model that reads no images."""
    inputs = keras.Input((7,), name="features")
    return keras.Model(inputs, logits(3)(inputs), name="vector")


def nothing() -> None:
    """No model."""


def keras_dropout() -> keras.Model:
    """A model with Keras's own dropout, which draws other numbers on each backend."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Dropout(0.5, seed=0, name="dropout")(conv(4, 3, name="conv")(inputs))
    return keras.Model(inputs, logits(3)(global_pool()(x)), name="keras_dropout")
