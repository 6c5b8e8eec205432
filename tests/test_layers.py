"""Layers and their dtype policies against closed forms and plain NumPy in float64."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from kvision.data.preprocessing import Preprocessing
from kvision.layers import (
    Dirac,
    VarianceScaling,
    activation,
    batch_norm,
    conv,
    dense,
    dropout,
    logits,
    max_pool,
    whitening_kernel,
    whitening_kernel_on_device,
)

SHAPE = (3, 3, 40, 60)
FANS = {"in": 9 * 40, "out": 9 * 60, "average": 9 * 50}


def numbers(seed=0):
    return np.random.default_rng(seed)


def cut_normal_moments(limit=2.0):
    """Return the second and fourth moment of a unit normal truncated at `limit`, by partial integration."""
    density = math.exp(-(limit**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(limit / math.sqrt(2))
    second = 1 - 2 * limit * density / inside
    return second, 3 * second - 2 * limit**3 * density / inside


SECOND, FOURTH = cut_normal_moments()
# Fourth moment over the square of the second; largest value over the deviation.
FORMS = {
    "normal": (3.0, math.inf),
    "uniform": (9 / 5, math.sqrt(3)),
    "truncated": (FOURTH / SECOND**2, 2 / math.sqrt(SECOND)),
}


@pytest.mark.parametrize("distribution", FORMS)
@pytest.mark.parametrize("fan", FANS)
@pytest.mark.parametrize("scale", [1 / 3, 2.0])
def test_initial_values_have_the_moments_of_their_distribution(scale, fan, distribution):
    values = VarianceScaling(scale, fan, distribution).sample(SHAPE, numbers())
    assert (values.shape, values.dtype) == (SHAPE, np.float32)
    variance, (kurtosis, largest) = scale / FANS[fan], FORMS[distribution]
    x = values.astype(np.float64).ravel() / math.sqrt(variance)
    # Four standard errors of each mean of n values; the eighth moment of a normal is 105.
    error = 4 / math.sqrt(x.size)
    assert abs(x.mean()) < error
    assert abs((x**2).mean() - 1) < error * math.sqrt(kurtosis - 1)
    assert abs((x**4).mean() - kurtosis) < error * math.sqrt(105 - 9)
    assert abs(x).max() <= largest * (1 + 1e-6)
    if largest < math.inf:
        assert abs(x).max() > 0.99 * largest


@pytest.mark.parametrize("shape", [(7, 5), (11,), (2, 4, 6)])
def test_fan_of_other_shapes(shape):
    """A uniform sample divided by its limit is the generator's."""
    fan = {1: 11, 2: 7, 3: 2 * 4}[len(shape)]
    values = VarianceScaling(3.0, "in", "uniform").sample(shape, numbers())
    unit = numbers().random(shape, np.float32) * 2 - 1
    np.testing.assert_allclose(values, unit * 3 / math.sqrt(fan), rtol=1e-6)


@pytest.mark.parametrize("options", [{"fan": "both"}, {"distribution": "cauchy"}])
def test_unknown_initializer_options_raise(options):
    with pytest.raises(ValueError, match=r"must be 'in', 'out'|must be 'normal', 'truncated'"):
        VarianceScaling(**options)


@pytest.mark.parametrize("initializer", [VarianceScaling(0.7, "average", "truncated"), Dirac()])
def test_initializers_are_restored_from_their_configuration(initializer):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(initializer))
    assert type(again) is type(initializer)
    shape = (3, 3, 4, 6)
    np.testing.assert_array_equal(again.sample(shape, numbers()), initializer.sample(shape, numbers()))


def test_an_initializer_called_by_keras_uses_numpys_seed():
    first, second = (ops.convert_to_numpy(VarianceScaling()((4, 5))) for _ in range(2))
    np.random.seed(0)
    again = ops.convert_to_numpy(VarianceScaling()((4, 5)))
    assert (first == again).all() and not (first == second).any()


@pytest.mark.parametrize(("kernel_size", "inputs", "outputs"), [(3, 3, 5), (3, 6, 4), (1, 4, 4), (5, 2, 3)])
def test_dirac_kernels_are_the_identity(kernel_size, inputs, outputs):
    x = numbers().normal(size=(2, 7, 6, inputs)).astype(np.float32)
    layer = conv(outputs, kernel_size, name="conv", initializer=Dirac())
    y, both = ops.convert_to_numpy(layer(x)), min(inputs, outputs)
    np.testing.assert_array_equal(y[..., :both], x[..., :both])
    kernel = ops.convert_to_numpy(layer.kernel)[..., both:]
    limit = 1 / math.sqrt(kernel_size**2 * inputs)
    assert (abs(kernel) <= limit).all() and (kernel != 0).all()


