"""Reader of TensorFlow's checkpoints, without TensorFlow and without building a graph.

Both versions are tables of LevelDB's format (https://github.com/google/leveldb/blob/main/doc/table_format.md) with
protocol buffers in them: version 1, one file, as TF-Slim published its networks (saved_tensor_slice.proto in
https://github.com/tensorflow/tensorflow), and version 2, an index and files of raw bytes next to it
(tensor_bundle.proto). The files' checksums (CRC-32C) are not verified: in Python that would take minutes.
"""

import math
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import BinaryIO

import ml_dtypes
import numpy as np

from kvision.untrusted import Budget, open_regular, read_exactly, translate_errors
from kvision.weights.archive import weights_error

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes
DTYPES = {  # of tensorflow/core/framework/types.proto
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    19: np.float16,
}
MAX_AXES = 32
MAX_NAME = 1_000  # bytes
MAX_SHARDS = 1_000
_OBJECT = 200  # bytes of Python's objects for an entry, and at most for a number
VALUES = {np.float32: 5, np.float64: 6, np.int64: 10, np.bool_: 11}  # fields of TensorProto; 7 for other integers


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of a protocol buffer: numbers, and uninterpreted bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind, size = tag & 7, 0
        if kind == 0:
            value, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = data[place : place + size]
        elif kind == 2:
            size, place = _varint(data, place)
            value = data[place : place + size]
        else:
            raise ValueError(f"a protocol buffer's field of kind {kind}")
        place += size
        if place > len(data):
            raise ValueError("a truncated protocol buffer")
        yield tag >> 3, value


def _shape(data: memoryview) -> tuple[int, ...]:
    """Return the shape of a TensorShapeProto."""
    shape = []
    for number, value in _fields(data):
        if number == 2 and len(shape) <= MAX_AXES:
            shape.append(dict(_fields(value)).get(1, 0))
    if len(shape) > MAX_AXES or math.prod(max(1, length) for length in shape) >= 2**60:
        raise ValueError(f"a tensor of shape {shape[:8]}")
    return tuple(shape)


def _table(data: memoryview, budget: Budget) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the entries of a table, key and value."""
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("it does not end like a checkpoint")
    footer = data[-FOOTER:]
    _, place = _varint(footer, 0)  # skip the metadata block: offset and size
    _, place = _varint(footer, place)
    free = 0
    for _, handle in _block(data, footer[place:], budget):
        start, place = _varint(handle, 0)
        size, _ = _varint(handle, place)
        if start < free:
            raise ValueError("blocks that overlap, or a repeated block")
        free = start + size
        yield from _block(data, handle, budget)


def _block(data: memoryview, handle: memoryview, budget: Budget) -> Iterator[tuple[bytes, memoryview]]:
    offset, place = _varint(handle, 0)
    size, _ = _varint(handle, place)
    if size < 4 or offset + size + 5 > len(data):
        raise ValueError("a block beyond the end of the file")
    if data[offset + size] != 0:
        raise ValueError("a compressed block, which TensorFlow's checkpoints do not have")
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end, place, key = size - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise ValueError("a block that is shorter than it states")
    while place < end:
        shared, place = _varint(block, place)
        fresh, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or place + fresh + length > end:
            raise ValueError("an entry beyond the end of its block")
        # Keys share prefixes: a few bytes of the file may stand for a long key.
        budget.take(_OBJECT + 3 * (shared + fresh), "the names of its tensors")
        key = key[:shared] + bytes(block[place : place + fresh])
        yield key, block[place + fresh : place + fresh + length]
        place += fresh + length


def _values(tensor: memoryview, dtype, shape: tuple[int, ...], budget: Budget) -> np.ndarray:
    """Return the values of a TensorProto, which are in the field of their type."""
    plain, expected = np.dtype(dtype), VALUES.get(dtype, 7)
    if dtype in (np.float16, ml_dtypes.bfloat16):
        expected = 13
    floats, numbers = [], []
    for number, value in _fields(tensor):
        if number == 4:
            return np.frombuffer(value, plain.newbyteorder("<")).reshape(shape)
        if number != expected:
            continue
        budget.take(_OBJECT, "its tensors' values")
        if expected in (5, 6):
            floats.append(np.frombuffer(value, plain.newbyteorder("<")))
        elif isinstance(value, int):
            numbers.append(value)
        else:
            place = 0
            while place < len(value):
                item, place = _varint(value, place)
                budget.take(_OBJECT // 4, "its tensors' values")
                numbers.append(item)
    if expected in (5, 6):
        values = np.concatenate(floats) if floats else np.zeros(0, plain)
    else:
        values = np.array(numbers, np.uint64)
        # Half precision is stored as its bits; negative integers as the 64 bits of their complement.
        values = values.astype(np.uint16).view(plain) if expected == 13 else values.view(np.int64).astype(plain)
    return values.reshape(shape)


def _read_first(file: BinaryIO, budget: Budget) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read version 1: the first entry describes the tensors, the others contain them."""
    described, arrays, ignored = {}, {}, []
    data = memoryview(read_exactly(file, 0, budget.size, "its table"))
    for key, value in _table(data, budget):
        for number, content in _fields(value):
            if number == 1 and not key:
                for field, meta in _fields(content):
                    if field == 1:
                        budget.take(2 * _OBJECT, "the names of its tensors")
                        entry = dict(_fields(meta))
                        name = _name(entry[1])
                        described[name] = (entry[3], _shape(entry.get(2, memoryview(b""))))
            elif number == 2:
                entry = dict(_fields(content))
                name = _name(entry[1])
                kind, shape = described[name]
                if any(field == 1 and len(part) for field, part in _fields(entry.get(2, memoryview(b"")))):
                    raise ValueError(f"{name[:80]} is stored in several slices, which are not supported")
                if kind not in DTYPES:
                    ignored.append(name)
                    continue
                array = _values(entry[3], DTYPES[kind], shape, budget)
                budget.take(array.nbytes, f"the values of {name[:80]}")
                # A copy: writable, in this machine's byte order, independent of the file's bytes.
                arrays[name] = array.astype(array.dtype.newbyteorder("="))
    if missing := described.keys() - arrays.keys() - set(ignored):
        raise ValueError(f"{sorted(missing)[0][:80]} is described but missing")
    return arrays, ignored


