"""The generator's bits against NumPy's uint32 arithmetic, and its statistics.

The statistics are of fixed numbers, so a test that passes once passes always. Each is a hypothesis test at level
1e-6 or less: what fails it is a fault of the generator, not chance.
"""

import contextlib
import math
from functools import reduce
from operator import xor
from statistics import NormalDist

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.random import bernoulli, bits, key, normal, rng, uniform

LEVEL = 1e-6
WORD = np.uint32
GOLDEN = [[[3852261826, 144276152], [1097323892, 4165379851]], [[940925629, 3801574880], [2694154614, 3220331793]]]
KEY = 1457549385
STREAM = [4, 834, 495, 854]


def lowbias32(x):
    x = np.array(x, WORD)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> WORD(shift)) * WORD(factor)
    return x ^ x >> WORD(16)


def reference_bits(key, step, shape):
    """Return `bits` as uint32."""
    key, step = np.array([key], WORD), np.array([step], WORD)
    a, b = (lowbias32(lowbias32(key ^ WORD(part)) ^ step) for part in (0x9E3779B9, 0x243F6A88))
    places = lowbias32(np.arange(math.prod(shape[1:]), dtype=WORD) ^ a)
    examples = lowbias32(np.arange(shape[0], dtype=WORD) ^ b)
    return lowbias32(examples[:, None] ^ places).reshape(shape)


def reference_uniform(key, step, shape):
    return ((reference_bits(key, step, shape) ^ WORD(2**31)) >> WORD(8)) / 2**24


normal_quantile = np.vectorize(NormalDist().inv_cdf)


def words(key, step, shape):
    array = ops.convert_to_numpy(bits(key, step, shape))
    assert (array.shape, array.dtype) == (shape, np.int32)
    return array.view(WORD)


def bound(tests=1, level=LEVEL):
    """Return the bound of |z| of a unit normal in `tests` tests at probability `level` (Bonferroni)."""
    return NormalDist().inv_cdf(1 - level / tests / 2)


def chi_square(counts):
    """Return the counts' deviation from equal ones as a unit normal (Wilson and Hilferty 1931)."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    assert expected >= 100
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


def byte_scores(words):
    """Chi-square of each of the four bytes."""
    planes = (words.ravel() >> WORD(shift) & WORD(255) for shift in (0, 8, 16, 24))
    return [chi_square(np.bincount(plane, minlength=256)) for plane in planes]


def bit_scores(words):
    """z of each bit's number of ones."""
    ones = np.array([np.count_nonzero(words >> WORD(i) & WORD(1)) for i in range(32)])
    return (ones - words.size / 2) / math.sqrt(words.size / 4)


def test_golden_bits():
    """Frozen, so that runs stay reproducible."""
    assert words(0, 0, (2, 2)).tolist() == GOLDEN[0]
    assert words(key(7, "dropout"), 12345, (2, 2)).tolist() == GOLDEN[1]


@pytest.mark.parametrize(
    ("key", "step"),
    [(0, 0), (1, 2), (2**31 - 1, 2**31 - 1), (2**31, 2**32 - 1), (-1, -5), (3, 2**32 + 9)],
)
def test_bits_equal_unsigned_arithmetic(key, step):
    np.testing.assert_array_equal(words(key, step, (5, 3, 4)), reference_bits(key % 2**32, step % 2**32, (5, 3, 4)))


def test_shapes():
    np.testing.assert_array_equal(words(1, 2, (6,)), reference_bits(1, 2, (6,)))
    np.testing.assert_array_equal(words(1, 2, (2, 60)).ravel(), words(1, 2, (2, 5, 4, 3)).ravel())
    with pytest.raises(ValueError, match=r"at least one axis, got \(\)"):
        bits(1, 2, ())


def test_keys_and_steps_may_be_tensors():
    """Like the state of a SeedGenerator, whose dtype differs by backend."""
    state = keras.random.SeedGenerator(2**31 - 2).next()
    np.testing.assert_array_equal(words(state[0], state[1], (5, 3, 4)), reference_bits(2**31 - 2, 0, (5, 3, 4)))
    for dtype in ("int32", "uint8"):
        pair = ops.convert_to_tensor(np.array([200, 7], dtype))
        np.testing.assert_array_equal(words(pair[0], pair[1], (5, 3, 4)), reference_bits(200, 7, (5, 3, 4)))


