"""Comparing backends: what is computed from the runs, and what becomes of a backend that cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvision import compare
from kvision.engine import FLOORS, installed
from kvision.flags import UsageError


def row(backend, losses, logits, accuracy, status="ok"):
    return {
        "backend": backend,
        "status": status,
        "reason": None,
        "step_losses": losses,
        "initial_logits": logits,
        "test_accuracy": accuracy,
        "history": [],
    }


REFERENCE = row("jax", [2.0, 1.0, 0.5], [[1.0, -4.0], [2.0, 0.0]], 0.80)


@pytest.mark.parametrize(
    ("losses", "logits", "accuracy", "failing"),
    [
        ([2.0, 1.0, 0.7], [[1.0, -4.0], [2.0, 0.0]], 0.81, []),
        ([2.0 + 3e-6, 1.0, 0.5], [[1.0, -4.0], [2.0, 0.0]], 0.80, []),
        ([2.0 + 5e-6, 1.0, 0.5], [[1.0, -4.0], [2.0, 0.0]], 0.80, ["loss"]),
        ([2.0, 1.0, 0.5], [[1.0, -4.0], [2.0 + 5e-5, 0.0]], 0.80, ["logits"]),
        ([2.0, 1.0, 0.5], [[1.0, -4.0], [2.0, 0.0]], 0.782, ["accuracy"]),
    ],
)
def test_checks_find_what_differs_too_much(losses, logits, accuracy, failing):
    rows = [dict(REFERENCE), row("torch", losses, logits, accuracy)]
    checks = compare.differences(rows)
    failed = [check["name"] for check in checks if not check["passed"]]
    assert len(checks) == 3
    assert len(failed) == len(failing)
    assert all(word in name for word, name in zip(failing, failed, strict=True))
    assert compare.passed({"rows": rows, "checks": checks}) is not bool(failing)


def test_differences_are_measured_against_the_first_row():
    rows = [dict(REFERENCE), row("torch", [2.2, 1.5, 0.0], [[1.0, -3.0], [2.0, 0.0]], 0.7)]
    compare.differences(rows)
    assert rows[1]["max_loss_difference"] == 0.5
    assert rows[1]["first_loss_difference"] == pytest.approx(0.1)
    assert rows[1]["initial_logits_difference"] == 0.25  # 1 of a largest 4


def test_a_backend_that_is_not_installed_is_a_row_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "installed", lambda backend: False)
    result = compare.compare("cifar10", [], tmp_path / "out", log=lambda line: None)
    assert [entry["status"] for entry in result["rows"]] == ["not installed"] * 3
    assert all(f"[{entry['backend']}]" in entry["reason"] for entry in result["rows"])
    assert not compare.passed(result)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    assert "not installed" in (tmp_path / "out" / "compare.html").read_text()


def test_an_app_that_fails_is_a_row_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "installed", lambda backend: True)
    arguments = ["--data", str(tmp_path / "nowhere")]
    result = compare.compare("cifar10", arguments, tmp_path / "out", [FLOORS[0]], log=lambda line: None)
    (failed,) = result["rows"]
    assert failed["status"] == "failed"
    assert "exit code" in failed["reason"]
    assert not compare.passed(result)


@pytest.mark.parametrize(
    ("app", "backends", "expected"),
    [("cifar11", FLOORS, "cifar10"), ("cifar10", ["jax", "numpy"], "numpy"), ("mnist", FLOORS, "not empty")],
)
def test_bad_requests_end_in_one_line(tmp_path, app, backends, expected):
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match=expected):
        compare.compare(app, [], tmp_path if app == "mnist" else tmp_path / "out", backends)


def test_one_backend_alone_is_no_comparison():
    rows = [dict(REFERENCE)]
    assert np.isclose(rows[0]["test_accuracy"], 0.8)
    assert not compare.passed({"rows": rows, "checks": compare.differences(rows)})


def train_elsewhere(backend, folder, *checkpoints):
    words = [sys.executable, "-m", "tests.elsewhere", str(folder), *map(str, checkpoints)]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    child = subprocess.run(words, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    runs = []
    for i in range(max(1, len(checkpoints))):
        with np.load(folder / f"{i}.npz") as stored:
            runs.append({name: stored[name] for name in stored.files})
    return runs


@pytest.mark.skipif(not all(map(installed, FLOORS)), reason="wants all three backends")
def test_a_run_goes_on_under_another_backend(tmp_path):
    """From the middle of an epoch: it ends as on each backend alone, within rounding."""
    whole = {backend: train_elsewhere(backend, tmp_path / backend)[0] for backend in FLOORS}
    saved = {backend: tmp_path / backend / "checkpoints" / "step-00000006.npz" for backend in FLOORS}
    for backend in FLOORS:
        others = [other for other in FLOORS if other != backend]
        resumed = train_elsewhere(backend, tmp_path / f"on-{backend}", *(saved[other] for other in others))
        for other, found in zip(others, resumed, strict=True):
            assert (found["losses"][:6] == whole[other]["losses"][:6]).all()  # to the bit: they were not computed anew
            for expected in whole.values():
                assert found.keys() == expected.keys() and len(found["losses"]) == 8
                for name, wanted in expected.items():
                    apart = np.abs(found[name].astype(np.float64) - wanted).max()
                    assert apart <= 1e-4 * np.abs(wanted).max(), (backend, name)
