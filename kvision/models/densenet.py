"""DenseNets for ImageNet.

Huang, Liu, van der Maaten and Weinberger 2016, "Densely connected convolutional networks",
https://arxiv.org/abs/1608.06993, table 1: in a dense block every layer adds `growth` channels to all preceding ones,
and the transitions between the blocks halve the channels and the map. `densenet121` is torchvision's;
`densenet121_keras` has the batch norms of `keras.applications`.
"""

from functools import partial

import keras

from kvision.layers import (
    VarianceScaling,
    activation,
    avg_pool,
    batch_norm,
    conv,
    global_pool,
    least_side,
    logits,
    max_pool,
)
from kvision.models import Paper

PAPER = Paper(
    "Densely connected convolutional networks",
    "Huang, Liu, van der Maaten and Weinberger",
    2016,
    "https://arxiv.org/abs/1608.06993",
    input_shape=(224, 224, 3),
    classes=1000,
)

convolution = partial(conv, initializer=VarianceScaling(2.0, "in"))


def layer(x, growth: int, norm, *, name: str, output_name: str):
    """Append `growth` channels, from a 1x1 and a 3x3 convolution, to `x`; `output_name` names the output."""
    y = norm(name=f"{name}_1_bn")(x)
    y = activation("relu", name=f"{name}_1_relu")(y)
    y = convolution(4 * growth, 1, name=f"{name}_1_conv")(y)
    y = norm(name=f"{name}_2_bn")(y)
    y = activation("relu", name=f"{name}_2_relu")(y)
    y = convolution(growth, 3, name=f"{name}_2_conv")(y)
    return keras.layers.Concatenate(name=output_name)([x, y])


def densenet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    layers: tuple[int, ...],
    growth: int = 32,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the pooled features if `classes` is 0.

    Args:
        layers: number of layers in each dense block.
        growth: channels that each layer adds; the first convolution has twice as many filters.
        momentum, epsilon: of the batch norms.

    Raises:
        ValueError: images too small for the transitions: 29 pixels for four dense blocks.
    """
    least = 2 ** (len(layers) + 1) - 3
    if least_side(input_shape) < least:
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels, got {input_shape[0]}x{input_shape[1]}"
        )
    norm = partial(batch_norm, momentum=momentum, epsilon=epsilon)
    inputs = keras.Input(input_shape, name="image")
    x = convolution(2 * growth, 7, 2, name="stem_conv")(inputs)
    x = norm(name="stem_bn")(x)
    x = activation("relu", name="stem")(x)
    x = max_pool(3, 2, name="stem_pool", padding="same")(x)
    for i, count in enumerate(layers, start=1):
        for j in range(1, count + 1):
            output_name = f"stage{i}" if j == count else f"stage{i}_block{j}"
            x = layer(x, growth, norm, name=f"stage{i}_block{j}", output_name=output_name)
        if i < len(layers):
            x = norm(name=f"stage{i}_transition_bn")(x)
            x = activation("relu", name=f"stage{i}_transition_relu")(x)
            x = convolution(x.shape[-1] // 2, 1, name=f"stage{i}_transition_conv")(x)
            x = avg_pool(2, name=f"stage{i}_transition_pool")(x)
    x = norm(name="final_bn")(x)
    x = activation("relu", name="final_relu")(x)
    x = global_pool()(x)
    return keras.Model(inputs, logits(classes)(x) if classes else x, name=name)


LAYERS = {
    "densenet121": (6, 12, 24, 16),
    "densenet169": (6, 12, 32, 32),
    "densenet201": (6, 12, 48, 32),
}

VARIANTS = {name: partial(densenet, layers=row, name=name) for name, row in LAYERS.items()} | {
    f"{name}_keras": partial(densenet, layers=row, momentum=0.99, epsilon=1.001e-5, name=f"{name}_keras")
    for name, row in LAYERS.items()
}
