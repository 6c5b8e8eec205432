"""Hostile files: each raises a one-line error, in bounded time and memory, and opens no other file."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from kvision import convert, safe_pickle, weights
from kvision.convert import create_model, formats, hdf5, pth, safetensors, tf_checkpoint
from kvision.data import DataError, Dataset, cifar, read_image_folder, read_npz
from kvision.data.unpickle import unpickle
from kvision.untrusted import BASE, FACTOR
from kvision.weights import WeightsError
from tests import fuzz_readers
from tests.fuzz_readers import _field as field
from tests.fuzz_readers import _varint as varint

pytestmark = pytest.mark.backend_free

STORAGE = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpuJ"
TENSOR = b"ctorch._utils\n_rebuild_tensor\n("


def refused(read, path, message, error=WeightsError):
    """Read a file, which must raise within the limits on time and memory."""
    size = path.stat().st_size
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(error, match=message) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert peak < BASE + FACTOR * size + (1 << 20)
    assert time.perf_counter() - started < 30


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as target:
        for name, content in members:
            target.writestr(name, content)
    return path


def torch_file(path, pickled, *storages):
    return zipped(path, [("x/data.pkl", pickled), *((f"x/data/{i}", bytes(s)) for i, s in enumerate(storages))])


def state_dict(*tensors, count=6):
    """Return a pickle of tensors [(name, offset, shape, strides)] in one storage "0" of float32."""
    identity = STORAGE.replace(b"\x01\0\0\0a", b"\x01\0\0\x000") + struct.pack("<i", count) + b"tQ"
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    body = b"\x80\x02}("
    for name, offset, shape, strides in tensors:
        body += b"X" + struct.pack("<I", len(name)) + name.encode() + TENSOR + b"(" + identity + number(offset)
        body += b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"ttR"
    return body + b"u."


# --- .pth


def test_a_deeply_nested_tuple_as_key_does_not_crash(tmp_path):
    nested = b"\x80\x02ccollections\nOrderedDict\n](" + b")" + b"\x85" * 100_000 + b"K\x01\x86e\x85R."
    refused(formats.read, torch_file(tmp_path / "x.pth", nested), "in the wrong place")


def test_repeated_copies_of_a_dictionary_exceed_the_budget(tmp_path):
    entries = b"".join(b"X\x05\0\0\0" + b"%05d" % i + b"K\x01" for i in range(10_000))
    copies = b"ccollections\nOrderedDict\nq\x01(" + entries + b"dq\x02" + b"h\x01h\x02\x85R" * 20_000 + b"."
    refused(
        formats.read, torch_file(tmp_path / "x.pth", b"\x80\x02" + copies), "a copy of a dictionary would take more"
    )


def test_the_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_OPCODES", 1000)
    refused(formats.read, torch_file(tmp_path / "x.pth", b"\x80\x02" + b"N" * 1200 + b"}."), "more than 1,000 opcodes")
    with pytest.raises(DataError, match="more than 1,000 opcodes"):
        unpickle(b"\x80\x02(" + b"}" * 1000 + b"l.", "a batch")


def test_views_share_their_storage_and_copies_are_charged(tmp_path):
    values = np.arange(4_000_000, dtype=np.float32)
    views = [(f"v{i}", i, (1000, 1000), (1000, 1)) for i in range(100)]
    path = torch_file(tmp_path / "views.pth", state_dict(*views, count=values.size), values.tobytes())
    tracemalloc.start()
    arrays = formats.read(path).arrays
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * values.nbytes
    assert arrays["v7"].flags.writeable and arrays["v7"][1, 2] == 1009
    turned = [(f"t{i}", i, (1000, 1000), (1, 1000)) for i in range(100)]
    path = torch_file(tmp_path / "turned.pth", state_dict(*turned, count=values.size), values.tobytes())
    refused(formats.read, path, "non-contiguous tensors would take more")


def test_an_encrypted_or_repeated_member_raises(tmp_path):
    path = torch_file(tmp_path / "x.pth", state_dict(("w", 0, (6,), (1,))), bytes(24))
    sound = path.read_bytes()
    formats.read(path)
    flagged = bytearray(sound)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        flagged[flagged.index(mark) + place] |= 1
    path.write_bytes(flagged)
    refused(formats.read, path, "encrypted")
    path.write_bytes(sound.replace(b"x/data/0", b"x/data.pkl"[:8]))
    torch_file(path, state_dict(("w", 0, (6,), (1,))), bytes(24), bytes(24))
    path.write_bytes(path.read_bytes().replace(b"x/data/1", b"x/data/0"))
    refused(formats.read, path, "contains x/data/0 twice")


def test_a_string_of_four_gigabytes_in_an_old_file_is_not_allocated(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x80\x02X\xff\xff\xff\xff" + bytes(99))
    refused(formats.read, tmp_path / "x.pth", "not a readable file of PyTorch")


# --- safetensors


@pytest.mark.parametrize("length", [0x80, 0x180, 0x280])
def test_a_header_length_that_ends_in_0x80_is_not_a_pickle(tmp_path, length):
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    content = struct.pack("<Q", length) + text.ljust(length) + np.arange(2, dtype=np.float32).tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    found = formats.read(tmp_path / "x.safetensors")
    assert (found.format, found.arrays["a"].tolist()) == ("safetensors", [0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            "a",
        ),
        ('{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', "dtype"),
    ],
)
def test_repeated_keys_raise(tmp_path, text, message):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(2))
    refused(formats.read, tmp_path / "x.safetensors", f"{message} occurs twice")


def test_a_header_that_grows_in_memory_raises(tmp_path):
    text = b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(formats.read, tmp_path / "x.safetensors", "its header would take more")


# --- TensorFlow's checkpoints


def table(entries):
    """Return a table of one block of entries (length of the shared prefix, rest of the key, value)."""
    body = b"".join(varint(shared) + varint(len(k)) + varint(len(v)) + k + v for shared, k, v in entries)
    data = body + struct.pack("<II", 0, 1)
    handle = varint(0) + varint(len(data))
    index = varint(0) + varint(1) + varint(len(handle)) + b"z" + handle + struct.pack("<II", 0, 1)
    footer = varint(0) + varint(0) + varint(len(data) + 5) + varint(len(index))
    return data + bytes(5) + index + bytes(5) + footer.ljust(40, b"\0") + struct.pack("<Q", tf_checkpoint.MAGIC)


def test_keys_that_grow_by_a_byte_each_raise(tmp_path):
    entries = [(0, b"", field(1, 1)), (0, b"k" * 60_000, field(1, 7))]
    entries += [(60_000 + i, b"k", field(1, 7)) for i in range(30_000)]
    (tmp_path / "x.index").write_bytes(table(entries))
    refused(formats.read, tmp_path / "x.index", "the names of its tensors would take more|not text of at most")


def test_repeatedly_referenced_values_raise(tmp_path):
    count = 200_000
    shape = field(2, field(2, field(1, count)))
    entry = field(1, 1) + shape + field(4, 0) + field(5, 4 * count)
    entries = [(0, b"", field(1, 1)), *((0, b"%05d" % i, entry) for i in range(1000))]
    (tmp_path / "x.index").write_bytes(table(entries))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(4 * count))
    with pytest.raises(WeightsError, match=r"the values of .* would take more"):
        formats.read(tmp_path / "x")


def test_the_two_versions_of_a_checkpoint_are_read(tmp_path):
    run, _ = fuzz_readers.target("tf_version_2", tmp_path)
    run(fuzz_readers.seeds("tf_version_2", tmp_path)[0])
    assert tf_checkpoint.read(tmp_path / "model")[0]["a/weights"].tolist() == [[0, 1, 2], [3, 4, 5]]


# --- HDF5


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


def keras_file(h5py, path, fill):
    """Write a file of Keras's layout with one layer, whose group is passed to `fill`."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"conv"]
        group = file.create_group("conv")
        group.attrs["weight_names"] = [b"conv/kernel:0"]
        fill(group, file)
    return path


