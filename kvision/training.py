"""Epochs, learning rates and checkpoints."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
from keras import ops

from kvision import engine as floors
from kvision.data.batches import Batches
from kvision.data.preprocessing import Preprocessing
from kvision.tasks.classification import score
from kvision.tracking.environment import seconds_since_process_start
from kvision.tracking.progress import Progress
from kvision.weights.archive import Archive, WeightsError, write

SCHEDULES = ("constant", "cosine", "linear", "steps")
OPTIMIZERS = ("sgd", "adam", "adamw")
TRACED_STEPS = 50  # how many step losses a run keeps, for comparing backends

DIVERGED = "try a smaller --learning-rate, or --dtype float32; the last checkpoint is intact"


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@keras.saving.register_keras_serializable("kvision")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """A straight line up to `peak` in `warmup` steps, then down to 0 at `total`, straight or along half a cosine.

    Args:
        start: the first step's share of `peak`.
        kind: "linear", "cosine" or "constant" (no way down).
    """

    def __init__(self, peak: float, total: int, warmup: int = 0, start: float = 0.2, kind: str = "linear"):
        if kind not in ("linear", "cosine", "constant"):
            raise ValueError(f"a schedule goes down 'linear', 'cosine' or not ('constant'), got {kind!r}")
        self.peak, self.total, self.warmup, self.start, self.kind = peak, total, warmup, start, kind

    def __call__(self, step):
        step = ops.cast(step, keras.config.floatx())
        up = self.start + (1 - self.start) * step / max(1, self.warmup)
        left = ops.clip((self.total - step) / max(1, self.total - self.warmup), 0.0, 1.0)
        if self.kind == "cosine":
            left = 0.5 - 0.5 * ops.cos(math.pi * left)
        down = ops.ones_like(left) if self.kind == "constant" else left
        return self.peak * ops.where(step < self.warmup, up, down)

    def get_config(self):
        names = ("peak", "total", "warmup", "start", "kind")
        return {name: getattr(self, name) for name in names}


def schedule(kind: str, peak: float, total: int, warmup: float = 0.0):
    """The learning rate over `total` steps.

    Args:
        kind: "constant"; "linear" or "cosine", down to 0 at the end; "steps", a tenth after half of the steps and a
            hundredth after three quarters (He et al. 2015, section 4.2).
        peak: the largest rate.
        warmup: the share of the steps in which the rate rises to `peak`, from a fifth of it.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if kind == "steps":
        boundaries = [total // 2 - 1, total * 3 // 4 - 1]  # the last step of each part
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, [peak, peak / 10, peak / 100])
    return WarmUp(peak, total, round(warmup * total), kind=kind)


def make_optimizer(
    name: str, learning_rate, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> keras.optimizers.Optimizer:
    """A Keras optimizer whose decoupled weight decay leaves biases and batch norms alone.

    Args:
        name: "sgd" (with Nesterov momentum), "adam" or "adamw" (the same with weight decay).
        learning_rate: a number or a Keras schedule.
        weight_decay: each step takes `learning_rate * weight_decay` of every kernel away.
    """
    decay = weight_decay or None
    if name == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    elif name in ("adam", "adamw"):
        optimizer = keras.optimizers.Adam(learning_rate, beta_1=momentum, weight_decay=decay)
    else:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if decay:
        # The pattern meets "gamma", or "stage1_bn/gamma:0" on TensorFlow.
        optimizer.exclude_from_weight_decay(var_names=["(^|/)(bias|gamma|beta)(:0)?$"])
    return optimizer


def predict(engine, images: np.ndarray, preprocessing: Preprocessing, batch_size: int = 500) -> np.ndarray:
    """Logits (n, classes) of uint8 images (n, h, w, c); the last batch is filled up, so that one shape is compiled."""
    batch_size = min(batch_size, len(images))
    logits = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)])
        logits.append(engine.predict(preprocessing(batch))[: batch_size - missing])
    return np.concatenate(logits).astype(np.float32)


@dataclass
class History:
    """What a training run has seen.

    Attributes:
        epochs: a dictionary an epoch: epoch (from 1), loss and accuracy on the training images as shown, learning_rate,
            seconds, images_per_second (of a median step); test_loss and test_accuracy where a test set was given.
        step_losses: the losses of the first steps.
        seconds_to_first_step: from the start of the process to the end of the first step, seconds.
        compile_seconds: what the first step took beyond a median one, seconds.
    """

    epochs: list[dict] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    seconds_to_first_step: float | None = None
    compile_seconds: float | None = None


def _names(model, optimizer) -> list[str]:
    # Keras numbers optimizers and generators on through the whole process ("sgd_1", "seed_generator_3"): no part of it.
    return [re.sub(r"_\d+/", "/", v.path, count=1) for v in (*model.variables, *optimizer.variables)]


def save_checkpoint(path: Path, model, optimizer, history: History) -> None:
    """Write everything that a run needs to go on into one npz file, whole or not at all."""
    arrays = {f"model/{i:04d}": ops.convert_to_numpy(v.value) for i, v in enumerate(model.variables)}
    arrays |= {f"optimizer/{i:04d}": ops.convert_to_numpy(v.value) for i, v in enumerate(optimizer.variables)}
    names = _names(model, optimizer)
    manifest = {"format": "kvision-checkpoint", "names": names, "history": vars(history)}
    arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    write(path, arrays)


