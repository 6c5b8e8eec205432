"""Parity: what is read off made-up results in every environment; with all backends, faults planted in one of them."""

import dataclasses
import json
import math
import zipfile

import keras
import numpy as np
import pytest

from kvision import __main__, engine, parity
from kvision.engine import BACKENDS, installed
from kvision.flags import UsageError
from kvision.layers import activation, batch_norm, conv, logits
from kvision.parity import Spec, launcher
from kvision.parity.cli import finite
from kvision.parity.compare import LIMITS, STAGES, judge
from kvision.parity.loading import build, check_shape, make_images, start, with_dtype
from kvision.parity.result import Result
from kvision.parity.tensors import KEPT, difference, keep, sampled_indices
from kvision.parity.worker import graph, numbered, run
from tests import parity_models

all_installed = pytest.mark.skipif(not all(map(installed, BACKENDS)), reason="compares all three backends")
QUIET = {"log": lambda line: None}


# Tensors


def test_all_values_of_a_small_tensor_are_kept():
    array = np.random.default_rng(0).normal(size=(3, 4, 5))
    kept = keep("x", array)
    np.testing.assert_array_equal(kept.values, array.ravel())
    assert (kept.name, kept.shape, kept.nonfinite) == ("x", (3, 4, 5), 0)
    assert kept.mean == pytest.approx(array.mean(), rel=1e-14)
    assert kept.largest == max(array.max(), -array.min())
    assert kept.norm == pytest.approx(np.linalg.norm(array), rel=1e-14)


def test_the_same_sample_of_a_large_tensor_is_kept_each_time():
    size = 100_000
    kept = sampled_indices(size)
    np.testing.assert_array_equal(kept, sampled_indices(size))
    assert 0.95 * KEPT < len(kept) <= KEPT
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0
    assert kept[-1] < size
    np.testing.assert_array_equal(keep("x", np.arange(size)).values, kept)


