"""The random numbers of a run, keyed by what they are for.

`keras.random` gives other numbers on every backend, and a shared generator gives other numbers as soon as somebody
draws once more. Here a number depends on the run's seed and on its purpose alone: the initial kernel of `stage1_conv`,
the order of epoch 7. So every backend starts from the same weights and sees the same images, and a run that was stopped
draws the same numbers when it goes on.

`rng` draws in NumPy. `bits`, `uniform`, `bernoulli` and `normal` draw on the device, eagerly or inside a compiled
step: a counter-based generator (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), which holds no state but
hashes where a number stands. Keras is imported when one of these is called, as data and command lines do without it.

The hash is lowbias32 (Wellons, https://github.com/skeeto/hash-prospector): two rounds of xor-shift and multiply, whose
avalanche bias, measured over all 2**32 inputs, is the least of its form bar slight later gains. A number is
`h(h(place ^ a) ^ h(example ^ b))`, with a and b two words hashed from (key, step): four rounds lie between every input
and the bits, where three make a hash that cannot be told from a random permutation (ibid.). The inner hashes are made
once for a row and a column, so a number costs two rounds. It is for dropping units, not for secrets.
"""

import hashlib
import math

import numpy as np


def _digest(*purpose: str | int) -> int:
    text = "\0".join(str(part) for part in purpose)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose: `rng(seed, "order", epoch)`.

    Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) takes its key from the SHA-256 of seed and
    purpose, so streams of different purposes are independent.
    """
    return np.random.Generator(np.random.Philox(key=_digest(seed, *purpose)))


def key(seed: int, *purpose: str | int) -> int:
    """A key for `bits` and its kin, from 0 to 2**31 - 1, for one purpose: `key(seed, "mixup")`."""
    return _digest(seed, *purpose) % 2**31


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return (word + 2**31) % 2**32 - 2**31


# The first 32 bits after the point of the golden ratio and of pi, which part the two words of a (key, step).
GOLDEN, PI = 0x9E3779B9, 0x243F6A88


def _mix(x):
    """lowbias32 of an int32 tensor."""
    from keras import ops

    def fold(x, shift):  # x ^= x >> shift of unsigned words
        shifted = ops.right_shift(x, shift)
        shifted &= 2 ** (32 - shift) - 1
        return shifted

    # PyTorch does these in place, in the memory of the first line's result; the others bind the name anew.
    x = x ^ fold(x, 16)
    x *= _signed(0x7FEB352D)
    x ^= fold(x, 15)
    x *= _signed(0x846CA68B)
    x ^= fold(x, 16)
    return x


def bits(key, step, shape):
    """32 random bits for each value, the same on every backend and device.

    The bits of value [i, ...] depend on key, step, i and the place within the example alone: the first 4 examples of a
    batch of 8 get what a batch of 4 gets.

    Args:
        key: int or integer scalar tensor, of which 32 bits count: what the numbers are for.
        step: likewise: which draw it is.
        shape: (examples, ...); the number of examples may be a tensor, the others are integers.

    Returns:
        An int32 tensor of `shape`, uniform from -2**31 to 2**31 - 1.

    Raises:
        ValueError: a shape without an axis of examples.
    """
    from keras import ops

    if not len(shape):
        raise ValueError("random numbers are drawn for examples: shape must have at least one axis, got ()")
    key, step = (
        ops.convert_to_tensor(_signed(word) if isinstance(word, int) else word, dtype="int32") for word in (key, step)
    )
    places, examples = (
        _mix(ops.arange(count, dtype="int32") ^ _mix(_mix(key ^ _signed(part)) ^ step))
        for count, part in ((math.prod(shape[1:]), GOLDEN), (shape[0], PI))
    )
    return ops.reshape(_mix(examples[:, None] ^ places), shape)


def uniform(key, step, shape, dtype: str | None = None):
    """Uniform numbers from 0 to less than 1 in steps of 2**-24, exactly the same on every backend.

    The upper 24 of `bits` as a signed integer, times 2**-24, plus 1/2: all of it exact in float32.

    Args:
        key, step, shape: as for `bits`.
        dtype: "float32" or "float64"; the default is float64 where that is Keras's `floatx`, float32 elsewhere.

    Raises:
        ValueError: a dtype that cannot hold the numbers: they would round up to 1.
    """
    import keras
    from keras import ops

    dtype = dtype or ("float64" if keras.config.floatx() == "float64" else "float32")
    if dtype not in ("float32", "float64"):
        raise ValueError(
            f"uniform numbers have 24 bits: dtype must be float32 or float64, got {dtype}; cast them after"
        )
    return ops.cast(ops.right_shift(bits(key, step, shape), 8), dtype) * 2**-24 + 0.5


def bernoulli(key, step, shape, probability: float):
    """A boolean tensor, True with `probability`: what `uniform(key, step, shape) < probability` gives, at less cost.

    Raises:
        ValueError: `probability` is not from 0 to 1.
    """
    from keras import ops

    if not 0 <= probability <= 1:
        raise ValueError(f"a probability is a number from 0 to 1, got {probability}")
    return ops.right_shift(bits(key, step, shape), 8) < math.ceil(probability * 2**24) - 2**23


def normal(key, step, shape, dtype: str | None = None):
    """Normal numbers of mean 0 and deviation 1, by the inverse of the distribution function, within 5.42.

    The uniform numbers beneath are the same on every backend. What is made of them differs by the rounding of each
    backend's inverse error function: over all 2**24 of them float32 parts from the true value by at most 1.1e-6 on
    TensorFlow and PyTorch, 2.2e-5 on JAX.

    Args:
        key, step, shape, dtype: as for `uniform`.
    """
    from keras import ops

    # The middle of each step of 2**-24 is symmetric about 1/2 and never 0 or 1; from -1 to 1 it is exact in float32.
    place = 2 * uniform(key, step, shape, dtype) - (1 - 2**-24)
    # TensorFlow's inverse loses the upper tail, where it rounds (1 + place) / 2; all three are good below 0.
    return -math.sqrt(2) * ops.sign(place) * ops.erfinv(-ops.abs(place))
