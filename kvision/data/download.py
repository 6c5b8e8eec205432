"""Download published data sets: resumable, verified against the publisher's checksum, atomic."""

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
except ImportError:  # Windows: downloads work, but cannot resume
    fcntl = None

TIMEOUT = 10  # seconds to connect, for the response header, and between two blocks
SLOW, SPAN = 16_000, 30  # a connection below SLOW bytes/s over SPAN seconds is closed
ATTEMPTS = 4  # in a row, as long as each receives something
PAUSE = 1.0  # seconds between attempts
BLOCK = 1 << 16
MAX_BYTES = 512 << 20


@dataclass(frozen=True)
class Remote:
    """A published file.

    Args:
        url: address of the file.
        file: path of the file (for an archive: its name while downloading), relative to the `datasets` folder of the
            Keras cache.
        checksum: "md5:..." or "sha256:...", as published.
        unpacks_to: for a tar, the folder that it contains and is replaced by.
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
    """Download the files of data set `name` into `folder`; return the file or folder that holds the data set.

    A file appears under its name once it is complete and verified. An interrupted download leaves a `.part` file,
    which the next call resumes. Several processes may download at the same time.

    Raises:
        DataUnavailable: the network or the server fails, or the folder cannot be written.
        DataError: a wrong checksum (the file is deleted), or an archive that is unsafe to unpack.
    """
    for remote in REMOTES[name]:
        target = folder / remote.file
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # An existing file may be broken: it is kept only if its checksum is right.
            if not (target.is_file() and _checksum(target, remote.checksum) == remote.checksum):
                log(f"downloading {remote.url} to {target.parent}")
                _fetch(remote, target)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise DataUnavailable(f"{remote.url} cannot be downloaded into {target.parent} ({reason})") from None
    if len(REMOTES[name]) > 1:
        return target.parent
    return folder / remote.unpacks_to if remote.unpacks_to else target


def _fetch(remote: Remote, target: Path) -> None:
    with _part_file(target) as (file, part):
        resumed = file.seek(0, os.SEEK_END) > 0
        _transfer(remote.url, file)
        found = _checksum(part, remote.checksum)
        if found != remote.checksum and resumed:
            # The resumed part may belong to an older version of the file: retry once from the start.
            file.truncate(0)
            _transfer(remote.url, file)
            found = _checksum(part, remote.checksum)
        if found != remote.checksum:
            part.unlink()
            raise DataError(f"{remote.url} is not the published file: expected {remote.checksum}, got {found}; deleted")
        if remote.unpacks_to:
            # Unpack the partial file itself, so that no other process sees an archive that is about to be deleted.
            unpack_tar(part, target.parent / remote.unpacks_to)
            part.unlink()
        else:
            os.replace(part, target)


@contextlib.contextmanager
def _part_file(target: Path):
    """Open the partial file and yield it with its path.

    The shared `.part` file is resumed if no other process has locked it, and kept after an interruption. Otherwise the
    file is a private one, which is deleted at the end.
    """
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
    private = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(private, "a+b", buffering=0) as file:
            yield file, private
    finally:
        private.unlink(missing_ok=True)


def _lock(file, path: Path) -> bool:
    """Lock a file for this process until it is closed; return whether that succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous owner of the lock may have renamed or deleted this very file.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _transfer(url: str, file) -> None:
    """Append the missing bytes of `url` to `file`, reconnecting where necessary."""
    for attempt in range(1, ATTEMPTS + 1):
        before = file.seek(0, os.SEEK_END)
        try:
            if _receive(url, file, before):
                return
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            with error:
                raise DataUnavailable(f"{url} returned {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        size = file.seek(0, os.SEEK_END)
        if size == before or attempt == ATTEMPTS:
            kept = f"; {size} bytes are kept, run again to resume" if size else ""
            raise DataUnavailable(f"{url} cannot be downloaded ({reason}){kept}")
        time.sleep(PAUSE)


def _receive(url: str, file, start: int) -> bool:
    """Download over one connection; return whether the file is complete according to the server."""
    request = urllib.request.Request(url, headers={"User-Agent": "kvision", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler)
        response = opener.open(request, timeout=TIMEOUT)
    except UnicodeError as error:  # an invalid address in a redirect
        raise OSError(f"it redirects to an invalid address: {error}") from None
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing follows at `start`: the file is complete, or a different one by now. The checksum decides.
        error.close()
        return True
    with response:
        if start and (response.status != 206 or not _continues(response, start)):
            # The server sends the whole file (200), or a part that does not continue ours (206).
            file.truncate(0)
            if response.status == 206:
                return False
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and re.fullmatch("[0-9]{1,18}", length) else None
        if (total or 0) > MAX_BYTES:
            raise DataError(f"{url} has {total} bytes, more than the {MAX_BYTES} that are allowed")
        progress = Progress(start, total, url.rsplit("/", 1)[-1])
        size, monitor = start, _RateMonitor(start)
        try:
            while block := response.read1(BLOCK):  # returns what has arrived; `read` waits for a whole block
                size += len(block)
                if size > MAX_BYTES:
                    raise DataError(f"{url} has more than the {MAX_BYTES} bytes that are allowed")
                file.write(block)
                progress.update(size)
                monitor.check(size)
        finally:
            progress.close(size)
        return total is None or size >= total


class _RateMonitor:
    """The minimum rate of a connection."""

    def __init__(self, size: int):
        self.size, self.since = size, time.monotonic()

    def check(self, size: int) -> None:
        """Raise TimeoutError if the rate over the last `SPAN` seconds was below `SLOW`."""
        now = time.monotonic()
        if now - self.since >= SPAN:
            if (rate := (size - self.size) / (now - self.since)) < SLOW:
                raise TimeoutError(f"{rate:,.0f} bytes/s over {SPAN} s, expected at least {SLOW:,}")
            self.size, self.since = size, now


class _Timed:
    """A connection whose response header must arrive within `TIMEOUT` seconds.

    A socket's timeout applies to each read, so a server that sends single bytes could block for ever.
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
            if over.is_set():  # a partial header may look complete
                raise TimeoutError(f"no complete response header in {TIMEOUT} s") from None


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
    """Return the file's checksum in the algorithm and notation of `like`."""
    algorithm = like.partition(":")[0]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{digest.hexdigest()}"


class Progress:
    """Print bytes, rate and remaining time to stderr: a bar on a terminal, else a line every ten seconds and one at
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
        # Clear the rest of the line, in case the previous text was longer.
        print(
            f"\r{text}\x1b[K" if self.live else text,
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )
