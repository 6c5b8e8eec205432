"""Special cases of conversion: prefixes, no head, another image size, a related network."""

import zipfile

import keras
import numpy as np
import pytest
from keras import ops

from kvision import weights, zoo
from kvision.convert import convert, create_model, export_arrays, hdf5, keras_applications, pth
from kvision.layers import AdaptiveAveragePooling2D, skip_init
from kvision.random import rng
from kvision.weights import WeightsError

BACKEND = keras.backend.backend()
torch_alone = pytest.mark.skipif(BACKEND != "torch", reason="needs PyTorch")


def filled(name, *shape, **options):
    """Return a network with distinct values."""
    with skip_init():
        model = zoo.build_model(name, *shape, **options)
    for variable in model.weights:
        scale = 0.5 / np.sqrt(np.prod(variable.shape[:-1]) or 1)
        values = scale * rng(0, "conversions", variable.path).standard_normal(variable.shape, np.float32)
        variable.assign(np.abs(values) + 0.5 if variable.name in ("gamma", "moving_variance") else values)
    return model


def same(one, two):
    named, others = weights.named_variables(one), weights.named_variables(two)
    assert named.keys() == others.keys()
    for key, variable in named.items():
        value, other = ops.convert_to_numpy(variable.value), ops.convert_to_numpy(others[key].value)
        np.testing.assert_array_equal(value, other, err_msg=key)


@pytest.mark.backend_free
@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "net.backbone.", "_orig_mod."])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_prefixes_are_removed(tmp_path, prefix, source):
    model = filled("mobilenet_v2", (32, 32, 3), 3)
    arrays = {f"{prefix}{key}": array for key, array in export_arrays(model, source).items()}
    pth.write(tmp_path / "wrapped.pth", arrays)
    report = convert(
        tmp_path / "wrapped.pth", tmp_path / "ours.npz", "mobilenet_v2", input_shape=(32, 32, 3), compare=False
    )
    assert report.source == source and not report.skipped
    same(create_model("mobilenet_v2", weights=tmp_path / "ours.npz"), model)


def test_unexpected_arrays_raise_despite_a_prefix(tmp_path):
    """Lightning saves the state of metrics and losses next to the model."""
    arrays = {f"model.{key}": array for key, array in export_arrays(filled("resnet20"), "torchvision").items()}
    arrays["criterion.weight"] = np.ones(10, np.float32)
    pth.write(tmp_path / "run.ckpt", arrays)
    with pytest.raises(WeightsError, match=r"1 of \d+ arrays are unexpected: criterion.weight"):
        convert(tmp_path / "run.ckpt", tmp_path / "ours.npz", "resnet20", compare=False)
    report = convert(tmp_path / "run.ckpt", tmp_path / "ours.npz", "resnet20", skip="criterion.*", compare=False)
    assert report.skipped == ["criterion.weight"]


@pytest.mark.parametrize(
    ("name", "asked", "hint"),
    [
        ("resnet20", "resnet32", r"they fit resnet20 \(torchvision\): --model resnet20$"),
        ("mobilenet_v2_keras", "mobilenet_v2", r"they fit mobilenet_v2_keras \(keras\): --model mobilenet_v2_keras$"),
    ],
)
def test_a_file_of_a_related_network_raises_with_its_name(tmp_path, name, asked, hint):
    model = filled(name)
    if name == "resnet20":
        pth.write(tmp_path / "file.pth", export_arrays(model, "torchvision"))
    else:
        hdf5.write(tmp_path / "file.pth", export_arrays(model, "keras"))
    with pytest.raises(WeightsError, match=hint):
        convert(tmp_path / "file.pth", tmp_path / "ours.npz", asked, compare=False)


@pytest.mark.parametrize(
    "name", ["mobilenet_v2_keras", pytest.param("densenet121_keras", marks=pytest.mark.backend_free), "vgg16"]
)
def test_a_keras_file_without_top(tmp_path, name, monkeypatch):
    zeros = lambda self, shape, dtype=None: ops.convert_to_tensor(np.zeros(shape, np.float32))  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
    model = filled(name, (32, 32, 3), 0)
    hdf5.write(tmp_path / "notop.h5", export_arrays(model, "keras"))
    proof = name == "mobilenet_v2_keras" or BACKEND != "jax"  # JAX compiles a program for each layer
    report = convert(tmp_path / "notop.h5", tmp_path / "ours.npz", name, input_shape=(32, 32, 3), compare=proof)
    assert not report.skipped and (report.difference < 1e-5 if proof else report.difference is None)
    again = create_model(name, weights=tmp_path / "ours.npz")
    assert again.output_shape[-1] == model.output_shape[-1]
    same(again, model)


def test_a_skipped_head_is_still_built(tmp_path):
    arrays = export_arrays(filled("resnet20"), "torchvision")
    pth.write(tmp_path / "x.pth", {key: array for key, array in arrays.items() if not key.startswith("linear")})
    report = convert(tmp_path / "x.pth", tmp_path / "ours.npz", "resnet20", skip="logits/.*", compare=False)
    assert report.skipped == ["logits/kernel", "logits/bias"]


