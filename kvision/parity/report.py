"""Formats a comparison as text: the table of stages, the losses of the steps, and a description of each fault."""

import math

from kvision.parity.compare import LIMITS, STAGES

ENDS = 6  # of many steps, the first and the last ones are printed


def _size(value: float) -> str:
    return "0" if value == 0 else "different" if math.isinf(value) else f"{value:.1e}"


def _value(value: float) -> str:
    return f"{value:.17g}"


def _setting(value) -> str:
    return "x".join(map(_setting, value)) if isinstance(value, list | tuple) else str(value)


# A fault


def _head(fault: dict) -> str:
    match fault["kind"]:
        case "loss":
            location = "at the loss"
        case "step":
            location = f"at the loss of {fault['name']}"
        case "fused":
            location = f"in {STAGES[fault['stage']]}, by {_size(fault['difference'])} of the scale"
        case "layer":
            location = f"at {fault['name']}, layer {fault['position']} of {fault['of']}, in {STAGES[fault['stage']]}"
        case "backward":
            location = f"at the gradient of {fault['name']}"
        case "variable":
            location = f"at {fault['name']}, in {STAGES[fault['stage']]}"
    return f"{fault['backend']} diverges from {fault['reference']} {location}"


def _values(fault: dict) -> str:
    """The values of the backends at the largest difference."""
    size, values = _size(fault["difference"]), fault["values"]
    if not isinstance(values, dict):
        values = dict(zip((fault["reference"], fault["backend"]), values or (), strict=False))
    shown = ", ".join(f"{_value(value)} on {name}" for name, value in values.items())
    if fault["kind"] in ("loss", "step"):
        return f"{shown}: relative difference {size}"
    if fault.get("shapes"):
        shapes = (f"{_setting(shape)} on {name}" for name, shape in fault["shapes"].items())
        return f"its output shapes are {', '.join(shapes)}"
    if fault["index"] is not None:
        return f"at {list(fault['index'])}: {shown}; {size} of the scale"
    if math.isinf(fault["difference"]):
        return "only one backend has it, or some of its values are not finite"
    return f"by {size} of the scale, in the mean or norm, not at a kept value"


def _step_reason(fault: dict) -> str:
    before = _size(fault["before"])
    if fault["grown"]:
        return (
            f"earlier losses or gradients already differ by {before}: rounding grows from step to step; "
            "a smaller --learning-rate or a larger --batch slows this"
        )
    agreed = f"agreed to {before}" if fault["before"] else "agreed"
    return f"earlier losses and all gradients {agreed}, so the error is in the optimizer"


def _layer_reasons(fault: dict) -> list[str]:
    lines = [
        f"{name} is {_setting(a)} on {fault['reference']}, {_setting(b)} on {fault['backend']}"
        for name, (a, b) in fault["settings_that_differ"].items()
    ]
    lines += (
        f"on {name} its inputs include {', '.join(only_here)}, which the other backend lacks"
        for name, only_here in fault["inputs_on_one_backend"].items()
        if only_here
    )
    largest = max(fault["inputs"].values(), default=0.0)
    if fault["grown"]:
        lines.append(f"its inputs already differ by {_size(largest)}: rounding grows through the layers before it")
    elif not fault["inputs_on_one_backend"]:
        names = ", ".join(fault["inputs"]) or "the images"
        agreed = f"agree to {_size(largest)}" if largest else "are equal"
        lines.append(f"its inputs ({names}) {agreed}, so the error is in this layer")
    if fault["random"]:
        lines.append(
            f"Keras's {fault['type']} uses the backend's random generator; kvision.layers.{fault['type']} "
            "gives the same random numbers on each"
        )
    return lines


def _describe(fault: dict) -> list[str]:
    match fault["kind"]:
        case "loss":
            lines = [_values(fault), "the outputs agree, so the error is in the loss"]
        case "step":
            lines = [_values(fault), _step_reason(fault)]
        case "fused":
            lines = ["every single layer agrees: the error is in a fusion of layers by kvision.engine"]
        case "layer":
            settings = ", ".join(f"{name} {_setting(value)}" for name, value in fault["settings"].items())
            lines = [f"{fault['type']}: {settings}" if settings else fault["type"]]
            lines += [_values(fault), *_layer_reasons(fault)]
        case "backward":
            lines, between = [_values(fault)], fault["between"]
            if between:
                shown = between if len(between) < 7 else [*between[:3], "...", *between[-3:]]
                lines.append(f"the outputs agree, so the error is in the gradient of one of: {', '.join(shown)}")
        case "variable":
            lines = [_values(fault)]
    return [_head(fault), *(f"  {line}" for line in lines)]


# The tables


def _stages(report: dict) -> list[str]:
    others = [backend for backend in report["losses"] if backend != report["reference"]]
    lines = [f"{'':<24}" + "".join(f"{backend:<12}" for backend in others) + f"{'limit':<10}largest at"]
    for stage, title in STAGES.items():
        if stage in ("losses", "weights") and not report["spec"]["steps"]:
            continue
        rows = [row for row in report["rows"] if row["stage"] == stage]
        largest, limit = max(rows, key=lambda row: row["difference"]), rows[0]["limit"]
        cells = "".join(f"{_size(row['difference']) + ('' if row['passed'] else ' !'):<12}" for row in rows)
        bound = "unchecked" if limit is None else f"{limit:g}"
        where = largest["where"] if largest["difference"] and largest["where"] != title else ""
        lines.append(f"{title:<24}{cells}{bound:<10}{where}".rstrip())
    return lines


def _steps(report: dict) -> list[str]:
    lines = [f"{'step':<6}" + "".join(f"{backend:<22}" for backend in report["losses"]) + "difference"]
    for i, values in enumerate(zip(*report["losses"].values(), strict=True), start=1):
        difference = (max(values) - min(values)) / (abs(values[0]) or 1)
        lines.append(f"{i:<6}" + "".join(f"{_value(value):<22}" for value in values) + _size(difference))
    if len(lines) > 2 * ENDS + 1:
        lines[ENDS + 1 : -ENDS] = ["..."]
    if LIMITS[report["spec"]["dtype"]]["losses"] is None:
        lines += (
            "Gradients differ if rounding changes the sign of a ReLU's input. Later losses diverge, the more",
            "the higher the learning rate. --dtype float64 tells rounding from error.",
        )
    return lines


def text(report: dict) -> str:
    """The report of `kvision.parity.compare` for a terminal."""
    spec, backends = report["spec"], list(report["losses"])
    packages = [f"{backend} {next(iter(report['versions'][backend].values()), '')}".strip() for backend in backends]
    lines = [
        f"{spec['model']} in {spec['dtype']}, batch {spec['batch']}, seed {spec['seed']}: "
        f"{', '.join(packages)}; differences from {report['reference']}, relative",
        "",
        *_stages(report),
    ]
    if spec["steps"]:
        lines += ["", *_steps(report)]
    lines += ["", *(f"NOTE: {note}" for note in report["notes"])]
    lines += (f"{backend} failed: {row['reason']}" for backend, row in report["failed"].items())
    for fault in report["faults"]:
        lines += _describe(fault)
    if report["passed"]:
        lines.append(f"{', '.join(backends)} agree")
    return "\n".join(lines)
