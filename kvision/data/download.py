"""Fetching a published data set: resumed where it broke off, checked against the publisher's checksum, whole
or not at all."""

import contextlib
import hashlib
import http.client
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvision.data.dataset import DataError, DataUnavailable
from kvision.data.tar import unpack_tar

try:
    import fcntl
except ImportError:  # Windows: downloads work, but do not resume
    fcntl = None

TIMEOUT = 10  # seconds to connect, for the answer's header, and between two blocks
SLOW, SPAN = 16_000, 30  # a connection that brings fewer bytes a second for so many seconds is given up
ATTEMPTS = 4  # as long as each brings something
PAUSE = 1.0  # seconds between attempts
BLOCK = 1 << 16
MAX_BYTES = 512 << 20


@dataclass(frozen=True)
class Remote:
    """A published file.

    Args:
        url: where it is.
        file: where it is kept (an archive: under which name it is downloaded), relative to the `datasets`
            folder of the Keras cache.
        checksum: "md5:..." or "sha256:...", as the publisher states it.
        unpacks_to: for a tar, the folder that it holds and leaves in its place.
    """

    url: str
    file: str
    checksum: str
    unpacks_to: str | None = None


_KERAS = "https://storage.googleapis.com/tensorflow/tf-keras-datasets"
# Checksums: CIFAR's page, Keras's source for mnist.npz, Fashion-MNIST's README.
REMOTES: dict[str, tuple[Remote, ...]] = {
    "cifar10": (
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "cifar-10-python.tar.gz",
            "md5:c58f30108f718f92721af3b95e74349a",
            unpacks_to="cifar-10-batches-py",
        ),
    ),
    "cifar100": (
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "cifar-100-python.tar.gz",
            "md5:eb9058c3a382ffc7106e4002c42a8d85",
            unpacks_to="cifar-100-python",
        ),
    ),
    "mnist": (
        Remote(
            f"{_KERAS}/mnist.npz",
            "mnist.npz",
            "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
        ),
    ),
    "fashion_mnist": tuple(
        Remote(f"{_KERAS}/{file}", f"fashion-mnist/{file}", f"md5:{md5}")
        for file, md5 in (
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        )
    ),
}


def download(name: str, folder: Path, log: Callable[[str], None] = print) -> Path:
    """Bring the files of data set `name` into `folder`; returns the file or folder that holds the data set.

    Each file appears under its name only when it is complete and its checksum is right. What an interruption
    leaves is a `.part` file, from which the next call goes on. Processes may do this at the same time.

    Raises:
        DataUnavailable: the network or the server fails, or the folder cannot be written.
        DataError: a wrong checksum (the file is deleted), or an archive that is unsafe to unpack.
    """
    for remote in REMOTES[name]:
        target = folder / remote.file
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A file of that name may be there, and broken: only the checksum lets it stay.
            if not (target.is_file() and _checksum(target, remote.checksum) == remote.checksum):
                log(f"downloading {remote.url} to {target.parent}")
                _fetch(remote, target)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise DataUnavailable(f"{remote.url} cannot be fetched into {target.parent} ({reason})") from None
    if len(REMOTES[name]) > 1:
        return target.parent
    return folder / remote.unpacks_to if remote.unpacks_to else target


def _fetch(remote: Remote, target: Path) -> None:
    with _part_file(target) as (file, part):
        resumed = file.seek(0, os.SEEK_END) > 0
        _transfer(remote.url, file)
        found = _checksum(part, remote.checksum)
        if found != remote.checksum and resumed:
            # The first half may be of an older file: once more from the start.
            file.truncate(0)
            _transfer(remote.url, file)
            found = _checksum(part, remote.checksum)
        if found != remote.checksum:
            part.unlink()
            raise DataError(f"{remote.url} is not the published file: expected {remote.checksum}, got {found}; deleted")
        if remote.unpacks_to:
            # Straight from the partial file: no other process sees an archive that this one is about to
            # delete.
            unpack_tar(part, target.parent / remote.unpacks_to)
            part.unlink()
        else:
            os.replace(part, target)


@contextlib.contextmanager
def _part_file(target: Path):
    """The open partial file and its path: one that is shared, to resume from, or one of its own while another
    process has that in hand. What is left of the shared one stays, what is left of one's own goes."""
    shared = target.with_name(f"{target.name}.part")
    if fcntl:
        with open(shared, "a+b", buffering=0) as file:
            if _lock(file, shared):
                try:
                    yield file, shared
                finally:
                    if not file.seek(0, os.SEEK_END):
                        shared.unlink(missing_ok=True)
                return
    own = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(own, "a+b", buffering=0) as file:
            yield file, own
    finally:
        own.unlink(missing_ok=True)


