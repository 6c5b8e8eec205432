"""From one task to another: a new head, and layers that keep what they learned before."""

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

    A frozen batch norm normalizes with its running statistics and does not update them, in training too.

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
        stages = [name for name in names if re.fullmatch(r"stem|stage\d+", name)]
        raise ValueError(f"{model.name} has no layer {until!r}; its stages are {', '.join(stages)}")
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
