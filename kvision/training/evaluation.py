"""Logits and losses of sets of images, from the host or from the device."""

import math
from collections.abc import Callable

import numpy as np

from kvision.data.batches import PARAMS, Batches
from kvision.data.device import DeviceDataset
from kvision.data.preprocessing import Preprocessing, as_uint8
from kvision.data.tta import TTA, augmented_views


def at_once(shape: tuple[int, int], small: int) -> int:
    """Images (height, width) of `shape` that are predicted at once: as many as have the pixels of `small` ones of
    32x32, so that large ones do not fill the memory."""
    return min(small, max(1, small * 32 * 32 // math.prod(shape)))


def evaluate(
    engine,
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int,
    call: Callable = lambda hook, step, logs=None: None,
) -> float:
    """The loss in inference mode with its penalties, as `keras.Model.evaluate` gives it: the mean over all images.

    Args:
        images: uint8 (n, h, w, c).
        labels: integers (n,).
        call: called as `call("on_test_batch_begin", step)` and `call("on_test_batch_end", step, {"loss": so_far})`.
    """
    total = 0.0
    for step, start in enumerate(range(0, len(images), batch_size)):
        call("on_test_batch_begin", step)
        stop = min(start + batch_size, len(images))
        loss, _ = engine.evaluate(preprocessing(images[start:stop]), labels[start:stop])
        total += float(loss) * (stop - start)
        call("on_test_batch_end", step, {"loss": total / stop})
    return total / len(images)


def predict(
    engine, images: np.ndarray, preprocessing: Preprocessing, batch_size: int | None = None, tta: str = "none"
) -> np.ndarray:
    """Logits (n, classes) of uint8 images (n, h, w, c); the last batch is filled up, so that one shape is compiled.

    Args:
        batch_size: None is 500, or as many as have the pixels of 500 images of CIFAR-10: 10 of 224x224.
        views: of each image, whose logits' weighted mean is taken, see `kvision.data.tta`.
    """
    images = as_uint8(images)
    batch_size = min(batch_size or at_once(images.shape[1:3], 500), len(images))
    logits = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)])
        mean = sum(weight * engine.predict(preprocessing(view)) for weight, view in augmented_views(batch, tta))
        logits.append(mean[: batch_size - missing])
    return np.concatenate(logits).astype(np.float32)


def predict_pictures(engine, pictures: DeviceDataset, batch_size: int | None = None, tta: str = "none") -> np.ndarray:
    """Logits (n, classes) of pictures on the device, in their order.

    Args:
        batch_size: None is 2,000, or as many as have the pixels of 2,000 images of CIFAR-10.
        views: as for `predict`; those that are moved want pictures with a border of a pixel at least.
    """
    batch_size = min(batch_size or at_once((pictures.height, pictures.width), 2000), pictures.count)
    border = pictures.padding
    count = math.ceil(pictures.count / batch_size)
    numbers = np.arange(count * batch_size, dtype=np.int32) % pictures.count  # the last batch is filled up
    total = 0
    for weight, move, mirrored in TTA[tta]:
        if abs(move) > border:
            raise ValueError(f"tta {tta!r} moves images by {abs(move)} pixels, their border has {border}")
        params = np.zeros((count, len(PARAMS), batch_size), np.int32)
        params[:, 0] = numbers.reshape(count, batch_size)
        params[:, 1:3] = border - move
        params[:, 3] = mirrored
        logits = engine.predict_on_device(pictures, params)
        total += weight * logits.reshape(-1, logits.shape[-1])[: pictures.count]
    return total.astype(np.float32)


class Scorer:
    """Logits of named sets of images, which lie on the device from their first scoring on where the others do."""

    def __init__(self, engine, preprocessing: Preprocessing, on_device: bool):
        self.engine, self.preprocessing = engine, preprocessing
        self.held = {} if on_device else None

    def __call__(self, name: str, images: np.ndarray) -> np.ndarray:
        if self.held is None:
            return predict(self.engine, images, self.preprocessing)
        if name not in self.held:
            self.held[name] = DeviceDataset(Batches(images, np.zeros(len(images), np.int32), 1, 0, self.preprocessing))
        return predict_pictures(self.engine, self.held[name])
