"""The directory of a zip file from strangers, checked before a member is read.

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

from kvision.untrusted import MALFORMED, Budget, read_exactly

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Bits of a member's flags that change nothing here: deflate's effort (1, 2), sizes written behind (3), UTF-8 (11).
HARMLESS_FLAGS = 0b1000_0000_1110
MAX_DIRECTORY = 4 << 20  # bytes; Python takes sixteen times as many for its members


@dataclass(frozen=True)
class Entry:
    """A member of a zip file, and where its bytes lie."""

    name: str
    start: int  # in the file
    packed_size: int
    size: int  # unpacked
    deflated: bool
    crc: int


class _Pieces(io.RawIOBase):
    """A file of which no reader takes more than a directory's length at once."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"its directory has {size:,} bytes, at most {MAX_DIRECTORY:,} are read")
        return self.file.read(size if size >= 0 else 1 << 17)  # all: of the last record, 64 KiB

    def seekable(self) -> bool:
        return True


def directory(file: BinaryIO) -> list[Entry]:
    """The members of a zip file, in the order of their bytes.

    Raises:
        zipfile.BadZipFile: it is no zip file.
        ValueError: one with two members of one name, members whose bytes overlap or lie outside, links, encryption,
            another packing than deflate's, or local headers that contradict the directory.
    """
    try:
        zipped = zipfile.ZipFile(_Pieces(file))
    except MALFORMED as error:  # beside BadZipFile it raises a dozen others
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from None
    entries, names, free = [], set(), 0
    for info in sorted(zipped.infolist(), key=lambda info: info.header_offset):
        name = info.orig_filename  # `filename` is what zipfile has made of it
        shown = name[:80]
        if name in names:
            raise ValueError(f"holds {shown} twice")
        names.add(name)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{shown} is a link or a device, not a plain member")
        if info.flag_bits & ~HARMLESS_FLAGS:
            raise ValueError(f"{shown} is encrypted or patched: unpack it and write it again without")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{shown} is packed by method {info.compress_type}; expected stored or deflated")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if not deflated and info.compress_size != info.file_size:
            raise ValueError(f"{shown} is stored but states two sizes, {info.compress_size} and {info.file_size}")
        # The offset may be anything, even negative, until it is compared; only then is it read from.
        inside = free <= info.header_offset < zipped.start_dir
        if not inside or (start := _data_start(file, info)) + info.compress_size > zipped.start_dir:
            raise ValueError(f"the bytes of {shown} overlap others or lie outside the file")
        free = start + info.compress_size
        entries.append(Entry(name, start, info.compress_size, info.file_size, deflated, info.CRC))
    return entries


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the member's bytes start, by its local header, which must tell what the directory tells."""
    file.seek(info.header_offset)
    raw = file.read(LOCAL_HEADER.size)
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if len(raw) == LOCAL_HEADER.size:
        signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = LOCAL_HEADER.unpack(raw)
        # Sizes may stand behind the bytes (flag 3) or in a 64-bit field, as np.savez writes them.
        sizes = {(info.compress_size, info.file_size), (0xFFFFFFFF, 0xFFFFFFFF)}
        if (
            (signature, flags, method) == (b"PK\x03\x04", info.flag_bits, info.compress_type)
            and (flags & 8 or (crc == info.CRC and (packed, size) in sizes))
            and file.read(name_size) == name
        ):
            return info.header_offset + LOCAL_HEADER.size + name_size + extra_size
    raise ValueError(f"the zip header of {info.orig_filename[:80]} contradicts the zip directory")


def content(file: BinaryIO, entry: Entry, budget: Budget) -> np.ndarray:
    """A member's bytes, unpacked: a writable vector of uint8; a stored one's checksum is the caller's to compare.

    Raises:
        ValueError, zlib.error: it is cut short, does not unpack to the size that it states, or the budget is spent.
    """
    budget.take(entry.size + entry.packed_size * entry.deflated, f"{entry.name[:80]}, unpacked,")
    packed = read_exactly(file, entry.start, entry.packed_size, entry.name[:80])
    return unpack(packed, entry.size, entry.name) if entry.deflated else packed


def unpack(packed: np.ndarray | bytes, size: int, name: str) -> np.ndarray:
    """Deflated bytes that must give exactly `size`; ValueError or zlib.error where they do not."""
    values, engine, done = np.empty(size, np.uint8), zlib.decompressobj(-15), 0
    while not engine.eof:
        # Piece by piece, so that no second copy of the whole is made.
        piece = engine.decompress(packed, min(1 << 20, size - done + 1))
        packed = engine.unconsumed_tail
        if done + len(piece) > size or (not piece and not packed and not engine.eof):
            break
        values[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    if done != size or not engine.eof or engine.unused_data:
        raise ValueError(f"{name[:80]} does not unpack to the {size:,} bytes it states")
    return values
