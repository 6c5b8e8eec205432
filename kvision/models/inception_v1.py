"""GoogLeNet, the first Inception.

Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke and Rabinovich 2014, "Going deeper with convolutions",
https://arxiv.org/abs/1409.4842, table 1: modules of four parallel branches, a 1x1 convolution, a 1x1 before a 3x3, a
1x1 before a 5x5, and a 1x1 after a 3x3 max pooling. The stages have the paper's numbers, the modules its letters.

- `inception_v1`: the paper's, without batch norm. Unspecified details are those of Caffe's `bvlc_googlenet`,
  https://github.com/BVLC/caffe/tree/master/models/bvlc_googlenet: the constants of local response normalization (k of
  1, alpha of 1e-4 / 5), and poolings that keep a last window over the border.
- `googlenet`: torchvision's, ported from TensorFlow: a batch norm after each convolution, 3x3 in place of 5x5, the
  fourth pooling 2x2, and auxiliary heads on the mean over 4x4 cells.
- `inception_v1_tf_slim`: TF-Slim's `inception_v1`: the same with TensorFlow's padding and batch norms without scale.
  Its published weights have no auxiliary heads; here they are the paper's.

torchvision's `transform_input` is part of the preprocessing here, see `kvision.convert.torchvision.preprocessing`.
"""

from functools import partial

import keras

from kvision.layers import (
    AdaptiveAveragePooling2D,
    LocalResponseNorm,
    VarianceScaling,
    activation,
    avg_pool,
    batch_norm,
    conv,
    dense,
    dropout,
    global_pool,
    least_side,
    logits,
    max_pool,
)
from kvision.models import Paper

PAPER = Paper(
    "Going deeper with convolutions",
    "Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke and Rabinovich",
    2014,
    "https://arxiv.org/abs/1409.4842",
    input_shape=(224, 224, 3),
    classes=1000,
)

# Table 1: filters of 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj in the modules a, b, ... of each stage.
MODULES = {
    3: (
        (64, 96, 128, 16, 32, 32),
        (128, 128, 192, 32, 96, 64),
    ),
    4: (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    5: (
        (256, 160, 320, 32, 128, 128),
        (384, 192, 384, 48, 128, 128),
    ),
}
HEADS = {"stage4_a": "aux1", "stage4_d": "aux2"}  # inputs and names of the auxiliary heads

NORMS = {
    "paper": None,
    "torchvision": partial(batch_norm, epsilon=1e-3),
    "tf_slim": partial(batch_norm, momentum=0.9997, epsilon=1e-3, scale=False),
}


def inception_v1(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    source: str = "paper",
    width: float = 1.0,
    auxiliary: bool = False,
    dropout_rate: float = 0.4,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 1024 `width` pooled features if
    `classes` is 0.

    Args:
        source: "paper", "torchvision" or "tf_slim", see the module's docstring.
        width: factor on all filter counts.
        auxiliary: return a list of three outputs, `logits` and those of two heads on the fourth stage.
        dropout_rate: before the last layer; in the auxiliary heads it is 0.7.

    Raises:
        ValueError: an unknown source; images too small for the poolings: 31 pixels for the paper's network, 15 for
            torchvision's; with auxiliary heads, except torchvision's, 79 (65 for TF-Slim's).
    """
    if source not in NORMS:
        raise ValueError(f"source must be one of {', '.join(NORMS)}, got {source!r}")
    auxiliary = auxiliary and classes > 0
    least = {"paper": 79 if auxiliary else 31, "torchvision": 15, "tf_slim": 65 if auxiliary else 1}[source]
    if least_side(input_shape) < least:
        raise ValueError(
            f"{name}{' with auxiliary heads' * auxiliary} needs images of at least {least}x{least} pixels, "
            f"got {input_shape[0]}x{input_shape[1]}"
        )
    norm, padding = NORMS[source], "tensorflow" if source == "tf_slim" else "same"
    shrink = partial(max_pool, padding="tensorflow") if source == "tf_slim" else partial(max_pool, ceil=True)
    scaled = lambda filters: max(1, int(filters * width))  # noqa: E731

    def unit(x, filters, size, strides=1, *, name, output_name=None):
        initializer = VarianceScaling(2.0, "in")
        options = {"use_bias": norm is None, "padding": padding, "initializer": initializer}
        x = conv(scaled(filters), size, strides, name=f"{name}_conv", **options)(x)
        if norm:
            x = norm(name=f"{name}_bn")(x)
        return activation("relu", name=output_name or f"{name}_relu")(x)

    def module(x, row, *, name, output_name):
        """Apply the four branches of a row of table 1; `output_name` names their concatenation."""
        one, reduce3, three, reduce5, five, pooled = row
        a = unit(x, one, 1, name=f"{name}_branch1_1")
        b = unit(x, reduce3, 1, name=f"{name}_branch2_1")
        b = unit(b, three, 3, name=f"{name}_branch2_2")
        c = unit(x, reduce5, 1, name=f"{name}_branch3_1")
        c = unit(c, five, 5 if source == "paper" else 3, name=f"{name}_branch3_2")
        d = max_pool(3, 1, name=f"{name}_branch4_pool", padding="same")(x)
        d = unit(d, pooled, 1, name=f"{name}_branch4_1")
        return keras.layers.Concatenate(name=output_name)([a, b, c, d])

    def head(x, *, name):
        """Return the logits of an auxiliary head."""
        pool = partial(AdaptiveAveragePooling2D, (4, 4)) if source == "torchvision" else partial(avg_pool, 5, 3)
        x = unit(pool(name=f"{name}_pool")(x), 128, 1, name=name)
        x = keras.layers.Flatten(name=f"{name}_flatten")(x)
        x = dense(scaled(1024), name=f"{name}_dense")(x)
        x = activation("relu", name=f"{name}_dense_relu")(x)
        x = dropout(0.7, name=f"{name}_dropout")(x)
        return logits(classes, name=f"{name}_logits")(x)

    inputs = keras.Input(input_shape, name="image")
    x = unit(inputs, 64, 7, 2, name="stage1", output_name="stage1")
    x = shrink(3, 2, name="stage1_pool")(x)
    if source == "paper":
        x = LocalResponseNorm(k=1.0, alpha=1e-4 / 5, name="stage1_lrn")(x)
    x = unit(x, 64, 1, name="stage2_1")
    x = unit(x, 192, 3, name="stage2_2", output_name="stage2")
    if source == "paper":
        x = LocalResponseNorm(k=1.0, alpha=1e-4 / 5, name="stage2_lrn")(x)
    heads = []
    for stage, rows in MODULES.items():
        size = 3 if stage < 5 or source == "paper" else 2
        x = shrink(size, 2, name=f"stage{stage - 1}_pool")(x)
        for letter, row in zip("abcde", rows, strict=False):
            block = f"stage{stage}_{letter}"
            x = module(x, row, name=block, output_name=f"stage{stage}" if row is rows[-1] else block)
            if auxiliary and block in HEADS:
                heads.append(head(x, name=HEADS[block]))
    x = global_pool()(x)
    if not classes:
        return keras.Model(inputs, x, name=name)
    x = dropout(dropout_rate, name="head_dropout")(x)
    x = logits(classes)(x)
    return keras.Model(inputs, [x, *heads] if heads else x, name=name)


VARIANTS = {
    "inception_v1": partial(inception_v1, name="inception_v1"),
    "googlenet": partial(inception_v1, source="torchvision", dropout_rate=0.2, name="googlenet"),
    "inception_v1_tf_slim": partial(inception_v1, source="tf_slim", dropout_rate=0.2, name="inception_v1_tf_slim"),
}
