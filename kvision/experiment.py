"""One run of a classifier: a configuration, a data set, a network, and the folder that tells what came of it.

The apps for CIFAR-10 and MNIST are this file plus their data set and their recipes. A recipe is a whole `Config`; the
command line replaces single fields of it.
"""

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np

from kvision import engine as engines
from kvision import flags, memory, zoo
from kvision.config import HELD_OUT, Config, arguments_of, expect_parts, model_arguments, public
from kvision.convert import find
from kvision.data import DataError, Dataset
from kvision.data.preprocessing import Preprocessing
from kvision.data.registry import keras_cache
from kvision.engine.threads import choose as choose_threads
from kvision.files import FolderInUseError, sha256, write_json, write_text
from kvision.layers import regularizers, skip_init, whitening_kernel
from kvision.report import environment
from kvision.report.run_report import MisclassifiedExample, write_report
from kvision.run_data import (
    WHITENED_PIXELS,
    build_batches,
    build_preprocessing,
    data_on,
    fit_batch,
    read_data,
    sample,
    train_validation_split,
)
from kvision.run_folder import clean_run_folder, identity, run_folder, store_config, stored_config
from kvision.tasks import classification
from kvision.training import averaging, evaluation, optimizers, schedules, trainer
from kvision.training.checkpoints import Checkpoints
from kvision.weights import WeightsError, inspect, save
from kvision.weights import load as load_weights
from kvision.weights.initialization import initialize
from kvision.weights.manifest import room_for

ERRORS = (DataError, WeightsError, FolderInUseError, trainer.DivergedError)
NEW_HEAD = r"(.*_)?logits/.*"  # the arrays of a network's last layer and of its auxiliary heads' last ones
COMPARED_IMAGES = 100  # test images whose logits under the initial weights a run keeps, for comparing backends


def classify(config: Config, names: Sequence[str], log=print) -> dict:
    """Find the data and train on it: the work behind the classification apps.

    Args:
        names: the data sets to look for, the wanted one first.

    Returns:
        The content of metrics.json, and under "folder" where the run lies. test_accuracy is of each image alone;
        where the views are not plain, tta_accuracy, tta_correct and tta_loss are of their mean logits.

    Raises:
        flags.UsageError, DataError, WeightsError, FolderInUseError, training.DivergedError: one clear line each. Before
            the first step nothing is left behind.
        training.Interrupted: SIGTERM or Ctrl-C came; the run was saved.
    """
    model_arguments(config)  # a flag that does not fit ends the run before the data are read
    with run_folder(config) as folder:
        dataset, note = read_data(config, names, log)
        return train(config, dataset, folder, note=note, log=log)


def build(config: Config, dataset: Dataset, skip: Sequence[str] = ()) -> tuple[keras.Model, Preprocessing, dict]:
    """The network of a run with its initial weights, its preprocessing, and the arguments of its own.

    Args:
        skip: patterns of the arrays of `config.weights` to leave, see `kvision.weights.load`.
    """
    preprocessing, own, manifest, at_most = build_preprocessing(dataset), model_arguments(config), {}, math.inf
    if config.weights is not None:
        weights = find(config.weights)
        held = inspect(weights)
        manifest, at_most = held["manifest"] or {}, room_for(held["parameters"])  # its arguments stand in a file
        known = zoo.arguments(config.model)
        own = {key: value for key, value in manifest.get("arguments", {}).items() if key in known} | own
        # Preprocessing belongs to the weights: what they were trained on decides, not this data set.
        preprocessing = Preprocessing.from_json(manifest.get("preprocessing") or preprocessing.to_json())
        if preprocessing.size not in (None, size := dataset.input_shape[:2]):
            preprocessing = replace(preprocessing, size=size, crop=1.0)
        skip = [*skip, *_head_to_skip(config, dataset, manifest, skip)]
    largest = memory.largest_kernel(dataset.input_shape, zoo.default_shape(config.model))
    try:
        with skip_init(at_most, largest):  # `initialize` follows
            model = zoo.build_model(config.model, dataset.input_shape, len(dataset.classes), **own)
    except ValueError as error:
        height, width = zoo.default_shape(config.model)[:2]
        cure = "" if largest is None else f"; it was published for images of {height}x{width}: --image-size {height}"
        raise flags.UsageError(f"{dataset.name} and {config.model} do not go together: {error}{cure}") from None
    initialize(model, config.seed)
    if config.weights is not None:
        load_weights(model, weights, skip)
    elif config.whiten:
        whiten(model, preprocessing(sample(dataset, WHITENED_PIXELS)))
    if config.whiten:
        model.get_layer("whiten_conv").trainable = False
    return model, preprocessing, own