def virtual(group, other):
    import h5py

    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(other, "secret", (4,))
    group.create_virtual_dataset("conv/kernel:0", layout)


@pytest.mark.parametrize(
    "reach",
    [
        virtual,
        lambda group, other: group.create_dataset("conv/kernel:0", (4,), "f4", external=[(other, 0, 16)]),
        lambda group, other: group.__setitem__("conv/kernel:0", _external(other, "/secret")),
        lambda group, other: group.__setitem__("conv", _external(other, "/")),
    ],
    ids=["virtual", "external storage", "external link", "link in the path"],
)
def test_no_other_file_is_read(h5py, tmp_path, reach):
    other = str(tmp_path / "other.h5")
    with h5py.File(other, "w") as file:
        file["secret"] = np.arange(4, dtype=np.float32)
        file["kernel:0"] = np.arange(4, dtype=np.float32)
    path = keras_file(h5py, tmp_path / "x.h5", lambda group, file: reach(group, other))
    refused(formats.read, path, "is not contiguous|link to elsewhere")


def _external(other, place):
    import h5py

    return h5py.ExternalLink(other, place)


def test_no_other_file_is_read_through_the_root(h5py, tmp_path):
    keras_file(h5py, tmp_path / "other.h5", lambda group, file: group.__setitem__("conv/kernel:0", np.zeros(3)))
    for name, content in (
        ("model_weights", {"model_weights": "/"}),
        ("layer", {"away": "/"}),
    ):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.attrs["layer_names"] = [b"away/conv"]
            for link, place in content.items():
                file[link] = _external(str(tmp_path / "other.h5"), place)
        refused(formats.read, tmp_path / f"{name}.h5", "missing or a link to elsewhere")


