"""TensorFlow's checkpoints, read without TensorFlow and without building a graph.

Both versions are tables of LevelDB's format (https://github.com/google/leveldb/blob/main/doc/table_format.md) with
protocol buffers in them: version 1, one file, as TF-Slim published its networks (saved_tensor_slice.proto in
https://github.com/tensorflow/tensorflow), and version 2, an index and files of raw bytes beside it
(tensor_bundle.proto). The files' checksums (CRC-32C) are not compared: in Python that would take minutes.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from kvision.weights.archive import refusal

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
STRING = 7
VALUES = {np.float32: 5, np.float64: 6, np.int64: 10, np.bool_: 11}  # TensorProto's fields; 7 for other integers


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
    """The fields of a protocol buffer: numbers, and bytes uninterpreted."""
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
            raise ValueError("a protocol buffer that is cut short")
        yield tag >> 3, value


def _shape(data: memoryview) -> tuple[int, ...]:
    """Of a TensorShapeProto."""
    shape = []
    for number, value in _fields(data):
        if number == 2:
            shape.append(dict(_fields(value)).get(1, 0))
    if len(shape) > 32 or math.prod(max(1, length) for length in shape) >= 2**60:
        raise ValueError(f"a tensor of shape {shape[:8]}")
    return tuple(shape)


def _table(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The entries of a table, key and value."""
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("it does not end as a checkpoint does")
    footer = data[-FOOTER:]
    _, place = _varint(footer, 0)  # the block of metadata: offset and size
    _, place = _varint(footer, place)
    for _, handle in _block(data, footer[place:]):
        yield from _block(data, handle)


def _block(data: memoryview, handle: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    offset, place = _varint(handle, 0)
    size, _ = _varint(handle, place)
    if offset + size + 5 > len(data):
        raise ValueError("a block beyond the end of the file")
    if data[offset + size] != 0:
        raise ValueError("a compressed block; TensorFlow's own checkpoints have none")
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end, place, key = size - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise ValueError("a block that is shorter than it says")
    while place < end:
        shared, place = _varint(block, place)
        fresh, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or place + fresh + length > end:
            raise ValueError("an entry beyond the end of its block")
        key = key[:shared] + bytes(block[place : place + fresh])
        yield key, block[place + fresh : place + fresh + length]
        place += fresh + length


def _values(tensor: memoryview, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Of a TensorProto, whose values lie in the field of their kind."""
    plain, wanted = np.dtype(dtype), VALUES.get(dtype, 7)
    if dtype in (np.float16, ml_dtypes.bfloat16):
        wanted = 13
    floats, numbers = [], []
    for number, value in _fields(tensor):
        if number == 4:
            return np.frombuffer(value, plain.newbyteorder("<")).reshape(shape)
        if number != wanted:
            continue
        if wanted in (5, 6):
            floats.append(np.frombuffer(value, plain.newbyteorder("<")))
        elif isinstance(value, int):
            numbers.append(value)
        else:
            place = 0
            while place < len(value):
                item, place = _varint(value, place)
                numbers.append(item)
    if wanted in (5, 6):
        values = np.concatenate(floats) if floats else np.zeros(0, plain)
    else:
        values = np.array(numbers, np.uint64)
        # Half precision as its bits; negative integers as the 64 bits of their complement.
        values = values.astype(np.uint16).view(plain) if wanted == 13 else values.view(np.int64).astype(plain)
    return values.reshape(shape)


def _read_first(data: memoryview) -> tuple[dict[str, np.ndarray], list[str]]:
    """Version 1: the first entry describes the tensors, the others hold them."""
    described, arrays, ignored = {}, {}, []
    for key, value in _table(data):
        for number, content in _fields(value):
            if number == 1 and not key:
                for field, meta in _fields(content):
                    if field == 1:
                        entry = dict(_fields(meta))
                        name = bytes(entry[1]).decode("utf-8")
                        described[name] = (entry[3], _shape(entry.get(2, memoryview(b""))))
            elif number == 2:
                entry = dict(_fields(content))
                name = bytes(entry[1]).decode("utf-8")
                kind, shape = described[name]
                if any(field == 1 and len(part) for field, part in _fields(entry.get(2, memoryview(b"")))):
                    raise ValueError(f"{name[:80]} lies in several slices, which is not read")
                if kind not in DTYPES:
                    ignored.append(name)
                    continue
                arrays[name] = _values(entry[3], DTYPES[kind], shape)
    if missing := described.keys() - arrays.keys() - set(ignored):
        raise ValueError(f"{sorted(missing)[0][:80]} is described but not there")
    return arrays, ignored


def _read_second(prefix: str, index: memoryview) -> tuple[dict[str, np.ndarray], list[str]]:
    """Version 2: an index of names, and where in which file of bytes each lies."""
    arrays, ignored, shards = {}, [], {}
    count = 0
    for key, value in _table(index):
        entry = dict(_fields(value))
        if not key:
            count = entry.get(1, 0)
            if entry.get(2, 0) != 0:
                raise ValueError("written on a big-endian machine")
            continue
        name, kind = key.decode("utf-8"), entry.get(1, 0)
        if kind not in DTYPES:
            ignored.append(name)
            continue
        if 7 in entry:
            raise ValueError(f"{name[:80]} lies in several slices, which is not read")
        shard, offset, size = (entry.get(field, 0) for field in (3, 4, 5))
        if not 0 <= shard < count:
            raise ValueError(f"{name[:80]} lies in file {shard} of {count}")
        if shard not in shards:
            shards[shard] = memoryview(Path(f"{prefix}.data-{shard:05d}-of-{count:05d}").read_bytes())
        shape, dtype = _shape(entry.get(2, memoryview(b""))), np.dtype(DTYPES[kind])
        values = shards[shard][offset : offset + size]
        if len(values) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name[:80]} of shape {shape} does not lie in its {size} bytes")
        arrays[name] = np.frombuffer(values, dtype.newbyteorder("<")).reshape(shape)
    return arrays, ignored


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a checkpoint, by name, and the names of those that are no numbers.

    Args:
        path: a version 1 file (`vgg_16.ckpt`), or a version 2 checkpoint's prefix or `.index`.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    prefix = os.fspath(path).removesuffix(".index")
    try:
        if os.path.isfile(f"{prefix}.index"):
            arrays, ignored = _read_second(prefix, memoryview(Path(f"{prefix}.index").read_bytes()))
        else:
            arrays, ignored = _read_first(memoryview(Path(path).read_bytes()))
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError, struct.error, OverflowError, MemoryError) as error:
        raise refusal(path, f"is no readable checkpoint of TensorFlow: {type(error).__name__}: {error}") from None
    if not arrays:
        raise refusal(path, "holds no tensors")
    # Copies: writable, in this machine's byte order, and free of the file's bytes.
    return {key: array.astype(array.dtype.newbyteorder("=")) for key, array in sorted(arrays.items())}, ignored
