"""TF-Slim's checkpoints: logits against tf_slim, variables by name, and bit-exact round trips."""

import json

import numpy as np
import pytest

from kvision import engine, zoo
from kvision.convert import convert, export_arrays, import_arrays
from kvision.layers import skip_init
from kvision.weights import WeightsError, inspect
from kvision.weights.initialization import initialize
from tests import golden_slim
from tests.arrays import values

EXPECTED = json.loads(golden_slim.FILE.read_text())


@pytest.mark.parametrize("name", golden_slim.NETWORKS)
def test_logits_and_names_equal_those_of_tf_slim(name):
    expected = EXPECTED[name]
    arrays = {key: golden_slim.draw(key, tuple(shape)) for key, shape in expected["variables"].items()}
    model_kwargs = {"auxiliary": True} if name == "inception_v3_keras" else {}
    with skip_init():
        model = zoo.build_model(name, golden_slim.NETWORKS[name][2], golden_slim.CLASSES, **model_kwargs)
    count, skipped, _ = import_arrays(model, arrays | {"global_step": np.array(7)}, "tf_slim")
    assert (count, skipped) == (len(arrays), [])
    logits = engine.create(model).predict(golden_slim.images(model.input_shape[1:]))
    wanted = np.asarray(expected["logits"])
    assert abs(logits - wanted).max() <= 1e-4 * abs(wanted).max()
    back = export_arrays(model, "tf_slim")
    assert {key: array.tobytes() for key, array in back.items()} == {k: a.tobytes() for k, a in arrays.items()}
    with pytest.raises(WeightsError, match=r"1 of \d+ variables are missing"):
        import_arrays(model, {key: array for key, array in arrays.items() if key != next(iter(arrays))}, "tf_slim")


@pytest.mark.parametrize(
    ("source", "theirs"),
    [
        (
            "tf_slim",
            {
                "vgg_16/conv5/conv5_3/weights": (3, 3, 32, 32),
                "vgg_16/fc6/weights": (7, 7, 32, 8),
                "vgg_16/fc7/weights": (1, 1, 8, 8),
                "vgg_16/fc8/biases": (10,),
            },
        ),
        ("frossard", {"conv5_3_W": (3, 3, 32, 32), "fc6_W": (1568, 8), "fc7_b": (8,), "fc8_W": (8, 10)}),
    ],
)
def test_early_vgg_files(source, theirs, tmp_path):
    """vgg_16.ckpt and vgg16_weights.npz: the fully connected layers read height, width, channels, as ours do."""
    with skip_init():
        model, again = (zoo.build_model("vgg16", (224, 224, 3), 10, width=4, hidden=8) for _ in range(2))
    initialize(model, 0)
    arrays = export_arrays(model, source)
    assert theirs.items() <= {key: array.shape for key, array in arrays.items()}.items()
    kernel = values(model)["head_1_dense/kernel"]
    assert np.array_equal(arrays[next(key for key in theirs if "fc6" in key)].reshape(kernel.shape), kernel)
    import_arrays(again, arrays, source)
    assert all(np.array_equal(values(again)[key], array) for key, array in values(model).items())
    np.savez(tmp_path / "vgg16_weights.npz", **{key.replace("/", "."): array for key, array in arrays.items()})
    if source == "frossard":
        out = tmp_path / "vgg16.npz"
        report = convert(tmp_path / "vgg16_weights.npz", out, "vgg16", arguments={"width": 4, "hidden": 8})
        assert (report.source, report.converted) == ("frossard", 32)
        assert inspect(out)["manifest"]["preprocessing"]["mean"] == [123.68, 116.779, 103.939]
