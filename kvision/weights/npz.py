"""A model's weights in one `.npz` file, with a manifest that says what they are. The format: docs/npz.md."""

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
from kvision.weights.manifest import FORMAT, FORMAT_VERSION, MANIFEST, STATED, check_fields, plain, read_manifest

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def named_variables(model) -> dict:
    """The model's variables by the names they have in a file: `{"stage1_conv/kernel": variable, ...}`.

    A name is the variable's path. Where the model's own name stands before every path, as in a
    `keras.Sequential` or a subclass, it is left out, so that renaming the model does not rename its weights.
    The statistics of batch norm are included; the states of random generators, metrics and optimizers are
    not.

    Raises:
        ValueError: two variables have one name, or there are none yet because the model is not built.
    """
    variables = model.weights
    prefix = model.name + "/"
    own = all(variable.path.startswith(prefix) for variable in variables)
    own = own and all(layer.name != model.name for layer in model.layers)
    named = {}
    for variable in variables:
        key = variable.path[len(prefix) :] if own else variable.path
        if key in named:
            raise ValueError(f"two variables of {model.name} are named {key}; give their layers distinct names")
        named[key] = variable
    if not named:
        raise ValueError(f"{model.name} has no variables; build it first, by calling it on an input")
    return named


def _named_variables(model, path) -> dict:
    """`named_variables` of plain numbers, or a refusal."""
    try:
        named = named_variables(model)
    except ValueError as error:
        raise weights_error(path, str(error)) from None
    for key, variable in named.items():
        try:
            fault = dtype_fault(np.dtype(str(variable.dtype)))
        except TypeError:  # bfloat16 and its like, which NumPy does not know
            fault = f"has dtype {variable.dtype}; weights files hold NumPy's numbers, such as float32"
        if fault:
            raise weights_error(path, f"the model's {key} {fault}")
    return named


def probe_images(shape: tuple[int, int, int]) -> np.ndarray:
    """Four images that any language can make: uint8 (4, *shape) for `shape` (height, width, channels).

    The value at place i, in C order, is `(i * 2654435761 mod 2**32) >> 24`: the high byte of Knuth's
    multiplicative hash (The Art of Computer Programming, volume 3, section 6.4).
    """
    places = np.arange(4 * math.prod(shape), dtype=np.uint64)
    return (places * 2654435761 % 2**32 >> 24).astype(np.uint8).reshape(4, *shape)


@contextlib.contextmanager
def _full_precision(model) -> Iterator[None]:
    """Compute in the dtype of the variables, on a GPU too: a network trained in less has its file's logits."""
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
    """The model's logits, float32 (4, classes), for the preprocessed `probe_images(shape)`."""
    import keras  # here, so that reading a file's manifest starts no backend

    prepare = Preprocessing() if preprocessing is None else Preprocessing.from_json(preprocessing)
    rows = []
    with _full_precision(model):
        for image in probe_images(shape):  # each alone: until it has them all, Keras keeps what every layer gives
            logits = model(prepare(image[None]), training=False)
            logits = logits[0] if isinstance(logits, list) else logits  # auxiliary heads follow the first
            rows.append(np.asarray(keras.ops.convert_to_numpy(logits), np.float32))
    return np.concatenate(rows)


