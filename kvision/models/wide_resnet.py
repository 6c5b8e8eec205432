"""Wide residual networks.

Zagoruyko and Komodakis 2016, "Wide residual networks", https://arxiv.org/abs/1605.07146: a shallow CIFAR ResNet,
`width` times as wide, with batch norm and ReLU before each convolution and, where the shape changes, a 1x1 convolution
as shortcut that shares the block's first activation. `dropout_rate` applies between the two convolutions of a block
(section 2.4). `wide_resnet` is the paper's WRN-16-8.
"""

from functools import partial

import keras

from kvision.layers import activation, batch_norm, conv, dropout, logits
from kvision.models import Paper

PAPER = Paper("Wide residual networks", "Zagoruyko and Komodakis", 2016, "https://arxiv.org/abs/1605.07146")


def block(x, filters: int, strides: int, dropout_rate: float, *, name: str, output_name: str):
    """Apply two pre-activated 3x3 convolutions and add a shortcut; `output_name` names the block's output."""
    y = batch_norm(name=f"{name}_1_bn")(x)
    y = activated = activation("relu", name=f"{name}_1_relu")(y)
    y = conv(filters, 3, strides, name=f"{name}_1_conv")(y)
    y = batch_norm(name=f"{name}_2_bn")(y)
    y = activation("relu", name=f"{name}_2_relu")(y)
    y = dropout(dropout_rate, name=f"{name}_dropout")(y)
    y = conv(filters, 3, name=f"{name}_2_conv")(y)
    if x.shape != y.shape:
        x = conv(filters, 1, strides, name=f"{name}_shortcut_conv")(activated)
    return keras.layers.Add(name=output_name)([x, y])


def wide_resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    depth: int,
    width: int,
    dropout_rate: float = 0.0,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 64 * `width` pooled features if
    `classes` is 0.

    Raises:
        ValueError: `depth` is not 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a wide ResNet has depth 6 n + 4 (10, 16, 22, 28 ...), got {depth}")
    blocks = (depth - 4) // 6
    inputs = keras.Input(input_shape, name="image")
    x = conv(16, 3, name="stem_conv")(inputs)
    for i, filters in enumerate((16, 32, 64), start=1):
        for j in range(1, blocks + 1):
            strides = 2 if i > 1 and j == 1 else 1
            output_name = f"stage{i}" if j == blocks else f"stage{i}_block{j}"
            x = block(x, filters * width, strides, dropout_rate, name=f"stage{i}_block{j}", output_name=output_name)
    x = batch_norm(name="final_bn")(x)
    x = activation("relu", name="final_relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = logits(classes)(x) if classes else x
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "wide_resnet": partial(wide_resnet, depth=16, width=8, name="wide_resnet"),
    "wide_resnet_16_4": partial(wide_resnet, depth=16, width=4, name="wide_resnet_16_4"),
}