@pytest.mark.parametrize("size", [60, 100_000])
def test_a_difference_has_its_index_values_and_relative_size(size):
    a = np.random.default_rng(1).normal(size=(size // 20, 20))
    b = a.copy()
    at = int(sampled_indices(size)[7])
    b.flat[at] += 0.5
    found = difference(keep("x", a), keep("x", b))
    assert found.index == np.unravel_index(at, a.shape)
    assert found.values == (a.flat[at], b.flat[at])
    assert found.size == pytest.approx(0.5 / max(abs(a).max(), abs(b).max()), rel=1e-12)


@pytest.mark.parametrize("by", [0.01, -0.01])
def test_a_difference_at_another_index_changes_mean_or_norm(by):
    a = np.random.default_rng(2).normal(size=100_000)
    b = a.copy()
    b[np.setdiff1d(np.arange(len(a)), sampled_indices(len(a)))[3]] += by
    found = difference(keep("x", a), keep("x", b))
    assert found.index is None
    assert LIMITS["float64"]["inference_layers"] < found.size < 0.01
    assert difference(keep("x", a), keep("x", a)).size == 0


@pytest.mark.parametrize(
    ("a", "b", "size"),
    [
        ([1.0, -np.inf], [1.0, -np.inf], 0),
        ([1.0, np.nan], [1.0, np.nan], 0),
        ([1.0, np.inf], [1.0, -np.inf], math.inf),
        ([1.0, 2.0], [1.0, np.nan], math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([0.0, 0.0], [0.0, 1e-30], 1),
        ([[1.0, 2.0]], [1.0, 2.0], math.inf),
        ([], [], 0),
    ],
)
def test_differences_of_nonfinite_values(a, b, size):
    assert difference(keep("x", np.array(a)), keep("x", np.array(b))).size == size
    assert difference(keep("x", np.array(b)), keep("x", np.array(a))).size == size


# Synthetic results

NAMES = ("first", "norm", "last")
SHAPES = ((2, 8, 8, 4), (2, 8, 8, 4), (2, 10))


def made(backend, change=None):
    """The result of a network of three layers; `change(arrays, values)` changes what this backend has computed."""
    generator = np.random.default_rng(3)
    layers = lambda: {name: generator.normal(size=shape) for name, shape in zip(NAMES, SHAPES, strict=True)}  # noqa: E731
    arrays = {"inference_layers": layers(), "training_layers": layers()}
    arrays["inference"] = {"outputs": arrays["inference_layers"]["last"].copy()}
    shapes = {"first/kernel": (3, 3, 3, 4), "first/bias": (4,), "norm/gamma": (4,), "last/kernel": (4, 10)}
    for stage, scale in (("initial", 1.0), ("gradients", 0.1), ("weights", 1.0)):
        arrays[stage] = {name: scale * generator.normal(size=shape) for name, shape in shapes.items()}
    arrays["gradients"]["first/bias"] *= 1e-17  # before a batch norm it is all rounding
    values = {"loss": 2.5, "losses": [2.5, 2.25, 2.0, 1.75], "notes": []}
    operations = [
        {"name": name, "type": kind, "settings": settings, "inputs": inputs, "dtype": "float64", "random": False}
        for name, kind, settings, inputs in (
            ("first", "Conv2D", {"padding": "valid"}, []),
            ("norm", "BatchNormalization", {"epsilon": 1e-5}, ["first"]),
            ("last", "Dense", {"units": 10}, ["norm"]),
        )
    ]
    if change:
        change(arrays, values, operations)
    tensors = {stage: [keep(name, array) for name, array in named.items()] for stage, named in arrays.items()}
    return Result(backend, operations, ["last"], tensors, **values)


def judged(change=None, on="torch", dtype="float64", backends=BACKENDS):
    results = [made(backend, change if backend == on else None) for backend in backends]
    report = judge(results, dtype)
    full = {"spec": dataclasses.asdict(Spec("made", dtype, steps=4)), "failed": {}}
    full["versions"] = {backend: {backend: "1.0"} for backend in backends}
    return report, parity.text(full | report)


def test_equal_results_agree():
    report, text = judged()
    assert report["passed"]
    assert report["faults"] == []
    assert {row["difference"] for row in report["rows"]} == {0}
    assert len(report["rows"]) == 2 * len(STAGES)
    assert text.endswith("jax, tensorflow, torch agree")


def test_rounding_passes_even_for_gradients_of_zero():
    def change(arrays, values, operations):
        for stage, named in arrays.items():
            for name in named if stage != "initial" else ():
                named[name] *= 1 + 1e-14
        arrays["gradients"]["first/bias"] *= -3
        values["loss"] *= 1 + 1e-14

    report, _ = judged(change)
    assert report["passed"]
    assert max(row["difference"] for row in report["rows"]) > 1e-15


def bend(stage, name, index, by):
    def change(arrays, values, operations):
        arrays[stage][name][index] += by

    return change


@pytest.mark.parametrize("on", BACKENDS)
def test_the_backend_that_diverges_is_reported_with_layer_index_and_values(on):
    def change(arrays, values, operations):
        for stage in ("inference_layers", "training_layers"):
            arrays[stage]["norm"][1, 2, 3, 0] += 1e-3
            arrays[stage]["last"][0, 0] += 1e-2
        arrays["inference"]["outputs"][0, 0] += 1e-2
        operations[1]["settings"]["epsilon"] = 1e-3

    report, text = judged(change, on)
    (fault,) = report["faults"]
    assert not report["passed"]
    assert report["reference"] == ("tensorflow" if on == "jax" else "jax")
    assert (fault["backend"], fault["kind"], fault["stage"], fault["name"]) == (on, "layer", "inference_layers", "norm")
    assert (fault["position"], fault["of"], fault["index"], fault["type"]) == (2, 3, (1, 2, 3, 0), "BatchNormalization")
    others = [fault["values"][backend] for backend in BACKENDS if backend != on]
    assert others[0] == others[1]
    assert fault["values"][on] == pytest.approx(others[0] + 1e-3, rel=1e-12)
    assert fault["inputs"] == {"first": 0}
    assert not fault["grown"]
    wrong, right = (1e-3, 1e-5)
    assert fault["settings_that_differ"] == {"epsilon": [right, wrong]}
    assert f"{on} diverges from {report['reference']} at norm, layer 2 of 3" in text
    assert "its inputs (first) are equal, so the error is in this layer" in text


def test_rounding_that_grows_over_layers_is_reported_as_such():
    def change(arrays, values, operations):
        arrays["inference_layers"]["first"][0, 0, 0, 0] += 8e-11 * abs(arrays["inference_layers"]["first"]).max()
        arrays["inference_layers"]["norm"][0, 0, 0, 0] += 2e-10 * abs(arrays["inference_layers"]["norm"]).max()

    report, text = judged(change)
    assert report["faults"][0]["name"] == "norm"
    assert report["faults"][0]["grown"]
    assert "rounding grows through the layers" in text


def test_a_layer_of_another_shape():
    def change(arrays, values, operations):
        arrays["inference_layers"]["norm"] = arrays["inference_layers"]["norm"][:, 1:]

    report, text = judged(change)
    assert report["faults"][0]["name"] == "norm"
    assert report["faults"][0]["shapes"] == {"jax": (2, 8, 8, 4), "torch": (2, 7, 8, 4)}
    assert "2x8x8x4 on jax, 2x7x8x4 on torch" in text


def test_a_layer_that_only_one_backend_has():
    def change(arrays, values, operations):
        arrays["inference_layers"] = {"pad": np.zeros(3), **arrays["inference_layers"]}
        arrays["training_layers"] = {"pad": np.zeros(3), **arrays["training_layers"]}
        arrays["inference_layers"]["first"][0, 0, 0, 0] += 1
        operations.insert(0, {**operations[0], "name": "pad", "type": "ConstantPad2D", "inputs": []})
        operations[1]["inputs"] = ["pad"]

    report, text = judged(change)
    assert report["faults"][0]["name"] == "first"
    assert report["notes"] == ["pad is a layer only on torch"]
    assert "on torch its inputs include pad, which the other backend lacks" in text


def test_single_layers_agree_and_their_fusion_does_not():
    report, text = judged(bend("inference", "outputs", (1, 1), 1e-3))
    assert report["faults"][0]["kind"] == "fused"
    assert "the error is in a fusion of layers" in text


def test_a_wrong_gradient_is_located_after_the_last_layer_that_has_one():
    def change(arrays, values, operations):
        arrays["gradients"]["first/kernel"][0, 0, 0, 0] += 1e-3
        arrays["gradients"]["norm/gamma"][2] += 1e-3

    report, text = judged(change)
    (fault,) = report["faults"]
    assert (fault["kind"], fault["name"], fault["index"]) == ("backward", "norm/gamma", (2,))
    assert fault["between"] == ["norm", "last"]
    assert "in the gradient of one of: norm, last" in text


@pytest.mark.parametrize(
    ("stage", "kind", "words"),
    [
        ("initial", "variable", "at last/kernel, in initial weights"),
        ("weights", "variable", "in weights after the steps"),
    ],
)
def test_a_variable_that_diverges(stage, kind, words):
    report, text = judged(bend(stage, "last/kernel", (3, 3), 1e-8))
    (fault,) = report["faults"]
    assert (fault["kind"], fault["name"], fault["index"]) == (kind, "last/kernel", (3, 3))
    assert words in text


def test_losses_are_checked_in_float64_and_only_reported_in_float32():
    def change(arrays, values, operations):
        values["losses"][2:] = [2.001, 1.5]
        arrays["weights"]["last/kernel"] *= 1.01
        arrays["gradients"]["last/kernel"] *= 1.01

    report, text = judged(change, dtype="float32")
    assert report["passed"]
    assert "2.0009999999999999" in text
    assert "rounding" in text
    report, text = judged(lambda arrays, values, operations: values.update(losses=[2.5, 2.25, 2.001, 1.5]))
    assert report["faults"][0]["name"] == "step 3"
    assert report["faults"][0]["values"] == (2.0, 2.001)
    assert "torch diverges from jax at the loss of step 3" in text
    assert "earlier losses and all gradients agreed, so the error is in the optimizer" in text
    grown = [2.5, 2.25 * (1 + 2e-11), 2.0 * (1 + 9e-11), 1.75 * (1 + 3e-10)]
    report, text = judged(lambda arrays, values, operations: values.update(losses=grown))
    assert report["faults"][0]["name"] == "step 4"
    assert "rounding grows from step to step" in text


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-10), ("float32", 1e-6)])
def test_the_first_loss_has_its_limit(dtype, limit):
    for factor, passed in ((0.9, True), (1.1, False)):
        report, _ = judged(
            lambda arrays, values, operations, f=factor: values.update(loss=2.5 * (1 + f * limit)), dtype=dtype
        )
        assert report["passed"] is passed
    assert report["faults"][0]["kind"] == "loss"


