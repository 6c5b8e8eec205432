"""The same run on every backend, held against numbers that were frozen once.

Each backend is compared with the same constants, so that the backends are proved equal where only one is installed.
"""

import hashlib

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine, zoo
from kvision.data.batches import Augmentation, Batches
from kvision.data.preprocessing import Preprocessing
from kvision.layers import activation, batch_norm, conv, logits, max_pool, regularizers
from kvision.tasks.classification import Classification
from kvision.training.optimizers import LearningRateMultipliers, make_optimizer
from kvision.training.schedules import schedule
from kvision.weights.initialization import initialize
from tests.arrays import figures

layers, initializers = keras.layers, keras.initializers

# JAX, TensorFlow and PyTorch agreed on these to 4e-7 on a CPU, and on the hashes below bit for bit.
FIRST_BATCHES = "e8cf770d84ff996c6a016150104c5c164ee168107f0b5ecbb7dbb9896d13ee7b"
FIRST_LOGITS = [-1.529171, 0.00753382, 0.1522478, -0.2758502, -0.68691]
LOSSES = [1.8456519, 1.9119622, 1.8892135, 1.803825, 1.7780173]
CORRECT = [5, 4, 4, 4, 5]
# The lengths of the variables after five steps.
NORMS = {
    "stage1_conv/kernel": 2.3606289,
    "stage1_bn/gamma": 2.8253684,
    "stage1_bn/beta": 0.7734826,
    "stage1_bn/moving_mean": 1.6755989,
    "stage1_bn/moving_variance": 2.5658019,
    "stage2_conv/kernel": 3.8085635,
    "stage2_bn/beta": 0.5268078,
    "stage2_bn/moving_mean": 1.4569568,
    "stage2_bn/moving_variance": 1.6572169,
    "logits/kernel": 2.252832,
    "logits/bias": 0.0814343,
}


def arrays(model):
    return {variable.path: np.asarray(ops.convert_to_numpy(variable.value)) for variable in model.weights}


def sha256(*parts):
    """Over the little-endian bytes of arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def kerass_own():
    """A layer for each of Keras's initializers that `initialize` draws in NumPy."""
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
        (lambda: zoo.build_model("resnet20"), 0, "14746606d18c42d877a5086de50a30eaba8533f6ab73149534fbdea0c4a55ae4"),
        (
            lambda: zoo.build_model("airbench_small"),
            7,
            "f0871fc30dcf0471e5d7e27f30a05692736d4cb9f11ca60deab531d88c7f2748",
        ),
        (kerass_own, 0, "eff387013faba5e27c6bc526179235500a1800afb885d6b8e4b4034dd6d88801"),
    ],
    ids=["resnet20", "airbench_small", "kerass_own"],
)
def test_initial_weights(build, seed, expected):
    model = build()
    initialize(model, seed)
    values = arrays(model)
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    assert sha256(*(values[path] for path in sorted(values))) == expected


def test_initial_weights_hang_on_seed_and_name_alone():
    def values(seed, *names):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, [layers.Dense(3, name=name)(inputs) for name in names])
        initialize(model, seed)
        return arrays(model)

    both, one, other = values(0, "a", "b"), values(0, "b"), values(1, "b")
    np.testing.assert_array_equal(both["b/kernel"], one["b/kernel"])
    assert not (both["a/kernel"] == both["b/kernel"]).any() and not (one["b/kernel"] == other["b/kernel"]).any()


@pytest.mark.parametrize(
    ("initializer", "moments"),
    [
        (initializers.GlorotUniform(), (0, 2 / 500)),
        (initializers.HeNormal(), (0, 2 / 200)),
        (initializers.RandomNormal(0.5, 0.1), (0.5, 0.01)),
        (initializers.RandomUniform(-0.2, 0.4), (0.1, 0.03)),
        # Cut at two deviations and, as in Keras, not corrected for it.
        (initializers.TruncatedNormal(1.0, 0.2), (1.0, (0.2 * 0.87962566) ** 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kerass_initializers_keep_their_moments(initializer, moments):
    inputs = keras.Input((200,))
    model = keras.Model(inputs, layers.Dense(300, kernel_initializer=initializer, name="dense")(inputs))
    initialize(model, 0)
    kernel = arrays(model)["dense/kernel"].astype(np.float64)
    assert abs(kernel.mean() - moments[0]) < 4 * np.sqrt(moments[1] / kernel.size)
    assert abs(kernel.var() / moments[1] - 1) < 4 * np.sqrt(2 / kernel.size)


def test_an_initialiser_that_numpy_cannot_draw_is_named():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(4, kernel_initializer="orthogonal", name="turn")(inputs))
    with pytest.raises(ValueError, match=r"cannot initialize turn/kernel in NumPy: its initializer is Orthogonal"):
        initialize(model, 0)


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


def tiny_batches(make_images):
    images, labels = make_images(64, 12, 12, classes=5)
    images[:, :6] //= 1 + labels[:, None, None, None].astype(np.uint8)  # something to learn
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Batches(images, labels, 16, 3, preprocessing, Augmentation(True, 2, "reflect", 3))


def test_augmented_batches(make_images):
    batches = tiny_batches(make_images)
    assert (
        sha256(*(part for epoch in (0, 1) for batch in batches.epoch(epoch) for part in batch.values()))
        == FIRST_BATCHES
    )


def test_first_losses_and_what_they_leave(make_images):
    model = tiny()
    initialize(model, 0)
    regularizers.add_regularizer(model, keras.regularizers.L2(1e-2))
    inner = make_optimizer("sgd", schedule("cosine", 0.1, 8, warmup=0.25), weight_decay=0.05)
    optimizer = LearningRateMultipliers(inner, {r".*_bn/beta": 8.0, "logits/.*": 0.5})
    optimizer.build(model.trainable_variables)
    runner = engine.create(model, Classification(label_smoothing=0.2), optimizer)
    batches = tiny_batches(make_images)
    before = runner.predict(next(batches.epoch(0))["image"])
    steps = [figures(runner.train_step(batch)) for epoch in (0, 1) for batch in batches.epoch(epoch)][:5]
    runner.sync_variables()
    np.testing.assert_allclose(before[0], FIRST_LOGITS, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([float(loss) for loss, _ in steps], LOSSES, rtol=1e-5)
    assert [int(correct) for _, correct in steps] == CORRECT
    norms = {path: np.linalg.norm(array.astype(np.float64)) for path, array in arrays(model).items()}
    bias = norms.pop("stage2_conv/bias")
    assert bias < 1e-6  # the batch norm after it takes it away: rounding is all that moves it
    assert norms == pytest.approx(NORMS, rel=1e-5)


def test_dropout_is_seeded():
    """By seed and layer, whatever else the process has built before."""

    def states(seed):
        model = zoo.build_model("mlp", (4, 4, 1), 3, hidden=(5, 5))
        initialize(model, seed)
        weights = {variable.path for variable in model.weights}
        return [ops.convert_to_numpy(v.value).tolist() for v in model.variables if v.path not in weights]

    assert states(0) == states(0) == [[1070810944, 0], [379215483, 0]]
    assert states(1) == [[428811023, 0], [1530976168, 0]]
