"""Runs that stop and go on: checkpoints at any step, signals, diverging, a full disk, Keras's callbacks."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import threading
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import ops

from apps import cifar10
from kvision.data.batches import Batches
from kvision.data.mixing import MixedBatches, Mixup, RandomErasing
from kvision.data.preprocessing import Preprocessing
from kvision.engine import HandedToKeras
from kvision.experiment import command
from kvision.flags import run_cli
from kvision.layers import logits, regularizers
from kvision.tasks.classification import Classification, cross_entropy, score
from kvision.training import evaluation, trainer
from kvision.training.averaging import EMA
from kvision.training.checkpoints import Checkpoints, State
from kvision.training.optimizers import make_optimizer
from kvision.training.shutdown import GracefulShutdown, Interrupted
from kvision.training.trainer import DivergedError, EarlyStopping, Execution, Schedule, fit
from kvision.weights import WeightsError
from kvision.weights.archive import write
from kvision.weights.initialization import initialize
from tests import kills
from tests.datasets import write_few
from tests.test_training import KilledError, everything, run, same, without_times

callbacks = keras.callbacks


def at_step(batches, number, act):
    """The batches, with a call of `act` before the batch of step `number`, from 1, is drawn."""
    inner = getattr(batches, "batches", batches)
    draw = inner.params

    def params(epoch, start=0):
        for step, drawn in enumerate(draw(epoch, start), start):
            if epoch * batches.steps + step + 1 == number:
                act()
            yield drawn

    inner.params = params
    return batches


def killed():
    raise KilledError


def softmax(seed=0):
    """Softmax regression on images of 6x6: nothing random in it."""
    inputs = keras.Input((6, 6, 3), name="image")
    model = keras.Model(inputs, logits(3)(keras.layers.Flatten()(inputs)), name="softmax")
    initialize(model, seed)
    return model


def noise(make_images, classes=3):
    """Batches of noise, 3 in an epoch, and other noise to validate on."""
    images, labels = make_images(12, 6, 6, classes=classes)
    return Batches(images, labels, 4, 1, Preprocessing(mean=(0.5,), std=(0.25,))), make_images(9, 6, 6, seed=2)


# Any step


def mixed(make_images, seed):
    """What has a state: dropout, batch norm, momentum, an average, mixed samples, the best epoch."""
    model, optimizer, batches = run(make_images, seed=seed)
    images, labels = make_images(13, 6, 6)
    held = images, (labels + 1) % 3  # the loss there soon rises, so that the best epoch is not the last
    options = {"evaluations": {"validation": held, "test": held}, "early_stopping": EarlyStopping(9)}
    return model, EMA(optimizer, 0.9), MixedBatches(batches, 3, [Mixup()], RandomErasing()), options


class Shy(callbacks.Callback):
    """Lowers the learning rate with each epoch's number of calls, which it tells in its own words alone."""

    def __init__(self):
        super().__init__()
        self.calls = iter(range(100))
        self.count = 0

    def on_train_begin(self, logs=None):
        self.count = 0

    def on_epoch_end(self, epoch, logs=None):
        self.count += 1
        self.model.optimizer.learning_rate = 0.1 / self.count

    def get_state(self):
        return {"told": np.array([self.count])}

    def set_state(self, state):
        self.count = int(state["told"][0])


def heard(make_images, seed):
    """Callbacks with a state, at a rate that they can set; the validation loss rises, so that they do."""
    model, batches = softmax(seed), noise(make_images)[0]
    images, labels = make_images(12, 6, 6)
    told = [
        callbacks.ReduceLROnPlateau(factor=0.5, patience=2, min_delta=0.01),
        callbacks.EarlyStopping(patience=3, restore_best_weights=True),
        callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        callbacks.History(),
    ]
    options = {"evaluations": {"validation": (images, (labels + 1) % 3)}, "callbacks": told}
    return model, keras.optimizers.Adam(0.01), batches, options


def shy(make_images, seed):
    model, (batches, _) = softmax(seed), noise(make_images)
    return model, keras.optimizers.SGD(0.05, momentum=0.9), batches, {"callbacks": [Shy()]}


