"""Muon: momentum whose matrices are made orthogonal, for many kernels at once.

An optimizer of Keras's kind without a line of one backend's: it runs in a compiled step, in a `lax.scan` and within a
recorded CUDA graph, as nothing in it waits for a value of the device.
"""

import math
import re

import keras
from keras import ops

from kvision.engine.keras_internals import index_of, updates_together

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: the steepest at 0 that does not diverge


def orthogonalize(matrices, steps: int = 5, dtype: str | None = None):
    """Matrices (..., rows, columns) brought near the orthogonal ones next to them, by Newton-Schulz iterations.

    Each becomes U S' V^T of its U S V^T, with S' between about 0.7 and 1.2 for what the steps reach (Jordan 2024,
    https://kellerjordan.github.io/posts/muon). A matrix of zeros stays one.

    Args:
        steps: iterations; each makes the small singular values about 3.4 times as large.
        dtype: what the products are computed in, "bfloat16" where speed counts; None is the matrices' own.

    Returns:
        A tensor of the matrices' shape, of the type `dtype`.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices if rows <= columns else ops.swapaxes(matrices, -2, -1)  # the products are of the shorter side
    x = x / (_norm(x) + 1e-7)  # so that no singular value is above 1
    x = x if dtype is None else ops.cast(x, dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ ops.swapaxes(x, -2, -1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if rows <= columns else ops.swapaxes(x, -2, -1)


def _norm(matrices):
    return ops.sqrt(ops.sum(matrices * matrices, axis=(-2, -1), keepdims=True))


def _matrix(kernel):
    """A kernel (..., outputs) as a matrix (outputs, rest); of two axes it stays as it is, as for Keras's Muon."""
    if len(kernel.shape) == 2:
        return kernel
    axes = (len(kernel.shape) - 1, *range(len(kernel.shape) - 1))
    return ops.reshape(ops.transpose(kernel, axes), (kernel.shape[-1], -1))


def _kernel(matrix, shape):
    """The inverse of `_matrix`."""
    if len(shape) == 2:
        return matrix
    return ops.transpose(ops.reshape(matrix, (shape[-1], *shape[:-1])), (*range(1, len(shape)), 0))


