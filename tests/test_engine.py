"""The engines: one step against NumPy in float64, and every layer they treat their own way against Keras's."""

import os

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.data.preprocessing import Preprocessing
from kvision.engine.fuse import Graph
from kvision.layers import VarianceScaling, activation, batch_norm, conv, logits, max_pool, regularizers
from kvision.tasks.classification import Classification, cross_entropy
from kvision.training.evaluation import predict
from kvision.training.optimizers import make_optimizer
from tests.arrays import batch, judge, noise, take_step, value, values

layers = keras.layers


def fill(model, seed=1):
    """Values of no symmetry, variances positive."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        drawn = generator.normal(size=tuple(variable.shape)) / 3
        variable.assign((abs(drawn) + 0.5 if "variance" in variable.path else drawn).astype(np.float32))
    return model


def build_engine(model, optimizer, loss=None):
    optimizer.build(model.trainable_variables)
    return engine.create(model, Classification(loss or cross_entropy()), optimizer)


def softmax_regression(features=5, classes=3):
    inputs = keras.Input((features,))
    return fill(keras.Model(inputs, logits(classes)(inputs)))


class PlainSoftmax:
    """The same in NumPy: SGD with Nesterov's momentum, and weight decay that acts before each step."""

    def __init__(self, model, rate, momentum, decay):
        self.kernel, self.bias = (value(variable).astype(np.float64) for variable in model.trainable_variables)
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.speeds = [np.zeros_like(self.kernel), np.zeros_like(self.bias)]

    def step(self, x, labels):
        scores = x.astype(np.float64) @ self.kernel + self.bias
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = exponents / exponents.sum(axis=1, keepdims=True)
        loss = -np.log(shares[range(len(x)), labels]).mean()
        error = (shares - np.eye(3)[labels]) / len(x)
        gradients = [x.T.astype(np.float64) @ error, error.sum(axis=0)]
        self.kernel = self.kernel * (1 - self.rate * self.decay)
        for weight, gradient, i in ((self.kernel, gradients[0], 0), (self.bias, gradients[1], 1)):
            self.speeds[i] = self.momentum * self.speeds[i] - self.rate * gradient
            weight += self.momentum * self.speeds[i] - self.rate * gradient
        return loss, int((scores.argmax(axis=1) == labels).sum())


def test_steps_are_those_of_the_closed_form():
    """Loss, count of right answers and weights over four steps, with a `sync_variables` between them."""
    model = softmax_regression()
    runner = build_engine(model, make_optimizer("sgd", 0.5, momentum=0.9, weight_decay=0.1))
    plain = PlainSoftmax(model, 0.5, 0.9, 0.1)
    for step in range(4):
        x, labels = noise(8, 5, seed=step), (np.arange(8, dtype=np.int32) + step) % 3
        loss, correct = take_step(runner, x, labels)
        expected = plain.step(x, labels)
        assert float(loss) == pytest.approx(expected[0], rel=1e-5)
        assert int(correct) == expected[1]
        if step == 1:
            runner.sync_variables()
            np.testing.assert_allclose(value(model.trainable_variables[0]), plain.kernel, atol=1e-6)
    runner.sync_variables()
    np.testing.assert_allclose(value(model.trainable_variables[0]), plain.kernel, atol=1e-6)
    np.testing.assert_allclose(value(model.trainable_variables[1]), plain.bias, atol=1e-6)
    assert int(ops.convert_to_numpy(runner.program.optimizers[0].iterations)) == 4


def test_targets_may_be_soft():
    """Steps on one-hot targets are those on integers; on mixed targets the loss is linear in them."""
    x, labels = noise(6, 5), np.arange(6, dtype=np.int32) % 3
    one_hot = np.eye(3, dtype=np.float32)
    losses = []
    for given in (
        labels,
        one_hot[labels],
        one_hot[::-1][labels],
        0.25 * one_hot[labels] + 0.75 * one_hot[::-1][labels],
    ):
        runner = build_engine(softmax_regression(), make_optimizer("sgd", 0.5))
        loss, correct = take_step(runner, x, given)
        losses.append((float(loss), int(correct)))
    assert losses[0] == pytest.approx(losses[1])
    assert losses[3][0] == pytest.approx(0.25 * losses[1][0] + 0.75 * losses[2][0], rel=1e-5)
    assert losses[3][1] == losses[2][1]


