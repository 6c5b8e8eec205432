"""Keras programs trained by `kvision.fit` and by `model.fit`: the same numbers.

From the same weights, on the same data and with the same seeds: all that callbacks see, in its order, the history, and
at the end every variable of the model and of the optimizer are Keras's: in float64 to 1e-10 where the program computes
in it, else to the bound of its row. What the engine does not take is trained by Keras, with a line that says so.
"""

import csv
import importlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
import pytest
from keras import layers, ops

import kvision
from kvision import engine
from kvision.engine.keras_internals import build_compiled
from kvision.tasks.compiled import Compiled
from kvision.training import keras_fit
from tests.arrays import value

BACKEND = keras.backend.backend()
EPOCHS, N, BATCH, FEATURES, CLASSES = 2, 16, 8, 6, 3
VECTORS, IMAGES, WORDS = (FEATURES,), (6, 6, 4), (5,)
PENALTY = keras.regularizers.L2(0.3)
OTHERS = ("tensorflow", "torch")


def labels_of(generator, x):
    return generator.integers(0, CLASSES, len(x)).astype(np.int32)


@dataclass
class Program:
    """A model's layers from inputs to outputs and how it is trained.

    Attributes:
        layers: from the symbolic input to the output, or outputs.
        shape: of an example.
        model: the class to make the model of, or a function that makes it of nothing.
        compiled: further arguments of `model.compile`, made anew for each model.
        targets: y of a generator and x.
        data: x, y and more arguments of `fit` of x and y.
        options: arguments of `fit`.
        callbacks: made anew for each model.
        bound: how far float32 numbers may be apart, relative to the largest; None computes in float64.
        policy: Keras's dtype policy where it is not float32 or float64.
        handed: what the line says by which the program goes to Keras.
        stays: whether the program changes no variable.
    """

    layers: Callable | None = None
    shape: tuple = VECTORS
    optimizer: Callable = lambda: keras.optimizers.SGD(0.1, momentum=0.9)
    loss: Callable | None = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model: Callable = keras.Model
    compiled: Callable = dict
    targets: Callable = labels_of
    data: Callable = lambda x, y: {"x": x, "y": y, "validation_data": (x[:BATCH], y[:BATCH])}
    options: dict = field(default_factory=dict)
    callbacks: Callable = list
    bound: float | None = None
    policy: str | None = None
    handed: str | None = None
    warns: str | None = None
    stays: bool = False
    backends: tuple = ("jax", "tensorflow", "torch")
    prepare: Callable = field(default=lambda model: None)

    def build(self):
        keras.utils.clear_session(free_memory=False)  # a garbage collection takes longer than the steps
        seed(0)  # of layers that are given no seed
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

    def arrays(self):
        generator = np.random.default_rng(2)
        if self.shape is WORDS:
            x = generator.integers(0, 9, (N, *self.shape)).astype(np.int32)
        else:
            x = generator.normal(size=(N, *self.shape)).astype(keras.config.floatx())
        return x, self.targets(generator, x)

    def compile(self, model, **options):
        loss = self.loss() if callable(self.loss) else self.loss
        model.compile(self.optimizer(), auto_scale_loss=False, **{"loss": loss, **options, **self.compiled()})


def seed(number):
    """Every generator that shuffles."""
    random.seed(number)
    np.random.seed(number)
    if BACKEND == "torch":
        importlib.import_module("torch").manual_seed(number)
    if BACKEND == "tensorflow":
        importlib.import_module("tensorflow").random.set_seed(number)


class Recorder(keras.callbacks.Callback):
    """All hooks that are called, and what they are given."""

    HOOKS = tuple(name for name in dir(keras.callbacks.Callback) if name.startswith("on_") and "predict" not in name)

    def __init__(self):
        super().__init__()
        self.rows = []
        for name in self.HOOKS:
            setattr(self, name, lambda *arguments, name=name, **options: self.see(name, *arguments, **options))

    def see(self, name, *arguments, logs=None):
        if arguments and (arguments[-1] is None or isinstance(arguments[-1], dict)):
            *arguments, logs = arguments
        self.rows.append((name, tuple(arguments), dict(logs or {})))


def fitted(program, fit, **options):
    """A program's model, trained by a function `fit(model, ...)`, and how it was before; what callbacks saw, and the
    history."""
    model = program.build()
    before = [value(variable) for variable in model.weights]
    program.compile(model, **options)
    x, y = program.arrays()
    given = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, **program.options, **program.data(x, y)}
    given = {name: argument for name, argument in given.items() if argument is not None}
    recorder = Recorder()
    seed(3)
    history = fit(model, callbacks=[*program.callbacks(), recorder], **given)
    return model, before, recorder.rows, history


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


