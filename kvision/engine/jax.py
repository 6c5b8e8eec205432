"""JAX: the step is one compiled function from state to state; the state's memory is reused.

Compiling takes far longer than a step, so what was compiled is kept in a folder and found there by the next process.
"""

import os
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from kvision.engine.fuse import Graph, Recorder, is_graph
from kvision.engine.keras_internals import calling, takes_training
from kvision.engine.kernels_jax import lower
from kvision.engine.program import Program, split

CACHE_BYTES = 2**30  # of compiled programs; a ResNet-20's step takes 2 MiB

_options: dict[str, object] = {}  # of the compiler


def configure(dtype: str, deterministic: bool, compile_cache: str | os.PathLike | None) -> None:
    jax.config.update("jax_enable_x64", dtype == "float64")
    _options.clear()
    if deterministic and jax.default_backend() == "gpu":
        _options["xla_gpu_deterministic_ops"] = True  # a CPU's programs are
    if compile_cache is None:
        return
    Path(compile_cache).mkdir(parents=True, exist_ok=True)
    _remove_oldest(compile_cache, CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # an optimizer starts by a dozen tiny ones
    if jax.config.jax_compilation_cache_dir != os.fspath(compile_cache):
        jax.config.update("jax_compilation_cache_dir", os.fspath(compile_cache))
        compilation_cache.reset_cache()  # the folder is opened once, at the first compilation


def _remove_oldest(folder: str | os.PathLike, limit: int) -> None:
    """Remove the programs read or written longest ago until those left take at most `limit` bytes.

    JAX's own `jax_compilation_cache_max_size` reads the whole folder again for each program that it adds: 76 ms of a
    CPU in a folder of 2,000, more than compiling a small one.
    """
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith("-cache"):
                with suppress(FileNotFoundError):  # another process removes them too
                    status = entry.stat()
                    files.append((max(status.st_atime, status.st_mtime), status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= size


def accelerated() -> bool:
    return jax.default_backend() != "cpu"


def full_precision():
    return jax.default_matmul_precision("highest")


def generator_states():
    return []


def set_generator_states(states):
    pass


def why_keras(model):
    return "Keras runs on Flax NNX" if keras.config.is_nnx_enabled() else None


class Engine:
    def __init__(self, models, task=None, optimizers=None, gradient_accumulation_steps=1):
        self.program = Program(models, task, optimizers)
        self.model, self.gradient_accumulation_steps = self.program.model, gradient_accumulation_steps
        self._state = None
        jit = partial(jax.jit, compiler_options=_options or None)
        self._step = jit(self._train, donate_argnums=0)
        self._steps = jit(self._train_steps, donate_argnums=0, static_argnums=1)
        self._gradients = jit(self._value_and_grad, static_argnums=2)
        self._forward = jit(self._predict)
        self._forward_on_device = jit(self._predict_on_device, static_argnums=2)
        self._score = jit(self._evaluate)
        self._score_on_device = jit(self._evaluate_on_device, static_argnums=2)
        self._graphs = {}

    def _call(self, name, inputs, training):
        model, key = self.program.models[name], (name, training)
        if key not in self._graphs:
            self._graphs[key] = Graph(model, lower, training) if is_graph(model) else None
        if self._graphs[key] is None:
            return model(inputs, **({"training": training} if takes_training(model) else {}))
        with calling(model, training):
            return self._graphs[key](inputs)

    def _scope(self, trainable, fixed, optimizer=None, slots=()):
        variables, values = (*self.program.trainable, *self.program.fixed), (*trainable, *fixed)
        if optimizer is not None:
            variables, values = (*variables, *optimizer.variables), (*values, *slots)
        return keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True)), collect_losses=True)

    def _part(self, phase, trainable, fixed, slots, batch):
        """The gradients of a phase on a part of a batch, its Means, and the variables that gradients do not change."""

        def objective(trained):
            values = list(trainable)
            for index, value in zip(phase.indices, trained, strict=True):
                values[index] = value
            with self._scope(values, fixed, phase.optimizer, slots) as scope:
                loss, means = self.program.objective(phase, self._call, batch)
                scaled = phase.optimizer.scale_loss(loss) if phase.optimizer else loss
            after = [scope.get_current_value(variable) for variable in self.program.fixed]
            return scaled, (after, _ordered(means))

        trained = [trainable[index] for index in phase.indices]
        (_, (after, means)), gradients = jax.value_and_grad(objective, has_aux=True)(trained)
        restored = {id(variable) for variable in phase.restored}
        pairs = zip(self.program.fixed, fixed, after, strict=True)
        return [old if id(variable) in restored else new for variable, old, new in pairs], (means, gradients)

    def _differentiate(self, phase, trainable, fixed, slots, batch):
        count = self.gradient_accumulation_steps
        if count == 1:
            return self._part(phase, trainable, fixed, slots, batch)

        def add(carry, part):
            fixed, sums = carry
            fixed, more = self._part(phase, trainable, fixed, slots, part)
            return (fixed, jax.tree.map(jnp.add, sums, more)), None

        pieces = jax.tree.map(lambda *arrays: jnp.stack(arrays), *split(batch, count))
        first = jax.tree.map(lambda array: array[0], pieces)
        of_part = jax.eval_shape(partial(self._part, phase), trainable, fixed, slots, first)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), of_part)
        (fixed, (means, gradients)), _ = lax.scan(add, (fixed, zeros), pieces)
        return fixed, (means, [total / count for total in gradients])

    def _train(self, state, batch):
        trainable, fixed, slots = state
        trainable, slots, found = list(trainable), list(slots), OrderedDict()
        for number, phase in enumerate(self.program.phases):
            fixed, (means, gradients) = self._differentiate(phase, trainable, fixed, slots[number], batch)
            trained = [trainable[index] for index in phase.indices]
            trained, slots[number] = phase.optimizer.stateless_apply(slots[number], gradients, trained)
            for index, value in zip(phase.indices, trained, strict=True):
                trainable[index] = value
            found |= means
        return (trainable, fixed, slots), found

    def _train_steps(self, state, dataset, tensors, params):
        def step(state, param):
            return self._train(state, dataset.make_batch(tensors, param))

        if len(params) > 1:
            return lax.scan(step, state, params)
        state, means = step(state, params[0])
        return state, jax.tree.map(lambda leaf: leaf[None], means)

    def _value_and_grad(self, state, batch, name):
        trainable, fixed, slots = state
        phase = self.program.phase(name)
        number = self.program.phases.index(phase)
        fixed, (means, gradients) = self._differentiate(phase, trainable, fixed, slots[number], batch)
        total, weight = means[phase.reported]
        return total / weight, gradients, fixed

    def _predict(self, trainable, fixed, batch):
        with self._scope(trainable, fixed):
            return self.program.predict(self._call, batch)

    def _predict_on_device(self, trainable, fixed, dataset, tensors, param):
        return self._predict(trainable, fixed, dataset.make_batch(tensors, param))

    def _evaluate(self, trainable, fixed, batch):
        with self._scope(trainable, fixed) as scope:
            means = _ordered(self.program.metrics(self._call, batch))
        return means, [scope.get_current_value(variable) for variable in self.program.task_variables]

    def _evaluate_on_device(self, trainable, fixed, dataset, tensors, param):
        return self._evaluate(trainable, fixed, dataset.make_batch(tensors, param))

    def _variables(self):
        slots = [optimizer.variables if optimizer else [] for optimizer in self.program.optimizers]
        return self.program.trainable, self.program.fixed, slots or [[] for _ in self.program.phases]

    def _values(self):
        """The state as the step returns it: of another structure it would be compiled again."""
        trainable, fixed, slots = self._variables()
        values = [variable.value for variable in trainable], [variable.value for variable in fixed]
        return *values, [[variable.value for variable in group] for group in slots]

    def train_step(self, batch):
        self.program.check(batch)
        if self._state is None:
            self._state = self._values()
        self._state, means = self._step(self._state, dict(batch))
        return means

    def train_steps(self, dataset, params):
        if self._state is None:
            self._state = self._values()
        # Convolutions within a loop are slow on a CPU: there each step is a separate program.
        pieces = [params] if accelerated() else np.split(params, len(params))
        results = []
        for piece in pieces:
            self._state, means = self._steps(self._state, dataset, dataset.tensors, piece)
            results.append(means)
        return results[0] if len(results) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)

    def value_and_grad(self, batch, phase=None):
        self.sync_variables()
        loss, gradients, fixed = self._gradients(self._values(), dict(batch), phase)
        for variable, value in zip(self.program.fixed, fixed, strict=True):
            variable.assign(value)
        return loss, gradients

    def predict(self, batch):
        self.sync_variables()
        return jax.tree.map(np.asarray, self._forward(*self._values()[:2], batch))

    def predict_on_device(self, dataset, params):
        self.sync_variables()
        values = self._values()[:2]
        results = [self._forward_on_device(*values, dataset, dataset.tensors, param) for param in params]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    def evaluate(self, batch):
        self.sync_variables()
        return self._scored(*self._score(*self._values()[:2], dict(batch)))

    def evaluate_on_device(self, dataset, param):
        self.sync_variables()
        return self._scored(*self._score_on_device(*self._values()[:2], dataset, dataset.tensors, param))

    def _scored(self, means, values):
        for variable, value in zip(self.program.task_variables, values, strict=True):
            variable.assign(value)
        return means

    def layer_outputs(self, batch, training=False):
        seen = Recorder()
        with calling(self.model, training):
            Graph(self.model, lower, training, fuse=False)(jnp.asarray(batch), seen)
        return seen.rows

    def sync_variables(self):
        if self._state is None:
            return
        trainable, fixed, slots = self._variables()
        groups = [(trainable, self._state[0]), (fixed, self._state[1]), *zip(slots, self._state[2], strict=True)]
        for variables, values in groups:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        self._state = None

    def keras_steps(self):
        program, task = self.program, self.program.task
        count = len(program.fixed) - len(program.task_variables)

        def train_step(state, data):
            trainable, fixed, slots, metrics = state
            state, _ = self._train((trainable, [*fixed, *metrics], [slots]), task.batch(data))
            trainable, fixed, (slots,) = state
            with self._scope(trainable, fixed):
                logs = task.logs()
            return logs, (trainable, fixed[:count], slots, fixed[count:])

        def test_step(state, data):
            trainable, fixed, metrics = state
            with self._scope(trainable, [*fixed, *metrics]) as scope:
                program.metrics(self._call, task.batch(data))
                logs = task.logs()
            fixed = [scope.get_current_value(variable) for variable in program.fixed]
            return logs, (trainable, fixed[:count], fixed[count:])

        return train_step, test_step


def _ordered(means):
    """Means as arrays; JAX sorts the keys of a plain dictionary."""
    return OrderedDict((name, tuple(map(jnp.asarray, pair))) for name, pair in means.items())


def mean_over_replicas(x):
    return x