def test_auxiliary_heads_add_three_tenths_of_their_loss():
    inputs = keras.Input((5,))
    heads = [logits(3, name=name)(inputs) for name in ("logits", "aux1_logits", "aux2_logits")]
    model = fill(keras.Model(inputs, heads))
    x, labels = noise(6, 5), np.arange(6, dtype=np.int32) % 3
    outputs = [x @ value(layer.kernel) + value(layer.bias) for layer in model.layers[1:]]
    losses = [np.log(np.exp(y).sum(1)).mean() - y[range(6), labels].mean() for y in outputs]
    runner = build_engine(model, make_optimizer("sgd", 0.5))
    np.testing.assert_allclose(runner.predict(x), outputs[0], rtol=1e-5)
    loss, correct = take_step(runner, x, labels)
    assert float(loss) == pytest.approx(losses[0] + 0.3 * losses[1] + 0.3 * losses[2], rel=1e-5)
    assert int(correct) == (outputs[0].argmax(1) == labels).sum()


def test_predict_sees_the_last_step():
    model = softmax_regression()
    runner, x = build_engine(model, make_optimizer("sgd", 0.5)), noise(8, 5)
    before = runner.predict(x)
    take_step(runner, x, np.zeros(8, np.int32))
    after = runner.predict(x)
    kernel, bias = (value(variable) for variable in model.trainable_variables)
    np.testing.assert_allclose(after, x @ kernel + bias, atol=1e-6)
    assert abs(after - before).max() > 0.01


def test_value_and_grad_is_that_of_the_closed_form_and_updates_nothing():
    model, x, labels = softmax_regression(), noise(6, 5), np.arange(6, dtype=np.int32) % 3
    kernel, bias = (value(variable).astype(np.float64) for variable in model.trainable_variables)
    plain = PlainSoftmax(model, 1.0, 0.0, 0.0)
    expected = plain.step(x, labels)
    loss, gradients = engine.create(model, Classification()).value_and_grad(batch(x, labels))
    assert float(loss) == pytest.approx(expected[0], rel=1e-5)
    for gradient, before, after in zip(gradients, (kernel, bias), (plain.kernel, plain.bias), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(gradient), before - after, atol=1e-6)
    np.testing.assert_array_equal(value(model.trainable_variables[0]), kernel.astype(np.float32))


def test_evaluate_is_inference_and_sees_the_last_step():
    model = normalized()
    runner, x, labels = (
        build_engine(model, keras.optimizers.SGD(0.1)),
        noise(7, 6, 5, 4),
        np.arange(7, dtype=np.int32) % 3,
    )
    take_step(runner, x, labels)
    loss, correct = judge(runner, x, labels)
    scores = runner.predict(x).astype(np.float64)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[range(7), labels]
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)
    assert int(correct) == (scores.argmax(axis=1) == labels).sum()


