"""MNIST and Fashion-MNIST as IDX files and as Keras's npz; any data set as an npz."""

import gzip
import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kvision.data import FASHION_CLASSES, DataError, load, mnist, npz, read_npz

pytestmark = pytest.mark.backend_free

TRAIN, TEST = 30, 20


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    for name in mnist.COUNTS:
        monkeypatch.setitem(mnist.COUNTS, name, (TRAIN, TEST))


def arrays(shape=(28, 28), train=TRAIN, test=TEST):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), np.uint8),
        "y_train": np.arange(train, dtype=np.uint8) % 10,
        "x_test": rng.integers(0, 256, (test, *shape), np.uint8),
        "y_test": np.arange(test, dtype=np.uint8) % 10,
    }


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, zipped=True, **made):
    folder.mkdir(parents=True)
    for file, array in zip(mnist.FILES, (made or arrays()).values(), strict=True):
        if zipped:
            (folder / f"{file}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / file).write_bytes(idx(array))
    return folder


def check(dataset, name, classes):
    assert (dataset.name, dataset.classes) == (name, classes)
    for key, array in arrays().items():
        found = getattr(dataset, key)
        np.testing.assert_array_equal(found, array[..., None] if key[0] == "x" else array)
        assert found.flags.writeable
    assert dataset.y_train.dtype == np.int32


DIGITS = tuple("0123456789")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("place", "asked", "path", "name"),
    [
        ("MNIST/raw", "mnist", "", "mnist"),
        ("MNIST/raw", "mnist", "MNIST", "mnist"),
        ("MNIST/raw", "fashion_mnist", "MNIST/raw", "mnist"),
        ("FashionMNIST/raw", "fashion_mnist", "", "fashion_mnist"),
        ("FashionMNIST/raw", "mnist", "FashionMNIST", "fashion_mnist"),
        ("fashion-mnist", "mnist", "fashion-mnist", "fashion_mnist"),
        ("somewhere", "mnist", "", "mnist"),
        ("somewhere", "fashion_mnist", "", "fashion_mnist"),
        ("somewhere", "fashion_mnist", "somewhere", "fashion_mnist"),
    ],
)
def test_the_name_of_idx_files_is_that_of_the_folder_or_the_requested_one(tmp_path, place, asked, path, name, zipped):
    write_idx(tmp_path / place, zipped)
    check(load(asked, tmp_path / path), name, FASHION_CLASSES if name == "fashion_mnist" else DIGITS)


def test_a_relative_of_mnist_keeps_its_name(tmp_path):
    write_idx(tmp_path / "KMNIST" / "raw")
    assert load("mnist", tmp_path / "KMNIST").name == "KMNIST"
    with pytest.raises(DataError, match="contains no mnist"):
        load("mnist", tmp_path)


def test_mnist_and_fashion_mnist_in_one_folder_are_found(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    write_idx(tmp_path / "FashionMNIST" / "raw")
    assert load("mnist", tmp_path).name == "mnist"
    assert load("fashion_mnist", tmp_path).name == "fashion_mnist"


def header(kind, *lengths):
    return struct.pack(f">HBB{len(lengths)}I", 0, kind, len(lengths), *lengths)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (0, None, "lacks train-images-idx3-ubyte"),
        (3, None, "lacks t10k-labels-idx1-ubyte"),
        (0, b"", "not an IDX file"),
        (0, b"\0\0\x08\x03\0\0", "not an IDX file"),
        (0, header(9, 30, 28, 28), "begins with 00000903, not 00000803"),
        (0, header(8, 30), "begins with 00000801, not 00000803"),
        (0, header(8, 30, 28, 28) + bytes(30 * 784 - 1), "takes 23520 bytes, but the file holds 23519"),
        (0, header(8, 30, 28, 28) + bytes(30 * 784 + 1), "but the file holds more"),
        (0, header(8, 2**32 - 1, 2**32 - 1, 2**32 - 1), "more than the"),
        (0, header(8, 2**21, 28, 28), "but the file holds 0"),
        (0, header(8, 29, 28, 28) + bytes(29 * 784), "is not mnist"),
        (0, header(8, 30, 28, 14) + bytes(30 * 392), "is not mnist"),
        (1, header(8, 30) + bytes([10] * 30), "labels must be 0 to 9, got 10 to 10"),
        (1, header(8, 29) + bytes(29), "30 images but 29 labels"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_broken_idx_file_raises(tmp_path, zipped, file, content, message):
    folder = write_idx(tmp_path / "mnist", zipped)
    path = folder / (mnist.FILES[file] + ".gz" * zipped)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("change", [lambda b: b[:-20], lambda b: b"not gzip", lambda b: b[:30] + b"\xff" * 30])
def test_a_broken_gzip_raises(tmp_path, change):
    folder = write_idx(tmp_path / "mnist")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot read .*train-images"):
        load("mnist", folder)


def test_a_gzip_bomb_is_read_up_to_the_size_in_its_header(tmp_path):
    folder = write_idx(tmp_path / "mnist")
    bomb = gzip.compress(header(8, 30, 28, 28) + bytes(50 << 20))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    with pytest.raises(DataError, match="but the file holds more"):
        load("mnist", folder)


def test_a_single_idx_file_raises_with_a_hint_at_its_folder(tmp_path):
    folder = write_idx(tmp_path / "mnist")
    with pytest.raises(DataError, match="give the folder"):
        load("mnist", folder / "train-images-idx3-ubyte.gz")


@pytest.mark.parametrize("path", ["mnist.npz", ""])
def test_keras_mnist_npz(tmp_path, path):
    np.savez(tmp_path / "mnist.npz", **arrays())
    check(load("mnist", tmp_path / path), "mnist", DIGITS)


def test_another_npz_of_that_name_is_not_mnist(tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays(train=TRAIN - 1))
    assert load("mnist", tmp_path).name == "mnist_npz"


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("mine", "mine"),
        ("cifar10", "cifar10_npz"),
        ("CIFAR-10", "CIFAR-10_npz"),
        ("Fashion_MNIST", "Fashion_MNIST_npz"),
    ],
)
@pytest.mark.parametrize("asked", ["cifar10", "mnist", "shapes10"])
def test_a_general_npz_is_named_after_its_file_but_not_as_a_published_data_set(tmp_path, stem, name, asked):
    made = arrays((6, 5, 3)) | {"y_train": np.arange(TRAIN)[:, None] % 4}
    np.savez_compressed(tmp_path / f"{stem}.npz", **made)
    for path in (tmp_path, tmp_path / f"{stem}.npz"):
        dataset = load(asked, path)
        assert dataset.name == name
        assert dataset.classes == DIGITS
        np.testing.assert_array_equal(dataset.x_train, made["x_train"])
        np.testing.assert_array_equal(dataset.y_train, made["y_train"][:, 0])