def _name(value: object) -> str:
    if not isinstance(value, memoryview) or len(value) > MAX_NAME:
        raise ValueError(f"a tensor's name that is not text of at most {MAX_NAME} bytes")
    return bytes(value).decode("utf-8")


def _read_second(prefix: str, file: BinaryIO, budget: Budget) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read version 2: an index with the name, file and offset of each tensor."""
    arrays, ignored, shards = {}, [], {}
    count = 0
    index = memoryview(read_exactly(file, 0, budget.size, "its index"))
    with ExitStack() as stack:
        for key, value in _table(index, budget):
            entry = dict(_fields(value))
            if not key:
                count = entry.get(1, 0)
                if entry.get(2, 0) != 0:
                    raise ValueError("written on a big-endian machine")
                continue
            name, kind = _name(memoryview(key)), entry.get(1, 0)
            if kind not in DTYPES:
                ignored.append(name)
                continue
            if 7 in entry:
                raise ValueError(f"{name[:80]} is stored in several slices, which are not supported")
            shard, offset, size = (entry.get(field, 0) for field in (3, 4, 5))
            if not 0 <= shard < count <= MAX_SHARDS:
                raise ValueError(f"{name[:80]} is stored in file {shard} of {count}")
            if shard not in shards:
                try:
                    part = open_regular(f"{prefix}.data-{shard:05d}-of-{count:05d}")
                except OSError as error:
                    raise ValueError(f"its file of values {shard} of {count}: {error.strerror}") from None
                shards[shard] = stack.enter_context(part)
                budget.add(os.fstat(part.fileno()).st_size)
            shape, dtype = _shape(entry.get(2, memoryview(b""))), np.dtype(DTYPES[kind])
            if size != math.prod(shape) * dtype.itemsize or offset >= 2**60:
                raise ValueError(f"{name[:80]} of shape {shape} does not match its {size} bytes")
            budget.take(size, f"the values of {name[:80]}")
            values = read_exactly(shards[shard], offset, size, f"the values of {name[:80]}")
            if dtype == np.bool_ and values.max(initial=0) > 1:
                raise ValueError(f"{name[:80]} is of dtype bool but contains bytes other than 0 and 1")
            arrays[name] = values.view(dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
    return arrays, ignored


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the tensors of a checkpoint, by name, and the names of those that are not numbers.

    Args:
        path: a version 1 file (`vgg_16.ckpt`), or a version 2 checkpoint's prefix or `.index`.

    Raises:
        WeightsError: it does not exist, is damaged, or needs more memory than its size justifies.
    """
    prefix = os.fspath(path).removesuffix(".index")
    second = os.path.isfile(f"{prefix}.index")
    with (
        translate_errors(partial(weights_error, path), "checkpoint of TensorFlow", "download it again"),
        open_regular(f"{prefix}.index" if second else path) as file,
    ):
        budget = Budget(os.fstat(file.fileno()).st_size)
        arrays, ignored = _read_second(prefix, file, budget) if second else _read_first(file, budget)
    if not arrays:
        raise weights_error(path, "contains no tensors")
    return dict(sorted(arrays.items())), ignored
