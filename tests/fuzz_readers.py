"""Coverage-guided fuzzing of every reader of foreign files, by atheris (https://github.com/google/atheris).

`python -m tests.fuzz_readers --seconds 3600 --out fuzzing.json` shares the time among all readers; `--reader NAME`
takes one. It needs `pip install atheris`. Each input is read or refused. Any other exception, more than 10 seconds,
more memory than 64 MiB and 8 times the input, or the end of the process is a finding: it is kept in the folder
`--findings`, and the exit code is 1. HDF5's own process is forked here instead of started, and the Python of what it
runs is then run once more in this one, where coverage is counted.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import platform
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

BASE, FACTOR = 64 << 20, 8
SECONDS = 10
SLACK = 4 << 20  # of the interpreter and of coverage itself
MODULES = ["kvision", "pickletools", "tarfile", "zipfile", "gzip", "PIL"]
MAX_LENGTH = 1 << 16


# --- seeds: small valid files, made by code


def _npz(packed: bool, **arrays) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(stream, **arrays)
    return stream.getvalue()


def _digits() -> dict:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (4, 3, 3), np.uint8),
        "y_train": np.arange(4) % 2,
        "x_test": generator.integers(0, 256, (2, 3, 3), np.uint8),
        "y_test": np.arange(2),
    }


def _h5(folder: Path, variable: bool, wrapped: bool) -> bytes:
    """Keras's layout, with names of fixed or of variable length, at the root or under "model_weights"."""
    import h5py

    with h5py.File(folder / "seed.h5", "w") as file:
        root = file.create_group("model_weights") if wrapped else file
        text = h5py.string_dtype() if variable else "S8"
        root.attrs["layer_names"] = np.array(["conv", "bn"], dtype=text)
        for layer, names in (("conv", ["kernel:0", "bias:0"]), ("bn", ["gamma:0"])):
            group = root.create_group(layer)
            group.attrs["weight_names"] = np.array([f"{layer[0]}/{name}" for name in names], dtype=h5py.string_dtype())
            for name in names:
                group[f"{layer[0]}/{name}"] = np.arange(6, dtype=np.float32)
    return (folder / "seed.h5").read_bytes()


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, content: int | bytes) -> bytes:
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _bundle() -> bytes:
    """A TensorFlow checkpoint of version 2: its index and its one file of values, the index's length ahead."""
    arrays = {b"a/biases": np.ones(3, np.float32), b"a/weights": np.arange(6, dtype=np.float32).reshape(2, 3)}
    entries, offset, values = [(b"", _field(1, 1) + _field(3, b"\x08\x01"))], 0, b""
    for name, array in arrays.items():
        shape = b"".join(_field(2, _field(1, length)) for length in array.shape)
        entry = _field(1, 1) + _field(2, shape) + _field(4, offset) + _field(5, array.nbytes)
        entries.append((name, entry))
        values += array.tobytes()
        offset += array.nbytes
    body = b"".join(_varint(0) + _varint(len(k)) + _varint(len(v)) + k + v for k, v in entries)
    data = body + struct.pack("<II", 0, 1)
    file = data + bytes(5)
    handle = _varint(0) + _varint(len(data))
    index = _varint(0) + _varint(1) + _varint(len(handle)) + b"z" + handle + struct.pack("<II", 0, 1)
    footer = _varint(0) + _varint(0) + _varint(len(file)) + _varint(len(index))
    table = file + index + bytes(5) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return struct.pack("<H", len(table)) + table + values


def _tar(mode: str) -> bytes:
    import tarfile  # here and below late, so that coverage is counted in what the readers import first

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.PAX_FORMAT) as tar:
        for name in ("data_batch_1", "test_batch", "batches.meta", "n" * 120):
            content = pickle.dumps({"labels": [1, 2], "label_names": ["airplane"]}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _images() -> list[bytes]:
    from PIL import Image

    found = []
    for kind, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
    ):
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        extra = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
        Image.new(mode, (9, 7)).save(stream, kind, **options, **extra)
        found.append(stream.getvalue())
    return found


