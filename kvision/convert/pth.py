"""Reader and writer of PyTorch's `state_dict` files, without PyTorch and without executing their code.

A `.pth` is a pickle that describes the tensors, and the bytes of their storages: since PyTorch 1.6 both in a zip file
(serialization.py of https://github.com/pytorch/pytorch), before that consecutive in one file. `kvision.safe_pickle`
interprets the opcodes; the allowed names are those that a `state_dict` of plain tensors needs.
"""

import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import ml_dtypes
import numpy as np

from kvision.data import zipped
from kvision.safe_pickle import Refused, copied, expect, interpret, text
from kvision.untrusted import Budget, open_regular, read_exactly, translate_errors
from kvision.weights.archive import plain_bytes, weights_error, write_zip

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before the zip format
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
MAX_AXES = 32
NESTED = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts store the state_dict


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

    def array(self, values: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the tensor's values in C order: a view of its storage if that has this order, else a copy."""
        count = math.prod(self.shape)
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        if count and (self.offset + last >= len(values) or count > len(values)):
            raise ValueError(f"a tensor of shape {self.shape} does not fit into its storage of {len(values)} values")
        if not count:
            return np.zeros(self.shape, values.dtype)
        strides = [stride * values.itemsize for stride in self.strides]
        array = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)
        if not array.flags.c_contiguous:
            budget.take(array.nbytes, "non-contiguous tensors")
            array = array.copy(order="C")
        return array


def _call(budget: Budget, kind: str, arguments: tuple) -> object:
    if kind == "dict":
        return copied(arguments[0], budget) if arguments else {}
    if kind == "size":
        if len(expect(arguments[0], (tuple, list))) > MAX_AXES:
            raise ValueError(f"a shape of {len(arguments[0])} axes")
        return tuple(arguments[0])
    if kind == "parameter":
        return expect(arguments[0], _Tensor)
    if kind != "tensor":
        raise Refused(f"a call of torch.{kind}")
    storage, offset, shape, strides = arguments[:4]
    if len(expect(shape, tuple)) > MAX_AXES:
        raise ValueError(f"a shape of {len(shape)} axes")
    numbers = [offset, *expect(shape, tuple), *expect(strides, tuple)]
    if any(type(number) is not int or not 0 <= number < 2**60 for number in numbers) or len(shape) != len(strides):
        raise ValueError("a tensor whose shape or strides are not natural numbers")
    if len(shape) > MAX_AXES or math.prod(max(1, length) for length in shape) >= 2**60:  # beyond NumPy's indices
        raise ValueError("a tensor of too many axes or values")
    return _Tensor(expect(storage, _Storage), offset, shape, strides)


def _set_state(target: object, state: object) -> None:
    expect(target, dict)  # an OrderedDict's attributes, such as a module's `_metadata`, are ignored
    expect(state, dict)


def _storage(identity: object) -> _Storage:
    kind, storage, key, _, count, *_ = expect(identity, tuple)
    name = getattr(storage, "kind", None)
    if kind != "storage" or name not in STORAGES or type(count) is not int or count < 0:
        raise Refused(f"a storage of {str(name)[:40]}")
    return _Storage(np.dtype(STORAGES[name]), text(key), count)