def _lock(file, path: Path) -> bool:
    """Whether the file is now this process's alone, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that had the lock before may have renamed this very file into place, or deleted it.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _transfer(url: str, file) -> None:
    """Append to `file` what it lacks of `url`, over as many connections as it takes."""
    for attempt in range(1, ATTEMPTS + 1):
        before = file.seek(0, os.SEEK_END)
        try:
            if _receive(url, file, before):
                return
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            with error:
                raise DataUnavailable(f"{url} answers {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        size = file.seek(0, os.SEEK_END)
        if size == before or attempt == ATTEMPTS:
            kept = f"; {size} bytes are kept, run again to go on" if size else ""
            raise DataUnavailable(f"{url} cannot be fetched ({reason}){kept}")
        time.sleep(PAUSE)


def _receive(url: str, file, start: int) -> bool:
    """One connection: whether the file is complete after it, as far as the server says."""
    request = urllib.request.Request(url, headers={"User-Agent": "kvision", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler)
        response = opener.open(request, timeout=TIMEOUT)
    except UnicodeError as error:  # an address that it forwards to
        raise OSError(f"it forwards to an address that is none: {error}") from None
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # The server has no byte there: the file is whole, or another one now. The checksum will tell.
        error.close()
        return True
    with response:
        if start and (response.status != 206 or not _continues(response, start)):
            # The server sends all of it (200), or a part that does not fit on (206).
            file.truncate(0)
            if response.status == 206:
                return False
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and re.fullmatch("[0-9]{1,18}", length) else None
        if (total or 0) > MAX_BYTES:
            raise DataError(f"{url} has {total} bytes, more than the {MAX_BYTES} that are allowed")
        progress = Progress(start, total, url.rsplit("/", 1)[-1])
        size, floor = start, _Floor(start)
        try:
            while block := response.read1(BLOCK):  # what has come: `read` waits for a whole block, however slow
                size += len(block)
                if size > MAX_BYTES:
                    raise DataError(f"{url} has more than the {MAX_BYTES} bytes that are allowed")
                file.write(block)
                progress.update(size)
                floor.check(size)
        finally:
            progress.close(size)
        return total is None or size >= total


class _Floor:
    """The least rate of a connection."""

    def __init__(self, size: int):
        self.size, self.since = size, time.monotonic()

    def check(self, size: int) -> None:
        """Raise TimeoutError where the last span of time brought too little."""
        now = time.monotonic()
        if now - self.since >= SPAN:
            if (rate := (size - self.size) / (now - self.since)) < SLOW:
                raise TimeoutError(f"{rate:,.0f} bytes a second for {SPAN} s, and at least {SLOW:,} are waited for")
            self.size, self.since = size, now


class _Timed:
    """A connection whose answer's header comes within `TIMEOUT` seconds, or is cut off.

    A socket's own limit is for each piece: a server that sends a byte now and then would hold it for ever.
    """

    def getresponse(self):
        over, connected = threading.Event(), self.sock

        def end():
            over.set()
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(TIMEOUT, end)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if over.is_set():  # what was read of the header may look whole
                raise TimeoutError(f"no whole answer in {TIMEOUT} s") from None


class _HTTPConnection(_Timed, http.client.HTTPConnection):
    pass


class _HTTPSConnection(_Timed, http.client.HTTPSConnection):
    pass


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_HTTPConnection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_HTTPSConnection, request)


def _continues(response: http.client.HTTPResponse, start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _checksum(path: Path, like: str) -> str:
    """The file's checksum, in the algorithm and the notation of `like`."""
    algorithm = like.partition(":")[0]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{digest.hexdigest()}"


class Progress:
    """Bytes, rate and time left on stderr: a bar on a terminal, else a plain line every ten seconds and at
    the end."""

    def __init__(self, start: int, total: int | None, name: str):
        self.start, self.total, self.name = start, total, name
        self.began = self.last = time.monotonic()
        self.live = sys.stderr.isatty()

    def update(self, size: int) -> None:
        now = time.monotonic()
        if now - self.last >= (0.2 if self.live else 10):
            self.last = now
            self._show(size, now)

    def close(self, size: int) -> None:
        self._show(size, time.monotonic())
        if self.live:
            print(file=sys.stderr)

    def _show(self, size: int, now: float) -> None:
        rate = (size - self.start) / max(now - self.began, 1e-3)
        text = f"{self.name}: {size / 1e6:.1f}"
        if self.total:
            text += f" of {self.total / 1e6:.1f} MB ({100 * size // self.total} %)"
        else:
            text += " MB"
        text += f", {rate / 1e6:.1f} MB/s"
        if self.total and size < self.total and rate > 0:
            text += f", {(self.total - size) / rate:.0f} s left"
        if self.live and self.total:
            done = 24 * size // self.total
            text = f"[{'#' * done}{'.' * (24 - done)}] {text}"
        # The end of the line is cleared, where the last one was longer.
        print(
            f"\r{text}\x1b[K" if self.live else text,
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )
