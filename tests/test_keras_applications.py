"""Weights of `keras.applications`: logits against Keras's networks, and export."""

import keras
import numpy as np
import pytest
from keras import ops

from kvision import applications, convert, engine, zoo
from kvision.convert import create_model, export_arrays, hdf5, import_arrays
from kvision.convert.keras_applications import CONSTRUCTORS, renumbered
from kvision.layers import skip_init
from kvision.random import rng

# The least sizes that Keras takes with its top.
SIZES = {"vgg16": 32, "resnet50_keras": 32, "densenet121_keras": 32, "mobilenet_v2_keras": 32, "inception_v3_keras": 75}
# Logits of one network are compared on every backend: `test_zoo` compares the backends' logits of all.
EVERYWHERE = "mobilenet_v2_keras"
OTHERS = [name for name in SIZES if name != EVERYWHERE]


@pytest.fixture
def peer(monkeypatch):
    """Return `peer(name)`: Keras's network with seven classes, and its random arrays by "layer/variable"."""
    # Its own initializers take JAX 10 to 20 s, and all values are set here.
    zeros = lambda self, shape, dtype=None: ops.convert_to_tensor(np.zeros(shape, np.float32))  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)

    def made(name):
        shape = (SIZES[name], SIZES[name], 3)
        make = getattr(keras.applications, CONSTRUCTORS[name])
        keras.utils.clear_session()  # Keras numbers unnamed layers on through the whole process
        network, arrays = make(weights=None, input_shape=shape, classes=7, classifier_activation=None), {}
        for layer in network.layers:
            for variable in layer.weights:
                leaf, size = variable.name, tuple(variable.shape)
                generator = rng(0, "keras", name, variable.path.replace("batch_normalization", "bn"))
                array = generator.standard_normal(size, np.float32)
                if leaf == "kernel":
                    fan = np.prod(size[:-1]) if "depthwise" not in layer.name else np.prod(size[:2])
                    array *= np.float32(np.sqrt(2 / fan))
                elif leaf in ("gamma", "moving_variance"):
                    array = generator.uniform(0.5, 1.5, size).astype(np.float32)
                else:
                    array /= 10
                variable.assign(array)
                arrays[f"{layer.name}/{leaf}"] = array
        return network, arrays

    return made


@pytest.mark.parametrize("name", [EVERYWHERE, *(pytest.param(name, marks=pytest.mark.backend_free) for name in OTHERS)])
def test_logits_equal_those_of_keras(name, peer, tmp_path):
    network, arrays = peer(name)
    hdf5.write(tmp_path / "keras.h5", arrays)
    report = convert.convert(
        tmp_path / "keras.h5", tmp_path / "ours.npz", name, input_shape=network.input_shape[1:], compare=False
    )
    assert report.source == "keras" and not report.skipped
    model = create_model(name, weights=tmp_path / "ours.npz")
    assert model.output_shape == (None, 7)
    images = rng(0, "images").standard_normal((2, *network.input_shape[1:]), np.float32)
    expected, logits = (engine.create(each).predict(images) for each in (network, model))
    assert abs(logits - expected).max() <= 1e-4 * abs(expected).max()
    # Back: bit for bit, but for the ResNets' biases before batch norms, which are folded into those.
    back = export_arrays(model, "keras")
    with skip_init():
        again = zoo.build_model(name, network.input_shape[1:], 7)
    import_arrays(again, back, "keras")
    for one, two in zip(model.weights, again.weights, strict=True):
        assert np.array_equal(ops.convert_to_numpy(one.value), ops.convert_to_numpy(two.value)), one.path
    if name == "resnet50_keras":
        assert back.keys() == arrays.keys()
    else:
        names = renumbered(key.rpartition("/")[0] for key in arrays)
        given = {
            f"{names.get(key.rpartition('/')[0], key.rpartition('/')[0])}/{key.rpartition('/')[2]}": key
            for key in arrays
        }
        assert given.keys() == back.keys()
        assert all(back[key].tobytes() == arrays[theirs].tobytes() for key, theirs in given.items())


def test_keras_reads_exported_files(peer, tmp_path):
    network, arrays = peer("mobilenet_v2_keras")
    hdf5.write(tmp_path / "keras.h5", arrays)
    convert.convert(
        tmp_path / "keras.h5", tmp_path / "ours.npz", "mobilenet_v2_keras", input_shape=(32, 32, 3), compare=False
    )
    convert.convert(tmp_path / "ours.npz", tmp_path / "back.h5", compare=False)
    for variable in network.weights:
        variable.assign(np.full(variable.shape, 3, np.float32))
    network.load_weights(tmp_path / "back.h5", by_name=True)
    for layer in network.layers:
        for variable in layer.weights:
            np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), arrays[f"{layer.name}/{variable.name}"])


def test_numbered_layers():
    assert renumbered(["conv2d_7", "conv2d_10", "batch_normalization", "batch_normalization_2", "predictions"]) == {
        "conv2d_7": "conv2d",
        "conv2d_10": "conv2d_1",
        "batch_normalization": "batch_normalization",
        "batch_normalization_2": "batch_normalization_1",
    }


@pytest.mark.parametrize(("name", "mode"), [("VGG16", "caffe"), ("DenseNet121", "torch"), ("InceptionV3", "tf")])
def test_preprocessing_equals_that_of_keras(name, mode):
    images = rng(0, "pixels").integers(0, 256, (2, 5, 4, 3)).astype(np.float32)
    expected = keras.applications.imagenet_utils.preprocess_input(images.copy(), mode=mode, data_format="channels_last")
    np.testing.assert_allclose(getattr(applications, name).preprocess_input(images), expected, atol=1e-4)


def test_constructors():
    top = applications.ResNet20(classes=4, input_shape=(9, 8, 3))
    images = rng(0, "images").standard_normal((2, 9, 8, 3), np.float32)
    probabilities = ops.convert_to_numpy(top(images))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert [layer.name for layer in top.layers][-2:] == ["logits", "predictions"]
    assert applications.ResNet20(classes=4, classifier_activation=None).output_shape == (None, 4)
    assert applications.ResNet20(include_top=False).output_shape == (None, 8, 8, 64)
    assert applications.ResNet20(include_top=False, pooling="max").output_shape == (None, 64)
    assert applications.ResNet50.architecture == "resnet50_keras"
    named = applications.ResNet20.decode_predictions(probabilities, top=2, classes="abcd")
    assert [[name for _, name, _ in row] for row in named] == [
        ["abcd"[i] for i in np.argsort(-row)[:2]] for row in probabilities
    ]
    for arguments, message in (
        ({"weights": "imagenet"}, "no ImageNet weights are included"),
        ({"weights": "softmax.mnist"}, "a file of softmax, which is not one of the networks of VGG16"),
        ({"pooling": "min"}, "pooling must be"),
    ):
        with pytest.raises(ValueError, match=message):
            applications.VGG16(**arguments)
    with pytest.raises(AttributeError, match="has no attribute 'VGG99'"):
        applications.VGG99  # noqa: B018
    assert all(name in zoo.list_models() for name in applications.NAMES.values())
