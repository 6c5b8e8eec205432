"""The comparison of a run on several backends: a text table, and an HTML page with charts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvision.files import write_text
from kvision.report import page
from kvision.report.page import MISSING, escape, finite, fixed, percent, plain, size
from kvision.report.run_report import column, fractions_to_percent
from kvision.report.svg import bar_chart, line_chart


def _seconds(value: Any) -> str:
    """Seconds to a tenth, which compare better in a column than minutes and hours."""
    return MISSING if value is None else f"{fixed(value, ',.1f')} s"


def _range(value: Any) -> str:
    """The range of several runs."""
    return MISSING if value is None else f"{fixed(value[0], ',.0f')} to {fixed(value[1], ',.0f')}"


# (heading in two lines, key of the row, format of its value), for the page and for the terminal.
COLUMNS = (
    ("test", "accuracy", "test_accuracy", percent),
    ("final", "loss", "final_loss", lambda value: fixed(value, ".4f")),
    ("initial", "logits diff", "initial_logits_difference", lambda value: fixed(value, ".1e")),
    ("first", "loss diff", "first_loss_difference", lambda value: fixed(value, ".1e")),
    ("largest", "loss diff", "max_loss_difference", lambda value: fixed(value, ".1e")),
    ("training", "images/s", "images_per_second", lambda value: fixed(value, ",.0f")),
    ("start to", "first step", "seconds_to_first_step", _seconds),
    ("compile", "time", "compile_seconds", _seconds),
    ("peak", "memory", "peak_memory_bytes", size),
    ("training", "time", "train_seconds", _seconds),
    ("range of", "images/s", "images_per_second_range", _range),
    ("", "threads", "threads", lambda value: fixed(value, ".0f")),
    ("load at", "its start", "load_average", lambda value: fixed(value, ".1f")),
)


def _without_color(text: Any) -> str:
    """The text without the escape sequences for color that a child process printed."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(text or ""))


def _one_line(text: Any, longest: int = 160) -> str:
    """The last line that is not blank, without control characters; in a traceback it is the error."""
    lines = [line for line in (" ".join(line.split()) for line in _without_color(text).splitlines()) if line]
    last = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", lines[-1]) if lines else ""
    return last if len(last) <= longest else last[: longest - 3] + "..."


def _status(row: Mapping[str, Any]) -> str:
    """One line on why a row has no numbers."""
    reason = _one_line(row.get("reason"))
    return f"{row.get('status') or 'failed'}: {reason}" if reason else str(row.get("status") or "failed")


