"""A model's weights in one `.npz` file with a manifest. The format: docs/npz.md."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from kvision import engine
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import Archive, digest, dtype_fault, shorten, weights_error, write
from kvision.weights.input_channels import adapt_kernel, adaptable
from kvision.weights.manifest import FORMAT, FORMAT_VERSION, MANIFEST, STATED, check_fields, read_manifest, to_json

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def named_variables(model) -> dict:
    """Return the model's variables by their names in a file: `{"stage1_conv/kernel": variable, ...}`.

    A name is the variable's path. If every path starts with the model's name, as in a `keras.Sequential` or a subclass,
    that is removed, so that renaming the model does not rename its weights. The statistics of batch norm are included;
    states of random generators, metrics and optimizers are not.

    Raises:
        ValueError: two variables have one name, or there are none because the model is not built.
    """
    variables = model.weights
    prefix = model.name + "/"
    prefixed = all(variable.path.startswith(prefix) for variable in variables)
    prefixed = prefixed and all(layer.name != model.name for layer in model.layers)
    named = {}
    for variable in variables:
        key = variable.path[len(prefix) :] if prefixed else variable.path
        if key in named:
            raise ValueError(f"two variables of {model.name} are named {key}; give their layers distinct names")
        named[key] = variable
    if not named:
        raise ValueError(f"{model.name} has no variables; build it first by calling it on an input")
    return named


def _named_variables(model, path) -> dict:
    """Return `named_variables` if all are of supported dtypes; else raise WeightsError."""
    try:
        named = named_variables(model)
    except ValueError as error:
        raise weights_error(path, str(error)) from None
    for key, variable in named.items():
        try:
            fault = dtype_fault(np.dtype(str(variable.dtype)))
        except TypeError:  # bfloat16 and others that are not NumPy's
            fault = f"has dtype {variable.dtype}; weights files support NumPy's numbers, such as float32"
        if fault:
            raise weights_error(path, f"the model's {key} {fault}")
    return named


def probe_images(shape: tuple[int, int, int]) -> np.ndarray:
    """Generate four images, easy to reproduce in any language: uint8 (4, *shape) for `shape` (height, width, channels).

    The value at index i, in C order, is `(i * 2654435761 mod 2**32) >> 24`: the high byte of Knuth's
    multiplicative hash (The Art of Computer Programming, volume 3, section 6.4).
    """
    indices = np.arange(4 * math.prod(shape), dtype=np.uint64)
    return (indices * 2654435761 % 2**32 >> 24).astype(np.uint8).reshape(4, *shape)


@contextlib.contextmanager
def _full_precision(model) -> Iterator[None]:
    """Within this context, compute in the variables' dtype, on a GPU, too: logits do not depend on a mixed policy."""
    layers = [layer for layer in model._flatten_layers() if layer.compute_dtype != layer.variable_dtype]
    policies = [layer.dtype_policy for layer in layers]
    for layer in layers:
        layer.dtype_policy = layer.variable_dtype
    try:
        with engine.full_precision():
            yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy


def probe_logits(model, shape: tuple[int, int, int], preprocessing: dict | None) -> np.ndarray:
    """Return the model's logits, float32 (4, classes), for the preprocessed `probe_images(shape)`."""
    import keras  # here, so that reading a manifest does not start a backend

    prepare = Preprocessing() if preprocessing is None else Preprocessing.from_json(preprocessing)
    rows = []
    with _full_precision(model):
        for image in probe_images(shape):  # one by one, because Keras keeps all layer outputs of a call in memory
            logits = model(prepare(image[None]), training=False)
            logits = logits[0] if isinstance(logits, list) else logits  # auxiliary heads follow the first
            rows.append(np.asarray(keras.ops.convert_to_numpy(logits), np.float32))
    return np.concatenate(rows)


