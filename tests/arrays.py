"""Variables as NumPy arrays, and noise to feed to networks."""

import numpy as np
from keras import ops


def value(variable):
    return np.array(ops.convert_to_numpy(variable.value))


def values(model):
    return {variable.path: value(variable) for variable in model.weights}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(images, labels):
    return {"image": images, "label": labels}


def figures(means):
    """The loss and the correct answers of the Means of a classification; arrays of those of several steps."""
    total, weight = map(ops.convert_to_numpy, means["loss"])
    return total / weight, ops.convert_to_numpy(means["accuracy"][0]) if "accuracy" in means else None


def take_step(engine, images, labels):
    """A training step: its loss and how many answers were correct."""
    return figures(engine.train_step(batch(images, labels)))


def judge(engine, images, labels):
    """The same in inference mode."""
    return figures(engine.evaluate(batch(images, labels)))


class Objective:
    """A task of a loss of labels and outputs and nothing else."""

    def __init__(self, function):
        self.function = function

    def loss(self, models, batch):
        return self.function(batch["label"], models(batch["image"])), {}

    def metrics(self, models, batch):
        return {"loss": (self.function(batch["label"], models(batch["image"])), 1)}
