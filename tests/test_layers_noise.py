"""Noise layers against their closed forms in NumPy, with numbers from an independent generator."""

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine, layers
from kvision.layers.noise import DropBlock, Dropout, GaussianNoise, ShakeShake, SpatialDropout, StochasticDepth
from kvision.random import key
from kvision.weights.initialization import initialize
from tests.arrays import Objective, noise, take_step, value
from tests.test_random import bound, normal_quantile, reference_uniform

SHAPE = (6, 5, 4, 3)
KEY = 11


def dropout(x, step, rate=0.4):
    return x * (reference_uniform(KEY, step, x.shape) < 1 - rate) / (1 - rate)


def spatial_dropout(x, step, rate=0.4):
    return x * (reference_uniform(KEY, step, (len(x), 1, 1, x.shape[-1])) < 1 - rate) / (1 - rate)


def by_row(x, step, rate=0.4):
    return x * (reference_uniform(KEY, step, (len(x), 1, 1, 1)) < 1 - rate) / (1 - rate)


def by_batch(x, step, rate=0.4):
    return x * (reference_uniform(KEY, step, (1,))[0] < 1 - rate) / (1 - rate)


def drop_block(x, step, rate=0.3, size=2):
    n, height, width, channels = x.shape
    rows, columns = height - size + 1, width - size + 1
    gamma = rate / size**2 * height * width / rows / columns
    mask = np.ones(x.shape)
    for i, row, column, channel in np.argwhere(reference_uniform(KEY, step, (n, rows, columns, channels)) < gamma):
        mask[i, row : row + size, column : column + size, channel] = 0
    kept = mask.sum(axis=(1, 2, 3), keepdims=True)
    return x * mask * height * width * channels / np.maximum(kept, 1)


def gaussian_noise(x, step, stddev=0.7):
    return x + stddev * normal_quantile(reference_uniform(KEY, step, x.shape) + 2**-25)


CASES = {
    "dropout": (lambda **options: Dropout(0.4, **options), dropout),
    "spatial_dropout": (lambda **options: SpatialDropout(0.4, **options), spatial_dropout),
    "stochastic_depth": (lambda **options: StochasticDepth(0.4, **options), by_row),
    "stochastic_depth_batch": (lambda **options: StochasticDepth(0.4, "batch", **options), by_batch),
    "drop_block": (lambda **options: DropBlock(0.3, 2, **options), drop_block),
    "gaussian_noise": (lambda **options: GaussianNoise(0.7, **options), gaussian_noise),
}
MASKS = [name for name in CASES if name != "gaussian_noise"]
NOTHING = {
    "dropout": lambda: Dropout(0),
    "spatial_dropout": lambda: SpatialDropout(0.0),
    "stochastic_depth": lambda: StochasticDepth(0.0),
    "drop_block": lambda: DropBlock(0.0, 2),
    "gaussian_noise": lambda: GaussianNoise(0),
}


def apply(layer, x, training=True):
    return np.asarray(ops.convert_to_numpy(layer(ops.convert_to_tensor(x), training=training)))


@pytest.mark.parametrize("name", CASES)
def test_closed_form(name):
    make, closed = CASES[name]
    layer, x = make(seed=KEY), noise(*SHAPE)
    for step in range(3):
        y = apply(layer, x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, closed(x, step), rtol=1e-6, atol=3e-5 if name == "gaussian_noise" else 1e-6)
    assert value(layer.seed_generator.state).tolist() == [KEY, 3]


@pytest.mark.parametrize("name", CASES)
def test_inference_returns_the_inputs(name):
    layer, x = CASES[name][0](seed=KEY), noise(*SHAPE)
    np.testing.assert_array_equal(apply(layer, x, training=False), x)
    assert value(layer.seed_generator.state).tolist() == [KEY, 0]


@pytest.mark.parametrize("name", NOTHING)
def test_a_zero_rate_returns_the_inputs(name):
    x = noise(*SHAPE)
    np.testing.assert_array_equal(apply(NOTHING[name](), x), x)


@pytest.mark.parametrize("name", CASES)
def test_an_example_does_not_depend_on_the_others(name):
    make, x = CASES[name][0], noise(*SHAPE)
    np.testing.assert_allclose(apply(make(seed=KEY), x)[:4], apply(make(seed=KEY), x[:4]), rtol=1e-6)


@pytest.mark.parametrize("name", ["dropout", "spatial_dropout", "stochastic_depth", "gaussian_noise"])
def test_expectation(name):
    """The mean over independent samples for an input of ones is 1, at level 1e-6."""
    make, _ = CASES[name]
    x = np.ones((4096, 2, 2, 2), np.float32)
    y = apply(make(seed=KEY), x)
    samples = y if name in ("dropout", "gaussian_noise") else y[:, 0, 0] if name == "spatial_dropout" else y[:, 0, 0, 0]
    deviation = 0.7 if name == "gaussian_noise" else np.sqrt(0.4 / 0.6)
    assert abs(samples.mean() - 1) < bound() * deviation / np.sqrt(samples.size)
    assert abs(samples.std() / deviation - 1) < 0.05


