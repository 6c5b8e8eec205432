"""Initializers that compute in NumPy.

Keras's compute on the backend, which gives different numbers on each and makes JAX compile a program for every shape:
10 to 20 s for a ResNet-20.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import keras
import numpy as np
from keras import ops

_skip_init: ContextVar[list[float] | None] = ContextVar("skip_init", default=None)  # [values left, values per kernel]


@contextmanager
def skip_init(at_most: float = math.inf, largest: float | None = None) -> Iterator[None]:
    """Within this context, kernels start as zeros: for networks that load weights, because sampling takes time.

    Args:
        at_most: maximum number of values in all kernels together. More raise ValueError before they are allocated: for
            a network whose arguments come from a file.
        largest: maximum number of values in one kernel; None is any number. More raise ValueError, too: for a network
            whose dense layer grows with the image.
    """
    token = _skip_init.set([at_most, math.inf if largest is None else largest])
    try:
        yield
    finally:
        _skip_init.reset(token)


def _skips_init(shape: tuple[int, ...]) -> bool:
    """Return whether a kernel of `shape` starts as zeros; ValueError if it exceeds the limits of `skip_init`."""
    limits = _skip_init.get()
    if limits is None:
        return False
    limits[0] -= (count := math.prod(shape))
    if limits[0] < 0:
        raise ValueError(f"a kernel of shape {tuple(shape)} makes the network larger than its weights file")
    if count > limits[1]:
        sides = " x ".join(f"{side:,}" for side in shape)
        raise ValueError(
            f"one of its kernels would have {sides} = {count:,} values, more than {limits[1]:,}, "
            "because it grows with the image"
        )
    return True


@keras.saving.register_keras_serializable("kvision")
class VarianceScaling(keras.initializers.Initializer):
    """Normal or uniform initial values of variance `scale / fan`, sampled in NumPy.

    Args:
        scale: 2 for layers before a ReLU (He et al. 2015, https://arxiv.org/abs/1502.01852), 1 with `fan="average"` for
            Glorot and Bengio 2010.
        fan: "in", "out" or "average": the number of connections that divides the variance.
        distribution: "normal", "truncated" (normal, truncated at two deviations, variance corrected) or "uniform".
    """

    def __init__(self, scale: float = 2.0, fan: str = "in", distribution: str = "normal"):
        if fan not in ("in", "out", "average"):
            raise ValueError(f"fan must be 'in', 'out' or 'average', got {fan!r}")
        if distribution not in ("normal", "truncated", "uniform"):
            raise ValueError(f"distribution must be 'normal', 'truncated' or 'uniform', got {distribution!r}")
        self.scale, self.fan, self.distribution = scale, fan, distribution

    def sample(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """Return float32 values of `shape`: a kernel (..., inputs, outputs), whose leading axes are its window."""
        window = math.prod(shape[:-2])
        inputs, outputs = (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], shape[0])
        fan = window * {"in": inputs, "out": outputs, "average": (inputs + outputs) / 2}[self.fan]
        stddev = math.sqrt(self.scale / max(1.0, fan))
        if self.distribution == "uniform":
            limit = math.sqrt(3) * stddev
            return (generator.random(shape, np.float32) * 2 - 1) * np.float32(limit)
        values = generator.standard_normal(shape, np.float32)
        if self.distribution == "truncated":
            while (outside := np.abs(values) > 2).any():
                values[outside] = generator.standard_normal(int(outside.sum()), np.float32)
            stddev /= 0.87962566103423978  # the standard deviation of a unit normal truncated at 2
        return values * np.float32(stddev)

    def __call__(self, shape, dtype=None):
        if _skips_init(shape):
            return ops.convert_to_tensor(np.zeros(shape, np.float32), dtype=dtype)
        # Seeded by NumPy's global generator, so that keras.utils.set_random_seed has an effect.
        generator = np.random.default_rng(np.random.randint(2**31))
        return ops.convert_to_tensor(self.sample(tuple(shape), generator), dtype=dtype)

    def get_config(self):
        return {"scale": self.scale, "fan": self.fan, "distribution": self.distribution}


@keras.saving.register_keras_serializable("kvision")
class Constant(VarianceScaling):
    """A constant, filled in by NumPy: Keras's Ones and Zeros make JAX compile a program for every shape."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value = value

    def sample(self, shape, generator):
        return np.full(shape, self.value, np.float32)

    def __call__(self, shape, dtype=None):
        return ops.convert_to_tensor(self.sample(tuple(shape), None), dtype=dtype)

    def get_config(self):
        return {"value": self.value}


def whitening_kernel(images: np.ndarray, size: int = 2, epsilon: float = 5e-4) -> np.ndarray:
    """Return the kernel of a fixed first convolution that whitens patches, from the statistics of `images`.

    The eigenvectors of the covariance of all `size` x `size` patches, each divided by the root of its eigenvalue, with
    both signs (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.2).

    Args:
        images: (n, h, w, c) floats, preprocessed as for the network.
        epsilon: added to each eigenvalue.

    Returns:
        (size, size, c, 2 * size * size * c) float32, a Keras convolution kernel.
    """
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))  # (n, h', w', c, size, size)
    windows = windows.transpose(0, 1, 2, 4, 5, 3)
    features = size * size * images.shape[-1]
    covariance = np.zeros((features, features))
    for start in range(0, len(windows), 500):  # all patches at once would take a gigabyte
        patches = windows[start : start + 500].reshape(-1, features).astype(np.float64)
        covariance += patches.T @ patches
    return _whitening(covariance / math.prod(windows.shape[:3]), size, epsilon)