class Draws(keras.layers.Layer):
    def call(self, x):
        return ops.stack([uniform(3, 4, ops.shape(x)), ops.cast(bernoulli(3, 4, ops.shape(x), 0.3), "float32")])

    def compute_output_shape(self, input_shape):
        return (2, *input_shape)


@pytest.mark.parametrize("predict", [lambda m, x: engine.create(m).predict(x), lambda m, x: m.predict(x, verbose=0)])
def test_compiled(predict):
    inputs = keras.Input((3, 4))
    numbers, kept = predict(keras.Model(inputs, Draws()(inputs)), np.zeros((5, 3, 4), np.float32))
    want = reference_uniform(3, 4, (5, 3, 4))
    np.testing.assert_array_equal(numbers, want)
    np.testing.assert_array_equal(kept, want < 0.3)


def test_an_example_does_not_depend_on_the_others():
    np.testing.assert_array_equal(words(9, 9, (8, 3, 5))[:4], words(9, 9, (4, 3, 5)))
    for draw in (uniform, normal):
        few, many = (ops.convert_to_numpy(draw(9, 9, (n, 3, 5))) for n in (4, 8))
        np.testing.assert_array_equal(many[:4], few)


@pytest.fixture(scope="module")
def block():
    """2**20 words: 256 examples of 4,096 places."""
    return words(1, 1, (256, 4096))


def test_uniformity(block):
    assert abs(bit_scores(block)).max() < bound(32)
    assert max(map(abs, byte_scores(block))) < bound(4)
    # 2**20 samples of 2**32 words: 128 expected pairs of equals, Poisson. (A permutation of counters would have none.)
    repeats = block.size - np.unique(block).size
    assert abs(repeats - 128) / math.sqrt(128) < bound()


RELATIONS = {
    "keys": lambda block: [block, words(2, 1, block.shape)],
    "steps": lambda block: [block, words(1, 2, block.shape)],
    "key and step": lambda block: [words(1, 2, block.shape), words(2, 1, block.shape)],
    "far keys": lambda block: [block, words(1 + 2**30, 1, block.shape)],
    "far steps": lambda block: [block, words(1, 1 + 2**30, block.shape)],
    "examples": lambda block: [block[0::2], block[1::2]],
    "far examples": lambda block: [block[:128], block[128:]],
    "places": lambda block: [block[:, 0::2], block[:, 1::2]],
    "far places": lambda block: [block[:, :2048], block[:, 2048:]],
    "example and place": lambda block: [block[:, :256], block[:, :256].T],
    # Example and place are combined by an exclusive or, whose four corners cancel; the last hash must hide that.
    "corners": lambda block: [block[i::2, j::2] for i in (0, 1) for j in (0, 1)],
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_independence(relation, block):
    """The exclusive or of related words is uniform, and their values are not correlated."""
    parts = RELATIONS[relation](block)
    if relation == "example and place":
        above = np.triu_indices(256, 1)  # each pair once
        parts = [part[above] for part in parts]
    together = reduce(xor, parts)
    tests = 32 + (4 if together.size >= 25_600 else 0) + 1
    scores = [*bit_scores(together), *byte_scores(together)]
    first, last = (part.ravel() / 2**32 - 0.5 for part in (parts[0], parts[-1]))
    scores.append(12 * (first * last).sum() / math.sqrt(first.size))  # the products' deviation is 1/12
    assert len(scores) == tests
    assert max(map(abs, scores)) < bound(tests)


@pytest.mark.parametrize("axis", [0, 1])
def test_serial_pairs(axis, block):
    """Upper and lower four bits of neighbors: all 256 pairs are equally frequent."""
    rolled = np.moveaxis(block, axis, -1)
    first, second = rolled[..., 0::2].ravel(), rolled[..., 1::2].ravel()
    for shift in (0, 28):
        pairs = (first >> WORD(shift) & WORD(15)) * WORD(16) + (second >> WORD(shift) & WORD(15))
        assert abs(chi_square(np.bincount(pairs, minlength=256))) < bound(4)


@pytest.mark.parametrize("axis", [0, 1])
def test_runs(axis, block):
    """The number of sign changes along places and along examples (Wald and Wolfowitz 1940)."""
    changes = np.count_nonzero(np.diff((block >> WORD(31)).astype(np.int8), axis=axis))
    n = block.size - block.shape[1 - axis]
    assert abs(changes - n / 2) / math.sqrt(n / 4) < bound(2)


@pytest.mark.parametrize("of", ["key", "step", "example", "place"])
def test_avalanche(of, block):
    """Flipping any bit of an input flips each bit of the output in half of the cases."""
    if of in ("key", "step"):
        shape, base = (8, 512), np.array([12345, 678])
        start = words(*map(int, base), shape)
        flipped = []
        for i in range(32):
            other = base ^ (np.array([1, 0] if of == "key" else [0, 1]) << i)
            flipped.append(words(*map(int, other), shape) ^ start)
    else:
        axis = ("example", "place").index(of)
        table = np.moveaxis(block, axis, 0)
        index = np.arange(len(table))
        flipped = []
        for i in range(len(table).bit_length() - 1):
            lower = index[index >> i & 1 == 0]  # each pair once
            flipped.append(table[lower] ^ table[lower ^ (1 << i)])
    scores = np.array([bit_scores(change) for change in flipped])
    assert abs(scores).max() < bound(scores.size)


def test_uniform():
    numbers = ops.convert_to_numpy(uniform(5, 6, (64, 4096)))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, reference_uniform(5, 6, numbers.shape))
    assert 0 <= numbers.min() < 2e-5 and 1 - 2e-5 < numbers.max() < 1
    with pytest.raises(ValueError, match="must be float32 or float64, got float16"):
        uniform(5, 6, (1,), "float16")


