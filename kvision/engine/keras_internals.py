"""Keras's private names, a function each: what the engine needs and Keras's public API does not give.

`tests/test_keras_internals.py` holds that each still means what is said here, on every version of Keras that is
supported. Nothing else in kvision names them.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
from keras import tree

_functional = importlib.import_module("keras.src.models.functional")
_arrays = importlib.import_module("keras.src.trainers.data_adapters.array_data_adapter")
_dtypes = importlib.import_module("keras.src.backend.common.dtypes")

# What `train_on_batch` calls of a model, which a subclass may write anew.
STEP_METHODS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


def narrow_float64(to: str) -> None:
    """Set what Keras makes of float64 in its rules of promotion; all of them end in this table."""
    _dtypes.BIT64_TO_BIT32_DTYPE["float64"] = to


def graph_of(model: keras.Model):
    """The functional model whose graph `model.call` runs: the model itself or a `Sequential`'s; None where a subclass
    has a `call` or `__call__` that is not Keras's, or where nothing is built."""
    kind = type(model)
    if not isinstance(model, keras.Model) or kind.__call__ is not keras.Model.__call__ or "call" in vars(model):
        return None
    if isinstance(model, keras.Sequential):
        return model._functional if kind.call is keras.Sequential.call else None
    if isinstance(model, _functional.Functional) and kind.call is _functional.Functional.call:
        return model
    return None


def own_step(model: keras.Model) -> list[str]:
    """The parts of Keras's step that a model's class writes anew."""
    return [name for name in STEP_METHODS if getattr(type(model), name) is not getattr(keras.Model, name)]


def steps_of_its_own(model: keras.Model) -> list[str]:
    """The parts of the steps of `model.fit` that a model's class writes anew, or that are set on the model, but
    `compute_loss`."""
    names = ("train_step", "test_step", "compute_metrics", "make_train_function", "make_test_function")
    return [
        name for name in names if name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name)
    ]


def nodes_of(functional) -> list:
    """The nodes of a functional model's graph in the order of execution, its inputs left out.

    A node has `operation`, `outputs` (symbolic tensors), `parent_nodes`, and `arguments` with `keras_tensors` and
    `fill_in(values)`, which gives the call's arguments from values by `id` of the symbolic tensors.
    """
    depths = functional._nodes_by_depth
    nodes = [node for depth in sorted(depths, reverse=True) for node in depths[depth]]
    return [node for node in nodes if node.operation and not node.is_input]


def only_tensor(arguments):
    """The symbolic tensor that is a call's only argument, or None."""
    return arguments._single_positional_tensor


def is_masked(node) -> bool:
    """Whether a call has a mask, or reads a tensor that carries one, as an `Embedding(mask_zero=True)` gives it."""
    carried = any(getattr(tensor, "_keras_mask", None) is not None for tensor in node.arguments.keras_tensors)
    return carried or node.arguments.kwargs.get("mask") is not None


def has_options(node) -> bool:
    """Whether a call has arguments by name beside `training` and `mask`."""
    return bool(set(node.arguments.kwargs) - {"training", "mask"})


def reads_variables(node) -> bool:
    """Whether the call has a variable among its arguments, which Keras casts by the policy of the model around it."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    return any(isinstance(value, keras.Variable) for value in tree.flatten([args, kwargs]))


def output_structure(functional):
    """How a functional model's outputs are nested."""
    return functional._outputs_struct


def standardize_inputs(functional, inputs) -> list:
    """A functional model's inputs as `call` takes them: a list of tensors of the dtypes and ranks of its `Input`s."""
    return functional._standardize_inputs(inputs)


def takes_training(layer) -> bool:
    """Whether an operation's call has an argument `training`."""
    return isinstance(layer, keras.layers.Layer) and layer._call_has_training_arg


def storage(variable):
    """The backend's tensor that holds a variable's value, whatever the policy in force; None before it is made."""
    return variable._value


@contextmanager
def calling(model: keras.Model, training: bool) -> Iterator[None]:
    """What `model(x, training=training)` sets up around the calls of its layers.

    They belong to one call: the penalties of the last one are dropped here, and those of this one add up, each call of
    a shared layer's too.
    """
    context = model._get_call_context()
    context.training = training
    try:
        yield
    finally:
        model._maybe_reset_call_context()


def call_losses(model: keras.Model) -> list:
    """The penalties that the last call of a model has added: `model.losses` without those on weights."""
    losses = list(model._get_own_losses())
    for layer in model._flatten_layers(include_self=False):
        losses.extend(layer._get_own_losses())
    return losses


