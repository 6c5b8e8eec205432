"""The apps as a user runs them: training on real CIFAR-10 where KVISION_DATA names it, else on synthetic shapes."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apps import cifar10, mnist, regularize, transfer
from kvision import engine, flags
from kvision.config import Config
from kvision.convert import verify
from kvision.data import load
from kvision.experiment import build_optimizer, command
from kvision.flags import UsageError
from kvision.run_data import build_batches, build_preprocessing, train_validation_split
from kvision.training.averaging import EMA, SWA, Lookahead
from kvision.training.optimizers import LearningRateMultipliers
from kvision.weights import inspect
from tests.datasets import write_few

FLAGS = [
    "model",
    "epochs",
    "batch-size",
    "learning-rate",
    "seed",
    "data",
    "output-dir",
    "max-train-samples",
    "max-steps",
    "resume",
    "l1",
    "l2",
    "dropout",
    "augment",
    "dtype",
    "engine",
    "gradient-accumulation-steps",
    "deterministic",
    "compile-cache",
    "data-on",
    "steps-per-execution",
    "orthogonal",
    "max-norm",
    "clip-norm",
    "ema",
    "swa",
    "lookahead",
    "tta",
    "early-stopping",
    "mixup",
    "cutmix",
    "random-erasing",
]
FILES = {"config.json", "metrics.jsonl", "metrics.json", "trace.json", "weights.npz", "checkpoints", "report.html"}


def newest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return sorted((folder / "checkpoints").iterdir())[-1]


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    return write_few(tmp_path_factory.mktemp("data") / "few.npz")


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory) -> dict:
    """A short but real training of the default recipe."""
    config = replace(
        cifar10.RECIPES["airbench_small"],
        data=images,
        max_train_samples=500,
        max_test_samples=500,
        epochs=3,
        batch_size=25,
        output_dir=str(tmp_path_factory.mktemp("run") / "cifar10"),
    )
    return cifar10.main(config)


def test_a_run_learns_and_leaves_its_folder(trained):
    folder = Path(trained["folder"])
    assert trained["test_accuracy"] > 0.25  # chance is 0.10
    assert {path.name for path in folder.iterdir()} == FILES
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {key: value for key, value in trained.items() if key != "folder"}
    assert metrics["dataset"] == "few"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
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
        model="airbench_small",
        weights=weights,
        epochs=0,
        data=images,
        max_test_samples=500,
        output_dir=str(tmp_path / "again"),
    )
    assert cifar10.main(config)["test_correct"] == trained["test_correct"]


def test_views_stand_beside_the_accuracy_of_each_image(trained, images, tmp_path, capsys):
    """Which is what the curve, the manifest and the confusions state."""
    weights = str(Path(trained["folder"]) / "weights.npz")
    base = Config(model="airbench_small", weights=weights, epochs=0, data=images, max_test_samples=500)
    result = cifar10.main(replace(base, tta="flip_shift", output_dir=str(tmp_path / "views")))
    assert (result["test_correct"], result["test_loss"]) == (trained["test_correct"], trained["test_loss"])
    assert trained["tta"] == "none" and "tta_accuracy" not in trained
    assert result["tta"] == "flip_shift" and result["tta_accuracy"] == result["tta_correct"] / 500
    assert result["tta_loss"] != result["test_loss"]
    manifest = inspect(str(tmp_path / "views/weights.npz"))["manifest"]
    assert list(manifest["accuracy"].values()) == [result["test_accuracy"]]
    percent = f"{100 * result['tta_accuracy']:.2f}"
    assert f"{percent}% with test-time augmentation flip_shift" in capsys.readouterr().out
    report = (tmp_path / "views/report.html").read_text()
    assert "With test-time augmentation" in report and f"{percent} %" in report


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16", "gradient_accumulation_steps": 2, "lookahead": 2, "ema": 0.5, "bias_factor": 64.0},
        {"dtype": "float64", "deterministic": True},
        {"engine": "keras", "bias_factor": 64.0},
    ],
    ids=lambda changes: changes.get("dtype", "keras"),
)
def test_ways_to_compute_a_run(changes, images, tmp_path, monkeypatch):
    """Each learns as float32 does: the losses of the first steps are the same within half precision's rounding."""
    kinds, create = set(), engine.create

    def noted(*arguments):
        made = create(*arguments)
        kinds.add(type(made).__module__)
        return made

    monkeypatch.setattr(engine, "create", noted)
    base = replace(
        cifar10.RECIPES["airbench_small"],
        data=images,
        max_train_samples=20,
        max_test_samples=10,
        epochs=1,
        batch_size=10,
        bias_factor=changes.get("bias_factor", 1.0),
    )
    losses = []
    try:
        for name, config in (("plain", base), ("changed", replace(base, **changes))):
            cifar10.main(replace(config, output_dir=str(tmp_path / name)))
            losses.append(json.loads((tmp_path / name / "trace.json").read_text())["step_losses"])
    finally:
        engine.configure("float32")
    limit = 1e-4 if changes.get("dtype") != "float16" else 0.1
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=limit)
    # Keras's own step can give the same losses bit for bit.
    assert losses[1] != losses[0] or changes.get("engine") == "keras"
    assert ("kvision.engine.keras" in kinds) is (changes.get("engine") == "keras")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 50, "gradient_accumulation_steps": 3}, "a batch of 50 images does not split into 3"),
        ({"engine": "keras", "gradient_accumulation_steps": 2}, "--gradient-accumulation-steps requires the native"),
        ({"engine": "keras", "data_on": "device"}, "--engine keras require images on the host"),
        ({"mixup": 0.2, "data_on": "device"}, "require images on the host: leave out --data-on device"),
        ({"steps_per_execution": 0}, "--steps-per-execution"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps must be at least 1"),
    ],
)
def test_accumulation_that_cannot_work_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        Config(**changes)


