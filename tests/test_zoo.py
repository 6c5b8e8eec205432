"""One test per promise, over the whole zoo."""

import gc
import importlib
import json
import re
from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops

import kvision
from kvision import engine, weights, zoo
from kvision.layers import skip_init
from kvision.tasks.classification import Classification
from kvision.weights.initialization import initialize
from tests import zoo_logits
from tests.arrays import take_step, values
from tests.zoo_logits import classes_of, small_form


def count_conv(size, inputs, outputs, bias=True):
    return size * size * inputs * outputs + bias * outputs


def count_normed(*convs):
    """Convolutions (size, inputs, outputs) without bias, each with a batch norm behind it."""
    return sum(count_conv(*conv, bias=False) + 2 * conv[-1] for conv in convs)


def count_dense(*widths):
    return sum((i + 1) * o for i, o in pairwise(widths))


def count_airbench(*widths):
    total, inputs = count_conv(2, 3, 24, bias=False), 24
    for width in widths:  # two convolutions, two batch norms with an offset each
        total += count_conv(3, inputs, width, False) + count_conv(3, width, width, False) + 2 * width
        inputs = width
    return total + 10 * inputs


CIFAR_CNN = sum(count_conv(3, i, o) for i, o in ((3, 32), (32, 32), (32, 64), (64, 64)))
STN_CNN = count_conv(9, 1, 64) + count_conv(7, 64, 128) + count_dense(512, 10)
STN_LOCALISATION = count_conv(5, 1, 20) + count_conv(5, 20, 20) + count_dense(20, 20)
CONV_AUTOENCODER = (
    count_normed((3, 1, 32), (3, 32, 64))
    + count_dense(3136, 32, 3136)
    + count_normed((2, 64, 32), (3, 32, 32))
    + count_conv(2, 32, 1)
)
UNET_DENOISER = (
    count_normed((5, 1, 32), *[(3, 32, 32)] * 2, (3, 32, 64), (3, 64, 64), (3, 64, 32), (3, 32, 32))
    + count_conv(2, 64, 32, bias=False)
    + count_conv(2, 32, 1)
)

# Trainable parameters at the size a network was published for: closed forms for the small ones, torchvision's
# documentation for those of ImageNet, the papers' or their authors' for the others.
COUNTS = {
    "softmax": 7_850,
    "mlp": count_dense(784, 512, 512, 10),
    "mnist_cnn": count_conv(3, 1, 32) + count_conv(3, 32, 64) + count_dense(64 * 12 * 12, 128, 10),
    "cifar_cnn": CIFAR_CNN + count_dense(64 * 6 * 6, 512, 10),
    "airbench94": count_airbench(64, 256, 256),
    "airbench_small": count_airbench(32, 64, 128),
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "wide_resnet": 10_961_370,
    "wide_resnet_16_4": 2_748_890,
    "densenet_40_12": 1_019_722,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_250_24": 15_324_406,
    "densenet_bc_190_40": 25_624_430,
    "alexnet": 61_100_840,
    "alexnet_2012": 60_965_224,
    "inception_v1": 6_998_552,  # Caffe's bvlc_googlenet without its auxiliary heads
    "googlenet": 6_624_904,
    "inception_v1_tf_slim": 6_624_904 - 7_280,  # no scales in the batch norms
    "inception_v2": 11_295_240 - 10_016,  # the Caffe weights, without the biases before batch norms
    "inception_v2_tf_slim": 11_178_336,  # counted in TF-Slim
    "inception_v3": 23_834_568,
    "inception_v3_keras": 23_817_352,  # counted in Keras
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    **{f"resnet50{source}": 25_557_032 for source in ("", "_keras", "_tf_slim")},
    **{f"resnet101{source}": 44_549_160 for source in ("", "_keras", "_tf_slim")},
    **{f"resnet152{source}": 60_192_808 for source in ("", "_keras", "_tf_slim")},
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
    **{f"densenet121{source}": 7_978_856 for source in ("", "_keras")},
    **{f"densenet169{source}": 14_149_480 for source in ("", "_keras")},
    **{f"densenet201{source}": 20_013_928 for source in ("", "_keras")},
    "mobilenet_v2": 3_504_872,
    "mobilenet_v2_keras": 3_504_872,
    "mnasnet0_5": 2_218_512,
    "mnasnet0_75": 3_170_208,
    "mnasnet1_0": 4_383_312,
    "mnasnet1_3": 6_282_256,
    "stn_cnn": STN_CNN,
    "stn_affine": STN_CNN + STN_LOCALISATION + count_dense(20, 6),
    "stn_thin_plate": STN_CNN + STN_LOCALISATION + count_dense(20, 32),
    "autoencoder": count_dense(784, 32, 784),
    "deep_autoencoder": count_dense(784, 1000, 500, 250, 2, 250, 500, 1000, 784),
    "conv_autoencoder": CONV_AUTOENCODER,
    "unet_denoiser": UNET_DENOISER,
}
NAMES = zoo.list_models()

