"""torchvision's weights: logits against reference networks, and bit-exact round trips."""

import json

import keras
import numpy as np
import pytest

from kvision import engine, zoo
from kvision.convert import torchvision
from kvision.weights.npz import named_variables
from tests import golden
from tests.arrays import value

EXPECTED = json.loads(golden.FILE.read_text())
CASES = pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)


@CASES
def test_converted_weights_give_the_references_logits_and_an_exact_round_trip(case):
    model = zoo.build_model(case.name, case.input_shape, case.classes, **case.model_kwargs)
    found, variables = torchvision.find(model), named_variables(model)
    given = {key: golden.draw(place.key, place.shape) for key, place in found.items()}
    for key, place in found.items():
        variables[key].assign(place.import_(given[key], tuple(variables[key].shape)))
    expected = np.asarray(EXPECTED[case.name], np.float32)
    logits = engine.create(model).predict(golden.images(case.input_shape))
    assert abs(logits - expected).max() <= 1e-4 * abs(expected).max()
    for key, place in found.items():
        back = place.export_(value(variables[key]))
        assert back.shape == given[key].shape and back.tobytes() == given[key].tobytes(), key


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the reference networks are PyTorch's")
@CASES
def test_the_reference_has_these_names_shapes_and_logits(case):
    module = golden.reference(case)
    model = zoo.build_model(case.name, case.input_shape, case.classes, **case.model_kwargs)
    found = torchvision.find(model)
    expected = {place.key: place.shape for place in found.values()}
    expected |= dict.fromkeys(torchvision.counters(found), ())
    assert {key: tuple(array.shape) for key, array in module.state_dict().items()} == expected
    logits, stored = golden.logits(module, case.input_shape), np.asarray(EXPECTED[case.name], np.float32)
    assert abs(logits - stored).max() <= 1e-5 * abs(stored).max()
