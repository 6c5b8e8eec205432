"""AlexNet and the Inceptions in plain NumPy: the variants that torchvision lacks, and the auxiliary heads.

The logits of torchvision's model_kwargs stand in `tests.golden`."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine, zoo
from kvision.convert import torchvision
from kvision.layers import AdaptiveAveragePooling2D, LocalResponseNorm, skip_init
from tests import zoo_logits
from tests.arrays import noise, values


def windows(x, size, strides, pads, fill=0.0):
    """Return windows (n, h, w, c, *size) of (n, h, w, c), float64; `pads` is ((above, below), (left, right))."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))[:, ::strides, ::strides]


def symmetrical(shape, size, strides):
    return tuple((side // 2, side // 2) for side in size)


def tensorflows(shape, size, strides):
    """Return the pads for ceil(side / strides) windows, an odd pixel below and right."""
    needs = [
        max(0, (-(-side // strides) - 1) * strides + window - side) for side, window in zip(shape, size, strict=True)
    ]
    return tuple((need // 2, need - need // 2) for need in needs)


def none(shape, size, strides):
    return (0, 0), (0, 0)


def over_the_end(shape, size, strides):
    """Return the pads for the last window that starts on the map."""
    return tuple(
        (0, max(0, -(-(side - window) // strides) * strides + window - side))
        for side, window in zip(shape, size, strict=True)
    )


def max_pool(x, size, strides, padding):
    pads = padding(x.shape[1:3], (size, size), strides)
    return windows(x, (size, size), strides, pads, -np.inf).max(axis=(-1, -2))


def avg_pool(x, size, strides, padding, counted=True):
    pads = padding(x.shape[1:3], (size, size), strides)
    return np.nanmean(windows(x, (size, size), strides, pads, 0.0 if counted else np.nan), axis=(-1, -2))


def adaptive_pool(x, cells):
    """As in PyTorch: cell i of n from floor(i h / n) to ceil((i + 1) h / n)."""
    rows, columns = (
        [slice(math.floor(i * side / n), math.ceil((i + 1) * side / n)) for i in range(n)]
        for n, side in zip(cells, x.shape[1:3], strict=True)
    )
    return np.stack([np.stack([x[:, r, c].mean(axis=(1, 2)) for c in columns], axis=1) for r in rows], axis=1)


def local_response_norm(x, size, k, alpha, beta):
    y = np.empty_like(x)
    for i in range(x.shape[-1]):
        near = x[..., max(0, i - size // 2) : i + size // 2 + 1]
        y[..., i] = x[..., i] / (k + alpha * (near**2).sum(axis=-1)) ** beta
    return y


class Network:
    """The layers of a model by name, with its weights, in NumPy."""

    def __init__(self, model, epsilon=1e-3, padding=symmetrical):
        self.values = {path: array.astype(np.float64) for path, array in values(model).items()}
        self.epsilon, self.padding = epsilon, padding

    def dense(self, x, name):
        return x @ self.values[f"{name}/kernel"] + self.values[f"{name}/bias"]

    def unit(self, x, name, strides=1, padding=None, groups=1):
        """Convolution, batch norm if it exists, ReLU."""
        kernel = self.values[f"{name}_conv/kernel"]
        seen = windows(x, kernel.shape[:2], strides, (padding or self.padding)(x.shape[1:3], kernel.shape[:2], strides))
        towers = zip(np.split(seen, groups, axis=3), np.split(kernel, groups, axis=3), strict=True)
        x = np.concatenate([np.einsum("nhwcij,ijco->nhwo", *tower, optimize=True) for tower in towers], axis=-1)
        x = x + self.values.get(f"{name}_conv/bias", 0)
        if f"{name}_bn/beta" in self.values:
            gamma, beta, mean, variance = (
                self.values.get(f"{name}_bn/{leaf}", 1) for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            x = (x - mean) / np.sqrt(variance + self.epsilon) * gamma + beta
        return np.maximum(x, 0)

    def chain(self, x, name, strides=1):
        """All convolutions `name`_1, `name`_2 ...; the last has the strides."""
        count = sum(f"{name}_{i}_conv/kernel" in self.values for i in range(1, 9))
        for i in range(1, count + 1):
            x = self.unit(x, f"{name}_{i}", strides if i == count else 1)
        return x


def alexnet_2012(model, x):
    """Section 3.5: 96, 256, 384, 384 and 256 kernels; the second, fourth and fifth see one half of the maps each."""
    network = Network(model)
    for stage, convolutions in ((1, 1), (2, 1), (3, 3)):
        for j in range(1, convolutions + 1):
            strides, padding = (4, none) if stage == 1 else (1, symmetrical)
            x = network.unit(x, f"stage{stage}_{j}", strides, padding, groups=2 if stage == 2 or j > 1 else 1)
        if stage < 3:
            x = local_response_norm(x, 5, 2.0, 1e-4, 0.75)
        x = max_pool(x, 3, 2, none)
    x = adaptive_pool(x, (6, 6)).reshape(len(x), -1)
    for i in (1, 2):
        x = np.maximum(network.dense(x, f"head_{i}_dense"), 0)
    return [network.dense(x, "logits")]


def inception_v1(model, x, padding=symmetrical, shrinking=over_the_end, slim=False):
    network = Network(model, padding=padding)
    normalize = lambda x: x if slim else local_response_norm(x, 5, 1.0, 1e-4 / 5, 0.75)  # noqa: E731
    x = network.unit(x, "stage1", 2)
    x = network.unit(normalize(max_pool(x, 3, 2, shrinking)), "stage2_1")
    x, heads = normalize(network.unit(x, "stage2_2")), []
    for stage, letters in ((3, "ab"), (4, "abcde"), (5, "ab")):
        x = max_pool(x, 2 if slim and stage == 5 else 3, 2, shrinking)
        for letter in letters:
            name = f"stage{stage}_{letter}"
            branches = [network.chain(x, f"{name}_branch{i}") for i in (1, 2, 3)]
            branches.append(network.chain(max_pool(x, 3, 1, symmetrical), f"{name}_branch4"))
            x = np.concatenate(branches, axis=-1)
            if name in ("stage4_a", "stage4_d"):
                heads.append(googlenet_head(network, avg_pool(x, 5, 3, none), f"aux{len(heads) + 1}"))
    return [network.dense(x.mean(axis=(1, 2)), "logits"), *heads]


def inception_v1_tf_slim(model, x):
    return inception_v1(model, x, tensorflows, tensorflows, slim=True)


def googlenet_head(network, pooled, name):
    x = network.unit(pooled, name).reshape(len(pooled), -1)
    return network.dense(np.maximum(network.dense(x, f"{name}_dense"), 0), f"{name}_logits")


def inception_v2(model, x, slim=False):
    """Figure 5. On even sides Caffe's poolings reach over the end; on odd ones they are centered like convolutions."""
    network = Network(model, 1e-3 if slim else 1e-5, tensorflows if slim else symmetrical)
    shrinking = tensorflows if slim else over_the_end
    beside = tensorflows if slim else lambda shape, *_: tuple((side % 2, 1) for side in shape)
    if slim:
        kernel = network.values["stage1_depthwise_conv/kernel"]
        seen = windows(x, (7, 7), 2, tensorflows(x.shape[1:3], (7, 7), 2))
        y = np.einsum("nhwcij,ijcm->nhwcm", seen, kernel, optimize=True)
        x = network.unit(y.reshape(*y.shape[:3], -1), "stage1")
    else:
        x = network.unit(x, "stage1", 2)
    x = network.unit(max_pool(x, 3, 2, shrinking), "stage2_1")
    x = max_pool(network.unit(x, "stage2_2"), 3, 2, shrinking)
    for stage, letters in ((3, "abc"), (4, "abcde"), (5, "ab")):
        for letter in letters:
            name = f"stage{stage}_{letter}"
            if name in ("stage3_c", "stage4_e"):
                branches = [network.chain(x, f"{name}_branch{i}", 2) for i in (2, 3)]
                branches.append(max_pool(x, 3, 2, beside))
            else:
                branches = [network.chain(x, f"{name}_branch{i}") for i in (1, 2, 3)]
                pool = (
                    max_pool(x, 3, 1, symmetrical) if name == "stage5_b" else avg_pool(x, 3, 1, symmetrical, not slim)
                )
                branches.append(network.chain(pool, f"{name}_branch4"))
            x = np.concatenate(branches, axis=-1)
    return [network.dense(x.mean(axis=(1, 2)), "logits")]


def inception_v2_tf_slim(model, x):
    return inception_v2(model, x, slim=True)


NARROW, HEADS = {"width": 0.1}, {"width": 0.1, "auxiliary": True}
CASES = [
    (alexnet_2012, (100, 71, 3), {"filters": (4, 8, 6, 6, 8), "hidden": 32}),
    (inception_v1, (98, 79, 3), HEADS),
    (inception_v1_tf_slim, (98, 65, 3), HEADS),
    (inception_v2, (72, 41, 3), NARROW),
    (inception_v2_tf_slim, (72, 41, 3), NARROW),
]


@pytest.mark.parametrize(("reference", "shape", "model_kwargs"), CASES, ids=[case[0].__name__ for case in CASES])
def test_every_output_equals_the_paper_in_numpy(reference, shape, model_kwargs):
    with skip_init():
        model = zoo.build_model(reference.__name__, shape, 5, **model_kwargs)
    zoo_logits.fill(model)
    images = 20 * zoo_logits.images(model)  # so that local response normalization is felt
    expected = reference(model, images.astype(np.float64))
    # One prediction for all heads: an engine gives the first output alone.
    outputs = keras.layers.Concatenate(name="outputs")(model.outputs) if len(model.outputs) > 1 else model.output
    given = np.split(engine.create(keras.Model(model.inputs, outputs)).predict(images), len(model.outputs), axis=1)
    for output, wanted in zip(given, expected, strict=True):
        assert abs(output - wanted).max() <= 1e-5 * abs(wanted).max()
        assert abs(wanted[0] - wanted[1]).max() > 1e-3 * abs(wanted).max()  # or all units would be dead


def test_the_auxiliary_heads_of_googlenet():
    with skip_init():
        model = zoo.build_model("googlenet", (98, 66, 3), 5, **HEADS)
    zoo_logits.fill(model)
    places = [model.get_layer(name).output for name in ("stage4_a", "stage4_d")]
    maps = [noise(2, *place.shape[1:]) for place in places]
    network, heads = Network(model), keras.Model(places, model.outputs[1:])
    for i, (output, x) in enumerate(zip(heads(maps, training=False), maps, strict=True), start=1):
        expected = googlenet_head(network, adaptive_pool(x.astype(np.float64), (4, 4)), f"aux{i}")
        assert abs(ops.convert_to_numpy(output) - expected).max() <= 1e-5 * abs(expected).max()


def inception_v3_module(network, x, name, counted):
    """A module that keeps the map's size: chains, whose last step may have two outputs, and an averaging branch."""
    branches = []
    for i in (1, 2, 3):
        y = network.chain(x, f"{name}_branch{i}")
        sides = [
            path for path in network.values if path.startswith(f"{name}_branch{i}_") and path.endswith("_conv/kernel")
        ]
        sides = [path.removesuffix("_conv/kernel") for path in sides if path.removesuffix("_conv/kernel")[-1] in "ab"]
        branches += [network.unit(y, side) for side in sides] or [y]
    branches.append(network.chain(avg_pool(x, 3, 1, symmetrical, counted), f"{name}_branch4"))
    return np.concatenate(branches, axis=-1)


@pytest.mark.parametrize("name", ["inception_v3", "inception_v3_keras"])
def test_one_module_of_each_figure_and_the_head_of_inception_v3(name):
    """The two variants differ only in averages and batch norms; `tests.golden` covers the rest."""
    with skip_init():
        model = zoo.build_model(name, (107, 170, 3), 5, **HEADS)
    zoo_logits.fill(model)
    modules = {"stage3_b": "stage3_c", "stage4_d": "stage4_e", "stage5_b": "stage5_c"}
    places = [model.get_layer(before).output for before in modules]
    maps = [noise(2, *place.shape[1:]) for place in places]
    outputs = [model.get_layer(f"stage{i}").output for i in (3, 4, 5)]
    given = keras.Model(places, [*outputs, model.outputs[1]])(maps, training=False)
    network = Network(model)
    expected = [
        inception_v3_module(network, x.astype(np.float64), module, name == "inception_v3")
        for x, module in zip(maps, modules.values(), strict=True)
    ]
    head = network.unit(avg_pool(expected[1], 5, 3, none), "aux1_1")  # of maps of 5x9 pixels
    head = network.unit(head, "aux1_2", padding=none).mean(axis=(1, 2))
    for output, wanted in zip(given, [*expected, network.dense(head, "aux1_logits")], strict=True):
        assert abs(ops.convert_to_numpy(output) - wanted).max() <= 1e-5 * abs(wanted).max()


@pytest.mark.parametrize(("channels", "size"), [(7, 5), (3, 7), (1, 1), (6, 3)])
def test_local_response_normalization(channels, size):
    x = 30 * noise(2, 3, 2, channels)
    for options in ({"size": size}, {"size": size, "k": 1.0, "alpha": 0.3, "beta": 0.5}):
        layer = LocalResponseNorm(**options)
        settings = {"k": 2.0, "alpha": 1e-4, "beta": 0.75} | options
        expected = local_response_norm(x.astype(np.float64), **settings)
        np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=2e-6)
        assert {key: layer.get_config()[key] for key in settings} == settings
    assert layer.compute_output_shape(x.shape) == x.shape


def test_local_response_normalization_of_large_halves():
    """The squares of larger numbers overflow float16."""
    x = np.full((1, 1, 1, 5), 30000, np.float16)
    y = LocalResponseNorm(dtype="float16")(ops.convert_to_tensor(x))
    expected = local_response_norm(x.astype(np.float64), 5, 2.0, 1e-4, 0.75)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    np.testing.assert_allclose(ops.convert_to_numpy(y).astype(np.float64), expected, rtol=2e-3)
    with pytest.raises(ValueError, match="odd number of channels, got 4"):
        LocalResponseNorm(4)


@pytest.mark.parametrize(("sides", "cells"), [((14, 13), (4, 4)), ((7, 2), (6, 6)), ((1, 5), (3, 5)), ((4, 6), (1, 2))])
def test_adaptive_pooling(sides, cells):
    x, layer = noise(2, *sides, 3), AdaptiveAveragePooling2D(cells)
    expected = adaptive_pool(x.astype(np.float64), cells)
    assert layer.compute_output_shape(x.shape) == expected.shape
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-5, atol=1e-6)


def test_the_towers_are_connected_only_at_the_third_convolution():
    """The second, fourth and fifth convolutions of a tower read only its half of the maps."""
    with skip_init():
        model = zoo.build_model("alexnet_2012", (67, 67, 3), 0, filters=(4, 6, 8, 8, 6))
    zoo_logits.fill(model)
    for name, whole in (
        ("stage2_1_conv", False),
        ("stage3_1_conv", True),
        ("stage3_2_conv", False),
        ("stage3_3_conv", False),
    ):
        layer = model.get_layer(name)
        x = noise(1, 5, 5, layer.input.shape[-1])
        changed = x + (np.arange(x.shape[-1]) >= x.shape[-1] // 2)
        before, after = (ops.convert_to_numpy(layer(array.astype(np.float32))) for array in (x, changed))
        half = before.shape[-1] // 2
        assert (abs(after - before)[..., :half].max() > 1e-3) == whole
        assert abs(after - before)[..., half:].max() > 1e-3


@pytest.mark.parametrize(
    ("name", "shape", "model_kwargs", "message"),
    [
        ("alexnet", (63, 62, 3), {}, "alexnet needs images of at least 63x63 pixels, got 63x62"),
        ("alexnet_2012", (66, 67, 3), {}, "alexnet_2012 needs images of at least 67x67 pixels, got 66x67"),
        ("alexnet", None, {"towers": 3}, "alexnet has 1 or 2 towers, got 3"),
        ("googlenet", (14, 15, 3), {}, "googlenet needs images of at least 15x15 pixels, got 14x15"),
        ("inception_v1", (31, 30, 3), {}, "inception_v1 needs images of at least 31x31 pixels, got 31x30"),
        ("inception_v1", (78, 79, 3), {"auxiliary": True}, "inception_v1 with auxiliary heads .* 79x79 .*, got 78x79"),
        (
            "inception_v1_tf_slim",
            (64, 65, 3),
            {"auxiliary": True},
            "with auxiliary heads needs .* 65x65 pixels, got 64x65",
        ),
        ("inception_v2", (7, 6, 3), {}, "inception_v2 needs images of at least 7x7 pixels, got 7x6"),
        ("inception_v3", (75, 74, 3), {}, "inception_v3 needs images of at least 75x75 pixels, got 75x74"),
        ("inception_v3", (107, 106, 3), {"auxiliary": True}, "with its auxiliary head .* 107x107 .*, got 107x106"),
        ("inception_v1", None, {"source": "keras"}, "source must be one of paper, torchvision, tf_slim, got 'keras'"),
        ("inception_v2", None, {"source": "paper"}, "source must be one of caffe, tf_slim, got 'paper'"),
        ("inception_v3", None, {"source": "paper"}, "source must be one of torchvision, keras, got 'paper'"),
    ],
)
def test_invalid_arguments_raise(name, shape, model_kwargs, message):
    with skip_init(), pytest.raises(ValueError, match=message):
        zoo.build_model(name, shape, **model_kwargs)


@pytest.mark.parametrize(
    ("name", "side", "model_kwargs"),
    [
        ("googlenet", 15, {}),
        ("googlenet", 15, {"auxiliary": True}),
        ("inception_v1", 31, {}),
        ("inception_v1", 79, {"auxiliary": True}),
        ("inception_v1_tf_slim", 1, {}),
        ("inception_v1_tf_slim", 65, {"auxiliary": True}),
        ("inception_v2", 7, {}),
        ("inception_v2_tf_slim", 1, {}),
        ("inception_v3", 75, {}),
        ("inception_v3_keras", 107, {"auxiliary": True}),
    ],
)
def test_the_smallest_images(name, side, model_kwargs):
    with skip_init():
        model = zoo.build_model(name, (side, side, 1), 4, width=0.05, **model_kwargs)
    shape = (None, 4)
    assert model.output_shape == ([shape] * (2 if "v3" in name else 3) if model_kwargs else shape)
    assert min(model.get_layer("stage5").output.shape[1:3]) >= 1


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("googlenet", 13_004_888),  # torchvision's documentation
        ("inception_v1", 6_998_552 + sum((c + 1) * 128 + 2049 * 1024 + 1025 * 1000 for c in (512, 528))),
        ("inception_v3", 27_161_264),  # torchvision's documentation
        ("inception_v3_keras", 27_161_264 - 17_216 - 128 - 768),  # no scales in the batch norms
    ],
)
def test_parameters_with_auxiliary_heads(name, published):
    with skip_init():
        model = zoo.build_model(name, auxiliary=True)
    assert sum(math.prod(variable.shape) for variable in model.trainable_variables) == published


@pytest.mark.parametrize(("name", "size", "resized"), [("googlenet", 224, 256), ("inception_v3", 299, 342)])
def test_transform_input_is_preprocessing(name, size, resized):
    """torchvision standardizes by ImageNet's statistics; its network replaces that by a mean and deviation of 1/2."""
    prepare = torchvision.preprocessing(name)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    transformed = (images / 255 - mean) / std * (std / 0.5) + (mean - 0.5) / 0.5
    np.testing.assert_allclose(prepare(images), transformed, atol=1e-6)
    assert prepare.size == (size, size) and round(size / prepare.crop) == resized
