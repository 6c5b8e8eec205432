"""Views of an image to score instead of the image alone: test-time augmentation of uint8 arrays."""

from collections.abc import Iterator

import numpy as np

# By name, each view's weight, the pixels by which it is moved down and to the right, and whether it is mirrored then.
VIEWS = {
    "plain": ((1.0, 0, False),),
    "mirror": ((0.5, 0, False), (0.5, 0, True)),
    "shifted": (
        (0.25, 0, False),
        (0.25, 0, True),
        (0.125, -1, False),
        (0.125, -1, True),
        (0.125, 1, False),
        (0.125, 1, True),
    ),
}


def views(images: np.ndarray, name: str) -> Iterator[tuple[float, np.ndarray]]:
    """The views of images (n, height, width, channels), each of the same shape, with their weights, whose sum is 1.

    "plain" is the images themselves; "mirror" adds those mirrored left to right; "shifted" adds to these, at half of
    their weight, both moved by a pixel up and left and by a pixel down and right, the border reflected (Jordan 2024,
    https://arxiv.org/abs/2404.00498, section 3.5).

    Raises:
        ValueError: an unknown name.
    """
    if name not in VIEWS:
        raise ValueError(f"views must be one of {', '.join(VIEWS)}, got {name!r}")
    height, width = images.shape[1:3]
    for weight, move, mirrored in VIEWS[name]:
        view = images
        if move:
            before, after = max(move, 0), max(-move, 0)
            view = np.pad(view, ((0, 0), (before, after), (before, after), (0, 0)), "reflect")
            view = view[:, after : after + height, after : after + width]
        yield weight, view[:, :, ::-1] if mirrored else view