def _head_to_skip(config: Config, dataset: Dataset, manifest: Mapping, skip: Sequence[str]) -> list[str]:
    """The pattern of the arrays of the last layer where they are not wanted.

    Raises:
        flags.UsageError: they are wanted, and are of another number of classes.
    """
    if config.new_head:
        return [NEW_HEAD]
    classes = manifest.get("arguments", {}).get("classes", len(dataset.classes))
    if not skip and classes != len(dataset.classes):
        raise flags.UsageError(
            f"--weights {config.weights} tell {classes} classes apart, and {dataset.name} has {len(dataset.classes)}: "
            "give --new-head to keep all but the last layer, and train that anew"
        )
    return []


def train(
    config: Config,
    dataset: Dataset,
    folder: Path,
    *,
    note: str | None = None,
    skip: Sequence[str] = (),
    prepare: Callable[[keras.Model], object] = lambda model: None,
    factors: Mapping[str, float] | None = None,
    log=print,
) -> dict:
    """Train on a data set, score, and write the run folder.

    Args:
        note: a remark on the data for the report.
        skip: patterns of the arrays of `config.weights` to leave, see `kvision.weights.load`.
        prepare: called with the model before training, to freeze layers.
        factors: learning-rate factors by variable pattern, see `kvision.training.optimizers.LearningRateMultipliers`.

    Returns, raises: as `classify`.
    """
    started = time.perf_counter()
    if not config.resume and Checkpoints(folder / "checkpoints").files():
        raise flags.UsageError(
            f"{folder} holds the checkpoints of a run: give --resume to go on with it, or another folder"
        )
    backend = keras.backend.backend()
    cache = {"auto": keras_cache().parent / "kvision-programs", "off": None}.get(
        config.compile_cache, config.compile_cache
    )
    engines.configure(config.dtype, deterministic=config.deterministic, compile_cache=cache)
    full = dataset
    dataset = full.subset(train=config.max_train_samples, test=config.max_test_samples, seed=config.seed)
    model, preprocessing, own = build(config, full, skip)
    prepare(model)
    regularize_weights(config, model)
    validation = None
    if config.early_stopping:
        dataset, validation = train_validation_split(dataset, HELD_OUT, config.seed)
    config = fit_batch(config, model, len(dataset.x_train), log)
    threads, load = choose_threads(zoo.multiply_adds(model) * config.batch_size), environment.load_average()
    batches = build_batches(config, dataset, preprocessing)
    expect_parts(batches.batch_size, config.gradient_accumulation_steps)  # of few images a batch is all
    optimizer = build_optimizer(config, batches.steps, factors or {})
    command = f"KERAS_BACKEND={backend} python -m apps.{config.app} {shlex.join(arguments_of(config))}"
    log(
        f"{config.model} on {dataset.name} ({dataset.source}): {len(dataset.x_train):,} training and "
        f"{len(dataset.x_test):,} test images, {len(dataset.classes)} classes; {backend}, "
        f"{count_parameters(model):,} trainable parameters, {threads} thread{'s' * (threads > 1)}; run folder {folder}"
    )
    # Before training goes on from a checkpoint the model has its initial weights, in a resumed run too.
    compared = dataset.x_test[:COMPARED_IMAGES]
    initial_logits = evaluation.predict(engines.create(model), compared, preprocessing).tolist()
    checkpoints = Checkpoints(folder / "checkpoints", configuration=identity(config, dataset))
    if config.resume:
        clean_run_folder(folder)
        if not checkpoints.files():
            log(f"{checkpoints.folder} has no checkpoint: the run starts from its beginning")
    store_config(config, folder)

    def on_epoch(history: trainer.History, sync: bool = False) -> None:
        # Not synced within the run: a resumed one writes both anew from its checkpoint.
        try:
            write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history.epochs), sync)
            trace = {"initial_logits": initial_logits, "step_losses": history.step_losses}
            write_json(folder / "trace.json", trace, sync)
        except OSError as error:
            text = f"{error.strerror}; the checkpoints in {checkpoints.folder} are intact: --resume goes on from them"
            raise OSError(error.errno, text, error.filename) from None

    history = trainer.fit(
        model,
        optimizer,
        classification.cross_entropy(config.label_smoothing),
        batches,
        epochs=config.epochs,
        test=(dataset.x_test, dataset.y_test),
        eval_every=config.eval_every,
        steps=config.max_steps,
        validation=validation,
        early_stopping=trainer.EarlyStopping(config.early_stopping) if config.early_stopping else None,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        engine=config.engine,
        data_on=data_on(config, dataset),
        steps_per_execution=config.steps_per_execution,
        checkpoint=checkpoints,
        save_every=config.save_every,
        on_epoch=on_epoch,
    )
    on_epoch(history, sync=True)
    # Epochs, checkpoints, manifest and confusions are of each image alone, so that they say what one answer is worth.
    engine = engines.create(model)
    logits = evaluation.predict(engine, dataset.x_test, preprocessing)
    scored, viewed = classification.score(logits, dataset.y_test), {}
    if config.tta != "none":
        mean = evaluation.predict(engine, dataset.x_test, preprocessing, tta=config.tta)
        viewed = {f"tta_{name}": value for name, value in classification.score(mean, dataset.y_test).items()}
    save(
        model,
        folder / "weights.npz",
        arguments=own,
        classes=list(dataset.classes),
        preprocessing=preprocessing.to_json(),
        dataset=dataset.name,
        accuracy={backend: scored["accuracy"]},
        license=config.license,
        provenance={"command": command, "seed": config.seed, "training_images": len(dataset.x_train)},
    )
    result = {
        "app": config.app,
        "model": config.model,
        "backend": backend,
        "dataset": dataset.name,
        "source": dataset.source[dataset.source.rfind(os.sep) + 1 :],  # no folder of this machine
        "note": note,
        "test_accuracy": scored["accuracy"],
        "test_correct": scored["correct"],
        "test_images": len(dataset.y_test),
        "test_loss": scored["loss"],
        "tta": config.tta,
        **viewed,
        "final_loss": history.epochs[-1]["loss"] if history.epochs else None,
        "train_seconds": sum(row["seconds"] for row in history.epochs),
        "total_seconds": time.perf_counter() - started,
        "images_per_second": median([row["images_per_second"] for row in history.epochs]),
        "seconds_to_first_step": history.seconds_to_first_step,
        "compile_seconds": history.compile_seconds,
        "peak_memory_bytes": environment.peak_memory_bytes(),
        "threads": threads,
        "load_average": load,
        "parameters": count_parameters(model),
        "seed": config.seed,
        "weights_sha256": sha256(folder / "weights.npz"),
        "versions": environment.versions(backend),
        "hardware": environment.hardware(),
        "command": command,
    }
    write_json(folder / "metrics.json", result)
    taken = min(len(history.epochs) * batches.steps, config.max_steps or len(history.epochs) * batches.steps)
    rates = learning_rates(build_schedule(config, total_steps(config, batches.steps)), taken, batches.steps)
    write_report(
        folder,
        config=public(config),
        history=history.epochs,
        result=result,
        confusion=classification.confusions(logits, dataset.y_test),
        classes=dataset.classes,
        mistakes=[
            MisclassifiedExample(
                dataset.x_test[i], dataset.classes[dataset.y_test[i]], dataset.classes[predicted], confidence
            )
            for i, predicted, confidence in classification.top_losses(logits, dataset.y_test)
        ],
        learning_rates=rates if taken else None,
    )
    more = f", {viewed['tta_accuracy']:.2%} with test-time augmentation {config.tta}" if viewed else ""
    log(
        f"{config.model} on {dataset.name}: test accuracy {scored['accuracy']:.2%} ({scored['correct']:,} of "
        f"{len(dataset.y_test):,}){more} after {result['train_seconds']:.0f} s of training; {folder / 'report.html'}"
    )
    return {**result, "folder": str(folder)}


