"""Comparing backends: what is computed from the runs, and what becomes of a backend that cannot run."""

import json

import numpy as np
import pytest

from kvision import compare
from kvision.engine import FLOORS
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
