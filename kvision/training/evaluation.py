"""What a task reports of sets of images, and predictions of images, from the host or from the device."""

import math
from collections.abc import Callable

import numpy as np
from keras import ops

from kvision.data.batches import PARAMS, Batches
from kvision.data.device import DeviceDataset
from kvision.data.preprocessing import Preprocessing, as_uint8
from kvision.data.tta import TTA, augmented_views
from kvision.tasks import add, summarize

ON_HOST, ON_DEVICE = 500, 2000  # batch sizes for images of 32x32


def default_batch_size(shape: tuple[int, int], at_32: int) -> int:
    """The batch size for images (height, width) of `shape`: `at_32` at 32x32 or less, and of larger images as many as
    have the same number of pixels, so that they do not fill the memory."""
    return min(at_32, max(1, at_32 * 32 * 32 // math.prod(shape)))


def host_means(means) -> dict:
    """Means as float64 on the host."""
    return {
        name: tuple(np.asarray(ops.convert_to_numpy(leaf), np.float64) for leaf in (total, weight))
        for name, (total, weight) in means.items()
    }


def evaluate(
    engine,
    batches: Batches | DeviceDataset,
    batch_size: int | None = None,
    call: Callable = lambda hook, step, logs=None: None,
) -> dict[str, float]:
    """The task's figures of all images of `batches`, each once and without augmentation, in inference mode.

    The last batch is filled up with examples of weight 0, unless the task does not leave those out.

    Args:
        engine: with a task. Metrics among the task's variables are started anew before and hold these images after.
        batches: on the host, or on the device.
        batch_size: None is 500 on the host and 2,000 on the device, fewer of images larger than 32x32.
        call: called as `call("on_test_batch_begin", step)` and `call("on_test_batch_end", step, figures_so_far)`.
    """
    return summarize(engine.program.task, evaluation_totals(engine, batches, batch_size, call))


def evaluation_totals(engine, batches, batch_size=None, call=None) -> dict:
    """The added Means of `evaluate`, float64 on the host."""
    task, on_device = engine.program.task, isinstance(batches, DeviceDataset)
    source = batches.batches if on_device else batches
    at_32 = ON_DEVICE if on_device else ON_HOST
    batch_size = batch_size or default_batch_size((source.height, source.width), at_32)
    if hasattr(task, "begin"):
        engine.sync_variables()
        task.begin()
    totals, waiting = {}, None
    pad = getattr(task, "masks_padding", True) and getattr(engine, "MASKS_PADDING", True)
    for step, params in enumerate(source.in_order(batch_size, pad)):
        if call:
            call("on_test_batch_begin", step)
        means = engine.evaluate_on_device(batches, params) if on_device else engine.evaluate(source.make_batch(params))
        if call:
            totals = add(totals, host_means(means))
            call("on_test_batch_end", step, summarize(task, totals))
            continue
        if waiting is not None:
            totals = add(totals, host_means(waiting))  # while the device works on the next
        waiting = means
    return totals if waiting is None else add(totals, host_means(waiting))


def predict(
    engine, images: np.ndarray, preprocessing: Preprocessing, batch_size: int | None = None, tta: str = "none"
) -> np.ndarray:
    """Predictions (n, ...) of uint8 images (n, h, w, c); the last batch is filled up, so that one shape is compiled.

    Args:
        engine: whose model takes images, with or without a task.
        batch_size: None is 500, or as many as have the pixels of 500 images of CIFAR-10: 10 of 224x224.
        tta: the views of each image, whose predictions' weighted mean is taken, see `kvision.data.tta`.
    """
    images = as_uint8(images)
    batch_size = min(batch_size or default_batch_size(images.shape[1:3], ON_HOST), len(images))
    predictions = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)])
        mean = sum(weight * engine.predict(preprocessing(view)) for weight, view in augmented_views(batch, tta))
        predictions.append(mean[: batch_size - missing])
    return np.concatenate(predictions).astype(np.float32)


def predict_on_device(engine, dataset: DeviceDataset, batch_size: int | None = None, tta: str = "none") -> np.ndarray:
    """Predictions (n, ...) of images on the device, in their order.

    Args:
        engine: with a task that predicts.
        batch_size: None is 2,000, or as many as have the pixels of 2,000 images of CIFAR-10.
        tta: as for `predict`; views that are moved need images with a border of a pixel at least.
    """
    batch_size = min(batch_size or default_batch_size((dataset.height, dataset.width), ON_DEVICE), dataset.count)
    padding = dataset.padding
    count = math.ceil(dataset.count / batch_size)
    indices = np.arange(count * batch_size, dtype=np.int32) % dataset.count  # the last batch is filled up
    total = 0
    for weight, move, mirrored in TTA[tta]:
        if abs(move) > padding:
            raise ValueError(f"tta {tta!r} moves images by {abs(move)} pixels, their border has {padding}")
        params = np.zeros((count, len(PARAMS), batch_size), np.int32)
        params[:, 0] = indices.reshape(count, batch_size)
        params[:, 1:3] = padding - move
        params[:, 3] = mirrored
        found = engine.predict_on_device(dataset, params)
        total += weight * found.reshape(-1, *found.shape[2:])[: dataset.count]
    return total.astype(np.float32)