def total_steps(config: Config, steps_an_epoch: int) -> int:
    """Steps that the schedule is laid over, at least 1."""
    return max(1, min(config.epochs * steps_an_epoch, config.max_steps or config.epochs * steps_an_epoch))


def build_schedule(config: Config, total: int):
    """The learning rate of each of `total` steps."""
    return schedules.schedule(config.schedule, config.learning_rate, total, config.warmup)


def learning_rates(schedule, steps: int, steps_an_epoch: int, most: int = 400) -> tuple[list[float], list[float]]:
    """Where steps lie, in epochs from the beginning, and their learning rates: of all steps, or of `most` of them."""
    shown = np.unique(np.linspace(0, steps - 1, min(steps, most)).round().astype(int)) if steps else []
    rates = [float(keras.ops.convert_to_numpy(schedule(int(step)))) for step in shown]
    return [int(step) / steps_an_epoch for step in shown], rates


def build_optimizer(config: Config, steps_an_epoch: int, factors: Mapping[str, float]) -> keras.optimizers.Optimizer:
    """The optimizer that a configuration describes, its schedule laid over the whole run."""
    total = total_steps(config, steps_an_epoch)
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        build_schedule(config, total),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_global_norm=config.clip_norm,
    )
    factors = dict(factors)
    if config.bias_factor != 1:
        factors[r".*bn/beta"] = config.bias_factor
    if factors:
        optimizer = optimizers.LearningRateMultipliers(optimizer, factors)
    if config.lookahead is not None:
        optimizer = averaging.Lookahead(optimizer, total, config.lookahead)
    # An average is of the weights that are trained, the drawing back included.
    if config.ema is not None:
        optimizer = averaging.EMA(optimizer, config.ema)
    if config.swa is not None:
        first = max(1, config.epochs - round(config.swa * config.epochs))
        optimizer = averaging.SWA(optimizer, first * steps_an_epoch, steps_an_epoch)
    return keras.optimizers.LossScaleOptimizer(optimizer) if config.dtype == "float16" else optimizer


