"""The apps as a user runs them: real training on real CIFAR-10 where KVISION_DATA names it, else on drawn shapes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apps import cifar10, mnist, transfer
from kvision import flags
from kvision.run import Config, command
from kvision.weights import verify
from tests.drawn import real_data, write_shapes

FLAGS = [
    "model",
    "epochs",
    "batch-size",
    "learning-rate",
    "seed",
    "data",
    "out",
    "limit",
    "steps",
    "resume",
    "l1",
    "l2",
]
FLAGS += ["dropout", "augment", "dtype"]
FILES = {"config.json", "metrics.jsonl", "metrics.json", "trace.json", "weights.npz", "checkpoint.npz", "report.html"}


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    return real_data() or write_shapes(tmp_path_factory.mktemp("data") / "shapes.npz")


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory) -> dict:
    """A short but real training of the default recipe."""
    config = replace(
        cifar10.RECIPES["airbench_small"],
        data=images,
        limit=2000,
        limit_test=1000,
        epochs=4,
        batch_size=100,
        out=str(tmp_path_factory.mktemp("run") / "cifar10"),
    )
    return cifar10.main(config)


def test_a_run_learns_and_leaves_its_folder(trained):
    folder = Path(trained["folder"])
    assert trained["test_accuracy"] > 0.25  # chance is 0.10
    assert {path.name for path in folder.iterdir()} == FILES
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {key: value for key, value in trained.items() if key != "folder"}
    assert metrics["dataset"] == ("cifar10" if real_data() else "shapes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["test_accuracy"] == metrics["test_accuracy"]
    report = (folder / "report.html").read_text()
    assert f"{100 * metrics['test_accuracy']:.2f}" in report
    assert metrics["dataset"] in report
    assert "http" not in re.sub(r"https?://(arxiv|doi)\.org\S*", "", report)
    import hashlib

    assert metrics["weights_sha256"] == hashlib.sha256((folder / "weights.npz").read_bytes()).hexdigest()


def test_the_weights_prove_themselves_and_score_the_same(trained, images, tmp_path):
    weights = str(Path(trained["folder"]) / "weights.npz")
    assert verify(weights).ok
    config = Config(
        model="airbench_small", weights=weights, epochs=0, data=images, limit_test=1000, out=str(tmp_path / "again")
    )
    assert cifar10.main(config)["test_correct"] == trained["test_correct"]


def test_mnist_falls_back_honestly(tmp_path, monkeypatch, capsys):
    """Without data and network, the digits of scikit-learn or drawn ones, and every file says so."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)
    from kvision.data import download

    (remote,) = download.REMOTES["mnist"]
    nowhere = replace(remote, url="http://127.0.0.1:9/mnist.npz")  # the discard port: refused at once
    monkeypatch.setitem(download.REMOTES, "mnist", (nowhere,))
    config = replace(mnist.RECIPES["softmax"], limit=500, limit_test=200, epochs=8, out=str(tmp_path / "run"))
    result = mnist.main(config)
    assert result["dataset"] in ("digits", "drawn_digits")
    assert result["test_accuracy"] > 0.5
    assert "mnist is not here" in capsys.readouterr().out
    for name in ("metrics.json", "report.html"):
        assert result["dataset"] in (tmp_path / "run" / name).read_text()


def test_transfer_runs_through(images, tmp_path, capsys):
    config = replace(
        transfer.RECIPE,
        model="vgg11_bn",
        data=images,
        limit=250,
        limit_test=100,
        per_class=10,
        source_epochs=1,
        epochs=1,
        unfreeze="stage5",
        unfreeze_epochs=1,
        hidden=32,
        out=str(tmp_path / "transfer"),
    )
    result = transfer.main(config)
    assert np.isclose(result["margin"], result["test_accuracy"] - result["scratch_accuracy"])
    assert f"{100 * result['margin']:+.1f} points" in capsys.readouterr().out
    with (
        np.load(tmp_path / "transfer/source/weights.npz") as a,
        np.load(tmp_path / "transfer/unfrozen/weights.npz") as b,
    ):
        for name in a.files:
            if name != "__manifest__":
                moved = not np.array_equal(a[name], b[name])
                assert moved == name.startswith(("stage5", "logits")), name


def run_command(*argv: str) -> int:
    return command(cifar10.main, cifar10.RECIPES, "", argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model", "resnet21"], "unknown model 'resnet21'; did you mean"),
        (["--learning-rate", "-1"], "--learning-rate must be a positive number, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--epochs", "1.5"], "expected a whole number, got '1.5'"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (["--dropout", "0.5", "--model", "resnet20"], "--dropout does not apply to resnet20; it does to"),
        (["--hidden", "5", "--model", "softmax"], "--hidden does not apply to softmax"),
        (["--optimizer", "sdg"], "invalid choice: 'sdg'"),
        (["--lerning-rate", "1"], "unrecognized arguments"),
        (["--epoch", "1"], "unrecognized arguments"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--weights", "no_such.npz"], "no_such.npz"),
        (["--resume", "--out", "no_such_run"], "found no run in no_such_run"),
    ],
)
def test_bad_flags_end_in_one_line_and_write_nothing(argv, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = run_command(*argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_data_end_in_one_line_and_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "flat.npz", x_train=np.zeros((5, 32), np.uint8), y_train=[0] * 5, x_test=[[0]], y_test=[0])
    for path in ("empty", "flat.npz"):
        assert run_command("--data", path) == 2
        error = capsys.readouterr().err
        assert path in error
        assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "flat.npz"]


def test_a_used_folder_is_not_written_over(trained, capsys):
    assert run_command("--out", trained["folder"]) == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_refuses_other_flags(trained, capsys):
    assert run_command("--resume", "--out", trained["folder"], "--seed", "7") == 2
    assert "--seed is 0 in the run to go on with, not 7" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse(Config, ["--help"], prog="x", description="", defaults=cifar10.RECIPES["airbench_small"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in FLAGS:
        assert f"--{name}" in text
    assert "(default: 250)" in text


def test_a_killed_run_resumes_to_the_same_weights(images, tmp_path):
    """SIGKILL while an epoch runs; the resumed run ends bit for bit as one that was left alone."""
    words = [sys.executable, "-m", "apps.cifar10", "--data", images, "--model", "cifar_cnn"]
    words += ["--limit", "300", "--limit-test", "100", "--epochs", "5", "--batch-size", "50"]
    root = Path(__file__).parent.parent

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*words, *more], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ), text=True
        )

    whole = start("--out", str(tmp_path / "whole"))
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    killed = start("--out", str(tmp_path / "killed"))
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "weights.npz").exists(), "the run ended before it was killed: make it longer"

    resumed = subprocess.run(
        [sys.executable, "-m", "apps.cifar10", "--resume", "--out", str(tmp_path / "killed")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    with np.load(tmp_path / "whole/checkpoint.npz") as a, np.load(tmp_path / "killed/checkpoint.npz") as b:
        assert a.files == b.files
        for name in a.files:
            if name != "manifest":
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