def whitening_kernel_on_device(pixels, factor: np.ndarray, offset: np.ndarray, size: int = 2, epsilon: float = 5e-4):
    """Return `whitening_kernel` of `pixels * factor - offset`; the sums over patches are computed on the device.

    They are sums of integers, exact on every backend and in TF32: a row's products in float32 below 2**24, an image's
    in int32.

    Args:
        pixels: tensor of integers from 0 to 255, (n, h, w, c).
        factor, offset: (c,), see `kvision.data.preprocessing.Preprocessing.constants`.

    Raises:
        ValueError: patches of more than 258 columns, or more than 33,000 of them in an image.
    """
    rows, columns = (side - size + 1 for side in pixels.shape[1:3])
    if columns * 255**2 >= 2**24 or rows * columns * 255**2 >= 2**31:
        raise ValueError(f"patches of {pixels.shape[1]}x{pixels.shape[2]} pixels are too many for an exact sum")
    pixels = ops.cast(pixels, "float32")
    windows = [pixels[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]
    windows = ops.concatenate([*windows, ops.ones_like(pixels[:, :rows, :columns, :1])], axis=-1)
    products = ops.matmul(ops.swapaxes(windows, -2, -1), windows)
    sums = ops.convert_to_numpy(ops.sum(ops.cast(products, "int32"), axis=1)).astype(np.int64).sum(axis=0)
    mean = sums / sums[-1, -1]  # of the products, and of the values in its last row
    factor, offset = (np.tile(np.asarray(values, np.float64), size * size) for values in (factor, offset))
    scaled = np.outer(factor * mean[-1, :-1], offset)
    covariance = np.outer(factor, factor) * mean[:-1, :-1] - scaled - scaled.T + np.outer(offset, offset)
    return _whitening(covariance, size, epsilon)


def _whitening(covariance, size, epsilon):
    values, vectors = np.linalg.eigh(covariance)
    # An eigenvector's sign depends on the library; fix it, so that the kernel is the same on every machine.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])
    kernel = (vectors / np.sqrt(values + epsilon)).reshape(size, size, len(values) // size**2, -1)
    return np.concatenate([kernel, -kernel], axis=-1).astype(np.float32)


@keras.saving.register_keras_serializable("kvision")
class Dirac(VarianceScaling):
    """The identity as a convolution kernel: output i starts as input i, further outputs start at random.

    Zagoruyko and Komodakis 2017, https://arxiv.org/abs/1706.00388. The random outputs are uniform, with PyTorch's
    default variance of 1 / (3 fan).
    """

    def __init__(self):
        super().__init__(1 / 3, "in", "uniform")

    def sample(self, shape, generator):
        kernel = super().sample(shape, generator)
        both = min(shape[-2:])
        center = tuple(size // 2 for size in shape[:-2])
        kernel[..., :both] = 0
        kernel[(*center, range(both), range(both))] = 1
        return kernel

    def get_config(self):
        return {}
