"""A run's folder is its own: however many start at once, whatever is resumed."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from apps import cifar10
from kvision import experiment, flags, run_folder
from kvision.engine import threads
from kvision.experiment import Config, command
from kvision.files import FolderInUseError, locked
from kvision.flags import UsageError
from kvision.training.checkpoints import Checkpoints, OtherRunError, State
from kvision.weights import save
from tests.datasets import write_shapes
from tests.test_files import HOLDER, tiny_model
from tests.test_resume import act_in_app

ROOT = Path(__file__).parent.parent
WORDS = [
    "--model",
    "softmax",
    "--max-train-samples",
    "60",
    "--max-test-samples",
    "20",
    "--batch-size",
    "20",
    "--epochs",
    "1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes.npz")


@pytest.fixture
def start(images, tmp_path, monkeypatch):
    """`start(*flags)`: a run in an empty working folder; the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *more, words=WORDS: command(cifar10.main, cifar10.RECIPES, "", [*words, "--data", images, *more])


@pytest.fixture
def holder(tmp_path):
    """`holder(folder)`: a process that holds a folder, as one that runs in it does."""
    processes = []

    def hold(folder):
        words = [sys.executable, "-c", HOLDER, str(Path(folder).resolve())]
        processes.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1].pid

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_runs_that_start_at_once_have_folders_of_their_own(start, monkeypatch, images):
    """The second starts while the first reads its data."""
    read, folders = experiment.read_data, []

    def meanwhile(config, *rest):
        folders.append({path.name for path in Path("runs").iterdir()})
        if len(folders) < 3:
            assert start() == 0
        return read(config, *rest)

    monkeypatch.setattr(experiment, "read_data", meanwhile)
    assert start() == 0
    assert [len(found) for found in folders] == [1, 2, 3]
    for folder in Path("runs").iterdir():
        assert {"metrics.json", "weights.npz", "report.html", "checkpoints"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_folder_that_another_process_runs_in_is_refused(start, holder, capsys, more, monkeypatch):
    assert start("--output-dir", "here") == 0
    pid = holder("here")
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("here").rglob("*"))
    monkeypatch.setattr(experiment, "read_data", None)  # no data are read before
    assert start("--output-dir", "here", *more) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"here is in use by process {pid}," in line
    assert sorted((path, path.stat().st_mtime_ns) for path in Path("here").rglob("*")) == before


def test_a_run_holds_its_folder_until_its_end(start, monkeypatch):
    read, seen = experiment.read_data, []

    def look(config, *rest):
        with pytest.raises(FolderInUseError), locked(Path("here")):
            pass
        seen.append(True)
        return read(config, *rest)

    monkeypatch.setattr(experiment, "read_data", look)
    assert start("--output-dir", "here") == 0 and seen
    with locked(Path("here")):
        pass
    assert not list(Path("here").glob(".*"))


def test_a_folder_that_a_killed_run_left_empty_is_free(start):
    Path("here").mkdir()
    Path("here/.lock").write_text("123 elsewhere\n")
    assert start("--output-dir", "here") == 0


@pytest.mark.parametrize("out", [None, "here", "above/here"])
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    config = Config(output_dir=out)
    with pytest.raises(UsageError, match="no data"), run_folder.run_folder(config) as folder:
        assert folder.is_dir()
        raise UsageError("no data")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_resumed_refuses_checkpoints(start, images, capsys):
    """Also where the folder is given to `train` itself."""
    assert start("--output-dir", "here") == 0
    config = Config(model="softmax", data=images, epochs=1, max_train_samples=60, max_test_samples=20, batch_size=20)
    dataset, _ = experiment.read_data(config, ("shapes10",))
    with pytest.raises(UsageError, match=r"here holds the checkpoints of a run: give --resume"):
        experiment.train(config, dataset, Path("here"))
    assert start("--output-dir", "here") == 2
    assert "--output-dir here is not empty: give --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "theirs", "ours"),
    [
        ("learning_rate", 0.5, "--learning-rate 0.01", "--learning-rate 0.5"),
        ("seed", 7, "--seed 0", "--seed 7"),
        (
            "max_train_samples",
            40,
            "--max-train-samples 60, training images 60",
            "--max-train-samples 40, training images 40",
        ),
        ("flip", False, "--flip True", "--flip False"),
    ],
)
def test_another_configuration_is_refused(start, capsys, name, value, theirs, ours):
    """As where a second run has written its config.json into the folder; nothing is removed."""
    assert start("--output-dir", "here") == 0
    path = Path("here/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    left = sorted(Path("here/checkpoints").iterdir())
    assert start("--output-dir", "here", "--resume", words=()) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step-00000003.npz: is of a run with {theirs}" in line and f"; this run has {ours}" in line
    assert sorted(Path("here/checkpoints").iterdir()) == left


def test_other_images_are_refused(start, tmp_path, capsys):
    assert start("--output-dir", "here") == 0
    with np.load(write_shapes(tmp_path / "other.npz")) as stored:
        arrays = dict(stored)
    arrays["y_train"] = np.roll(arrays["y_train"], 1)
    np.savez(tmp_path / "other.npz", **arrays)
    path = Path("here/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": str(tmp_path / "other.npz")}))
    assert command(cifar10.main, cifar10.RECIPES, "", ["--resume", "--output-dir", "here"]) == 2
    assert "their labels sha256" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"epochs": 3}, {"steps_per_execution": 1, "data_on": "host"}, {"save_every": 2}])