def test_the_child_cannot_open_files_or_exceed_its_memory(h5py, tmp_path):
    code = (
        "import runpy, sys; child = runpy.run_path(sys.argv[1])\n"
        "child['confine'](NOFILE=0, AS=child['memory']() + (64 << 20))\n"
        "for attempt in (lambda: open('/etc/hostname'), lambda: bytes(1 << 28)):\n"
        "    try: attempt(); print('done')\n"
        "    except (OSError, MemoryError) as error: print(type(error).__name__)"
    )
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("limits by /proc")
    done = subprocess.run([sys.executable, "-P", "-c", code, hdf5.CHILD], capture_output=True, text=True)
    assert done.stdout.split() == ["OSError", "MemoryError"], done.stderr


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; time.sleep(99)", "within 1 s"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass", "was stopped"),
        ("raise MemoryError", "code 1 MemoryError"),
        ("print('[1]')", "not a readable HDF5"),
    ],
)
def test_a_child_that_hangs_or_crashes_raises(tmp_path, monkeypatch, program, message):
    (tmp_path / "child.py").write_text(program)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    monkeypatch.setattr(hdf5, "CHILD", tmp_path / "child.py")
    monkeypatch.setattr(hdf5, "SECONDS", 1 if "sleep" in program else 60)
    refused(formats.read, tmp_path / "x.h5", message)


def test_aliased_and_compressed_arrays_raise(h5py, tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"conv"]
        group = file.create_group("conv")
        group["0"] = np.zeros(1 << 18, np.float32)
        for i in range(1, 200):
            group[str(i)] = group["0"]  # another name for the same array
        group.attrs["weight_names"] = [str(i) for i in range(200)]
    refused(formats.read, path, "would take more")
    zeros = np.zeros(1 << 24, np.float32)
    keras_file(h5py, path, lambda group, file: group.create_dataset("conv/kernel:0", data=zeros, compression="gzip"))
    refused(formats.read, path, "is not contiguous")


@pytest.mark.parametrize("number", range(4))
def test_names_of_fixed_and_of_variable_length_are_read(h5py, tmp_path, number):
    (tmp_path / "x.h5").write_bytes(fuzz_readers.seeds("h5", tmp_path)[number])
    assert sorted(formats.read(tmp_path / "x.h5").arrays) == ["bn/gamma", "conv/bias", "conv/kernel"]


# --- files of every kind


@pytest.mark.parametrize(
    "read", [formats.read, pth.read, safetensors.read, tf_checkpoint.read, hdf5.read, weights.inspect]
)
def test_a_pipe_does_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "x")
    refused(read, tmp_path / "x", "not a regular file")
    refused(read, type(tmp_path)("/dev/zero"), "not a regular file")


@pytest.mark.parametrize("path", ["train-images-idx3-ubyte", "data_batch_1", "x.npz", "x.tar.gz"])
def test_a_pipe_among_data_does_not_block(tmp_path, path):
    os.mkfifo(tmp_path / path)
    for read in (read_npz, cifar.read_archive, cifar._read_file):
        with pytest.raises(DataError, match="not a regular file"):
            read(tmp_path / path)


