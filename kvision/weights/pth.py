"""PyTorch's files of a `state_dict`, read and written without PyTorch and without running their code.

A `.pth` is a pickle that describes the tensors, and the bytes of their storages: since PyTorch 1.6 both in a zip file
(serialization.py of https://github.com/pytorch/pytorch), before in one file, one after the other. The pickle's opcodes
are interpreted (`kvision.data.opcodes`); what it may name is what a `state_dict` of plain tensors needs.
"""

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from kvision.data.opcodes import BROKEN, Refused, expect, interpret, text
from kvision.weights.archive import plain_bytes, refusal, write_zip

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the files before the zip format
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
NAMES = {
    "collections OrderedDict": "dict",
    "torch Size": "size",
    "torch._utils _rebuild_tensor": "tensor",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
    **{f"torch {name}": name for name in STORAGES},
}
NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the state_dict


@dataclass
class _Storage:
    dtype: np.dtype
    key: str
    count: int


@dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, values: np.ndarray) -> np.ndarray:
        """The tensor's own values, in C order, of those of its storage."""
        count = math.prod(self.shape)
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        if count and (self.offset + last >= len(values) or count > len(values)):
            raise ValueError(f"a tensor of shape {self.shape} that its storage of {len(values)} values does not hold")
        if not count:
            return np.zeros(self.shape, values.dtype)
        strides = [stride * values.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides).copy(order="C")


def _call(kind: str, arguments: tuple) -> object:
    if kind == "dict":
        return dict(arguments[0]) if arguments else {}
    if kind == "size":
        return tuple(expect(arguments[0], (tuple, list)))
    if kind == "parameter":
        return expect(arguments[0], _Tensor)
    if kind != "tensor":
        raise Refused(f"a call of torch.{kind}")
    storage, offset, shape, strides = arguments[:4]
    numbers = [offset, *expect(shape, tuple), *expect(strides, tuple)]
    if any(type(number) is not int or not 0 <= number < 2**60 for number in numbers) or len(shape) != len(strides):
        raise ValueError("a tensor whose shape or strides are no natural numbers")
    if len(shape) > 32 or math.prod(max(1, length) for length in shape) >= 2**60:  # more than NumPy indexes
        raise ValueError("a tensor of too many axes or values")
    return _Tensor(expect(storage, _Storage), offset, shape, strides)


def _set_state(target: object, state: object) -> None:
    expect(target, dict)  # an OrderedDict's attributes, such as a module's `_metadata`: not read
    expect(state, dict)


def _storage(identity: object) -> _Storage:
    kind, storage, key, _, count, *_ = expect(identity, tuple)
    name = getattr(storage, "kind", None)
    if kind != "storage" or name not in STORAGES or type(count) is not int or count < 0:
        raise Refused(f"a storage of {str(name)[:40]}")
    return _Storage(np.dtype(STORAGES[name]), text(key), count)


