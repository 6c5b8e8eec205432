"""What makes a step of a gradient: schedules, Keras's optimizers, and optimizers around them.

An optimizer here is Keras's or has one inside, so that it trains on every engine and lives in a checkpoint.
"""

import math
import re

import keras
import numpy as np
from keras import ops

SCHEDULES = ("constant", "cosine", "linear", "steps")
OPTIMIZERS = ("sgd", "adam", "adamw")


@keras.saving.register_keras_serializable("kvision")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A straight line up to `peak` in `warmup` steps, then down to 0 at `total`, straight or along half a cosine.

    Args:
        start: the first step's share of `peak`.
        kind: "linear", "cosine" or "constant" (no way down).
    """

    def __init__(self, peak: float, total: int, warmup: int = 0, start: float = 0.2, kind: str = "linear"):
        if kind not in ("linear", "cosine", "constant"):
            raise ValueError(f"a schedule goes down 'linear', 'cosine' or not ('constant'), got {kind!r}")
        self.peak, self.total, self.warmup, self.start, self.kind = peak, total, warmup, start, kind

    def __call__(self, step):
        step = ops.cast(step, keras.config.floatx())
        up = self.start + (1 - self.start) * step / max(1, self.warmup)
        left = ops.clip((self.total - step) / max(1, self.total - self.warmup), 0.0, 1.0)
        if self.kind == "cosine":
            left = 0.5 - 0.5 * ops.cos(math.pi * left)
        down = ops.ones_like(left) if self.kind == "constant" else left
        return self.peak * ops.where(step < self.warmup, up, down)

    def get_config(self):
        names = ("peak", "total", "warmup", "start", "kind")
        return {name: getattr(self, name) for name in names}


def schedule(kind: str, peak: float, total: int, warmup: float = 0.0):
    """The learning rate over `total` steps.

    Args:
        kind: "constant"; "linear" or "cosine", down to 0 at the end; "steps", a tenth after half of the steps and a
            hundredth after three quarters (He et al. 2015, section 4.2).
        peak: the largest rate.
        warmup: the share of the steps in which the rate rises to `peak`, from a fifth of it.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if kind == "steps":
        boundaries = [total // 2 - 1, total * 3 // 4 - 1]  # the last step of each part
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, [peak, peak / 10, peak / 100])
    return WarmupSchedule(peak, total, round(warmup * total), kind=kind)


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
    if keras.config.floatx() == "float64":
        # Keras casts Python's numbers to the variables' type, which TensorFlow does by way of float32; not NumPy's.
        momentum, weight_decay = np.float64(momentum), np.float64(weight_decay)
    options = {
        "weight_decay": weight_decay or None,
        "clipvalue": clip_value,
        "clipnorm": clip_norm,
        "global_clipnorm": clip_global_norm,
    }
    if name == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=bool(momentum > 0), **options)
    elif name in ("adam", "adamw"):
        optimizer = keras.optimizers.Adam(learning_rate, beta_1=momentum, **options)
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
        return self._variables[:] + self.inner.variables

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


class WeightAverage(OptimizerWrapper):
    """An optimizer that keeps an average of the weights beside them.

    After each step of the inner optimizer, constraints included, `average = (1 - share) average + share weight`.
    Training does not see the average; `fit` scores it, and leaves it in the model at the end. (Keras's own `use_ema`
    has no warm-up, averages before constraints are applied, and leaves batch norm the other weights' statistics.)
    """

    def share(self, step):
        """The newest weights' share in the average after step `step`, an integer tensor from 0."""
        raise NotImplementedError

    def build(self, variables):
        self.averages = self.add_optimizer_variables(variables, "average")
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        share = self.share(ops.convert_to_tensor(self.iterations))
        self.inner.apply(grads, trainable_variables)
        for variable, average in zip(self._trainable_variables, self.averages, strict=True):
            part = ops.cast(share, variable.dtype)
            average.assign((1 - part) * average.value + part * variable.value)


