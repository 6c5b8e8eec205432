"""Keras's own step, that of `model.fit`, with an engine's methods: to compare with, and for models that override it.

Chosen by `kvision.engine.create(..., engine="keras")`, whatever the backend. The model is compiled as Keras does by
default, and every step is one call of `train_on_batch`. The task says how: `task.keras_step()` gives the loss and the
metrics of `model.compile`, each metric with whether it goes on from step to step, and `task.keras_batch(batch)` gives
inputs, targets and sample weights.
"""

import keras
import numpy as np

from kvision.engine.program import Program


class Engine:
    MASKS_PADDING = False  # Keras's loss is divided by the number of examples, whatever their weights

    def __init__(self, models, task=None, optimizers=None, gradient_accumulation_steps=1):
        if gradient_accumulation_steps != 1:
            raise ValueError("Keras's own step accumulates over steps: give its optimizer gradient_accumulation_steps")
        self.program = Program(models, task, optimizers)
        if len(self.program.models) > 1:
            raise ValueError(f"Keras's own step trains one model, got {', '.join(self.program.models)}")
        self.model, self.task = self.program.model, task
        if task is not None and not hasattr(task, "keras_step"):
            raise TypeError(f"Keras's own step cannot take a {type(task).__name__}: it has no keras_step()")
        count = len(self.model.outputs or [None])
        if count != 1:
            raise ValueError(f"Keras's own step takes models of one output, and {self.model.name} has {count}")
        if optimizers is not None:
            loss, metrics = task.keras_step()
            metrics = [_Running(metric) if running else metric for metric, running in metrics]
            self.model.compile(self.program.optimizers[0], loss, metrics=metrics, auto_scale_loss=False)

    def train_step(self, batch):
        self.program.check(batch)
        return self._means(self.model.train_on_batch, batch)

    def evaluate(self, batch):
        return self._means(self.model.test_on_batch, batch)

    def _means(self, step, batch):
        x, y, weight = self.task.keras_batch(batch)
        self.model.reset_metrics()
        row = step(x, y, sample_weight=weight, return_dict=True)
        count = len(x) if weight is None else float(np.sum(weight))
        names = ["loss", *(name for name in row if name != "loss" and not name.startswith(_Running.PREFIX))]
        return {name: (float(row[name]) * count, count) for name in names}

    def predict(self, batch):
        x = self.task.keras_batch(batch)[0] if isinstance(batch, dict) else batch
        return np.asarray(self.model.predict_on_batch(x))

    def sync_variables(self):
        pass


class _Running(keras.metrics.Metric):
    """A metric that goes on from step to step; Keras begins those of a step anew with each."""

    PREFIX = "running_"

    def __init__(self, metric):
        super().__init__(name=f"{self.PREFIX}{metric.name}")
        self.metric = metric

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.metric.update_state(y_true, y_pred, sample_weight)

    def result(self):
        return self.metric.result()

    def reset_state(self):
        pass