@keras.saving.register_keras_serializable("kvision")
@updates_together
class Muon(keras.optimizers.Optimizer):
    """Momentum that is orthogonalized before each step, for kernels; Nesterov's SGD for all other variables.

    On a kernel of two axes it does what `keras.optimizers.Muon` does; a convolution's kernel (..., inputs, outputs) is
    the matrix (outputs, rest), which Keras's leaves to Adam. Kernels whose matrices have one shape are one batch.

    Args:
        learning_rate: of the kernels, a number or a Keras schedule.
        momentum: of the kernels, with Nesterov's look ahead unless `nesterov` is False.
        steps: Newton-Schulz iterations.
        dtype: what these are computed in; None is the variables' type.
        rms_rate: each step is made `rms_rate sqrt(longer side)` times as long (Liu et al. 2025,
            https://arxiv.org/abs/2502.16982, section 2.2); None leaves it.
        normalize: before each step a kernel is scaled to the norm `sqrt(outputs)` (Jordan 2024,
            https://github.com/KellerJordan/cifar10-airbench).
        sgd: regular expression of a whole variable path -> learning rate (a number or a Keras schedule), or that and a
            factor of the penalty: `factor * variable` is added to the gradient. The first match counts, and what
            matches is not Muon's.
        sgd_momentum: of these.
        options: of `keras.optimizers.Optimizer`. `weight_decay` is decoupled, and of all variables that are not
            excluded.

    Raises:
        ValueError: no step or a momentum outside 0 to 1; on building, a variable of fewer than two axes that no
            pattern matches, or a pattern that matches none.
    """

    def __init__(
        self,
        learning_rate=0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        dtype: str | None = None,
        rms_rate: float | None = None,
        normalize: bool = False,
        sgd: dict | None = None,
        sgd_momentum: float = 0.9,
        **options,
    ):
        if steps < 1 or not 0 <= momentum < 1 or not 0 <= sgd_momentum < 1:
            raise ValueError(
                "Muon takes at least 1 step of Newton-Schulz and momenta of at least 0 and below 1, got "
                f"{steps}, {momentum} and {sgd_momentum}"
            )
        super().__init__(learning_rate=learning_rate, **options)
        self.momentum, self.nesterov, self.steps, self.dtype = momentum, nesterov, steps, dtype
        self.rms_rate, self.normalize, self.sgd_momentum = rms_rate, normalize, sgd_momentum
        self.sgd = {
            pattern: tuple(entry) if isinstance(entry, list | tuple) else (entry, 0.0)
            for pattern, entry in (sgd or {}).items()
        }

    def pattern(self, path: str) -> str | None:
        """The pattern of `sgd` that a variable's path matches; None: it is Muon's."""
        return next((pattern for pattern in self.sgd if re.fullmatch(pattern, path)), None)

    def build(self, variables):
        if self.built:
            return
        paths = {variable.path: variable for variable in variables}
        for path, variable in paths.items():
            if len(variable.shape) < 2 and self.pattern(path) is None:
                raise ValueError(
                    f"Muon steps along matrices, and {path} has the shape {tuple(variable.shape)}: give it a learning "
                    "rate in sgd="
                )
        unused = [pattern for pattern in self.sgd if pattern not in map(self.pattern, paths)]
        if unused:
            raise ValueError(f"no trainable variable matches {unused[0]!r} of sgd= first")
        super().build(variables)
        self.momenta = self.add_optimizer_variables(variables, "momentum")

    def update_variables(self, gradients, variables, learning_rate):
        """Keras's `update_step` for all variables together."""
        batches = {}
        for gradient, variable in zip(gradients, variables, strict=True):
            momentum = self.momenta[index_of(self, variable)]
            pattern = self.pattern(variable.path)
            if pattern is None:
                shape = tuple(_matrix(variable.value).shape)
                batches.setdefault((shape, variable.dtype), []).append((gradient, variable, momentum))
            else:
                self._step_of_sgd(gradient, variable, momentum, *self.sgd[pattern])
        for batch in batches.values():
            self._step_of_muon(batch, learning_rate)

    def _step_of_sgd(self, gradient, variable, momentum, rate, penalty):
        rate = rate(self.iterations) if callable(rate) else rate
        rate, factor = ops.cast(rate, variable.dtype), self.sgd_momentum
        gradient = ops.cast(gradient, variable.dtype)
        if penalty:
            gradient = gradient + penalty * variable.value
        momentum.assign(factor * momentum.value + gradient)
        variable.assign(variable.value - rate * (gradient + factor * momentum.value))

    def _step_of_muon(self, batch, learning_rate):
        gradients, variables, momenta = zip(*batch, strict=True)
        dtype = variables[0].dtype
        old = _stack([momentum.value for momentum in momenta])
        gradient = ops.cast(_stack(gradients), dtype)
        momentum = self.momentum * old + gradient
        change = gradient + self.momentum * momentum if self.nesterov else momentum
        change = ops.cast(orthogonalize(change, self.steps, self.dtype), dtype)
        values = _stack([variable.value for variable in variables])
        rows, columns = values.shape[-2:]
        if self.normalize:
            values = values * (math.sqrt(variables[0].shape[-1]) / _norm(values))
        factor = 1.0 if self.rms_rate is None else self.rms_rate * math.sqrt(max(rows, columns))
        values = values - (ops.cast(learning_rate, dtype) * factor) * change
        for i, (variable, kept) in enumerate(zip(variables, momenta, strict=True)):
            kept.assign(_kernel(momentum[i], variable.shape))
            variable.assign(_kernel(values[i], variable.shape))

    def get_config(self):
        names = ("momentum", "nesterov", "steps", "dtype", "rms_rate", "normalize", "sgd_momentum")
        sgd = {
            pattern: [keras.saving.serialize_keras_object(rate), penalty]
            for pattern, (rate, penalty) in self.sgd.items()
        }
        return super().get_config() | {name: getattr(self, name) for name in names} | {"sgd": sgd}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        load = keras.saving.deserialize_keras_object
        sgd = {
            pattern: (load(rate, custom_objects=custom_objects), penalty)
            for pattern, (rate, penalty) in config["sgd"].items()
        }
        return super().from_config(config | {"sgd": sgd}, custom_objects)


def _stack(kernels):
    return ops.stack([_matrix(kernel) for kernel in kernels])