def test_a_data_set_of_zeros_is_read(tmp_path):
    arrays = {"x_train": np.zeros((30_000, 64, 64), np.uint8), "y_train": np.zeros(30_000, np.uint8)}
    np.savez_compressed(tmp_path / "x.npz", **arrays, x_test=arrays["x_train"][:1], y_test=arrays["y_train"][:1])
    refused(read_npz, tmp_path / "x.npz", "would take more than", DataError)


@pytest.mark.parametrize("shape", ["(True,)", "(-1, -30)", "(1e3,)", "'3'", "((3,),)", "(10**9,)", "(" * 3000])
def test_invalid_headers_of_arrays_raise(tmp_path, shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(30)
    path = zipped(tmp_path / "x.npz", [(f"{key}.npy", content) for key in ("x_train", "y_train", "x_test", "y_test")])
    refused(read_npz, path, "malformed header|file holds", DataError)


@pytest.mark.parametrize("change", ["negative size", "endless name", "sparse", "not octal"])
def test_invalid_headers_of_archives_raise(tmp_path, change):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("n" * (5000 if change == "endless name" else 50)))
    header = bytearray(stream.getvalue())
    if change == "negative size":
        header[124:136] = b"\xff" * 11 + b"\x00"
    elif change == "not octal":
        header[124:136] = b"99999999999\0"
    elif change == "sparse":
        header[156:157] = b"S"
    if change != "endless name":
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
    (tmp_path / "x.tar").write_bytes(header)
    refused(cifar.read_archive, tmp_path / "x.tar", "not a readable tar archive", DataError)


def test_a_repeatedly_encoded_string_exceeds_the_budget():
    text = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x01X\x06\0\0\0latin1q\x02c_codecs\nencode\nq\x03"
    with pytest.raises(DataError, match="its strings as bytes would take more"):
        unpickle(b"\x80\x02" + text + b"h\x03h\x01h\x02\x86R" * 5_000 + b".", "a batch")


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\x9b2J", "a\nb", "caf\udce9"])
def test_an_unprintable_class_name_raises_on_reading(name):
    images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.arange(2, dtype=np.int32)
    with pytest.raises(DataError, match=r"the class name .* is not UTF-8, or contains control .*; rename it") as caught:
        Dataset("x", images, labels, images, labels, classes=("good", name), source="x")
    assert str(caught.value).isprintable()
    with pytest.raises(
        DataError, match=r"the data set's name .* is not UTF-8, or contains control characters; rename it"
    ):
        Dataset(name, images, labels, images, labels, classes=("good", "bad"), source="x")
    Dataset("x", images, labels, images, labels, classes=("good", "क्‍ष 猫\u3000"), source="x")


def test_a_class_folder_with_a_non_utf_8_name_raises_on_reading(tmp_path):
    from PIL import Image

    for name in (b"good", b"caf\xe9"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for i in range(2):
            Image.new("RGB", (4, 4)).save(os.path.join(os.fsdecode(folder), f"{i}.png"))
    with pytest.raises(DataError, match="is not UTF-8, or contains control characters; rename it"):
        read_image_folder(tmp_path)


def test_a_manifest_of_two_billion_classes_builds_nothing(tmp_path):

    with_manifest = fuzz_readers.seeds("weights_npz", tmp_path)[1]
    (tmp_path / "sound.npz").write_bytes(with_manifest)
    manifest = weights.inspect(tmp_path / "sound.npz")["manifest"]
    manifest |= {"architecture": "resnet20", "classes": None}
    manifest["arguments"] = {"classes": 2_000_000_000, "input_shape": [32, 32, 3]}
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez(tmp_path / "x.npz", __manifest__=text, a=np.zeros(2, np.float32))
    for read in (convert.verify, lambda path: create_model("resnet20", weights=path)):
        with pytest.raises(ValueError, match="larger than its weights file"):
            read(tmp_path / "x.npz")


def test_bfloat16_and_a_pickle_with_code(tmp_path):
    pth.write(tmp_path / "x.pth", {"a": np.ones(3, ml_dtypes.bfloat16)})
    assert formats.read(tmp_path / "x.pth").arrays["a"].dtype == ml_dtypes.bfloat16
    (tmp_path / "y.pth").write_bytes(pickle.dumps(os.getcwd))
    refused(formats.read, tmp_path / "y.pth", "is of an unknown format|it was not executed|not a readable")
