"""JAX: the step is one compiled function from state to state; the state's memory is reused.

Compiling takes far longer than a step, so what was compiled is kept in a folder and found there by the next process.
"""

import os
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from kvision.engine import check_model, check_targets, main_output
from kvision.engine.fuse import Graph, Recorder, is_graph, parts, penalties
from kvision.engine.keras_internals import calling, takes_training
from kvision.engine.kernels_jax import lower

CACHE_BYTES = 2**30  # of compiled programs; a ResNet-20's step takes 2 MiB

_options: dict[str, object] = {}  # of the compiler


def configure(dtype: str, deterministic: bool, compile_cache: str | os.PathLike | None) -> None:
    jax.config.update("jax_enable_x64", dtype == "float64")
    _options.clear()
    if deterministic and jax.default_backend() == "gpu":
        _options["xla_gpu_deterministic_ops"] = True  # a CPU's programs are
    if compile_cache is None:
        return
    try:
        import filelock  # noqa: F401 (JAX locks the folder with it, and drops what was not used for longest)
    except ImportError:
        warnings.warn(
            "compiled programs are not kept, as the package filelock is missing: pip install kvision-keras[jax]",
            stacklevel=3,
        )
        return
    Path(compile_cache).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # an optimizer starts by a dozen tiny ones
    if jax.config.jax_compilation_cache_dir != os.fspath(compile_cache):
        jax.config.update("jax_compilation_cache_dir", os.fspath(compile_cache))
        compilation_cache.reset_cache()  # the folder is opened once, at the first compilation


def accelerated() -> bool:
    return jax.default_backend() != "cpu"


