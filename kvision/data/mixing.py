"""Batch regularizers that change images and targets together: mixup, CutMix, random erasing.

Each is a dataclass with two methods. `make_params(generator, shape)` samples a batch's random numbers in NumPy.
`apply(images, targets, params)` is a pure function of tensors on Keras ops, which differs between backends by rounding
alone. `MixedBatches` applies them to the batches of a run, with parameters keyed by seed, epoch and step: the same on
every backend and in a resumed run.

Targets are probabilities (n, classes). Training accuracy on mixed images is not meaningful.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from keras import ops

from kvision.random import rng

ATTEMPTS = 10  # to find a rectangle that fits into the image; if all fail, the image stays unchanged


def _expect_positive(name: str, alpha: float) -> None:
    if not 0 < alpha < np.inf:
        raise ValueError(f"{name}: alpha of the distribution Beta(alpha, alpha) must be positive, got {alpha}")


@dataclass(frozen=True)
class Mixup:
    """Blend each image with another of the batch: `x = lam x_i + (1 - lam) x_j`, targets likewise (Zhang et al. 2017,
    https://arxiv.org/abs/1710.09412). One `lam` per batch, from Beta(alpha, alpha), as in the authors' code.

    Args:
        alpha: 1 for CIFAR-10 and 0.2 for ImageNet in the paper.

    Raises:
        ValueError: alpha is not positive.
    """

    alpha: float = 1.0

    def __post_init__(self):
        _expect_positive("mixup", self.alpha)

    def make_params(self, generator: np.random.Generator, shape: Sequence[int]) -> dict[str, np.ndarray]:
        """Sample `lam`, a float32 scalar, and the permutation (n,) of the other images, for images of `shape`."""
        lam = np.float32(generator.beta(self.alpha, self.alpha))
        return {"lam": lam, "permutation": generator.permutation(shape[0]).astype(np.int32)}

    def apply(self, images, targets, params):
        """Return mixed images (n, h, w, c) and targets (n, classes)."""
        lam, permutation = float(params["lam"]), params["permutation"]
        return _blend(images, permutation, lam), _blend(targets, permutation, lam)


def _blend(x, permutation, lam):
    return lam * x + (1 - lam) * ops.take(x, permutation, axis=0)


@dataclass(frozen=True)
class CutMix:
    """Replace a rectangle of each image by another image's and mix the targets by area (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899, section 3.1). One rectangle per batch, around a uniform center, clipped at the
    border; its sides are `sqrt(1 - lam)` of the image's, `lam` from Beta(alpha, alpha).

    Args:
        alpha: 1 in the paper.

    Raises:
        ValueError: alpha is not positive.
    """

    alpha: float = 1.0

    def __post_init__(self):
        _expect_positive("CutMix", self.alpha)

    def make_params(self, generator: np.random.Generator, shape: Sequence[int]) -> dict[str, np.ndarray]:
        """Sample the rectangle (top, bottom, left, right) and the permutation (n,), for images of `shape`."""
        n, height, width = shape[:3]
        side = np.sqrt(1 - generator.beta(self.alpha, self.alpha))
        permutation = generator.permutation(n).astype(np.int32)
        box = []
        for size in (height, width):
            center, half = generator.integers(size), int(size * side) // 2
            box += [max(0, center - half), min(size, center + half)]
        return {"box": np.array(box, np.int32), "permutation": permutation}

    def apply(self, images, targets, params):
        """Return mixed images (n, h, w, c) and targets (n, classes)."""
        box, permutation = params["box"], params["permutation"]
        height, width = images.shape[1:3]
        inside = _inside(box[None], height, width)
        lam = 1 - int((box[1] - box[0]) * (box[3] - box[2])) / (height * width)  # of the clipped rectangle
        return ops.where(inside, ops.take(images, permutation, axis=0), images), _blend(targets, permutation, lam)


def _inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return booleans (n, h, w, 1): whether a pixel lies in its image's rectangle (top, bottom, left, right)."""
    top, bottom, left, right = (boxes[:, i, None] for i in range(4))
    rows, columns = np.arange(height)[None], np.arange(width)[None]
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (rows[:, :, None] & columns[:, None, :])[..., None]


@dataclass(frozen=True)
class RandomErasing:
    """Replace a rectangle of some images by noise (Zhong et al. 2017, https://arxiv.org/abs/1708.04896, algorithm 1).

    The paper's noise is uniform over the range of pixels; here it is normal with standard deviation 1, that of the
    preprocessed images. Labels stay.

    Args:
        probability: fraction of the images; 0.5 in the paper.
        area: smallest and largest fraction of the image's area; 0.02 and 0.4 in the paper.
        aspect: smallest height over width, and the inverse of the largest; 0.3 in the paper.

    Raises:
        ValueError: a probability outside 0 to 1, areas out of order, an aspect above 1.
    """

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    aspect: float = 0.3

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"random erasing: the probability must be from 0 to 1, got {self.probability}")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect <= 1:
            raise ValueError(
                "random erasing: areas must be in order between 0 and 1 and the smallest aspect at most 1, "
                f"got {self.area} and {self.aspect}"
            )

    def make_params(self, generator: np.random.Generator, shape: Sequence[int]) -> dict[str, np.ndarray]:
        """Sample the rectangles (n, 4), empty for unchanged images, and the noise, for images of `shape`."""
        n, height, width = shape[:3]
        chosen = generator.random(n) < self.probability
        area = generator.uniform(*self.area, (n, ATTEMPTS)) * height * width
        aspect = generator.uniform(self.aspect, 1 / self.aspect, (n, ATTEMPTS))
        sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=-1).astype(np.int32)
        fits = (sides < (height, width)).all(axis=-1)
        sides = sides[np.arange(n), fits.argmax(axis=1)] * (chosen & fits.any(axis=1))[:, None]
        corner = (generator.random((n, 2)) * ((height + 1, width + 1) - sides)).astype(np.int32)
        boxes = np.stack([corner, corner + sides], axis=-1).reshape(n, 4)  # top, bottom, left, right
        return {"box": boxes, "noise": generator.standard_normal(tuple(shape), np.float32)}

    def apply(self, images, targets, params):
        """Return images (n, h, w, c) with their rectangles erased, and the targets unchanged."""
        inside = _inside(params["box"], *images.shape[1:3])
        return ops.where(inside, params["noise"], images), targets


