"""The data of a run: loads and resizes images, splits off a validation set, builds batches that fit into memory."""

from collections.abc import Sequence
from dataclasses import replace

import keras
import numpy as np

from kvision import engine, flags, memory, zoo
from kvision.config import Config
from kvision.convert import find
from kvision.data import Dataset, DataUnavailable, load
from kvision.data.batches import Augmentation, Batches
from kvision.data.mixing import CutMix, MixedBatches, Mixup, RandomErasing
from kvision.data.preprocessing import Preprocessing
from kvision.random import rng
from kvision.weights import inspect

WHITENED_PIXELS = 5000 * 32 * 32  # pixels of the images from which the whitening kernel is computed


def image_size(config: Config) -> tuple[int, int]:
    """(height, width) to which the images of a folder are resized.

    It is `--image-size`, else the size in the manifest of `--weights`, else the network's default.

    Raises:
        WeightsError: `config.weights` cannot be read.
    """
    if config.image_size is not None:
        return config.image_size, config.image_size
    shape = zoo.default_shape(config.model)
    if config.weights is not None:
        manifest = inspect(find(config.weights))["manifest"] or {}
        shape = manifest.get("arguments", {}).get("input_shape", shape)
    return tuple(shape[:2])


def read_data(config: Config, names: Sequence[str], log=print) -> tuple[Dataset, str | None]:
    """Load the data set; returns it and a note if it is not the first of `names`, else None.

    Raises:
        DataError: `--data` names no readable data set, or none of `names` is available.
    """
    if config.data is not None:
        dataset = load(
            names[0],
            config.data,
            size=image_size(config),
            limit=(config.max_train_samples, config.max_test_samples),
            memory=int(config.data_memory * 2**30),
            log=log,
        )
        if config.image_size not in (None, *dataset.input_shape[:2]):
            height, width = dataset.input_shape[:2]
            raise flags.UsageError(
                f"--image-size applies to folders of images; those of {dataset.name} are {height}x{width}"
            )
        return dataset, None
    missing = []
    for name in names:
        try:
            dataset = load(name, seed=config.seed, log=log)
        except DataUnavailable as error:
            missing.append(str(error))
            continue
        if not missing:
            return dataset, None
        note = f"{names[0]} is not available, so this run trains on {dataset.name} instead. {missing[0]}"
        log(f"NOTE: {note}")
        return dataset, note
    raise DataUnavailable(missing[0])


def build_preprocessing(dataset: Dataset) -> Preprocessing:
    """Standardization to mean 0 and standard deviation 1 a channel over the training images.

    The statistics are rounded to four decimals.
    """
    images = dataset.x_train
    part = max(1, (1 << 22) // images[0].size)  # np.bincount makes int64 copies, eight times as large
    counts = [
        sum(
            np.bincount(images[start : start + part, ..., channel].ravel(), minlength=256)
            for start in range(0, len(images), part)
        )
        for channel in range(images.shape[-1])
    ]
    values = np.arange(256) / 255
    means = [float(np.average(values, weights=count)) for count in counts]
    stds = [
        float(np.sqrt(np.average((values - m) ** 2, weights=count))) for m, count in zip(means, counts, strict=True)
    ]
    return Preprocessing(
        mean=tuple(round(mean, 4) for mean in means),
        std=tuple(max(round(std, 4), 1e-3) for std in stds),
        channel_order="rgb" if dataset.x_train.shape[-1] == 3 else "gray",
        size=dataset.input_shape[:2],
    )


def build_batches(config: Config, dataset: Dataset, preprocessing: Preprocessing) -> Batches | MixedBatches:
    """The training batches of a configuration, with its augmentation."""
    augmentation = (
        Augmentation(config.flip, config.crop_padding, config.padding_mode, config.cutout) if config.augment else None
    )
    batches = Batches(
        dataset.x_train,
        dataset.y_train,
        config.batch_size,
        config.seed,
        preprocessing,
        augmentation,
        classes=len(dataset.classes),
    )
    transforms = [kind(alpha) for kind, alpha in ((Mixup, config.mixup), (CutMix, config.cutmix)) if alpha is not None]
    erasing = RandomErasing(config.random_erasing) if config.random_erasing else None
    if not transforms and not erasing:
        return batches
    return MixedBatches(batches, len(dataset.classes), transforms, erasing)


def fit_batch(config: Config, model: keras.Model, images: int, log=print) -> Config:
    """Reduce the batch size to what fits into memory, and the learning rate in proportion.

    The linear scaling rule is that of Goyal et al. 2017, https://arxiv.org/abs/1706.02677.
    """
    requested = min(config.batch_size, images)
    size = (
        memory.batch_within(model, requested)
        if config.fit_batch and config.gradient_accumulation_steps == 1
        else requested
    )
    if size == requested:
        return config
    rate = config.learning_rate * size / requested
    much, less = (count * memory.activation_bytes(model) / 2**30 for count in (requested, size))
    log(
        f"batch size {size} instead of {requested}, learning rate {rate:g} instead of {config.learning_rate:g}: the "
        f"activations of {requested} images would take {much:.1f} GiB, those of {size} take {less:.2f}; give "
        f"--batch-size {requested} to use it nevertheless"
    )
    return replace(config, batch_size=size, learning_rate=rate)


def sample(dataset: Dataset, pixels: int) -> np.ndarray:
    """Training images with `pixels` pixels in total: the first ones, or evenly spaced ones if these lack a class."""
    images, count = dataset.x_train, max(1, pixels // int(np.prod(dataset.input_shape[:2])))
    if len(np.unique(dataset.y_train[:count])) == len(np.unique(dataset.y_train)):
        return images[:count]
    return images[np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)]


def data_on(config: Config, dataset: Dataset) -> str:
    """Where images are stored and augmented, resolving "auto".

    On a CPU, large images stay on the host: a second copy in the device's memory would gain nothing.
    """
    large = dataset.input_shape[0] * dataset.input_shape[1] > memory.SMALL_IMAGE
    return "host" if config.data_on == "auto" and large and not engine.accelerated() else config.data_on


def train_validation_split(
    dataset: Dataset, fraction: float, seed: int
) -> tuple[Dataset, tuple[np.ndarray, np.ndarray]]:
    """Split a stratified fraction off the training images; returns the remaining data set, and (images, labels).

    Raises:
        flags.UsageError: the fraction is less than one image of each class.
    """
    labels, generator = dataset.y_train, rng(seed, "hold out")
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == label))
        held[indices[: round(fraction * len(indices))]] = True
    if not held.any():
        raise flags.UsageError(f"{len(labels)} training images are too few to hold out {fraction:.0%} of each class")
    part = replace(dataset, x_train=dataset.x_train[~held], y_train=dataset.y_train[~held])
    return part, (dataset.x_train[held], dataset.y_train[held])