@pytest.mark.parametrize("make", [mixed, heard, shy])
def test_a_run_goes_on_from_any_step(make_images, tmp_path, make):
    """Killed before some of its twelve steps, again and again; bit for bit, callbacks and losses included."""

    def train(seed=0, stop=None, folder=None, every=None):
        model, optimizer, batches, options = make(make_images, seed)
        batches = at_step(batches, stop, killed) if stop else batches
        options |= {"checkpoint": folder, "schedule": Schedule(eval_every=1, save_every=every)}
        history = fit(model, Classification(), optimizer, batches, epochs=4, **options)
        kept = [
            [getattr(callback, name, None) for name in ("history", "min_delta", "wait", "best")]
            for callback in options.get("callbacks", ())
        ]
        rates = [row["learning_rate"] for row in history.epochs]
        return everything(model, optimizer), without_times(history), history.step_losses, kept, rates

    whole = train()
    assert make is not heard or min(whole[-1]) < 0.01 * 0.9**4  # both have lowered the rate
    for every, stops in ((1, (4, 9)), (2, (8,))):
        folder = tmp_path / str(every)
        for stop in stops:
            with pytest.raises(KilledError):
                train(stop if folder.exists() else 0, stop, folder, every)
            assert len(list(folder.iterdir())) <= 3
        for _ in range(every):  # the second time there is nothing left to do
            found = train(99, None, folder, every)
            assert same(found[0], whole[0]) and found[1:] == whole[1:], every


def test_where_checkpoints_are_written(make_images, tmp_path):
    steps = lambda folder: sorted(int(path.stem[5:]) for path in folder.iterdir())  # noqa: E731
    for name, options, expected in (
        ("epochs", {}, [9, 12, 15]),
        ("two", {"save_every": 2}, [10, 12, 14, 15]),
        ("all", {"save_every": 1}, list(range(1, 16))),
        ("end", {"save_every": 100}, [15]),
    ):
        model, (batches, _) = softmax(), noise(make_images)
        folder = tmp_path / name
        checkpoints = Checkpoints(folder, keep={"two": 4, "all": 99}.get(name, 3))
        optimizer, plan = make_optimizer("sgd", 0.1), Schedule(**options)
        fit(model, Classification(), optimizer, batches, epochs=5, checkpoint=checkpoints, schedule=plan)
        assert steps(folder) == expected, name


@pytest.mark.parametrize("kind", ["Adam", "RMSprop", "Lion", "Muon"])
def test_kerass_optimizers_and_losses_go_on(make_images, tmp_path, kind):
    def train(stop=None, folder=None):
        model, (batches, _), optimizer = softmax(), noise(make_images), getattr(keras.optimizers, kind)(0.01)
        batches = at_step(batches, stop, killed) if stop else batches
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        history = fit(
            model,
            Classification(loss),
            optimizer,
            batches,
            epochs=2,
            checkpoint=folder,
            schedule=Schedule(save_every=1),
        )
        return everything(model, optimizer), history.step_losses

    whole, losses = train()
    with pytest.raises(KilledError):
        train(5, tmp_path / "run")
    found, again = train(None, tmp_path / "run")
    assert same(found, whole) and again == losses


# The folder


@pytest.fixture
def checkpoint(make_images, tmp_path):
    """A checkpoint as a run would write it, what is in it, and its state."""
    model, optimizer, batches = run(make_images)
    optimizer.build(model.trainable_variables)
    for i, variable in enumerate((*model.variables, *optimizer.variables)):
        variable.assign(ops.full(variable.shape, i + 1, dtype=variable.dtype))
    state = State(
        step=4,
        history={"epochs": [{"epoch": 1, "loss": 0.1}], "step_losses": [0.3, 0.2, 0.1], "compile_seconds": 0.25},
        totals={"loss": (np.float64(4 / 3), np.float64(4)), "accuracy": (np.float64(2), np.float64(4))},
        durations=[0.1],
        best=[np.full(tuple(v.shape), 7, np.float32) for v in model.variables],
        callbacks=[("Shy", {"a": (1, [2.5, None], {"b": np.arange(3), 4: "x"}), "c": float("-inf")})],
        batches=(batches.steps, batches.batch_size),
    )
    return Checkpoints(tmp_path / "run").write(model, optimizer, state), everything(model, optimizer), state


def test_a_checkpoint_comes_back(make_images, checkpoint):
    path, expected, state = checkpoint
    model, optimizer, _ = run(make_images, seed=5)
    optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(path.parent)
    read = checkpoints.read(model, optimizer, ["Shy"], (3, 4))
    assert path.name == "step-00000004.npz" and checkpoints.newest == path
    assert same(everything(model, optimizer), expected) and same(read.best, state.best)
    ((_, found),), ((_, wanted),) = read.callbacks, state.callbacks
    np.testing.assert_array_equal(found["a"][2].pop("b"), wanted["a"][2].pop("b"))
    assert found == wanted
    for name in ("step", "history", "totals", "durations", "stopped", "batches"):
        assert getattr(read, name) == getattr(state, name)
    first = path.read_bytes()
    wanted["a"][2]["b"] = np.arange(3)
    del found["a"][2][4], wanted["a"][2][4]  # the order of a dictionary's items counts
    wanted["a"][2][4] = "x"
    checkpoints.write(model, optimizer, state)
    assert len(path.read_bytes()) == len(first)


