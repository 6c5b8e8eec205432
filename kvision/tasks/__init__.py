"""What is learned: the protocol of a task, and one file for each task.

A task is an object with methods on tensors; it names no backend and reads no files. An engine (`kvision.engine`) runs
it on batches: mappings of arrays with one leading axis, such as {"image", "label"}, whose optional "weight" (n,) is 0
where an example is padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Batch = Mapping[str, Any]
Means = Mapping[str, tuple[Any, Any]]  # name -> (sum, weight); a sum may be an array, as a confusion matrix


@dataclass(frozen=True)
class Phase:
    """One gradient step of a training step.

    Args:
        name: of the phase, and the name of its optimizer.
        loss: `loss(models, batch) -> (scalar, Means)`, in training mode.
        trains: the name of the model that it trains, or several; None trains all. What it does not train it leaves as
            it is, batch statistics included.
    """

    name: str
    loss: Callable
    trains: str | Sequence[str] | None = None


class Task(Protocol):
    """What a task must have. `models(x)` calls a single model, `models["generator"](z)` one of several; an optional
    `training=` overrides the mode.

    Optional, looked up by name:

    - `variables`: the task's `keras.Variable`s, as metrics or the weights of a momentum teacher; carried through every
      step and stored in checkpoints.
    - `phases() -> Sequence[Phase]`: several gradient steps in the place of one by `loss`.
    - `predict(models, batch)`: tensors of fixed shape, nested as one likes.
    - `summarize(totals) -> dict[str, float]`: figures of added Means, as `mean`.
    - `begin()`: start metrics among `variables` anew; called before each epoch and each evaluation.
    - `check(batch)` and `check_models(models)`: raise an error for what it cannot train on.
    - `has_penalties`: True where its loss has the models' penalties (`model.losses`) in it; else the engine adds them.
    - `masks_padding`: False where its Means do not leave out examples of weight 0; then no batch is padded.
    - `keras_step()` and `keras_batch(batch)`: how Keras's own step trains it, see `kvision.engine.keras`.
    - `for_keras() -> dict`: the arguments "loss" and "metrics" of `model.compile`, so that a `.keras` file has them.
    - `directions`: "up" or "down" by the name of a figure, for callbacks that choose by themselves.
    """

    def loss(self, models, batch: Batch) -> tuple[Any, Means]:
        """The scalar loss of a batch in training mode, and what else is reported of it."""

    def metrics(self, models, batch: Batch) -> Means:
        """What is reported of a batch in inference mode, "loss" among it."""


def add(first: Mapping, second: Mapping) -> dict:
    """The Means of two sets of examples together; names that only one has are kept."""
    found = dict(first)
    for name, (total, weight) in second.items():
        if name in found:
            total, weight = found[name][0] + total, found[name][1] + weight
        found[name] = total, weight
    return found


def mean(totals: Mapping) -> dict[str, float]:
    """Sum over weight of each of the Means that is a number; arrays are left out. Of no weight it is nan."""
    found = {}
    for name, (total, weight) in totals.items():
        if np.ndim(total) == 0:
            found[name] = float(total) / float(weight) if float(weight) else float("nan")
    return found


def summarize(task, totals: Mapping) -> dict[str, float]:
    """A task's figures of added Means."""
    return task.summarize(totals) if hasattr(task, "summarize") else mean(totals)
