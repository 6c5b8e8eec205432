"""What is kept of a tensor, and how far two are apart.

Kept are up to `KEPT` values at places that depend on the tensor's size alone, and the mean, the Euclidean norm, the
largest magnitude and the number of values that are not finite, all of which are compared: what parts elsewhere shows in
those.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvision.random import rng

KEPT = 4096  # values of a tensor


@dataclass(frozen=True)
class Tensor:
    """What is kept of a tensor.

    Args:
        values: those at `places`, flat.
        mean, largest, norm: of the finite ones: mean, largest magnitude, Euclidean norm.
        odd: how many are infinite or not a number.
    """

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    mean: float
    largest: float
    norm: float
    odd: int


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one name are apart.

    Args:
        size: the largest difference relative to their scale; infinite where shapes or non-finite values differ.
        index: where, or None where it is at none of the places kept.
        values: the first's and the second's there.
    """

    name: str
    size: float
    index: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None


def places(size: int) -> np.ndarray:
    """The flat places of a tensor of `size` values that are kept: all, or up to `KEPT` by chance, the same for all."""
    return np.arange(size) if size <= KEPT else np.unique(rng(0, "places", size).integers(size, size=KEPT))


def keep(name: str, array) -> Tensor:
    """What is kept of an array."""
    array = np.asarray(array)
    wide = array.reshape(-1).astype(np.float64)
    values = wide[places(wide.size)]
    finite = np.isfinite(wide)
    odd = int(wide.size - finite.sum())
    if odd:
        wide = wide[finite]
    mean, largest = (float(wide.mean()), float(np.abs(wide).max())) if wide.size else (0.0, 0.0)
    return Tensor(name, tuple(map(int, array.shape)), values, mean, largest, float(np.sqrt(wide @ wide)), odd)


def difference(a: Tensor, b: Tensor, scale: float | None = None) -> Difference:
    """How far two tensors are apart, relative to `scale`: by default the largest magnitude in either."""
    if a.shape != b.shape:
        return Difference(a.name, math.inf)
    if not a.values.size:
        return Difference(a.name, 0.0)
    scale = scale or max(a.largest, b.largest) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.values - b.values)
    apart[(a.values == b.values) | (np.isnan(a.values) & np.isnan(b.values))] = 0
    apart[np.isnan(apart)] = np.inf
    at = int(apart.argmax())
    sizes = float(apart[at]), abs(a.mean - b.mean), abs(a.norm - b.norm) / math.sqrt(math.prod(a.shape) or 1)
    if a.odd != b.odd:
        sizes = *sizes[:1], math.inf, 0.0
    if max(sizes[1:]) > sizes[0] * (1 + 1e-6):  # which no difference at the places kept explains
        return Difference(a.name, max(sizes[1:]) / scale)
    index = tuple(map(int, np.unravel_index(places(math.prod(a.shape))[at], a.shape)))
    return Difference(a.name, sizes[0] / scale, index, (float(a.values[at]), float(b.values[at])))


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest of some; the first of equal ones."""
    return max(differences, key=lambda item: item.size, default=Difference("", 0.0))