@keras.saving.register_keras_serializable("kvision")
class EMA(WeightAverage):
    """The exponential moving average of the weights (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046).

    Args:
        decay: what is kept of the average at each step. The first steps keep less, `t / (9 + t)` after t steps, so that
            the initial weights are forgotten soon.

    Raises:
        ValueError: a decay outside 0 to 1.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, decay: float = 0.999, **options):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the weights' average must be at least 0 and below 1, got {decay}")
        super().__init__(inner, **options)
        self.decay = decay

    def share(self, step):
        step = ops.cast(step, keras.config.floatx())
        return 1 - ops.minimum(self.decay, step / (9 + step))

    def get_config(self):
        return super().get_config() | {"decay": self.decay}


@keras.saving.register_keras_serializable("kvision")
class SWA(WeightAverage):
    """The plain average of the weights after `start` steps, `start + every`, and so on (stochastic weight averaging,
    Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, algorithm 1); until then the weights themselves.

    It gains most where the learning rate stays high while it averages.

    Raises:
        ValueError: `start` or `every` below 1.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, start: int, every: int = 1, **options):
        if start < 1 or every < 1:
            raise ValueError(f"averaging starts after at least 1 step, every at least 1; got {start} and {every}")
        super().__init__(inner, **options)
        self.start, self.every = start, every

    def share(self, step):
        past = ops.cast(step, "int32") + 1 - self.start  # steps since the first of the averaged weights
        count = ops.cast(past // self.every + 1, keras.config.floatx())
        fresh = ops.where(past % self.every == 0, 1 / ops.maximum(count, 1), 0.0)
        return ops.where(past <= 0, 1.0, fresh)

    def get_config(self):
        return super().get_config() | {"start": self.start, "every": self.every}


@keras.saving.register_keras_serializable("kvision")
class Lookahead(OptimizerWrapper):
    """An optimizer that draws its weights back to slow ones (Zhang et al. 2019, https://arxiv.org/abs/1907.08610).

    After every `every` steps of the inner optimizer, constraints included, the slow weights move toward the fast ones,
    `slow = kept slow + (1 - kept) fast`, and the fast ones are set to them. Where the paper keeps one share throughout,
    `kept` grows here with the cube of the steps taken, `decay**every (t / total)**3` after t steps: next to nothing at
    first, and most of the slow weights at the end (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.4).

    The slow weights start as the variables are when the optimizer is built. Batch norm's running statistics are no
    part of it: they stay those of the fast weights. At its end `fit` leaves the slow weights in the model, as Keras's
    own `fit` does.

    Args:
        total: the steps of the run.
        every: steps from one drawing back to the next.
        decay: what is kept of the slow weights at the end, as a share a step.

    Raises:
        ValueError: `total` or `every` below 1, a decay outside 0 to 1.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, total: int, every: int = 5, decay: float = 0.95, **options):
        if total < 1 or every < 1:
            raise ValueError(
                f"lookahead wants at least 1 step in all and at least 1 at a time, got {total} and {every}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the slow weights must be at least 0 and below 1, got {decay}")
        super().__init__(inner, **options)
        self.total, self.every, self.decay = total, every, decay

    def kept(self, step):
        """What is kept of the slow weights after `step` steps, an integer tensor from 1."""
        part = ops.cast(step, keras.config.floatx()) / self.total
        part = ops.where(part < 1, part, ops.ones_like(part))
        return self.decay**self.every * part * part * part

    def build(self, variables):
        self.slow = self.add_optimizer_variables(variables, "slow")
        for variable, slow in zip(variables, self.slow, strict=True):
            slow.assign(ops.copy(variable.value))  # JAX reuses the memory of both
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        step = ops.convert_to_tensor(self.iterations) + 1
        self.inner.apply(grads, trainable_variables)
        # The same operations in every step, and no number that comes from the host: a program can be recorded once.
        due = step % self.every == 0
        share = (1 - self.kept(step)) * ops.cast(due, keras.config.floatx())
        for variable, slow in zip(self._trainable_variables, self.slow, strict=True):
            slow.assign(slow.value + ops.cast(share, variable.dtype) * (variable.value - slow.value))
            variable.assign(ops.where(due, slow.value, variable.value))

    def finalize_variable_values(self, var_list):
        """Set the weights to the slow ones; Keras's name for what is done after the last step."""
        for variable, slow in zip(self._trainable_variables, self.slow, strict=True):
            variable.assign(ops.copy(slow.value))

    def get_config(self):
        return super().get_config() | {"total": self.total, "every": self.every, "decay": self.decay}


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
        scaled = [(variable, self.factor(variable.path)) for variable in self._trainable_variables]
        scaled = [(variable, ops.copy(variable.value), factor) for variable, factor in scaled if factor != 1]
        self.inner.apply(grads, trainable_variables)
        for variable, old, factor in scaled:
            variable.assign(old + factor * (variable.value - old))

    def get_config(self):
        return super().get_config() | {"factors": self.factors}
