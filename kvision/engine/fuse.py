"""A functional model's graph as a list of calls, prepared once and run in every step.

Calling a Keras model walks its graph each time, through scopes, signatures and nested structures that cost Python more
time than a small layer costs the device. Here every call is prepared once, a value is freed after its last use, and
consecutive layers that are one operation in every framework are fused into one call:

- zero padding and the convolution without padding after it are a convolution with padding;
- a batch norm or an addition and the ReLU after it are one call, which can run in place.
"""

from collections import Counter
from collections.abc import Callable

import keras
import numpy as np
from keras import ops, tree

from kvision.engine.keras_internals import (
    graph_of,
    has_options,
    is_masked,
    is_rematerialized,
    nodes_of,
    only_tensor,
    options_of,
    output_structure,
    reads_variables,
    standardize_inputs,
    takes_training,
)
from kvision.layers import ConstantPad2D

CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)

# The options that the engines support of the layers that they compute in another way than Keras.
KNOWN = {
    keras.layers.Conv2D: "filters kernel_size strides padding data_format dilation_rate groups activation use_bias",
    keras.layers.DepthwiseConv2D: "kernel_size strides padding depth_multiplier data_format dilation_rate activation "
    "use_bias",
    keras.layers.MaxPooling2D: "pool_size strides padding data_format name",
    keras.layers.BatchNormalization: "axis momentum epsilon center scale renorm_momentum",
    keras.layers.Dense: "units activation use_bias lora_alpha",
    keras.layers.Activation: "activation",
    keras.layers.ReLU: "max_value negative_slope threshold",
    keras.layers.Add: "",
    keras.layers.ZeroPadding2D: "padding data_format",
    ConstantPad2D: "pads value",
    keras.layers.LSTM: "units activation recurrent_activation use_bias unit_forget_bias dropout recurrent_dropout seed "
    "return_sequences return_state go_backwards stateful unroll use_cudnn",
    keras.layers.GRU: "units activation recurrent_activation use_bias dropout recurrent_dropout seed return_sequences "
    "return_state go_backwards stateful unroll reset_after use_cudnn",
}
VALUES = ("_initializer", "_regularizer", "_constraint")  # of variables: no part of a call


class Graph:
    """Runs a functional model within `keras_internals.calling`: `graph(inputs)` is `model(inputs, training=training)`.

    Args:
        model: a functional model or a `Sequential`.
        lower: `lower(layer, pads=None, relu=False)` gives the function that is called in the place of a plain layer,
            with its arguments; None where the layer is Keras's to call, or where it cannot do what is asked. `pads`,
            ((above, below), (left, right)), are zeros that a convolution puts around its input itself; with `relu` a
            batch norm or an addition ends in a ReLU.
        training: as for calling the model.
        fuse: whether consecutive layers become one call. To read each layer's output they must not.
    """

    def __init__(self, model: keras.Model, lower: Callable, training: bool, fuse: bool = True):
        self.model = graph_of(model)
        self.lower, self.training, self.fuse = lower, training, fuse
        nodes = nodes_of(self.model)
        self.inputs = [id(tensor) for tensor in self.model.inputs]
        self.outputs = [id(tensor) for tensor in self.model.outputs]
        self.structure = output_structure(self.model)
        uses = Counter(self.outputs)
        for node in nodes:
            uses.update(map(id, node.arguments.keras_tensors))
        maker = {id(tensor): node for node in nodes for tensor in node.outputs}

        fused_calls = {}  # the call of two layers, by the second
        taken = set()  # the first of two layers
        for node in nodes if fuse else ():
            tensor = only_tensor(node.arguments)
            first = maker.get(id(tensor)) if tensor is not None and uses[id(tensor)] == 1 else None
            function = None if first is None or first in taken else self._fuse(first, node)
            if function is not None:
                fused_calls[node] = function, first.arguments
                taken.add(first)
        self.calls = []
        for node in nodes:
            if node not in taken:
                function, arguments = fused_calls.get(node) or (self._function(node), node.arguments)
                outputs = [id(tensor) for tensor in node.outputs]
                self.calls.append(_Call(node.operation, function, arguments, outputs))
        later = set(self.outputs)
        for call in reversed(self.calls):
            read = {id(tensor) for tensor in call.arguments.keras_tensors}
            call.last = tuple((read | set(call.outputs)) - later)
            later |= read

    def _fuse(self, first, second) -> Callable | None:
        """The function that computes two consecutive layers, or None."""
        if not (is_plain(first) and is_plain(second)):
            return None
        layer, next_layer = first.operation, second.operation
        if layer.compute_dtype != next_layer.compute_dtype:
            return None
        if type(next_layer) in CONVOLUTIONS and next_layer.padding == "valid" and is_channels_last(next_layer):
            pads = _pads(layer)
            return pads and self.lower(next_layer, pads=pads)
        if type(layer) in (keras.layers.BatchNormalization, keras.layers.Add) and _is_relu(next_layer):
            return self.lower(layer, relu=True)
        return None

    def _function(self, node) -> Callable:
        operation = node.operation
        if isinstance(operation, keras.Model) and is_graph(operation) and not is_masked(node):
            return Graph(operation, self.lower, self.training, self.fuse).nested
        function = self.lower(operation) if is_plain(node) else None
        if function is not None:
            return function
        if takes_training(operation):
            return lambda *args, **kwargs: operation(*args, **{**kwargs, "training": self.training})
        return operation

    def nested(self, inputs, **_):
        """What is called in the place of a model that is a layer of another one."""
        return self(inputs)

    def __call__(self, inputs, seen: Callable | None = None):
        """The model's outputs.

        Args:
            inputs: a tensor, or tensors nested as the model takes them.
            seen: called with each layer and its outputs, in the order of execution.
        """
        values = dict(zip(self.inputs, standardize_inputs(self.model, inputs), strict=True))
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
        tensor = only_tensor(arguments)
        self.single = None if tensor is None else id(tensor)
        self.last = ()


