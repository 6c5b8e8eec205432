"""Atomic file writes: every failing system call, and a simulated power cut at every point."""

import contextlib
import errno
import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from kvision import files
from kvision.convert import hdf5, pth, safetensors
from kvision.files import FolderInUseError
from kvision.report.page import document
from kvision.training.checkpoints import Checkpoints, State
from kvision.weights import WeightsError, archive

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parent.parent
ARRAYS = {"a/kernel": np.arange(60_000, dtype=np.float32).reshape(300, 200), "a/bias": np.zeros(4, np.float32)}


class Disk:
    """Replaces `os` in `kvision.files`: records what reaches the disk, and makes one call fail.

    Attributes:
        calls: the operations so far: (name, what it was of).
    """

    def __init__(self, failing: int | None = None, error: int = errno.ENOSPC):
        self.failing, self.error, self.calls = failing, error, []
        self.names = {}  # of open files, by their numbers

    def __getattr__(self, name):
        return getattr(os, name)

    def _call(self, name, *what):
        self.calls.append((name, *what))
        if len(self.calls) - 1 == self.failing:
            raise OSError(self.error, os.strerror(self.error))

    def open(self, path, flags, *mode):
        if flags & os.O_CREAT:
            self._call("create", os.fspath(path))
        handle = os.open(path, flags, *mode)
        self.names[handle] = os.fspath(path)
        return handle

    def fdopen(self, handle, mode):
        disk = self

        class Raw(io.FileIO):
            def write(self, piece):
                disk._call("write", disk.names[handle], self.tell(), bytes(piece))
                return super().write(piece)

        return io.BufferedRandom(Raw(handle, "r+b"))

    def fsync(self, handle):
        self._call("fsync", self.names[handle])
        os.fsync(handle)

    def replace(self, source, target):
        self._call("rename", os.fspath(source), os.fspath(target))
        os.replace(source, target)

    def unlink(self, path):
        if os.path.lexists(path) and not os.fspath(path).endswith(
            ".tmp"
        ):  # the cleanup after an error must not fail, too
            self._call("unlink", os.fspath(path))
        os.unlink(path)


def tiny_model():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2, kernel_initializer="ones", name="a")(inputs))
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def write_checkpoint(folder, step=1):
    Checkpoints(folder / "checkpoints", keep=1).write(*tiny_model(), State(step=step))


WRITERS = {
    "npz": (lambda folder: archive.write(folder / "x.npz", ARRAYS), WeightsError),
    "pth": (lambda folder: pth.write(folder / "x.pth", ARRAYS), WeightsError),
    "h5": (lambda folder: hdf5.write(folder / "x.h5", ARRAYS), WeightsError),
    "safetensors": (lambda folder: safetensors.write(folder / "x.safetensors", ARRAYS), WeightsError),
    "json": (lambda folder: files.write_json(folder / "config.json", {"seed": 0}), OSError),
    "report": (lambda folder: files.write_text(folder / "report.html", document("x", "y")), OSError),
    "checkpoint": (write_checkpoint, WeightsError),
}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", WRITERS)
def test_each_call_fails_in_turn(tmp_path, monkeypatch, kind, error):
    write, expected = WRITERS[kind]
    disk = Disk()
    monkeypatch.setattr(files, "os", disk)
    write(tmp_path)
    ((path, new),) = content(tmp_path).items()
    names = [call[0] for call in disk.calls if call[1].startswith(str((tmp_path / path).parent))]
    assert {"create", "write", "fsync", "rename"} <= set(names)
    assert names[-2:] == ["rename", "fsync"]  # the name is on the disk, too
    former = path.with_name("step-00000000.npz") if kind == "checkpoint" else path
    for failing in range(1000):
        (tmp_path / path).unlink()
        (tmp_path / former).write_bytes(b"old")
        disk = Disk(failing, error)
        monkeypatch.setattr(files, "os", disk)
        try:
            write(tmp_path)
        except expected as raised:
            assert os.strerror(error) in str(raised) and str((tmp_path / path).parent) in str(raised)
        else:
            break
        last = disk.calls[-1][:2]
        if any(call[0] == "rename" for call in disk.calls[:failing]):  # the folder's sync failed, or a removal
            assert content(tmp_path) == {former: b"old"} | {path: new}, last
        else:
            assert content(tmp_path) == {former: b"old"}, last
            (tmp_path / path).touch()
    assert failing == len(disk.calls) and failing >= 4


