"""Residual networks for ImageNet.

He, Zhang, Ren and Sun 2015, "Deep residual learning for image recognition", https://arxiv.org/abs/1512.03385, table 1:
a 7x7 convolution and a max pooling, then four stages of residual blocks. Depths 18 and 34 have blocks of two 3x3
convolutions, the others bottlenecks: 1x1, 3x3, and 1x1 to four times the filters. A shortcut whose shape changes is a
1x1 convolution (option B).

Three variants have published weights. They have the same variables, and differ in the stride of a bottleneck:

- `resnet50`: torchvision's, in the first block of a stage, on the 3x3 convolution.
- `resnet50_keras`: the paper's, in the first block, on the first 1x1 convolution. It is that of `keras.applications`,
  whose convolutions have biases; the batch norm that follows each can absorb them, so there are none here.
- `resnet50_tf_slim`: TF-Slim's `resnet_v1_50`, in the last block of a stage, on the 3x3 convolution; such a block's
  shortcut takes every second pixel. The first pooling is padded like TensorFlow's "same". `stage1` ... are the last
  blocks before the map shrinks, so that their sizes equal those of the other variants.
"""

from functools import partial

import keras

from kvision.layers import activation, batch_norm, conv, global_pool, logits, max_pool
from kvision.models import Paper

PAPER = Paper(
    "Deep residual learning for image recognition",
    "He, Zhang, Ren and Sun",
    2015,
    "https://arxiv.org/abs/1512.03385",
    input_shape=(224, 224, 3),
    classes=1000,
)

NORMS = {
    "torchvision": batch_norm,
    "keras": partial(batch_norm, momentum=0.99, epsilon=1.001e-5),
    "tf_slim": partial(batch_norm, momentum=0.997),
}


def block(x, convolutions: tuple[tuple[int, int, int], ...], norm, *, name: str, output_name: str):
    """Apply convolutions (filters, size, strides) and add a shortcut; `output_name` names the block's output."""
    y = x
    for k, (filters, size, strides) in enumerate(convolutions, start=1):
        if k > 1:
            y = activation("relu", name=f"{name}_{k - 1}_relu")(y)
        y = conv(filters, size, strides, name=f"{name}_{k}_conv")(y)
        y = norm(name=f"{name}_{k}_bn")(y)
    strides = max(strides for _, _, strides in convolutions)
    if x.shape[-1] != y.shape[-1]:
        x = conv(y.shape[-1], 1, strides, name=f"{name}_shortcut_conv")(x)
        x = norm(name=f"{name}_shortcut_bn")(x)
    elif x.shape != y.shape:
        x = max_pool(1, strides, name=f"{name}_shortcut_pool")(x)
    y = keras.layers.Add(name=f"{name}_add")([x, y])
    return activation("relu", name=output_name)(y)


def resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    blocks: tuple[int, ...],
    bottleneck: bool = True,
    source: str = "torchvision",
    width: int = 64,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the pooled features of the last stage if
    `classes` is 0.

    Args:
        blocks: number of blocks in each stage.
        bottleneck: blocks of three convolutions, not two.
        source: "torchvision", "keras" or "tf_slim", see the module's docstring.
        width: filters of the first stage's 3x3 convolutions; they double with each stage.

    Raises:
        ValueError: an unknown source; for TF-Slim's, a stage but the last with one block only.
    """
    if source not in NORMS:
        raise ValueError(f"source must be one of {', '.join(NORMS)}, got {source!r}")
    late = source == "tf_slim"
    if late and min(blocks[:-1], default=2) < 2:
        raise ValueError(f"the network of tf_slim needs two blocks in every stage but the last, got {blocks}")
    norm = NORMS[source]
    inputs = keras.Input(input_shape, name="image")
    x = conv(width, 7, 2, name="stem_conv")(inputs)
    x = norm(name="stem_bn")(x)
    x = activation("relu", name="stem")(x)
    x = max_pool(3, 2, name="stem_pool", padding="tensorflow" if late else "same")(x)
    for i, count in enumerate(blocks, start=1):
        filters, last, strided = width * 2 ** (i - 1), count, 1 if i > 1 else None
        if late:
            last, strided = (count - 1, count) if i < len(blocks) else (count, None)
        for j in range(1, count + 1):
            strides = 2 if j == strided else 1
            first, second = (strides, 1) if source == "keras" else (1, strides)
            convolutions = ((filters, 3, strides), (filters, 3, 1))
            if bottleneck:
                convolutions = ((filters, 1, first), (filters, 3, second), (4 * filters, 1, 1))
            output_name = f"stage{i}" if j == last else f"stage{i}_block{j}"
            x = block(x, convolutions, norm, name=f"stage{i}_block{j}", output_name=output_name)
    x = global_pool()(x)
    return keras.Model(inputs, logits(classes)(x) if classes else x, name=name)


BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SOURCES = {"": "torchvision", "_keras": "keras", "_tf_slim": "tf_slim"}

VARIANTS = {
    "resnet18": partial(resnet, blocks=(2, 2, 2, 2), bottleneck=False, name="resnet18"),
    "resnet34": partial(resnet, blocks=(3, 4, 6, 3), bottleneck=False, name="resnet34"),
} | {
    f"resnet{depth}{suffix}": partial(resnet, blocks=blocks, source=source, name=f"resnet{depth}{suffix}")
    for suffix, source in SOURCES.items()
    for depth, blocks in BLOCKS.items()
}
