"""Lists the arrays of an HDF5 weights file with their offsets: a separate program, `python hdf5_child.py FILE LIMIT`.

The HDF5 library is written in C for trusted files: a damaged one can make it loop, crash or allocate without bound, and
a crafted one can open other files. So it runs here, in a process with limits on time and memory that cannot open
another file. It reads names, shapes and offsets only; the caller reads the values itself. Nothing of kvision is
imported, so that it starts as fast as h5py.

It prints JSON: {"arrays": [[layer, variable, dtype, shape, offset], ...]}, or {"error": reason}.
"""

import codecs
import json
import math
import os
import sys

import h5py
import numpy as np

SECONDS = 5  # of CPU time; the largest of Keras's files take one
MAX_NAMES = 100_000
MAX_AXES = 32
MAX_DEPTH = 16  # of layers within layers
KERNELS = ("conv2d", "conv2d_transpose", "depthwise_conv2d", "dense")  # classes with a kernel and perhaps a bias


class Refused(Exception):  # noqa: N818  (the message is for the caller)
    """The file does not follow Keras's format; the message says how."""


def confine(**limits: int) -> None:
    """Set this process's limits by their names in `resource`, RLIMIT_...; a no-op on systems without them."""
    try:
        import resource
    except ImportError:  # Windows: only the caller's timeout applies
        return
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}", None)
        if limit is not None:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # At the soft limit on time, a signal reports it; one second later the hard limit ends the process.
            resource.setrlimit(limit, (value, value + 1 if name == "CPU" and value < hard % 2**63 else value))


def memory() -> int | None:
    """Return the bytes of this process's address space; None if the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def names(group, attribute: str) -> list[str]:
    """Return an attribute that is a list of names; long ones are split into `layer_names0`, `layer_names1` ..."""
    parts = [attribute] if attribute in group.attrs else []
    while not parts or parts[0] != attribute:
        part = f"{attribute}{len(parts)}"
        if part not in group.attrs:
            break
        parts.append(part)
    found = []
    for part in parts:
        stored = group.attrs.get_id(part)
        if math.prod(stored.shape or ()) * max(8, stored.dtype.itemsize) > MAX_NAMES * 64:
            raise Refused(f"an attribute {part} of shape {stored.shape}")
        found += np.asarray(group.attrs[part]).reshape(-1).tolist()
    if not parts or len(found) > MAX_NAMES or not all(isinstance(name, bytes | str) for name in found):
        raise Refused(f"a group without a list {attribute!r}")
    return [name.decode("utf-8") if isinstance(name, bytes) else name for name in found]


def inside(group, path: str):
    """Return the member at a path below a group; each step must lie in this file itself."""
    for part in path.split("/"):
        if not isinstance(group, h5py.Group) or not part or part == ".":
            raise Refused(f"{path[:80]!r} is not a path of a group")
        name = part.encode()
        if not group.id.links.exists(name) or group.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise Refused(f"{path[:80]} is missing or a link to elsewhere")
        group = group[part]
    return group


def place(dataset, name: str) -> tuple[str, list[int], int]:
    """Return (dtype, shape, offset in the file) of a contiguous array of numbers."""
    if not isinstance(dataset, h5py.Dataset):
        raise Refused(f"{name[:80]} is not an array of numbers in this file")
    creation = dataset.id.get_create_plist()
    # Not virtual, not in external files, not chunked.
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_external_count():
        raise Refused(
            f"{name[:80]} is not contiguous in this file, as Keras writes it: load it in h5py and save it as "
            "a plain data set"
        )
    dtype, shape = dataset.dtype, dataset.shape
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or h5py.check_enum_dtype(dtype) or shape is None:
        raise Refused(f"{name[:80]} is not an array of numbers in this file")
    if len(shape) > MAX_AXES:
        raise Refused(f"{name[:80]} has {len(shape)} axes")
    offset = dataset.id.get_offset()
    if offset is None and 0 not in shape:
        raise Refused(f"{name[:80]} was created and never written")
    return dtype.str, [int(length) for length in shape], int(offset or 0)


def contents(file) -> list[list]:
    """Return the arrays of an open file: [[layer, variable's name, dtype, shape, offset], ...]."""
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
    """Return the names of a layer's variables, which Keras 3 numbers, by its class; numbers for an unknown class."""
    if kind in KERNELS and count <= 2:
        return ["kernel", "bias"][:count]
    if kind == "batch_normalization" and 2 <= count <= 4:  # with three, the scale is missing, as in Inception
        return ["gamma", "beta", "moving_mean", "moving_variance"][0 if count == 4 else 4 - count :]
    return [str(i) for i in range(count)]


def numbered(layers) -> list[list]:
    """Return the arrays of Keras 3's `.weights.h5`: a group for each layer, named by its class and a number, with its
    name in an attribute and its variables numbered in a group `vars`. States of random generators are skipped."""
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
                    "its layers have no names, which Keras writes since 3.12: load it in Keras and save it again"
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
    """Return the program's output for a file."""
    try:
        for encoding in ("ascii", "utf-8", "latin-1"):
            codecs.lookup(encoding)  # Python loads codecs from files, which cannot be opened later
        confine(CPU=SECONDS, FSIZE=0, CORE=0)
        if taken := memory():
            confine(AS=taken + limit)
        with h5py.File(path, "r") as file:
            # Open files stay open, but no other file can be opened, by whatever link.
            confine(NOFILE=0)
            return {"arrays": contents(file)}
    except Refused as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than its size justifies"}
    except Exception as error:  # whatever h5py raises
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    print(json.dumps(locate(sys.argv[1], int(sys.argv[2]))), flush=True)
    os._exit(0)  # skips HDF5's cleanup, which a damaged file can crash
