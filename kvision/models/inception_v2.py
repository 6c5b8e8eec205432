"""BN-Inception, the second Inception.

Ioffe and Szegedy 2015, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
https://arxiv.org/abs/1502.03167, figure 5: GoogLeNet with batch norm, two 3x3 convolutions in place of the 5x5, average
pooling in most modules, and modules of stride 2 (3c, 4e) in place of two poolings. The stages have the paper's numbers,
the modules its letters.

- `inception_v2`: the published Caffe weights' network, known from `pretrained-models.pytorch`,
  https://github.com/Cadene/pretrained-models.pytorch: the figure's filters. Those weights have biases in the
  convolutions; the batch norm that follows each can absorb them, so there are none here.
- `inception_v2_tf_slim`: TF-Slim's `inception_v2`, with TensorFlow's padding and batch norms without scale. Its first
  convolution is separable: 8 filters for each color, then 1x1 over all 24 channels, with a bias and no batch norm. The
  pooling projections of 4c and 4d have 96 filters, so that the modules have the 576 output channels that the figure
  states; the figure's 128 filters would give 608.
"""

import math
from functools import partial

import keras

from kvision.layers import (
    ConstantPad2D,
    VarianceScaling,
    activation,
    avg_pool,
    batch_norm,
    conv,
    depthwise_conv,
    dropout,
    global_pool,
    least_side,
    logits,
    max_pool,
)
from kvision.models import Paper

PAPER = Paper(
    "Batch normalization: accelerating deep network training by reducing internal covariate shift",
    "Ioffe and Szegedy",
    2015,
    "https://arxiv.org/abs/1502.03167",
    input_shape=(224, 224, 3),
    classes=1000,
)

# Figure 5: filters of 1x1, (3x3 reduce, 3x3), (double 3x3 reduce, double 3x3), and the pooling with its projection in
# the modules a, b, ... of each stage. Those without 1x1 and projection have stride 2.
MODULES = {
    3: (
        (64, (64, 64), (64, 96), ("avg", 32)),
        (64, (64, 96), (64, 96), ("avg", 64)),
        (0, (128, 160), (64, 96), ("max", 0)),
    ),
    4: (
        (224, (64, 96), (96, 128), ("avg", 128)),
        (192, (96, 128), (96, 128), ("avg", 128)),
        (160, (128, 160), (128, 160), ("avg", 128)),
        (96, (128, 192), (160, 192), ("avg", 128)),
        (0, (128, 192), (192, 256), ("max", 0)),
    ),
    5: (
        (352, (192, 320), (160, 224), ("avg", 128)),
        (352, (192, 320), (192, 224), ("max", 128)),
    ),
}
NARROW = ("stage4_c", "stage4_d")  # modules that differ in TF-Slim
STAGE_ENDS = {"stage3_b": "stage3", "stage4_d": "stage4", "stage5_b": "stage5"}  # the last modules of each map size

NORMS = {"caffe": batch_norm, "tf_slim": partial(batch_norm, momentum=0.9997, epsilon=1e-3, scale=False)}


def inception_v2(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    source: str = "caffe",
    width: float = 1.0,
    dropout_rate: float = 0.0,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 1024 `width` pooled features if
    `classes` is 0.

    Args:
        source: "caffe" or "tf_slim", see the module's docstring.
        width: factor on all filter counts.
        dropout_rate: before the last layer.

    Raises:
        ValueError: an unknown source; in Caffe's network, images of less than 7 pixels, which its poolings need.
    """
    if source not in NORMS:
        raise ValueError(f"source must be one of {', '.join(NORMS)}, got {source!r}")
    least = 7 if source == "caffe" else 1
    if least_side(input_shape) < least:
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels, got {input_shape[0]}x{input_shape[1]}"
        )
    norm, padding = NORMS[source], "tensorflow" if source == "tf_slim" else "same"
    scaled = lambda filters: max(1, int(filters * width))  # noqa: E731

    def unit(x, filters, size, strides=1, *, name, output_name=None):
        initializer = VarianceScaling(2.0, "in")
        x = conv(scaled(filters), size, strides, name=f"{name}_conv", padding=padding, initializer=initializer)(x)
        x = norm(name=f"{name}_bn")(x)
        return activation("relu", name=output_name or f"{name}_relu")(x)

    def shrink(x, *, name):
        """Apply max pooling parallel to convolutions of stride 2, with their output size, ceil(side / 2)."""
        if source == "tf_slim":
            return max_pool(3, 2, name=name, padding="tensorflow")(x)
        # Caffe's windows start on the map and cross its end; for odd sides the result would be one pixel smaller than
        # that of the convolutions, an error in Caffe. Here they start one pixel before the map, like the convolutions.
        pads = tuple((side % 2, 1) for side in x.shape[1:3])
        return max_pool(3, 2, name=name)(ConstantPad2D(pads, -math.inf, name=f"{name}_pad")(x))

    def module(x, row, *, name, output_name):
        """Apply the branches of a row of figure 5; `output_name` names their concatenation."""
        one, (reduce, three), (reduce_double, double), (pooling, projected) = row
        strides = 1 if one else 2
        b = unit(x, reduce, 1, name=f"{name}_branch2_1")
        b = unit(b, three, 3, strides, name=f"{name}_branch2_2")
        c = unit(x, reduce_double, 1, name=f"{name}_branch3_1")
        c = unit(c, double, 3, name=f"{name}_branch3_2")
        c = unit(c, double, 3, strides, name=f"{name}_branch3_3")
        if not one:
            return keras.layers.Concatenate(name=output_name)([b, c, shrink(x, name=f"{name}_branch4_pool")])
        a = unit(x, one, 1, name=f"{name}_branch1_1")
        pool = avg_pool if pooling == "avg" else max_pool
        d = pool(3, 1, name=f"{name}_branch4_pool", padding=padding)(x)
        d = unit(d, 96 if source == "tf_slim" and name in NARROW else projected, 1, name=f"{name}_branch4_1")
        return keras.layers.Concatenate(name=output_name)([a, b, c, d])

    inputs = x = keras.Input(input_shape, name="image")
    if source == "tf_slim":
        ways = max(1, min(8, scaled(64) // 3))
        x = depthwise_conv(7, 2, name="stage1_depthwise_conv", padding=padding, depth_multiplier=ways)(x)
        x = conv(scaled(64), 1, name="stage1_conv", use_bias=True, initializer=VarianceScaling(2.0, "in"))(x)
        x = activation("relu", name="stage1")(x)
    else:
        x = unit(x, 64, 7, 2, name="stage1", output_name="stage1")
    pool = partial(max_pool, padding="tensorflow") if source == "tf_slim" else partial(max_pool, ceil=True)
    x = pool(3, 2, name="stage1_pool")(x)
    x = unit(x, 64, 1, name="stage2_1")
    x = unit(x, 192, 3, name="stage2_2", output_name="stage2")
    x = pool(3, 2, name="stage2_pool")(x)
    for stage, rows in MODULES.items():
        for letter, row in zip("abcde", rows, strict=False):
            block = f"stage{stage}_{letter}"
            x = module(x, row, name=block, output_name=STAGE_ENDS.get(block, block))
    x = global_pool()(x)
    if classes:
        x = dropout(dropout_rate, name="head_dropout")(x)
        x = logits(classes)(x)
    return keras.Model(inputs, x, name=name)


VARIANTS = {
    "inception_v2": partial(inception_v2, name="inception_v2"),
    "inception_v2_tf_slim": partial(inception_v2, source="tf_slim", dropout_rate=0.2, name="inception_v2_tf_slim"),
}