def test_layers_may_share_the_name_of_their_generators(tmp_path):
    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.5, name="a")(keras.layers.Dense(4, name="dense")(inputs))
    model = keras.Model(inputs, keras.layers.Dropout(0.5, name="b")(x))
    optimizer = make_optimizer("sgd", 0.1)
    optimizer.build(model.trainable_variables)
    states = [v for v in model.variables if "seed" in v.path]
    for i, variable in enumerate(states):
        variable.assign([i, 7])
    checkpoints, kept = Checkpoints(tmp_path), everything(model, optimizer)
    checkpoints.write(model, optimizer, State(step=1))
    for variable in states:
        variable.assign([9, 9])
    checkpoints.read(model, optimizer)
    assert len(states) == 2 and same(everything(model, optimizer), kept)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    path.write_bytes(damaged)


def text(path):
    path.write_text("not a checkpoint")


def nothing(path):
    path.write_bytes(b"")


def weights_file(path):
    write(path, {"conv/kernel": np.zeros(3, np.float32)})


def other_manifest(content):
    def change(path):
        with np.load(path) as stored:
            arrays = dict(stored)
        write(path, arrays | {"manifest": np.frombuffer(json.dumps(content).encode(), np.uint8)})

    return change


BROKEN = {
    "cut": (cut, ""),
    "flip": (flip, ""),
    "text": (text, ""),
    "empty": (nothing, ""),
    "weights": (weights_file, "is not a checkpoint of a training run"),
    "list": (other_manifest([]), "is not a checkpoint of a training run"),
    "format": (other_manifest({"format": "something else"}), "is not a checkpoint of a training run"),
    "step": (other_manifest({"format": "kvision-checkpoint"}), "is not a checkpoint of a training run"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_passed_over(make_images, checkpoint, kind):
    """For the one before it, with a warning that names both; it goes when the next is written."""
    newest, expected, state = checkpoint
    damage, message = BROKEN[kind]
    before = newest.with_name("step-00000002.npz")
    shutil.copy(newest, before)
    damage(newest)
    model, optimizer, _ = run(make_images, seed=5)
    optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(newest.parent, keep=2)
    with pytest.warns(RuntimeWarning, match=f"{newest}: .*{message}.*; passed over, the run goes on from {before}"):
        checkpoints.read(model, optimizer, ["Shy"])
    assert same(everything(model, optimizer), expected) and checkpoints.newest == before
    checkpoints.write(model, optimizer, dataclasses.replace(state, step=3))
    assert [path.name for path in checkpoints.files()] == ["step-00000002.npz", "step-00000003.npz"]


@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_goes_on_from_broken_checkpoints_alone(make_images, checkpoint, kind):
    newest, _, _ = checkpoint
    damage, message = BROKEN[kind]
    damage(newest)
    shutil.copy(newest, newest.with_name("step-00000002.npz"))
    refused(make_images, newest, {}, rf"{message}.*\(nor can step-00000002.npz\)", {})


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({"kind": "adam"}, {}, "not a checkpoint of net with this optimizer: only .* has optimizer/"),
        ({"width": 5}, {}, r"model/conv/kernel is float32 \(3, 3, 3, 4\), not float32 \(3, 3, 3, 5\)"),
        ({}, {"size": 5}, r"with \(steps an epoch, images a step\) \(3, 4\); this run has \(2, 5\)"),
        ({}, {"callbacks": []}, r"of a run with the callbacks \['Shy'\]; this run has \[\]"),
    ],
    ids=["optimizer", "width", "batches", "callbacks"],
)
def test_a_foreign_checkpoint_is_refused(make_images, checkpoint, network, options, message):
    refused(make_images, checkpoint[0], options, message, network)


def refused(make_images, newest, options, message, network):
    """`fit` ends before anything has changed."""
    model, optimizer, batches = run(make_images, **network)
    optimizer.build(model.trainable_variables)
    before, kept, options = everything(model, optimizer), newest.read_bytes(), {"callbacks": [Shy()], **options}
    if size := options.pop("size", None):
        batches = Batches(*make_images(13, 6, 6), size, 1, Preprocessing())
    with pytest.raises(WeightsError, match=f"^{newest}: .*{message}") as error:
        fit(model, Classification(), optimizer, batches, epochs=2, checkpoint=newest.parent, **options)
    assert "no run can go on from it" in str(error.value) and "start a new one in another folder" in str(error.value)
    assert same(everything(model, optimizer), before) and newest.read_bytes() == kept


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(make_images, tmp_path):
    def train(folder=None):
        model, optimizer, batches = run(make_images, width=0)
        fit(model, Classification(), optimizer, batches, epochs=2, checkpoint=folder, schedule=Schedule(save_every=2))
        return everything(model, optimizer)

    whole = train(tmp_path)
    cut(tmp_path / "step-00000006.npz")
    with pytest.warns(RuntimeWarning, match=r"step-00000006.npz: .*goes on from .*step-00000004.npz"):
        assert same(train(tmp_path), whole)
    assert same(train(tmp_path), whole)


