"""PyTorch's compiled steps against the engine's own, in float64 on a CPU."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.data.batches import Augmentation, Batches
from kvision.data.device import DeviceDataset
from kvision.data.preprocessing import Preprocessing
from kvision.layers import activation, batch_norm, conv, logits, max_pool
from kvision.tasks.classification import Classification
from kvision.training.muon import Muon
from kvision.training.schedules import schedule
from kvision.weights.initialization import initialize
from tests.arrays import figures

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch" or not shutil.which("g++"), reason="PyTorch's compiler writes C++ on a CPU"
)


@pytest.fixture
def float64():
    engine.configure("float64")
    yield
    engine.configure("float32")


def network():
    inputs = keras.Input((8, 8, 3))
    x = conv(4, 3, name="first_conv")(inputs)
    x = max_pool(2, name="pool")(x)
    x = batch_norm(name="first_bn", scale=False)(x)
    x = activation("gelu", name="gelu")(x)
    x = keras.layers.GlobalMaxPooling2D(name="global_pool")(x)
    model = keras.Model(inputs, logits(10)(x))
    initialize(model, 0)
    return model


@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
def test_compiled_steps_are_the_engines(float64):
    from kvision.engine import torch_compiled

    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (24, 8, 8, 3), np.uint8), generator.integers(0, 10, 24)
    augmentation = Augmentation(flip=True, crop_padding=1, padding_mode="reflect")
    batches = Batches(images, labels, 8, 0, Preprocessing((0.5,) * 3, (0.25,) * 3), augmentation)
    rate, found = schedule("linear", 0.05, 9), []
    for compiled in (False, True):
        model = network()
        optimizer = Muon(rate, normalize=True, sgd={"first_bn/.*": (rate, 0.01), "logits/.*": rate})
        optimizer.build(model.trainable_variables)
        trainer = engine.create(model, Classification(label_smoothing=0.2), optimizer)
        if compiled:
            torch_compiled.compile_steps(trainer)
        means = trainer.train_steps(DeviceDataset(batches), np.stack(list(batches.params(0))))
        found.append(
            [
                *figures(means),
                *(np.array(ops.convert_to_numpy(v.value)) for v in (*model.variables, *optimizer.variables)),
            ]
        )
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)
