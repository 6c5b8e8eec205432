"""A new head, frozen layers, learning-rate factors, and penalties attached by name."""

import json
from functools import cache

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine, zoo
from kvision.layers import regularizers
from kvision.tasks.classification import Classification
from kvision.training.finetune import freeze, swap_head, unfreeze
from kvision.training.optimizers import LearningRateMultipliers, make_optimizer
from tests.arrays import noise, take_step, values

layers = keras.layers


def small_vgg(classes=4):
    return zoo.build_model("vgg11_bn", (32, 32, 1), classes, convolutions=(1, 1, 1, 1, 1), hidden=3)


def free(model):
    return [layer.name for layer in model.layers if layer.trainable and layer.weights]


VGG = [f"stage{i}_1_{kind}" for i in range(1, 6) for kind in ("conv", "bn")] + [
    "head_1_dense",
    "head_2_dense",
    "logits",
]


# Heads


def test_a_new_head_keeps_everything_before_it():
    model = small_vgg()
    swapped = swap_head(model, 7)
    assert swapped.name == model.name and swapped.output_shape == (None, 7)
    assert [v.path for v in swapped.weights] == [v.path for v in model.weights]
    for new, old in zip(swapped.layers[:-1], model.layers[:-1], strict=True):
        assert new is old
    head, old = swapped.layers[-1], model.layers[-1]
    assert (head.name, head.units, head.dtype_policy) == ("logits", 7, old.dtype_policy)
    assert type(head.kernel_initializer) is type(old.kernel_initializer)
    assert (old.units, model.output_shape) == (4, (None, 4))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("top", "vgg11_bn has no layer 'top' to replace; its last layers are head_2_relu, head_2_dropout, logits"),
        ("head_2_dense", "'head_2_dense' is not the last layer of vgg11_bn: a new head would lose 'logits'"),
    ],
)
def test_a_head_is_the_last_layer(head, message):
    with pytest.raises(ValueError, match=message):
        swap_head(small_vgg(), 7, head)


# Freezing


@pytest.mark.parametrize(
    ("until", "except_", "expected"),
    [
        (None, None, []),
        (None, "logits", ["logits"]),
        (None, r"head_\d_dense|logits", VGG[10:]),
        (None, "head", []),  # the whole name must match
        ("stage4", None, VGG[8:]),
        ("stage1", ".*_bn", VGG[1:]),
        ("logits", None, []),
    ],
)
def test_freeze(until, except_, expected):
    model = small_vgg()
    frozen = freeze(model, until, except_=except_)
    assert free(model) == expected
    assert frozen == [name for name in VGG if name not in expected]


def test_freeze_again_releases_what_comes_later():
    model = small_vgg()
    freeze(model)
    freeze(model, "stage2")
    assert free(model) == VGG[4:]


def test_unfreeze():
    model = zoo.build_model("vgg11_bn", (32, 32, 1), 4, hidden=3)
    freeze(model)
    assert unfreeze(model, "stage5") == ["stage5_1_conv", "stage5_1_bn", "stage5_2_conv", "stage5_2_bn"]
    assert unfreeze(model, "logits|stage1") == ["stage1_1_conv", "stage1_1_bn", "logits"]
    assert len(free(model)) == 7


def test_unfreeze_tells_stage_1_from_stage_10():
    inputs = keras.Input((3,))
    x = layers.Dense(3, name="stage10_dense")(layers.Dense(3, name="stage1_dense")(inputs))
    model = keras.Model(inputs, x)
    freeze(model)
    assert unfreeze(model, "stage1") == ["stage1_dense"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: freeze(m, "stage6"), "has no layer 'stage6'; its stages are stage1, stage2, stage3, stage4, stage5"),
        (lambda m: unfreeze(m, "stage6"), "no layer with weights of vgg11_bn has a name that begins with 'stage6'"),
    ],
)
def test_unknown_layers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_vgg())


