"""The training loop: epochs, evaluation, early stopping, checkpoints and resuming."""

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
from kvision.engine.keras_internals import trained_variables
from kvision.layers.norm import batch_statistics_model, update_bn
from kvision.report.environment import seconds_since_process_start
from kvision.report.progress import Progress
from kvision.tasks import add, summarize
from kvision.training.averaging import Lookahead, WeightAverage
from kvision.training.callbacks import Callbacks, logs_of
from kvision.training.checkpoints import Checkpoints, NotFiniteError, State
from kvision.training.evaluation import evaluate, host_means
from kvision.training.shutdown import GracefulShutdown, Interrupted

DATA_ON = ("auto", "host", "device")
STEPS_PER_EXECUTION = 50  # on an accelerator
DEVICE_BYTES = 2**30  # of uint8 training images that "auto" keeps on the device; CIFAR-10 has 240 MB with its padding
TRACED_STEPS = 50  # how many step losses a run keeps, for comparing backends
# Enough for batch norm's statistics: Wu and Johnson 2021, https://arxiv.org/abs/2105.07576, recommend 1,000 to 10,000.
RECALIBRATION_IMAGES = 10_000

DIVERGED = "try a smaller --learning-rate, --clip-norm 1 or --dtype float32"


class DivergedError(RuntimeError):
    """The loss or a weight is no longer a finite number. The message names the step, the last good checkpoint and what
    to try."""


@dataclass(frozen=True)
class EarlyStopping:
    """Stop where a figure of an epoch has not improved for some epochs, and restore the weights of the best epoch
    (Prechelt 1998, https://doi.org/10.1007/3-540-49430-8_3).

    Args:
        patience: how many epochs without improvement end the run.
        min_delta: an improvement is a change by more than this.
        monitor: the figure's name in an epoch's row of the history, such as "validation_loss".
        mode: "min" where less is better, "max" where more is.

    Raises:
        ValueError: a patience below 1, a negative `min_delta`, another mode.
    """

    patience: int
    min_delta: float = 0.0
    monitor: str = "validation_loss"
    mode: str = "min"

    def __post_init__(self):
        if self.patience < 1 or self.min_delta < 0:
            raise ValueError(
                "early stopping requires a patience of at least 1 and no negative min_delta, "
                f"got {self.patience} and {self.min_delta}"
            )
        if self.mode not in ("min", "max"):
            raise ValueError(f"early stopping's mode must be min or max, got {self.mode!r}")

    def best(self, epochs: list[dict]) -> int:
        """The place of the best epoch in a history that has one."""
        best, sign = 0, 1 if self.mode == "min" else -1
        for i, row in enumerate(epochs):
            if sign * row[self.monitor] < sign * epochs[best][self.monitor] - self.min_delta:
                best = i
        return best

    def is_over(self, epochs: list[dict]) -> bool:
        """Whether a run with this history ends here."""
        return bool(epochs) and len(epochs) - 1 - self.best(epochs) >= self.patience


