"""Muon against Keras's own, against a loop in NumPy, and on every engine."""

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.data.batches import Batches
from kvision.data.device import DeviceDataset
from kvision.data.preprocessing import Preprocessing
from kvision.layers import conv, logits
from kvision.tasks.classification import Classification
from kvision.training.muon import COEFFICIENTS, Muon, orthogonalize
from kvision.training.schedules import schedule
from kvision.weights.initialization import initialize

GENERATOR = np.random.default_rng(0)
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    engine.configure(request.param)
    yield request.param
    engine.configure("float32")


def numpy_of(variable):
    return np.array(ops.convert_to_numpy(variable.value))


def reference(matrix, steps=5):
    """Newton-Schulz as the formula stands, in double."""
    x = matrix.astype(np.float64) / (np.linalg.norm(matrix) + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def steps_of(optimizer, values, gradients):
    """Variables of these names and values after each of the lists of gradients."""
    variables = [keras.Variable(value, name=name) for name, value in values.items()]
    optimizer.build(variables)
    for each in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient) for gradient in each], variables)
    return [numpy_of(variable) for variable in variables]


def params(shapes, dtype, count=1):
    return [[GENERATOR.standard_normal(shape).astype(dtype) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 3, 7)])
def test_orthogonalize_is_its_formula(shape, dtype):
    matrices = GENERATOR.standard_normal(shape).astype(dtype)
    found = ops.convert_to_numpy(orthogonalize(ops.convert_to_tensor(matrices)))
    expected = np.stack([reference(matrix) for matrix in matrices.reshape(-1, *shape[-2:])]).reshape(shape)
    np.testing.assert_allclose(found, expected, atol=20 * TOLERANCE[dtype])


