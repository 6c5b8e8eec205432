"""Files that are written whole or not at all, also through a power cut, and the lock of a run folder.

Every writer of the project goes through `atomic_write`: the content is on the disk before the name is, and the name is
on the disk before the call returns. So what is removed after it (an older checkpoint) is never the last one there is.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None

LOCK = ".lock"  # the file in a run folder that a running process holds
# A folder that its file system cannot sync (some network and FUSE mounts), or that may be written and not read.
UNSYNCABLE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}


class FolderInUseError(RuntimeError):
    """Another process is at work in a folder. The message names the folder, the process, and what to do."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write, seekable, which is at `path` only once everything is written and on the disk.

    It is made beside the target under a name that is nobody's, and moved there at the end; after any error the target
    is what it was, and nothing else is left. A link at `path` is replaced, not followed.

    Args:
        sync: false does not wait for the disk (some milliseconds, twice): for what is written again and again, and made
            anew from something else. A killed process leaves it whole all the same, a power cut may leave it empty.

    Raises:
        OSError: the system refuses, or `path` is a device, a pipe or a folder; its `filename` is `path`.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    # In the target's folder, because a rename is whole or not at all only within one file system. A file's name has
    # 255 bytes at most.
    start = os.fsdecode(os.fsencode(name)[:200])
    temporary = os.path.join(folder, f".{start}.{secrets.token_hex(8)}.tmp")
    with _named(path, temporary):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "is no plain file, and is not replaced by one", path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(temporary, flags, 0o666)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                os.unlink(temporary)
            raise
        if sync:
            sync_folder(folder)


@contextlib.contextmanager
def _named(path: str, *unknown: str) -> Iterator[None]:
    """An error that names no file, or one that the caller does not know, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, *unknown):  # that of a full disk knows no file
            raise OSError(error.errno, error.strerror, path) from None
        raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so.

    Raises:
        OSError: the disk fails.
    """
    if os.name == "nt":  # a folder cannot be opened there
        return
    with _named(os.fspath(folder)):
        try:
            handle = os.open(folder or os.curdir, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno not in UNSYNCABLE:
                raise


def write_text(path: str | os.PathLike, text: str, sync: bool = True) -> Path:
    """Write text as UTF-8, whole or not at all, into a folder that is made where it is missing; the path.

    Args:
        sync: as for `atomic_write`.

    Raises:
        OSError: the system refuses; its `filename` is `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    with atomic_write(path, sync) as file:
        # A folder name that is not UTF-8 reaches Python as lone surrogates, which no encoder takes.
        file.write(text.encode("utf-8", "backslashreplace"))
    return path


def write_json(path: str | os.PathLike, content, sync: bool = True) -> Path:
    """Write plain data as JSON, whole or not at all; the path.

    Args:
        sync: as for `atomic_write`.

    Raises:
        ValueError: a number that JSON does not have (infinity, not a number).
        OSError: the system refuses; its `filename` is `path`.
    """
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", sync)


def make_folder(folder: str | os.PathLike, exist_ok: bool = True) -> None:
    """Make a folder and those above it, on the disk before the call returns.

    Raises:
        FileExistsError: it is a file, or `exist_ok` is false and it is there: no other process can have made it too.
        OSError: the system refuses.
    """
    folder = Path(folder)
    while True:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            for place in reversed(missing[1:]):
                place.mkdir(exist_ok=True)
                sync_folder(place.parent)
            if not (exist_ok and folder.is_dir()):
                folder.mkdir(exist_ok=exist_ok)
                sync_folder(folder.parent)
            return
        except FileNotFoundError:  # another process has removed one that it had made, empty
            if folder.parent.exists():
                raise


def new_folder(names: Iterable[str | os.PathLike]) -> Path:
    """Make the first of some folders that is free: each is given to one process, however many ask at once.

    Raises:
        FileExistsError: none is free.
        OSError: the system refuses.
    """
    for name in names:
        try:
            make_folder(name, exist_ok=False)
        except FileExistsError:
            continue
        return Path(name)
    raise FileExistsError(errno.EEXIST, "no name for a new folder is free", os.fspath(name))


def remove(path: str | os.PathLike) -> None:
    """Remove a file that may be gone already.

    Raises:
        OSError: the system refuses.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_temp_files(folder: Path, name: str) -> None:
    """Remove what a killed process left of files that it was writing; for the process that holds the folder.

    Args:
        name: of the files, a shell pattern such as "step-*".
    """
    for path in folder.glob(f".{name}.*.tmp"):
        remove(path)


def sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process. The system lets go of it when the process ends, however it ends.

    Where the file system knows no locks (some network mounts) and on Windows nothing is held.

    Raises:
        FolderInUseError: another process, or an earlier call in this one, holds it.
        OSError: the folder is not there, or cannot be written.
    """
    path = folder / LOCK
    file = _lock(path)
    try:
        yield
    finally:
        # Removed while it is held: who opened it before gets a lock of a file that is no longer there, and looks again.
        remove(path)
        if file:
            file.close()


def _lock(path: Path):
    """The open lock file, or None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(f"{os.getpid()} {socket.gethostname()}\n")
                file.flush()
                return file
        except BlockingIOError:
            holder = file.read(200).split()
            file.close()
            who = f"process {holder[0]}" if holder else "another process"
            if len(holder) > 1 and holder[1] != socket.gethostname():
                who += f" on {holder[1]}"
            raise FolderInUseError(
                f"{path.parent} is in use by {who}, which has not ended: wait for it, stop it (kill saves the run), or "
                "take another folder"
            ) from None
        except FileNotFoundError:
            pass  # removed by the process that held it
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                file.close()
                return None
            file.close()
            raise
        file.close()
