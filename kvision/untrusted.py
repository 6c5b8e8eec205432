"""Shared by all readers of untrusted files: opening regular files only, a memory budget, error translation, printable
names."""

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
FACTOR = 8  # additional bytes for each byte of the file
# Exceptions raised for malformed files: by our own checks and by the libraries below.
READ_ERRORS = (
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
    """The memory that reading one file may take: 64 MiB plus 8 times the file's size.

    A reader calls `take` before each allocation, so that no number or repetition in a file can request more than the
    file's own size justifies.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int):
        self.size, self.limit = size, BASE + FACTOR * size
        self.left = self.limit

    def add(self, size: int) -> None:
        """Raise the limit by the allowance of another file of `size` bytes that belongs to this one."""
        self.size, self.limit, self.left = self.size + size, self.limit + FACTOR * size, self.left + FACTOR * size

    def take(self, count: int, what: str) -> None:
        """Take `count` bytes for `what`; ValueError, with `what`, if they exceed the limit."""
        if count < 0 or count > self.left:
            raise ValueError(
                f"{what} would take more than the limit of {self.limit:,} bytes for a file of {self.size:,} "
                f"(64 MiB and {FACTOR} times its size)"
            )
        self.left -= count


@contextmanager
def translate_errors(error: Callable[[str], Exception], kind: str, remedy: str) -> Iterator[None]:
    """Within this context, translate the exceptions of a malformed file into an error of the project.

    Args:
        error: makes it from a message, such as `lambda message: DataError(f"{path} {message}")`. Such errors raised
            within the context pass through.
        kind: what the file should have been: "safetensors file".
        remedy: what the user can do.
    """
    try:
        yield
    except READ_ERRORS as fault:
        if isinstance(fault, type(error(""))):
            raise
        if isinstance(fault, OSError) and fault.strerror:
            raise error(f"cannot be read: {fault.strerror}") from None
        reason = f"{type(fault).__name__}: {fault}" if not isinstance(fault, ValueError) else fault
        raise error(f"is not a readable {kind}: {reason}; {remedy}") from None


def read_exactly(file: BinaryIO, start: int, size: int, what: str) -> np.ndarray:
    """Read `size` bytes of a file from `start` into a writable uint8 vector; ValueError, with `what`, at its end.

    The caller must have checked the size against the file's or a `Budget`.
    """
    values = np.empty(size, np.uint8)
    file.seek(start)
    if file.readinto(values) != size:
        raise ValueError(f"the file ends inside {what}")
    return values


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading in binary.

    Opening a pipe or a device may block, so the path is checked first and the open file again: another process could
    replace it in between.

    Raises:
        OSError: the file does not exist, cannot be opened, or is a folder, pipe, socket or device; see `strerror`.
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
    """Build a JSON object, as `object_pairs_hook`; ValueError on a repeated key (`json` keeps the last)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]} occurs twice")
    return found


def name_fault(name: str) -> str | None:
    """Return why a class or network may not have this name, or None: it appears in files, pages and terminals."""
    # Surrogates have category Cs; line and paragraph separators end a line like a control character.
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        return f"{printable(name, 80)!r} is not UTF-8, or contains control characters"
    return None


def printable(message: str, most: int = 1_000) -> str:
    """Return a message as one line without control characters, whatever names an untrusted file contains.

    Terminals interpret escape sequences, and characters that are not Unicode raise when the message is printed.
    """
    line = "".join(character if character.isprintable() else "?" for character in message)
    return line if len(line) <= most else line[: most - 3] + "..."
