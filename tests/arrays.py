"""Variables as NumPy arrays, and noise to feed to networks."""

import numpy as np
from keras import ops


def value(variable):
    return np.array(ops.convert_to_numpy(variable.value))


def values(model):
    return {variable.path: value(variable) for variable in model.weights}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