# A power cut


def cut(calls, after, lost, start):
    """Yield possible states of the disk after a power cut: folder entries and contents by path.

    Args:
        lost: which of the changes of names that no fsync of their folder followed are lost (a bool for each).
    """
    data = {name: bytearray(start[name]) for name in start}  # contents in memory, by inode (its first name)
    disk = {name: bytes(start[name]) for name in start}  # synced contents
    inode = {name: name for name in start}  # names in memory
    names, pending = dict(inode), []  # names on the disk, and pending changes
    for number, (kind, path, *rest) in enumerate(calls[:after]):
        if kind == "create":
            inode[path] = f"{path} {number}"
            data[inode[path]], disk[inode[path]] = bytearray(), b""
            pending.append((os.path.dirname(path), {path: inode[path]}))
        elif kind == "write":
            place, piece = rest
            data[inode[path]][place : place + len(piece)] = piece
        elif kind == "fsync" and path in inode:
            disk[inode[path]] = bytes(data[inode[path]])
        elif kind == "fsync":
            for _, change in (item for item in pending if item[0] == path):
                names |= change
            pending = [item for item in pending if item[0] != path]
        elif kind == "rename":
            moved = inode.pop(path)
            inode[rest[0]] = moved
            pending.append((os.path.dirname(path), {path: None, rest[0]: moved}))
        else:
            inode.pop(path)
            pending.append((os.path.dirname(path), {path: None}))
    for (_, change), gone in itertools.zip_longest(pending, lost[: len(pending)], fillvalue=False):
        if not gone:
            names |= change
    return {path: disk[node] for path, node in names.items() if node is not None}, len(pending)


def every_cut(calls, start):
    """Yield every state of the disk: after each call, with each subset of the pending changes."""
    for after in range(len(calls) + 1):
        _, count = cut(calls, after, (), start)
        for lost in itertools.product((False, True), repeat=count):
            yield cut(calls, after, lost, start)[0]


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "checkpoint"])
def test_a_power_cut_leaves_the_old_file_or_the_new(tmp_path, monkeypatch, kind):
    write, _ = WRITERS[kind]
    write(tmp_path)
    ((path, new),) = content(tmp_path).items()
    path, old = str(tmp_path / path), b"old"
    Path(path).write_bytes(old)
    disk = Disk()
    monkeypatch.setattr(files, "os", disk)
    write(tmp_path)
    found = [state[path] for state in every_cut(disk.calls, {path: old})]
    assert set(found) == {old, new} and found[-1] == new


def test_a_power_cut_leaves_a_valid_checkpoint(tmp_path, monkeypatch):
    """Three checkpoints, of which one is kept: after a power cut at any point one can be read."""
    folder = tmp_path / "checkpoints"
    write_checkpoint(tmp_path, 1)
    ((path, first),) = content(tmp_path).items()
    disk, start = Disk(), {str(tmp_path / path): first}
    monkeypatch.setattr(files, "os", disk)
    model, optimizer = tiny_model()
    kept = Checkpoints(folder, keep=1)
    for step in (2, 3):
        kept.write(model, optimizer, State(step=step))
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert list(sound) == ["step-00000003.npz"]
    whole = {first} | {bytes(piece) for state in every_cut(disk.calls, start) for piece in state.values()} - {b""}
    assert len(whole) == 3  # no partial content
    steps = [
        [int(Path(name).stem[5:]) for name, piece in state.items() if not name.endswith(".tmp") and piece]
        for state in every_cut(disk.calls, start)
    ]
    assert all(steps) and steps[0] == [1] and steps[-1][-1] == 3
    empty = [name for state in every_cut(disk.calls, start) for name, piece in state.items() if not piece]
    assert all(name.endswith(".tmp") for name in empty)  # final names have their content


