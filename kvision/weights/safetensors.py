"""The safetensors format, read and written: https://huggingface.co/docs/safetensors (a header of JSON, then bytes)."""

import json
import math
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from kvision.weights.archive import plain_bytes, refusal, whole

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


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file, by name.

    Raises:
        WeightsError: the file is damaged, or no safetensors file.
    """
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror}") from None
    size = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or size > min(MAX_HEADER, len(blob) - 8):
        raise refusal(path, "is no safetensors file, or is cut short")
    arrays, taken, start = {}, [], 8 + size
    try:
        header = json.loads(blob[8:start].decode("utf-8"))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            dtype, shape, (begin, end) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, begin, end)) or len(shape) > 32:
                raise ValueError(f"{key[:80]} has a shape or offsets that are no natural numbers")
            if end - begin != math.prod(shape) * dtype.itemsize or end > len(blob) - start:
                raise ValueError(f"{key[:80]} of shape {shape} does not lie in its bytes {begin} to {end}")
            taken.append((begin, end))
            values = blob[start + begin : start + end]
            if dtype == np.bool_ and max(values, default=0) > 1:
                raise ValueError(f"{key[:80]} is of dtype BOOL but holds other bytes than 0 and 1")
            array = np.frombuffer(values, dtype.newbyteorder("<")).reshape(shape)
            arrays[key] = array.astype(dtype)  # writable, and in this machine's byte order
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise refusal(path, f"is no sound safetensors file: {type(error).__name__}: {error}") from None
    places = [0, *(place for pair in sorted(taken) for place in pair), len(blob) - start]
    if any(end != begin for end, begin in zip(places[::2], places[1::2], strict=True)):
        raise refusal(path, "is no sound safetensors file: its tensors overlap or leave bytes between them")
    return arrays


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays, whole or not at all; the same arrays give the same bytes.

    Raises:
        WeightsError: a dtype that the format does not have, or the disk refuses.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, offset = {}, 0
    for key, array in sorted(arrays.items()):
        if array.dtype.newbyteorder("=") not in names:
            raise refusal(path, f"{key} has dtype {array.dtype}, which safetensors does not have")
        end = offset + array.nbytes
        kind = names[array.dtype.newbyteorder("=")]
        header[key] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8 bytes
    with whole(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in sorted(arrays.items()):
            file.write(plain_bytes(array))
