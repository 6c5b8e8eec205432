import json
from dataclasses import replace

import pytest

from apps import cifar10
from benchmarks import speedrun
from docs.update import put
from kvision import flags
from kvision.data import load
from tests.drawn import write_shapes

EPOCHS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes.npz")


@pytest.fixture(scope="module")
def course(data):
    recipe = replace(cifar10.RECIPES["softmax"], epochs=EPOCHS, views="mirror")
    return speedrun.Course(recipe, load("cifar10", data))


def test_a_run_depends_on_its_seed_alone(course):
    first, other, again = (course.run(seed) for seed in (0, 1, 0))
    for key in ("accuracy", "alone", "last_loss"):
        assert first[key] == again[key]
    assert first["last_loss"] != other["last_loss"]


def test_a_run_is_the_apps(course, data, tmp_path):
    config = replace(course.recipe, data=data, out=str(tmp_path / "run"), seed=1)
    expected, found = cifar10.main(config), course.run(1)
    images = expected["test_images"]
    assert found["alone"] == pytest.approx(expected["test_accuracy"], abs=1.5 / images)
    assert found["accuracy"] == pytest.approx(expected["views_accuracy"], abs=1.5 / images)


def test_its_table_holds_every_file(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "measured").mkdir(parents=True)
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    page = tmp_path / "docs" / "engine.md"
    page.write_text("before\n<!-- speedrun:start -->\n<!-- speedrun:end -->\nafter\n")
    speedrun.main(["--n", "2", "--model", "softmax", "--epochs", "1", "--data", data, "--dtype", "float32", "--write"])
    (file,) = (tmp_path / "docs" / "measured").glob("speedrun-*.json")
    report = json.loads(file.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["command"] == "python -m benchmarks.speedrun --n 2 --model softmax --epochs 1 --dtype float32"
    assert f"| {report['backend']} | {report['device']} | 1 |" in page.read_text()
    assert page.read_text() == put(page.read_text(), "speedrun", speedrun.table([report]))


def test_a_network_without_a_recipe_is_named():
    with pytest.raises(flags.UsageError, match=r"--model resnet50 has no recipe in apps\.cifar10"):
        speedrun.recipe_of(speedrun.Config(model="resnet50"))