def _unpickle(source) -> object:
    return interpret(source, NAMES, _call, _set_state, _storage, floats=True)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a `state_dict`, and the names of what is there besides.

    The dictionary may lie in another one, under "state_dict" or "model", as training scripts leave it.

    Args:
        path: a file of `torch.save`, of either format.

    Returns:
        (arrays by name in C order, the keys of entries that are no tensors).

    Raises:
        WeightsError: the file is damaged, or holds more than plain tensors, strings and numbers. Nothing was executed.
    """
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror}") from None
    try:
        tensors, bytes_of = _read_zip(blob) if blob[:2] == b"PK" else _read_legacy(blob)
        if not isinstance(tensors, dict):
            raise ValueError(f"expected a state_dict, got a {type(tensors).__name__}")
        ignored = []
        for name in NESTED:
            if isinstance(tensors.get(name), dict):
                ignored = [text(key) for key in tensors if key != name]
                tensors = tensors[name]
                break
        arrays = {}
        for key, tensor in tensors.items():
            if not isinstance(tensor, _Tensor):
                ignored.append(text(key))
                continue
            storage = tensor.storage
            values = bytes_of(storage)
            if len(values) != storage.count * storage.dtype.itemsize:
                raise ValueError(f"the storage of {text(key)} has {len(values)} bytes, expected {storage.count} values")
            if storage.dtype == np.bool_ and max(values, default=0) > 1:
                raise ValueError(f"{text(key)} is of dtype bool but holds other bytes than 0 and 1")
            arrays[text(key)] = tensor.array(np.frombuffer(values, storage.dtype.newbyteorder("<")))
    except Refused as error:
        raise refusal(path, f"holds {error}; it was not executed") from None
    except (*BROKEN, zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, MemoryError) as error:
        raise refusal(path, f"is no readable file of PyTorch: {type(error).__name__}: {error}") from None
    if not arrays:
        raise refusal(path, "holds no tensors")
    return {key: array.astype(array.dtype.newbyteorder("=")) for key, array in arrays.items()}, ignored


def _read_zip(blob: bytes):
    zipped = zipfile.ZipFile(io.BytesIO(blob))
    infos = {info.filename: info for info in zipped.infolist()}

    def content(name: str) -> bytes:
        info = infos[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(blob):
            raise ValueError(f"{name} is packed, which PyTorch never does")
        return zipped.read(info)

    (pickle,) = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
    folder = pickle.removesuffix("data.pkl")
    if f"{folder}byteorder" in infos and content(f"{folder}byteorder") != b"little":
        raise ValueError("written on a big-endian machine")
    return _unpickle(content(pickle)), lambda storage: content(f"{folder}data/{storage.key}")


def _read_legacy(blob: bytes):
    stream = io.BytesIO(blob)
    if _unpickle(stream) != MAGIC or _unpickle(stream) != PROTOCOL:
        raise ValueError("it starts with neither of PyTorch's marks")
    system = _unpickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("written on a big-endian machine")
    tensors = _unpickle(stream)
    storages = {}
    sizes = {
        value.storage.key: value.storage
        for group in (tensors, *(tensors.values() if isinstance(tensors, dict) else ()))
        if isinstance(group, dict)
        for value in group.values()
        if isinstance(value, _Tensor)
    }
    for key in expect(_unpickle(stream), list):
        (count,) = struct.unpack("<q", stream.read(8))
        storage = sizes[text(key)]  # a storage that no tensor uses has no known size
        if count != storage.count:
            raise ValueError(f"storage {text(key)} has {count} values, its tensors expect {storage.count}")
        storages[text(key)] = stream.read(count * storage.dtype.itemsize)
    return tensors, lambda storage: storages[storage.key]


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray], version: int | None = None) -> None:
    """Write arrays as a `state_dict` that `torch.load(path, weights_only=True)` reads; the same arrays, the same bytes.

    Args:
        version: of the module that the arrays are of, as PyTorch states it in `_metadata`; None states nothing.

    Raises:
        WeightsError: a dtype that PyTorch does not have, or the disk refuses.
    """
    kinds = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
    ordered = b"ccollections\nOrderedDict\n)R"
    pickle, members = [b"\x80\x02", ordered, b"("], {}
    string = lambda value: b"X" + struct.pack("<I", len(value.encode())) + value.encode()  # noqa: E731
    number = lambda value: b"\x8a\x08" + struct.pack("<q", value)  # noqa: E731  (LONG1)
    for i, (key, array) in enumerate(arrays.items()):
        if array.dtype.newbyteorder("=") not in kinds:
            raise refusal(path, f"{key} has dtype {array.dtype}, which PyTorch does not have")
        kind = kinds[array.dtype.newbyteorder("=")]
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        pickle += [string(key), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        pickle += [string("storage"), f"ctorch\n{kind}\n".encode(), string(str(i)), string("cpu"), number(array.size)]
        pickle += [b"tQ", number(0), b"(", *map(number, array.shape), b"t(", *map(number, strides), b"t\x89", ordered]
        pickle += [b"tR"]
        members[f"archive/data/{i}"] = partial(lambda array: [plain_bytes(array)], array)
    pickle.append(b"u")
    if version is not None:  # the attribute `_metadata` of the dictionary: {name of a module: {"version": ...}}
        pickle += [b"}", string("_metadata"), ordered, string(""), b"}", string("version"), number(version), b"sssb"]
    pickle.append(b".")
    write_zip(
        path,
        {
            "archive/data.pkl": lambda: pickle,
            "archive/byteorder": lambda: [b"little"],
            **members,
            "archive/version": lambda: [b"3\n"],
        },
    )