class OwnMetrics(keras.Model):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "largest": ops.max(y_pred)}


class OwnTestStep(keras.Model):
    def test_step(self, *arguments):
        return super().test_step(*arguments)


class OldComputeLoss(keras.Model):
    """Without the argument that Keras 3.3 has added."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return ops.mean(ops.square(y_pred)) + ops.mean(ops.square(x)) * ops.mean(y_pred)


class OwnTracker(keras.Model):
    """As Keras's guide has it: a loss, and a metric for it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.distance = keras.metrics.Mean(name="distance")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        self.distance.update_state(ops.mean(ops.abs(y_pred)))
        return loss


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


class Counts(layers.Layer):
    """Has a metric."""

    def __init__(self):
        super().__init__()
        self.length = keras.metrics.Mean(name="length")

    def call(self, x):
        self.length.update_state(ops.sqrt(ops.sum(ops.square(x), axis=-1)))
        return x


class Agreement(keras.metrics.Metric):
    def __init__(self):
        super().__init__(name="agreement")
        self.right, self.seen = (self.add_weight(initializer="zeros", name=name) for name in ("right", "seen"))

    def update_state(self, y_true, y_pred, sample_weight=None):
        same = ops.equal(ops.cast(y_true, "int32"), ops.cast(ops.argmax(y_pred, axis=-1), "int32"))
        self.right.assign_add(ops.cast(ops.sum(ops.cast(same, "int32")), self.right.dtype))
        self.seen.assign_add(ops.cast(ops.shape(y_pred)[0], self.seen.dtype))

    def result(self):
        return self.right / self.seen


def spread(y_true, y_pred):
    return ops.max(y_pred, axis=-1) - ops.min(y_pred, axis=-1)


# Models of several inputs and outputs, of vectors; `a` and `b` are made of one array.


def features(name, **options):
    return keras.Input((FEATURES,), name=name, **options)


def joined(first, second):
    return layers.Dense(5, activation="tanh")(layers.Concatenate()([first, second]))


def from_a_list():
    inputs = [features("a"), features("b")]
    return keras.Model(inputs, layers.Dense(CLASSES)(joined(*inputs)))


def from_names():
    inputs = {"a": features("a"), "b": features("b")}
    return keras.Model(inputs, layers.Dense(CLASSES)(joined(inputs["a"], inputs["b"])))


def from_a_nest():
    inputs = {"pair": [features("a"), features("b")], "one": features("c")}
    y = joined(*inputs["pair"])
    return keras.Model(inputs, layers.Dense(CLASSES)(joined(y, inputs["one"])))


def siamese():
    a, b = features("a"), features("b")
    tower = keras.Sequential([layers.Dense(4, activation="tanh"), layers.BatchNormalization()])
    return keras.Model([a, b], layers.Dense(CLASSES)(layers.Subtract()([tower(a), tower(b)])))


def outputs_of(a, kind=list):
    y = layers.Dense(5, activation="tanh")(a)
    heads = {"main": layers.Dense(CLASSES, name="main")(y), "size": layers.Dense(1, name="size")(y)}
    return heads if kind is dict else list(heads.values())


def to_a_list():
    a = features("a")
    return keras.Model(a, outputs_of(a))


def to_names():
    a = features("a")
    return keras.Model(a, outputs_of(a, dict))


def to_one_name():
    a = features("a")
    return keras.Model(a, {"main": layers.Dense(CLASSES, name="main")(a)})


