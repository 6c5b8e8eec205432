"""Compatibility of `kvision.applications` with `keras.applications`. `test_keras_applications` compares logits."""

import inspect

import keras
import numpy as np
import pytest

import kvision
from kvision import applications
from kvision.layers import skip_init

KERAS = ("VGG16", "VGG19", "ResNet50", "ResNet101", "ResNet152", "InceptionV3")
KERAS += ("DenseNet121", "DenseNet169", "DenseNet201", "MobileNetV2")
MODULES = ("vgg16", "vgg19", "resnet", "resnet50", "inception_v3", "densenet", "mobilenet_v2")


@pytest.fixture(autouse=True)
def no_values():
    with skip_init():
        yield


@pytest.mark.parametrize("name", KERAS)
def test_signatures_equal_those_of_keras(name):
    theirs = list(inspect.signature(getattr(keras.applications, name)).parameters)
    ours = list(inspect.signature(getattr(applications, name).__call__).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("module", MODULES)
def test_modules_equal_those_of_keras(module):
    theirs = {name for name in dir(getattr(keras.applications, module)) if not name.startswith("_")}
    assert theirs - {"ResNet50V2"} <= set(dir(getattr(applications, module)))
    image = np.full((2, 3, 3), 100.0, np.float32)
    ours, keras_own = getattr(applications, module), getattr(keras.applications, module)
    expected = keras_own.preprocess_input(image.copy(), data_format="channels_last")
    np.testing.assert_allclose(ours.preprocess_input(image), expected, atol=1e-4)  # one image
    np.testing.assert_allclose(ours.preprocess_input(image[None])[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["VGG16", "ResNet50", "DenseNet121", "MobileNetV2", "InceptionV3"])
def test_images_of_any_size(name):
    make = getattr(applications, name)
    model = make(include_top=False, weights=None, input_shape=(None, None, 3))
    assert model.input_shape == (None, None, None, 3) and model.output_shape[:3] == (None, None, None)
    with pytest.raises(ValueError, match="include_top requires a known size"):
        make(input_shape=(None, None, 3))


@pytest.mark.parametrize("name", KERAS)
def test_minimum_sizes_equal_those_of_keras(name):
    least = 75 if name == "InceptionV3" else 32
    make = getattr(applications, name)
    if name in ("VGG16", "ResNet50", "DenseNet121", "MobileNetV2", "InceptionV3"):  # the others are built alike
        assert make(include_top=False, input_shape=(least, least, 3), pooling="avg").output_shape[0] is None
    with pytest.raises(ValueError, match=f"{name} needs images of at least {least}x{least} pixels"):
        make(include_top=False, input_shape=(least, least - 1, 3))


def test_the_model_starts_at_the_input_tensor():
    image = keras.Input((40, 36, 3), name="photo")
    tensor = keras.layers.Rescaling(1 / 255, name="scale")(image)
    model = applications.ResNet20(input_tensor=tensor, include_top=False, pooling="avg", name="features")
    assert model.name == "features" and model.input_shape == (None, 40, 36, 3)
    names = [layer.name for layer in model.layers]
    assert names[:2] == ["photo", "scale"] and "stem_conv" in names and "image" not in names
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 40, 36, 3)).astype(np.float32)
    alone = applications.ResNet20(input_shape=(40, 36, 3), include_top=False, pooling="avg")
    for ours, theirs in zip(alone.weights, model.weights, strict=True):
        value = np.random.default_rng(0).uniform(0.1, 0.5, ours.shape).astype(np.float32)
        ours.assign(value), theirs.assign(value)
    found, expected = (each(x, training=False) for each, x in ((model, pixels), (alone, pixels / 255)))
    expected = keras.ops.convert_to_numpy(expected)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_tensor": np.zeros((1, 32, 32, 3))}, "input_tensor must be a Keras tensor of images"),
        ({"input_tensor": keras.Input((32, 32, 3)), "input_shape": (64, 64, 3)}, r"of shape \(32, 32, 3\), but input"),
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"input_shape": (32, 32)}, r"input_shape must be \(height, width, channels\)"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        applications.MobileNetV2(**arguments)


def test_alpha_equals_that_of_keras():
    ours = applications.MobileNetV2((32, 32, 3), 0.5, classes=7)
    theirs = keras.applications.MobileNetV2((32, 32, 3), 0.5, weights=None, classes=7)
    assert ours.count_params() == theirs.count_params()


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1"])
def test_an_unknown_size_raises(name):
    try:
        model = kvision.create_model(name, (None, None, 3), classes=0)
    except ValueError as error:
        assert "needs a known image size" in str(error)
    else:
        assert model.input_shape == (None, None, None, 3)
