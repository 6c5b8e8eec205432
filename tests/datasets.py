"""Data for tests of the apps: the real set if KVISION_DATA names it, else a file of synthetic shapes."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvision.data import Dataset, load


def real_data() -> str | None:
    """The folder of the real data sets, or None."""
    folder = os.environ.get("KVISION_DATA")
    return folder if folder and Path(folder).is_dir() else None


@functools.cache
def _shapes() -> Dataset:
    return load("shapes10", log=lambda line: None)


def _write(path: Path, dataset: Dataset) -> str:
    np.savez(path, x_train=dataset.x_train, y_train=dataset.y_train, x_test=dataset.x_test, y_test=dataset.y_test)
    return str(path)


def write_shapes(path: Path) -> str:
    """Write an .npz of shapes10 in Keras's layout; returns its path."""
    return _write(path, _shapes())


def write_few(path: Path) -> str:
    """Write an .npz of 2,500 and 1,000 images of CIFAR-10, else of shapes10, at 16x16 pixels; returns its path.

    Reading the pickled labels of all of CIFAR-10 takes 3 s, longer than a short run.
    """
    whole = load("cifar10", real_data()) if real_data() else _shapes()
    few = whole.subset(train=2500, test=1000, seed=0)
    return _write(path, replace(few, x_train=few.x_train[:, ::2, ::2], x_test=few.x_test[:, ::2, ::2]))
