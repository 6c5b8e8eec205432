"""Parser of the header of an untrusted array in NumPy's format, NEP 1
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""

import ast
import math
import re

import numpy as np

from kvision.untrusted import READ_ERRORS

MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000  # bytes of an array's header; NumPy's own bound
PLAIN_NUMBERS = "files hold plain numbers of at most 64 bits (float32, int64 ...)"
_NESTING = re.compile(r"[(\[{~+-]|\bnot\b")


def parse_header(head: bytes) -> tuple[int, tuple[int, ...], np.dtype, bool]:
    """Parse (header size, shape, dtype, Fortran order) from an array's first bytes.

    Raises:
        ValueError: a malformed header; the message says how.
    """
    version = head[len(MAGIC) : len(MAGIC) + 2]
    if not head.startswith(MAGIC) or version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00") or len(head) < 12:
        raise ValueError("is not an array in NumPy's format 1 to 3")
    start = 10 if version == b"\x01\x00" else 12
    end = start + int.from_bytes(head[8:start], "little")
    if end > MAX_HEADER or end > len(head):
        raise ValueError(f"has a header of {end:,} bytes; at most {MAX_HEADER:,}, inside the array's bytes, are read")
    try:
        text = head[start:end].decode("latin1" if version < b"\x03" else "utf-8").strip()
        # `literal_eval` reads constants and runs nothing, but an expression nested some thousand deep, which no array's
        # header needs, can overflow its stack.
        if len(_NESTING.findall(text)) > 100:
            raise ValueError
        header = ast.literal_eval(text)
        descr, fortran_order, shape = header.pop("descr"), header.pop("fortran_order"), header.pop("shape")
        if header or type(fortran_order) is not bool or type(shape) is not tuple or len(shape) > 32:
            raise ValueError
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError
        if math.prod(max(1, length) for length in shape) >= 2**60:  # more than NumPy can index, even where it is empty
            raise ValueError
    except READ_ERRORS:
        raise ValueError("has a malformed header: the file is damaged") from None
    if "O" in str(descr):
        raise ValueError("contains Python objects (a pickle), which could run code and are never loaded")
    if not isinstance(descr, str) or not re.fullmatch("[<>|=]?(b1|[iu][1248]|f[248])", descr):
        raise ValueError(f"has dtype {str(descr)[:80]!r}; {PLAIN_NUMBERS}")
    return end, shape, np.dtype(descr), fortran_order
