"""What an HDF5 file of weights holds and where its bytes lie: a program of its own, `python hdf5_child.py FILE LIMIT`.

The HDF5 library is written in C for files that are trusted: a damaged one makes it loop for ever, crash or allocate
without bound, and one that is made for it opens other files. So it runs here, in a process with limits on time and
memory that can open no further file, and it reads names, shapes and places alone; the values, the caller reads itself.
Nothing of kvision is imported: starting it takes as long as importing h5py.

It prints JSON: {"arrays": [[layer, variable, dtype, shape, offset], ...]}, or {"error": why}.
"""

import codecs
import json
import math
import os
import sys

import h5py
import numpy as np

SECONDS = 5  # of this process's time; the largest of Keras's files take one
MAX_NAMES = 100_000
MAX_AXES = 32
MAX_DEPTH = 16  # of layers within layers
KERNELS = ("conv2d", "conv2d_transpose", "depthwise_conv2d", "dense")  # classes with a kernel and perhaps a bias


class Refused(Exception):  # noqa: N818  (the message is for the caller)
    """The file is not as Keras writes them; the message says what is wrong."""


def confine(**limits: int) -> None:
    """Lower limits of this process by their names in `resource`, RLIMIT_...; where a system has them."""
    try:
        import resource
    except ImportError:  # Windows: the caller's own clock is left
        return
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}", None)
        if limit is not None:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # Past the softer limit on time a signal says so; one second later comes the end without a word.
            resource.setrlimit(limit, (value, value + 1 if name == "CPU" and value < hard % 2**63 else value))


def memory() -> int | None:
    """The bytes of this process's address space; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def names(group, attribute: str) -> list[str]:
    """An attribute that is a list of names; long ones are cut into `layer_names0`, `layer_names1` ..."""
    parts = [attribute] if attribute in group.attrs else []
    while not parts or parts[0] != attribute:
        part = f"{attribute}{len(parts)}"
        if part not in group.attrs:
            break
        parts.append(part)
    found = []
    for part in parts:
        told = group.attrs.get_id(part)
        if math.prod(told.shape or ()) * max(8, told.dtype.itemsize) > MAX_NAMES * 64:
            raise Refused(f"an attribute {part} of shape {told.shape}")
        found += np.asarray(group.attrs[part]).reshape(-1).tolist()
    if not parts or len(found) > MAX_NAMES or not all(isinstance(name, bytes | str) for name in found):
        raise Refused(f"a group without a list {attribute!r}")
    return [name.decode("utf-8") if isinstance(name, bytes) else name for name in found]


def inside(group, path: str):
    """What lies at a path below a group, each step of which must be in this file itself."""
    for part in path.split("/"):
        if not isinstance(group, h5py.Group) or not part or part == ".":
            raise Refused(f"{path[:80]!r} is no path of a group")
        name = part.encode()
        if not group.id.links.exists(name) or group.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise Refused(f"{path[:80]} is missing or a link to elsewhere")
        group = group[part]
    return group


def place(dataset, name: str) -> tuple[str, list[int], int]:
    """(dtype, shape, offset in the file) of an array of numbers that lies there in one piece."""
    if not isinstance(dataset, h5py.Dataset):
        raise Refused(f"{name[:80]} is no array of numbers in this file")
    creation = dataset.id.get_create_plist()
    # Neither a virtual data set nor one with external storage, which lie in other files; nor one packed in chunks.
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_external_count():
        raise Refused(
            f"{name[:80]} does not lie in one piece in this file, as Keras writes it: load it in h5py and save it as "
            "a plain data set"
        )
    dtype, shape = dataset.dtype, dataset.shape
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or h5py.check_enum_dtype(dtype) or shape is None:
        raise Refused(f"{name[:80]} is no array of numbers in this file")
    if len(shape) > MAX_AXES:
        raise Refused(f"{name[:80]} has {len(shape)} axes")
    offset = dataset.id.get_offset()
    if offset is None and 0 not in shape:
        raise Refused(f"{name[:80]} was created and never written")
    return dtype.str, [int(length) for length in shape], int(offset or 0)


def contents(file) -> list[list]:
    """The arrays of an opened file: [[layer, variable's name, dtype, shape, offset], ...]."""
    root = file
    if file.id.links.exists(b"model_weights"):
        root = inside(file, "model_weights")
    if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
        if root.get("layers", getlink=True) is not None:
            return numbered(inside(root, "layers"))
        raise Refused("it has neither layer_names, as Keras 2's files, nor layers, as Keras 3's")
    found = []
    for layer in names(root, "layer_names"):
        group = inside(root, layer)
        for name in names(group, "weight_names"):
            found.append([layer, name, *place(inside(group, name), f"{layer}/{name}")])
            if len(found) > MAX_NAMES:
                raise Refused(f"more than {MAX_NAMES:,} arrays")
    return found


def variables(kind: str, count: int) -> list[str]:
    """The names of a layer's variables, which Keras 3 numbers, by its class; of a class unknown here the numbers."""
    if kind in KERNELS and count <= 2:
        return ["kernel", "bias"][:count]
    if kind == "batch_normalization" and 2 <= count <= 4:  # of three the scale is what is missing, as in Inception
        return ["gamma", "beta", "moving_mean", "moving_variance"][0 if count == 4 else 4 - count :]
    return [str(i) for i in range(count)]


def numbered(layers) -> list[list]:
    """The arrays of Keras 3's `.weights.h5`: a group for each layer, named by its class and a number, with its name in
    an attribute and its variables numbered in a group `vars`. The state of random numbers is left out."""
    found, left = [], [(layers, 0)]
    while left:
        group, depth = left.pop()
        for part in group:
            if not isinstance(inside(group, part), h5py.Group) or part == "seed_generator":
                continue
            inner = inside(group, part)
            if part != "vars":
                if depth >= MAX_DEPTH:
                    raise Refused(f"layers within layers, more than {MAX_DEPTH} deep")
                left.append((inner, depth + 1))
                continue
            count = len(inner)
            if not count:
                continue
            if "name" not in inner.attrs:
                raise Refused(
                    "its layers have no names, which Keras writes from 3.12 on: load it in Keras and save it again"
                )
            kind = group.name.rsplit("/", 1)[-1]
            kind = kind.rsplit("_", 1)[0] if kind.rsplit("_", 1)[-1].isdigit() else kind
            layer = inner.attrs["name"]
            layer = layer.decode("utf-8") if isinstance(layer, bytes) else str(layer)
            for i, variable in enumerate(variables(kind, count)):
                found.append([layer, variable, *place(inside(inner, str(i)), f"{layer}/{i}")])
            if len(found) > MAX_NAMES:
                raise Refused(f"more than {MAX_NAMES:,} arrays")
    return found


def locate(path: str, limit: int) -> dict:
    """What the program prints for a file."""
    try:
        for encoding in ("ascii", "utf-8", "latin-1"):
            codecs.lookup(encoding)  # Python loads them from files, which soon are out of reach
        confine(CPU=SECONDS, FSIZE=0, CORE=0)
        if taken := memory():
            confine(AS=taken + limit)
        with h5py.File(path, "r") as file:
            # What is open stays open, and no other file can be opened, by whatever link.
            confine(NOFILE=0)
            return {"arrays": contents(file)}
    except Refused as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it asks for more memory than its size explains"}
    except Exception as error:  # whatever h5py makes of what HDF5 says
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    print(json.dumps(locate(sys.argv[1], int(sys.argv[2]))), flush=True)
    os._exit(0)  # without HDF5's own clearing up, which a damaged file can upset
