"""The same run on every backend, held against numbers that were frozen once.

Each backend is compared with the same constants, so that the backends are proved equal where only one is installed.
"""

import hashlib

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine, regularizers, zoo
from kvision.data.batches import Augmentation, Batches
from kvision.data.preprocessing import Preprocessing
from kvision.layers import activation, batch_norm, conv, logits, max_pool
from kvision.tasks.classification import cross_entropy
from kvision.training import make_optimizer, schedule
from kvision.transfer import LearningRateFactors
from kvision.weights.initial import initialize

layers, initializers = keras.layers, keras.initializers


def arrays(model):
    return {variable.path: np.asarray(ops.convert_to_numpy(variable.value)) for variable in model.weights}


def sha256(*parts):
    """Over the little-endian bytes of arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def kerass_own():
    """A layer for each of Keras's initialisers that `initialize` draws in NumPy."""
    own = {
        "glorot": initializers.GlorotUniform(),
        "he": initializers.HeNormal(),
        "lecun": initializers.LecunUniform(),
        "variance": initializers.VarianceScaling(3.0, "fan_out", "untruncated_normal"),
        "normal": initializers.RandomNormal(0.5, 0.1),
        "uniform": initializers.RandomUniform(-0.2, 0.3),
        "truncated": initializers.TruncatedNormal(1.0, 0.2),
        "constant": initializers.Constant(0.25),
        "zeros": initializers.Zeros(),
        "ones": initializers.Ones(),
    }
    inputs = keras.Input((20,))
    outputs = [layers.Dense(30, kernel_initializer=own[name], name=name)(inputs) for name in own]
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("build", "seed", "expected"),
    [
        (lambda: zoo.create_model("resnet20"), 0, "resnet20"),
        (lambda: zoo.create_model("airbench_small"), 7, "airbench_small"),
        (kerass_own, 0, "kerass_own"),
    ],
    ids=["resnet20", "airbench_small", "kerass_own"],
)
def test_initial_weights(build, seed, expected):
    model = build()
    initialize(model, seed)
    values = arrays(model)
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    assert sha256(*(values[path] for path in sorted(values))) == expected


def tiny():
    """Two convolutions with batch norms, one of them with stride 2, pooled, and logits: no dropout."""
    x = inputs = keras.Input((12, 12, 3), name="image")
    x = conv(8, 3, name="stage1_conv")(x)
    x = max_pool(2, name="stage1_pool")(x)
    x = activation("relu", name="stage1")(batch_norm(name="stage1_bn")(x))
    x = conv(12, 3, 2, name="stage2_conv", use_bias=True)(x)
    x = activation("gelu", name="stage2")(batch_norm(name="stage2_bn", momentum=0.6, scale=False)(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, logits(5)(x), name="tiny")


def tiny_batches(pictures):
    images, labels = pictures(64, 12, 12, classes=5)
    images[:, :6] //= 1 + labels[:, None, None, None].astype(np.uint8)  # something to learn
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Batches(images, labels, 16, 3, preprocessing, Augmentation(True, 2, "reflect", 3))


def test_augmented_batches(pictures):
    batches = tiny_batches(pictures)
    assert sha256(*(part for epoch in (0, 1) for batch in batches.epoch(epoch) for part in batch)) == "batches"


def test_first_losses_and_what_they_leave(pictures):
    model = tiny()
    initialize(model, 0)
    regularizers.attach(model, keras.regularizers.L2(1e-2))
    inner = make_optimizer("sgd", schedule("cosine", 0.1, 8, warmup=0.25), weight_decay=0.05)
    optimizer = LearningRateFactors(inner, {r".*_bn/beta": 8.0, "logits/.*": 0.5})
    optimizer.build(model.trainable_variables)
    floor = engine.create(model, optimizer, cross_entropy(smoothing=0.2))
    batches = tiny_batches(pictures)
    before = floor.predict(next(batches.epoch(0))[0])
    steps = [floor.train_step(*batch) for epoch in (0, 1) for batch in batches.epoch(epoch)][:5]
    losses = [float(loss) for loss, _ in steps]
    print([float(x) for x in before[0]], losses, [int(c) for _, c in steps])
    floor.push()
    for path, v in arrays(model).items():
        print(path, float(np.sqrt(np.square(v.astype(float)).sum())))


def test_dropout_is_seeded():
    def states(seed):
        model = zoo.create_model("mlp", (4, 4, 1), 3, hidden=(5, 5))
        initialize(model, seed)
        weights = {variable.path for variable in model.weights}
        return [ops.convert_to_numpy(v.value).tolist() for v in model.variables if v.path not in weights]

    print(states(0), states(0), states(1))
