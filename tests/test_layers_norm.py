"""Batch norm frozen, fused, updated and synchronized, each against its closed form."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.layers import activation, batch_norm, conv, dense, depthwise_conv, logits, max_pool, norm
from kvision.tasks.classification import Classification
from kvision.training.optimizers import make_optimizer
from tests.arrays import noise, take_step, value, values

layers = keras.layers


def fill(model, seed=0):
    """Set every variable to random values, variances to positive ones."""
    for i, variable in enumerate(model.weights):
        drawn = noise(*variable.shape, seed=seed + i) / max(1, np.sqrt(np.prod(variable.shape[:-1])))
        variable.assign(np.abs(drawn) + 0.5 if variable.name.startswith("moving_variance") else drawn)
    return model


def chain(*calls, shape=(6, 6, 3)):
    x = inputs = keras.Input(shape, name="image")
    for call in calls:
        x = call(x)
    return fill(keras.Model(inputs, x, name="net"))


def small():
    return chain(
        conv(4, 3, name="stage1_conv"),
        batch_norm(name="stage1_bn"),
        activation("relu", name="stage1"),
        layers.Flatten(name="flatten"),
        logits(3),
    )


def train(model, images, steps=2, optimizer=None):
    runner = engine.create(model, Classification(), optimizer or make_optimizer("sgd", 0.1))
    for _ in range(steps):
        take_step(runner, images, np.arange(len(images), dtype=np.int32) % 3)
    runner.sync_variables()


def predict(model, images):
    return engine.create(model).predict(images)


# Frozen


def test_a_frozen_batch_norm_uses_its_running_statistics_and_is_not_updated():
    """The step equals that of a network with an affine map in place of the batch norm."""
    model, images = small(), noise(6, 6, 6, 3, seed=7)
    before, (scale, offset, mean, variance) = values(model), (value(v) for v in model.get_layer("stage1_bn").weights)
    assert norm.freeze_batch_norm(model) == ["stage1_bn"]
    inputs = keras.Input((6, 6, 3))
    factor = scale / np.sqrt(variance + 1e-5)
    x = conv(4, 3, name="stage1_conv")(inputs) * factor + (offset - mean * factor)
    written = keras.Model(inputs, logits(3)(layers.Flatten()(ops.relu(x))))
    for variable in written.weights:
        variable.assign(before[variable.path])
    for one in (model, written):
        train(one, images)
    for path, array in values(model).items():
        if path.startswith("stage1_bn"):
            np.testing.assert_array_equal(array, before[path])
        else:
            assert np.abs(array - before[path]).max() > 1e-3
            np.testing.assert_allclose(array, values(written)[path], rtol=1e-4, atol=1e-6, err_msg=path)


# Folded

FOLDS = {
    "conv": lambda: [conv(4, 3, name="a_conv"), batch_norm(name="a_bn")],
    "bias": lambda: [conv(4, 3, name="a_conv", use_bias=True), batch_norm(name="a_bn")],
    "strides": lambda: [conv(4, 3, 2, name="a_conv"), batch_norm(name="a_bn"), activation("relu", name="a")],
    "groups": lambda: [conv(6, 3, name="a_conv", groups=3), batch_norm(name="a_bn")],
    "no_scale": lambda: [conv(4, 3, name="a_conv"), batch_norm(name="a_bn", scale=False)],
    "no_offset": lambda: [conv(4, 3, name="a_conv", use_bias=True), batch_norm(name="a_bn", center=False)],
    "depthwise": lambda: [depthwise_conv(3, name="a_conv"), batch_norm(name="a_bn")],
    "multiplier": lambda: [
        depthwise_conv(3, name="a_conv", use_bias=True, depth_multiplier=2),
        batch_norm(name="a_bn"),
    ],
    "dense": lambda: [layers.Flatten(), dense(5, name="a_dense"), batch_norm(name="a_bn", epsilon=1e-3)],
    "two": lambda: [
        conv(4, 3, name="a_conv"),
        batch_norm(name="a_bn"),
        activation("relu", name="a"),
        conv(4, 3, name="b_conv"),
        batch_norm(name="b_bn"),
    ],
}
# What stays, and why.
KEEPS = {
    "pre_activation": lambda: [batch_norm(name="a_bn"), activation("relu", name="a"), conv(4, 3, name="a_conv")],
    "between": lambda: [conv(4, 3, name="a_conv"), max_pool(2, name="a_pool"), batch_norm(name="a_bn")],
    "activation": lambda: [conv(4, 3, name="a_conv", activation="relu"), batch_norm(name="a_bn")],
    "rows": lambda: [conv(4, 3, name="a_conv"), layers.BatchNormalization(axis=1, name="a_bn")],
    "renorm": lambda: [conv(4, 3, name="a_conv"), layers.BatchNormalization(renorm=True, name="a_bn")],
}


@pytest.mark.parametrize("build", FOLDS.values(), ids=FOLDS)
def test_fusing_keeps_the_outputs_at_inference(build):
    model, images = chain(*build()), noise(4, 6, 6, 3, seed=7)
    before, expected = values(model), predict(model, images)
    folded = norm.fuse_conv_bn(model)
    assert norm.batch_norms(folded) == [] and norm.batch_norms(model) != []
    found = predict(folded, images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert [layer.name for layer in folded.layers] == [
        layer.name for layer in model.layers if not layer.name.endswith("bn")
    ]
    after = values(model)  # the model itself is left alone
    assert all(np.array_equal(after[path], before[path]) for path in before) and after.keys() == before.keys()


def test_a_fused_kernel_equals_its_closed_form():
    model = chain(conv(4, 3, name="a_conv", use_bias=True), batch_norm(name="a_bn"))
    kernel, bias = (value(v).astype(np.float64) for v in model.get_layer("a_conv").weights)
    gamma, beta, mean, variance = (value(v).astype(np.float64) for v in model.get_layer("a_bn").weights)
    scale = gamma / np.sqrt(variance + 1e-5)
    found = norm.fuse_conv_bn(model).get_layer("a_conv").get_weights()
    np.testing.assert_allclose(found[0], kernel * scale, rtol=1e-6)
    np.testing.assert_allclose(found[1], (bias - mean) * scale + beta, rtol=1e-5, atol=1e-7)


def branched():
    """Another layer reads the convolution's output, too."""
    inputs = keras.Input((6, 6, 3))
    x = conv(4, 3, name="a_conv")(inputs)
    return fill(keras.Model(inputs, layers.Add(name="add")([x, batch_norm(name="a_bn")(x)])))


