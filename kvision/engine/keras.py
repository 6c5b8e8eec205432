"""Keras's own step, that of `model.fit`, behind an engine's methods: to compare with, and for what the floors lack.

Chosen by `kvision.engine.create(..., kind="keras")`, whatever the backend. The model is compiled as Keras does by
default, and every step is one call of `train_on_batch`.
"""

import keras
import numpy as np
from keras import ops


class Engine:
    def __init__(self, model, optimizer=None, loss=None, gradient_accumulation_steps=1, metrics=()):
        if gradient_accumulation_steps != 1:
            raise ValueError("Keras's own step accumulates over steps: give its optimizer gradient_accumulation_steps")
        count = len(model.outputs or [None])
        if count != 1:
            raise ValueError(f"Keras's own step wants one output, and {model.name} has {count}")
        self.model, self.optimizer = model, optimizer
        if optimizer is not None:
            right = keras.metrics.MeanMetricWrapper(_right, name="right")
            kept = [_Kept(metric) for metric in metrics]
            model.compile(optimizer, _of_integers(loss), metrics=[right, *kept], auto_scale_loss=False)

    def train_step(self, images, labels):
        self.model.reset_metrics()
        row = self.model.train_on_batch(images, labels, return_dict=True)
        return row["loss"], round(float(row["right"]) * len(images))

    def evaluate(self, images, labels):
        self.model.reset_metrics()
        row = self.model.test_on_batch(images, labels, return_dict=True)
        return row["loss"], round(float(row["right"]) * len(images))

    def predict(self, images):
        return np.asarray(self.model.predict_on_batch(images))

    def sync_variables(self):
        pass


class _Kept(keras.metrics.Metric):
    """A metric that goes on from step to step; what is Keras's own of a step begins anew with each."""

    def __init__(self, metric):
        super().__init__(name=f"kept_{metric.name}")
        self.metric = metric

    def update_state(self, y_true, y_pred, sample_weight=None):
        labels = ops.argmax(y_true, axis=-1) if len(y_true.shape) == 2 else ops.cast(y_true, "int32")
        self.metric.update_state(labels, y_pred)

    def result(self):
        return self.metric.result()

    def reset_state(self):
        pass


def _of_integers(loss):
    """Keras makes numbers of labels; the loss gets integers, but for targets (n, classes)."""
    return lambda labels, outputs: loss(labels if len(labels.shape) == 2 else ops.cast(labels, "int32"), outputs)


def _right(labels, logits):
    """For each image, whether its largest logit is right."""
    classes = ops.argmax(labels, axis=-1) if len(labels.shape) == 2 else labels
    return ops.cast(ops.equal(ops.cast(classes, "int32"), ops.cast(ops.argmax(logits, axis=-1), "int32")), "float32")