def save(
    model, path: str | os.PathLike, *, allow_nonfinite: bool = False, dtype: str | None = None, **manifest
) -> dict:
    """Write a model's weights and their manifest to `path`, whole or not at all.

    The same weights and manifest give the same bytes: the file holds no time and no machine. Fields of the
    manifest:

        architecture: name of the network; the default is `model.name`.
        arguments: what `kvision.zoo.build_model` needs to build it again; `input_shape` and `classes` are
            filled in from the model's shapes, and what is given here replaces them (a network without head
            needs `{"classes": 0}`).
        classes: names of the classes in the order of the logits.
        input_size: (height, width) in pixels; the default is the model's.
        preprocessing: a `kvision.data.preprocessing.Preprocessing`, or its `to_json()`; the default, None,
            means a scale of 1/255.
        dataset: name of the data set it was trained on.
        accuracy: on the test set, each image alone, from 0 to 1, by backend: `{keras.backend.backend(): 0.9158}`.
        license: of the weights, an SPDX identifier.
        provenance: anything that says where the weights come from; `{"command": ...}` goes into the folder's
            table.

    Args:
        model: a built Keras model with variables of plain NumPy dtypes.
        path: file to write; its folder must exist.
        allow_nonfinite: write NaN and infinite weights too, as a diverged run has.
        dtype: "float16" or "bfloat16" stores floating-point arrays rounded to it, in half the bytes; loading widens
            them again, and the probe logits are those of the rounded weights. None stores each as it is.

    Returns:
        The manifest as written, with the sha256 of each array and, for networks from one image to one row of
        logits, the probe logits.

    Raises:
        TypeError: a field that manifests do not have.
        WeightsError: the weights or a field cannot be written; a file that was at `path` is still there.
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
            "would write them",
        )
    manifest = _completed(model, path, manifest)
    if dtype not in (None, "float32"):
        arrays = {key: _narrow(path, key, array, dtype, allow_nonfinite) for key, array in arrays.items()}
    manifest["arrays"] = {
        key: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest(array)}
        for key, array in arrays.items()
    }
    with _holding(model, arrays):
        manifest["probe"] = _probe(model, path, manifest, allow_nonfinite)
    # NumPy's format has no bfloat16: its bits lie there as uint16.
    arrays = {key: array.view(np.uint16) if array.dtype == BFLOAT16 else array for key, array in arrays.items()}
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        encoded = np.frombuffer(text.encode("utf-8"), np.uint8)
    except UnicodeEncodeError:
        raise weights_error(path, "not written, the manifest holds a character that is no Unicode") from None
    write(path, {**arrays, MANIFEST: encoded})
    return json.loads(text)


def _narrow(path, key: str, array: np.ndarray, dtype: str, allow_nonfinite: bool) -> np.ndarray:
    """A floating-point array in a narrower type; others stay."""
    if dtype not in ("float16", "bfloat16"):
        raise weights_error(path, f"weights are stored as float32, float16 or bfloat16, not as {dtype}")
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(BFLOAT16 if dtype == "bfloat16" else np.float16)
    if not allow_nonfinite and not np.isfinite(narrow.astype(np.float32)).all():
        raise weights_error(path, f"not written: {key} reaches {abs(array).max():.3g}, beyond what {dtype} holds")
    return narrow


@contextlib.contextmanager
def _holding(model, arrays: dict) -> Iterator[None]:
    """Within this, the model's variables have the values of arrays that were rounded; then their own again."""
    kept = []
    for key, variable in named_variables(model).items():
        if key in arrays and arrays[key].dtype.name != str(variable.dtype).removeprefix("torch."):
            values = np.array(_numpy(variable))
            kept.append((variable, values))
            variable.assign(arrays[key].astype(values.dtype))
    try:
        yield
    finally:
        for variable, values in kept:
            variable.assign(values)


def _numpy(variable) -> np.ndarray:
    import keras

    return np.asarray(keras.ops.convert_to_numpy(variable.value))


def _completed(model, path, stated: dict) -> dict:
    """The manifest without arrays and probe: what is stated, and what the model's shapes say."""
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
        manifest = plain(manifest, "")
        check_fields(manifest)
    except ValueError as error:
        raise weights_error(path, f"not written, {error}") from None
    return manifest


def _image_shape(model) -> list[int | None] | None:
    """[height, width, channels] of a model that reads one batch of images, where a free size is None."""
    try:
        shape = model.input_shape
    except (AttributeError, ValueError):  # a subclass that was built by a call
        return None
    return list(shape[1:]) if isinstance(shape, tuple) and len(shape) == 4 and None not in shape[3:] else None


