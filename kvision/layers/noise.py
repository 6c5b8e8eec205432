"""Noise on activations: dropout by unit, channel, block or branch, Gaussian noise, shake-shake.

Each layer draws from `kvision.random`, so that every backend draws the same numbers; Keras's own layers differ. Each
holds one `keras.random.SeedGenerator`, but only as the holder of the two numbers (key, step): a training call draws by
them and counts the step on. The state is a variable: it travels in checkpoints, `kvision.weights.initialize` sets it by
seed and layer name, and it stays out of weight files. An example's noise depends on its index in the batch, not on how
many others there are.

At inference the layers pass their inputs on; shake-shake takes the mean of its branches. Masks are scaled in the
layer's compute dtype, so under bfloat16 and float16 the expectation holds to that type's rounding.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_

import keras
from keras import ops

from kvision.random import bernoulli, key, normal, uniform


def _next(generator: keras.random.SeedGenerator):
    """(key, step) of this call; the generator's state moves on to the next step."""
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
        rate: from 0, which changes nothing, to less than 1.
        seed: the key of the draws, from 0 to 2**31 - 1; None takes one by chance.

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
        """What an input of `shape` is multiplied by."""
        keep = 1 - self.rate
        kept = bernoulli(*_next(self.seed_generator), self._mask_shape(shape), keep)
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
    """Dropout of whole channels: (n, ..., c) loses each of an example's c maps with probability `rate`.

    Tompson et al. 2014, https://arxiv.org/abs/1411.4280. Arguments and errors as for `Dropout`.
    """

    def _mask_shape(self, shape):
        return (shape[0], *[1] * (len(shape) - 2), shape[-1])


@keras.saving.register_keras_serializable("kvision")
class StochasticDepth(Dropout):
    """Drops a residual branch: before its addition, with probability `rate`, or else divides it by `1 - rate`.

    Huang et al. 2016, https://arxiv.org/abs/1603.09382. The survival probability is `1 - rate`; the paper lets it fall
    with depth, which is for the network to say. The paper multiplies by it at inference; dividing in training is the
    same expectation, as in torchvision.

    Args:
        rate, seed: as for `Dropout`.
        mode: "row", each example for itself; "batch", all together, as in the paper.

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
    """Sets squares of `block_size` pixels to 0 in maps (n, h, w, c), each channel for itself.

    Ghiasi, Lin and Le 2018, https://arxiv.org/abs/1810.12890. A square starts at each place where it fits with
    probability `rate / block_size**2 * h w / ((h - block_size + 1) (w - block_size + 1))`, so that about `rate` of the
    units go (less where squares overlap). What stays is multiplied by count / count kept: over each example, where the
    authors' code counts over the batch, so that the other examples do not matter. An example that keeps nothing is 0.

    Args:
        rate, seed: as for `Dropout`.
        block_size: the square's side in pixels; 1 is dropout.

    Raises:
        ValueError: as for `Dropout`; a block that is no positive integer; when called, inputs that are no maps of known
            size at least as large as the block.
    """

    def __init__(self, rate: float, block_size: int = 7, seed: int | None = None, **options):
        super().__init__(rate, seed=seed, **options)
        if not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"{self.name}: block_size must be a positive integer, got {block_size!r}")
        self.block_size = block_size

    def build(self, input_shape):
        if len(input_shape) != 4:
            raise ValueError(f"{self.name}: DropBlock wants maps (n, h, w, c), got shape {tuple(input_shape)}")
        self._check_size(*input_shape[1:3])

    def _check_size(self, height, width):
        if any(side is not None and side < self.block_size for side in (height, width)):
            raise ValueError(
                f"{self.name}: a block of {self.block_size}x{self.block_size} pixels does not fit into maps of "
                f"{height}x{width}; take a smaller block_size or larger images"
            )

    def _mask(self, shape, dtype):
        n, height, width, channels = shape
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"{self.name}: DropBlock wants maps whose height and width are known, got {shape}")
        self._check_size(height, width)
        size = self.block_size
        rows, columns = height - size + 1, width - size + 1
        probability = self.rate / size**2 * (height * width) / (rows * columns)
        corners = bernoulli(*_next(self.seed_generator), (n, rows, columns, channels), probability)
        border = (size - 1, size - 1)
        dropped = ops.pad(corners, ((0, 0), border, border, (0, 0)))
        # A pixel goes where any of the size x size corners from here to the upper left is set: rows, then columns.
        # (Max pooling says the same, slower.)
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
    https://doi.org/10.1162/neco.1995.7.1.108. The noise of two backends agrees as `kvision.random.normal` says.

    Args:
        deviation: its standard deviation, in the inputs' units; 0 changes nothing.
        seed: as for `Dropout`.

    Raises:
        ValueError: a negative deviation, a seed out of range.
    """

    def __init__(self, deviation: float, seed: int | None = None, **options):
        super().__init__(**options)
        if not isinstance(deviation, int | float) or not 0 <= deviation < float("inf"):
            raise ValueError(f"{self.name}: deviation must be a number from 0 on, got {deviation!r}")
        _check_seed(self.name, seed)
        self.deviation, self.seed, self.supports_masking = deviation, seed, True
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        if not training or not self.deviation:
            return inputs
        noise = normal(*_next(self.seed_generator), ops.shape(inputs)) * self.deviation
        return inputs + ops.cast(noise, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "deviation": self.deviation, "seed": self.seed}


@keras.saving.register_keras_serializable("kvision")
class ShakeShake(keras.layers.Layer):
    """Adds two branches (n, ...) by random shares: `a x + (1 - a) y` forward, shares b and 1 - b of the gradient back.

    Gastaldi 2017, https://arxiv.org/abs/1705.07485: a and b are independent and uniform from 0 to 1 for each example
    and call, the paper's best form on CIFAR-10 (Shake-Shake-Image). At inference the mean of the two. Called on a list
    of two tensors of one shape.

    Args:
        seed: as for `Dropout`.

    Raises:
        ValueError: a seed out of range; when built, other than two inputs of one shape.
    """

    def __init__(self, seed: int | None = None, **options):
        super().__init__(**options)
        _check_seed(self.name, seed)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        shapes = [tuple(shape) for shape in input_shape if isinstance(shape, tuple | list)]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise ValueError(f"{self.name}: shake-shake wants a list of two tensors of one shape, got {input_shape}")

    def call(self, inputs, training=False):
        x, y = inputs
        if not training:
            return (x + y) * 0.5
        shares = uniform(*_next(self.seed_generator), (ops.shape(x)[0], 2))
        shares = ops.cast(ops.reshape(shares, (-1, 2, *[1] * (len(x.shape) - 1))), x.dtype)
        forward, backward = shares[:, 0], shares[:, 1]
        # The second term has no gradient and makes the value that of the forward share.
        difference = x - y
        return y + backward * difference + ops.stop_gradient((forward - backward) * difference)

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def dropout(rate: float, *, name: str) -> Callable:
    """`Dropout` whose seed is made of its name; no layer at all where the rate is 0."""
    if not rate:
        return lambda x: x
    return Dropout(rate, seed=key(0, name), name=name)
