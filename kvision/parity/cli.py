"""The command `python -m kvision parity MODEL`."""

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
    """Replace infinity and nan, which JSON lacks, by strings."""
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


def _model_kwargs(words: Sequence[str]) -> dict[str, object]:
    try:
        return assignments(words)
    except ValueError as error:
        raise UsageError(f"--set must be NAME=VALUE, got {error}") from None


def main(arguments: argparse.Namespace) -> int:
    """Run a comparison with parsed arguments and print its report; returns 0 if the backends agree, else 1."""
    spec = Spec(
        arguments.model,
        arguments.dtype,
        arguments.input_shape,
        arguments.classes,
        _model_kwargs(arguments.set),
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
        "parity", help="compare a model between backends, layer by layer", allow_abbrev=False
    )
    defaults = Spec("")
    parser.add_argument("model", metavar="MODEL", help="network of the zoo, .keras file, or module:function")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default=defaults.dtype, help="(default: %(default)s)")
    parser.add_argument(
        "--backends", default=",".join(BACKENDS), help="comma-separated backends (default: %(default)s)"
    )
    parser.add_argument("--input-shape", type=_shape, metavar="HxWxC", help="image shape (default: the model's)")
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes (default: the model's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="model-specific argument, may be repeated"
    )
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, metavar="N", help="images a step (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, metavar="N", help="training steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, metavar="X", help="(default: %(default)s)"
    )
    parser.add_argument("--data", metavar="PATH", help="data set of the images (default: synthetic)")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--timeout",
        type=float,
        default=HOUR,
        metavar="SECONDS",
        help="time limit of each backend, 0 for none (default: an hour)",
    )
    parser.set_defaults(handler=main)
