"""The third Inception.

Szegedy, Vanhoucke, Ioffe, Shlens and Wojna 2015, "Rethinking the Inception architecture for computer vision",
https://arxiv.org/abs/1512.00567, table 1 and section 10: unpadded convolutions at the start, then modules whose 5x5 and
7x7 windows are factored into smaller ones, 3x3 or 1x7 after 7x1. The published networks, whose filters these are, keep
a 5x5 branch in the first three. Stages have equal map sizes: the modules 5b, 6a and 7a of torchvision and TF-Slim are
`stage3_a`, `stage4_a` and `stage5_a` here.

- `inception_v3`: torchvision's. The padding of its average poolings counts as zeros.
- `inception_v3_keras`: that of `keras.applications` and TF-Slim. Average poolings count only the image's own pixels,
  and batch norms have no scale. The auxiliary head is TF-Slim's.

torchvision's `transform_input` is part of the preprocessing here, see `kvision.convert.torchvision.preprocessing`.
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
    max_pool,
)
from kvision.models import Paper

PAPER = Paper(
    "Rethinking the Inception architecture for computer vision",
    "Szegedy, Vanhoucke, Ioffe, Shlens and Wojna",
    2015,
    "https://arxiv.org/abs/1512.00567",
    input_shape=(299, 299, 3),
    classes=1000,
)

# A module is a row of branches, a branch a row of steps: a pooling, a convolution (filters, window, strides), or two
# parallel convolutions.


def figure5(pooled: int):
    return (
        ((64, 1),),
        ((48, 1), (64, 5)),
        ((64, 1), (96, 3), (96, 3)),
        ("avg", (pooled, 1)),
    )


def figure6(n: int):
    return (
        ((192, 1),),
        ((n, 1), (n, (1, 7)), (192, (7, 1))),
        ((n, 1), (n, (7, 1)), (n, (1, 7)), (n, (7, 1)), (192, (1, 7))),
        ("avg", (192, 1)),
    )


SPREAD = ((384, (1, 3)), (384, (3, 1)))
FIGURE7 = (
    ((320, 1),),
    ((384, 1), SPREAD),
    ((448, 1), (384, 3), SPREAD),
    ("avg", (192, 1)),
)

# The modules a, b, ... of each stage. The first of stages 4 and 5 halve the map, as in figure 10.
MODULES = {
    3: (figure5(32), figure5(64), figure5(64)),
    4: (
        (((384, 3, 2),), ((64, 1), (96, 3), (96, 3, 2)), ("max",)),
        figure6(128),
        figure6(160),
        figure6(160),
        figure6(192),
    ),
    5: (
        (((192, 1), (320, 3, 2)), ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)), ("max",)),
        FIGURE7,
        FIGURE7,
    ),
}

NORMS = {
    "torchvision": partial(batch_norm, epsilon=1e-3),
    "keras": partial(batch_norm, momentum=0.9997, epsilon=1e-3, scale=False),
}


def inception_v3(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    source: str = "torchvision",
    width: float = 1.0,
    auxiliary: bool = False,
    dropout_rate: float = 0.5,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the 2048 `width` pooled features if
    `classes` is 0.

    Args:
        source: "torchvision" or "keras", see the module's docstring.
        width: factor on all filter counts.
        auxiliary: return a list of two outputs, `logits` and those of a head on the fourth stage. Its 5x5 convolution
            needs images of at least 299 pixels; for smaller ones its window is the map it reads, as in TF-Slim.
        dropout_rate: before the last layer.

    Raises:
        ValueError: an unknown source; images of less than 75 pixels, which the poolings need, or 107 with the head.
    """
    if source not in NORMS:
        raise ValueError(f"source must be one of {', '.join(NORMS)}, got {source!r}")
    auxiliary = auxiliary and classes > 0
    least = 107 if auxiliary else 75
    if least_side(input_shape) < least:
        raise ValueError(
            f"{name}{' with its auxiliary head' * auxiliary} needs images of at least {least}x{least} pixels, "
            f"got {input_shape[0]}x{input_shape[1]}"
        )
    norm = NORMS[source]
    average = partial(avg_pool, 3, 1, padding="tensorflow" if source == "keras" else "same")

    def unit(x, filters, size, strides=1, *, name, padding="same", output_name=None):
        filters, padding = max(1, int(filters * width)), "valid" if strides == 2 else padding
        x = conv(filters, size, strides, name=f"{name}_conv", padding=padding, initializer=VarianceScaling(2.0, "in"))(
            x
        )
        x = norm(name=f"{name}_bn")(x)
        return activation("relu", name=output_name or f"{name}_relu")(x)

    def branch(x, steps, *, name):
        """Return the outputs of a branch, one or two."""
        convolutions = 0
        for step in steps:
            if step == "avg":
                x = average(name=f"{name}_pool")(x)
            elif step == "max":
                x = max_pool(3, 2, name=f"{name}_pool")(x)
            else:
                convolutions += 1
                if step is SPREAD:
                    return [unit(x, *step[i], name=f"{name}_{convolutions}{side}") for i, side in enumerate("ab")]
                x = unit(x, *step, name=f"{name}_{convolutions}")
        return [x]

    def module(x, branches, *, name, output_name):
        """Apply parallel branches; `output_name` names their concatenation."""
        outputs = []
        for i, steps in enumerate(branches, start=1):
            outputs += branch(x, steps, name=f"{name}_branch{i}")
        return keras.layers.Concatenate(name=output_name)(outputs)

    def head(x):
        """Return the logits of the auxiliary head."""
        x = avg_pool(5, 3, name="aux1_pool")(x)
        x = unit(x, 128, 1, name="aux1_1")
        x = unit(x, 768, tuple(min(5, side) for side in x.shape[1:3]), name="aux1_2", padding="valid")
        x = global_pool(name="aux1_global_pool")(x)
        return logits(classes, name="aux1_logits", initializer=VarianceScaling(0.001**2 * x.shape[-1], "in"))(x)

    inputs = keras.Input(input_shape, name="image")
    x = unit(inputs, 32, 3, 2, name="stage1_1")
    x = unit(x, 32, 3, name="stage1_2", padding="valid")
    x = unit(x, 64, 3, name="stage1_3", output_name="stage1")
    x = max_pool(3, 2, name="stage1_pool")(x)
    x = unit(x, 80, 1, name="stage2_1")
    x = unit(x, 192, 3, name="stage2_2", padding="valid", output_name="stage2")
    x = max_pool(3, 2, name="stage2_pool")(x)
    heads = []
    for stage, rows in MODULES.items():
        for j, row in enumerate(rows):
            block = f"stage{stage}_{'abcde'[j]}"
            x = module(x, row, name=block, output_name=f"stage{stage}" if j == len(rows) - 1 else block)
        if auxiliary and stage == 4:
            heads.append(head(x))
    x = global_pool()(x)
    if not classes:
        return keras.Model(inputs, x, name=name)
    x = dropout(dropout_rate, name="head_dropout")(x)
    x = logits(classes)(x)
    return keras.Model(inputs, [x, *heads] if heads else x, name=name)


VARIANTS = {
    "inception_v3": partial(inception_v3, name="inception_v3"),
    "inception_v3_keras": partial(inception_v3, source="keras", dropout_rate=0.2, name="inception_v3_keras"),
}
