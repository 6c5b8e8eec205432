"""Noise on activations: dropout of units, channels, blocks or branches, Gaussian noise, shake-shake.

All layers sample by `kvision.random`, so that the numbers are the same on every backend; Keras's own layers differ.
Each has one `keras.random.SeedGenerator`, used only as the variable of two numbers (key, step): a training call samples
by them and increments the step. This state is stored in checkpoints, set by `kvision.weights.initialize` from seed and
layer name, and left out of weights files. An example's noise depends on its index in the batch, not on the batch size.

At inference the layers return their inputs; shake-shake returns the mean of its branches. Masks are scaled in the
layer's compute dtype, so under bfloat16 and float16 the expectation is exact up to that type's rounding.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_

import keras
from keras import ops

from kvision.random import bernoulli, key, normal, uniform


def _next_step(generator: keras.random.SeedGenerator):
    """Return (key, step) of this call and increment the generator's step."""
    state = generator.next()
    return state[0], state[1]


def _check_seed(name: str, seed: int | None) -> None:
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**31):
        raise ValueError(f"{name}: seed must be an integer from 0 to 2**31 - 1 or None, got {seed!r}")


@keras.saving.register_keras_serializable("kvision")
class Dropout(keras.layers.Dropout):
    """Sets each unit to 0 with probability `rate` and divides the others by `1 - rate`.

    Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

    Args:
        rate: from 0, which has no effect, to less than 1.
        seed: the key, from 0 to 2**31 - 1; None chooses one at random.

    Raises:
        ValueError: a rate or seed out of range.
    """

    def __init__(self, rate: float, seed: int | None = None, **options):
        name = options.get("name") or type(self).__name__
        if not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"{name}: rate must be a number from 0 to less than 1, got {rate!r}")
        _check_seed(name, seed)
        super().__init__(rate, seed=seed, **options)

    def _mask_shape(self, shape: tuple) -> tuple:
        return shape

    def _mask(self, shape: tuple, dtype: str):
        """Return the factor on an input of `shape`."""
        keep = 1 - self.rate
        kept = bernoulli(*_next_step(self.seed_generator), self._mask_shape(shape), keep)
        return ops.cast(kept, dtype) * (1 / keep)

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        return inputs * self._mask(ops.shape(inputs), inputs.dtype)

    def get_config(self):
        config = super().get_config()
        del config["noise_shape"]
        return config


@keras.saving.register_keras_serializable("kvision")
class SpatialDropout(Dropout):
    """Dropout of whole channels: each of the c maps of an example (n, ..., c) is dropped with probability `rate`.

    Tompson et al. 2014, https://arxiv.org/abs/1411.4280. Arguments and errors as for `Dropout`.
    """

    def _mask_shape(self, shape):
        return (shape[0], *[1] * (len(shape) - 2), shape[-1])


@keras.saving.register_keras_serializable("kvision")
class StochasticDepth(Dropout):
    """Drops a residual branch before its addition with probability `rate`, or else divides it by `1 - rate`.

    Huang et al. 2016, https://arxiv.org/abs/1603.09382. The survival probability is `1 - rate`; in the paper it
    decreases with depth, which the network must set. The paper multiplies by it at inference; dividing in training
    gives the same expectation, as in torchvision.

    Args:
        rate, seed: as for `Dropout`.
        mode: "row", independently for each example; "batch", for all together, as in the paper.

    Raises:
        ValueError: as for `Dropout`, and an unknown mode.
    """

    def __init__(self, rate: float, mode: str = "row", seed: int | None = None, **options):
        super().__init__(rate, seed=seed, **options)
        if mode not in ("row", "batch"):
            raise ValueError(f"{self.name}: mode must be 'row' or 'batch', got {mode!r}")
        self.mode = mode

    def _mask_shape(self, shape):
        return (shape[0] if self.mode == "row" else 1, *[1] * (len(shape) - 1))

    def get_config(self):
        return {**super().get_config(), "mode": self.mode}