@dataclass(frozen=True)
class Schedule:
    """When a run ends, is evaluated and saved.

    Args:
        max_steps: end after so many steps, if the epochs are not over before.
        eval_every: evaluate after every so many epochs; None evaluates once, at the end, with the final weights. The
            set "validation", and what early stopping monitors, is evaluated after every epoch.
        save_every: steps from one checkpoint to the next; None writes one after each epoch. The run's end writes one
            in any case.

    Raises:
        ValueError: `eval_every` or `save_every` below 1.
    """

    max_steps: int | None = None
    eval_every: int | None = None
    save_every: int | None = None

    def __post_init__(self):
        for name in ("eval_every", "save_every"):
            value, unit = getattr(self, name), {"eval_every": "epoch", "save_every": "step"}[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 {unit}, got {value}")


@dataclass(frozen=True)
class Execution:
    """How steps are computed; it does not change what they compute.

    Args:
        engine: "native", or "keras" for Keras's own step, see `kvision.engine.create`.
        data_on: "host" makes each step's images in NumPy; "device" keeps the uint8 images in the device's memory and
            makes batches there, within the step, see `kvision.data.device`; "auto" is that for all batches that can be
            and are not more than 1 GiB, but in float64.
        steps_per_execution: steps on the device in one program; None is about 50 on an accelerator, and 1 on a CPU,
            where a loop within a program is slow, or where a callback is called for every step.
        gradient_accumulation_steps: parts that a batch is divided into, whose mean gradient makes the step.

    Raises:
        ValueError: an unknown `data_on`; `steps_per_execution` below 1.
    """

    engine: str = "native"
    data_on: str = "auto"
    steps_per_execution: int | None = None
    gradient_accumulation_steps: int = 1

    def __post_init__(self):
        if self.data_on not in DATA_ON:
            raise ValueError(f"data_on must be one of {', '.join(DATA_ON)}, got {self.data_on!r}")
        if self.steps_per_execution is not None and self.steps_per_execution < 1:
            raise ValueError(f"steps_per_execution must be at least 1, got {self.steps_per_execution}")


@dataclass
class History:
    """The figures of a training run.

    Attributes:
        epochs: a dictionary for each epoch: epoch (from 1); the task's figures of the training batches, loss first;
            learning_rate; seconds, images_per_second (of a median step); and of each evaluated set its figures with the
            set's name before them, as test_loss.
        final: the figures of the sets that are evaluated once, at the end.
        step_losses: the losses of the first steps.
        seconds_to_first_step: from the start of the process to the end of the first step, or of the first program of
            several steps, seconds.
        compile_seconds: what that took beyond median steps, seconds.
    """

    epochs: list[dict] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    step_losses: list[float] = field(default_factory=list)
    seconds_to_first_step: float | None = None
    compile_seconds: float | None = None


def values(variables) -> list[np.ndarray]:
    """Copies of the values of variables."""
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]


