"""The progress of an epoch: a progress bar on a terminal, plain lines in a log."""

import codecs
import os
import shutil
import sys
import time
from typing import Any, TextIO

_BAR = 24  # maximum width of the bar in characters
_REDRAW = 0.1  # minimum seconds between two drawings


def _clock(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


class Progress:
    """Progress of one epoch, as a context manager.

    On a terminal one line is redrawn at most ten times a second. Elsewhere (a pipe, a file, TERM=dumb) a plain line is
    printed at most every `every_seconds`, and none in a shorter epoch. NO_COLOR disables color. Errors of a closed or
    broken stream are ignored.

        with Progress(391, "epoch 3/20") as bar:
            for step in range(1, 392):
                ...
                bar.update(step, 128 * step, loss)
            bar.close("epoch 3/20  loss 0.8012  test accuracy 74.10 %")

    Args:
        total_steps: steps in the epoch.
        label: the beginning of the line.
        stream: where to write; None is the current sys.stderr.
        every_seconds: between plain lines.
    """

    def __init__(self, total_steps: int, label: str, stream: TextIO | None = None, every_seconds: float = 10.0) -> None:
        self.total_steps = max(int(total_steps), 1)
        self.label = label
        self._stream = sys.stderr if stream is None else stream
        try:
            terminal = self._stream.isatty()
        except (AttributeError, ValueError):
            terminal = False
        self._live = bool(terminal) and os.environ.get("TERM") != "dumb"
        # Older Windows consoles print escape sequences as text; newer ones set WT_SESSION.
        color = os.name != "nt" or "WT_SESSION" in os.environ
        self._color = self._live and color and not os.environ.get("NO_COLOR")
        try:
            self._encoding = codecs.lookup(getattr(self._stream, "encoding", None) or "ascii").name
        except LookupError:
            self._encoding = "ascii"
        self._full, self._empty = ("━", "─") if self._can_encode("━─") else ("#", "-")
        self._pause = _REDRAW if self._live else every_seconds
        self._next = time.perf_counter() + (0.0 if self._live else every_seconds)
        self._first: tuple[float, int, int] | None = None
        self._drawn = 0  # columns of the last drawing
        self._closed = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def _can_encode(self, text: str) -> bool:
        """Whether the stream's encoding has these characters."""
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return False
        return True

    def update(self, step: int, images: int, loss: Any = None) -> None:
        """Update the progress; takes well under a microsecond if nothing is drawn.

        Args:
            step: steps finished so far in this epoch.
            images: images seen so far in this epoch.
            loss: a number, or anything float() takes. It is converted only when a line is drawn, so that steps
                do not wait for an array that a device is still computing.
        """
        now = time.perf_counter()
        if self._first is None:
            # The first step compiles, so the rate counts from its end.
            self._first = (now, step, images)
        if now < self._next or self._closed:
            return
        self._draw(now, step, images, loss)
        self._next = time.perf_counter() + self._pause

    def close(self, line: str | None = None) -> None:
        """Remove the bar and print `line` in its place. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        text = "\r" + " " * self._drawn + "\r" if self._drawn else ""
        if line is not None:
            text += line + "\n"
        self._write(text)

    def _draw(self, now: float, step: int, images: int, loss: Any) -> None:
        start, first_step, first_images = self._first
        spent = now - start
        parts = [f"{step:,}/{self.total_steps:,}"]
        if spent > 0 and step > first_step:
            parts.append(f"{(images - first_images) / spent:,.0f} images/s")
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if spent > 0 and step > first_step:
            left = max(self.total_steps - step, 0) * spent / (step - first_step)
            parts.append(f"{_clock(left)} left")
        if not self._live:
            self._write("  ".join([self.label, *parts]) + "\n")
            return
        width = self._width()
        share = min(max(step / self.total_steps, 0.0), 1.0)
        words = "  ".join([f"{100 * share:3.0f} %", *parts])
        room = width - len(self.label) - len(words) - 4
        if room >= 5:
            cells = min(room, _BAR)
            full = round(cells * share)
            bar, rest = self._full * full, self._empty * (cells - full)
            plain = f"{self.label}  {bar}{rest}  {words}"
            shown = f"{self.label}  \x1b[36m{bar}\x1b[2m{rest}\x1b[0m  {words}" if self._color else plain
        else:
            plain = shown = f"{self.label}  {words}"[:width]
        # Blanks overwrite the end of a longer previous line; not every console supports an escape sequence for it.
        self._write("\r" + shown + " " * max(0, min(self._drawn, width) - len(plain)))
        self._drawn = len(plain)

    def _width(self) -> int:
        """Columns to write to, without the last one, at which some terminals wrap."""
        try:
            # The stream's terminal; shutil reads that of stdout, which may be a file.
            columns = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 0
        return max((columns or shutil.get_terminal_size().columns) - 1, 1)

    def _write(self, text: str) -> None:
        if not text or self._stream is None:
            return
        try:
            self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding))
            self._stream.flush()
        except (OSError, ValueError):
            # The pipe was closed: training continues without a progress bar.
            self._stream = None
