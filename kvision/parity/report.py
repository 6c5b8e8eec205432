"""A comparison in words: the table of stages, the losses step by step, and what is known of each fault."""

import math

from kvision.parity.compare import LIMITS, STAGES

ENDS = 6  # of many steps, the first and the last that are shown


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
            place = "at the loss"
        case "step":
            place = f"at the loss of {fault['name']}"
        case "joined":
            place = f"in {STAGES[fault['stage']]}, by {_size(fault['difference'])} of the scale"
        case "layer":
            place = f"at {fault['name']}, layer {fault['place']} of {fault['of']}, in {STAGES[fault['stage']]}"
        case "backward":
            place = f"at the gradient of {fault['name']}"
        case "variable":
            place = f"at {fault['name']}, in {STAGES[fault['stage']]}"
    return f"{fault['backend']} parts from {fault['reference']} {place}"


def _values(fault: dict) -> str:
    """What the backends have at the place of the largest difference."""
    size, values = _size(fault["difference"]), fault["values"]
    if not isinstance(values, dict):
        values = dict(zip((fault["reference"], fault["backend"]), values or (), strict=False))
    shown = ", ".join(f"{_value(value)} on {name}" for name, value in values.items())
    if fault["kind"] in ("loss", "step"):
        return f"{shown}: {size} of it"
    if fault.get("shapes"):
        shapes = (f"{_setting(shape)} on {name}" for name, shape in fault["shapes"].items())
        return f"its outputs have shapes {', '.join(shapes)}"
    if fault["index"] is not None:
        return f"at {list(fault['index'])}: {shown}; {size} of the scale"
    if math.isinf(fault["difference"]):
        return "only one of them has it, or values of one are not finite"
    return f"by {size} of the scale, at none of the values kept: means or norms part"


def _step_reason(fault: dict) -> str:
    before = _size(fault["before"])
    if fault["grown"]:
        return (
            f"losses or gradients before parted by {before} already: rounding has grown from step "
            "to step, which a smaller --learning-rate or a larger --batch slows"
        )
    agreed = f"agreed to {before}" if fault["before"] else "agreed"
    return f"the losses before and every gradient {agreed}, so the fault lies in the optimizer"


def _layer_reasons(fault: dict) -> list[str]:
    lines = [
        f"{name} is {_setting(a)} on {fault['reference']}, {_setting(b)} on {fault['backend']}"
        for name, (a, b) in fault["settings_that_differ"].items()
    ]
    lines += (
        f"on {name} it reads {', '.join(lone)}, which is not there on the other"
        for name, lone in fault["inputs_on_one_backend"].items()
        if lone
    )
    reach = max(fault["inputs"].values(), default=0.0)
    if fault["grown"]:
        lines.append(
            f"its inputs parted by {_size(reach)} already: rounding has grown on the way, see the layers before"
        )
    elif not fault["inputs_on_one_backend"]:
        names = ", ".join(fault["inputs"]) or "the images"
        agreed = f"agreed to {_size(reach)}" if reach else "are equal"
        lines.append(f"its inputs ({names}) {agreed}, so the fault lies in this layer")
    if fault["random"]:
        lines.append(
            f"Keras's {fault['type']} draws from the backend's generator; kvision.layers.{fault['type']} "
            "draws the same on each"
        )
    return lines


def _describe(fault: dict) -> list[str]:
    match fault["kind"]:
        case "loss":
            lines = [_values(fault), "the outputs agreed, so the fault lies in the loss"]
        case "step":
            lines = [_values(fault), _step_reason(fault)]
        case "joined":
            lines = ["every layer by itself agreed: the fault lies where kvision.engine makes one call of neighbours"]
        case "layer":
            settings = ", ".join(f"{name} {_setting(value)}" for name, value in fault["settings"].items())
            lines = [f"{fault['type']}: {settings}" if settings else fault["type"]]
            lines += [_values(fault), *_layer_reasons(fault)]
        case "backward":
            lines, between = [_values(fault)], fault["between"]
            if between:
                shown = between if len(between) < 7 else [*between[:3], "...", *between[-3:]]
                lines.append(f"the outputs agreed, so the fault lies in the gradient of one of: {', '.join(shown)}")
        case "variable":
            lines = [_values(fault)]
    return [_head(fault), *(f"  {line}" for line in lines)]


# The tables


def _stages(report: dict) -> list[str]:
    others = [backend for backend in report["losses"] if backend != report["reference"]]
    lines = [f"{'':<24}" + "".join(f"{backend:<12}" for backend in others) + f"{'at most':<9} where largest"]
    for stage, title in STAGES.items():
        if stage in ("losses", "weights") and not report["question"]["steps"]:
            continue
        rows = [row for row in report["rows"] if row["stage"] == stage]
        largest, limit = max(rows, key=lambda row: row["difference"]), rows[0]["limit"]
        cells = "".join(f"{_size(row['difference']) + ('' if row['passed'] else ' !'):<12}" for row in rows)
        bound = "shown" if limit is None else f"{limit:g}"
        where = largest["where"] if largest["difference"] and largest["where"] != title else ""
        lines.append(f"{title:<24}{cells}{bound:<9} {where}".rstrip())
    return lines


def _steps(report: dict) -> list[str]:
    lines = [f"{'step':<6}" + "".join(f"{backend:<22}" for backend in report["losses"]) + "apart"]
    for i, values in enumerate(zip(*report["losses"].values(), strict=True), start=1):
        apart = (max(values) - min(values)) / (abs(values[0]) or 1)
        lines.append(f"{i:<6}" + "".join(f"{_value(value):<22}" for value in values) + _size(apart))
    if len(lines) > 2 * ENDS + 1:
        lines[ENDS + 1 : -ENDS] = ["..."]
    if LIMITS[report["question"]["dtype"]]["losses"] is None:
        lines += (
            "Gradients part where rounding decides a ReLU's side, and later losses ever more, the higher the",
            "learning rate; --dtype float64 tells rounding from error.",
        )
    return lines


def text(report: dict) -> str:
    """The report of `kvision.parity.compare` for a terminal."""
    spec, backends = report["question"], list(report["losses"])
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
