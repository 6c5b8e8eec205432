"""Keras programs trained by the engine and by Keras's own step, from the same weights on the same batches.

After each of five steps the loss, and at the end every variable of the model and of the optimizer, what is predicted
and the loss in inference mode are Keras's: in float64 to 1e-10 where the program computes in it, else to the bound of
its row.
A program that the engine does not take is refused in one line that says what to use instead.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
import pytest
from keras import layers, ops

from kvision import engine
from kvision.tasks.classification import Classification
from kvision.training import trainer
from tests.arrays import judge, take_step, value

BACKEND = keras.backend.backend()
STEPS = 5
N, FEATURES, CLASSES = 8, 6, 3
VECTORS, IMAGES, WORDS = (FEATURES,), (6, 6, 4), (5,)
PENALTY = keras.regularizers.L2(0.3)


@dataclass
class Program:
    """A model's layers from inputs to outputs and how it is trained.

    Attributes:
        layers: from the symbolic input to the output, or a list of outputs.
        model: the class to make the model of, or a function that makes it of nothing.
        bound: how far float32 numbers may be apart, relative to the largest; None computes in float64.
        policy: Keras's dtype policy where it is not float32 or float64.
        warns: what a warning says that must be given.
    """

    layers: Callable | None = None
    shape: tuple = VECTORS
    optimizer: Callable = lambda: keras.optimizers.SGD(0.1, momentum=0.9)
    loss: Callable = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model: Callable = keras.Model
    bound: float | None = None
    policy: str | None = None
    gradient_accumulation_steps: int = 1
    one_hot: bool = False
    warns: str | None = None
    backends: tuple = ("jax", "tensorflow", "torch")
    prepare: Callable = field(default=lambda model: None)

    def build(self):
        keras.utils.clear_session()
        random.seed(0)  # of layers that are given no seed
        if self.layers is None:
            model = self.model()
        else:
            inputs = keras.Input(self.shape, dtype="int32" if self.shape is WORDS else None)
            model = self.model(inputs, self.layers(inputs))
        self.prepare(model)
        generator = np.random.default_rng(1)
        for variable in model.weights:
            drawn = generator.normal(size=tuple(variable.shape)) / 2
            variable.assign(abs(drawn) + 0.5 if "variance" in variable.path or "stddev" in variable.path else drawn)
        return model

    def batches(self):
        generator = np.random.default_rng(2)
        for _ in range(STEPS):
            x = generator.normal(size=(N, *self.shape))
            if self.shape is WORDS:
                x = generator.integers(0, 9, (N, *self.shape))
            labels = generator.integers(0, CLASSES, N).astype(np.int32)
            x = x.astype("int32" if self.shape is WORDS else keras.config.floatx())
            yield x, np.eye(CLASSES, dtype=keras.config.floatx())[labels] if self.one_hot else labels


def net(*stack):
    """Layers one behind the other; what is callable without being a layer is made first."""

    def apply(x):
        for layer in stack:
            x = (layer() if not isinstance(layer, layers.Layer) else layer)(x)
        return x

    return apply


def head(*stack, **options):
    """The same of layers given as functions, with a dense layer for the classes behind them."""
    return net(*stack, lambda: layers.Dense(CLASSES, name="logits", **options))


def image_head(*stack):
    return head(*stack, layers.Flatten)


def conv(filters=4, size=3, **options):
    return lambda: layers.Conv2D(filters, size, **options)


def batch_norm(**options):
    return lambda: layers.BatchNormalization(**options)


def relu():
    return layers.Activation("relu")


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(3 * ops.mean(ops.square(x)))
        self.add_loss(ops.square(x))  # of any shape
        return x


class Unused(layers.Layer):
    """Has a trainable variable that its output does not use."""

    def build(self, shape):
        self.unused = self.add_weight(shape=(2,), name="unused")

    def call(self, x):
        return 2 * x


class DoublesItsLogits(keras.Model):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


class OwnLoss(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 2 * super().compute_loss(x, y, y_pred, sample_weight, training)


class OwnStep(keras.Model):
    def train_step(self, *arguments):
        arguments = list(arguments)
        x, y, *rest = arguments[-1]
        arguments[-1] = (0.5 * x, y, *rest)
        return super().train_step(*arguments)


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.noise = layers.Dense(5, activation="relu"), layers.Dropout(0.5, seed=3)
        self.norm, self.logits = layers.BatchNormalization(), layers.Dense(CLASSES, activity_regularizer=PENALTY)
        self(np.zeros((1, FEATURES)))


class WithTraining(Subclass):
    def call(self, x, training=False):
        return self.logits(self.noise(self.norm(self.hidden(x), training=training), training=training))


class WithoutTraining(Subclass):
    def call(self, x):
        return self.logits(self.noise(self.norm(self.hidden(x))))


def shared(x):
    dense = layers.Dense(FEATURES, activity_regularizer=PENALTY)
    return layers.Dense(CLASSES)(dense(dense(x)))


def pooled_twice(x):
    pool = layers.MaxPooling2D(2, activity_regularizer=PENALTY)
    return head(lambda: layers.Flatten())(layers.Add()([pool(x), pool(2 * x)]))


def nested(kind, **call):
    def apply(x):
        inner = keras.Input(x.shape[1:])
        block = kind(inner, net(batch_norm(), relu, lambda: layers.Dense(FEATURES))(inner))
        return head(relu)(block(x, **call))

    return apply


def sequential():
    stack = [
        layers.Dense(5),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Dropout(0.4, seed=5),
        layers.Dense(CLASSES),
    ]
    return keras.Sequential([keras.Input((FEATURES,)), *stack])


def sequential_within(x):
    inner = keras.Sequential([layers.Dense(5, activation="tanh"), layers.BatchNormalization()])
    return head(relu)(inner(x))


def with_ops(x):
    y = ops.tanh(layers.Dense(FEATURES)(x) * 0.5 + x)
    return layers.Dense(CLASSES)(ops.concatenate([y, ops.relu(x)], axis=-1))


def attention(x):
    x = layers.Reshape((3, 2))(x)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    return head(layers.Flatten)(x)


def masked(x):
    x = layers.Embedding(9, 4, mask_zero=True)(x)
    x = layers.Dense(4, activation="tanh")(x)
    return head(lambda: layers.BatchNormalization(), lambda: layers.GRU(3))(x)


def two_heads(x):
    y = layers.Dense(4, activation="relu")(x)
    return [layers.Dense(CLASSES, name="main")(y), layers.Dense(CLASSES, name="auxiliary")(x)]


def main_and_auxiliary():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return lambda labels, outputs: loss(labels, outputs[0]) + 0.3 * loss(labels, outputs[1])


def words(*stack):
    return head(lambda: layers.Embedding(9, 4), *stack)


def optimizer(name, *arguments, **options):
    return lambda: getattr(keras.optimizers, name)(*arguments, **options)


def loss_scale(inner, scale=2.0**10):
    return lambda: keras.optimizers.LossScaleOptimizer(inner(), initial_scale=scale)


def decay_of_kernels(**options):
    def make():
        made = keras.optimizers.AdamW(0.01, weight_decay=0.1, **options)
        made.exclude_from_weight_decay(var_names=["bias"])
        return made

    return make


def frozen(name):
    def prepare(model):
        model.get_layer(name).trainable = False

    return prepare


def low_rank(model):
    model.get_layer("hidden").enable_lora(2)


def within_rematerialization(x):
    with keras.RematScope(mode="full"):
        return head(conv(), relu, layers.Flatten)(x)


CONV_NET = (conv(use_bias=False), batch_norm(), relu, lambda: layers.MaxPooling2D(2))
MIXED = {"policy": "mixed_bfloat16", "bound": 0.02}
EMA = {"use_ema": True, "ema_momentum": 0.7}

PROGRAMS = {
    # What is added to the loss
    "activity": Program(head(lambda: layers.Dense(5, activity_regularizer=PENALTY))),
    "activity of a convolution": Program(image_head(conv(activity_regularizer=PENALTY), relu), IMAGES),
    "activity of pooling": Program(image_head(lambda: layers.MaxPooling2D(2, activity_regularizer=PENALTY)), IMAGES),
    "activity of pooling, twice": Program(pooled_twice, IMAGES, backends=("tensorflow", "torch")),
    "activity of a border": Program(
        image_head(lambda: layers.ZeroPadding2D(1, activity_regularizer=PENALTY), conv()), IMAGES
    ),
    "activity of a batch norm": Program(image_head(batch_norm(activity_regularizer=PENALTY), relu), IMAGES),
    "activity of a ReLU": Program(
        image_head(batch_norm(), lambda: layers.Activation("relu", activity_regularizer=PENALTY)), IMAGES
    ),
    # On JAX Keras's own step counts the last call's penalty alone.
    "activity of a shared layer": Program(shared, backends=("tensorflow", "torch")),
    "activity layer": Program(head(lambda: layers.ActivityRegularization(0.1, 0.2))),
    "add_loss": Program(head(AddsLoss)),
    "penalties and constraints": Program(
        head(
            lambda: layers.Dense(
                5, kernel_regularizer="l2", bias_regularizer="l1", kernel_constraint=keras.constraints.MaxNorm(1.0)
            )
        )
    ),
    # Layers
    "dense": Program(head(lambda: layers.Dense(5, activation="relu"))),
    "convolution": Program(image_head(*CONV_NET), IMAGES),
    "border and convolution": Program(image_head(lambda: layers.ZeroPadding2D(((1, 0), (2, 1))), conv(size=2)), IMAGES),
    "strides, groups, dilation": Program(
        image_head(
            conv(padding="same", strides=2), conv(groups=2, padding="same"), conv(dilation_rate=2, padding="same")
        ),
        IMAGES,
    ),
    "depthwise and separable": Program(
        image_head(
            lambda: layers.ZeroPadding2D(1),
            lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
            lambda: layers.SeparableConv2D(4, 3),
        ),
        IMAGES,
    ),
    "transposed convolution": Program(image_head(lambda: layers.Conv2DTranspose(3, 3, strides=2)), IMAGES),
    "other poolings": Program(
        image_head(lambda: layers.MaxPooling2D(3, 2, padding="same"), lambda: layers.AveragePooling2D(2)), IMAGES
    ),
    "batch norm with renorm": Program(image_head(batch_norm(renorm=True), relu), IMAGES),
    "batch norm, synchronized": Program(
        image_head(batch_norm(synchronized=True), relu), IMAGES, backends=("tensorflow",), bound=1e-4
    ),
    "batch norm of the first axis": Program(image_head(batch_norm(axis=1), relu), IMAGES),
    "batch norm of sequences": Program(
        head(lambda: layers.Reshape((3, 2)), batch_norm(momentum=0.6), relu, layers.Flatten)
    ),
    "batch norm of vectors": Program(head(batch_norm(scale=False), batch_norm(center=False), relu)),
    "batch norm, frozen": Program(image_head(batch_norm(name="norm"), relu), IMAGES, prepare=frozen("norm")),
    "other norms": Program(
        image_head(lambda: layers.GroupNormalization(2), layers.LayerNormalization, layers.UnitNormalization), IMAGES
    ),
    "spectral norm over time": Program(
        head(
            lambda: layers.Reshape((3, 2)),
            lambda: layers.TimeDistributed(layers.SpectralNormalization(layers.Dense(4))),
            layers.Flatten,
        ),
        bound=1e-4,
    ),
    "attention": Program(attention),
    "operations": Program(with_ops),
    "activations of layers": Program(
        head(layers.PReLU, lambda: layers.LeakyReLU(0.1), lambda: layers.Dense(5, activation=layers.ELU()))
    ),
    "ReLU with a slope behind a batch norm": Program(
        image_head(batch_norm(), lambda: layers.ReLU(1.0, 0.1, 0.2)), IMAGES
    ),
    "dropouts": Program(
        head(
            lambda: layers.Dropout(0.4, seed=3),
            lambda: layers.GaussianDropout(0.3, seed=4),
            lambda: layers.GaussianNoise(0.5, seed=5),
        )
    ),
    "augmenting layers": Program(
        image_head(lambda: layers.Rescaling(0.5), lambda: layers.RandomFlip("horizontal", seed=3)), IMAGES
    ),
    "frozen layer": Program(head(lambda: layers.Dense(5, name="hidden")), prepare=frozen("hidden")),
    "low-rank": Program(head(lambda: layers.Dense(5, name="hidden")), prepare=low_rank),
    "rematerialized": Program(
        within_rematerialization, IMAGES, backends=("jax", "torch")
    ),  # Keras's fails on TensorFlow
    "unused variable": Program(head(Unused), optimizer=optimizer("SGD", 0.1, weight_decay=0.1), warns="unused"),
    "unused variable, accumulated": Program(
        head(Unused), optimizer=optimizer("Adam", 0.01), gradient_accumulation_steps=2, warns="unused"
    ),
    # Words
    "embedding": Program(words(layers.Flatten), WORDS),
    "embedding with Adam": Program(words(layers.Flatten), WORDS, optimizer("Adam", 0.01)),
    "embedding with Adam, accumulated": Program(
        words(layers.Flatten), WORDS, optimizer("Adam", 0.01), gradient_accumulation_steps=2
    ),
    "LSTM": Program(words(lambda: layers.LSTM(4)), WORDS),
    "bidirectional GRU": Program(words(lambda: layers.Bidirectional(layers.GRU(3))), WORDS),
    "masked words": Program(masked, WORDS),
    # Models
    "sequential": Program(model=sequential),
    "sequential within": Program(sequential_within),
    "model within": Program(nested(keras.Model)),
    "model within, called for inference": Program(nested(keras.Model, training=False)),
    "own call": Program(head(layers.BatchNormalization), model=DoublesItsLogits),
    "own call within": Program(nested(DoublesItsLogits)),
    "own compute_loss": Program(
        head(relu), model=OwnLoss, warns="by Keras's own step: its class overrides compute_loss"
    ),
    "own train_step": Program(head(relu), model=OwnStep, warns="by Keras's own step: its class overrides train_step"),
    "subclass": Program(model=WithTraining),
    "subclass without training": Program(model=WithoutTraining),
    "two heads": Program(two_heads, loss=main_and_auxiliary),
    # Losses
    "smoothed one-hot targets": Program(
        head(relu),
        loss=lambda: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        one_hot=True,
    ),
    "focal loss of probabilities": Program(
        head(relu, activation="softmax"), loss=lambda: keras.losses.CategoricalFocalCrossentropy(), one_hot=True
    ),
    "loss summed over the batch": Program(
        head(relu), loss=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    ),
    "squared error of shares": Program(head(relu), loss=lambda: keras.losses.MeanSquaredError(), one_hot=True),
    "hinge": Program(head(relu), loss=lambda: keras.losses.CategoricalHinge(), one_hot=True),
    # Optimizers
    **{
        name: Program(head(relu), optimizer=optimizer(name, 0.01))
        for name in ("Adagrad", "Adafactor", "Adamax", "Ftrl", "Lamb", "Lion", "Nadam", "RMSprop")
    },
    "Adadelta": Program(head(relu), optimizer=optimizer("Adadelta", 1.0)),
    "Nesterov with decay": Program(
        image_head(*CONV_NET), IMAGES, optimizer("SGD", 0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    ),
    "plain SGD with a schedule": Program(
        head(relu), optimizer=lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.7))
    ),
    "decay of kernels": Program(head(relu), optimizer=decay_of_kernels()),
    "Muon with two decays": Program(
        head(relu), optimizer=optimizer("Muon", 0.01, weight_decay=0.3, adam_weight_decay=0.1), bound=1e-4
    ),
    "AMSGrad": Program(head(relu), optimizer=optimizer("Adam", 0.01, amsgrad=True)),
    "clipped by value": Program(head(relu), optimizer=optimizer("SGD", 0.5, clipvalue=0.01)),
    "clipped by length": Program(head(relu), optimizer=optimizer("SGD", 0.5, clipnorm=0.1)),
    "clipped together": Program(head(relu), optimizer=optimizer("SGD", 0.5, momentum=0.9, global_clipnorm=0.1)),
    "Keras's own accumulation": Program(head(relu), optimizer=optimizer("SGD", 0.5, gradient_accumulation_steps=2)),
    "averaged weights": Program(head(relu), optimizer=optimizer("SGD", 0.1, momentum=0.9, **EMA)),
    "averaged weights, overwritten": Program(
        head(relu), optimizer=optimizer("Adam", 0.01, ema_overwrite_frequency=2, **EMA)
    ),
    "scaled loss": Program(head(relu), optimizer=loss_scale(optimizer("SGD", 0.1, momentum=0.9, weight_decay=0.1))),
    "scaled loss, averaged weights": Program(head(relu), optimizer=loss_scale(optimizer("SGD", 0.1, **EMA))),
    "scaled loss that overflows": Program(head(relu), optimizer=loss_scale(optimizer("SGD", 0.1), 1e38), bound=1e-4),
    "accumulated": Program(head(lambda: layers.Dense(5, kernel_regularizer="l2"), relu), gradient_accumulation_steps=4),
    # Policies
    "bfloat16": Program(image_head(*CONV_NET, conv(size=1)), IMAGES, **MIXED),
    "float32 batch norm in bfloat16": Program(image_head(conv(), batch_norm(dtype="float32"), relu), IMAGES, **MIXED),
    "float32 pooling in bfloat16": Program(
        image_head(conv(), lambda: layers.MaxPooling2D(2, dtype="float32")), IMAGES, **MIXED
    ),
    "bfloat16 batch norm": Program(image_head(conv(), batch_norm(dtype="bfloat16"), relu), IMAGES, bound=0.02),
    "bfloat16 layers": Program(
        image_head(
            conv(dtype="mixed_bfloat16"),
            lambda: layers.MaxPooling2D(2, dtype="bfloat16"),
            batch_norm(dtype="mixed_bfloat16"),
        ),
        IMAGES,
        bound=0.02,
    ),
    "bfloat16 sum": Program(
        lambda x: head(layers.Flatten)(layers.Add(dtype="mixed_bfloat16")([x, layers.Conv2D(4, 3, padding="same")(x)])),
        IMAGES,
        bound=0.02,
    ),
}
PROGRAMS = {name: program for name, program in PROGRAMS.items() if BACKEND in program.backends}


@pytest.fixture(autouse=True)
def float32_after():
    yield
    engine.configure("float32")


def by_keras(program):
    """Losses, variables, predictions and the loss in inference mode of Keras's own steps."""
    model = program.build()
    optimizer = program.optimizer()
    # TensorFlow's steps one operation after the other: tracing them takes many times longer than five steps.
    options = {"auto_scale_loss": False, "run_eagerly": BACKEND == "tensorflow"}
    if len(getattr(model, "outputs", None) or []) > 1:  # Keras's `compile` has a loss an output
        weights = dict(zip(model.output_names, (1.0, 0.3), strict=True))
        losses = {name: keras.losses.SparseCategoricalCrossentropy(from_logits=True) for name in weights}
        model.compile(optimizer, losses, loss_weights=weights, **options)
        given = lambda y: dict.fromkeys(weights, y)  # noqa: E731
    else:
        model.compile(optimizer, program.loss(), **options)
        given = lambda y: y  # noqa: E731
    losses = []
    for x, y in program.batches():
        model.reset_metrics()
        losses.append(first(model.train_on_batch(x, given(y))))
    model.reset_metrics()
    score = first(model.test_on_batch(x, given(y)))
    return model, optimizer, losses, main(model.predict_on_batch(x)), score


