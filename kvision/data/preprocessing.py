"""Preprocessing of images into network input.

Preprocessing belongs to the weights, not to the model: the same VGG expects ImageNet's mean if torchvision trained it
and Caffe's BGR if Caffe did. So it is data, stored in the manifest of a weights file and restored from there.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image

CHANNEL_ORDERS = ("rgb", "bgr", "gray")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def covering(shape: tuple[int, int], size: tuple[int, int], crop: float = 1.0) -> tuple[int, int]:
    """Return the (height, width) to which an image of `shape` is resized before `size` is cropped from its center.

    The side that limits the crop becomes its size / `crop`; the other one is rounded down, as in torchvision.
    """
    (rows, columns), (height, width) = shape, size
    factor = max(round(height / crop) / rows, round(width / crop) / columns)
    return max(height, int(rows * factor + 1e-9)), max(width, int(columns * factor + 1e-9))


def center_offset(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the first row and column of the center crop of `size` in an image of `shape`, both (height, width)."""
    return round((shape[0] - size[0]) / 2), round((shape[1] - size[1]) / 2)


VALUE_RANGES = ((0, 1), (0, 255))


def as_uint8(images: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Convert images to uint8, 0 to 255; a uint8 array is returned as it is.

    Args:
        images: (n, height, width, channels), uint8, or another type together with `value_range`.
        value_range: (0, 1) for floats from black to white, (0, 255) for floats or integers; values are rounded to the
            nearest of 256 levels.

    Raises:
        TypeError: not an array of numbers, or a dtype other than uint8 without `value_range`.
        ValueError: not four axes, an unknown range, uint8 images with range 0..1, or a value outside the range.
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
            f"images must be uint8, 0 to 255, got {images.dtype}; state their range: value_range=(0, 1) or "
            "value_range=(0, 255)"
        )
    low, high = value_range
    if images.dtype.kind in "ui" and high == 1:
        raise ValueError(f"images in 0..1 must be floats, got {images.dtype}; give value_range=(0, 255)")
    result = np.empty(images.shape, np.uint8)
    for image, out in zip(images, result, strict=True):  # one at a time, to avoid a second copy in floats
        # Not `min() < low`: this form rejects NaN, too.
        if image.size and not (image.min() >= low and image.max() <= high):
            raise ValueError(f"images must lie in {low}..{high} as stated, got {image.min()} to {image.max()}")
        out[:] = np.rint(image * (255 / high)) if images.dtype.kind == "f" else image
    return result


@dataclass(frozen=True)
class Preprocessing:
    """The map from stored images to network input: `(images * scale - mean) / std`, per channel.

    Args:
        mean, std: one number per channel, in the unit of the scaled images, in the order of `channel_order`.
        scale: factor on the stored 0..255 values; the default 1/255 maps them to 0..1.
        channel_order: "rgb", "bgr" (the channels are reversed first, as Caffe's networks expect) or "gray".
        size: (height, width) in pixels that the network was trained at; None for any size.
        crop: fraction of the shorter side that the center crop keeps, from 0 (exclusive) to 1.
        interpolation: method for resizing to `size`: "nearest", "bilinear", "bicubic" or "lanczos".

    Raises:
        ValueError: an invalid value; the message names it.
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
            raise ValueError(f"preprocessing needs as many means as deviations, got {self.mean} and {self.std}")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise ValueError(
                f"preprocessing needs finite means and positive deviations, got {self.mean} and {self.std}"
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
        """Return network input, (n, height, width, channels) in `dtype`, for uint8 images of the same shape."""
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
        """Return (factor, offset), each (channels,) and rounded once: the input is `pixel * factor - offset`."""
        factor = np.asarray(self.scale / np.asarray(self.std), dtype)
        return factor, np.asarray(np.asarray(self.mean) / np.asarray(self.std), dtype)

    def images(self, images: Iterable[np.ndarray], dtype: str = "float32") -> np.ndarray:
        """Return network input, (n, *size, channels) in `dtype`, for uint8 images (h, w, channels) of any size.

        As in torchvision's evaluation: the shorter side is resized to `size / crop` pixels, with anti-aliasing, and the
        center is cropped. If `size` is None, the images must have one size, and nothing is resized.

        Raises:
            ValueError: images of another dtype or rank or, without `size`, of different sizes.
        """
        images = [np.asarray(image) for image in images]
        for i, image in enumerate(images):
            if image.ndim != 3 or image.dtype != np.uint8:
                raise ValueError(
                    f"expected uint8 images (height, width, channels), got {image.dtype} {image.shape} at index {i}"
                )
        if self.size is not None:
            images = [self._resize_and_crop(image) for image in images]
        elif len({image.shape for image in images}) > 1:
            raise ValueError(f"images of different sizes need a `size`: {sorted({x.shape for x in images})[:4]}")
        return self(np.stack(images), dtype)

    def _resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        height, width = self.size
        target = covering(image.shape[:2], self.size, self.crop)
        if target != image.shape[:2]:
            method = Image.Resampling[self.interpolation.upper()]
            planes = [  # one plane at a time, because Pillow supports images of 1 and 3 channels only
                np.asarray(Image.fromarray(np.ascontiguousarray(image[..., i])).resize(target[::-1], method))
                for i in range(image.shape[-1])
            ]
            image = np.stack(planes, axis=-1)
        top, left = center_offset(target, self.size)
        return image[top : top + height, left : left + width]

    def to_json(self) -> dict:
        """Return a dictionary of plain JSON values; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Preprocessing":
        """Create preprocessing from a manifest's dictionary; ValueError names an unknown or malformed entry."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"preprocessing accepts {sorted(known)}, got {values!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"malformed preprocessing {values!r}: {error}") from None