def assign(variables, values: list[np.ndarray]) -> None:
    """Set variables to values in the same order."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class RunningMeans:
    """The added Means of an epoch's steps, float64 on the host; those of the newest steps may be on the device.

    Args:
        totals: of the epoch's earlier steps.
    """

    def __init__(self, totals: Mapping = {}):
        self.totals, self._waiting = dict(totals), []

    def put(self, means: Mapping, steps: int | None = None) -> None:
        """Means of one step, or of several with a leading axis of `steps`."""
        self._waiting.append((means, steps))

    def read(self, keep: int = 0) -> Iterator[dict]:
        """Add what is on the device but for the `keep` newest results; yields the Means of each step."""
        while len(self._waiting) > keep:
            means, steps = self._waiting.pop(0)
            means = host_means(means)
            for step in range(1 if steps is None else steps):
                one = means if steps is None else {key: (s[step], w[step]) for key, (s, w) in means.items()}
                self.totals = add(self.totals, one)
                yield one


class Trainer:
    """A run: its history, its unfinished epoch, and the methods that advance them.

    Args:
        engine: of `kvision.engine`.
        models, optimizers: as they were given, for checkpoints.
        loader: the training batches.
        sets: the sets to evaluate, by name.
        total: steps in all.
        dataset: the training images on the device; None where the host makes each step's batch.
        steps_per_execution: steps in one program of them.
    """

    def __init__(
        self,
        engine,
        models,
        optimizers,
        loader,
        sets: Mapping[str, Batches | DeviceDataset],
        total: int,
        callbacks: Callbacks,
        checkpoints: Checkpoints | None,
        dataset: DeviceDataset | None = None,
        steps_per_execution: int = 1,
    ):
        self.engine, self.models, self.optimizers, self.loader, self.sets = engine, models, optimizers, loader, sets
        self.task, self.callbacks, self.checkpoints = engine.program.task, callbacks, checkpoints
        self.dataset, self.steps_per_execution = dataset, steps_per_execution
        self.total, self.epochs = total, math.ceil(total / loader.steps)
        self.history, self.best = History(), None
        self.global_step, self.stopped = 0, False
        self.running, self.durations = RunningMeans(), []  # of the unfinished epoch
        self.first_program = None  # its seconds and steps
        self.monitored = "validation" if "validation" in sets or not sets else next(iter(sets))
        self.logs = {}  # of the last epoch, for callbacks
        self.steps_read, self.latest_loss = 0, math.nan
        self._not_finite, self._saved = None, None

    def start(self) -> None:
        """From the newest checkpoint, or from the beginning."""
        state = State()
        if self.checkpoints:
            shape, own = (self.loader.steps, self.loader.batch_size), self.engine.program.task_variables
            state = self.checkpoints.read(self.models, self.optimizers, self.callbacks.names, shape, own)
        self.history = History(**state.history)
        self.global_step = self.steps_read = state.step
        self.stopped, self.best = state.stopped, state.best
        self.running, self.durations = RunningMeans(state.totals), state.durations
        if state.step:
            self._saved = self.position
        self.callbacks.begin(
            {"verbose": 0, "epochs": self.epochs, "steps": self.loader.steps}, [kept for _, kept in state.callbacks]
        )

    @property
    def position(self) -> tuple[int, int]:
        """Steps taken, epochs finished."""
        return self.global_step, len(self.history.epochs)

    @property
    def first_step(self) -> int:
        """The steps that were taken before the running epoch."""
        return len(self.history.epochs) * self.loader.steps

    @property
    def count(self) -> int:
        """Steps in the running epoch."""
        return min(self.loader.steps, self.total - self.first_step)

    def call_callbacks(self, hook: str, *arguments, logs: dict | None = None) -> None:
        """Call a hook of the callbacks, which may read and set variables."""
        if self.callbacks.callbacks:
            self.engine.sync_variables()
            self.callbacks.call(hook, *arguments, logs=logs)

    def train_epoch(self, progress: Progress, shutdown: GracefulShutdown, save_every: int | None) -> float:
        """Take the steps that are left of the epoch; the epoch's seconds until now."""
        epoch, size, first = len(self.history.epochs), self.loader.batch_size, self.global_step - self.first_step
        earlier, started = sum(self.durations), time.perf_counter()
        clock, done = started, first
        if first == 0:
            if hasattr(self.task, "begin"):
                self.engine.sync_variables()
                self.task.begin()
            self.call_callbacks("on_epoch_begin", epoch)
        try:
            for count in self.step_iterator(epoch, first, save_every):
                self.global_step += count
                if self.first_program is None:
                    self.read()  # waits for the device
                    self.first_program = time.perf_counter() - clock, count
                    if self.history.seconds_to_first_step is None:
                        self.history.seconds_to_first_step = seconds_since_process_start()
                if self.callbacks.batches:
                    self.call_callbacks("on_train_batch_end", done, logs=self.running_metrics())
                if not self.callbacks.stop:
                    self.read(keep=1)  # not the newest step: the device always has work
                    self.raise_if_diverged()
                now = time.perf_counter()
                self.durations += [(now - clock) / count] * count
                if self.callbacks.stop:
                    break
                done += count
                progress.update(done, done * size, self.latest_loss)
                if save_every and self.global_step % save_every == 0 and done < self.count:
                    self.save()
                    now = time.perf_counter()
                self.raise_if_interrupted(shutdown)
                clock = now
        finally:
            self.engine.sync_variables()  # after an error or Ctrl-C too: until then JAX's variables are empty
        self.read()
        if not self.callbacks.stop:
            self.raise_if_diverged()
        return earlier + time.perf_counter() - started

    def step_iterator(self, epoch: int, first: int, save_every: int | None) -> Iterator[int]:
        """Take the steps of an epoch from `first`; yields how many each program had.

        A program is `steps_per_execution` steps, from a multiple of them to the next, so that a resumed run has the
        same ones as one that was not stopped; where fewer are left until the epoch's end or a checkpoint, each is its
        own.
        """
        if self.dataset is None:
            for step, batch in zip(range(first, self.count), self.loader.epoch(epoch, first), strict=False):
                if self.callbacks.batches:
                    self.call_callbacks("on_train_batch_begin", step)
                self.running.put(self.engine.train_step(batch))
                yield 1
            return
        params, step, size = self.loader.params(epoch, first), first, self.steps_per_execution
        while step < self.count:
            whole = step % size == 0 and step + size <= self.count
            if whole and save_every:
                whole = self.global_step % save_every + size <= save_every
            count = size if whole else 1
            if self.callbacks.batches:
                self.call_callbacks("on_train_batch_begin", step)
            chunk = np.stack(list(itertools.islice(params, count)))
            self.running.put(self.engine.train_steps(self.dataset, chunk), count)
            yield count
            step += count

    def read(self, keep: int = 0) -> None:
        """Read the Means of all programs but the `keep` newest ones from the device."""
        for means in self.running.read(keep):
            losses = {name: float(means[name][0] / means[name][1]) for name in self.engine.program.loss_names}
            self.latest_loss = next(iter(losses.values()))
            self.steps_read += 1
            if len(self.history.step_losses) < TRACED_STEPS:
                self.history.step_losses.append(self.latest_loss)
            for name, loss in losses.items():
                if not math.isfinite(loss) and self._not_finite is None:
                    self._not_finite = f"the {name.replace('_', ' ')} is {loss} at step {self.steps_read}"

    def running_metrics(self) -> dict[str, float]:
        """The task's figures of the unfinished epoch's training batches, at the weights of each step."""
        self.read()
        if self.engine.program.task_variables:
            self.engine.sync_variables()
        return summarize(self.task, self.running.totals)

    def evaluate(self, names: Sequence[str]) -> dict[str, float]:
        """The figures of named sets, as keys of an epoch's row. Callbacks see an evaluation as Keras's, of the set
        `monitored`."""
        row = {}
        if not names:
            return row
        self.call_callbacks("on_test_begin")
        size = self.loader.batch_size if self.callbacks.callbacks else None
        for name in names:
            call = self.call_batch_hooks if name == self.monitored and self.callbacks.overrides_test_batches else None
            figures = evaluate(self.engine, self.sets[name], size, call)
            row |= {f"{name}_{key}": value for key, value in figures.items()}
        logs = logs_of(row, self.monitored)
        logs = {key.removeprefix("val_"): value for key, value in logs.items() if key.startswith("val_")}
        self.call_callbacks("on_test_end", logs=logs)
        return row

    def call_batch_hooks(self, hook: str, step: int, logs: dict | None = None) -> None:
        """Call a hook of an evaluation's batches, where a callback has one."""
        if self.callbacks.overrides(hook):
            self.call_callbacks(hook, step, logs=logs)

    def end_epoch(self, row: dict) -> None:
        """Put an epoch's row into the history."""
        history, self.logs = self.history, logs_of(row, self.monitored)
        self.call_callbacks("on_epoch_end", len(history.epochs), logs=dict(self.logs))  # callbacks add to theirs
        self.stopped = self.callbacks.stop
        if history.compile_seconds is None and self.first_program is not None and self.durations:
            seconds, count = self.first_program
            history.compile_seconds = max(0.0, seconds - count * float(np.median(self.durations)))
        history.epochs.append(row)
        self.running, self.durations = RunningMeans(), []

    def save(self) -> None:
        """Write a checkpoint, unless this position has one. What it holds is finite."""
        if self.checkpoints is None or self._saved == self.position:
            return
        self.read()
        if self._not_finite:
            if self.stopped:
                return  # a callback has ended the run for it
            self.raise_if_diverged()
        self.engine.sync_variables()
        state = State(
            step=self.global_step,
            history=vars(self.history),
            totals=self.running.totals,
            durations=self.durations,
            best=self.best,
            callbacks=list(zip(self.callbacks.names, self.callbacks.states(), strict=True)),
            stopped=self.stopped,
            batches=(self.loader.steps, self.loader.batch_size),
        )
        try:
            self.checkpoints.write(self.models, self.optimizers, state, self.engine.program.task_variables)
        except NotFiniteError as error:
            raise self.diverged(f"{error} is no longer finite after step {self.global_step}") from None
        self._saved = self.position

    def raise_if_interrupted(self, shutdown: GracefulShutdown) -> None:
        """End the run where a signal asked for it."""
        if shutdown.signal:
            self.save()
            raise Interrupted(
                f"stopped by {shutdown.signal} after step {self.global_step} and saved as {self.checkpoints.newest}; "
                "--resume continues from there"
            )

    def raise_if_diverged(self) -> None:
        """End the run where a loss that was read is not finite."""
        if self._not_finite:
            raise self.diverged(self._not_finite)

    def diverged(self, what: str) -> DivergedError:
        """The error that says what is no longer finite."""
        newest = self.checkpoints and self.checkpoints.newest
        last = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written before"
        return DivergedError(f"{what}; {last}; {DIVERGED}")


