"""One test a promise, over the whole zoo."""

import gc
import re
from functools import cache
from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops

import kvision
from kvision import engine, zoo
from kvision.layers import Variance
from kvision.tasks.classification import cross_entropy
from kvision.weights.initial import initialize


def count_conv(size, inputs, outputs, bias=True):
    return size * size * inputs * outputs + bias * outputs


def count_dense(*widths):
    return sum((i + 1) * o for i, o in pairwise(widths))


def count_airbench(*widths):
    total, inputs = count_conv(2, 3, 24, bias=False), 24
    for width in widths:  # two convolutions, two batch norms with an offset each
        total += count_conv(3, inputs, width, False) + count_conv(3, width, width, False) + 2 * width
        inputs = width
    return total + 10 * inputs


CIFAR, MNIST, IMAGENET = ((32, 32, 3), 10), ((28, 28, 1), 10), ((224, 224, 3), 1000)
CIFAR_CNN = sum(count_conv(3, i, o) for i, o in ((3, 32), (32, 32), (32, 64), (64, 64)))

# Trainable parameters: closed forms; the ResNets' and the VGGs' as published (torchvision's for the latter).
COUNTS = [
    ("softmax", *MNIST, 7_850),
    ("softmax", *CIFAR, count_dense(3072, 10)),
    ("mlp", *MNIST, count_dense(784, 512, 512, 10)),
    ("mnist_cnn", *MNIST, count_conv(3, 1, 32) + count_conv(3, 32, 64) + count_dense(64 * 12 * 12, 128, 10)),
    ("cifar_cnn", *CIFAR, CIFAR_CNN + count_dense(64 * 6 * 6, 512, 10)),
    ("airbench94", *CIFAR, count_airbench(64, 256, 256)),
    ("airbench_small", *CIFAR, count_airbench(32, 64, 128)),
    ("resnet20", *CIFAR, 269_722),
    ("resnet32", *CIFAR, 464_154),
    ("resnet44", *CIFAR, 658_586),
    ("resnet56", *CIFAR, 853_018),
    ("resnet110", *CIFAR, 1_727_962),
    ("wide_resnet", *CIFAR, 10_961_370),
    ("wide_resnet_16_4", *CIFAR, 2_748_890),
    ("vgg11", *IMAGENET, 132_863_336),
    ("vgg13", *IMAGENET, 133_047_848),
    ("vgg16", *IMAGENET, 138_357_544),
    ("vgg19", *IMAGENET, 143_667_240),
    ("vgg11_bn", *IMAGENET, 132_868_840),
    ("vgg13_bn", *IMAGENET, 133_053_736),
    ("vgg16_bn", *IMAGENET, 138_365_992),
    ("vgg19_bn", *IMAGENET, 143_678_248),
]

# Small forms that hold every branch of the files: image shape, arguments, width of the features.
SMALL = {
    "softmax": ((4, 4, 2), {}, 32),
    "mlp": ((4, 4, 2), {"hidden": (9, 7)}, 7),
    "mnist_cnn": ((8, 9, 1), {"hidden": 7}, 7),
    "cifar_cnn": ((10, 12, 3), {"hidden": 7}, 7),
    "airbench": ((10, 9, 3), {"widths": (6, 8, 10)}, 10),
    "resnet": ((9, 8, 3), {}, 64),
    "wide_resnet": ((9, 8, 3), {"width": 2}, 128),
    "vgg": ((32, 33, 3), {"hidden": 7}, 512),
}
STAGES = {
    "softmax": 0,
    "mlp": 2,
    "mnist_cnn": 1,
    "cifar_cnn": 2,
    "airbench": 3,
    "resnet": 3,
    "wide_resnet": 3,
    "vgg": 5,
}
NAMES = zoo.list_models()
# What tests train, one or two rows of each file. The other rows are longer or wider, and so are these by themselves.
TRAINED = {
    "softmax": {},
    "mlp": {},
    "cifar_cnn": {},
    "airbench_small": {},
    "resnet20": {"depth": 8},
    "wide_resnet_16_4": {"depth": 10},
    "vgg11_bn": {"convolutions": (1, 1, 1, 1, 1)},
}


