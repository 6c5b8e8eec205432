"""Other frameworks' files: reading and writing without the framework, rejection of invalid files."""

import os
from collections import Counter
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest

import kvision
from kvision import convert, engine, weights, zoo
from kvision.__main__ import main
from kvision.convert import create_model, formats, hdf5, pth, safetensors, tf_checkpoint, timm
from kvision.data import load
from kvision.layers import skip_init
from kvision.training import evaluation
from kvision.weights import WeightsError
from kvision.weights.initialization import initialize
from tests import fuzz_weights
from tests.arrays import values

BACKEND = keras.backend.backend()
CIFAR_RESNET = Path(os.environ.get("KVISION_DATA", "")) / "resnet20-12fca82f.th"


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "conv/kernel": generator.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "double": generator.normal(size=(2, 3)),
        "half": generator.normal(size=5).astype(np.float16),
        "brain": generator.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "count": np.array(-7, np.int64),
        "small": np.array([-1, 2], np.int8),
        "bytes": np.array([0, 255], np.uint8),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and a[key].tobytes() == b[key].tobytes()
        for key in a
    )


@pytest.mark.parametrize("form", [pth, safetensors], ids=["pth", "safetensors"])
def test_round_trip(form, arrays, tmp_path):
    form.write(tmp_path / "one", arrays)
    form.write(tmp_path / "two", arrays)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = formats.read(tmp_path / "one")
    assert found.format == form.__name__.rsplit(".", 1)[-1]
    assert same(found.arrays, arrays)
    assert all(array.flags.writeable for array in found.arrays.values())
    with pytest.raises(WeightsError, match="complex"):
        form.write(tmp_path / "three", {"a": np.zeros(2, np.complex64)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_the_fuzzers_seeds_are_read(tmp_path):
    """Files written byte by byte from the formats' specifications."""
    for kind, blob in fuzz_weights.seeds(tmp_path).items():
        (tmp_path / kind).write_bytes(blob)
        if kind == "canary":
            with pytest.raises(WeightsError, match=r"a call of '\w+\.mkdir'; it was not executed"):
                formats.read(tmp_path / kind)
            continue
        found = formats.read(tmp_path / kind).arrays
        if kind == "legacy":
            np.testing.assert_array_equal(found["w"], np.arange(6).reshape(2, 3))
        elif kind == "checkpoint":
            np.testing.assert_array_equal(found["a/weights"], np.arange(6).reshape(2, 3))
            np.testing.assert_array_equal(found["a/biases"], np.ones(3))
        else:
            np.testing.assert_array_equal(found["conv/kernel"], np.arange(54).reshape(3, 3, 2, 3))


def test_mutated_files_are_read_or_raise():
    """`python -m tests.fuzz_weights` does the same with ten thousand."""
    found = fuzz_weights.fuzz(700, seed=1)
    assert set(sum(found.values(), Counter())) <= {"read", "refused"}
    assert all(outcomes["refused"] for outcomes in found.values())


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own reader is PyTorch's")
def test_pytorch_agrees(arrays, tmp_path):
    import torch

    pth.write(tmp_path / "ours.pth", arrays)
    read = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert list(read) == list(arrays)
    assert same(
        {key: tensor.to(torch.float64).numpy() for key, tensor in read.items()},
        {k: a.astype(np.float64) for k, a in arrays.items()},
    )
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"part": whole[1:3, ::2], "turned": whole.t(), "whole": torch.nn.Parameter(whole), "none": torch.zeros(0)}
    state["shared"] = state["whole"]
    for zipped in (True, False):
        for saved in (state, {"state_dict": state, "epoch": 3, "best": 0.5}):
            torch.save(saved, tmp_path / "theirs.pth", _use_new_zipfile_serialization=zipped)
            found = formats.read(tmp_path / "theirs.pth")
            assert found.ignored == [key for key in saved if key in ("epoch", "best")]
            assert same(found.arrays, {key: tensor.detach().numpy() for key, tensor in state.items()})
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match="it was not executed"):
        formats.read(tmp_path / "module.pth")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own writer is TensorFlow's")
