"""The networks that give an image: autoencoders and the denoising U-Net."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import kvision
from kvision import zoo
from kvision.layers import up_conv
from kvision.weights.initialization import initialize
from tests.arrays import values
from tests.zoo_logits import classes_of, fill, images, small_form

NAMES = [name for name in zoo.list_models() if classes_of(name) is None]


def build(name, classes=None):
    shape, own, *_ = small_form(name)
    model = zoo.build_model(name, shape, classes, **own)
    fill(model)
    return model


def test_which_networks_give_an_image():
    assert NAMES == ["autoencoder", "deep_autoencoder", "conv_autoencoder", "unet_denoiser"]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_head_a_network_ends_in_its_code(name):
    model, encoder = build(name), build(name, 0)
    assert encoder.name == name and encoder.output_shape == (None, small_form(name)[2])
    assert set(values(encoder)) < set(values(model))
    x = images(model)
    code = keras.Model(model.input, model.get_layer("code").output)(x, training=False)
    code = ops.convert_to_numpy(code).reshape(2, -1, code.shape[-1]).mean(axis=1)  # of maps the mean over all pixels
    np.testing.assert_allclose(ops.convert_to_numpy(encoder(x, training=False)), code, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_mirrors_the_way_in(name):
    layers = {layer.name: tuple(layer.output.shape[1:]) for layer in build(name).layers}
    stages = {key: shape for key, shape in layers.items() if key.startswith("stage") and "_" not in key}
    back = {key.replace("up", "stage"): shape for key, shape in layers.items() if key[:2] == "up" and "_" not in key}
    assert back == stages


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_a_gradient(name):
    shape, own, *_ = small_form(name)
    model = zoo.build_model(name, shape, **own)
    initialize(model, 0)
    model.compile(keras.optimizers.SGD(1.0, momentum=0.9), keras.losses.BinaryCrossentropy(from_logits=True))
    targets = np.random.default_rng(0).random((8, *shape)).astype(np.float32)
    model.train_on_batch(targets, targets)
    # After one step from rest the momenta are the gradients, at learning rate 1.
    gradients = model.optimizer.variables[2:]
    assert len(gradients) == len(model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        assert abs(ops.convert_to_numpy(gradient)).max() > 1e-8, variable.path


def test_a_skip_carries_what_the_code_does_not():
    """With a decoder that reads nothing from below, the denoiser still sees the image."""
    model = build("unet_denoiser")
    for layer in model.layers:
        if re.fullmatch(r"up\d+_conv", layer.name):
            layer.set_weights([0 * array for array in layer.get_weights()])
    first, second = ops.convert_to_numpy(model(images(model), training=False))
    assert abs(first - second).max() > 0.01


def test_images_of_any_size_with_even_halves():
    model = zoo.build_model("unet_denoiser", (None, None, 1))
    assert model(np.zeros((1, 8, 12, 1), np.float32), training=False).shape == (1, 8, 12, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet_denoiser", {"classes": 10}, "unet_denoiser returns images, not logits: expected classes=None, or 0"),
        ("unet_denoiser", {"input_shape": (28, 30, 1)}, r"multiples of 4, got \(28, 30\)"),
        ("conv_autoencoder", {"input_shape": (30, 28, 1)}, r"multiples of 4, got \(30, 28\)"),
        ("conv_autoencoder", {"input_shape": (None, None, 1)}, "needs a known image size"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.build_model(name, **options)


def test_what_is_known_of_a_network_without_classes():
    info = kvision.model_info("conv_autoencoder")
    assert info.classes is None and "images        28x28x1\n" in f"{info}\n"


def test_a_transposed_convolution_without_overlap():
    """Each pixel becomes 2x2: the kernel's window, summed over the channels."""
    layer, generator = up_conv(5, name="up", use_bias=True), np.random.default_rng(0)
    x = generator.normal(size=(2, 3, 4, 6)).astype(np.float32)
    layer.build(x.shape)
    kernel, bias = generator.normal(size=(2, 2, 5, 6)).astype(np.float32), np.arange(5, dtype=np.float32)
    layer.set_weights([kernel, bias])
    expected = np.einsum("nhwc,ijfc->nhiwjf", x, kernel).reshape(2, 6, 8, 5) + bias
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_keeps_the_scale():
    layer = up_conv(64, name="up")
    layer.build((None, 8, 8, 128))
    kernel = layer.kernel_initializer.sample((2, 2, 64, 128), np.random.default_rng(0))
    assert abs(kernel.std() / np.sqrt(2 / 128) - 1) < 0.01
