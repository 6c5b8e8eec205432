"""Summaries of tensors, and the difference of two of them.

A summary has up to `KEPT` values, at indices that depend only on the tensor's size, and the mean, the Euclidean norm,
the largest magnitude and the number of nonfinite values. All are compared; differences at other indices change those
statistics.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvision.random import rng

KEPT = 4096  # values of a tensor


@dataclass(frozen=True)
class Tensor:
    """The summary of a tensor.

    Args:
        values: the values at `sampled_indices`, flat, float64.
        mean, largest, norm: mean, largest magnitude and Euclidean norm of the finite values.
        nonfinite: the number of infinite and nan values.
    """

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    mean: float
    largest: float
    norm: float
    nonfinite: int


@dataclass(frozen=True)
class Difference:
    """The difference of two tensors with the same name.

    Args:
        size: the largest difference relative to their scale; infinite if shapes or nonfinite values differ.
        index: its index, or None if it is not at a kept index.
        values: the values of the first and the second tensor there.
    """

    name: str
    size: float
    index: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None


def sampled_indices(size: int) -> np.ndarray:
    """The flat indices of a tensor of `size` values that are kept: all, or up to `KEPT` random ones."""
    return np.arange(size) if size <= KEPT else np.unique(rng(0, "places", size).integers(size, size=KEPT))


def keep(name: str, array) -> Tensor:
    """Summarize an array."""
    array = np.asarray(array)
    wide = array.reshape(-1).astype(np.float64)
    values = wide[sampled_indices(wide.size)]
    finite = np.isfinite(wide)
    nonfinite = int(wide.size - finite.sum())
    if nonfinite:
        wide = wide[finite]
    mean, largest = (float(wide.mean()), float(np.abs(wide).max())) if wide.size else (0.0, 0.0)
    return Tensor(name, tuple(map(int, array.shape)), values, mean, largest, float(np.sqrt(wide @ wide)), nonfinite)


def difference(a: Tensor, b: Tensor, scale: float | None = None) -> Difference:
    """The difference of two tensors relative to `scale`, by default the largest magnitude in either."""
    if a.shape != b.shape:
        return Difference(a.name, math.inf)
    if not a.values.size:
        return Difference(a.name, 0.0)
    scale = scale or max(a.largest, b.largest) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(a.values - b.values)
    delta[(a.values == b.values) | (np.isnan(a.values) & np.isnan(b.values))] = 0
    delta[np.isnan(delta)] = np.inf
    at = int(delta.argmax())
    sizes = float(delta[at]), abs(a.mean - b.mean), abs(a.norm - b.norm) / math.sqrt(math.prod(a.shape) or 1)
    if a.nonfinite != b.nonfinite:
        sizes = *sizes[:1], math.inf, 0.0
    if max(sizes[1:]) > sizes[0] * (1 + 1e-6):  # not explained by a difference at a kept index
        return Difference(a.name, max(sizes[1:]) / scale)
    index = tuple(map(int, np.unravel_index(sampled_indices(math.prod(a.shape))[at], a.shape)))
    return Difference(a.name, sizes[0] / scale, index, (float(a.values[at]), float(b.values[at])))


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest difference; the first of equal ones."""
    return max(differences, key=lambda item: item.size, default=Difference("", 0.0))