class ToNames(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.main, self.size = layers.Dense(5), layers.Dense(CLASSES), layers.Dense(1)
        self(np.zeros((1, FEATURES)))

    def call(self, x):
        y = ops.tanh(self.hidden(x))
        return {"main": self.main(y), "size": self.size(y)}


def unbuilt():
    return keras.Sequential([layers.Dense(5, kernel_initializer="ones"), layers.Dense(CLASSES, "tanh", False, "ones")])


def two_targets(form):
    """Labels and sizes, in a list or by the names of the outputs, with the arguments of `fit` beside them."""

    def data(x, y):
        size = x.sum(axis=1, keepdims=True)
        both = {"main": y, "size": size} if form is dict else [y, size]
        return {"x": x, "y": both, "validation_data": (x, both)}

    return data


def two_losses(form, weights=(1.0, 0.3), **more):
    def options():
        losses = {"main": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}
        scales = dict(zip(losses, weights, strict=True))
        if form is list:
            losses, scales = list(losses.values()), list(scales.values())
        return {"loss": losses, "loss_weights": scales, **more}

    return options


def states_of(layer, x):
    return head(layers.Concatenate)(layer(layers.Embedding(9, 4)(x)))


def words_in_order(x):
    x = layers.Embedding(9, 4, mask_zero=True)(x)
    return layers.Dense(CLASSES)(layers.LSTM(4, return_sequences=True)(x))


def label_of_each_word(generator, x):
    return generator.integers(0, CLASSES, x.shape).astype(np.int32)


def one_hot(generator, x):
    return np.eye(CLASSES, dtype=keras.config.floatx())[labels_of(generator, x)]


def several(generator, x):
    return generator.integers(0, 2, (len(x), CLASSES)).astype(keras.config.floatx())


def numbers(generator, x):
    return generator.normal(size=(len(x), 1)).astype(keras.config.floatx())


def yes_or_no(generator, x):
    return generator.integers(0, 2, len(x)).astype(bool)


def weighted(y, *trailing):
    return np.random.default_rng(4).uniform(size=(len(y), *trailing)).astype(keras.config.floatx())


class Pairs(keras.utils.PyDataset):
    def __init__(self, *arrays, **options):
        super().__init__(**options)
        self.arrays = arrays

    def __len__(self):
        return N // BATCH

    def __getitem__(self, index):
        return tuple(array[index * BATCH : (index + 1) * BATCH] for array in self.arrays)


def batches(x, y):
    while True:
        for start in range(0, N, BATCH):
            yield x[start : start + BATCH], y[start : start + BATCH]


def tf_data(x, y):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


def data_loader(x, y):
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(torch.as_tensor(x), torch.as_tensor(y))
    return torch.utils.data.DataLoader(pairs, batch_size=BATCH)


def data_frames(x, y):
    pandas = pytest.importorskip("pandas")
    return {"x": pandas.DataFrame(x), "y": pandas.Series(y), "validation_split": 0.25}


def alone(make, **more):
    """The arguments of `fit` for data that comes in batches."""
    return lambda x, y: {"x": make(x, y), "batch_size": None, "shuffle": None, **more}


def metrics(*names, weighted=()):
    return lambda: {"metrics": list(names), "weighted_metrics": list(weighted)}


class StopsAfter(keras.callbacks.Callback):
    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        self.model.stop_training = self.left == 0


class Interferes(keras.callbacks.Callback):
    """Reads and writes weights, rates and metrics in the middle of a run."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            logs["size"] = float(np.abs(self.model.get_weights()[0]).sum())

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / (epoch + 1)

    def on_epoch_end(self, epoch, logs=None):
        x = np.ones((2, FEATURES))
        logs["score"] = self.model.evaluate(x, np.array([0, 1]), verbose=0)
        logs["answer"] = float(self.model.predict(x, verbose=0).sum())
        self.model.set_weights([0.5 * weight for weight in self.model.get_weights()])


CONV_NET = (conv(use_bias=False), batch_norm(), relu, lambda: layers.MaxPooling2D(2))
MIXED = {"policy": "mixed_bfloat16", "bound": 0.02}
EMA = {"use_ema": True, "ema_momentum": 0.7}

PROGRAMS = {
    # What is added to the loss
    "activity": Program(head(lambda: layers.Dense(5, activity_regularizer=PENALTY))),
    "activity of a convolution": Program(image_head(conv(activity_regularizer=PENALTY), relu), IMAGES),
    "activity of pooling": Program(image_head(lambda: layers.MaxPooling2D(2, activity_regularizer=PENALTY)), IMAGES),
    "activity of pooling, twice": Program(pooled_twice, IMAGES, backends=OTHERS),
    "activity of a border": Program(
        image_head(lambda: layers.ZeroPadding2D(1, activity_regularizer=PENALTY), conv()), IMAGES
    ),
    "activity of a batch norm": Program(image_head(batch_norm(activity_regularizer=PENALTY), relu), IMAGES),
    "activity of a ReLU": Program(
        image_head(batch_norm(), lambda: layers.Activation("relu", activity_regularizer=PENALTY)), IMAGES
    ),
    # On JAX Keras's own step counts the last call's penalty alone.
    "activity of a shared layer": Program(shared, backends=OTHERS),
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
    # Words
    "embedding": Program(words(layers.Flatten), WORDS),
    "embedding with Adam": Program(words(layers.Flatten), WORDS, optimizer("Adam", 0.01)),
    "LSTM": Program(words(lambda: layers.LSTM(4)), WORDS),
    "LSTM of all steps, backwards": Program(
        words(lambda: layers.LSTM(4, return_sequences=True, go_backwards=True, use_bias=False), layers.Flatten), WORDS
    ),
    "states of an LSTM": Program(
        lambda x: states_of(layers.LSTM(4, return_state=True, unit_forget_bias=False), x), WORDS
    ),
    "states of a GRU": Program(lambda x: states_of(layers.GRU(4, return_state=True, go_backwards=True), x), WORDS),
    "GRU": Program(words(lambda: layers.GRU(4, return_sequences=True), lambda: layers.GRU(3)), WORDS),
    "GRU of other gates": Program(
        words(
            lambda: layers.GRU(4, reset_after=False, return_sequences=True),
            lambda: layers.GRU(4, use_bias=False, return_sequences=True),
            lambda: layers.GRU(3, recurrent_activation="hard_sigmoid"),
        ),
        WORDS,
    ),
    "LSTM with dropout": Program(words(lambda: layers.LSTM(4, dropout=0.3, recurrent_dropout=0.2, seed=3)), WORDS),
    "bidirectional GRU": Program(words(lambda: layers.Bidirectional(layers.GRU(3))), WORDS),
    "masked words": Program(masked, WORDS),
    # Models
    "sequential": Program(model=sequential),
    "sequential within": Program(sequential_within),
    "model within": Program(nested(keras.Model)),
    "model within, called for inference": Program(nested(keras.Model, training=False)),
    "own call": Program(head(layers.BatchNormalization), model=DoublesItsLogits),
    "own call within": Program(nested(DoublesItsLogits)),
    "own train_step": Program(head(relu), model=OwnStep, handed="its class overrides train_step"),
    "subclass": Program(model=WithTraining),
    "subclass without training": Program(model=WithoutTraining),
    # Losses
    "smoothed one-hot targets": Program(
        head(relu),
        loss=lambda: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        targets=one_hot,
    ),
    "focal loss of probabilities": Program(
        head(relu, activation="softmax"), loss=lambda: keras.losses.CategoricalFocalCrossentropy(), targets=one_hot
    ),
    "loss summed over the batch": Program(
        head(relu), loss=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    ),
    "squared error of shares": Program(head(relu), loss=lambda: keras.losses.MeanSquaredError(), targets=one_hot),
    "hinge": Program(head(relu), loss=lambda: keras.losses.CategoricalHinge(), targets=one_hot),
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
    # The steps that a subclass has
    "own compute_loss": Program(head(relu), model=OwnLoss),
    "own compute_loss of old": Program(
        head(relu), model=OldComputeLoss, handed="its compute_loss has no argument training"
    ),
    "own compute_loss and metric": Program(head(relu), model=OwnTracker),
    "own test_step": Program(head(relu), model=OwnTestStep, handed="its class overrides test_step"),
    "own compute_metrics": Program(head(relu), model=OwnMetrics, handed="its class overrides compute_metrics"),
    "nothing to train": Program(
        head(lambda: layers.Dense(5, name="hidden")),
        prepare=lambda model: setattr(model, "trainable", False),
        handed="no trainable variables",
        stays=True,
    ),
    # Inputs and outputs
    "a list of inputs": Program(model=from_a_list, data=lambda x, y: {"x": [x, 2 * x], "y": y}),
    "inputs by name": Program(model=from_names, data=lambda x, y: {"x": {"b": 2 * x, "a": x}, "y": y}),
    "nested inputs": Program(model=from_a_nest, data=lambda x, y: {"x": {"one": x, "pair": [x, 2 * x]}, "y": y}),
    "one tower for two inputs": Program(model=siamese, data=lambda x, y: {"x": (x, 2 * x), "y": y}, backends=OTHERS),
    "a list of outputs": Program(model=to_a_list, data=two_targets(list), loss=None, compiled=two_losses(list)),
    "a list of outputs, losses by name": Program(
        model=to_a_list, data=two_targets(dict), loss=None, compiled=two_losses(dict)
    ),
    "outputs by name": Program(
        model=to_names,
        data=two_targets(dict),
        loss=None,
        compiled=two_losses(dict, metrics={"main": ["accuracy"], "size": ["mae", "mse"]}),
    ),
    "metrics of a list of outputs": Program(
        model=to_a_list,
        data=two_targets(list),
        loss=None,
        compiled=two_losses(list, metrics=[["acc"], ["mae"]], weighted_metrics=[[], ["mse"]]),
    ),
    "weights for each output": Program(
        model=to_names,
        data=lambda x, y: two_targets(dict)(x, y) | {"sample_weight": {"main": weighted(y), "size": weighted(y)[::-1]}},
        loss=None,
        compiled=two_losses(dict, weighted_metrics={"main": ["accuracy"], "size": ["mae"]}),
    ),
    "an output without a loss": Program(
        model=to_a_list,
        loss=None,
        compiled=lambda: {"loss": [keras.losses.SparseCategoricalCrossentropy(from_logits=True), None]},
    ),
    "one output by name": Program(
        model=to_one_name,
        data=lambda x, y: {"x": x, "y": {"main": y}},
        loss=None,
        compiled=lambda: {"loss": {"main": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}},
    ),
    "outputs of a subclass by name": Program(
        model=ToNames, data=two_targets(dict), loss=None, compiled=two_losses(dict)
    ),
    "one loss for all outputs": Program(two_heads, data=lambda x, y: {"x": x, "y": [y, y]}),
    "not built": Program(model=unbuilt),
    # Targets, and losses by name
    "several labels at once": Program(
        head(relu), loss=lambda: keras.losses.BinaryCrossentropy(from_logits=True), targets=several
    ),
    "yes or no": Program(
        net(relu, lambda: layers.Dense(1, "sigmoid")), loss=lambda: "binary_crossentropy", targets=yes_or_no
    ),
    "a label for each word": Program(words(), WORDS, targets=label_of_each_word),
    "numbers": Program(
        net(lambda: layers.Dense(4, "tanh"), lambda: layers.Dense(1)), loss=lambda: "mse", targets=numbers
    ),
    **{
        name: Program(net(lambda: layers.Dense(1, "softplus")), loss=lambda name=name: name, targets=several)
        for name in ("mae", "msle", "poisson", "log_cosh", "huber")
    },
    "crossentropy": Program(head(relu, activation="softmax"), loss=lambda: "crossentropy"),
    "a function": Program(head(relu), loss=lambda: lambda y, z: ops.mean(z, axis=-1) * ops.cast(y, z.dtype)),
    "no loss but add_loss": Program(head(lambda: layers.Dense(5), AddsLoss), loss=None, data=lambda x, y: {"x": x}),
    "masked words in order": Program(words_in_order, WORDS, targets=label_of_each_word, compiled=metrics("accuracy")),
    # Weights of examples
    "sample weights": Program(
        head(relu),
        data=lambda x, y: {"x": x, "y": y, "sample_weight": weighted(y), "validation_data": (x, y, weighted(y))},
        compiled=metrics("accuracy", weighted=["accuracy"]),
    ),
    "weights of words": Program(
        words_in_order,
        WORDS,
        targets=label_of_each_word,
        data=lambda x, y: {"x": x, "y": y, "sample_weight": weighted(y, 5)},
        compiled=metrics(weighted=["accuracy"]),
    ),
    "class weights": Program(
        head(relu), options={"class_weight": {0: 1.0, 1: 3.0, 2: 0.2}}, compiled=metrics(weighted=["accuracy"])
    ),
    # Metrics
    "accuracy": Program(head(relu), compiled=metrics("accuracy")),
    "metrics of labels": Program(head(relu), compiled=metrics(spread, "sparse_categorical_crossentropy")),
    "metrics of shares": Program(
        head(relu, activation="softmax"),
        loss=lambda: "categorical_crossentropy",
        targets=one_hot,
        compiled=lambda: {
            "metrics": ["acc", keras.metrics.AUC(20), keras.metrics.F1Score(), keras.metrics.Precision()]
        },
    ),
    "own metric": Program(head(relu), compiled=lambda: {"metrics": [Agreement()]}),
    # On JAX Keras 3.15.1 itself raises a TypeError: its `fit` cannot update a layer's metric there.
    "metric of a layer": Program(head(Counts, relu), compiled=metrics("accuracy"), backends=("tensorflow", "torch")),
    # Data
    "shuffled": Program(head(relu), options={"epochs": 3}),
    "in order": Program(head(relu), options={"shuffle": False}),
    "shuffled within batches": Program(head(relu), options={"shuffle": "batch"}),
    "a smaller last batch": Program(
        image_head(*CONV_NET), IMAGES, options={"batch_size": 6}, compiled=metrics("accuracy")
    ),
    "lists": Program(head(relu), data=lambda x, y: {"x": [x], "y": [y]}),
    "data frames": Program(head(relu), data=data_frames),
    "PyDataset": Program(head(relu), data=alone(Pairs, shuffle=True)),
    "PyDataset of three, in threads": Program(
        head(relu), data=lambda x, y: alone(lambda *xy: Pairs(*xy, weighted(y), workers=2))(x, y)
    ),
    "PyDataset and class weights": Program(head(relu), data=alone(Pairs, class_weight={0: 1.0, 1: 3.0, 2: 0.2})),
    "tf.data": Program(head(relu), data=alone(tf_data)),
    "DataLoader": Program(head(relu), data=alone(data_loader)),
    "generator": Program(head(relu), data=alone(batches, steps_per_epoch=2)),
    "generator for validation": Program(
        head(relu),
        data=lambda x, y: {"x": batches(x, y), "steps_per_epoch": 1, "validation_data": batches(y=y, x=2 * x)},
        options={"validation_steps": 2, "shuffle": None, "batch_size": None},
    ),
    "validation split": Program(head(relu), data=lambda x, y: {"x": x, "y": y}, options={"validation_split": 0.5}),
    "validation of every second epoch": Program(head(relu), options={"validation_freq": 2}),
    "validation after an epoch": Program(head(relu), options={"validation_freq": [1], "validation_batch_size": 3}),
    "steps of an epoch": Program(head(relu), options={"steps_per_epoch": 1, "epochs": 3}),
    "a later start": Program(head(relu), options={"initial_epoch": 1, "epochs": 3}),
    "two steps at once": Program(
        head(relu), compiled=lambda: {"steps_per_execution": 2}, backends=("jax", "tensorflow")
    ),
    "step by step": Program(image_head(*CONV_NET), IMAGES, compiled=lambda: {"run_eagerly": True}),
    # Callbacks
    "early stopping": Program(
        head(relu),
        optimizer=lambda: keras.optimizers.SGD(5.0),
        options={"epochs": 5},
        callbacks=lambda: [keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)],
    ),
    "a rate by plateaus": Program(
        head(relu),
        optimizer=lambda: keras.optimizers.SGD(2.0),
        options={"epochs": 4},
        callbacks=lambda: [keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.1)],
    ),
    "a rate by epochs": Program(
        head(relu), callbacks=lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (epoch + 2))]
    ),
    "stopped within an epoch": Program(head(relu), options={"epochs": 3}, callbacks=lambda: [StopsAfter(3)]),
    "a callback that interferes": Program(head(batch_norm(), relu), callbacks=lambda: [Interferes()]),
    "averages at the end": Program(
        head(relu),
        optimizer=optimizer("Adam", 0.05, **EMA),
        callbacks=lambda: [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
    ),
}
PROGRAMS = {name: program for name, program in PROGRAMS.items() if BACKEND in program.backends}


# A step takes far longer to compile than to run. Keras's own runs operation by operation, and so do three programs of
# four of kvision's.
EAGERLY = {} if BACKEND == "torch" else {"run_eagerly": True}
COMPILED = list(PROGRAMS)[::4]


@pytest.fixture(autouse=True)
def float32_after():
    yield
    engine.configure("float32")


def close(found, expected, bound, name):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(1.0, abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * scale, err_msg=name)


def close_logs(found, expected, bound, name):
    assert list(found) == list(expected), name
    for key in expected:
        close(found[key], expected[key], bound, f"{name}: {key}")


def state(model):
    return [*model.variables, *model.optimizer.variables]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_as_model_fit_trains_it(name):
    program = PROGRAMS[name]
    engine.configure("float64" if program.bound is None else "float32")
    if program.policy:
        keras.config.set_dtype_policy(program.policy)
    bound = program.bound or 1e-10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs, _, their_rows, their_history = fitted(program, lambda model, **given: model.fit(**given), **EAGERLY)
        lines = [str(warning.message) for warning in caught]
        caught.clear()
        ours, before, our_rows, our_history = fitted(program, kvision.fit, **({} if name in COMPILED else EAGERLY))
    handed = [str(warning.message) for warning in caught if warning.category is engine.HandedToKeras]
    if program.handed:
        assert len(handed) == 1 and "is trained by model.fit" in handed[0] and program.handed in handed[0]
    else:
        assert not handed
    if program.warns:
        assert any(program.warns in line for line in lines) == any(
            program.warns in str(line.message) for line in caught
        )
    assert [row[:2] for row in our_rows] == [row[:2] for row in their_rows]
    for (hook, place, found), (*_, expected) in zip(our_rows, their_rows, strict=True):
        close_logs(found, expected, bound, f"{hook}{place}")
    assert type(our_history) is keras.callbacks.History
    assert our_history.epoch == their_history.epoch and our_history.params == their_history.params
    close_logs(our_history.history, their_history.history, bound, "history")
    for mine, kerass in zip(state(ours), state(theirs), strict=True):
        close(value(mine), value(kerass), bound, mine.path)
    assert {"train_step", "test_step"}.isdisjoint(vars(ours))
    if before and not program.stays:
        moved = [abs(value(variable) - old).max() for variable, old in zip(ours.weights, before, strict=True)]
        assert max(moved) > 1e-3 or "overflows" in name, moved


def test_there_are_many_programs():
    assert len(PROGRAMS) >= 90


def both(program, *callbacks_of, **options):
    """A program's model by `model.fit` and by `kvision.fit`, each with callbacks made of a folder's name."""
    engine.configure("float64")
    for name, fit in (("theirs", lambda model, **given: model.fit(**given)), ("ours", kvision.fit)):
        program.callbacks = lambda name=name: [make(name) for make in callbacks_of]
        yield fitted(program, fit, **options)


def test_files_of_callbacks(tmp_path):
    """A checkpoint of the best weights, and a table of the logs."""
    program = Program(head(relu), optimizer=lambda: keras.optimizers.SGD(12.0), options={"epochs": 6, "shuffle": False})
    saves = lambda name: keras.callbacks.ModelCheckpoint(  # noqa: E731
        tmp_path / name / "{epoch}.weights.h5", save_weights_only=True, save_best_only=True
    )
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    logs = lambda name: keras.callbacks.CSVLogger(tmp_path / f"{name}.csv")  # noqa: E731
    (theirs, *_), (ours, *_) = both(program, saves, logs)
    tables = [list(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines())) for name in ("theirs", "ours")]
    assert tables[0][0] == tables[1][0] and len(tables[0]) == 7
    close(np.array(tables[1][1:], float), np.array(tables[0][1:], float), 1e-10, "table")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("theirs", "ours")]
    assert files[0] == files[1] and 0 < len(files[0]) < 6, files
    for file in files[0]:
        theirs.load_weights(tmp_path / "theirs" / file)
        ours.load_weights(tmp_path / "ours" / file)
        for mine, kerass in zip(ours.weights, theirs.weights, strict=True):
            close(value(mine), value(kerass), 1e-10, file)


class BrokenError(Exception):
    pass


class Breaks(keras.callbacks.Callback):
    """Ends a run in an epoch as a fault does. It has no state that a run goes on with."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch == 0 and batch == 1:
            raise BrokenError
        self.epoch -= batch == 1

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


RESUMED = Program(
    head(batch_norm(), relu, lambda: layers.Dropout(0.3, seed=3)),
    optimizer=optimizer("Adam", 0.05, **EMA),
    compiled=metrics("accuracy"),
    options={"epochs": 4, "batch_size": 6},
)


@pytest.mark.parametrize("data", ["arrays", "PyDataset"])
def test_a_run_that_breaks_off_goes_on_as_if_it_had_not(tmp_path, data):
    """To the bit: weights, optimizer and history of what `model.fit` gives in one go, an optimizer's averages, an early
    stopping's patience and a rate that plateaus lower among it."""
    engine.configure("float64")
    given = RESUMED.data if data == "arrays" else alone(Pairs, shuffle=True, epochs=4)
    program = Program(**{**vars(RESUMED), "data": given})

    def run(fit, epoch=-1, **more):
        monitor = "loss" if data == "PyDataset" else "val_loss"
        program.callbacks = lambda: [
            keras.callbacks.ReduceLROnPlateau(monitor, patience=0, factor=0.5, min_delta=10),
            keras.callbacks.EarlyStopping(monitor, patience=3, min_delta=10),
            Breaks(epoch),
        ]
        return fitted(program, lambda model, **options: fit(model, **options, **more))

    whole, _, _, history = run(kvision.fit)
    folder = tmp_path / "checkpoints"
    for epoch in (1, 0):
        with pytest.raises(BrokenError):
            run(kvision.fit, 2 - epoch, checkpoint=folder)
    for _ in range(2):  # the second time there is nothing left to do
        resumed, _, _, again = run(kvision.fit, checkpoint=folder)
        assert again.history == history.history and again.epoch == history.epoch
        for mine, other in zip(state(resumed), state(whole), strict=True):
            np.testing.assert_array_equal(value(mine), value(other), mine.path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"x": batches(np.ones((N, 1)), np.ones(N)), "y": None},
            "takes arrays or a keras.utils.PyDataset, got a gen",
        ),
        ({"steps_per_epoch": 1}, "takes whole epochs: leave out steps_per_epoch"),
        ({"callbacks": [keras.callbacks.BackupAndRestore("nowhere")]}, "BackupAndRestore keeps no"),
    ],
    ids=["generator", "steps", "BackupAndRestore"],
)
def test_what_cannot_be_resumed_is_refused(tmp_path, changed, message):
    program = Program(head(relu))
    model = program.build()
    program.compile(model)
    x, y = program.arrays()
    with pytest.raises(ValueError, match=message):
        kvision.fit(model, **{"x": x, "y": y, "checkpoint": tmp_path / "run", **changed})


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    program = Program(head(relu))
    x, y = program.arrays()
    for size in (N, N - 1):
        model = program.build()
        program.compile(model)
        if size == N:
            kvision.fit(model, x, y, checkpoint=tmp_path, verbose=0)
        else:
            with pytest.raises(kvision.weights.WeightsError, match="is of a run with size 16; this run has size 15"):
                kvision.fit(model, x[:size], y[:size], checkpoint=tmp_path, verbose=0)