def test_drop_block_expectation():
    """Each example keeps its sum, and about `rate` of it is dropped (less where blocks overlap)."""
    y = apply(DropBlock(0.1, 3, seed=KEY), np.ones((64, 12, 12, 4), np.float32))
    np.testing.assert_allclose(y.sum(axis=(1, 2, 3)), 12 * 12 * 4, rtol=1e-5)
    assert 0.08 < (y == 0).mean() < 0.1


def test_a_block_of_one_pixel_and_a_block_of_the_whole_map():
    x = np.ones((8, 3, 3, 2), np.float32)
    single = apply(DropBlock(0.4, 1, seed=KEY), x) == 0
    np.testing.assert_array_equal(single, reference_uniform(KEY, 0, x.shape) < 0.4)
    whole = apply(DropBlock(0.4, 3, seed=KEY), x) == 0
    np.testing.assert_array_equal(whole, np.broadcast_to(reference_uniform(KEY, 0, (8, 1, 1, 2)) < 0.4, x.shape))
    alone = apply(DropBlock(0.9, 3, seed=KEY), x[..., :1])
    assert np.isfinite(alone).all() and (alone[:, 0, 0, 0] == 0).any()


def shares(n, step):
    return reference_uniform(KEY, step, (n, 2))[..., None, None]


def test_shake_shake_forward():
    layer, x, y = ShakeShake(seed=KEY), noise(4, 3, 2, seed=1), noise(4, 3, 2, seed=2)
    pair = [ops.convert_to_tensor(x), ops.convert_to_tensor(y)]
    for step in range(2):
        a = shares(4, step)[:, 0]
        np.testing.assert_allclose(ops.convert_to_numpy(layer(pair, training=True)), a * x + (1 - a) * y, atol=2e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(pair, training=False)), (x + y) / 2, atol=1e-6)
    assert value(layer.seed_generator.state).tolist() == [KEY, 2]


class Given(keras.layers.Layer):
    """Adds a variable of the batch's own shape: its gradient is that of the activations."""

    def build(self, input_shape):
        self.values = self.add_weight(shape=SHAPE, initializer="zeros", name="values")

    def call(self, x):
        return x + self.values

    def compute_output_shape(self, input_shape):
        return input_shape


def trained(outputs, inputs, target, steps=2):
    """Loss and gradients, by SGD's steps of rate 1, of `sum((outputs - target)**2) / 2` in a compiled step.

    (TensorFlow may update a variable before it is read, if the update does not depend on what was read.)
    """
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(model.trainable_variables)
    runner = engine.create(
        model, Objective(lambda _, outputs: ops.sum(ops.square(ops.subtract(outputs, target))) / 2), optimizer
    )
    losses, gradients = [], []
    for _ in range(steps):
        for variable in model.trainable_variables:
            variable.assign(np.zeros(SHAPE, np.float32))
        loss, _ = take_step(runner, noise(*SHAPE), np.zeros((*SHAPE[:-1],), np.int32))
        runner.sync_variables()
        losses.append(float(loss))
        gradients.append([-value(variable) for variable in model.trainable_variables])
    return losses, gradients


@pytest.mark.parametrize("name", CASES)
def test_training_step(name):
    """Compiled where the backend compiles: value and gradient of both steps."""
    make, closed = CASES[name]
    target, inputs = noise(*SHAPE, seed=3), keras.Input(SHAPE[1:])
    losses, gradients = trained(make(seed=KEY)(Given()(inputs)), inputs, target)
    for step in range(2):
        difference = closed(noise(*SHAPE), step) - target
        assert losses[step] == pytest.approx((difference**2).sum() / 2, rel=1e-5)
        mask = closed(np.ones(SHAPE), step) if name in MASKS else 1
        np.testing.assert_allclose(gradients[step][0], mask * difference, atol=1e-4)


def test_shake_shake_training_step():
    """The forward and the backward weight are different numbers."""
    target, inputs = noise(*SHAPE, seed=3), keras.Input(SHAPE[1:])
    pair = [Given()(inputs), Given()(-inputs)]
    losses, gradients = trained(ShakeShake(seed=KEY)(pair), inputs, target)
    for step in range(2):
        a, b = (shares(SHAPE[0], step)[:, i, ..., None] for i in (0, 1))
        difference = (2 * a - 1) * noise(*SHAPE) - target
        assert losses[step] == pytest.approx((difference**2).sum() / 2, rel=1e-5)
        np.testing.assert_allclose(gradients[step][0], b * difference, atol=1e-4)
        np.testing.assert_allclose(gradients[step][1], (1 - b) * difference, atol=1e-4)


