"""One run of a classifier: a configuration, a data set, a network, and the folder that tells what came of it.

The apps for CIFAR-10 and MNIST are this file plus their data set and their recipes. A recipe is a whole `Config`; the
command line replaces single fields of it.
"""

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import keras
import numpy as np

from kvision import engine as floors
from kvision import evaluation, flags, optimizers, regularizers, training, zoo
from kvision.checkpoints import Checkpoints
from kvision.data import DataError, Dataset, DataUnavailable, load
from kvision.data.batches import Augmentation, Batches
from kvision.data.find import keras_cache
from kvision.data.preprocessing import Preprocessing
from kvision.data.views import VIEWS
from kvision.engine.threads import choose as choose_threads
from kvision.files import FolderInUseError, sha256, write_json, write_text
from kvision.layers import blank, whitening_kernel
from kvision.random import stream
from kvision.regularizers.samples import CutMix, Mixed, Mixup, RandomErasing
from kvision.run_folder import identity, run_folder, store_config, stored_config, sweep
from kvision.tasks import classification
from kvision.tracking import environment
from kvision.tracking.report import Mistake, write_report
from kvision.weights import WeightsError, inspect, save
from kvision.weights import load as load_weights
from kvision.weights.initial import initialize

ERRORS = (DataError, WeightsError, FolderInUseError, training.DivergedError)
HELD_OUT = 0.1  # share of the training images that early stopping goes by
COMPARED_IMAGES = 100  # test images whose logits under the initial weights a run keeps, for comparing backends


