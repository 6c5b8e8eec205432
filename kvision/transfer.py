"""From one task to another: a new head, frozen layers, a smaller learning rate for what was learned before."""

import re

import keras


def swap_head(model: keras.Model, classes: int, head: str = "logits") -> keras.Model:
    """The same network, sharing its layers and weights, with a new last layer of `classes` logits.

    Args:
        head: name of the dense layer to replace; everything before it is kept.

    Raises:
        ValueError: no such layer, or it is not the last one.
    """
    if head not in (names := [layer.name for layer in model.layers]):
        raise ValueError(f"{model.name} has no layer {head!r} to replace; its last layers are {', '.join(names[-3:])}")
    old = model.get_layer(head)
    if model.output is not old.output:
        raise ValueError(f"{head!r} is not the last layer of {model.name}: a new head would lose {names[-1]!r}")
    config = old.get_config() | {"units": classes}
    return keras.Model(model.input, type(old).from_config(config)(old.input), name=model.name)


def freeze(model: keras.Model, until: str | None = None, *, except_: str | None = None) -> list[str]:
    """Freeze the layers up to and including `until`, in the network's order; release those after it.

    A frozen batch norm normalises with its running statistics and leaves them alone, in training too.

    Args:
        until: a layer's name, such as the tap "stage4"; None freezes all.
        except_: regular expression; a layer whose whole name matches stays free.

    Returns:
        The names of the frozen layers that own weights.

    Raises:
        ValueError: no such layer.
    """
    names = [layer.name for layer in model.layers]
    if until is not None and until not in names:
        taps = [name for name in names if re.fullmatch(r"stem|stage\d+", name)]
        raise ValueError(f"{model.name} has no layer {until!r}; its stages are {', '.join(taps)}")
    last = len(names) if until is None else names.index(until) + 1
    frozen = []
    for i, layer in enumerate(model.layers):
        layer.trainable = i >= last or bool(except_ and re.fullmatch(except_, layer.name))
        if not layer.trainable and layer.weights:
            frozen.append(layer.name)
    return frozen


def unfreeze(model: keras.Model, pattern: str) -> list[str]:
    """Release the layers whose name begins with a match of the regular expression `pattern`, such as "stage5".

    Returns:
        The names of the released layers that own weights.

    Raises:
        ValueError: no layer with weights matches.
    """
    released = [layer for layer in model.layers if layer.weights and re.match(rf"(?:{pattern})(?![0-9])", layer.name)]
    if not released:
        raise ValueError(f"no layer with weights of {model.name} has a name that begins with {pattern!r}")
    for layer in released:
        layer.trainable = True
    return [layer.name for layer in released]


@keras.saving.register_keras_serializable("kvision")
class LearningRateFactors(keras.optimizers.Optimizer):
    """An optimizer whose step is `factor` times as long for the variables whose path matches.

    The step of any optimizer is scaled, weight decay included: after the inner update from `old` to `new` the variable
    is set to `old + factor (new - old)`. For SGD, Adam and their like, whose steps are proportional to the learning
    rate, this is that learning rate times the factor.

    Args:
        inner: any Keras optimizer.
        factors: regular expression for a whole variable path -> factor; the first match counts, no match means 1.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, factors: dict[str, float], **options):
        super().__init__(learning_rate=0.0, **options)
        self.inner, self.factors = inner, dict(factors)

    def factor(self, path: str) -> float:
        """The factor of the variable with this path."""
        return next((value for pattern, value in self.factors.items() if re.fullmatch(pattern, path)), 1.0)

    def build(self, variables):
        unused = [p for p in self.factors if not any(re.fullmatch(p, v.path) for v in variables)]
        if unused:
            raise ValueError(f"no trainable variable matches the learning-rate factor's pattern {unused[0]!r}")
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

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        scaled = [(variable, self.factor(variable.path)) for variable in self._trainable_variables]
        scaled = [(variable, keras.ops.copy(variable.value), factor) for variable, factor in scaled if factor != 1]
        self.inner.apply(grads, trainable_variables)
        for variable, old, factor in scaled:
            variable.assign(old + factor * (variable.value - old))

    def get_config(self):
        return {"inner": keras.saving.serialize_keras_object(self.inner), "factors": self.factors}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(config["inner"], custom_objects=custom_objects)
        return cls(inner, config["factors"])
