"""CIFAR's layouts, from small files written as the publisher writes them; invalid ones are rejected."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kvision.data import CIFAR10_CLASSES, CIFAR100_CLASSES, DataError, cifar, load, tar
from kvision.data.unpickle import unpickle

pytestmark = pytest.mark.backend_free

TRAIN, TEST = 50, 10


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    for name in cifar.COUNTS:
        monkeypatch.setitem(cifar.COUNTS, name, (TRAIN, TEST))


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def rows(x):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2).reshape(len(x), 3072))


def expected(classes):
    x = images(TRAIN, 0), images(TEST, 1)
    y = [np.arange(len(part)) * 7 % classes for part in x]
    return x, y


def write_python(folder, classes=10, protocol=2, text=str.encode):
    """The Python version; `text` makes its strings: bytes by default, as in Python 2."""
    folder.mkdir(parents=True)
    (x_train, x_test), (y_train, y_test) = expected(classes)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value, protocol))

    def batch(x, y, key):
        return {
            text("data"): rows(x),
            text(key): y.tolist(),
            text("batch_label"): text("some batch"),
            text("filenames"): [text(f"{i}.png") for i in range(len(y))],
        }

    if classes == 10:
        for i in range(5):
            part = slice(i * 10, i * 10 + 10)
            write(f"data_batch_{i + 1}", batch(x_train[part], y_train[part], "labels"))
        write("test_batch", batch(x_test, y_test, "labels"))
        write("batches.meta", {text("label_names"): [text(name) for name in CIFAR10_CLASSES], text("num"): 3072})
    else:
        write("train", batch(x_train, y_train, "fine_labels") | {text("coarse_labels"): [0] * TRAIN})
        write("test", batch(x_test, y_test, "fine_labels") | {text("coarse_labels"): [0] * TEST})
        write("meta", {text("fine_label_names"): [text(name) for name in CIFAR100_CLASSES]})
    return folder


def write_binary(folder, classes=10):
    folder.mkdir(parents=True)
    (x_train, x_test), (y_train, y_test) = expected(classes)

    def write(name, x, y):
        labels = y[:, None] if classes == 10 else np.stack([y // 5, y], 1)
        (folder / name).write_bytes(np.concatenate([labels.astype(np.uint8), rows(x)], 1).tobytes())

    if classes == 10:
        for i in range(5):
            part = slice(i * 10, i * 10 + 10)
            write(f"data_batch_{i + 1}.bin", x_train[part], y_train[part])
        write("test_batch.bin", x_test, y_test)
        (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    else:
        write("train.bin", x_train, y_train)
        write("test.bin", x_test, y_test)
        (folder / "fine_label_names.txt").write_text("\n".join(CIFAR100_CLASSES) + "\n")
    return folder


def pack(folder, path, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, folder.name)
    return path


def check(dataset, name, classes):
    (x_train, x_test), (y_train, y_test) = expected(len(classes))
    assert (dataset.name, dataset.classes) == (name, classes)
    np.testing.assert_array_equal(dataset.x_train, x_train)
    np.testing.assert_array_equal(dataset.x_test, x_test)
    np.testing.assert_array_equal(dataset.y_train, y_train)
    np.testing.assert_array_equal(dataset.y_test, y_test)
    # torch warns about read-only arrays.
    assert dataset.x_train.flags.writeable and dataset.x_train.flags.c_contiguous


@pytest.mark.parametrize("classes", [CIFAR10_CLASSES, CIFAR100_CLASSES], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("packed", ["folder", "one level down", "tar.gz", "tar.gz one level down", "tar"])
def test_every_published_layout_is_read(tmp_path, classes, version, packed):
    name = f"cifar{len(classes)}"
    inner = {
        ("cifar10", "python"): "cifar-10-batches-py",
        ("cifar10", "binary"): "cifar-10-batches-bin",
        ("cifar100", "python"): "cifar-100-python",
        ("cifar100", "binary"): "cifar-100-binary",
    }[name, version]
    write = write_python if version == "python" else write_binary
    folder = write(tmp_path / "made" / inner, len(classes))
    if packed == "folder":
        path = folder
    elif packed == "one level down":
        path = folder.parent
    else:
        (tmp_path / "kept").mkdir()
        number = len(classes)
        path = tmp_path / "kept" / f"cifar-{number}-{version}.{packed.split()[0]}"
        pack(folder, path, "w" if packed == "tar" else "w:gz")
        path = path.parent if packed.endswith("down") else path
    check(load(name, path), name, classes)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("text", [str, str.encode], ids=["str", "bytes"])
def test_every_pickle_protocol_is_read(tmp_path, protocol, text):
    check(
        load("cifar10", write_python(tmp_path / "x", protocol=protocol, text=text)),
        "cifar10",
        CIFAR10_CLASSES,
    )


def test_a_python_2_pickle_is_read():
    # Written by hand like the published files: protocol 2, byte strings, NumPy's old module, its version 1 state.
    content = bytes(range(6))
    blob = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06" + content + b"tbU\x06labelsq\x08]q\x09(K\x05K\x02eu."
    )
    reference = pickle.loads(blob, encoding="bytes")
    found = unpickle(blob, "x")
    assert found["labels"] == reference[b"labels"] == [5, 2]
    np.testing.assert_array_equal(found["data"], reference[b"data"])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_equal_those_of_pickle(order, protocol):
    array = np.asarray(np.arange(12, dtype=np.uint8).reshape(3, 4), order=order)
    found = unpickle(pickle.dumps({"data": array, "labels": np.arange(3)}, protocol), "x")
    np.testing.assert_array_equal(found["data"], array)
    np.testing.assert_array_equal(found["labels"], np.arange(3))


class Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, bytearray, np.load, np.frombuffer])
def test_a_pickle_with_a_call_is_rejected_and_not_executed(tmp_path, protocol, function):
    folder = write_python(tmp_path / "cifar-10-batches-py")
    proof = tmp_path / "ran"
    argument = f"touch {proof}" if function is os.system else f"open({str(proof)!r}, 'w')"
    bad = pickle.dumps({"data": Exploit(function, argument), "labels": []}, protocol)
    (folder / "data_batch_1").write_bytes(bad)
    with pytest.raises(DataError, match=r"data_batch_1.*call of.*not executed"):
        load("cifar10", folder)
    assert not proof.exists()


BAD_PICKLES = {
    "an object": pickle.dumps({"data": Path("x")}),
    "a set": pickle.dumps({"data": {1, 2}}),
    "a float": pickle.dumps({"data": 1.5}),
    "an object array": pickle.dumps({"data": np.array([None, 1], object)}),
    "a float array": pickle.dumps({"data": np.zeros(3)}),
    "a persistent id": b"Pname\n.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "a list": pickle.dumps([1, 2]),
    "text": b"hello world",
    "nothing": b"",
    "no end": pickle.dumps({"data": 1})[:-1],
    "truncated": pickle.dumps({"data": np.zeros((5, 3072), np.uint8)}, 2)[:4000],
    "an empty stack": b"s.",
    "a missing mark": b"t.",
    "an unknown memo": b"h\x07.",
    "a list as key": b"}](]]u.",
    "a deep tuple as key": b"})" + b"\x85" * 100_000 + b"Ns.",
    "a false length": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "a false byte array": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "a false memo index": b"}r\xff\xff\xff\xff]Ns.",
    "an array of a false shape": pickle.dumps({"data": np.zeros(12, np.uint8)}, 2).replace(
        b"K\x0c\x85", b"J\xff\xff\xff\x7f\x85"
    ),
    "bytes of a size": b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "a call of a string": b"X\x01\x00\x00\x00a)R.",
    "a state for a list": b"]()b.",
}


@pytest.mark.parametrize("blob", BAD_PICKLES.values(), ids=BAD_PICKLES.keys())
def test_an_invalid_pickle_raises_a_one_line_error(blob):
    with pytest.raises(DataError, match="some file") as caught:
        unpickle(blob, "some file")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def rewrite(change):
    """Damage one batch: write the dictionary of data_batch_2 after `change`."""

    def fault(folder):
        batch = pickle.loads((folder / "data_batch_2").read_bytes())
        change(batch)
        (folder / "data_batch_2").write_bytes(pickle.dumps(batch))

    return fault


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


FAULTS = {
    "a missing batch": (lambda folder: (folder / "data_batch_3").unlink(), "lacks data_batch_3"),
    "a missing test batch": (lambda folder: (folder / "test_batch").unlink(), "lacks test_batch"),
    "a truncated batch": (cut("data_batch_4", 9000), "data_batch_4"),
    "an empty batch": (cut("data_batch_4", 0), "data_batch_4"),
    "fewer images": (
        rewrite(lambda b: b.update({b"data": b[b"data"][:9], b"labels": b[b"labels"][:9]})),
        "expected 50 training images, got 49",
    ),
    "more images": (
        rewrite(lambda b: b.update({b"data": b[b"data"].repeat(2, 0), b"labels": b[b"labels"] * 2})),
        "expected 50 training images, got 60",
    ),
    "another width": (rewrite(lambda b: b.update({b"data": b[b"data"][:, :3000]})), r"shape \(n, 3072\)"),
    "other labels": (rewrite(lambda b: b.update({b"labels": [10] * 10})), "expected labels 0 to 9, got 10"),
    "negative labels": (rewrite(lambda b: b.update({b"labels": [-1] * 10})), "got -1"),
    "labels of text": (rewrite(lambda b: b.update({b"labels": ["1"] * 10})), "list of integers"),
    "too few labels": (rewrite(lambda b: b[b"labels"].pop()), "10 images but 9 labels"),
    "no data": (rewrite(lambda b: b.pop(b"data")), "expected under 'data'"),
    "no labels": (rewrite(lambda b: b.pop(b"labels")), "expected under 'labels'"),
    "other classes": (
        lambda folder: (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")})),
        "does not list the classes of cifar10",
    ),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_broken_folder_raises_an_error_with_its_name(tmp_path, fault, message):
    folder = write_python(tmp_path / "cifar-10-batches-py")
    fault(folder)
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", tmp_path)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, 3073 * 9 + 5, 3073 * 9])
def test_a_truncated_binary_batch_raises(tmp_path, size):
    folder = write_binary(tmp_path / "cifar-10-batches-bin")
    cut("data_batch_5.bin", size)(folder)
    with pytest.raises(DataError, match=r"complete records|got 49"):
        load("cifar10", folder)


def test_a_file_larger_than_cifars_is_not_read(tmp_path, monkeypatch):
    folder = write_python(tmp_path / "cifar-10-batches-py")
    monkeypatch.setattr(cifar, "MAX_FILE", 1000)
    with pytest.raises(DataError, match="more than any CIFAR file"):
        load("cifar10", folder)


def test_the_real_counts_are_the_published_ones(monkeypatch):
    monkeypatch.undo()
    assert cifar.COUNTS == {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
    assert len(CIFAR100_CLASSES) == len(set(CIFAR100_CLASSES)) == 100
    assert list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)


def tar_of(*members):
    """A .tar.gz of (name, content or a change of the TarInfo)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                content = b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def link(kind, target):
    def change(info):
        info.type, info.linkname = kind, target

    return change


