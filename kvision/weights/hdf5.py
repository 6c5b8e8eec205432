"""Keras's HDF5 files of weights: `keras.applications`' own, and what `model.save("x.h5")` writes.

A group for each layer, with the names of its variables in an attribute. Keras 3's `.weights.h5` numbers variables
instead of naming them, so only the model that wrote one can read it: save such a model as `.h5`.
"""

import io
import os

import h5py
import numpy as np

from kvision.weights.archive import listed, refusal, whole

# The variables' last names in files of Keras 1 and 2, and ours.
LEAVES = {"W": "kernel", "b": "bias", "depthwise_kernel": "kernel", "running_mean": "moving_mean"}
LEAVES |= {"running_std": "moving_variance"}  # Keras 1 called the variance so
MAX_NAMES = 100_000


def _names(group, attribute: str) -> list[str]:
    """An attribute that is a list of names; long ones are cut into `layer_names0`, `layer_names1` ..."""
    parts = [attribute] if attribute in group.attrs else []
    while not parts or parts[0] != attribute:
        part = f"{attribute}{len(parts)}"
        if part not in group.attrs:
            break
        parts.append(part)
    names = [name for part in parts for name in np.asarray(group.attrs[part]).reshape(-1).tolist()]
    if not parts or len(names) > MAX_NAMES or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"a group without a list {attribute!r}")
    return [name.decode("utf-8") if isinstance(name, bytes) else name for name in names]


def _leaf(name: str) -> str:
    """A variable's own name: of "conv1/kernel:0" "kernel", of "block1_conv1_W_1:0" too."""
    last = name.rsplit("/", 1)[-1].partition(":")[0]
    known = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance", *LEAVES)
    for leaf in known:
        if last == leaf or last.endswith(f"_{leaf}") or f"_{leaf}_" in last:
            return LEAVES.get(leaf, leaf)
    return last


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file, by "layer/variable": {"block1_conv1/kernel": ...}.

    Raises:
        WeightsError: the file is damaged, of Keras 3's `.weights.h5`, or links to other files.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        size = os.path.getsize(path)
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
                raise ValueError(
                    "it has no layer_names (Keras 3's .weights.h5 numbers its variables): load it into its model and "
                    "save that as .h5"
                )
            for layer in _names(root, "layer_names"):
                if not isinstance(root.get(layer, getlink=True), h5py.HardLink):
                    raise ValueError(f"{layer[:80]} is a link to elsewhere")
                for name in _names(root[layer], "weight_names"):
                    place = root[layer]
                    for part in name.split("/"):
                        if not isinstance(place.get(part, getlink=True), h5py.HardLink):
                            raise ValueError(f"{layer[:80]}/{name[:80]} is missing or a link to elsewhere")
                        place = place[part]
                    if not isinstance(place, h5py.Dataset) or place.dtype.kind not in "biuf" or place.external:
                        raise ValueError(f"{name[:80]} is no array of numbers in this file")
                    if place.nbytes > 1000 * size:
                        raise ValueError(f"{name[:80]} states {place.nbytes} bytes in a file of {size}")
                    key = f"{layer}/{_leaf(name)}"
                    if key in arrays:
                        raise ValueError(f"{layer[:80]} has two variables {_leaf(name)}")
                    arrays[key] = np.ascontiguousarray(place[()])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, RecursionError) as error:
        raise refusal(path, f"is no readable HDF5 file of Keras: {error}") from None
    if not arrays:
        raise refusal(path, "holds no weights")
    return arrays


def _new_file(image: io.BytesIO) -> h5py.File:
    """A file that keeps the order of its groups and not the time of its making: same arrays, same bytes."""
    creation, access = h5py.h5p.create(h5py.h5p.FILE_CREATE), h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    creation.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    creation.set_attr_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    creation.set_obj_track_times(False)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, image)
    return h5py.File(h5py.h5f.create(b"image", h5py.h5f.ACC_TRUNC, creation, access))


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by "layer/variable" for `model.load_weights(path, by_name=True)`, whole or not at all.

    A layer's variables are written in the order of `arrays`, which must be Keras's: kernel, bias; gamma, beta,
    moving_mean, moving_variance.

    Raises:
        WeightsError: a name that is not "layer/variable", or the disk refuses.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        layer, _, leaf = key.partition("/")
        if not leaf or "/" in leaf:
            raise refusal(path, f"not written: {listed([key])} is no layer/variable")
        layers.setdefault(layer, {})[leaf] = array
    image = io.BytesIO()  # HDF5 writes here and there in a file, and what it makes of a disk's error is its own
    with _new_file(image) as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.0.0"
        for layer, variables in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{leaf}:0".encode() for leaf in variables]
            for leaf, array in variables.items():
                group[f"{layer}/{leaf}:0"] = array
    with whole(path) as file:
        file.write(image.getbuffer())