class Averages:
    """The averaged weights of a run whose optimizers keep some, see `kvision.training.averaging`."""

    def __init__(self, engine, loader):
        self.engine, self.loader = engine, loader
        # Inside a LossScaleOptimizer there is another.
        optimizers = [getattr(one, "inner_optimizer", one) for one in engine.program.optimizers]
        self.optimizers = [one for one in optimizers if isinstance(one, WeightAverage)]
        self.lookaheads = [one for one in optimizers if isinstance(one, Lookahead)]
        statistics = None
        if self.optimizers:
            statistics = [batch_statistics_model(model) for model in engine.program.models.values()]
            if len(statistics) > 1 and any(statistics):
                raise ValueError("an average of the weights of several models is of models without batch norm")
            statistics = statistics[0]
        self.statistics = statistics and engines.create(statistics)

    def __bool__(self):
        return bool(self.optimizers)

    def assign(self, epoch: int) -> None:
        """Put the averages into the models, with the statistics that batch norm has under them."""
        for optimizer in self.optimizers:
            assign(trained_variables(optimizer), values(optimizer.averages))
        if self.statistics:
            count = math.ceil(RECALIBRATION_IMAGES / self.loader.batch_size)
            batches = itertools.islice(self.loader.epoch(epoch), count)
            update_bn(self.engine.model, [self.statistics.predict(batch["image"]) for batch in batches])

    @contextmanager
    def averaged_weights(self, epoch: int) -> Iterator[None]:
        """The averages inside, the models' own weights again after."""
        variables = all_variables(self.engine)
        kept = values(variables)
        self.assign(epoch)
        try:
            yield
        finally:
            assign(variables, kept)


