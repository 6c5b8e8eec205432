"""A dataclass is the configuration language: every field is a flag, every bad value one clear line."""

import argparse
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from kvision import keras_import

SAVED = 75  # exit code of a run that was told to stop and has saved: "temporary failure, try again" (sysexits.h)


class UsageError(ValueError):
    """A flag's value, or a combination of flags, that cannot work; the message says what was expected."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def _kind(annotation) -> type:
    """The type behind `int | None` and its like."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = [part for part in typing.get_args(annotation) if part is not type(None)]
    return annotation


def _number(kind: type) -> Callable[[str], object]:
    def read(text: str):
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return read


def parse(
    config: type,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    defaults=None,
    more: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """The fields of the dataclass `config` that the command line sets, by name.

    Fields with metadata {"help": ...} are flags; a bool is `--name/--no-name`; metadata "choices" limits a value.
    `--help` lists them by the groups of `config.GROUPS`, {title: "names of fields"}, where there are such; fields in
    none of them come first.

    Args:
        argv: the arguments; None takes the process's own.
        defaults: an instance whose values `--help` shows as the defaults.
        more: by a field's name, what `--help` says after its text, such as names that are known when it is asked for.

    Raises:
        SystemExit: code 2 after one line on an unknown flag or a malformed value; code 0 after `--help`.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{prog} [--flag VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups, first = {}, parser.add_argument_group("of this app")
    for title, names in getattr(config, "GROUPS", {}).items():
        groups |= dict.fromkeys(names.split(), parser.add_argument_group(title))
    hints = typing.get_type_hints(config)
    for item in fields(config):
        if "help" not in item.metadata:
            continue
        kind = _kind(hints[item.name])
        default = getattr(defaults, item.name, item.default)
        shown = "none" if default is None else default
        choices = item.metadata.get("choices")
        texts = [
            item.metadata["help"],
            f"one of {', '.join(choices)}" if choices else "",
            (more or {}).get(item.name, ""),
        ]
        help_text = f"{'; '.join(filter(None, texts))} (default: {shown})".replace("%", "%%")
        group = groups.get(item.name, first)
        flag = f"--{item.name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            group.add_argument(
                flag,
                type=str if kind is str else _number(kind),
                choices=choices,
                metavar=item.metadata.get("metavar", {str: "NAME", int: "N", float: "X"}[kind]),
                help=help_text,
            )
    return vars(parser.parse_args(argv))


def arguments(config, skip: Sequence[str] = (), hidden: Sequence[str] = ()) -> list[str]:
    """The command line that gives this configuration: every flag that is not its class's default.

    Args:
        skip: fields to leave out, such as the folder of a run.
        hidden: fields whose values stay on this machine, such as paths: the flag is there, with "..." for its value.
    """
    words = []
    for item in fields(config):
        value, name = getattr(config, item.name), item.name.replace("_", "-")
        if item.name in hidden and value is not None:
            value = "..."
        if "help" in item.metadata and item.name not in skip and value != item.default:
            words += (
                [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
            )
    return words


def check(config, names: str, holds: Callable[[object], bool], expected: str) -> None:
    """Check the fields of a configuration that are not None.

    Raises:
        UsageError: a value for which `holds` is false; the message names the flag and what was expected.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {value}")


def print_anything() -> None:
    """For a command: what the terminal's or the pipe's encoding lacks is printed as an escape sequence, `\\xfc`, and
    does not end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _tell(line: str) -> None:
    """Print to stderr, unless the terminal has gone, which must not change the exit code."""
    try:
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # what is still to be written there would fail at the process's end
            os.dup2(nowhere, stream)


def run_cli(
    prog: str,
    run: Callable[[], int | None],
    errors: tuple[type[Exception], ...],
    saved: type[BaseException] | tuple[()] = (),
) -> int:
    """Run an app's command; the given errors, and what the system refuses, end it with one line and exit code 2, Ctrl-C
    with code 130.

    Args:
        saved: the exception of a run that was told to stop and has saved: its line, and the code `SAVED`.
    """
    print_anything()
    keras_import.announce(prog)
    try:
        return run() or 0
    except (UsageError, *errors) as error:
        _tell(f"{prog}: {' '.join(str(error).split())}")
        return 2
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        _tell(f"{prog}: {file}{error.strerror or error}")
        return 2
    except saved as stop:
        _tell(f"\n{prog}: {stop}")
        return SAVED
    except KeyboardInterrupt:
        _tell(f"\n{prog}: stopped; --resume goes on from the last checkpoint")
        return 130