BAD_TARS = {
    "an absolute path": (("data/a", b"1"), ("/tmp/escaped", b"1")),
    "a path upwards": (("data/a", b"1"), ("data/../../escaped", b"1")),
    "another folder": (("data/a", b"1"), ("escaped", b"1")),
    "a symbolic link": (("data/a", b"1"), ("data/link", link(tarfile.SYMTYPE, "/etc"))),
    "a hard link": (("data/a", b"1"), ("data/link", link(tarfile.LNKTYPE, "../../escaped"))),
    "a device": (("data/a", b"1"), ("data/null", link(tarfile.CHRTYPE, ""))),
    "a fifo": (("data/a", b"1"), ("data/pipe", link(tarfile.FIFOTYPE, ""))),
    "a Windows path": (("data/a", b"1"), ("data\\..\\..\\escaped", b"1")),
    "too large": (("data/a", b"1"), ("data/b", bytes(200_000))),
    "too many": tuple((f"data/{i}", b"1") for i in range(30)),
    "no such folder": (),
}


@pytest.mark.parametrize("members", BAD_TARS.values(), ids=BAD_TARS.keys())
def test_a_hostile_archive_is_not_unpacked(tmp_path, monkeypatch, members):
    monkeypatch.setattr(tar, "MAX_UNPACKED", 100_000)
    monkeypatch.setattr(tar, "MAX_MEMBERS", 20)
    cache = tmp_path / "deep" / "cache"
    cache.mkdir(parents=True)
    path = tmp_path / "bad.tar.gz"
    path.write_bytes(tar_of(*members))
    with pytest.raises(DataError, match=r"bad\.tar\.gz"):
        tar.unpack_tar(path, cache / "data")
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["bad.tar.gz", "cache", "deep"]


