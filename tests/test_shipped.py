"""The pretrained weights reproduce their logits, and the generated parts of the READMEs are up to date."""

import hashlib
import importlib
import importlib.util
import json
import shlex
from pathlib import Path

import keras
import pytest

from kvision import flags
from kvision.convert import verify
from kvision.weights import inspect, table
from kvision.weights.archive import Archive, digest
from kvision.weights.npz import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = sorted((ROOT / "weights").glob("*.npz"))
# sha256 of the arrays, and of the probe logits in the manifest, as each file was made; a manifest may be edited later.
AS_MADE = {
    "airbench_small.cifar10": ("10e16f6ca70071b4", "37ee299922369701"),
    "mnist_cnn.mnist": ("ef224a7e3c32b8ca", "228813021379dc18"),
    "resnet20.cifar10": ("056ff837af4942f2", "5db026fe4a032af3"),
    "softmax.mnist": ("ffe4b76304818336", "75944a2afb39779d"),
}


@pytest.mark.parametrize("name", AS_MADE)
def test_pretrained_arrays_and_logits_are_those_that_were_made(name):
    with Archive(ROOT / "weights" / f"{name}.npz") as archive:
        arrays = {key: archive.read(key) for key in archive.members}
    manifest = json.loads(bytes(arrays.pop(MANIFEST)))
    text = "".join(f"{key} {digest(array)}\n" for key, array in sorted(arrays.items()))
    probe = json.dumps(manifest["probe"], sort_keys=True)
    assert tuple(hashlib.sha256(part.encode()).hexdigest()[:16] for part in (text, probe)) == AS_MADE[name]


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_pretrained_weights_give_their_probe_logits(path):
    result = verify(path)
    assert result.ok, str(result)
    assert result.difference is not None


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_the_command_of_pretrained_weights_parses(path):
    """The flags in the manifest are those of the app today, and describe its network."""
    manifest = inspect(path)["manifest"]
    backend, python, dash_m, module, *argv = shlex.split(manifest["provenance"]["command"])
    assert backend.startswith("KERAS_BACKEND=") and (python, dash_m) == ("python", "-m")
    recipe = importlib.import_module(module).RECIPES[manifest["architecture"]]
    given = flags.parse(type(recipe), argv, prog="x", description="")
    assert given["model"] == manifest["architecture"]
    assert {name: getattr(recipe, name) for name in given} | {"save_every": None} == given | {"save_every": None}


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_pretrained_manifests_are_complete(path):
    manifest = inspect(path)["manifest"]
    assert path.stem == f"{manifest['architecture']}.{manifest['dataset']}"
    assert set(manifest["accuracy"]) == {"jax", "tensorflow", "torch"}
    assert max(manifest["accuracy"].values()) - min(manifest["accuracy"].values()) < 1e-9  # the same to the image
    assert manifest["license"] == "Apache-2.0"
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