@pytest.fixture(scope="module")
def network():
    x = inputs = keras.Input(SHAPE[1:])
    for name, (make, _) in CASES.items():
        x = make(name=name)(x)
    x = ShakeShake(name="shake_shake")([x, inputs])
    x = layers.logits(3)(layers.global_pool()(x))
    return keras.Model(inputs, x)


def test_states(network):
    """They are set by seed and name. Checkpoints contain them; weights files do not."""
    initialize(network, 5)
    states = {layer.name: layer.seed_generator.state for layer in network.layers if hasattr(layer, "seed_generator")}
    assert set(states) == {*CASES, "shake_shake"}
    drawn = [tuple(value(state)) for state in states.values()]
    assert len(set(drawn)) == len(drawn) and all(step == 0 for _, step in drawn)
    assert not {id(variable) for variable in network.weights} & set(map(id, states.values()))
    assert {id(variable) for variable in network.non_trainable_variables} >= set(map(id, states.values()))
    initialize(network, 6)
    assert not {tuple(value(state)) for state in states.values()} & set(drawn)


def test_keras_fit(network):
    """Keras's training loop counts the steps and gets the same numbers."""
    initialize(network, 5)
    network.compile(keras.optimizers.SGD(0.0), "mse")
    images, targets = noise(12, *SHAPE[1:]), np.zeros((12, 3), np.float32)
    fitted = network.fit(images, targets, batch_size=6, epochs=1, shuffle=False, verbose=0).history["loss"][0]
    states = [layer.seed_generator.state for layer in network.layers if hasattr(layer, "seed_generator")]
    assert [int(value(state)[1]) for state in states] == [2] * len(states)
    initialize(network, 5)
    eager = [(ops.convert_to_numpy(network(images[i : i + 6], training=True)) ** 2).mean() for i in (0, 6)]
    assert fitted == pytest.approx(np.mean(eager), rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_mixed_precision(name, dtype):
    make, closed = CASES[name]
    layer, x = make(seed=KEY, dtype=f"mixed_{dtype}"), noise(*SHAPE)
    y = layer(ops.convert_to_tensor(x), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    tolerance = 0.02 if dtype == "bfloat16" else 0.003
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(y, "float32")), closed(x, 0), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shake_shake_in_mixed_precision(dtype):
    x, a = noise(4, 3, 2), shares(4, 0)[:, 0]
    y = ShakeShake(seed=KEY, dtype=f"mixed_{dtype}")(
        [ops.convert_to_tensor(x), ops.convert_to_tensor(-x)], training=True
    )
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(y, "float32")), (2 * a - 1) * x, atol=0.05)


@pytest.mark.parametrize("make", [*(make for make, _ in CASES.values()), ShakeShake])
def test_configuration(make):
    layer = make(seed=KEY, name="noise")
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == f"kvision>{type(layer).__name__}"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer) and again.get_config() == layer.get_config()
    assert value(again.seed_generator.state).tolist() == [KEY, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dropout(1.0, name="drop"), "drop: rate must be a number from 0 to less than 1, got 1.0"),
        (lambda: Dropout(-0.1), "Dropout: rate must be .*, got -0.1"),
        (lambda: StochasticDepth("row"), "StochasticDepth: rate must be .*, got 'row'"),
        (lambda: Dropout(0.5, seed=2**31, name="drop"), r"drop: seed must be an integer from 0 .*, got 2147483648"),
        (lambda: ShakeShake(seed=-1, name="mix"), "mix: seed must be"),
        (lambda: GaussianNoise(0.1, seed=0.5, name="hiss"), "hiss: seed must be .*, got 0.5"),
        (lambda: GaussianNoise(-1, name="hiss"), "hiss: stddev must be a non-negative number, got -1"),
        (lambda: StochasticDepth(0.1, "image", name="depth"), "depth: mode must be 'row' or 'batch', got 'image'"),
        (lambda: DropBlock(0.1, 0, name="block"), "block: block_size must be a positive integer, got 0"),
        (lambda: DropBlock(0.1, 2.0, name="block"), "block: block_size must be a positive integer, got 2.0"),
        (lambda: DropBlock(0.1, 7, name="block")(np.ones((1, 7, 6, 2))), "block: a block of 7x7 .* maps of 7x6; use"),
        (
            lambda: DropBlock(0.1, 7, name="block")(np.ones((1, 7))),
            r"block: DropBlock expects maps .*got shape \(1, 7\)",
        ),
        (
            lambda: ShakeShake(name="mix")(np.ones((2, 3))),
            "mix: shake-shake expects a list of two tensors of one shape",
        ),
        (lambda: ShakeShake(name="mix")([np.ones((2, 3)), np.ones((2, 4))]), "mix: shake-shake expects"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_use_this_dropout():
    layer = layers.dropout(0.3, name="head_dropout")
    assert type(layer) is Dropout and (layer.rate, layer.name) == (0.3, "head_dropout")
    assert value(layer.seed_generator.state).tolist() == [key(0, "head_dropout"), 0]
    x = object()
    assert layers.dropout(0.0, name="head_dropout")(x) is x