# Depths that hold every kind of block, by the argument that makes a row deep. Rows that are then the same network are
# trained once.
SHORT = {
    "wide_resnet": {"depth": 10},
    r"densenet_bc_\d+_\d+": {"depth": 16},
    r"densenet_\d+_\d+": {"depth": 10},
    r"resnet(20|32|44|56|110)": {"depth": 8},
    r"vgg\d+(_bn)?": {"convolutions": (1, 1, 1, 1, 2)},
    r"resnet\d+_tf_slim": {"blocks": (2, 2, 2, 1)},
    r"resnet\d+(_keras)?": {"blocks": (2, 1, 1, 1)},
    r"densenet\d+(_keras)?": {"layers": (1, 2, 1, 1)},
}

# Networks with auxiliary heads, and images large enough for these.
AUXILIARY = {"inception_v1": (79, 80, 3), "googlenet": (33, 35, 3), "inception_v1_tf_slim": (65, 66, 3)}
AUXILIARY |= dict.fromkeys(("inception_v3", "inception_v3_keras"), (107, 109, 3))


def short_form(name):
    """Return (shape, arguments) of a variant at its smallest depth, and narrow."""
    shape, model_kwargs = small_form(name)[:2]
    for pattern, depth in SHORT.items():
        if re.fullmatch(pattern, name):
            return shape, model_kwargs | depth
    return shape, model_kwargs


def distinct_networks():
    """Return the classifiers that differ in more than depth and width."""
    seen = {}
    for name in filter(classes_of, NAMES):
        row, (shape, model_kwargs) = zoo._variants()[name], short_form(name)
        seen.setdefault(repr((row.func, shape, sorted((zoo.arguments(name) | model_kwargs).items()))), name)
    return list(seen.values())


DISTINCT = distinct_networks()


def build(name, shape, classes, **model_kwargs):
    with skip_init():
        return zoo.build_model(name, shape, classes, **model_kwargs)


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    """A network in its small form; pytest runs all of its tests before the next is built."""
    shape, model_kwargs, *_ = small_form(request.param)
    return build(request.param, shape, classes_of(request.param), **model_kwargs)


def images_for(model, n=4):
    return np.random.default_rng(1).normal(size=(n, *model.input_shape[1:])).astype(np.float32)


def test_the_tables_above_are_complete():
    assert set(COUNTS) == set(NAMES) == set(kvision.list_models())
    papers = {zoo._variants()[name].func.__module__.split(".")[-1] for name in DISTINCT}
    assert papers == set(zoo.PAPERS) - {"autoencoder", "unet"}
    assert {"resnet18", "resnet50", "resnet50_keras", "resnet50_tf_slim"} <= set(
        DISTINCT
    ) and "resnet101" not in DISTINCT


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name):
    model = build(name, None, None)
    counted = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    del model
    gc.collect()  # models are full of cycles; the next one may be half a gigabyte too
    assert counted == COUNTS[name]


def test_shapes(network):
    shape, _, features, _ = small_form(network.name)
    outputs = (10,) if classes_of(network.name) else shape
    assert (network.input_shape, network.output_shape) == ((None, *shape), (None, *outputs))
    names = [layer.name for layer in network.layers]
    assert len(set(names)) == len(names)
    if "pool" in names:
        assert network.get_layer("pool").output.shape == (None, features)


def test_stages(network):
    stages = small_form(network.name)[3]
    names = [layer.name for layer in network.layers]
    assert [tap for tap in names if re.fullmatch(r"stage\d+", tap)] == [f"stage{i + 1}" for i in range(stages)]
    features = [network.get_layer(f"stage{i + 1}").output.shape for i in range(stages)]
    if network.name not in ("mlp", "deep_autoencoder"):
        sizes = [shape[1] for shape in features]
        assert all(len(shape) == 4 for shape in features)
        assert sizes == sorted(set(sizes), reverse=True)


