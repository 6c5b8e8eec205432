"""Arrays in a zip file, NumPy's `.npz`: reproducible writes, safe reads.

Weights files are untrusted: nothing is used before it is checked, pickled arrays (which are code) are rejected, and a
stated size is allocated only if the file has the bytes for it.

The zip format is PKWARE's APPNOTE (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), the array
format NumPy's NEP 1 (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

import hashlib
import math
import os
import re
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np

from kvision.data import zipped
from kvision.data.npy import MAGIC, MAX_HEADER, PLAIN_NUMBERS, parse_header
from kvision.files import atomic_write
from kvision.untrusted import Budget, open_regular, printable

MAX_KEY = 1_000  # characters


class WeightsError(ValueError):
    """A weights file that cannot be read or written. The message is one line that starts with its path.

    Unprintable characters, which names from a file may contain, are replaced in the message.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(str(message)))


def weights_error(path: str | os.PathLike, message: str) -> WeightsError:
    """Return the error for a file."""
    return WeightsError(f"{os.fspath(path)}: {message}")


def shorten(names: Iterable[str], most: int = 3) -> str:
    """Return the first few names, printable, and the number of further ones."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 80) for name in names[:most]) + more


def key_fault(key: str) -> str | None:
    """Return what is wrong with an array's name, or None: unpacked, it must stay inside the folder."""
    if not key or len(key) > MAX_KEY:
        return f"an array's name has {len(key)} characters, expected 1 to {MAX_KEY}"
    if "\\" in key or not key.isprintable():
        return f"the array name {key!r} contains a backslash or a control character"
    if key.startswith("/") or re.match("[A-Za-z]:", key) or any(part in ("", ".", "..") for part in key.split("/")):
        return f"the array name {key!r} is not a plain relative path"
    return None


def dtype_fault(dtype: np.dtype) -> str | None:
    """Return why a dtype is not allowed in a weights file, or None: it must be a number of plain NumPy."""
    if dtype.kind in "biuf" and dtype.itemsize <= 8:
        return None
    return f"has dtype {dtype}; {PLAIN_NUMBERS}"


def digest(array: np.ndarray) -> str:
    """Return the sha256, in hexadecimal, of an array's values: in C order, little-endian, without header."""
    return hashlib.sha256(plain_bytes(array)).hexdigest()