def save(
    model, path: str | os.PathLike, *, allow_nonfinite: bool = False, dtype: str | None = None, **manifest
) -> dict:
    """Write a model's weights and their manifest to `path`, atomically.

    The same weights and manifest give the same bytes: the file contains no time and no machine. Fields of the
    manifest:

        architecture: name of the network; the default is `model.name`.
        arguments: arguments of `kvision.zoo.build_model` to rebuild it; `input_shape` and `classes` are
            filled in from the model's shapes unless given here (a network without head
            needs `{"classes": 0}`).
        classes: names of the classes in the order of the logits.
        input_size: (height, width) in pixels; the default is the model's.
        preprocessing: a `kvision.data.preprocessing.Preprocessing`, or its `to_json()`; the default, None,
            means a scale of 1/255.
        dataset: name of the training data set.
        accuracy: on the test set without augmentation, from 0 to 1, by backend: `{keras.backend.backend(): 0.9158}`.
        license: of the weights, an SPDX identifier.
        provenance: the origin of the weights, any object; `{"command": ...}` is shown in the folder's table.

    Args:
        model: a built Keras model with variables of plain NumPy dtypes.
        path: file to write; its folder must exist.
        allow_nonfinite: also write NaN and infinite weights, as of a diverged run.
        dtype: "float16" or "bfloat16" stores floating-point arrays rounded to it, in half the bytes; loading widens
            them again, and the probe logits are those of the rounded weights. None stores each as it is.

    Returns:
        The manifest as written, with the sha256 of each array and, for networks from one image to one row of
        logits, the probe logits.

    Raises:
        TypeError: an unknown field of the manifest.
        WeightsError: the weights or a field cannot be written; an existing file at `path` is unchanged.
    """
    if unknown := manifest.keys() - STATED.keys():
        raise TypeError(f"a manifest has no field {shorten(sorted(unknown))}; it has {', '.join(STATED)}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise weights_error(path, f"cannot be written: there is no folder {folder}")
    arrays = {key: _numpy(variable) for key, variable in _named_variables(model, path).items()}
    if not allow_nonfinite and (broken := [key for key, array in arrays.items() if not np.isfinite(array).all()]):
        raise weights_error(
            path,
            f"not written, the run diverged: {shorten(broken)} would be NaN or infinite; allow_nonfinite=True "
            "writes them",
        )
    manifest = _completed(model, path, manifest)
    if dtype not in (None, "float32"):
        arrays = {key: _narrow(path, key, array, dtype, allow_nonfinite) for key, array in arrays.items()}
    manifest["arrays"] = {
        key: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest(array)}
        for key, array in arrays.items()
    }
    with _rounded_weights(model, arrays):
        manifest["probe"] = _probe(model, path, manifest, allow_nonfinite)
    # NumPy's format has no bfloat16: its bits are stored as uint16.
    arrays = {key: array.view(np.uint16) if array.dtype == BFLOAT16 else array for key, array in arrays.items()}
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        encoded = np.frombuffer(text.encode("utf-8"), np.uint8)
    except UnicodeEncodeError:
        raise weights_error(path, "not written, the manifest contains a character that is not Unicode") from None
    write(path, {**arrays, MANIFEST: encoded})
    return json.loads(text)


def _narrow(path, key: str, array: np.ndarray, dtype: str, allow_nonfinite: bool) -> np.ndarray:
    """Round a floating-point array to a narrower type; others are unchanged."""
    if dtype not in ("float16", "bfloat16"):
        raise weights_error(path, f"weights are stored as float32, float16 or bfloat16, not as {dtype}")
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(BFLOAT16 if dtype == "bfloat16" else np.float16)
    if not allow_nonfinite and not np.isfinite(narrow.astype(np.float32)).all():
        raise weights_error(path, f"not written: {key} reaches {abs(array).max():.3g}, beyond the range of {dtype}")
    return narrow


@contextlib.contextmanager
def _rounded_weights(model, arrays: dict) -> Iterator[None]:
    """Within this context, the model's variables have the rounded values of `arrays`."""
    original = []
    for key, variable in named_variables(model).items():
        if key in arrays and arrays[key].dtype.name != str(variable.dtype).removeprefix("torch."):
            values = np.array(_numpy(variable))
            original.append((variable, values))
            variable.assign(arrays[key].astype(values.dtype))
    try:
        yield
    finally:
        for variable, values in original:
            variable.assign(values)


