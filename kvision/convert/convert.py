"""Conversion of weights files from and to other frameworks: names, layouts, preprocessing. See docs/convert.md.

Strict in both directions: an unmatched tensor or variable is an error unless its name is skipped.
"""

import gc
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from kvision import zoo
from kvision.convert import (
    formats,
    frossard,
    hdf5,
    keras_applications,
    native,
    pth,
    safetensors,
    slim,
    timm,
    torchvision,
)
from kvision.convert.pretrained import create_model
from kvision.convert.reference import compare_with_reference
from kvision.convert.verify import rebuild
from kvision.weights.archive import Archive, WeightsError, shorten, weights_error
from kvision.weights.manifest import read_manifest
from kvision.weights.npz import load, named_variables, save

# Naming schemes of files. Each module has `find`, `prepare`, `buffers` and `preprocessing`.
SOURCES: dict[str, ModuleType] = {
    "torchvision": torchvision,
    "timm": timm,
    "keras": keras_applications,
    "tf_slim": slim,
    "frossard": frossard,
    "kvision": native,
}
# For each suffix on export: the format's writer, and the default source.
WRITERS = {
    ".pth": (pth.write, "torchvision"),
    ".pt": (pth.write, "torchvision"),
    ".safetensors": (safetensors.write, "kvision"),
    ".h5": (hdf5.write, "keras"),
}


@dataclass(frozen=True)
class Report:
    """The result of a conversion.

    Args:
        path, out: the two files' names.
        model: name of the network.
        source: naming scheme of the foreign file.
        converted: number of converted arrays.
        skipped: unmatched names on either side that the caller allowed.
        ignored: names in the foreign file that are not weights: training state, counters, strings.
        difference: largest difference of the logits of generated images from the source framework's, relative to the
            largest logit; None if the framework is not installed or has no such network.
    """

    path: str
    out: str
    model: str
    source: str
    converted: int
    skipped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    difference: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.source}) -> {self.out}: {self.model}, {self.converted} arrays"]
        for title, names in (("skipped", self.skipped), ("ignored", self.ignored)):
            if names:
                lines.append(f"  {title}: {shorten(names, 10)}")
        if self.difference is not None:
            lines.append(f"  logits within {self.difference:.1e} of the source framework's, relative to their largest")
        else:
            lines.append("  logits not compared with the source framework, which is not installed")
        return "\n".join(lines)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _patterns(skip: str | Iterable[str]) -> list[str]:
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"skip must contain regular expressions, {pattern!r} is invalid: {error}") from None
    return patterns


def _detect_source(name: str | None, arrays: Mapping[str, np.ndarray], form: str) -> str:
    """Return `name`, or the naming scheme of `arrays`."""
    if name is not None:
        if name not in SOURCES:
            raise WeightsError(f"unknown source {name!r}; expected one of {', '.join(SOURCES)}")
        return name
    if form == "tf_checkpoint":
        return "tf_slim"
    if form == "h5":  # written by Keras for one of our networks, or one of its applications
        return "kvision" if any(re.match(r"stage\d|stem_|logits/", key) for key in arrays) else "keras"
    if any(re.fullmatch(r"(.*\.)?(blocks\.\d|pre_logits|conv_stem)\..*", key) for key in arrays):
        return "timm"
    if any(re.fullmatch(r".*\.(weight|bias)", key) for key in arrays):
        return "torchvision"
    if any(re.fullmatch(r"conv1_1_[Wb]", key) for key in arrays):
        return "frossard"
    return "kvision"


def strip_prefix(arrays: Mapping[str, np.ndarray], known: Iterable[str]) -> dict[str, np.ndarray]:
    """Remove the prefix of enclosing modules from the arrays' names.

    `DataParallel` adds `module.` to every name, Lightning the attribute's name, such as `model.`.

    Args:
        known: the network's names. If any of them occurs in `arrays`, nothing is removed.
    """
    known = set(known)
    if not known.isdisjoint(arrays):
        return dict(arrays)
    prefixes = Counter()
    for key in arrays:
        dots = (match.end() for match in re.finditer(r"\.", key))
        prefixes.update(key[:end] for end in dots if key[end:] in known)
    if not prefixes:
        return dict(arrays)
    prefix = prefixes.most_common(1)[0][0]
    return {key.removeprefix(prefix): array for key, array in arrays.items()}


