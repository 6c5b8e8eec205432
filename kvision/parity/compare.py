"""Checks whether backends agree, and finds the one that diverges and the first layer at which it does."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from kvision.parity.result import Result
from kvision.parity.tensors import Difference, Tensor, difference, keep, sampled_indices, worst

# The stages in the order in which a difference propagates, with their titles in the table.
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
# The largest difference that passes, relative to the scale of the tensor; None is reported but not checked. The scale
# is the largest magnitude in the tensor, for gradients and weights the largest in their layer: the gradient of a bias
# before a batch norm is 0 except for rounding. In float32 gradients are not checked: an input of a ReLU near 0 may have
# another sign on another backend. In ResNet-20 at batch 8, three inputs of 1e-6 differed in sign between JAX and
# TensorFlow, and gradients differed by 7e-2; between TensorFlow and PyTorch none did, and gradients agreed to 1e-5.
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
# A layer whose inputs differ by this fraction of the difference of its outputs is not the cause; the same holds for a
# loss and the gradients or losses before it. (A batch norm over four numbers multiplies rounding by a thousand.)
GROWN, GROWN_IN_A_STEP = 0.03, 1e-3


def _by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors}


def layer_differences(a: Result, b: Result, stage: str) -> dict[str, Difference]:
    """The differences of the layer outputs that both have, in the order of execution."""
    others = _by_name(b.tensors[stage])
    return {
        tensor.name: difference(tensor, others[tensor.name]) for tensor in a.tensors[stage] if tensor.name in others
    }


def variable_differences(a: Result, b: Result, stage: str) -> list[Difference]:
    """The differences of variables or gradients, relative to the largest magnitude in their layer.

    The difference is infinite for a variable that only one backend has. The scale of gradients is at least a millionth
    of the largest of all layers.
    """
    mine, theirs = _by_name(a.tensors[stage]), _by_name(b.tensors[stage])
    if only_in_one := sorted(mine.keys() ^ theirs.keys()):
        return [Difference(name, math.inf) for name in only_in_one]
    largest: dict[str, float] = {}
    for name, tensor in mine.items():
        layer = name.rpartition("/")[0]
        largest[layer] = max(largest.get(layer, 0.0), tensor.largest)
    floor = 1e-6 * max(largest.values(), default=0.0) if stage == "gradients" else 0.0
    return [difference(mine[name], theirs[name], max(largest[name.rpartition("/")[0]], floor)) for name in mine]


def _loss_difference(name: str, a: float, b: float) -> Difference:
    found = difference(keep(name, [a]), keep(name, [b]), abs(a) if math.isfinite(a) else None)
    return Difference(name, found.size, None, (a, b))


def step_differences(a: Result, b: Result) -> list[Difference]:
    """The differences of the losses of the steps."""
    return [
        _loss_difference(f"step {i}", *pair) for i, pair in enumerate(zip(a.losses, b.losses, strict=True), start=1)
    ]


def stage_differences(a: Result, b: Result) -> dict[str, Difference]:
    """The largest difference of each stage."""
    inference, training = (layer_differences(a, b, f"{stage}_layers") for stage in ("inference", "training"))
    return {
        "initial": worst(variable_differences(a, b, "initial")),
        "inference_layers": worst(inference.values()),
        "inference": worst(layer_differences(a, b, "inference").values()),
        "training_layers": worst(training.values()),
        "training": worst(training.get(name, Difference(name, math.inf)) for name in a.outputs),
        "loss": _loss_difference("loss", a.loss, b.loss),
        "gradients": worst(variable_differences(a, b, "gradients")),
        "losses": worst(step_differences(a, b)),
        "weights": worst(variable_differences(a, b, "weights")),
    }


def exceeding(found: Mapping[str, Difference], limits: Mapping[str, float | None]) -> list[str]:
    """The checked stages that exceed their limits, in the order in which a difference propagates."""
    return [stage for stage in STAGES if limits[stage] is not None and not found[stage].size <= limits[stage]]


def reference(results: Sequence[Result], limits: Mapping[str, float | None]) -> Result:
    """The first of the backends that agree with most of the others; of three, the one that diverges is thus another."""
    agree = [sum(not exceeding(stage_differences(a, b), limits) for b in results if b is not a) for a in results]
    return results[agree.index(max(agree))]


# The first fault


def first_fault(
    results: Sequence[Result], a: Result, b: Result, found: Mapping[str, Difference], limits: Mapping[str, float | None]
) -> dict | None:
    """The first place where `b` diverges from the reference `a`, given its differences by stage; None if it agrees.

    A dictionary: stage, backend, kind ("layer", "fused", "backward", "variable", "loss", "step") and details of the
        kind.
    """
    failed = exceeding(found, limits)
    if not failed:
        return None
    stage = failed[0]
    fault = {"backend": b.backend, "reference": a.backend, "stage": stage, **_location(found[stage])}
    mode = stage.removesuffix("_layers")
    if mode in ("inference", "training"):
        layers = f"{mode}_layers"
        limit = limits[layers if layers in failed else mode]
        return fault | (_layer_fault(results, a, b, layers, limit) or {"kind": "fused"})
    if stage == "gradients":
        return fault | _backward_fault(a, b, limits[stage])
    if stage == "losses":
        return fault | _step_fault(a, b, limits[stage], found["gradients"].size)
    return fault | {"kind": "loss" if stage == "loss" else "variable"}


def _location(found: Difference) -> dict:
    return {"name": found.name, "difference": found.size, "index": found.index, "values": found.values}


def _layer_fault(results: Sequence[Result], a: Result, b: Result, stage: str, limit: float) -> dict | None:
    """The first layer whose outputs differ by more than the limit; None if no single layer does."""
    differences = layer_differences(a, b, stage)
    found = next((item for item in differences.values() if not item.size <= limit), None)
    if found is None:
        return None
    mine, theirs = ({operation["name"]: operation for operation in r.operations} for r in (a, b))
    operation, other = mine[found.name], theirs[found.name]
    tensors = {r.backend: tensor for r in results if (tensor := _by_name(r.tensors[stage]).get(found.name))}
    shapes = {r.backend: tensors[r.backend].shape for r in (a, b)}
    inputs = {name: differences[name].size for name in operation["inputs"] if name in differences}
    only_in_one = {
        r: [name for name in op["inputs"] if name not in differences]
        for r, op in ((a.backend, operation), (b.backend, other))
    }
    return {
        "kind": "layer",
        "stage": stage,
        **_location(found),
        "values": _values_at(found.index, shapes[a.backend], tensors) if found.index is not None else {},
        "position": list(mine).index(found.name) + 1,
        "of": len(mine),
        "type": operation["type"],
        "settings": operation["settings"],
        "random": operation["random"],
        "shapes": shapes if len(set(shapes.values())) > 1 else {},
        "settings_that_differ": _settings_that_differ(operation, other),
        "inputs": inputs,
        "inputs_on_one_backend": only_in_one if any(only_in_one.values()) else {},
        "grown": max(inputs.values(), default=0.0) > GROWN * found.size,
    }


def _values_at(index: tuple[int, ...], shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The values at a kept index, of the backends whose tensor has that shape."""
    at = np.searchsorted(sampled_indices(math.prod(shape)), np.ravel_multi_index(index, shape))
    return {backend: float(tensor.values[at]) for backend, tensor in tensors.items() if tensor.shape == shape}


