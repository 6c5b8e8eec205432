"""TensorFlow: the step is one `tf.function`; the variables hold the state. XLA stays off: it is slower on a CPU."""

import itertools
from contextlib import contextmanager
from functools import partial

import keras
import tensorflow as tf

from kvision.engine import check_model, check_targets, main_output
from kvision.engine.fuse import Graph, Recorder, is_graph, parts, penalties
from kvision.engine.keras_internals import calling, index_of, takes_training, with_methods
from kvision.engine.kernels_tensorflow import lower


def configure(dtype: str, deterministic: bool, compile_cache) -> None:
    if deterministic:
        tf.config.experimental.enable_op_determinism()  # for the whole process: TensorFlow knows no way back
        tf.random.set_seed(0)  # or what params numbers without a seed of its own would fail


def accelerated() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


@contextmanager
def full_precision():
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


class Engine:
    def __init__(self, model, optimizer=None, loss=None, gradient_accumulation_steps=1, metrics=()):
        check_model(model)
        self.model, self.optimizer, self.loss, self.gradient_accumulation_steps = (
            model,
            optimizer,
            loss,
            gradient_accumulation_steps,
        )
        self.metrics, self._is_graph = list(metrics), is_graph(model)
        function = partial(tf.function, jit_compile=False, autograph=False)
        self._step = function(self._train)
        self._shown = function(lambda pictures, tensors, draw: self._train(*pictures.make_batch(tensors, draw)))
        self._gradients = function(self._dense_gradients)
        self._forward = function(self._infer)
        self._forward_shown = function(
            lambda pictures, tensors, draw: self._infer(pictures.make_batch(tensors, draw)[0])
        )
        self._score = function(self._judge)
        self._graphs = {}
        if optimizer is not None:
            distributed = tf.distribute.has_strategy()
            self._fast_optimizer = optimizer if distributed else with_methods(optimizer, _fast_methods)

    def _call(self, images, training):
        if not self._is_graph:
            return self.model(images, **({"training": training} if takes_training(self.model) else {}))
        if training not in self._graphs:
            self._graphs[training] = Graph(self.model, partial(lower, training=training), training)
        with calling(self.model, training):
            return self._graphs[training](images)

    def _part(self, images, labels):
        variables = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = self._call(images, training=True)
            loss = self.loss(labels, outputs) + penalties(self.model)
            scaled = self.optimizer.scale_loss(loss) if self.optimizer else loss
        for metric in self.metrics:
            metric.update_state(_classes(labels), main_output(outputs))
        # A variable that the loss does not use has no gradient: None.
        return loss, _count(labels, main_output(outputs)), tape.gradient(scaled, variables)

    def _differentiate(self, images, labels):
        if self.gradient_accumulation_steps == 1:
            return self._part(images, labels)
        pieces = [
            tf.stack(piece) for piece in zip(*parts(self.gradient_accumulation_steps, (images, labels)), strict=True)
        ]
        loss, correct, gradients = self._part(*(piece[0] for piece in pieces))
        used = [gradient is not None for gradient in gradients]
        sums = [
            _Dense,
            _Dense,
            *(_Rows if isinstance(g, tf.IndexedSlices) else _Dense for g in gradients if g is not None),
        ]

        def add(i, *totals):
            loss, correct, gradients = self._part(*(piece[i] for piece in pieces))
            more = (loss, correct, *itertools.compress(gradients, used))
            return i + 1, *(kind.add(i, *pair) for kind, *pair in zip(sums, totals, more, strict=True))

        start = [loss, correct, *itertools.compress(gradients, used)]
        start = [kind.start(value, self.gradient_accumulation_steps) for kind, value in zip(sums, start, strict=True)]
        # One part at a time: side by side they would need the memory that accumulation is to save.
        _, *totals = tf.while_loop(
            lambda i, *_: i < self.gradient_accumulation_steps, add, (1, *start), parallel_iterations=1
        )
        variables = itertools.compress(self.model.trainable_variables, used)
        loss, correct, *totals = totals
        means = iter(
            [
                kind.mean(total, self.gradient_accumulation_steps, v)
                for kind, total, v in zip(sums[2:], totals, variables, strict=True)
            ]
        )
        return loss / self.gradient_accumulation_steps, correct, [next(means) if is_used else None for is_used in used]

    def _dense_gradients(self, images, labels):
        loss, _, gradients = self._differentiate(images, labels)
        pairs = zip(gradients, self.model.trainable_variables, strict=True)
        return loss, [tf.zeros_like(v.value) if grad is None else tf.convert_to_tensor(grad) for grad, v in pairs]

    def _train(self, images, labels):
        loss, correct, gradients = self._differentiate(images, labels)
        self._fast_optimizer.apply(gradients, self.model.trainable_variables)
        return loss, correct

    def _infer(self, images):
        return main_output(self._call(images, training=False))

    def _judge(self, images, labels):
        outputs = self._call(images, training=False)
        return self.loss(labels, outputs) + penalties(self.model), _count(labels, main_output(outputs))

    def train_step(self, images, labels):
        check_targets(labels)
        return self._step(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def train_steps(self, pictures, params):
        results = [self._shown(pictures, pictures.tensors, draw) for draw in tf.unstack(params)]
        return [tf.stack(values) for values in zip(*results, strict=True)]

    def value_and_grad(self, images, labels):
        return self._gradients(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def predict(self, images):
        return self._forward(tf.convert_to_tensor(images)).numpy()

    def predict_on_device(self, pictures, params):
        results = [self._forward_shown(pictures, pictures.tensors, draw) for draw in tf.unstack(params)]
        return tf.stack(results).numpy()

    def evaluate(self, images, labels):
        return self._score(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def layer_outputs(self, images, training=False):
        seen = Recorder()
        with calling(self.model, training):
            Graph(self.model, partial(lower, training=training), training, fuse=False)(
                tf.convert_to_tensor(images), seen
            )
        return seen.rows

    def sync_variables(self):
        pass


class _Dense:
    """A sum over the parts of a batch."""

    @staticmethod
    def start(value, count):
        return value

    @staticmethod
    def add(i, total, value):
        return total + value

    @staticmethod
    def mean(total, count, variable):
        return total / count


class _Rows:
    """The same of an embedding's gradient, which is rows and their numbers: those of all parts, one behind the other,
    as the whole batch has them. Optimizers treat them otherwise than an array."""

    @staticmethod
    def start(value, count):
        arrays = [tf.TensorArray(x.dtype, count, element_shape=x.shape) for x in (value.values, value.indices)]
        return _Rows.add(0, arrays, value)

    @staticmethod
    def add(i, total, value):
        return [array.write(i, x) for array, x in zip(total, (value.values, value.indices), strict=True)]

    @staticmethod
    def mean(total, count, variable):
        values, indices = (array.concat() for array in total)
        return tf.IndexedSlices(values / count, indices, tf.shape(variable.value))


def _fast_methods(optimizer):
    """The methods of SGD with momentum by TensorFlow's one operation for it, which computes what Keras's seven do."""
    return {"update_step": _momentum_step} if type(optimizer) is keras.optimizers.SGD and optimizer.momentum else {}


def _momentum_step(optimizer, gradient, variable, learning_rate):
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=optimizer.momentums[index_of(optimizer, variable)].value.handle,
        lr=tf.cast(learning_rate, variable.dtype),
        grad=tf.cast(gradient, variable.dtype),
        momentum=keras.ops.cast(
            optimizer.momentum, variable.dtype
        ),  # a Python number by way of float32, as Keras has it
        use_nesterov=optimizer.nesterov,
    )


def mean_over_replicas(x):
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, x)


def _classes(labels):
    """Integer labels (n,); of targets (n, classes) the largest."""
    return tf.argmax(labels, axis=-1) if labels.shape.rank == 2 else tf.cast(labels, tf.int64)


def _count(labels, logits):
    """How many of the largest logits are right."""
    return tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == _classes(labels), tf.int32))
