"""Runs an app on every backend, each in a separate process, and compares the runs.

Keras supports one backend a process, so each backend runs in a child process with `KERAS_BACKEND` set. The run folders
are compared.
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
from kvision.flags import UsageError, app_module
from kvision.report.compare_report import advice, comparison_table, write_compare_report
from kvision.report.environment import hardware, load_average

APPS = ("cifar10", "mnist", "transfer")
DAY = 24 * 3600.0  # seconds, the default time limit of a run
# The figures of which several runs give medians and ranges.
TIMED = (
    *("images_per_second", "seconds_to_first_step", "compile_seconds", "peak_memory_bytes"),
    *("train_seconds", "load_average"),
)

# The limits of `--check` between the first backend and each other one, in float32 without dropout. Later losses are
# reported and not checked: at a high learning rate they diverge by rounding alone. The first loss of ResNet-20 in
# training mode, batch 128, agrees to 1.6e-7 on two cores; on one core JAX's differs from the others' by 1.4e-6.
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
    """Run the app on one backend into `folder`; returns its row of the comparison.

    Its "status" is "ok", "failed" or "not installed", with a "reason".

    Args:
        children: runs the process; None makes a new `Children`.
        limit: time limit in seconds; None sets no limit.

    Raises:
        StoppedError: this process got a signal.
    """
    if children is None:
        with Children() as children:
            return run_backend(backend, app, arguments, folder, log, children, limit)
    row: dict[str, object] = {"backend": backend, "status": "not installed", "reason": None}
    if not installed(backend):
        return row | {"reason": f"install it with: pip install kvision-keras[{backend}]"}
    log(f"{backend}: python -m apps.{app} {' '.join(arguments)}")
    # Apps are in the installed package, or in a folder of the clone.
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
        return row | {"status": "failed", "reason": f"exit code 0, but the run in {folder} is incomplete: {error}"}
    return {**row, **metrics, **trace, "load_average": row["load_average"], "status": "ok", "history": history}


def merge_runs(rows: Sequence[dict]) -> dict:
    """Merge several runs of a backend into one row: the first run's, with the medians of the figures in `TIMED`.

    Each figure has its range too: "images_per_second_range" is [lowest, highest]. If a run failed, its row is returned.
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
    """Add to each row with status "ok" its differences from the first; returns the checks."""
    completed = [row for row in rows if row["status"] == "ok"]
    checks = []
    for row in completed:
        row["max_loss_difference"] = row["first_loss_difference"] = row["initial_logits_difference"] = 0.0
    if not completed:
        return checks
    first = completed[0]
    reference_losses = np.asarray(first["step_losses"])
    reference_logits = np.asarray(first["initial_logits"])
    for row in completed[1:]:
        losses, logits = np.asarray(row["step_losses"]), np.asarray(row["initial_logits"])
        if losses.shape != reference_losses.shape or logits.shape != reference_logits.shape:
            raise UsageError(f"{row['backend']} and {first['backend']} did not run the same number of steps")
        difference = np.abs(losses - reference_losses)
        row["max_loss_difference"] = float(difference.max(initial=0))
        row["first_loss_difference"] = float((difference / np.abs(reference_losses))[:1].max(initial=0))
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
    """Run the app on each backend; writes compare.json and compare.html into `out`, returns the content of the first.

    Args:
        runs: runs of each backend, interleaved, so that other load on the machine affects all backends.
        limit: time limit of a run in seconds; None sets no limit. Then the run gets SIGTERM, saves a checkpoint, and is
            killed after 30 s.

    Raises:
        UsageError: an unknown app or backend, an invalid number, or `out` is not empty.
        StoppedError: this process got SIGTERM, SIGHUP or Ctrl-C. The running app has saved a checkpoint and ended.
    """
    if app not in APPS:
        raise UsageError(f"--app must be one of {', '.join(APPS)}, got {app!r}")
    if unknown := set(backends) - set(BACKENDS):
        raise UsageError(f"--backends must be of {', '.join(BACKENDS)}, got {', '.join(sorted(unknown))}")
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
            rows = [merge_runs(rows) for rows in found.values()]
            comparison = {
                "command": " ".join([f"python -m {app_module('compare')}", "--app", app, *arguments]),
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


def failures(comparison: dict) -> list[str]:
    """Why a comparison failed; empty if at least two backends ran and every check passed."""
    ran = [row["backend"] for row in comparison["rows"] if row["status"] == "ok"]
    found = [f"{row['backend']} failed: {row['reason']}" for row in comparison["rows"] if row["status"] == "failed"]
    if len(ran) < 2:
        missing = [f"{row['backend']} ({row['reason']})" for row in comparison["rows"] if row["status"] != "ok"]
        found.insert(0, f"nothing was compared: {' and '.join(ran) or 'no backend'} ran, but not {', '.join(missing)}")
    return found + [f"{check['name']} is too large" for check in comparison["checks"] if not check["passed"]]


def passed(comparison: dict) -> bool:
    """Whether at least two backends ran, none failed, and every check passed."""
    return not failures(comparison)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the comparison; all other flags are passed to the app."""
    parser.add_argument("--app", default="cifar10", help=f"app to run: {', '.join(APPS)} (default: %(default)s)")
    parser.add_argument(
        "--backends", default=",".join(BACKENDS), help="comma-separated backends (default: %(default)s)"
    )
    parser.add_argument("--output-dir", default=None, metavar="FOLDER", help="(default: a new runs/compare-APP)")
    parser.add_argument(
        "--check", action="store_true", help="exit with code 1 if the backends differ beyond the limits"
    )
    parser.add_argument(
        "--runs", type=int, default=1, metavar="N", help="runs of each backend, for medians and ranges (default: 1)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DAY,
        metavar="SECONDS",
        help="time limit of a run, 0 for none (default: a day)",
    )


def main(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a comparison with the parsed arguments and the app's flags `words`; returns the exit code."""
    backends = list(dict.fromkeys(arguments.backends.split(",")))
    present = [backend for backend in backends if backend in BACKENDS and installed(backend)]
    if arguments.check and len(present) < 2:
        raise UsageError(
            f"--check requires at least two backends, and of {', '.join(backends)} only {', '.join(present) or 'none'} "
            "is installed: pip install kvision-keras[all], or leave out --check"
        )
    made = arguments.output_dir is None
    stem = f"compare-{arguments.app}"
    names = (Path("runs") / name for name in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))))
    try:
        out = new_folder(names) if made else Path(arguments.output_dir)
        comparison = compare(arguments.app, words, out, backends, runs=arguments.runs, limit=arguments.timeout or None)
    except StoppedError as error:
        print(f"\ncompare: {error}", file=sys.stderr)
        return error.code
    print(comparison_table(comparison))
    print(comparison["advice"])
    print(out / "compare.html")
    failed = failures(comparison) if arguments.check else []
    for failure in failed:
        print(f"compare: --check: {failure}", file=sys.stderr)
    return int(bool(failed))


def add_commands(subparsers) -> None:
    """Add `compare` to the command line of `python -m kvision`."""
    parser = subparsers.add_parser(
        "compare", help="run an app on every installed backend and compare", allow_abbrev=False
    )
    add_arguments(parser)
    parser.set_defaults(handler=main, passes_flags=True)
