"""Test-time augmentation of uint8 images: the mean logits of several views of an image, instead of its own."""

from collections.abc import Iterator

import numpy as np

# By name, each view's weight, the pixels by which it is moved down and to the right, and whether it is mirrored then.
TTA = {
    "none": ((1.0, 0, False),),
    "flip": ((0.5, 0, False), (0.5, 0, True)),
    "flip_shift": (
        (0.25, 0, False),
        (0.25, 0, True),
        (0.125, -1, False),
        (0.125, -1, True),
        (0.125, 1, False),
        (0.125, 1, True),
    ),
}


def augmented_views(images: np.ndarray, name: str) -> Iterator[tuple[float, np.ndarray]]:
    """The views of images (n, height, width, channels), each of the same shape, with their weights, whose sum is 1.

    "none" is the images themselves; "flip" adds those mirrored left to right; "flip_shift" adds to these, at half of
    their weight, both moved by a pixel up and left and by a pixel down and right, the border reflected (Jordan 2024,
    https://arxiv.org/abs/2404.00498, section 3.5).

    Raises:
        ValueError: an unknown name.
    """
    if name not in TTA:
        raise ValueError(f"tta must be one of {', '.join(TTA)}, got {name!r}")
    height, width = images.shape[1:3]
    for weight, move, mirrored in TTA[name]:
        view = images
        if move:
            before, after = max(move, 0), max(-move, 0)
            view = np.pad(view, ((0, 0), (before, after), (before, after), (0, 0)), "reflect")
            view = view[:, after : after + height, after : after + width]
        yield weight, view[:, :, ::-1] if mirrored else view