@pytest.mark.parametrize("version", [1, 2])
def test_tensorflow_agrees(version, tmp_path):
    import tensorflow as tf

    generator = np.random.default_rng(0)
    given = {
        "a/weights": generator.normal(size=(3, 3, 20, 50)).astype(np.float32),
        "a/biases": generator.normal(size=50),
        "half": generator.normal(size=4).astype(np.float16),
        "step": np.int64(-5),
        "counts": np.array([-3, 2**31 - 1], np.int32),
        "flags": np.array([True, False]),
    }
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [tf.Variable(value, name=name) for name, value in given.items()]
        session.run([variable.initializer for variable in variables])
        tf.compat.v1.train.Saver(variables, write_version=version).save(session, str(tmp_path / "model.ckpt"))
    found = formats.read(tmp_path / "model.ckpt")
    assert (found.format, found.ignored) == ("tf_checkpoint", [])
    assert same(found.arrays, {key: np.asarray(value) for key, value in sorted(given.items())})
    (tmp_path / "cut").write_bytes(
        (tmp_path / ("model.ckpt" if version == 1 else "model.ckpt.index")).read_bytes()[:-60]
    )
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        tf_checkpoint.read(tmp_path / "cut")


def test_old_names_of_keras(tmp_path):
    """The files of Keras 1 name variables "block1_conv1_W_1:0"."""
    import h5py

    kernel, bias = np.ones((3, 3, 3, 4), np.float32), np.zeros(4, np.float32)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"block1_conv1", b"block1_pool"]
        for layer, names in (("block1_conv1", [b"block1_conv1_W_1:0", b"block1_conv1_b_1:0"]), ("block1_pool", [])):
            file.create_group(layer).attrs["weight_names"] = names
        file["block1_conv1/block1_conv1_W_1:0"], file["block1_conv1/block1_conv1_b_1:0"] = kernel, bias
    assert same(hdf5.read(tmp_path / "old.h5"), {"block1_conv1/kernel": kernel, "block1_conv1/bias": bias})
    with h5py.File(tmp_path / "old.h5", "a") as file:
        del file["block1_conv1/block1_conv1_b_1:0"]
        file["block1_conv1/block1_conv1_b_1:0"] = h5py.ExternalLink("elsewhere.h5", "/a")
    with pytest.raises(WeightsError, match="missing or a link to elsewhere"):
        hdf5.read(tmp_path / "old.h5")


@pytest.fixture(scope="module")
def small():
    model = zoo.build_model("resnet20", (9, 8, 3), 4, depth=8)
    initialize(model, 0)
    return model


def test_the_command_converts_in_both_directions(small, tmp_path, capsys):
    weights.save(small, tmp_path / "ours.npz", arguments={"depth": 8})
    for suffix, source in ((".pth", "torchvision"), (".safetensors", "kvision")):
        there, back = tmp_path / f"there{suffix}", tmp_path / f"back{suffix}.npz"
        assert main(["weights", "convert", str(tmp_path / "ours.npz"), "-o", str(there)]) == 0
        arguments = [
            "--model",
            "resnet20",
            "--argument",
            "depth=8",
            "--input-shape",
            "9",
            "8",
            "3",
            "--dataset",
            "shapes",
        ]
        assert main(["weights", "convert", str(there), "-o", str(back), *arguments]) == 0
        assert f"({source})" in capsys.readouterr().out
        model = create_model("resnet20", weights=back)
        assert model.output_shape == (None, 4)  # read off the file
        assert same(values(model), values(small))
        manifest = weights.inspect(back)["manifest"]
        assert (manifest["dataset"], manifest["provenance"]["file"]) == ("shapes", there.name)
    assert manifest["preprocessing"] is None


def test_counters_are_restored(small, tmp_path):
    arrays = convert.export_arrays(small, "torchvision")
    counters = [key for key in arrays if key.endswith("num_batches_tracked")]
    assert counters and all(arrays[key] == 0 for key in counters)
    arrays[counters[0]] = np.array(391, np.int64)
    pth.write(tmp_path / "in.pth", {f"module.{key}": array for key, array in arrays.items()})
    convert.convert(
        tmp_path / "in.pth", tmp_path / "ours.npz", "resnet20", input_shape=(9, 8, 3), arguments={"depth": 8}
    )
    convert.convert(tmp_path / "ours.npz", tmp_path / "out.pth")
    assert same(pth.read(tmp_path / "out.pth")[0], arrays)