@pytest.mark.backend_free
def test_inception_is_exported_in_the_order_of_keras(monkeypatch):
    """Without `by_name`, Keras reads a file in the order of its layers."""
    zeros = lambda self, shape, dtype=None: ops.convert_to_tensor(np.zeros(shape, np.float32))  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
    keras.utils.clear_session()
    peer = keras.applications.InceptionV3(weights=None, input_shape=(75, 75, 3), classes=3)
    names = keras_applications.renumbered(layer.name for layer in peer.layers)
    theirs = [names.get(layer.name, layer.name) for layer in peer.layers if layer.weights]
    with skip_init():
        model = zoo.build_model("inception_v3_keras", (75, 75, 3), 3)
    ours = list(dict.fromkeys(key.rpartition("/")[0] for key in export_arrays(model, "keras")))
    assert ours == theirs


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("name", ["resnet20", "airbench_small", "mnist_cnn"])
def test_our_networks_saved_by_keras_3(tmp_path, name, suffix):
    model = filled(name)
    model.compile("adam", "mse")  # whose state is left out
    path = tmp_path / f"model{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    report = convert(path, tmp_path / "ours.npz", name, compare=False)
    assert report.source == "kvision" and not report.skipped
    same(create_model(name, weights=tmp_path / "ours.npz"), model)


@pytest.mark.backend_free
@pytest.mark.parametrize("top", [True, False])
def test_keras_networks_saved_by_keras_3(tmp_path, top, monkeypatch):
    zeros = lambda self, shape, dtype=None: ops.convert_to_tensor(np.zeros(shape, np.float32))  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
    theirs = keras.applications.MobileNetV2((32, 32, 3), weights=None, classes=3, include_top=top)
    for variable in theirs.weights:
        variable.assign(np.abs(rng(0, variable.path).standard_normal(variable.shape, np.float32)))
    theirs.save_weights(tmp_path / "keras.weights.h5")
    name = "mobilenet_v2_keras"
    report = convert(tmp_path / "keras.weights.h5", tmp_path / "ours.npz", name, input_shape=(32, 32, 3), compare=False)
    assert report.source == "keras" and not report.skipped
    again = export_arrays(create_model(name, weights=tmp_path / "ours.npz"), "keras")
    for layer in theirs.layers:
        for variable in layer.weights:
            value = ops.convert_to_numpy(variable.value)
            np.testing.assert_array_equal(again[f"{layer.name}/{variable.name}"], value)


def test_a_damaged_keras_file_raises_a_one_line_error(tmp_path):
    filled("mnist_cnn").save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as source, zipfile.ZipFile(tmp_path / "bad.keras", "w") as file:
        for entry in source.namelist():
            content = source.read(entry)
            file.writestr(entry, content[: len(content) // 2] if entry.endswith(".h5") else content)
    with pytest.raises(WeightsError, match=r"^/.*/bad\.keras: ") as error:
        convert(tmp_path / "bad.keras", tmp_path / "ours.npz", "mnist_cnn", compare=False)
    assert "model.weights.h5:" not in str(error.value) and "\n" not in str(error.value)


@torch_alone
def test_mnasnet_states_its_version(tmp_path):
    """torchvision's module requires it."""
    import torch

    model = filled("mnasnet0_5", (32, 32, 3), 3)
    weights.save(model, tmp_path / "ours.npz", arguments={"input_shape": (32, 32, 3), "classes": 3})
    convert(tmp_path / "ours.npz", tmp_path / "out.pth", compare=False)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert state._metadata[""]["version"] == 2
    again = convert(tmp_path / "out.pth", tmp_path / "again.npz", "mnasnet0_5", input_shape=(32, 32, 3), compare=False)
    assert not again.skipped and not again.ignored
    same(create_model("mnasnet0_5", weights=tmp_path / "again.npz"), model)


@torch_alone
def test_vgg_at_another_size_equals_torchvision(tmp_path):
    import torch

    from tests.references import vgg as reference

    theirs = reference.build("vgg11", 3, hidden=8, width=4).eval()
    generator = np.random.default_rng(0)
    arrays = {
        key: 0.1 * generator.standard_normal(tuple(value.shape)).astype(np.float32)
        for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
    pth.write(tmp_path / "vgg.pth", arrays)
    model_kwargs = {"hidden": 8, "width": 4}
    convert(tmp_path / "vgg.pth", tmp_path / "at224.npz", "vgg11", arguments=model_kwargs, compare=False)
    convert(tmp_path / "vgg.pth", tmp_path / "at128.npz", "vgg11", arguments=model_kwargs, input_shape=(128, 96, 3))
    images = generator.standard_normal((2, 128, 96, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    for model in (
        create_model("vgg11", (128, 96, 3), weights=tmp_path / "at224.npz"),
        create_model("vgg11", weights=tmp_path / "at128.npz"),
    ):
        assert model.input_shape == (None, 128, 96, 3)
        logits = ops.convert_to_numpy(model(images, training=False))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@torch_alone
@pytest.mark.filterwarnings("ignore")  # the tracer is deprecated, and says that it makes a constant of a size
def test_adaptive_pooling_computes_its_cells_outside_the_tracer():
    """Computed within PyTorch's tracer, ONNX would divide differently, wrong by whole pixels."""
    import torch

    layer = AdaptiveAveragePooling2D((3, 3))
    traced = torch.jit.trace(lambda x: layer(x), torch.zeros(1, 5, 8, 2))
    assert not {"floor_divide", "aten::mul", "aten::div"} & set(str(traced.graph).replace("(", " ").split())
    assert "aten::neg" not in str(traced.graph)
