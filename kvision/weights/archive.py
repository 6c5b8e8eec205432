"""Arrays in a zip file, NumPy's `.npz`: written byte for byte the same, read without trust.

A weights file comes from anywhere, so nothing in it is believed before it is checked, nothing in it is code
(pickled arrays are refused), and no size it states is allocated unless the file has the bytes to back it.

The zip format is PKWARE's APPNOTE (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), the array
format NumPy's NEP 1 (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

import ast
import hashlib
import math
import os
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np

from kvision.files import atomic_write

MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000  # bytes of an array's header; NumPy's own bound
MAX_KEY = 1_000  # characters
PLAIN_NUMBERS = "weights files hold plain numbers of at most 64 bits (float32, int64 ...)"
# Deflate shrinks zeros a thousandfold, trained weights by a tenth. What a file unpacks to is bounded by both.
MAX_UNPACKED = 4 << 30
MAX_RATIO = 100
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Bits of a zip member's flags that change nothing here: deflate's effort (1, 2), sizes written behind (3),
# UTF-8 (11).
HARMLESS_FLAGS = 0b1000_0000_1110


class WeightsError(ValueError):
    """A weights file is refused, or cannot be written. The message is one line that starts with its path."""


def refusal(path: str | os.PathLike, message: str) -> WeightsError:
    """The error to raise: one printable line, whatever the names in a hostile file hold."""
    line = "".join(character if character.isprintable() else "?" for character in f"{os.fspath(path)}: {message}")
    return WeightsError(line if len(line) <= 1_000 else line[:997] + "...")


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:most]) + more


def key_fault(key: str) -> str | None:
    """What is wrong with an array's name, or None: unpacked, it must stay inside the folder."""
    if not key or len(key) > MAX_KEY:
        return f"an array's name has {len(key)} characters, 1 to {MAX_KEY} are allowed"
    if "\\" in key or not key.isprintable():
        return f"the array name {key!r} holds a backslash or a control character"
    if key.startswith("/") or re.match("[A-Za-z]:", key) or any(part in ("", ".", "..") for part in key.split("/")):
        return f"the array name {key!r} is not a plain relative path"
    return None


def dtype_fault(dtype: np.dtype) -> str | None:
    """What keeps a dtype out of a weights file, or None: it must be a number that plain NumPy knows."""
    if dtype.kind in "biuf" and dtype.itemsize <= 8:
        return None
    return f"has dtype {dtype}; {PLAIN_NUMBERS}"


def digest(array: np.ndarray) -> str:
    """The sha256, in hexadecimal, of an array's values: in C order, little-endian, without any header."""
    return hashlib.sha256(plain_bytes(array)).hexdigest()


