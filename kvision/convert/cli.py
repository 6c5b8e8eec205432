"""`python -m kvision weights inspect|verify|diff|table`: weights files on the command line."""

import argparse
import json
import os
from collections.abc import Sequence

from kvision.convert.convert import SOURCES, convert
from kvision.convert.verify import diff, verify
from kvision.untrusted import printable
from kvision.weights.archive import WeightsError
from kvision.weights.npz import inspect
from kvision.weights.table import file_size, table, write_table

LINE = 1 << 20  # characters of a line at most
TOLERANCE = 1e-4  # of the logits after a conversion, relative to the largest


def add_commands(subparsers) -> None:
    """Add `weights` and its commands to an argparse subparsers object.

    The parsed arguments carry `handler`: `handler(arguments)` prints and returns the exit code. A file that
    cannot be read raises WeightsError, whose message is the line to print on stderr; the exit code is then 2.
    """
    weights = subparsers.add_parser("weights", help="look at, check and compare weights files (.npz)")
    commands = weights.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="print what a file holds; nothing is built, no value is read")
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--json", action="store_true", help="print JSON, one object a file and line")
    command.set_defaults(handler=_inspect)

    command = commands.add_parser(
        "verify",
        help="check the hashes, rebuild the network, compare its logits; exit code 1 where a file fails",
    )
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="allowed difference relative to the largest logit (%(default)s)",
    )
    command.set_defaults(handler=_verify)

    command = commands.add_parser("diff", help="compare two files, array by array; exit code 1 where they differ")
    command.add_argument("a", metavar="FILE")
    command.add_argument("b", metavar="FILE")
    command.set_defaults(handler=_diff)

    command = commands.add_parser(
        "convert",
        help="weights of torchvision, Keras, TF-Slim or safetensors into .npz, or an .npz into .pth, .safetensors, .h5",
    )
    command.add_argument("path", metavar="FILE")
    command.add_argument("-o", "--out", required=True, metavar="OUT")
    command.add_argument("--model", metavar="NAME", help="network that foreign weights are of, see `kvision models`")
    command.add_argument("--source", choices=list(SOURCES), help="whose names the foreign file has (found by itself)")
    command.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="names that may have no match")
    command.add_argument("--input-shape", type=int, nargs=3, metavar=("H", "W", "C"), help="the network's default")
    command.add_argument("--classes", type=int, help="read off the file where it can be")
    command.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the network's own, as JSON: hidden=512",
    )
    command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="store floating-point arrays so")
    command.add_argument("--dataset", help="what the weights were trained on, for the manifest")
    command.add_argument("--license", help="of the weights, an SPDX identifier, for the manifest")
    command.set_defaults(handler=_convert)

    command = commands.add_parser("table", help="print the Markdown table of a folder of weights files")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument(
        "--write",
        metavar="README",
        help="put it between the lines <!-- weights:start --> and <!-- weights:end --> of a file",
    )
    command.set_defaults(handler=_table)


def _inspect(arguments: argparse.Namespace) -> int:
    for path in arguments.files:
        found = inspect(path)
        if arguments.json:
            print(json.dumps({"file": path, **found}, ensure_ascii=False))
            continue
        manifest = found["manifest"] or {}
        print(
            f"{path}: {manifest.get('architecture', 'no manifest')}, {found['parameters']:,} parameters in "
            f"{len(found['arrays'])} arrays, {file_size(found['bytes'])}, sha256 {found['sha256']}"
        )
        for field in (
            "dataset",
            "accuracy",
            "arguments",
            "input_size",
            "preprocessing",
            "classes",
            "license",
            "provenance",
        ):
            if manifest.get(field) not in (None, {}):
                print(printable(f"  {field:<14} {json.dumps(manifest[field], ensure_ascii=False)}", LINE))
        width = max(map(len, found["arrays"]), default=0)
        for key, array in found["arrays"].items():
            print(f"  {key:<{width}}  {array['dtype']:<8} {' x '.join(map(str, array['shape']))}")
    return 0


def assignments(words: Sequence[str]) -> dict[str, object]:
    """The values of words NAME=VALUE by name: what VALUE says as JSON, or else its text.

    Raises:
        ValueError: a word without "="; the message is that word in quotes.
    """
    own = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(repr(word))
        try:
            own[name] = json.loads(value)
        except ValueError:
            own[name] = value
    return own


def _convert(arguments: argparse.Namespace) -> int:
    try:
        own = assignments(arguments.argument)
    except ValueError as error:
        raise WeightsError(f"--argument wants KEY=VALUE, got {error}") from None
    try:
        report = convert(
            arguments.path,
            arguments.out,
            arguments.model,
            source=arguments.source,
            skip=arguments.skip,
            input_shape=tuple(arguments.input_shape) if arguments.input_shape else None,
            classes=arguments.classes,
            arguments=own,
            dtype=arguments.dtype,
            dataset=arguments.dataset,
            license=arguments.license,
        )
    except WeightsError:
        raise
    except ValueError as error:  # a network, size or argument that does not exist
        raise WeightsError(str(error)) from None
    print(report)
    return 0 if report.difference is None or report.difference <= TOLERANCE else 1


def _verify(arguments: argparse.Namespace) -> int:
    passed = True
    for path in arguments.files:
        try:
            result = verify(path, arguments.tolerance)
            print(result)
            passed &= result.ok
        except WeightsError as error:
            print(error)
            passed = False
    return 0 if passed else 1


def _diff(arguments: argparse.Namespace) -> int:
    found = diff(arguments.a, arguments.b)
    for field, (a, b) in found.manifest.items():
        print(printable(f"{field}: {json.dumps(a, ensure_ascii=False)} | {json.dumps(b, ensure_ascii=False)}", LINE))
    for path, keys in ((arguments.a, found.only_a), (arguments.b, found.only_b)):
        for key in keys:
            print(f"{key}: only in {os.fspath(path)}")
    for key, (a, b) in found.shapes.items():
        print(f"{key}: shape {a} | {b}")
    changed = {key: value for key, value in found.largest.items() if value}
    for key, value in changed.items():
        print(f"{key}: differs by up to {value:.3e}")
    print(f"{len(found.largest) - len(changed)} of {len(found.largest)} common arrays are equal")
    return 0 if found.equal else 1


def _table(arguments: argparse.Namespace) -> int:
    if arguments.write:
        write_table(arguments.folder, arguments.write)
    else:
        print(table(arguments.folder))
    return 0
