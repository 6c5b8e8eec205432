"""Weight penalties, weight constraints and weight decay, applied to a built model by variable paths.

Model files contain none of them. Every function takes `pattern`, a regular expression that must match the whole path of
a variable ("stage1_conv/kernel"); the default matches each kernel and excludes biases and batch norms.

L1, L2 and elastic net are Keras's: `add_regularizer(model, keras.regularizers.L1L2(1e-5, 1e-4), ".*_conv/kernel")`.
Two are not: `keras.regularizers.OrthogonalRegularizer` supports matrices only, and `keras.constraints.MaxNorm` needs
the axes for each rank of kernel and slightly shrinks weights within the bound at every step.
"""

import math
import re

import keras
from keras import ops

KERNELS = r".*/kernel"


def match(model: keras.Model, pattern: str = KERNELS) -> list[keras.Variable]:
    """Return the trainable variables whose path matches.

    Raises:
        ValueError: none matches.
    """
    matched = [variable for variable in model.trainable_variables if re.fullmatch(pattern, variable.path)]
    if not matched:
        paths = ", ".join(variable.path for variable in model.trainable_variables[:5])
        raise ValueError(f"no trainable variable of {model.name} matches {pattern!r}; it has {paths} ...")
    return matched


def add_regularizer(model: keras.Model, regularizer, pattern: str = KERNELS) -> list[str]:
    """Add `regularizer` (a `keras.regularizers.Regularizer`) to the loss, for each variable whose path matches.

    An existing penalty is kept.

    Returns:
        The paths of the matching variables.

    Raises:
        ValueError: no trainable variable matches.
    """
    matched = match(model, pattern)
    for variable in matched:
        old = variable.regularizer
        variable.regularizer = regularizer if old is None else Sum(old, regularizer)
    return [variable.path for variable in matched]


def add_constraint(model: keras.Model, constraint, pattern: str = KERNELS) -> list[str]:
    """Make the optimizer apply `constraint` (a `keras.constraints.Constraint`) after every step to matching variables.

    Returns:
        The paths of the matching variables.

    Raises:
        ValueError: no trainable variable matches, or one already has a constraint: the order of two would matter.
    """
    matched = match(model, pattern)
    for variable in matched:
        if variable.constraint is not None:
            raise ValueError(f"{variable.path} already has a constraint: {type(variable.constraint).__name__}")
    for variable in matched:
        variable.constraint = constraint
    return [variable.path for variable in matched]


def set_weight_decay_mask(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, pattern: str = KERNELS
) -> list[str]:
    """Restrict the optimizer's decoupled weight decay to the matching variables.

    Decoupled: each step subtracts `learning_rate * weight_decay` times the weight itself, independently of the gradient
    (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    Returns:
        The paths of the variables that decay.

    Raises:
        ValueError: no trainable variable matches, the optimizer has no weight decay, or it is already built.
    """
    if not optimizer.weight_decay:
        raise ValueError(f"{optimizer.name} has no weight decay: give it weight_decay=")
    matched = match(model, pattern)
    kept = {variable.path for variable in matched}
    optimizer.exclude_from_weight_decay([v for v in model.trainable_variables if v.path not in kept])
    return [variable.path for variable in matched]


@keras.saving.register_keras_serializable("kvision")
class Sum(keras.regularizers.Regularizer):
    """Several penalties on one variable."""

    def __init__(self, *parts):
        self.parts = [keras.regularizers.get(part) for part in parts]

    def __call__(self, x):
        return sum(part(x) for part in self.parts)

    def get_config(self):
        return {"parts": [keras.regularizers.serialize(part) for part in self.parts]}

    @classmethod
    def from_config(cls, config):
        return cls(*config["parts"])


@keras.saving.register_keras_serializable("kvision")
class Orthogonal(keras.regularizers.Regularizer):
    """Soft orthogonality: `factor * ||W'W - 1||^2`, the squared Frobenius norm (Bansal, Chen and Wang 2018,
    https://arxiv.org/abs/1810.09102).

    W is the kernel (..., inputs, outputs) as a matrix of window times inputs rows, one column per output. If there are
    more columns than rows, the rows are made orthogonal instead: `||WW' - 1||^2`.

    Raises:
        ValueError: when called with a vector.
    """

    def __init__(self, factor: float = 1e-4):
        self.factor = factor

    def __call__(self, x):
        if len(x.shape) < 2:
            raise ValueError(f"orthogonality needs the columns of a kernel, got a variable of shape {tuple(x.shape)}")
        matrix = ops.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        if matrix.shape[0] < matrix.shape[1]:
            matrix = ops.transpose(matrix)
        gram = ops.matmul(ops.transpose(matrix), matrix)
        return self.factor * ops.sum(ops.square(gram - ops.eye(matrix.shape[1], dtype=gram.dtype)))

    def get_config(self):
        return {"factor": self.factor}


@keras.saving.register_keras_serializable("kvision")
class MaxNorm(keras.constraints.Constraint):
    """Scales each output's weights (all axes but the last) down to the norm `limit` if theirs is larger
    (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html, section 5.1; there `limit` is 3 to 4)."""

    def __init__(self, limit: float = 3.0):
        if limit <= 0:
            raise ValueError(f"limit must be positive, got {limit}")
        self.limit = limit

    def __call__(self, w):
        w = ops.convert_to_tensor(w)
        squares = ops.sum(ops.square(w), axis=tuple(range(len(w.shape) - 1)), keepdims=True)
        return w * ops.minimum(1.0, self.limit / ops.sqrt(ops.maximum(squares, 1e-30)))  # avoids division by 0

    def get_config(self):
        return {"limit": self.limit}
