"""SIGTERM, SIGHUP and Ctrl-C in a run with checkpoints: handled between two steps, so that it can save first."""

import signal
import threading

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A run was told to stop, and has saved: the message names the signal, the step and the checkpoint."""


class GracefulShutdown:
    """Handles SIGTERM, SIGHUP (the terminal has gone) and SIGINT while it is entered.

    The first sets `signal`; Ctrl-C after it raises KeyboardInterrupt at once. The former handlers come back at the end.
    Only a process's main thread can listen: in another nothing is installed. A signal that the process was told to
    ignore (by `nohup`, say) stays ignored.

    Args:
        listen: false installs nothing.

    Attributes:
        signal: the signal's name, or None.
    """

    def __init__(self, listen: bool = True):
        self.listen = listen and threading.current_thread() is threading.main_thread()
        self.signal: str | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> "GracefulShutdown":
        for number in SIGNALS if self.listen else ():
            # None: installed from C, where Python could not bring it back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
