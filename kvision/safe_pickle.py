"""Reading pickles without unpickling them.

A pickle is a program. The files that are read here use a small part of its language: dictionaries, lists, strings,
numbers, and calls of a few functions by name. So no unpickler runs. This file interprets that part itself, on the
opcodes that `pickletools` has parsed, and refuses every other one; what a named function stands for, the caller says.
Nothing is ever imported or called by name. Each object is taken from a budget by the file's size before it is made, and
the opcodes are counted, so that memory and time are bounded.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from kvision.untrusted import MALFORMED, Budget

MAX_OPCODES = 1_000_000  # about two seconds; a state_dict takes 40 for each tensor, CIFAR's batches 50,000
_OBJECT = 64  # bytes that an opcode's object takes, with its place on the stack
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

BROKEN = MALFORMED  # what a broken pickle makes an interpreter stumble over


@dataclass(frozen=True)
class Named:
    """A function or class that a pickle names, by the kind of thing that it stands for."""

    kind: str


class _Source:
    """An open file that is asked for no more bytes than it has: Python allocates them before it reads."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, max(0, self.size - self.file.tell())))


class Refused(Exception):  # noqa: N818  (callers make it an error with the file's name)
    """A pickle asks for something that its kind of file does not need; the message says for what."""


def interpret(
    source: bytes | BinaryIO,
    names: Mapping[str, str],
    call: Callable[[str, tuple], object],
    set_state: Callable[[object, object], None],
    budget: Budget,
    persistent: Callable[[object], object] | None = None,
    floats: bool = False,
) -> object:
    """The object that a pickle describes.

    Args:
        source: the pickle; of an open file what follows it is left unread.
        names: what it may name, "module attribute", with the kind of each.
        call: what calling a thing of a kind with a tuple of arguments gives.
        set_state: what it does to an object to give it a state.
        budget: what its objects are taken from. What `call` makes beyond one object, it takes itself.
        persistent: what a persistent id stands for; None refuses them.
        floats: whether floating-point numbers may stand in it.

    Raises:
        Refused: an opcode or a name beyond these.
        ValueError, KeyError ...: any of `BROKEN`, where the pickle is no sound one, or asks for more than its size
            explains.
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
        # A string may take four bytes a character, which at protocol 0 is one byte of the file.
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
    """What `dict(argument)` or `OrderedDict(argument)` gives, of a dictionary or a list of pairs."""
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
    # Keys that are text alone: hashing a tuple that is nested a million deep would overflow the C stack.
    return {expect(key, (str, bytes)): value for key, value in zip(items[::2], items[1::2], strict=True)}


def expect(value: object, kind: type | tuple[type, ...]):
    """`value`, which must be of a kind; ValueError where it is not."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the wrong place")
    return value


def raw(value: object) -> bytes:
    """Bytes, which Python 2 wrote as str and `pickletools` decodes as Latin-1."""
    return bytes(value) if isinstance(value, (bytes, bytearray)) else expect(value, str).encode("latin-1")


def text(value: object) -> str:
    """A string, which Python 2 wrote as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else expect(value, str)