def test_what_a_killed_write_left_is_removed(make_images, tmp_path):
    (tmp_path / ".step-00000003.npz.0a1b2c3d.tmp").write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("mine")
    model, optimizer, batches = run(make_images, width=0)
    fit(model, Classification(), optimizer, batches, epochs=1, checkpoint=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003.npz", "notes.txt"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (lambda: {"checkpoint": Checkpoints("run", keep=0)}, ValueError, "keep must be at least 1 checkpoint, got 0"),
        (lambda: {"schedule": Schedule(save_every=0)}, ValueError, "save_every must be at least 1 step, got 0"),
        (lambda: {"checkpoint": "file"}, WeightsError, "file: is a file; checkpoints want a folder"),
    ],
)
def test_bad_requests_are_named(make_images, tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    model, optimizer, batches = run(make_images, width=0)
    with pytest.raises(error, match=message):
        fit(model, Classification(), optimizer, batches, epochs=1, **{"checkpoint": tmp_path / "run", **options()})


# Signals


@pytest.mark.parametrize("step", [1, 5, 6])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_first(make_images, tmp_path, number, name, step):
    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    send = lambda: os.kill(os.getpid(), number)  # noqa: E731

    def train(stop=None, folder=None):
        model, optimizer, batches = run(make_images, width=0)
        batches = at_step(batches, stop, send) if stop else batches
        fit(
            model,
            Classification(),
            optimizer,
            batches,
            epochs=2,
            checkpoint=folder,
            evaluations={"test": make_images(9, 6, 6)},
            schedule=Schedule(eval_every=1),
        )
        return everything(model, optimizer)

    whole, folder = train(), tmp_path / "run"
    saved = folder / f"step-0000000{step}.npz"
    with pytest.raises(Interrupted, match=f"stopped by {name} after step {step} and saved as {saved}; --resume"):
        train(step, folder)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former
    assert sorted(folder.iterdir())[-1] == saved
    assert same(train(None, folder), whole)


def test_a_second_ctrl_c_ends_at_once(make_images, tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    model, optimizer, batches = run(make_images, width=0)
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(model, Classification(), optimizer, at_step(batches, 5, twice), epochs=2, checkpoint=tmp_path)
    assert type(stop.value) is KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.npz"]
    assert np.isfinite(everything(model, optimizer)[0]).all()  # the model can be looked at, on every backend


def test_a_run_without_checkpoints_leaves_signals_alone(make_images):
    seen = []
    model, optimizer, batches = run(make_images, width=0)
    batches = at_step(batches, 2, lambda: seen.append(signal.getsignal(signal.SIGINT)))
    fit(model, Classification(), optimizer, batches, epochs=1)
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_ignored_signals_stay_ignored_and_other_threads_listen_to_none():
    former, found = signal.signal(signal.SIGTERM, signal.SIG_IGN), []
    try:
        with GracefulShutdown():
            found.append(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, former)

    def elsewhere():
        with GracefulShutdown():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.SIG_IGN, signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Interrupted("stopped by Ctrl-C"), 75, "app: stopped by Ctrl-C"),
        (KeyboardInterrupt(), 130, "app: stopped; --resume continues from the last checkpoint"),
        (OSError(28, "No space left on device", "runs/x/report.html"), 2, "app: runs/x/report.html: No space left"),
        (DivergedError("the loss is nan"), 2, "app: the loss is nan"),
    ],
)
def test_what_ends_an_app_is_one_line_and_a_code(capsys, error, code, line):
    def raises():
        raise error

    assert run_cli("app", raises, (DivergedError,), Interrupted) == code
    assert capsys.readouterr().err.strip().startswith(line)


# Numbers that are no longer finite