def by_engine(program):
    """The same of the engine's."""
    model = program.build()
    optimizer = program.optimizer()
    optimizer.build(model.trainable_variables)
    own = engine.create(model, Classification(program.loss()), optimizer, program.gradient_accumulation_steps)
    losses = [float(take_step(own, x, y)[0]) for x, y in program.batches()]
    *_, (x, y) = program.batches()
    score = float(judge(own, x, y)[0])
    predicted = own.predict(x)
    own.sync_variables()
    return model, optimizer, losses, predicted, score


def first(results):
    return float(results[0] if isinstance(results, list | tuple) else results)


def main(outputs):
    return outputs[0] if isinstance(outputs, list | tuple) else outputs


def close(found, expected, bound, name):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(1.0, abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * scale, err_msg=name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_as_kerass_own_step_trains_it(name):
    program = PROGRAMS[name]
    engine.configure("float64" if program.bound is None else "float32")
    if program.policy:
        keras.config.set_dtype_policy(program.policy)
    bound = program.bound or 1e-10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs, their_optimizer, their_losses, their_outputs, their_score = by_keras(program)
        ours, our_optimizer, our_losses, our_outputs, our_score = by_engine(program)
    said = [str(warning.message) for warning in caught]
    if program.warns and not ("unused" in program.warns and BACKEND == "jax"):  # there its gradient is 0
        assert any(program.warns in line for line in said), said
    else:
        assert not any("Keras's own step" in line for line in said), said
    close(our_losses, their_losses, bound, "losses")
    for mine, kerass in zip(ours.variables, theirs.variables, strict=True):
        close(value(mine), value(kerass), bound, mine.path)
    for mine, kerass in zip(our_optimizer.variables, their_optimizer.variables, strict=True):
        close(value(mine), value(kerass), bound, mine.path)
    close(our_outputs, their_outputs, bound, "predictions")
    close(our_score, their_score, bound, "loss in inference mode")
    before = program.build()
    moved = [abs(value(a) - value(b)).max() for a, b in zip(ours.weights, before.weights, strict=True)]
    assert max(moved) > 1e-3 or "overflows" in name, moved


@pytest.mark.parametrize(("layers_of", "shape"), [(shared, VECTORS), (pooled_twice, IMAGES)], ids=["dense", "pooling"])
def test_each_call_of_a_shared_layer_adds_its_penalty(layers_of, shape):
    """On every backend, against `model.losses` of a plain call."""
    program = Program(layers_of, shape, bound=1e-5)
    engine.configure("float32")
    model = program.build()
    x, y = next(program.batches())
    plain = program.loss()(y, model(x))
    loss = sum(float(ops.convert_to_numpy(part)) for part in (plain, *model.losses))
    assert len(model.losses) == 2
    optimizer = program.optimizer()
    optimizer.build(model.trainable_variables)
    found, _ = take_step(engine.create(model, Classification(program.loss()), optimizer), x, y)
    assert float(found) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Muon", "LossScaleOptimizer"])
def test_an_optimizer_stays_as_it_is_given(kind):
    """After a step of the engine it is of the same class and has no method of its own."""
    inner = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
    made = {"LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(inner)}.get(
        kind, lambda: getattr(keras.optimizers, kind)(0.1, weight_decay=0.1)
    )()
    model = Program(head(relu)).build()
    made.build(model.trainable_variables)
    kinds = [type(one) for one in (made, inner)]
    own = engine.create(model, Classification(keras.losses.SparseCategoricalCrossentropy(from_logits=True)), made)
    take_step(own, np.ones((4, FEATURES), np.float32), np.arange(4, dtype=np.int32) % CLASSES)
    own.sync_variables()
    assert kinds == [type(one) for one in (made, inner)]
    patched = {name for one in (made, inner) for name in vars(one) if callable(getattr(type(one), name, None))}
    assert not patched


def two_inputs():
    inputs = [keras.Input((FEATURES,)) for _ in range(2)]
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Add()(inputs)))


