"""Classification: one label for each image, or several; its loss, its metrics and the mistakes worth looking at."""

from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from kvision.engine import main_output
from kvision.engine.keras_internals import direction
from kvision.tasks import mean

# Of each auxiliary head's loss (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 5).
AUXILIARY_WEIGHT = 0.3
PART = 1 << 20  # logits that are scored at once
INSTEAD = "Train it with Keras's own model.compile(...) and model.fit(...)."


class Classification:
    """Images {"image"} and their labels {"label"}: integers (n,), or targets (n, classes).

    The loss is the mean over the examples, by their "weight" where a batch has one. Reported are "accuracy" (of targets
    the largest counts), in inference mode "loss" too, and what is asked for below.

    Args:
        loss: `loss(labels, outputs)`, a Keras loss or a function that gives a scalar; None is `CrossEntropy`, or with
            `multi_label` the binary cross-entropy of each class. A function takes no weights.
        label_smoothing: of these two.
        multi_label: targets (n, classes) are 0 or 1 for each class on its own; accuracy is the share of right ones.
        metrics: Keras metrics of integer labels (n,) and logits (n, classes); of targets they see the largest.
        top_k: for each number k "top_<k>": the share of labels among the k largest logits.
        per_class: report "precision", "recall" and "f1", the means over the classes. The evaluation's totals then have
            "confusion", counts (classes, classes): row the true class, column the predicted one.
        calibration: bins of confidence for "calibration_error" (Guo et al. 2017, https://arxiv.org/abs/1706.04599,
            equation 3); 0 reports none.

    Raises:
        ValueError: `label_smoothing` beside a loss; metrics that share a name, or have one that is reported anyway.
    """

    def __init__(
        self,
        loss=None,
        *,
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        metrics: Sequence[keras.metrics.Metric] = (),
        top_k: Sequence[int] = (),
        per_class: bool = False,
        calibration: int = 0,
    ):
        if loss is not None and label_smoothing:
            raise ValueError("label_smoothing is of the default loss: give it to the loss")
        if loss is None and multi_label:
            loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=label_smoothing)
        elif loss is None:
            loss = CrossEntropy(label_smoothing)
        if not callable(loss):
            raise TypeError(
                f"expected a loss(labels, logits) such as kvision.tasks.classification.CrossEntropy(), got {loss!r}; "
                "keras.losses.get makes one of a name"
            )
        self.loss_function, self.multi_label, self.keras_metrics = loss, multi_label, list(metrics)
        self.top_k, self.per_class, self.calibration = tuple(top_k), per_class, calibration
        names = [metric.name for metric in metrics]
        if len({*names, "loss", "accuracy"}) != len(names) + 2:
            raise ValueError(
                f"metrics must have names of their own, other than loss and accuracy; got {', '.join(names)}"
            )
        self.variables = [variable for metric in metrics for variable in metric.variables]
        self.masks_padding = isinstance(loss, keras.losses.Loss)
        self.directions = {metric.name: direction(metric) for metric in metrics} | {"accuracy": "up"}

    def loss(self, models, batch):
        outputs, labels, weight = models(batch["image"]), batch["label"], batch.get("weight")
        loss, logits = self._loss(labels, outputs, weight), ops.stop_gradient(main_output(outputs))
        self._update(labels, logits, weight)
        return loss, {"accuracy": self._accuracy(labels, logits, weight)}

    def metrics(self, models, batch):
        outputs, labels, weight = models(batch["image"]), batch["label"], batch.get("weight")
        loss, logits = self._loss(labels, outputs, weight), main_output(outputs)
        self._update(labels, logits, weight)
        count = logits.shape[0] if weight is None else ops.cast(ops.sum(weight), loss.dtype)
        means = {"loss": (loss * count, count), "accuracy": self._accuracy(labels, logits, weight)}
        for k in self.top_k:
            hits = ops.in_top_k(_classes(labels), logits, k=k)
            means[f"top_{k}"] = _total(ops.cast(hits, "float32"), weight)
        if self.per_class:
            means["confusion"] = self._confusion(labels, logits, weight)
        if self.calibration:
            means["calibration"] = self._bins(labels, logits, weight)
        return means

    def predict(self, models, batch):
        """Logits (n, classes)."""
        return main_output(models(batch["image"]))

    def begin(self) -> None:
        for metric in self.keras_metrics:
            metric.reset_state()

    def summarize(self, totals: Mapping) -> dict[str, float]:
        found = mean(totals)
        if "confusion" in totals:
            scores = class_scores(np.asarray(totals["confusion"][0]))
            found |= {name: float(values.mean()) for name, values in scores.items()}
        if "calibration" in totals:
            (_, confident, right), weight = np.asarray(totals["calibration"][0]).T, totals["calibration"][1]
            found["calibration_error"] = float(np.abs(confident - right).sum() / weight)
        return found | {metric.name: float(ops.convert_to_numpy(metric.result())) for metric in self.keras_metrics}

    def _loss(self, labels, outputs, weight):
        if weight is None:
            return self.loss_function(labels, outputs)
        loss = self.loss_function(labels, outputs, sample_weight=weight)
        if self.loss_function.reduction != "sum_over_batch_size":
            return loss
        # Keras divides by the number of examples, whatever their weights.
        return loss * (weight.shape[0] / ops.maximum(ops.cast(ops.sum(weight), loss.dtype), 1e-9))

    def _accuracy(self, labels, logits, weight):
        if self.multi_label:
            right = ops.equal(ops.greater(logits, 0), ops.greater(labels, 0.5))
        else:
            right = ops.equal(_classes(labels), ops.argmax(logits, axis=-1))
        if weight is None and len(right.shape) == 1:
            return ops.sum(ops.cast(right, "int32")), right.shape[0]
        right = ops.cast(right, "float32")
        return _total(ops.mean(right, axis=tuple(range(1, len(right.shape)))), weight)

    def _confusion(self, labels, logits, weight):
        classes = logits.shape[-1]
        true = ops.one_hot(_classes(labels), classes, dtype="float32")
        predicted = ops.one_hot(ops.argmax(logits, axis=-1), classes, dtype="float32")
        count = logits.shape[0] if weight is None else ops.sum(weight)
        if weight is not None:
            predicted = predicted * ops.cast(weight, "float32")[:, None]
        return ops.matmul(ops.transpose(true), predicted), count

    def _bins(self, labels, logits, weight):
        """(bins, 3): examples, the sum of their confidence, and how many are right."""
        probabilities = ops.softmax(ops.cast(logits, "float32"))
        confidence = ops.max(probabilities, axis=-1)
        right = ops.cast(ops.equal(_classes(labels), ops.argmax(logits, axis=-1)), "float32")
        place = ops.minimum(ops.cast(confidence * self.calibration, "int32"), self.calibration - 1)
        bins = ops.one_hot(place, self.calibration, dtype="float32")
        count = logits.shape[0] if weight is None else ops.sum(weight)
        if weight is not None:
            bins = bins * ops.cast(weight, "float32")[:, None]
        rows = ops.stack([ops.ones_like(confidence), confidence, right], axis=1)
        return ops.matmul(ops.transpose(bins), rows), count

    def _update(self, labels, logits, weight) -> None:
        options = {} if weight is None else {"sample_weight": weight}
        for metric in self.keras_metrics:
            metric.update_state(labels if self.multi_label else _classes(labels), logits, **options)

    def check_models(self, models: Mapping) -> None:
        """Refuse models that are no classifier of images.

        Raises:
            ValueError: several models, several inputs or nested ones, or outputs that are not a tensor or a list.
        """
        if len(models) > 1:
            raise ValueError(f"classification trains one model, got {', '.join(models)}")
        for model in models.values():
            for name, kinds in (
                ("inputs", "one input tensor"),
                ("outputs", "a tensor, or a list of tensors, as output"),
            ):
                tensors = getattr(model, name, None)  # a subclass of keras.Model has none: its outputs are seen later
                structure = getattr(model, name.removesuffix("s"), None)
                if tensors and (isinstance(structure, dict) or (name == "inputs" and len(tensors) > 1)):
                    what = f"a {type(structure).__name__} of {len(tensors)} {name}"
                    raise ValueError(
                        f"classification trains models with {kinds}, and {model.name} has {what}. {INSTEAD}"
                    )

    def check(self, batch) -> None:
        """Refuse labels that are neither class numbers nor shares of classes; tensors on a device are not looked at.

        Raises:
            ValueError: they are something else, or weights are given to a loss that takes none.
        """
        if batch.get("weight") is not None and not self.masks_padding:
            raise ValueError("a batch has weights, and the loss is a function, which takes none: give a Keras loss")
        labels = batch["label"]
        if not isinstance(labels, np.ndarray):
            return
        if self.multi_label:
            if labels.ndim == 2 and labels.size and labels.min() >= 0 and labels.max() <= 1:
                return
            raise ValueError(f"expected targets (n, classes) from 0 to 1, got {labels.dtype} of shape {labels.shape}")
        if labels.ndim != 2 and labels.dtype.kind in "iu":  # of two axes they could be counts of classes
            return
        if labels.ndim == 2 and labels.dtype.kind == "f":
            if np.allclose(labels.sum(axis=1), 1, atol=1e-3):
                return
            raise ValueError(
                f"targets (n, classes) must sum to 1 in each row; these do not: give multi_label=True. {INSTEAD}"
            )
        raise ValueError(
            f"expected integer labels (n,) or floating targets (n, classes), got {labels.dtype} of shape "
            f"{labels.shape}. {INSTEAD}"
        )

    def for_keras(self) -> dict:
        """The arguments of `model.compile` that describe this task."""
        return {"loss": self.loss_function, "metrics": self.keras_metrics}

    def keras_step(self) -> tuple:
        """The loss of Keras's own step, and its metrics, each with whether it goes on from step to step."""

        def loss(labels, outputs):  # Keras makes floating numbers of labels
            whole = len(labels.shape) != 2 and not self.multi_label
            return self.loss_function(ops.cast(labels, "int32") if whole else labels, outputs)

        def right(labels, logits):
            if self.multi_label:
                hits = ops.equal(ops.greater(logits, 0), ops.greater(labels, 0.5))
                return ops.mean(ops.cast(hits, "float32"), axis=-1)
            return ops.cast(ops.equal(_classes(labels), ops.argmax(logits, axis=-1)), "float32")

        running = [(_OfClasses(metric, self.multi_label), True) for metric in self.keras_metrics]
        return loss, [(keras.metrics.MeanMetricWrapper(right, name="accuracy"), False), *running]

    def keras_batch(self, batch) -> tuple:
        """Inputs, targets and sample weights of a batch."""
        return batch["image"], batch["label"], batch.get("weight")


