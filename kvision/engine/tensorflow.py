"""TensorFlow: the step is one `tf.function`; the variables hold the state. XLA stays off: it is slower on a CPU."""

import itertools
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial

import keras
import tensorflow as tf

from kvision.engine.fuse import Graph, Recorder, is_graph
from kvision.engine.keras_internals import calling, index_of, takes_training, with_methods
from kvision.engine.kernels_tensorflow import lower
from kvision.engine.program import Program, gradients_or_zeros, split


def configure(dtype: str, deterministic: bool, compile_cache) -> None:
    if deterministic:
        tf.config.experimental.enable_op_determinism()  # for the whole process: TensorFlow knows no way back
        tf.random.set_seed(0)  # without it, operations that have no seed would fail


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


def generator_states():
    return []


def set_generator_states(states):
    pass


def why_keras(model):
    replicas = model.distribute_strategy.num_replicas_in_sync
    return f"tf.distribute trains it on {replicas} replicas" if replicas > 1 else None


class Engine:
    def __init__(self, models, task=None, optimizers=None, gradient_accumulation_steps=1):
        self.program = Program(models, task, optimizers)
        self.model, self.gradient_accumulation_steps = self.program.model, gradient_accumulation_steps
        function = partial(tf.function, jit_compile=False, autograph=False)
        self._step = function(self._train)
        self._step_on_device = function(lambda data, tensors, param: self._train(data.make_batch(tensors, param)))
        self._gradients = function(self._value_and_grad)
        self._forward = function(self._predict)
        self._forward_on_device = function(lambda data, tensors, param: self._predict(data.make_batch(tensors, param)))
        self._score = function(self._evaluate)
        self._score_on_device = function(lambda data, tensors, param: self._evaluate(data.make_batch(tensors, param)))
        self._graphs = {}
        distributed = tf.distribute.has_strategy()
        self._fast_optimizers = [
            optimizer if distributed else with_methods(optimizer, _fast_methods)
            for optimizer in self.program.optimizers
        ]

    def _call(self, name, inputs, training):
        model, key = self.program.models[name], (name, training)
        if key not in self._graphs:
            graph = Graph(model, partial(lower, training=training), training) if is_graph(model) else None
            self._graphs[key] = graph
        if self._graphs[key] is None:
            return model(inputs, **({"training": training} if takes_training(model) else {}))
        with calling(model, training):
            return self._graphs[key](inputs)

    def _part(self, phase, batch):
        """The Means of a phase on a part of a batch, and its gradients."""
        restored = [(variable, tf.identity(variable.value)) for variable in phase.restored]
        with tf.GradientTape() as tape:
            loss, means = self.program.objective(phase, self._call, batch)
            scaled = phase.optimizer.scale_loss(loss) if phase.optimizer else loss
        # A variable that the loss does not use has no gradient: None.
        gradients = tape.gradient(scaled, [variable.value for variable in phase.variables])
        for variable, value in restored:
            variable.assign(value)
        return tf.nest.map_structure(tf.convert_to_tensor, means), gradients

    def _differentiate(self, phase, batch):
        count = self.gradient_accumulation_steps
        if count == 1:
            return self._part(phase, batch)
        pieces = tf.nest.map_structure(lambda *arrays: tf.stack(arrays), *split(batch, count))
        means, gradients = self._part(phase, tf.nest.map_structure(lambda array: array[0], pieces))
        used = [gradient is not None for gradient in gradients]
        first = [*tf.nest.flatten(means), *itertools.compress(gradients, used)]
        sums = [_Rows if isinstance(value, tf.IndexedSlices) else _Dense for value in first]

        def add(i, *totals):
            more, gradients = self._part(phase, tf.nest.map_structure(lambda array: array[i], pieces))
            values = [*tf.nest.flatten(more), *itertools.compress(gradients, used)]
            return i + 1, *(kind.add(i, *pair) for kind, *pair in zip(sums, totals, values, strict=True))

        start = [kind.start(value, count) for kind, value in zip(sums, first, strict=True)]
        # One part at a time: side by side they would need the memory that accumulation is to save.
        _, *totals = tf.while_loop(lambda i, *_: i < count, add, (1, *start), parallel_iterations=1)
        leaves = len(first) - sum(used)
        variables = itertools.compress(phase.variables, used)
        rows = zip(sums[leaves:], totals[leaves:], variables, strict=True)
        averages = iter([kind.mean(total, count, variable) for kind, total, variable in rows])
        gradients = [next(averages) if is_used else None for is_used in used]
        return tf.nest.pack_sequence_as(means, totals[:leaves]), gradients

    def _value_and_grad(self, batch, name):
        phase = self.program.phase(name)
        means, gradients = self._differentiate(phase, batch)
        total, weight = means[phase.reported]
        gradients = [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
        return total / tf.cast(weight, total.dtype), gradients_or_zeros(gradients, phase.variables)

    def _train(self, batch):
        found = {}
        for phase, optimizer in zip(self.program.phases, self._fast_optimizers, strict=True):
            means, gradients = self._differentiate(phase, batch)
            optimizer.apply(gradients, phase.variables)
            found |= means
        return found

    def _predict(self, batch):
        return self.program.predict(self._call, batch)

    def _evaluate(self, batch):
        return tf.nest.map_structure(tf.convert_to_tensor, self.program.metrics(self._call, batch))

    def train_step(self, batch):
        self.program.check(batch)
        return self._step(_tensors(batch))

    def train_steps(self, dataset, params):
        results = [self._step_on_device(dataset, dataset.tensors, param) for param in tf.unstack(params)]
        return tf.nest.map_structure(lambda *leaves: tf.stack(leaves), *results)

    def value_and_grad(self, batch, phase=None):
        return self._gradients(_tensors(batch), phase)

    def predict(self, batch):
        return _arrays(self._forward(_tensors(batch)))

    def predict_on_device(self, dataset, params):
        results = [self._forward_on_device(dataset, dataset.tensors, param) for param in tf.unstack(params)]
        return _arrays(tf.nest.map_structure(lambda *leaves: tf.stack(leaves), *results))

    def evaluate(self, batch):
        return self._score(_tensors(batch))

    def evaluate_on_device(self, dataset, param):
        return self._score_on_device(dataset, dataset.tensors, tf.convert_to_tensor(param))

    def layer_outputs(self, batch, training=False):
        seen = Recorder()
        with calling(self.model, training):
            Graph(self.model, partial(lower, training=training), training, fuse=False)(
                tf.convert_to_tensor(batch), seen
            )
        return seen.rows

    def sync_variables(self):
        pass

    def keras_steps(self):
        task = self.program.task

        def train_step(data):
            self._train(task.batch(data))
            return task.logs()

        def test_step(data):
            self.program.metrics(self._call, task.batch(data))
            return task.logs()

        return train_step, test_step


def _tensors(tree):
    def tensor(leaf):
        return None if leaf is None else tf.convert_to_tensor(leaf)

    return tf.nest.map_structure(tensor, dict(tree) if isinstance(tree, Mapping) else tree)


def _arrays(tree):
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), tree)


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
