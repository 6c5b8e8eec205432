"""Averages of the weights over a run: EMA, SWA, Lookahead.

Each wraps an optimizer; a checkpoint stores its averages as variables of the optimizer.
"""

import keras
from keras import ops

from kvision.engine.keras_internals import trained_variables
from kvision.training.optimizers import OptimizerWrapper


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
        for variable, average in zip(trained_variables(self), self.averages, strict=True):
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
        for variable, slow in zip(trained_variables(self), self.slow, strict=True):
            slow.assign(slow.value + ops.cast(share, variable.dtype) * (variable.value - slow.value))
            variable.assign(ops.where(due, slow.value, variable.value))

    def finalize_variable_values(self, var_list):
        """Set the weights to the slow ones; Keras's name for what is done after the last step."""
        for variable, slow in zip(trained_variables(self), self.slow, strict=True):
            variable.assign(ops.copy(slow.value))

    def get_config(self):
        return super().get_config() | {"total": self.total, "every": self.every, "decay": self.decay}
