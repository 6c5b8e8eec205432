"""Mutated weights files of every format: each is read or refused, and nothing else happens.

`python -m tests.fuzz_weights --files 10000` makes that many, changes them at random and prints what became of them; it
ends with code 1 where a reader raised anything but WeightsError, took longer than ten seconds, or ran code of a file.
"""

import argparse
import io
import os
import pickle
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np

from kvision.convert import formats, hdf5, pth, safetensors
from kvision.weights import WeightsError
from kvision.weights.archive import write

LIMIT = 10.0  # seconds for one file
MEMORY = 64 << 20  # bytes for one file; the valid ones have some thousand


def _checkpoint() -> bytes:
    """A TensorFlow checkpoint of version 1, made by the format's description: two tensors, one block each."""

    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def field(number, content):
        if isinstance(content, int):
            return varint(number << 3) + varint(content)
        return varint(number << 3 | 2) + varint(len(content)) + content

    def shape(*sizes):
        return b"".join(field(2, field(1, size)) for size in sizes)

    def block(entries):
        body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in entries)
        return body + struct.pack("<II", 0, 1)

    arrays = {"a/weights": np.arange(6, dtype=np.float32).reshape(2, 3), "a/biases": np.ones(3, np.float32)}
    described = [field(1, field(1, k.encode()) + field(2, shape(*a.shape)) + field(3, 1)) for k, a in arrays.items()]
    entries = [(b"", field(1, b"".join(described)))]
    for key, array in arrays.items():
        tensor = field(1, 1) + field(5, array.tobytes())
        slices = b"".join(field(1, b"") for _ in array.shape)
        entries.append((key.encode(), field(2, field(1, key.encode()) + field(2, slices) + field(3, tensor))))
    data = block(entries)
    handle = varint(0) + varint(len(data))
    file = data + b"\0" + b"\0" * 4
    index = block([(b"z", handle)])
    footer = varint(0) + varint(0) + varint(len(file)) + varint(len(index))
    file += index + b"\0" + b"\0" * 4
    return file + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


class _Canary:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "kvision_canary"),)


def seeds(folder: Path) -> dict[str, bytes]:
    """A small valid file of each format (and a pickle that would run code)."""
    arrays = {
        "conv/kernel": np.arange(54, dtype=np.float32).reshape(3, 3, 2, 3),
        "bn/gamma": np.ones(3, np.float16),
        "bn/count": np.array(7, np.int64),
    }
    write(folder / "seed.npz", arrays)
    pth.write(folder / "seed.pth", {**arrays, "half": np.ones(4, ml_dtypes.bfloat16)})
    safetensors.write(folder / "seed.safetensors", {**arrays, "half": np.ones(4, ml_dtypes.bfloat16)})
    hdf5.write(folder / "seed.h5", arrays)
    legacy = io.BytesIO()
    for item in (pth.MAGIC, pth.PROTOCOL, {"little_endian": True}):
        pickle.dump(item, legacy, protocol=2)
    storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpuK\x06tQ"
    body = b"ctorch._utils\n_rebuild_tensor\n((" + storage + b"K\0(K\x02K\x03t(K\x03K\x01ttR"
    legacy.write(b"\x80\x02}(X\x01\0\0\0w" + body + b"u.")
    pickle.dump(["a"], legacy, protocol=2)
    legacy.write(struct.pack("<q", 6) + np.arange(6, dtype=np.float32).tobytes())
    return {
        **{kind: (folder / f"seed.{kind}").read_bytes() for kind in ("npz", "pth", "safetensors", "h5")},
        "legacy": legacy.getvalue(),
        "checkpoint": _checkpoint(),
        "canary": pickle.dumps({"w": _Canary()}, protocol=2),
    }


def mutate(blob: bytes, generator: np.random.Generator) -> bytes:
    """A few random changes: bits, bytes, lengths, cuts, pieces moved, doubled or of another file's kind."""
    data = bytearray(blob)
    for _ in range(int(generator.integers(1, 5))):
        if not data:
            break
        kind, at = int(generator.integers(7)), int(generator.integers(len(data)))
        if kind == 0:
            data[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            data[at] = int(generator.choice([0, 1, 127, 128, 254, 255]))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + int(generator.integers(1, 9))]
        elif kind == 4:
            end = at + int(generator.integers(1, 65))
            data[at:at] = data[at:end] * int(generator.integers(1, 4))
        elif kind == 5:
            number = int(generator.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
            size = int(generator.choice([1, 2, 4, 8]))
            data[at : at + size] = (number % 256**size).to_bytes(size, "little")
        else:
            data[at : at + 4] = generator.bytes(4)
    return bytes(data)


def outcome(path: Path) -> str:
    """What reading a file comes to: "read", "refused", or what should not happen."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            formats.read(path)
        result = "read"
    except WeightsError as error:
        result = "refused" if "\n" not in str(error) else "a message of several lines"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if seconds > LIMIT:
        return f"took {seconds:.1f} s"
    if peak > MEMORY:
        return f"took {peak >> 20} MiB"
    if (Path(tempfile.gettempdir()) / "kvision_canary").exists():
        return "ran code"
    return result


def fuzz(files: int, seed: int = 0) -> dict[str, Counter]:
    """Outcomes by format, of `files` mutated files, spread evenly over the formats but for fewer of HDF5."""
    generator, found = np.random.default_rng(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        valid = seeds(Path(folder))
        path = Path(folder) / "mutated"
        kinds = [kind for kind in valid if kind != "h5"] * 8 + ["h5"]  # which starts a process for each
        for i in range(files):
            kind = kinds[i % len(kinds)]
            path.write_bytes(mutate(valid[kind], generator))
            found.setdefault(kind, Counter())[outcome(path)] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = fuzz(arguments.files, arguments.seed)
    for kind, outcomes in found.items():
        print(f"{kind}: {', '.join(f'{count} {what}' for what, count in outcomes.most_common())}")
    return int(any(what not in ("read", "refused") for outcomes in found.values() for what in outcomes))


if __name__ == "__main__":
    sys.exit(main())