def test_a_loss_that_is_no_number_on_one_backend():
    report, _ = judged(lambda arrays, values, operations: values.update(losses=[2.5, math.nan, math.nan, math.nan]))
    assert report["faults"][0]["name"] == "step 2"
    assert "nan" in json.dumps(finite(report), allow_nan=False)


def test_a_result_is_restored_from_its_files(tmp_path):
    result = made("jax", lambda arrays, values, operations: values.update(losses=[0.1, math.inf]))
    result.save(tmp_path)
    back = Result.load(tmp_path, "jax")
    assert {k: v for k, v in vars(back).items() if k != "tensors"} == {
        k: v for k, v in vars(result).items() if k != "tensors"
    }
    for stage, kept in result.tensors.items():
        for a, b in zip(kept, back.tensors[stage], strict=True):
            np.testing.assert_array_equal(a.values, b.values)
            assert dataclasses.replace(a, values=None) == dataclasses.replace(b, values=None)


# One backend


def test_names_are_made_unique():
    assert numbered(["relu", "relu (2)", "conv", "relu", "relu"]) == [
        "relu",
        "relu (2)",
        "conv",
        "relu (3)",
        "relu (4)",
    ]


def test_a_layer_that_runs_twice_is_two_operations():
    inputs = keras.Input((4, 4, 3))
    relu, layer = activation("relu", name="relu"), conv(3, 3, name="conv")
    outputs = relu(layer(relu(layer(inputs))))
    operations, last = graph(keras.Model(inputs, outputs))
    assert [(operation["name"], operation["inputs"]) for operation in operations] == [
        ("conv", []),
        ("relu", ["conv"]),
        ("conv (2)", ["relu"]),
        ("relu (2)", ["conv (2)"]),
    ]
    assert last == ["relu (2)"]


