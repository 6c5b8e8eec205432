"""Reader of other frameworks' weights files, recognized by content."""

import os
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvision.convert import hdf5, pth, safetensors, tf_checkpoint
from kvision.data import zipped
from kvision.untrusted import Budget, open_regular, translate_errors
from kvision.weights.archive import Archive, WeightsError, weights_error
from kvision.weights.manifest import MANIFEST

KERAS_WEIGHTS = "model.weights.h5"  # the member of a .keras file


@dataclass(frozen=True)
class Foreign:
    """The contents of a file.

    Args:
        format: "pth", "safetensors", "h5", "tf_checkpoint" or "npz".
        arrays: by their names in the file.
        ignored: names of entries that are not arrays of numbers.
    """

    format: str
    arrays: dict[str, np.ndarray]
    ignored: list[str] = field(default_factory=list)


def _read_keras(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of a `.keras` file, a zip with a `.weights.h5`; its description of the network is not read."""
    with (
        translate_errors(partial(weights_error, path), ".keras file", "save it in Keras again"),
        open_regular(path) as file,
        tempfile.TemporaryDirectory() as folder,
    ):
        entry = next(entry for entry in zipped.directory(file) if entry.name == KERAS_WEIGHTS)
        inner = os.path.join(folder, KERAS_WEIGHTS)
        with open(inner, "wb") as out:
            out.write(zipped.content(file, entry, Budget(os.fstat(file.fileno()).st_size)))
        try:
            return hdf5.read(inner)
        except WeightsError as error:
            raise weights_error(path, str(error).removeprefix(f"{inner}: ")) from None


def read(path: str | os.PathLike) -> Foreign:
    """Read a file of PyTorch (`.pth`), safetensors, Keras (`.h5`, `.keras`), TensorFlow (a checkpoint) or NumPy.

    No framework is needed, and nothing in the file is executed.

    Raises:
        WeightsError: the file does not exist, is damaged, or of another kind.
    """
    if os.path.isfile(f"{os.fspath(path).removesuffix('.index')}.index"):
        return Foreign("tf_checkpoint", *tf_checkpoint.read(path))
    if not os.path.exists(path):
        raise weights_error(path, "no such file")
    with (
        translate_errors(partial(weights_error, path), "weights file", "download it again"),
        open_regular(path) as file,
    ):
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        names = []
        if head.startswith(b"PK"):
            try:
                names = [entry.name for entry in zipped.directory(file)]
            except (zipfile.BadZipFile, ValueError) as error:
                raise weights_error(path, f"is a damaged zip file ({error})") from None
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return Foreign("h5", hdf5.read(path))
    if head.startswith(b"PK"):
        if any(name.endswith("/data.pkl") for name in names):
            return Foreign("pth", *pth.read(path))
        if KERAS_WEIGHTS in names:
            return Foreign("h5", _read_keras(path))
        with Archive(path) as archive:
            return Foreign("npz", {key: archive.read(key) for key in archive.members if key != MANIFEST})
    # Checked before the pickles, which start with 0x80, because one in 32 header lengths (multiples of 8) does so,
    # too.
    if safetensors.is_safetensors(head):
        return Foreign("safetensors", safetensors.read(path))
    if head[:1] == b"\x80":
        return Foreign("pth", *pth.read(path))
    if int.from_bytes(tail, "little") == tf_checkpoint.MAGIC:
        return Foreign("tf_checkpoint", *tf_checkpoint.read(path))
    raise weights_error(
        path, "is of an unknown format; expected .pth, .safetensors, .h5, .keras, a TensorFlow checkpoint, .npz"
    )
