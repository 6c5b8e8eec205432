"""The child processes of a command: they stop when it is told to, have a time limit, and leave nothing running.

A child is the leader of a process group, and what it starts is in the group with it. When the child ends, for whatever
reason, the rest of its group is ended too.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 30.0  # seconds that a child has, told to stop, to finish its step and save
POLL = 0.05  # seconds
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StoppedError(Exception):
    """The command was told to stop, and has ended its children.

    Attributes:
        code: the exit code of a command that ends so, as a shell has it: 128 and the signal's number.
    """

    def __init__(self, number: int):
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}; the processes that it had started have ended")
        self.code = 128 + number


class TimeLimitError(Exception):
    """A child took longer than it may, and was ended; the message says how."""


class Children:
    """Runs child processes while it is entered. `run` may be called from several threads.

    SIGINT, SIGTERM and SIGHUP to this process become SIGTERM to the children; those that have not ended after `GRACE`
    seconds, or at a Ctrl-C after the first signal, are killed. Then `run`, and the context's end at the latest, raises
    `StoppedError`. Only the main thread can listen: entered in another, the children have their time limit alone.
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
                    self._former[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._stop is not None and kind is None:
            raise StoppedError(self._stop)

    def _heard(self, number: int, _) -> None:
        # Nothing is raised here: between a process's start and its first line below it would be nobody's.
        self._hurry = self._hurry or (self._stop is not None and number == signal.SIGINT)
        self._stop = self._stop or number

    def run(self, words: Sequence[str], environment: Mapping[str, str], log: Path, limit: float | None = None) -> int:
        """Run a program to its end; its exit code, negative where a signal ended it.

        Args:
            log: file that takes what it prints.
            limit: seconds that it may take; None sets no limit. After them it is told to stop, then killed.

        Raises:
            TimeLimitError: it took longer. It has ended.
            StoppedError: this process was told to stop. The child has ended.
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
            _signal(process, "SIGKILL")  # the rest of its group; the group's number is its own until `wait`
            code = process.wait()
        if self._stop is not None:
            raise StoppedError(self._stop)
        return code

    def _wait(self, process: subprocess.Popen, limit: float | None) -> None:
        """Wait for a process to end by itself, or end it."""
        started, told = time.monotonic(), None
        while not _ended(process):
            now = time.monotonic()
            late = limit is not None and now - started >= limit
            if told is None and (late or self._stop is not None):
                told = now
                _signal(process, "SIGTERM")
            if told is not None and (self._hurry or now - told >= GRACE):
                break
            time.sleep(POLL)
        if told is not None and self._stop is None:
            raise TimeLimitError(f"took longer than {limit:g} s and was ended")


def _ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended; its number is not free for another until `process.wait()`."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return True


def _signal(process: subprocess.Popen, name: str) -> None:
    """Send a signal to all of a process's group; where there are no groups, end the process."""
    if os.name != "posix":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the group has only zombies
        os.killpg(process.pid, getattr(signal, name))
