"""Trains and evaluates a classifier from a configuration and writes its run folder.

An app adds its data sets and its recipes. A recipe is a complete `Config`; the command line replaces single fields.
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

from kvision import engine, flags, memory, zoo
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
from kvision.weights.manifest import max_parameters

ERRORS = (DataError, WeightsError, FolderInUseError, trainer.DivergedError)
NEW_HEAD = r"(.*_)?logits/.*"  # arrays of the last layer, and of the last layers of auxiliary heads
COMPARED_IMAGES = 100  # test images whose initial logits are stored in trace.json, to compare backends


def classify(config: Config, names: Sequence[str], log=print) -> dict:
    """Load the data and train on them, as the classification apps do.

    Args:
        names: data sets in order of preference; the first that is available is used.

    Returns:
        The content of metrics.json, and the path of the run folder under "folder". test_accuracy is without test-time
        augmentation; with it, tta_accuracy, tta_correct and tta_loss are those of the averaged logits.

    Raises:
        flags.UsageError, DataError, WeightsError, FolderInUseError, training.DivergedError: a one-line message. An
        error
            before the first step leaves no files.
        training.Interrupted: the process got SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    model_arguments(config)  # raises for a flag that does not apply, before the data are read
    with run_folder(config) as folder:
        dataset, note = read_data(config, names, log)
        return train(config, dataset, folder, note=note, log=log)


def build(config: Config, dataset: Dataset, skip: Sequence[str] = ()) -> tuple[keras.Model, Preprocessing, dict]:
    """Build the network with its initial weights; returns it, its preprocessing and its model-specific arguments.

    Args:
        skip: patterns of the arrays of `config.weights` that are not loaded, see `kvision.weights.load`.
    """
    preprocessing, model_kwargs, manifest, at_most = build_preprocessing(dataset), model_arguments(config), {}, math.inf
    if config.weights is not None:
        weights = find(config.weights)
        content = inspect(weights)
        # The arguments come from a file, so the size of the network is bounded.
        manifest, at_most = content["manifest"] or {}, max_parameters(content["parameters"])
        known = zoo.arguments(config.model)
        stored = {key: value for key, value in manifest.get("arguments", {}).items() if key in known}
        model_kwargs = stored | model_kwargs
        # Preprocessing belongs to the weights, not to this data set.
        preprocessing = Preprocessing.from_json(manifest.get("preprocessing") or preprocessing.to_json())
        if preprocessing.size not in (None, size := dataset.input_shape[:2]):
            preprocessing = replace(preprocessing, size=size, crop=1.0)
        skip = [*skip, *_head_to_skip(config, dataset, manifest, skip)]
    largest = memory.largest_kernel(dataset.input_shape, zoo.default_shape(config.model))
    try:
        with skip_init(at_most, largest):  # `initialize` below sets the weights
            model = zoo.build_model(config.model, dataset.input_shape, len(dataset.classes), **model_kwargs)
    except ValueError as error:
        height, width = zoo.default_shape(config.model)[:2]
        hint = "" if largest is None else f"; its default image size is {height}x{width}: --image-size {height}"
        raise flags.UsageError(f"{config.model} cannot be built for {dataset.name}: {error}{hint}") from None
    initialize(model, config.seed)
    if config.weights is not None:
        load_weights(model, weights, skip)
    elif config.whiten:
        whiten(model, preprocessing(sample(dataset, WHITENED_PIXELS)))
    if config.whiten:
        model.get_layer("whiten_conv").trainable = False
    return model, preprocessing, model_kwargs


