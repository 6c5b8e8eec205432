"""Each private name of Keras that the engine uses still means what `kvision/engine/keras_internals.py` says."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kvision.engine import keras_internals
from tests.arrays import value


class OwnCall(keras.Model):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training)


class OwnStep(keras.Model):
    def train_step(self, *arguments):
        return super().train_step(*arguments)


def functional(kind=keras.Model, **options):
    inputs = keras.Input((3,), name="image")
    return kind(inputs, layers.Dense(2, name="dense", **options)(inputs))


def test_the_graph_that_a_model_runs():
    model, sequential = functional(), keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    assert keras_internals.graph_of(model) is model
    assert len(keras_internals.nodes_of(keras_internals.graph_of(sequential))) == 1
    assert keras_internals.graph_of(functional(OwnStep)) is not None
    for other in (functional(OwnCall), keras.Sequential([layers.Dense(2)]), layers.Dense(2)):
        assert keras_internals.graph_of(other) is None
    model.call = lambda inputs, training=None: inputs
    assert keras_internals.graph_of(model) is None


def test_what_a_class_writes_anew_of_the_step():
    assert keras_internals.own_step(functional()) == []
    assert keras_internals.own_step(functional(OwnCall)) == []
    assert keras_internals.own_step(functional(OwnStep)) == ["train_step"]


def test_the_calls_of_a_graph():
    words = keras.Input((4,), dtype="int32")
    embedded = layers.Embedding(9, 3, mask_zero=True, name="embedding")(words)
    read = layers.LSTM(2, name="lstm")(layers.Dense(3, name="dense")(embedded))
    doubled = ops.multiply(read, 2)
    product = doubled._keras_history.operation.name  # numbered through the whole process
    joined = layers.Add(name="add")([read, doubled])
    model = keras.Model(words, layers.Reshape((2, 1), name="reshape")(joined))
    nodes = {node.operation.name: node for node in keras_internals.nodes_of(model)}
    first, *_, last = nodes
    assert (first, last) == ("embedding", "reshape")
    masked = {name for name, node in nodes.items() if keras_internals.is_masked(node)}
    assert {"dense", "lstm"} <= masked and not {"embedding", "add", "reshape"} & masked
    assert keras_internals.only_tensor(nodes["embedding"].arguments) is model.inputs[0]
    assert keras_internals.only_tensor(nodes["add"].arguments) is None
    assert not keras_internals.has_options(nodes["lstm"]) and not any(
        map(keras_internals.reads_variables, nodes.values())
    )
    assert keras_internals.takes_training(nodes["lstm"].operation)
    assert not keras_internals.takes_training(nodes["reshape"].operation)
    assert not keras_internals.takes_training(nodes[product].operation)


def test_a_variable_among_the_arguments_of_a_call():
    inputs = keras.Input((3,))
    scale = keras.Variable(np.ones(3, np.float32), name="scale")
    model = keras.Model(inputs, ops.multiply(inputs, scale))
    assert [keras_internals.reads_variables(node) for node in keras_internals.nodes_of(model)] == [True]


def test_inputs_become_tensors_of_the_inputs_dtype():
    model = functional()
    (tensor,) = keras_internals.standardize_inputs(model, ops.convert_to_tensor(np.ones((2, 3), np.int32)))
    assert keras.backend.standardize_dtype(tensor.dtype) == "float32" and tuple(tensor.shape) == (2, 3)
    assert keras_internals.output_structure(model) is model.outputs[0]


def test_penalties_add_up_within_a_call_and_the_next_one_drops_them():
    dense = layers.Dense(3, activity_regularizer=keras.regularizers.L2(1.0))
    inputs = keras.Input((3,))
    model = keras.Model(inputs, dense(dense(inputs)))
    x = ops.convert_to_tensor(np.ones((2, 3), np.float32))
    for _ in range(2):
        with keras_internals.calling(model, training=True):
            dense(dense(x))
        assert len(model.losses) == 2
    dropout = layers.Dropout(0.5, seed=1)
    for training in (True, False):
        with keras_internals.calling(model, training):
            assert bool(ops.any(dropout(x) == 0)) == training


def test_rematerialized_layers():
    with keras.RematScope(mode="full"):
        assert keras_internals.is_rematerialized(layers.Dense(2))
    assert not keras_internals.is_rematerialized(layers.Dense(2))


def test_the_options_of_a_constructor():
    assert set(keras_internals.options_of(layers.ReLU)) == {"max_value", "negative_slope", "threshold"}
    assert "momentum" in keras_internals.options_of(layers.BatchNormalization)


def test_the_places_of_an_optimizers_slots():
    model, optimizer = functional(), keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(model.trainable_variables)
    kernel, bias = model.trainable_variables
    assert keras_internals.uses_weight_decay(optimizer, kernel)
    assert not keras_internals.uses_weight_decay(optimizer, bias)
    slot = optimizer.momentums[keras_internals.index_of(optimizer, bias)]
    assert tuple(slot.shape) == tuple(bias.shape)
    assert ops.is_tensor(keras_internals.storage(kernel)) or keras.backend.backend() == "tensorflow"


@pytest.mark.parametrize("wrap", [lambda inner: inner, keras.optimizers.LossScaleOptimizer], ids=["plain", "scaled"])
def test_other_methods_on_the_same_state(wrap):
    """The optimizer that is given keeps its class, its methods and its attributes; what one sets, both have."""
    model, inner = functional(), keras.optimizers.SGD(0.1)
    optimizer = wrap(inner)
    optimizer.build(model.trainable_variables)
    before = type(inner), set(vars(inner)), type(optimizer), set(vars(optimizer))
    other = keras_internals.with_methods(optimizer, lambda found: {"double": lambda self: 2 * self.momentum})
    unwrapped = other if other.__class__.__name__ == inner.__class__.__name__ else other.inner_optimizer
    unwrapped.momentum = 4.0
    assert inner.momentum == 4.0 and unwrapped.double() == 8.0 and not hasattr(inner, "double")
    assert isinstance(other, type(optimizer)) and other.variables == optimizer.variables
    other.learning_rate = 0.25
    assert float(value(inner._learning_rate)) == 0.25
    assert before == (type(inner), set(vars(inner)), type(optimizer), set(vars(optimizer)))
    assert keras_internals.with_methods(optimizer, lambda found: {}) is optimizer


def test_what_a_class_writes_anew_of_the_steps_of_fit():
    assert keras_internals.steps_of_its_own(functional()) == []
    assert keras_internals.steps_of_its_own(functional(OwnStep)) == ["train_step"]
    model = functional()
    vars(model)["test_step"] = model.test_step
    assert keras_internals.steps_of_its_own(model) == ["test_step"]


def test_the_parts_of_a_compiled_model():
    model = functional()
    model.compile("sgd", "mse", metrics=["mae"])
    tracker = keras_internals.loss_tracker(model)
    assert tracker is model.metrics[0] and tracker.name == "loss"
    assert not keras_internals.is_built(model)
    before = [value(variable) for variable in model.weights]
    keras_internals.build_compiled(model, (np.ones((4, 3), np.float32), np.ones((4, 2), np.float32), None))
    assert keras_internals.is_built(model) and model.optimizer.built
    assert {"loss", "mae"} <= set(model.get_metrics_result())
    assert all((value(variable) == old).all() for variable, old in zip(model.weights, before, strict=True))
    model.compile("sgd", "mse")
    assert keras_internals.loss_tracker(model) is not tracker


def test_a_mask_is_carried_on():
    embedded = layers.Embedding(9, 3, mask_zero=True)(ops.convert_to_tensor(np.array([[1, 0]])))
    other = keras_internals.copy_mask(embedded, ops.stop_gradient(embedded))
    loss = keras.losses.MeanAbsoluteError(reduction="sum")
    zeros = ops.zeros_like(embedded)
    found, expected, whole = (float(ops.convert_to_numpy(loss(zeros, y))) for y in (other, embedded, other + 0))
    assert found == expected != whole


def test_what_fit_takes_as_arrays():
    assert keras_internals.are_arrays(({"a": np.ones(2), "b": [np.ones(2)]}, None, np.ones(2)))
    assert not keras_internals.are_arrays(((number for number in range(2)), None, None))
