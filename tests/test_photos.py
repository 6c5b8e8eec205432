"""The apps on folders of ordinary photos: the sizes they get, what they take, and what is told."""

import io
import json
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps import cifar10, mnist, transfer
from kvision import flags, memory, zoo
from kvision.config import Config, arguments_of, public
from kvision.convert import pretrained_weights
from kvision.data import Dataset
from kvision.data.preprocessing import Preprocessing
from kvision.experiment import build, build_schedule, command, learning_rates
from kvision.layers import skip_init
from kvision.run_data import build_preprocessing, data_on, fit_batch, image_size, read_data, sample
from kvision.training import evaluation
from kvision.weights import inspect

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photos of several sizes and both orientations, light ones and dark ones."""
    root = tmp_path_factory.mktemp("photos") / "home of somebody"
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / name).mkdir(parents=True)
        for i in range(15):
            size = (150, 112) if i % 3 else (112, 150)
            pixels = generator.integers(low, low + 128, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    return root


def dataset_of(height, width, classes=2, n=6) -> Dataset:
    images = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)
    labels = np.sort(np.arange(n, dtype=np.int32) % classes)
    return Dataset("noise", images, labels, images, labels, tuple(map(str, range(classes))), "drawn")


def weights_of(name: str) -> str:
    if name not in pretrained_weights():
        pytest.skip(f"{name} does not lie here")
    return name


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (Config(model="resnet50"), 224),
        (Config(model="inception_v3"), 299),
        (Config(model="airbench_small"), 32),
        (Config(model="mnist_cnn"), 28),
        (Config(model="resnet50", image_size=96), 96),
    ],
)
def test_images_are_brought_to_the_networks_own_size_or_the_one_asked_for(config, size):
    assert image_size(config) == (size, size)


def test_weights_say_the_size_that_they_were_made_for(tmp_path):
    assert image_size(Config(model="resnet50", weights=weights_of("mnist_cnn.mnist"))) == (28, 28)


@pytest.mark.parametrize(("model", "shape"), [("airbench_small", (32, 32, 3)), ("vgg11_bn", (224, 224, 3))])
def test_a_folder_is_never_read_at_a_cameras_size(photos, model, shape):
    told = []
    dataset, note = read_data(
        Config(model=model, data=str(photos), max_train_samples=4, max_test_samples=2), ("cifar10",), told.append
    )
    assert dataset.input_shape == shape and len(dataset.x_train) == 4 and note is None
    assert len(told) == 1 and f"6 images of {shape[0]}x{shape[1]} pixels take" in told[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data-memory", "0.00001"], "(--image-size"),
        (["--image-size", "0"], "--image-size must be from 1 to 4096 pixels"),
        (
            ["--model", "mlp", "--image-size", "300"],
            "values, more than 67,108,864, because it grows with the image; its default image size is 28x28",
        ),
        (["--model", "mnist_cnn", "--image-size", "400"], "its default image size is 28x28: --image-size 28"),
        (["--new-head"], "--new-head requires --weights"),
    ],
)
def test_what_would_not_fit_ends_in_one_line_with_the_cure(photos, tmp_path, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(tmp_path)
    assert command(cifar10.main, cifar10.RECIPES, "", ["--data", str(photos), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error


def test_image_size_is_of_folders(tmp_path):
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(flags.UsageError, match="--image-size applies to folders of images; those of a are 8x8"):
        read_data(Config(data=str(tmp_path / "a.npz"), image_size=9), ("cifar10",))
    assert read_data(Config(data=str(tmp_path / "a.npz"), image_size=8), ("cifar10",))[0].input_shape == (8, 8, 3)


@pytest.mark.parametrize("model", ["mlp", "mnist_cnn"])
def test_a_kernel_that_grows_with_the_image_is_refused_before_it_is_made(model):
    with pytest.raises(flags.UsageError, match=rf"{model} cannot be built for noise: one of its kernels would have"):
        build(Config(model=model), dataset_of(374, 500))


def test_a_network_of_the_published_size_has_its_kernels():
    """VGG's first dense layer has 102,760,448 weights, as published."""
    assert memory.largest_kernel((224, 224, 3), zoo.default_shape("vgg16")) is None
    assert memory.largest_kernel((256, 224, 3), zoo.default_shape("vgg16")) == memory.LARGEST_KERNEL


@pytest.mark.parametrize(
    ("shape", "batch", "expected"),
    [((224, 224, 3), 128, 16), ((224, 224, 3), 16, 16), ((32, 32, 3), 100_000, 100_000), ((64, 64, 3), 10**6, 10**6)],
)
def test_a_batch_of_large_images_fits_the_memory(shape, batch, expected):
    with skip_init():
        model = zoo.build_model("squeezenet1_1", shape, 2)
    each = memory.activation_bytes(model)
    assert memory.batch_within(model, batch) == expected
    assert expected == batch or expected * each <= memory.ACTIVATIONS < 2 * expected * each
    told = []
    config = fit_batch(Config(batch_size=batch, learning_rate=0.4), model, 10**9, told.append)
    assert config.batch_size == expected and config.learning_rate == pytest.approx(0.4 * expected / batch)
    assert bool(told) is (expected != batch) and all(f"give --batch-size {batch} to use it" in line for line in told)
    for left in ({"fit_batch": False}, {"gradient_accumulation_steps": 2}):
        assert fit_batch(Config(batch_size=batch, **left), model, 10**9).batch_size == batch
    assert memory.batch_within(model, batch, budget=1) in (1, batch)