def inputs_by_name():
    inputs = keras.Input((FEATURES,), name="image")
    return keras.Model({"image": inputs}, layers.Dense(CLASSES)(inputs))


def outputs_by_name():
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, {"logits": layers.Dense(CLASSES)(inputs)})


class DictionaryOutputs(WithTraining):
    def call(self, x, training=False):
        return {"logits": super().call(x, training)}


REFUSED_MODELS = {
    "several inputs": (two_inputs, "with one input tensor, and .* has a list of 2 inputs. Train it with Keras's own"),
    "inputs by name": (inputs_by_name, "with one input tensor, and .* has a dict of 1 inputs"),
    "outputs by name": (
        outputs_by_name,
        "with a tensor, or a list of tensors, as output, and .* has a dict of 1 outputs",
    ),
    "outputs by name, in a call": (DictionaryOutputs, "returns a tensor, or a list of tensors .* returned a dict"),
    "not built": (lambda: keras.Sequential([layers.Dense(CLASSES)]), "is not built: build it first, by model.build"),
    "no model": (lambda: layers.Dense(CLASSES), "expected a keras.Model, got a Dense"),
}


def first_of_outputs(labels, outputs):
    main = engine.main_output(outputs)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, main)


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_a_model_that_is_not_taken_is_refused_in_a_line(name):
    make, message = REFUSED_MODELS[name]
    model, optimizer = make(), keras.optimizers.SGD(0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        if getattr(model, "built", False):
            optimizer.build(model.trainable_variables)
        own = engine.create(model, Classification(first_of_outputs), optimizer)
        take_step(own, np.ones((4, FEATURES), np.float32), np.zeros(4, np.int32))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.array([True, False] * 4),
            r"expected integer labels \(n,\) or floating targets .*, got bool of shape \(8,\)",
        ),
        (np.zeros((8, 5), np.int32), r"got int32 of shape \(8, 5\). Train it with Keras's own"),
        (np.ones((8, 5, CLASSES), np.float32), r"got float32 of shape \(8, 5, 3\)"),
        (np.ones(8, np.float32), r"got float32 of shape \(8,\)"),
        (np.ones((8, CLASSES), np.float32), r"targets \(n, classes\) must sum to 1 in each row"),
    ],
    ids=["bool", "sequences of classes", "sequences of shares", "numbers", "several classes at once"],
)
def test_targets_that_are_not_taken_are_refused_in_a_line(labels, message):
    model, optimizer = Program(head(relu)).build(), keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    own = engine.create(model, Classification(keras.losses.MeanSquaredError()), optimizer)
    with pytest.raises(ValueError, match=message):
        take_step(own, np.ones((8, FEATURES), np.float32), labels)


def test_a_loss_by_name_is_refused_in_a_line():
    with pytest.raises(TypeError, match=r"expected a loss\(labels, logits\) .*, got 'mse'"):
        Classification("mse")


class Pairs(keras.utils.PyDataset):
    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "sgd"}, r"expected an optimizer such as keras.optimizers.SGD\(0.1\), got 'sgd'"),
        ({"task": "mse"}, r"expected a task such as .*, got 'mse'"),
        ({"batches": Pairs()}, "got Pairs: .* use keras.Model.fit"),
        ({"batches": [(np.zeros((2, FEATURES)), np.zeros(2))]}, "got list: .* use keras.Model.fit"),
    ],
    ids=["optimizer", "loss", "PyDataset", "list"],
)
def test_arguments_of_fit_that_are_not_taken_are_refused_in_a_line(changed, message):
    given = {"task": Classification(), "optimizer": keras.optimizers.SGD(0.1), "batches": None} | changed
    with pytest.raises(TypeError, match=message):
        trainer.fit(Program(head(relu)).build(), *given.values(), epochs=1)
