"""The Markdown table of a folder of weights files, generated from their manifests."""

import os
from pathlib import Path

from kvision.files import write_text
from kvision.untrusted import printable
from kvision.weights.archive import weights_error
from kvision.weights.npz import inspect

START, END = "<!-- weights:start -->", "<!-- weights:end -->"


def file_size(count: int) -> str:
    """Format a number of bytes: `1.1 MB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _cell(text: object) -> str:
    return printable(" ".join(str(text).split()).replace("|", "\\|"))


def table(folder: str | os.PathLike) -> str:
    """Return a Markdown table of every `*.npz` in a folder, by name, without a trailing newline.

    Accuracy has a column for each backend in the files. The parameters include the statistics of batch norm; the
    sha256 is shortened to 12 digits.

    Raises:
        WeightsError: the folder does not exist, or a file in it is damaged or has no manifest.
    """
    if not os.path.isdir(folder):
        raise weights_error(folder, "is not a folder")
    files = {path: inspect(path) for path in sorted(Path(folder).glob("*.npz"))}
    for path, found in files.items():
        if found["manifest"] is None:
            raise weights_error(path, "has no manifest for a table row; write it with kvision.weights.save")
    backends = sorted({backend for found in files.values() for backend in found["manifest"]["accuracy"]})
    columns = ["file", "architecture", "data set", "parameters"]
    columns += [f"accuracy, {backend}" for backend in backends]
    columns += ["size", "sha256", "made by"]
    rows = [columns, ["---"] * len(columns)]
    for path, found in files.items():
        manifest = found["manifest"]
        accuracy = manifest["accuracy"]
        command = manifest["provenance"].get("command")
        rows.append(
            [
                f"[{path.name}]({path.name})",
                manifest["architecture"],
                manifest["dataset"] or "",
                f"{found['parameters']:,}",
                *(f"{accuracy[backend]:.2%}" if backend in accuracy else "" for backend in backends),
                file_size(found["bytes"]),
                f"`{found['sha256'][:12]}`",
                f"`{command}`" if command else "",
            ]
        )
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def write_table(folder: str | os.PathLike, readme: str | os.PathLike) -> None:
    """Write `table(folder)` between the lines `<!-- weights:start -->` and `<!-- weights:end -->` of a file.

    Raises:
        WeightsError: as `table`; or the file cannot be read or written, or lacks the two lines.
    """
    text_of_table = table(folder)
    try:
        text = Path(readme).read_text(encoding="utf-8")
        before, start, rest = text.partition(START)
        _, end, after = rest.partition(END)
        if not (start and end):
            raise weights_error(readme, f"lacks the lines {START} and {END}; put them where the table should be")
        write_text(readme, f"{before}{START}\n{text_of_table}\n{END}{after}")
    except OSError as error:
        raise weights_error(readme, f"cannot be rewritten: {error.strerror}") from None