def _head_to_skip(config: Config, dataset: Dataset, manifest: Mapping, skip: Sequence[str]) -> list[str]:
    """The pattern of the last layer's arrays if `--new-head` replaces it, else an empty list.

    Raises:
        flags.UsageError: the weights have another number of classes, without `--new-head`.
    """
    if config.new_head:
        return [NEW_HEAD]
    classes = manifest.get("arguments", {}).get("classes", len(dataset.classes))
    if not skip and classes != len(dataset.classes):
        raise flags.UsageError(
            f"--weights {config.weights} have {classes} classes, and {dataset.name} has {len(dataset.classes)}: "
            "give --new-head to replace the last layer and train it"
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
    """Train and evaluate on a data set, and write the run folder.

    Args:
        note: a remark on the data for the report.
        skip: patterns of the arrays of `config.weights` that are not loaded, see `kvision.weights.load`.
        prepare: called with the model before training, for instance to freeze layers.
        factors: learning-rate factors by variable pattern, see `kvision.training.optimizers.LearningRateMultipliers`.

    Returns, raises: as `classify`.
    """
    started = time.perf_counter()
    if not config.resume and Checkpoints(folder / "checkpoints").files():
        raise flags.UsageError(
            f"{folder} holds the checkpoints of a run: give --resume to continue it, or another folder"
        )
    backend = keras.backend.backend()
    cache = {"auto": keras_cache().parent / "kvision-programs", "off": None}.get(
        config.compile_cache, config.compile_cache
    )
    engine.configure(config.dtype, deterministic=config.deterministic, compile_cache=cache)
    full = dataset
    dataset = full.subset(train=config.max_train_samples, test=config.max_test_samples, seed=config.seed)
    model, preprocessing, model_kwargs = build(config, full, skip)
    prepare(model)
    regularize_weights(config, model)
    validation = None
    if config.early_stopping:
        dataset, validation = train_validation_split(dataset, HELD_OUT, config.seed)
    config = fit_batch(config, model, len(dataset.x_train), log)
    threads, load = choose_threads(zoo.multiply_adds(model) * config.batch_size), environment.load_average()
    batches = build_batches(config, dataset, preprocessing)
    expect_parts(batches.batch_size, config.gradient_accumulation_steps)  # a small data set has smaller batches
    optimizer = build_optimizer(config, batches.steps, factors or {})
    command = f"KERAS_BACKEND={backend} python -m {flags.app_module(config.app)} {shlex.join(arguments_of(config))}"
    log(
        f"{config.model} on {dataset.name} ({dataset.source}): {len(dataset.x_train):,} training and "
        f"{len(dataset.x_test):,} test images, {len(dataset.classes)} classes; {backend}, "
        f"{count_parameters(model):,} trainable parameters, {threads} thread{'s' * (threads > 1)}; run folder {folder}"
    )
    # The model still has its initial weights here, in a resumed run too: `fit` loads the checkpoint.
    compared = dataset.x_test[:COMPARED_IMAGES]
    initial_logits = evaluation.predict(engine.create(model), compared, preprocessing).tolist()
    checkpoints = Checkpoints(folder / "checkpoints", configuration=identity(config, dataset))
    if config.resume:
        clean_run_folder(folder)
        if not checkpoints.files():
            log(f"{checkpoints.folder} has no checkpoint: the run starts at step 0")
    store_config(config, folder)

    def on_epoch(history: trainer.History, sync: bool = False) -> None:
        # Not synced within the run: a resumed run writes both files again from its checkpoint.
        try:
            write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history.epochs), sync)
            trace = {"initial_logits": initial_logits, "step_losses": history.step_losses}
            write_json(folder / "trace.json", trace, sync)
        except OSError as error:
            text = f"{error.strerror}; the checkpoints in {checkpoints.folder} are intact: --resume continues from them"
            raise OSError(error.errno, text, error.filename) from None

    evaluations = {"test": (dataset.x_test, dataset.y_test)}
    if validation is not None:
        evaluations["validation"] = validation
    history = trainer.fit(
        model,
        classification.Classification(label_smoothing=config.label_smoothing),
        optimizer,
        batches,
        epochs=config.epochs,
        evaluations=evaluations,
        schedule=trainer.Schedule(config.max_steps, config.eval_every, config.save_every),
        early_stopping=trainer.EarlyStopping(config.early_stopping) if config.early_stopping else None,
        checkpoint=checkpoints,
        execution=trainer.Execution(
            config.engine,
            data_on(config, dataset),
            config.steps_per_execution,
            config.gradient_accumulation_steps,
        ),
        on_epoch=on_epoch,
    )
    on_epoch(history, sync=True)
    # Epochs, checkpoints, manifest and confusion counts are without test-time augmentation.
    runner = engine.create(model)
    logits = evaluation.predict(runner, dataset.x_test, preprocessing)
    scored, augmented = classification.score(logits, dataset.y_test), {}
    if config.tta != "none":
        mean = evaluation.predict(runner, dataset.x_test, preprocessing, tta=config.tta)
        augmented = {f"tta_{name}": value for name, value in classification.score(mean, dataset.y_test).items()}
    save(
        model,
        folder / "weights.npz",
        arguments=model_kwargs,
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
        "source": dataset.source[dataset.source.rfind(os.sep) + 1 :],  # no local folder
        "note": note,
        "test_accuracy": scored["accuracy"],
        "test_correct": scored["correct"],
        "test_images": len(dataset.y_test),
        "test_loss": scored["loss"],
        "tta": config.tta,
        **augmented,
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
    steps_run = min(len(history.epochs) * batches.steps, config.max_steps or len(history.epochs) * batches.steps)
    rates = learning_rates(build_schedule(config, total_steps(config, batches.steps)), steps_run, batches.steps)
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
        learning_rates=rates if steps_run else None,
    )
    more = f", {augmented['tta_accuracy']:.2%} with test-time augmentation {config.tta}" if augmented else ""
    log(
        f"{config.model} on {dataset.name}: test accuracy {scored['accuracy']:.2%} ({scored['correct']:,} of "
        f"{len(dataset.y_test):,}){more} after {result['train_seconds']:.0f} s of training; {folder / 'report.html'}"
    )
    return {**result, "folder": str(folder)}