def test_the_result_of_a_backend():
    """Layer outputs against `keras.Model.predict`, the loss against NumPy."""
    result = run(Spec("mnist_cnn", "float32", input_shape=(8, 8, 1), classes=3, batch=4, steps=2))
    engine.configure("float32")
    names = [operation["name"] for operation in result.operations]
    assert names == [tensor.name for tensor in result.tensors["inference_layers"]]
    assert all(set(operation["inputs"]) <= set(names[:at]) for at, operation in enumerate(result.operations))
    spec = Spec("mnist_cnn", "float32", input_shape=(8, 8, 1), classes=3)
    model, _ = build(spec)
    start(model, spec)
    images, labels = make_images(dataclasses.replace(spec, batch=4), (8, 8, 1), 3)
    batch = ((images[:4] / 255 - 0.5) / 0.25).astype("float32")
    for name, kept in zip(names, result.tensors["inference_layers"], strict=True):
        expected = keras.Model(model.inputs, model.get_layer(name).output).predict(batch, verbose=0)
        np.testing.assert_allclose(kept.values, expected.ravel()[sampled_indices(expected.size)], rtol=1e-4, atol=1e-5)
    assert result.outputs == names[-1:]
    (training_logits,) = (t.values.reshape(4, 3) for t in result.tensors["training_layers"][-1:])
    log_sums = np.log(np.exp(training_logits).sum(axis=1))
    assert result.loss == pytest.approx(float((log_sums - training_logits[range(4), labels[:4]]).mean()), rel=1e-5)
    variables = [variable.path for variable in model.trainable_variables]
    assert [tensor.name for tensor in result.tensors["gradients"]] == variables
    assert all(tensor.largest > 0 for tensor in result.tensors["gradients"])
    assert len(result.losses) == 2
    assert all(
        a.norm != b.norm for a, b in zip(result.tensors["initial"], result.tensors["weights"], strict=True) if a.norm
    )


def test_only_the_outputs_of_a_subclassed_model_are_compared():
    spec = Spec("tests.parity_models:subclass", "float32", input_shape=(8, 8, 3), batch=4, steps=2)
    result = run(spec)
    assert [tensor.name for tensor in result.tensors["inference_layers"]] == result.outputs == ["outputs"]
    assert result.notes == ["subclass is no functional model: only its outputs are compared, not its layers"]
    (training_logits,) = (t.values.reshape(4, 3) for t in result.tensors["training_layers"])
    labels = make_images(spec, (8, 8, 3), 3)[1][:4]
    log_sums = np.log(np.exp(training_logits).sum(axis=1))
    assert result.loss == pytest.approx(float((log_sums - training_logits[range(4), labels]).mean()), rel=1e-5)
    assert [tensor.shape for tensor in result.tensors["gradients"]] == [(3, 3, 3, 4), (4,), (4, 3), (3,)]
    assert all(tensor.largest > 0 for tensor in result.tensors["gradients"])
    assert len(result.losses) == 2


