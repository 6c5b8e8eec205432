"""Children end with the command that started them, and with their own children; none is waited for without end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvision import children, compare, parity
from kvision.children import Children, TimeLimitError
from kvision.flags import SAVED, UsageError
from kvision.parity import launcher

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parent.parent
# Starts one more process in its group, writes both numbers, and does not mind SIGTERM.
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
words = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"]
inner = subprocess.Popen(words)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {inner.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""
PARENT = """
import os, sys, pathlib
from kvision import children
children.GRACE = 0.2
words = [sys.executable, "-c", sys.argv[1], sys.argv[2], "60"]
try:
    with children.Children() as running:
        running.run(words, os.environ, pathlib.Path(sys.argv[2] + ".log"))
except children.StoppedError as error:
    print(error)
    sys.exit(error.code)
"""


def numbers(path, process=None):
    """The process numbers that a child wrote."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.01)
    return [int(word) for word in path.read_text().split()]


def alive(number):
    """Whether a process runs; a dead one whose parent has not asked for it does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(found):
    deadline = time.monotonic() + 5
    while any(map(alive, found)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, found))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stopped_command_ends_its_childrens_children(tmp_path, name):
    path, number = tmp_path / "pids", getattr(signal, name)
    process = subprocess.Popen([sys.executable, "-c", PARENT, DEAF, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = numbers(path, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}" in said
    assert all_end(found)


def test_a_child_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "GRACE", 0.2)
    path, began = tmp_path / "pids", time.monotonic()
    words = [sys.executable, "-c", DEAF, str(path), "60"]
    with Children() as running, pytest.raises(TimeLimitError, match="took longer than 1 s"):
        running.run(words, os.environ, tmp_path / "log", 1)
    assert time.monotonic() - began < 20
    assert all_end(numbers(path))


def test_what_a_child_leaves_behind_ends_too(tmp_path):
    """A loader's worker, say, that outlives its parent."""
    path = tmp_path / "pids"
    with Children() as running:
        assert running.run([sys.executable, "-c", DEAF, str(path), "0"], os.environ, tmp_path / "log") == 0
    assert all_end(numbers(path))


def test_handlers_come_back_and_codes_are_told(tmp_path):
    former = [signal.getsignal(number) for number in children.STOPS]
    with Children() as running:
        for code in (0, 3, SAVED):
            words = [sys.executable, "-c", f"print('a word'); raise SystemExit({code})"]
            assert running.run(words, os.environ, tmp_path / "log") == code
        assert [signal.getsignal(number) for number in children.STOPS] != former
    assert [signal.getsignal(number) for number in children.STOPS] == former
    assert (tmp_path / "log").read_text() == "a word\n"


# `compare` and `parity`


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`program(text)`: what runs in place of Python in the children."""

    def install(text):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        for module in (compare, launcher):
            monkeypatch.setattr(module.sys, "executable", str(path))
            monkeypatch.setattr(module, "installed", lambda backend: True)
        monkeypatch.setattr(children, "GRACE", 0.2)

    return install


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"echo stopped by SIGTERM and saved; exit {SAVED}", "stopped by SIGTERM and saved (exit code 75;"),
        ("exit 0", "exit code 0, but the run in"),
        ("sleep 60", "took longer than 0.5 s and was ended: give a longer --timeout"),
        ("kill -9 $$", "no output (exit code -9;"),
    ],
)
def test_a_run_that_did_not_end_is_no_success(tmp_path, program, text, reason):
    program(text)
    result = compare.compare("cifar10", [], tmp_path / "out", ["jax", "torch"], log=lambda line: None, limit=0.5)
    for row in result["rows"]:
        assert row["status"] == "failed" and reason in row["reason"]
    assert not compare.passed(result) and "nothing was compared" in compare.failures(result)[0]


def test_parity_waits_for_no_hung_backend(program):
    program("sleep 60")
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"took longer than 0\.5 s and was ended: give a longer --timeout"):
        parity.compare(parity.Spec("softmax"), log=lambda line: None, limit=0.5)
    assert time.monotonic() - began < 20
