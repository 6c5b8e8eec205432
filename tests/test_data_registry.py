"""Search order of `load`: the given path alone, else the Keras cache, ./data, the network."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvision.data import NAMES, DataError, DataUnavailable, cifar, keras_cache, load, mnist


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty Keras cache and an empty folder to work in, and published data sets with 5 and 1 images."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)
    for counts in (cifar.COUNTS, mnist.COUNTS):
        for name in counts:
            monkeypatch.setitem(counts, name, (5, 1))
    return tmp_path


def write_cifar10(folder):
    folder.mkdir(parents=True)
    for name in ["test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6))]:
        (folder / name).write_bytes(bytes(3073))


def write_mnist(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"x_train": np.ones((5, 28, 28), np.uint8), "x_test": np.ones((1, 28, 28), np.uint8)}
    np.savez(path, **made, y_train=np.arange(5) + 5, y_test=np.arange(1))


def write_fashion(folder):
    folder.mkdir(parents=True)
    for name, count in zip(mnist.FILES, (5, 5, 1, 1), strict=True):
        lengths = (count, 28, 28) if "idx3" in name else (count,)
        header = bytes([0, 0, 8, len(lengths)]) + np.array(lengths, ">u4").tobytes()
        (folder / name).write_bytes(header + b"\1" * int(np.prod(lengths)))


PLACES = {
    "Keras, folder": ("cifar10", "keras/datasets/cifar-10-batches-bin", write_cifar10),
    "Keras 3.15, folder": (
        "cifar10",
        "keras/datasets/cifar-10-batches-py-target/cifar-10-batches-bin",
        write_cifar10,
    ),
    "Keras, MNIST": ("mnist", "keras/datasets/mnist.npz", write_mnist),
    "Keras, Fashion-MNIST": ("fashion_mnist", "keras/datasets/fashion-mnist", write_fashion),
    "./data, CIFAR-10": ("cifar10", "data/cifar-10-batches-bin", write_cifar10),
    "./data, MNIST": ("mnist", "data/MNIST/raw", write_fashion),
    "./data, Fashion-MNIST": ("fashion_mnist", "data/FashionMNIST/raw", write_fashion),
}


@pytest.mark.parametrize(("name", "place", "write"), PLACES.values(), ids=PLACES.keys())
def test_without_a_path_the_default_locations_are_searched(home, name, place, write):
    write(home / place)
    dataset = load(name, download=False)
    assert dataset.name == name
    assert (home / place).samefile(dataset.source)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_a_missing_data_set_raises_with_a_remedy(home, name):
    with pytest.raises(DataUnavailable, match="give a path to it, or put") as caught:
        load(name, download=False)
    assert str(keras_cache()) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cache_precedes_the_data_folder(home):
    write_mnist(home / "keras" / "datasets" / "mnist.npz")
    write_mnist(home / "data" / "mnist.npz")
    assert load("mnist", download=False).source == str(home / "keras" / "datasets" / "mnist.npz")


def test_a_broken_candidate_is_skipped_and_logged(home):
    broken = home / "keras" / "datasets" / "mnist.npz"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PK broken")
    write_mnist(home / "data" / "mnist.npz")
    said = []
    assert load("mnist", download=False, log=said.append).source == str(Path("data/mnist.npz"))
    assert len(said) == 1 and str(broken) in said[0]


def test_an_incomplete_mnist_in_the_cache_is_not_mnist(home, monkeypatch):
    write_mnist(home / "keras" / "datasets" / "mnist.npz")
    monkeypatch.setitem(mnist.COUNTS, "mnist", (60_000, 10_000))
    said = []
    with pytest.raises(DataUnavailable):
        load("mnist", download=False, log=said.append)
    assert "not the complete mnist" in said[0]


def test_a_given_path_is_the_only_candidate(home):
    write_mnist(home / "keras" / "datasets" / "mnist.npz")
    (home / "empty").mkdir()
    with pytest.raises(DataError, match="empty contains no mnist") as caught:
        load("mnist", home / "empty")
    assert not isinstance(caught.value, DataUnavailable)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "missing does not exist"),
        ("", "path of the data is empty"),
        ("  ", "path of the data is empty"),
        ("empty", "contains no cifar10, no .npz and no images by class, but nothing"),
        ("notes.txt", "is not a data set: expected"),
        ("text", "contains no cifar10.*but readme"),
        ("mnist", r"contains no cifar10.*but mnist\.npz; expected cifar-10-batches-py/ or cifar-10-batches-bin/"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_an_invalid_path_raises_a_one_line_error(home, path, message, kind):
    (home / "empty").mkdir()
    (home / "text").mkdir()
    (home / "text" / "readme").write_text("x")
    (home / "notes.txt").write_text("x")
    write_mnist(home / "mnist" / "mnist.npz")
    if kind is Path and not path.strip():
        path, message = "missing/", "does not exist"
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", kind(path))
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, DataUnavailable)


def test_one_folder_may_contain_several_data_sets(home):
    write_cifar10(home / "all" / "cifar-10-batches-bin")
    write_mnist(home / "all" / "mnist.npz")
    write_fashion(home / "all" / "FashionMNIST" / "raw")
    for name in ("cifar10", "mnist", "fashion_mnist"):
        assert load(name, home / "all").name == name


def test_a_path_to_another_data_set_loads_that_one(home):
    write_cifar10(home / "cifar-10-batches-bin")
    assert load("mnist", home / "cifar-10-batches-bin").name == "cifar10"


def test_the_home_directory_is_expanded(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    write_mnist(home / "mnist.npz")
    assert load("mnist", "~/mnist.npz").name == "mnist"


def test_an_unknown_name_raises_with_the_known_names():
    with pytest.raises(DataError, match="unknown data set 'cifar11'; expected one of cifar10, cifar100, mnist"):
        load("cifar11")
    assert set(NAMES) >= {"cifar10", "cifar100", "mnist", "fashion_mnist", "shapes10", "digits", "synthetic_digits"}


def test_the_cache_is_that_of_keras(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "k"))
    assert keras_cache() == tmp_path / "k" / "datasets"
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keras_cache() == tmp_path / ".keras" / "datasets"


def test_importing_the_package_imports_neither_keras_nor_a_backend():
    heavy = ("keras", "jax", "torch", "tensorflow", "sklearn")
    code = f"import sys, kvision.data; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
