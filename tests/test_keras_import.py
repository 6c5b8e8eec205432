"""The hooks into the import of Keras: the choice of backend, and the classes of `.keras` files."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from kvision import keras_import

ROOT = Path(__file__).parent.parent
BACKEND = keras.backend.backend()
# A process in which only the backend of this one is installed, and a module run in it as a command.
ALONE = """
import runpy, sys
from importlib.machinery import PathFinder
find, hidden = PathFinder.find_spec, sys.argv[1].split(",")
PathFinder.find_spec = lambda name, *others: None if name.split(".")[0] in hidden else find(name, *others)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_alone(tmp_path, *words, present=(BACKEND,), **variables):
    hidden = ",".join(name for name in keras_import.BACKENDS if name not in present) or "-"
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    environment |= {"KERAS_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", ALONE, hidden, *map(str, words)]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("present", "default", "variable", "chosen"),
    [
        ("torch", "tensorflow", "", "torch"),
        ("jax", "tensorflow", "", "jax"),
        ("torch", "torch", "", "torch"),
        ("jax tensorflow torch", "tensorflow", "", "tensorflow"),
        ("jax tensorflow torch", "torch", "", "torch"),  # keras.json selects it
        ("jax torch", "tensorflow", "", "jax"),
        ("torch", "jax", "", "torch"),  # keras.json names a missing one
        ("torch", "numpy", "numpy", "numpy"),  # Keras has more backends
    ],
)
def test_an_installed_backend_is_chosen(monkeypatch, present, default, variable, chosen):
    monkeypatch.setattr(keras_import, "installed", present.split().__contains__)
    monkeypatch.setenv("KERAS_BACKEND", variable)
    assert keras_import.choose(default) == chosen


@pytest.mark.parametrize(
    ("present", "default", "message"),
    [
        ("", "tensorflow", "no backend is installed: expected one of jax, tensorflow, torch; install one with pip"),
        ("torch", "jax", "KERAS_BACKEND is 'jax', which is not installed: set it to torch, or install it with pip"),
    ],
)
def test_a_missing_backend_raises(monkeypatch, present, default, message):
    monkeypatch.setattr(keras_import, "installed", present.split().__contains__)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(keras_import.BackendError, match=message):
        keras_import.choose(default)


def test_a_folder_without_code_is_not_a_backend(tmp_path, monkeypatch):
    """An uninstalled package may leave a folder without code, which Python imports as a namespace."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kvision_no_backend").mkdir()
    assert not keras_import.installed("kvision_no_backend") and not keras_import.installed("kvision_none_at_all")
    assert keras_import.installed(BACKEND)


@pytest.mark.parametrize(
    ("words", "output", "line"),
    [
        (["kvision", "info", "softmax"], "7,850", "kvision: KERAS_BACKEND is not set; running on "),
        (["kvision", "weights", "verify", ROOT / "weights" / "softmax.mnist.npz"], ": ok", "running on "),
        (["apps.cifar10", "--help"], "usage:", "python -m apps.cifar10: KERAS_BACKEND is not set; running on "),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else "",
)
def test_a_command_runs_on_the_only_installed_backend(tmp_path, words, output, line):
    done = run_alone(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert output in done.stdout
    assert f"{line}{BACKEND if line.endswith('on ') else ''}" in done.stderr and "only backend" in done.stderr


def test_a_command_without_a_backend_prints_one_line(tmp_path):
    done = run_alone(tmp_path, "kvision", "info", "softmax", present=())
    assert done.returncode == 2
    assert done.stderr.startswith("kvision: no backend is installed") and done.stderr.count("\n") == 1


def test_a_variable_with_a_missing_backend_prints_one_line(tmp_path):
    missing = next(name for name in keras_import.BACKENDS if name != BACKEND)
    done = run_alone(tmp_path, "kvision", "info", "softmax", KERAS_BACKEND=missing)
    assert done.returncode == 2
    assert f"KERAS_BACKEND is '{missing}', which is not installed: set it to {BACKEND}" in done.stderr


def test_a_user_program_runs_on_the_only_installed_backend(tmp_path):
    (tmp_path / "program.py").write_text("import kvision\nprint(kvision.create_model('softmax').count_params())\n")
    done = run_alone(tmp_path, "program")
    assert done.stdout.strip() == "7850", done.stderr


def test_every_serializable_class_is_registered_in_advance():
    for module in ("layers", "training.averaging", "training.muon", "training.schedules", "tasks.classification"):
        importlib.import_module(f"kvision.{module}")
    importlib.import_module("kvision.zoo").list_models()
    registered = {
        (value.__module__, value.__name__)
        for name, value in keras.saving.get_custom_objects().items()
        if name.startswith("kvision>")
    }
    listed = {(module, name) for module, names in keras_import.SERIALIZABLE.items() for name in names}
    assert registered == listed


def test_a_placeholder_is_replaced_by_the_class():
    made = keras_import._placeholder("kvision.layers.initializers", "Constant")
    assert made.from_config({"value": 2.0}).value == 2.0
    assert type(made(3.0)) is importlib.import_module("kvision.layers").Constant
