"""What is done to an image between its file and its network.

Preprocessing belongs to the weights, not to the model: the same VGG wants ImageNet's mean when torchvision trained it
and Caffe's BGR when Caffe did. So it is data: it travels in the manifest of a weights file and comes back from there.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image

CHANNEL_ORDERS = ("rgb", "bgr", "gray")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def covering(shape: tuple[int, int], size: tuple[int, int], crop: float = 1.0) -> tuple[int, int]:
    """What an image of `shape` is resized to before `size` is cut out of its centre, (height, width) all.

    The shorter side in the proportion of what is cut out; the longer one rounded down, as torchvision does.
    """
    (rows, columns), (height, width) = shape, size
    factor = max(round(height / crop) / rows, round(width / crop) / columns)
    return max(height, int(rows * factor + 1e-9)), max(width, int(columns * factor + 1e-9))


def centred(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The first row and column of the centre of `size` in an image of `shape`, (height, width) both."""
    return round((shape[0] - size[0]) / 2), round((shape[1] - size[1]) / 2)


VALUE_RANGES = ((0, 1), (0, 255))


def as_uint8(images: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Images as uint8, 0 to 255; an array that is that already is returned as it is.

    Args:
        images: (n, height, width, channels), uint8, or numbers of another type where `value_range` says what they mean.
        value_range: (0, 1) for floats from black to white, (0, 255) for floats or integers; they are rounded to the
            nearest of 256 steps.

    Raises:
        TypeError: no array of numbers, or another dtype than uint8 without `value_range`.
        ValueError: not four axes, an unknown range, uint8 images said to lie in 0..1, or a value outside the range.
    """
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "uif":
        found = f"an array of {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise TypeError(f"images must be a NumPy array of uint8, got {found}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (n, height, width, channels), got {images.shape}")
    if value_range is not None and tuple(value_range) not in VALUE_RANGES:
        raise ValueError(f"value_range must be (0, 1) or (0, 255), got {value_range!r}")
    if images.dtype == np.uint8 and (value_range is None or tuple(value_range) == (0, 255)):
        return images
    if value_range is None:
        raise TypeError(
            f"images must be uint8, 0 to 255, got {images.dtype}; say what their values mean: value_range=(0, 1) or "
            "value_range=(0, 255)"
        )
    low, high = value_range
    if images.dtype.kind in "ui" and high == 1:
        raise ValueError(f"images in 0..1 must be floats, got {images.dtype}; give value_range=(0, 255)")
    result = np.empty(images.shape, np.uint8)
    for image, out in zip(images, result, strict=True):  # one after the other: no second copy in floats
        # Not `min() < low`: this way a nan is outside, too.
        if image.size and not (image.min() >= low and image.max() <= high):
            raise ValueError(f"images must lie in {low}..{high} as stated, got {image.min()} to {image.max()}")
        out[:] = np.rint(image * (255 / high)) if images.dtype.kind == "f" else image
    return result


@dataclass(frozen=True)
class Preprocessing:
    """The map from stored images to network input: `(images * scale - mean) / std`, channel by channel.

    Args:
        mean, std: one number a channel, in the unit of the scaled images, in the order of `channel_order`.
        scale: factor on the stored 0..255 values; the default 1/255 brings them to 0..1.
        channel_order: "rgb", "bgr" (the channels are reversed first, as Caffe's networks want) or "gray".
        size: (height, width) in pixels that the network was trained at; None where any size will do.
        crop: fraction of the shorter side that the centre crop keeps, from 0 (exclusive) to 1.
        interpolation: how an image of another size is resized to `size`.

    Raises:
        ValueError: a value that is none of the above; the message names it.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    channel_order: str = "rgb"
    size: tuple[int, int] | None = None
    crop: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(value) for value in self.size))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"preprocessing wants as many means as deviations, got {self.mean} and {self.std}")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise ValueError(
                f"preprocessing wants finite means and positive deviations, got {self.mean} and {self.std}"
            )
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"preprocessing scale must be a positive number, got {self.scale}")
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel order must be one of {CHANNEL_ORDERS}, got {self.channel_order!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {self.crop}")

    def __call__(self, images: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """Network input, (n, height, width, channels) in `dtype`, of uint8 images of the same shape."""
        if images.ndim != 4 or len(self.mean) not in (1, images.shape[-1]):
            raise ValueError(f"expected images of shape (n, height, width, {len(self.mean)}), got shape {images.shape}")
        if self.channel_order == "bgr":
            images = images[..., ::-1]
        factor, offset = self.constants(dtype)
        pixels = images.astype(dtype)
        pixels *= factor
        pixels -= offset
        return pixels

    def constants(self, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
        """A value is `pixel * factor - offset`, with these, (channels,), rounded once."""
        factor = np.asarray(self.scale / np.asarray(self.std), dtype)
        return factor, np.asarray(np.asarray(self.mean) / np.asarray(self.std), dtype)

    def images(self, pictures: Iterable[np.ndarray], dtype: str = "float32") -> np.ndarray:
        """Network input, (n, *size, channels) in `dtype`, of uint8 pictures (height, width, channels) of any size.

        As in torchvision's evaluation: the shorter side becomes `size / crop` pixels, with anti-aliasing, and the
        centre is cut out. Where `size` is None the pictures must have one size, and nothing is resized.

        Raises:
            ValueError: pictures of other kinds or, without `size`, of different sizes.
        """
        pictures = [np.asarray(picture) for picture in pictures]
        for i, picture in enumerate(pictures):
            if picture.ndim != 3 or picture.dtype != np.uint8:
                raise ValueError(
                    f"expected pictures of uint8 (height, width, channels), got {picture.dtype} {picture.shape} at {i}"
                )
        if self.size is not None:
            pictures = [self._cut(picture) for picture in pictures]
        elif len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"pictures of different sizes need a `size`: {sorted({p.shape for p in pictures})[:4]}")
        return self(np.stack(pictures), dtype)

    def _cut(self, picture: np.ndarray) -> np.ndarray:
        height, width = self.size
        target = covering(picture.shape[:2], self.size, self.crop)
        if target != picture.shape[:2]:
            method = Image.Resampling[self.interpolation.upper()]
            planes = [  # plane by plane, because Pillow knows images of 1 and 3 channels alone
                np.asarray(Image.fromarray(np.ascontiguousarray(picture[..., i])).resize(target[::-1], method))
                for i in range(picture.shape[-1])
            ]
            picture = np.stack(planes, axis=-1)
        top, left = centred(target, self.size)
        return picture[top : top + height, left : left + width]

    def to_json(self) -> dict:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Preprocessing":
        """Preprocessing of a manifest's dictionary; ValueError names an unknown or malformed entry."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"preprocessing knows {sorted(known)}, got {values!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"malformed preprocessing {values!r}: {error}") from None