def test_frozen_layers_stay_as_they_are():
    """Kernels, and the statistics of batch norms, while the head learns."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, name="stage1_conv")(inputs)
    x = layers.BatchNormalization(name="stage1_bn")(x)
    x = layers.GlobalAveragePooling2D(name="stage1")(x)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x))
    freeze(model, "stage1")
    before, optimizer = values(model), make_optimizer("sgd", 0.5, weight_decay=0.1)
    optimizer.build(model.trainable_variables)
    runner = engine.create(model, Classification(), optimizer)
    take_step(runner, noise(6, 6, 6, 2), np.arange(6, dtype=np.int32) % 3)
    runner.sync_variables()
    for path, now in values(model).items():
        assert (now == before[path]).all() == path.startswith("stage1"), path


# Learning-rate factors


def two_layers(seed=0):
    inputs = keras.Input((4,))
    x = layers.Dense(6, activation="tanh", name="first")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="second")(x))
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(generator.normal(size=tuple(variable.shape)).astype(np.float32))
    return model


def trained(optimizer, steps=4, how="engine"):
    """The values after some steps on the same batches."""
    model = two_layers()
    if how == "keras":
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        step = model.train_on_batch
    else:
        optimizer.build(model.trainable_variables)
        runner = engine.create(model, Classification(), optimizer)
        step = lambda *arrays: take_step(runner, *arrays)  # noqa: E731
    for i in range(steps):
        step(noise(8, 4, seed=i), np.arange(8, dtype=np.int32) % 3)
    if how == "engine":
        runner.sync_variables()
    return values(model)


MAKERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate),
    "nesterov with decay": lambda rate: make_optimizer("sgd", rate, weight_decay=0.1),
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "adamw": lambda rate: make_optimizer("adamw", rate, weight_decay=0.1),
}


@cache
def alone(name, rate, steps):
    """The values after some steps of the optimizer without factors."""
    return trained(MAKERS[name](rate), steps)


@pytest.mark.parametrize("how", ["engine", "keras"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_factor_is_a_scaled_learning_rate(name, how):
    """Several steps with one factor for all, against the optimizer alone with the rate times the factor."""
    found = trained(LearningRateMultipliers(MAKERS[name](0.1), {".*": 0.25}), how=how)
    for path, expected in alone(name, 0.025, 4).items():
        np.testing.assert_allclose(found[path], expected, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("how", ["engine", "keras"])
@pytest.mark.parametrize("name", ["nesterov with decay", "adam"])
def test_each_variable_has_the_factor_of_its_first_match(name, how):
    """After one step each variable stands where its own learning rate would have brought it."""
    factors = {"first/bias": 3.0, "first/.*": 0.25, "second/bias": 0.0}
    found = trained(LearningRateMultipliers(MAKERS[name](0.1), factors), 1, how)
    rates = {"first/kernel": 0.025, "first/bias": 0.3, "second/kernel": 0.1, "second/bias": 0.0}
    start = values(two_layers())
    for path, rate in rates.items():
        expected = alone(name, rate, 1)[path] if rate else start[path]
        np.testing.assert_allclose(found[path], expected, atol=1e-6, err_msg=path)


def test_factors_under_fit():
    """Keras's own loop: two epochs with a schedule, the state of the inner optimizer included."""
    x, labels = noise(12, 4), np.arange(12, dtype=np.int32) % 3

    def fitted(optimizer):
        model = two_layers()
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, labels, batch_size=4, epochs=2, shuffle=False, verbose=0)
        return model

    rate = keras.optimizers.schedules.PiecewiseConstantDecay
    plain = fitted(keras.optimizers.SGD(rate([2], [0.05, 0.005]), momentum=0.9))
    factored = fitted(LearningRateMultipliers(keras.optimizers.SGD(rate([2], [0.1, 0.01]), momentum=0.9), {".*": 0.5}))
    for path, expected in values(plain).items():
        np.testing.assert_allclose(values(factored)[path], expected, atol=2e-6, err_msg=path)
    assert int(ops.convert_to_numpy(factored.optimizer.iterations)) == 6
    assert float(ops.convert_to_numpy(factored.optimizer.learning_rate)) == pytest.approx(0.01)


def test_a_callback_may_set_the_learning_rate():
    optimizer = LearningRateMultipliers(keras.optimizers.SGD(0.1), {".*": 0.5})
    optimizer.learning_rate = 0.2
    assert float(ops.convert_to_numpy(optimizer.inner.learning_rate)) == pytest.approx(0.2)
    optimizer.build(two_layers().trainable_variables)
    assert len(optimizer.variables) == len({id(v) for v in optimizer.variables}) > len(optimizer.inner.variables)


def test_factors_survive_their_configuration():
    optimizer = LearningRateMultipliers(keras.optimizers.Adam(0.1, beta_1=0.8), {"first/.*": 0.25, ".*": 2.0})
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    again = keras.saving.deserialize_keras_object(stored)
    assert type(again) is LearningRateMultipliers and again.get_config() == optimizer.get_config()
    assert list(again.factors) == list(optimizer.factors)  # the first match counts
    first, second = trained(optimizer, 2), trained(again, 2)
    for path in first:
        np.testing.assert_array_equal(first[path], second[path])


def test_a_pattern_without_variables_is_refused():
    optimizer = LearningRateMultipliers(keras.optimizers.SGD(0.1), {"first/.*": 2.0, "first": 3.0})
    with pytest.raises(ValueError, match="no trainable variable matches the learning-rate factor's pattern 'first'"):
        optimizer.build(two_layers().trainable_variables)


# Penalties


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        (None, ["first/kernel", "second/kernel"]),
        ("second/.*", ["second/kernel", "second/bias"]),
        (".*", ["first/kernel", "first/bias", "second/kernel", "second/bias"]),
    ],
)
def test_penalties_by_name(pattern, paths):
    model = two_layers()
    penalty = keras.regularizers.L1L2(0.01, 0.02)
    assert regularizers.add_regularizer(model, penalty, *([pattern] if pattern else [])) == paths
    expected = [0.01 * abs(values(model)[path]).sum() + 0.02 * (values(model)[path] ** 2).sum() for path in paths]
    found = [float(ops.convert_to_numpy(loss)) for loss in model.losses]
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-5)


def test_penalties_leave_frozen_variables_alone():
    model = two_layers()
    freeze(model, "first")
    assert regularizers.add_regularizer(model, keras.regularizers.L2(0.1)) == ["second/kernel"]
    assert len(model.losses) == 1


@pytest.mark.parametrize("pattern", ["kernel", "third/.*"])
def test_a_penalty_without_variables_is_refused(pattern):
    model = two_layers()
    with pytest.raises(ValueError, match=f"matches '{pattern}'; it has first/kernel, first/bias"):
        regularizers.add_regularizer(model, keras.regularizers.L2(0.1), pattern)