def test_accumulated_parts_make_the_step_of_the_whole():
    """Without batch norm, whose statistics are each part's own."""
    x, labels = noise(12, 5), np.arange(12, dtype=np.int32) % 3
    steps = []
    for count in (1, 3):
        model = softmax_regression()
        regularizers.add_regularizer(model, keras.regularizers.L1L2(0.02, 0.03))
        optimizer = make_optimizer("sgd", 0.5)
        optimizer.build(model.trainable_variables)
        runner = engine.create(model, Classification(), optimizer, gradient_accumulation_steps=count)
        results = [take_step(runner, x, labels) for _ in range(2)]
        runner.sync_variables()
        steps.append(
            [np.array([float(part) for result in results for part in result]), *map(value, model.trainable_variables)]
        )
    for whole, parts in zip(*steps, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_each_accumulated_part_has_its_own_statistics():
    model = normalized()
    bn, x, labels = model.get_layer("bn"), 2 * noise(8, 6, 5, 4) + 3, np.zeros(8, np.int32)
    mean = value(bn.moving_mean).astype(np.float64)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    runner = engine.create(model, Classification(), optimizer, gradient_accumulation_steps=2)
    take_step(runner, x, labels)
    runner.sync_variables()
    for part in (x[:4], x[4:]):
        mean = 0.9 * mean + 0.1 * part.mean(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(value(bn.moving_mean), mean, rtol=1e-5)
    with pytest.raises(ValueError, match="a batch of 7 cannot be cut into 2 equal parts"):
        take_step(runner, x[:7], labels[:7])


@pytest.mark.parametrize("scale", [2.0**10, 1e38])
def test_a_scaled_loss_makes_the_same_step_or_none(scale):
    """Gradients are scaled back; where they overflow, the step is left out and the scale halved."""
    x, labels = 1000 * noise(6, 5), np.arange(6, dtype=np.int32) % 3
    weights = []
    for optimizer in (keras.optimizers.SGD(0.5), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), scale)):
        model = softmax_regression()
        runner = build_engine(model, optimizer)
        loss, _ = take_step(runner, x, labels)
        runner.sync_variables()
        weights.append(value(model.trainable_variables[0]))
    assert np.isfinite(float(loss))
    if scale > 1e30:
        np.testing.assert_array_equal(weights[1], value(softmax_regression().trainable_variables[0]))
        assert float(value(optimizer.dynamic_scale)) == pytest.approx(scale / 2)
    else:
        np.testing.assert_allclose(weights[1], weights[0], rtol=1e-5)


def test_penalties_are_part_of_the_loss():
    model = softmax_regression()
    x, labels = noise(6, 5), np.arange(6, dtype=np.int32) % 3
    kernel = value(model.trainable_variables[0]).astype(np.float64)
    plain = PlainSoftmax(model, 1.0, 0.0, 0.0)
    loss, _ = plain.step(x, labels)
    regularizers.add_regularizer(model, keras.regularizers.L1L2(0.02, 0.03))
    runner = build_engine(model, keras.optimizers.SGD(1.0))
    penalised, _ = take_step(runner, x, labels)
    runner.sync_variables()
    assert float(penalised) == pytest.approx(loss + 0.02 * abs(kernel).sum() + 0.03 * (kernel**2).sum(), rel=1e-5)
    step = 0.02 * np.sign(kernel) + 0.06 * kernel
    np.testing.assert_allclose(value(model.trainable_variables[0]), plain.kernel - step, atol=1e-6)


BN_OPTIONS = [
    {},
    {"scale": False},
    {"center": False, "epsilon": 1e-3},
    {"momentum": 0.6, "epsilon": 1e-12, "scale": False},
]


def normalized(shape=(6, 5, 4), **options):
    inputs = keras.Input(shape)
    x = batch_norm(name="bn", **options)(inputs)
    x = layers.Flatten(name="flatten")(x)
    return fill(keras.Model(inputs, logits(3)(x)))


