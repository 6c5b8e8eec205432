"""Epochs, early stopping, and runs that stop and go on."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
from keras import ops

from kvision import engine as engines
from kvision.data.batches import Batches
from kvision.data.device import DeviceDataset
from kvision.layers.norm import batch_statistics_model, update_bn
from kvision.report.environment import seconds_since_process_start
from kvision.report.progress import Progress
from kvision.tasks.classification import score
from kvision.training.averaging import Lookahead, WeightAverage
from kvision.training.callbacks import Callbacks, logs_of
from kvision.training.checkpoints import Checkpoints, NotFiniteError, State
from kvision.training.evaluation import Scorer, evaluate
from kvision.training.shutdown import GracefulShutdown, Interrupted

DATA_ON = ("auto", "host", "device")
STEPS_PER_EXECUTION = 50  # on an accelerator
DEVICE_BYTES = 2**30  # of uint8 training images that "auto" keeps on the device; CIFAR-10 has 240 MB with its border
TRACED_STEPS = 50  # how many step losses a run keeps, for comparing backends
# Enough for batch norm's statistics: Wu and Johnson 2021, https://arxiv.org/abs/2105.07576, want 1,000 to 10,000.
RECALIBRATION_IMAGES = 10_000

DIVERGED = "try a smaller --learning-rate, --clip-norm 1 or --dtype float32"


class DivergedError(RuntimeError):
    """The loss or a weight is no longer a finite number. The message names the step, the last good checkpoint and what
    to try."""


@dataclass(frozen=True)
class EarlyStopping:
    """Stop where the loss on validation images has not fallen for some epochs; the best epoch's weights come back
    (Prechelt 1998, https://doi.org/10.1007/3-540-49430-8_3).

    Args:
        patience: how many epochs without improvement end the run.
        min_delta: an improvement is a fall by more than this, in nats.

    Raises:
        ValueError: a patience below 1, a negative `min_delta`.
    """

    patience: int
    min_delta: float = 0.0

    def __post_init__(self):
        if self.patience < 1 or self.min_delta < 0:
            raise ValueError(
                "early stopping wants a patience of at least 1 and no negative min_delta, "
                f"got {self.patience} and {self.min_delta}"
            )

    def best(self, epochs: list[dict]) -> int:
        """The place of the best epoch in a history that has one."""
        best = 0
        for i, row in enumerate(epochs):
            if row["validation_loss"] < epochs[best]["validation_loss"] - self.min_delta:
                best = i
        return best

    def over(self, epochs: list[dict]) -> bool:
        """Whether a run with this history ends here."""
        return bool(epochs) and len(epochs) - 1 - self.best(epochs) >= self.patience


@dataclass
class History:
    """What a training run has seen.

    Attributes:
        epochs: a dictionary an epoch: epoch (from 1), loss and accuracy on the training images as shown, learning_rate,
            seconds, images_per_second (of a median step); test_loss and test_accuracy where a test set was given,
            validation_loss and validation_accuracy where validation images were.
        step_losses: the losses of the first steps.
        seconds_to_first_step: from the start of the process to the end of the first step, or of the first program of
            several steps, seconds.
        compile_seconds: what that took beyond median steps, seconds.
    """

    epochs: list[dict] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    seconds_to_first_step: float | None = None
    compile_seconds: float | None = None


def values(variables) -> list[np.ndarray]:
    """Copies of what variables hold."""
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]


def assign(variables, values: list[np.ndarray]) -> None:
    """Set variables to values in the same order."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class _Average:
    """Puts the averaged weights into a model, with the statistics that its batch norms have under them."""

    def __init__(self, model, optimizer, batches: Batches):
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.count = math.ceil(RECALIBRATION_IMAGES / batches.batch_size)
        statistics = batch_statistics_model(model)
        self.engine = statistics and engines.create(statistics)

    def put(self, epoch: int) -> None:
        assign(self.optimizer._trainable_variables, values(self.optimizer.averages))
        if self.engine:
            shown = itertools.islice(self.batches.epoch(epoch), self.count)
            update_bn(self.model, [self.engine.predict(images) for images, _ in shown])

    @contextmanager
    def inside(self, epoch: int) -> Iterator[None]:
        """The average inside, the model's own weights again after."""
        kept = values(self.model.variables)
        self.put(epoch)
        try:
            yield
        finally:
            assign(self.model.variables, kept)


class _Value:
    """One of several values of the device, which are read together when the first of them is wanted."""

    __slots__ = ("place", "together")

    def __init__(self, together: list, place: int):
        self.together, self.place = together, place

    @classmethod
    def each(cls, values, count: int) -> list:
        """One for each of `count` values of an array."""
        together = [values]
        return [cls(together, place) for place in range(count)]

    def __float__(self):
        if not isinstance(self.together[0], np.ndarray):
            self.together[0] = ops.convert_to_numpy(self.together[0])
        return float(self.together[0][self.place])

    def __int__(self):
        return int(float(self))


class _Run:
    """A training as it goes: its history, its unfinished epoch, and what moves them on.

    Args:
        pictures: the batches' images on the device; None where the host makes each step's.
        at_once: steps in one program of them.
    """

    def __init__(
        self,
        engine,
        batches: Batches,
        total: int,
        callbacks: Callbacks,
        checkpoints: Checkpoints | None,
        pictures: DeviceDataset | None = None,
        at_once: int = 1,
    ):
        self.engine, self.batches, self.callbacks, self.checkpoints = engine, batches, callbacks, checkpoints
        self.pictures, self.at_once = pictures, at_once
        self.total, self.epochs = total, math.ceil(total / batches.steps)
        self.history, self.best = History(), None
        self.taken, self.stopped = 0, False
        # Of each step of the unfinished epoch; the newest losses and counts may still be on the device.
        self.losses, self.correct, self.durations = [], [], []
        self.first_program = None  # its seconds and steps
        self.monitored_loss, self.logs = None, {}  # of the last epoch, for callbacks
        self._saved = None

    def start(self) -> None:
        """From the newest checkpoint, or from the beginning."""
        state = State()
        if self.checkpoints:
            shape = (self.batches.steps, self.batches.batch_size)
            state = self.checkpoints.read(self.engine.model, self.engine.optimizer, self.callbacks.names, shape)
        self.history = History(**state.history)
        self.taken, self.stopped, self.best = state.step, state.stopped, state.best
        self.losses, self.correct, self.durations = state.losses, state.correct, state.durations
        if state.step:
            self._saved = self.place
        self.callbacks.begin(
            {"verbose": 0, "epochs": self.epochs, "steps": self.batches.steps}, [kept for _, kept in state.callbacks]
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of what the unfinished epoch has shown."""
        if self.callbacks.metrics:
            self.engine.sync_variables()
        return self.callbacks.results()

    @property
    def place(self) -> tuple[int, int]:
        """Steps taken, epochs finished."""
        return self.taken, len(self.history.epochs)

    @property
    def count(self) -> int:
        """Steps in the running epoch."""
        return min(self.batches.steps, self.total - len(self.history.epochs) * self.batches.steps)

    def tell(self, hook: str, *arguments, logs: dict | None = None) -> None:
        """Call a hook of the callbacks, which may read and set variables."""
        if self.callbacks.callbacks:
            self.engine.sync_variables()
            self.callbacks.call(hook, *arguments, logs=logs)

    def take_steps(self, progress: Progress, interruption: GracefulShutdown, every: int | None) -> float:
        """The steps that are left of the epoch, with a checkpoint after each `every`; the epoch's seconds until now."""
        epoch, size, first = len(self.history.epochs), self.batches.batch_size, len(self.losses)
        earlier, started = sum(self.durations), time.perf_counter()
        clock = started
        if first == 0:
            self.tell("on_epoch_begin", epoch)
        try:
            for values, correct in self.programs(epoch, first, every):
                taken, done = len(values), len(self.losses)
                self.losses += values
                self.correct += correct
                self.taken += taken
                if self.first_program is None:
                    float(values[-1])  # waits for the device
                    self.first_program = time.perf_counter() - clock, taken
                    if self.history.seconds_to_first_step is None:
                        self.history.seconds_to_first_step = seconds_since_process_start()
                if self.callbacks.batches:
                    self.tell("on_train_batch_end", done, logs=self.so_far())
                ended = self.callbacks.stop
                # The losses before these are read, not these: the device always has work.
                latest = self.losses[-1] if ended else self.loss(max(0, done - 1))
                now = time.perf_counter()
                self.durations += [(now - clock) / taken] * taken
                if ended:
                    break
                done += taken
                progress.update(done, done * size, latest)
                if every and self.taken % every == 0 and done < self.count:
                    self.save()
                    now = time.perf_counter()
                self.heed(interruption)
                clock = now
        finally:
            self.engine.sync_variables()  # after an error or Ctrl-C too: until then JAX's variables are empty
        if not self.callbacks.stop:
            for step in range(len(self.losses)):
                self.loss(step)
        return earlier + time.perf_counter() - started

    def programs(self, epoch: int, first: int, every: int | None) -> Iterator[tuple[list, list]]:
        """Take the steps of an epoch from `first`; losses and correct answers of those that are one program.

        A program is `at_once` steps, from a multiple of them to the next, so that a run that goes on has the same ones
        as one that was not stopped; where fewer are left until the epoch's end or a checkpoint, each is its own.
        """
        if self.pictures is None:
            for step, (images, labels) in zip(range(first, self.count), self.batches.epoch(epoch, first), strict=False):
                if self.callbacks.batches:
                    self.tell("on_train_batch_begin", step)
                value, correct = self.engine.train_step(images, labels)
                yield [value], [correct]
            return
        params, step = self.batches.params(epoch, first), first
        while step < self.count:
            whole = step % self.at_once == 0 and step + self.at_once <= self.count
            if whole and every:
                whole = self.taken % every + self.at_once <= every
            count = self.at_once if whole else 1
            if self.callbacks.batches:
                self.tell("on_train_batch_begin", step)
            values, correct = self.engine.train_steps(self.pictures, np.stack(list(itertools.islice(params, count))))
            yield _Value.each(values, count), _Value.each(correct, count)
            step += count

    def loss(self, step: int) -> float:
        """The loss of a step of the unfinished epoch."""
        value = self.losses[step] = float(self.losses[step])
        if not math.isfinite(value):
            raise self.diverged(f"the loss is {value} at step {self.taken - len(self.losses) + step + 1}")
        return value

    def so_far(self) -> dict[str, float]:
        """Loss and accuracy on the unfinished epoch's images as shown, at the weights of each step."""
        self.losses = [float(value) for value in self.losses]
        self.correct = [int(value) for value in self.correct]
        count = len(self.losses)
        return {
            "loss": float(np.mean(self.losses)),
            "accuracy": sum(self.correct) / (count * self.batches.batch_size),
            **self.metrics,
        }

    def score(self, sets: dict[str, tuple[np.ndarray, np.ndarray]], scorer: Scorer, monitored: str) -> dict:
        """Loss, accuracy and metrics of named images and labels, as keys of an epoch's row.

        Callbacks see an evaluation as Keras's, of the set that they go by: `monitored`.
        """
        row, self.monitored_loss = {}, None
        if not sets:
            return row
        self.tell("on_test_begin")
        for name, (images, labels) in sets.items():
            logits = scorer(name, images)
            result = score(logits, labels) | self.callbacks.measure(logits, labels)
            del result["correct"]
            row |= {f"{name}_{key}": value for key, value in result.items()}
        if monitored in sets and self.callbacks.callbacks:
            batches = self.batches
            loss = evaluate(
                self.engine, *sets[monitored], batches.preprocessing, batches.batch_size, self.tell_of_batch
            )
            self.monitored_loss = loss
        logs = logs_of(row, monitored, self.monitored_loss)
        self.tell("on_test_end", logs={key.removeprefix("val_"): logs[key] for key in logs if key.startswith("val_")})
        return row

    def tell_of_batch(self, hook: str, step: int, logs: dict | None = None) -> None:
        """Call a hook of an evaluation's batches, where a callback has one."""
        if self.callbacks.overrides(hook):
            self.tell(hook, step, logs=logs)

    def end_epoch(self, row: dict, monitored: str) -> None:
        """Put an epoch's row into the history."""
        history, self.logs = self.history, logs_of(row, monitored, self.monitored_loss)
        self.tell("on_epoch_end", len(history.epochs), logs=dict(self.logs))  # callbacks add to theirs
        self.stopped = self.callbacks.stop
        history.step_losses += self.losses[: TRACED_STEPS - len(history.step_losses)]
        if history.compile_seconds is None and self.first_program is not None and self.durations:
            seconds, count = self.first_program
            history.compile_seconds = max(0.0, seconds - count * float(np.median(self.durations)))
        history.epochs.append(row)
        self.losses, self.correct, self.durations = [], [], []

    def save(self) -> None:
        """Write a checkpoint, unless this place has one. What it holds is finite."""
        if self.checkpoints is None or self._saved == self.place:
            return
        if self.losses:
            self.loss(len(self.losses) - 1)
        elif self.history.epochs and not math.isfinite(self.history.epochs[-1]["loss"]):
            return  # a callback has ended the run for it
        if self.losses:
            self.so_far()  # from the device
        self.engine.sync_variables()
        state = State(
            step=self.taken,
            history=vars(self.history),
            losses=self.losses,
            correct=self.correct,
            durations=self.durations,
            best=self.best,
            callbacks=list(zip(self.callbacks.names, self.callbacks.states(), strict=True)),
            stopped=self.stopped,
            batches=(self.batches.steps, self.batches.batch_size),
        )
        try:
            self.checkpoints.write(self.engine.model, self.engine.optimizer, state)
        except NotFiniteError as error:
            raise self.diverged(f"{error} is no longer finite after step {self.taken}") from None
        self._saved = self.place

    def heed(self, interruption: GracefulShutdown) -> None:
        """End the run where a signal asked for it."""
        if interruption.heard:
            self.save()
            raise Interrupted(
                f"stopped by {interruption.heard} after step {self.taken} and saved as {self.checkpoints.newest}; "
                "--resume goes on from there"
            )

    def diverged(self, what: str) -> DivergedError:
        """The error that says what is no longer finite."""
        newest = self.checkpoints and self.checkpoints.newest
        last = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written before"
        return DivergedError(f"{what}; {last}; {DIVERGED}")


def fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: Callable,
    batches: Batches,
    *,
    epochs: int,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    eval_every: int = 1,
    steps: int | None = None,
    also: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    metrics: Sequence[keras.metrics.Metric] = (),
    checkpoint: Path | Checkpoints | None = None,
    save_every: int | None = None,
    keep: int = 3,
    on_epoch: Callable[[History], None] = lambda history: None,
    label: str = "epoch",
    gradient_accumulation_steps: int = 1,
    engine: str = "native",
    data_on: str = "auto",
    steps_per_execution: int | None = None,
) -> History:
    """Train for `epochs` epochs, or until `steps` steps.

    Args:
        loss: `loss(labels, logits)`, a scalar tensor, such as a Keras loss with `from_logits=True`; penalties on
            weights (`model.losses`) are added to it.
        batches: what is shown, a `kvision.data.mixing.MixedBatches` too.
        test: uint8 images and integer labels to score after every `eval_every` epochs.
        also: further images and labels by name, scored together with the test images: "train" gives train_loss and
            train_accuracy.
        validation: the like, scored after every epoch; what `early_stopping` goes by.
        callbacks: Keras callbacks. Their logs have loss, accuracy and each metric on the training images as shown, and
            the same with val_ before it of the validation images or, where there are none, the test images; val_loss is
            `loss` with its penalties, as Keras's. They see the weights in training (of a `WeightAverage`, not the
            average), and at the end the final ones. The model is compiled with the optimizer and the loss for them.
        metrics: Keras metrics of integer labels (n,) and logits (n, classes), such as
            `keras.metrics.SparseTopKCategoricalAccuracy(5)`; of the training images as shown, and of all images that
            are scored. Of targets (n, classes) they see the largest.
        checkpoint: folder of the run's checkpoints, or a `kvision.training.checkpoints.Checkpoints`. Where it has
            one, the run goes on from the newest and ends with the weights of an uninterrupted run: to the bit on the
            same backend, within rounding on another. With it SIGTERM, SIGHUP and Ctrl-C are heard between two steps.
        save_every: steps from one checkpoint to the next; None writes one after each epoch. The run's end writes
            one in any case.
        keep: how many checkpoints are kept, the newest, where `checkpoint` is a folder.
        accumulate, engine: of `kvision.engine.create`: parts that a batch is cut into, and which engine.
        data_on: "host" makes each step's images in NumPy; "device" keeps the uint8 images in the device's memory and
            makes them there, within the step, see `kvision.data.device`; "auto" is that for all batches that can be
            and are not more than 1 GiB, but in float64.
        steps_per_execution: steps of images on the device in one program; None is about 50 on an accelerator, and 1 on
            a CPU, where a loop within a program is slow, or where a callback is told of every step.
        on_epoch: called after every epoch (and once on resumption) with the history so far.

    Returns:
        The history; the optimizer holds the final state, and the model too: where the optimizer is a `WeightAverage` it
        has the average instead, of a `Lookahead` the slow weights, with Keras's `use_ema` its average, and with
        `early_stopping` what was scored after the best epoch.

    Raises:
        DivergedError: the loss or a weight became infinite or not a number. No checkpoint was written after it.
        Interrupted: SIGTERM or Ctrl-C came, the running step was finished and a checkpoint was written. It is a
            KeyboardInterrupt; a second Ctrl-C raises a plain one at once.
        kvision.weights.WeightsError: there are checkpoints but none is sound and of this run, or the disk refuses a new
            one; the message says which is left.
        ValueError: early stopping without validation images; a metric without a name of its own; `save_every`,
            `keep` or `steps_per_execution` below 1; images on the device of batches that change what they show, such as
            mixup's; a model or labels that the engine does not take; Keras's `BackupAndRestore`.
        TypeError: an optimizer or a loss by name; batches of another kind.
    """
    if early_stopping and validation is None:
        raise ValueError("early stopping goes by validation images: give validation=")
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every must be at least 1 step, got {save_every}")
    check_arguments(optimizer, loss, batches)
    monitored = "test" if validation is None else "validation"
    optimizer.build(model.trainable_variables)
    engine = engines.create(model, optimizer, loss, gradient_accumulation_steps, engine, metrics)
    kind = "native" if hasattr(engine, "train_steps") else "keras"
    total = min(epochs * batches.steps, steps or math.inf)
    checkpoints = checkpoint
    if not isinstance(checkpoint, Checkpoints | None):
        checkpoints = Checkpoints(checkpoint, keep)
    callbacks = Callbacks(callbacks, metrics, model, optimizer, loss if kind == "native" else None)
    pictures = _pictures(batches, data_on, kind)
    at_once = _at_once(batches.steps, steps_per_execution, callbacks)
    scorer = Scorer(engine, batches.preprocessing, on_device=pictures is not None and engines.accelerated())
    run = _Run(engine, batches, total, callbacks, checkpoints, pictures, at_once)
    averaging = getattr(optimizer, "inner_optimizer", optimizer)  # inside a LossScaleOptimizer
    average = _Average(model, averaging, batches) if isinstance(averaging, WeightAverage) else None
    with GracefulShutdown(listen=checkpoints is not None) as interruption:
        run.start()
        history = run.history
        if history.epochs:
            on_epoch(history)
        while len(history.epochs) < run.epochs and not run.stopped:
            if early_stopping and early_stopping.over(history.epochs):
                break
            epoch = len(history.epochs)
            with Progress(run.count, f"{label} {epoch + 1}/{run.epochs}") as progress:
                seconds = run.take_steps(progress, interruption, save_every)
                if run.taken == total and isinstance(averaging, Lookahead):
                    averaging.finalize_variable_values(model.trainable_variables)
                row = {
                    "epoch": epoch + 1,
                    **run.so_far(),
                    "learning_rate": float(ops.convert_to_numpy(optimizer.learning_rate)),
                    "seconds": seconds,
                    "images_per_second": batches.batch_size / float(np.median(run.durations)),
                }
                scored = {"test": test, **(also or {})} if (epoch + 1) % eval_every == 0 else {}
                scored = {name: pair for name, pair in {**scored, "validation": validation}.items() if pair is not None}
                with average.inside(epoch) if average and scored else nullcontext():
                    row |= run.score(scored, scorer, monitored)
                    if early_stopping and early_stopping.best([*history.epochs, row]) == epoch:
                        run.best = values(model.variables)
                progress.close(describe(row, run.epochs))
            run.end_epoch(row, monitored)
            if save_every is None or run.taken % save_every == 0:
                run.save()
            on_epoch(history)
            run.heed(interruption)
        run.save()
    if run.best is not None:
        assign(model.variables, run.best)
    else:
        if average and history.epochs:
            average.put(len(history.epochs) - 1)
        optimizer.finalize_variable_values(model.trainable_variables)  # as Keras's own `fit` does after the last step
    run.callbacks.call("on_train_end", logs=run.logs)
    return history


def check_arguments(optimizer, loss, batches) -> None:
    """Refuse what Keras's `fit` takes and this one does not.

    Raises:
        TypeError: a name for the optimizer or the loss; data that are no batches.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"expected an optimizer such as keras.optimizers.SGD(0.1), got {optimizer!r}; "
            "keras.optimizers.get makes one of a name"
        )
    if not callable(loss):
        raise TypeError(
            f"expected a loss(labels, logits) such as kvision.tasks.classification.cross_entropy(), got {loss!r}; "
            "keras.losses.get makes one of a name"
        )
    missing = [name for name in ("steps", "batch_size", "preprocessing", "epoch") if not hasattr(batches, name)]
    if missing:
        raise TypeError(
            f"expected kvision.data.batches.Batches(images, labels, batch_size, seed, preprocessing), got "
            f"{type(batches).__name__}: this fit takes uint8 images and labels in memory. For data of another kind "
            "use keras.Model.fit"
        )


def _pictures(batches, data_on: str, engine: str) -> DeviceDataset | None:
    """The batches' images on the device, if they are to be there."""
    if data_on not in DATA_ON:
        raise ValueError(f"data_on must be one of {', '.join(DATA_ON)}, got {data_on!r}")
    # Where somebody's own `epoch` shows something else, the host does it.
    plain = getattr(getattr(batches, "epoch", None), "__func__", None) is Batches.epoch
    if data_on == "device" and not plain:
        raise ValueError(
            f"images of {type(batches).__name__} batches cannot be made on the device: "
            "what changes them, as mixup, CutMix and erasing do, runs on the host"
        )
    if data_on == "device" and engine == "keras":
        raise ValueError("Keras's own step takes images from the host: data_on must not be 'device'")
    if data_on == "auto":
        fits = plain and engine != "keras" and batches.padded.nbytes <= DEVICE_BYTES
        # A float64 run tests logic, not rounding: its images are NumPy's, bit for bit, on every backend.
        data_on = "device" if fits and keras.config.floatx() != "float64" else "host"
    return DeviceDataset(batches) if data_on == "device" else None


def steps_per_execution(steps: int) -> int:
    """Steps in one program, of epochs of so many, where nothing else asks for fewer."""
    if not engines.accelerated():
        return 1
    # An epoch of whole programs spares the compilation of another one for the rest.
    divisors = [count for count in range(STEPS_PER_EXECUTION // 5, STEPS_PER_EXECUTION + 1) if steps % count == 0]
    return max(divisors, default=STEPS_PER_EXECUTION)


def _at_once(steps: int, wanted: int | None, callbacks: Callbacks) -> int:
    if wanted is not None and wanted < 1:
        raise ValueError(f"steps_per_execution must be at least 1, got {wanted}")
    if callbacks.batches:
        return 1
    return steps_per_execution(steps) if wanted is None else wanted


def describe(row: dict, epochs: int) -> str:
    """An epoch's row of the history as one line for a terminal or a log."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}", f"accuracy {row['accuracy']:.2%}"]
    if "test_accuracy" in row:
        parts += [f"test loss {row['test_loss']:.4f}", f"test accuracy {row['test_accuracy']:.2%}"]
    parts += [f"{row['images_per_second']:,.0f} images/s", f"{row['seconds']:.1f} s"]
    return "  ".join(parts)
