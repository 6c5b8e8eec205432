"""Weights files of other frameworks, recognised by their content."""

import os
import zipfile
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvision.data import zipped
from kvision.data.untrusted import border, open_regular
from kvision.weights import hdf5, pth, safetensors, tf_checkpoint
from kvision.weights.archive import Archive, refusal
from kvision.weights.manifest import MANIFEST


@dataclass(frozen=True)
class Foreign:
    """What a file holds.

    Args:
        format: "pth", "safetensors", "h5", "tf_checkpoint" or "npz".
        arrays: by the names that they have there.
        ignored: names of what is no array of numbers.
    """

    format: str
    arrays: dict[str, np.ndarray]
    ignored: list[str] = field(default_factory=list)


def read(path: str | os.PathLike) -> Foreign:
    """Read a file of PyTorch (`.pth`), safetensors, Keras (`.h5`), TensorFlow (a checkpoint) or NumPy (`.npz`).

    No framework is needed for it, and nothing in the file is executed.

    Raises:
        WeightsError: there is no such file, it is damaged, or of another kind.
    """
    if os.path.isfile(f"{os.fspath(path).removesuffix('.index')}.index"):
        return Foreign("tf_checkpoint", *tf_checkpoint.read(path))
    if not os.path.exists(path):
        raise refusal(path, "no such file")
    with border(partial(refusal, path), "weights file", "download it again"), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        names = []
        if head.startswith(b"PK"):
            try:
                names = [entry.name for entry in zipped.directory(file)]
            except (zipfile.BadZipFile, ValueError) as error:
                raise refusal(path, f"is a damaged zip file ({error})") from None
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return Foreign("h5", hdf5.read(path))
    if head.startswith(b"PK"):
        if any(name.endswith("/data.pkl") for name in names):
            return Foreign("pth", *pth.read(path))
        if "model.weights.h5" in names:
            raise refusal(path, "is a .keras file, which numbers its variables: load it in Keras and save it as .h5")
        with Archive(path) as archive:
            return Foreign("npz", {key: archive.read(key) for key in archive.members if key != MANIFEST})
    # Before the pickles, which start with 0x80: so does the length of one header in 256 here, in 32 where it is a
    # multiple of 8.
    if safetensors.looks_so(head):
        return Foreign("safetensors", safetensors.read(path))
    if head[:1] == b"\x80":
        return Foreign("pth", *pth.read(path))
    if int.from_bytes(tail, "little") == tf_checkpoint.MAGIC:
        return Foreign("tf_checkpoint", *tf_checkpoint.read(path))
    raise refusal(path, "is of no kind known here: .pth, .safetensors, .h5, a TensorFlow checkpoint, .npz")
