"""The folder of a run: creates and locks it before data are read; stores and restores the configuration to resume."""

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
# Flags that may change when a run is resumed: paths, durations, intervals and execution settings. The steps so far give
# the same numbers under each value, except for rounding.
FREE = {
    *("output_dir", "resume", "data", "epochs", "max_steps", "save_every", "eval_every", "tta", "license"),
    *("engine", "data_on", "steps_per_execution", "deterministic", "compile_cache", "data_memory"),
}


@contextlib.contextmanager
def run_folder(config) -> Iterator[Path]:
    """Create and lock the folder of a run until the context ends.

    It is `--output-dir`, which must be new or empty unless the run is resumed, or a new folder below runs/. Folders
    that were created here and are empty at the end are removed.

    Raises:
        flags.UsageError: `--output-dir` is a file, or is not empty and the run is not resumed.
        kvision.files.FolderInUseError: another process has locked it.
        OSError: it cannot be created.
    """
    folder = Path("runs" if config.output_dir is None else config.output_dir)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    if config.output_dir is None:
        stem = f"{config.app}-{config.model}-{keras.backend.backend()}"
        folder = new_folder(folder / name for name in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))))
        created.insert(0, folder)
    elif folder.exists() and not folder.is_dir():
        raise flags.UsageError(f"--output-dir {folder} is a file; expected a new or an empty folder")
    elif not config.resume:
        make_folder(folder)
    try:
        with locked(folder):
            if not config.resume and any(path.name != LOCK for path in folder.iterdir()):
                raise flags.UsageError(
                    f"--output-dir {folder} is not empty: give --resume to continue the run in it, or another folder"
                )
            yield folder
    finally:
        with contextlib.suppress(OSError):  # stops at the first that is not empty
            for path in created:
                path.rmdir()


def clean_run_folder(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a run folder."""
    for name in FILES:
        remove_temp_files(folder, name)


def store_config(config, folder: Path) -> None:
    """Write config.json, from which `--resume` restores the configuration."""
    write_json(folder / "config.json", dataclasses.asdict(replace(config, output_dir=None, resume=False)))


def stored_config(default, given: Mapping[str, object]):
    """The configuration of the run that `--resume` continues.

    Raises:
        flags.UsageError: there is no such run, or a flag contradicts its configuration.
    """
    if given.get("output_dir") is not None:
        folder = Path(given["output_dir"])
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
        if name not in ("resume", "output_dir") and getattr(config, name) != value:
            text = f"--{name.replace('_', '-')} is {getattr(config, name)} in the run to resume, not {value}"
            raise flags.UsageError(f"{text}; leave the flag out, or start a new run")
    return config


def _weights_digest(path: str) -> str:
    """The sha256 of a weights file's arrays, or of its bytes if it is no `.npz`.

    The manifest does not count: it holds the accuracy by backend, and a run may be resumed on another backend.
    """
    try:
        with Archive(path) as archive:
            rows = [f"{key} {digest(archive.read(key))}" for key in sorted(archive.members) if key != MANIFEST]
    except WeightsError:
        return sha256(path)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def identity(config, dataset: Dataset) -> dict[str, object]:
    """What determines the numbers of a run, stored in its checkpoints: flags, training images, initial weights.

    Args:
        dataset: the training data after `--max-train-samples` and the validation split.
    """
    values: dict[str, object] = {
        f"--{name.replace('_', '-')}": value for name, value in vars(config).items() if name not in FREE
    }
    if config.weights is not None and Path(path := find(config.weights)).is_file():
        values["--weights"] = f"sha256 {_weights_digest(path)[:16]}"  # independent of its path
    labels = np.ascontiguousarray(dataset.y_train, np.int64)
    return values | {
        "data set": dataset.name,
        "training images": len(labels),
        "their labels": f"sha256 {hashlib.sha256(labels).hexdigest()[:16]}",
    }
