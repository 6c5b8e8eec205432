"""The folder of a run: made and held before data are read, so that no two runs share one; what a run resumes from."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np

from kvision import flags
from kvision.convert import find
from kvision.data import Dataset
from kvision.files import LOCK, locked, make_folder, new_folder, remove_temp_files, sha256, write_json
from kvision.weights.archive import Archive, WeightsError, digest
from kvision.weights.npz import MANIFEST

FILES = ("config.json", "metrics.jsonl", "metrics.json", "trace.json", "weights.npz", "report.html")
# Flags that a run may change where it is resumed: they name a place, or say how fast, how far and how often, and the
# numbers of the steps that were taken are the same under each value, but for rounding.
FREE = {
    *("output_dir", "resume", "data", "epochs", "max_steps", "save_every", "eval_every", "tta", "license"),
    *("engine", "data_on", "steps_per_execution", "deterministic", "compile_cache", "data_memory"),
}


@contextlib.contextmanager
def run_folder(config) -> Iterator[Path]:
    """The folder of a run, which is this process's alone until the context ends.

    It is `--output-dir`, new or empty unless the run is resumed, or one made below runs/ under the next free name. What
    was made here and is empty at the end is removed.

    Raises:
        flags.UsageError: `--output-dir` is a file, or a folder that holds something and the run is not resumed.
        kvision.files.FolderInUseError: another process runs in it.
        OSError: it cannot be made.
    """
    folder = Path("runs" if config.output_dir is None else config.output_dir)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    if config.output_dir is None:
        stem = f"{config.app}-{config.model}-{keras.backend.backend()}"
        folder = new_folder(folder / name for name in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))))
        made.insert(0, folder)
    elif folder.exists() and not folder.is_dir():
        raise flags.UsageError(f"--output-dir {folder} is a file; expected a new or an empty folder")
    elif not config.resume:
        make_folder(folder)
    try:
        with locked(folder):
            if not config.resume and any(path.name != LOCK for path in folder.iterdir()):
                raise flags.UsageError(
                    f"--output-dir {folder} is not empty: give --resume to go on with the run in it, or another folder"
                )
            yield folder
    finally:
        with contextlib.suppress(OSError):  # the first that holds something ends it
            for place in made:
                place.rmdir()


def clean_run_folder(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote into a run folder."""
    for name in FILES:
        remove_temp_files(folder, name)


def store_config(config, folder: Path) -> None:
    """Write config.json, from which `--resume` takes the configuration."""
    write_json(folder / "config.json", dataclasses.asdict(replace(config, output_dir=None, resume=False)))


def stored_config(default, given: Mapping[str, object]):
    """The configuration of the run that `--resume` goes on with.

    Raises:
        flags.UsageError: there is no such run, or a flag contradicts it.
    """
    if given.get("out") is not None:
        folder = Path(given["out"])
    else:
        started = sorted(Path("runs").glob(f"{default.app}-*/config.json"), key=lambda path: path.stat().st_mtime)
        if not started:
            raise flags.UsageError(
                f"--resume found no run of {default.app} below runs/; name its folder with --output-dir"
            )
        folder = started[-1].parent
    try:
        stored = json.loads((folder / "config.json").read_text())
        if stored["app"] != default.app:
            raise flags.UsageError(f"{folder} holds a run of {stored['app']}, not of {default.app}")
        config = type(default)(**{**stored, "output_dir": str(folder), "resume": True})
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, flags.UsageError):
            raise
        raise flags.UsageError(f"--resume found no run in {folder}: its config.json is missing or broken") from None
    for name, value in given.items():
        if name not in ("resume", "out") and getattr(config, name) != value:
            text = f"--{name.replace('_', '-')} is {getattr(config, name)} in the run to go on with, not {value}"
            raise flags.UsageError(f"{text}; leave the flag out, or start a new run")
    return config


def _digest_of(path: str) -> str:
    """The sha256 of a weights file's arrays; of its bytes, where it is no `.npz`.

    Its manifest is left out: it states the score on a backend, and a run may go on under another.
    """
    try:
        with Archive(path) as archive:
            rows = [f"{key} {digest(archive.read(key))}" for key in sorted(archive.members) if key != MANIFEST]
    except WeightsError:
        return sha256(path)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def identity(config, dataset: Dataset) -> dict[str, object]:
    """What decides the numbers of a run, for its checkpoints: the flags by name, the training images, the weights file.

    Args:
        dataset: what is trained on, after the choice of images.
    """
    flags_of: dict[str, object] = {
        f"--{name.replace('_', '-')}": value for name, value in vars(config).items() if name not in FREE
    }
    if config.weights is not None and Path(path := find(config.weights)).is_file():
        flags_of["--weights"] = f"sha256 {_digest_of(path)[:16]}"  # wherever it lies now
    labels = np.ascontiguousarray(dataset.y_train, np.int64)
    return flags_of | {
        "data set": dataset.name,
        "training images": len(labels),
        "their labels": f"sha256 {hashlib.sha256(labels).hexdigest()[:16]}",
    }
