"""A `.keras` file of every kind of network of the zoo loads in a fresh process, after `import kvision` alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from kvision import zoo
from kvision.layers.regularizers import MaxNorm, Orthogonal, add_constraint, add_regularizer
from kvision.models import inception_v1, inception_v2, inception_v3, mnasnet, mobilenet_v2
from kvision.training.schedules import WarmupSchedule
from tests.test_zoo import build, classes_of, short_form

ROOT = Path(__file__).parent.parent
# Every module of the zoo, and every option that adds a class; each network in its short form.
NETWORKS = {
    "softmax": {},
    "mnist_cnn": {},
    "airbench_small": {},
    "resnet20": {},
    "wide_resnet_16_4": {"dropout_rate": 0.3},
    "densenet_40_12": {},
    "alexnet": {},
    "alexnet_2012": {},
    "vgg11_bn": {},
    "googlenet": {},
    "inception_v2_tf_slim": {},
    "inception_v3": {},
    "resnet18": {},
    "squeezenet1_1": {},
    "densenet121": {},
    "mobilenet_v2": {},
    "mnasnet0_5": {},
    "stn_affine": {},
    "stn_thin_plate": {},
    "conv_autoencoder": {},
    "unet_denoiser": {},
}
# What is compared: the weights' sums and, of networks of few layers, the logits.
FOUND = """
import numpy as np, keras
def found(model):
    from kvision import engine
    sums = [float(np.abs(keras.ops.convert_to_numpy(v.value)).sum()) for v in model.weights]
    if len(model.layers) > 60:
        return sums
    images = np.random.default_rng(0).random((1, *model.input_shape[1:]), np.float32)
    return sums + engine.create(model).predict(images).ravel().tolist()
"""
LOAD = f"""
import json, sys
import kvision
import keras
{FOUND}
result = []
for path in sys.argv[1:]:
    try:
        result.append(found(keras.saving.load_model(path)))
    except Exception as error:
        result.append(f"{{type(error).__name__}}: {{error}}"[:2000])
print(json.dumps(result))
"""
exec(FOUND)  # the same here


@pytest.fixture(scope="module")
def one_module_a_stage():
    """Keras's time to write and read a file grows with the layers; their kinds are in the first modules."""
    with pytest.MonkeyPatch.context() as patch:
        for paper in (inception_v1, inception_v2, inception_v3):
            patch.setattr(paper, "MODULES", {stage: rows[:1] for stage, rows in paper.MODULES.items()})
        for paper in (mobilenet_v2, mnasnet):
            once = tuple(tuple((*row[:-1], min(row[-1], 2)) for row in rows[:1]) for rows in paper.STAGES)
            patch.setattr(paper, "STAGES", once)
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, one_module_a_stage):
    """{name: (sums of the weights and the logits here, in a fresh process that read the file)}."""
    folder, here = tmp_path_factory.mktemp("keras_files"), []
    for name, options in NETWORKS.items():
        shape, arguments = short_form(name)
        model = build(name, shape, 3 if classes_of(name) else None, **arguments, **options)
        generator = np.random.default_rng(0)
        for variable in model.trainable_variables:
            variable.assign(0.05 * generator.standard_normal(variable.shape, np.float32))
        if name == "mnist_cnn":  # what a user adds comes along
            add_regularizer(model, Orthogonal(1e-3))
            add_constraint(model, MaxNorm(3.0))
            model.compile(keras.optimizers.SGD(WarmupSchedule(0.1, 10, 2)), "mse")
        here.append(found(model))  # noqa: F821
        model.save(folder / f"{name}.keras")
    words = [sys.executable, "-c", LOAD, *(f"{name}.keras" for name in NETWORKS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(NETWORKS, zip(here, there, strict=True), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_keras_file_loads_in_a_fresh_process(loaded, name):
    expected, found = loaded[name]
    assert not isinstance(found, str), found
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_module_of_the_zoo_is_covered():
    assert {zoo.paper(name).title for name in NETWORKS} >= {
        zoo.paper(name).title for name in zoo.list_models() if not name.startswith(("mlp", "softmax"))
    }
