"""MobileNetV2.

Sandler, Howard, Zhu, Zhmoginov and Chen 2018, "MobileNetV2: inverted residuals and linear bottlenecks",
https://arxiv.org/abs/1801.04381, table 2: a block expands its channels by a 1x1 convolution, applies a depthwise
convolution, and projects them by a 1x1 convolution without activation; the shortcut connects the narrow ends.

`mobilenet_v2` is torchvision's. `mobilenet_v2_keras` is that of `keras.applications`: TensorFlow's padding and batch
norms, no dropout.
"""

from functools import partial

import keras

from kvision.layers import VarianceScaling, activation, batch_norm, conv, depthwise_conv, dropout, global_pool, logits
from kvision.models import Paper

PAPER = Paper(
    "MobileNetV2: inverted residuals and linear bottlenecks",
    "Sandler, Howard, Zhu, Zhmoginov and Chen",
    2018,
    "https://arxiv.org/abs/1801.04381",
    input_shape=(224, 224, 3),
    classes=1000,
)

# Table 2: for each stage, whose first block has stride 2, rows of (expansion, filters, blocks).
STAGES = (
    ((1, 16, 1),),
    ((6, 24, 2),),
    ((6, 32, 3),),
    ((6, 64, 4), (6, 96, 3)),
    ((6, 160, 3), (6, 320, 1)),
)


def rounded(filters: float) -> int:
    """Return the nearest multiple of 8, at least 8 and at least nine tenths of `filters`."""
    near = max(8, int(filters + 4) // 8 * 8)
    return near if near >= 0.9 * filters else near + 8


def block(x, expansion: int, filters: int, strides: int, padding: str, norm, *, name: str, output_name: str):
    """Apply an inverted residual; `output_name` names its output."""
    y = x
    if expansion > 1:
        y = conv(expansion * x.shape[-1], 1, name=f"{name}_expand_conv")(y)
        y = norm(name=f"{name}_expand_bn")(y)
        y = activation("relu6", name=f"{name}_expand_relu")(y)
    y = depthwise_conv(3, strides, name=f"{name}_depthwise_conv", padding=padding)(y)
    y = norm(name=f"{name}_depthwise_bn")(y)
    y = activation("relu6", name=f"{name}_depthwise_relu")(y)
    y = conv(filters, 1, name=f"{name}_project_conv")(y)
    y = norm(name=f"{name}_project_bn")(y)
    if strides == 1 and x.shape == y.shape:
        return keras.layers.Add(name=output_name)([x, y])
    return activation("linear", name=output_name)(y)


def mobilenet_v2(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    padding: str = "same",
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    dropout_rate: float = 0.2,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the pooled features, 1280 or more, if
    `classes` is 0.

    Args:
        width: factor on all filter counts, rounded to multiples of 8; the last convolution has at least the paper's
            1280.
        padding: of all convolutions, see `kvision.layers.conv`.
        momentum, epsilon: of the batch norms.
        dropout_rate: before the last layer.
    """
    norm = partial(batch_norm, momentum=momentum, epsilon=epsilon)
    inputs = keras.Input(input_shape, name="image")
    x = conv(rounded(32 * width), 3, 2, name="stem_conv", padding=padding)(inputs)
    x = norm(name="stem_bn")(x)
    x = activation("relu6", name="stem")(x)
    for i, rows in enumerate(STAGES, start=1):
        blocks = [(expansion, rounded(filters * width)) for expansion, filters, count in rows for _ in range(count)]
        for j, (expansion, filters) in enumerate(blocks, start=1):
            strides = 2 if i > 1 and j == 1 else 1
            output_name = f"stage{i}" if j == len(blocks) else f"stage{i}_block{j}"
            x = block(x, expansion, filters, strides, padding, norm, name=f"stage{i}_block{j}", output_name=output_name)
    x = conv(rounded(1280 * max(1.0, width)), 1, name="final_conv")(x)
    x = norm(name="final_bn")(x)
    x = activation("relu6", name="final_relu")(x)
    x = global_pool()(x)
    if classes:
        x = dropout(dropout_rate, name="head_dropout")(x)
        # torchvision's standard deviation is 0.01.
        x = logits(classes, initializer=VarianceScaling(0.01**2 * x.shape[-1], "in"))(x)
    return keras.Model(inputs, x, name=name)


VARIANTS = {
    "mobilenet_v2": partial(mobilenet_v2, name="mobilenet_v2"),
    "mobilenet_v2_keras": partial(
        mobilenet_v2, padding="tensorflow", momentum=0.999, epsilon=1e-3, dropout_rate=0.0, name="mobilenet_v2_keras"
    ),
}