def _settings_that_differ(mine: dict, theirs: dict) -> dict[str, list]:
    a, b = (
        {"type": operation["type"], "dtype": operation["dtype"], **operation["settings"]}
        for operation in (mine, theirs)
    )
    return {name: [a.get(name), b.get(name)] for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)}


def _backward_fault(a: Result, b: Result, limit: float) -> dict:
    """The layers that may cause a wrong gradient: those after the last layer, in execution order, that diverges."""
    names = [operation["name"] for operation in a.operations]
    order = {name: i for i, name in enumerate(names)}
    differences = [(order.get(item.name.split("/")[0], -1), item) for item in variable_differences(a, b, "gradients")]
    last, found = max(((i, item) for i, item in differences if not item.size <= limit), key=lambda pair: pair[0])
    end = min((i for i, item in differences if item.size <= limit and i > last), default=len(names) - 1)
    return {"kind": "backward", **_location(found), "between": names[last : end + 1] if last >= 0 else []}


def _step_fault(a: Result, b: Result, limit: float, gradients: float) -> dict:
    differences = step_differences(a, b)
    at = next(i for i, item in enumerate(differences) if not item.size <= limit)
    before = max(worst(differences[:at]).size, gradients)
    return {
        "kind": "step",
        **_location(differences[at]),
        "before": before,
        "grown": before > GROWN_IN_A_STEP * differences[at].size,
    }


# The result


def judge(results: Sequence[Result], dtype: str) -> dict:
    """Compare the results of at least two backends, all computed in `dtype`.

    Returns:
        A dictionary of plain values: reference, rows (stage, backend, difference, where, limit, passed), losses by
        backend, faults, notes, passed.
    """
    limits = LIMITS[dtype]
    first = reference(results, limits)
    rows, faults = [], []
    for other in results:
        if other is first:
            continue
        found = stage_differences(first, other)
        failed = exceeding(found, limits)
        rows += (
            {
                "stage": stage,
                "backend": other.backend,
                "difference": item.size,
                "where": item.name,
                "limit": limits[stage],
                "passed": stage not in failed,
            }
            for stage, item in found.items()
        )
        if fault := first_fault(results, first, other, found, limits):
            faults.append(fault)
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    names = {result.backend: {operation["name"]: None for operation in result.operations} for result in results}
    for name in dict.fromkeys(name for layers in names.values() for name in layers):
        present = [backend for backend, layers in names.items() if name in layers]
        if len(present) < len(results):
            notes.append(f"{name} is a layer only on {', '.join(present)}")
    return {
        "reference": first.backend,
        "rows": rows,
        "losses": {result.backend: result.losses for result in results},
        "loss": {result.backend: result.loss for result in results},
        "faults": faults,
        "notes": notes,
        "passed": not faults,
    }