def seeds(reader: str, folder: Path) -> list[bytes]:
    """Small valid files of a reader's format."""
    import gzip

    from tests import fuzz_weights

    digits = _digits()
    if reader in ("pth", "pth_legacy", "safetensors", "tf_version_1", "weights_npz"):
        made = fuzz_weights.seeds(folder)
    if reader == "weights_npz":
        manifest = {
            "format": "kvision-npz",
            "format_version": 1,
            "architecture": "tiny",
            "arguments": {"classes": 2, "input_shape": [8, 8, 3]},
            "classes": ["a", "b"],
            "input_size": [8, 8],
            "preprocessing": None,
            "dataset": "made",
            "accuracy": {"jax": 0.5},
            "license": "MIT",
            "provenance": {},
            "arrays": {"a": {"shape": [2], "dtype": "float32", "sha256": hashlib.sha256(bytes(8)).hexdigest()}},
            "probe": {"shape": [4, 8, 8, 3], "logits": [[0.5, 1.0]] * 4},
        }
        text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
        a = np.zeros(2, np.float32)
        return [made["npz"], *(_npz(packed, __manifest__=text, a=a) for packed in (False, True))]
    if reader == "h5":
        return [_h5(folder, variable, wrapped) for variable in (False, True) for wrapped in (False, True)]
    return {
        "pth": lambda: [made["pth"]],
        "pth_legacy": lambda: [made["legacy"], made["canary"]],
        "safetensors": lambda: [made["safetensors"]],
        "tf_version_1": lambda: [made["checkpoint"]],
        "tf_version_2": lambda: [_bundle()],
        "cifar_pickle": lambda: [
            pickle.dumps(
                {"labels": [1, 2], "data": np.zeros((2, 4), np.uint8), b"names": [b"a", "b"]}, protocol=protocol
            )
            for protocol in range(6)
        ],
        "mnist_idx": lambda: [
            content
            for content in (bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 3, 3) + bytes(range(18)),)
            for content in (content, gzip.compress(content))
        ],
        "data_npz": lambda: [_npz(packed, **digits) for packed in (False, True)],
        "tar": lambda: [_tar("w"), _tar("w:gz")],
        "images": _images,
    }[reader]()


READERS = (
    "pth",
    "pth_legacy",
    "safetensors",
    "h5",
    "tf_version_1",
    "tf_version_2",
    "cifar_pickle",
    "mnist_idx",
    "data_npz",
    "tar",
    "images",
    "weights_npz",
)


# --- one input


def target(reader: str, folder: Path):
    """A function that reads one input of a reader's format, and the errors that are a refusal."""
    from kvision.convert import formats
    from kvision.data import cifar, images, mnist, npz, tar, unpickle
    from kvision.data.dataset import DataError
    from kvision.weights import WeightsError, inspect

    path = folder / "input"

    def file(read, name: str = "input"):
        def run(blob: bytes) -> None:
            (folder / name).write_bytes(blob)
            read(folder / name)

        return run

    def idx(blob: bytes) -> None:
        place = folder / "some"
        place.mkdir(exist_ok=True)
        for name in mnist.FILES[1:]:
            shape = (2, 3, 3) if "idx3" in name else (2,)
            sizes = struct.pack(f">{len(shape)}I", *shape)
            (place / name).write_bytes(bytes([0, 0, 8, len(shape)]) + sizes + bytes(int(np.prod(shape))))
        for ending in ("", ".gz"):
            (place / (mnist.FILES[0] + ending)).unlink(missing_ok=True)
        (place / (mnist.FILES[0] + ".gz" * blob.startswith(b"\x1f\x8b"))).write_bytes(blob)
        mnist.read_idx_folder(place, "digits")

    def bundle(blob: bytes) -> None:
        size = int.from_bytes(blob[:2], "little")
        (folder / "model.index").write_bytes(blob[2 : 2 + size])
        (folder / "model.data-00000-of-00001").write_bytes(blob[2 + size :])
        formats.read(folder / "model")

    def read_tar(blob: bytes) -> None:
        path.write_bytes(blob)
        try:
            cifar.read_archive(path)
        except DataError:
            tar.unpack_tar(path, folder / "cifar-10-batches-py")

    def weights(read_path: Path) -> None:
        try:
            inspect(read_path)
        except WeightsError:
            formats.read(read_path)
        else:
            formats.read(read_path)

    run = {
        "weights_npz": file(weights),
        "h5": file(formats.read),
        "tf_version_2": bundle,
        "cifar_pickle": lambda blob: unpickle.unpickle(blob, "input"),
        "mnist_idx": idx,
        "data_npz": file(npz.read_npz, "input.npz"),
        "tar": read_tar,
        "images": file(images.read_image),
    }.get(reader, file(formats.read))
    if reader == "h5":
        _fork_hdf5()
    return run, (WeightsError, DataError)


