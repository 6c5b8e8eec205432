"""Command-line flags from dataclasses: every field with a help text is a flag, every bad value is a one-line error."""

import argparse
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path

from kvision import keras_import

SAVED = 75  # exit code of a run that was stopped after it saved a checkpoint: "temporary failure" (sysexits.h)
WIDTH = 100  # columns of `--help` at most
FLAG_COLUMN = 35  # column at which the help texts begin


class UsageError(ValueError):
    """A flag's value, or a combination of flags, is invalid; the message states what was expected."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of at most `WIDTH` columns, one line a flag where it fits, a bool as `--[no-]name`."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=FLAG_COLUMN)
        self._width = min(self._width, WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        return super()._format_action_invocation(action)


class _Help(argparse.Action):
    """Prints the common flags for `--help`, all of them for `--help all`, and exits."""

    rare: Sequence[argparse.Action] = ()  # what `--help` alone leaves out
    titles: Collection[str] = ()  # the groups of these
    brief = ""  # the description that `--help` alone prints

    def __call__(self, parser, namespace, values, option_string=None):
        if values is None and self.rare:
            parser.description = self.brief
            parser.epilog = f"--help all also lists the flags for {', '.join(self.titles)}."
            for action in self.rare:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"{self.prog}: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def app_module(name: str) -> str:
    """The module of an app: `apps.NAME` in a clone, `kvision.apps.NAME` in an installed package."""
    running = getattr(sys.modules.get("__main__"), "__spec__", None)
    if running is not None and running.name in (f"apps.{name}", f"kvision.apps.{name}"):
        return running.name
    return f"kvision.apps.{name}" if (Path(__file__).parent / "apps").is_dir() else f"apps.{name}"


def _base_type(annotation) -> type:
    """The type of an annotation such as `int | None`, without None."""
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


def _help_text(item: Field, kind: type, default: object, more: str) -> str:
    """What `--help` prints for a flag: its text, its choices, what is `more` about it, and its default."""
    choices = ", ".join(item.metadata.get("choices", ()))
    text = item.metadata["help"] + (f": {choices}" if choices else "") + (f"; {more}" if more else "")
    if kind is bool:
        shown = "on" if default else "off"
    else:
        shown = item.metadata.get("none", "none") if default is None else default
    return f"{text} (default: {shown})".replace("%", "%%")


def parse(
    config: type,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    defaults=None,
    more: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Parse a command line into the fields of the dataclass `config`; returns those that are given, by name.

    Fields with metadata {"help": ...} are flags; a bool is `--name/--no-name`; metadata "choices" limits the values,
    "none" is what `--help` prints for the default None. `config.GROUPS`, {title: "names of fields"}, orders the
    flags in `--help`; flags in no group come first. `--help` leaves out the groups in `config.RARE`, `--help all` does
    not.

    Args:
        argv: the arguments; None takes the process's.
        defaults: an instance whose values `--help` prints as the defaults.
        more: text that `--help` appends to a flag's, by field name.

    Raises:
        SystemExit: code 2 after one line on an unknown flag or a malformed value; code 0 after `--help`.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=_Formatter,
        usage=f"{prog} [--flag VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    grouped: Mapping[str, str] = getattr(config, "GROUPS", {})
    rare_groups: Collection[str] = getattr(config, "RARE", ())
    groups, first, rare = {}, parser.add_argument_group("options"), []
    for title, names in grouped.items():
        groups |= dict.fromkeys(names.split(), parser.add_argument_group(title))
    hints = typing.get_type_hints(config)
    order = {name: i for i, name in enumerate(" ".join(grouped.values()).split())}
    for item in sorted(fields(config), key=lambda item: order.get(item.name, -1)):
        if "help" not in item.metadata:
            continue
        kind = _base_type(hints[item.name])
        default = getattr(defaults, item.name, item.default)
        help_text = _help_text(item, kind, default, (more or {}).get(item.name, ""))
        group = groups.get(item.name, first)
        flag = f"--{item.name.replace('_', '-')}"
        if kind is bool:
            action = group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            action = group.add_argument(
                flag,
                type=str if kind is str else _number(kind),
                choices=item.metadata.get("choices"),
                metavar=item.metadata.get("metavar", {str: "NAME", int: "N", float: "X"}[kind]),
                help=help_text,
            )
        if group.title in rare_groups:
            rare.append(action)
    if rare:
        text = "print the common flags, or all of them, and exit"
        show = first.add_argument("-h", "--help", action=_Help, nargs="?", choices=["all"], metavar="all", help=text)
        show.rare, show.titles, show.brief = rare, rare_groups, description.partition("\n\n")[0]
    else:
        first.add_argument("-h", "--help", action="help", help="print the flags and exit")
    return vars(parser.parse_args(argv))


def arguments(config, skip: Sequence[str] = (), hidden: Sequence[str] = ()) -> list[str]:
    """The command line of a configuration: every flag whose value is not its class's default.

    Args:
        skip: fields to leave out, such as the run folder.
        hidden: fields with private values, such as local paths, which become "...".
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
    """Check the fields `names` of a configuration; None passes.

    Raises:
        UsageError: a value for which `holds` is false; the message names the flag and what was expected.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {value}")


def print_anything() -> None:
    """Let stdout and stderr print characters that their encoding lacks as escape sequences such as `\\xfc`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _print_error(line: str) -> None:
    """Print to stderr; a terminal that is gone is ignored, so that the exit code stays."""
    try:
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # a buffered line would fail when the process exits
            os.dup2(nowhere, stream)


def run_cli(
    prog: str,
    run: Callable[[], int | None],
    errors: tuple[type[Exception], ...],
    saved: type[BaseException] | tuple[()] = (),
) -> int:
    """Run an app's command; returns its exit code.

    UsageError, OSError and `errors` print one line and give code 2, Ctrl-C gives 130.

    Args:
        saved: the exception of a run that was stopped and saved a checkpoint: prints its line and gives `SAVED`.
    """
    print_anything()
    keras_import.announce(prog)
    try:
        return run() or 0
    except (UsageError, *errors) as error:
        _print_error(f"{prog}: {' '.join(str(error).split())}")
        return 2
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        _print_error(f"{prog}: {file}{error.strerror or error}")
        return 2
    except saved as stop:
        _print_error(f"\n{prog}: {stop}")
        return SAVED
    except KeyboardInterrupt:
        _print_error(f"\n{prog}: stopped; --resume continues from the last checkpoint")
        return 130
