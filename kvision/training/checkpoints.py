"""The checkpoints of a run: a folder of files `step-00000123.npz`, each of which holds all that the run needs to go on.

A file is written atomically (`kvision.files`), and an older one is removed only after the new one and its name are on
the disk: a process that is killed, or a machine that loses power, leaves a valid checkpoint, and at most a temporary
file, which the next process removes. Arrays are keyed by the variables' names, so that a checkpoint of one
backend is read on another. Nothing in a checkpoint is code.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
from keras import ops

from kvision.files import make_folder, remove, remove_temp_files
from kvision.weights.archive import Archive, WeightsError, shorten, weights_error, write

FORMAT = "kvision-checkpoint"


class OtherRunError(WeightsError):
    """A checkpoint is sound, and of another run. It is neither passed over nor removed."""


class NotFiniteError(ArithmeticError):
    """A number to be kept is infinite or not a number; the message is the name of its variable."""


@dataclass
class State:
    """Where a run is, besides its variables.

    Attributes:
        step: how many steps were taken in all.
        history: what the finished epochs gave, plain data.
        totals: the added Means of the unfinished epoch, float64: name -> (sum, weight).
        durations: the seconds of each step of the unfinished epoch.
        best: the models' variables after the best epoch, for early stopping.
        callbacks: for each callback the name of its class, and its state, plain data and arrays.
        stopped: whether a callback has ended the run.
        batches: (steps in an epoch, images in a step), which a run to go on must share.
    """

    step: int = 0
    history: dict = field(default_factory=dict)
    totals: dict[str, tuple] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)
    best: list[np.ndarray] | None = None
    callbacks: list[tuple[str, dict]] = field(default_factory=list)
    stopped: bool = False
    batches: tuple[int, int] | None = None


def _named(prefix: str, variables) -> dict[str, keras.Variable]:
    """The variables by name, in their order."""
    named = {}
    for variable in variables:
        # Keras numbers optimizers and generators on through the whole process ("sgd_1", "seed_generator_3"): no part
        # of it. So the generators of several layers share a name, and are told apart by their order.
        name = f"{prefix}/{re.sub(r'_[0-9]+/', '/', variable.path, count=1)}"
        key, count = name, 1
        while key in named:
            count += 1
            key = f"{name}#{count}"
        named[key] = variable
    return named


def _groups(prefix: str, members) -> dict:
    """Models or optimizers by the prefix of their variables' names: a single one has its own."""
    if not isinstance(members, Mapping):
        return {prefix: members}
    return {f"{prefix}s/{name}": member for name, member in members.items()}


def _variables(models, optimizers, task_variables) -> dict[str, keras.Variable]:
    """All variables of a run by name, each once."""
    named, seen = {}, set()
    groups = {**_groups("model", models), **_groups("optimizer", optimizers)}
    for prefix, variables in [*((key, member.variables) for key, member in groups.items()), ("task", task_variables)]:
        for name, variable in _named(prefix, variables).items():
            if id(variable) not in seen:
                named[name] = variable
                seen.add(id(variable))
    return named


def _best(models) -> list[str]:
    """The names of what early stopping keeps: all variables of the models, in their order."""
    if not isinstance(models, Mapping):
        return list(_named("best", models.variables))
    return [name for key, model in models.items() for name in _named(f"best/{key}", model.variables)]


def _detach(value, arrays: dict[str, np.ndarray]):
    """Plain data whose arrays have moved into `arrays`, as JSON takes it."""
    if isinstance(value, np.ndarray):
        key = f"callbacks/{len(arrays):04d}"
        arrays[key] = value
        return {"array": key}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_detach(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"items": [[_detach(key, arrays), _detach(item, arrays)] for key, item in value.items()]}
    return value


