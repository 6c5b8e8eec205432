"""A compiled Keras model as a task: its loss, its metrics and its penalties are those of `model.compile`."""

from collections.abc import Mapping

import keras
from keras import ops, tree

from kvision.engine.keras_internals import copy_mask, loss_tracker


class Compiled:
    """Batches {"x", "y", "sample_weight"} of a model that `model.compile` has given a loss, as `model.fit` trains on.

    The loss is `model.compute_loss`, which a subclass may override: the losses of all outputs with their weights, and
    the model's penalties. The compiled metrics, the metrics of layers and the mean loss go on from step to step until
    `begin`; they are the task's variables, and `logs` reads them. Each of "x", "y" and "sample_weight" is an array, or
    arrays nested as the model and its losses take them; None and what is absent are the same.

    Args:
        model: compiled and built, and its losses and metrics built with it, as after the first step of `model.fit`.
    """

    has_penalties = True
    masks_padding = False

    def __init__(self, model: keras.Model):
        self.model = model
        self.variables = list(model.metrics_variables)

    def batch(self, data) -> dict:
        """The batch of what a data adapter of Keras gives: x, or a tuple of x, y and sample weights."""
        return dict(zip(("x", "y", "sample_weight"), keras.utils.unpack_x_y_sample_weight(data), strict=True))

    def loss(self, models, batch):
        return self._score(models, batch, training=True), {}

    def metrics(self, models, batch):
        loss, count = self._score(models, batch, training=False), _examples(batch["x"])
        return {"loss": (loss * ops.cast(count, loss.dtype), count)}

    def predict(self, models, batch):
        """The model's outputs, nested as it gives them."""
        return models(batch["x"])

    def begin(self) -> None:
        self.model.reset_metrics()

    def logs(self) -> dict:
        """The metrics by name, as `model.fit` logs them; tensors."""
        return self.model.get_metrics_result()

    def summarize(self, totals: Mapping) -> dict[str, float]:
        return {name: float(ops.convert_to_numpy(value)) for name, value in self.logs().items()}

    def _score(self, models, batch, training: bool):
        x, y, weight = batch["x"], batch.get("y"), batch.get("sample_weight")
        outputs = models(x)
        loss = self.model.compute_loss(x, y, outputs, weight, training=training)
        loss_tracker(self.model).update_state(ops.stop_gradient(loss), sample_weight=_examples(x))
        fixed = tree.map_structure(lambda one: copy_mask(one, ops.stop_gradient(one)), outputs)
        # On PyTorch Keras's losses and metrics multiply weights by masks where they lie, and the gradient needs them.
        weight = tree.map_structure(lambda one: None if one is None else ops.copy(one), weight)
        self.model.compute_metrics(x, y, fixed, sample_weight=weight)
        return loss


def _examples(x):
    """How many examples a batch has."""
    return ops.shape(next(array for array in tree.flatten(x) if array is not None))[0]
