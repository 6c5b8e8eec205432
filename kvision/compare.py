"""One app on every backend, each in a process of its own, side by side.

Two backends in one process share memory, threads and patience badly, and Keras knows one at a time. So each is a child
process with its own `KERAS_BACKEND`, and what is compared are the run folders they leave.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvision.children import Children, StoppedError, TimeLimitError
from kvision.engine import BACKENDS, installed
from kvision.files import LOCK, FolderInUseError, locked, make_folder, new_folder, write_json
from kvision.flags import UsageError
from kvision.report.compare_report import advice, comparison_table, write_compare_report
from kvision.report.environment import hardware, load_average

APPS = ("cifar10", "mnist", "transfer")
DAY = 24 * 3600.0  # seconds that a run may take
# What several runs are timed for.
TIMED = (
    *("images_per_second", "seconds_to_first_step", "compile_seconds", "peak_memory_bytes"),
    *("train_seconds", "load_average"),
)

# What `--check` allows between the first backend and each other one, in float32 without dropout. Later losses are shown
# and not checked: at a high learning rate rounding alone drives them apart. The first loss of ResNet-20 in training
# mode, batch 128, agrees to 1.6e-7 on two cores; with one core JAX's parts from the others' by 1.4e-6.
INITIAL_LOGITS = 1e-5  # largest difference, relative to the largest logit
FIRST_LOSS = 2e-6  # relative, of the first step
ACCURACY = 0.015


def run_backend(
    backend: str,
    app: str,
    arguments: Sequence[str],
    folder: Path,
    log=print,
    children: Children | None = None,
    limit: float | None = DAY,
) -> dict:
    """Run the app on one backend into `folder`; the row of the comparison, whose "status" says how it went.

    Args:
        children: what runs the process; None takes one of its own.
        limit: seconds that it may take; None sets no limit.

    Raises:
        StoppedError: this process was told to stop.
    """
    if children is None:
        with Children() as children:
            return run_backend(backend, app, arguments, folder, log, children, limit)
    row: dict[str, object] = {"backend": backend, "status": "not installed", "reason": None}
    if not installed(backend):
        return row | {"reason": f"install it with: pip install kvision-keras[{backend}]"}
    log(f"{backend}: python -m apps.{app} {' '.join(arguments)}")
    # A part of the package where that is installed, else a folder of the clone.
    package = "kvision.apps" if importlib.util.find_spec("kvision.apps") else "apps"
    words = [sys.executable, "-m", f"{package}.{app}", *arguments, "--output-dir", str(folder)]
    log_path = folder.with_name(f"{folder.name}.log")
    row["load_average"] = load_average()
    try:
        code = children.run(words, {**os.environ, "KERAS_BACKEND": backend}, log_path, limit)
    except TimeLimitError as error:
        return row | {"status": "failed", "reason": f"{error}: give a longer --timeout ({log_path})"}
    if code:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no output"
        return row | {"status": "failed", "reason": f"{reason} (exit code {code}; {log_path})"}
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        trace = json.loads((folder / "trace.json").read_text())
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        return row | {"status": "failed", "reason": f"exit code 0, but no whole run is in {folder}: {error}"}
    return {**row, **metrics, **trace, "load_average": row["load_average"], "status": "ok", "history": history}


def median_of(rows: Sequence[dict]) -> dict:
    """One row of several runs of a backend: the first run's, with the medians of what was timed.

    Beside each figure stands its range: "images_per_second_range" is [lowest, highest]. Where a run failed, its row.
    """
    for row in rows:
        if row["status"] != "ok":
            return row
    merged = dict(rows[0])
    if len(rows) > 1:
        merged["runs"] = len(rows)
        for name in TIMED:
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                merged[name] = float(np.median(values))
                merged[f"{name}_range"] = [min(values), max(values)]
    return merged


def differences(rows: Sequence[dict]) -> list[dict]:
    """Add to each row that is ok its differences from the first; returns the checks."""
    done = [row for row in rows if row["status"] == "ok"]
    checks = []
    for row in done:
        row["max_loss_difference"] = row["first_loss_difference"] = row["initial_logits_difference"] = 0.0
    if not done:
        return checks
    first = done[0]
    reference_losses = np.asarray(first["step_losses"])
    reference_logits = np.asarray(first["initial_logits"])
    for row in done[1:]:
        losses, logits = np.asarray(row["step_losses"]), np.asarray(row["initial_logits"])
        if losses.shape != reference_losses.shape or logits.shape != reference_logits.shape:
            raise UsageError(f"{row['backend']} and {first['backend']} did not run the same number of steps")
        apart = np.abs(losses - reference_losses)
        row["max_loss_difference"] = float(apart.max(initial=0))
        row["first_loss_difference"] = float((apart / np.abs(reference_losses))[:1].max(initial=0))
        row["initial_logits_difference"] = float(
            np.abs(logits - reference_logits).max() / np.abs(reference_logits).max()
        )
        accuracy = abs(row["test_accuracy"] - first["test_accuracy"])
        pair = f"{row['backend']} against {first['backend']}"
        for name, value, limit in (
            ("initial logits, relative to the largest", row["initial_logits_difference"], INITIAL_LOGITS),
            ("loss of the first step, relative", row["first_loss_difference"], FIRST_LOSS),
            ("test accuracy", accuracy, ACCURACY),
        ):
            checks.append({"name": f"{pair}: {name}", "value": value, "limit": limit, "passed": bool(value <= limit)})
    return checks


def compare(
    app: str,
    arguments: Sequence[str],
    out: Path,
    backends: Sequence[str] = BACKENDS,
    log=print,
    *,
    runs: int = 1,
    limit: float | None = DAY,
) -> dict:
    """Run the app on each backend; writes compare.json and compare.html into `out` and returns what is in the first.

    Args:
        runs: of each backend, in turn, so that what else the machine does befalls all of them.
        limit: seconds that each run may take; None sets no limit. After them it is told to stop, by SIGTERM, on which
            it saves, and 30 s later it is killed.

    Raises:
        UsageError: an unknown app or backend, a bad number, or `out` is not empty.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C came. The running app has saved and ended.
    """
    if app not in APPS:
        raise UsageError(f"--app must be one of {', '.join(APPS)}, got {app!r}")
    if unknown := set(backends) - set(BACKENDS):
        raise UsageError(f"--backends knows {', '.join(BACKENDS)}, got {', '.join(sorted(unknown))}")
    if runs < 1:
        raise UsageError(f"--runs must be at least 1, got {runs}")
    if limit is not None and not limit > 0:
        raise UsageError(f"--timeout must be 0 (no limit) or a positive number of seconds, got {limit:g}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output-dir {out} is a file: expected a new or an empty folder")
    make_folder(out)
    try:
        with locked(out), Children() as children:
            if any(path.name != LOCK for path in out.iterdir()):
                raise UsageError(f"--output-dir {out} is not empty: expected a new or an empty folder")
            found: dict[str, list[dict]] = {backend: [] for backend in backends}
            for number in range(1, runs + 1):
                for backend, rows in found.items():
                    if all(row["status"] == "ok" for row in rows):
                        folder = out / (backend if number == 1 else f"{backend}-{number}")
                        rows.append(run_backend(backend, app, arguments, folder, log, children, limit))
            rows = [median_of(rows) for rows in found.values()]
            comparison = {
                "command": " ".join(["python -m apps.compare", "--app", app, *arguments]),
                "app": app,
                "arguments": list(arguments),
                "hardware": hardware(),
                "checks": differences(rows),
                "advice": advice(rows, hardware()["cores"]),
                "rows": rows,
            }
            write_json(out / "compare.json", comparison)
            write_compare_report(out, comparison)
            return comparison
    except FolderInUseError as error:
        raise UsageError(str(error)) from None


def faults(comparison: dict) -> list[str]:
    """Why a comparison is none, or did not hold: nothing where two backends at least ran and every check held."""
    ran = [row["backend"] for row in comparison["rows"] if row["status"] == "ok"]
    found = [f"{row['backend']} failed: {row['reason']}" for row in comparison["rows"] if row["status"] == "failed"]
    if len(ran) < 2:
        missing = [f"{row['backend']} ({row['reason']})" for row in comparison["rows"] if row["status"] != "ok"]
        found.insert(0, f"nothing was compared: {' and '.join(ran) or 'no backend'} ran, but not {', '.join(missing)}")
    return found + [f"{check['name']} is too large" for check in comparison["checks"] if not check["passed"]]


def passed(comparison: dict) -> bool:
    """Whether at least two backends ran, none failed, and every check held."""
    return not faults(comparison)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the comparison; every flag it does not know goes to the app."""
    parser.add_argument("--app", default="cifar10", help="which app to run: %(default)s, or " + ", ".join(APPS[1:]))
    parser.add_argument("--backends", default=",".join(BACKENDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--output-dir", default=None, metavar="FOLDER", help="default: a new runs/compare-APP")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the backends differ beyond the limits")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="runs of each, for medians and ranges (1)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DAY,
        metavar="SECONDS",
        help="that each run may take; then it is told to stop, and killed 30 s later; 0 sets no limit (a day)",
    )


