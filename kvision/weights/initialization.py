"""Initial weights by seed and variable path: the same numbers on every backend."""

import keras
import numpy as np

from kvision.layers import VarianceScaling
from kvision.random import rng

# Keras's own initializers, computed in NumPy instead of the backend.
_FANS = {"fan_in": "in", "fan_out": "out", "fan_avg": "average"}
_DISTRIBUTIONS = {"truncated_normal": "truncated", "untruncated_normal": "normal", "uniform": "uniform"}


def _sample(initializer, shape: tuple[int, ...], generator: np.random.Generator, key: str) -> np.ndarray:
    known = keras.initializers
    if isinstance(initializer, VarianceScaling):
        return initializer.sample(shape, generator)
    if isinstance(initializer, known.VarianceScaling):
        fan, distribution = _FANS[initializer.mode], _DISTRIBUTIONS[initializer.distribution]
        return VarianceScaling(initializer.scale, fan, distribution).sample(shape, generator)
    if isinstance(initializer, known.RandomUniform):
        return generator.uniform(initializer.minval, initializer.maxval, shape)
    if isinstance(initializer, known.TruncatedNormal):
        unit = VarianceScaling(0.87962566103423978**2, "in", "truncated").sample((1, int(np.prod(shape))), generator)
        return initializer.mean + initializer.stddev * unit.reshape(shape)
    if isinstance(initializer, known.RandomNormal):
        return initializer.mean + initializer.stddev * generator.standard_normal(shape)
    if isinstance(initializer, (known.Zeros, known.Ones)):
        return np.full(shape, float(isinstance(initializer, known.Ones)), np.float32)
    if isinstance(initializer, known.Constant) and np.isscalar(initializer.value):
        return np.full(shape, initializer.value, np.float32)
    raise ValueError(
        f"cannot initialize {key} in NumPy: its initializer is {type(initializer).__name__}; use "
        "kvision.layers.VarianceScaling or Keras's VarianceScaling, RandomNormal, RandomUniform, TruncatedNormal, "
        "Zeros, Ones or Constant"
    )


def initialize(model: keras.Model, seed: int) -> None:
    """Set every variable of `model` to its initial value for `seed`, computed in NumPy.

    A value depends only on the seed and the variable's path, so two backends, or two models with a common layer name
    and shape, start from the same numbers. The states of dropout layers' generators are set, too.

    Raises:
        ValueError: a variable with an unsupported initializer; the message names it.
    """
    for layer in model._flatten_layers(include_self=False):
        for variable in layer._trainable_variables + layer._non_trainable_variables:
            kind = "depthwise" if isinstance(layer, keras.layers.DepthwiseConv2D) else "kernel"  # names of the kernel
            attribute = f"{kind if variable.name == 'kernel' else variable.name}_initializer"
            initializer = getattr(layer, attribute, None)
            generator = rng(seed, "initial", variable.path)
            variable.assign(_sample(initializer, tuple(variable.shape), generator, variable.path))
        # By index, not by name: Keras continues the numbers in generators' names through the whole process.
        for i, generator in enumerate(layer.__dict__.get("_seed_generators", ())):
            # Below 2**31, because the state is int32 on PyTorch.
            generator_key = rng(seed, "generator", layer.name, i).integers(2**31)
            generator.state.assign(np.array([generator_key, 0], np.uint32))