def burst(make_images, step, **options):
    """Train with gradients that are not finite in one step, whose loss is."""
    images, labels = make_images(12, 6, 6)
    batches, plain = Batches(images, labels * 0, 4, 1, Preprocessing()), cross_entropy()
    draw = batches.epoch

    def epoch(epoch, start=0):
        for i, batch in enumerate(draw(epoch, start), start):
            yield batch | {"label": batch["label"] + np.int32(epoch * 3 + i + 1 == step)}

    def loss(labels, scores):
        marked = ops.cast(ops.max(labels), "float32")
        # The root's slope at 0 is infinite, and 0 times it not a number; elsewhere all this is 0.
        return plain(labels, scores) + ops.sqrt(ops.sum(scores * 0) + 1 - marked) - (1 - marked)

    batches.epoch = epoch
    model, optimizer, _ = run(make_images, width=0)
    fit(model, Classification(loss), optimizer, batches, epochs=2, **options)


@pytest.mark.parametrize(
    ("step", "every", "what", "last"),
    [
        (4, 5, "the loss is nan at step 5", None),
        (4, 1, "model/logits/(kernel|bias) is no longer finite after step 4", 3),
        (5, 5, "model/logits/(kernel|bias) is no longer finite after step 5", None),
        (3, None, "model/logits/(kernel|bias) is no longer finite after step 3", None),
        (6, None, "model/logits/(kernel|bias) is no longer finite after step 6", 3),
        (5, None, "the loss is nan at step 6", 3),
    ],
)
def test_nothing_that_is_not_finite_is_kept(make_images, tmp_path, step, every, what, last):
    """The loss of the step before a checkpoint is waited for, and the weights are looked at."""
    name = f"the last good checkpoint is {tmp_path}/step-0000000{last}.npz" if last else "no checkpoint was written"
    with pytest.raises(
        DivergedError, match=f"{what}; {name}.*; try a smaller --learning-rate, --clip-norm 1 or --dtype"
    ):
        burst(make_images, step, checkpoint=tmp_path, schedule=Schedule(save_every=every))
    for path in tmp_path.iterdir():
        with np.load(path) as stored:
            assert all(np.isfinite(stored[key]).all() for key in stored.files), path
        assert int(path.stem[5:]) <= (last or 0)


def test_terminate_on_nan_ends_the_run(make_images, tmp_path):
    """Without an error, as in Keras, and without a checkpoint."""
    ends = []
    told = [callbacks.TerminateOnNaN(), callbacks.LambdaCallback(on_train_end=lambda logs: ends.append("end"))]
    burst(make_images, 4, checkpoint=tmp_path, callbacks=told)
    assert ends == ["end"] and [path.name for path in tmp_path.iterdir()] == ["step-00000003.npz"]
    with pytest.raises(RuntimeError, match="NaN or Inf loss"):
        burst(make_images, 4, callbacks=[callbacks.TerminateOnNaN(raise_error=True)])


# A full disk


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_few(tmp_path_factory.mktemp("data") / "few.npz")


def app(images, folder, *more):
    words = [
        "--data",
        images,
        "--model",
        "softmax",
        "--max-train-samples",
        "200",
        "--max-test-samples",
        "50",
        "--batch-size",
        "50",
    ]
    return command(cifar10.main, cifar10.RECIPES, "", [*words, "--epochs", "2", "--output-dir", str(folder), *more])


def weights(folder):
    with np.load(folder / "weights.npz") as stored:
        return [stored[name] for name in stored.files if name != "__manifest__"]


def last_line(capsys):
    """What stderr ends with, below the lines of the epochs."""
    *epochs, line = capsys.readouterr().err.strip().splitlines()
    assert all(other.startswith("epoch ") for other in epochs if other), epochs
    return line


def act_in_app(monkeypatch, step, act):
    """`act` is called before the app's step with this number, once."""
    made = Batches.__init__

    def init(self, *arguments, **options):
        made(self, *arguments, **options)
        at_step(self, step, lambda: (monkeypatch.setattr(Batches, "__init__", made), act()))

    monkeypatch.setattr(Batches, "__init__", init)


