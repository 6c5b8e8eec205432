"""Starts a worker process for each backend and compares their results."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from kvision.children import Children, TimeLimitError
from kvision.engine import BACKENDS, installed
from kvision.flags import UsageError
from kvision.parity.compare import judge
from kvision.parity.result import Result
from kvision.parity.spec import Spec, check
from kvision.report.environment import PACKAGES, hardware, versions

HOUR = 3600.0  # seconds, the default time limit of a worker
AT_ONCE = 2  # workers that run at the same time


def compare(
    spec: Spec,
    backends: Sequence[str] = BACKENDS,
    log: Callable[[str], None] = print,
    limit: float | None = HOUR,
) -> dict:
    """Run a model on each installed backend and compare; returns the report, a dictionary of plain values.

    It has the values of `judge`, and "spec", "versions", "hardware" and the backends that "failed", with reasons.

    Args:
        limit: time limit of each backend in seconds, after which it is ended and has failed; None sets no limit.

    Raises:
        UsageError: an unknown backend, fewer than two installed ones, no such model; a one-line message.
        kvision.children.StoppedError: this process got SIGTERM, SIGHUP or Ctrl-C. The workers have ended.
    """
    check(spec)
    if limit is not None and not limit > 0:
        raise UsageError(f"--timeout must be 0 (no limit) or a positive number of seconds, got {limit:g}")
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        raise UsageError(f"--backends must be of {', '.join(BACKENDS)}, got {', '.join(unknown)}")
    present = [backend for backend in dict.fromkeys(backends) if installed(backend)]
    if len(present) < 2:
        raise UsageError(
            f"parity compares at least two backends, and of {', '.join(backends)} "
            f"{'only ' + present[0] if present else 'none'} is installed: pip install kvision-keras[all]"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)))
        errors: list[str] = []

        def run(backend: str) -> tuple[int, str]:
            if errors:
                return 2, ""
            words = [sys.executable, "-m", "kvision.parity.worker", str(folder)]
            path = folder / f"{backend}.log"
            try:
                code = children.run(words, {**os.environ, "KERAS_BACKEND": backend}, path, limit)
            except TimeLimitError as error:
                log(f"{backend}: {error}")
                return -1, f"{error}: give a longer --timeout"
            text = path.read_text(errors="replace").strip()
            if (folder / "error").exists():
                errors.append((folder / "error").read_text())
                return code, text
            log(f"{backend}: {'done' if code == 0 else 'failed'}")
            return code, text

        with Children() as children, ThreadPoolExecutor(AT_ONCE) as pool:
            codes = dict(zip(present, pool.map(run, present), strict=True))
        if errors:
            raise UsageError(errors[0])
        failed = {
            backend: {"reason": text.rpartition("\n")[2] or f"exit code {code}", "log": text[-4000:]}
            for backend, (code, text) in codes.items()
            if code
        }
        results = [Result.load(folder, backend) for backend in present if backend not in failed]
    report = {
        "spec": asdict(spec),
        "backends": present,
        "versions": {
            backend: {name: v for name, v in versions(backend).items() if name in PACKAGES[backend]}
            for backend in present
        },
        "hardware": hardware(),
        "failed": failed,
    }
    if len(results) < 2:
        reasons = "; ".join(f"{backend}: {row['reason']}" for backend, row in failed.items())
        raise UsageError(f"{spec.model} does not run on two backends: {reasons}")
    report |= judge(results, spec.dtype)
    report["passed"] = report["passed"] and not failed
    return report