def plain_bytes(array: np.ndarray) -> np.ndarray:
    """An array's values as bytes: in C order, little-endian."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Member:
    """One array of a file: what its header says, and where its bytes lie."""

    shape: tuple[int, ...]
    dtype: np.dtype  # as stored; the byte order may be foreign
    fortran_order: bool
    header: bytes
    size: int  # bytes of header and values, unpacked
    start: int  # in the file
    packed_size: int
    deflated: bool
    crc: int


class Archive:
    """The arrays of an `.npz` file. Opening it checks the directory and every header, and reads no values.

    Args:
        path: the file. Members may be stored or deflated (`np.savez`, `np.savez_compressed`).

    Raises:
        WeightsError: the file cannot be read or is not a sound `.npz` of plain numbers.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        if not os.path.isfile(path):  # opening a pipe would wait forever
            raise refusal(path, "is not a file" if os.path.exists(path) else "no such file")
        try:
            self._file = open(path, "rb")  # noqa: SIM115
            self._lock = threading.Lock()  # of the file's position
        except OSError as error:
            raise refusal(path, f"cannot be opened: {error.strerror}") from None
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
        try:
            zipped = zipfile.ZipFile(self._file)
            infos, end = zipped.infolist(), zipped.start_dir
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            OSError,
            struct.error,
            MemoryError,
        ) as error:
            raise refusal(self.path, f"is not an .npz file, or is cut short ({error})") from None
        infos.sort(key=lambda info: info.header_offset)
        members, free, unpacked = {}, 0, 0
        for info in infos:
            key = self._key(info)
            if key in members:
                raise refusal(self.path, f"holds the array {key} twice")
            # The offset may be anything, even negative, until it is compared; only then is it read from.
            inside = free <= info.header_offset < end
            if not inside or (start := self._data_start(info, key)) + info.compress_size > end:
                raise refusal(self.path, f"the bytes of {key} overlap others or lie outside the file")
            free = start + info.compress_size
            unpacked += info.file_size if info.compress_type else 0
            if unpacked > min(MAX_UNPACKED, MAX_RATIO * self.bytes + (1 << 20)):
                raise refusal(
                    self.path,
                    f"{self.bytes:,} bytes claim to unpack to {unpacked:,} and more, as a zip bomb does; if "
                    "the file is sound, write it again with np.savez",
                )
            members[key] = self._member(info, key, start)
        return members

    def _key(self, info: zipfile.ZipInfo) -> str:
        name = info.orig_filename  # `filename` is what zipfile has made of it
        if name != info.filename or not name.endswith(".npy"):
            raise refusal(self.path, f"holds {name[:80]!r}, which is not an array (.npy)")
        if fault := key_fault(name[:-4]):
            raise refusal(self.path, fault)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise refusal(self.path, f"{name} is a link or a device, not a plain member")
        if info.flag_bits & ~HARMLESS_FLAGS:
            raise refusal(self.path, f"{name} is encrypted or patched, which weights files never are")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refusal(self.path, f"{name} is packed by method {info.compress_type}; expected stored or deflated")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise refusal(
                self.path, f"{name} is stored but states two sizes, {info.compress_size} and {info.file_size}"
            )
        return name[:-4]

    def _data_start(self, info: zipfile.ZipInfo, key: str) -> int:
        """Where the member's bytes start, by its local header, which must tell what the directory tells."""
        self._file.seek(info.header_offset)
        raw = self._file.read(LOCAL_HEADER.size)
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if len(raw) == LOCAL_HEADER.size:
            signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = LOCAL_HEADER.unpack(raw)
            # Sizes may stand behind the bytes (flag 3) or in a 64-bit field, as np.savez writes them.
            sizes = {(info.compress_size, info.file_size), (0xFFFFFFFF, 0xFFFFFFFF)}
            if (
                (signature, flags, method) == (b"PK\x03\x04", info.flag_bits, info.compress_type)
                and (flags & 8 or (crc == info.CRC and (packed, size) in sizes))
                and self._file.read(name_size) == name
            ):
                return info.header_offset + LOCAL_HEADER.size + name_size + extra_size
        raise refusal(self.path, f"the zip header of {key} contradicts the zip directory: the file is damaged")

    def _member(self, info: zipfile.ZipInfo, key: str, start: int) -> Member:
        self._file.seek(start)
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        head = self._file.read(min(info.compress_size, 2 * MAX_HEADER))
        if deflated:
            try:
                head = zlib.decompressobj(-15).decompress(head, MAX_HEADER + 12)
            except zlib.error as error:
                raise refusal(self.path, f"{key} cannot be unpacked ({error}): the file is damaged") from None
        try:
            header_size, shape, dtype, fortran_order = _parse_header(head)
        except ValueError as error:
            raise refusal(self.path, f"{key} {error}") from None
        if info.file_size != (expected := header_size + math.prod(shape) * dtype.itemsize):
            raise refusal(
                self.path,
                f"{key} has {info.file_size:,} bytes where shape {shape} of {dtype.name} takes {expected:,}: "
                "cut short, or followed by something else",
            )
        return Member(
            shape,
            dtype,
            fortran_order,
            head[:header_size],
            info.file_size,
            start,
            info.compress_size,
            deflated,
            info.CRC,
        )

    def read(self, key: str, sha256: str | None = None) -> np.ndarray:
        """One array: writable, C order, in this machine's byte order.

        Args:
            key: one of `members`.
            sha256: what `digest` of the values must be. Without it the zip's checksum (CRC-32) is compared.

        Raises:
            WeightsError: the bytes are not those that were written.
        """
        member = self.members[key]
        size = member.size - len(member.header)
        if member.deflated:
            with self._lock:
                self._file.seek(member.start)
                packed = self._file.read(member.packed_size)
            engine = zlib.decompressobj(-15)
            try:
                unpacked = engine.decompress(packed, member.size + 1)
            except zlib.error as error:
                raise refusal(self.path, f"{key} cannot be unpacked ({error}): the file is damaged") from None
            if len(unpacked) != member.size or not engine.eof or engine.unused_data:
                raise refusal(self.path, f"{key} does not unpack to the {member.size:,} bytes it states")
            values = np.frombuffer(unpacked, np.uint8, offset=len(member.header)).copy()
        else:
            # Read, not mapped: a mapped file that another process writes to would change the weights after
            # their check.
            values = np.empty(size, np.uint8)
            with self._lock:
                self._file.seek(member.start + len(member.header))
                got = self._file.readinto(values)
            if got != size:
                raise refusal(self.path, f"ends inside {key}: the file was cut short while it was read")
        if sha256 is None and zlib.crc32(values, zlib.crc32(member.header)) != member.crc:
            raise refusal(self.path, f"{key} does not match its checksum: the file is damaged")
        if member.dtype.kind == "b" and values.max(initial=0) > 1:
            raise refusal(self.path, f"{key} is of dtype bool but holds other bytes than 0 and 1")
        array = values.view(member.dtype).reshape(member.shape, order="F" if member.fortran_order else "C")
        array = np.ascontiguousarray(array, member.dtype.newbyteorder("=")).reshape(member.shape)
        if sha256 is not None and digest(array) != sha256:
            raise refusal(self.path, f"{key} does not match its sha256: the file is damaged or was changed")
        return array