def _fork_hdf5() -> None:
    """Run what HDF5's child process runs in a fork, which takes a hundredth of the time."""
    import h5py

    from kvision.convert import hdf5, hdf5_child

    hdf5_child.SECONDS = 1

    def ask(path):
        out, into = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.dup2(into, 1)
                os.write(1, json.dumps(hdf5_child.locate(str(path), hdf5.BASE)).encode())
            finally:
                os._exit(0)
        os.close(into)
        with open(out, "rb") as answer:
            said = answer.read()
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if not code:  # it ended by itself: then it does so here too, and its Python is seen
            try:
                with h5py.File(path, "r") as file:
                    hdf5_child.contents(file)
            except Exception:
                pass  # the child has reported it
        return subprocess.CompletedProcess([], code, said, b"")

    hdf5._run_child = ask


def _memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def fuzz_one(reader: str, seconds: int, corpus: Path, findings: Path) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=MODULES):
        pass

    warnings.simplefilter("ignore")
    work = Path(tempfile.mkdtemp())
    run, refusals = target(reader, work)
    seen = set()

    def report(kind: str, blob: bytes, detail: str) -> None:
        if kind not in seen:
            seen.add(kind)
            name = hashlib.sha256(f"{reader} {kind}".encode()).hexdigest()[:12]
            (findings / f"{reader}-{name}").write_bytes(blob)
            (findings / f"{reader}-{name}.txt").write_text(f"{kind}\n\n{detail}")
            print(f"finding: {reader}: {kind}", file=sys.stderr)

    def one(blob: bytes) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, started = _memory("VmRSS"), os.times()
        try:
            run(blob)
        except refusals as error:
            if not str(error).isprintable():
                report("a message that is no printable line", blob, repr(error))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            report(f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}", blob, traceback.format_exc())
        # Of processors, not on the clock: a machine may be busy. libFuzzer's own limit is for what never ends.
        seconds = sum(os.times()[:4]) - sum(started[:4])
        if seconds > SECONDS:
            report("time", blob, f"{seconds:.1f} s")
        taken = _memory("VmHWM") - before
        if taken > BASE + FACTOR * len(blob) + SLACK:
            report("memory", blob, f"{taken:,} bytes for an input of {len(blob):,}")

    options = [
        f"-max_total_time={seconds}",
        "-timeout=120",
        "-report_slow_units=120",
        f"-max_len={MAX_LENGTH}",
        "-rss_limit_mb=2048",
    ]
    options += ["-print_final_stats=1", f"-artifact_prefix={findings}/{reader}-", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def fuzz(reader: str, seconds: int, findings: Path) -> dict:
    """Fuzz one reader for some time in processes; figures of what was done."""
    figures = {"executions": 0, "seconds": 0.0, "edges": 0, "corpus": 0}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, blob in enumerate(seeds(reader, Path(folder))):
            (corpus / f"seed{number}").write_bytes(blob)
        started = time.monotonic()
        while (left := seconds - int(time.monotonic() - started)) > 0:
            command = [sys.executable, "-m", "tests.fuzz_readers", "--one", reader, "--seconds", str(left)]
            command += ["--corpus", str(corpus), "--findings", str(findings)]
            environment = {**os.environ, "TMPDIR": folder}
            done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
            numbers = re.findall(r"cov: (\d+)", done.stderr)
            executed = re.findall(r"number_of_executed_units: (\d+)|^#(\d+)\s", done.stderr, re.MULTILINE)
            figures["executions"] += max((int(a or b) for a, b in executed), default=0)
            figures["edges"] = max([figures["edges"], *map(int, numbers)])
            if not executed:
                raise SystemExit(f"{reader}: the fuzzer did not start\n{done.stderr[-2000:]}")
        figures["seconds"] = round(time.monotonic() - started, 1)
        figures["corpus"] = len(list(corpus.iterdir()))
    if (canary := Path(tempfile.gettempdir()) / "kvision_canary").exists():  # what the seed with code would make
        (findings / f"{reader}-code").write_text(f"a file's code was run: it made {canary}")
    figures["findings"] = len({path.name.split(".")[0] for path in findings.glob(f"{reader}-*")})
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reader", choices=READERS, help="all of them if left out")
    parser.add_argument("--seconds", type=int, default=600, help="in all (%(default)s)")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "kvision_findings")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--one", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        fuzz_one(arguments.one, arguments.seconds, arguments.corpus, arguments.findings)
        return 0
    names = [arguments.reader] if arguments.reader else READERS
    found = {}
    for name in names:
        found[name] = fuzz(name, arguments.seconds // len(names), arguments.findings)
        print(f"{name}: {found[name]}", flush=True)
        if arguments.out:
            versions = {"python": platform.python_version(), "numpy": np.__version__}
            command = f"python -m tests.fuzz_readers --seconds {arguments.seconds}"
            text = json.dumps({"command": command, "versions": versions, "readers": found}, indent=2)
            arguments.out.write_text(text + "\n")
    return int(any(figures["findings"] for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