def total_steps(config: Config, steps_an_epoch: int) -> int:
    """The number of steps that the schedule spans, at least 1."""
    return max(1, min(config.epochs * steps_an_epoch, config.max_steps or config.epochs * steps_an_epoch))


def build_schedule(config: Config, total: int):
    """The learning rate of each of `total` steps."""
    return schedules.schedule(config.schedule, config.learning_rate, total, config.warmup)


def learning_rates(schedule, steps: int, steps_an_epoch: int, most: int = 400) -> tuple[list[float], list[float]]:
    """The positions of steps, in epochs, and their learning rates: of all steps, or of `most` evenly spaced ones."""
    shown = np.unique(np.linspace(0, steps - 1, min(steps, most)).round().astype(int)) if steps else []
    rates = [float(keras.ops.convert_to_numpy(schedule(int(step)))) for step in shown]
    return [int(step) / steps_an_epoch for step in shown], rates


def build_optimizer(config: Config, steps_an_epoch: int, factors: Mapping[str, float]) -> keras.optimizers.Optimizer:
    """The optimizer of a configuration, with a schedule over the whole run."""
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
    # An average is of the trained weights, Lookahead's updates included.
    if config.ema is not None:
        optimizer = averaging.EMA(optimizer, config.ema)
    if config.swa is not None:
        first = max(1, config.epochs - round(config.swa * config.epochs))
        optimizer = averaging.SWA(optimizer, first * steps_an_epoch, steps_an_epoch)
    return keras.optimizers.LossScaleOptimizer(optimizer) if config.dtype == "float16" else optimizer


def regularize_weights(config: Config, model: keras.Model) -> None:
    """Add the configuration's regularizers and constraints to the model's kernels."""
    if config.l1 or config.l2:
        regularizers.add_regularizer(model, keras.regularizers.L1L2(config.l1, config.l2))
    if config.orthogonal:
        regularizers.add_regularizer(model, regularizers.Orthogonal(config.orthogonal))
    if config.max_norm is not None:
        regularizers.add_constraint(model, regularizers.MaxNorm(config.max_norm))


def whiten(model: keras.Model, images: np.ndarray) -> None:
    """Set the layer `whiten_conv` to whiten the patches of preprocessed `images` (n, h, w, c)."""
    try:
        layer = model.get_layer("whiten_conv")
    except ValueError:
        raise flags.UsageError(f"--whiten does not apply to {model.name}: it has no layer whiten_conv") from None
    layer.kernel.assign(whitening_kernel(images, layer.kernel_size[0]))


def count_parameters(model: keras.Model) -> int:
    """The number of trainable parameters."""
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables))


def median(values: Sequence[float]) -> float | None:
    """The median, or None for no values."""
    return float(np.median(values)) if values else None


def command(
    main: Callable[[Config], object],
    recipes: Mapping[str, Config],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    otherwise: Config | None = None,
) -> int:
    """Run an app's `main(config)` from the command line; returns the exit code.

    Args:
        recipes: configurations by network name; the first is the default.
        argv: the arguments; None takes the process's.
        otherwise: the configuration of a network without a recipe; None takes the defaults of the recipes' class.
    """
    default = next(iter(recipes.values()))
    prog = f"python -m {flags.app_module(default.app)}"
    known = {"model": f"recipes for {', '.join(recipes)}; `python -m kvision models` lists all"}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe shows each line at once, too

    def run() -> None:
        given = flags.parse(type(default), argv, prog=prog, description=description, defaults=default, more=known)
        if given.get("resume"):
            config = stored_config(default, given)
        else:
            name = given.get("model", default.model)
            if "weights" in given and "model" not in given:
                name = (inspect(find(given["weights"]))["manifest"] or {}).get("architecture") or name
            zoo.arguments(name)  # raises for an unknown name
            recipe = recipes.get(name) or otherwise or type(default)(app=default.app)
            config = replace(recipe, **{**given, "model": name, "fit_batch": "batch_size" not in given})
        main(config)

    return flags.run_cli(prog, run, (*ERRORS, zoo.UnknownModelError), trainer.Interrupted)