def full_precision():
    return jax.default_matmul_precision("highest")


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
        self._state = None
        jit = partial(jax.jit, compiler_options=_options or None)
        self._step = jit(self._train, donate_argnums=0)
        self._steps = jit(self._train_shown, donate_argnums=0, static_argnums=1)
        self._gradients = jit(self._differentiate)
        self._forward = jit(self._infer)
        self._forward_shown = jit(self._infer_shown, static_argnums=2)
        self._score = jit(self._judge)
        self._graphs = {}

    def _call(self, images, training):
        if not self._is_graph:
            return self.model(images, **({"training": training} if takes_training(self.model) else {}))
        if training not in self._graphs:
            self._graphs[training] = Graph(self.model, lower, training)
        with calling(self.model, training):
            return self._graphs[training](images)

    @property
    def _fixed(self):
        """The variables that a step changes and no gradient does: running statistics, generators, metrics."""
        return [*self.model.non_trainable_variables, *(v for metric in self.metrics for v in metric.variables)]

    def _scope(self, trainable, fixed, slots=()):
        variables, values = (*self.model.trainable_variables, *self._fixed), (*trainable, *fixed)
        if slots:
            variables, values = (*variables, *self.optimizer.variables), (*values, *slots)
        return keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True)), collect_losses=True)

    def _objective(self, trainable, fixed, slots, images, labels):
        with self._scope(trainable, fixed, slots) as scope:
            outputs = self._call(images, training=True)
            loss = self.loss(labels, outputs) + penalties(self.model)
            scaled = self.optimizer.scale_loss(loss) if self.optimizer else loss
            for metric in self.metrics:
                metric.update_state(_classes(labels), main_output(outputs))
        fixed = [scope.get_current_value(variable) for variable in self._fixed]
        return scaled, (fixed, loss, _count(labels, main_output(outputs)))

    def _part(self, trainable, fixed, slots, images, labels):
        gradient = jax.value_and_grad(self._objective, has_aux=True)
        (_, (fixed, loss, correct)), gradients = gradient(trainable, fixed, slots, images, labels)
        return fixed, (loss, correct, gradients)

    def _differentiate(self, trainable, fixed, slots, images, labels):
        if self.gradient_accumulation_steps == 1:
            fixed, (loss, correct, gradients) = self._part(trainable, fixed, slots, images, labels)
            return loss, correct, gradients, fixed

        def add(carry, part):
            fixed, sums = carry
            fixed, more = self._part(trainable, fixed, slots, *part)
            return (fixed, jax.tree.map(jnp.add, sums, more)), None

        pieces = [
            jnp.stack(piece) for piece in zip(*parts(self.gradient_accumulation_steps, (images, labels)), strict=True)
        ]
        of_part = jax.eval_shape(self._part, trainable, fixed, slots, *(piece[0] for piece in pieces))[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), of_part)
        (fixed, (loss, correct, gradients)), _ = lax.scan(add, (fixed, zeros), pieces)
        return (
            loss / self.gradient_accumulation_steps,
            correct,
            [total / self.gradient_accumulation_steps for total in gradients],
            fixed,
        )

    def _train(self, state, images, labels):
        trainable, fixed, slots = state
        loss, correct, gradients, fixed = self._differentiate(trainable, fixed, slots, images, labels)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        return (trainable, fixed, slots), (loss, correct)

    def _train_shown(self, state, pictures, tensors, params):
        def step(state, draw):
            return self._train(state, *pictures.make_batch(tensors, draw))

        if len(params) > 1:
            return lax.scan(step, state, params)
        state, results = step(state, params[0])
        return state, [result[None] for result in results]

    def _infer(self, trainable, fixed, images):
        with self._scope(trainable, fixed):
            return main_output(self._call(images, training=False))

    def _infer_shown(self, trainable, fixed, pictures, tensors, draw):
        return self._infer(trainable, fixed, pictures.make_batch(tensors, draw)[0])

    def _judge(self, trainable, fixed, images, labels):
        with self._scope(trainable, fixed):
            outputs = self._call(images, training=False)
            return self.loss(labels, outputs) + penalties(self.model), _count(labels, main_output(outputs))

    def _variables(self):
        slots = self.optimizer.variables if self.optimizer else []
        return self.model.trainable_variables, self._fixed, slots

    def _values(self):
        return tuple([variable.value for variable in group] for group in self._variables())

    def train_step(self, images, labels):
        check_targets(labels)
        if self._state is None:
            self._state = self._values()  # a tuple of lists, as the step returns: another structure is compiled anew
        self._state, result = self._step(self._state, images, labels)
        return result

    def train_steps(self, pictures, params):
        if self._state is None:
            self._state = self._values()
        # Convolutions within a loop are slow on a CPU: there each step is a program of its own.
        pieces = [params] if accelerated() else np.split(params, len(params))
        results = []
        for piece in pieces:
            self._state, result = self._steps(self._state, pictures, pictures.tensors, piece)
            results.append(result)
        return results[0] if len(results) == 1 else [jnp.concatenate(values) for values in zip(*results, strict=True)]

    def value_and_grad(self, images, labels):
        self.sync_variables()
        trainable, fixed, slots = self._values()
        loss, _, gradients, fixed = self._gradients(trainable, fixed, slots, images, labels)
        for variable, value in zip(self._fixed, fixed, strict=True):
            variable.assign(value)
        return loss, gradients

    def predict(self, images):
        self.sync_variables()
        return np.asarray(self._forward(*self._values()[:2], images))

    def predict_on_device(self, pictures, params):
        self.sync_variables()
        values = self._values()[:2]
        return np.stack([self._forward_shown(*values, pictures, pictures.tensors, draw) for draw in params])

    def evaluate(self, images, labels):
        self.sync_variables()
        return self._score(*self._values()[:2], images, labels)

    def layer_outputs(self, images, training=False):
        seen = Recorder()
        with calling(self.model, training):
            Graph(self.model, lower, training, fuse=False)(jnp.asarray(images), seen)
        return seen.rows

    def sync_variables(self):
        if self._state is not None:
            for group, values in zip(self._variables(), self._state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)
            self._state = None


def mean_over_replicas(x):
    return x


def _classes(labels):
    """Integer labels (n,); of targets (n, classes) the largest."""
    return jnp.argmax(labels, axis=-1) if labels.ndim == 2 else labels


def _count(labels, logits):
    """How many of the largest logits are right."""
    return jnp.sum(jnp.argmax(logits, axis=-1) == _classes(labels))
