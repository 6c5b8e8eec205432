"""Against libraries that do the same: skipped where they are not installed."""

import numpy as np
import pytest

from kvision.weights import load, save
from kvision.weights.initial import initialize
from kvision.zoo import create_model


def test_safetensors_holds_the_same_arrays(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = create_model("resnet20")
    initialize(model, 0)
    save(model, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "__manifest__"}
    safetensors.save_file(arrays, tmp_path / "a.safetensors")
    back = safetensors.load_file(tmp_path / "a.safetensors")
    assert back.keys() == {variable.path for variable in model.variables}
    initialize(model, 1)
    load(model, tmp_path / "a.npz")
    for variable in model.variables:
        np.testing.assert_array_equal(back[variable.path], np.asarray(variable))


def test_keras_cv_is_no_dependency():
    import sys

    import kvision.run  # noqa: F401

    assert "keras_cv" not in sys.modules