def test_an_archive_replaces_a_broken_folder_and_keeps_an_equal_one(tmp_path):
    path = tmp_path / "good.tar.gz"
    path.write_bytes(tar_of(("data", link(tarfile.DIRTYPE, "")), ("data/a", b"1"), ("data/b", b"2")))
    target = tmp_path / "data"
    target.mkdir()
    (target / "a").write_bytes(b"broken")
    tar.unpack_tar(path, target)
    assert {item.name: item.read_bytes() for item in target.iterdir()} == {"a": b"1", "b": b"2"}
    before = target.stat().st_ino
    tar.unpack_tar(path, target)
    assert target.stat().st_ino == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["data", "good.tar.gz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of(("something/else.txt", b"1")), "contains none of CIFAR's layouts"),
        (tar_of(("cifar-10-batches-py/data_batch_1", b"1")), "lacks data_batch_2"),
        (tar_of(("x/data_batch_1", bytes(200_000)), ("x/test_batch", b""))[:100], "not a readable tar archive"),
        (tar_of(("x/data_batch_1", bytes(200_000))), "unpacks to more than"),
        (b"\x1f\x8bnonsense", "not a readable tar archive"),
        (b"", "is not a data set"),
        (b"just text", "is not a data set"),
    ],
    ids=["other files", "incomplete", "truncated", "bomb", "not gzip", "empty", "text"],
)
def test_an_invalid_archive_given_as_path_raises(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(tar, "MAX_UNPACKED", 100_000)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", path)
    assert str(path) in str(caught.value)


def test_a_link_in_an_archive_is_skipped_without_unpacking(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path = tmp_path / "x.tar.gz"
    path.write_bytes(
        tar_of(
            ("cifar-10-batches-py/data_batch_1", link(tarfile.SYMTYPE, str(secret))),
            ("cifar-10-batches-py/test_batch", b"1"),
        )
    )
    with pytest.raises(DataError, match="lacks data_batch_1"):
        load("cifar10", path)


def test_the_real_cifar10(monkeypatch):
    monkeypatch.undo()
    root = os.environ.get("KVISION_DATA")
    if not root or not (Path(root) / "cifar-10-batches-py").is_dir():
        pytest.skip("KVISION_DATA names no folder with cifar-10-batches-py")
    dataset = load("cifar10", root)
    assert dataset.name == "cifar10"
    assert np.bincount(dataset.y_train).tolist() == [5000] * 10
    assert np.bincount(dataset.y_test).tolist() == [1000] * 10
    # The mean and deviation of the training images that the literature normalizes with.
    mean = dataset.x_train.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean, (0.49140, 0.48216, 0.44653), atol=1e-5)
    deviation = dataset.x_train[::10].std((0, 1, 2)) / 255
    np.testing.assert_allclose(deviation, (0.24703, 0.24349, 0.26159), atol=2e-3)