def test_a_batch_size_that_is_given_stays(monkeypatch):
    seen = []
    for argv in ([], ["--batch-size", "7"]):
        command(seen.append, cifar10.RECIPES, "", argv)
    assert [config.fit_batch for config in seen] == [True, False]


def test_activations_are_counted_layer_by_layer():
    with skip_init():
        model = zoo.build_model("softmax", (4, 5, 3), 2)
    assert memory.activation_bytes(model) == 4 * sum(int(np.prod(layer.output.shape[1:])) for layer in model.layers)
    assert memory.activation_bytes(model) >= 4 * (60 + 60 + 2)


def test_large_images_have_one_copy():
    assert data_on(Config(), dataset_of(32, 32)) == "auto"
    assert data_on(Config(), dataset_of(65, 64)) in ("host", "auto")  # the second on an accelerator
    assert data_on(Config(data_on="device"), dataset_of(65, 64)) == "device"


@pytest.mark.parametrize(("side", "n", "largest"), [(32, 501, 500), (224, 25, 10), (2000, 2, 1)])
def test_predictions_are_of_a_bounded_number_of_pixels(side, n, largest):
    """500 photos at once took gigabytes."""
    seen = []

    class Engine:
        def predict(self, images):
            seen.append(len(images))
            return images[:, 0, 0]

    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    found = evaluation.predict(Engine(), images, Preprocessing(scale=1.0))
    assert set(seen) == {largest}
    np.testing.assert_array_equal(found, images[:, 0, 0])
    with pytest.raises(TypeError, match="must be uint8, 0 to 255, got float64"):
        evaluation.predict(Engine(), images / 255, Preprocessing())


def test_statistics_of_parts_are_those_of_all(monkeypatch):
    dataset = dataset_of(300, 400, n=14)  # more than one part
    found = build_preprocessing(dataset)
    values = dataset.x_train.reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, values.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found.std, values.std(axis=0), atol=1e-4)


def test_whitening_sees_few_pixels_of_every_class():
    dataset = dataset_of(10, 10, classes=3, n=30)
    np.testing.assert_array_equal(sample(dataset, 100 * 100), dataset.x_train)
    some = sample(dataset, 6 * 100)
    assert len(some) == 6
    numbers = [int(np.flatnonzero((dataset.x_train == image).all(axis=(1, 2, 3)))[0]) for image in some]
    assert set(dataset.y_train[numbers]) == {0, 1, 2}
    mixed = replace(dataset, y_train=np.arange(30, dtype=np.int32) % 3)
    np.testing.assert_array_equal(sample(mixed, 6 * 100), mixed.x_train[:6])


@pytest.fixture(scope="module")
def ran(photos, tmp_path_factory) -> dict:
    """The default network on photos, as a user begins."""
    out = str(tmp_path_factory.mktemp("run") / "first")
    found = []
    argv = ["--data", str(photos), "--epochs", "2", "--batch-size", "12", "--output-dir", out]
    assert command(lambda config: found.append(cifar10.main(config)), cifar10.RECIPES, "", argv) == 0
    return found[0]


def test_the_command_says_data_and_nothing_shows_a_path_of_this_machine(ran, photos):
    """Without --data the command trained on something else."""
    words = shlex.split(ran["command"])
    assert words[words.index("--data") + 1] == "..."
    folder = Path(ran["folder"])
    report, metrics = (folder / "report.html").read_text(), (folder / "metrics.json").read_text()
    manifest = inspect(folder / "weights.npz")["manifest"]
    assert "--data ..." in report and "--data ..." in metrics and "--data ..." in manifest["provenance"]["command"]
    for text in (report, metrics, json.dumps(manifest)):
        assert str(photos.parent) not in text and str(folder.parent) not in text
    assert ran["source"] == photos.name and manifest["input_size"] == [32, 32]


def test_the_learning_rate_is_drawn_step_by_step(ran):
    report = (Path(ran["folder"]) / "report.html").read_text()
    assert report.count("<title>learning rate: ") == 4  # two steps in each of two epochs


def test_rates_are_the_schedules():
    schedule = build_schedule(Config(learning_rate=0.3, warmup=0.5, schedule="linear"), 20)
    places, rates = learning_rates(schedule, 20, 5)
    assert places == [step / 5 for step in range(20)]
    assert rates == pytest.approx([float(schedule(step)) for step in range(20)]) and max(rates) == pytest.approx(0.3)
    places, rates = learning_rates(schedule, 10_000, 5, most=11)
    assert len(places) == len(rates) == 11 and places[0] == 0 and places[-1] == 9_999 / 5
    assert learning_rates(schedule, 0, 5) == ([], [])