def is_graph(model: keras.Model) -> bool:
    """Whether a model's graph can be run: a functional one's or a `Sequential`'s with Keras's own `call`."""
    functional = graph_of(model)
    return (
        functional is not None
        and model.activity_regularizer is None
        and not any(reads_variables(node) for node in nodes_of(functional))
    )


def is_plain(node) -> bool:
    """Whether a call is that of a layer of `KNOWN` which does what its class says and no more, on floating numbers.

    Not one with an option that is not known here, as a later Keras may have it, nor with a penalty on its output, a
    low-rank or an integer kernel, or a mask.
    """
    layer = node.operation
    if type(layer) not in KNOWN or "call" in vars(layer) or is_masked(node) or has_options(node):
        return False
    others = [name for name in options_of(type(layer)) if name not in KNOWN[type(layer)].split()]
    return (
        layer.activity_regularizer is None
        and layer.autocast
        and layer.quantization_mode is None
        and not getattr(layer, "lora_enabled", False)
        and not is_rematerialized(layer)
        and all(getattr(layer, name, True) in (None, False) for name in others if not name.endswith(VALUES))
        and all(keras.backend.is_float_dtype(tensor.dtype) for tensor in node.arguments.keras_tensors)
    )


def is_channels_last(layer: keras.layers.Layer) -> bool:
    """Whether a layer of images reads (n, h, w, c)."""
    return layer.data_format == "channels_last"


def _is_relu(layer: keras.layers.Layer) -> bool:
    """Whether a plain layer is a ReLU of one slope and no bounds."""
    if type(layer) is keras.layers.ReLU:
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return type(layer) is keras.layers.Activation and layer.activation is keras.activations.relu


def _pads(layer) -> tuple | None:
    """The zeros that a layer puts around its input, where it does no more."""
    if type(layer) is ConstantPad2D and layer.value == 0:
        return layer.pads
    if type(layer) is keras.layers.ZeroPadding2D and is_channels_last(layer):
        return layer.padding
    return None


def penalties(model: keras.Model):
    """The sum of `model.losses`: penalties on weights, and those that the call before has added."""
    return sum(ops.sum(loss) if loss.ndim else loss for loss in model.losses)


class Recorder:
    """The values within a model, in the order of execution: what `layer_outputs` of an engine returns."""

    def __init__(self):
        self.rows: list[tuple[keras.layers.Layer, list[np.ndarray]]] = []

    def __call__(self, layer, outputs) -> None:
        self.rows.append((layer, [ops.convert_to_numpy(output) for output in tree.flatten(outputs)]))
