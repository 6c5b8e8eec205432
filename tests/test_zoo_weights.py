"""Networks and weights by name, their info, and other numbers of image channels."""

import numpy as np
import pytest

import kvision
from kvision import convert, engine, weights, zoo
from kvision.__main__ import main
from kvision.data.preprocessing import Preprocessing
from kvision.weights.initialization import initialize
from tests.arrays import noise, values


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Write a file of resnet20's short form, for 8x8 images of 3 channels and 4 classes."""
    model = zoo.build_model("resnet20", (8, 8, 3), 4, depth=8)
    initialize(model, 0)
    path = tmp_path_factory.mktemp("weights") / "resnet20.shapes.npz"
    weights.save(
        model, path, arguments={"depth": 8}, preprocessing=Preprocessing(size=(8, 8), crop=0.5), dataset="shapes"
    )
    return path, model


def test_the_file_states_its_networks_arguments(stored):
    path, model = stored
    again = kvision.create_model("resnet20", weights=path)
    assert again.input_shape == (None, 8, 8, 3) and again.output_shape == (None, 4)
    for key, array in values(model).items():
        np.testing.assert_array_equal(values(again)[key], array)
    larger = kvision.create_model("resnet20", (16, 12, 3), weights=path)
    assert larger.input_shape == (None, 16, 12, 3)
    with pytest.raises(weights.WeightsError, match=r"logits/kernel: file \(64, 4\), model \(64, 5\)"):
        kvision.create_model("resnet20", classes=5, weights=path)
    with pytest.raises(weights.WeightsError, match="a file of resnet20 does not fit the model resnet32"):
        kvision.create_model("resnet32", weights=path)


def test_a_network_without_head_loads_the_rest(stored):
    path, model = stored
    headless = kvision.create_model("resnet20", classes=0, weights=path)
    images = noise(2, 8, 8, 3)
    features, logits = engine.create(headless).predict(images), engine.create(model).predict(images)
    head = model.get_layer("logits")
    np.testing.assert_allclose(features @ np.array(head.kernel) + np.array(head.bias), logits, atol=1e-5)


def test_weights_for_other_channels(stored):
    """A gray image gives the logits of three equal channels, and so does one of six channels."""
    path, model = stored
    gray = noise(2, 8, 8, 1)
    expected = engine.create(model).predict(np.repeat(gray, 3, axis=-1))
    for channels in (1, 6):
        adapted = kvision.create_model("resnet20", (8, 8, channels), weights=path, adapt_input=True)
        logits = engine.create(adapted).predict(np.repeat(gray, channels, axis=-1))
        np.testing.assert_allclose(logits, expected, atol=1e-5 * abs(expected).max())
    with pytest.raises(weights.WeightsError, match=r"stem_conv/kernel: file \(3, 3, 3, 16\), model \(3, 3, 1, 16\)"):
        kvision.create_model("resnet20", (8, 8, 1), weights=path)
    kernel = np.arange(2 * 3, dtype=np.float32).reshape(1, 1, 3, 2)
    np.testing.assert_array_equal(weights.adapt_kernel(kernel, 4)[0, 0, :, 0], np.array([0, 2, 4, 0]) * 0.75)
    with pytest.raises(ValueError, match="expected a kernel"):
        weights.adapt_kernel(kernel, 0)


def test_weights_by_name():
    assert convert.find("airbench_small.cifar10") == convert.pretrained_weights()["airbench_small.cifar10"]
    assert convert.find("softmax.mnist.npz").name == "softmax.mnist.npz"
    with pytest.raises(weights.WeightsError, match=r"airbench_smal\.cifar10: .* did you mean airbench_small\.cifar10"):
        convert.find("airbench_smal.cifar10")
    model = kvision.create_model("softmax", weights="softmax.mnist")
    assert model.input_shape == (None, 28, 28, 1)
    prepare = kvision.preprocess("softmax.mnist")
    assert prepare.size == (28, 28) and len(prepare.mean) == 1


def test_preprocessing_of_a_file_accepts_images_of_any_size(stored):
    prepare = kvision.preprocess(stored[0])
    assert prepare == Preprocessing(size=(8, 8), crop=0.5)
    generator = np.random.default_rng(0)
    make_images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((16, 16), (30, 17), (16, 41))]
    cut = prepare.images(make_images)
    assert cut.shape == (3, 8, 8, 3) and cut.dtype == np.float32
    # The shorter side is 16 = 8 / 0.5 pixels in the first and the last: nothing is resized, the center is cut out.
    np.testing.assert_array_equal(cut[0], prepare(make_images[0][None, 4:12, 4:12])[0])
    np.testing.assert_array_equal(cut[2], prepare(make_images[2][None, 4:12, 16:24])[0])
    # A ramp stays a ramp when it is made smaller: 32 steps of 8 become 16 of 16.
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))[..., None].repeat(3, axis=-1)
    middle = prepare.images([ramp])[0, 0, :, 0] * 255
    np.testing.assert_allclose(np.diff(middle), 16, atol=1)
    with pytest.raises(ValueError, match=r"expected uint8 images \(height, width, channels\), got float32 \(4, 4, 3\)"):
        prepare.images([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(ValueError, match="images of different sizes need a `size`"):
        Preprocessing().images(make_images)


def test_model_info(capsys):
    info = kvision.model_info("resnet20")
    assert (info.year, info.address, info.input_shape) == (2015, "https://arxiv.org/abs/1512.03385", (32, 32, 3))
    # Counted by hand: 3 stages of 6 convolutions, the first of stages 2 and 3 with half the inputs; stem; head.
    stem, head = 32 * 32 * 9 * 3 * 16, 64 * 10
    stages = 6 * 32 * 32 * 9 * 16 * 16, 5.5 * 16 * 16 * 9 * 32 * 32, 5.5 * 8 * 8 * 9 * 64 * 64
    assert info.flops == stem + sum(stages) + head
    assert info.parameters == 269_722
    assert info.stages == {"stage1": (32, 32, 16), "stage2": (16, 16, 32), "stage3": (8, 8, 64)}
    assert info.preprocessing.mean == (0.485, 0.456, 0.406)
    # torchvision's documentation: 4.089 and 5.713 billion.
    assert [kvision.model_info(name).flops for name in ("resnet50", "inception_v3")] == [4_089_184_256, 5_713_216_096]
    assert "airbench_small.cifar10" in kvision.model_info("airbench_small").weights
    assert main(["info", "resnet20"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{info}\n" and "269,722" in printed and "stage2 16x16x32" in printed
    assert main(["info", "resnet21"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["models", "resnet2?"]) == 0
    assert capsys.readouterr().out.startswith("resnet20  32x32x3")
    assert main(["models", "x*"]) == 2
    assert "no model matches 'x*'" in capsys.readouterr().err