@pytest.mark.parametrize("shape", [(6, 5, 4), (4,)], ids=["images", "vectors"])
@pytest.mark.parametrize("options", BN_OPTIONS, ids=str)
def test_running_statistics_of_one_step(options, shape):
    """`momentum` of the old and the rest of the batch's mean and biased variance."""
    model = normalized(shape, **options)
    bn, x = model.get_layer("bn"), 2 * noise(7, *shape) + 3
    mean, variance = value(bn.moving_mean).astype(np.float64), value(bn.moving_variance).astype(np.float64)
    runner = build_engine(model, keras.optimizers.SGD(0.1))
    take_step(runner, x, np.zeros(7, np.int32))
    runner.sync_variables()
    pixels, keep = x.astype(np.float64).reshape(-1, 4), options.get("momentum", 0.9)
    np.testing.assert_allclose(value(bn.moving_mean), keep * mean + (1 - keep) * pixels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(value(bn.moving_variance), keep * variance + (1 - keep) * pixels.var(axis=0), rtol=1e-5)


def test_a_batch_norm_called_twice_moves_twice():
    """By the statistics of its input, then by those output."""
    inputs = keras.Input((6, 5, 4))
    twice = batch_norm(name="bn")
    model = fill(keras.Model(inputs, logits(3)(layers.Flatten(name="flatten")(twice(twice(inputs))))))
    bn, x = model.get_layer("bn"), 2 * noise(7, 6, 5, 4) + 3
    mean, variance = value(bn.moving_mean).astype(np.float64), value(bn.moving_variance).astype(np.float64)
    gamma, beta, pixels = value(bn.gamma), value(bn.beta), x.astype(np.float64).reshape(-1, 4)
    for _ in range(2):
        mean, variance = 0.9 * mean + 0.1 * pixels.mean(axis=0), 0.9 * variance + 0.1 * pixels.var(axis=0)
        pixels = (pixels - pixels.mean(axis=0)) / np.sqrt(pixels.var(axis=0) + 1e-5) * gamma + beta
    runner = build_engine(model, keras.optimizers.SGD(0.1))
    take_step(runner, x, np.zeros(7, np.int32))
    runner.sync_variables()
    np.testing.assert_allclose(value(bn.moving_mean), mean, rtol=1e-5)
    np.testing.assert_allclose(value(bn.moving_variance), variance, rtol=1e-5)


def test_a_frozen_batch_norm_stays_as_it_is():
    """It normalizes with its running statistics in training too, so the loss is that of inference."""
    model = normalized()
    model.get_layer("bn").trainable = False
    before = values(model)
    runner, x, labels = (
        build_engine(model, keras.optimizers.SGD(0.1)),
        noise(7, 6, 5, 4),
        np.arange(7, dtype=np.int32) % 3,
    )
    scores = runner.predict(x).astype(np.float64)
    expected = -(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))[range(7), labels].mean()
    loss, _ = take_step(runner, x, labels)
    runner.sync_variables()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    for path, now in values(model).items():
        assert (now == before[path]).all() == path.startswith("bn/"), path


def mixture():
    """Every layer that a runner replaces, in the forms it must tell apart."""
    inputs = keras.Input((13, 12, 3))
    x = conv(6, 3, name="same_conv", use_bias=True)(inputs)
    x = max_pool(3, 2, name="overlapping_pool")(x)
    x = batch_norm(name="first_bn")(x)
    x = conv(8, 3, 2, name="padded_conv")(activation("relu", name="first_relu")(x))
    x = batch_norm(name="second_bn", scale=False, momentum=0.6)(x)
    y = layers.Conv2D(
        8, 3, strides=2, padding="same", activation="tanh", name="lopsided_conv", kernel_initializer=VarianceScaling()
    )(inputs)
    y = layers.MaxPooling2D(2, padding="same", name="same_pool")(y)
    y = layers.Conv2D(8, 2, padding="same", groups=2, name="even_conv", kernel_initializer=VarianceScaling())(y)
    y = layers.Conv2D(8, 3, padding="same", dilation_rate=2, name="dilated_conv", kernel_initializer=VarianceScaling())(
        y
    )
    y = layers.ZeroPadding2D(((0, 0), (0, 0)), name="nothing")(y)
    y = layers.Resizing(3, 3, interpolation="nearest", name="resize")(y)
    x = layers.Add(name="add")([activation("gelu", name="gelu")(x), y])
    x = activation("tanh", name="tanh")(conv(8, 5, 2, name="wide_conv")(x))
    x = conv(8, 3, name="conv_wider_than_its_map", use_bias=True)(x)
    z = batch_norm(name="residual_bn")(conv(8, 3, name="residual_conv")(x))
    z = layers.DepthwiseConv2D(3, name="depthwise", depthwise_initializer=VarianceScaling())(
        layers.ZeroPadding2D(1, name="depthwise_pad")(activation("relu", name="residual_relu")(z))
    )
    z = layers.ZeroPadding2D(((1, 0), (2, 1)), name="lopsided_pad")(z)
    z = layers.Conv2D(8, (2, 4), name="lopsided_pad_conv", kernel_initializer=VarianceScaling())(z)
    x = layers.ReLU(name="sum_relu")(layers.Add(name="sum")([x, z]))
    y = batch_norm(name="read_twice_bn")(x)
    x = layers.Add(name="three")([activation("relu", name="beside_relu")(y), y, x])
    x = layers.Lambda(lambda both: both[0] * both[1], name="product")([x, y])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = batch_norm(name="vector_bn", center=False)(x)
    return fill(keras.Model(inputs, logits(4)(x)))