def main(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a comparison as parsed, `words` being the app's flags; prints the table; returns the exit code."""
    backends = list(dict.fromkeys(arguments.backends.split(",")))
    present = [backend for backend in backends if backend in BACKENDS and installed(backend)]
    if arguments.check and len(present) < 2:
        raise UsageError(
            f"--check compares two backends at least, and of {', '.join(backends)} only {', '.join(present) or 'none'} "
            "is installed: pip install kvision-keras[all], or leave out --check"
        )
    made = arguments.out is None
    stem = f"compare-{arguments.app}"
    names = (Path("runs") / name for name in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))))
    try:
        out = new_folder(names) if made else Path(arguments.out)
        comparison = compare(arguments.app, words, out, backends, runs=arguments.runs, limit=arguments.timeout or None)
    except StoppedError as error:
        print(f"\ncompare: {error}", file=sys.stderr)
        return error.code
    print(comparison_table(comparison))
    print(comparison["advice"])
    print(out / "compare.html")
    wrong = faults(comparison) if arguments.check else []
    for fault in wrong:
        print(f"compare: --check: {fault}", file=sys.stderr)
    return int(bool(wrong))


def add_commands(subparsers) -> None:
    """Add `compare` to the command line of `python -m kvision`."""
    parser = subparsers.add_parser(
        "compare", help="run an app on every installed backend and compare", allow_abbrev=False
    )
    add_arguments(parser)
    parser.set_defaults(handler=main, passes_flags=True)
