"""Weights made for images of some channels, for images of others."""

import numpy as np


def adapt_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A first convolution's kernel (height, width, inputs, outputs) for images of `channels` channels.

    One channel gets the sum over the old ones, so a grey image means what it meant as an image of equal channels. More
    get the old ones in turn, scaled such that an image of equal channels keeps its response where they divide evenly.

    Raises:
        ValueError: the kernel has not four axes, or `channels` is not positive.
    """
    if kernel.ndim != 4 or channels < 1:
        raise ValueError(f"expected a kernel (h, w, inputs, outputs) and a channel, got {kernel.shape} and {channels}")
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    inputs = kernel.shape[2]
    return kernel[:, :, np.arange(channels) % inputs] * np.asarray(inputs / channels, kernel.dtype)


def adaptable(stored: tuple[int, ...], wanted: tuple[int, ...], channels: int) -> bool:
    """Whether a stored kernel's shape is the wanted one but for the channels of the images that it reads."""
    kernels = len(stored) == len(wanted) == 4 and wanted[2] == channels != stored[2]
    return kernels and (*stored[:2], stored[3]) == (*wanted[:2], wanted[3])