def fit(
    models: keras.Model | Mapping[str, keras.Model],
    task,
    optimizers: keras.optimizers.Optimizer | Mapping[str, keras.optimizers.Optimizer],
    loader: Batches,
    *,
    epochs: int,
    evaluations: Mapping[str, Batches | tuple[np.ndarray, np.ndarray]] | None = None,
    schedule: Schedule = Schedule(),
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    checkpoint: Path | Checkpoints | None = None,
    execution: Execution = Execution(),
    on_epoch: Callable[[History], None] = lambda history: None,
    label: str = "epoch",
) -> History:
    """Train for `epochs` epochs.

    Args:
        models: a model, or several by name.
        task: what is learned, see `kvision.tasks`.
        optimizers: one, or a mapping by the task's phases.
        loader: the training batches; a `kvision.data.mixing.MixedBatches` too.
        evaluations: sets to evaluate, by name: batches, or uint8 images and labels, which are checked as the training
            set's are. What selects (early stopping, callbacks) should go by a "validation" set.
        schedule: when the run ends, is evaluated and saved.
        callbacks: Keras callbacks, of a single model. Their logs have the figures of the training batches, and those of
            the set "validation", or else of the first one, with val_ before them, as in Keras. They see the weights in
            training (of a `WeightAverage`, not the average), and at the end the final ones. The model is compiled with
            the optimizer and the task's loss for them.
        checkpoint: folder of the run's checkpoints, or a `kvision.training.checkpoints.Checkpoints`. Where it has one,
            the run resumes from the newest and ends with the weights of an uninterrupted run: bit-exact on the same
            backend, within rounding on another. With it SIGTERM, SIGHUP and Ctrl-C take effect between two steps.
        execution: how steps are computed.
        on_epoch: called after every epoch (and once on resumption) with the history so far.
        label: what a line of progress begins with.

    Returns:
        The history; optimizers and models hold the final state: of a `WeightAverage` the average, of a `Lookahead` the
        slow weights, with Keras's `use_ema` its average, and with `early_stopping` the weights of the best epoch.

    Raises:
        DivergedError: the loss or a weight became infinite or not a number. No checkpoint was written after it.
        Interrupted: SIGTERM or Ctrl-C came, the running step was finished and a checkpoint was written. It is a
            KeyboardInterrupt; a second Ctrl-C raises a plain one at once.
        kvision.weights.WeightsError: there are checkpoints but none is sound and of this run, or the disk refuses a new
            one; the message says which is left.
        ValueError: early stopping by a set that is not evaluated; images on the device of batches that change them,
            such as mixup's; a model, labels or callbacks that cannot be trained with.
        TypeError: an optimizer by name; an object that is no task; batches of another kind.
    """
    check_arguments(task, optimizers, loader)
    evaluations = dict(evaluations or {})
    every_epoch = {"validation"} & set(evaluations)
    if early_stopping:
        every_epoch |= {monitored_set(early_stopping.monitor, evaluations)} - {None}
    engine = engines.create(models, task, optimizers, execution.gradient_accumulation_steps, execution.engine)
    native = hasattr(engine, "train_steps")
    dataset = device_dataset(loader, execution.data_on, native)
    sets = {name: as_batches(data, loader) for name, data in evaluations.items()}
    if dataset is not None and engines.accelerated():
        sets = {name: DeviceDataset(batches) for name, batches in sets.items()}
    if callbacks and isinstance(models, Mapping):
        raise ValueError("Keras's callbacks are of a single model")
    compiled = None
    if native and hasattr(task, "for_keras") and callbacks:
        compiled = {"optimizer": optimizers, **task.for_keras()}
    called = Callbacks(callbacks, engine.model, compiled, getattr(task, "directions", None))
    checkpoints = checkpoint if isinstance(checkpoint, Checkpoints | None) else Checkpoints(checkpoint)
    total = min(epochs * loader.steps, schedule.max_steps or math.inf)
    steps = program_steps(loader.steps, execution.steps_per_execution, called)
    run = Trainer(engine, models, optimizers, loader, sets, total, called, checkpoints, dataset, steps)
    averages, every = Averages(engine, loader), schedule.eval_every
    with GracefulShutdown(listen=checkpoints is not None) as shutdown:
        run.start()
        history = run.history
        if history.epochs:
            on_epoch(history)
        while len(history.epochs) < run.epochs and not run.stopped:
            if early_stopping and early_stopping.is_over(history.epochs):
                break
            epoch = len(history.epochs)
            with Progress(run.count, f"{label} {epoch + 1}/{run.epochs}") as progress:
                seconds = run.train_epoch(progress, shutdown, schedule.save_every)
                if run.global_step == total:
                    for optimizer in averages.lookaheads:
                        optimizer.finalize_variable_values(trained_variables(optimizer))
                row = {
                    "epoch": epoch + 1,
                    **run.running_metrics(),
                    **learning_rates(engine),
                    "seconds": seconds,
                    "images_per_second": loader.batch_size / float(np.median(run.durations)),
                }
                due = every is not None and (epoch + 1) % every == 0
                names = [name for name in sets if due or name in every_epoch]
                with averages.averaged_weights(epoch) if averages and names else nullcontext():
                    row |= run.evaluate(names)
                    if early_stopping and early_stopping.best([*history.epochs, row]) == epoch:
                        run.best = values(all_variables(engine))
                progress.close(describe(row, run.epochs))
            run.end_epoch(row)
            if schedule.save_every is None or run.global_step % schedule.save_every == 0:
                run.save()
            on_epoch(history)
            run.raise_if_interrupted(shutdown)
        run.save()
    if run.best is not None:
        assign(all_variables(engine), run.best)
    else:
        if averages and history.epochs:
            averages.assign(len(history.epochs) - 1)
        for phase in engine.program.phases:  # as Keras's own `fit` does after the last step
            phase.optimizer.finalize_variable_values(phase.variables)
    if every is None and history.epochs:
        rest = [name for name in sets if name not in every_epoch]
        history.final = {f"{n}_{key}": value for n in rest for key, value in evaluate(engine, sets[n]).items()}
    run.callbacks.call("on_train_end", logs=run.logs)
    return history


