"""U-Net as a denoiser of small images.

Ronneberger, Fischer and Brox 2015, "U-Net: convolutional networks for biomedical image segmentation",
https://arxiv.org/abs/1505.04597, figure 1: stages of two 3x3 convolutions with ReLU, 2x2 max pooling between them; then
the way back up, where a 2x2 transposed convolution doubles the maps and the stage of the same size is concatenated.

`unet_denoiser` reads a noisy image and returns the logits of its pixels: their sigmoid is the clean image. It
departs from the paper in four ways. Convolutions are padded, so nothing is cropped. Batch norm is between
convolution and ReLU. Widths and depth are for digits of 28x28 pixels. And all stages work at half the size and less: a
5x5 convolution of stride 2 reads the image and a transposed convolution writes it, as in FFDNet (Zhang, Zuo and Zhang
2018, https://arxiv.org/abs/1710.04026, section III), which halves the cost.

Vincent, Larochelle, Bengio and Manzagol 2008, "Extracting and composing robust features with denoising autoencoders",
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


def block(x, filters: int, *, name: str, output_name: str):
    """Apply two 3x3 convolutions with batch norm and ReLU; `output_name` names the output."""
    for i in (1, 2):
        x = conv(filters, 3, name=f"{name}_{i}_conv")(x)
        x = batch_norm(name=f"{name}_{i}_bn")(x)
        x = activation("relu", name=output_name if i == 2 else f"{name}_{i}_relu")(x)
    return x


def unet_denoiser(
    input_shape: tuple[int | None, int | None, int],
    classes: int | None,
    *,
    widths: tuple[int, ...] = (32, 64),
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits of their pixels (n, h, w, c), or to the pooled maps of `code` if
    `classes` is 0.

    Args:
        widths: filters of the stages, from half the images' size down; `code` is the last one's output.

    Raises:
        ValueError: a side of the images cannot be halved for every stage.
    """
    step = 2 ** len(widths)
    if any(side is not None and side % step for side in input_shape[:2]):
        raise ValueError(f"{name} needs images whose sides are multiples of {step}, got {input_shape[:2]}")
    inputs = keras.Input(input_shape, name="image")
    x = conv(widths[0], 5, 2, name="stem_conv")(inputs)
    x = batch_norm(name="stem_bn")(x)
    x = activation("relu", name="stem")(x)
    skips = []
    for i, filters in enumerate(widths[:-1], start=1):
        x = block(x, filters, name=f"stage{i}", output_name=f"stage{i}")
        skips.append(x)
        x = max_pool(2, name=f"stage{i}_pool")(x)
    x = block(x, widths[-1], name="code", output_name="code")
    if classes == 0:
        return keras.Model(inputs, global_pool()(x), name=name)
    for i in range(len(skips), 0, -1):
        x = up_conv(widths[i - 1], name=f"up{i}_conv")(x)
        x = keras.layers.Concatenate(name=f"up{i}_concat")([skips[i - 1], x])
        x = block(x, widths[i - 1], name=f"up{i}", output_name=f"up{i}")
    # The head computes in full precision, as in every network.
    outputs = up_conv(input_shape[-1], name="logits", use_bias=True, dtype=keras.config.floatx())(x)
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {"unet_denoiser": partial(unet_denoiser, name="unet_denoiser")}