def test_what_is_one_operation_is_one_call():
    """Borders go into the convolution behind them, a ReLU into the batch norm or the addition before it."""
    model, lowered = mixture(), []
    graph = Graph(model, lambda layer, pads=None, relu=False: lowered.append((layer.name, pads, relu)) or layer, False)
    joined = [(name, pads, relu) for name, pads, relu in lowered if pads or relu]
    one = ((1, 1), (1, 1))
    assert sorted(joined) == [
        ("depthwise", one, False),
        ("first_bn", None, True),
        ("lopsided_pad_conv", ((1, 0), (2, 1)), False),
        ("padded_conv", one, False),
        ("residual_bn", None, True),
        ("sum", None, True),
        ("wide_conv", ((2, 2), (2, 2)), False),
    ]
    assert len(graph.calls) == len(model.layers) - 1 - len(joined)


def test_tap_shows_every_layer():
    model, x = mixture(), noise(5, 13, 12, 3)
    rows = engine.create(model).layer_outputs(x)
    shown = keras.Model(model.inputs[0], [layer.output for layer in model.layers[1:]])
    expected = dict(zip([layer.name for layer in model.layers[1:]], shown.predict_on_batch(x), strict=True))
    assert {layer.name for layer, _ in rows} == set(expected)
    seen = set()
    for layer, (output,) in rows:
        assert {node.operation.name for node in layer._inbound_nodes[0].parent_nodes} - {"input_layer"} <= seen | {
            model.layers[0].name
        }
        seen.add(layer.name)
        scale = max(1.0, abs(expected[layer.name]).max())
        np.testing.assert_allclose(output, expected[layer.name], atol=1e-5 * scale, err_msg=layer.name)


def test_inference_is_kerass():
    model, x = mixture(), noise(5, 13, 12, 3)
    expected = model.predict_on_batch(x)
    found = engine.create(model).predict(x)
    assert (found.shape, found.dtype) == ((5, 4), np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())


def test_a_training_step_is_kerass():
    """Loss, every weight and every statistic after a step, against `train_on_batch` from the same start."""
    x, labels = noise(18, 13, 12, 3), np.arange(18, dtype=np.int32) % 4
    ours, theirs = mixture(), mixture()
    runner = build_engine(ours, keras.optimizers.SGD(1.0))
    loss, _ = take_step(runner, x, labels)
    runner.sync_variables()
    theirs.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert float(loss) == pytest.approx(float(theirs.train_on_batch(x, labels)), rel=1e-5)
    before, found = values(mixture()), values(ours)
    for path, expected in values(theirs).items():
        step = abs(expected - before[path]).max()
        assert step > 0.01 or path.endswith("bias"), path  # a batch norm takes the bias before it away
        np.testing.assert_allclose(found[path], expected, atol=2e-5 * max(step, 0.05), err_msg=path)


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (6, 3), (2, 500), (1, 1)])
def test_predict_pads_the_last_batch(make_images, count, batch_size):
    inputs = keras.Input((8, 8, 3))
    model = fill(keras.Model(inputs, logits(3)(layers.Flatten()(batch_norm(name="bn")(inputs)))))
    images, preprocessing = make_images(count)[0], Preprocessing(mean=(0.5,), std=(0.2,))
    runner, sizes = engine.create(model), []
    once = runner.predict
    runner.predict = lambda batch: sizes.append(len(batch)) or once(batch)
    found = predict(runner, images, preprocessing, batch_size)
    assert (found.shape, found.dtype) == ((count, 3), np.float32)
    expected = ops.convert_to_numpy(model(preprocessing(images), training=False))
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())
    assert set(sizes) == {min(batch_size, count)}  # one shape is compiled