def _unpickle(source, budget: Budget) -> object:
    return interpret(source, NAMES, partial(_call, budget), _set_state, budget, _storage, floats=True)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the tensors of a `state_dict`, and the names of other entries.

    The dictionary may be nested in another one, under "state_dict" or "model", as by training scripts. Tensors with a
    common storage share memory.

    Args:
        path: a file of `torch.save`, of either format.

    Returns:
        (arrays by name in C order, the keys of entries that are not tensors).

    Raises:
        WeightsError: the file is damaged, contains more than plain tensors, strings and numbers, or needs more memory
            than its size justifies. Nothing is executed.
    """
    with (
        translate_errors(
            partial(weights_error, path), "file of PyTorch", "download it again, or save a plain state_dict"
        ),
        open_regular(path) as file,
    ):
        budget = Budget(os.fstat(file.fileno()).st_size)
        try:
            tensors, storages = (_read_zip if file.read(2) == b"PK" else _read_legacy)(file, budget)
        except Refused as error:
            raise weights_error(path, f"contains {error}; it was not executed") from None
        arrays, ignored = _arrays(expect(tensors, dict), storages, budget)
    if not arrays:
        raise weights_error(path, "contains no tensors")
    return arrays, ignored


def _arrays(tensors: dict, read_bytes: Callable[[_Storage], np.ndarray], budget: Budget):
    """Return the arrays of a state_dict by name, and the keys of other entries."""
    ignored, arrays, storages = [], {}, {}
    for name in NESTED:
        if isinstance(tensors.get(name), dict):
            ignored = [text(key) for key in tensors if key != name]
            tensors = tensors[name]
            break
    for key, tensor in tensors.items():
        if not isinstance(tensor, _Tensor):
            ignored.append(text(key))
            continue
        storage = tensor.storage
        if storage.key not in storages:
            values = read_bytes(storage)
            if len(values) != storage.count * storage.dtype.itemsize:
                raise ValueError(f"the storage of {text(key)} has {len(values)} bytes, expected {storage.count} values")
            if storage.dtype == np.bool_ and values.max(initial=0) > 1:
                raise ValueError(f"{text(key)} is of dtype bool but contains bytes other than 0 and 1")
            values = values.view(storage.dtype.newbyteorder("<")).astype(storage.dtype, copy=False)
            storages[storage.key] = (storage, values)
        known, values = storages[storage.key]
        if known != storage:
            raise ValueError(f"the storage of {text(key)} has two descriptions")
        if text(key) in arrays:
            raise ValueError(f"{text(key)} occurs twice")
        arrays[text(key)] = tensor.array(values, budget)
    return arrays, ignored


def _read_zip(file: BinaryIO, budget: Budget):
    entries = {entry.name: entry for entry in zipped.directory(file)}

    def content(name: str) -> np.ndarray:
        if name not in entries or entries[name].deflated:
            raise ValueError(f"{name[:80]} is missing, or compressed, which PyTorch never does")
        values = zipped.content(file, entries[name], budget)
        if zlib.crc32(values) != entries[name].crc:
            raise ValueError(f"{name[:80]} does not match its checksum")
        return values

    (pickle,) = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    folder = pickle.removesuffix("data.pkl")
    if f"{folder}byteorder" in entries and content(f"{folder}byteorder").tobytes() != b"little":
        raise ValueError("written on a big-endian machine")
    tensors = _unpickle(content(pickle).tobytes(), budget)
    return tensors, lambda storage: content(f"{folder}data/{storage.key}")


def _read_legacy(file: BinaryIO, budget: Budget):
    file.seek(0)
    if _unpickle(file, budget) != MAGIC or _unpickle(file, budget) != PROTOCOL:
        raise ValueError("it does not start with PyTorch's magic number and protocol")
    system = _unpickle(file, budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("written on a big-endian machine")
    tensors = _unpickle(file, budget)
    positions = {}
    sizes = {
        value.storage.key: value.storage
        for group in (tensors, *(tensors.values() if isinstance(tensors, dict) else ()))
        if isinstance(group, dict)
        for value in group.values()
        if isinstance(value, _Tensor)
    }
    for key in expect(_unpickle(file, budget), list):
        (count,) = struct.unpack("<q", file.read(8))
        storage = sizes[text(key)]  # a storage without a tensor has no known size
        if count != storage.count:
            raise ValueError(f"storage {text(key)} has {count} values, its tensors expect {storage.count}")
        positions[text(key)] = file.tell()
        file.seek(count * storage.dtype.itemsize, os.SEEK_CUR)

    def content(storage: _Storage) -> np.ndarray:
        size = storage.count * storage.dtype.itemsize
        budget.take(size, f"the storage {storage.key[:80]}")
        return read_exactly(file, positions[storage.key], size, f"the storage {storage.key[:80]}")

    return tensors, content


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray], version: int | None = None) -> None:
    """Write arrays as a `state_dict` for `torch.load(path, weights_only=True)`; the same arrays give the same bytes.

    Args:
        version: of the arrays' module, stored in PyTorch's `_metadata`; None stores none.

    Raises:
        WeightsError: a dtype that PyTorch does not support, or a disk error.
    """
    kinds = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
    ordered = b"ccollections\nOrderedDict\n)R"
    pickle, members = [b"\x80\x02", ordered, b"("], {}
    string = lambda value: b"X" + struct.pack("<I", len(value.encode())) + value.encode()  # noqa: E731
    number = lambda value: b"\x8a\x08" + struct.pack("<q", value)  # noqa: E731  (LONG1)
    for i, (key, array) in enumerate(arrays.items()):
        if array.dtype.newbyteorder("=") not in kinds:
            raise weights_error(path, f"{key} has dtype {array.dtype}, which PyTorch does not support")
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