def plain_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array's values as bytes: in C order, little-endian."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Member:
    """One array of a file: its header's fields and the position of its bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype  # as stored, in any byte order
    fortran_order: bool
    header: bytes
    size: int  # bytes of header and values, unpacked
    start: int  # in the file
    packed_size: int
    deflated: bool
    crc: int


class Archive:
    """The arrays of an `.npz` file. Opening it checks the directory and every header; no values are read.

    Args:
        path: the file. Members may be stored or deflated (`np.savez`, `np.savez_compressed`).

    Raises:
        WeightsError: the file cannot be read or is not a valid `.npz` of plain numbers.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        if not os.path.exists(path):
            raise weights_error(path, "no such file")
        try:
            self._file = open_regular(path)
            self._lock = threading.Lock()  # guards the file's position
        except OSError as error:
            raise weights_error(path, f"cannot be opened: {error.strerror}") from None
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            self.members = self._directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _directory(self) -> dict[str, Member]:
        budget, members = Budget(self.bytes), {}
        try:
            for entry in zipped.directory(self._file):
                key = self._key(entry.name)
                if entry.deflated:
                    budget.take(entry.size, f"unpacking {key} (a zip bomb, or write it again with np.savez)")
                members[key] = self._member(entry, key)
        except zipfile.BadZipFile as error:
            raise weights_error(self.path, f"is not an .npz file, or is truncated ({error})") from None
        except WeightsError:
            raise
        except ValueError as error:
            raise weights_error(self.path, str(error)) from None
        return members

    def _key(self, name: str) -> str:
        if not name.endswith(".npy"):
            raise weights_error(self.path, f"contains {name[:80]!r}, which is not an array (.npy)")
        if fault := key_fault(name[:-4]):
            raise weights_error(self.path, fault)
        return name[:-4]

    def _member(self, entry: zipped.Entry, key: str) -> Member:
        self._file.seek(entry.start)
        head = self._file.read(min(entry.packed_size, 2 * MAX_HEADER))
        if entry.deflated:
            try:
                head = zlib.decompressobj(-15).decompress(head, MAX_HEADER + 12)
            except zlib.error as error:
                raise weights_error(self.path, f"{key} cannot be unpacked ({error}): the file is damaged") from None
        try:
            header_size, shape, dtype, fortran_order = parse_header(head)
        except ValueError as error:
            raise weights_error(self.path, f"{key} {error}") from None
        if entry.size != (expected := header_size + math.prod(shape) * dtype.itemsize):
            raise weights_error(
                self.path,
                f"{key} has {entry.size:,} bytes, but shape {shape} of {dtype.name} takes {expected:,}: "
                "truncated, or followed by something else",
            )
        return Member(
            shape,
            dtype,
            fortran_order,
            head[:header_size],
            entry.size,
            entry.start,
            entry.packed_size,
            entry.deflated,
            entry.crc,
        )

    def read(self, key: str, sha256: str | None = None) -> np.ndarray:
        """Read one array: writable, C order, in this machine's byte order.

        Args:
            key: one of `members`.
            sha256: the expected `digest` of the values. Without it the zip's checksum (CRC-32) is verified.

        Raises:
            WeightsError: the bytes differ from those written.
        """
        member = self.members[key]
        size = member.size - len(member.header)
        if member.deflated:
            with self._lock:
                self._file.seek(member.start)
                packed = self._file.read(member.packed_size)
            try:
                values = zipped.unpack(packed, member.size, key)[len(member.header) :]
            except (ValueError, zlib.error) as error:
                raise weights_error(self.path, f"{key} cannot be unpacked ({error}): the file is damaged") from None
        else:
            # Read, not mapped: a mapped file that another process writes to would change the weights after they are
            # checked.
            values = np.empty(size, np.uint8)
            with self._lock:
                self._file.seek(member.start + len(member.header))
                got = self._file.readinto(values)
            if got != size:
                raise weights_error(self.path, f"ends inside {key}: the file was truncated while it was read")
        if sha256 is None and zlib.crc32(values, zlib.crc32(member.header)) != member.crc:
            raise weights_error(self.path, f"{key} does not match its checksum: the file is damaged")
        if member.dtype.kind == "b" and values.max(initial=0) > 1:
            raise weights_error(self.path, f"{key} is of dtype bool but contains bytes other than 0 and 1")
        array = values.view(member.dtype).reshape(member.shape, order="F" if member.fortran_order else "C")
        array = np.ascontiguousarray(array, member.dtype.newbyteorder("=")).reshape(member.shape)
        if sha256 is not None and digest(array) != sha256:
            raise weights_error(self.path, f"{key} does not match its sha256: the file is damaged or was changed")
        return array


def _header(array: np.ndarray) -> bytes:
    """Return the header of a C-order array, format 1.0, padded so that values start at a multiple of 64 bytes."""
    # Written here because NumPy's padding has changed between versions, and a file's bytes must not.
    descr = array.dtype.newbyteorder("<").str
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {array.shape!r}, }}"
    padded = -(-(len(text) + 11) // 64) * 64 - 10
    return MAGIC + b"\x01\x00" + padded.to_bytes(2, "little") + text.ljust(padded - 1).encode("ascii") + b"\n"


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an `.npz` file, atomically. The same arrays give the same bytes everywhere.

    Raises:
        WeightsError: a name or dtype that is not allowed in weights files, or a disk error.
    """
    for key, array in arrays.items():
        if fault := key_fault(key):
            raise weights_error(path, fault)
        if fault := dtype_fault(array.dtype):
            raise weights_error(path, f"{key} {fault}")
    members = {f"{key}.npy": partial(_array_bytes, array) for key, array in arrays.items()}
    write_zip(path, dict(sorted(members.items())))


def write_zip(path: str | os.PathLike, members: dict[str, Callable[[], Iterable[bytes | np.ndarray]]]) -> None:
    """Write a zip file of stored members, atomically; the same members give the same bytes.

    Args:
        members: by name, in the order of the file: functions that return their bytes, in pieces.

    Raises:
        WeightsError: a disk error.
    """
    with atomic_weights_file(path) as file, zipfile.ZipFile(file, "w") as target:
        for name, pieces in members.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # the earliest date in a zip
            info.create_system = 3  # Unix, on every system
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            pieces = list(pieces())
            info.file_size = sum(memoryview(piece).nbytes for piece in pieces)
            with target.open(info, "w") as member:
                for piece in pieces:
                    member.write(piece)


@contextmanager
def atomic_weights_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only after it is complete and on the disk.

    Raises:
        WeightsError: a disk error.
    """
    try:
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        raise weights_error(path, f"cannot be written: {error.strerror or error}") from None


def _array_bytes(array: np.ndarray) -> list[bytes | np.ndarray]:
    return [_header(array), plain_bytes(array)]
