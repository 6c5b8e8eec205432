"""The directory of an untrusted zip file, validated before a member is read.

The format is PKWARE's APPNOTE (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
"""

import io
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from kvision.untrusted import READ_ERRORS, Budget, read_exactly

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Flags that do not matter here: deflate's effort (1, 2), sizes stored after the data (3), UTF-8 (11).
HARMLESS_FLAGS = 0b1000_0000_1110
MAX_DIRECTORY = 4 << 20  # bytes; Python's objects for the members take sixteen times as many


@dataclass(frozen=True)
class Entry:
    """A member of a zip file, and the position of its bytes."""

    name: str
    start: int  # in the file
    packed_size: int
    size: int  # unpacked
    deflated: bool
    crc: int


class _Pieces(io.RawIOBase):
    """A file that raises on a read of more than `MAX_DIRECTORY` bytes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"its directory has {size:,} bytes, the limit is {MAX_DIRECTORY:,}")
        return self.file.read(size if size >= 0 else 1 << 17)  # zipfile reads the last record, 64 KiB, with size -1

    def seekable(self) -> bool:
        return True


def directory(file: BinaryIO) -> list[Entry]:
    """Return the members of a zip file, in the order of their bytes.

    Raises:
        zipfile.BadZipFile: not a zip file.
        ValueError: two members of one name, bytes that overlap or lie outside the file, links, encryption, a
            compression other than deflate, or local headers that contradict the directory.
    """
    try:
        zipped = zipfile.ZipFile(_Pieces(file))
    except READ_ERRORS as error:  # it raises a dozen others besides BadZipFile
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from None
    entries, names, free = [], set(), 0
    for info in sorted(zipped.infolist(), key=lambda info: info.header_offset):
        name = info.orig_filename  # `filename` has been changed by zipfile
        shown = name[:80]
        if name in names:
            raise ValueError(f"contains {shown} twice")
        names.add(name)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{shown} is a link or a device, not a plain member")
        if info.flag_bits & ~HARMLESS_FLAGS:
            raise ValueError(f"{shown} is encrypted or patched: write the file again without")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{shown} is compressed by method {info.compress_type}; expected stored or deflated")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if not deflated and info.compress_size != info.file_size:
            raise ValueError(f"{shown} is stored but states two sizes, {info.compress_size} and {info.file_size}")
        # The offset may have any value, even a negative one, so compare it before reading from it.
        inside = free <= info.header_offset < zipped.start_dir
        if not inside or (start := _data_start(file, info)) + info.compress_size > zipped.start_dir:
            raise ValueError(f"the bytes of {shown} overlap others or lie outside the file")
        free = start + info.compress_size
        entries.append(Entry(name, start, info.compress_size, info.file_size, deflated, info.CRC))
    return entries


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return the start of the member's bytes, from its local header, which must agree with the directory."""
    file.seek(info.header_offset)
    raw = file.read(LOCAL_HEADER.size)
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if len(raw) == LOCAL_HEADER.size:
        signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = LOCAL_HEADER.unpack(raw)
        # Sizes may be stored after the data (flag 3) or in a 64-bit field, as np.savez does.
        sizes = {(info.compress_size, info.file_size), (0xFFFFFFFF, 0xFFFFFFFF)}
        if (
            (signature, flags, method) == (b"PK\x03\x04", info.flag_bits, info.compress_type)
            and (flags & 8 or (crc == info.CRC and (packed, size) in sizes))
            and file.read(name_size) == name
        ):
            return info.header_offset + LOCAL_HEADER.size + name_size + extra_size
    raise ValueError(f"the zip header of {info.orig_filename[:80]} contradicts the zip directory")


def content(file: BinaryIO, entry: Entry, budget: Budget) -> np.ndarray:
    """Return a member's unpacked bytes: a writable uint8 vector. The caller compares the checksum of a stored one.

    Raises:
        ValueError, zlib.error: truncated, not unpacking to its stated size, or beyond the budget.
    """
    budget.take(entry.size + entry.packed_size * entry.deflated, f"{entry.name[:80]}, unpacked,")
    packed = read_exactly(file, entry.start, entry.packed_size, entry.name[:80])
    return unpack(packed, entry.size, entry.name) if entry.deflated else packed


def unpack(packed: np.ndarray | bytes, size: int, name: str) -> np.ndarray:
    """Inflate to exactly `size` bytes; ValueError or zlib.error otherwise."""
    values, engine, done = np.empty(size, np.uint8), zlib.decompressobj(-15), 0
    while not engine.eof:
        # In pieces, so that there is no second copy of the whole.
        piece = engine.decompress(packed, min(1 << 20, size - done + 1))
        packed = engine.unconsumed_tail
        if done + len(piece) > size or (not piece and not packed and not engine.eof):
            break
        values[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    if done != size or not engine.eof or engine.unused_data:
        raise ValueError(f"{name[:80]} does not unpack to the {size:,} bytes it states")
    return values
