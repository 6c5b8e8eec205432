"""Test-time augmentation of uint8 images: logits are averaged over several views of each image."""

from collections.abc import Iterator

import numpy as np

# By name, for each view: its weight, the shift down and right in pixels, and whether it is then flipped.
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
    """Yield (weight, view) for the views of images (n, height, width, channels); the weights sum to 1.

    "none" is the images themselves; "flip" adds those mirrored left to right; "flip_shift" also adds, at half the
    weight, both shifted by a pixel up and left and by a pixel down and right, with a reflected border (Jordan 2024,
    https://arxiv.org/abs/2404.00498, section 3.5).
    Raises:
        ValueError: an unknown name.
    """
    if name not in TTA:
        raise ValueError(f"tta must be one of {', '.join(TTA)}, got {name!r}")
    height, width = images.shape[1:3]
    for weight, shift, flipped in TTA[name]:
        view = images
        if shift:
            before, after = max(shift, 0), max(-shift, 0)
            view = np.pad(view, ((0, 0), (before, after), (before, after), (0, 0)), "reflect")
            view = view[:, after : after + height, after : after + width]
        yield weight, view[:, :, ::-1] if flipped else view