def _bound(value: Any) -> str:
    return fixed(value, ".3g") if finite(value) is not None else plain(value)


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as an aligned text table, for a terminal or a log.

    A backend that failed has the reason in place of its numbers. The checks follow the table. All is ASCII except for
    those reasons. See `write_compare_report` for the argument.
    """
    rows = comparison.get("rows") or []
    columns = _columns(rows)
    lines = [
        ["", *(column[0] for column in columns)],
        ["backend", *(column[1] for column in columns)],
        *([str(row.get("backend")), *_values(row, columns)] for row in rows),
    ]
    widths = [max(len(line[0]) for line in lines)]
    widths += [max(len(line[i]) for line in lines if len(line) > i) for i in range(1, len(columns) + 1)]
    text = []
    for line, row in zip(lines, [None, None, *rows], strict=True):
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=False)]
        if row is not None and row.get("status") != "ok":
            cells = [_status(row)]
        text.append("  ".join([f"{line[0]:<{widths[0]}}", *cells]).rstrip())
    text.insert(2, "  ".join("-" * width for width in widths))
    checks = comparison.get("checks") or []
    if checks:
        long = max(len(str(check["name"])) for check in checks)
        text.append("")
        for check in checks:
            verdict = "pass" if check["passed"] else "FAIL"
            measured = f"{_bound(check.get('value'))} (limit {_bound(check.get('limit'))})"
            text.append(f"{verdict}  {check['name']!s:<{long}}  {measured}")
    return "\n".join(text).replace(MISSING, "-")


def advice(rows: Sequence[Mapping[str, Any]], cores: int | None = None) -> str:
    """One sentence on which backend to use on this machine, from the rows of a comparison.

    Args:
        cores: the machine's cores; the sentence mentions a load above half of them.
    """
    ran = [row for row in rows if row.get("status") == "ok" and finite(row.get("images_per_second"))]
    if not ran:
        return "No backend was timed."
    ranked = sorted(ran, key=lambda row: -row["images_per_second"])
    first, *others = ranked
    count = first.get("runs") or 1
    text = f"{'Fastest here' if others else 'Timed alone'}: {first['backend']}, "
    text += f"{fixed(first['images_per_second'], ',.0f')} images/s "
    text += f"(median of {count} runs)" if count > 1 else "(one run)"
    ratios = [f"{first['images_per_second'] / row['images_per_second']:.2g} times {row['backend']}" for row in others]
    text += f", {' and '.join(ratios)}" if ratios else ""
    ranges = [row.get("images_per_second_range") for row in ranked[:2]]
    if others and all(ranges) and ranges[1][1] >= ranges[0][0]:
        text += f", but its range overlaps that of {others[0]['backend']}"
    for key, what, write in (
        ("peak_memory_bytes", "least memory", size),
        ("seconds_to_first_step", "shortest start", _seconds),
    ):
        known = [row for row in ran if finite(row.get(key))]
        if others and len(known) == len(ran):
            least = min(known, key=lambda row: row[key])
            text += f"; {what}: {least['backend']}, {write(least[key])}"
    loads = [row["load_average"] for row in ran if finite(row.get("load_average")) is not None]
    if cores and loads and max(loads) > cores / 2:
        text += f"; the machine was busy (load {max(loads):.1f} on {cores} cores), so measure again when it is idle"
    return f"{text}."


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """The columns with a value for at least one backend."""
    return [column for column in COLUMNS if any(row.get(column[2]) is not None for row in rows)]


def _values(row: Mapping[str, Any], columns: Sequence[tuple]) -> list[str]:
    """The row's figures as text; empty if the backend did not run."""
    return [write(row.get(key)) for _, _, key, write in columns] if row.get("status") == "ok" else []


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = _columns(rows)
    lines: list[str | list[str]] = []
    for row in rows:
        name = escape(row.get("backend"))
        if row.get("status") == "ok":
            lines.append([name, *(escape(value) for value in _values(row, columns))])
        else:
            message = _without_color(row.get("reason")).strip() or "no reason given"
            reason = f'<span class="reason">{escape(message)}</span>'
            lines.append(
                f'<tr><td>{name}</td><td colspan="{max(1, len(columns))}">'
                f'<span class="bad">{escape(row.get("status") or "failed")}</span> {reason}</td></tr>'
            )
    heads = ["backend", *(f"{first} {second}" for first, second, _, _ in columns)]
    return page.table(heads, lines, range(1, len(columns) + 1))


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for check in checks:
        verdict = '<span class="good">passed</span>' if check["passed"] else '<span class="bad">failed</span>'
        rows.append(
            [
                escape(check["name"]),
                escape(_bound(check.get("value"))),
                escape(_bound(check.get("limit"))),
                verdict,
            ]
        )
    return page.table(("check", "measured", "limit", ""), rows, (1, 2))


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The curves; a backend that did not run keeps its color, so that colors agree in all charts."""
    history = {row["backend"]: row.get("history") or [] for row in rows}
    steps = {row["backend"]: list(row.get("step_losses") or []) for row in rows}
    charts = [
        line_chart(
            {name: column(h, "loss") for name, h in history.items()},
            "Training loss",
            "epoch",
            "mean over the epoch",
        ),
        line_chart(
            {name: fractions_to_percent(column(h, "test_accuracy")) for name, h in history.items()},
            "Test accuracy",
            "epoch",
            "accuracy, %",
        ),
    ]
    if any(steps.values()):
        charts.append(
            line_chart(
                {name: (range(1, len(losses) + 1), losses) for name, losses in steps.items()},
                "Loss of the first steps",
                "step",
                "loss a batch",
            )
        )
    reference = next((name for name, losses in steps.items() if losses), None)
    differences = {}
    for name, losses in steps.items():
        pairs = zip(losses, steps[reference] if reference is not None else [], strict=False)
        values = [
            None if name == reference or finite(a) is None or finite(b) is None else abs(float(a) - float(b))
            for a, b in pairs
        ]
        differences[name] = (range(1, len(values) + 1), values)
    if any(value for _, values in differences.values() for value in values):
        title = f"Step losses: difference from {reference}"
        charts.append(
            line_chart(differences, title, "step", "absolute difference; no point for equal losses", log=True)
        )
    return f'<div class="charts">{"".join(charts)}</div>'


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    def bars(key: str, unit: str, title: str, scale: float = 1.0) -> str:
        values = {row["backend"]: finite(row.get(key)) for row in rows}
        if all(value is None for value in values.values()):
            return ""
        return bar_chart({name: value and value * scale for name, value in values.items()}, unit, title)

    charts = [
        bars("images_per_second", "images/s", "Training speed (higher is better)"),
        bars("peak_memory_bytes", "MiB", "Peak memory of the process (lower is better)", 2.0**-20),
        bars("seconds_to_first_step", "s", "Process start to first step (lower is better)"),
        bars("compile_seconds", "s", "Compilation (lower is better)"),
        bars("train_seconds", "s", "Total training time (lower is better)"),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else '<p class="quiet">Not measured.</p>'


def _versions(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of package versions, packages by backends."""
    tables = {row["backend"]: row.get("versions") or {} for row in rows}
    packages = list(dict.fromkeys(package for versions in tables.values() for package in versions))
    if not packages:
        return ""
    lines = [[escape(name), *(escape(plain(v.get(name))) for v in tables.values())] for name in packages]
    hashes = [f"<code>{escape(plain(row.get('weights_sha256'))[:16])}</code>" for row in rows]
    if any(row.get("weights_sha256") for row in rows):
        lines.append(["final weights, sha256", *hashes])
    return page.table(["", *tables], lines)


