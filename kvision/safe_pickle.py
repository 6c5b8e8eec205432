"""Safe interpreter of a subset of pickle.

A pickle is a program. The files read here use a small part of its language: dictionaries, lists, strings, numbers, and
calls of a few named functions. No unpickler runs: this module interprets that part itself, on the opcodes parsed by
`pickletools`, and rejects all others; the caller defines what a named function stands for. Nothing is imported or
called by name. Each object is taken from a budget set by the file's size before it is made, and opcodes are counted, so
that memory and time are bounded.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from kvision.untrusted import Budget

MAX_OPCODES = 1_000_000  # about two seconds; a state_dict takes 40 for each tensor, CIFAR's batches 50,000
_OBJECT = 64  # bytes of an opcode's object, including its slot on the stack
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


@dataclass(frozen=True)
class Named:
    """A function or class named in a pickle, with its kind."""

    kind: str


class _Source:
    """An open file that never requests more bytes than it has, because Python allocates them before reading."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, max(0, self.size - self.file.tell())))


class Refused(Exception):  # noqa: N818  (callers turn it into an error with the file's name)
    """A pickle requests something that its kind of file does not need; the message says what."""


def interpret(
    source: bytes | BinaryIO,
    names: Mapping[str, str],
    call: Callable[[str, tuple], object],
    set_state: Callable[[object, object], None],
    budget: Budget,
    persistent: Callable[[object], object] | None = None,
    floats: bool = False,
) -> object:
    """Return the object that a pickle describes.

    Args:
        source: the pickle; in an open file, anything after it is left unread.
        names: allowed names, "module attribute", with the kind of each.
        call: returns the result of calling a kind with a tuple of arguments.
        set_state: applies a state to an object.
        budget: charged for each object. `call` charges what it allocates beyond one object.
        persistent: returns the object of a persistent id; None rejects them.
        floats: allow floating-point numbers.

    Raises:
        Refused: an opcode or a name outside this subset.
        ValueError, KeyError ...: any of `READ_ERRORS`, for a broken pickle, or one above its budget.
    """
    code = source if isinstance(source, bytes) else _Source(source, budget.size)
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def named(name: str) -> Named:
        if name not in names:
            raise Refused(f"a call of {name.replace(' ', '.')[:80]!r}")
        return Named(names[name])

    for count, (opcode, argument, _) in enumerate(pickletools.genops(code)):
        name = opcode.name
        if count >= MAX_OPCODES:
            raise ValueError(f"a pickle of more than {MAX_OPCODES:,} opcodes")
        # A string may take four bytes per character, which at protocol 0 is one byte of the file.
        budget.take(_OBJECT + (4 * len(argument) if isinstance(argument, (str, bytes)) else 0), "its pickle's objects")
        if name in _PUSH_ARGUMENT or (floats and name == "BINFLOAT"):
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
            expect(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = since_mark()
            expect(stack[-1], list).extend(items)
        elif name == "DICT":
            stack.append(_pairs(since_mark()))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            expect(stack[-1], dict).update(_pairs([key, value]))
        elif name == "SETITEMS":
            items = since_mark()
            expect(stack[-1], dict).update(_pairs(items))
        elif name == "GLOBAL":
            stack.append(named(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(named(f"{text(module)} {text(attribute)}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(call(expect(function, Named).kind, expect(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            set_state(stack[-1], state)
        elif name == "BINPERSID" and persistent:
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"the pickle opcode {name}")
    raise ValueError("no end")  # genops raises first


def copied(argument: object, budget: Budget) -> dict:
    """Return what `dict(argument)` or `OrderedDict(argument)` gives, for a dictionary or a list of pairs."""
    if isinstance(argument, dict):
        budget.take(2 * _OBJECT * len(argument), "a copy of a dictionary")
        return dict(argument)
    items = []
    for pair in expect(argument, (list, tuple)):
        budget.take(2 * _OBJECT, "a dictionary's entries")
        items += expect(pair, (list, tuple)) if len(pair) == 2 else expect(None, tuple)
    return _pairs(items)


def _pairs(items: list) -> dict:
    if len(items) % 2:
        raise ValueError("a key without a value")
    # Text keys only: hashing a tuple nested a million deep would overflow the C stack.
    return {expect(key, (str, bytes)): value for key, value in zip(items[::2], items[1::2], strict=True)}


def expect(value: object, kind: type | tuple[type, ...]):
    """Return `value` if it is of a kind; else raise ValueError."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the wrong place")
    return value


def raw(value: object) -> bytes:
    """Return bytes, which Python 2 wrote as str and `pickletools` decodes as Latin-1."""
    return bytes(value) if isinstance(value, (bytes, bytearray)) else expect(value, str).encode("latin-1")


def text(value: object) -> str:
    """Return a string, which Python 2 wrote as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else expect(value, str)
