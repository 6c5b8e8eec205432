"""One paper, one file: blocks, a builder, and `VARIANTS`, a row for each network."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paper:
    """Where a file's networks were published, and what they read and give unless told otherwise.

    Args:
        input_shape: (height, width, channels) of the images.
        classes: the number of logits; None for networks that give an image of the input's shape instead.
        shapes: rows of the file that read other images.
    """

    title: str
    authors: str
    year: int
    address: str
    input_shape: tuple[int, int, int] = (32, 32, 3)
    classes: int | None = 10
    shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
