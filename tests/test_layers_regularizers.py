"""Weight penalties, constraints and decay: values and gradients against their closed forms, through a step."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.layers import batch_norm, conv, logits
from kvision.layers.regularizers import (
    KERNELS,
    MaxNorm,
    Orthogonal,
    Sum,
    add_constraint,
    add_regularizer,
    set_weight_decay_mask,
)
from kvision.training.optimizers import make_optimizer
from tests.arrays import Objective, noise, take_step, values

L1L2 = keras.regularizers.L1L2
CONV, DENSE = "stage1_conv/kernel", "logits/kernel"


def network():
    """A wide dense kernel (3, 4) and a tall convolution kernel (9 * 2, 3), far from orthogonal."""
    inputs = keras.Input((4, 4, 2), name="image")
    x = batch_norm(name="stage1_bn")(conv(3, 3, name="stage1_conv", use_bias=True)(inputs))
    model = keras.Model(inputs, logits(4)(keras.layers.GlobalAveragePooling2D(name="pool")(x)), name="net")
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(noise(*variable.shape, seed=i))
    return model


def step(model, optimizer, loss=lambda labels, outputs: 0.0 * ops.sum(outputs)):
    """One step of the engine: the loss, and the weights before and after."""
    optimizer.build(model.trainable_variables)
    runner, before = engine.create(model, Objective(loss), optimizer), values(model)
    found, _ = take_step(runner, noise(5, 4, 4, 2, seed=9), np.zeros(5, np.int32))
    runner.sync_variables()
    return float(found), before, values(model)


def gram(kernel, factor):
    """Return value and gradient of soft orthogonality in float64."""
    matrix = kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
    wide = matrix.shape[0] < matrix.shape[1]
    matrix = matrix.T if wide else matrix
    apart = matrix.T @ matrix - np.eye(matrix.shape[1])
    gradient = 4 * factor * matrix @ apart
    return factor * (apart**2).sum(), (gradient.T if wide else gradient).reshape(kernel.shape)


@pytest.mark.parametrize(
    ("regularizer", "closed"),
    [
        (L1L2(l1=0.01), lambda w: (0.01 * np.abs(w).sum(), 0.01 * np.sign(w))),
        (L1L2(l2=0.02), lambda w: (0.02 * (w**2).sum(), 0.04 * w)),
        (L1L2(0.01, 0.02), lambda w: (0.01 * np.abs(w).sum() + 0.02 * (w**2).sum(), 0.01 * np.sign(w) + 0.04 * w)),
        (Orthogonal(0.001), lambda w: gram(w, 0.001)),
    ],
    ids=["l1", "l2", "elastic_net", "orthogonal"],
)
def test_a_penalty_equals_its_closed_form(regularizer, closed):
    """With a loss of zero, the step is the penalty's gradient alone."""
    model = network()
    assert add_regularizer(model, regularizer) == [CONV, DENSE]
    loss, before, after = step(model, make_optimizer("sgd", 1.0, momentum=0.0))
    expected = {path: closed(before[path]) for path in (CONV, DENSE)}
    assert loss == pytest.approx(sum(penalty for penalty, _ in expected.values()), rel=1e-5)
    for variable in model.trainable_variables:
        gradient = expected[variable.path][1] if variable.path in expected else 0 * before[variable.path]
        np.testing.assert_allclose(
            before[variable.path] - after[variable.path], gradient, rtol=1e-4, atol=1e-5, err_msg=variable.path
        )


def test_the_pattern_selects_variables():
    model = network()
    assert add_regularizer(model, L1L2(l2=0.02), ".*_conv/.*") == [CONV, "stage1_conv/bias"]
    assert [v.path for v in model.trainable_variables if v.regularizer is not None] == [CONV, "stage1_conv/bias"]


def test_a_second_penalty_is_added_to_the_first():
    model = network()
    add_regularizer(model, L1L2(l2=0.02))
    add_regularizer(model, Orthogonal(0.001), CONV)
    kernels = {path: array.astype(np.float64) for path, array in values(model).items() if path in (CONV, DENSE)}
    expected = sum(0.02 * (w**2).sum() for w in kernels.values()) + gram(kernels[CONV], 0.001)[0]
    assert float(ops.convert_to_numpy(sum(model.losses))) == pytest.approx(expected, rel=1e-5)