def test_unmatched_names_raise(small, tmp_path):
    arrays = convert.export_arrays(small, "torchvision")
    before = values(small)
    odd = {**arrays, "extra.weight": np.zeros(3, np.float32)}
    del odd["linear.bias"], odd["layer1.0.conv1.weight"]
    with pytest.raises(
        WeightsError, match=r"2 of \d+ variables are missing: .*layer1\.0\.conv1\.weight.*extra\.weight"
    ):
        convert.import_arrays(small, odd, "torchvision")
    count, skipped, _ = convert.import_arrays(
        small, odd, "torchvision", skip=["extra.*", "logits/bias", "stage1_block1_1_conv/kernel"]
    )
    assert len(skipped) == 3 and count == len(before) - 2
    for key, array, message in (
        (
            "linear.weight",
            np.zeros((4, 63), np.float32),
            r"linear\.weight has shape \(4, 63\), logits/kernel expects \(4, 64\)",
        ),
        ("linear.bias", np.full(4, np.nan, np.float32), "linear.bias contains NaN or infinite values"),
    ):
        with pytest.raises(WeightsError, match=message):
            convert.import_arrays(small, arrays | {key: array}, "torchvision")
    assert same(values(small), before)
    pth.write(tmp_path / "a.pth", arrays)
    for arguments, message in (
        (("resnet21",), "unknown model 'resnet21'"),
        ((), "does not state its network"),
        (("softmax",), "torchvision has no softmax"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.convert(tmp_path / "a.pth", tmp_path / "b.npz", *arguments)
    with pytest.raises(WeightsError, match="no such file"):
        convert.convert(tmp_path / "missing.pth", tmp_path / "b.npz", "resnet20")
    (tmp_path / "text").write_text("hello, I am no weights file at all")
    with pytest.raises(WeightsError, match="is of an unknown format"):
        formats.read(tmp_path / "text")
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize(
    ("name", "model_kwargs", "theirs"),
    [
        (
            "mobilenet_v2",
            {},
            {
                "conv_stem.weight": (32, 3, 3, 3),
                "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
                "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
                "blocks.3.3.conv_pw.weight": (384, 64, 1, 1),
                "blocks.4.0.conv_pwl.weight": (96, 384, 1, 1),
                "blocks.4.2.bn3.running_var": (96,),
                "blocks.6.0.conv_pwl.weight": (320, 960, 1, 1),
                "bn2.weight": (1280,),
                "classifier.bias": (10,),
            },
        ),
        (
            "mnasnet1_0",
            {},
            {
                "blocks.1.2.conv_dw.weight": (72, 1, 3, 3),
                "blocks.4.1.conv_pwl.weight": (96, 576, 1, 1),
                "blocks.6.0.bn2.weight": (1152,),
            },
        ),
        (
            "vgg11_bn",
            {"hidden": 8},
            {"features.4.weight": (128, 64, 3, 3), "pre_logits.fc1.weight": (8, 512, 2, 2), "head.fc.weight": (10, 8)},
        ),
    ],
)
def test_timms_names(name, model_kwargs, theirs):
    """Names and shapes from timm 1.0.31, whose logits these were compared with by hand (within 2.2e-6)."""
    with skip_init():
        model = zoo.build_model(name, (64, 64, 3), 10, **model_kwargs)
    found = {place.key: place.shape for place in timm.find(model).values()}
    assert theirs.items() <= found.items()
    assert len(found) == len(model.weights)
    for key, array in convert.export_arrays(model, "timm").items():
        assert array.shape == found.get(key, ())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, small, tmp_path):
    before = values(small)
    weights.save(small, tmp_path / "half.npz", arguments={"depth": 8}, dtype=dtype)
    weights.save(small, tmp_path / "full.npz", arguments={"depth": 8})
    assert same(values(small), before)
    assert (tmp_path / "half.npz").stat().st_size < 0.75 * (tmp_path / "full.npz").stat().st_size
    model = create_model("resnet20", weights=tmp_path / "half.npz")
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    assert same(values(model), {key: array.astype(narrow).astype(np.float32) for key, array in before.items()})
    assert convert.verify(tmp_path / "half.npz").ok
    small.get_layer("logits").bias.assign(np.full(4, 1e6, np.float32))
    if dtype == "float16":
        with pytest.raises(WeightsError, match=r"logits/bias reaches 1e\+06, beyond the range of float16"):
            weights.save(small, tmp_path / "over.npz", dtype=dtype)
    small.get_layer("logits").bias.assign(before["logits/bias"])


@pytest.mark.skipif(not CIFAR_RESNET.is_file(), reason="KVISION_DATA names no folder with Idelbayev's weights")
def test_published_weights_have_their_published_accuracy(tmp_path):
    """https://github.com/akamaster/pytorch_resnet_cifar10: an error of 8.27 % on CIFAR-10."""
    convert.convert(CIFAR_RESNET, tmp_path / "resnet20.npz", "resnet20", dataset="cifar10", license="BSD-2-Clause")
    model = kvision.create_model("resnet20", weights=tmp_path / "resnet20.npz")
    dataset = load("cifar10", CIFAR_RESNET.parent)
    logits = evaluation.predict(engine.create(model), dataset.x_test, kvision.preprocess(tmp_path / "resnet20.npz"))
    assert (logits.argmax(axis=1) == dataset.y_test).sum() == 9173
