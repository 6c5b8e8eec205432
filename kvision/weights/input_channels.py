"""Adaptation of a first convolution's weights to another number of image channels."""

import numpy as np


def adapt_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapt a first convolution's kernel (height, width, inputs, outputs) to images of `channels` channels.

    One channel gets the sum over the old ones, so that a gray image gives the same response as with equal channels.
    More channels get the old ones in turn, scaled such that an image of equal channels keeps its response if they
    divide evenly.

    Raises:
        ValueError: the kernel does not have four axes, or `channels` is not positive.
    """
    if kernel.ndim != 4 or channels < 1:
        raise ValueError(f"expected a kernel (h, w, inputs, outputs) and a channel, got {kernel.shape} and {channels}")
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    inputs = kernel.shape[2]
    return kernel[:, :, np.arange(channels) % inputs] * np.asarray(inputs / channels, kernel.dtype)


def adaptable(stored: tuple[int, ...], expected: tuple[int, ...], channels: int) -> bool:
    """Return whether a stored kernel's shape is the expected one except for the number of image channels."""
    kernels = len(stored) == len(expected) == 4 and expected[2] == channels != stored[2]
    return kernels and (*stored[:2], stored[3]) == (*expected[:2], expected[3])
