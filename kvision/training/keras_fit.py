"""`kvision.fit`: Keras's own `fit` of a compiled model, each step computed by kvision's engine.

Keras's loop stays: its data adapters, its order of shuffling, its callbacks, logs and validation. While it runs, the
model's `train_step` and `test_step` are the engine's; afterwards the model is as Keras has made it.
"""

import inspect
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from kvision import engine as engines
from kvision.engine.keras_internals import are_arrays, build_compiled, is_built, loss_tracker, steps_of_its_own
from kvision.tasks.compiled import Compiled
from kvision.training.callbacks import Callbacks
from kvision.training.checkpoints import Checkpoints, NotFiniteError, State

KEPT = "_kvision_steps"  # the attribute under which a model keeps its `_Steps`, with what they have compiled


def fit(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool | str = True,
    class_weight: dict | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | Sequence[int] = 1,
    *,
    checkpoint: str | os.PathLike | Checkpoints | None = None,
) -> keras.callbacks.History:
    """Train a compiled model as `model.fit` does, with the same numbers, by the steps of kvision's engine.

    The arguments are those of `keras.Model.fit`, and so is what they take: arrays, nested lists and dictionaries of
    arrays, a `keras.utils.PyDataset`, a `tf.data.Dataset`, a `torch.utils.data.DataLoader`, a generator. With one seed
    (`keras.utils.set_random_seed`) the batches are those of `model.fit`, in the same order.

    A program that the engine does not take, as a model with a `train_step`, is trained by `model.fit`, with
    a warning `kvision.engine.HandedToKeras` that says why. Layers that the engine does not know, and the `call` of a
    subclass, run as Keras runs them, within the engine's step.

    On JAX, Keras's step counts the activity penalty of a layer that is called several times once, for its last call;
    here, as on the other backends and in `model.losses`, each call counts.

    Args:
        model: compiled. It need not be built, but with `checkpoint`.
        checkpoint: folder of the run's checkpoints, or a `kvision.training.checkpoints.Checkpoints`; one is written
            after each epoch. Where there is one, the run goes on from the newest: with its weights, its optimizer, its
            callbacks, its history and the generators that shuffle, and ends as the run that was not broken off. Data
            are arrays, or a `PyDataset` whose batches depend on their number alone. On TensorFlow, whose generators
            cannot be stored, the order is the same where the same seed is set before.

    Returns:
        What `model.fit` returns: its history by epochs.

    Raises:
        TypeError: `model` is no `keras.Model`.
        ValueError: it is not compiled; `checkpoint` with a model that is not built, with data of another kind, with
            `steps_per_epoch` or with Keras's `BackupAndRestore`; and what `model.fit` raises.
        kvision.weights.WeightsError: there are checkpoints but none is sound and of this run, or the disk refuses one.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"expected a keras.Model, got a {type(model).__name__}")
    if not model.compiled:
        raise ValueError(f"{model.name} is not compiled: call model.compile(optimizer, loss, metrics=[...]) first")
    options = {
        "x": x,
        "y": y,
        "batch_size": batch_size,
        "epochs": epochs,
        "verbose": verbose,
        "callbacks": callbacks,
        "validation_split": validation_split,
        "validation_data": validation_data,
        "shuffle": shuffle,
        "class_weight": class_weight,
        "sample_weight": sample_weight,
        "initial_epoch": initial_epoch,
        "steps_per_epoch": steps_per_epoch,
        "validation_steps": validation_steps,
        "validation_batch_size": validation_batch_size,
        "validation_freq": validation_freq,
    }
    if checkpoint is not None:
        options |= _resumed(model, checkpoint, options)
    reason = why_keras(model)
    if reason:
        warnings.warn(f"{model.name} is trained by model.fit: {reason}", engines.HandedToKeras, stacklevel=2)
        return model.fit(**options)
    with _steps_in_place(model):
        return model.fit(**options)


def why_keras(model: keras.Model) -> str | None:
    """Why a compiled model is trained by Keras's own step; None where the engine takes it."""
    own = steps_of_its_own(model)
    if own:
        return f"its class overrides {', '.join(own)}"
    if "training" not in inspect.signature(model.compute_loss).parameters:  # an older Keras's signature
        return "its compute_loss has no argument training"
    if not isinstance(model.optimizer, keras.optimizers.Optimizer):
        return "it is compiled without an optimizer"
    if type(model.optimizer).apply_gradients is not keras.optimizers.Optimizer.apply_gradients:
        return "its optimizer overrides apply_gradients"
    if model.built and not model.trainable_variables:
        return "it has no trainable variables"
    if keras.distribution.distribution() is not None:
        return "keras.distribution is in use"
    return engines.backend_module().why_keras(model)


class _Steps:
    """The engine's steps for a model as it is compiled now.

    Attributes:
        functions: what Keras has compiled of them: `train_function` and `test_function`.
    """

    def __init__(self, model: keras.Model):
        self.model, self.functions, self._steps = model, (None, None), None
        self.key = _key(model)

    def train_step(self, *arguments):
        return self._made(arguments[-1])[0](*arguments)

    def test_step(self, *arguments):
        return self._made(arguments[-1])[1](*arguments)

    def _made(self, data):
        if self._steps is None:
            if not is_built(self.model):  # on TensorFlow, where Keras builds within the first step
                build_compiled(self.model, data)
            task = Compiled(self.model)
            self._steps = engines.backend_module().Engine(self.model, task, self.model.optimizer).keras_steps()
        return self._steps