def _parse_header(head: bytes) -> tuple[int, tuple[int, ...], np.dtype, bool]:
    """(header size, shape, dtype, Fortran order) of an array's first bytes; ValueError says what is wrong."""
    version = head[len(MAGIC) : len(MAGIC) + 2]
    if not head.startswith(MAGIC) or version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00") or len(head) < 12:
        raise ValueError("is not an array in NumPy's format 1 to 3")
    start = 10 if version == b"\x01\x00" else 12
    end = start + int.from_bytes(head[8:start], "little")
    if end > MAX_HEADER or end > len(head):
        raise ValueError(f"has a header of {end:,} bytes; at most {MAX_HEADER:,}, inside the array's bytes, are read")
    try:
        # `literal_eval` reads constants and runs nothing; the bound above keeps it from being overwhelmed.
        header = ast.literal_eval(head[start:end].decode("latin1" if version < b"\x03" else "utf-8").strip())
        descr, fortran_order, shape = header.pop("descr"), header.pop("fortran_order"), header.pop("shape")
        if header or type(fortran_order) is not bool or type(shape) is not tuple or len(shape) > 32:
            raise ValueError
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError
        if math.prod(max(1, length) for length in shape) >= 2**60:  # more than NumPy can index, even where it is empty
            raise ValueError
    except (
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        AttributeError,
        MemoryError,
        RecursionError,
        OverflowError,
    ):
        raise ValueError("has a header that says nothing sensible: the file is damaged") from None
    if "O" in str(descr):
        raise ValueError("holds Python objects (a pickle), which could run code and are never read")
    if not isinstance(descr, str) or not re.fullmatch("[<>|=]?(b1|[iu][1248]|f[248])", descr):
        raise ValueError(f"has dtype {str(descr)[:80]!r}; {PLAIN_NUMBERS}")
    return end, shape, np.dtype(descr), fortran_order


def _header(array: np.ndarray) -> bytes:
    """The header of a C-order array, format 1.0, padded so that values start at a multiple of 64 bytes."""
    # Written here because NumPy's padding has changed between versions, and the bytes of a file must not.
    descr = array.dtype.newbyteorder("<").str
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {array.shape!r}, }}"
    padded = -(-(len(text) + 11) // 64) * 64 - 10
    return MAGIC + b"\x01\x00" + padded.to_bytes(2, "little") + text.ljust(padded - 1).encode("ascii") + b"\n"


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an `.npz` file, whole or not at all. The same arrays give the same bytes everywhere.

    Raises:
        WeightsError: a name or dtype that weights files do not hold, or the disk refuses.
    """
    for key, array in arrays.items():
        if fault := key_fault(key):
            raise refusal(path, fault)
        if fault := dtype_fault(array.dtype):
            raise refusal(path, f"{key} {fault}")
    members = {f"{key}.npy": partial(_array_bytes, array) for key, array in arrays.items()}
    write_zip(path, dict(sorted(members.items())))


def write_zip(path: str | os.PathLike, members: dict[str, Callable[[], Iterable[bytes | np.ndarray]]]) -> None:
    """Write a zip file of members, stored, whole or not at all; the same members give the same bytes.

    Args:
        members: by name, in the order of the file: what gives each one's bytes, in pieces.

    Raises:
        WeightsError: the disk refuses.
    """
    with whole(path) as file, zipfile.ZipFile(file, "w") as zipped:
        for name, pieces in members.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # the earliest that zip knows
            info.create_system = 3  # Unix, on every system
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            pieces = list(pieces())
            info.file_size = sum(memoryview(piece).nbytes for piece in pieces)
            with zipped.open(info, "w") as member:
                for piece in pieces:
                    member.write(piece)


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` only once everything is written and on the disk.

    Raises:
        WeightsError: the disk refuses.
    """
    try:
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        raise refusal(path, f"cannot be written: {error.strerror or error}") from None


def _array_bytes(array: np.ndarray) -> list[bytes | np.ndarray]:
    return [_header(array), plain_bytes(array)]
