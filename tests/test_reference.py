"""Comparison with equivalent libraries; skipped if they are not installed."""

import ml_dtypes
import numpy as np
import pytest

from kvision.convert import create_model, safetensors
from kvision.weights import load, save
from kvision.weights.initialization import initialize


def test_safetensors_reads_the_same_arrays(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    model = create_model("resnet20")
    initialize(model, 0)
    save(model, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "__manifest__"}
    theirs.save_file(arrays, tmp_path / "a.safetensors")
    back = theirs.load_file(tmp_path / "a.safetensors")
    assert back.keys() == {variable.path for variable in model.variables}
    initialize(model, 1)
    load(model, tmp_path / "a.npz")
    for variable in model.variables:
        np.testing.assert_array_equal(back[variable.path], np.asarray(variable))


def test_safetensors_agrees(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "brain": np.arange(3).astype(ml_dtypes.bfloat16),
        "count": np.array(-7, np.int64),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), np.float16),
    }
    safetensors.write(tmp_path / "ours", arrays)
    theirs.save_file(arrays, tmp_path / "theirs")
    for read in (theirs.load_file(tmp_path / "ours"), safetensors.read(tmp_path / "theirs")):
        assert {k: (a.dtype, a.shape, a.tobytes()) for k, a in read.items()} == {
            k: (a.dtype, a.shape, a.tobytes()) for k, a in arrays.items()
        }


def test_keras_cv_is_not_a_dependency():
    import sys

    import kvision.experiment  # noqa: F401

    assert "keras_cv" not in sys.modules