def import_arrays(
    model, arrays: Mapping[str, np.ndarray], source: str, skip: str | Iterable[str] = ()
) -> tuple[int, list[str], dict[str, np.ndarray]]:
    """Set a network's variables to foreign arrays, in the names and layouts of a source.

    Everything is checked before the first variable is set.

    Args:
        model: a network of the zoo; its name selects the rules.
        source: one of `SOURCES`.
        skip: patterns of names, ours or theirs, that may be unmatched.

    Returns:
        (number of variables set, skipped names, arrays that are not weights, such as counters).

    Raises:
        WeightsError: an unmatched name on either side, another shape, or values that are not finite; the message
            lists all problems.
    """
    table, patterns = SOURCES[source], _patterns(skip)
    tensor_maps, variables = table.find(model), named_variables(model)
    known = {target.key for target in tensor_maps.values()}
    given = strip_prefix(table.prepare(model.name, dict(arrays)), known)
    buffers = {key: given[key] for key in table.buffers(model.name, tensor_maps) if key in given and key not in known}
    missing = [key for key, target in tensor_maps.items() if target.key not in given]
    unexpected = [key for key in given if key not in known and key not in buffers]
    skipped = [key for key in (*missing, *unexpected) if _matches(key, patterns)]
    faults = []
    if left := [f"{key} ({tensor_maps[key].key})" for key in missing if key not in skipped]:
        faults.append(f"{len(left)} of {len(tensor_maps)} variables are missing: {shorten(left, 5)}")
    if left := [key for key in unexpected if key not in skipped]:
        faults.append(f"{len(left)} of {len(given)} arrays are unexpected: {shorten(left, 5)}")
    converted = {}
    for key, target in tensor_maps.items():
        if target.key not in given or _matches(key, patterns):
            continue
        array = given[target.key]
        if array.shape != target.shape:
            faults.append(f"{target.key} has shape {array.shape}, {key} expects {target.shape}")
        elif not np.isfinite(np.asarray(array, np.float64)).all():
            faults.append(f"{target.key} contains NaN or infinite values")
        else:
            array = np.asarray(array, str(variables[key].dtype))
            converted[key] = target.import_(array, tuple(variables[key].shape))
    if faults:
        raise WeightsError(f"the {source} arrays do not fit {model.name}: {'; '.join(faults[:6])}")
    for key, array in converted.items():
        variables[key].assign(array)
    return len(converted), skipped, buffers


