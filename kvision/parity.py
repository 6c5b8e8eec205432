"""Whether a model computes the same on every backend: `python -m kvision parity resnet20`.

Each backend is a child process of its own (Keras knows one at a time), and all start from the same weights and the same
images. A child keeps the output of every layer at inference and in training, the loss, the gradient of each weight, and
the losses and weights of some steps with augmentation, momentum, weight decay and a schedule. What is compared are
those. Where they part, the first layer to do so is named: its inputs agreed, so the fault lies there.

In float64 rounding is so small that what parts is an error: a padding, an epsilon, a layer that computes in float32. In
float32 the forward pass and the first loss tell; later losses part by rounding alone, and are shown and not judged.

Of a tensor are kept up to `KEPT` values at places that depend on its size alone, and the mean, the Euclidean norm, the
largest magnitude and the number of values that are not finite, all of which are compared: what parts elsewhere shows in
those.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kvision.engine import FLOORS, installed
from kvision.flags import UsageError
from kvision.random import stream
from kvision.tracking.environment import BACKENDS, hardware, versions
from kvision.tracking.page import write

AT_ONCE = 2  # child processes that run side by side: starting one takes a core some seconds
KEPT = 4096  # values of a tensor
WARMUP, MOMENTUM, WEIGHT_DECAY, SHIFT = 0.2, 0.9, 5e-4, 4  # of the steps

# The stages in the order in which a difference spreads, with what each is called in the table.
STAGES = {
    "initial": "initial weights",
    "inference_layers": "inference, every layer",
    "inference": "inference, outputs",
    "training_layers": "training, every layer",
    "training": "training, outputs",
    "loss": "loss",
    "gradients": "gradients",
    "losses": "losses of the steps",
    "weights": "weights after the steps",
}
# The largest difference that passes, relative to the scale of what is compared; None is shown and not judged. Scale is
# the largest magnitude in the tensor; of gradients and weights the largest in their layer, because the gradient of a
# bias before a batch norm is 0 and rounding all that is there of it. In float32 gradients are not judged: where a ReLU
# reads a number of the size of rounding, backends take its two sides. In ResNet-20 at batch 8, three numbers of 1e-6
# did so between JAX and TensorFlow, and gradients parted by 7e-2; between TensorFlow and PyTorch none did, and they
# agreed to 1e-5.
LIMITS: dict[str, dict[str, float | None]] = {
    "float64": {**dict.fromkeys(STAGES, 1e-10), "initial": 0.0, "weights": 1e-9},
    "float32": {
        "initial": 0.0,
        "inference_layers": 1e-4,
        "inference": 1e-5,
        "training_layers": 1e-4,
        "training": 1e-4,
        "loss": 1e-6,
        "gradients": None,
        "losses": None,
        "weights": None,
    },
}
# A layer whose inputs part by this share of what its outputs do has not parted by itself; nor has a loss, where the
# gradients or losses before did. (A batch norm over four numbers multiplies rounding by a thousand.)
GROWN, GROWN_IN_A_STEP = 0.03, 1e-3
# Attributes that every layer has and that say nothing of what it computes.
COMMON = {
    *("name", "built", "autocast", "supports_jit", "supports_masking", "stateful", "rank", "seed", "inputs", "outputs"),
    *("training", "call_signature_parameters", "lora_enabled", "lora_rank", "lora_alpha"),
}


@dataclass(frozen=True)
class Question:
    """What is to be compared.

    Args:
        model: a network of the zoo, a `.keras` file, or `module:function` whose function returns a `keras.Model`.
        dtype: "float64" or "float32".
        input_shape: (height, width, channels); None takes the model's own.
        classes: how many, of a network of the zoo or a function that takes `classes`; None takes the model's own.
        own: arguments of the network's or the function's own.
        batch: images a step.
        steps: training steps; 0 takes none.
        learning_rate: the largest of the schedule.
        data: folder or file of a data set, as `kvision.data.load` reads it; None draws the images.
    """

    model: str
    dtype: str = "float64"
    input_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    own: Mapping[str, object] = field(default_factory=dict)
    batch: int = 8
    steps: int = 5
    seed: int = 0
    learning_rate: float = 0.01
    data: str | None = None


# What is kept of a tensor, and how far two are apart


@dataclass(frozen=True)
class Tensor:
    """What is kept of a tensor.

    Args:
        values: those at `places`, flat.
        mean, largest, norm: of the finite ones: mean, largest magnitude, Euclidean norm.
        odd: how many are infinite or not a number.
    """

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    mean: float
    largest: float
    norm: float
    odd: int


@dataclass(frozen=True)
class Gap:
    """How far two tensors of one name are apart.

    Args:
        size: the largest difference relative to their scale; infinite where shapes or non-finite values differ.
        index: where, or None where it is at none of the places kept.
        values: the first's and the second's there.
    """

    name: str
    size: float
    index: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None


def places(size: int) -> np.ndarray:
    """The flat places of a tensor of `size` values that are kept: all, or up to `KEPT` by chance, the same for all."""
    return np.arange(size) if size <= KEPT else np.unique(stream(0, "places", size).integers(size, size=KEPT))


def keep(name: str, array) -> Tensor:
    """What is kept of an array."""
    array = np.asarray(array)
    wide = array.reshape(-1).astype(np.float64)
    values = wide[places(wide.size)]
    finite = np.isfinite(wide)
    odd = int(wide.size - finite.sum())
    if odd:
        wide = wide[finite]
    mean, largest = (float(wide.mean()), float(np.abs(wide).max())) if wide.size else (0.0, 0.0)
    return Tensor(name, tuple(map(int, array.shape)), values, mean, largest, float(np.sqrt(wide @ wide)), odd)


def gap(a: Tensor, b: Tensor, scale: float | None = None) -> Gap:
    """How far two tensors are apart, relative to `scale`: by default the largest magnitude in either."""
    if a.shape != b.shape:
        return Gap(a.name, math.inf)
    if not a.values.size:
        return Gap(a.name, 0.0)
    scale = scale or max(a.largest, b.largest) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.values - b.values)
    apart[(a.values == b.values) | (np.isnan(a.values) & np.isnan(b.values))] = 0
    apart[np.isnan(apart)] = np.inf
    at = int(apart.argmax())
    sizes = float(apart[at]), abs(a.mean - b.mean), abs(a.norm - b.norm) / math.sqrt(math.prod(a.shape) or 1)
    if a.odd != b.odd:
        sizes = *sizes[:1], math.inf, 0.0
    if max(sizes[1:]) > sizes[0] * (1 + 1e-6):  # which no difference at the places kept explains
        return Gap(a.name, max(sizes[1:]) / scale)
    index = tuple(map(int, np.unravel_index(places(math.prod(a.shape))[at], a.shape)))
    return Gap(a.name, sizes[0] / scale, index, (float(a.values[at]), float(b.values[at])))


def worst(gaps: Sequence[Gap]) -> Gap:
    """The largest of some; the first of equal ones."""
    return max(gaps, key=lambda item: item.size, default=Gap("", 0.0))


# What a child leaves, and what is read off several


@dataclass
class Result:
    """What one backend has computed.

    Args:
        operations: of the graph in the order of execution: name, type, settings (a dictionary of plain values), inputs
            (places in this list), dtype, random (whether it draws on the backend).
        outputs: places in `operations` of the model's outputs.
        tensors: by stage, in order: "initial", "inference_layers" and "training_layers" (one an operation, each run for
            itself), "inference" (of all at once, as in scoring), "gradients", "weights".
        loss: at the initial weights, in training mode, and `losses` of the steps from then on.
        notes: what the reader should know of the model.
    """

    backend: str
    operations: list[dict]
    outputs: list[int]
    tensors: dict[str, list[Tensor]]
    loss: float
    losses: list[float]
    notes: list[str]

    def save(self, folder: Path) -> None:
        arrays = {f"{stage}/{i}": t.values for stage, kept in self.tensors.items() for i, t in enumerate(kept)}
        np.savez(folder / f"{self.backend}.npz", **arrays)
        rows = {
            stage: [{k: v for k, v in vars(tensor).items() if k != "values"} for tensor in kept]
            for stage, kept in self.tensors.items()
        }
        (folder / f"{self.backend}.json").write_text(json.dumps({**vars(self), "tensors": rows}))

    @classmethod
    def load(cls, folder: Path, backend: str) -> "Result":
        content = json.loads((folder / f"{backend}.json").read_text())
        with np.load(folder / f"{backend}.npz", allow_pickle=False) as file:
            content["tensors"] = {
                stage: [
                    Tensor(**{**row, "shape": tuple(row["shape"]), "values": file[f"{stage}/{i}"]})
                    for i, row in enumerate(rows)
                ]
                for stage, rows in content["tensors"].items()
            }
        return cls(**content)


def _keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """A layer may run more than once: (name, which time)."""
    seen: Counter = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _matched(a: Sequence[Tensor], b: Sequence[Tensor]) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """The tensors that both have, in the order of the first."""
    others = dict(zip(_keys([tensor.name for tensor in b]), b, strict=True))
    pairs = zip(_keys([tensor.name for tensor in a]), a, strict=True)
    return {key: (tensor, others[key]) for key, tensor in pairs if key in others}


def layer_gaps(a: Result, b: Result, stage: str) -> dict[tuple[str, int], Gap]:
    """How far the outputs of each layer are apart, in the order of execution."""
    return {key: gap(*pair) for key, pair in _matched(a.tensors[stage], b.tensors[stage]).items()}


def variable_gaps(a: Result, b: Result, stage: str) -> list[Gap]:
    """How far variables or gradients are apart, relative to the largest in their layer.

    A layer whose gradients are less than a millionth of the largest of all is measured by that.
    """
    tensors = a.tensors[stage]
    largest: dict[str, float] = {}
    for tensor in tensors:
        layer = tensor.name.rpartition("/")[0]
        largest[layer] = max(largest.get(layer, 0.0), tensor.largest)
    floor = 1e-6 * max(largest.values(), default=0.0) if stage == "gradients" else 0.0
    pairs = _matched(tensors, b.tensors[stage]).values()
    return [gap(x, y, max(largest[x.name.rpartition("/")[0]], floor)) for x, y in pairs]


def _loss_gap(name: str, a: float, b: float) -> Gap:
    found = gap(keep(name, [a]), keep(name, [b]), abs(a) if math.isfinite(a) else None)
    return Gap(name, found.size, None, (a, b))


def stage_gaps(a: Result, b: Result) -> dict[str, Gap]:
    """The largest difference of each stage."""
    gaps = {"initial": worst(variable_gaps(a, b, "initial"))}
    for stage in ("inference", "training"):
        layers = layer_gaps(a, b, f"{stage}_layers")
        keys = _keys([tensor.name for tensor in a.tensors[f"{stage}_layers"]])
        gaps[f"{stage}_layers"] = worst(list(layers.values()))
        if stage == "training":
            gaps[stage] = worst([layers.get(keys[i], Gap(keys[i][0], math.inf)) for i in a.outputs])
        else:
            gaps[stage] = worst([gap(*pair) for pair in _matched(a.tensors[stage], b.tensors[stage]).values()])
    gaps["loss"] = _loss_gap("loss", a.loss, b.loss)
    gaps["gradients"] = worst(variable_gaps(a, b, "gradients"))
    pairs = enumerate(zip(a.losses, b.losses, strict=True), start=1)
    gaps["losses"] = worst([_loss_gap(f"step {i}", *pair) for i, pair in pairs])
    gaps["weights"] = worst(variable_gaps(a, b, "weights"))
    for stage in ("initial", "gradients", "weights"):
        names = [{tensor.name for tensor in result.tensors[stage]} for result in (a, b)]
        if lone := sorted(names[0] ^ names[1]):
            gaps[stage] = Gap(lone[0], math.inf)
    return gaps


def within(found: Mapping[str, Gap], limits: Mapping[str, float | None]) -> bool:
    """Whether every stage that is judged stays within its limit."""
    return all(limits[stage] is None or item.size <= limits[stage] for stage, item in found.items())


def reference(results: Sequence[Result], limits: Mapping[str, float | None]) -> Result:
    """The first of the backends that agree with most of the others, so that of three the odd one out is named."""
    agree = [sum(within(stage_gaps(a, b), limits) for b in results if b is not a) for a in results]
    return results[agree.index(max(agree))]


def _settings(a: Result, b: Result, at: int, other: int) -> dict[str, list]:
    mine, theirs = a.operations[at], b.operations[other]
    mine, theirs = ({"type": op["type"], "dtype": op["dtype"], **op["settings"]} for op in (mine, theirs))
    names = dict.fromkeys((*mine, *theirs))
    return {name: [mine.get(name), theirs.get(name)] for name in names if mine.get(name) != theirs.get(name)}


def first_fault(results: Sequence[Result], a: Result, b: Result, limits: Mapping[str, float | None]) -> dict | None:
    """The first place where `b` parts from the reference `a`; None where it does not.

    A dictionary: stage, backend, kind ("layer", "joined", "backward", "variable", "loss", "step") and what is of it.
    """
    found = stage_gaps(a, b)
    beyond = [stage for stage in STAGES if limits[stage] is not None and not found[stage].size <= limits[stage]]
    if not beyond:
        return None
    fault = {"backend": b.backend, "reference": a.backend, "stage": beyond[0], **_place(found[beyond[0]])}
    if beyond[0] == "initial":
        return fault | {"kind": "variable"}
    for stage in ("inference", "training"):
        if {stage, f"{stage}_layers"} & set(beyond):
            limit = limits[f"{stage}_layers" if f"{stage}_layers" in beyond else stage]
            return fault | (_layer_fault(results, a, b, f"{stage}_layers", limit) or {"kind": "joined"})
    if beyond[0] == "gradients":
        return fault | _backward_fault(a, b, limits["gradients"])
    if beyond[0] == "losses":
        pairs = enumerate(zip(a.losses, b.losses, strict=True), start=1)
        gaps = [_loss_gap(f"step {i}", *pair) for i, pair in pairs]
        at = next(i for i, item in enumerate(gaps) if not item.size <= limits["losses"])
        before = max(worst(gaps[:at]).size, found["gradients"].size)
        grown = before > GROWN_IN_A_STEP * gaps[at].size
        return fault | {"kind": "step", **_place(gaps[at]), "before": before, "grown": grown}
    return fault | {"kind": "loss" if beyond[0] == "loss" else "variable"}


def _place(found: Gap) -> dict:
    return {"name": found.name, "difference": found.size, "index": found.index, "values": found.values}


def _layer_fault(results, a: Result, b: Result, stage: str, limit: float) -> dict | None:
    """The first layer whose outputs part by more than the limit; None where none does, one by one."""
    gaps = layer_gaps(a, b, stage)
    key = next((key for key, item in gaps.items() if not item.size <= limit), None)
    if key is None:
        return None
    keys = {r.backend: _keys([operation["name"] for operation in r.operations]) for r in results}
    at, other = keys[a.backend].index(key), keys[b.backend].index(key)
    operation, found = a.operations[at], gaps[key]
    inputs, lone = {}, []
    for i in operation["inputs"]:
        name = keys[a.backend][i]
        if name in gaps:
            inputs[name[0]] = gaps[name].size
        else:
            lone.append(name[0])
    extra = [keys[b.backend][i][0] for i in b.operations[other]["inputs"] if keys[b.backend][i] not in gaps]
    values = {}
    if found.index is not None:
        for r in results:
            tensor = dict(zip(_keys([t.name for t in r.tensors[stage]]), r.tensors[stage], strict=True)).get(key)
            if tensor is not None and tensor.shape == a.tensors[stage][at].shape:
                flat = np.ravel_multi_index(found.index, tensor.shape)
                values[r.backend] = float(tensor.values[np.searchsorted(places(math.prod(tensor.shape)), flat)])
    shapes = {r.backend: t.shape for r, t in ((a, a.tensors[stage][at]), (b, b.tensors[stage][other]))}
    return {
        "kind": "layer",
        "stage": stage,
        **_place(found),
        "values": values,
        "place": at + 1,
        "of": len(a.operations),
        "type": operation["type"],
        "settings": operation["settings"],
        "random": operation["random"],
        "shapes": shapes if len(set(shapes.values())) > 1 else {},
        "settings_that_differ": _settings(a, b, at, other),
        "inputs": inputs,
        "inputs_on_one_backend": {a.backend: lone, b.backend: extra} if lone or extra else {},
        "grown": max(inputs.values(), default=0.0) > GROWN * found.size,
    }


def _backward_fault(a: Result, b: Result, limit: float) -> dict:
    """Gradients flow backwards: the fault is behind the last layer, in the order of execution, whose gradient parts."""
    order = {name: i for i, (name, _) in enumerate(_keys([operation["name"] for operation in a.operations]))}
    gaps = [(order.get(item.name.split("/")[0], -1), item) for item in variable_gaps(a, b, "gradients")]
    last, found = max(((i, item) for i, item in gaps if not item.size <= limit), key=lambda pair: pair[0])
    behind = [i for i, item in gaps if item.size <= limit and i > last]
    end = min(behind, default=len(a.operations) - 1)
    between = [a.operations[i]["name"] for i in range(max(last, 0), end + 1)] if last >= 0 else []
    return {"kind": "backward", **_place(found), "between": between}


def judge(results: Sequence[Result], question: Question) -> dict:
    """Compare the results of at least two backends.

    Returns:
        A dictionary of plain values: reference, rows (stage, backend, difference, where, limit, passed), losses by
        backend, faults, notes, passed.
    """
    limits = LIMITS[question.dtype]
    first = reference(results, limits)
    rows, faults = [], []
    for other in results:
        if other is first:
            continue
        for stage, found in stage_gaps(first, other).items():
            limit = limits[stage]
            row = {"stage": stage, "backend": other.backend, "difference": found.size, "where": found.name}
            rows.append(row | {"limit": limit, "passed": limit is None or found.size <= limit})
        if fault := first_fault(results, first, other, limits):
            faults.append(fault)
    names = {result.backend: Counter(operation["name"] for operation in result.operations) for result in results}
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    for name in dict.fromkeys(name for counter in names.values() for name in counter):
        having = [backend for backend, counter in names.items() if counter[name]]
        if len(having) < len(results):
            notes.append(f"{name} is a layer on {', '.join(having)} alone")
    return {
        "reference": first.backend,
        "rows": rows,
        "losses": {result.backend: result.losses for result in results},
        "loss": {result.backend: result.loss for result in results},
        "faults": faults,
        "notes": notes,
        "passed": not faults,
    }


# The child: one backend


def _number_of_classes(model, keras) -> int | None:
    """How many classes, where every output is (n, classes); None where the model is no classifier."""
    shapes = [tuple(output.shape) for output in keras.tree.flatten(model.outputs)]
    return shapes[0][1] if all(len(shape) == 2 and shape[1] for shape in shapes) else None


def _in_double(path: Path, dtype: str, folder: Path) -> Path:
    """A copy of a `.keras` file whose layers compute in `dtype` where they did in float32: the file says it of each."""

    def convert(value, key=None):
        if isinstance(value, dict):
            if key == "dtype" and value.get("class_name") == "DTypePolicy" and value["config"]["name"] == "float32":
                return {**value, "config": {**value["config"], "name": dtype}}
            return {name: convert(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [convert(item) for item in value]
        return dtype if key == "dtype" and value == "float32" else value

    copy = folder / path.name
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == "config.json":
                content = json.dumps(convert(json.loads(content))).encode()
            target.writestr(entry, content)
    return copy


def _load_file(question: Question, keras):
    from kvision import zoo

    zoo.list_models()  # imports every network's own layers, so that Keras knows them
    if question.own or question.classes is not None:
        raise UsageError(f"{question.model} is built already: --set and --classes do not apply to a .keras file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(question.model)
        try:
            if question.dtype != "float32":
                path = _in_double(path, question.dtype, Path(folder))
            return keras.saving.load_model(path, compile=False, safe_mode=True)
        except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"{question.model} cannot be loaded: {reason} (a model with code of its own is named module:function)"
            ) from None


def _call_function(question: Question, keras):
    module, _, name = question.model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UsageError(f"{question.model}: cannot import {module}: {error}") from None
    except AttributeError:
        raise UsageError(f"{question.model}: {module} has no {name}") from None
    given = dict(question.own)
    if question.input_shape is not None:
        given["input_shape"] = question.input_shape
    if question.classes is not None:
        given["classes"] = question.classes
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise UsageError(f"{question.model} cannot be called with {given or 'no arguments'}: {error}") from None
    model = function(**given)
    if not isinstance(model, keras.Model):
        raise UsageError(f"{question.model} returned a {type(model).__name__}; expected a keras.Model")
    return model


def _build(question: Question, keras):
    """The model, and the (height, width, channels) of its images."""
    from kvision import zoo
    from kvision.layers import blank

    if question.model.endswith(".keras"):
        model = _load_file(question, keras)
    elif ":" in question.model:
        model = _call_function(question, keras)
    else:
        try:
            with blank():
                model = zoo.create_model(question.model, question.input_shape, question.classes, **question.own)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if isinstance(model, keras.Sequential):
        if not model.built and question.input_shape is not None:
            model.build((None, *question.input_shape))
        if model.built:
            model = keras.Model(model.inputs, model.outputs, name=model.name)  # the same layers, as a graph
    shape = getattr(model, "input_shape", None) if model.built else (None, *(question.input_shape or ()))
    return model, _check_shape(question, shape, model.built)


def _check_shape(question: Question, shape, built: bool) -> tuple[int, int, int]:
    """The (height, width, channels) to take for a model that reads inputs of `shape`."""
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise UsageError(
            f"{question.model} reads inputs of shape {shape}; expected one input of images (n, height, width, channels)"
            + ("" if built else ": the model is not built, give --input-shape")
        )
    wanted = question.input_shape or shape[1:]
    if any(side is None for side in wanted):
        raise UsageError(f"{question.model} reads images of any size {shape[1:]}: give --input-shape, as in 32x32x3")
    if any(side not in (None, given) for side, given in zip(shape[1:], wanted, strict=True)):
        raise UsageError(f"{question.model} reads images of {shape[1:]}, not of --input-shape {wanted}")
    return tuple(wanted)


def _start(model, question: Question) -> None:
    """Set the weights that every backend starts from; a file keeps its own. Generators are set in any case."""
    from kvision.layers import Variance
    from kvision.weights.initial import initialize

    weights = [(variable, np.array(variable.numpy())) for variable in model.weights]
    try:
        initialize(model, question.seed)
    except ValueError:  # of a user's model, an initialiser that NumPy does not know
        for variable, value in weights:
            if value.size and (value != value.flat[0]).any():
                generator = stream(question.seed, "initial", variable.path)
                variable.assign(Variance(1.0, "in").draw(value.shape, generator))
        for i, variable in enumerate(v for v in model.variables if v.dtype in ("uint32", "int32", "int64")):
            if tuple(variable.shape) == (2,):
                variable.assign(np.array([stream(question.seed, "generator", i).integers(2**31), 0], np.uint32))
    if question.model.endswith(".keras"):
        for variable, value in weights:
            variable.assign(value)


def _images(question: Question, shape: tuple[int, int, int], classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images, four batches of them where they are drawn, and labels."""
    count = 4 * question.batch
    if question.data is not None:
        from kvision.data import load

        dataset = load("cifar10", question.data, size=shape[:2], log=lambda line: None)
        images, labels = dataset.x_train[:count], dataset.y_train[:count]
        if images.shape[1:] != shape:
            raise UsageError(f"--data has images of {images.shape[1:]}, and {question.model} reads {shape}")
        return images, labels % (classes or 1)
    # Coarse patches of colour under noise: a network sees edges, and no two pixels that it pools are equal for long.
    generator = stream(question.seed, "images")
    height, width, channels = shape
    patches = generator.integers(0, 192, (count, -(-height // 8), -(-width // 8), channels))
    images = patches.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    images = (images + generator.integers(0, 64, images.shape)).astype(np.uint8)
    return images, generator.integers(0, classes or 1, count).astype(np.int32)


def _plain(value):
    """A setting as JSON has it; None for what is none."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(item, bool | int | float | str | list | tuple) for item in value
    ):
        return [_plain(item) for item in value]
    return None


def _operation(operation, inputs: list[int]) -> dict:
    # Its attributes and not get_config(), which a user's layer may lack and which takes Keras seconds for a network.
    settings = {
        name: getattr(value, "__name__", None) if name == "activation" else _plain(value)
        for name, value in vars(operation).items()
        if not name.startswith("_") and name not in COMMON
    }
    return {
        "name": operation.name,
        "type": type(operation).__name__,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "inputs": inputs,
        "dtype": getattr(operation, "compute_dtype", None),
        "random": bool(operation.__dict__.get("_seed_generators")) and type(operation).__module__.startswith("keras."),
    }


def _graph(model) -> tuple[list[dict], list[int]]:
    """The operations of a functional model in the order in which Keras runs them, and which of them are outputs."""
    depths = model._nodes_by_depth
    nodes = [
        node for depth in sorted(depths, reverse=True) for node in depths[depth] if node.operation and not node.is_input
    ]
    at = {id(node): i for i, node in enumerate(nodes)}
    operations = [
        _operation(node.operation, [at[id(parent)] for parent in node.parent_nodes if id(parent) in at])
        for node in nodes
    ]
    history = [output._keras_history for output in model.outputs]
    return operations, [at[id(item.operation._inbound_nodes[item.node_index])] for item in history]


def _notes(model, question: Question, classes: int | None, operations: list[dict]) -> list[str]:
    notes = []
    if classes is None:
        notes.append("the outputs are not (n, classes): the loss is the mean of their squares")
    elif operations and (
        operations[-1]["type"] == "Softmax" or operations[-1]["settings"].get("activation") == "softmax"
    ):
        notes.append(f"{operations[-1]['name']} is a softmax: the loss takes its outputs as logits all the same")
    if not hasattr(model, "_nodes_by_depth"):
        notes.append(f"{model.name} is no functional model: its layers cannot be told apart, only its outputs are seen")
    other = [operation["name"] for operation in operations if operation["dtype"] not in (None, question.dtype)]
    if other:
        notes.append(
            f"layers that do not compute in {question.dtype}: {', '.join(other[:5])}" + " ..." * (len(other) > 5)
        )
    return notes


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """An operation's only output, or all of several, flat."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.ravel(array) for array in arrays])


def _on_values(loss: Callable, labels, outputs):
    """`loss` of the outputs as numbers: on TensorFlow Keras sees a softmax before a cross-entropy and leaves it out."""
    import keras

    return loss(labels, keras.tree.map_structure(lambda output: output * 1, outputs))


def _squares(labels, outputs):
    import keras
    from keras import ops

    tensors = keras.tree.flatten(outputs)
    return sum(ops.mean(ops.square(tensor)) for tensor in tensors) / len(tensors)


def answer(question: Question) -> Result:
    """What the active backend computes; for a process of its own, whose dtype it sets.

    Raises:
        UsageError: no such model, or one that this test cannot run; one clear line.
        kvision.data.DataError: `data` cannot be read.
    """
    import keras
    from keras import ops

    from kvision import engine, training
    from kvision.data.batches import Augmentation, Batches
    from kvision.data.preprocessing import Preprocessing
    from kvision.tasks.classification import cross_entropy

    engine.configure(dtype=question.dtype, deterministic=True)
    model, shape = _build(question, keras)
    classes = _number_of_classes(model, keras) if model.built else None
    images, labels = _images(question, shape, classes)
    preprocessing = Preprocessing(mean=(0.5,), std=(0.25,))
    batch = preprocessing(images[: question.batch]).astype(question.dtype)
    first_labels = labels[: question.batch]
    if not model.built:
        model(ops.convert_to_tensor(batch))
        classes = _number_of_classes(model, keras)
    loss = partial(_on_values, cross_entropy()) if classes else _squares
    _start(model, question)

    def values(variables):
        return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]

    start = values(model.variables)

    def again():
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)

    def kept(variables):
        return [keep(variable.path, value) for variable, value in zip(variables, values(variables), strict=True)]

    operations, outputs = _graph(model) if hasattr(model, "_nodes_by_depth") else ([], [])
    notes = _notes(model, question, classes, operations)
    weights = [variable for variable in model.weights if "float" in variable.dtype]
    tensors = {"initial": kept(weights)}
    runner = engine.create(model, None, loss)
    tensors["inference"] = [keep("outputs", runner.predict(batch))]
    for stage, training_mode in (("inference_layers", False), ("training_layers", True)):
        if operations:
            rows = [(layer.name, outputs) for layer, outputs in runner.tap(batch, training_mode)]
        else:
            found = keras.tree.flatten(model(ops.convert_to_tensor(batch), training=training_mode))
            rows = [("outputs", [ops.convert_to_numpy(output) for output in found])]
        tensors[stage] = [keep(name, _joined(arrays)) for name, arrays in rows]
        del rows
        again()
    if not operations:
        operations = [
            {"name": tensor.name, "type": "", "settings": {}, "inputs": [], "dtype": None, "random": False}
            for tensor in tensors["inference_layers"]
        ]
        outputs = list(range(len(operations)))
    value, gradients = runner.value_and_grad(batch, first_labels if classes else np.zeros(1, np.int32))
    value = float(value)
    tensors["gradients"] = [
        keep(variable.path, np.zeros(variable.shape) if gradient is None else ops.convert_to_numpy(gradient))
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
    ]
    del gradients, runner
    again()
    losses = []
    if question.steps:
        rates = training.schedule("cosine", question.learning_rate, question.steps, WARMUP)
        optimizer = training.make_optimizer("sgd", rates, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        optimizer.build(model.trainable_variables)
        runner = engine.create(model, optimizer, loss)
        shift = min(SHIFT, *(side // 4 for side in shape[:2]))
        batches = Batches(images, labels, question.batch, question.seed, preprocessing, Augmentation(True, shift))
        for step in range(question.steps):
            epoch, place = divmod(step, batches.steps)
            if place == 0:
                shown = batches.epoch(epoch)
            batch, batch_labels = next(shown)
            batch_labels = batch_labels if classes else np.zeros(1, np.int32)
            losses.append(float(runner.train_step(batch.astype(question.dtype), batch_labels)[0]))
        runner.push()
    tensors["weights"] = kept(weights)
    return Result(keras.backend.backend(), operations, outputs, tensors, value, losses, notes)


def child(folder: str) -> int:
    """Answer the question in a folder with the active backend; the exit code. A wrong question becomes a file there."""
    from kvision.data import DataError

    content = json.loads((Path(folder) / "question.json").read_text())
    if content["input_shape"] is not None:
        content["input_shape"] = tuple(content["input_shape"])
    try:
        answer(Question(**content)).save(Path(folder))
    except (UsageError, DataError) as error:
        (Path(folder) / "wrong").write_text(str(error))
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


# The parent: all of them


def check(question: Question) -> None:
    """See what can be seen of a question without a backend.

    Raises:
        UsageError: one clear line.
    """
    if question.dtype not in LIMITS:
        raise UsageError(f"--dtype must be one of {', '.join(LIMITS)}, got {question.dtype!r}")
    for name, least in (("batch", 1), ("steps", 0), ("seed", 0)):
        if getattr(question, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(question, name)}")
    if not (question.learning_rate > 0 and math.isfinite(question.learning_rate)):
        raise UsageError(f"--learning-rate must be a positive number, got {question.learning_rate}")
    if question.classes is not None and question.classes < 1:
        raise UsageError(f"--classes must be at least 1, got {question.classes}")
    shape = question.input_shape
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise UsageError(
            "--input-shape must be an image's, height x width x channels as in 32x32x3, "
            f"got {'x'.join(map(str, shape))}"
        )
    path = Path(question.model)
    if path.suffix == ".keras":
        if not path.is_file():
            raise UsageError(f"{path}: no such file; expected a model that Keras saved")
    elif path.suffix in (".h5", ".npz", ".pth", ".pt", ".onnx", ".safetensors", ".json"):
        raise UsageError(f"{path}: parity reads networks of the zoo, .keras files and module:function")


def compare(question: Question, backends: Sequence[str] = FLOORS, log: Callable[[str], None] = print) -> dict:
    """Run a model on each installed backend and compare; returns the report, a dictionary of plain values.

    Beside what `judge` gives it holds the question, versions, hardware, and the backends that "failed", with reasons.

    Raises:
        UsageError: an unknown backend, fewer than two that are installed, no such model; one clear line.
    """
    check(question)
    if unknown := [backend for backend in backends if backend not in FLOORS]:
        raise UsageError(f"--backends knows {', '.join(FLOORS)}, got {', '.join(unknown)}")
    present = [backend for backend in dict.fromkeys(backends) if installed(backend)]
    if len(present) < 2:
        raise UsageError(
            f"parity compares at least two backends, and of {', '.join(backends)} "
            f"{'only ' + present[0] if present else 'none'} is installed: pip install kvision-keras[all]"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "question.json").write_text(json.dumps(asdict(question)))
        wrong: list[str] = []

        def run(backend: str) -> tuple[int, str]:
            if wrong:
                return 2, ""
            words = [sys.executable, "-m", "kvision.parity", str(folder)]
            path = folder / f"{backend}.log"
            with open(path, "w") as file:
                environment = {**os.environ, "KERAS_BACKEND": backend}
                code = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
            text = path.read_text(errors="replace").strip()
            if (folder / "wrong").exists():
                wrong.append((folder / "wrong").read_text())
                return code, text
            log(f"{backend}: {'done' if code == 0 else 'failed'}")
            return code, text

        with ThreadPoolExecutor(AT_ONCE) as pool:
            codes = dict(zip(present, pool.map(run, present), strict=True))
        if wrong:
            raise UsageError(wrong[0])
        failed = {
            backend: {"reason": text.rpartition("\n")[2] or f"exit code {code}", "log": text[-4000:]}
            for backend, (code, text) in codes.items()
            if code
        }
        results = [Result.load(folder, backend) for backend in present if backend not in failed]
    report = {
        "question": asdict(question),
        "backends": present,
        "versions": {
            backend: {name: v for name, v in versions(backend).items() if name in BACKENDS[backend]}
            for backend in present
        },
        "hardware": hardware(),
        "failed": failed,
    }
    if len(results) < 2:
        reasons = "; ".join(f"{backend}: {row['reason']}" for backend, row in failed.items())
        raise UsageError(f"{question.model} does not run on two backends: {reasons}")
    report |= judge(results, question)
    report["passed"] = report["passed"] and not failed
    return report


# The report


def _size(value: float) -> str:
    return "0" if value == 0 else "different" if math.isinf(value) else f"{value:.1e}"


def _value(value: float) -> str:
    return f"{value:.17g}"


def _describe(fault: dict) -> list[str]:
    backend, first = fault["backend"], fault["reference"]
    stage = STAGES[fault["stage"]]
    if fault["kind"] in ("loss", "step"):
        a, b = map(_value, fault["values"])
        if fault["kind"] == "loss":
            reason = "the outputs agreed, so the fault lies in the loss"
        elif fault["grown"]:
            reason = (
                f"losses or gradients before parted by {_size(fault['before'])} already: rounding has grown from step "
                "to step, which a smaller --learning-rate or a larger --batch slows"
            )
        else:
            agreed = f"agreed to {_size(fault['before'])}" if fault["before"] else "agreed"
            reason = f"the losses before and every gradient {agreed}, so the fault lies in the optimizer"
        where = "the loss" if fault["kind"] == "loss" else f"the loss of {fault['name']}"
        return [
            f"{backend} parts from {first} at {where}",
            f"  {a} on {first}, {b} on {backend}: {_size(fault['difference'])} of it",
            f"  {reason}",
        ]
    if fault["kind"] == "joined":
        return [
            f"{backend} parts from {first} in {stage}, by {_size(fault['difference'])} of the scale",
            "  every layer by itself agreed: the fault lies where kvision.engine makes one call of neighbours",
        ]
    lines = []
    if fault["kind"] == "layer":
        lines.append(
            f"{backend} parts from {first} at {fault['name']}, layer {fault['place']} of {fault['of']}, in {stage}"
        )
        settings = ", ".join(f"{name} {_shown(value)}" for name, value in fault["settings"].items())
        lines.append(f"  {fault['type']}" + (f": {settings}" if settings else ""))
    elif fault["kind"] == "backward":
        lines.append(f"{backend} parts from {first} at the gradient of {fault['name']}")
    else:
        lines.append(f"{backend} parts from {first} at {fault['name']}, in {stage}")
    if fault.get("shapes"):
        shapes = [f"{'x'.join(map(str, shape))} on {name}" for name, shape in fault["shapes"].items()]
        lines.append(f"  its outputs have shapes {', '.join(shapes)}")
    elif fault["index"] is not None:
        values = fault["values"]
        if not isinstance(values, dict):
            values = dict(zip((first, backend), values, strict=True))
        shown = ", ".join(f"{_value(value)} on {name}" for name, value in values.items())
        lines.append(f"  at {list(fault['index'])}: {shown}; {_size(fault['difference'])} of the scale")
    elif math.isinf(fault["difference"]):
        lines.append("  only one of them has it, or values of one are not finite")
    else:
        lines.append(f"  by {_size(fault['difference'])} of the scale, at none of the values kept: means or norms part")
    for name, (a, b) in fault.get("settings_that_differ", {}).items():
        lines.append(f"  {name} is {_shown(a)} on {first}, {_shown(b)} on {backend}")
    for name, lone in fault.get("inputs_on_one_backend", {}).items():
        if lone:
            lines.append(f"  on {name} it reads {', '.join(lone)}, which is not there on the other")
    if fault["kind"] == "layer":
        reach = max(fault["inputs"].values(), default=0.0)
        if fault["grown"]:
            lines.append(
                f"  its inputs parted by {_size(reach)} already: rounding has grown on the way, see the layers before"
            )
        elif not fault["inputs_on_one_backend"]:
            names = ", ".join(fault["inputs"]) or "the images"
            agreed = f"agreed to {_size(reach)}" if reach else "are equal"
            lines.append(f"  its inputs ({names}) {agreed}, so the fault lies in this layer")
        if fault["random"]:
            lines.append(
                f"  Keras's {fault['type']} draws from the backend's generator; kvision.regularizers.{fault['type']}"
                " draws the same on each"
            )
    if fault["kind"] == "backward" and fault["between"]:
        between = fault["between"]
        shown = between if len(between) < 7 else [*between[:3], "...", *between[-3:]]
        lines.append(f"  the outputs agreed, so the fault lies in the gradient of one of: {', '.join(shown)}")
    return lines


def _shown(value) -> str:
    return "x".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)


def text(report: dict) -> str:
    """A report for a terminal."""
    question, first = report["question"], report["reference"]
    others = [backend for backend in report["losses"] if backend != first]
    packages = [
        f"{backend} {next(iter(report['versions'][backend].values()), '')}".strip() for backend in report["losses"]
    ]
    lines = [
        f"{question['model']} in {question['dtype']}, batch {question['batch']}, seed {question['seed']}: "
        f"{', '.join(packages)}; differences from {first}, relative",
        "",
        f"{'':<24}" + "".join(f"{backend:<12}" for backend in others) + f"{'at most':<9} where largest",
    ]
    for stage, title in STAGES.items():
        rows = [row for row in report["rows"] if row["stage"] == stage]
        if stage in ("losses", "weights") and not question["steps"]:
            continue
        largest, limit = max(rows, key=lambda row: row["difference"]), rows[0]["limit"]
        cells = "".join(f"{_size(row['difference']) + ('' if row['passed'] else ' !'):<12}" for row in rows)
        bound = "shown" if limit is None else f"{limit:g}"
        where = largest["where"] if largest["difference"] and largest["where"] != title else ""
        lines.append(f"{title:<24}{cells}{bound:<9} {where}".rstrip())
    if question["steps"]:
        lines += ["", f"{'step':<6}" + "".join(f"{backend:<22}" for backend in report["losses"]) + "apart"]
        columns = list(report["losses"].values())
        for i, values in enumerate(zip(*columns, strict=True), start=1):
            if question["steps"] > 12 and 6 < i <= question["steps"] - 6:
                if i == 7:
                    lines.append("...")
                continue
            apart = (max(values) - min(values)) / (abs(values[0]) or 1)
            lines.append(f"{i:<6}" + "".join(f"{_value(value):<22}" for value in values) + _size(apart))
        if LIMITS[question["dtype"]]["losses"] is None:
            lines += (
                "Gradients part where rounding decides a ReLU's side, and later losses ever more, the higher the",
                "learning rate; --dtype float64 tells rounding from error.",
            )
    lines += ["", *(f"NOTE: {note}" for note in report["notes"])] if report["notes"] else [""]
    for backend, row in report["failed"].items():
        lines.append(f"{backend} failed: {row['reason']}")
    for fault in report["faults"]:
        lines += _describe(fault)
    if report["passed"]:
        lines.append(f"{', '.join(report['losses'])} agree")
    return "\n".join(lines)


def _finite(value):
    """The report as JSON has it, where infinity is no number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shape(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected height x width x channels as in 32x32x3, got {words!r}") from None


def _own(words: Sequence[str]) -> dict[str, object]:
    own = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--set wants NAME=VALUE, got {word!r}")
        try:
            own[name] = json.loads(value)
        except ValueError:
            own[name] = value
    return own


def main(arguments: argparse.Namespace) -> int:
    """Run a comparison as parsed, print its report; 0 where the backends agree, 1 where they do not."""
    question = Question(
        arguments.model,
        arguments.dtype,
        arguments.input_shape,
        arguments.classes,
        _own(arguments.set),
        arguments.batch,
        arguments.steps,
        arguments.seed,
        arguments.learning_rate,
        arguments.data,
    )
    report = compare(question, arguments.backends.split(","), log=lambda line: print(line, file=sys.stderr))
    if arguments.out:
        write(Path(arguments.out), json.dumps(_finite(report), indent=1) + "\n")
    print(text(report))
    return int(not report["passed"])


def add_commands(subparsers) -> None:
    """Add `parity` to the command line of `python -m kvision`."""
    parser = subparsers.add_parser(
        "parity", help="whether a model computes the same on every backend, layer by layer", allow_abbrev=False
    )
    defaults = Question("")
    parser.add_argument("model", metavar="MODEL", help="network of the zoo, .keras file, or module:function")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default=defaults.dtype, help="(default: %(default)s)")
    parser.add_argument("--backends", default=",".join(FLOORS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--input-shape", type=_shape, metavar="HxWxC", help="of the images; default: the model's own")
    parser.add_argument("--classes", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of the model's own")
    parser.add_argument("--batch", type=int, default=defaults.batch, metavar="N", help="images a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=defaults.steps, metavar="N", help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, metavar="X", help="(default: %(default)s)"
    )
    parser.add_argument("--data", metavar="PATH", help="data set to take the images from; default: drawn")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON")
    parser.set_defaults(handler=main)


if __name__ == "__main__":
    sys.exit(child(sys.argv[1]))