def test_names_are_the_file_format(network):
    for layer in network.layers:
        for variable in layer.weights:
            assert variable.path == f"{layer.name}/{variable.name}"
            assert re.fullmatch(r"[a-z][a-z0-9_]*/[a-z_]+", variable.path)
    paths = [variable.path for variable in network.weights]
    assert len(set(paths)) == len(paths)


def test_logits_and_files(network, tmp_path, monkeypatch):
    """The same logits on every backend, from weights loaded from a file."""
    zoo_logits.fill(network)
    written = {key: array.tobytes() for key, array in values(network).items()}
    # The probe has tests of its model_kwargs, and takes JAX seconds a network.
    monkeypatch.setattr(weights.npz, "_probe", lambda *arguments: None)
    weights.save(network, tmp_path / "weights.npz")
    for variable in network.weights:
        variable.assign(np.full(variable.shape, 7, np.float32))
    weights.load(network, tmp_path / "weights.npz")
    assert {key: array.tobytes() for key, array in values(network).items()} == written
    expected = np.asarray(json.loads(zoo_logits.FILE.read_text())[network.name], np.float32)
    images = zoo_logits.images(network)
    if keras.backend.backend() == "jax":  # compiled as a whole, a network takes a third of the time
        logits = engine.create(network).predict(images)
    else:
        logits = ops.convert_to_numpy(network(images, training=False))
    assert abs(logits - expected).max() <= 1e-4 * abs(expected).max()
    assert abs(expected[0] - expected[1]).max() > 1e-3 * abs(expected).max()  # else they would hardly show the network


# Of the Inceptions the modules that differ in kind: for each stage, the first so many.
MODULES = {"inception_v1": {3: 1, 4: 4, 5: 1}, "inception_v3": {3: 1, 4: 2, 5: 2}}


def build_short(name, shape, classes, **model_kwargs):
    """A network in its short form."""
    paper = zoo._row(name).func.__module__
    with pytest.MonkeyPatch.context() as patch:
        if counts := MODULES.get(paper.rsplit(".", 1)[-1]):
            modules = importlib.import_module(paper).MODULES
            patch.setattr(f"{paper}.MODULES", {stage: modules[stage][:count] for stage, count in counts.items()})
        return build(name, shape, classes, **short_form(name)[1], **model_kwargs)