def test_orthonormal_columns_cost_nothing():
    matrix = np.linalg.qr(noise(18, 18).astype(np.float64))[0].astype(np.float32)
    for kernel in (matrix[:, :3].reshape(3, 3, 2, 3), matrix[:4]):
        assert float(ops.convert_to_numpy(Orthogonal(1.0)(ops.convert_to_tensor(kernel)))) < 1e-10


def test_orthogonality_requires_a_kernel():
    with pytest.raises(ValueError, match=r"needs the columns of a kernel, got a variable of shape \(3,\)"):
        Orthogonal()(ops.ones((3,)))


def bounded(kernel, limit):
    norm = np.sqrt((kernel.astype(np.float64) ** 2).sum(axis=tuple(range(kernel.ndim - 1)), keepdims=True))
    return kernel * np.minimum(1, limit / norm)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_max_norm_holds_after_each_step(kind):
    """The step equals that without a bound, followed by the bound."""
    models = [network(), network()]
    assert add_constraint(models[1], MaxNorm(1.5)) == [CONV, DENSE]
    loss = lambda labels, outputs: ops.sum(ops.square(outputs))  # noqa: E731
    (_, _, free), (_, _, found) = (step(model, make_optimizer(kind, 0.01), loss) for model in models)
    lengths = np.sqrt((free[CONV] ** 2).sum(axis=(0, 1, 2)))
    assert (lengths > 1.5).any()
    for path in free:
        expected = bounded(free[path], 1.5) if path in (CONV, DENSE) else free[path]
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_max_norm_keeps_weights_within_the_bound_exactly():
    kernel = noise(3, 3, 2, 5) * np.array([0.0, 0.01, 0.1, 10, 100], np.float32)
    found = ops.convert_to_numpy(MaxNorm(2.0)(kernel))
    np.testing.assert_array_equal(found[..., :3], kernel[..., :3])
    np.testing.assert_allclose(np.sqrt((found[..., 3:] ** 2).sum(axis=(0, 1, 2))), 2, rtol=1e-6)


def test_a_second_constraint_raises():
    model = network()
    add_constraint(model, MaxNorm(2.0), DENSE)
    with pytest.raises(ValueError, match="logits/kernel already has a constraint: MaxNorm"):
        add_constraint(model, MaxNorm(1.0))
    assert model.get_layer("stage1_conv").kernel.constraint is None
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        MaxNorm(0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_decay_applies_to_matching_variables(kind):
    model = network()
    optimizer = make_optimizer(kind, 0.5, weight_decay=0.1)
    assert set_weight_decay_mask(model, optimizer, "stage1_(conv|bn)/(kernel|gamma)") == [CONV, "stage1_bn/gamma"]
    _, before, after = step(model, optimizer)
    for variable in model.trainable_variables:
        share = 0.95 if variable.path in (CONV, "stage1_bn/gamma") else 1
        np.testing.assert_allclose(after[variable.path], share * before[variable.path], rtol=1e-6, atol=1e-7)


def test_decay_requires_an_optimizer_with_weight_decay():
    with pytest.raises(ValueError, match="has no weight decay: give it weight_decay="):
        set_weight_decay_mask(network(), make_optimizer("sgd", 0.1))


@pytest.mark.parametrize("lay", [add_regularizer, add_constraint])
def test_a_pattern_without_a_match_raises(lay):
    with pytest.raises(ValueError, match="no trainable variable of net matches 'kernel'; it has stage1_conv/kernel"):
        lay(network(), MaxNorm(), "kernel")


@pytest.mark.parametrize("lay", [add_regularizer, add_constraint])
def test_inference_is_unchanged(lay):
    model, images = network(), noise(3, 4, 4, 2)
    before = engine.create(model).predict(images)
    lay(model, {add_regularizer: Orthogonal(), add_constraint: MaxNorm(0.1)}[lay], KERNELS)
    np.testing.assert_array_equal(engine.create(model).predict(images), before)


def test_they_are_restored_from_their_configuration():
    kernel = noise(3, 3, 2, 4)
    for part in (Orthogonal(0.01), Sum(Orthogonal(0.01), L1L2(0.1, 0.2))):
        again = keras.regularizers.get(json.loads(json.dumps(keras.regularizers.serialize(part))))
        found, expected = (float(ops.convert_to_numpy(one(ops.convert_to_tensor(kernel)))) for one in (again, part))
        assert found == expected
    again = keras.constraints.get(json.loads(json.dumps(keras.constraints.serialize(MaxNorm(0.7)))))
    np.testing.assert_array_equal(ops.convert_to_numpy(again(kernel)), ops.convert_to_numpy(MaxNorm(0.7)(kernel)))
