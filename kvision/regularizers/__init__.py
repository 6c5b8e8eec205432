"""Penalties on weights, attached from outside by the names of variables. Model files hold none."""

import re

import keras

KERNELS = r".*/kernel"


def attach(model: keras.Model, regularizer, pattern: str = KERNELS) -> list[str]:
    """Add `regularizer` (a `keras.regularizers.Regularizer`) to the loss, for each variable whose path matches.

    Args:
        pattern: a regular expression that must match the whole path; the default takes every kernel and leaves biases
            and batch norms free.

    Returns:
        The paths of the variables that got it.

    Raises:
        ValueError: no trainable variable matches.
    """
    matched = [variable for variable in model.trainable_variables if re.fullmatch(pattern, variable.path)]
    if not matched:
        paths = ", ".join(variable.path for variable in model.trainable_variables[:5])
        raise ValueError(f"no trainable variable of {model.name} matches {pattern!r}; it has {paths} ...")
    for variable in matched:
        variable.regularizer = regularizer
    return [variable.path for variable in matched]
