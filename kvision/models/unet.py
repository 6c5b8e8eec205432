"""U-Net, and the small one that removes noise from digits.

Ronneberger, Fischer and Brox 2015, "U-Net: convolutional networks for biomedical image segmentation",
https://arxiv.org/abs/1505.04597, figure 1: stages of two 3x3 convolutions with ReLU, 2x2 max pooling between them; then
the way back up, where a 2x2 transposed convolution doubles the maps and the stage of the same size is concatenated.

`unet_denoiser` reads a noisy digit and gives the logits of its pixels: their sigmoid is the clean image. It departs
from the paper in its widths, a quarter of the paper's or less; convolutions are padded, so that the output has the
size of the input and nothing is cropped; and batch norm stands between convolution and ReLU. Vincent, Larochelle,
Bengio and Manzagol 2008, "Extracting and composing robust features with denoising autoencoders",
https://doi.org/10.1145/1390156.1390294, is the training: clean images from corrupted ones.
"""

from functools import partial

import keras

from kvision.layers import activation, batch_norm, conv, global_pool, max_pool, up_conv
from kvision.models import Paper

PAPER = Paper(
    "U-Net: convolutional networks for biomedical image segmentation",
    "Ronneberger, Fischer and Brox",
    2015,
    "https://arxiv.org/abs/1505.04597",
    input_shape=(28, 28, 1),
    classes=None,
)


def block(x, filters: int, *, name: str, tap: str):
    """Two 3x3 convolutions with batch norm and ReLU; `tap` names the output."""
    for i in (1, 2):
        x = conv(filters, 3, name=f"{name}_{i}_conv")(x)
        x = batch_norm(name=f"{name}_{i}_bn")(x)
        x = activation("relu", name=tap if i == 2 else f"{name}_{i}_relu")(x)
    return x


def unet(
    input_shape: tuple[int, int, int], classes: int | None, *, widths: tuple[int, ...], name: str
) -> keras.Model:
    """Images (n, h, w, c) to logits of each pixel (n, h, w, classes); (n, h, w, c) where `classes` is None.

    Where `classes` is 0, to the pooled features of the last stage, the network's `code`.

    Args:
        widths: filters of each stage; the last one's output is `code`.

    Raises:
        ValueError: a side of the images cannot be halved between all stages.
    """
    step = 2 ** (len(widths) - 1)
    if any(side is not None and side % step for side in input_shape[:2]):
        raise ValueError(f"{name} needs images whose sides are multiples of {step}, got {input_shape[:2]}")
    inputs = x = keras.Input(input_shape, name="image")
    skips = []
    for i, filters in enumerate(widths, start=1):
        if skips:
            x = max_pool(2, name=f"stage{i}_pool")(x)
        last = i == len(widths)
        x = block(x, filters, name=f"stage{i}", tap="code" if last else f"stage{i}")
        skips.append(x)
    if classes == 0:
        return keras.Model(inputs, global_pool()(x), name=name)
    for i, filters in reversed(list(enumerate(widths[:-1], start=1))):
        x = up_conv(filters, name=f"up{i}_conv")(x)
        x = keras.layers.Concatenate(name=f"up{i}_concat")([skips[i - 1], x])
        x = block(x, filters, name=f"up{i}", tap=f"up{i}")
    filters = input_shape[-1] if classes is None else classes
    # The head computes in full precision, as every network's.
    x = conv(filters, 1, name="logits", use_bias=True, dtype=keras.config.floatx())(x)
    return keras.Model(inputs, x, name=name)


VARIANTS = {"unet_denoiser": partial(unet, widths=(16, 32, 64), name="unet_denoiser")}
