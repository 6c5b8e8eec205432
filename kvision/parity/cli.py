"""`python -m kvision parity MODEL`: its arguments, what it prints and what it writes."""

import argparse
import math
import sys
from collections.abc import Sequence

from kvision.children import StoppedError
from kvision.convert.cli import assignments
from kvision.engine import BACKENDS
from kvision.files import write_json
from kvision.flags import UsageError
from kvision.parity.compare import LIMITS
from kvision.parity.launcher import HOUR, compare
from kvision.parity.report import text
from kvision.parity.spec import Spec


def finite(value):
    """The report as JSON has it, where infinity is no number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shape(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected height x width x channels as in 32x32x3, got {words!r}") from None


def _own(words: Sequence[str]) -> dict[str, object]:
    try:
        return assignments(words)
    except ValueError as error:
        raise UsageError(f"--set wants NAME=VALUE, got {error}") from None


def main(arguments: argparse.Namespace) -> int:
    """Run a comparison as parsed, print its report; 0 where the backends agree, 1 where they do not."""
    spec = Spec(
        arguments.model,
        arguments.dtype,
        arguments.input_shape,
        arguments.classes,
        _own(arguments.set),
        arguments.batch,
        arguments.steps,
        arguments.seed,
        arguments.learning_rate,
        arguments.data,
    )
    try:
        report = compare(
            spec,
            arguments.backends.split(","),
            log=lambda line: print(line, file=sys.stderr),
            limit=arguments.timeout or None,
        )
    except StoppedError as error:
        print(f"\nparity: {error}", file=sys.stderr)
        return error.code
    if arguments.out:
        write_json(arguments.out, finite(report))
    print(text(report))
    return int(not report["passed"])


def add_commands(subparsers) -> None:
    """Add `parity` to the command line of `python -m kvision`."""
    parser = subparsers.add_parser(
        "parity", help="whether a model computes the same on every backend, layer by layer", allow_abbrev=False
    )
    defaults = Spec("")
    parser.add_argument("model", metavar="MODEL", help="network of the zoo, .keras file, or module:function")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default=defaults.dtype, help="(default: %(default)s)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--input-shape", type=_shape, metavar="HxWxC", help="of the images; default: the model's own")
    parser.add_argument("--classes", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of the model's own")
    parser.add_argument("--batch", type=int, default=defaults.batch, metavar="N", help="images a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=defaults.steps, metavar="N", help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, metavar="X", help="(default: %(default)s)"
    )
    parser.add_argument("--data", metavar="PATH", help="data set to take the images from; default: drawn")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--timeout",
        type=float,
        default=HOUR,
        metavar="SECONDS",
        help="that each backend may take, after which it is ended; 0 sets no limit (an hour)",
    )
    parser.set_defaults(handler=main)
