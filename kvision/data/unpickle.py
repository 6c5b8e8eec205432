"""Safe reader of CIFAR's pickles: dictionaries, strings, numbers and NumPy arrays.

`kvision.safe_pickle` interprets the opcodes; arrays are rebuilt here from their bytes.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from kvision.data.dataset import DataError
from kvision.safe_pickle import Refused, expect, interpret, raw, text
from kvision.untrusted import READ_ERRORS, Budget

_DTYPES = ("u1", "i4", "i8")

# Names allowed in the files, mapped to the kinds handled here. NumPy 2 moved these functions; Python 3 writes bytes
# by `encode` at protocols 0 to 2, and empty ones by `bytes`.
_GLOBALS = {
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    "builtins bytes": "bytes",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"numpy.{core}.multiarray _reconstruct": "reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "frombuffer" for core in ("core", "_core")},
}


@dataclass
class _Type:
    """A NumPy dtype under construction: `code` from its call, `order` from its state."""

    code: str
    order: str = "|"


@dataclass
class _Array:
    """A NumPy array under construction: None until its state is set."""

    value: np.ndarray | None = None


def unpickle(blob: bytes, where: str) -> dict[str, object]:
    """Read the dictionary of a CIFAR batch: str keys, str or bytes strings, NumPy arrays.

    Args:
        blob: the pickle: protocol 2 of Python 2, as published, or any of protocols 0 to 5 of Python 3.
        where: the file's name, for messages.

    Raises:
        DataError: a broken pickle, or one with other contents; none of its code is executed.
    """
    try:
        budget = Budget(len(blob))
        result = interpret(blob, _GLOBALS, partial(_call, budget), _set_state, budget)
    except Refused as refusal:
        raise DataError(f"{where} is not a CIFAR batch: it contains {refusal}; it was not executed") from None
    except READ_ERRORS as error:
        raise DataError(f"{where} is not a readable CIFAR batch: {type(error).__name__}: {error}") from None
    if not isinstance(result, dict):
        raise DataError(f"{where} is not a CIFAR batch: expected a dictionary, got {type(result).__name__}")
    try:
        return {text(key): value.value if isinstance(value, _Array) else value for key, value in result.items()}
    except ValueError as error:  # a key of bytes that are not ASCII
        raise DataError(f"{where} is not a readable CIFAR batch: {error}") from None


def _call(budget: Budget, kind: str, arguments: tuple) -> object:
    """Return the result of a call in the pickle: bytes, or an object under construction."""
    if kind == "encode":
        string, codec = arguments
        if codec != "latin1":
            raise ValueError(f"bytes in codec {str(codec)[:20]!r}")
        budget.take(len(string), "its strings as bytes")
        return raw(string)
    if kind == "bytes":
        if arguments:
            raise ValueError("bytes() with an argument")
        return b""
    if kind == "reconstruct":
        return _Array()
    if kind == "dtype":
        return _Type(text(arguments[0]))
    if kind == "frombuffer":
        buffer, dtype, shape, order = arguments
        if order not in ("C", "F"):
            raise ValueError(f"array order {str(order)[:20]!r}")
        return _Array(_array(shape, dtype, order == "F", buffer))
    raise Refused(f"a call of {kind}")


def _set_state(target: object, state: object) -> None:
    state = expect(state, tuple)
    if isinstance(target, _Type):
        target.order = text(state[1])
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, content = state
        target.value = _array(shape, dtype, bool(fortran), content)
    else:
        raise Refused(f"a state for a {type(target).__name__}")


def _array(shape: object, dtype: object, fortran: bool, content: object) -> np.ndarray:
    """Return a view of `content`; NumPy raises if the shape does not match its size."""
    dtype = expect(dtype, _Type)
    if dtype.code not in _DTYPES or dtype.order not in ("|", "<", ">", "="):
        raise Refused(f"an array of {dtype.order[:4]}{dtype.code[:20]}")
    shape = tuple(expect(length, int) for length in expect(shape, tuple))
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    values = np.frombuffer(raw(content), np.dtype(dtype.order + dtype.code))
    return values.reshape(shape, order="F" if fortran else "C")
