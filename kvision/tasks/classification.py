"""One label for each image: its loss, its score, and the mistakes worth looking at."""

from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

# Of each auxiliary head's loss (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 5).
AUXILIARY_WEIGHT = 0.3
PART = 1 << 20  # logits that are scored at once


@keras.saving.register_keras_serializable("kvision")
class CrossEntropy(keras.losses.Loss):
    """The mean cross-entropy `loss(labels, logits)` in nats.

    Labels are integers (n,) or targets (n, classes) that sum to 1 in each row. Logits are (n, classes), or a list of
    such from a network with auxiliary heads: the first counts whole, the others by `AUXILIARY_WEIGHT`.

    Args:
        smoothing: the share of each target that is spread over all classes (Szegedy et al. 2015,
            https://arxiv.org/abs/1512.00567, section 7).

    Raises:
        ValueError: a smoothing outside 0 to 1.
    """

    def __init__(self, smoothing: float = 0.0, name: str = "cross_entropy"):
        if not 0 <= smoothing < 1:
            raise ValueError(f"label smoothing must be at least 0 and below 1, got {smoothing}")
        super().__init__(name)
        self.smoothing = smoothing
        self.of_targets = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)

    def __call__(self, y_true, y_pred, sample_weight=None):
        # Keras's own `__call__` would make numbers of the labels, and wants labels for each of several heads.
        main, *auxiliary = y_pred if isinstance(y_pred, list | tuple) else [y_pred]
        labels = ops.convert_to_tensor(y_true)
        targets = labels if len(labels.shape) == 2 else ops.one_hot(ops.cast(labels, "int32"), main.shape[-1])
        loss = self.of_targets(targets, main, sample_weight)
        return loss + AUXILIARY_WEIGHT * sum(self.of_targets(targets, logits, sample_weight) for logits in auxiliary)

    def get_config(self):
        return {"smoothing": self.smoothing, "name": self.name}


def cross_entropy(smoothing: float = 0.0) -> CrossEntropy:
    """The mean cross-entropy of labels and logits; see `CrossEntropy`."""
    return CrossEntropy(smoothing)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log softmax over the last axis in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _parts(logits: np.ndarray) -> Iterator[np.ndarray]:
    """The logits in parts of some megabytes: their copies in float64 are of a part, however many classes there are."""
    rows = max(1, PART // logits.shape[-1])
    return (logits[start : start + rows] for start in range(0, len(logits), rows))


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy (0 to 1), the count behind it and the mean cross-entropy in nats, of (n, classes) logits."""
    correct = int((logits.argmax(axis=-1) == labels).sum())
    losses, done = [], 0
    for part in _parts(logits):
        losses.append(-log_probabilities(part)[np.arange(len(part)), labels[done : done + len(part)]])
        done += len(part)
    return {"accuracy": correct / len(labels), "correct": correct, "loss": float(np.concatenate(losses).mean())}


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes) counts: row the true class, column the predicted one. Of many classes see `confusions`."""
    classes = logits.shape[-1]
    cells = np.asarray(labels, np.int64) * classes + logits.argmax(axis=-1)  # uint8 labels would overflow
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def confusions(logits: np.ndarray, labels: np.ndarray) -> dict[tuple[int, int], int]:
    """How many images of a true class were given a predicted one: {(true, predicted): count}, of what occurred alone.

    As many entries as images at most, where a matrix has the square of the number of classes.
    """
    classes = logits.shape[-1]
    cells = np.asarray(labels, np.int64) * classes + logits.argmax(axis=-1)
    return {
        divmod(int(cell), classes): int(count)
        for cell, count in zip(*np.unique(cells, return_counts=True), strict=True)
    }


def top_losses(logits: np.ndarray, labels: np.ndarray, count: int = 24) -> list[tuple[int, int, float]]:
    """(index, predicted class, its probability) of the wrong answers given with most confidence."""
    predicted = logits.argmax(axis=-1)
    confidence = np.concatenate([np.exp(log_probabilities(part).max(axis=-1)) for part in _parts(logits)])
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    return [(int(i), int(predicted[i]), float(confidence[i])) for i in order]