def family(name):
    return max((prefix for prefix in SMALL if name.startswith(prefix)), key=len)


def build(name, shape, classes, **own):
    """A network whose initial weights are zeros: they cost no drawing, and most of their memory is never touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Variance, "draw", lambda self, shape, generator: np.zeros(shape, np.float32))
        return zoo.create_model(name, shape, classes, **own)


@pytest.fixture(scope="module")
def small():
    """`small(name)`: the small form of a network, built once."""

    @cache
    def built(name, classes=10):
        shape, own, _ = SMALL[family(name)]
        return build(name, shape, classes, **own)

    yield built
    built.cache_clear()


def images_for(model, n=4):
    return np.random.default_rng(1).normal(size=(n, *model.input_shape[1:])).astype(np.float32)


def test_the_tables_above_hold_the_whole_zoo():
    assert {row[0] for row in COUNTS} == set(NAMES) == set(kvision.list_models())
    assert {family(name) for name in NAMES} == set(SMALL) == set(STAGES)
    assert {zoo._variants()[name].func.__module__.split(".")[-1] for name in TRAINED} == set(zoo.PAPERS)


@pytest.mark.parametrize(("name", "shape", "classes", "count"), COUNTS, ids=[f"{row[0]}-{row[1][0]}" for row in COUNTS])
def test_parameter_count(name, shape, classes, count):
    model = build(name, shape, classes)
    counted = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    del model
    gc.collect()  # models are full of cycles; the next one may be half a gigabyte too
    assert counted == count


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, small):
    shape, _, features = SMALL[family(name)]
    model, headless = small(name), small(name, classes=0)
    assert model.name == headless.name == name
    assert model.input_shape == headless.input_shape == (None, *shape)
    assert model.output_shape == (None, 10)
    assert headless.output_shape == (None, features)
    rest = [variable.path for variable in headless.weights]
    assert rest == [variable.path for variable in model.weights][: len(rest)]


@pytest.mark.parametrize("name", NAMES)
def test_taps(name, small):
    model, stages = small(name), STAGES[family(name)]
    names = [layer.name for layer in model.layers]
    assert [tap for tap in names if re.fullmatch(r"stage\d+", tap)] == [f"stage{i + 1}" for i in range(stages)]
    taps = [model.get_layer(f"stage{i + 1}").output.shape for i in range(stages)]
    if family(name) != "mlp":
        sizes = [shape[1] for shape in taps]
        assert all(len(shape) == 4 for shape in taps)
        assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_file_format(name, small):
    """Names are given, never numbered by Keras: a second network of the process has the same."""
    first = small(name)
    shape, own, _ = SMALL[family(name)]
    second = build(name, shape, 10, **own)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    for layer in first.layers:
        for variable in layer.weights:
            assert variable.path == f"{layer.name}/{variable.name}"
            assert re.fullmatch(r"[a-z][a-z0-9_]*/[a-z_]+", variable.path)
    paths = [variable.path for variable in first.weights]
    assert len(set(paths)) == len(paths)


@pytest.fixture(scope="module")
def floors():
    """`floors(name)`: an engine and its network, made once, because compiling takes time."""

    @cache
    def floor(name):
        shape, own, _ = SMALL[family(name)]
        model = zoo.create_model(name, shape, 10, **own | TRAINED[name])
        initialize(model, 0)
        optimizer = keras.optimizers.SGD(1.0, momentum=0.9)
        optimizer.build(model.trainable_variables)
        return engine.create(model, optimizer, cross_entropy())

    yield floor
    floor.cache_clear()


@pytest.mark.parametrize("name", TRAINED)
def test_the_logits_of_an_image_depend_on_it_alone(name, floors):
    floor = floors(name)
    images = images_for(floor.model)
    others = images[::-1].copy()
    others[2] = images[2]
    logits = floor.predict(images)
    assert (logits.shape, logits.dtype) == ((4, 10), np.float32)
    scale = abs(logits).max()
    np.testing.assert_allclose(floor.predict(others)[2], logits[2], atol=1e-5 * scale)
    assert abs(logits[1] - logits[2]).max() > 1e-3 * scale


@pytest.mark.parametrize("name", TRAINED)
def test_every_weight_has_a_gradient(name, floors):
    floor = floors(name)
    loss, _ = floor.train_step(images_for(floor.model), np.arange(4, dtype=np.int32))
    floor.push()
    assert np.isfinite(float(loss))
    # After one step from rest the momenta are the gradients, at learning rate 1.
    gradients = [ops.convert_to_numpy(variable) for variable in floor.optimizer.variables[2:]]
    paths = [variable.path for variable in floor.model.trainable_variables]
    assert len(gradients) == len(paths)
    for path, gradient in zip(paths, gradients, strict=True):
        assert np.isfinite(gradient).all(), path
        # A batch norm takes the bias before it away again: its gradient is 0 but for rounding.
        if not (name.endswith("_bn") and path.endswith("conv/bias")):
            assert abs(gradient).max() > 1e-8, path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21'; did you mean resnet"),
        ("zzz", {}, r"unknown model 'zzz'\. The zoo has: softmax, mlp, "),
        ("softmax", {"width": 3}, "softmax takes no argument width; it takes hidden, dropout_rate"),
        ("airbench94", {"with": 3, "depth": 1}, "airbench94 takes no argument depth, with; it takes widths"),
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
def test_what_cannot_be_built_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_model(name, **options)


def test_the_smallest_images_that_fit():
    assert zoo.create_model("airbench_small", (9, 9, 3)).output_shape == (None, 10)
    assert zoo.create_model("vgg11", (32, 32, 1), 10, hidden=4).output_shape == (None, 10)
    assert zoo.create_model("resnet20", (1, 1, 1)).output_shape == (None, 10)


def test_listing_and_arguments():
    assert zoo.list_models("resnet*") == [f"resnet{depth}" for depth in (20, 32, 44, 56, 110)]
    assert zoo.list_models("nothing*") == []
    assert zoo.arguments("mlp") == {"hidden": (512, 512), "dropout_rate": 0.2}
    assert zoo.arguments("wide_resnet")["width"] == 8
    with pytest.raises(zoo.UnknownModelError):
        zoo.arguments("nothing")


def test_arguments_may_come_from_json():
    widths = [variable.shape[-1] for variable in zoo.create_model("mlp", (2, 2, 1), 3, hidden=[5, 6]).weights]
    assert widths == [5, 5, 6, 6, 3, 3]


def test_dropout_is_where_the_rate_says():
    def dropouts(model):
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert dropouts(zoo.create_model("cifar_cnn", (10, 10, 3), dropout_rate=0.2)) == [0.2, 0.2, 0.4]
    assert dropouts(zoo.create_model("cifar_cnn", (10, 10, 3), dropout_rate=0.0)) == []
    assert dropouts(zoo.create_model("vgg11", (32, 32, 3), hidden=4)) == [0.5, 0.5]
    assert dropouts(zoo.create_model("wide_resnet_16_4", (8, 8, 3), dropout_rate=0.3, width=1)) == [0.3] * 6


def test_the_shortcut_without_parameters(small):
    """Option A: every second pixel, zeros for the channels that are new, half of them before the old ones."""
    shortcut = small("resnet20").get_layer("stage2_block1_shortcut")
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 16)).astype(np.float32)
    y = ops.convert_to_numpy(shortcut(x))
    assert y.shape == shortcut.compute_output_shape(x.shape) == (2, 3, 2, 32)
    np.testing.assert_array_equal(y[..., 8:24], x[:, ::2, ::2])
    assert not y[..., :8].any() and not y[..., 24:].any()
    config = shortcut.get_config()
    assert (config["filters"], config["strides"]) == (32, 2)