def _logits_shape(model) -> tuple | None:
    """(None, classes) of a model that gives one row of logits an image, as its only or its first output."""
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
    # `str` gives the shortest decimal that reads back as the same float32.
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
    """Set a model's variables to the arrays of a weights file; names and shapes must agree both ways.

    Everything is checked before the first variable is set, so a refused file leaves the model as it was.

    Args:
        model: a built Keras model.
        path: a file of `save`, or any `.npz` whose arrays have the names and shapes of
            `named_variables(model)`.
        skip: regular expressions; variables whose whole name matches one keep their values, and such arrays
            are ignored.
        manifest_required: False takes a file without manifest, whose arrays only the zip's checksums vouch
            for.
        allow_nonfinite: take NaN and infinite values too.
        adapt_input: where the model reads images of other channels, change the kernels that read them, see
            `kvision.weights.adapt_kernel`.

    Returns:
        The manifest; {} if the file has none.

    Raises:
        WeightsError: the file is damaged, unsafe, or not of this model; the line says which.
        ValueError: `skip` holds something that is no regular expression.
    """
    skip = [skip] if isinstance(skip, str) else list(skip)
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(f"skip must hold regular expressions, {error.pattern!r} is none: {error}") from None

    def kept(named: dict) -> dict:
        return {key: item for key, item in named.items() if not any(pattern.fullmatch(key) for pattern in patterns)}

    with Archive(path) as archive:
        manifest = read_manifest(archive, manifest_required)
        variables = kept(_named_variables(model, path))
        members = kept({key: member for key, member in archive.members.items() if key != MANIFEST})
        channels = (_image_shape(model) or [0])[-1] if adapt_input else 0
        if fault := _misfit(variables, members, channels, manifest.get("arrays", {})):
            made_for = f"a file of {manifest['architecture']}" if manifest else "the file"
            raise weights_error(path, f"{made_for} does not fit the model {model.name}: {fault}")

        def checked(key: str) -> np.ndarray:
            entry = manifest["arrays"][key] if manifest else {}
            array = archive.read(key, entry.get("sha256"))
            if entry.get("dtype") == "bfloat16":
                array = array.view(BFLOAT16).astype(np.float32)
            if not allow_nonfinite and not _finite(array):
                raise weights_error(path, f"{key} holds NaN or infinite values (allow_nonfinite=True takes them)")
            return array

        # Hashing takes most of the time, and lets other threads run meanwhile.
        with ThreadPoolExecutor() as pool:
            arrays = dict(zip(members, pool.map(checked, members), strict=True))
    for key, array in arrays.items():
        variable = variables[key]
        variable.assign(array if array.shape == tuple(variable.shape) else adapt_kernel(array, channels))
    return manifest


def _finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. A finite sum of squares says so in a fifth of the time."""
    if array.dtype in (np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            flat = array.reshape(-1)
            if np.isfinite(np.dot(flat, flat)):
                return True
    return bool(np.isfinite(array).all())


def _misfit(variables: dict, members: dict, channels: int, entries: dict) -> str | None:
    """What keeps the arrays from being the variables, or None; kernels that read `channels` may be of others."""
    faults = []
    if missing := [key for key in variables if key not in members]:
        faults.append(f"{len(missing)} of {len(variables)} variables are missing ({shorten(missing)})")
    if unexpected := [key for key in members if key not in variables]:
        faults.append(f"{len(unexpected)} of {len(members)} arrays are unexpected ({shorten(unexpected)})")
    shapes, dtypes = [], []
    for key in variables.keys() & members.keys():
        wanted, got = tuple(variables[key].shape), members[key].shape
        dtype, stored = np.dtype(str(variables[key].dtype)), members[key].dtype
        if entries.get(key, {}).get("dtype") == "bfloat16":
            stored = np.dtype(np.float16)  # of one kind and size with it
        if wanted != got and not adaptable(got, wanted, channels):
            shapes.append(f"{key}: file {got}, model {wanted}")
        # A float16 array loses nothing in a float32 variable; the other way round it would, without a word.
        if stored.kind != dtype.kind or stored.itemsize > dtype.itemsize:
            dtypes.append(f"{key}: file {stored.name}, model {dtype.name}")
    if shapes:
        faults.append(f"{len(shapes)} of another shape ({shorten(sorted(shapes))})")
    if dtypes:
        faults.append(f"{len(dtypes)} of another dtype ({shorten(sorted(dtypes))})")
    return "; ".join(faults) or None


def inspect(path: str | os.PathLike) -> dict:
    """What a file holds, by its directory, headers and manifest; no model is built.

    Returns:
        {"manifest": dict or None, "arrays": {name: {"shape", "dtype"}}, "parameters": how many numbers (the
        statistics of batch norm included), "bytes": of the file, "sha256": of the file}, all plain JSON.

    Raises:
        WeightsError: the file cannot be read or is not a sound `.npz` of plain numbers.
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
