"""Keras's callbacks and metrics in a run of `kvision.training.fit`: the hooks, what they are told, and their state.

Keras calls the hooks from `Model.fit`; here they hear the same, in the same order. A run that goes on from a checkpoint
calls `on_train_begin`, puts each callback's state back, and does not begin an epoch a second time.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np

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


class TrainingMetrics(keras.callbacks.Callback):
    """Begins metrics anew with each epoch; their state is part of a checkpoint."""

    def __init__(self, metrics: Sequence):
        super().__init__()
        self.variables = [variable for metric in metrics for variable in metric.variables]
        self.metrics = metrics

    def on_epoch_begin(self, epoch, logs=None):
        for metric in self.metrics:
            metric.reset_state()

    def get_state(self) -> dict:
        return {"values": [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in self.variables]}

    def set_state(self, state: dict) -> None:
        for variable, value in zip(self.variables, state["values"], strict=True):
            variable.assign(value)


class Callbacks:
    """A run's callbacks, called together.

    Args:
        callbacks: Keras callbacks.
        metrics: Keras metrics `update_state(labels, logits)`, of integer labels (n,) and logits (n, classes). The
            engine updates them in every step; `measure` does on images that are scored.
        model: where there are callbacks it is compiled with the optimizer and the loss, as what Keras's callbacks save
            shall have both, and `model.stop_training` is false.
        loss: None leaves the model as it is compiled.

    Attributes:
        given: whether the caller has callbacks.

    Raises:
        ValueError: two metrics of one name, or one with a name that a run gives itself; `BackupAndRestore`.
    """

    def __init__(
        self, callbacks: Sequence, metrics: Sequence, model: keras.Model, optimizer, loss: Callable | None = None
    ):
        self.callbacks, self.metrics, self.model = list(callbacks), list(metrics), model
        if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
            raise ValueError(
                "BackupAndRestore keeps no optimizer and no place in an epoch: give fit(checkpoint=FOLDER) instead, "
                "which goes on to the bit"
            )
        names = [metric.name for metric in self.metrics]
        if len({*names, "loss", "accuracy"}) != len(names) + 2:
            raise ValueError(f"metrics want names of their own, other than loss and accuracy; got {', '.join(names)}")
        # ModelCheckpoint has hooks for batches, which do nothing where it saves after epochs.
        waiting = [callback for callback in self.callbacks if getattr(callback, "save_freq", None) != "epoch"]
        self.batches = any(_overrides(callback, hook) for callback in waiting for hook in BATCH_HOOKS)
        self._first: list[dict] = []
        self.given = bool(self.callbacks)
        if self.given and loss is not None:
            model.compile(optimizer, loss, metrics=self.metrics, auto_scale_loss=False)
        if self.metrics:
            self.callbacks.insert(0, TrainingMetrics(self.metrics))
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
        directions = {metric.name: getattr(metric, "_direction", None) for metric in self.metrics}
        directions["accuracy"] = "up"
        for callback in self.callbacks:
            callback.set_params(params)
            callback.set_model(self.model)
            # Keras looks among the metrics of a compiled model for whether more is better.
            monitored = str(getattr(callback, "monitor", "")).removeprefix("val_")
            if getattr(callback, "mode", None) == "auto" and directions.get(monitored):
                callback.mode = {"up": "max", "down": "min"}[directions[monitored]]
        self.call("on_train_begin")
        self._first = [_attributes(callback) for callback in self.callbacks]
        for callback, state in zip(self.callbacks, states, strict=False):
            _restore(callback, state)

    def overrides(self, hook: str) -> bool:
        """Whether a callback has this hook."""
        return any(_overrides(callback, hook) for callback in self.callbacks)

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

    def results(self) -> dict[str, float]:
        """The metrics by name."""
        return {metric.name: float(keras.ops.convert_to_numpy(metric.result())) for metric in self.metrics}

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics of other images by name; what they saw before is lost."""
        for metric in self.metrics:
            metric.reset_state()
            metric.update_state(labels, logits)
        return self.results()


def _restore(callback, state: dict) -> None:
    if hasattr(callback, "set_state"):
        callback.set_state(state)
        return
    if "min_delta" in state and getattr(callback, "monitor_op", True) is None:
        # Keras chooses the comparison at the first epoch's end and turns the sign of `min_delta` then: once.
        callback._set_monitor_op()
    vars(callback).update(state)


def logs_of(row: dict, monitored: str, loss: float | None = None) -> dict[str, float]:
    """A row of the history under Keras's names: val_loss, val_accuracy and so on are of the images `monitored`.

    Args:
        loss: val_loss, where it is not the row's cross-entropy.
    """
    figures = {key: value for key, value in row.items() if key not in KERAS_HAS_NONE}
    prefix = f"{monitored}_"
    logs = {f"val_{key.removeprefix(prefix)}" if key.startswith(prefix) else key: figures[key] for key in figures}
    return logs if loss is None else logs | {"val_loss": loss}