def _attach(value, arrays: dict[str, np.ndarray]):
    """The inverse of `_detach`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[content]
    if kind == "items":
        return {_attach(key, arrays): _attach(item, arrays) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_attach(item, arrays) for item in content)


class Checkpoints:
    """The checkpoints in a folder, of one run.

    Args:
        folder: made with the first checkpoint.
        keep: how many are kept, the newest.
        configuration: what decides the run's numbers, plain data by name, such as {"--seed": 0}. Each checkpoint has
            it, and one whose values differ is refused; names that only one of the two has are not compared.

    Raises:
        ValueError: `keep` is below 1.
        kvision.weights.WeightsError: `folder` is a file.
    """

    def __init__(self, folder: Path, keep: int = 3, configuration: Mapping[str, object] | None = None):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self.configuration = json.loads(json.dumps(dict(configuration or {})))
        self.folder, self.keep = Path(folder), keep
        if self.folder.exists() and not self.folder.is_dir():
            raise weights_error(self.folder, "is a file; checkpoints want a folder")
        self.newest: Path | None = None  # the last that was read or written by this object
        self._broken: list[Path] = []

    def files(self) -> list[Path]:
        """The checkpoints that are there, the newest last."""
        found = [path for path in self.folder.glob("step-*.npz") if re.fullmatch(r"step-[0-9]+", path.stem)]
        return sorted(found, key=lambda path: int(path.stem[5:]))

    def remove_temp_files(self) -> None:
        """Remove what a killed process left of the checkpoint that it was writing."""
        remove_temp_files(self.folder, "step-*")

    def write(self, models, optimizers, state: State, task_variables: Sequence[keras.Variable] = ()) -> Path:
        """Write a checkpoint, then remove those that are too many; its file.

        Args:
            models, optimizers: one each, or mappings by name.
            task_variables: those of the task.

        Raises:
            NotFiniteError: a variable is no longer finite. Nothing was written.
            kvision.weights.WeightsError: the disk refuses; the message names the checkpoint that is left.
        """
        variables = _variables(models, optimizers, task_variables)
        arrays = {key: ops.convert_to_numpy(variable.value) for key, variable in variables.items()}
        for key, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise NotFiniteError(key)
        arrays["epoch/durations"] = np.array(state.durations, np.float64)
        for name, (total, weight) in state.totals.items():
            arrays[f"epoch/sums/{name}"] = np.asarray(total, np.float64)
            arrays[f"epoch/weights/{name}"] = np.asarray(weight, np.float64)
        arrays |= dict(zip(_best(models), state.best, strict=True)) if state.best is not None else {}
        kept = {}
        manifest = {
            "format": FORMAT,
            "backend": keras.backend.backend(),
            "step": state.step,
            "history": state.history,
            "totals": list(state.totals),
            "callbacks": [[name, _detach(content, kept)] for name, content in state.callbacks],
            "stopped": state.stopped,
            "batches": state.batches,
            "configuration": self.configuration,
        }
        arrays |= kept | {"manifest": np.frombuffer(json.dumps(manifest).encode(), np.uint8)}
        path = self.folder / f"step-{state.step:08d}.npz"
        try:
            try:
                make_folder(self.folder)
            except OSError as error:
                raise weights_error(self.folder, f"cannot be made: {error.strerror or error}") from None
            write(path, arrays)
        except WeightsError as error:
            intact = "no checkpoint was written before it"
            if self.newest:
                intact = f"the last checkpoint, {self.newest}, is intact: --resume goes on from it"
            raise WeightsError(f"{error}; {intact}") from None
        self.newest = path
        sound = [other for other in self.files() if other == path or other not in self._broken]
        for other in sorted({*self._broken, *sound[: -self.keep]} - {path}):
            try:
                remove(other)
            except OSError as error:
                text = f"cannot be removed: {error.strerror}; the last checkpoint, {path}, is intact"
                raise weights_error(other, f"{text}: --resume goes on from it") from None
        self._broken = []
        return path

    def read(
        self,
        models,
        optimizers,
        callbacks: Sequence[str] = (),
        batches: tuple[int, int] | None = None,
        task_variables: Sequence[keras.Variable] = (),
    ) -> State:
        """Set models, optimizers and the task's variables to the newest checkpoint that can be read and is of this run;
        returns the state beside them.

        One that is broken is passed over with a warning that names it and the one taken, and goes when the next is
        written. Without any checkpoint nothing is changed, and the state is that of a run's start.

        Args:
            callbacks: the names of the classes of the run's callbacks.
            batches: as in `State`.

        Raises:
            OtherRunError: the newest sound checkpoint is of another run; the message says what differs.
            kvision.weights.WeightsError: there are checkpoints, but none that is sound. Nothing was changed.
        """
        self.remove_temp_files()
        faults: list[WeightsError] = []
        for path in reversed(self.files()):
            try:
                named = _variables(models, optimizers, task_variables)
                arrays, state = _read(path, models, named, callbacks, batches, self.configuration)
            except OtherRunError:
                raise
            except WeightsError as error:
                faults.append(error)
                self._broken.append(path)
                continue
            for key, variable in named.items():
                variable.assign(arrays[key])
            if faults:
                text = "; ".join(str(fault) for fault in faults)
                warnings.warn(f"{text}; passed over, the run goes on from {path}", RuntimeWarning, stacklevel=2)
            self.newest = path
            return state
        if faults:
            more = f" (nor can {shorten(path.name for path in self._broken[1:])})" if faults[1:] else ""
            raise WeightsError(f"{faults[0]}; no run can go on from it{more}: start a new one in another folder")
        return State(batches=batches)


def _other_run(path: Path, what: str) -> OtherRunError:
    text = "no run can go on from it but one that is the same: make this one so, or start a new one in another folder"
    return OtherRunError(str(weights_error(path, f"{what}; {text}")))


def _read(path: Path, models, variables, callbacks, batches, configuration) -> tuple[dict[str, np.ndarray], State]:
    """The arrays of a checkpoint and its state, all checked, for `variables` by name."""
    with Archive(path) as archive:
        arrays = {key: archive.read(key) for key in archive.members}
    try:
        manifest = json.loads(bytes(arrays.pop("manifest")))
        if manifest["format"] != FORMAT:
            raise ValueError
        state = State(
            step=manifest["step"],
            history=manifest["history"],
            callbacks=[(name, _attach(content, arrays)) for name, content in manifest["callbacks"]],
            stopped=manifest["stopped"],
            batches=manifest["batches"] and tuple(manifest["batches"]),
            durations=arrays.pop("epoch/durations").tolist(),
            totals={
                name: (arrays.pop(f"epoch/sums/{name}"), arrays.pop(f"epoch/weights/{name}"))
                for name in manifest["totals"]
            },
        )
        other = manifest.get("configuration") or {}
        differing = [name for name in configuration if name in other and other[name] != configuration[name]]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise weights_error(path, "is not a checkpoint of a training run") from None
    if differing:
        theirs, ours = (shorten([f"{name} {of[name]}" for name in differing], 5) for of in (other, configuration))
        text = f"is of a run with {theirs}; this run has {ours}"
        raise _other_run(path, text)
    best = {key: arrays[key] for key in _best(models) if key in arrays}
    stored = {key for key in arrays if not key.startswith(("best/", "callbacks/"))}
    if different := sorted(stored ^ set(variables)):
        whose = "that network" if different[0] in stored else "this one"
        name = ", ".join(models) if isinstance(models, Mapping) else models.name
        text = f"is not a checkpoint of {name} with this optimizer: only {whose} has {shorten(different)}"
        raise _other_run(path, text)
    for key, variable in variables.items():
        shape, kind = tuple(variable.shape), {"f": "f", "b": "b"}.get(variable.dtype[0], "iu")
        if arrays[key].shape != shape or arrays[key].dtype.kind not in kind:
            text = f"{key} is {arrays[key].dtype} {arrays[key].shape}, not {variable.dtype} {shape}"
            raise _other_run(path, text)
        if kind == "iu":
            # The states of generators are uint32, int64 or int32, by backend; each holds numbers below 2**31.
            arrays[key] = arrays[key].astype(variable.dtype)
    if batches is not None and state.batches != tuple(batches):
        text = f"is of a run with (steps an epoch, images a step) {state.batches}; this run has {tuple(batches)}"
        raise _other_run(path, text)
    if (names := [name for name, _ in state.callbacks]) != list(callbacks):
        raise _other_run(path, f"is of a run with the callbacks {names}; this run has {list(callbacks)}")
    if best:
        state.best = list(best.values())
    return arrays, state
