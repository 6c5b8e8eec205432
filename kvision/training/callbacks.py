"""Keras's callbacks in a run of `kvision.training.fit`: their hooks, logs and state.

The hooks are called as `Model.fit` calls them, in the same order with the same logs. A run that resumes from a
checkpoint calls `on_train_begin`, restores each callback's state, and does not begin an epoch a second time.
"""

from collections.abc import Mapping, Sequence

import keras
import numpy as np

from kvision.engine.keras_internals import set_comparison

BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
FOREIGN = {"params", "_model", "model"}  # the run's, not the callback's
KERAS_HAS_NONE = {"epoch", "learning_rate", "seconds", "images_per_second"}  # of a row; its callbacks add the rate
MISSING = object()


def plain(value):
    """A copy of `value` where it is None, a truth value, number, text or array, or lists, tuples and dicts of those.

    Raises:
        TypeError: it is something else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return np.array(value)
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} is not plain data")


def _equal(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b


def _attributes(callback) -> dict:
    found = {}
    for name, value in vars(callback).items():
        if name not in FOREIGN:
            try:
                found[name] = plain(value)
            except TypeError:
                continue  # a file, a function, a backend's tensor
    return found


def _overrides(callback, hook: str) -> bool:
    own = hook in vars(callback)  # a LambdaCallback's
    return own or getattr(type(callback), hook) is not getattr(keras.callbacks.Callback, hook)


class Callbacks:
    """A run's callbacks, called together.

    Args:
        callbacks: Keras callbacks.
        model: where there are callbacks, `model.stop_training` is set to false.
        compiled: arguments of `model.compile`, "optimizer" among them, so that what Keras's callbacks save has them;
            None leaves the model as it is compiled.
        directions: "up" or "down", by the name of a figure: whether more or less of it is better.

    Raises:
        ValueError: `BackupAndRestore`.
    """

    def __init__(
        self,
        callbacks: Sequence,
        model: keras.Model,
        compiled: Mapping | None = None,
        directions: Mapping[str, str | None] | None = None,
    ):
        self.callbacks, self.model, self.directions = list(callbacks), model, dict(directions or {})
        if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
            raise ValueError(
                "BackupAndRestore keeps no optimizer and no place in an epoch: give fit(checkpoint=FOLDER) instead, "
                "which resumes bit-exactly"
            )
        # ModelCheckpoint has hooks for batches, which do nothing where it saves after epochs.
        waiting = [callback for callback in self.callbacks if getattr(callback, "save_freq", None) != "epoch"]
        self.batches = any(_overrides(callback, hook) for callback in waiting for hook in BATCH_HOOKS)
        self._first: list[dict] = []
        if self.callbacks and compiled is not None:
            model.compile(**compiled, auto_scale_loss=False)
        self.stop = False

    @property
    def names(self) -> list[str]:
        """The names of the callbacks' classes."""
        return [type(callback).__name__ for callback in self.callbacks]

    @property
    def stop(self) -> bool:
        """Whether a callback has asked for the end: Keras's `model.stop_training`."""
        return bool(self.callbacks) and bool(self.model.stop_training)

    @stop.setter
    def stop(self, value: bool) -> None:
        if self.callbacks:
            self.model.stop_training = value

    def begin(self, params: dict, states: Sequence[dict] = ()) -> None:
        """`on_train_begin`, then the states of a checkpoint."""
        for callback in self.callbacks:
            callback.set_params(params)
            callback.set_model(self.model)
            # Keras looks among the metrics of a compiled model for whether more is better.
            monitored = str(getattr(callback, "monitor", "")).removeprefix("val_")
            if getattr(callback, "mode", None) == "auto" and self.directions.get(monitored):
                callback.mode = {"up": "max", "down": "min"}[self.directions[monitored]]
        self.call("on_train_begin")
        self.restore(states)

    def restore(self, states: Sequence[dict] = ()) -> None:
        """Set the callbacks, whose `on_train_begin` was called, to the states of a checkpoint; none leaves them."""
        self._first = [_attributes(callback) for callback in self.callbacks]
        for callback, state in zip(self.callbacks, states, strict=False):
            _restore(callback, state)

    def overrides(self, hook: str) -> bool:
        """Whether a callback has this hook."""
        return any(_overrides(callback, hook) for callback in self.callbacks)

    @property
    def overrides_test_batches(self) -> bool:
        """Whether a callback has a hook for the batches of an evaluation."""
        return any(map(self.overrides, ("on_test_batch_begin", "on_test_batch_end")))

    def call(self, hook: str, *arguments, logs: dict | None = None) -> None:
        """Call a hook of every callback; they share `logs`, and may add to it."""
        logs = {} if logs is None else logs
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments, logs=logs)

    def states(self) -> list[dict]:
        """The state of each callback: what its `get_state()` gives, or its attributes of plain data that have changed
        since `on_train_begin`."""
        found = []
        for callback, first in zip(self.callbacks, self._first, strict=True):
            if hasattr(callback, "get_state"):
                found.append(plain(callback.get_state()))
                continue
            now = _attributes(callback)
            found.append({name: value for name, value in now.items() if not _equal(value, first.get(name, MISSING))})
        return found


def _restore(callback, state: dict) -> None:
    if hasattr(callback, "set_state"):
        callback.set_state(state)
        return
    if "min_delta" in state and getattr(callback, "monitor_op", True) is None:
        # Keras chooses the comparison at the first epoch's end and turns the sign of `min_delta` then: once.
        set_comparison(callback)
    vars(callback).update(state)


def logs_of(row: dict, monitored: str) -> dict[str, float]:
    """A row of the history under Keras's names: val_loss, val_accuracy and so on are of the set `monitored`."""
    figures = {key: value for key, value in row.items() if key not in KERAS_HAS_NONE}
    prefix = f"{monitored}_"
    return {f"val_{key.removeprefix(prefix)}" if key.startswith(prefix) else key: figures[key] for key in figures}
