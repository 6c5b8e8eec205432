"""Weights files: exact round trips, reproducible bytes, and rejection of invalid files."""

import argparse
import contextlib
import hashlib
import io
import json
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import kvision.weights as weights
from kvision import convert
from kvision.convert.cli import add_commands
from kvision.data.preprocessing import Preprocessing
from kvision.weights import WeightsError, archive

# Keras 3.15 turns torch tensors into arrays by `np.array(tensor)`, of which NumPy 2.4 and PyTorch 2.13 disapprove.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

DOCS = Path(__file__).parent.parent / "docs" / "npz.md"
KERNEL = "conv/kernel"


def tiny(name="tiny", input_shape=(6, 5, 3), classes=4, dtype=None):
    layers = keras.layers
    x = inputs = keras.Input(input_shape)
    x = layers.Conv2D(4, 3, name="conv", dtype=dtype)(x)
    x = layers.BatchNormalization(name="norm", dtype=dtype)(x)
    x = layers.Dropout(0.5, name="drop", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(name="pool", dtype=dtype)(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits", dtype=dtype)(x), name=name)


def values(model):
    return {variable.path: np.array(keras.ops.convert_to_numpy(variable.value)) for variable in model.weights}


def fill(model, seed):
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(generator.uniform(0.1, 1, tuple(variable.shape)).astype(np.float32))
    return model


def same(a, b):
    return a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in a)


STATED = {
    "preprocessing": Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), size=(6, 5)),
    "classes": ["aeroplane", "bird", "cat", "dög"],
    "dataset": "made-up",
    "accuracy": {"jax": 0.91, "torch": 0.915},
    "license": "Apache-2.0",
    "provenance": {"command": "python -m apps.cifar10 --seed 0", "seeds": [0, 1]},
}


@pytest.fixture(scope="module")
def trained():
    return fill(tiny(), seed=1)


@pytest.fixture(scope="module")
def target():
    return fill(tiny(), seed=2)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny.npz"
    weights.save(trained, path, **STATED)
    return path


# --- what goes in comes out


def test_round_trip_is_bit_exact_and_returns_the_manifest(trained, saved):
    model = fill(tiny("another_name"), seed=3)
    manifest = weights.load(model, saved)
    assert same(values(model), values(trained))
    assert manifest["architecture"] == "tiny"
    assert manifest["arguments"] == {"input_shape": [6, 5, 3], "classes": 4}
    assert manifest["input_size"] == [6, 5]
    assert Preprocessing.from_json(manifest["preprocessing"]) == STATED["preprocessing"]
    assert {key: manifest[key] for key in STATED.keys() - {"preprocessing"}} == {
        key: STATED[key] for key in STATED.keys() - {"preprocessing"}
    }


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int32", "uint32", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_round_trip_of_every_plain_dtype_and_shape(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    archive.write(tmp_path / "a.npz", {"a": array})
    with archive.Archive(tmp_path / "a.npz") as opened:
        found = opened.read("a", archive.digest(array))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        read = file["a"]
    for other in (found, read):
        assert (other.dtype, other.shape, other.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert found.flags.writeable and found.flags.c_contiguous


def test_the_reader_in_the_docs_reads_a_file(trained, saved):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    scope = {}
    exec(blocks[0], scope)
    arrays, manifest = scope["read"](saved)
    assert same(arrays, values(trained))
    assert manifest["classes"] == STATED["classes"]


def test_files_contain_only_weights_independent_of_the_models_name(target):
    plain = ["conv/kernel", "conv/bias", "norm/gamma", "norm/beta", "norm/moving_mean"]
    plain += ["norm/moving_variance", "logits/kernel", "logits/bias"]
    assert list(weights.named_variables(target)) == plain  # the dropout's generator is a variable, but no weight
    assert len(target.variables) == len(plain) + 1
    chain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="a")], name="chain")
    assert list(weights.named_variables(chain)) == ["a/kernel", "a/bias"]
    image = keras.Input((6, 5, 3))
    nested = keras.Model(image, keras.layers.Dense(2, name="head")(target(image)), name="nested")
    assert list(weights.named_variables(nested)) == [*plain, "head/kernel", "head/bias"]


def test_two_variables_of_one_name_raise(tmp_path):
    image = keras.Input((6, 5, 3))
    twice = keras.Model(image, [tiny("left")(image), tiny("right")(image)], name="twice")
    with pytest.raises(WeightsError, match="two variables of twice are named conv/kernel"):
        weights.save(twice, tmp_path / "x.npz")


# --- the same bytes


def test_the_same_weights_give_the_same_bytes(trained, saved, tmp_path):
    weights.save(trained, tmp_path / "again.npz", **dict(reversed(STATED.items())))
    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()
    names = zipfile.ZipFile(saved).namelist()
    assert names == sorted(names) and "__manifest__.npy" in names


