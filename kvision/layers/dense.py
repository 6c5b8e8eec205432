"""Dense layers, activations and logits."""

import keras

from kvision.layers.initializers import Constant, VarianceScaling


def activation(kind: str, *, name: str) -> keras.layers.Layer:
    """Create an element-wise activation by its Keras name: "relu", "gelu" ..."""
    return keras.layers.Activation(kind, name=name)


def dense(
    units: int, *, name: str, initializer: keras.initializers.Initializer | None = None, **options
) -> keras.layers.Layer:
    """Create a fully connected layer; the kernel's default is He's normal initializer."""
    options = {
        "kernel_initializer": initializer or VarianceScaling(2.0, "in"),
        "bias_initializer": Constant(),
        **options,
    }
    return keras.layers.Dense(units, name=name, **options)


def logits(classes: int, *, name: str = "logits", **options) -> keras.layers.Layer:
    """Create the last layer of a classifier. It computes in full precision under a mixed policy, too."""
    options = {"initializer": VarianceScaling(1.0, "in"), "dtype": keras.config.floatx(), **options}
    return dense(classes, name=name, **options)
