"""MnasNet.

Tan, Chen, Pang, Vasudevan, Sandler, Howard and Le 2018, "MnasNet: platform-aware neural architecture search for
mobile", https://arxiv.org/abs/1807.11626: MnasNet-B1, the searched network without squeeze and excitation, of stacks of
MobileNetV2's inverted residuals with windows of 3 or 5 pixels. As in torchvision, names end in the width: `mnasnet0_5`
has half as many filters in every layer but the last convolution.
"""

from functools import partial

import keras

from kvision.layers import VarianceScaling, activation, batch_norm, conv, depthwise_conv, dropout, global_pool, logits
from kvision.models import Paper

PAPER = Paper(
    "MnasNet: platform-aware neural architecture search for mobile",
    "Tan, Chen, Pang, Vasudevan, Sandler, Howard and Le",
    2018,
    "https://arxiv.org/abs/1807.11626",
    input_shape=(224, 224, 3),
    classes=1000,
)

# For each stage, whose first block has stride 2, stacks of (expansion, window, filters, blocks). A stage of one block
# without expansion precedes them.
STAGES = (
    ((3, 3, 24, 3),),
    ((3, 5, 40, 3),),
    ((6, 5, 80, 3), (6, 3, 96, 2)),
    ((6, 5, 192, 4), (6, 3, 320, 1)),
)

norm = partial(batch_norm, momentum=0.9997)  # as in TensorFlow's mobile networks


def rounded(filters: float) -> int:
    """Return the nearest multiple of 8, at least 8 and at least nine tenths of `filters`."""
    near = max(8, int(filters + 4) // 8 * 8)
    return near if near >= 0.9 * filters else near + 8


def block(x, expansion: int, size: int, filters: int, strides: int, *, name: str, output_name: str):
    """Apply an inverted residual; `output_name` names its output."""
    y = x
    if expansion > 1:
        y = conv(expansion * x.shape[-1], 1, name=f"{name}_expand_conv")(y)
        y = norm(name=f"{name}_expand_bn")(y)
        y = activation("relu", name=f"{name}_expand_relu")(y)
    y = depthwise_conv(size, strides, name=f"{name}_depthwise_conv")(y)
    y = norm(name=f"{name}_depthwise_bn")(y)
    y = activation("relu", name=f"{name}_depthwise_relu")(y)
    y = conv(filters, 1, name=f"{name}_project_conv")(y)
    y = norm(name=f"{name}_project_bn")(y)
    if expansion > 1 and strides == 1 and x.shape == y.shape:
        return keras.layers.Add(name=output_name)([x, y])
    return activation("linear", name=output_name)(y)


def mnasnet(
    input_shape: tuple[int, int, int], classes: int, *, width: float, dropout_rate: float = 0.2, name: str
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 1280 pooled features if `classes` is 0.

    Args:
        width: factor on all filter counts but the last convolution's 1280, rounded to multiples of 8.
        dropout_rate: before the last layer.
    """
    inputs = keras.Input(input_shape, name="image")
    x = conv(rounded(32 * width), 3, 2, name="stem_conv")(inputs)
    x = norm(name="stem_bn")(x)
    x = activation("relu", name="stem")(x)
    x = block(x, 1, 3, rounded(16 * width), 1, name="stage1_block1", output_name="stage1")
    for i, stacks in enumerate(STAGES, start=2):
        blocks = [(*row, rounded(filters * width)) for *row, filters, count in stacks for _ in range(count)]
        for j, (expansion, size, filters) in enumerate(blocks, start=1):
            strides = 2 if j == 1 else 1
            output_name = f"stage{i}" if j == len(blocks) else f"stage{i}_block{j}"
            x = block(x, expansion, size, filters, strides, name=f"stage{i}_block{j}", output_name=output_name)
    x = conv(1280, 1, name="final_conv")(x)
    x = norm(name="final_bn")(x)
    x = activation("relu", name="final_relu")(x)
    x = global_pool()(x)
    if classes:
        x = dropout(dropout_rate, name="head_dropout")(x)
        x = logits(classes, initializer=VarianceScaling(1.0, "out", "uniform"))(x)
    return keras.Model(inputs, x, name=name)


WIDTHS = {"mnasnet0_5": 0.5, "mnasnet0_75": 0.75, "mnasnet1_0": 1.0, "mnasnet1_3": 1.3}

VARIANTS = {name: partial(mnasnet, width=width, name=name) for name, width in WIDTHS.items()}