def test_mnist_falls_back_honestly(tmp_path, monkeypatch, capsys):
    """Without data and network, the digits of scikit-learn or drawn ones, and every file says so."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)
    from kvision.data import download

    (remote,) = download.REMOTES["mnist"]
    nowhere = replace(remote, url="http://127.0.0.1:9/mnist.npz")  # the discard port: refused at once
    monkeypatch.setitem(download.REMOTES, "mnist", (nowhere,))
    config = replace(
        mnist.RECIPES["softmax"],
        max_train_samples=500,
        max_test_samples=200,
        epochs=8,
        compile_cache="off",  # a folder in the changed KERAS_HOME would stay JAX's for the tests that follow
        output_dir=str(tmp_path / "run"),
    )
    result = mnist.main(config)
    assert result["dataset"] in ("digits", "synthetic_digits")
    assert result["test_accuracy"] > 0.5
    assert "mnist is not available" in capsys.readouterr().out
    for name in ("metrics.json", "report.html"):
        assert result["dataset"] in (tmp_path / "run" / name).read_text()


def test_transfer_runs_through(images, tmp_path, capsys):
    config = replace(
        transfer.RECIPE,
        model="airbench_small",
        data=images,
        max_train_samples=250,
        max_test_samples=100,
        per_class=10,
        source_epochs=1,
        epochs=1,
        unfreeze="stage3",
        unfreeze_epochs=1,
        hidden=None,
        output_dir=str(tmp_path / "transfer"),
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
                assert moved == name.startswith(("stage3", "logits")), name


def test_a_run_with_every_regularizer(images, tmp_path):
    """Each flag reaches its part, and what is scored and saved is the average of the weights."""
    config = Config(
        model="airbench_small",
        data=images,
        max_train_samples=300,
        max_test_samples=100,
        epochs=2,
        batch_size=50,
        learning_rate=0.05,
        bias_factor=4.0,
        l2=1e-4,
        orthogonal=1e-4,
        max_norm=0.5,
        clip_norm=1.0,
        ema=0.9,
        early_stopping=1,
        mixup=1.0,
        cutmix=1.0,
        random_erasing=0.5,
        label_smoothing=0.1,
        output_dir=str(tmp_path / "run"),
    )
    result = cifar10.main(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["validation_loss"])
    assert result["test_accuracy"] == pytest.approx(best["test_accuracy"])
    assert result["test_loss"] < best["test_loss"]  # without the penalties and the label smoothing
    with np.load(tmp_path / "run/weights.npz") as saved, np.load(newest(tmp_path / "run")) as stored:
        assert sum(name.startswith("best/") for name in stored.files) == sum(
            name.startswith("model/") for name in stored.files
        )
        kernel = saved["stage2_1_conv/kernel"]
        assert np.sqrt((kernel**2).sum(axis=(0, 1, 2))).max() <= 0.5 * (1 + 1e-5)
        assert any(np.array_equal(kernel, stored[name]) for name in stored.files if name.startswith("best/"))
        assert not any(np.array_equal(kernel, stored[name]) for name in stored.files if name.startswith("model/"))
    assert json.loads((tmp_path / "run/config.json").read_text())["ema"] == 0.9


def test_flags_make_the_optimizer():
    optimizer = build_optimizer(Config(ema=0.9, bias_factor=2.0, clip_norm=0.5, epochs=8), 10, {})
    assert type(optimizer) is EMA and optimizer.decay == 0.9
    assert type(optimizer.inner) is LearningRateMultipliers and optimizer.inner.inner.global_clipnorm == 0.5
    for share, start in ((0.25, 60), (0.99, 10), (0.01, 80)):
        optimizer = build_optimizer(Config(swa=share, epochs=8), 10, {})
        assert type(optimizer) is SWA and (optimizer.start, optimizer.every) == (start, 10)
    for steps, total in ((None, 80), (25, 25), (100, 80)):
        optimizer = build_optimizer(
            Config(lookahead=4, ema=0.9, bias_factor=2.0, epochs=8, max_steps=steps), 10, {}
        ).inner
        assert type(optimizer) is Lookahead and (optimizer.total, optimizer.every) == (total, 4)
        assert optimizer.decay == 0.95 and type(optimizer.inner) is LearningRateMultipliers
    assert build_optimizer(Config(lookahead=4, epochs=0), 10, {}).total == 1


def test_images_are_held_out_evenly():
    dataset = load("shapes10", log=lambda line: None).subset(train=205, seed=0)
    rest, (images, labels) = train_validation_split(dataset, 0.1, 0)
    assert np.bincount(labels, minlength=10).tolist() == [2] * 10 and len(rest.y_train) == 185
    whole = {image.tobytes() for image in dataset.x_train}
    kept, held = ({image.tobytes() for image in part} for part in (rest.x_train, images))
    assert kept | held == whole and not kept & held
    again = train_validation_split(dataset, 0.1, 0)[1][0]
    assert np.array_equal(again, images) and not np.array_equal(train_validation_split(dataset, 0.1, 1)[1][0], images)
    with pytest.raises(flags.UsageError, match="20 training images are too few to hold out 10% of each class"):
        train_validation_split(dataset.subset(train=20), 0.1, 0)


def test_mixed_batches_are_of_the_classes():
    dataset = load("shapes10", log=lambda line: None).subset(train=40, seed=0)
    plain = build_batches(Config(batch_size=20, cutout=4), dataset, build_preprocessing(dataset))
    mixed = build_batches(Config(batch_size=20, cutout=4, random_erasing=0.5), dataset, build_preprocessing(dataset))
    (images, labels), (erased, targets) = (next(one.epoch(0)).values() for one in (plain, mixed))
    assert targets.shape == (20, 10) and erased.shape == images.shape and labels.shape == (20,)


SMOKE = {"max_train_samples": 100, "max_test_samples": 50, "epochs": 2, "batch_size": 50, "eval_every": 1}


def test_regularize_writes_a_table_and_curves(images, tmp_path, capsys):
    """A row of each kind: by flag, by layer, with a part of the images held out."""
    config = regularize.RegularizeConfig(
        only="mixup,shake_shake,early_stopping",
        data=images,
        output_dir=str(tmp_path / "r"),
        **SMOKE,
    )
    result = regularize.main(config)
    rows = {row["regularizer"]: row for row in result["rows"]}
    assert list(rows) == ["none", "mixup", "shake_shake", "early_stopping"]
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "config.json",
        "metrics.json",
        "table.md",
        "report.html",
    }
    stored = json.loads((tmp_path / "r/metrics.json").read_text())
    assert stored == {key: value for key, value in result.items() if key != "folder"}
    for row in rows.values():
        last = row["history"][-1]
        assert row["gap"] == row["train_accuracy"] - row["test_accuracy"]
        if row["regularizer"] != "early_stopping":
            assert (last["train_accuracy"], last["test_accuracy"]) == (row["train_accuracy"], row["test_accuracy"])
    table = (tmp_path / "r/table.md").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == 6
    report = (tmp_path / "r/report.html").read_text()
    assert report.count("<svg") == 4 + 2 and "shake shake" in report and "http" not in report
    assert "--data ..." in stored["command"]


def test_the_rows_of_regularize_start_alike(images):
    """The same weights and the same first batch: without its regularizer each row's first loss would be the first's."""
    dataset = load("cifar10", images, log=lambda line: None).subset(train=50, test=10, seed=0)
    models = {
        name: regularize.network(dataset.input_shape, 10, row, seed=0)
        for name, row in regularize.ROWS.items()
        if row.layer or name == "none"
    }
    outputs = []
    for model in models.values():
        regularize.initialize(model, 0)
        outputs.append(regularize.engine.create(model).predict(dataset.x_test / np.float32(255)))
    assert len(outputs) == 7 and all(np.array_equal(output, outputs[0]) for output in outputs[1:-1])
    np.testing.assert_allclose(outputs[-1], outputs[0], rtol=1e-5, atol=1e-6)  # shake-shake's mean


def test_regularize_names_its_rows(capsys):
    assert regularize.command(["--only", "l2,l3"]) == 2
    assert "--only must be of none, l1, l2," in (error := capsys.readouterr().err) and "got l3" in error
    assert regularize.RegularizeConfig(only="l2,none,l2").rows() == ["none", "l2"]


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
        (["--dropout", "0.5", "--model", "resnet20"], "--dropout does not apply to resnet20; it applies to"),
        (["--ema", "1"], "--ema must be at least 0 and below 1"),
        (["--swa", "1"], "--swa must be above 0 and below 1"),
        (["--ema", "0.9", "--swa", "0.5"], "--ema and --swa both average the weights: give one"),
        (["--mixup", "0"], "--mixup must be a positive number, got 0"),
        (["--random-erasing", "2"], "--random-erasing must be from 0 to 1"),
        (["--max-norm", "-1"], "--max-norm must be a positive number"),
        (["--early-stopping", "0"], "--early-stopping must be at least 1"),
        (["--lookahead", "0"], "--lookahead must be at least 1"),
        (["--hidden", "5", "--model", "softmax"], "--hidden does not apply to softmax"),
        (["--optimizer", "sdg"], "invalid choice: 'sdg'"),
        (["--tta", "zoomed"], "--tta: invalid choice: 'zoomed'"),
        (["--lerning-rate", "1"], "unrecognized arguments"),
        (["--epoch", "1"], "unrecognized arguments"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--weights", "no_such.npz"], "no_such.npz"),
        (["--resume", "--output-dir", "no_such_run"], "found no run in no_such_run"),
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
    assert run_command("--output-dir", trained["folder"]) == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_refuses_other_flags(trained, capsys):
    assert run_command("--resume", "--output-dir", trained["folder"], "--seed", "7") == 2
    assert "--seed is 0 in the run to resume, not 7" in capsys.readouterr().err


def help_of(command, argv, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        command(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_all_names_every_flag_with_its_choices_and_default(capsys, monkeypatch):
    def show(argv):
        flags.parse(Config, argv, prog="x", description="", defaults=cifar10.RECIPES["airbench_small"])

    text = " ".join(help_of(show, ["--help", "all"], capsys, monkeypatch).split())
    for name in FLAGS:
        assert f"--{name} " in text or f"--[no-]{name} " in text
    for words in ("(default: 250)", "sgd, adam, adamw (default: sgd)", "(default: no clipping)", "(default: on)"):
        assert words in text
    assert "bias-factor" not in text
    with pytest.raises(SystemExit):
        show(["--help", "most"])


@pytest.mark.parametrize("app", ["cifar10", "mnist", "transfer", "regularize", "compare"])
def test_help_of_every_app_fits_on_a_screen(app, capsys, monkeypatch):
    module = importlib.import_module(f"apps.{app}")
    commands = {
        "regularize": lambda argv: module.command(argv),
        "compare": lambda argv: module.main(argv),
        "transfer": lambda argv: command(module.main, {"vgg11_bn": module.RECIPE}, module.__doc__, argv),
    }
    show = commands.get(app, lambda argv: command(module.main, module.RECIPES, module.__doc__, argv))
    lines = help_of(show, ["--help"], capsys, monkeypatch).splitlines()
    assert lines[0].startswith(f"usage: python -m apps.{app} ")
    assert len(lines) <= 54 and max(map(len, lines)) <= 120


def test_help_names_the_module_of_a_clone_and_of_an_installed_package(monkeypatch, tmp_path):
    assert flags.app_module("mnist") == "apps.mnist"
    (tmp_path / "apps").mkdir()
    monkeypatch.setattr(flags, "__file__", str(tmp_path / "flags.py"))
    assert flags.app_module("mnist") == "kvision.apps.mnist"
    running = SimpleNamespace(__spec__=SimpleNamespace(name="apps.mnist"))  # as `python -m apps.mnist` in a clone
    monkeypatch.setitem(sys.modules, "__main__", running)
    assert flags.app_module("mnist") == "apps.mnist"


def test_a_killed_run_resumes_to_the_same_weights(images, tmp_path):
    """SIGKILL while an epoch runs; the resumed run ends bit for bit as one that was left alone."""
    words = [sys.executable, "-m", "apps.cifar10", "--data", images, "--model", "mlp", "--hidden", "32"]
    words += ["--max-train-samples", "300", "--max-test-samples", "100", "--epochs", "12", "--batch-size", "50"]
    root = Path(__file__).parent.parent

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*words, *more], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ), text=True
        )

    whole = start("--output-dir", str(tmp_path / "whole"))
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    killed = start("--output-dir", str(tmp_path / "killed"))
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "weights.npz").exists(), "the run ended before it was killed: make it longer"

    resumed = subprocess.run(
        [sys.executable, "-m", "apps.cifar10", "--resume", "--output-dir", str(tmp_path / "killed")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    with np.load(newest(tmp_path / "whole")) as a, np.load(newest(tmp_path / "killed")) as b:
        assert a.files == b.files
        for name in a.files:
            if name != "manifest":
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 13))
