"""Random numbers of a run, keyed by what they are for.

`keras.random` gives different numbers on every backend, and a shared generator gives different numbers as soon as one
more is sampled anywhere. Here a number depends only on the run's seed and its key: the initial kernel of `stage1_conv`,
the order of epoch 7. So every backend starts from the same weights and sees the same images, and a resumed run samples
the same numbers.

`rng` samples in NumPy. `bits`, `uniform`, `bernoulli` and `normal` sample on the device, eagerly or inside a compiled
step, with a counter-based generator (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): it has no state and
hashes a number's position. They import Keras when called, because data and command lines work without it.

The hash is lowbias32 (Wellons, https://github.com/skeeto/hash-prospector): two rounds of xor-shift and multiply. Its
avalanche bias, measured over all 2**32 inputs, is the lowest known of this form up to slight later gains. A number is
`h(h(place ^ a) ^ h(example ^ b))`, with two words a and b hashed from (key, step): four rounds between every input and
the bits, while three already give a hash indistinguishable from a random permutation (ibid.). The inner hashes are
computed once per row and column, so a number costs two rounds. It is for dropping units, not for secrets.
"""

import hashlib
import math

import numpy as np


def _digest(*key: str | int) -> int:
    text = "\0".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def rng(seed: int, *key: str | int) -> np.random.Generator:
    """Create a NumPy generator for one key: `rng(seed, "order", epoch)`.

    Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), keyed by the SHA-256 of seed and key, so that
    generators of different keys are independent.
    """
    return np.random.Generator(np.random.Philox(key=_digest(seed, *key)))


def key(seed: int, *parts: str | int) -> int:
    """Return a key from 0 to 2**31 - 1 for `bits` and the functions below: `key(seed, "mixup")`."""
    return _digest(seed, *parts) % 2**31


def _signed(word: int) -> int:
    """Return the int32 with the bits of a 32-bit word."""
    return (word + 2**31) % 2**32 - 2**31


# The first 32 fractional bits of the golden ratio and of pi, which distinguish the two words of a (key, step).
GOLDEN, PI = 0x9E3779B9, 0x243F6A88


def _mix(x):
    """Hash an int32 tensor by lowbias32."""
    from keras import ops

    def fold(x, shift):  # x ^= x >> shift of unsigned words
        shifted = ops.right_shift(x, shift)
        shifted &= 2 ** (32 - shift) - 1
        return shifted

    # PyTorch works in place, in the memory of the first line's result; the other backends rebind the name.
    x = x ^ fold(x, 16)
    x *= _signed(0x7FEB352D)
    x ^= fold(x, 15)
    x *= _signed(0x846CA68B)
    x ^= fold(x, 16)
    return x


def bits(key, step, shape):
    """Return 32 random bits for each value, the same on every backend and device.

    The bits of value [i, ...] depend on key, step, i and the position within the example alone: the first 4 examples of
    a batch of 8 get the bits of a batch of 4.

    Args:
        key: int or integer scalar tensor, of which 32 bits are used: what the numbers are for.
        step: likewise; the number of the call.
        shape: (examples, ...); the number of examples may be a tensor, the others are integers.

    Returns:
        An int32 tensor of `shape`, uniform from -2**31 to 2**31 - 1.

    Raises:
        ValueError: a shape without an axis of examples.
    """
    from keras import ops

    if not len(shape):
        raise ValueError("random numbers are sampled per example: shape must have at least one axis, got ()")
    key, step = (
        ops.convert_to_tensor(_signed(word) if isinstance(word, int) else word, dtype="int32") for word in (key, step)
    )
    places, examples = (
        _mix(ops.arange(count, dtype="int32") ^ _mix(_mix(key ^ _signed(part)) ^ step))
        for count, part in ((math.prod(shape[1:]), GOLDEN), (shape[0], PI))
    )
    return ops.reshape(_mix(examples[:, None] ^ places), shape)


def uniform(key, step, shape, dtype: str | None = None):
    """Return uniform numbers from 0 to less than 1 in steps of 2**-24, exactly equal on every backend.

    The upper 24 of `bits` as a signed integer, times 2**-24, plus 1/2: all exact in float32.

    Args:
        key, step, shape: as for `bits`.
        dtype: "float32" or "float64"; the default is float64 if that is Keras's `floatx`, else float32.

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
    """Return a boolean tensor, True with `probability`: equals `uniform(key, step, shape) < probability`, at less cost.

    Raises:
        ValueError: `probability` is not from 0 to 1.
    """
    from keras import ops

    if not 0 <= probability <= 1:
        raise ValueError(f"a probability is a number from 0 to 1, got {probability}")
    return ops.right_shift(bits(key, step, shape), 8) < math.ceil(probability * 2**24) - 2**23


def normal(key, step, shape, dtype: str | None = None):
    """Return normal numbers of mean 0 and standard deviation 1, by the inverse distribution function, within 5.42.

    The underlying uniform numbers are the same on every backend. The results differ by the rounding of each backend's
    inverse error function: over all 2**24 of them, float32 deviates from the exact value by at most 1.1e-6 on
    TensorFlow and PyTorch, 2.2e-5 on JAX.

    Args:
        key, step, shape, dtype: as for `uniform`.
    """
    from keras import ops

    # The middle of each step of 2**-24 is symmetric about 1/2 and never 0 or 1; from -1 to 1 it is exact in float32.
    place = 2 * uniform(key, step, shape, dtype) - (1 - 2**-24)
    # TensorFlow's inverse loses the upper tail, because it rounds (1 + place) / 2; all three are accurate below 0.
    return -math.sqrt(2) * ops.sign(place) * ops.erfinv(-ops.abs(place))