def test_a_second_fit_goes_on_and_compiles_nothing_anew(monkeypatch):
    engine.configure("float64")
    program, made = Program(head(batch_norm(), relu)), []
    kind = engine.backend_module().Engine
    monkeypatch.setattr(engine.backend_module(), "Engine", lambda *options: made.append(1) or kind(*options))
    ends = []
    for fit in (lambda model, *given, **options: model.fit(*given, **options), kvision.fit):
        model = program.build()
        program.compile(model)
        x, y = program.arrays()
        for _ in range(3):
            fit(model, x, y, batch_size=BATCH, shuffle=False, verbose=0)
        assert len(made) == (fit is kvision.fit)
        model.compile("adam", "mse")
        fit(model, x, np.eye(CLASSES)[y], batch_size=BATCH, shuffle=False, verbose=0)
        assert len(made) == 2 * (fit is kvision.fit)
        ends.append(state(model))
    for kerass, mine in zip(*ends, strict=True):
        close(value(mine), value(kerass), 1e-10, mine.path)


def test_keras_fits_a_model_afterwards():
    """Its own step, which the engine has not changed."""
    program = Program(head(relu))
    model = program.build()
    program.compile(model)
    x, y = program.arrays()
    kvision.fit(model, x, y, verbose=0)
    assert model.train_function is None and model.train_step.__func__ is keras.Model.train_step
    model.fit(x, y, verbose=0)
    assert model.optimizer.iterations == 2


