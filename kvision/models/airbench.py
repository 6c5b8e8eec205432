"""Small networks that train on CIFAR-10 in minutes.

Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", https://arxiv.org/abs/2404.00498: a 2x2 convolution that
whitens patches, then three stages of two 3x3 convolutions with pooling between them, initialized as the identity and
followed by batch norms without scale; the features are divided by 9 before the last layer. The paper's recipe
(whitening from the training images, label smoothing, a large rate on the batch norms' biases, Lookahead, test-time
augmentation) is in the app.

`airbench94` has the paper's widths; `airbench_small` has a seventh of its weights and is this project's network for two
CPU cores. Departure: the whitening convolution has no bias, unless `whiten_bias` adds the paper's, which is trained
for the first three epochs.
"""

from functools import partial

import keras

from kvision.layers import Dirac, VarianceScaling, activation, batch_norm, conv, least_side, logits, max_pool
from kvision.models import Paper

PAPER = Paper("94% on CIFAR-10 in 3.29 seconds on a single GPU", "Jordan", 2024, "https://arxiv.org/abs/2404.00498")

# A low momentum, because training is short (the paper's section 3.1).
norm = partial(batch_norm, momentum=0.6, epsilon=1e-12, scale=False)


def airbench(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    widths: tuple[int, int, int],
    whiten_bias: bool = False,
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the last width's pooled features if
    `classes` is 0.

    Args:
        widths: filters of each stage.
        whiten_bias: add a bias to the whitening convolution, with a uniform initializer as in PyTorch.

    Raises:
        ValueError: images smaller than 9 pixels, which three poolings need.
    """
    if least_side(input_shape) < 9:
        raise ValueError(f"airbench needs images of at least 9x9 pixels, got {input_shape[0]}x{input_shape[1]}")
    inputs = keras.Input(input_shape, name="image")
    limit = (4 * input_shape[-1]) ** -0.5  # from the number of inputs of the 2x2 window
    bias = {"use_bias": True, "bias_initializer": keras.initializers.RandomUniform(-limit, limit)}
    x = conv(8 * input_shape[-1], 2, name="whiten_conv", padding="valid", **(bias if whiten_bias else {}))(inputs)
    x = activation("gelu", name="whiten")(x)
    for i, filters in enumerate(widths, start=1):
        x = conv(filters, 3, name=f"stage{i}_1_conv", initializer=Dirac())(x)
        x = max_pool(2, name=f"stage{i}_pool")(x)
        x = norm(name=f"stage{i}_1_bn")(x)
        x = activation("gelu", name=f"stage{i}_1_gelu")(x)
        x = conv(filters, 3, name=f"stage{i}_2_conv", initializer=Dirac())(x)
        x = norm(name=f"stage{i}_2_bn")(x)
        x = activation("gelu", name=f"stage{i}")(x)
    x = keras.layers.GlobalMaxPooling2D(name="pool")(x)
    x = keras.layers.Rescaling(1 / 9, name="pool_scale")(x)
    outputs = logits(classes, use_bias=False, initializer=VarianceScaling(1 / 3, "in", "uniform"))(x) if classes else x
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "airbench94": partial(airbench, widths=(64, 256, 256), name="airbench94"),
    "airbench_small": partial(airbench, widths=(32, 64, 128), name="airbench_small"),
}
