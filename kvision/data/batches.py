"""Batches of a training set: order, flips and crops sampled by seed and epoch, the same on every backend."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvision.data.preprocessing import Preprocessing, as_uint8
from kvision.random import rng

PADDING_MODES = {"zero": "constant", "reflect": "reflect"}  # to NumPy's names
PARAMS = ("index", "top", "left", "flip", "cutout_top", "cutout_left")  # of each image, see `Batches.params`


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image each time it is used.

    Args:
        flip: mirror half of the images left to right, the other half in the next epoch, and so on: over two epochs
            every image is used both ways (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.6).
        crop_padding: pad every side by this many pixels and crop at a random position.
        padding_mode: "zero", black pixels as in He et al. 2015, or "reflect", the mirrored image.
        cutout: blank a square of this many pixels a side at a random position (DeVries and Taylor 2017,
            https://arxiv.org/abs/1708.04552), clipped at the border; 0 turns it off.

    Raises:
        ValueError: an unknown padding mode, or a negative number of pixels.
    """

    flip: bool = False
    crop_padding: int = 0
    padding_mode: str = "zero"
    cutout: int = 0

    def __post_init__(self):
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {self.padding_mode!r}")
        if self.crop_padding < 0 or self.cutout < 0:
            raise ValueError(
                f"crop_padding and cutout must be 0 or more pixels, got {self.crop_padding} and {self.cutout}"
            )


def _check_labels(labels, classes: int | None) -> np.ndarray:
    """Return labels as int32; floats are rejected, not truncated."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "ui":
        raise TypeError(f"labels must be integers, the classes' indices, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (n,), one class index per image, got {labels.shape}")
    most = np.iinfo(np.int32).max if classes is None else classes - 1
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) > most):
        raise ValueError(f"labels must lie in 0..{most}, got {labels.min()} to {labels.max()}")
    return labels.astype(np.int32)


class Batches:
    """The training images of one run, batch by batch.

    An epoch is a function of seed and epoch number alone, so a resumed run continues with the same images. Every epoch
    drops its last, incomplete batch (other images each time), so that one step is compiled.

    Args:
        images: uint8 (n, height, width, channels), or another type together with `value_range`.
        labels: integers (n,), 0 or more.
        batch_size: images per step; all of them if there are fewer.
        value_range: (0, 1) or (0, 255), the range of images that are not uint8; they are rounded to uint8.
        classes: if given, labels must be below it.

    Raises:
        TypeError: images that are not a uint8 array and no `value_range`; labels that are not integers.
        ValueError: no images, a wrong shape, a value out of range, a different number of labels, a batch size below 1.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        *,
        value_range: tuple[float, float] | None = None,
        classes: int | None = None,
    ):
        images = as_uint8(images, value_range)
        if len(images) == 0 or batch_size < 1:
            raise ValueError(
                f"expected at least one image and a positive batch size, got {len(images)} and {batch_size}"
            )
        if len(images) != len(labels):
            raise ValueError(f"expected one label per image, got {len(images)} images and {len(labels)} labels")
        if not images.size:
            raise ValueError(f"images must have pixels and channels, got shape {images.shape}")
        self.labels, self.classes = _check_labels(labels, classes), classes
        self.batch_size = min(batch_size, len(images))
        self.preprocessing = preprocessing
        self.augmentation = augmentation or Augmentation()
        self.height, self.width = images.shape[1:3]
        crop_padding = self.augmentation.crop_padding
        mode = PADDING_MODES[self.augmentation.padding_mode]
        self.padded = (
            np.pad(images, ((0, 0), (crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0)), mode)
            if crop_padding
            else images
        )
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Change the seed of order and augmentation."""
        self.seed = seed
        self.flipped = rng(seed, "flip").random(len(self.labels)) < 0.5

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return len(self.labels) // self.batch_size

    def params(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Sample the parameters of each step of an epoch: int32 (6, n), one column per image.

        The rows are `PARAMS`: the image's index, the corner (top, left) of the crop in the padded image, whether the
        crop is flipped, and the corner of the cutout square. Rows without augmentation are 0. `make_batch` turns them
        into a batch; `kvision.data.device` makes the same batch on a device.

        Args:
            start: first step; earlier ones are not sampled.
        """
        augmentation, n = self.augmentation, self.batch_size
        order = rng(self.seed, "order", epoch).permutation(len(self.labels)).astype(np.int32)
        for step in range(start, self.steps):
            params = np.zeros((len(PARAMS), n), np.int32)
            params[0] = order[step * n : (step + 1) * n]
            generator = rng(self.seed, "augment", epoch, step)
            if augmentation.crop_padding:
                params[1:3] = generator.integers(0, 2 * augmentation.crop_padding + 1, (2, n))
            if augmentation.flip:
                params[3] = self.flipped[params[0]] ^ bool(epoch % 2)
            if augmentation.cutout:
                center = generator.integers(0, (self.height, self.width), (n, 2))
                params[4:] = center.T - augmentation.cutout // 2
            yield params

    def in_order(self, batch_size: int, pad: bool = True) -> Iterator[np.ndarray]:
        """Yield the parameters of batches with each image once, in order and without augmentation.

        Args:
            pad: fill up the last batch, so that one shape is compiled, and add a seventh row, 1 for images and 0 for
                padding, which becomes the batch's "weight".
        """
        count, padding = len(self.labels), self.augmentation.crop_padding
        batch_size = min(batch_size, count)
        for start in range(0, count, batch_size):
            stop = start + batch_size if pad else min(start + batch_size, count)
            indices = np.arange(start, stop)
            params = np.zeros((len(PARAMS) + pad, len(indices)), np.int32)
            params[0], params[1:3] = np.where(indices < count, indices, start), padding
            if self.augmentation.cutout:
                params[4:6] = -self.augmentation.cutout  # outside the image
            if pad:
                params[6] = indices < count
            yield params

    def images(self, params: np.ndarray) -> np.ndarray:
        """Return the uint8 images (n, h, w, c) of a step's `params`."""
        indices, tops, lefts, flips, *corner = params[: len(PARAMS)]
        images = np.empty((len(indices), self.height, self.width, self.padded.shape[-1]), np.uint8)
        # A loop copies each image once: a third of the time of NumPy's indexing of all crops.
        for image, index, top, left, flip in zip(images, indices, tops, lefts, flips, strict=True):
            crop = self.padded[index, top : top + self.height, left : left + self.width]
            image[:] = crop[:, ::-1] if flip else crop
        if side := self.augmentation.cutout:
            inside = [
                (np.arange(size) >= first[:, None]) & (np.arange(size) < first[:, None] + side)
                for size, first in zip((self.height, self.width), corner, strict=True)
            ]
            images[inside[0][:, :, None] & inside[1][:, None, :]] = 0
        return images

    def make_batch(self, params: np.ndarray) -> dict[str, np.ndarray]:
        """Return the batch of a step's `params`: "image", preprocessed float32 (n, h, w, c), and "label", int32 (n,); a
        seventh row of params becomes "weight", float32 (n,)."""
        batch = {"image": self.preprocessing(self.images(params)), "label": self.labels[params[0]]}
        return batch | {"weight": params[6].astype(np.float32)} if len(params) > len(PARAMS) else batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch, {"image", "label"}; epochs count from 0.

        Args:
            start: first step; earlier ones are not sampled.
        """
        for params in self.params(epoch, start):
            yield self.make_batch(params)