def test_what_is_no_compiled_model_is_refused():
    with pytest.raises(TypeError, match=r"expected a keras\.Model, got a Dense"):
        kvision.fit(layers.Dense(2))
    with pytest.raises(ValueError, match=r"is not compiled: call model\.compile\(optimizer, loss"):
        kvision.fit(Program(head(relu)).build())


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
def test_a_model_that_pytorch_compiles_is_kerass():
    model = Program(head(relu)).build()
    model.compile("sgd", "mse", jit_compile=True)
    assert keras_fit.why_keras(model) == "it is compiled with jit_compile=True"


@pytest.mark.parametrize("make", [lambda: head(lambda: layers.Dense(5, kernel_regularizer="l2"), relu)])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_gradients_accumulated_over_parts_are_those_of_the_whole(make, kind):
    """A compiled model as a task, its batch in two parts, against Keras's step on the whole batch."""
    engine.configure("float64")
    program = Program(make(), optimizer=optimizer(kind, 0.05))
    models = [program.build(), program.build()]
    x, y = program.arrays()
    for model in models:
        program.compile(model, run_eagerly=BACKEND != "torch")
        if model is models[0]:
            row = model.train_on_batch(x, y, return_dict=True)
            continue
        build_compiled(model, (x, y, None))
        task = Compiled(model)
        own = engine.backend_module().Engine(model, task, model.optimizer, 2)
        means = own.train_step({"x": x, "y": y})
        own.sync_variables()
        close(np.divide(*map(ops.convert_to_numpy, means["loss"])), row["loss"], 1e-10, "loss")
        close(task.summarize(means)["loss"], row["loss"], 1e-10, "logged loss")
    for mine, kerass in zip(state(models[1]), state(models[0]), strict=True):
        close(value(mine), value(kerass), 1e-10, mine.path)