def test_the_simulation_detects_missing_syncs(tmp_path):
    """Without either fsync, a power cut leaves an empty file, or neither of two."""
    new, old, part = (str(tmp_path / name) for name in ("new", "old", ".new.tmp"))
    calls = [("create", part), ("write", part, 0, b"x"), ("rename", part, new), ("unlink", old)]
    states = list(every_cut(calls, {old: b"o"}))
    assert {new: b""} in states and {} in states
    calls.insert(2, ("fsync", part))
    assert {new: b""} not in every_cut(calls, {old: b"o"}) and {} in every_cut(calls, {old: b"o"})
    calls.insert(4, ("fsync", str(tmp_path)))
    assert {} not in every_cut(calls, {old: b"o"})


def test_the_bytes_of_an_h5_do_not_depend_on_the_time(tmp_path):
    """HDF5 stores the time of groups that track their order, in seconds."""
    hdf5.write(tmp_path / "a.h5", ARRAYS)
    first = int(time.time())
    while int(time.time()) == first:
        time.sleep(0.01)
    hdf5.write(tmp_path / "b.h5", ARRAYS)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


# Other files


@pytest.mark.parametrize("kind", ["npz", "pth", "h5", "safetensors", "json"])
def test_other_files_are_not_touched(tmp_path, kind):
    """Neither a file with a likely temporary name, nor the target of a link at that name or at the path."""
    write, _ = WRITERS[kind]
    write(tmp_path)
    (name,) = content(tmp_path)
    other = tmp_path / "elsewhere"
    other.write_bytes(b"mine")
    (tmp_path / f"{name}.tmp").symlink_to(other)
    (tmp_path / f".{name}.tmp").write_bytes(b"theirs")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(other)
    write(tmp_path)
    assert other.read_bytes() == b"mine" and (tmp_path / f".{name}.tmp").read_bytes() == b"theirs"
    assert (tmp_path / f"{name}.tmp").is_symlink() and not (tmp_path / name).is_symlink()


def test_a_pipe_or_a_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="is not a regular file") as raised:
            files.write_text(tmp_path / name, "x")
        assert raised.value.filename == str(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2


def test_names_of_maximal_length(tmp_path):
    path = tmp_path / ("ü" * 125 + ".json")
    files.write_json(path, 1)
    assert path.read_text() == "1\n"


# Folders and their locks


FOLDERS = """
import multiprocessing, pathlib, sys
from kvision.files import new_folder

def make(_):
    return str(new_folder(pathlib.Path(sys.argv[1]) / f"run-{number}" for number in range(100)))

with multiprocessing.get_context("fork").Pool(8) as pool:
    print(*pool.map(make, range(40), chunksize=1))
"""


def test_new_folders_are_unique(tmp_path):
    """In a separate process, because a process with a backend's threads must not be forked."""
    words = [sys.executable, "-c", FOLDERS, str(tmp_path / "runs")]
    found = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert sorted(found) == sorted(str(tmp_path / "runs" / f"run-{number}") for number in range(40))


HOLDER = """
import sys, time, pathlib
from kvision.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    """The message names the process; SIGKILL releases the lock, and its leftover file is no obstacle."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"{tmp_path} is in use by process {holder.pid},"):
            files.locked(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.communicate()
    with files.locked(tmp_path), pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
        files.locked(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_removed_lock_file_is_not_locked(tmp_path, monkeypatch):
    """The holder ends between the opening of the lock file and the lock: the file no longer exists."""
    flock, first = files.fcntl.flock, []

    def late(file, how):
        if not first:
            first.append((tmp_path / files.LOCK).unlink())
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.locked(tmp_path):
        assert (tmp_path / files.LOCK).read_text().split()[0] == str(os.getpid())


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path), contextlib.suppress(ValueError):
        raise ValueError
    assert not list(tmp_path.iterdir())