def test_bytes_are_independent_of_the_versions_of_python_and_numpy(tmp_path):
    arrays = {"b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64)}
    archive.write(tmp_path / "a.npz", arrays)
    written = (tmp_path / "a.npz").read_bytes()
    assert hashlib.sha256(written).hexdigest() == "803b0bc026e5234f62e608be993008e821d90b753c021f2381bbc0e0ba71ba50"


def test_a_failed_write_keeps_the_old_file_and_nothing_else(trained, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.os, "fsync", full)
    with pytest.raises(WeightsError, match="cannot be written: No space left"):
        weights.save(trained, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"accuracy": {"jax": float("nan")}}, "accuracy.jax in the manifest is nan"),
        ({"accuracy": {"jax": 91.5}}, "accuracy.jax in the manifest must be a number from 0 to 1"),
        ({"provenance": {"when": [np.int64(3)]}}, r"provenance.when\[0\] in the manifest is 3 \(int64\)"),
        ({"provenance": {1: 2}}, "strings for keys"),
        ({"classes": ["one"]}, "classes in the manifest must be 4 strings"),
        ({"preprocessing": {"median": 3}}, "preprocessing accepts"),
        ({"preprocessing": Preprocessing(mean=(0, 0), std=(1, 1))}, "expected images of shape"),
        ({"dataset": 7}, "dataset in the manifest is '7'; it must be a string or null"),
        ({"dataset": "\ud800"}, "is not UTF-8"),
        ({"provenance": {"by": "\ud800"}}, "not Unicode"),
        ({"architecture": "\x1b[2J"}, "control characters"),
    ],
)
def test_an_invalid_manifest_is_not_written(trained, tmp_path, stated, message):
    with pytest.raises(WeightsError, match=message):
        weights.save(trained, tmp_path / "x.npz", **stated)
    assert not list(tmp_path.iterdir())