def test_what_may_change_may_change(start, change):
    assert start("--output-dir", "here") == 0
    path = Path("here/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert start("--output-dir", "here", "--resume", words=()) == 0
    rows = Path("here/metrics.jsonl").read_text().splitlines()
    assert len(rows) == change.get("epochs", 1)


def test_every_flag_is_in_the_digest_or_free(images):
    config = Config(data=images)
    dataset, _ = experiment.read_data(config, ("shapes10",))
    known = {f"--{field.name}".replace("_", "-") for field in dataclasses.fields(Config)}
    free = {f"--{name}".replace("_", "-") for name in run_folder.FREE}
    assert free <= known
    found = {name.replace("_", "-") for name in run_folder.identity(config, dataset) if name.startswith("--")}
    assert found == known - free


def test_a_weights_file_counts_by_its_arrays(images, tmp_path):
    """Neither its place nor its manifest, which a resumed stage of another backend writes anew, makes another run."""
    dataset, _ = experiment.read_data(Config(data=images), ("shapes10",))
    model, _ = tiny_model()

    def of(name, **stated):
        save(model, tmp_path / name, **stated)
        return run_folder.identity(Config(weights=str(tmp_path / name)), dataset)

    first = of("a.npz", accuracy={"jax": 0.5})
    assert of("b.npz", accuracy={"torch": 0.6}) == first
    model.layers[-1].bias.assign([1.0, 2.0])
    assert of("a.npz") != first
    (tmp_path / "c.pth").write_bytes(b"x")
    assert run_folder.identity(Config(weights=str(tmp_path / "c.pth")), dataset)["--weights"].startswith("sha256 2d71")


def test_a_checkpoint_without_a_configuration_is_taken(tmp_path):
    """As those of `training.fit` in a program, and of earlier versions."""
    model, optimizer = tiny_model()
    Checkpoints(tmp_path).write(model, optimizer, State(step=4))
    assert Checkpoints(tmp_path, configuration={"--seed": 1}).read(model, optimizer).step == 4


def test_a_newer_checkpoint_of_another_run_is_neither_passed_over_nor_removed(tmp_path):
    model, optimizer = tiny_model()
    for seed, step in ((0, 2), (1, 4)):
        Checkpoints(tmp_path, configuration={"--seed": seed}).write(model, optimizer, State(step=step))
    ours = Checkpoints(tmp_path, keep=1, configuration={"--seed": 0})
    with pytest.raises(OtherRunError, match=r"step-00000004.npz: is of a run with --seed 1; this run has --seed 0"):
        ours.read(model, optimizer)
    assert [path.name for path in ours.files()] == ["step-00000002.npz", "step-00000004.npz"]


def test_a_terminal_that_lacks_a_letter_ends_no_run(monkeypatch):
    """An ASCII pipe, and the name of a class."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert flags.run_cli("app", lambda: print("Vögel"), ()) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"V\\xf6gel\n"


def test_tiny_networks_get_one_thread_of_pytorchs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    few, many = threads.choose(10), threads.choose(10**10)
    assert many >= few >= 1
    if keras.backend.backend() == "torch":
        assert few == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's own choice
    assert threads.choose(10) == threads.choose(10**10)


def test_threads_and_load_stand_in_the_metrics(start, capsys):
    assert start("--output-dir", "here") == 0
    metrics = json.loads(Path("here/metrics.json").read_text())
    assert metrics["threads"] >= 1 and metrics["load_average"] >= 0
    assert f", {metrics['threads']} thread" in capsys.readouterr().out


def test_the_terminal_may_go(start, monkeypatch, capsys):
    """SIGHUP saves, and the exit code says so."""
    act_in_app(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert start("--output-dir", "here") == 75
    assert "stopped by SIGHUP after step 2 and saved as here/checkpoints/step-00000002.npz" in capsys.readouterr().err
    assert start("--output-dir", "here", "--resume", words=()) == 0


GONE = """
import sys, time
from kvision.flags import run_cli
from kvision.training.shutdown import Interrupted, GracefulShutdown

def run():
    with GracefulShutdown() as interruption:
        print("ready", flush=True)  # in one piece, which has gone when its end has come
        while not interruption.signal:
            time.sleep(0.01)
        raise Interrupted(f"stopped by {interruption.signal} and saved")

sys.exit(run_cli("app", run, (), Interrupted))
"""


@pytest.mark.backend_free
def test_the_exit_code_does_not_need_the_terminal():
    """What a run says last has nowhere to go; the kernel sends SIGHUP as the terminal's window closes."""
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    words = [sys.executable, "-c", f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{GONE}"]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, **streams)
    try:
        os.close(terminal)
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(controller, 100)
        os.close(controller)
        assert process.wait(30) == flags.SAVED
    finally:
        process.kill()
        process.wait()
