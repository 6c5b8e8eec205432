"""The configuration of a run: every field a flag, checked where it enters, and the command line that gives it again."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvision import engine, flags, memory, zoo
from kvision.convert import shipped
from kvision.data.folder import MEMORY as FOLDER_MEMORY
from kvision.data.tta import TTA
from kvision.training import optimizers, schedules, trainer

HELD_OUT = 0.1  # share of the training images that early stopping goes by


def flag(default, text: str, **metadata):
    """A field of a configuration that is a flag, with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Raises `flags.UsageError` where a value cannot work.

    Args:
        fit_batch: whether `batch_size` is made smaller, and `learning_rate` in proportion, where a step on images of
            more than 64x64 pixels would take more memory than `kvision.memory.ACTIVATIONS`. On the command line it is
            on unless --batch-size is given.
    """

    GROUPS: ClassVar[Mapping[str, str]] = {
        "data": "data image_size data_memory max_train_samples max_test_samples",
        "network and weights": "model weights new_head hidden dropout whiten license",
        "budget": "epochs max_steps batch_size gradient_accumulation_steps seed",
        "optimizer": "optimizer learning_rate schedule warmup momentum bias_factor clip_norm lookahead",
        "augmentation": "augment flip crop_padding padding_mode cutout random_erasing mixup cutmix",
        "regularization": "weight_decay l1 l2 orthogonal max_norm label_smoothing ema swa early_stopping",
        "scoring": "tta eval_every",
        "run folder": "output_dir resume save_every",
        "engine": "dtype engine data_on steps_per_execution deterministic compile_cache",
    }

    app: str = "cifar10"
    fit_batch: bool = True
    model: str = flag("softmax", "network of the zoo, with its recipe, which the other flags change")
    epochs: int = flag(10, "times that every training image is shown; 0 scores the initial weights or --weights")
    batch_size: int = flag(
        128,
        "images a step; without the flag fewer, at a learning rate in proportion, of images above 64x64 pixels whose "
        f"activations would take more than {memory.ACTIVATIONS >> 20} MiB",
    )
    learning_rate: float = flag(0.1, "the largest learning rate of the schedule")
    optimizer: str = flag("sgd", "what makes the step of a gradient", choices=optimizers.OPTIMIZERS)
    momentum: float = flag(0.9, "momentum of sgd, beta_1 of adam")
    weight_decay: float = flag(0.0, "decoupled weight decay of the kernels, times the learning rate each step")
    schedule: str = flag("cosine", "how the learning rate goes down", choices=schedules.SCHEDULES)
    warmup: float = flag(0.0, "share of the steps in which the learning rate rises")
    label_smoothing: float = flag(0.0, "share of the target that is spread over all classes")
    l1: float = flag(0.0, "penalty on the sum of the kernels' absolute values")
    l2: float = flag(0.0, "penalty on the sum of the kernels' squares")
    orthogonal: float = flag(0.0, "penalty on what keeps the kernels' columns from being orthonormal")
    max_norm: float | None = flag(None, "largest length of the weights of one output; none sets no bound")
    clip_norm: float | None = flag(None, "largest length of all gradients as one vector; none clips nothing")
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
    random_erasing: float = flag(0.0, "share of the images that get a rectangle of noise")
    dropout: float | None = flag(None, "dropout rate of a network that has dropout; none keeps the network's own")
    augment: bool = flag(True, "flip, shift and blank the training images as the recipe says")
    flip: bool = flag(False, "mirror half of the images, the other half in the next epoch")
    crop_padding: int = flag(0, "move each image by up to so many pixels")
    padding_mode: str = flag("zero", "what moves in, black pixels or the mirrored image", choices=("zero", "reflect"))
    cutout: int = flag(0, "blank a square of so many pixels a side in each image")
    seed: int = flag(0, "seed of the initial weights, the order and the augmentation, equal on every backend")
    data: str | None = flag(
        None, "folder or file to read the data set from; none looks in the usual places", metavar="PATH"
    )
    image_size: int | None = flag(
        None,
        "side in pixels that the images of a folder are brought to: the shorter side is resized, the centre cut out; "
        "none is the size the network, or --weights, was made for",
        metavar="PIXELS",
    )
    data_memory: float = flag(
        FOLDER_MEMORY / 2**30, "memory that the decoded images of a folder may take", metavar="GIB"
    )
    output_dir: str | None = flag(None, "folder of the run; none makes a new one below runs/", metavar="FOLDER")
    max_train_samples: int | None = flag(None, "train on so many images, drawn evenly from the classes; none takes all")
    max_test_samples: int | None = flag(None, "test on so many images; none takes all")
    tta: str = flag(
        "none",
        "what the finished model is scored on too, beside each test image alone: the mean logits of it and its mirror "
        "image (flip), or of these and both moved by a pixel (flip_shift); none is the image alone",
        choices=tuple(TTA),
    )
    eval_every: int = flag(1, "epochs from one scoring of the test images to the next; the end is always scored")
    max_steps: int | None = flag(None, "stop after so many steps, whatever --epochs says")
    save_every: int | None = flag(None, "steps from one checkpoint to the next; none keeps one after each epoch")
    resume: bool = flag(False, "go on with the run in --output-dir, or with the latest one, from its last checkpoint")
    dtype: str = flag(
        "float32",
        "float32 or float64 for everything, bfloat16 or float16 for the layers with float32 weights",
        choices=tuple(engine.POLICIES),
    )
    engine: str = flag("native", "native, or keras for the step of Keras's own fit", choices=engine.ENGINES)
    data_on: str = flag(
        "auto",
        "host makes the images of each step in NumPy, device keeps all in its memory and makes them there; auto is the "
        "second where it can be",
        choices=trainer.DATA_ON,
    )
    steps_per_execution: int | None = flag(
        None, "steps of images on the device in one program; none is about 50 on an accelerator, 1 on a CPU"
    )
    gradient_accumulation_steps: int = flag(1, "cut each batch into so many parts, one after the other, to save memory")
    deterministic: bool = flag(False, "the same bits in every run on the same machine, where that costs speed")
    compile_cache: str = flag(
        "auto",
        "folder that keeps JAX's compiled programs for the next run; auto is one in Keras's cache, off keeps none",
        metavar="FOLDER",
    )
    weights: str | None = flag(
        None,
        "start from this weights file, or from one that ships, by its name such as resnet20.cifar10",
        metavar="FILE|NAME",
    )
    new_head: bool = flag(False, "leave the last layer of --weights and begin with a new one, for other classes")
    bias_factor: float = flag(1.0, "learning-rate factor of the batch norms' offsets")
    whiten: bool = flag(False, "set the layer whiten_conv from the training images and freeze it")
    hidden: int | None = flag(None, "units of each hidden layer of a network that has some; none keeps its own")
    license: str | None = flag(None, "license of the weights, for their manifest")

    def __post_init__(self):
        check = flags.check
        check(self, "epochs", lambda value: value >= 0, "0 or more")
        check(self, "batch_size eval_every gradient_accumulation_steps", lambda value: value >= 1, "at least 1")
        check(self, "learning_rate bias_factor data_memory", lambda value: 0 < value < np.inf, "a positive number")
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
            raise flags.UsageError("--gradient-accumulation-steps is the native engine's: leave out --engine keras")
        expect_parts(self.batch_size, self.gradient_accumulation_steps)
        if self.data_on == "device" and (self.mixup or self.cutmix or self.random_erasing or self.engine == "keras"):
            raise flags.UsageError(
                "--mixup, --cutmix, --random-erasing and --engine keras want images from the host: leave out "
                "--data-on device"
            )
        if self.ema is not None and self.swa is not None:
            raise flags.UsageError("--ema and --swa are two averages of the weights: give one")
        check(self, "crop_padding cutout", lambda value: value >= 0, "0 or more pixels")
        check(self, "image_size", lambda value: 1 <= value <= 4096, "from 1 to 4096 pixels")
        if self.new_head and self.weights is None:
            raise flags.UsageError("--new-head is of --weights: give a file or the name of one that ships")
        check(
            self,
            "max_train_samples max_test_samples max_steps hidden save_every steps_per_execution",
            lambda value: value >= 1,
            "at least 1",
        )
        check(self, "seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


def expect_parts(batch_size: int, gradient_accumulation_steps: int) -> None:
    """Check that a batch can be cut into equal parts; raises `flags.UsageError`."""
    if batch_size % gradient_accumulation_steps:
        raise flags.UsageError(
            f"a batch of {batch_size} images cannot be cut into {gradient_accumulation_steps} equal parts: "
            "choose a --batch-size that is a multiple of --gradient-accumulation-steps"
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


def arguments_of(config: Config) -> list[str]:
    """The command line that gives this configuration from scratch: every flag that is not the class's default.

    Paths of this machine are not in it: `--data ...` stands for the data of one's own, `--weights ...` for a file that
    does not ship.
    """
    skip = ("model", "output_dir", "resume", "compile_cache")
    return ["--model", config.model, *flags.arguments(config, skip, private(config))]


def private(config: Config) -> list[str]:
    """The fields that hold a path of this machine, which no page and no manifest shows."""
    ships = config.weights is None or config.weights.removesuffix(".npz") in shipped()
    return ["data", "output_dir", "compile_cache"] + ["weights"] * (not ships)


def public(config: Config) -> dict[str, object]:
    """The configuration by name, "..." for a path of this machine."""
    hidden = [name for name in private(config) if getattr(config, name) not in (None, "auto", "off")]
    return dataclasses.asdict(config) | dict.fromkeys(hidden, "...")