def test_an_unknown_manifest_field_raises_with_the_known_ones(trained, tmp_path):
    with pytest.raises(TypeError, match=r"no field acuracy; it has .*accuracy"):
        weights.save(trained, tmp_path / "x.npz", acuracy={})
    with pytest.raises(WeightsError, match="there is no folder"):
        weights.save(trained, tmp_path / "none" / "x.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_weights_require_allow_nonfinite(tmp_path, value):
    model, path = fill(tiny(), seed=1), tmp_path / "x.npz"
    bias = np.array([0, value, 0, 0], np.float32)
    weights.named_variables(model)["conv/bias"].assign(bias)
    with pytest.raises(WeightsError, match="conv/bias would be NaN or infinite"):
        weights.save(model, path)
    assert not path.exists()
    assert weights.save(model, path, allow_nonfinite=True)["probe"] is None
    fresh = fill(tiny(), seed=2)
    weights.load(fresh, path, allow_nonfinite=True)
    np.testing.assert_array_equal(values(fresh)["conv/bias"], bias)


def test_dtypes_unknown_to_numpy_raise(tmp_path):
    with pytest.raises(WeightsError, match="conv/kernel has dtype bfloat16"):
        weights.save(tiny(dtype="bfloat16"), tmp_path / "x.npz")


# --- files of others


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("change", [lambda a: a, np.asfortranarray, lambda a: a.astype(">f4")])
def test_numpys_files_load_without_a_required_manifest(trained, target, tmp_path, write, change):
    write(tmp_path / "x.npz", **{key: change(array) for key, array in values(trained).items()})
    fill(target, seed=2)
    with pytest.raises(WeightsError, match=r"has no manifest.*manifest_required=False"):
        weights.load(target, tmp_path / "x.npz")
    assert weights.load(target, tmp_path / "x.npz", manifest_required=False) == {}
    assert same(values(target), values(trained))


def test_a_narrower_float_is_widened(trained, target, tmp_path):
    halves = {key: array.astype(np.float16) for key, array in values(trained).items()}
    np.savez(tmp_path / "x.npz", **halves)
    weights.load(target, tmp_path / "x.npz", manifest_required=False)
    assert same(values(target), {key: array.astype(np.float32) for key, array in halves.items()})


def test_skip_keeps_variables_and_ignores_arrays(trained, saved):
    other = fill(tiny(classes=7), seed=5)
    before = values(other)
    with pytest.raises(WeightsError, match=r"2 of another shape \(logits/bias: file \(4,\), model \(7,\)"):
        weights.load(other, saved)
    with pytest.raises(WeightsError, match="of another shape"):
        weights.load(other, saved, skip=["logit"])  # the whole name has to match
    assert same(values(other), before)
    weights.load(other, saved, skip="logits/.*")
    expected = {key: (before if key.startswith("logits") else values(trained))[key] for key in before}
    assert same(values(other), expected)
    with pytest.raises(ValueError, match="skip must contain regular expressions"):
        weights.load(other, saved, skip=["("])


# --- bad files: each is made from the good one


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def pack(members, method=zipfile.ZIP_STORED):
    """Write a zip of [(name or ZipInfo, bytes)]."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        for name, data in members:
            zipped.writestr(name, data)
    return buffer.getvalue()


class Good:
    """The parts of a valid file, to be combined into invalid ones."""

    def __init__(self, path):
        self.raw = path.read_bytes()
        zipped = zipfile.ZipFile(path)
        self.members = {name: zipped.read(name) for name in zipped.namelist()}
        with np.load(path) as file:
            self.arrays = dict(file)
        self.manifest = json.loads(bytes(self.arrays.pop("__manifest__")))

    def bytes(self, extra=(), method=zipfile.ZIP_STORED, **changed):
        """Return the file with members changed, dropped (None) or added."""
        kept = {**self.members, **changed}
        return pack([*((name, data) for name, data in kept.items() if data is not None), *extra], method)

    def with_manifest(self, text):
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        return self.bytes(**{"__manifest__.npy": npy(np.frombuffer(text, np.uint8))})

    def stating(self, **fields):
        return self.with_manifest({**self.manifest, **fields})

    def entry(self, **fields):
        arrays = {**self.manifest["arrays"], KERNEL: {**self.manifest["arrays"][KERNEL], **fields}}
        return self.stating(arrays=arrays)

    def honest(self, **changed):
        """Return a valid file of other arrays, including hashes; None drops one."""
        arrays = {key: array for key, array in {**self.arrays, **changed}.items() if array is not None}
        entries = {
            key: {
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
            for key, array in arrays.items()
        }
        text = json.dumps({**self.manifest, "arrays": entries}).encode()
        members = [(f"{key}.npy", npy(array)) for key, array in arrays.items()]
        return pack([*members, ("__manifest__.npy", npy(np.frombuffer(text, np.uint8)))])

    def kernel(self, data):
        return self.bytes(**{f"{KERNEL}.npy": data})

    def spoiled(self, index, value):
        array = self.arrays[KERNEL].copy()
        array.flat[index] = value
        return array

    def patched(self, name, offset, data, where="both"):
        """Return the file with bytes changed at `offset` of a directory entry, and two before that of its local one."""
        raw = bytearray(self.raw)
        name = name.encode()
        local = raw.index(name) - 30
        central = raw.rindex(name) - 46
        if where in ("both", "central"):
            raw[central + offset : central + offset + len(data)] = data
        if where in ("both", "local"):
            raw[local + offset - 2 : local + offset - 2 + len(data)] = data
        return bytes(raw)


def flipped(raw, place):
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def header(text, version=b"\x01\x00"):
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode("latin1")


def info(name, **attributes):
    member = zipfile.ZipInfo(name)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member


class Payload:
    """An object that prints a line when it is unpickled."""

    def __reduce__(self):
        return print, ("the payload ran",)


ONE = npy(np.ones(1, np.float32))
OBJECTS = np.array([Payload()], dtype=object)
RECORDS = np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])
LINK = (stat.S_IFLNK | 0o777) << 16

BAD = {
    "empty": (lambda good: b"", "is not an .npz file"),
    "text": (lambda good: b"weights, honestly\n" * 99, "is not an .npz file"),
    "cut in half": (lambda good: good.raw[: len(good.raw) // 2], "is not an .npz file"),
    "cut by a byte": (lambda good: good.raw[:-1], "is not an .npz file"),
    "head missing": (lambda good: good.raw[100:], "contradicts the zip directory|overlap"),
    "bit flipped in the values": (
        lambda good: flipped(good.raw, good.raw.index(good.arrays[KERNEL].tobytes()) + 9),
        "conv/kernel does not match its sha256",
    ),
    "value changed, zip checksum right": (
        lambda good: good.kernel(npy(good.spoiled(3, 0.5))),
        "conv/kernel does not match its sha256",
    ),
    "bit flipped in the manifest": (
        lambda good: flipped(good.raw, good.raw.index(b"made-up")),
        "__manifest__ does not match its checksum",
    ),
    "bit flipped in a deflated array": (
        lambda good: (raw := good.bytes(method=zipfile.ZIP_DEFLATED))[:400] + b"\0\0\0\0" + raw[404:],
        "damaged|does not unpack",
    ),
    "array gone": (
        lambda good: good.bytes(**{f"{KERNEL}.npy": None}),
        "lacks arrays that its manifest lists: conv/kernel",
    ),
    "array added": (lambda good: good.bytes([("more.npy", ONE)]), "manifest does not list: more"),
    "fewer arrays": (lambda good: good.honest(**{KERNEL: None}), r"1 of 8 variables are missing \(conv/kernel\)"),
    "more arrays": (
        lambda good: good.honest(more=np.ones(3, np.float32)),
        r"1 of 9 arrays are unexpected \(more\)",
    ),
    "another architecture": (
        lambda good: good.honest(**{KERNEL: None, "stem/kernel": good.arrays[KERNEL]}),
        r"a file of tiny does not fit the model tiny: 1 of 8 .*conv/kernel.*; 1 of 8 .*stem/kernel",
    ),
    "another shape": (
        lambda good: good.honest(**{KERNEL: good.arrays[KERNEL].reshape(9, 3, 4)}),
        r"1 of another shape \(conv/kernel: file \(9, 3, 4\), model \(3, 3, 3, 4\)\)",
    ),
    "transposed": (lambda good: good.honest(**{KERNEL: good.arrays[KERNEL].T}), "1 of another shape"),
    "float64": (
        lambda good: good.honest(**{KERNEL: good.arrays[KERNEL].astype(np.float64)}),
        r"1 of another dtype \(conv/kernel: file float64, model float32\)",
    ),
    "integers": (
        lambda good: good.honest(**{KERNEL: good.arrays[KERNEL].astype(np.int32)}),
        "1 of another dtype",
    ),
    "NaN": (lambda good: good.honest(**{KERNEL: good.spoiled(-1, np.nan)}), "conv/kernel contains NaN"),
    "infinity": (lambda good: good.honest(**{KERNEL: good.spoiled(0, -np.inf)}), "conv/kernel contains NaN"),
    "pickle": (lambda good: good.kernel(npy(OBJECTS, allow_pickle=True)), "contains Python objects"),
    "pickle beside the arrays": (
        lambda good: good.bytes([("more.npy", npy(OBJECTS, allow_pickle=True))]),
        "contains Python objects",
    ),
    "pickle as manifest": (
        lambda good: good.bytes(**{"__manifest__.npy": npy(OBJECTS, allow_pickle=True)}),
        "contains Python objects",
    ),
    "structured dtype": (lambda good: good.kernel(npy(RECORDS)), "conv/kernel has dtype .*plain numbers"),
    "bfloat16 as raw bytes": (
        lambda good: good.kernel(header("{'descr': '|V2', 'fortran_order': False, 'shape': (1,), }") + b"ab"),
        r"has dtype '\|V2'",
    ),
    "complex": (lambda good: good.kernel(npy(np.ones(3, np.complex64))), "has dtype '<c8'"),
    "text array": (lambda good: good.kernel(npy(np.array(["a"]))), "has dtype '<U1'"),
    "path upwards": (lambda good: good.bytes([("../more.npy", ONE)]), "not a plain relative path"),
    "path upwards inside": (lambda good: good.bytes([("a/../../more.npy", ONE)]), "not a plain relative path"),
    "absolute path": (lambda good: good.bytes([("/etc/more.npy", ONE)]), "not a plain relative path"),
    "drive letter": (lambda good: good.bytes([("C:more.npy", ONE)]), "not a plain relative path"),
    "backslash": (lambda good: good.bytes([(info("x", filename="..\\x.npy"), ONE)]), "backslash"),
    "line end in a name": (lambda good: good.bytes([("a\nb.npy", ONE)]), "control character"),
    "NUL in a name": (
        lambda good: good.bytes([("more#x.npy", ONE)]).replace(b"more#x", b"more\0x"),
        "not an array|control character",
    ),
    "no name": (lambda good: good.bytes([(".npy", ONE)]), "has 0 characters"),
    "endless name": (lambda good: good.bytes([("a" * 2000 + ".npy", ONE)]), "has 2000 characters"),
    "folder": (lambda good: good.bytes([("folder/", b"")]), "'folder/', which is not an array"),
    "other member": (lambda good: good.bytes([("run.py", b"print()")]), "'run.py', which is not an array"),
    "link": (lambda good: good.bytes([(info("l.npy", external_attr=LINK), b"/etc/passwd")]), "is a link"),
    "encrypted": (lambda good: good.patched(f"{KERNEL}.npy", 8, b"\x01"), "is encrypted"),
    "bzip2": (lambda good: good.bytes(method=zipfile.ZIP_BZIP2), "compressed by method 12"),
    "local header lies": (
        lambda good: good.patched(f"{KERNEL}.npy", 24, b"\0\1\0\0", where="local"),
        "contradicts the zip directory",
    ),
    "two arrays of one name": (
        lambda good: good.bytes([("more1.npy", ONE), ("more2.npy", ONE)]).replace(b"more2", b"more1"),
        "contains more1.npy twice",
    ),
    "overlap": (  # all sizes agree, and reach 108 bytes into the next array
        lambda good: good.patched(
            f"{KERNEL}.npy", 20, struct.pack("<II", *[len(good.members[f"{KERNEL}.npy"]) + 108] * 2)
        ).replace(b"'shape': (3, 3, 3, 4)", b"'shape': (3, 3, 3, 5)"),
        "the bytes of logits/bias.npy overlap",
    ),
    "reaches past the end": (
        lambda good: good.patched(f"{KERNEL}.npy", 20, struct.pack("<II", 1 << 30, 1 << 30)),
        "overlap",
    ),
    "stored with two sizes": (
        lambda good: good.patched(f"{KERNEL}.npy", 24, b"\0\0\0\x70", where="central"),
        "two sizes",
    ),
    "64-bit sizes promised, not given": (
        lambda good: good.patched(f"{KERNEL}.npy", 20, b"\xff" * 8),
        "is not an .npz file|overlap",
    ),
    "zip bomb": (
        lambda good: good.bytes([("more.npy", npy(np.zeros(1 << 27, np.uint8)))], zipfile.ZIP_DEFLATED),
        "zip bomb",
    ),
    "giant shape": (
        lambda good: good.kernel(header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}")),
        "takes 4,398,046,511,",
    ),
    "shape beyond NumPy": (
        lambda good: good.kernel(header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {2**62})}}")),
        "malformed header",
    ),
    "negative shape": (
        lambda good: good.kernel(header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}")),
        "malformed header",
    ),
    "bytes after the values": (lambda good: good.kernel(good.members[f"{KERNEL}.npy"] + b"\0"), "has 561 bytes"),
    "values cut": (lambda good: good.kernel(good.members[f"{KERNEL}.npy"][:-4]), "has 556 bytes"),
    "header cut": (lambda good: good.kernel(good.members[f"{KERNEL}.npy"][:40]), "has a header of 128 bytes"),
    "header endless": (lambda good: good.kernel(header(" " * 60_000)), "has a header of 60,010 bytes"),
    "header is code": (lambda good: good.kernel(header("print('the payload ran')")), "malformed header"),
    "header nested": (lambda good: good.kernel(header("(" * 9_000)), "malformed header"),
    "magic wrong": (lambda good: good.kernel(b"\x93NUMPZ" + good.members[f"{KERNEL}.npy"][6:]), "NumPy's format"),
    "format 9": (lambda good: good.kernel(header("{}", b"\x09\x00")), "NumPy's format 1 to 3"),
    "not an array": (lambda good: good.kernel(b""), "NumPy's format 1 to 3"),
    "no manifest": (lambda good: good.bytes(**{"__manifest__.npy": None}), "manifest_required=False"),
    "manifest of floats": (lambda good: good.bytes(**{"__manifest__.npy": ONE}), "bytes in one row"),
    "manifest not UTF-8": (lambda good: good.with_manifest(b'{"a": "\xff"}'), "is not JSON"),
    "manifest not JSON": (lambda good: good.with_manifest(b"{'a': 1}"), "is not JSON"),
    "manifest with NaN": (lambda good: good.stating(provenance={"a": float("nan")}), "not a finite number"),
    "manifest with 1e999": (lambda good: good.with_manifest(b'{"accuracy": {"jax": 1e999}}'), "not a finite number"),
    "manifest nested": (lambda good: good.with_manifest(b"[" * 200_000), "is not JSON"),
    "manifest says a thing twice": (
        lambda good: good.with_manifest(b'{"format": 1, "format": 2}'),
        "occurs twice",
    ),
    "classes no UTF-8": (lambda good: good.stating(classes=["a", "b", "c", "\udc80"]), "surrogates not allowed"),
    "classes that clear the screen": (lambda good: good.stating(classes=["a", "b", "c", "\x1b[2J"]), "control char"),
    "header of minuses": (
        lambda good: good.kernel(header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 9_000 + "1,)}")),
        "malformed header",
    ),
    "manifest a list": (lambda good: good.with_manifest([]), "is not JSON .*not an object"),
    "manifest empty": (lambda good: good.with_manifest({}), "of format 'None'"),
    "another format": (lambda good: good.stating(format="other"), "of format 'other', expected 'kvision-npz'"),
    "newer format": (lambda good: good.stating(format_version=2), "has format version 2.*upgrade kvision"),
    "format version text": (lambda good: good.stating(format_version="1"), "format_version in the manifest is '1'"),
    "shape a lie": (lambda good: good.entry(shape=[9, 3, 4]), "conv/kernel is .* its manifest states"),
    "dtype a lie": (lambda good: good.entry(dtype="float16"), "conv/kernel is .* its manifest states"),
    "hash a lie": (lambda good: good.entry(sha256="0" * 64), "conv/kernel does not match its sha256"),
    "hash missing": (lambda good: good.entry(sha256=None), "states no sha256 of conv/kernel"),
    "entry no object": (
        lambda good: good.stating(arrays={**good.manifest["arrays"], KERNEL: 3}),
        "conv/kernel is .* its manifest states None",
    ),
    "arrays a list": (lambda good: good.stating(arrays=[]), "lists no arrays"),
    "architecture missing": (
        lambda good: good.with_manifest({k: v for k, v in good.manifest.items() if k != "architecture"}),
        "architecture in the manifest is missing; it must be a string",
    ),
    "accuracy text": (lambda good: good.stating(accuracy={"jax": "high"}), "accuracy.jax .* from 0 to 1"),
    "classes miscounted": (lambda good: good.stating(classes=["a"]), "classes in the manifest must be 4"),
    "preprocessing broken": (
        lambda good: good.stating(preprocessing={"mean": [[1]], "std": [1]}),
        "preprocessing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_file_raises_a_one_line_error_and_the_model_is_unchanged(saved, target, tmp_path, capfd, case):
    make, message = BAD[case]
    path = tmp_path / "bad.npz"
    path.write_bytes(make(Good(saved)))
    before = values(target)
    with pytest.raises(WeightsError, match=message) as caught:
        weights.load(target, path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.isprintable() and len(line) <= 1_000
    assert same(values(target), before)
    assert capfd.readouterr() == ("", "")  # the payload prints


def test_a_stream_longer_than_stated_is_not_unpacked(tmp_path):
    stated, real = ONE, ONE + bytes(1 << 26)
    raw = pack([("more.npy", real)], zipfile.ZIP_DEFLATED)
    (tmp_path / "x.npz").write_bytes(raw.replace(struct.pack("<I", len(real)), struct.pack("<I", len(stated))))
    tracemalloc.start()
    with (
        archive.Archive(tmp_path / "x.npz") as opened,
        pytest.raises(WeightsError, match="does not unpack to the 132 bytes"),
    ):
        opened.read("more")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_a_reassembled_valid_file_loads(saved, trained, target):
    # Otherwise the cases above might be refused for how the test packs them.
    good = Good(saved)
    for raw in (good.bytes(), good.honest(), good.stating(), good.bytes(method=zipfile.ZIP_DEFLATED)):
        path = saved.with_name("again.npz")
        path.write_bytes(raw)
        fill(target, seed=2)
        weights.load(target, path)
        assert same(values(target), values(trained))


@pytest.mark.parametrize("call", [weights.inspect, convert.verify, lambda path: weights.load(None, path)])
def test_other_paths_raise(tmp_path, call):
    with pytest.raises(WeightsError, match="no such file"):
        call(tmp_path / "none.npz")
    with pytest.raises(WeightsError, match="is not a regular file"):
        call(tmp_path)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_mutated_file_gives_the_same_values_or_raises(saved, trained, target, tmp_path, manifest):
    path = tmp_path / "mutated.npz"
    if manifest:
        raw = saved.read_bytes()
    else:
        np.savez_compressed(path, **values(trained))
        raw = path.read_bytes()
    generator = np.random.default_rng(0)
    directory = raw.index(b"PK\x01\x02")
    refused = 0
    for trial in range(300):
        mutated = bytearray(raw)
        if trial % 5 == 0:
            del mutated[generator.integers(len(raw)) :]
        elif trial % 5 == 1:
            start = generator.integers(len(raw))
            del mutated[start : start + generator.integers(1, 60)]
        else:  # half of the flips go to the directory, where the structure is
            for place in generator.integers(directory if trial % 2 else 0, len(raw), generator.integers(1, 4)):
                mutated[place] ^= 1 << generator.integers(8)
        path.write_bytes(mutated)
        before = values(target)
        try:
            weights.load(target, path, manifest_required=manifest)
            assert same(values(target), values(trained))
            fill(target, seed=trial)
        except WeightsError as error:
            refused += 1
            assert same(values(target), before) and str(error).startswith(str(path))
        with contextlib.suppress(WeightsError):
            weights.inspect(path)
    assert 150 < refused < 300


# --- probe, verify, diff, inspect


def test_probe_images_equal_those_of_the_docs():
    images = weights.probe_images((3, 2, 5))
    expected = [(i * 2654435761 % 2**32) >> 24 for i in range(4 * 3 * 2 * 5)]
    assert images.dtype == np.uint8 and images.shape == (4, 3, 2, 5)
    assert images.ravel().tolist() == expected


def test_probe_logits_are_those_of_preprocessed_images(trained, saved):
    probe = weights.inspect(saved)["manifest"]["probe"]
    images = weights.probe_images((6, 5, 3)).astype(np.float64) / 255
    images = (images - [0.5, 0.4, 0.3]) / [0.2, 0.2, 0.1]
    arrays = values(trained)
    # The network in plain NumPy: a 3x3 convolution, batch norm, mean, dense.
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2))
    x = np.einsum("nhwcij,ijco->nhwo", windows, arrays["conv/kernel"].astype(np.float64)) + arrays["conv/bias"]
    x = (x - arrays["norm/moving_mean"]) / np.sqrt(arrays["norm/moving_variance"] + 1e-3)
    x = (x * arrays["norm/gamma"] + arrays["norm/beta"]).mean((1, 2))
    expected = x @ arrays["logits/kernel"] + arrays["logits/bias"]
    assert probe["shape"] == [4, 6, 5, 3]
    np.testing.assert_allclose(probe["logits"], expected, atol=1e-5 * np.abs(expected).max())


def test_the_probe_of_a_mixed_precision_network_is_in_float32(trained, tmp_path):
    mixed = tiny(dtype="mixed_bfloat16")
    for variable, value in zip(mixed.weights, values(trained).values(), strict=True):
        variable.assign(value)
    a = weights.save(mixed, tmp_path / "a.npz")["probe"]["logits"]
    b = weights.save(trained, tmp_path / "b.npz")["probe"]["logits"]
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert mixed.get_layer("conv").compute_dtype == "bfloat16"


def test_networks_without_one_row_of_logits_have_no_probe(tmp_path):
    image = keras.Input((None, None, 3))
    maps = keras.layers.Conv2D(2, 1, name="conv")(image)
    free = keras.Model(image, keras.layers.GlobalAveragePooling2D()(maps), name="free")
    assert weights.save(keras.Model(image, maps, name="maps"), tmp_path / "a.npz")["probe"] is None
    assert weights.save(free, tmp_path / "b.npz")["probe"] is None
    assert weights.save(free, tmp_path / "c.npz", input_size=(4, 6))["probe"]["shape"] == [4, 4, 6, 3]


@pytest.fixture
def zoo(monkeypatch):
    def create_model(name, input_shape, classes, weights=None):
        if name != "tiny":
            raise ValueError(f"unknown model {name!r}")
        return tiny(name, tuple(input_shape), classes)

    monkeypatch.setattr("kvision.zoo.build_model", create_model)


def test_verify_accepts_a_valid_file(saved, zoo):
    result = convert.verify(saved)
    assert result.ok and result.difference < 1e-6
    assert (result.architecture, result.parameters) == ("tiny", 9 * 3 * 4 + 4 + 4 * 4 + 4 * 4 + 4)
    assert str(result).startswith(f"{saved}: ok, tiny, 148 parameters, probe logits differ by")


def test_verify_detects_a_changed_weight(saved, zoo, tmp_path):
    good, path = Good(saved), tmp_path / "x.npz"
    path.write_bytes(good.honest(**{KERNEL: good.spoiled(5, 3.0)}))
    result = convert.verify(path)
    assert not result.ok and result.difference > 1e-3 and "WRONG" in str(result)
    path.write_bytes(good.kernel(npy(good.spoiled(5, 3.0))))
    with pytest.raises(WeightsError, match="does not match its sha256"):
        convert.verify(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "huge"}, "huge cannot be rebuilt from the manifest's arguments: unknown model 'huge'"),
        ({"arguments": {"input_shape": [6, 5, 3], "classes": 4, "depth": 3}}, "cannot be rebuilt"),
        ({"arguments": {"input_shape": [6, 5, 3], "classes": 5}, "classes": None}, "of another shape"),
        ({"probe": {"shape": [4, 6, 5, 3], "logits": [[1.0]] * 4}}, "probe cannot be repeated: logits of shape"),
        ({"probe": 3}, r"probe.shape in the manifest must be \[4, height"),
        ({"probe": {"shape": [4, 6, 5, 3], "logits": [[10**400] * 4] * 4}}, "beyond 64 bits"),
        ({"probe": {"shape": [4, 6, 5, 3], "logits": [[1e300] * 4] * 4}}, "rows of float32 numbers"),
        ({"arguments": {"input_shape": [6, -5, 3], "classes": 4}}, "arguments.input_shape .* positive integers"),
        ({"arguments": {"input_shape": [10**6, 10**6, 3], "classes": 4}}, "at most 16,777,216 values"),
        ({"probe": {"shape": [4, 10**6, 10**6, 3], "logits": [[1.0]] * 4}}, "at most 16,777,216 values"),
        ({"probe": {"shape": [4, 6, 5, -3], "logits": [[1.0]] * 4}}, "positive integers"),
    ],
)
def test_verify_raises_if_the_network_cannot_be_rebuilt(saved, zoo, tmp_path, fields, message):
    path = tmp_path / "x.npz"
    path.write_bytes(Good(saved).stating(**fields))
    with pytest.raises(WeightsError, match=message) as caught:
        convert.verify(path)
    assert str(caught.value).isprintable()


def test_verify_rebuilds_a_network_of_the_zoo(tmp_path):
    from kvision.convert import create_model

    model = create_model("softmax", input_shape=(8, 8, 1), classes=3)
    weights.save(model, tmp_path / "softmax.npz")
    assert convert.verify(tmp_path / "softmax.npz").ok


def test_diff(saved, tmp_path):
    good, path = Good(saved), tmp_path / "x.npz"
    assert convert.diff(saved, saved).equal
    kernel = good.arrays[KERNEL].copy()
    kernel.flat[[3, 7]] += np.float32([0.25, -2])
    path.write_bytes(good.honest(**{KERNEL: kernel, "conv/bias": None, "more": np.ones(2), "norm/beta": np.ones(9)}))
    found = convert.diff(saved, path)
    assert not found.equal
    assert (found.only_a, found.only_b) == (["conv/bias"], ["more"])
    assert found.shapes == {"norm/beta": ((4,), (9,))}
    assert found.largest[KERNEL] == pytest.approx(2, abs=1e-6)
    assert {key for key, value in found.largest.items() if value} == {KERNEL}
    path.write_bytes(good.stating(architecture="other", dataset="else"))
    assert convert.diff(saved, path).manifest == {"architecture": ("tiny", "other")}
    path.write_bytes(good.honest(**{KERNEL: good.spoiled(0, np.nan)}))
    assert convert.diff(saved, path).largest[KERNEL] == np.inf and convert.diff(path, path).equal


def test_inspect_reads_headers_and_manifest(saved, tmp_path):
    found = weights.inspect(saved)
    raw = saved.read_bytes()
    assert (found["bytes"], found["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert found["parameters"] == 148 and len(found["arrays"]) == 8
    assert found["arrays"][KERNEL] == {"shape": [3, 3, 3, 4], "dtype": "float32"}
    assert found["manifest"]["dataset"] == "made-up"
    assert json.loads(json.dumps(found)) == found
    good = Good(saved)
    (tmp_path / "x.npz").write_bytes(flipped(raw, raw.index(good.arrays[KERNEL].tobytes())))
    assert weights.inspect(tmp_path / "x.npz")["manifest"] == found["manifest"]  # values are not read
    np.savez(tmp_path / "y.npz", **good.arrays)
    assert weights.inspect(tmp_path / "y.npz")["manifest"] is None


# --- command line and table


def command(*words):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["weights", *map(str, words)])
    return arguments.handler(arguments)


def test_commands_print_and_return_their_exit_codes(saved, zoo, tmp_path, capsys):
    good, bad, changed = Good(saved), tmp_path / "bad.npz", tmp_path / "changed.npz"
    bad.write_bytes(good.raw[:-30])
    changed.write_bytes(good.honest(**{KERNEL: good.spoiled(5, 3.0)}))

    assert command("inspect", saved) == 0
    printed = capsys.readouterr().out
    assert "tiny, 148 parameters in 8 arrays" in printed and re.search(r"conv/kernel +float32 +3 x 3 x 3 x 4", printed)
    assert command("inspect", "--json", saved) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(saved), **weights.inspect(saved)}

    assert command("verify", saved) == 0
    assert command("verify", saved, bad, changed) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(": ")[0] for line in lines] == [str(saved), str(bad), str(changed)]
    assert ": ok," in lines[0] and "is not an .npz file" in lines[1] and ": WRONG," in lines[2]

    assert command("diff", saved, saved) == 0
    assert command("diff", saved, changed) == 1
    assert "conv/kernel: differs by up to" in capsys.readouterr().out
    for words in (("inspect", bad), ("diff", saved, bad)):
        with pytest.raises(WeightsError, match=r"is not an .npz file"):
            command(*words)


def test_table_of_a_folder_is_made_from_the_manifests(saved, trained, tmp_path, capsys):
    (tmp_path / "b.npz").write_bytes(saved.read_bytes())
    weights.save(trained, tmp_path / "a.npz", accuracy={"tensorflow": 0.5}, dataset="x|y")
    sha256 = hashlib.sha256(saved.read_bytes()).hexdigest()[:12]
    made = weights.table(tmp_path).splitlines()
    assert made[0] == (
        "| file | architecture | data set | parameters | accuracy, jax | accuracy, tensorflow | accuracy, torch "
        "| size | sha256 | made by |"
    )
    assert made[2].startswith("| [a.npz](a.npz) | tiny | x\\|y | 148 |  | 50.00% |  | ")
    assert made[3] == (
        f"| [b.npz](b.npz) | tiny | made-up | 148 | 91.00% |  | 91.50% | {saved.stat().st_size / 1e3:.1f} kB "
        f"| `{sha256}` | `python -m apps.cifar10 --seed 0` |"
    )
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- weights:start -->\nold\n<!-- weights:end -->\nafter\n")
    assert command("table", tmp_path, "--write", readme) == 0
    expected = "before\n<!-- weights:start -->\n" + "\n".join(made) + "\n<!-- weights:end -->\nafter\n"
    assert readme.read_text() == expected
    assert command("table", tmp_path, "--write", readme) == 0 and readme.read_text() == expected
    assert command("table", tmp_path) == 0 and capsys.readouterr().out.splitlines() == made
    readme.write_text("no markers")
    with pytest.raises(WeightsError, match="lacks the lines"):
        command("table", tmp_path, "--write", readme)
    np.savez(tmp_path / "c.npz", a=np.ones(2))
    with pytest.raises(WeightsError, match=r"c\.npz: has no manifest"):
        weights.table(tmp_path)
    with pytest.raises(WeightsError, match="is not a folder"):
        weights.table(tmp_path / "none")


def test_reading_a_manifest_imports_no_backend(saved):
    read = "weights.inspect(sys.argv[1]); convert.diff(*sys.argv[1:]); print('keras' in sys.modules)"
    code = f"import sys; from kvision import convert, weights; {read}"
    done = subprocess.run([sys.executable, "-c", code, saved, saved], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
