"""Untrusted tar archives: read or unpacked within bounds, regular files only."""

import filecmp
import gzip
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from kvision.data.dataset import DataError
from kvision.untrusted import Budget, open_regular, translate_errors

# CIFAR's archives unpack to 178 MB, in 8 members.
MAX_UNPACKED = 600 << 20
MAX_MEMBERS = 1000
MAX_EXTENSION = 4096  # bytes of an extension header, which holds a long name or the like

_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Header(tarfile.TarInfo):
    """A member's header; raises on the types and sizes that regular files do not need."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError("a member of a negative size")
        if header.type == tarfile.GNUTYPE_SPARSE or (header.type in _EXTENSIONS and header.size > MAX_EXTENSION):
            raise tarfile.ReadError("a sparse member or an oversized header, which no CIFAR archive has")
        return header


class _Bounded:
    """A file that raises after more bytes than its size allows, before memory or disk is exhausted."""

    def __init__(self, file, size: int):
        self.file, self.budget, self.left = file, Budget(size), MAX_UNPACKED

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED >> 20} MB, which no CIFAR archive does")
        self.budget.take(3 * len(content), "unpacking it")  # tarfile joins a member from pieces
        return content


def _members(path: Path, wanted: Callable[[tarfile.TarInfo], bool]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the members of a tar, gzipped or not, in one pass, with the contents of the `wanted` ones.

    Raises:
        DataError: a broken archive.
    """
    with (
        translate_errors(lambda message: DataError(f"{path} {message}"), "tar archive", "fetch it again"),
        open_regular(path) as raw,
    ):
        size = os.fstat(raw.fileno()).st_size
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        content = gzip.GzipFile(fileobj=raw) if gzipped else raw
        # Stream mode ("r|") makes tarfile read small blocks, each of which is checked against the bound.
        with tarfile.open(fileobj=_Bounded(content, size), mode="r|", tarinfo=_Header) as archive:
            for count, member in enumerate(archive, 1):
                if count > MAX_MEMBERS:
                    raise DataError(f"{path} has more than {MAX_MEMBERS} members, which no CIFAR archive does")
                archive.members.clear()  # tarfile would keep each with its headers
                yield member, archive.extractfile(member).read() if member.isreg() and wanted(member) else b""


def read_tar(path: Path, wanted: Callable[[str], bool]) -> dict[str, dict[str, bytes]]:
    """Read the regular files whose base name is wanted: contents by folder name, then by base name.

    Nothing is written. Links, devices and other members are skipped, so their paths do not matter.

    Raises:
        DataError: not a tar, truncated, or beyond the bounds on size and count.
    """
    found: dict[str, dict[str, bytes]] = {}
    for member, content in _members(path, lambda member: wanted(PurePosixPath(member.name).name)):
        place = PurePosixPath(member.name)
        if member.isreg() and wanted(place.name):
            found.setdefault(place.parent.name, {})[place.name] = content
    return found


def unpack_tar(path: Path, target: Path) -> None:
    """Unpack the archive's only folder, which must have the name of `target`, to `target`: completely or not at all.

    An archive with an absolute path, a "..", a link, a device, or a member outside that folder is rejected as a
    whole. An existing folder at `target` is replaced.

    Raises:
        DataError: such an archive, a truncated one, or one beyond the bounds; nothing is left behind.
    """
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise DataError(f"cannot unpack {path} to {target}: {error.strerror}") from None
    try:
        for member, content in _members(path, lambda member: True):
            place = work / _check_member(member, target.name, path)
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        if not (work / target.name).is_dir():
            raise DataError(f"{path} contains no folder {target.name!r}")
        if target.exists() and not _same(work / target.name, target):
            # rename cannot replace a non-empty folder, but it can move it away.
            os.rename(target, work / "replaced")
        if not target.exists():
            os.rename(work / target.name, target)
    except OSError as error:
        raise DataError(f"cannot unpack {path} to {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    if not other.is_dir() or names - {path.name for path in other.iterdir()}:
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _check_member(member: tarfile.TarInfo, folder: str, path: Path) -> PurePosixPath:
    place = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()):
        raise DataError(f"{path} is rejected: its member {member.name!r} is a link or a device, not a regular file")
    escapes = place.is_absolute() or ".." in place.parts or "\\" in member.name or ":" in member.name
    if escapes or place.parts[:1] != (folder,):
        raise DataError(f"{path} is rejected: its member {member.name!r} lies outside the folder {folder!r}")
    return place