def regularize_weights(config: Config, model: keras.Model) -> None:
    """Lay the configuration's penalties and bounds on the model's kernels."""
    if config.l1 or config.l2:
        regularizers.add_regularizer(model, keras.regularizers.L1L2(config.l1, config.l2))
    if config.orthogonal:
        regularizers.add_regularizer(model, regularizers.Orthogonal(config.orthogonal))
    if config.max_norm is not None:
        regularizers.add_constraint(model, regularizers.MaxNorm(config.max_norm))


def whiten(model: keras.Model, images: np.ndarray) -> None:
    """Set the layer `whiten_conv` to whiten the patches of preprocessed `images` (n, h, w, c), and freeze it."""
    try:
        layer = model.get_layer("whiten_conv")
    except ValueError:
        raise flags.UsageError(f"--whiten does not apply to {model.name}: it has no layer whiten_conv") from None
    layer.kernel.assign(whitening_kernel(images, layer.kernel_size[0]))


def count_parameters(model: keras.Model) -> int:
    """Trainable numbers of a model."""
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables))


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return float(np.median(values)) if values else None


def command(
    main: Callable[[Config], object],
    recipes: Mapping[str, Config],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    otherwise: Config | None = None,
) -> int:
    """An app's command line around its `main(config)`; returns the exit code.

    Args:
        recipes: a configuration for each network it is known for, by name; the first is the default. A network without
            one has the values of `otherwise`.
        argv: the arguments; None takes the process's own.
        otherwise: the default is that of the first one's class.
    """
    default = next(iter(recipes.values()))
    prog = f"python -m apps.{default.app}"
    known = {"model": f"{', '.join(recipes)} have one, `python -m kvision models` lists all"}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # into a pipe, too: a run of hours must not be silent

    def run() -> None:
        given = flags.parse(type(default), argv, prog=prog, description=description, defaults=default, more=known)
        if given.get("resume"):
            config = stored_config(default, given)
        else:
            name = given.get("model", default.model)
            if "weights" in given and "model" not in given:
                name = (inspect(find(given["weights"]))["manifest"] or {}).get("architecture") or name
            zoo.arguments(name)  # an unknown name ends here
            recipe = recipes.get(name) or otherwise or type(default)(app=default.app)
            config = replace(recipe, **{**given, "model": name, "fit_batch": "batch_size" not in given})
        main(config)

    return flags.run_cli(prog, run, (*ERRORS, zoo.UnknownModelError), trainer.Interrupted)
