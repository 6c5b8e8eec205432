"""What an engine runs: models by name, the task's phases, and each of their variables once.

The same on every backend. The backend's module adds how a model is called and how gradients and updates are computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import keras
from keras import ops

from kvision.engine import check_model, main_output
from kvision.engine.fuse import penalties
from kvision.engine.keras_internals import call_losses

ONLY = "model"  # the name of a single model


@dataclass
class PhasePlan:
    """One gradient step of a training step.

    Attributes:
        name: of the phase, and of its optimizer.
        loss: `loss(models, batch) -> (scalar, Means)`.
        trains: names of the models whose trainable variables it updates.
        optimizer: None where nothing is updated.
        variables: those trainable variables.
        indices: their places in `Program.trainable`.
        restored: variables that gradients do not change and that are as before after the phase: those of the models
            that it does not train.
        reported: the name of its loss in the Means.
    """

    name: str
    loss: Callable
    trains: tuple[str, ...]
    optimizer: keras.optimizers.Optimizer | None
    variables: list
    indices: list[int]
    restored: list
    reported: str


class Program:
    """The models, the task, the optimizers, and their variables.

    Args:
        models: a built `keras.Model`, or a mapping of several by name.
        task: see `kvision.tasks`; None where only the models' own outputs are computed.
        optimizers: one, or a mapping of them by phase; None where nothing is trained. Those that are not built are
            built here.

    Attributes:
        trainable: the trainable variables of all models but those among the task's.
        fixed: the variables that no gradient changes: running statistics, states of generators, those of the task.
        phases: a `PhasePlan` each; empty without a task.

    Raises:
        TypeError: a model that is no `keras.Model`.
        ValueError: a model that is not built; a phase without an optimizer, or with a model of another name.
    """

    def __init__(self, models, task=None, optimizers=None):
        self.models = dict(models) if isinstance(models, Mapping) else {ONLY: models}
        for model in self.models.values():
            check_model(model)
        self.task = task
        if hasattr(task, "check_models"):
            task.check_models(self.models)
        self.has_penalties = getattr(task, "has_penalties", False)
        self.task_variables = list(getattr(task, "variables", ()))
        own = {id(variable) for variable in self.task_variables}
        groups = [model.trainable_variables for model in self.models.values()]
        self.trainable = _once(variable for group in groups for variable in group if id(variable) not in own)
        groups = [model.non_trainable_variables for model in self.models.values()]
        self.fixed = _once([*(variable for group in groups for variable in group), *self.task_variables])
        self.phases = [] if task is None else self._plan(optimizers, own)
        self.optimizers = [] if optimizers is None else [phase.optimizer for phase in self.phases]
        self.loss_names = [phase.reported for phase in self.phases]

    @property
    def model(self) -> keras.Model:
        """The only model, or the first of several."""
        return next(iter(self.models.values()))

    def _plan(self, optimizers, own: set[int]) -> list[PhasePlan]:
        names = list(self.models)
        phases = self.task.phases() if hasattr(self.task, "phases") else None
        rows = [("train", self.task.loss, None)] if phases is None else [(p.name, p.loss, p.trains) for p in phases]
        if optimizers is not None and not isinstance(optimizers, Mapping):
            if len(rows) > 1:
                raise ValueError(f"expected an optimizer for each phase: {', '.join(name for name, *_ in rows)}")
            optimizers = {rows[0][0]: optimizers}
        if optimizers is not None and (wrong := {name for name, *_ in rows} ^ set(optimizers)):
            raise ValueError(f"phases and optimizers must have the same names; only one of them has {sorted(wrong)}")
        places = {id(variable): i for i, variable in enumerate(self.trainable)}
        plans = []
        for name, loss, trains in rows:
            trains = tuple(names if trains is None else [trains] if isinstance(trains, str) else trains)
            if unknown := set(trains) - set(names):
                raise ValueError(f"phase {name!r} trains {sorted(unknown)}, and the models are {', '.join(names)}")
            models = [self.models[one] for one in trains]
            found = _once(v for model in models for v in model.trainable_variables if id(v) not in own)
            kept = {id(variable) for model in models for variable in model.non_trainable_variables} | own
            others = [variable for variable in self.fixed if id(variable) not in kept]
            optimizer = None if optimizers is None else optimizers[name]
            if optimizer is not None and not optimizer.built:
                optimizer.build(found)
            reported = "loss" if len(rows) == 1 else f"{name}_loss"
            indices = [places[id(variable)] for variable in found]
            plans.append(PhasePlan(name, loss, trains, optimizer, found, indices, others, reported))
        return plans

    def phase(self, name: str | None) -> PhasePlan:
        """The phase of a name; None is the first.

        Raises:
            ValueError: no such phase.
        """
        for phase in self.phases:
            if name in (None, phase.name):
                return phase
        raise ValueError(f"phases are {', '.join(phase.name for phase in self.phases)}; got {name!r}")

    def objective(self, phase: PhasePlan, call: Callable, batch):
        """The loss of a phase with the penalties of the models that it trains, and its Means; in training mode."""
        models = BoundModels(self.models, call, training=True)
        loss, means = phase.loss(models, batch)
        total = loss if self.has_penalties else loss + models.penalties(phase.trains)
        count = weight_of(batch, total.dtype)
        return total, {phase.reported: (total * count, count), **means}

    def metrics(self, call: Callable, batch):
        """The task's Means of a batch in inference mode; "loss" is with the models' penalties."""
        models = BoundModels(self.models, call, training=False)
        means = dict(self.task.metrics(models, batch))
        if "loss" in means and not self.has_penalties:
            total, weight = means["loss"]
            means["loss"] = total + models.penalties(self.models) * weight, weight
        return means

    def predict(self, call: Callable, batch):
        """What the task predicts of a batch; of an array the first output of a single model."""
        models = BoundModels(self.models, call, training=False)
        if isinstance(batch, Mapping) and hasattr(self.task, "predict"):
            return self.task.predict(models, batch)
        return main_output(models(batch))

    def check(self, batch) -> None:
        """Let the task refuse a batch that is still on the host."""
        if hasattr(self.task, "check"):
            self.task.check(batch)


class BoundModels(Mapping):
    """The models as a task calls them: `models(x)` where there is one, `models["generator"](z)` by name.

    Calls run in the engine's form of the model's graph, in training mode where a loss is computed and in inference mode
    elsewhere, unless `training=` says otherwise.

    Args:
        call: `call(name, inputs, training)` runs a model.
    """

    def __init__(self, models: Mapping[str, keras.Model], call: Callable, training: bool):
        self._models, self._run, self.training = models, call, training
        self._earlier: dict[str, list] = {}  # by model that was called: the penalties of its calls but the last

    def _call(self, name: str, inputs, training: bool | None):
        model = self._models[name]
        if name in self._earlier:
            self._earlier[name] += call_losses(model)  # the next call drops them
        else:
            self._earlier[name] = []
        return self._run(name, inputs, self.training if training is None else training)

    def __call__(self, inputs, training: bool | None = None):
        if len(self._models) > 1:
            raise TypeError(f"there are several models; call one by name: models[name](x), of {', '.join(self)}")
        return self._call(next(iter(self._models)), inputs, training)

    def __getitem__(self, name: str) -> Callable:
        if name not in self._models:
            raise KeyError(f"no model {name!r}; the models are {', '.join(self)}")
        return lambda inputs, training=None: self._call(name, inputs, training)

    def __iter__(self):
        return iter(self._models)

    def __len__(self):
        return len(self._models)

    def penalties(self, names):
        """The sum of the penalties on weights and of all that the calls of these models have added."""
        called = [name for name in names if name in self._earlier]
        return sum(sum(map(ops.sum, self._earlier[name])) + penalties(self._models[name]) for name in called)


def weight_of(batch, dtype):
    """What a batch counts for in a mean: the sum of its "weight", a tensor of `dtype`, or its number of examples."""
    if "weight" in batch:
        return ops.cast(ops.sum(batch["weight"]), dtype)
    leaf = next(_leaves(batch))
    return ops.cast(ops.shape(leaf)[0], dtype) if leaf.shape[0] is None else leaf.shape[0]


def _leaves(batch):
    """The arrays of a batch."""
    for value in batch.values():
        if hasattr(value, "shape"):
            yield value
        else:
            yield from (leaf for leaf in keras.tree.flatten(value) if leaf is not None)


def split(batch: Mapping, count: int) -> list[dict]:
    """A batch in `count` equal parts.

    Raises:
        ValueError: the examples cannot be divided equally.
    """
    total = next(_leaves(batch)).shape[0]
    size, rest = divmod(total, count)
    if rest or not size:
        raise ValueError(
            f"a batch of {total} cannot be cut into {count} equal parts to accumulate gradients over: "
            "choose a batch size that is a multiple"
        )
    return [
        keras.tree.map_structure(lambda array, i=i: array[i * size : (i + 1) * size], dict(batch)) for i in range(count)
    ]


def _once(variables) -> list:
    """Variables in their order, each once."""
    return list({id(variable): variable for variable in variables}.values())


def gradients_or_zeros(gradients: Sequence, variables: Sequence) -> list:
    """Gradients, with zeros where the loss does not use a variable."""
    return [ops.zeros_like(v.value) if grad is None else grad for grad, v in zip(gradients, variables, strict=True)]