def _numpy(variable) -> np.ndarray:
    import keras

    return np.asarray(keras.ops.convert_to_numpy(variable.value))


def _completed(model, path, stated: dict) -> dict:
    """Return the manifest without arrays and probe: the stated fields, completed from the model's shapes."""
    if hasattr(stated.get("preprocessing"), "to_json"):
        stated["preprocessing"] = stated["preprocessing"].to_json()
    arguments, input_size = {}, None
    shape = _image_shape(model)
    if shape is not None:
        arguments["input_shape"], input_size = shape, shape[:2] if all(shape[:2]) else None
    if (outputs := _logits_shape(model)) is not None:
        arguments["classes"] = outputs[-1]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": model.name,
        "classes": None,
        "input_size": input_size,
        "preprocessing": None,
        "dataset": None,
        "accuracy": {},
        "license": None,
        "provenance": {},
        **stated,
        "arguments": {**arguments, **dict(stated.get("arguments") or {})},
    }
    try:
        manifest = to_json(manifest, "")
        check_fields(manifest)
    except ValueError as error:
        raise weights_error(path, f"not written, {error}") from None
    return manifest


def _image_shape(model) -> list[int | None] | None:
    """Return [height, width, channels] of a model that reads one batch of images, with None for free sizes."""
    try:
        shape = model.input_shape
    except (AttributeError, ValueError):  # a subclass that was built by calling it
        return None
    return list(shape[1:]) if isinstance(shape, tuple) and len(shape) == 4 and None not in shape[3:] else None


def _logits_shape(model) -> tuple | None:
    """Return (None, classes) if the model's only or first output is one row of logits per image."""
    shape = getattr(model, "output_shape", None)
    if isinstance(shape, list) and shape:
        shape = shape[0]
    return shape if isinstance(shape, tuple) and len(shape) == 2 else None


def _probe(model, path, manifest: dict, allow_nonfinite: bool) -> dict | None:
    shape, outputs = _image_shape(model), _logits_shape(model)
    if shape is not None and not all(shape[:2]) and manifest["input_size"]:
        shape = [*manifest["input_size"], shape[2]]
    if shape is None or None in shape or outputs is None:
        return None
    try:
        logits = probe_logits(model, shape, manifest["preprocessing"])
    except ValueError as error:
        raise weights_error(path, f"not written, the probe images cannot be classified: {error}") from None
    if not np.isfinite(logits).all():
        if allow_nonfinite:
            return None
        raise weights_error(path, "not written, the probe images have logits that are NaN or infinite")
    # `str` gives the shortest decimal that parses to the same float32.
    return {"shape": [4, *shape], "logits": [[float(str(value)) for value in row] for row in logits]}