class _OfClasses(keras.metrics.Metric):
    """A Keras metric that gets integer labels; a metric itself, so that Keras finds its variables."""

    def __init__(self, metric, multi_label: bool):
        super().__init__(name=metric.name, dtype=metric.dtype)
        self.metric, self.multi_label = metric, multi_label

    def update_state(self, y_true, y_pred, sample_weight=None):
        labels = y_true if self.multi_label else _classes(y_true)
        self.metric.update_state(labels, y_pred, **({} if sample_weight is None else {"sample_weight": sample_weight}))

    def result(self):
        return self.metric.result()

    def reset_state(self):
        self.metric.reset_state()


def _classes(labels):
    """Integer labels (n,); of targets (n, classes) the largest."""
    return ops.argmax(labels, axis=-1) if len(labels.shape) == 2 else ops.cast(labels, "int32")


def _total(values, weight):
    """The sum of values (n,) and its weight."""
    if weight is None:
        return ops.sum(values), values.shape[0]
    weight = ops.cast(weight, values.dtype)
    return ops.sum(values * weight), ops.sum(weight)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, (classes,), of counts (classes, classes) with a row a true class.

    Where nothing was predicted or nothing is true, precision or recall is 0.
    """
    right = np.diagonal(confusion).astype(np.float64)
    precision = right / np.maximum(confusion.sum(axis=0), 1e-12)
    recall = right / np.maximum(confusion.sum(axis=1), 1e-12)
    f1 = 2 * right / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}


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
