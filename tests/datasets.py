"""Data for tests of the apps: the real set if KVISION_DATA names it, else a file of synthetic shapes."""

import os
from pathlib import Path

import numpy as np

from kvision.data import load


def real_data() -> str | None:
    """The folder of the real data sets, or None."""
    folder = os.environ.get("KVISION_DATA")
    return folder if folder and Path(folder).is_dir() else None


def write_shapes(path: Path) -> str:
    """An .npz of shapes10 in Keras's layout; its path."""
    shapes = load("shapes10", log=lambda line: None)
    np.savez(path, x_train=shapes.x_train, y_train=shapes.y_train, x_test=shapes.x_test, y_test=shapes.y_test)
    return str(path)