def export_arrays(model, source: str, buffers: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Return a network's variables in the names and layouts of a source: the inverse of `import_arrays`.

    Args:
        buffers: arrays that are not weights, as returned by `import_arrays`; others get the source's defaults.

    Raises:
        WeightsError: the source has no such network.
    """
    import keras

    table, variables = SOURCES[source], named_variables(model)
    tensor_maps = table.find(model)
    arrays = {
        target.key: target.export_(np.asarray(keras.ops.convert_to_numpy(variables[key].value)))
        for key, target in tensor_maps.items()
    }
    return arrays | table.buffers(model.name, tensor_maps) | dict(buffers or {})


def _build(name: str, arrays: Mapping[str, np.ndarray], source: str, input_shape, classes, arguments: dict, skip):
    """Return the network for some arrays, without initial values, and its arguments: its number of classes and its
    auxiliary heads are inferred from the arrays."""
    from kvision.layers import skip_init  # here, because it imports Keras

    table = SOURCES[source]

    def map_arrays(*shape, **options) -> tuple[dict, dict[str, np.ndarray]]:
        """Return the tensor maps of such a network, and the arrays under their names."""
        with skip_init():
            tensor_maps = table.find(zoo.build_model(name, *shape, **options))
        known = [target.key for target in tensor_maps.values()]
        return tensor_maps, strip_prefix(table.prepare(name, dict(arrays)), known)

    if "auxiliary" in zoo.arguments(name) and "auxiliary" not in arguments:
        try:
            tensor_maps, given = map_arrays(**{**arguments, "auxiliary": True})
            heads = [target.key for key, target in tensor_maps.items() if key.startswith("aux")]
        except WeightsError:  # a source without these heads
            heads, given = [], {}
        arguments = {**arguments, "auxiliary": bool(heads) and any(key in given for key in heads)}
    if "maps" in zoo.arguments(name) and "maps" not in arguments and input_shape is not None:
        tensor_maps, given = map_arrays(input_shape, classes, **arguments)
        head = tensor_maps.get("head_1_dense/kernel")
        if head and head.key in given and given[head.key].shape != head.shape:
            arguments = {**arguments, "maps": zoo.head_maps(name, zoo.default_shape(name), input_shape)}
    if classes is None:
        tensor_maps, given = map_arrays(input_shape, **arguments)
        target = tensor_maps.get("logits/bias") or tensor_maps["logits/kernel"]
        if target.key in given and "logits/bias" in tensor_maps:
            classes = given[target.key].size
        elif not any(_matches(key, skip) for key in tensor_maps if key.startswith("logits/")):
            body = {item.key for item in map_arrays(input_shape, 0, **arguments)[0].values()}
            head = {item.key for item in tensor_maps.values()} - body
            classes = 0 if head.isdisjoint(given) and not body.isdisjoint(given) else None
    with skip_init():
        model = zoo.build_model(name, input_shape, classes, **arguments)
    return model, arguments if classes != 0 else {**arguments, "classes": 0}


def _suggest_network(name: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return a hint at a network of the same paper that the arrays fit, or an empty string."""
    from kvision.layers import skip_init  # here, because it imports Keras

    for other in zoo.list_models():
        if other == name or zoo.paper(other) != zoo.paper(name):
            continue
        gc.collect()  # some networks take half a gigabyte
        with skip_init():
            model = zoo.build_model(other, **({"auxiliary": False} if "auxiliary" in zoo.arguments(other) else {}))
        for source, table in SOURCES.items():
            try:
                tensor_maps = table.find(model)
                known = [target.key for target in tensor_maps.values()]
                given = strip_prefix(table.prepare(other, dict(arrays)), known)
            except WeightsError:
                continue
            head = ("logits/kernel", "logits/bias")  # the number of classes may differ
            body = [target for key, target in tensor_maps.items() if key not in head]
            if all(target.key in given and given[target.key].shape == target.shape for target in body):
                return f"; they fit {other} ({source}): --model {other}"
    return ""


def convert(
    path: str | os.PathLike,
    out: str | os.PathLike,
    model: str | None = None,
    *,
    source: str | None = None,
    skip: str | Iterable[str] = (),
    input_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    arguments: Mapping[str, object] | None = None,
    compare: bool = True,
    **manifest,
) -> Report:
    """Convert a weights file to or from the library's `.npz`.

    Args:
        path: a foreign file, see `kvision.convert.formats.read`; or one of our `.npz` files, to be exported.
        out: an `.npz` for a foreign file; else a `.pth`, `.safetensors` or `.h5`.
        model: the network of the weights; one of our `.npz` files states it.
        source: naming scheme of the foreign file: "torchvision", "timm", "keras", "tf_slim", "frossard" or "kvision".
            The default is detected from the names, or on export from the suffix.
        skip: patterns of names, ours or theirs, that may be unmatched.
        input_shape, classes, arguments: of the network, if they are not the default and cannot be inferred.
        compare: compare the logits with those of the source framework's network, if it is installed.
        manifest: fields of the manifest, such as dataset and license; see `kvision.weights.save`.

    Raises:
        WeightsError: the file is damaged, or does not fit the network; nothing is written.
        ValueError: an unknown network or argument.
    """
    from kvision.layers import skip_init  # here, because it imports Keras

    suffix = os.path.splitext(os.fspath(out))[1]
    if os.path.splitext(os.fspath(path))[1] == ".npz" and suffix != ".npz":
        return _export(path, out, suffix, source, compare)
    if suffix != ".npz":
        raise weights_error(out, "convert writes .npz, or reads .npz and writes .pth, .safetensors or .h5")
    if model is None:
        raise weights_error(path, "does not state its network: name it (--model)")
    zoo.arguments(model)  # raises on an unknown name
    found = formats.read(path)
    source = _detect_source(source, found.arrays, found.format)
    table = SOURCES[source]
    try:
        network, model_kwargs = _build(
            model, found.arrays, source, input_shape, classes, dict(arguments or {}), _patterns(skip)
        )
        count, skipped, buffers = import_arrays(network, found.arrays, source, skip)
    except WeightsError as error:
        raise weights_error(path, f"{error}{_suggest_network(model, found.arrays)}") from None
    provenance = {
        "file": os.path.basename(os.fspath(path)),
        "format": found.format,
        "source": source,
        **manifest.pop("provenance", {}),
    }
    if os.path.isfile(path):
        provenance["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if counters := {key: array.tolist() for key, array in buffers.items() if array.ndim == 0 and array.item()}:
        provenance["counters"] = counters
    manifest.setdefault("preprocessing", table.preprocessing(model))
    save(network, out, arguments=model_kwargs, provenance=provenance, **manifest)
    left = found.arrays.keys() - table.prepare(model, dict(found.arrays)).keys() if source == "tf_slim" else ()
    difference = None
    if compare and not skipped:  # compare the written file, in a network built from it
        with skip_init():
            again = create_model(model, weights=out)
        arrays = strip_prefix(found.arrays, [target.key for target in table.find(again).values()])
        difference = compare_with_reference(again, source, arrays)
    ignored = [*found.ignored, *sorted(left)]
    return Report(os.fspath(path), os.fspath(out), model, source, count, skipped, ignored, difference)


def _export(path, out, suffix: str, source: str | None, compare: bool) -> Report:
    """Convert one of our files to a foreign format."""
    if suffix not in WRITERS:
        raise weights_error(out, f"weights are exported as {', '.join(WRITERS)}")
    writer, default = WRITERS[suffix]
    source = _detect_source(source or default, {}, "npz")
    with Archive(path) as archive:
        manifest = read_manifest(archive)
    name = manifest["architecture"]
    network = rebuild(path, manifest)
    load(network, path)
    stored = manifest["provenance"].get("counters", {})
    buffers = {key: np.array(value, np.int64) for key, value in stored.items()} if source == "torchvision" else {}
    try:
        arrays = export_arrays(network, source, buffers)
    except WeightsError as error:
        raise weights_error(path, str(error)) from None
    versions = {"version": torchvision.version(name)} if writer is pth.write and source == "torchvision" else {}
    writer(out, arrays, **versions)
    difference = compare_with_reference(network, source, arrays) if compare else None
    return Report(os.fspath(path), os.fspath(out), name, source, len(arrays), difference=difference)
