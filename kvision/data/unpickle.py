"""Reading CIFAR's pickles without unpickling them.

A pickle is a program. CIFAR's use a small part of its language: dictionaries, lists, strings, numbers, one
NumPy array. So this file runs no unpickler at all. It interprets that part itself, on the opcodes that
`pickletools` has parsed, and refuses every other one. Nothing is ever imported or called by name; the array
is rebuilt here from its bytes, so memory is bounded by the size of the file.
"""

import pickletools
from dataclasses import dataclass

import numpy as np

from kvision.data.dataset import DataError

_STRINGS = """
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
_PUSH_ARGUMENT = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", *_STRINGS.split()}
_PUSH_NEW = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DTYPES = ("u1", "i4", "i8")

# What the files may name, with the kind of thing it stands for here. NumPy moved these functions in its
# version 2; `encode` is how Python 3 writes bytes at protocols 0 to 2, and `bytes` how it writes empty ones.
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
class _Global:
    kind: str


@dataclass
class _Type:
    """A NumPy dtype under construction: `code` from its call, `order` from its state."""

    code: str
    order: str = "|"


@dataclass
class _Array:
    """A NumPy array under construction: empty until its state comes."""

    value: np.ndarray | None = None


class _Refused(Exception):  # noqa: N818  (private: it becomes a DataError with the file's name)
    pass


def unpickle(blob: bytes, where: str) -> dict[str, object]:
    """The dictionary that a CIFAR batch holds, keys as str, strings inside as str or bytes, arrays as NumPy
    arrays.

    Args:
        blob: the pickle: protocol 2 of Python 2, as published, or any of the protocols 0 to 5 of Python 3.
        where: the file's name, for messages.

    Raises:
        DataError: a broken pickle, or one that holds anything else; no code of it has run.
    """
    try:
        result = _interpret(blob)
    except _Refused as refusal:
        raise DataError(f"{where} is no CIFAR batch: it holds {refusal}; it was not executed") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{where} is not a readable CIFAR batch: {type(error).__name__}: {error}") from None
    if not isinstance(result, dict):
        raise DataError(f"{where} is no CIFAR batch: expected a dictionary, got {type(result).__name__}")
    return {_text(key): value.value if isinstance(value, _Array) else value for key, value in result.items()}


def _interpret(blob: bytes) -> object:
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(blob):
        name = opcode.name
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in _PUSH_NEW:
            stack.append(_PUSH_NEW[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _SHORT_TUPLES:
            start = len(stack) - _SHORT_TUPLES[name]
            stack[start:] = [tuple(stack[start:])]
        elif name == "LIST":
            stack.append(since_mark())
        elif name == "APPEND":
            item = stack.pop()
            _expect(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = since_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "DICT":
            stack.append(_pairs(since_mark()))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _expect(stack[-1], dict).update(_pairs([key, value]))
        elif name == "SETITEMS":
            items = since_mark()
            _expect(stack[-1], dict).update(_pairs(items))
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{_text(module)} {_text(attribute)}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(_expect(function, _Global).kind, _expect(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], _expect(state, tuple))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"the pickle opcode {name}")
    raise ValueError("no end")  # genops raises first


def _named(name: str) -> _Global:
    if name not in _GLOBALS:
        raise _Refused(f"a call of {name.replace(' ', '.')[:80]!r}")
    return _Global(_GLOBALS[name])


def _call(kind: str, arguments: tuple) -> object:
    """What a call that the file asks for makes: plain bytes, or a thing under construction."""
    if kind == "encode":
        text, codec = arguments
        if codec != "latin1":
            raise ValueError(f"bytes in codec {str(codec)[:20]!r}")
        return _raw(text)
    if kind == "bytes":
        if arguments:
            raise ValueError("bytes() with an argument")
        return b""
    if kind == "reconstruct":
        return _Array()
    if kind == "dtype":
        return _Type(_text(arguments[0]))
    if kind == "frombuffer":
        buffer, dtype, shape, order = arguments
        if order not in ("C", "F"):
            raise ValueError(f"array order {str(order)[:20]!r}")
        return _Array(_array(shape, dtype, order == "F", buffer))
    raise _Refused(f"a call of {kind}")


def _set_state(target: object, state: tuple) -> None:
    if isinstance(target, _Type):
        target.order = _text(state[1])
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, content = state
        target.value = _array(shape, dtype, bool(fortran), content)
    else:
        raise _Refused(f"a state for a {type(target).__name__}")


def _array(shape: object, dtype: object, fortran: bool, content: object) -> np.ndarray:
    """A view on `content`; NumPy refuses a shape that is not exactly its size."""
    dtype = _expect(dtype, _Type)
    if dtype.code not in _DTYPES or dtype.order not in ("|", "<", ">", "="):
        raise _Refused(f"an array of {dtype.order[:4]}{dtype.code[:20]}")
    shape = tuple(_expect(length, int) for length in _expect(shape, tuple))
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    values = np.frombuffer(_raw(content), np.dtype(dtype.order + dtype.code))
    return values.reshape(shape, order="F" if fortran else "C")


def _pairs(items: list) -> dict:
    if len(items) % 2:
        raise ValueError("a key without a value")
    # Keys that are text alone: hashing a tuple that is nested a million deep would overflow the C stack.
    return {_expect(key, (str, bytes)): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _expect(value: object, kind: type | tuple[type, ...]):
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the wrong place")
    return value


def _raw(value: object) -> bytes:
    """Bytes, which Python 2 wrote as str and `pickletools` decodes as Latin-1."""
    return bytes(value) if isinstance(value, (bytes, bytearray)) else _expect(value, str).encode("latin-1")


def _text(value: object) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else _expect(value, str)
