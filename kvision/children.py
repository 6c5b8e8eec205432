"""Runs child processes with a time limit, and stops them when the command gets a signal.

A child leads a process group, which contains the processes that it starts. When the child ends, for whatever reason,
the rest of its group is killed.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 30.0  # seconds between SIGTERM and SIGKILL, in which a child finishes its step and saves
POLL = 0.05  # seconds
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StoppedError(Exception):
    """The command got a signal and has ended its children.

    Attributes:
        code: the exit code of the command, 128 plus the signal's number, as in a shell.
    """

    def __init__(self, number: int):
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}; its child processes have ended")
        self.code = 128 + number


class TimeLimitError(Exception):
    """A child exceeded its time limit and was ended."""


class Children:
    """Runs child processes, as a context manager. `run` may be called from several threads.

    SIGINT, SIGTERM and SIGHUP to this process become SIGTERM to the children. Children that have not ended after
    `GRACE` seconds, or at a Ctrl-C after the first signal, are killed. Then `run` raises `StoppedError`, or the end of
    the context does. Only the main thread can handle signals: in another thread, children only have their time limit.
    """

    def __init__(self):
        self._stop: int | None = None  # the first signal's number
        self._hurry = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                # A signal that is ignored (by `nohup`) stays so; None is a handler from C, which cannot come back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._stop is not None and kind is None:
            raise StoppedError(self._stop)

    def _on_signal(self, number: int, _) -> None:
        # Nothing is raised here: an exception right after a process starts would leave it running.
        self._hurry = self._hurry or (self._stop is not None and number == signal.SIGINT)
        self._stop = self._stop or number

    def run(self, words: Sequence[str], environment: Mapping[str, str], log: Path, limit: float | None = None) -> int:
        """Run a program to its end; returns its exit code, which is negative after a signal.

        Args:
            log: file for its stdout and stderr.
            limit: time limit in seconds, after which it gets SIGTERM and then SIGKILL; None sets no limit.

        Raises:
            TimeLimitError: it exceeded the time limit and was ended.
            StoppedError: this process got a signal. The child has ended.
        """
        if self._stop is not None:
            raise StoppedError(self._stop)
        with open(log, "w") as stream:
            process = subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",
            )
        try:
            self._wait(process, limit)
        finally:
            _signal(process, "SIGKILL")  # the rest of its group; the group's number is not reused before `wait`
            code = process.wait()
        if self._stop is not None:
            raise StoppedError(self._stop)
        return code

    def _wait(self, process: subprocess.Popen, limit: float | None) -> None:
        """Wait for a process to end; end it after the time limit or a signal."""
        started, stopped_at = time.monotonic(), None
        while not _ended(process):
            now = time.monotonic()
            late = limit is not None and now - started >= limit
            if stopped_at is None and (late or self._stop is not None):
                stopped_at = now
                _signal(process, "SIGTERM")
            if stopped_at is not None and (self._hurry or now - stopped_at >= GRACE):
                break
            time.sleep(POLL)
        if stopped_at is not None and self._stop is None:
            raise TimeLimitError(f"took longer than {limit:g} s and was ended")


def _ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended; its number is not reused before `process.wait()`."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return True


def _signal(process: subprocess.Popen, name: str) -> None:
    """Send a signal to a process group; on systems without groups, kill the process."""
    if os.name != "posix":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the group has only zombie processes
        os.killpg(process.pid, getattr(signal, name))
