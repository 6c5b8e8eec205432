"""Keras's HDF5 weights files: those of `keras.applications`, and those of `model.save("x.h5")`.

They have a group for each layer, with its variables' names in an attribute. Keras 3's `.weights.h5` numbers the
variables instead; the layer's class determines their names.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from kvision.untrusted import BASE, Budget, open_regular, read_exactly, translate_errors
from kvision.weights.archive import atomic_weights_file, shorten, weights_error

# Last parts of variable names in files of Keras 1 and 2, and ours.
LEAVES = {"W": "kernel", "b": "bias", "depthwise_kernel": "kernel", "running_mean": "moving_mean"}
LEAVES |= {"running_std": "moving_variance"}  # Keras 1's name of the variance
CHILD = Path(__file__).with_name("hdf5_child.py")
SECONDS = 60  # of wall time; the child takes a quarter of a second, and stops itself after five of CPU time


def _leaf(name: str) -> str:
    """Return a variable's short name: "kernel" for "conv1/kernel:0" and "block1_conv1/kernel_1:0"."""
    last = name.rsplit("/", 1)[-1].partition(":")[0]
    known = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance", *LEAVES)
    for leaf in known:
        if last == leaf or last.endswith(f"_{leaf}") or f"_{leaf}_" in last:
            return LEAVES.get(leaf, leaf)
    return last


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the arrays of a file, by "layer/variable": {"block1_conv1/kernel": ...}.

    The HDF5 library runs in a separate process, `kvision/convert/hdf5_child.py`, which returns the arrays' offsets.

    Raises:
        WeightsError: the file is damaged, links to other files, or needs more time or memory than its size justifies.
    """
    arrays: dict[str, np.ndarray] = {}
    with (
        translate_errors(partial(weights_error, path), "HDF5 file of Keras", "load it in Keras and save it as .h5"),
        open_regular(path) as file,
    ):
        budget = Budget(os.fstat(file.fileno()).st_size)
        for layer, name, code, shape, offset in _locate_arrays(path, budget):
            key = f"{layer}/{_leaf(name)}"
            if key in arrays:
                raise ValueError(f"{layer[:80]} has two variables {_leaf(name)[:80]}")
            dtype = np.dtype(code)
            if math.prod(max(1, length) for length in shape) >= 2**60:
                raise ValueError(f"{key[:80]} has shape {shape}")
            size = math.prod(shape) * dtype.itemsize
            budget.take(size, key[:80])
            values = read_exactly(file, offset, size, key[:80])
            arrays[key] = values.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    if not arrays:
        raise weights_error(path, "holds no weights")
    return arrays


def _run_child(path: str | os.PathLike) -> subprocess.CompletedProcess:
    # -P: do not import from the script's folder, whose files have names of packages.
    command = [sys.executable, "-P", str(CHILD), os.path.abspath(path), str(BASE)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    try:
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"HDF5 did not finish reading it within {SECONDS} s") from None


def _locate_arrays(path: str | os.PathLike, budget: Budget) -> list[list]:
    """Return the child process's result: [[layer, variable's name, dtype, shape, offset], ...]."""
    done = _run_child(path)
    if done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise ValueError("HDF5 did not finish reading it and was stopped")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        reason = "; ".join(done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:])
        end = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        raise ValueError(f"HDF5 cannot read it and ends with {end} {reason[:200]}") from None
    if "error" in result:
        raise ValueError(result["error"])
    budget.take(len(done.stdout), "the names of its arrays")
    return result["arrays"]


def _new_file(h5py, image: io.BytesIO):
    """Create a file that tracks the order of its groups but no creation times: same arrays, same bytes."""
    creation, access = h5py.h5p.create(h5py.h5p.FILE_CREATE), h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    creation.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    creation.set_attr_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    creation.set_obj_track_times(False)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, image)
    return h5py.File(h5py.h5f.create(b"image", h5py.h5f.ACC_TRUNC, creation, access))


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by "layer/variable" for `model.load_weights(path, by_name=True)`, atomically.

    A layer's variables are written in the order of `arrays`, which must be Keras's: kernel, bias; gamma, beta,
    moving_mean, moving_variance.

    Raises:
        WeightsError: a name that is not "layer/variable", or a disk error.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        layer, _, leaf = key.partition("/")
        if not leaf or "/" in leaf:
            raise weights_error(path, f"not written: {shorten([key])} is not layer/variable")
        layers.setdefault(layer, {})[leaf] = array
    import h5py  # here, because reading needs it only in the child process

    image = io.BytesIO()  # HDF5 writes non-sequentially, and does not report a disk's errors as OSError
    with _new_file(h5py, image) as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.0.0"
        for layer, variables in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{leaf}:0".encode() for leaf in variables]
            for leaf, array in variables.items():
                group.create_dataset(f"{layer}/{leaf}:0", data=array, track_times=False)
    with atomic_weights_file(path) as file:
        file.write(image.getbuffer())
