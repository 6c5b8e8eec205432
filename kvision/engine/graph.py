"""A functional model's graph as a list of calls, made ready once and run in every step.

Calling a Keras model walks its graph anew each time, through scopes, signatures and nested structures that cost Python
more time than a small layer costs the device. Here every call is prepared once; a value that nobody reads any more is
let go at once; and neighbours that are one operation in every framework become one call:

- a border of zeros and the convolution without padding behind it are a convolution with padding;
- a batch norm or an addition and the ReLU behind it are one call, which can be done in the memory of the first.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops, tree

from kvision.layers import Border

CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)


class Graph:
    """Runs a functional model: `graph(inputs)` is `model(inputs)`.

    Args:
        ready: `ready(layer, pads=None, relu=False)` gives the function that is called in the layer's place, with its
            positional and keyword arguments. `pads`, ((above, below), (left, right)), are zeros that a convolution puts
            around its input itself; with `relu` a batch norm or an addition ends in a ReLU.
        joined: whether neighbours become one call. For looking at each layer's output they must not.
    """

    def __init__(self, model: keras.Model, ready: Callable, joined: bool = True):
        nodes = nodes_of(model)
        self.inputs = [id(tensor) for tensor in model.inputs]
        self.outputs = [id(tensor) for tensor in model.outputs]
        self.structure = model._outputs_struct
        uses = Counter(self.outputs)
        for node in nodes:
            uses.update(map(id, node.arguments.keras_tensors))
        maker = {id(tensor): node for node in nodes for tensor in node.outputs}

        def before(node):
            """The node that makes the only input of this one and is read by nobody else."""
            tensor = node.arguments._single_positional_tensor
            return maker.get(id(tensor)) if tensor is not None and uses[id(tensor)] == 1 else None

        first_of = {}  # the first of two neighbours, by the second
        for node in nodes if joined else ():
            first = before(node)
            if first is not None and _joins(first.operation, node.operation) and first not in first_of.values():
                first_of[node] = first
        gone = set(first_of.values())
        self.calls = []
        for node in nodes:
            if node in gone:
                continue
            first = first_of.get(node)
            if first is None:
                function, arguments = ready(node.operation), node.arguments
            elif type(node.operation) in CONVOLUTIONS:
                function, arguments = ready(node.operation, pads=_pads(first.operation)), first.arguments
            else:
                function, arguments = ready(first.operation, relu=True), first.arguments
            outputs = [id(tensor) for tensor in node.outputs]
            self.calls.append(_Call(node.operation, function, arguments, outputs))
        later = set(self.outputs)
        for call in reversed(self.calls):
            read = {id(tensor) for tensor in call.arguments.keras_tensors}
            call.last = tuple((read | set(call.outputs)) - later)
            later |= read

    def __call__(self, inputs, seen: Callable | None = None):
        """The model's outputs.

        Args:
            inputs: a tensor, or a list of them.
            seen: called with each layer and its outputs, in the order of execution.
        """
        inputs = inputs if isinstance(inputs, list | tuple) else [inputs]
        values = dict(zip(self.inputs, inputs, strict=True))
        for call in self.calls:
            if call.single is not None:
                result = call.function(values[call.single])
            else:
                args, kwargs = call.arguments.fill_in(values)
                result = call.function(*args, **kwargs)
            if seen is not None:
                seen(call.layer, result)
            if len(call.outputs) == 1 and not isinstance(result, list | tuple | dict):
                values[call.outputs[0]] = result
            else:
                values.update(zip(call.outputs, tree.flatten(result), strict=True))
            for key in call.last:
                del values[key]
        return tree.pack_sequence_as(self.structure, [values[key] for key in self.outputs])


class _Call:
    """One call of a graph.

    Attributes:
        single: the key of the only argument, where the call has one tensor and nothing else.
        outputs: the keys of what it gives.
        last: the keys that nobody reads after it.
    """

    __slots__ = ("arguments", "function", "last", "layer", "outputs", "single")

    def __init__(self, layer, function: Callable, arguments, outputs: list[int]):
        self.layer, self.function, self.arguments, self.outputs = layer, function, arguments, outputs
        tensor = arguments._single_positional_tensor
        self.single = None if tensor is None else id(tensor)
        self.last = ()


def is_graph(model: keras.Model) -> bool:
    """Whether a model's graph can be read: a functional one's, not that of a subclass of `keras.Model`."""
    return hasattr(model, "_nodes_by_depth")


def nodes_of(model: keras.Model) -> list:
    """The nodes of a functional model's graph in the order of execution, its inputs left out."""
    depths = model._nodes_by_depth
    nodes = [node for depth in sorted(depths, reverse=True) for node in depths[depth]]
    return [node for node in nodes if node.operation and not node.is_input]


def nested(model: keras.Model, ready: Callable) -> Callable:
    """What is called in the place of a model that is a layer of another one."""
    graph = Graph(model, ready)
    return lambda inputs, **_: graph(inputs)


def replaceable(layer: keras.layers.Layer) -> bool:
    """Whether a layer does what its class says and no more: no penalty on its output, no low-rank or integer kernel."""
    return (
        getattr(layer, "activity_regularizer", None) is None
        and not getattr(layer, "lora_enabled", False)
        and getattr(layer, "quantization_mode", None) is None
    )


def is_relu(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a plain ReLU."""
    if type(layer) is keras.layers.ReLU:
        plain = layer.max_value is None and not layer.negative_slope and not layer.threshold
    else:
        plain = type(layer) is keras.layers.Activation and layer.activation is keras.activations.relu
    return plain and replaceable(layer)


def _joins(first, second) -> bool:
    if type(second) in CONVOLUTIONS:
        valid = second.padding == "valid" and second.data_format == "channels_last" and replaceable(second)
        return valid and _pads(first) is not None and first.compute_dtype == second.compute_dtype
    if type(first) not in (keras.layers.BatchNormalization, keras.layers.Add) or not is_relu(second):
        return False
    return replaceable(first) and first.compute_dtype == second.compute_dtype


def _pads(layer) -> tuple | None:
    """The zeros that a layer puts around its input, where it does no more."""
    if type(layer) is Border and layer.value == 0:
        return layer.pads
    if type(layer) is keras.layers.ZeroPadding2D and layer.data_format == "channels_last":
        return layer.padding
    return None


class Taps:
    """The values within a model, in the order of execution: what `tap` of an engine returns."""

    def __init__(self):
        self.rows: list[tuple[keras.layers.Layer, list[np.ndarray]]] = []

    def __call__(self, layer, outputs) -> None:
        self.rows.append((layer, [ops.convert_to_numpy(output) for output in tree.flatten(outputs)]))


def parts(count: int, arrays: Sequence) -> list[tuple]:
    """A batch in `count` equal parts.

    Raises:
        ValueError: the examples cannot be shared out equally.
    """
    total = arrays[0].shape[0]
    size, rest = divmod(total, count)
    if rest or not size:
        raise ValueError(
            f"a batch of {total} cannot be cut into {count} equal parts to accumulate gradients over: "
            "choose a batch size that is a multiple"
        )
    return [tuple(array[i * size : (i + 1) * size] for array in arrays) for i in range(count)]