def test_a_step_is_compiled_once():
    """The loss is called while a step is traced, and a trace is what gets compiled; PyTorch calls it in every step."""
    traces, loss = [], cross_entropy()
    model = softmax_regression()
    runner = build_engine(
        model, make_optimizer("adamw", 0.1, weight_decay=0.1), lambda *both: traces.append(1) or loss(*both)
    )
    for _ in range(3):
        for step in range(2):
            take_step(runner, noise(8, 5, seed=step), np.zeros(8, np.int32))
        runner.sync_variables()
    assert len(traces) == (6 if keras.backend.backend() == "torch" else 1)


def test_a_model_that_is_no_graph():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, activation="relu"), layers.Dense(3)])

    class Wrapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = model

        def call(self, x, training=False):
            return self.inner(x, training=training)

    wrapped, x = Wrapped(), noise(6, 5)
    expected = ops.convert_to_numpy(wrapped(x))
    np.testing.assert_allclose(engine.create(wrapped).predict(x), expected, atol=1e-6)
    runner = build_engine(wrapped, keras.optimizers.SGD(0.1))
    losses = [float(take_step(runner, x, np.arange(6, dtype=np.int32) % 3)[0]) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_a_model_within_a_model():
    inner = keras.Sequential([keras.Input((6, 6, 3)), layers.Flatten()])
    inputs = keras.Input((6, 6, 3))
    x = batch_norm(name="bn")(conv(4, 3, 2, name="conv")(inputs))
    block = keras.Model(inputs, layers.Flatten()(activation("relu", name="relu")(x)), name="block")
    outer = keras.Input((6, 6, 3))
    model = fill(keras.Model(outer, layers.Concatenate()([block(outer), block(0.5 * outer), inner(outer)])))
    x = noise(4, 6, 6, 3)
    expected = model.predict_on_batch(x)
    np.testing.assert_allclose(engine.create(model).predict(x), expected, atol=1e-5 * abs(expected).max())


@pytest.fixture
def computed_in():
    """`computed_in(dtype)` configures the engine; after the test it is as before."""
    yield lambda dtype, **options: engine.configure(dtype, **options)
    engine.configure("float32")


def test_float64_is_double_all_the_way(computed_in):
    """Batch norm, dense layer, loss, gradient and update, against NumPy."""
    computed_in("float64")
    x = np.random.default_rng(0).standard_normal((8, 3, 3, 4)) + 3
    labels = np.arange(8, dtype=np.int32) % 3
    model = normalized((3, 3, 4))
    bn, kernel = model.get_layer("bn"), model.get_layer("logits").kernel
    assert {variable.dtype for variable in model.weights} == {"float64"}
    gamma, beta = value(bn.gamma), value(bn.beta)
    before, bias = value(kernel), value(model.get_layer("logits").bias)
    normal = (x - x.mean(axis=(0, 1, 2))) / np.sqrt(x.var(axis=(0, 1, 2)) + 1e-5)
    features = (normal * gamma + beta).reshape(8, -1)
    scores = features @ before + bias
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    runner = build_engine(model, make_optimizer("sgd", 0.5))
    mean = 0.9 * value(bn.moving_mean) + 0.1 * x.mean(axis=(0, 1, 2))
    variance = 0.9 * value(bn.moving_variance) + 0.1 * x.var(axis=(0, 1, 2))
    loss, _ = take_step(runner, x, labels)
    runner.sync_variables()
    assert float(loss) == pytest.approx(-np.log(shares)[range(8), labels].mean(), rel=1e-13)
    gradient = features.T @ (shares - np.eye(3)[labels]) / 8
    speed = -0.5 * gradient
    np.testing.assert_allclose(value(kernel), before + 0.9 * speed - 0.5 * gradient, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(value(bn.moving_mean), mean, rtol=1e-13)
    np.testing.assert_allclose(value(bn.moving_variance), variance, rtol=1e-13)
    inferred = runner.predict(x)
    normal = (x - mean) / np.sqrt(variance + 1e-5) * value(bn.gamma) + value(bn.beta)
    expected = normal.reshape(8, -1) @ value(kernel) + value(model.get_layer("logits").bias)
    np.testing.assert_allclose(inferred, expected, rtol=1e-11, atol=1e-12)


def test_adam_is_double_all_the_way(computed_in):
    """Two steps in float64 against NumPy (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, section 2, end)."""
    computed_in("float64")
    x, labels = np.random.default_rng(0).standard_normal((8, 5)), np.arange(8, dtype=np.int32) % 3
    model = softmax_regression()
    kernel, bias = (value(variable) for variable in model.trainable_variables)
    runner, first, second = build_engine(model, make_optimizer("adam", 0.5)), 0, 0
    for t in (1, 2):
        shares = np.exp(x @ kernel + bias)
        error = (shares / shares.sum(axis=1, keepdims=True) - np.eye(3)[labels]) / 8
        gradient = np.concatenate([x.T @ error, error.sum(axis=0, keepdims=True)])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = 0.5 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        change = -rate * first / (np.sqrt(second) + 1e-7)
        kernel, bias = kernel + change[:-1], bias + change[-1]
        take_step(runner, x, labels)
    runner.sync_variables()
    found = [value(variable) for variable in model.trainable_variables]
    np.testing.assert_allclose(found[0], kernel, rtol=1e-12)
    np.testing.assert_allclose(found[1], bias, rtol=1e-12)


def test_float64_of_every_layer_is_float32_but_for_rounding(computed_in):
    narrow = engine.create(mixture()).predict(noise(5, 13, 12, 3))
    computed_in("float64")
    wide = engine.create(mixture()).predict(noise(5, 13, 12, 3))
    assert wide.dtype == np.float64
    np.testing.assert_allclose(narrow, wide, atol=1e-5 * abs(wide).max())
    assert abs(narrow - wide).max() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_trains(computed_in, dtype, tolerance):
    """Variables and logits stay float32; the first loss is float32's within the type's rounding, and it falls."""
    x, labels, losses = noise(16, 6, 5, 4), np.arange(16, dtype=np.int32) % 3, []

    def net():
        inputs = keras.Input((6, 5, 4))
        y = activation("relu", name="relu")(batch_norm(name="bn")(conv(8, 3, 2, name="conv")(inputs)))
        y = max_pool(2, name="pool")(conv(8, 3, name="second_conv", use_bias=True)(y))
        return fill(keras.Model(inputs, logits(3)(layers.Flatten()(y))))

    for kind in ("float32", dtype):
        computed_in(kind)
        model = net()
        assert {variable.dtype for variable in model.weights} == {"float32"}
        assert model.get_layer("conv").compute_dtype == kind
        runner = build_engine(model, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**10))
        assert runner.predict(x).dtype == np.float32
        losses.append([float(take_step(runner, x, labels)[0]) for _ in range(20)])
    assert losses[1][0] == pytest.approx(losses[0][0], abs=tolerance)
    assert losses[1][0] != losses[0][0]
    assert losses[1][-1] < 0.7 * losses[1][0]


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, bfloat16, float16, got 'int8'"):
        engine.configure("int8")


@pytest.fixture
def programs(tmp_path):
    """A folder for compiled programs; after the test JAX uses the folder that it used before."""
    before = None
    if keras.backend.backend() == "jax":
        import jax

        before = jax.config.jax_compilation_cache_dir
    yield tmp_path / "programs"
    engine.configure("float32", compile_cache=before)


def test_compiled_programs_are_kept(programs):
    """JAX finds them again: the second engine of the same program writes no other."""
    engine.configure("float32", compile_cache=programs)
    counts = []
    for _ in range(2):
        runner = build_engine(normalized(), keras.optimizers.SGD(0.1))
        take_step(runner, noise(7, 6, 5, 4), np.zeros(7, np.int32))
        counts.append(len(list(programs.glob("*-cache"))))
    assert counts[0] == counts[1]
    assert bool(counts[0]) == (keras.backend.backend() == "jax")


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone keeps its compiled programs")
def test_the_programs_unused_for_longest_are_removed(programs, monkeypatch):
    programs.mkdir()
    for i, name in enumerate(("c-cache", "a-cache", "notes.txt", "b-cache", "d-cache")):
        (programs / name).write_bytes(bytes(100))
        os.utime(programs / name, (1000 - i, 500 if i else 2000))
    monkeypatch.setattr("kvision.engine.jax.CACHE_BYTES", 250)
    engine.configure("float32", compile_cache=programs)
    assert {path.name for path in programs.iterdir()} == {"a-cache", "c-cache", "notes.txt"}


def test_kerass_own_step_is_the_engines():
    x, labels = noise(18, 13, 12, 3), np.arange(18, dtype=np.int32) % 4
    found = []
    for kind in engine.ENGINES:
        model = mixture()
        optimizer = make_optimizer("sgd", 0.1)
        optimizer.build(model.trainable_variables)
        runner = engine.create(model, Classification(label_smoothing=0.1), optimizer, engine=kind)
        step = [float(part) for part in take_step(runner, x, labels)]
        runner.sync_variables()
        score = [float(part) for part in judge(runner, x, labels)]
        found.append(
            [np.array(step), np.array(score), runner.predict(x), value(model.get_layer("first_bn").moving_mean)]
        )
    for ours, kerass in zip(*found, strict=True):
        np.testing.assert_allclose(ours, kerass, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="engine must be one of native, keras, got 'fast'"):
        engine.create(model, engine="fast")
    with pytest.raises(ValueError, match="give its optimizer gradient_accumulation_steps"):
        engine.create(model, gradient_accumulation_steps=2, engine="keras")


def test_floors():
    assert engine.installed(keras.backend.backend()) and not engine.installed("no_backend_of_this_name")
    assert engine.backend_module().__name__ == f"kvision.engine.{keras.backend.backend()}"


def test_another_backend_of_keras_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(RuntimeError, match=r"trains on jax, tensorflow, torch, and KERAS_BACKEND is 'numpy': set it"):
        engine.backend_module()


def test_full_precision_leaves_things_as_they_were():
    """The context of float32 that is float32: on a CPU, where it always is, products are the same within it."""
    x, y = noise(9, 8), noise(8, 7, seed=1)
    product = lambda: ops.convert_to_numpy(ops.matmul(ops.convert_to_tensor(x), ops.convert_to_tensor(y)))  # noqa: E731
    expected = x.astype(np.float64) @ y
    with engine.full_precision():
        np.testing.assert_allclose(product(), expected, rtol=1e-5, atol=1e-6)
    if keras.backend.backend() == "torch":
        import torch

        with pytest.raises(KeyError), engine.full_precision():
            assert not torch.backends.cudnn.allow_tf32
            raise KeyError
        assert torch.backends.cudnn.allow_tf32
