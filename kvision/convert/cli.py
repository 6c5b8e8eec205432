"""`python -m kvision weights`: inspect, verify, compare, convert and tabulate weights files."""

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

LINE = 1 << 20  # maximum characters per line
TOLERANCE = 1e-4  # on the logits after a conversion, relative to the largest


def add_commands(subparsers) -> None:
    """Add `weights` and its commands to an argparse subparsers object.

    The parsed arguments have `handler`: `handler(arguments)` prints and returns the exit code. An unreadable file
    raises WeightsError; its message is one line for stderr, with exit code 2.
    """
    weights = subparsers.add_parser("weights", help="inspect, verify, compare and convert weights files (.npz)")
    commands = weights.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="print a file's contents from its headers and manifest")
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--json", action="store_true", help="print one JSON object per file and line")
    command.set_defaults(handler=_inspect)

    command = commands.add_parser(
        "verify",
        help="check the hashes, rebuild the network, compare its logits; exit code 1 if a file fails",
    )
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="allowed difference relative to the largest logit (%(default)s)",
    )
    command.set_defaults(handler=_verify)

    command = commands.add_parser("diff", help="compare two files, array by array; exit code 1 if they differ")
    command.add_argument("a", metavar="FILE")
    command.add_argument("b", metavar="FILE")
    command.set_defaults(handler=_diff)

    command = commands.add_parser(
        "convert",
        help="convert files of torchvision, Keras, TF-Slim or safetensors to .npz, or .npz to .pth, .safetensors, .h5",
    )
    command.add_argument("path", metavar="FILE")
    command.add_argument("-o", "--out", required=True, metavar="OUT")
    command.add_argument("--model", metavar="NAME", help="network of the foreign weights, see `kvision models`")
    command.add_argument("--source", choices=list(SOURCES), help="naming scheme of the file (default: detected)")
    command.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="names that may be unmatched")
    command.add_argument("--input-shape", type=int, nargs=3, metavar=("H", "W", "C"), help="(default: the network's)")
    command.add_argument("--classes", type=int, help="number of classes (default: that of the file)")
    command.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="model-specific argument, as JSON: hidden=512",
    )
    command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="dtype of stored arrays")
    command.add_argument("--dataset", help="data set of the training, for the manifest")
    command.add_argument("--license", help="SPDX identifier of the weights' license, for the manifest")
    command.set_defaults(handler=_convert)

    command = commands.add_parser("table", help="print the Markdown table of a folder of weights files")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument(
        "--write",
        metavar="README",
        help="replace the lines between <!-- weights:start --> and <!-- weights:end --> of a file",
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
    """Parse words NAME=VALUE into a dictionary; VALUE is JSON, or else text.

    Raises:
        ValueError: a word without "="; the message is that word in quotes.
    """
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(repr(word))
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _convert(arguments: argparse.Namespace) -> int:
    try:
        model_kwargs = assignments(arguments.argument)
    except ValueError as error:
        raise WeightsError(f"--argument expects KEY=VALUE, got {error}") from None
    try:
        report = convert(
            arguments.path,
            arguments.out,
            arguments.model,
            source=arguments.source,
            skip=arguments.skip,
            input_shape=tuple(arguments.input_shape) if arguments.input_shape else None,
            classes=arguments.classes,
            arguments=model_kwargs,
            dtype=arguments.dtype,
            dataset=arguments.dataset,
            license=arguments.license,
        )
    except WeightsError:
        raise
    except ValueError as error:  # an unknown network or argument, or an unsupported size
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
