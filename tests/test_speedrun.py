import json
from dataclasses import replace

import numpy as np
import pytest

from apps import cifar10
from benchmarks import speedrun
from docs.update import put
from kvision import flags
from kvision.data import load
from kvision.tasks.classification import log_probabilities
from kvision.training import evaluation
from tests.datasets import write_shapes

EPOCHS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes.npz")


@pytest.fixture(scope="module")
def course(data):
    recipe = replace(cifar10.RECIPES["softmax"], epochs=EPOCHS, tta="flip")
    return speedrun.Course(recipe, load("cifar10", data))


def test_a_run_depends_on_its_seed_alone(course):
    first, other, again = (course.run(seed) for seed in (0, 1, 0))
    for key in ("accuracy", "alone", "last_loss"):
        assert first[key] == again[key]
    assert first["last_loss"] != other["last_loss"]


def test_a_run_is_the_apps(course, data, tmp_path):
    config = replace(course.recipe, data=data, output_dir=str(tmp_path / "run"), seed=1)
    expected, found = cifar10.main(config), course.run(1)
    images = expected["test_images"]
    assert found["alone"] == pytest.approx(expected["test_accuracy"], abs=1.5 / images)
    assert found["accuracy"] == pytest.approx(expected["tta_accuracy"], abs=1.5 / images)


def test_its_table_holds_every_file(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "measured").mkdir(parents=True)
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    page = tmp_path / "docs" / "engine.md"
    page.write_text("before\n<!-- speedrun:start -->\n<!-- speedrun:end -->\nafter\n")
    arguments = "--n 2 --recipe app --model softmax --epochs 1 --unsure 1.0 --no-compile --dtype float32"
    speedrun.main([*arguments.split(), "--data", data, "--write"])
    (file,) = (tmp_path / "docs" / "measured").glob("speedrun-*.json")
    report = json.loads(file.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["command"] == f"python -m benchmarks.speedrun {arguments}"
    assert f"| {report['backend']} | {report['device']} | app | 1 |" in page.read_text()
    assert page.read_text() == put(page.read_text(), "speedrun", speedrun.table([report]))


def test_a_network_without_a_recipe_is_named():
    with pytest.raises(flags.UsageError, match=r"--model resnet50 has no recipe in apps\.cifar10"):
        speedrun.recipe_of(speedrun.Config(model="resnet50"))


def test_muon_is_of_airbench_alone():
    with pytest.raises(flags.UsageError, match="--recipe muon is of airbench94 and airbench_small"):
        speedrun.recipe_of(speedrun.Config(model="softmax"))


@pytest.fixture(scope="module")
def muon_course(data):
    recipe = speedrun.recipe_of(speedrun.Config(model="airbench_small", dtype="float32", epochs=EPOCHS))
    dataset = load("cifar10", data).subset(train=200, test=100, seed=0)
    return speedrun.Course(replace(recipe, batch_size=50), dataset, with_muon=True, unsure=0.25)


def test_muons_run_learns_and_depends_on_its_seed_alone(muon_course):
    first, other, again = (muon_course.run(seed) for seed in (0, 1, 0))
    assert first["accuracy"] == again["accuracy"] and first["last_loss"] == again["last_loss"] != other["last_loss"]
    assert first["last_loss"] < 2.3 and first["accuracy"] > 0.15
    kernel, bias = (getattr(muon_course.model.get_layer("whiten_conv"), name) for name in ("kernel", "bias"))
    assert not kernel.trainable and bias.trainable


def test_views_of_the_least_sure(muon_course):
    muon_course.run(0)
    alone, some = evaluation.predict_on_device(muon_course.engine, muon_course.test), muon_course.test_logits()
    whole = evaluation.predict_on_device(muon_course.engine, muon_course.test, tta="flip_shift")
    sure = np.argsort(log_probabilities(alone).max(axis=-1))[25:]
    np.testing.assert_array_equal(some[sure], alone[sure])
    unsure = np.setdiff1d(np.arange(len(alone)), sure)
    np.testing.assert_allclose(some[unsure], whole[unsure], atol=1e-4)