class MixedBatches:
    """Batches with regularized samples; replaces `kvision.data.batches.Batches` in `training.fit`.

    Args:
        batches: the `Batches` to change.
        classes: number of classes.
        transforms: Mixup or CutMix; each batch gets one of several, with equal probability.
        erasing: applied after the mixing.
    """

    def __init__(self, batches, classes: int, transforms: Sequence = (), erasing: RandomErasing | None = None):
        self.batches, self.classes = batches, classes
        self.transforms, self.erasing = tuple(transforms), erasing
        self.steps, self.batch_size, self.preprocessing = batches.steps, batches.batch_size, batches.preprocessing

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """Yield the batches of one epoch, counted from 0: "image" (n, h, w, c) and "label" (n, classes), both float32.

        Args:
            start: first step; earlier ones are not sampled.
        """
        for step, batch in enumerate(self.batches.epoch(epoch, start), start):
            images, generator = batch["image"], rng(self.batches.seed, "samples", epoch, step)
            targets = np.eye(self.classes, dtype=np.float32)[batch["label"]]
            chosen = [self.transforms[generator.integers(len(self.transforms))]] if self.transforms else []
            for transform in [*chosen, *([self.erasing] if self.erasing else [])]:
                params = transform.make_params(generator, images.shape)
                images, targets = transform.apply(ops.convert_to_tensor(images), ops.convert_to_tensor(targets), params)
            yield {"image": images, "label": targets}