def test_start_replaces_initializers_without_a_numpy_equivalent():
    def build():
        inputs = keras.Input((4, 4, 3))
        orthogonal = keras.initializers.Orthogonal()
        x = keras.layers.Conv2D(2, 3, kernel_initializer=orthogonal, bias_initializer="ones", name="conv")(inputs)
        return keras.Model(inputs, x)

    kernels = []
    for seed in (0, 0, 1):
        model = build()
        start(model, Spec("a:b", seed=seed))
        kernels.append(np.array(keras.ops.convert_to_numpy(model.get_layer("conv").kernel)))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.get_layer("conv").bias), [1, 1])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    assert kernels[0].std() == pytest.approx(27**-0.5, rel=0.3)


def test_a_file_computes_in_the_dtype_of_the_spec(tmp_path):
    inputs = keras.Input((4, 4, 3))
    x = batch_norm(name="bn")(conv(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, logits(2)(keras.layers.Flatten(name="flat")(x)))
    model.save(tmp_path / "model.keras")
    (tmp_path / "double").mkdir()
    copy = with_dtype(tmp_path / "model.keras", "float64", tmp_path / "double")
    with zipfile.ZipFile(copy) as archive:
        config = json.loads(archive.read("config.json"))
    policies = {layer["config"]["name"]: layer["config"]["dtype"] for layer in config["config"]["layers"]}
    for name in ("conv", "bn", "flat", "logits"):
        assert policies[name]["config"]["name"] == "float64"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec("resnet21"), "did you mean .*resnet20"),
        (Spec("resnet20", model_kwargs={"depth_rate": 1}), "has no argument depth_rate"),
        (Spec("tests.nowhere:small"), "cannot import tests.nowhere"),
        (Spec("tests.parity_models:large"), "has no large"),
        (Spec("tests.parity_models:nothing"), "returned a NoneType; expected a keras.Model"),
        (Spec("tests.parity_models:small", model_kwargs={"pad": 1}), "cannot be called with {'pad': 1}"),
        (Spec("tests.parity_models:small", classes=3), "cannot be called with {'classes': 3}"),
        (Spec("tests.parity_models:vector"), r"inputs of shape \(None, 7\); expected one input of images"),
        (Spec("tests.parity_models:softmax", model_kwargs={"size": None}), "of any size .* give --input-shape"),
    ],
)
def test_an_invalid_model_is_a_one_line_error(spec, expected):
    with pytest.raises(UsageError, match=expected):
        build(spec)