def plain_convolution(x, kernel, strides, pad):
    """Return sums over the window, in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    size = len(kernel)
    rows, columns = ((side - size) // strides + 1 for side in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * strides : i * strides + size, j * strides : j * strides + size]
            y[:, i, j] = np.tensordot(window, kernel.astype(np.float64), 3)
    return y


@pytest.mark.parametrize(
    ("kernel_size", "strides", "height", "width", "padding"),
    [
        (3, 1, 6, 7, "same"),
        (3, 2, 8, 8, "same"),
        (3, 2, 7, 9, "same"),
        (3, 3, 8, 7, "same"),
        (5, 2, 8, 7, "same"),
        (7, 2, 8, 9, "same"),
        (1, 2, 8, 7, "same"),
        (1, 1, 4, 4, "same"),
        (3, 2, 8, 7, "valid"),
        (2, 1, 5, 6, "valid"),
    ],
)
def test_convolutions_pad_symmetrically(kernel_size, strides, height, width, padding):
    x = numbers().normal(size=(2, height, width, 3)).astype(np.float32)
    inputs = keras.Input((height, width, 3))
    model = keras.Model(inputs, conv(4, kernel_size, strides, name="conv", padding=padding)(inputs))
    kernel = ops.convert_to_numpy(model.get_layer("conv").kernel)
    expected = plain_convolution(x, kernel, strides, kernel_size // 2 if padding == "same" else 0)
    assert model.output_shape == (None, *expected.shape[1:])
    if padding == "same":
        assert expected.shape[1:3] == (-(-height // strides), -(-width // strides))
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), expected, rtol=1e-5, atol=1e-5)


def test_same_padding_requires_an_odd_window():
    with pytest.raises(ValueError, match=r"middle: symmetric padding needs an odd window, got \(2, 2\)"):
        conv(4, 2, name="middle")


def test_shared_defaults():
    bn = batch_norm(name="bn")
    assert (bn.epsilon, bn.momentum) == (1e-5, 0.9)
    assert not conv(4, 3, name="conv").use_bias and dense(4, name="dense").use_bias
    x = ops.ones((2, 5, 5, 3))
    assert tuple(max_pool(2, name="pool")(x).shape) == (2, 2, 2, 3)  # a window that does not fit is dropped
    assert dropout(0.0, name="none")(x) is x
    assert dropout(0.3, name="some").rate == 0.3
    np.testing.assert_array_equal(ops.convert_to_numpy(activation("relu", name="relu")(ops.array([-1.0, 2]))), [0, 2])


def test_logits_keep_full_precision_under_a_mixed_policy():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert (dense(4, name="dense").compute_dtype, logits(4).compute_dtype) == ("bfloat16", "float32")
    finally:
        keras.config.set_dtype_policy(policy)


def second_moment(images, size):
    """Return the mean outer product of all patches with themselves, patch by patch."""
    n, height, width, channels = images.shape
    total = np.zeros((size * size * channels,) * 2)
    for image in images.astype(np.float64):
        for i in range(height - size + 1):
            for j in range(width - size + 1):
                patch = image[i : i + size, j : j + size].ravel()
                total += np.outer(patch, patch)
    return total / (n * (height - size + 1) * (width - size + 1))


@pytest.fixture
def correlated():
    """Return noise with dependent channels and neighbors, so that its covariance is far from the identity."""
    noise = numbers().normal(size=(40, 7, 6, 3))
    mixed = noise @ np.array([[1.0, 0.5, 0.2], [0, 0.8, 0.3], [0, 0, 0.4]])
    return (mixed[:, 1:] + 0.6 * mixed[:, :-1]).astype(np.float32)


@pytest.mark.parametrize("size", [2, 3])
def test_whitened_patches_are_uncorrelated(correlated, size):
    kernel = whitening_kernel(correlated, size, epsilon=0.01)
    outputs = size * size * 3
    assert (kernel.shape, kernel.dtype) == ((size, size, 3, 2 * outputs), np.float32)
    np.testing.assert_array_equal(kernel[..., outputs:], -kernel[..., :outputs])
    half, moment = kernel[..., :outputs].reshape(outputs, outputs).astype(np.float64), second_moment(correlated, size)
    values = np.linalg.eigvalsh(moment)
    np.testing.assert_allclose(half.T @ moment @ half, np.diag(values / (values + 0.01)), atol=2e-5)
    whole = whitening_kernel(correlated, size, epsilon=0.0)[..., :outputs].reshape(outputs, outputs)
    np.testing.assert_allclose(whole.T @ moment @ whole, np.eye(outputs), atol=2e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_the_whitening_kernel_on_the_device_equals_that_of_numpy(size):
    pixels = numbers().integers(0, 256, (40, 17, 23, 3), np.uint8)
    pixels[:, 1:] = pixels[:, 1:] // 2 + pixels[:, :-1] // 2  # neighbors are alike
    scaling = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    found = whitening_kernel_on_device(ops.convert_to_tensor(pixels), *scaling.constants("float64"), size)
    np.testing.assert_allclose(found, whitening_kernel(scaling(pixels, "float64"), size), rtol=1e-5, atol=1e-6)


def test_patches_without_an_exact_sum_raise():
    with pytest.raises(ValueError, match="patches of 4x300 pixels are too many for an exact sum"):
        whitening_kernel_on_device(ops.zeros((1, 4, 300, 3), "uint8"), np.ones(3), np.zeros(3))


def test_the_sign_of_a_whitening_filter_is_fixed(correlated, monkeypatch):
    kernel = whitening_kernel(correlated)
    half = kernel[..., :12].reshape(12, 12)
    assert (half[abs(half).argmax(axis=0), range(12)] > 0).all()
    # A library that answers with the other signs gives the same kernel.
    signs = np.where(numbers().random(12) < 0.5, -1.0, 1.0)
    assert {-1.0, 1.0} == set(signs)
    solve = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (solve(matrix)[0], solve(matrix)[1] * signs))
    np.testing.assert_array_equal(whitening_kernel(correlated), kernel)
