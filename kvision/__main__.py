"""The command line: `python -m kvision --help` (installed: `kvision --help`)."""

import argparse
import sys
from collections.abc import Sequence

import kvision


def _models(arguments: argparse.Namespace) -> int:
    from kvision import convert, zoo

    if arguments.table:
        print(convert.markdown_table())
        return 0
    names = zoo.list_models(arguments.pattern)
    width = max(map(len, names), default=0)
    for name in names:
        published = zoo.paper(name)
        shape = "x".join(map(str, zoo.default_shape(name)))
        print(f"{name:<{width}}  {shape:<11}  {published.authors} {published.year}, {published.title}")
    if not names:
        raise zoo.UnknownModelError(
            f"no model matches {arguments.pattern!r}; the zoo has {', '.join(zoo.list_models())}"
        )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from kvision import convert

    for name in arguments.names:
        print(convert.model_info(name))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one line on stderr and code 2."""
    from kvision import compare, keras_import, parity
    from kvision.convert import cli
    from kvision.flags import UsageError, print_anything
    from kvision.weights import WeightsError
    from kvision.zoo import UnknownModelError

    parser = argparse.ArgumentParser(prog="kvision", description=kvision.__doc__)
    parser.add_argument("--version", action="version", version=f"kvision {kvision.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    models = commands.add_parser("models", help="list the networks: name, image size, paper")
    models.add_argument("pattern", nargs="?", default="*", help="shell pattern, such as 'resnet*'")
    models.add_argument(
        "--table", action="store_true", help="print the README's table: parameters, multiply-adds, accuracy"
    )
    models.set_defaults(handler=_models)
    info = commands.add_parser("info", help="print a network's paper, parameters, multiply-adds, stages, preprocessing")
    info.add_argument("names", nargs="+", metavar="NAME")
    info.set_defaults(handler=_info)
    cli.add_commands(commands)
    compare.add_commands(commands)
    parity.add_commands(commands)
    print_anything()
    arguments, others = parser.parse_known_args(argv)
    passes_flags = getattr(arguments, "passes_flags", False)  # `compare` passes unknown flags to the app
    if others and not passes_flags:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        code = arguments.handler(arguments, others) if passes_flags else arguments.handler(arguments)
        keras_import.announce("kvision")  # after the command, which may not have imported Keras
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        sys.stderr.close()
        return 0
    except (UsageError, WeightsError, UnknownModelError, keras_import.BackendError) as error:
        print(f"kvision: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