def test_singular_values_come_near_one():
    matrix = GENERATOR.standard_normal((30, 50)).astype("float32")
    for dtype in (None, "bfloat16"):
        found = orthogonalize(ops.convert_to_tensor(matrix), dtype=dtype)
        assert keras.backend.standardize_dtype(found.dtype) == (dtype or "float32")
        values = np.linalg.svd(ops.convert_to_numpy(ops.cast(found, "float32")), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3


def test_no_gradient_is_no_step():
    assert not ops.convert_to_numpy(orthogonalize(ops.zeros((3, 4)))).any()


@pytest.mark.parametrize("rms_rate", [None, 0.2])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_step_as_keras_muon_does(nesterov, rms_rate, dtype):
    shapes = [(8, 5), (5, 8), (8, 5)]
    values = dict(zip("abc", params(shapes, dtype)[0], strict=True))
    gradients = params(shapes, dtype, count=4)
    rate = schedule("linear", 0.1, 6)
    ours = Muon(rate, 0.9, nesterov, rms_rate=rms_rate, weight_decay=0.01)
    theirs = keras.optimizers.Muon(
        rate, momentum=0.9, nesterov=nesterov, rms_rate=rms_rate, weight_decay=0.01, exclude_embeddings=False
    )
    # Keras's factor of the step is a float32 root on PyTorch.
    tolerance = 100 * TOLERANCE[dtype] if rms_rate is None else 1e-5
    for one, other in zip(steps_of(ours, values, gradients), steps_of(theirs, values, gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


def test_kernels_of_convolutions_step_as_their_matrices(dtype):
    (kernel,), gradients = params([(3, 3, 2, 5)], dtype)[0], params([(3, 3, 2, 5)], dtype, count=3)
    (found,) = steps_of(Muon(0.1), {"kernel": kernel}, gradients)
    matrices = [[gradient.reshape(18, 5) for gradient in each] for each in gradients]
    (expected,) = steps_of(Muon(0.1), {"kernel": kernel.reshape(18, 5)}, matrices)
    np.testing.assert_allclose(found.reshape(18, 5), expected, atol=20 * TOLERANCE[dtype])


def test_a_kernel_is_scaled_before_its_step(dtype):
    (kernel,), gradients = params([(3, 3, 2, 5)], dtype)[0], params([(3, 3, 2, 5)], dtype, count=1)
    (found,) = steps_of(Muon(0.1, normalize=True), {"kernel": kernel}, gradients)
    scaled = kernel * np.sqrt(5) / np.linalg.norm(kernel)
    (expected,) = steps_of(Muon(0.1), {"kernel": scaled.astype(dtype)}, gradients)
    np.testing.assert_allclose(found, expected, atol=20 * TOLERANCE[dtype])


def test_other_variables_step_by_sgd(dtype):
    values = dict(zip(("bias", "head"), params([(5,), (4, 3)], dtype)[0], strict=True))
    gradients = params([(5,), (4, 3)], dtype, count=3)
    optimizer = Muon(0.1, sgd={"bias": schedule("linear", 0.5, 2), "head": (0.25, 0.01)}, sgd_momentum=0.8)
    found = steps_of(optimizer, values, gradients)
    for value, rates, penalty, got, column in zip(
        values.values(), ((0.5, 0.25, 0.0), (0.25, 0.25, 0.25)), (0.0, 0.01), found, (0, 1), strict=True
    ):
        momentum = 0
        for rate, each in zip(rates, gradients, strict=True):
            gradient = each[column] + penalty * value
            momentum = 0.8 * momentum + gradient
            value = value - rate * (gradient + 0.8 * momentum)
        np.testing.assert_allclose(got, value, atol=20 * TOLERANCE[dtype])


def test_every_variable_has_its_step():
    bias, head = keras.Variable(np.zeros(3), name="bias"), keras.Variable(np.zeros((2, 3)), name="head")
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\): give it a learning rate in sgd="):
        Muon().build([bias, head])
    with pytest.raises(ValueError, match="no trainable variable matches 'tail' of sgd= first"):
        Muon(sgd={"bias": 0.1, "tail": 0.1}).build([bias, head])
    with pytest.raises(ValueError, match="at least 1 step of Newton-Schulz"):
        Muon(steps=0)


def test_it_is_read_back():
    optimizer = Muon(schedule("linear", 0.5, 7), sgd={".*": (schedule("linear", 0.1, 7), 0.2)}, dtype="bfloat16")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert again.get_config() == optimizer.get_config()
    assert float(ops.convert_to_numpy(again.sgd[".*"][0](0))) == pytest.approx(0.1)


def network():
    inputs = keras.Input((8, 8, 3))
    x = conv(8, 3, name="first_conv", use_bias=True)(inputs)
    x = conv(8, 3, name="second_conv", use_bias=True)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, logits(10)(x))
    initialize(model, 0)
    return model


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_engine_steps_as_the_optimizer_alone(dtype):
    labels = np.arange(32, dtype=np.int32) % 10
    images = GENERATOR.integers(0, 256, (32, 8, 8, 3), np.uint8)
    batches = Batches(images, labels, 8, 0, Preprocessing((0.5,) * 3, (0.25,) * 3))

    def made():
        model = network()
        optimizer = Muon(schedule("linear", 0.1, 4), dtype=dtype, sgd={".*bias": 0.1, "logits/.*": (0.1, 0.01)})
        optimizer.build(model.trainable_variables)
        return model, optimizer, engine.create(model, Classification(), optimizer)

    model, _, whole = made()
    whole.train_steps(DeviceDataset(batches), np.stack(list(batches.params(0))))
    whole.sync_variables()
    expected, optimizer, alone = made()
    for shown in batches.epoch(0):
        _, gradients = alone.value_and_grad(shown)
        optimizer.apply(gradients, expected.trainable_variables)
    for one, other in zip(model.variables, expected.variables, strict=True):
        np.testing.assert_allclose(numpy_of(one), numpy_of(other), atol=1e-5 if dtype is None else 1e-2)