def write_compare_report(folder: str | Path, comparison: Mapping[str, Any]) -> Path:
    """Write `compare.html` into `folder`: a self-contained file without scripts.

    Args:
        folder: created if missing. The page is written atomically.
        comparison: the content of `compare.json`: command, app, arguments (a list), hardware (a dictionary),
            checks (each with name, value, limit, passed), advice (a sentence) and rows, one a backend. A row has
            backend, status ("ok", "not installed" or "failed") and reason. With status "ok" it has the figures named in
            `COLUMNS`, weights_sha256, versions, history (see `write_report`) and step_losses, the losses of the first
            steps. Any figure may be missing or None.

    Returns:
        The path of the page.
    """
    rows = comparison.get("rows") or []
    checks = comparison.get("checks") or []
    names = [str(row.get("backend")) for row in rows]
    title = f"{plain(comparison.get('app'))} on {', '.join(names) or 'no backend'}"
    failed = [check for check in checks if not check["passed"]]
    ran = [row for row in rows if row.get("status") == "ok"]
    verdict = f"{len(ran)} of {len(rows)} backends ran. "
    if failed:
        verdict += f'<span class="bad">{len(failed)} of {len(checks)} checks failed.</span>'
    elif checks:
        verdict += f"<strong>All {len(checks)} checks passed.</strong>" if len(checks) > 1 else "The check passed."
    else:
        verdict += "No checks ran."
    header = (
        f"<h1>{escape(title)}</h1>"
        '<p class="score">The same model, seed, initial weights and batches.</p>'
        f"<p>{verdict}</p>"
    )
    if comparison.get("advice"):
        header += f"<p>{escape(comparison['advice'])}</p>"
    more = [("command", f"`{comparison['command']}`")] if comparison.get("command") else []
    if comparison.get("arguments"):
        more.append(("arguments", f"`{' '.join(str(word) for word in comparison['arguments'])}`"))
    hardware = page.definition_table(
        (
            name.removesuffix("_bytes").replace("_", " "),
            size(value) if name.endswith("_bytes") else plain(value),
        )
        for name, value in (comparison.get("hardware") or {}).items()
    )
    sections = [page.section("Results", _table(rows))]
    if checks:
        sections.append(page.section("Checks", _checks(checks)))
    sections += [
        page.section("Curves", _charts(rows)),
        page.section("Speed and memory", _bars(rows)),
        page.section(
            "Environment",
            _versions(ran),
            f'<h3 class="apart">Hardware</h3>{hardware}',
            page.definition_table(more) if more else "",
        ),
    ]
    return write_text(Path(folder) / "compare.html", page.document(title, header, *sections))
