"""One module per paper: blocks, a builder, and `VARIANTS`, one row per network."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paper:
    """The publication of a module's networks, and their default input and output sizes.

    Args:
        input_shape: (height, width, channels) of the images.
        classes: the number of logits; None for networks whose output is an image of the input's shape.
        shapes: variants with another input shape.
    """

    title: str
    authors: str
    year: int
    address: str
    input_shape: tuple[int, int, int] = (32, 32, 3)
    classes: int | None = 10
    shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