def test_public_names_what_ships_and_hides_what_does_not():
    config = Config(
        data="/home/a", weights="/home/b.npz", output_dir="/home/c", compile_cache="/home/d", model="resnet20"
    )
    assert {key: value for key, value in public(config).items() if value == "..."} == dict.fromkeys(
        ("data", "weights", "output_dir", "compile_cache"), "..."
    )
    assert arguments_of(config) == ["--model", "resnet20", "--data", "...", "--weights", "..."]
    if "resnet20.cifar10" in pretrained_weights():
        config = Config(weights="resnet20.cifar10", model="resnet20")
        assert arguments_of(config) == ["--model", "resnet20", "--weights", "resnet20.cifar10"]
    assert public(Config())["data"] is None and public(Config())["compile_cache"] == "auto"


def test_weights_by_name_ask_for_a_new_head_of_other_classes(photos, tmp_path, capsys):
    weights = weights_of("airbench_small.cifar10")
    argv = ["--data", str(photos), "--weights", weights, "--epochs", "0", "--output-dir", str(tmp_path / "run")]
    assert command(cifar10.main, cifar10.RECIPES, "", argv) == 2
    error = capsys.readouterr().err
    assert f"--weights {weights} have 10 classes, and home of somebody has 2: give --new-head" in error
    assert command(cifar10.main, cifar10.RECIPES, "", [*argv[:-1], str(tmp_path / "new"), "--new-head"]) == 0
    metrics = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert f"--weights {weights} --new-head" in metrics["command"]
    with np.load(pretrained_weights()[weights]) as old, np.load(tmp_path / "new" / "weights.npz") as new:
        assert new["logits/kernel"].shape[-1] == 2
        for name in set(old.files) - {"__manifest__", "logits/kernel"}:
            np.testing.assert_array_equal(old[name], new[name])


def test_transfer_takes_two_classes(photos, tmp_path, capsys):
    weights = weights_of("airbench_small.cifar10")
    argv = ["--data", str(photos), "--per-class", "5", "--epochs", "1", "--output-dir", str(tmp_path / "run")]
    run = lambda *more: command(  # noqa: E731
        transfer.main,
        {"vgg11_bn": transfer.RECIPE},
        "",
        [*argv, *more],
        otherwise=replace(transfer.RECIPE, hidden=None),
    )
    assert run() == 2
    error = capsys.readouterr().err
    assert (
        "has 2 classes, too few to split into source and target classes: give --weights" in error and weights in error
    )
    assert run("--weights", weights) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["margin"] == metrics["head_accuracy"] - metrics["scratch_accuracy"]
    assert "Transfer to 2 classes of home of somebody from 5 images each" in capsys.readouterr().out
    with np.load(pretrained_weights()[weights]) as old, np.load(tmp_path / "run" / "head" / "weights.npz") as new:
        assert all(np.array_equal(old[name], new[name]) for name in old.files if name.startswith("stage"))


def test_weights_that_know_the_classes_carry_over_to_the_others(monkeypatch):
    dataset = dataset_of(8, 8, classes=5, n=50)
    config = replace(transfer.RECIPE, weights="x", per_class=3)
    monkeypatch.setattr(transfer, "find", lambda weights: weights)
    monkeypatch.setattr(transfer, "inspect", lambda weights: {"manifest": {"classes": ["0", "1"]}})
    source, target = transfer.split(config, dataset)
    assert source.classes == ("0", "1") and target.classes == ("2", "3", "4") and len(target.x_train) == 9
    monkeypatch.setattr(transfer, "inspect", lambda weights: {"manifest": {"classes": ["cat", "dog"]}})
    source, target = transfer.split(config, dataset)
    assert source is None and target.classes == dataset.classes and len(target.x_train) == 15


@pytest.mark.parametrize("config", [Config, transfer.TransferConfig])
def test_every_flag_of_every_run_is_in_one_group(config, capsys):
    grouped = [name for names in config.GROUPS.values() for name in names.split()]
    assert sorted(grouped) == sorted(set(grouped))
    known = {item.name for item in fields(Config) if "help" in item.metadata}
    assert set(grouped) == known
    with pytest.raises(SystemExit):
        flags.parse(config, ["--help", "all"], prog="x", description="", more={"model": "such as these"})
    text = capsys.readouterr().out
    for title in config.GROUPS:
        assert f"\n{title}:\n" in text
    assert ("--per-class" in text) is (config is not Config)
    words = " ".join(text.split())
    assert "optimizer: sgd, adam, adamw (default: sgd)" in words and "how crops are padded: zero, reflect" in words
    assert "such as these (default: softmax)" in words and "usage: x [--flag VALUE ...]" in words


def test_a_pipe_has_every_line_at_once(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), line_buffering=False)
    monkeypatch.setattr(sys, "stdout", stream)
    assert command(lambda config: print("begun"), mnist.RECIPES, "", []) == 0
    assert stream.buffer.getvalue() == b"begun\n"


def test_the_readme_shows_the_users_first_command():
    text = (ROOT / "README.md").read_text()
    assert "\nKERAS_BACKEND=jax python -m apps.cifar10" in text and "--image-size" in text