def test_a_model_of_a_fixed_size_rejects_another():
    with pytest.raises(UsageError, match=r"reads images of \(4, 4, 3\), not of --input-shape \(8, 8, 3\)"):
        check_shape(Spec("x", input_shape=(8, 8, 3)), (None, 4, 4, 3), True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.keras"], "nowhere.keras: no such file"),
        (["weights.npz"], "expected a network of the zoo, a .keras file or module:function"),
        (["resnet20", "--input-shape", "32x32"], "as in 32x32x3, got 32x32"),
        (["resnet20", "--steps", "-1"], "--steps must be at least 0"),
        (["resnet20", "--batch", "0"], "--batch must be at least 1"),
        (["resnet20", "--learning-rate", "nan"], "--learning-rate must be a positive number"),
        (["resnet20", "--classes", "0"], "--classes must be at least 1"),
        (["resnet20", "--set", "depth"], "--set must be NAME=VALUE"),
        (["resnet20", "--backends", "jax,mxnet"], "got mxnet"),
        (["resnet20", "--backends", "jax"], "at least two backends"),
    ],
)
def test_invalid_arguments_are_one_line_errors(words, expected, capsys):
    assert __main__.main(["parity", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_fewer_than_two_backends(monkeypatch):
    monkeypatch.setattr(launcher, "installed", lambda backend: backend == "torch")
    with pytest.raises(UsageError, match=r"only torch is installed: pip install kvision-keras\[all\]"):
        parity.compare(Spec("resnet20"))


# All backends


@all_installed
def test_fifty_steps_of_resnet20_in_float64():
    """Dropout, augmentation, batch norm, momentum, weight decay and schedule: losses to 1e-10, weights to 1e-9."""
    spec = Spec("tests.parity_models:resnet20_dropout", model_kwargs={"size": 16}, steps=50, learning_rate=0.02)
    report = parity.compare(spec, **QUIET)
    assert report["passed"], parity.text(report)
    losses = np.array(list(report["losses"].values()))
    assert losses.shape == (3, 50)
    assert (np.abs(losses / losses[0] - 1) <= 1e-10).all()
    assert len(set(losses[0])) == 50
    weights = [row for row in report["rows"] if row["stage"] == "weights"]
    assert len(weights) == 2
    assert all(row["difference"] <= 1e-9 for row in weights)


@all_installed
def test_another_padding_and_another_epsilon_are_reported():
    spec = Spec("tests.parity_models:small", model_kwargs={"padding": "torch", "epsilon": "tensorflow"}, steps=1)
    report = parity.compare(spec, **QUIET)
    faults = {fault["backend"]: fault for fault in report["faults"]}
    assert report["reference"] == "jax"
    assert faults["tensorflow"]["name"] == "first_bn"
    assert faults["tensorflow"]["settings_that_differ"] == {"epsilon": [1e-5, 1e-3]}
    assert faults["torch"]["name"] == "second_conv"
    assert faults["torch"]["settings_that_differ"] == {"padding": ["valid", "same"]}
    assert faults["torch"]["inputs_on_one_backend"] == {"jax": ["second_conv_pad"], "torch": []}
    assert faults["torch"]["values"]["jax"] == pytest.approx(faults["torch"]["values"]["tensorflow"], rel=1e-2)
    assert not report["passed"]


@all_installed
def test_rounding_in_one_layer_and_a_wrong_gradient_are_reported():
    spec = Spec("tests.parity_models:small", model_kwargs={"rounding": "torch", "gradient": "tensorflow"}, steps=0)
    report = parity.compare(spec, **QUIET)
    tensorflow, torch = sorted(report["faults"], key=lambda fault: fault["backend"])
    shown = parity.text(report)
    assert "torch diverges from jax at passing, layer 3 of 10, in inference" in shown
    assert "its inputs (first_bn) agree to" in shown
    assert (torch["kind"], torch["backend"]) == ("layer", "torch")
    assert 1e-9 < torch["difference"] < 1e-7
    assert (tensorflow["kind"], tensorflow["backend"]) == ("backward", "tensorflow")
    assert tensorflow["name"].startswith("first_bn/")
    assert "passing" in tensorflow["between"]


@all_installed
def test_random_layers_of_keras_are_reported(capsys):
    words = ["parity", "tests.parity_models:keras_dropout", "--steps", "0", "--backends", "tensorflow,torch"]
    assert __main__.main(words) == 1
    shown = capsys.readouterr().out
    assert "torch diverges from tensorflow at dropout, layer 2 of 4, in training, every layer" in shown
    assert "Keras's Dropout uses the backend's random generator; kvision.layers.Dropout gives the same random" in shown


@all_installed
def test_a_network_of_the_zoo_in_float32(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert __main__.main(["parity", "resnet20", "--dtype", "float32", "--steps", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("jax, tensorflow, torch agree\n")
    report = json.loads(out.read_text())
    assert report["passed"]
    assert {row["limit"] for row in report["rows"] if row["stage"] in ("losses", "weights", "gradients")} == {None}
    assert set(report["versions"]) == set(BACKENDS)


@all_installed
def test_a_keras_file(tmp_path):
    """A `.keras` file in float64 with a softmax and its stored weights."""
    model = parity_models.softmax()
    model.save(tmp_path / "softmax.keras")
    report = parity.compare(Spec(str(tmp_path / "softmax.keras"), steps=2), ("tensorflow", "torch"), **QUIET)
    assert report["passed"], parity.text(report)
    assert report["notes"] == ["classes is a softmax, but the loss takes its outputs as logits"]


@all_installed
def test_a_model_without_classes_and_a_model_that_does_not_exist():
    report = parity.compare(Spec("tests.parity_models:maps", steps=2), ("tensorflow", "torch"), **QUIET)
    assert report["passed"], parity.text(report)
    assert report["notes"] == ["the outputs are not (n, classes): the loss is the mean of their squares"]
    with pytest.raises(UsageError, match="unknown model 'resnet21'; did you mean"):
        parity.compare(Spec("resnet21"), ("tensorflow", "torch"), **QUIET)