def load(
    model,
    path: str | os.PathLike,
    skip: str | Iterable[str] = (),
    *,
    manifest_required: bool = True,
    allow_nonfinite: bool = False,
    adapt_input: bool = False,
) -> dict:
    """Set a model's variables to the arrays of a weights file; names and shapes must match in both directions.

    Everything is checked before the first variable is set, so a rejected file leaves the model unchanged.

    Args:
        model: a built Keras model.
        path: a file of `save`, or any `.npz` with the names and shapes of `named_variables(model)`.
        skip: regular expressions; variables whose whole name matches one keep their values, and such arrays
            are ignored.
        manifest_required: False accepts a file without manifest, protected only by the zip's checksums.
        allow_nonfinite: also accept NaN and infinite values.
        adapt_input: adapt the kernels that read the images to another number of channels, see
            `kvision.weights.adapt_kernel`.

    Returns:
        The manifest; {} if the file has none.

    Raises:
        WeightsError: the file is damaged, unsafe, or not of this model; the message says which.
        ValueError: an invalid regular expression in `skip`.
    """
    skip = [skip] if isinstance(skip, str) else list(skip)
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(f"skip must contain regular expressions, {error.pattern!r} is invalid: {error}") from None

    def kept(named: dict) -> dict:
        return {key: item for key, item in named.items() if not any(pattern.fullmatch(key) for pattern in patterns)}

    with Archive(path) as archive:
        manifest = read_manifest(archive, manifest_required)
        variables = kept(_named_variables(model, path))
        members = kept({key: member for key, member in archive.members.items() if key != MANIFEST})
        channels = (_image_shape(model) or [0])[-1] if adapt_input else 0
        if fault := _find_mismatches(variables, members, channels, manifest.get("arrays", {})):
            made_for = f"a file of {manifest['architecture']}" if manifest else "the file"
            raise weights_error(path, f"{made_for} does not fit the model {model.name}: {fault}")

        def checked(key: str) -> np.ndarray:
            entry = manifest["arrays"][key] if manifest else {}
            array = archive.read(key, entry.get("sha256"))
            if entry.get("dtype") == "bfloat16":
                array = array.view(BFLOAT16).astype(np.float32)
            if not allow_nonfinite and not _finite(array):
                raise weights_error(path, f"{key} contains NaN or infinite values (allow_nonfinite=True accepts them)")
            return array

        # Hashing takes most of the time, and releases the interpreter's lock.
        with ThreadPoolExecutor() as pool:
            arrays = dict(zip(members, pool.map(checked, members), strict=True))
    for key, array in arrays.items():
        variable = variables[key]
        variable.assign(array if array.shape == tuple(variable.shape) else adapt_kernel(array, channels))
    return manifest


def _finite(array: np.ndarray) -> bool:
    """Return whether all values are finite. A finite sum of squares proves it in a fifth of the time."""
    if array.dtype in (np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            flat = array.reshape(-1)
            if np.isfinite(np.dot(flat, flat)):
                return True
    return bool(np.isfinite(array).all())


def _find_mismatches(variables: dict, members: dict, channels: int, entries: dict) -> str | None:
    """Return how the arrays differ from the variables, or None; kernels that read `channels` may have others."""
    faults = []
    if missing := [key for key in variables if key not in members]:
        faults.append(f"{len(missing)} of {len(variables)} variables are missing ({shorten(missing)})")
    if unexpected := [key for key in members if key not in variables]:
        faults.append(f"{len(unexpected)} of {len(members)} arrays are unexpected ({shorten(unexpected)})")
    shapes, dtypes = [], []
    for key in variables.keys() & members.keys():
        expected, found = tuple(variables[key].shape), members[key].shape
        dtype, stored = np.dtype(str(variables[key].dtype)), members[key].dtype
        if entries.get(key, {}).get("dtype") == "bfloat16":
            stored = np.dtype(np.float16)  # of the same kind and size
        if expected != found and not adaptable(found, expected, channels):
            shapes.append(f"{key}: file {found}, model {expected}")
        # A float16 array is exact in a float32 variable; the other way round it would be rounded silently.
        if stored.kind != dtype.kind or stored.itemsize > dtype.itemsize:
            dtypes.append(f"{key}: file {stored.name}, model {dtype.name}")
    if shapes:
        faults.append(f"{len(shapes)} of another shape ({shorten(sorted(shapes))})")
    if dtypes:
        faults.append(f"{len(dtypes)} of another dtype ({shorten(sorted(dtypes))})")
    return "; ".join(faults) or None


def inspect(path: str | os.PathLike) -> dict:
    """Return a file's contents, from its directory, headers and manifest; no model is built.

    Returns:
        {"manifest": dict or None, "arrays": {name: {"shape", "dtype"}}, "parameters": number of values (with the
        statistics of batch norm), "bytes": of the file, "sha256": of the file}, all plain JSON.

    Raises:
        WeightsError: the file cannot be read or is not a valid `.npz` of plain numbers.
    """
    with Archive(path) as archive:
        manifest = read_manifest(archive, required=False)
        members = {key: member for key, member in archive.members.items() if key != MANIFEST}
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "manifest": manifest or None,
        "arrays": {key: {"shape": list(m.shape), "dtype": m.dtype.name} for key, m in members.items()},
        "parameters": sum(math.prod(member.shape) for member in members.values()),
        "bytes": archive.bytes,
        "sha256": sha256,
    }