def _key(model: keras.Model) -> tuple:
    """What steps are made for: they are made anew where it has changed."""
    trainable = [id(variable) for variable in model.trainable_variables] if model.built else None
    return loss_tracker(model), trainable, model.run_eagerly, model.jit_compile, model.steps_per_execution


@contextmanager
def _steps_in_place(model: keras.Model) -> Iterator[None]:
    """The engine's steps in the place of the model's."""
    attributes = vars(model)  # not by assignment, which Keras tracks
    steps = attributes.get(KEPT)
    if steps is None or steps.key != _key(model):
        steps = attributes[KEPT] = _Steps(model)
    own, tracker = (model.train_function, model.test_function), loss_tracker(model)
    attributes["train_step"], attributes["test_step"] = steps.train_step, steps.test_step
    model.train_function, model.test_function = steps.functions
    try:
        yield
    finally:
        del attributes["train_step"], attributes["test_step"]
        steps.functions = model.train_function, model.test_function
        compiled_anew = loss_tracker(model) is not tracker
        model.train_function, model.test_function = (None, None) if compiled_anew else own
        steps.key = None if compiled_anew else _key(model)


def _resumed(model: keras.Model, checkpoint, options: dict) -> dict:
    """The arguments of `model.fit` that go on from the newest checkpoint, and write the next ones."""
    x, y, sample_weight = (options[name] for name in ("x", "y", "sample_weight"))
    if not model.built:
        raise ValueError(f"{model.name} is not built: with checkpoint= build it first, by calling it on a batch")
    if options["steps_per_epoch"] is not None:
        raise ValueError("checkpoint= takes whole epochs: leave out steps_per_epoch")
    own = isinstance(x, keras.utils.PyDataset) and [
        name
        for name in ("on_epoch_begin", "on_epoch_end")
        if getattr(type(x), name) is not getattr(keras.utils.PyDataset, name)
    ]
    if own:
        raise ValueError(f"checkpoint= cannot store what {type(x).__name__}.{own[0]} changes between epochs")
    if not isinstance(x, keras.utils.PyDataset) and not are_arrays((x, y, sample_weight)):
        raise ValueError(
            f"checkpoint= takes arrays or a keras.utils.PyDataset, got a {type(x).__name__}, whose place in an epoch "
            "cannot be stored"
        )
    if not isinstance(checkpoint, Checkpoints):
        checkpoint = Checkpoints(checkpoint)
    size = len(x) if isinstance(x, keras.utils.PyDataset) else next(iter(keras.tree.flatten(x))).shape[0]
    given = {name: options[name] for name in ("batch_size", "shuffle", "validation_split", "class_weight")}
    checkpoint.configuration |= {"size": size} | {name: str(value) for name, value in given.items()}
    callbacks = keras.tree.flatten(options["callbacks"]) if options["callbacks"] else []
    if not any(isinstance(callback, keras.callbacks.History) for callback in callbacks):
        callbacks.append(keras.callbacks.History())
    model.optimizer.build(model.trainable_variables)
    keeper = _Keeper(model, callbacks, checkpoint)
    last = options["epochs"] if keeper.state.stopped else keeper.state.step
    return {"callbacks": [*callbacks, keeper], "initial_epoch": max(options["initial_epoch"], last)}


class _Keeper(keras.callbacks.Callback):
    """Writes a checkpoint after each epoch. It is the last callback: the others have begun and ended before it.

    Attributes:
        state: that of the checkpoint from which the run goes on; its `step` is the number of epochs.
    """

    def __init__(self, model: keras.Model, callbacks: Sequence, checkpoints: Checkpoints):
        super().__init__()
        self.callbacks, self.checkpoints = Callbacks([*callbacks, _Generators()], model), checkpoints
        self.state = checkpoints.read(model, model.optimizer, self.callbacks.names)

    def on_train_begin(self, logs=None):
        self.callbacks.restore([state for _, state in self.state.callbacks])

    def on_epoch_end(self, epoch, logs=None):
        states = list(zip(self.callbacks.names, self.callbacks.states(), strict=True))
        state = State(step=epoch + 1, callbacks=states, stopped=bool(self.model.stop_training))
        try:
            self.checkpoints.write(self.model, self.model.optimizer, state)
        except NotFiniteError as error:
            warnings.warn(f"{error} is not finite: no checkpoint of epoch {epoch + 1}", RuntimeWarning, stacklevel=2)


class _Generators(keras.callbacks.Callback):
    """The global generators by which Keras shuffles, as the state of a callback."""

    def get_state(self) -> dict:
        version, words, normal = random.getstate()
        name, *numbers = np.random.get_state()
        return {
            "python": [version, np.array(words, np.uint32), normal],
            "numpy": [name, *numbers],
            "backend": engines.backend_module().generator_states(),
        }

    def set_state(self, state: dict) -> None:
        version, words, normal = state["python"]
        random.setstate((version, tuple(words.tolist()), normal))
        np.random.set_state(tuple(state["numpy"]))
        engines.backend_module().set_generator_states(state["backend"])
