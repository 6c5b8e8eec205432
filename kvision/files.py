"""Atomic, durable file writes, and the lock of a run folder.

All files of the project are written through `atomic_write`: the content reaches the disk before the name does, and the
name before the call returns. So a file that is removed afterwards (an older checkpoint) is never the last valid one.
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

LOCK = ".lock"  # lock file in a run folder
# Errors of folders that cannot be synced: some network and FUSE mounts, or a folder that is writable but not readable.
UNSYNCABLE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}


class FolderInUseError(RuntimeError):
    """Another process uses a folder. The message names the folder, the process and the remedies."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a seekable binary file that appears at `path` only after it is complete and on the disk.

    It is written next to the target under a unique temporary name and renamed at the end; after an error the target is
    unchanged and nothing else is left. A link at `path` is replaced, not followed.

    Args:
        sync: False does not wait for the disk (some milliseconds, twice), for files that are rewritten often and can be
            recomputed. They survive a killed process; after a power cut they may be empty.

    Raises:
        OSError: the system reports an error, or `path` is a device, a pipe or a folder; its `filename` is `path`.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    # In the target's folder, because a rename is atomic only within one file system. A file name has at most 255
    # bytes.
    start = os.fsdecode(os.fsencode(name)[:200])
    temporary = os.path.join(folder, f".{start}.{secrets.token_hex(8)}.tmp")
    with _named(path, temporary):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "is not a regular file, so it is not replaced", path)
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
    """Within this context, set the file name of errors that have none, or one of `unknown`, to `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, *unknown):  # the error of a full disk has no file name
            raise OSError(error.errno, error.strerror, path) from None
        raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Wait until a folder's entries are on the disk, where the system supports that.

    Raises:
        OSError: a disk error.
    """
    if os.name == "nt":  # Windows cannot open a folder
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
    """Write text as UTF-8, atomically; create the folder if it is missing; return the path.

    Args:
        sync: as for `atomic_write`.

    Raises:
        OSError: the system reports an error; its `filename` is `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    with atomic_write(path, sync) as file:
        # A folder name that is not UTF-8 reaches Python as lone surrogates, which cannot be encoded.
        file.write(text.encode("utf-8", "backslashreplace"))
    return path


def write_json(path: str | os.PathLike, content, sync: bool = True) -> Path:
    """Write plain data as JSON, atomically; return the path.

    Args:
        sync: as for `atomic_write`.

    Raises:
        ValueError: a number that JSON does not have (infinity, NaN).
        OSError: the system reports an error; its `filename` is `path`.
    """
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", sync)


def make_folder(folder: str | os.PathLike, exist_ok: bool = True) -> None:
    """Create a folder and its parents; they are on the disk when the call returns.

    Raises:
        FileExistsError: it is a file, or it exists and `exist_ok` is False: no other process can have created it, too.
        OSError: the system reports an error.
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
        except FileNotFoundError:  # another process has removed an empty parent that it had created
            if folder.parent.exists():
                raise


def new_folder(names: Iterable[str | os.PathLike]) -> Path:
    """Create the first of some folders that does not exist; concurrent processes get different ones.

    Raises:
        FileExistsError: all exist.
        OSError: the system reports an error.
    """
    for name in names:
        try:
            make_folder(name, exist_ok=False)
        except FileExistsError:
            continue
        return Path(name)
    raise FileExistsError(errno.EEXIST, "all names for a new folder are taken", os.fspath(name))


def remove(path: str | os.PathLike) -> None:
    """Remove a file; a missing file is no error.

    Raises:
        OSError: the system reports an error.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_temp_files(folder: Path, name: str) -> None:
    """Remove the temporary files of a killed process; to be called by the process that holds the folder's lock.

    Args:
        name: shell pattern of the files' final names, such as "step-*".
    """
    for path in folder.glob(f".{name}.*.tmp"):
        remove(path)


def sha256(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock when the process ends, for whatever reason.

    File systems without locks (some network mounts) and Windows do not lock.

    Raises:
        FolderInUseError: another process, or an earlier call in this one, holds the lock.
        OSError: the folder does not exist or cannot be written.
    """
    path = folder / LOCK
    file = _lock(path)
    try:
        yield
    finally:
        # Removed while locked: a process that opened it before locks a deleted file, detects that, and retries.
        remove(path)
        if file:
            file.close()


def _lock(path: Path):
    """Return the open lock file, or None if locks are not supported."""
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
                f"{path.parent} is in use by {who}, which is still running: wait for it, stop it (kill saves the run), "
                "or use another folder"
            ) from None
        except FileNotFoundError:
            pass  # removed by the process that held the lock
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                file.close()
                return None
            file.close()
            raise
        file.close()