def test_an_app_survives_a_full_disk(images, tmp_path, monkeypatch, capsys):
    """The system refuses files as large as a checkpoint: one line says what is left, nothing half-written stays, and
    with room again the run ends as it would have."""
    resource = pytest.importorskip("resource")
    assert app(images, tmp_path / "whole") == 0
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, former[1]))  # noqa: E731
    folder = tmp_path / "run"
    act_in_app(monkeypatch, 7, full)
    capsys.readouterr()
    try:
        code = app(images, folder, "--save-every", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    error = last_line(capsys)
    left = folder / "checkpoints"
    assert code == 2
    for part in (
        "step-00000008.npz: cannot be written: File too large",
        f"the last checkpoint, {left}/step-00000006.npz",
    ):
        assert part in error
    assert "is intact: --resume goes on from it" in error
    assert [path.name for path in sorted(left.iterdir())] == ["step-00000003.npz", "step-00000006.npz"]
    assert not list(folder.rglob(".*"))
    assert command(cifar10.main, cifar10.RECIPES, "", ["--resume", "--output-dir", str(folder)]) == 0
    assert same(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.json", "report.html"])
def test_an_app_names_the_file_that_the_disk_refused(images, tmp_path, monkeypatch, capsys, name):
    replace = os.replace

    def refuse(source, target):
        if os.fspath(target).endswith(name):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)
    assert app(images, tmp_path / "run") == 2
    line = last_line(capsys)
    assert f"{tmp_path / 'run' / name}: No space left on device" in line
    assert "intact" in line or name != "metrics.jsonl"
    assert not list(tmp_path.rglob(".*"))


def test_an_app_ends_with_75_where_it_saved(images, tmp_path, monkeypatch, capsys):
    """SIGTERM and --resume; a folder without a checkpoint starts at its beginning, and says so."""
    assert app(images, tmp_path / "whole") == 0
    folder = tmp_path / "run"
    act_in_app(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert app(images, folder) == 75  # EX_TEMPFAIL: neither done nor failed
    line = last_line(capsys)
    saved = folder / "checkpoints" / "step-00000002.npz"
    assert f"stopped by SIGTERM after step 2 and saved as {saved}; --resume continues from there" in line
    assert not (folder / "weights.npz").exists()
    saved.unlink()
    (folder / ".metrics.jsonl.x1y2.tmp").touch()  # what SIGKILL may leave
    assert command(cifar10.main, cifar10.RECIPES, "", ["--resume", "--output-dir", str(folder)]) == 0
    assert f"{folder / 'checkpoints'} has no checkpoint: the run starts at step 0" in capsys.readouterr().out
    assert same(weights(folder), weights(tmp_path / "whole")) and not list(folder.rglob(".*"))


# Keras's callbacks


class Recorder(callbacks.Callback):
    """What was called, with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_begin(self, logs=None):
        self.calls.append(("train begin", self.params["epochs"], self.params["steps"]))

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(("epoch begin", epoch))

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append(("batch begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append(("batch end", batch, dict(logs)))

    def on_test_begin(self, logs=None):
        self.calls.append(("test begin",))

    def on_test_batch_begin(self, batch, logs=None):
        self.calls.append(("test batch begin", batch))

    def on_test_batch_end(self, batch, logs=None):
        self.calls.append(("test batch end", batch, logs["loss"]))

    def on_test_end(self, logs=None):
        self.calls.append(("test end", dict(logs)))

    def on_epoch_end(self, epoch, logs=None):
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.calls.append(("epoch end", epoch, dict(logs), rate, self.model.get_weights()[0].sum()))

    def on_train_end(self, logs=None):
        self.calls.append(("train end", dict(logs), self.model.get_weights()[0].sum()))


class Shown(keras.utils.PyDataset):
    """Our batches to Keras's `fit`."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.number = batches, -1  # Keras looks at a batch first, and calls that an epoch

    def __len__(self):
        return self.batches.steps

    def __getitem__(self, step):
        return tuple(next(self.batches.epoch(max(0, self.number), step)).values())

    def on_epoch_end(self):
        self.number += 1


class Halve(callbacks.Callback):
    """Halves the learning rate after the second step."""

    steps = 0

    def on_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == 2:
            self.model.optimizer.learning_rate = 0.05


TOLD = {
    "none": lambda: [],
    "plateau": lambda: [callbacks.ReduceLROnPlateau(factor=0.5, patience=1, min_delta=0.001)],
    "early stopping": lambda: [callbacks.EarlyStopping("val_accuracy", patience=2, restore_best_weights=True)],
    "metric": lambda: [callbacks.EarlyStopping("val_top", patience=2, restore_best_weights=True)],
    "schedule": lambda: [callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (epoch + 1))],
    "batches": lambda: [Halve()],
    "ema": lambda: [],
    "ema, scaled": lambda: [],
    "ema, swapped": lambda: [callbacks.SwapEMAWeights()],
    "ema, swapped at an epoch's end": lambda: [callbacks.SwapEMAWeights(swap_on_epoch=True)],
    "other loss": lambda: [callbacks.EarlyStopping(patience=1)],
}


@pytest.mark.parametrize("kind", TOLD)
def test_callbacks_hear_what_keras_tells_them(make_images, kind):
    """The same calls, logs, rates and weights as in Keras's own `fit` of the same batches."""
    images, labels = make_images(12, 6, 6)
    held, wrong = images, np.where(np.arange(12) % 2, labels, (labels + 1) % 3)  # the loss there rises soon
    prepare, found = Preprocessing(mean=(0.5,), std=(0.25,)), []
    for ours in (False, True):
        model, recorder, told = softmax(), Recorder(), TOLD[kind]()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.5, use_ema="ema" in kind, ema_momentum=0.5)
        if kind == "ema, scaled":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
        batches = Batches(images, labels, 4, 1, prepare)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if kind == "other loss":  # and a penalty, both part of val_loss
            regularizers.add_regularizer(model, keras.regularizers.L2(0.1))
            loss = lambda labels, logits, plain=loss: 2 * plain(labels, logits)  # noqa: E731
        metrics = [keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")]
        if ours:
            options = {"evaluations": {"validation": (held, wrong)}, "callbacks": [*told, recorder]}
            fit(model, Classification(loss, metrics=metrics), optimizer, batches, epochs=6, **options)
        else:
            model.compile(optimizer, loss, metrics=["accuracy", *metrics])
            options = {"validation_data": (prepare(held), wrong), "callbacks": [*told, recorder], "verbose": 0}
            model.fit(Shown(batches), epochs=6, shuffle=False, validation_batch_size=4, **options)
        found.append(recorder.calls)
    keras_calls, our_calls = found
    assert [call[:2] if len(call) > 2 else call[:1] for call in our_calls if call[0] != "train end"] == [
        call[:2] if len(call) > 2 else call[:1] for call in keras_calls if call[0] != "train end"
    ]
    for ours, theirs in zip(our_calls, keras_calls, strict=True):
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-5), ours[:2]
    ended = {"early stopping": (3, 5), "metric": (3, 5), "other loss": (2, 5)}.get(kind, (6, 6))
    assert ended[0] <= sum(call[0] == "epoch end" for call in our_calls) <= ended[1]


