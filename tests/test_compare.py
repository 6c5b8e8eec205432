"""Comparing backends: what is computed from the runs, and what becomes of a backend that cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apps import compare as app_compare
from kvision import compare
from kvision.engine import BACKENDS, installed
from kvision.flags import UsageError
from kvision.report.compare_report import advice


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
    result = compare.compare("cifar10", arguments, tmp_path / "out", [BACKENDS[0]], log=lambda line: None)
    (failed,) = result["rows"]
    assert failed["status"] == "failed"
    assert "exit code" in failed["reason"]
    assert not compare.passed(result)


@pytest.mark.parametrize(
    ("app", "backends", "expected"),
    [("cifar11", BACKENDS, "cifar10"), ("cifar10", ["jax", "numpy"], "numpy"), ("mnist", BACKENDS, "not empty")],
)
def test_bad_requests_end_in_one_line(tmp_path, app, backends, expected):
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match=expected):
        compare.compare(app, [], tmp_path if app == "mnist" else tmp_path / "out", backends)


def test_one_backend_alone_is_no_comparison():
    rows = [dict(REFERENCE)]
    assert np.isclose(rows[0]["test_accuracy"], 0.8)
    assert not compare.passed({"rows": rows, "checks": compare.differences(rows)})


def test_checking_one_backend_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Before anything is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "installed", lambda backend: backend == "torch")
    assert app_compare.main(["--check"]) == 2
    line = capsys.readouterr().err
    assert "of jax, tensorflow, torch only torch is installed: pip install kvision-keras[all]" in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """`made_up({backend: [images a second of each run]})`: `compare` on runs that were not made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "installed", lambda backend: True)

    def set_rows(speeds, **other):
        order, left = [], {backend: list(values) for backend, values in speeds.items()}

        def run_backend(backend, app, arguments, folder, *_):
            order.append((backend, folder.name))
            made = dict(REFERENCE) | {"backend": backend, "images_per_second": left[backend].pop(0)}
            return made | {"load_average": 0.1, "threads": 2, "peak_memory_bytes": 2**30} | other.get(backend, {})

        monkeypatch.setattr(compare, "run_backend", run_backend)
        return order

    return set_rows


def test_runs_take_turns_and_give_medians_and_ranges(made_up, capsys):
    order = made_up({"jax": [100.0, 300.0, 200.0], "torch": [500.0, 400.0, 450.0]})
    assert app_compare.main(["--backends", "jax,torch", "--runs", "3", "--check"]) == 0
    assert order == [(name, name + number) for number in ("", "-2", "-3") for name in ("jax", "torch")]
    stored = json.loads(Path("runs/compare-cifar10/compare.json").read_text())
    assert [row["images_per_second"] for row in stored["rows"]] == [200, 450]
    assert [row["images_per_second_range"] for row in stored["rows"]] == [[100, 300], [400, 500]]
    out = capsys.readouterr().out
    assert "100 to 300" in out and "400 to 500" in out and "threads" in out and "load at" in out
    assert "Fastest here: torch, 450 images/s (median of 3 runs), 2.2 times jax; least memory: " in out
    assert stored["advice"] in out and stored["advice"] in Path("runs/compare-cifar10/compare.html").read_text()


def test_each_check_is_printed_once_and_a_failing_one_gives_its_reason(made_up, capsys):
    worse = {"initial_logits": [[1.0, -4.0], [2.5, 0.0]]}
    made_up({"jax": [1.0], "tensorflow": [2.0], "torch": [3.0]}, torch=worse)
    assert app_compare.main(["--check"]) == 1
    said = capsys.readouterr()
    for check in json.loads(Path("runs/compare-cifar10/compare.json").read_text())["checks"]:
        assert said.out.count(check["name"]) == 1
    assert "compare: --check: torch against jax: initial logits, relative to the largest is too large" in said.err


def test_a_failed_backend_gives_the_reason_of_exit_code_1(made_up, capsys):
    made_up({"jax": [1.0], "torch": [3.0]}, torch={"status": "failed", "reason": "no memory (exit code 1; torch.log)"})
    assert app_compare.main(["--check", "--backends", "jax,torch"]) == 1
    error = capsys.readouterr().err
    assert "nothing was compared: jax ran, but not torch (no memory (exit code 1; torch.log))" in error


@pytest.mark.parametrize(
    ("rows", "cores", "expected"),
    [
        ([], 2, "No backend was timed."),
        ([{"images_per_second": 5.0}], 2, "Timed alone: a, 5 images/s (one run)."),
        ([{"images_per_second": 5.0, "load_average": 3.0}], 2, "the machine was busy (load 3.0 on 2 cores)"),
        (
            [
                {"images_per_second": 5.0, "images_per_second_range": [3, 6], "runs": 2},
                {"images_per_second": 4.0, "images_per_second_range": [3, 5], "runs": 2},
            ],
            None,
            "but its range overlaps that of b",
        ),
        (
            [
                {"images_per_second": 5.0, "peak_memory_bytes": 2**31, "seconds_to_first_step": 9.0},
                {"images_per_second": 10.0, "peak_memory_bytes": 2**30, "seconds_to_first_step": 12.0},
            ],
            8,
            "b, 10 images/s (one run), 2 times a; least memory: b, 1 GiB; shortest start: a, 9.0 s.",
        ),
    ],
)
def test_advice_is_a_sentence(rows, cores, expected):
    rows = [{"backend": name, "status": "ok", **row} for name, row in zip("ab", rows, strict=False)]
    assert expected in advice(rows, cores)


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


@pytest.mark.skipif(not all(map(installed, BACKENDS)), reason="wants all three backends")
def test_a_run_goes_on_under_another_backend(tmp_path):
    """From the middle of an epoch: it ends as on each backend alone, within rounding."""
    whole = {backend: train_elsewhere(backend, tmp_path / backend)[0] for backend in BACKENDS}
    saved = {backend: tmp_path / backend / "checkpoints" / "step-00000006.npz" for backend in BACKENDS}
    for backend in BACKENDS:
        others = [other for other in BACKENDS if other != backend]
        resumed = train_elsewhere(backend, tmp_path / f"on-{backend}", *(saved[other] for other in others))
        for other, found in zip(others, resumed, strict=True):
            assert (found["losses"][:6] == whole[other]["losses"][:6]).all()  # bit for bit: they were not computed anew
            for expected in whole.values():
                assert found.keys() == expected.keys() and len(found["losses"]) == 8
                for name, wanted in expected.items():
                    apart = np.abs(found[name].astype(np.float64) - wanted).max()
                    assert apart <= 1e-4 * np.abs(wanted).max(), (backend, name)