def test_arrays_in_fortran_order_are_read_correctly(tmp_path):
    made = {key: np.asfortranarray(array) for key, array in arrays().items()}
    np.savez(tmp_path / "mnist.npz", **made)
    check(load("mnist", tmp_path), "mnist", DIGITS)


def without(key):
    return {name: array for name, array in arrays().items() if name != key}


BAD_ARRAYS = {
    "a missing array": (without("x_test"), "x_test missing among"),
    "floating images": (arrays() | {"x_train": np.zeros((TRAIN, 4, 4), np.float32)}, "x_train: expected integers"),
    "wide images": (arrays() | {"x_train": np.zeros((TRAIN, 4, 4), np.int64)}, "expected uint8 images"),
    "vectors": (arrays() | {"x_train": np.zeros((TRAIN, 16), np.uint8)}, r"expected shape \(n, height, width\)"),
    "four channels": (arrays() | {"x_train": np.zeros((TRAIN, 4, 4, 4), np.uint8)}, "1 or 3"),
    "two sizes": (arrays() | {"x_train": np.zeros((TRAIN, 4, 4), np.uint8)}, r"have shape \(4, 4, 1\), test images"),
    "one-hot labels": (arrays() | {"y_test": np.zeros((TEST, 10), np.uint8)}, r"shape \(n,\) or \(n, 1\)"),
    "negative labels": (arrays() | {"y_test": np.full(TEST, -1)}, "expected labels 0 to"),
    "huge labels": (arrays() | {"y_test": np.full(TEST, 2**60)}, "expected labels 0 to"),
    "floating labels": (arrays() | {"y_test": np.zeros(TEST)}, "y_test: expected integers"),
    "too few labels": (arrays() | {"y_test": np.zeros(TEST - 1, np.int64)}, "20 images but 19 labels"),
    "no images": (arrays(test=0), "empty"),
    "objects": (arrays() | {"y_test": np.array([None] * TEST)}, "y_test contains Python objects"),
}


@pytest.mark.parametrize(("made", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_invalid_arrays_raise(tmp_path, made, message):
    path = tmp_path / "mine.npz"
    np.savez(path, **made)
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def npy(shape, content=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + content


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy((2**40, 28, 28)), "more than the"),
        (npy((TRAIN, 28, 28), bytes(100)), "but the file holds"),
        (npy((TRAIN, 28, 28), bytes(40 << 20)), "but the file holds"),
        (npy((TRAIN, -28, 28)), "malformed header"),
        (b"no array", "is not an array"),
        (b"", "is not an array"),
        (b"\x93NUMPY\x01\x00\x10\x00__import__('os')", "malformed header"),
    ],
    ids=["absurd shape", "too short", "bomb", "negative shape", "not npy", "empty", "code as header"],
)
def test_a_member_whose_size_contradicts_its_header_raises(tmp_path, member, message):
    np.savez(tmp_path / "mine.npz", **without("x_train"))
    with zipfile.ZipFile(tmp_path / "mine.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", member)
    with pytest.raises(DataError, match=message):
        read_npz(tmp_path / "mine.npz")


def damage(content, where, value):
    return content[:where] + value + content[where + len(value) :]


@pytest.mark.parametrize(
    "change",
    [lambda b: b"", lambda b: b"PK nothing", lambda b: b[: len(b) // 2], lambda b: damage(b, 5000, b"\xff\0\xff\0")],
    ids=["empty", "no zip", "half", "flipped"],
)
def test_a_damaged_npz_raises(tmp_path, change):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"not a readable \.npz|does not match its checksum"):
        load("mnist", path)


def test_a_members_size_is_limited(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", **arrays())
    monkeypatch.setattr(npz, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="more than the limit of 1000"):
        read_npz(tmp_path / "mine.npz")


def test_a_missing_npz():
    with pytest.raises(DataError, match="does not exist"):
        read_npz(Path("nowhere.npz"))


def test_the_real_mnist(monkeypatch):
    monkeypatch.undo()
    root = os.environ.get("KVISION_DATA")
    if not root or not (Path(root) / "mnist.npz").is_file():
        pytest.skip("KVISION_DATA names no folder with mnist.npz")
    dataset = load("mnist", root)
    assert dataset.name == "mnist"
    with np.load(Path(root) / "mnist.npz") as reference:
        np.testing.assert_array_equal(dataset.x_train[..., 0], reference["x_train"])
        np.testing.assert_array_equal(dataset.y_test, reference["y_test"])
    # The published count of each digit, and the mean and deviation used in the literature.
    assert np.bincount(dataset.y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(dataset.x_train.mean() / 255 - 0.1307) < 1e-4
    assert abs(dataset.x_train.std() / 255 - 0.3081) < 1e-4
