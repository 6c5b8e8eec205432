"""Reader and writer of safetensors: https://huggingface.co/docs/safetensors (a JSON header, then bytes)."""

import json
import math
import os
import struct
from functools import partial

import ml_dtypes
import numpy as np

from kvision.untrusted import Budget, open_regular, read_exactly, translate_errors, unique
from kvision.weights.archive import atomic_weights_file, plain_bytes, weights_error

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 100 << 20  # bytes, as in the format's own reader


def is_safetensors(head: bytes) -> bool:
    """Return whether a file that starts with these nine bytes has this format: a header's length, then its "{"."""
    return head[5:9] == b"\0\0\0{"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of a file, by name; they share one buffer.

    Raises:
        WeightsError: the file is damaged, or not a safetensors file.
    """
    with (
        translate_errors(partial(weights_error, path), "safetensors file", "download it again"),
        open_regular(path) as file,
    ):
        whole_size = os.fstat(file.fileno()).st_size
        budget = Budget(whole_size)
        size = int.from_bytes(file.read(8), "little")
        if whole_size < 8 or size > min(MAX_HEADER, whole_size - 8):
            raise weights_error(path, "is not a safetensors file, or is truncated")
        budget.take(30 * size, "its header")  # Python's nested lists take this much
        header = json.loads(file.read(size).decode("utf-8"), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        return _arrays(header, read_exactly(file, 8 + size, whole_size - 8 - size, "its values"))


def _arrays(header: dict, values: np.ndarray) -> dict[str, np.ndarray]:
    arrays, taken = {}, []
    for key, entry in header.items():
        dtype, shape, (begin, end) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if type(shape) is not list or len(shape) > 32:
            raise ValueError(f"{key[:80]} has no shape, or more than 32 axes")
        if any(type(number) is not int or not 0 <= number < 2**60 for number in (*shape, begin, end)):
            raise ValueError(f"{key[:80]} has a shape or offsets that are not natural numbers")
        if end - begin != math.prod(shape) * dtype.itemsize or end > len(values):
            raise ValueError(f"{key[:80]} of shape {shape} does not lie in its bytes {begin} to {end}")
        taken.append((begin, end))
        part = values[begin:end]
        if dtype == np.bool_ and part.max(initial=0) > 1:
            raise ValueError(f"{key[:80]} is of dtype BOOL but contains bytes other than 0 and 1")
        if begin % dtype.alignment:
            part = part.copy()  # aligned; tensors do not overlap, so each byte is copied once
        arrays[key] = part.view(dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
    offsets = [0, *(offset for pair in sorted(taken) for offset in pair), len(values)]
    if any(end != begin for end, begin in zip(offsets[::2], offsets[1::2], strict=True)):
        raise ValueError("its tensors overlap or leave bytes between them")
    return arrays


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays, atomically; the same arrays give the same bytes.

    Raises:
        WeightsError: a dtype that the format does not support, or a disk error.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, offset = {}, 0
    for key, array in sorted(arrays.items()):
        if array.dtype.newbyteorder("=") not in names:
            raise weights_error(path, f"{key} has dtype {array.dtype}, which safetensors does not support")
        end = offset + array.nbytes
        kind = names[array.dtype.newbyteorder("=")]
        header[key] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8 bytes
    with atomic_weights_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in sorted(arrays.items()):
            file.write(plain_bytes(array))