def check_arguments(task, optimizers, loader) -> None:
    """Refuse what Keras's `fit` takes and this one does not.

    Raises:
        TypeError: a name for an optimizer; an object that is no task; data that are no batches.
    """
    for optimizer in optimizers.values() if isinstance(optimizers, Mapping) else [optimizers]:
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                f"expected an optimizer such as keras.optimizers.SGD(0.1), got {optimizer!r}; "
                "keras.optimizers.get makes one of a name"
            )
    if not hasattr(task, "metrics") or not (hasattr(task, "loss") or hasattr(task, "phases")):
        raise TypeError(f"expected a task such as kvision.tasks.classification.Classification(), got {task!r}")
    missing = [name for name in ("steps", "batch_size", "preprocessing", "epoch") if not hasattr(loader, name)]
    if missing:
        raise TypeError(
            f"expected kvision.data.batches.Batches(images, labels, batch_size, seed, preprocessing), got "
            f"{type(loader).__name__}: this fit takes uint8 images and labels in memory. For data of another kind "
            "use keras.Model.fit"
        )


def monitored_set(monitor: str, evaluations: Mapping) -> str | None:
    """The set whose figure early stopping monitors; None for a figure of the training batches.

    Raises:
        ValueError: it is of a set that is not evaluated.
    """
    for name in evaluations:
        if monitor.startswith(f"{name}_"):
            return name
    if "_" in monitor:
        name = monitor.rpartition("_")[0]
        raise ValueError(f"early stopping goes by {monitor}: give evaluations={{{name!r}: (images, labels)}}")
    return None


