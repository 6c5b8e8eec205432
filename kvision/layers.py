"""The layers every network is built of, with the policies they share bound once.

- Padding is symmetric, as in torchvision, so that weights trained elsewhere mean the same here. (Keras's "same" pads
  one row more below than above when the stride is 2.)
- A convolution before a batch norm has no bias.
- Batch norm has epsilon 1e-5 and keeps 0.9 of its running statistics, PyTorch's defaults. A lineage that differs says
  so in a row of its `VARIANTS`.
- Initial weights are drawn by NumPy. Keras draws them on the backend, which gives other numbers on each and makes JAX
  compile a program for every shape: 10 to 20 s for a ResNet-20.

The functions return layers (or a short chain of them) to be called on a tensor: `conv(64, 3, name="stem_conv")(x)`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import keras
import numpy as np
from keras import ops

from kvision.random import key
from kvision.regularizers.activations import Dropout

_blank: ContextVar[list[float] | None] = ContextVar("blank", default=None)  # [numbers that may follow, in a kernel]


@contextmanager
def blank(at_most: float = math.inf, largest: float | None = None) -> Iterator[None]:
    """Within this, kernels start as zeros: for networks whose values come from elsewhere, as drawing takes time.

    Args:
        at_most: how many numbers all kernels may hold together. More raise ValueError before they take memory: for a
            network whose arguments stand in a file.
        largest: how many one kernel may hold; None is any number. More raise ValueError likewise: for a network whose
            dense layer grows with the image.
    """
    token = _blank.set([at_most, math.inf if largest is None else largest])
    try:
        yield
    finally:
        _blank.reset(token)


def _is_blank(shape: tuple[int, ...]) -> bool:
    """Whether a kernel of `shape` starts as zeros; ValueError where `blank` allows no such kernel."""
    limits = _blank.get()
    if limits is None:
        return False
    limits[0] -= (count := math.prod(shape))
    if limits[0] < 0:
        raise ValueError(f"a kernel of shape {tuple(shape)} makes the network larger than the file of its weights")
    if count > limits[1]:
        sides = " x ".join(f"{side:,}" for side in shape)
        raise ValueError(
            f"one of its kernels would have {sides} = {count:,} numbers, more than {limits[1]:,}, "
            "as it grows with the image"
        )
    return True


@keras.saving.register_keras_serializable("kvision")
class Variance(keras.initializers.Initializer):
    """Normal or uniform initial values of variance `scale / fan`, drawn by NumPy.

    Args:
        scale: 2 for layers before a ReLU (He et al. 2015, https://arxiv.org/abs/1502.01852), 1 with `fan="average"` for
            Glorot and Bengio 2010.
        fan: "in", "out" or "average": which number of connections divides the variance.
        distribution: "normal", "truncated" (normal cut at two deviations, variance corrected) or "uniform".
    """

    def __init__(self, scale: float = 2.0, fan: str = "in", distribution: str = "normal"):
        if fan not in ("in", "out", "average"):
            raise ValueError(f"fan must be 'in', 'out' or 'average', got {fan!r}")
        if distribution not in ("normal", "truncated", "uniform"):
            raise ValueError(f"distribution must be 'normal', 'truncated' or 'uniform', got {distribution!r}")
        self.scale, self.fan, self.distribution = scale, fan, distribution

    def draw(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """Float32 values of `shape`: a kernel (..., inputs, outputs), whose leading axes are its window."""
        window = math.prod(shape[:-2])
        inputs, outputs = (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], shape[0])
        fan = window * {"in": inputs, "out": outputs, "average": (inputs + outputs) / 2}[self.fan]
        deviation = math.sqrt(self.scale / max(1.0, fan))
        if self.distribution == "uniform":
            limit = math.sqrt(3) * deviation
            return (generator.random(shape, np.float32) * 2 - 1) * np.float32(limit)
        values = generator.standard_normal(shape, np.float32)
        if self.distribution == "truncated":
            while (outside := np.abs(values) > 2).any():
                values[outside] = generator.standard_normal(int(outside.sum()), np.float32)
            deviation /= 0.87962566103423978  # the deviation of a unit normal cut at 2
        return values * np.float32(deviation)

    def __call__(self, shape, dtype=None):
        if _is_blank(shape):
            return ops.convert_to_tensor(np.zeros(shape, np.float32), dtype=dtype)
        # Seeded by NumPy's global generator, so that keras.utils.set_random_seed is heard.
        generator = np.random.default_rng(np.random.randint(2**31))
        return ops.convert_to_tensor(self.draw(tuple(shape), generator), dtype=dtype)

    def get_config(self):
        return {"scale": self.scale, "fan": self.fan, "distribution": self.distribution}


@keras.saving.register_keras_serializable("kvision")
class Filled(Variance):
    """One value everywhere, filled in by NumPy: Keras's Ones and Zeros make JAX compile a program for every shape."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value = value

    def draw(self, shape, generator):
        return np.full(shape, self.value, np.float32)

    def __call__(self, shape, dtype=None):
        return ops.convert_to_tensor(self.draw(tuple(shape), None), dtype=dtype)

    def get_config(self):
        return {"value": self.value}


@keras.saving.register_keras_serializable("kvision")
class Border(keras.layers.Layer):
    """Pads images with a constant: `pads` is ((above, below), (left, right)). Keras's own layer pads with 0 alone."""

    def __init__(self, pads: tuple[tuple[int, int], tuple[int, int]], value: float = 0.0, **options):
        super().__init__(**options)
        self.pads, self.value = tuple(map(tuple, pads)), value

    def call(self, x):
        return ops.pad(x, ((0, 0), *self.pads, (0, 0)), constant_values=self.value)

    def compute_output_shape(self, input_shape):
        n, *sizes, channels = input_shape
        grow = lambda size, pads: None if size is None else size + sum(pads)  # noqa: E731
        return (n, *map(grow, sizes, self.pads), channels)

    def get_config(self):
        return {**super().get_config(), "pads": self.pads, "value": self.value}


def least_side(input_shape: tuple[int | None, int | None, int]) -> float:
    """The shorter side of images in pixels, as far as it is known; None is any size, and infinite here."""
    return min((side for side in input_shape[:2] if side is not None), default=math.inf)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _padded(layer: keras.layers.Layer, size: tuple[int, int], value: float = 0.0) -> Callable:
    """`layer` behind a border of half a window on every side; the window's sides must be odd."""
    if any(side % 2 == 0 for side in size):
        raise ValueError(f"{layer.name}: symmetric padding wants an odd window, got {size}; give padding='valid'")
    pads = tuple((side // 2, side // 2) for side in size)
    border = Border(pads, value, name=f"{layer.name}_pad")
    return lambda x: layer(border(x))


PADDINGS = {"same": "valid", "valid": "valid", "tensorflow": "same"}  # and what Keras's layer is told


def _convolution(make: Callable, size, strides, padding: str, name: str) -> Callable:
    size, strides = _pair(size), _pair(strides)
    if padding not in PADDINGS:
        raise ValueError(f"{name}: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if padding == "same" and strides == (1, 1) and all(side % 2 for side in size):
        return make(size, strides, padding="same", name=name)  # then Keras's is symmetric
    layer = make(size, strides, padding=PADDINGS[padding], name=name)
    return _padded(layer, size) if padding == "same" and size != (1, 1) else layer


def conv(
    filters: int,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    name: str,
    use_bias: bool = False,
    padding: str = "same",
    initializer: keras.initializers.Initializer | None = None,
    **options,
) -> Callable:
    """A 2-D convolution with symmetric padding: (n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), filters).

    Args:
        padding: "same", `kernel_size // 2` zeros on every side; "valid", none; "tensorflow", that of TensorFlow's and
            Keras's "same", which at stride 2 pads one more below than above: for lineages trained there.
        initializer: of the kernel; the default is He's normal initialiser over the outputs, as in torchvision.
        options: further arguments of `keras.layers.Conv2D`.

    Raises:
        ValueError: "same" with an even kernel, which has no centre; an unknown padding.
    """
    initializer = initializer or Variance(2.0, "out")
    options = {"kernel_initializer": initializer, "bias_initializer": Filled(), **options}
    make = partial(keras.layers.Conv2D, filters, use_bias=use_bias, **options)
    return _convolution(make, kernel_size, strides, padding, name)


def depthwise_conv(
    kernel_size: int, strides: int = 1, *, name: str, use_bias: bool = False, padding: str = "same", **options
) -> Callable:
    """A convolution of each channel by itself; padding as `conv` has it."""
    initializer = Variance(2.0, "out")  # of the kernel (h, w, c, 1): 2 / (h w)
    options = {"depthwise_initializer": initializer, "bias_initializer": Filled(), **options}
    make = partial(keras.layers.DepthwiseConv2D, use_bias=use_bias, **options)
    return _convolution(make, kernel_size, strides, padding, name)


def batch_norm(*, name: str, momentum: float = 0.9, epsilon: float = 1e-5, **options) -> keras.layers.Layer:
    """Batch normalisation over the last axis (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167)."""
    constants = {
        "gamma_initializer": Filled(1.0),
        "beta_initializer": Filled(),
        "moving_mean_initializer": Filled(),
        "moving_variance_initializer": Filled(1.0),
    }
    options = {"momentum": momentum, "epsilon": epsilon, **constants, **options}
    return keras.layers.BatchNormalization(name=name, **options)


def activation(kind: str, *, name: str) -> keras.layers.Layer:
    """An element-wise activation by its Keras name: "relu", "gelu" ..."""
    return keras.layers.Activation(kind, name=name)


def dense(
    units: int, *, name: str, initializer: keras.initializers.Initializer | None = None, **options
) -> keras.layers.Layer:
    """A fully connected layer; its kernel starts from He's normal initialiser unless told otherwise."""
    options = {"kernel_initializer": initializer or Variance(2.0, "in"), "bias_initializer": Filled(), **options}
    return keras.layers.Dense(units, name=name, **options)


def logits(classes: int, *, name: str = "logits", **options) -> keras.layers.Layer:
    """The last layer of a classifier. It computes in full precision under a mixed policy too."""
    options = {"initializer": Variance(1.0, "in"), "dtype": keras.config.floatx(), **options}
    return dense(classes, name=name, **options)


def max_pool(
    size: int, strides: int | None = None, *, name: str, padding: str = "valid", ceil: bool = False
) -> Callable:
    """Max pooling; a window that does not fit at the border is dropped, as in torchvision.

    Args:
        strides: the default is `size`.
        padding: "valid"; "same", half a window on every side, which no maximum sees; "tensorflow" as for `conv`.
        ceil: keep a last window that reaches over the lower and right border, where it starts inside the image
            (torchvision's `ceil_mode`).
    """
    strides = strides or size
    if padding not in PADDINGS:
        raise ValueError(f"{name}: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    layer = keras.layers.MaxPooling2D(size, strides, padding=PADDINGS[padding], name=name)
    if padding == "same":
        return _padded(layer, (size, size), -math.inf)
    if not ceil:
        return layer

    def pool(x):
        beyond = [max(0, -(-(side - size) // strides) * strides + size - side) for side in x.shape[1:3]]
        if any(beyond):
            x = Border(tuple((0, side) for side in beyond), -math.inf, name=f"{name}_pad")(x)
        return layer(x)

    return pool


def avg_pool(size: int, strides: int | None = None, *, name: str, padding: str = "valid") -> Callable:
    """Average pooling.

    Args:
        strides: the default is `size`.
        padding: "valid"; "same", half a window of zeros on every side, which count, as in torchvision; "tensorflow",
            where only the image's own pixels count.
    """
    layer = keras.layers.AveragePooling2D(size, strides or size, padding=PADDINGS[padding], name=name)
    return _padded(layer, (size, size)) if padding == "same" else layer


def global_pool(*, name: str = "pool") -> keras.layers.Layer:
    """The mean over all pixels: (n, h, w, c) to (n, c)."""
    return keras.layers.GlobalAveragePooling2D(name=name)


@keras.saving.register_keras_serializable("kvision")
class AdaptivePool(keras.layers.Layer):
    """The mean over `size` (height, width) cells of a map: (n, h, w, c) to (n, *size, c).

    Cell i of n goes from floor(i h / n) to ceil((i + 1) h / n): cells overlap where n does not divide h, and repeat
    pixels where h is less than n, as PyTorch has it. Keras's own layer gives NaN on JAX.
    """

    def __init__(self, size: tuple[int, int], **options):
        super().__init__(**options)
        self.size = tuple(size)

    def call(self, x):
        for axis, cells in enumerate(self.size, start=1):
            length = int(x.shape[axis])  # PyTorch's tracer, which ONNX is made with, makes a tensor of it
            ends = [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]
            parts = [x[:, start:end] if axis == 1 else x[:, :, start:end] for start, end in ends]
            x = ops.concatenate([ops.mean(part, axis, keepdims=True) for part in parts], axis)
        return x

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.size, input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "size": self.size}


@keras.saving.register_keras_serializable("kvision")
class LocalResponseNorm(keras.layers.Layer):
    """Each value divided by `(k + alpha * s) ** beta`, where s sums the squares of its `size` nearest channels.

    Krizhevsky, Sutskever and Hinton 2012 (see `kvision.models.alexnet`), section 3.3, with its values as defaults.
    Channels beyond the first and last count as 0. Caffe, PyTorch and cuDNN divide their alpha by `size` first: theirs
    is `size` times the one here.

    Args:
        size: channels in a sum, the value's own in the middle; an odd number.

    Raises:
        ValueError: an even size.
    """

    def __init__(self, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75, **options):
        super().__init__(**options)
        if size % 2 == 0:
            raise ValueError(f"local response normalisation wants an odd number of channels, got {size}")
        self.size, self.k, self.alpha, self.beta = size, k, alpha, beta

    def call(self, x):
        wide = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))  # float16 ends at 256 squared
        channels, reach = x.shape[-1], self.size // 2
        squares = ops.pad(wide * wide, ((0, 0), (0, 0), (0, 0), (reach, reach)))
        total = sum(squares[..., i : i + channels] for i in range(self.size))
        return ops.cast(wide * (self.k + self.alpha * total) ** -self.beta, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {"size": self.size, "k": self.k, "alpha": self.alpha, "beta": self.beta}
        return {**super().get_config(), **own}


def dropout(rate: float, *, name: str) -> Callable:
    """`kvision.regularizers.activations.Dropout`, keyed by its name; no layer at all where the rate is 0."""
    if not rate:
        return lambda x: x
    return Dropout(rate, seed=key(0, name), name=name)


def whitening_kernel(images: np.ndarray, size: int = 2, epsilon: float = 5e-4) -> np.ndarray:
    """The kernel of a fixed first convolution that whitens patches, from the images' own statistics.

    The eigenvectors of the covariance of all `size` x `size` patches, each divided by the root of its eigenvalue and
    taken with both signs (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.2).

    Args:
        images: (n, h, w, c) floats, preprocessed as the network will see them.
        epsilon: added to each eigenvalue.

    Returns:
        (size, size, c, 2 * size * size * c) float32, a Keras convolution kernel.
    """
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))  # (n, h', w', c, size, size)
    windows = windows.transpose(0, 1, 2, 4, 5, 3)
    features = size * size * images.shape[-1]
    covariance = np.zeros((features, features))
    for start in range(0, len(windows), 500):  # all patches at once would fill a gigabyte
        patches = windows[start : start + 500].reshape(-1, features).astype(np.float64)
        covariance += patches.T @ patches
    return _whitening(covariance / math.prod(windows.shape[:3]), size, epsilon)


def whitening_kernel_on_device(pixels, factor: np.ndarray, offset: np.ndarray, size: int = 2, epsilon: float = 5e-4):
    """`whitening_kernel` of `pixels * factor - offset`, with the sums over patches made where the pixels lie.

    They are sums of integers, exact on every backend and in TF32 too: a row's products in float32 below 2**24, an
    image's in int32.

    Args:
        pixels: tensor of integers from 0 to 255, (n, h, w, c).
        factor, offset: (c,), see `kvision.data.preprocessing.Preprocessing.constants`.

    Raises:
        ValueError: patches of more than 258 columns, or more than 33,000 of them in an image.
    """
    rows, columns = (side - size + 1 for side in pixels.shape[1:3])
    if columns * 255**2 >= 2**24 or rows * columns * 255**2 >= 2**31:
        raise ValueError(f"patches of {pixels.shape[1]}x{pixels.shape[2]} pixels are too many to be summed exactly")
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
    # An eigenvector's sign is the library's whim; fix it, so that every machine starts from the same kernel.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])
    kernel = (vectors / np.sqrt(values + epsilon)).reshape(size, size, len(values) // size**2, -1)
    return np.concatenate([kernel, -kernel], axis=-1).astype(np.float32)


@keras.saving.register_keras_serializable("kvision")
class Identity(Variance):
    """A convolution kernel that passes its inputs on: output i starts as input i, further outputs start at random.

    Zagoruyko and Komodakis 2017 (https://arxiv.org/abs/1706.00388) call it Dirac; the random outputs are uniform, with
    PyTorch's default variance of 1 / (3 fan).
    """

    def __init__(self):
        super().__init__(1 / 3, "in", "uniform")

    def draw(self, shape, generator):
        kernel = super().draw(shape, generator)
        both = min(shape[-2:])
        centre = tuple(size // 2 for size in shape[:-2])
        kernel[..., :both] = 0
        kernel[(*centre, range(both), range(both))] = 1
        return kernel

    def get_config(self):
        return {}