def flag(default, text: str, **metadata):
    """A field of a configuration that is a flag, with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Raises `flags.UsageError` where a value cannot work."""

    app: str = "cifar10"
    model: str = flag("softmax", "network of the zoo; each has its recipe, which the other flags change")
    epochs: int = flag(10, "times that every training image is shown; 0 scores the initial weights or --weights")
    batch_size: int = flag(128, "images a step")
    learning_rate: float = flag(0.1, "the largest learning rate of the schedule")
    optimizer: str = flag("sgd", "sgd, adam or adamw", choices=optimizers.OPTIMIZERS)
    momentum: float = flag(0.9, "momentum of sgd, beta_1 of adam")
    weight_decay: float = flag(0.0, "decoupled weight decay of the kernels, times the learning rate each step")
    schedule: str = flag("cosine", "how the learning rate goes down", choices=optimizers.SCHEDULES)
    warmup: float = flag(0.0, "share of the steps in which the learning rate rises")
    label_smoothing: float = flag(0.0, "share of the target that is spread over all classes")
    l1: float = flag(0.0, "penalty on the sum of the kernels' absolute values")
    l2: float = flag(0.0, "penalty on the sum of the kernels' squares")
    orthogonal: float = flag(0.0, "penalty on what keeps the kernels' columns from being orthonormal")
    max_norm: float | None = flag(None, "largest length of the weights of one output; none sets no bound")
    clip: float | None = flag(None, "largest length of all gradients as one vector; none clips nothing")
    ema: float | None = flag(
        None, "decay of a moving average of the weights, which is scored and saved; none takes none"
    )
    swa: float | None = flag(None, "share of the epochs, the last, whose weights are averaged; none averages none")
    lookahead: int | None = flag(
        None, "steps after which the weights are drawn back to slow ones, again and again; none uses none"
    )
    early_stopping: int | None = flag(
        None,
        f"end after so many epochs without a smaller loss on {HELD_OUT:.0%} of the training images, held out for it",
    )
    mixup: float | None = flag(None, "alpha of mixup; with --cutmix each batch gets one of the two")
    cutmix: float | None = flag(None, "alpha of CutMix")
    erasing: float = flag(0.0, "share of the images that get a rectangle of noise")
    dropout: float | None = flag(None, "dropout rate of a network that has dropout; none keeps the network's own")
    augment: bool = flag(True, "flip, shift and blank the training images as the recipe says")
    flip: bool = flag(False, "mirror half of the images, the other half in the next epoch")
    shift: int = flag(0, "move each image by up to so many pixels")
    border: str = flag("zero", "what moves in: zero (black) or reflect", choices=("zero", "reflect"))
    cutout: int = flag(0, "blank a square of so many pixels a side in each image")
    seed: int = flag(0, "seed of the initial weights, the order and the augmentation, equal on every backend")
    data: str | None = flag(
        None, "folder or file to read the data set from; none looks in the usual places", metavar="PATH"
    )
    out: str | None = flag(None, "folder of the run; none makes a new one below runs/", metavar="FOLDER")
    limit: int | None = flag(None, "train on so many images, drawn evenly from the classes; none takes all")
    limit_test: int | None = flag(None, "test on so many images; none takes all")
    views: str = flag(
        "plain",
        "what the finished model is scored on too, beside each test image alone: the mean logits of it and its mirror "
        "image (mirror), or of these and both moved by a pixel (shifted); plain is the image alone",
        choices=tuple(VIEWS),
    )
    test_every: int = flag(1, "epochs from one scoring of the test images to the next; the end is always scored")
    steps: int | None = flag(None, "stop after so many steps, whatever --epochs says")
    checkpoint_every: int | None = flag(None, "steps from one checkpoint to the next; none keeps one after each epoch")
    resume: bool = flag(False, "go on with the run in --out, or with the latest one, from its last checkpoint")
    dtype: str = flag(
        "float32",
        "float32 or float64 for everything, bfloat16 or float16 for the layers with float32 weights",
        choices=tuple(floors.POLICIES),
    )
    engine: str = flag("native", "native, or keras for the step of Keras's own fit", choices=floors.KINDS)
    images_on: str = flag(
        "auto",
        "host makes the images of each step in NumPy, device keeps all in its memory and makes them there; auto is the "
        "second where it can be",
        choices=training.IMAGES_ON,
    )
    steps_at_once: int | None = flag(
        None, "steps of images on the device in one program; none is about 50 on an accelerator, 1 on a CPU"
    )
    accumulate: int = flag(1, "cut each batch into so many parts, one after the other, to save memory")
    deterministic: bool = flag(False, "the same bits in every run on the same machine, where that costs speed")
    compile_cache: str = flag(
        "auto",
        "folder that keeps JAX's compiled programs for the next run; auto is one in Keras's cache, off keeps none",
        metavar="FOLDER",
    )
    weights: str | None = flag(None, "start from this weights file instead of random weights", metavar="FILE")
    bias_factor: float = flag(1.0, "learning-rate factor of the batch norms' offsets")
    whiten: bool = flag(False, "set the layer whiten_conv from the training images and freeze it")
    hidden: int | None = flag(None, "units of each hidden layer of a network that has some; none keeps its own")
    licence: str | None = flag(None, "licence of the weights, for their manifest")

    def __post_init__(self):
        expect = flags.expect
        expect(self, "epochs", lambda value: value >= 0, "0 or more")
        expect(self, "batch_size test_every accumulate", lambda value: value >= 1, "at least 1")
        expect(self, "learning_rate bias_factor", lambda value: 0 < value < np.inf, "a positive number")
        expect(self, "max_norm clip mixup cutmix", lambda value: 0 < value < np.inf, "a positive number")
        expect(self, "weight_decay l1 l2 orthogonal", lambda value: 0 <= value < np.inf, "0 or a positive number")
        expect(
            self,
            "momentum label_smoothing warmup dropout ema",
            lambda value: 0 <= value < 1,
            "at least 0 and below 1",
        )
        expect(self, "swa", lambda value: 0 < value < 1, "above 0 and below 1")
        expect(self, "erasing", lambda value: 0 <= value <= 1, "from 0 to 1")
        expect(self, "early_stopping lookahead", lambda value: value >= 1, "at least 1")
        if self.engine == "keras" and self.accumulate != 1:
            raise flags.UsageError("--accumulate is the native engine's: leave out --engine keras")
        expect_parts(self.batch_size, self.accumulate)
        if self.images_on == "device" and (self.mixup or self.cutmix or self.erasing or self.engine == "keras"):
            raise flags.UsageError(
                "--mixup, --cutmix, --erasing and --engine keras want images from the host: leave out "
                "--images-on device"
            )
        if self.ema is not None and self.swa is not None:
            raise flags.UsageError("--ema and --swa are two averages of the weights: give one")
        expect(self, "shift cutout", lambda value: value >= 0, "0 or more pixels")
        expect(
            self, "limit limit_test steps hidden checkpoint_every steps_at_once", lambda value: value >= 1, "at least 1"
        )
        expect(self, "seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


def expect_parts(batch_size: int, accumulate: int) -> None:
    """Check that a batch can be cut into equal parts; raises `flags.UsageError`."""
    if batch_size % accumulate:
        raise flags.UsageError(
            f"a batch of {batch_size} images cannot be cut into {accumulate} equal parts: choose a --batch-size "
            "that is a multiple of --accumulate"
        )


def model_arguments(config: Config) -> dict[str, object]:
    """The arguments of the network's own that the flags set.

    Raises:
        flags.UsageError: the network has no such part; the message names networks that have.
    """
    own, defaults = {}, zoo.arguments(config.model)
    for name, key, value in (
        ("dropout", "dropout_rate", config.dropout),
        ("hidden", "hidden", config.hidden),
    ):
        if value is None:
            continue
        if key not in defaults or defaults[key] == ():
            others = [other for other in zoo.list_models() if zoo.arguments(other).get(key, ()) != ()]
            raise flags.UsageError(f"--{name} does not apply to {config.model}; it does to {', '.join(others)}")
        own[key] = (value,) * len(defaults[key]) if isinstance(defaults[key], tuple) else value
    return own


def read_data(config: Config, names: Sequence[str], log=print) -> tuple[Dataset, str | None]:
    """The data set, and a note where it is not the first of `names` because that one is nowhere to be had.

    Raises:
        DataError: `--data` names no readable data set, or none of `names` is there.
    """
    if config.data is not None:
        return load(names[0], config.data, log=log), None
    missing = []
    for name in names:
        try:
            dataset = load(name, seed=config.seed, log=log)
        except DataUnavailable as error:
            missing.append(str(error))
            continue
        if not missing:
            return dataset, None
        note = f"{names[0]} is not here, so this run trains on {dataset.name} instead. {missing[0]}"
        log(f"NOTE: {note}")
        return dataset, note
    raise DataUnavailable(missing[0])


def preprocessing_of(dataset: Dataset) -> Preprocessing:
    """Mean 0 and deviation 1 a channel over the training images, from statistics rounded to four digits."""
    counts = [
        np.bincount(dataset.x_train[..., channel].ravel(), minlength=256)
        for channel in range(dataset.x_train.shape[-1])
    ]
    values = np.arange(256) / 255
    means = [float(np.average(values, weights=count)) for count in counts]
    stds = [
        float(np.sqrt(np.average((values - m) ** 2, weights=count))) for m, count in zip(means, counts, strict=True)
    ]
    return Preprocessing(
        mean=tuple(round(mean, 4) for mean in means),
        std=tuple(max(round(std, 4), 1e-3) for std in stds),
        channel_order="rgb" if dataset.x_train.shape[-1] == 3 else "grey",
        size=dataset.input_shape[:2],
    )


def classify(config: Config, names: Sequence[str], log=print) -> dict:
    """Find the data and train on it: the work behind the classification apps.

    Args:
        names: the data sets to look for, the wanted one first.

    Returns:
        The content of metrics.json, and under "folder" where the run lies. test_accuracy is of each image alone;
        where the views are not plain, views_accuracy, views_correct and views_loss are of their mean logits.

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
    preprocessing, own, manifest = preprocessing_of(dataset), model_arguments(config), {}
    if config.weights is not None:
        manifest = inspect(config.weights)["manifest"] or {}
        known = zoo.arguments(config.model)
        own = {key: value for key, value in manifest.get("arguments", {}).items() if key in known} | own
        # Preprocessing belongs to the weights: what they were trained on decides, not this data set.
        preprocessing = Preprocessing.from_json(manifest.get("preprocessing") or preprocessing.to_json())
    try:
        with blank():  # `initialize` follows
            model = zoo.create_model(config.model, dataset.input_shape, len(dataset.classes), **own)
    except ValueError as error:
        raise flags.UsageError(f"{dataset.name} and {config.model} do not go together: {error}") from None
    initialize(model, config.seed)
    if config.weights is not None:
        load_weights(model, config.weights, skip)
    elif config.whiten:
        whiten(model, preprocessing(dataset.x_train[:5000]))
    if config.whiten:
        model.get_layer("whiten_conv").trainable = False
    return model, preprocessing, own


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
        factors: learning-rate factors by variable pattern, see `kvision.optimizers.LearningRateFactors`.

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
    floors.configure(config.dtype, deterministic=config.deterministic, compile_cache=cache)
    full = dataset
    dataset = full.subset(train=config.limit, test=config.limit_test, seed=config.seed)
    model, preprocessing, own = build(config, full, skip)
    threads, load = choose_threads(zoo.multiply_adds(model) * config.batch_size), environment.load_average()
    prepare(model)
    regularize_weights(config, model)
    validation = None
    if config.early_stopping:
        dataset, validation = hold_out(dataset, HELD_OUT, config.seed)
    batches = batches_of(config, dataset, preprocessing)
    expect_parts(batches.batch_size, config.accumulate)  # of few images a batch is all
    optimizer = optimizer_of(config, batches.steps, factors or {})
    command = f"KERAS_BACKEND={backend} python -m apps.{config.app} {shlex.join(arguments_of(config))}"
    log(
        f"{config.model} on {dataset.name} ({dataset.source}): {len(dataset.x_train):,} training and "
        f"{len(dataset.x_test):,} test images, {len(dataset.classes)} classes; {backend}, "
        f"{count_parameters(model):,} trainable parameters, {threads} thread{'s' * (threads > 1)}; run folder {folder}"
    )
    # Before training goes on from a checkpoint the model has its initial weights, in a resumed run too.
    compared = dataset.x_test[:COMPARED_IMAGES]
    initial_logits = evaluation.predict(floors.create(model), compared, preprocessing).tolist()
    checkpoints = Checkpoints(folder / "checkpoints", configuration=identity(config, dataset))
    if config.resume:
        sweep(folder)
        if not checkpoints.files():
            log(f"{checkpoints.folder} has no checkpoint: the run starts from its beginning")
    store_config(config, folder)

    def on_epoch(history: training.History, sync: bool = False) -> None:
        # Not synced within the run: a resumed one writes both anew from its checkpoint.
        try:
            write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history.epochs), sync)
            trace = {"initial_logits": initial_logits, "step_losses": history.step_losses}
            write_json(folder / "trace.json", trace, sync)
        except OSError as error:
            text = f"{error.strerror}; the checkpoints in {checkpoints.folder} are intact: --resume goes on from them"
            raise OSError(error.errno, text, error.filename) from None

    history = training.fit(
        model,
        optimizer,
        classification.cross_entropy(config.label_smoothing),
        batches,
        epochs=config.epochs,
        test=(dataset.x_test, dataset.y_test),
        test_every=config.test_every,
        steps=config.steps,
        validation=validation,
        early_stopping=training.EarlyStopping(config.early_stopping) if config.early_stopping else None,
        accumulate=config.accumulate,
        engine=config.engine,
        images_on=config.images_on,
        steps_at_once=config.steps_at_once,
        checkpoint=checkpoints,
        checkpoint_every=config.checkpoint_every,
        on_epoch=on_epoch,
    )
    on_epoch(history, sync=True)
    # Epochs, checkpoints, manifest and confusions are of each image alone, so that they say what one answer is worth.
    engine = floors.create(model)
    logits = evaluation.predict(engine, dataset.x_test, preprocessing)
    scored, viewed = classification.score(logits, dataset.y_test), {}
    if config.views != "plain":
        mean = evaluation.predict(engine, dataset.x_test, preprocessing, views=config.views)
        viewed = {f"views_{name}": value for name, value in classification.score(mean, dataset.y_test).items()}
    save(
        model,
        folder / "weights.npz",
        arguments=own,
        classes=list(dataset.classes),
        preprocessing=preprocessing.to_json(),
        dataset=dataset.name,
        accuracy={backend: scored["accuracy"]},
        licence=config.licence,
        provenance={"command": command, "seed": config.seed, "training_images": len(dataset.x_train)},
    )
    result = {
        "app": config.app,
        "model": config.model,
        "backend": backend,
        "dataset": dataset.name,
        "source": dataset.source,
        "note": note,
        "test_accuracy": scored["accuracy"],
        "test_correct": scored["correct"],
        "test_images": len(dataset.y_test),
        "test_loss": scored["loss"],
        "views": config.views,
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
    write_report(
        folder,
        config=dataclasses.asdict(config),
        history=history.epochs,
        result=result,
        confusion=classification.confusion_matrix(logits, dataset.y_test),
        classes=dataset.classes,
        mistakes=[
            Mistake(dataset.x_test[i], dataset.classes[dataset.y_test[i]], dataset.classes[predicted], confidence)
            for i, predicted, confidence in classification.worst_mistakes(logits, dataset.y_test)
        ],
    )
    more = f", {viewed['views_accuracy']:.2%} on the views {config.views}" if viewed else ""
    log(
        f"{config.model} on {dataset.name}: test accuracy {scored['accuracy']:.2%} ({scored['correct']:,} of "
        f"{len(dataset.y_test):,}){more} after {result['train_seconds']:.0f} s of training; {folder / 'report.html'}"
    )
    return {**result, "folder": str(folder)}


def optimizer_of(config: Config, steps_an_epoch: int, factors: Mapping[str, float]) -> keras.optimizers.Optimizer:
    """The optimizer that a configuration describes, its schedule laid over the whole run."""
    total = max(1, min(config.epochs * steps_an_epoch, config.steps or config.epochs * steps_an_epoch))
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        optimizers.schedule(config.schedule, config.learning_rate, total, config.warmup),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_global_norm=config.clip,
    )
    factors = dict(factors)
    if config.bias_factor != 1:
        factors[r".*bn/beta"] = config.bias_factor
    if factors:
        optimizer = optimizers.LearningRateFactors(optimizer, factors)
    if config.lookahead is not None:
        optimizer = optimizers.Lookahead(optimizer, total, config.lookahead)
    # An average is of the weights that are trained, the drawing back included.
    if config.ema is not None:
        optimizer = optimizers.ExponentialAverage(optimizer, config.ema)
    if config.swa is not None:
        first = max(1, config.epochs - round(config.swa * config.epochs))
        optimizer = optimizers.StochasticAverage(optimizer, first * steps_an_epoch, steps_an_epoch)
    return keras.optimizers.LossScaleOptimizer(optimizer) if config.dtype == "float16" else optimizer


def regularize_weights(config: Config, model: keras.Model) -> None:
    """Lay the configuration's penalties and bounds on the model's kernels."""
    if config.l1 or config.l2:
        regularizers.attach(model, keras.regularizers.L1L2(config.l1, config.l2))
    if config.orthogonal:
        regularizers.attach(model, regularizers.Orthogonal(config.orthogonal))
    if config.max_norm is not None:
        regularizers.constrain(model, regularizers.MaxNorm(config.max_norm))


def batches_of(config: Config, dataset: Dataset, preprocessing: Preprocessing) -> Batches | Mixed:
    """The training images as the configuration shows them."""
    augmentation = Augmentation(config.flip, config.shift, config.border, config.cutout) if config.augment else None
    batches = Batches(dataset.x_train, dataset.y_train, config.batch_size, config.seed, preprocessing, augmentation)
    mixers = [kind(alpha) for kind, alpha in ((Mixup, config.mixup), (CutMix, config.cutmix)) if alpha is not None]
    erasing = RandomErasing(config.erasing) if config.erasing else None
    if not mixers and not erasing:
        return batches
    return Mixed(batches, len(dataset.classes), mixers, erasing)


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, tuple[np.ndarray, np.ndarray]]:
    """The data set without a share of its training images, drawn from each class, and those images and labels.

    Raises:
        flags.UsageError: the share is less than an image, or all of them.
    """
    labels, generator = dataset.y_train, stream(seed, "hold out")
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        held[places[: round(share * len(places))]] = True
    if not held.any():
        raise flags.UsageError(f"{len(labels)} training images are too few to hold out {share:.0%} of each class")
    part = replace(dataset, x_train=dataset.x_train[~held], y_train=dataset.y_train[~held])
    return part, (dataset.x_train[held], dataset.y_train[held])


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


def arguments_of(config: Config) -> list[str]:
    """The command line that gives this configuration from scratch: every flag that is not the class's default."""
    return ["--model", config.model, *flags.arguments(config, ("model", "out", "resume", "data"))]


def command(
    main: Callable[[Config], object], recipes: Mapping[str, Config], description: str, argv: Sequence[str] | None = None
) -> int:
    """An app's command line around its `main(config)`; returns the exit code.

    Args:
        recipes: a configuration for each network it is known for, by name; the first is the default. A network without
            one has the values of the first's class.
        argv: the arguments; None takes the process's own.
    """
    default = next(iter(recipes.values()))
    prog = f"python -m apps.{default.app}"

    def run() -> None:
        given = flags.parse(type(default), argv, prog=prog, description=description, defaults=default)
        if given.get("resume"):
            config = stored_config(default, given)
        else:
            name = given.get("model", default.model)
            if "weights" in given and "model" not in given:
                name = (inspect(given["weights"])["manifest"] or {}).get("architecture") or name
            zoo.arguments(name)  # an unknown name ends here
            config = replace(recipes.get(name) or type(default)(app=default.app, model=name), **given)
        main(config)

    return flags.guard(prog, run, (*ERRORS, zoo.UnknownModelError), training.Interrupted)