def as_batches(data, loader) -> Batches:
    """A set to evaluate as batches; of images and labels, checked and preprocessed as the training set's are."""
    if not isinstance(data, tuple | list):
        return data
    plain = getattr(loader, "batches", loader)
    return Batches(*data, loader.batch_size, 0, loader.preprocessing, classes=getattr(plain, "classes", None))


def all_variables(engine) -> list:
    """The variables of all models."""
    return [variable for model in engine.program.models.values() for variable in model.variables]


def learning_rates(engine) -> dict[str, float]:
    """The learning rate of the optimizer, or of each with the phase's name before it."""
    phases = engine.program.phases
    names = ["learning_rate"] if len(phases) == 1 else [f"{phase.name}_learning_rate" for phase in phases]
    rates = (float(ops.convert_to_numpy(phase.optimizer.learning_rate)) for phase in phases)
    return dict(zip(names, rates, strict=True))


def device_dataset(loader, data_on: str, native: bool) -> DeviceDataset | None:
    """The training images on the device, if they are to be there."""
    # Where somebody's own `epoch` gives something else, the host does it.
    plain = getattr(getattr(loader, "epoch", None), "__func__", None) is Batches.epoch
    if data_on == "device" and not plain:
        raise ValueError(
            f"images of {type(loader).__name__} cannot be made on the device: "
            "what changes them, as mixup, CutMix and erasing do, runs on the host"
        )
    if data_on == "device" and not native:
        raise ValueError("Keras's own step takes images from the host: data_on must not be 'device'")
    if data_on == "auto":
        fits = plain and native and loader.padded.nbytes <= DEVICE_BYTES
        # A float64 run tests logic, not rounding: its images are NumPy's, bit for bit, on every backend.
        data_on = "device" if fits and keras.config.floatx() != "float64" else "host"
    return DeviceDataset(loader) if data_on == "device" else None


def steps_per_execution(steps: int) -> int:
    """Steps in one program, of epochs of so many, where nothing else asks for fewer."""
    if not engines.accelerated():
        return 1
    # An epoch of whole programs spares the compilation of another one for the rest.
    divisors = [count for count in range(STEPS_PER_EXECUTION // 5, STEPS_PER_EXECUTION + 1) if steps % count == 0]
    return max(divisors, default=STEPS_PER_EXECUTION)


def program_steps(steps: int, requested: int | None, callbacks: Callbacks) -> int:
    """Steps in one program of a run."""
    if callbacks.batches:
        return 1
    return steps_per_execution(steps) if requested is None else requested


def describe(row: dict, epochs: int) -> str:
    """An epoch's row of the history as one line for a terminal or a log."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    for name, value in row.items():
        if name not in ("epoch", "seconds", "images_per_second") and not name.endswith("learning_rate"):
            share = name.endswith("accuracy")
            parts.append(f"{name.replace('_', ' ')} {value:.2%}" if share else f"{name.replace('_', ' ')} {value:.4f}")
    parts += [f"{row['images_per_second']:,.0f} images/s", f"{row['seconds']:.1f} s"]
    return "  ".join(parts)