@keras.saving.register_keras_serializable("kvision")
class DropBlock(Dropout):
    """Sets squares of `block_size` pixels to 0 in maps (n, h, w, c), independently for each channel.

    Ghiasi, Lin and Le 2018, https://arxiv.org/abs/1810.12890. A square starts at each position where it fits with
    probability `rate / block_size**2 * h w / ((h - block_size + 1) (w - block_size + 1))`, so that about `rate` of the
    units are dropped (fewer where squares overlap). The rest is multiplied by count / count kept, counted per example;
    the authors' code counts over the batch, which makes examples depend on each other. An example without any unit left
    is 0.

    Args:
        rate, seed: as for `Dropout`.
        block_size: the square's side in pixels; 1 is dropout.

    Raises:
        ValueError: as for `Dropout`; a block size that is not a positive integer; when called, inputs that are not maps
            of a known size of at least the block's.
    """

    def __init__(self, rate: float, block_size: int = 7, seed: int | None = None, **options):
        super().__init__(rate, seed=seed, **options)
        if not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"{self.name}: block_size must be a positive integer, got {block_size!r}")
        self.block_size = block_size

    def build(self, input_shape):
        if len(input_shape) != 4:
            raise ValueError(f"{self.name}: DropBlock expects maps (n, h, w, c), got shape {tuple(input_shape)}")
        self._check_size(*input_shape[1:3])

    def _check_size(self, height, width):
        if any(side is not None and side < self.block_size for side in (height, width)):
            raise ValueError(
                f"{self.name}: a block of {self.block_size}x{self.block_size} pixels does not fit into maps of "
                f"{height}x{width}; use a smaller block_size or larger images"
            )

    def _mask(self, shape, dtype):
        n, height, width, channels = shape
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"{self.name}: DropBlock expects maps of known height and width, got {shape}")
        self._check_size(height, width)
        size = self.block_size
        rows, columns = height - size + 1, width - size + 1
        probability = self.rate / size**2 * (height * width) / (rows * columns)
        corners = bernoulli(*_next_step(self.seed_generator), (n, rows, columns, channels), probability)
        pad = (size - 1, size - 1)
        dropped = ops.pad(corners, ((0, 0), pad, pad, (0, 0)))
        # A pixel is dropped if any of the size x size corners from here to the upper left is set: rows, then columns.
        # (Max pooling gives the same, but slower.)
        dropped = reduce(or_, (dropped[:, i : i + height] for i in range(size)))
        dropped = reduce(or_, (dropped[:, :, i : i + width] for i in range(size)))
        kept = ops.cast(ops.logical_not(dropped), "float32")
        count = ops.sum(kept, axis=(1, 2, 3), keepdims=True)
        return ops.cast(kept * (height * width * channels / ops.maximum(count, 1.0)), dtype)

    def get_config(self):
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("kvision")
class GaussianNoise(keras.layers.Layer):
    """Adds normal noise of mean 0.

    Bishop 1995, "Training with noise is equivalent to Tikhonov regularization",
    https://doi.org/10.1162/neco.1995.7.1.108. Backends agree up to the rounding of `kvision.random.normal`.

    Args:
        stddev: standard deviation, in the inputs' units; 0 has no effect.
        seed: as for `Dropout`.

    Raises:
        ValueError: a negative stddev, a seed out of range.
    """

    def __init__(self, stddev: float, seed: int | None = None, **options):
        super().__init__(**options)
        if not isinstance(stddev, int | float) or not 0 <= stddev < float("inf"):
            raise ValueError(f"{self.name}: stddev must be a non-negative number, got {stddev!r}")
        _check_seed(self.name, seed)
        self.stddev, self.seed, self.supports_masking = stddev, seed, True
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        if not training or not self.stddev:
            return inputs
        noise = normal(*_next_step(self.seed_generator), ops.shape(inputs)) * self.stddev
        return inputs + ops.cast(noise, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "stddev": self.stddev, "seed": self.seed}


@keras.saving.register_keras_serializable("kvision")
class ShakeShake(keras.layers.Layer):
    """Adds two branches with random weights: `a x + (1 - a) y` forward, with b and 1 - b in the backward pass.

    Gastaldi 2017, https://arxiv.org/abs/1705.07485: a and b are independent and uniform from 0 to 1 for each example
    and call, the paper's best variant on CIFAR-10 (Shake-Shake-Image). At inference it returns the mean of the two.
    Called on a list of two tensors (n, ...) of one shape.

    Args:
        seed: as for `Dropout`.

    Raises:
        ValueError: a seed out of range; when built, inputs other than two of one shape.
    """

    def __init__(self, seed: int | None = None, **options):
        super().__init__(**options)
        _check_seed(self.name, seed)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        shapes = [tuple(shape) for shape in input_shape if isinstance(shape, tuple | list)]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise ValueError(f"{self.name}: shake-shake expects a list of two tensors of one shape, got {input_shape}")

    def call(self, inputs, training=False):
        x, y = inputs
        if not training:
            return (x + y) * 0.5
        weights = uniform(*_next_step(self.seed_generator), (ops.shape(x)[0], 2))
        weights = ops.cast(ops.reshape(weights, (-1, 2, *[1] * (len(x.shape) - 1))), x.dtype)
        forward, backward = weights[:, 0], weights[:, 1]
        # The last term has no gradient; it makes the value that of the forward weight.
        difference = x - y
        return y + backward * difference + ops.stop_gradient((forward - backward) * difference)

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def dropout(rate: float, *, name: str) -> Callable:
    """Create `Dropout` with a seed derived from its name; the identity if the rate is 0."""
    if not rate:
        return lambda x: x
    return Dropout(rate, seed=key(0, name), name=name)