def test_callbacks_write_files(make_images, tmp_path):
    """ModelCheckpoint, whole and weights alone, after epochs and steps; CSVLogger, which goes on after a stop."""

    logger = []

    def train(stop=None):
        model, (batches, held) = softmax(), noise(make_images)
        batches = at_step(batches, stop, killed) if stop else batches
        told = [
            callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), save_best_only=True),
            callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True),
            callbacks.ModelCheckpoint(
                str(tmp_path / "step{epoch}-{batch}.weights.h5"), save_weights_only=True, save_freq=2
            ),
            callbacks.CSVLogger(str(tmp_path / "log.csv"), append=True),
        ]
        logger.append(told[-1])
        options = {"evaluations": {"test": held}, "callbacks": told, "checkpoint": tmp_path / "run"}
        options["schedule"] = Schedule(eval_every=1, save_every=1)
        history = fit(model, Classification(), keras.optimizers.SGD(0.1), batches, epochs=3, **options)
        return model, history

    with pytest.raises(KilledError):
        train(6)
    logger[0].csv_file.close()  # as the end of a process does
    model, history = train()
    losses = [row["test_loss"] for row in history.epochs]
    best, last = keras.models.load_model(tmp_path / "best.keras"), softmax(9)
    assert best.optimizer.variables and best.loss.get_config() == cross_entropy().get_config()
    steps = int(ops.convert_to_numpy(best.optimizer.iterations))
    assert steps == 3 * (1 + losses.index(min(losses)))
    last.load_weights(tmp_path / "3.weights.h5")
    assert same([np.array(w) for w in last.get_weights()], [np.array(w) for w in model.get_weights()])
    scores = evaluation.predict(
        trainer.engines.create(best), noise(make_images)[1][0], noise(make_images)[0].preprocessing
    )
    assert score(scores, noise(make_images)[1][1])["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert {path.name for path in tmp_path.glob("step*")} == {
        "step1-2.weights.h5",
        "step2-1.weights.h5",
        "step2-3.weights.h5",
        "step3-2.weights.h5",
    }
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(losses)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]


def test_metrics_are_scored_with_every_image_set(make_images):
    model, (batches, held) = softmax(), noise(make_images)
    other = make_images(15, 6, 6, seed=3)
    top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")
    history = fit(
        model,
        Classification(metrics=[top]),
        make_optimizer("sgd", 0.1),
        batches,
        epochs=2,
        evaluations={"test": held, "o": other},
        schedule=Schedule(eval_every=1),
    )
    runner = trainer.engines.create(model)
    for name, (images, labels) in (("test", held), ("o", other)):
        scores = evaluation.predict(runner, images, batches.preprocessing)
        rank = (scores > scores[np.arange(len(labels)), labels][:, None]).sum(axis=1)
        assert history.epochs[-1][f"{name}_top"] == pytest.approx((rank < 2).mean())
    with pytest.raises(
        ValueError, match="metrics must have names of their own, other than loss and accuracy; got accuracy"
    ):
        taken = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        fit(model, Classification(metrics=[taken]), make_optimizer("sgd", 0.1), batches, epochs=1)