def load_checkpoint(path: Path, model, optimizer) -> History:
    """Set model and optimizer to the state of a checkpoint; returns the history until then.

    Raises:
        kvision.weights.WeightsError: the file is broken, or of another network or optimizer. Nothing was changed.
    """
    with Archive(path) as archive:
        arrays = {key: archive.read(key) for key in archive.members}
    try:
        manifest = json.loads(bytes(arrays.pop("manifest")))
    except (KeyError, ValueError):
        raise WeightsError(f"{path}: not a checkpoint of a training run") from None
    variables = [*model.variables, *optimizer.variables]
    keys = [f"model/{i:04d}" for i in range(len(model.variables))]
    keys += [f"optimizer/{i:04d}" for i in range(len(optimizer.variables))]
    names = _names(model, optimizer)
    if not isinstance(manifest, dict):
        manifest = {}
    if manifest.get("format") != "kvision-checkpoint" or set(arrays) != set(keys) or manifest.get("names") != names:
        raise WeightsError(f"{path}: not a checkpoint of {model.name} with this optimizer")
    for key, variable in zip(keys, variables, strict=True):
        if arrays[key].shape != tuple(variable.shape):
            raise WeightsError(f"{path}: {variable.path} has shape {arrays[key].shape}, not {tuple(variable.shape)}")
    for key, variable in zip(keys, variables, strict=True):
        variable.assign(arrays[key])
    return History(**manifest["history"])


def fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: Callable,
    batches: Batches,
    *,
    epochs: int,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    test_every: int = 1,
    steps: int | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[History], None] = lambda history: None,
    label: str = "epoch",
) -> History:
    """Train for `epochs` epochs, or until `steps` steps.

    Args:
        loss: `loss(labels, logits)`, a scalar tensor; penalties on weights (`model.losses`) are added to it.
        test: uint8 images and integer labels to score after every `test_every` epochs.
        checkpoint: file that is written after every epoch; where it exists, the run goes on from it and ends with the
            weights of an uninterrupted one.
        on_epoch: called after every epoch (and once on resumption) with the history so far.

    Returns:
        The history; the model and the optimizer hold the final state.

    Raises:
        DivergedError: the loss became infinite or not a number; the message says at which step.
        kvision.weights.WeightsError: the checkpoint is not of this run.
    """
    optimizer.build(model.trainable_variables)
    history = History()
    if checkpoint is not None and checkpoint.exists():
        history = load_checkpoint(checkpoint, model, optimizer)
        on_epoch(history)
    engine = floors.create(model, optimizer, loss)
    total = min(epochs * batches.steps, steps or math.inf)
    first_step_seconds, durations = None, []
    for epoch in range(len(history.epochs), math.ceil(total / batches.steps)):
        count = min(batches.steps, total - epoch * batches.steps)
        losses, hits, started = [], [], time.perf_counter()
        with Progress(count, f"{label} {epoch + 1}/{math.ceil(total / batches.steps)}") as progress:
            clock = started
            try:
                for step, (images, labels) in zip(range(count), batches.epoch(epoch), strict=False):
                    value, correct = engine.train_step(images, labels)
                    losses.append(value)
                    hits.append(correct)
                    if first_step_seconds is None:
                        float(value)  # waits for the device
                        first_step_seconds = time.perf_counter() - clock
                        if history.seconds_to_first_step is None:
                            history.seconds_to_first_step = seconds_since_process_start()
                    # The last step's loss is read, not this one's: the device always has work.
                    latest = float(losses[max(0, step - 1)])
                    if not math.isfinite(latest):
                        at = epoch * batches.steps + max(1, step)
                        raise DivergedError(f"the loss is {latest} at step {at}: {DIVERGED}")
                    now = time.perf_counter()
                    durations.append(now - clock)
                    clock = now
                    progress.update(step + 1, (step + 1) * batches.batch_size, latest)
            finally:
                engine.push()  # after an error or Ctrl-C too: until then JAX's variables are empty
            losses = [float(value) for value in losses]
            seconds = time.perf_counter() - started
            row = {
                "epoch": epoch + 1,
                "loss": float(np.mean(losses)),
                "accuracy": sum(int(correct) for correct in hits) / (count * batches.batch_size),
                "learning_rate": float(ops.convert_to_numpy(optimizer.learning_rate)),
                "seconds": seconds,
                "images_per_second": batches.batch_size / float(np.median(durations[-count:])),
            }
            if not math.isfinite(row["loss"]):
                raise DivergedError(f"the loss is {losses[-1]} at the end of epoch {epoch + 1}: {DIVERGED}")
            if test is not None and (epoch + 1) % test_every == 0:
                result = score(predict(engine, test[0], batches.preprocessing), test[1])
                row |= {"test_loss": result["loss"], "test_accuracy": result["accuracy"]}
            progress.close(describe(row, math.ceil(total / batches.steps)))
        history.step_losses += losses[: TRACED_STEPS - len(history.step_losses)]
        if history.compile_seconds is None:
            history.compile_seconds = max(0.0, first_step_seconds - float(np.median(durations)))
        history.epochs.append(row)
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimizer, history)
        on_epoch(history)
    return history


def describe(row: dict, epochs: int) -> str:
    """An epoch's row of the history as one line for a terminal or a log."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}", f"accuracy {row['accuracy']:.2%}"]
    if "test_accuracy" in row:
        parts += [f"test loss {row['test_loss']:.4f}", f"test accuracy {row['test_accuracy']:.2%}"]
    parts += [f"{row['images_per_second']:,.0f} images/s", f"{row['seconds']:.1f} s"]
    return "  ".join(parts)
