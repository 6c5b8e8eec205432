"""What classification trains on and what it refuses, in a line; and that the engine leaves an optimizer as it is."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kvision import engine
from kvision.tasks.classification import Classification
from kvision.training import trainer
from tests.arrays import take_step
from tests.test_equals_fit import (
    CLASSES,
    FEATURES,
    IMAGES,
    VECTORS,
    Program,
    WithTraining,
    head,
    pooled_twice,
    relu,
    shared,
)


@pytest.mark.parametrize(("layers_of", "shape"), [(shared, VECTORS), (pooled_twice, IMAGES)], ids=["dense", "pooling"])
def test_each_call_of_a_shared_layer_adds_its_penalty(layers_of, shape):
    """On every backend, against `model.losses` of a plain call."""
    program = Program(layers_of, shape, bound=1e-5)
    engine.configure("float32")
    model = program.build()
    x, y = program.arrays()
    plain = program.loss()(y, model(x))
    loss = sum(float(ops.convert_to_numpy(part)) for part in (plain, *model.losses))
    assert len(model.losses) == 2
    optimizer = program.optimizer()
    optimizer.build(model.trainable_variables)
    found, _ = take_step(engine.create(model, Classification(program.loss()), optimizer), x, y)
    assert float(found) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Muon", "LossScaleOptimizer"])
def test_an_optimizer_stays_as_it_is_given(kind):
    """After a step of the engine it is of the same class and has no method."""
    inner = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
    made = {"LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(inner)}.get(
        kind, lambda: getattr(keras.optimizers, kind)(0.1, weight_decay=0.1)
    )()
    model = Program(head(relu)).build()
    made.build(model.trainable_variables)
    kinds = [type(one) for one in (made, inner)]
    own = engine.create(model, Classification(keras.losses.SparseCategoricalCrossentropy(from_logits=True)), made)
    take_step(own, np.ones((4, FEATURES), np.float32), np.arange(4, dtype=np.int32) % CLASSES)
    own.sync_variables()
    assert kinds == [type(one) for one in (made, inner)]
    patched = {name for one in (made, inner) for name in vars(one) if callable(getattr(type(one), name, None))}
    assert not patched


def two_inputs():
    inputs = [keras.Input((FEATURES,)) for _ in range(2)]
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Add()(inputs)))


def inputs_by_name():
    inputs = keras.Input((FEATURES,), name="image")
    return keras.Model({"image": inputs}, layers.Dense(CLASSES)(inputs))


def outputs_by_name():
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, {"logits": layers.Dense(CLASSES)(inputs)})


class DictionaryOutputs(WithTraining):
    def call(self, x, training=False):
        return {"logits": super().call(x, training)}


REFUSED_MODELS = {
    "several inputs": (two_inputs, "with one input tensor, and .* has a list of 2 inputs. Train it with Keras's own"),
    "inputs by name": (inputs_by_name, "with one input tensor, and .* has a dict of 1 inputs"),
    "outputs by name": (
        outputs_by_name,
        "with a tensor, or a list of tensors, as output, and .* has a dict of 1 outputs",
    ),
    "outputs by name, in a call": (DictionaryOutputs, "returns a tensor, or a list of tensors .* returned a dict"),
    "not built": (lambda: keras.Sequential([layers.Dense(CLASSES)]), "is not built: build it first, by model.build"),
    "no model": (lambda: layers.Dense(CLASSES), "expected a keras.Model, got a Dense"),
}


def first_of_outputs(labels, outputs):
    main = engine.main_output(outputs)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, main)


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_a_model_that_is_not_taken_is_refused_in_a_line(name):
    make, message = REFUSED_MODELS[name]
    model, optimizer = make(), keras.optimizers.SGD(0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        if getattr(model, "built", False):
            optimizer.build(model.trainable_variables)
        own = engine.create(model, Classification(first_of_outputs), optimizer)
        take_step(own, np.ones((4, FEATURES), np.float32), np.zeros(4, np.int32))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.array([True, False] * 4),
            r"expected integer labels \(n,\) or floating targets .*, got bool of shape \(8,\)",
        ),
        (np.zeros((8, 5), np.int32), r"got int32 of shape \(8, 5\). Train it with Keras's own"),
        (np.ones((8, 5, CLASSES), np.float32), r"got float32 of shape \(8, 5, 3\)"),
        (np.ones(8, np.float32), r"got float32 of shape \(8,\)"),
        (np.ones((8, CLASSES), np.float32), r"targets \(n, classes\) must sum to 1 in each row"),
    ],
    ids=["bool", "sequences of classes", "sequences of shares", "numbers", "several classes at once"],
)
def test_targets_that_are_not_taken_are_refused_in_a_line(labels, message):
    model, optimizer = Program(head(relu)).build(), keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    own = engine.create(model, Classification(keras.losses.MeanSquaredError()), optimizer)
    with pytest.raises(ValueError, match=message):
        take_step(own, np.ones((8, FEATURES), np.float32), labels)


def test_a_loss_by_name_is_refused_in_a_line():
    with pytest.raises(TypeError, match=r"expected a loss\(labels, logits\) .*, got 'mse'"):
        Classification("mse")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "sgd"}, r"expected an optimizer such as keras.optimizers.SGD\(0.1\), got 'sgd'"),
        ({"task": "mse"}, r"expected a task such as .*, got 'mse'"),
        ({"batches": keras.utils.PyDataset()}, "got PyDataset: .* use keras.Model.fit"),
        ({"batches": [(np.zeros((2, FEATURES)), np.zeros(2))]}, "got list: .* use keras.Model.fit"),
    ],
    ids=["optimizer", "loss", "PyDataset", "list"],
)
def test_arguments_of_fit_that_are_not_taken_are_refused_in_a_line(changed, message):
    given = {"task": Classification(), "optimizer": keras.optimizers.SGD(0.1), "batches": None} | changed
    with pytest.raises(TypeError, match=message):
        trainer.fit(Program(head(relu)).build(), *given.values(), epochs=1)
