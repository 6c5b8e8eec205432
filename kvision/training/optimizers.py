"""Optimizers: Keras's by name, and wrappers that change what an inner optimizer does.

Each is a Keras optimizer or wraps one, so that every engine trains with it and a checkpoint stores it.
"""

import re

import keras
import numpy as np
from keras import ops

from kvision.engine.keras_internals import slot_variables, trained_variables

OPTIMIZERS = ("sgd", "adam", "adamw")


def make_optimizer(
    name: str,
    learning_rate,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    clip_global_norm: float | None = None,
) -> keras.optimizers.Optimizer:
    """A Keras optimizer whose decoupled weight decay leaves biases and batch norms alone.

    See `kvision.layers.regularizers.decay` for other variables.

    Args:
        name: "sgd" (with Nesterov momentum), "adam" or "adamw" (the same with weight decay).
        learning_rate: a number or a Keras schedule.
        weight_decay: each step takes `learning_rate * weight_decay` of every kernel away.
        clip_value: each number of a gradient is brought between minus this and this.
        clip_norm: the gradient of each variable is scaled down to this length where it is longer.
        clip_global_norm: all gradients are scaled down together where they are longer than this as one vector (Pascanu,
            Mikolov and Bengio 2013, https://arxiv.org/abs/1211.5063, algorithm 1). One of the three, or none.
    """
    beta_2, epsilon = 0.999, 1e-7
    if keras.config.floatx() == "float64":
        # Keras casts Python's numbers to the variables' type, which TensorFlow does by way of float32; not NumPy's.
        momentum, weight_decay, beta_2, epsilon = map(np.float64, (momentum, weight_decay, beta_2, epsilon))
    options = {
        "weight_decay": weight_decay or None,
        "clipvalue": clip_value,
        "clipnorm": clip_norm,
        "global_clipnorm": clip_global_norm,
    }
    if name == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=bool(momentum > 0), **options)
    elif name in ("adam", "adamw"):
        optimizer = keras.optimizers.Adam(learning_rate, momentum, beta_2, epsilon, **options)
    else:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if weight_decay:
        # The pattern meets "gamma", or "stage1_bn/gamma:0" on TensorFlow.
        optimizer.exclude_from_weight_decay(var_names=["(^|/)(bias|gamma|beta)(:0)?$"])
    return optimizer


class OptimizerWrapper(keras.optimizers.Optimizer):
    """An optimizer that does something beside the update that another one, the inner optimizer, makes.

    Args:
        inner: any Keras optimizer. Steps are counted, and the learning rate is set, there.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, **options):
        super().__init__(learning_rate=0.0, **options)
        self.inner = inner

    def build(self, variables):
        if not self.inner.built:
            self.inner.build(variables)
        super().build(variables)

    @property
    def variables(self):
        return slot_variables(self) + self.inner.variables

    @property
    def learning_rate(self):
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner.learning_rate = value

    @property
    def iterations(self):
        return self.inner.iterations

    def finalize_variable_values(self, var_list):
        """What the inner optimizer does after the last step, as with `use_ema`."""
        self.inner.finalize_variable_values(var_list)

    def get_config(self):
        return {"inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(config.pop("inner"), custom_objects=custom_objects)
        return cls(inner, **config)


@keras.saving.register_keras_serializable("kvision")
class LearningRateMultipliers(OptimizerWrapper):
    """An optimizer whose step is `factor` times as long for the variables whose path matches.

    The step of any optimizer is scaled, weight decay included: after the inner update from `old` to `new` the variable
    is set to `old + factor (new - old)`. For SGD, Adam and their like, whose steps are proportional to the learning
    rate, this is that learning rate times the factor.

    Args:
        factors: regular expression for a whole variable path -> factor; the first match counts, no match means 1.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, factors: dict[str, float], **options):
        super().__init__(inner, **options)
        self.factors = dict(factors)

    def factor(self, path: str) -> float:
        """The factor of the variable with this path."""
        return next((value for pattern, value in self.factors.items() if re.fullmatch(pattern, path)), 1.0)

    def build(self, variables):
        unused = [p for p in self.factors if not any(re.fullmatch(p, v.path) for v in variables)]
        if unused:
            raise ValueError(f"no trainable variable matches the learning-rate factor's pattern {unused[0]!r}")
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        scaled = [(variable, self.factor(variable.path)) for variable in trained_variables(self)]
        scaled = [(variable, ops.copy(variable.value), factor) for variable, factor in scaled if factor != 1]
        self.inner.apply(grads, trainable_variables)
        for variable, old, factor in scaled:
            variable.assign(old + factor * (variable.value - old))

    def get_config(self):
        return super().get_config() | {"factors": self.factors}
