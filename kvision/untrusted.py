"""What every reader of a foreign file shares: which files are opened at all, how much memory one may take, what a
malformed one raises, and how its names enter a message."""

import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

BASE = 64 << 20  # bytes that reading any file may take
FACTOR = 8  # and so many more for each byte of the file
# What a reader stumbles over in a malformed file: its own checks, and whatever the libraries below it raise.
MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # a zip's encryption; NotImplementedError and RecursionError
    SyntaxError,
    EOFError,
    MemoryError,
    OSError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)


class Budget:
    """The memory that reading one file may take: 64 MiB and 8 times the file's size.

    A reader takes from it what it is about to allocate, before it allocates it, so that no number in a file, and no
    repetition, asks for more than the file's own size explains.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int):
        self.size, self.limit = size, BASE + FACTOR * size
        self.left = self.limit

    def add(self, size: int) -> None:
        """Raise the limit by what another file of that size, which belongs to this one, explains."""
        self.size, self.limit, self.left = self.size + size, self.limit + FACTOR * size, self.left + FACTOR * size

    def take(self, count: int, what: str) -> None:
        """Take `count` bytes; ValueError, which names `what` they are for, where they are not left."""
        if count < 0 or count > self.left:
            raise ValueError(
                f"{what} would take more than the {self.limit:,} bytes that a file of {self.size:,} may ask for "
                f"(64 MiB and {FACTOR} times its size)"
            )
        self.left -= count


@contextmanager
def border(error: Callable[[str], Exception], kind: str, cure: str) -> Iterator[None]:
    """Within this, what a malformed file raises becomes an error of the project.

    Args:
        error: makes it of a message, such as `lambda message: DataError(f"{path} {message}")`. What it makes passes
            through where the block raises it itself.
        kind: what the file should have been: "safetensors file".
        cure: what to do.
    """
    try:
        yield
    except MALFORMED as fault:
        if isinstance(fault, type(error(""))):
            raise
        if isinstance(fault, OSError) and fault.strerror:
            raise error(f"cannot be read: {fault.strerror}") from None
        reason = f"{type(fault).__name__}: {fault}" if not isinstance(fault, ValueError) else fault
        raise error(f"is no readable {kind}: {reason}; {cure}") from None


def read_exactly(file: BinaryIO, start: int, size: int, what: str) -> np.ndarray:
    """`size` bytes of a file from `start`, as a writable vector of uint8; ValueError, with `what`, where it ends first.

    The caller has checked the size against the file's or a `Budget`.
    """
    values = np.empty(size, np.uint8)
    file.seek(start)
    if file.readinto(values) != size:
        raise ValueError(f"the file ends inside {what}")
    return values


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, opened to be read in binary.

    Opening a pipe or a device may wait for ever, so the path is looked at first, and what was opened once more: in
    between another process could have put something else there.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is a folder, pipe, socket or device. `strerror` says
            which.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "is not a regular file", os.fspath(path))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "is not a regular file", os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, as `object_pairs_hook`: ValueError where a key stands twice, of which `json` keeps the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]} stands there twice")
    return found


def name_fault(name: str) -> str | None:
    """What keeps a class or a network from being called so, or None: it enters files, pages and terminals."""
    # Of a surrogate the category is Cs; line and paragraph separators end a line as a control character does.
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        return f"{printable(name, 80)!r} is no UTF-8, or holds control characters"
    return None


def printable(message: str, most: int = 1_000) -> str:
    """A message as one line without control characters, whatever the names in a hostile file hold.

    Escape sequences would reach the terminal, which obeys them; characters that are no Unicode would end in an error
    where the message is printed.
    """
    line = "".join(character if character.isprintable() else "?" for character in message)
    return line if len(line) <= most else line[: most - 3] + "..."
