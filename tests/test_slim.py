"""TF-Slim's checkpoints mean the same here: logits against tf_slim's own, variables by name, and back to the bit."""

import json

import numpy as np
import pytest

from kvision import engine, zoo
from kvision.layers import blank
from kvision.weights import WeightsError, export_arrays, import_arrays
from tests import golden_slim

EXPECTED = json.loads(golden_slim.FILE.read_text())


@pytest.mark.parametrize("name", golden_slim.NETWORKS)
def test_logits_and_names_are_tf_slims(name):
    expected = EXPECTED[name]
    arrays = {key: golden_slim.draw(key, tuple(shape)) for key, shape in expected["variables"].items()}
    own = {"auxiliary": True} if name == "inception_v3_tf" else {}
    with blank():
        model = zoo.create_model(name, golden_slim.NETWORKS[name][2], golden_slim.CLASSES, **own)
    count, skipped, _ = import_arrays(model, arrays | {"global_step": np.array(7)}, "slim")
    assert (count, skipped) == (len(arrays), [])
    logits = engine.create(model).predict(golden_slim.images(model.input_shape[1:]))
    wanted = np.asarray(expected["logits"])
    assert abs(logits - wanted).max() <= 1e-4 * abs(wanted).max()
    back = export_arrays(model, "slim")
    assert {key: array.tobytes() for key, array in back.items()} == {k: a.tobytes() for k, a in arrays.items()}
    with pytest.raises(WeightsError, match=r"1 of \d+ variables get no array"):
        import_arrays(model, {key: array for key, array in arrays.items() if key != next(iter(arrays))}, "slim")