def is_rematerialized(layer) -> bool:
    """Whether a layer was made in a `RematScope`: it computes its outputs once more in the backward pass."""
    return bool(layer._remat_mode)


def uses_weight_decay(optimizer, variable) -> bool:
    """Whether an optimizer's decoupled weight decay acts on a variable."""
    return optimizer._use_weight_decay(variable)


def index_of(optimizer, variable) -> int:
    """The place of a variable's slots in an optimizer's lists."""
    return optimizer._get_variable_index(variable)


def trained_variables(optimizer) -> list:
    """The variables that an optimizer was built for, in the order of its slots."""
    return optimizer._trainable_variables


def slot_variables(optimizer) -> list:
    """An optimizer's own variables, without those of an optimizer that it wraps."""
    return list(optimizer._variables)


WEIGHT_DECAY = "_apply_weight_decay"  # `method(variables)`: decoupled weight decay, before the update
PARALLEL_UPDATE = "_parallel_update_step"  # `method(gradients, variables, learning_rate)` of Keras's PyTorch optimizers


def has_plain_weight_decay(optimizer) -> bool:
    """Whether an optimizer has a weight decay and its class Keras's own method for it."""
    kind = type(optimizer)
    return optimizer.weight_decay is not None and getattr(kind, WEIGHT_DECAY) is getattr(
        keras.optimizers.Optimizer, WEIGHT_DECAY
    )


def updates_together(kind: type) -> type:
    """A class of optimizers whose `update_variables(gradients, variables, learning_rate)` is called in the place of
    `update_step` for each variable."""
    kind._backend_update_step = kind.update_variables
    return kind


def set_comparison(callback) -> None:
    """Let a callback that monitors a value choose now how it is compared; Keras does at the first epoch's end."""
    callback._set_monitor_op()


def direction(metric) -> str | None:
    """Whether more of a Keras metric is better ("up"), less ("down"), or None: it does not say."""
    return vars(metric).get("_direction")


def has_generators(operation) -> bool:
    """Whether a layer draws random numbers of Keras's own."""
    return bool(vars(operation).get("_seed_generators"))


def producer_of(tensor):
    """The node of a graph that gives a symbolic tensor."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def inner_name(optimizer) -> str | None:
    """The attribute under which an optimizer keeps the one that it wraps."""
    return next((name for name in ("inner", "inner_optimizer") if getattr(optimizer, name, None) is not None), None)


def with_methods(optimizer, methods_for: Callable[[keras.optimizers.Optimizer], dict]):
    """An optimizer of the same state with other methods; the optimizer that is given stays as it is.

    Args:
        methods_for: the methods by name, for the optimizer inside all wrappers.
    """
    kind, inner = type(optimizer), inner_name(optimizer)
    if inner is None:
        methods = methods_for(optimizer)
    else:
        wrapped = with_methods(getattr(optimizer, inner), methods_for)
        unchanged = wrapped is getattr(optimizer, inner)
        methods = {} if unchanged else {inner: property(lambda self: wrapped)}
    if not methods:
        return optimizer
    other = object.__new__(type(kind.__name__, (kind,), methods))
    object.__setattr__(other, "__dict__", vars(optimizer))  # one dictionary: what is set on either is set on both
    return other


def options_of(kind: type) -> list[str]:
    """The names of the arguments of a layer's constructor, those of `keras.layers.Layer` left out."""
    _, *parameters = inspect.signature(kind.__init__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def loss_tracker(model: keras.Model):
    """The metric of a compiled model that has the mean loss of the steps since `reset_metrics`."""
    return model._loss_tracker


def copy_mask(tensor, other):
    """`other` with the mask that a tensor carries, as an `Embedding(mask_zero=True)` gives it."""
    mask = getattr(tensor, "_keras_mask", None)
    if mask is not None:
        other._keras_mask = mask
    return other


def is_built(model: keras.Model) -> bool:
    """Whether a model, its layers, its optimizer, and the losses and metrics of `compile` have their variables."""
    parts = (model._compile_loss, model._compile_metrics, model.optimizer, *model._flatten_layers())
    return all(part is None or part.built for part in parts)


def build_compiled(model: keras.Model, data) -> None:
    """Make the variables of a compiled model, of its losses, metrics and optimizer, for a batch (x, y, sample weights);
    nothing is computed."""
    model._symbolic_build(data_batch=data)


def are_arrays(data) -> bool:
    """Whether what is nested in `data` are arrays to Keras's `fit`, which divides them into batches itself."""
    return _arrays.can_convert_arrays(data)
