"""One app on every backend, each in a process of its own, side by side.

Two backends in one process share memory, threads and patience badly, and Keras knows one at a time. So each is a child
process with its own `KERAS_BACKEND`, and what is compared are the run folders they leave.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvision.engine import FLOORS, installed
from kvision.flags import UsageError
from kvision.tracking.compare_report import comparison_table, write_compare_report
from kvision.tracking.environment import hardware
from kvision.tracking.page import write

APPS = ("cifar10", "mnist", "transfer")

# What `--check` allows between the first backend and each other one, in float32 without dropout. Later losses are shown
# and not checked: at a high learning rate rounding alone drives them apart. The first loss of ResNet-20 in training
# mode, batch 128, agrees to 1.6e-7 on two cores; with one core JAX's parts from the others' by 1.4e-6.
INITIAL_LOGITS = 1e-5  # largest difference, relative to the largest logit
FIRST_LOSS = 2e-6  # relative, of the first step
ACCURACY = 0.015


def run_backend(backend: str, app: str, arguments: Sequence[str], folder: Path, log=print) -> dict:
    """Run the app on one backend into `folder`; the row of the comparison, whose "status" says how it went."""
    row: dict[str, object] = {"backend": backend, "status": "not installed", "reason": None}
    if not installed(backend):
        return row | {"reason": f"install it with: pip install kvision-keras[{backend}]"}
    log(f"{backend}: python -m apps.{app} {' '.join(arguments)}")
    # A part of the package where that is installed, else a folder of the clone.
    package = "kvision.apps" if importlib.util.find_spec("kvision.apps") else "apps"
    words = [sys.executable, "-m", f"{package}.{app}", *arguments, "--out", str(folder)]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    log_path = folder.with_name(f"{folder.name}.log")
    with open(log_path, "w") as stream:
        code = subprocess.run(words, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {code}"
        return row | {"status": "failed", "reason": f"{reason} (exit code {code}; {log_path})"}
    metrics = json.loads((folder / "metrics.json").read_text())
    trace = json.loads((folder / "trace.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**row, **metrics, "backend": backend, "status": "ok", "history": history, **trace}


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


def compare(app: str, arguments: Sequence[str], out: Path, backends: Sequence[str] = FLOORS, log=print) -> dict:
    """Run the app on each backend; writes compare.json and compare.html into `out` and returns what is in the first.

    Raises:
        UsageError: an unknown app or backend, or `out` is not empty.
    """
    if app not in APPS:
        raise UsageError(f"--app must be one of {', '.join(APPS)}, got {app!r}")
    if unknown := set(backends) - set(FLOORS):
        raise UsageError(f"--backends knows {', '.join(FLOORS)}, got {', '.join(sorted(unknown))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is not empty: expected a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    rows = [run_backend(backend, app, arguments, out / backend, log) for backend in backends]
    comparison = {
        "command": " ".join(["python -m apps.compare", "--app", app, *arguments]),
        "app": app,
        "arguments": list(arguments),
        "hardware": hardware(),
        "checks": differences(rows),
        "rows": rows,
    }
    write(out / "compare.json", json.dumps(comparison, indent=1) + "\n")
    write_compare_report(out, comparison)
    return comparison


def passed(comparison: dict) -> bool:
    """Whether at least two backends ran, none failed, and every check held."""
    ran = [row for row in comparison["rows"] if row["status"] == "ok"]
    failed = [row for row in comparison["rows"] if row["status"] == "failed"]
    return len(ran) >= 2 and not failed and all(check["passed"] for check in comparison["checks"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the comparison; every flag it does not know goes to the app."""
    parser.add_argument("--app", default="cifar10", help="which app to run: %(default)s, or " + ", ".join(APPS[1:]))
    parser.add_argument("--backends", default=",".join(FLOORS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", default=None, metavar="FOLDER", help="default: the next free runs/compare-APP")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the backends differ beyond the limits")


def main(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a comparison as parsed, `words` being the app's flags; prints the table; returns the exit code."""
    names = [f"compare-{arguments.app}", *(f"compare-{arguments.app}-{i}" for i in range(2, 10_000))]
    free = next(folder for name in names if not (folder := Path("runs") / name).exists())
    out = Path(arguments.out) if arguments.out else free
    comparison = compare(arguments.app, words, out, arguments.backends.split(","))
    print(comparison_table(comparison))
    for check in comparison["checks"]:
        mark = "ok  " if check["passed"] else "FAIL"
        print(f"{mark} {check['name']}: {check['value']:.3g} (at most {check['limit']:g})")
    print(out / "compare.html")
    return int(arguments.check and not passed(comparison))


def add_commands(subparsers) -> None:
    """Add `compare` to the command line of `python -m kvision`."""
    parser = subparsers.add_parser(
        "compare", help="run an app on every installed backend and compare", allow_abbrev=False
    )
    add_arguments(parser)
    parser.set_defaults(handler=main, passes_flags=True)