@pytest.fixture
def float64():
    """Compute in float64, which JAX must enable separately."""
    switch = contextlib.nullcontext()
    if keras.backend.backend() == "jax":
        import jax

        switch = jax.enable_x64(True)
    keras.config.set_floatx("float64")
    with switch:
        yield
    keras.config.set_floatx("float32")


def test_under_float64(float64):
    numbers, gauss = (ops.convert_to_numpy(draw(5, 6, (4, 9))) for draw in (uniform, normal))
    want = reference_uniform(5, 6, (4, 9))
    assert numbers.dtype == gauss.dtype == np.float64
    np.testing.assert_array_equal(numbers, want)
    np.testing.assert_allclose(gauss, normal_quantile(want + 2**-25), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(ops.convert_to_numpy(bernoulli(5, 6, (4, 9), 0.3)), want < 0.3)


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.3, 0.5, 1 - 2**-24, 1.0, 1])
def test_bernoulli(probability):
    drawn = ops.convert_to_numpy(bernoulli(5, 6, (64, 4096), probability))
    assert drawn.dtype == bool
    np.testing.assert_array_equal(drawn, reference_uniform(5, 6, drawn.shape) < probability)
    deviation = math.sqrt(drawn.size * probability * (1 - probability))
    assert abs(drawn.sum() - drawn.size * probability) <= bound() * deviation


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_probability_is_from_0_to_1(probability):
    with pytest.raises(ValueError, match=f"from 0 to 1, got {probability}"):
        bernoulli(1, 2, (3,), probability)


def test_normal():
    numbers = ops.convert_to_numpy(normal(5, 6, (64, 512)))
    exact = normal_quantile(reference_uniform(5, 6, numbers.shape) + 2**-25)
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers, exact, rtol=0, atol=2.5e-5)
    n = numbers.size
    for moment, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((exact**moment).mean() - mean) < bound(4) * math.sqrt(variance / n)
    edges = normal_quantile(np.arange(1, 64) / 64)
    assert abs(chi_square(np.bincount(np.searchsorted(edges, numbers.ravel()), minlength=64))) < bound()


def test_the_tails_of_the_normal_numbers():
    """A backend's inverse error function fails first at the ends: the words next to 0 and to 1 are included."""
    place = np.array([1, 3, 5, 2**20 + 1, 2**23 - 1], np.float64) / 2**24  # half of it is a distance from 0 or from 1
    exact = normal_quantile(place / 2)
    numbers = ops.convert_to_numpy(math.sqrt(2) * ops.erfinv(ops.convert_to_tensor((place - 1).astype(np.float32))))
    np.testing.assert_allclose(numbers, exact, rtol=0, atol=2.5e-5)


def test_keys():
    assert key(1, "dropout") == KEY
    drawn = {key(seed, purpose, i) for seed in range(10) for purpose in ("a", "b") for i in range(10)}
    assert len(drawn) == 200
    assert 0 <= min(drawn) < 2**26 and 2**31 - 2**26 < max(drawn) < 2**31
    assert key(1, "2") != key(12)
    assert all(isinstance(value, int) for value in drawn)


def test_rng():
    assert rng(1, "order", 2).integers(1000, size=4).tolist() == STREAM
    assert rng(1, "order", 2).random() != rng(1, "order", 3).random()