def tapped():
    inputs = keras.Input((6, 6, 3))
    x = conv(4, 3, name="a_conv")(inputs)
    return fill(keras.Model(inputs, [batch_norm(name="a_bn")(x), x]))


def shared():
    inputs = keras.Input((6, 6, 3))
    layer = conv(4, 3, name="a_conv")
    return fill(keras.Model(inputs, layers.Add(name="add")([batch_norm(name="a_bn")(layer(inputs)), layer(inputs)])))


@pytest.mark.parametrize(
    "build",
    [*(lambda make=make: chain(*make()) for make in KEEPS.values()), branched, tapped, shared],
    ids=[*KEEPS, "branched", "tapped", "shared"],
)
def test_other_batch_norms_stay(build):
    model, images = build(), noise(4, 6, 6, 3, seed=7)
    folded = norm.fuse_conv_bn(model)
    assert [layer.name for layer in norm.batch_norms(folded)] == ["a_bn"]
    np.testing.assert_array_equal(predict(folded, images), predict(model, images))


def test_nested_batch_norms_stay():
    inner = chain(conv(4, 3, name="inner_conv"), batch_norm(name="inner_bn"))
    model = chain(inner, conv(4, 3, name="a_conv"), batch_norm(name="a_bn"))
    folded, images = norm.fuse_conv_bn(model), noise(4, 6, 6, 3, seed=7)
    assert [layer.name for layer in norm.batch_norms(folded)] == ["inner_bn"]
    expected = predict(model, images)
    assert np.abs(predict(folded, images) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_fusing_requires_a_functional_model():
    class Own(keras.Model):
        pass

    with pytest.raises(ValueError, match="fuse_conv_bn needs a functional model, and own is a Own"):
        norm.fuse_conv_bn(Own(name="own"))


# Recalibrated


def test_update_bn_pools_the_moments_of_all_images():
    """The first batch norm against all images as one batch, the second against the first's outputs by batch."""
    model = chain(
        conv(4, 3, name="a_conv"),
        batch_norm(name="a_bn", scale=False),
        layers.Dropout(0.5, seed=0, name="dropout"),
        conv(5, 3, name="b_conv"),
        batch_norm(name="b_bn"),
    )
    batches = [3 * noise(4, 6, 6, 3, seed=i) + i for i in range(3)]
    runner = engine.create(norm.batch_statistics_model(model))
    before = values(model)
    norm.update_bn(model, [runner.predict(images) for images in batches])

    first = [predict(keras.Model(model.input, model.get_layer("a_conv").output), x).astype(np.float64) for x in batches]
    whole = np.concatenate(first)
    a = model.get_layer("a_bn")
    np.testing.assert_allclose(value(a.moving_mean), whole.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value(a.moving_variance), whole.var(axis=(0, 1, 2)), rtol=1e-4)
    inputs = keras.Input((6, 6, 4))
    rest = keras.Model(inputs, model.get_layer("b_conv")(inputs))
    second = []
    for x in first:
        x = (x - x.mean(axis=(0, 1, 2))) / np.sqrt(x.var(axis=(0, 1, 2)) + 1e-5) + value(a.beta)
        second.append(predict(rest, x.astype(np.float32)).astype(np.float64))
    whole, b = np.concatenate(second), model.get_layer("b_bn")
    np.testing.assert_allclose(value(b.moving_mean), whole.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value(b.moving_variance), whole.var(axis=(0, 1, 2)), rtol=1e-4)
    for path, array in values(model).items():
        assert ("moving" in path) != np.array_equal(array, before[path]), path


def test_update_bn_with_branches():
    """Each batch norm gets its own statistics, whatever the order of the graph."""
    inputs = keras.Input((6, 6, 3))
    x = batch_norm(name="stem_bn")(conv(3, 3, name="stem_conv")(inputs))
    branches = []
    for side in ("a", "b"):
        y = batch_norm(name=f"{side}_1_bn")(conv(4, 3, name=f"{side}_1_conv")(x))
        branches.append(batch_norm(name=f"{side}_2_bn")(conv(4, 3, name=f"{side}_2_conv")(y)))
    short = batch_norm(name="short_bn")(conv(4, 1, name="short_conv")(x))
    model = fill(keras.Model(inputs, layers.Add(name="add")([short, *branches])))
    images = 2 * noise(4, 6, 6, 3) + 1
    norm.update_bn(model, [engine.create(norm.batch_statistics_model(model)).predict(images)])
    # Of one batch: at inference each batch norm now sees what it normalizes to mean 0 and deviation 1.
    for layer in norm.batch_norms(model):
        seen = predict(keras.Model(model.input, layer.input), images)
        np.testing.assert_allclose(value(layer.moving_mean), seen.mean(axis=(0, 1, 2)), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(value(layer.moving_variance), seen.var(axis=(0, 1, 2)), rtol=1e-3)


def test_update_bn_skips_frozen_batch_norms():
    model = chain(conv(4, 3, name="a_conv"), batch_norm(name="a_bn"), batch_norm(name="b_bn"))
    model.get_layer("a_bn").trainable = False
    before, images = values(model), noise(4, 6, 6, 3)
    norm.update_bn(model, [engine.create(norm.batch_statistics_model(model)).predict(images)])
    # What the second sees is what the first makes with its running statistics.
    seen = predict(keras.Model(model.input, model.get_layer("a_bn").output), images)
    after = values(model)
    np.testing.assert_allclose(after["b_bn/moving_mean"], seen.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(after[path], before[path]) for path in after if not path.startswith("b_bn/moving"))


def test_a_network_without_batch_norm_has_no_statistics_model():
    assert norm.batch_statistics_model(chain(conv(4, 3, name="a_conv"))) is None
    model = small()
    norm.freeze_batch_norm(model)
    assert norm.batch_statistics_model(model) is None


def test_the_statistics_model_does_not_change_the_model():
    model, images = small(), noise(4, 6, 6, 3)
    expected = predict(model, images)
    engine.create(norm.batch_statistics_model(model)).predict(images)
    np.testing.assert_array_equal(predict(model, images), expected)
    assert [layer.name for layer in norm.batch_norms(norm.fuse_conv_bn(model))] == []


# Synchronized


def test_synchronized_batch_norm_of_one_replica_is_batch_norm():
    """The steps equal those of the plain network, with a mean that is large relative to the deviation."""
    plain, images = small(), noise(6, 6, 6, 3, seed=7) + 5
    synchronized = norm.sync_batch_norm(plain, lambda x: x)
    assert [type(layer) for layer in norm.batch_norms(synchronized)] == [norm.SynchronizedBatchNorm]
    for model in (plain, synchronized):
        train(model, images)
    for path, array in values(plain).items():
        np.testing.assert_allclose(values(synchronized)[path], array, rtol=1e-3, atol=1e-5, err_msg=path)
    assert "average" not in norm.batch_norms(synchronized)[0].get_config()


def test_two_replicas_equal_one_large_batch(tmp_path):
    """Moments, output and gradients of two replicas with half of the images each equal those of all images in NumPy."""
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "tests.replicas", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    x, t = noise(8, 2, 2, 3) * 2 + 5, noise(8, 2, 2, 3, seed=1)
    gamma, beta = np.array([1.0, 2, 3]), np.array([0.5, 0, -0.5])
    axes = (0, 1, 2)
    mean, variance = x.astype(np.float64).mean(axis=axes), x.astype(np.float64).var(axis=axes)
    normal = (x - mean) / np.sqrt(variance + 1e-5)
    # Of the loss sum(t * y): Ioffe and Szegedy 2015, section 3.
    centered = t - t.mean(axis=axes) - normal * (t * normal).mean(axis=axes)
    expected = {
        "output": gamma * normal + beta,
        "moving_mean": 0.1 * mean,
        "moving_variance": 0.9 + 0.1 * variance,
        "to_x": gamma / np.sqrt(variance + 1e-5) * centered,
        "to_gamma": (t * normal).sum(axis=axes),
        "to_beta": t.sum(axis=axes),
    }
    with np.load(tmp_path / "replicas.npz") as found:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)
        # Half of the images have other moments: each replica by itself would be wrong.
        assert np.abs(x[:4].mean(axis=axes) - mean).max() > 0.1
