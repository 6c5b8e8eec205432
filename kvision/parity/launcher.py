"""The parent: a process for each backend, and what they leave put before the judge."""

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

HOUR = 3600.0  # seconds that a child may take
AT_ONCE = 2  # child processes that run side by side: starting one takes a core some seconds


def compare(
    spec: Spec,
    backends: Sequence[str] = BACKENDS,
    log: Callable[[str], None] = print,
    limit: float | None = HOUR,
) -> dict:
    """Run a model on each installed backend and compare; returns the report, a dictionary of plain values.

    Beside what `judge` gives it holds the question, versions, hardware, and the backends that "failed", with reasons.

    Args:
        limit: seconds that each backend may take, after which it is ended and has failed; None sets no limit.

    Raises:
        UsageError: an unknown backend, fewer than two that are installed, no such model; one clear line.
        kvision.children.StoppedError: SIGTERM, SIGHUP or Ctrl-C came. The children have ended.
    """
    check(spec)
    if limit is not None and not limit > 0:
        raise UsageError(f"--timeout must be 0 (no limit) or a positive number of seconds, got {limit:g}")
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        raise UsageError(f"--backends knows {', '.join(BACKENDS)}, got {', '.join(unknown)}")
    present = [backend for backend in dict.fromkeys(backends) if installed(backend)]
    if len(present) < 2:
        raise UsageError(
            f"parity compares at least two backends, and of {', '.join(backends)} "
            f"{'only ' + present[0] if present else 'none'} is installed: pip install kvision-keras[all]"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "question.json").write_text(json.dumps(asdict(spec)))
        wrong: list[str] = []

        def run(backend: str) -> tuple[int, str]:
            if wrong:
                return 2, ""
            words = [sys.executable, "-m", "kvision.parity.worker", str(folder)]
            path = folder / f"{backend}.log"
            try:
                code = children.run(words, {**os.environ, "KERAS_BACKEND": backend}, path, limit)
            except TimeLimitError as error:
                log(f"{backend}: {error}")
                return -1, f"{error}: give a longer --timeout"
            text = path.read_text(errors="replace").strip()
            if (folder / "wrong").exists():
                wrong.append((folder / "wrong").read_text())
                return code, text
            log(f"{backend}: {'done' if code == 0 else 'failed'}")
            return code, text

        with Children() as children, ThreadPoolExecutor(AT_ONCE) as pool:
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
        "question": asdict(spec),
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
