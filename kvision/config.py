"""The configuration of a run: every field is a flag and is checked, and the command line can be written back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvision import engine, flags, zoo
from kvision.convert import pretrained_weights
from kvision.data.folder import MEMORY as FOLDER_MEMORY
from kvision.data.tta import TTA
from kvision.training import optimizers, schedules, trainer

HELD_OUT = 0.1  # fraction of the training images that early stopping uses as its validation set


def flag(default, text: str, **metadata):
    """A dataclass field that is a flag, with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class Config:
    """All settings of a run. Raises `flags.UsageError` for an invalid value.

    Args:
        app: name of the app, `apps.NAME`.
        fit_batch: whether to reduce `batch_size`, and `learning_rate` in proportion, where a step on images of more
            than 64x64 pixels would need more memory than `kvision.memory.ACTIVATIONS`. The command line turns it on
            unless --batch-size is given.
        bias_factor: learning-rate factor of the batch norm offsets; a recipe sets it, there is no flag.
    """

    GROUPS: ClassVar[Mapping[str, str]] = {
        "data": "data image_size data_memory max_train_samples max_test_samples",
        "model and weights": "model weights new_head",
        "training": "epochs max_steps batch_size optimizer learning_rate schedule warmup weight_decay seed "
        "early_stopping",
        "evaluation": "tta eval_every",
        "run folder": "output_dir resume save_every",
        "augmentation": "augment flip crop_padding padding_mode cutout random_erasing mixup cutmix",
        "regularization": "label_smoothing l1 l2 orthogonal max_norm ema swa",
        "optimizer details": "momentum clip_norm lookahead gradient_accumulation_steps",
        "network options": "dropout hidden whiten license",
        "execution": "dtype engine data_on steps_per_execution deterministic compile_cache",
    }
    RARE: ClassVar[tuple[str, ...]] = (
        *("augmentation", "regularization", "optimizer details", "network options", "execution"),
    )

    app: str = "cifar10"
    fit_batch: bool = True
    bias_factor: float = 1.0
    model: str = flag("softmax", "network of the zoo")
    epochs: int = flag(10, "passes over the training images; 0 only evaluates")
    batch_size: int = flag(128, "images a step; by default fewer of large images")
    learning_rate: float = flag(0.1, "maximum learning rate of the schedule")
    optimizer: str = flag("sgd", "optimizer", choices=optimizers.OPTIMIZERS)
    momentum: float = flag(0.9, "momentum of sgd, beta_1 of adam")
    weight_decay: float = flag(0.0, "decoupled weight decay of the kernels")
    schedule: str = flag("cosine", "learning-rate schedule", choices=schedules.SCHEDULES)
    warmup: float = flag(0.0, "fraction of the steps with a rising learning rate")
    label_smoothing: float = flag(0.0, "share of the target spread over all classes")
    l1: float = flag(0.0, "L1 penalty of the kernels")
    l2: float = flag(0.0, "L2 penalty of the kernels")
    orthogonal: float = flag(0.0, "penalty on kernels whose columns are not orthonormal")
    max_norm: float | None = flag(None, "maximum L2 norm of an output's weights", none="no limit")
    clip_norm: float | None = flag(None, "clip gradients to this global L2 norm", none="no clipping")
    ema: float | None = flag(None, "decay of an exponential moving average of the weights", none="off")
    swa: float | None = flag(None, "average the weights over this final fraction of the epochs", none="off")
    lookahead: int | None = flag(None, "steps between two updates of Lookahead's slow weights", none="off")
    early_stopping: int | None = flag(
        None,
        f"stop after N epochs without a lower loss on a {HELD_OUT:.0%} validation split",
        none="off",
    )
    mixup: float | None = flag(None, "alpha of mixup; with --cutmix, one of them a batch", none="off")
    cutmix: float | None = flag(None, "alpha of CutMix", none="off")
    random_erasing: float = flag(0.0, "fraction of the images with a rectangle of noise")
    dropout: float | None = flag(None, "dropout rate", none="the network's")
    augment: bool = flag(True, "apply the recipe's flips, crops and cutout")
    flip: bool = flag(False, "flip half of the images horizontally in each epoch")
    crop_padding: int = flag(0, "shift each image by up to N pixels: pad and crop")
    padding_mode: str = flag("zero", "how crops are padded", choices=("zero", "reflect"))
    cutout: int = flag(0, "side in pixels of a zero square in each image")
    seed: int = flag(0, "seed of weights, order and augmentation")
    data: str | None = flag(None, "folder or file of the data set", none="cache, ./data or download", metavar="PATH")
    image_size: int | None = flag(
        None, "side to which images of a folder are resized and cropped", none="the network's", metavar="PIXELS"
    )
    data_memory: float = flag(FOLDER_MEMORY / 2**30, "memory limit for the decoded images of a folder", metavar="GIB")
    output_dir: str | None = flag(None, "run folder", none="a new one below runs/", metavar="FOLDER")
    max_train_samples: int | None = flag(None, "use N training images, balanced over the classes", none="all")
    max_test_samples: int | None = flag(None, "use N test images", none="all")
    tta: str = flag("none", "test-time augmentation", choices=tuple(TTA))
    eval_every: int = flag(1, "evaluate every N epochs, and at the end")
    max_steps: int | None = flag(None, "stop after N steps", none="no limit")
    save_every: int | None = flag(None, "save a checkpoint every N steps", none="every epoch")
    resume: bool = flag(False, "resume the run in --output-dir, or the latest one")
    dtype: str = flag("float32", "16-bit dtypes keep float32 weights", choices=tuple(engine.POLICIES))
    engine: str = flag("native", "training step of kvision or of Keras", choices=engine.ENGINES)
    data_on: str = flag("auto", "where images are stored and augmented", choices=trainer.DATA_ON)
    steps_per_execution: int | None = flag(None, "steps in one program", none="about 50 on an accelerator, 1 on a CPU")
    gradient_accumulation_steps: int = flag(1, "split each batch into N parts to save memory")
    deterministic: bool = flag(False, "bit-identical runs on one machine, at lower speed")
    compile_cache: str = flag("auto", "folder for compiled JAX programs, auto or off", metavar="FOLDER")
    weights: str | None = flag(None, "initial weights: a file, or a name such as resnet20.cifar10", metavar="FILE|NAME")
    new_head: bool = flag(False, "replace the last layer of --weights")
    whiten: bool = flag(False, "initialize whiten_conv from the images and freeze it")
    hidden: int | None = flag(None, "units of each hidden layer", none="the network's")
    license: str | None = flag(None, "license of the weights, an SPDX identifier")

    def __post_init__(self):
        check = flags.check
        check(self, "epochs", lambda value: value >= 0, "0 or more")
        check(self, "batch_size eval_every gradient_accumulation_steps", lambda value: value >= 1, "at least 1")
        check(self, "learning_rate data_memory", lambda value: 0 < value < np.inf, "a positive number")
        check(self, "max_norm clip_norm mixup cutmix", lambda value: 0 < value < np.inf, "a positive number")
        check(self, "weight_decay l1 l2 orthogonal", lambda value: 0 <= value < np.inf, "0 or a positive number")
        check(
            self,
            "momentum label_smoothing warmup dropout ema",
            lambda value: 0 <= value < 1,
            "at least 0 and below 1",
        )
        check(self, "swa", lambda value: 0 < value < 1, "above 0 and below 1")
        check(self, "random_erasing", lambda value: 0 <= value <= 1, "from 0 to 1")
        check(self, "early_stopping lookahead", lambda value: value >= 1, "at least 1")
        if self.engine == "keras" and self.gradient_accumulation_steps != 1:
            raise flags.UsageError("--gradient-accumulation-steps requires the native engine: leave out --engine keras")
        expect_parts(self.batch_size, self.gradient_accumulation_steps)
        if self.data_on == "device" and (self.mixup or self.cutmix or self.random_erasing or self.engine == "keras"):
            raise flags.UsageError(
                "--mixup, --cutmix, --random-erasing and --engine keras require images on the host: leave out "
                "--data-on device"
            )
        if self.ema is not None and self.swa is not None:
            raise flags.UsageError("--ema and --swa both average the weights: give one of them")
        check(self, "crop_padding cutout", lambda value: value >= 0, "0 or more pixels")
        check(self, "image_size", lambda value: 1 <= value <= 4096, "from 1 to 4096 pixels")
        if self.new_head and self.weights is None:
            raise flags.UsageError("--new-head requires --weights: give a file or the name of pretrained weights")
        check(
            self,
            "max_train_samples max_test_samples max_steps hidden save_every steps_per_execution",
            lambda value: value >= 1,
            "at least 1",
        )
        check(self, "seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


def expect_parts(batch_size: int, gradient_accumulation_steps: int) -> None:
    """Check that a batch splits into equal parts; raises `flags.UsageError`."""
    if batch_size % gradient_accumulation_steps:
        raise flags.UsageError(
            f"a batch of {batch_size} images does not split into {gradient_accumulation_steps} equal parts: "
            "choose a --batch-size that is a multiple of --gradient-accumulation-steps"
        )


def model_arguments(config: Config) -> dict[str, object]:
    """The model-specific arguments that the flags set, such as `dropout_rate`.

    Raises:
        flags.UsageError: the network does not take the argument; the message names networks that do.
    """
    model_kwargs, defaults = {}, zoo.arguments(config.model)
    for name, key, value in (
        ("dropout", "dropout_rate", config.dropout),
        ("hidden", "hidden", config.hidden),
    ):
        if value is None:
            continue
        if key not in defaults or defaults[key] == ():
            others = [other for other in zoo.list_models() if zoo.arguments(other).get(key, ()) != ()]
            raise flags.UsageError(f"--{name} does not apply to {config.model}; it applies to {', '.join(others)}")
        model_kwargs[key] = (value,) * len(defaults[key]) if isinstance(defaults[key], tuple) else value
    return model_kwargs


def arguments_of(config: Config) -> list[str]:
    """The command line of a configuration, for a new run: every flag whose value is not the class's default.

    It has no local paths: `--data ...` stands for local data, `--weights ...` for other files.
    """
    skip = ("model", "output_dir", "resume", "compile_cache")
    return ["--model", config.model, *flags.arguments(config, skip, private(config))]


def private(config: Config) -> list[str]:
    """The fields that hold a local path, which reports and manifests leave out."""
    pretrained = config.weights is None or config.weights.removesuffix(".npz") in pretrained_weights()
    return ["data", "output_dir", "compile_cache"] + ["weights"] * (not pretrained)


def public(config: Config) -> dict[str, object]:
    """The configuration as a dictionary, with "..." for local paths."""
    hidden = [name for name in private(config) if getattr(config, name) not in (None, "auto", "off")]
    return dataclasses.asdict(config) | dict.fromkeys(hidden, "...")
