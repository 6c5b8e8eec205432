"""Downloads from a local server that truncates, sends wrong headers and ignores ranges."""

import contextlib
import hashlib
import http.server
import io
import multiprocessing
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvision.data import DataError, DataUnavailable, cifar, download, load, mnist, registry
from kvision.data.download import Remote

pytestmark = pytest.mark.backend_free

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; the next responses are truncated to `cut` bytes; `ranges`: whether it supports resuming."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.ranges = True
        self.pause = 0.0
        self.drip = None  # "header" or "body": sent byte by byte without end
        self.length: str | None = None  # overrides the Content-Length header
        self.ended = threading.Event()
        self.asked: list[str | None] = []

    def url(self, file):
        return f"http://127.0.0.1:{self.server_port}/{file}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path[1:])
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if content is None:
            return self.send_error(404)
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.drip == "header":
            return self.dribble(b"X-Long: ")
        self.send_header("Content-Length", self.server.length or str(len(content) - start))
        self.end_headers()
        if self.server.drip == "body":
            return self.dribble(b"")
        time.sleep(self.server.pause)
        body = content[start:]
        if self.server.cut:
            body = body[: self.server.cut.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def dribble(self, first):
        with contextlib.suppress(OSError):
            self.flush_headers()
            self.wfile.write(first)
            while not self.server.ended.wait(0.02):
                self.wfile.write(b"x")
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Keras cache, and an empty folder to work in."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "keras" / "datasets"


@pytest.fixture
def one_file(server, monkeypatch):
    """Data set "mnist" as one file of random bytes."""
    server.files["mnist.npz"] = CONTENT
    return publish(monkeypatch, server, "mnist", "mnist.npz", CONTENT)


def publish(monkeypatch, server, name, file, content, algorithm="sha256", unpacks_to=None):
    checksum = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
    remote = Remote(server.url(file), file, checksum, unpacks_to)
    monkeypatch.setitem(download.REMOTES, name, (remote,))
    return remote


def fetch(cache):
    return download.download("mnist", cache, log=lambda line: None)


def left(cache):
    return sorted(path.name for path in cache.iterdir())


def test_a_complete_download(server, one_file, cache, capsys):
    said = []
    path = download.download("mnist", cache, log=said.append)
    assert path == cache / "mnist.npz"
    assert path.read_bytes() == CONTENT
    assert left(cache) == ["mnist.npz"]
    assert said == [f"downloading {one_file.url} to {cache}"]
    assert "mnist.npz: 0.3 of 0.3 MB (100 %)" in capsys.readouterr().err


def test_a_verified_file_is_not_downloaded_again(server, one_file, cache):
    fetch(cache)
    fetch(cache)
    assert server.asked == [None]


def test_a_wrong_file_is_replaced(server, one_file, cache):
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_bytes(CONTENT[:-1])
    assert fetch(cache).read_bytes() == CONTENT


def test_a_broken_transfer_is_resumed(server, one_file, cache):
    server.cut = [100_000, 50_000]
    assert fetch(cache).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert left(cache) == ["mnist.npz"]


def test_the_next_call_resumes_an_abandoned_download(server, one_file, cache):
    server.cut = [100_000, 0]
    with pytest.raises(DataUnavailable, match="100000 bytes are kept, run again to resume"):
        fetch(cache)
    assert left(cache) == ["mnist.npz.part"]
    server.asked.clear()
    assert fetch(cache).read_bytes() == CONTENT
    assert server.asked == ["bytes=100000-"]


def test_a_server_without_ranges_restarts_the_transfer(server, one_file, cache):
    server.ranges = False
    server.cut = [100_000]
    assert fetch(cache).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "part",
    [b"of an older file" * 1000, CONTENT, CONTENT + b"more", b"x" * len(CONTENT)],
    ids=["older", "complete", "longer", "as long"],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_any_partial_file_becomes_the_published_file(server, one_file, cache, part, ranges):
    server.ranges = ranges
    cache.mkdir(parents=True)
    (cache / "mnist.npz.part").write_bytes(part)
    assert fetch(cache).read_bytes() == CONTENT
    assert left(cache) == ["mnist.npz"]


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_wrong_checksum_raises_and_leaves_nothing(server, cache, monkeypatch, algorithm):
    publish(monkeypatch, server, "mnist", "mnist.npz", CONTENT, algorithm)
    server.files["mnist.npz"] = CONTENT[:-1] + b"?"
    with pytest.raises(DataError, match=f"is not the published file: expected {algorithm}:") as caught:
        fetch(cache)
    assert not isinstance(caught.value, DataUnavailable)
    assert left(cache) == []


def test_a_missing_file_on_the_server(server, one_file, cache):
    server.files.clear()
    with pytest.raises(DataUnavailable, match=r"mnist\.npz returned 404"):
        fetch(cache)
    assert left(cache) == []


def test_no_server(server, cache, monkeypatch):
    publish(monkeypatch, server, "mnist", "mnist.npz", CONTENT)
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    with pytest.raises(DataUnavailable) as caught:
        load("mnist")
    assert time.monotonic() - began < 5
    message = str(caught.value)
    assert message.startswith("mnist is neither on disk nor downloadable: http://127.0.0.1")
    assert message.endswith(f"give a path to it, or put mnist.npz into {cache}")
    assert "\n" not in message
    assert left(cache) == []


def test_a_stalled_transfer_times_out(server, one_file, cache, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.pause = 0.5
    with pytest.raises(DataUnavailable, match="timed out"):
        fetch(cache)


@pytest.mark.parametrize("drip", ["header", "body"])
def test_a_slow_transfer_times_out(server, one_file, cache, monkeypatch, drip):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    monkeypatch.setattr(download, "SPAN", 0.2)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.drip = drip
    began = time.monotonic()
    said = {"header": "no complete response header in 0.5 s", "body": "bytes/s over 0.2 s"}[drip]
    with pytest.raises(DataUnavailable, match=said):
        fetch(cache)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("length", ["9" * 5000, "²", "-1", "1e3", "0x10"])
def test_an_invalid_content_length_is_ignored(server, one_file, cache, length):
    """The header's bytes are decoded as latin-1; the checksum decides whether the file is complete."""
    server.length = length
    try:
        assert fetch(cache).read_bytes() == CONTENT
    except DataUnavailable as error:
        assert "cannot be fetched" in str(error)


def test_without_a_home_directory_the_cache_is_that_of_keras(monkeypatch):
    """As for a container's user without an entry in the system: "~" is not expanded."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("KERAS_HOME", raising=False)

    def unknown(*_):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert registry.keras_cache() == Path(tempfile.gettempdir()) / ".keras" / "datasets"
    with pytest.raises(DataError, match="~nobody_here"):
        load("mnist", "~nobody_here/mnist.npz")


def test_time_to_connect_is_bounded():
    assert download.TIMEOUT <= 15


def test_a_file_above_the_size_limit_raises(server, one_file, cache, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="has 300000 bytes, more than the 1000"):
        fetch(cache)


def test_an_unwritable_folder_raises(server, one_file, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataUnavailable, match="cannot be downloaded into"):
        fetch(tmp_path / "file" / "cache")


def archive(folder, **files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar10_archive(monkeypatch):
    """The binary version, with one image per batch."""
    monkeypatch.setitem(cifar.COUNTS, "cifar10", (5, 1))
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return archive("cifar-10-batches-bin", **{name: bytes([i]) * 3073 for i, name in enumerate(names)})


def test_an_archive_is_downloaded_unpacked_and_then_found(server, cache, monkeypatch):
    content = cifar10_archive(monkeypatch)
    server.files["cifar.tar.gz"] = content
    publish(monkeypatch, server, "cifar10", "cifar.tar.gz", content, "md5", "cifar-10-batches-bin")
    assert load("cifar10", log=lambda line: None).y_train.tolist() == [0, 1, 2, 3, 4]
    assert left(cache) == ["cifar-10-batches-bin"]
    again = load("cifar10", download=False)
    assert again.source == str(cache / "cifar-10-batches-bin")
    assert len(server.asked) == 1


def test_a_broken_folder_in_the_cache_is_skipped_and_replaced(server, cache, monkeypatch):
    content = cifar10_archive(monkeypatch)
    server.files["cifar.tar.gz"] = content
    publish(monkeypatch, server, "cifar10", "cifar.tar.gz", content, "md5", "cifar-10-batches-bin")
    broken = cache / "cifar-10-batches-bin"
    broken.mkdir(parents=True)
    (broken / "data_batch_1.bin").write_bytes(b"1")
    said = []
    assert load("cifar10", log=said.append).name == "cifar10"
    assert said[0].startswith(f"skipping {broken}: ")
    assert left(cache) == ["cifar-10-batches-bin"]


def test_a_hostile_archive_with_the_right_checksum_leaves_nothing(server, cache, monkeypatch):
    content = archive("cifar-10-batches-bin/../..", escaped=b"1")
    server.files["cifar.tar.gz"] = content
    publish(monkeypatch, server, "cifar10", "cifar.tar.gz", content, "md5", "cifar-10-batches-bin")
    with pytest.raises(DataError, match="lies outside the folder"):
        load("cifar10", log=lambda line: None)
    assert not list(cache.parent.parent.rglob("escaped"))
    assert not (cache / "cifar-10-batches-bin").exists()


def test_fashion_mnist_has_four_files(server, cache, monkeypatch):
    monkeypatch.setitem(mnist.COUNTS, "fashion_mnist", (2, 1))
    remotes = []
    for name, count in zip(mnist.FILES, (2, 2, 1, 1), strict=True):
        lengths = (count, 28, 28) if "idx3" in name else (count,)
        content = bytes([0, 0, 8, len(lengths)]) + np.array(lengths, ">u4").tobytes() + bytes(np.prod(lengths))
        server.files[name] = content
        md5 = hashlib.md5(content).hexdigest()
        remotes.append(Remote(server.url(name), f"fashion-mnist/{name}", f"md5:{md5}"))
    monkeypatch.setitem(download.REMOTES, "fashion_mnist", tuple(remotes))
    assert load("fashion_mnist", log=lambda line: None).name == "fashion_mnist"
    assert left(cache) == ["fashion-mnist"]
    assert load("fashion_mnist", download=False).source == str(cache / "fashion-mnist")


def _fetch_in_a_process(remotes, cache, results):
    download.REMOTES.update(remotes)
    with contextlib.redirect_stderr(io.StringIO()):
        path = download.download("cifar10", cache, log=lambda line: None)
    results.put(sorted((item.name, item.stat().st_size) for item in path.iterdir()))


def test_concurrent_downloads_do_not_interfere(server, cache, monkeypatch):
    content = cifar10_archive(monkeypatch)
    server.files["cifar.tar.gz"] = content
    server.pause = 0.3
    remote = publish(monkeypatch, server, "cifar10", "cifar.tar.gz", content, "md5", "cifar-10-batches-bin")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_fetch_in_a_process, args=({"cifar10": (remote,)}, cache, results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6
    assert left(cache) == ["cifar-10-batches-bin"]


def test_the_published_checksums():
    # As the publishers and Keras state them; a typo here would make every download fail.
    found = {name: [remote.checksum for remote in remotes] for name, remotes in download.REMOTES.items()}
    assert found["cifar10"] == ["md5:c58f30108f718f92721af3b95e74349a"]
    assert found["cifar100"] == ["md5:eb9058c3a382ffc7106e4002c42a8d85"]
    assert found["mnist"] == ["sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"]
    assert len(set(found["fashion_mnist"])) == 4
    assert all(remote.url.startswith("https://") for remotes in download.REMOTES.values() for remote in remotes)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("live", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, live):
    stream = Terminal() if live else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    clock = iter([100.0, 111.0, 122.0])
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    progress = download.Progress(0, 44_000_000, "x.gz")
    progress.update(11_000_000)
    progress.close(44_000_000)
    first, last = stream.getvalue().replace("\x1b[K", "\n").split("\n")[:2]
    assert first.endswith("x.gz: 11.0 of 44.0 MB (25 %), 1.0 MB/s, 33 s left")
    assert last.endswith("x.gz: 44.0 of 44.0 MB (100 %), 2.0 MB/s")
    assert first.startswith("\r[######......") == live
