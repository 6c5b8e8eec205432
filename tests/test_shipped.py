"""What the repository ships proves itself, and what its READMEs say is what their generators say."""

import importlib.util
from pathlib import Path

import keras
import pytest

from kvision.convert import verify
from kvision.weights import inspect, table

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "weights").glob("*.npz"))


def test_weights_ship():
    names = {"softmax.mnist", "mnist_cnn.mnist", "airbench_small.cifar10", "resnet20.cifar10"}
    assert names <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_give_their_probe_logits(path):
    result = verify(path)
    assert result.ok, str(result)
    assert result.difference is not None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_manifests_are_complete(path):
    manifest = inspect(path)["manifest"]
    assert path.stem == f"{manifest['architecture']}.{manifest['dataset']}"
    assert set(manifest["accuracy"]) == {"jax", "tensorflow", "torch"}
    assert max(manifest["accuracy"].values()) - min(manifest["accuracy"].values()) < 1e-9  # the same to the image
    assert manifest["licence"] == "Apache-2.0"
    assert manifest["preprocessing"]["size"]
    assert "python -m apps." in manifest["provenance"]["command"]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="builds the whole zoo, with the same counts everywhere")
def test_readmes_are_up_to_date():
    found = importlib.util.spec_from_file_location("update", ROOT / "docs" / "update.py")
    update = importlib.util.module_from_spec(found)
    found.loader.exec_module(update)
    text = (ROOT / "README.md").read_text()
    assert text == update.readme(text), "run: python docs/update.py"
    assert table(ROOT / "weights") in (ROOT / "weights" / "README.md").read_text(), "run: python docs/update.py"