@pytest.fixture(scope="module", params=DISTINCT)
def runner(request):
    """The engine of a network in the short form, made once, because compiling takes time."""
    auxiliary = {"auxiliary": True} if request.param in AUXILIARY else {}
    shape = AUXILIARY.get(request.param, short_form(request.param)[0])
    model = build_short(request.param, shape, 10, **auxiliary)
    initialize(model, 0)
    optimizer = keras.optimizers.SGD(1.0, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return engine.create(model, Classification(), optimizer)


def test_without_a_head(runner):
    model, name = runner.model, runner.model.name
    shape = model.input_shape[1:]
    headless = build_short(name, shape, 0)
    assert (headless.name, headless.input_shape, len(headless.output_shape)) == (name, (None, *shape), 2)
    # A second network of the process has the first's names: Keras numbers none.
    rest, layers = [variable.path for variable in headless.weights], [layer.name for layer in headless.layers]
    assert rest == [variable.path for variable in model.weights if variable.path in rest]
    assert set(layers) <= {layer.name for layer in model.layers} | {"pool"}
    pooled = [layer.output.shape[-1] for layer in model.layers if layer.name == "pool"]
    assert [headless.output_shape[-1]] == (pooled or [small_form(name)[2]])


def test_the_logits_of_an_image_depend_on_it_alone(runner):
    images = images_for(runner.model)
    others = images[::-1].copy()
    others[2] = images[2]
    logits = runner.predict(images)
    assert (logits.shape, logits.dtype) == ((4, 10), np.float32)
    scale = abs(logits).max()
    np.testing.assert_allclose(runner.predict(others)[2], logits[2], atol=1e-5 * scale)
    assert abs(logits[1] - logits[2]).max() > 1e-3 * scale


def test_every_weight_has_a_gradient(runner):
    loss, _ = take_step(runner, images_for(runner.model), np.arange(4, dtype=np.int32))
    runner.sync_variables()
    assert np.isfinite(float(loss))
    # After one step from rest the momenta are the gradients, at learning rate 1.
    gradients = [ops.convert_to_numpy(variable) for variable in runner.program.optimizers[0].variables[2:]]
    variables = {variable.path: variable for variable in runner.model.trainable_variables}
    assert len(gradients) == len(variables)
    for path, gradient in zip(variables, gradients, strict=True):
        assert np.isfinite(gradient).all(), path
        # A batch norm takes away what was added before it, by a convolution's bias or, through a linear bottleneck and
        # the next convolution, by another batch norm: there the gradient is 0 but for rounding.
        biased = path.endswith("conv/bias") and path.replace("conv/bias", "bn/beta") in variables
        if not biased and not path.endswith("project_bn/beta"):
            assert abs(gradient).max() > 1e-8, path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21'; did you mean resnet"),
        ("zzz", {}, r"unknown model 'zzz'\. The zoo has: softmax, mlp, "),
        ("softmax", {"width": 3}, "softmax has no argument width; it has hidden, dropout_rate"),
        (
            "airbench94",
            {"with": 3, "depth": 1},
            "airbench94 has no argument depth, with; it has widths, whiten_bias",
        ),
        ("softmax", {"input_shape": (32, 32)}, r"three positive integers \(height, width, channels\), got \(32, 32\)"),
        ("softmax", {"input_shape": (32, None, 3)}, "three positive integers"),
        ("softmax", {"input_shape": (32, 0, 3)}, "three positive integers"),
        ("softmax", {"classes": -1}, "classes must be 0 or a positive integer, got -1"),
        ("softmax", {"classes": 2.0}, "classes must be 0 or a positive integer, got 2.0"),
        ("vgg11", {"input_shape": (32, 31, 3)}, "VGG needs images of at least 32x32 pixels, got 32x31"),
        ("airbench94", {"input_shape": (8, 9, 3)}, "airbench needs images of at least 9x9 pixels, got 8x9"),
        ("mnist_cnn", {"input_shape": (4, 4, 1)}, None),  # in the words of Keras
        ("resnet20", {"depth": 21}, r"a CIFAR ResNet has depth 6 n \+ 2 .*, got 21"),
        ("wide_resnet", {"depth": 15}, r"a wide ResNet has depth 6 n \+ 4 .*, got 15"),
    ],
)
def test_invalid_arguments_raise(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.build_model(name, **options)


def test_the_smallest_images():
    assert zoo.build_model("airbench_small", (9, 9, 3)).output_shape == (None, 10)
    assert zoo.build_model("vgg11", (32, 32, 1), 10, hidden=4).output_shape == (None, 10)
    assert zoo.build_model("resnet20", (1, 1, 1)).output_shape == (None, 10)


def test_listing_and_arguments():
    assert zoo.list_models("resnet??") == [f"resnet{depth}" for depth in (20, 32, 44, 56, 18, 34, 50)]
    assert zoo.list_models("nothing*") == []
    assert zoo.arguments("mlp") == {"hidden": (512, 512), "dropout_rate": 0.2}
    assert zoo.arguments("wide_resnet")["width"] == 8
    with pytest.raises(zoo.UnknownModelError):
        zoo.arguments("nothing")


def test_arguments_may_come_from_json():
    widths = [variable.shape[-1] for variable in zoo.build_model("mlp", (2, 2, 1), 3, hidden=[5, 6]).weights]
    assert widths == [5, 5, 6, 6, 3, 3]


def test_dropout_layers_depend_on_the_rate():
    def dropouts(model):
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert dropouts(zoo.build_model("cifar_cnn", (10, 10, 3), dropout_rate=0.2)) == [0.2, 0.2, 0.4]
    assert dropouts(zoo.build_model("cifar_cnn", (10, 10, 3), dropout_rate=0.0)) == []
    assert dropouts(zoo.build_model("vgg11", (32, 32, 3), hidden=4)) == [0.5, 0.5]
    assert dropouts(zoo.build_model("wide_resnet_16_4", (8, 8, 3), dropout_rate=0.3, width=1)) == [0.3] * 6


def test_the_shortcut_without_parameters():
    """Option A: every second pixel, zeros for new channels, half of them before the old ones."""
    shortcut = build("resnet20", (9, 8, 3), 10).get_layer("stage2_block1_shortcut")
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 16)).astype(np.float32)
    y = ops.convert_to_numpy(shortcut(x))
    assert y.shape == shortcut.compute_output_shape(x.shape) == (2, 3, 2, 32)
    np.testing.assert_array_equal(y[..., 8:24], x[:, ::2, ::2])
    assert not y[..., :8].any() and not y[..., 24:].any()
    config = shortcut.get_config()
    assert (config["filters"], config["strides"]) == (32, 2)