def test_metrics_of_an_epoch_survive_a_stop(make_images, tmp_path):
    """They are of all images that the epoch has shown, before and after the stop; of targets they see the largest."""

    def train(stop=None, **options):
        model, (batches, held) = softmax(), noise(make_images)
        batches = at_step(batches, stop, killed) if stop else batches
        top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")
        options |= {"evaluations": {"test": held}, "schedule": Schedule(eval_every=1, save_every=1)}
        return fit(model, Classification(metrics=[top]), make_optimizer("sgd", 0.1), batches, epochs=2, **options)

    with pytest.raises(KilledError):
        train(6, checkpoint=tmp_path)
    again, whole = train(checkpoint=tmp_path), train()
    keys = "top", "test_top", "accuracy", "loss"
    assert [[row[key] for key in keys] for row in again.epochs] == [[row[key] for key in keys] for row in whole.epochs]
    model, (batches, _) = softmax(), noise(make_images)
    mean = keras.metrics.SparseCategoricalAccuracy(name="mean")
    mixed = MixedBatches(batches, 3, [Mixup()])
    history = fit(model, Classification(metrics=[mean]), make_optimizer("sgd", 0.1), mixed, epochs=1)
    assert history.epochs[0]["mean"] == pytest.approx(history.epochs[0]["accuracy"])


@pytest.mark.parametrize("kind", ["native", "keras"])
def test_metrics_are_those_of_the_steps(make_images, kind):
    model, (batches, _) = softmax(), noise(make_images)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="measured")
    task, execution = Classification(metrics=[accuracy]), Execution(engine=kind)
    history = fit(model, task, make_optimizer("sgd", 0.1), batches, epochs=2, execution=execution)
    for row in history.epochs:
        assert row["measured"] == pytest.approx(row["accuracy"])


class Halved(keras.Model):
    """Shows itself images of half the contrast."""

    def train_step(self, *arguments):
        x, y, *rest = arguments[-1]
        return super().train_step(*arguments[:-1], (0.5 * x, y, *rest))


def test_a_step_of_its_own_is_kerass_to_take(make_images):
    """With a warning, and the same as Keras's engine asked for by name."""
    found = []
    for kind in ("native", "keras"):
        model = softmax()
        model = Halved(model.inputs[0], model.outputs[0])
        batches, _ = noise(make_images)
        with pytest.warns(HandedToKeras, match="its class overrides train_step") if kind == "native" else nullcontext():
            history = fit(
                model, Classification(), make_optimizer("sgd", 0.1), batches, epochs=2, execution=Execution(engine=kind)
            )
        found.append(([row["loss"] for row in history.epochs], model.get_weights()[0]))
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])
    plain, (batches, _) = softmax(), noise(make_images)
    fit(plain, Classification(), make_optimizer("sgd", 0.1), batches, epochs=2)
    assert abs(plain.get_weights()[0] - found[0][1]).max() > 1e-3


def test_keras_s_backup_is_refused(make_images, tmp_path):
    model, (batches, _) = softmax(), noise(make_images)
    with pytest.raises(ValueError, match=r"give fit\(checkpoint=FOLDER\) instead"):
        told = [callbacks.BackupAndRestore(str(tmp_path))]
        fit(model, Classification(), make_optimizer("sgd", 0.1), batches, epochs=1, callbacks=told)


def test_an_average_is_no_matter_of_the_callbacks(make_images):
    """They see the weights in training, and at the end the average."""
    model, (batches, held) = softmax(), noise(make_images)
    optimizer, seen = EMA(make_optimizer("sgd", 0.1), 0.9), []
    look = lambda: seen.append(np.array(model.get_weights()[0]))  # noqa: E731
    told = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: look(), on_train_end=lambda logs: look())
    fit(
        model,
        Classification(),
        optimizer,
        batches,
        epochs=1,
        callbacks=[told],
        evaluations={"test": held},
        schedule=Schedule(eval_every=1),
    )
    twin = softmax()
    fit(twin, Classification(), make_optimizer("sgd", 0.1), batches, epochs=1)
    assert np.array_equal(seen[0], twin.get_weights()[0]) and not np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[1], model.get_weights()[0])


# Many kills


def test_a_run_killed_again_and_again_ends_as_one_left_alone(tmp_path):
    """Three of the kills of `python -m tests.kills`, which has fifty; at least one in the midst of a write."""
    record = kills.run(tmp_path, 3, log=lambda line: None)
    assert record["identical"], record
    assert record["aimed_at_a_write"] >= 1
