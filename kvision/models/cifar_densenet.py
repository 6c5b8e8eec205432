"""DenseNets for CIFAR-10.

Huang, Liu, van der Maaten and Weinberger 2016, "Densely connected convolutional networks",
https://arxiv.org/abs/1608.06993, section 3, "Implementation details", and table 2: three dense blocks on maps of 32, 16
and 8 pixels; every layer adds `growth` channels to all preceding ones. In a DenseNet-BC each layer has a 1x1
convolution to `4 * growth` channels before its 3x3 convolution (B), and the transitions halve the channels (C).
`densenet_bc_100_12` has depth 100 and growth 12. Without augmentation the paper trains with dropout 0.2 after every
convolution but the first: `dropout_rate`.
"""

from functools import partial

import keras

from kvision.layers import (
    VarianceScaling,
    activation,
    avg_pool,
    batch_norm,
    conv,
    dropout,
    global_pool,
    least_side,
    logits,
)
from kvision.models import Paper

PAPER = Paper(
    "Densely connected convolutional networks",
    "Huang, Liu, van der Maaten and Weinberger",
    2016,
    "https://arxiv.org/abs/1608.06993",
)


def activated_conv(x, filters: int, size: int, dropout_rate: float, *, name: str):
    """Apply batch norm, ReLU, convolution, dropout."""
    x = batch_norm(name=f"{name}_bn")(x)
    x = activation("relu", name=f"{name}_relu")(x)
    x = conv(filters, size, name=f"{name}_conv", initializer=VarianceScaling(2.0, "in"))(x)
    return dropout(dropout_rate, name=f"{name}_dropout")(x)


def cifar_densenet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int,
    growth: int,
    compressed: bool = True,
    dropout_rate: float = 0.0,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the pooled features if `classes` is 0.

    Args:
        growth: channels that each layer adds.
        compressed: a DenseNet-BC; False is the paper's plain DenseNet.
        dropout_rate: after every convolution but the first.

    Raises:
        ValueError: the depth is not 6 n + 4 (3 n + 4 for a plain DenseNet); images smaller than 4 pixels.
    """
    step = 6 if compressed else 3
    if depth < step + 4 or (depth - 4) % step:
        raise ValueError(f"{name} has depth {step} n + 4 ({step + 4}, {2 * step + 4} ...), got {depth}")
    if least_side(input_shape) < 4:
        raise ValueError(f"{name} needs images of at least 4x4 pixels, got {input_shape[0]}x{input_shape[1]}")
    count = (depth - 4) // step
    inputs = keras.Input(input_shape, name="image")
    filters = 2 * growth if compressed else 16
    x = conv(filters, 3, name="stem_conv", initializer=VarianceScaling(2.0, "in"))(inputs)
    for i in (1, 2, 3):
        if i > 1:
            filters = x.shape[-1] // 2 if compressed else x.shape[-1]
            x = activated_conv(x, filters, 1, dropout_rate, name=f"stage{i - 1}_transition")
            x = avg_pool(2, name=f"stage{i - 1}_transition_pool")(x)
        for j in range(1, count + 1):
            sizes, y, at = ((4 * growth, 1), (growth, 3)) if compressed else ((growth, 3),), x, f"stage{i}_block{j}"
            for k, (filters, size) in enumerate(sizes, start=1):
                y = activated_conv(y, filters, size, dropout_rate, name=f"{at}_{k}")
            x = keras.layers.Concatenate(name=f"stage{i}" if j == count else at)([x, y])
    x = batch_norm(name="final_bn")(x)
    x = activation("relu", name="final_relu")(x)
    x = global_pool()(x)
    return keras.Model(inputs, logits(classes)(x) if classes else x, name=name)


VARIANTS = {
    "densenet_40_12": partial(cifar_densenet, depth=40, growth=12, compressed=False, name="densenet_40_12"),
} | {
    f"densenet_bc_{depth}_{growth}": partial(
        cifar_densenet, depth=depth, growth=growth, name=f"densenet_bc_{depth}_{growth}"
    )
    for depth, growth in ((100, 12), (250, 24), (190, 40))
}
