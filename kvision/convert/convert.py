"""Weights of other frameworks as ours, and ours as theirs: names, layouts, preprocessing. docs/convert.md.

Strict both ways: a tensor that finds no place, or a variable that gets none, is an error unless it is skipped by name.
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
from kvision.convert.reference import difference_from_peer
from kvision.convert.verify import rebuild
from kvision.weights.archive import Archive, WeightsError, shorten, weights_error
from kvision.weights.manifest import read_manifest
from kvision.weights.npz import load, named_variables, save

# Whose names a file has. Each module has `find`, `prepare`, `buffers` and `preprocessing`.
SOURCES: dict[str, ModuleType] = {
    "torchvision": torchvision,
    "timm": timm,
    "keras": keras_applications,
    "slim": slim,
    "frossard": frossard,
    "kvision": native,
}
# What a suffix stands for when ours go out: the format's writer, and the source unless another is named.
WRITERS = {
    ".pth": (pth.write, "torchvision"),
    ".pt": (pth.write, "torchvision"),
    ".safetensors": (safetensors.write, "kvision"),
    ".h5": (hdf5.write, "keras"),
}


@dataclass(frozen=True)
class Report:
    """What came of a conversion.

    Args:
        path, out: the two files' names.
        model: name of the network.
        source: whose names the foreign file has.
        converted: how many arrays found their place.
        skipped: names on either side that were left out because the caller said so.
        ignored: what the foreign file holds that is no weight: training state, counters, strings.
        difference: of the logits of made images from the source framework's, relative to the largest; None where it
            is not installed or has no such network.
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
            lines.append("  logits not compared with the source framework's: it is not installed here")
        return "\n".join(lines)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _patterns(skip: str | Iterable[str]) -> list[str]:
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"skip must hold regular expressions, {pattern!r} is none: {error}") from None
    return patterns


def _lineage(name: str | None, arrays: Mapping[str, np.ndarray], form: str) -> str:
    """Whose names these are."""
    if name is not None:
        if name not in SOURCES:
            raise WeightsError(f"unknown source {name!r}; those are {', '.join(SOURCES)}")
        return name
    if form == "tf_checkpoint":
        return "slim"
    if form == "h5":  # Keras itself wrote one of ours, or of its applications
        return "kvision" if any(re.match(r"stage\d|stem_|logits/", key) for key in arrays) else "keras"
    if any(re.fullmatch(r"(.*\.)?(blocks\.\d|pre_logits|conv_stem)\..*", key) for key in arrays):
        return "timm"
    if any(re.fullmatch(r".*\.(weight|bias)", key) for key in arrays):
        return "torchvision"
    if any(re.fullmatch(r"conv1_1_[Wb]", key) for key in arrays):
        return "frossard"
    return "kvision"


def unwrapped(arrays: Mapping[str, np.ndarray], known: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a network without the names of the modules around it when it was saved.

    `DataParallel` puts `module.` before every name, Lightning the attribute's, such as `model.`.

    Args:
        known: the names that the network has by itself. Where one of them is there, nothing is around it.
    """
    known = set(known)
    if not known.isdisjoint(arrays):
        return dict(arrays)
    around = Counter()
    for key in arrays:
        dots = (match.end() for match in re.finditer(r"\.", key))
        around.update(key[:end] for end in dots if key[end:] in known)
    if not around:
        return dict(arrays)
    prefix = around.most_common(1)[0][0]
    return {key.removeprefix(prefix): array for key, array in arrays.items()}


def import_arrays(
    model, arrays: Mapping[str, np.ndarray], source: str, skip: str | Iterable[str] = ()
) -> tuple[int, list[str], dict[str, np.ndarray]]:
    """Set a network's variables to foreign arrays, by the names and in the layouts of a source.

    Everything is checked before the first variable is set.

    Args:
        model: a network of the zoo; its name decides the table.
        source: one of `SOURCES`.
        skip: patterns of names, ours or theirs, that may be without a counterpart.

    Returns:
        (how many variables were set, the names that were skipped, the arrays that are no weights, such as counters).

    Raises:
        WeightsError: a name without counterpart on either side, another shape, or values that are not finite; all
            that is wrong is in the one message.
    """
    table, patterns = SOURCES[source], _patterns(skip)
    tensor_maps, variables = table.find(model), named_variables(model)
    known = {place.key for place in tensor_maps.values()}
    given = unwrapped(table.prepare(model.name, dict(arrays)), known)
    buffers = {key: given[key] for key in table.buffers(model.name, tensor_maps) if key in given and key not in known}
    missing = [key for key, place in tensor_maps.items() if place.key not in given]
    unexpected = [key for key in given if key not in known and key not in buffers]
    skipped = [key for key in (*missing, *unexpected) if _matches(key, patterns)]
    faults = []
    if left := [f"{key} ({tensor_maps[key].key})" for key in missing if key not in skipped]:
        faults.append(f"{len(left)} of {len(tensor_maps)} variables get no array: {shorten(left, 5)}")
    if left := [key for key in unexpected if key not in skipped]:
        faults.append(f"{len(left)} of {len(given)} arrays find no place: {shorten(left, 5)}")
    taken = {}
    for key, place in tensor_maps.items():
        if place.key not in given or _matches(key, patterns):
            continue
        array = given[place.key]
        if array.shape != place.shape:
            faults.append(f"{place.key} has shape {array.shape}, {key} expects {place.shape}")
        elif not np.isfinite(np.asarray(array, np.float64)).all():
            faults.append(f"{place.key} holds NaN or infinite values")
        else:
            taken[key] = place.import_(np.asarray(array, str(variables[key].dtype)), tuple(variables[key].shape))
    if faults:
        raise WeightsError(f"the {source} arrays do not fit {model.name}: {'; '.join(faults[:6])}")
    for key, array in taken.items():
        variables[key].assign(array)
    return len(taken), skipped, buffers


def export_arrays(model, source: str, buffers: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """A network's variables by the names and in the layouts of a source: the inverse of `import_arrays`.

    Args:
        extras: arrays that are no weights, as `import_arrays` gave them; the rest starts from the source's defaults.

    Raises:
        WeightsError: the source has no such network.
    """
    import keras

    table, variables = SOURCES[source], named_variables(model)
    tensor_maps = table.find(model)
    arrays = {
        place.key: place.export_(np.asarray(keras.ops.convert_to_numpy(variables[key].value)))
        for key, place in tensor_maps.items()
    }
    return arrays | table.buffers(model.name, tensor_maps) | dict(buffers or {})


def _build(name: str, arrays: Mapping[str, np.ndarray], source: str, input_shape, classes, arguments: dict, skip):
    """The network that arrays are of, and its arguments: its classes and auxiliary heads are read off them."""
    from kvision.layers import skip_init  # here, because it imports Keras

    table = SOURCES[source]

    def placed(*shape, **options) -> tuple[dict, dict[str, np.ndarray]]:
        """Where the variables of such a network lie, and the arrays by those names."""
        from kvision.layers import skip_init  # here, because it imports Keras

        with skip_init():
            tensor_maps = table.find(zoo.build_model(name, *shape, **options))
        return tensor_maps, unwrapped(table.prepare(name, dict(arrays)), [place.key for place in tensor_maps.values()])

    if "auxiliary" in zoo.arguments(name) and "auxiliary" not in arguments:
        try:
            tensor_maps, given = placed(**{**arguments, "auxiliary": True})
            heads = [place.key for key, place in tensor_maps.items() if key.startswith("aux")]
        except WeightsError:  # a source without these heads
            heads, given = [], {}
        arguments = {**arguments, "auxiliary": bool(heads) and any(key in given for key in heads)}
    if "maps" in zoo.arguments(name) and "maps" not in arguments and input_shape is not None:
        tensor_maps, given = placed(input_shape, classes, **arguments)
        head = tensor_maps.get("head_1_dense/kernel")
        if head and head.key in given and given[head.key].shape != head.shape:
            arguments = {**arguments, "maps": zoo.head_maps(name, zoo.default_shape(name), input_shape)}
    if classes is None:
        tensor_maps, given = placed(input_shape, **arguments)
        place = tensor_maps.get("logits/bias") or tensor_maps["logits/kernel"]
        if place.key in given and "logits/bias" in tensor_maps:
            classes = given[place.key].size
        elif not any(_matches(key, skip) for key in tensor_maps if key.startswith("logits/")):
            body = {item.key for item in placed(input_shape, 0, **arguments)[0].values()}
            head = {item.key for item in tensor_maps.values()} - body
            classes = 0 if head.isdisjoint(given) and not body.isdisjoint(given) else None
    with skip_init():
        model = zoo.build_model(name, input_shape, classes, **arguments)
    return model, arguments if classes != 0 else {**arguments, "classes": 0}


def _sister(name: str, arrays: Mapping[str, np.ndarray]) -> str:
    """A hint at the network of the same paper that arrays fit, or nothing."""
    from kvision.layers import skip_init  # here, because it imports Keras

    for other in zoo.list_models():
        if other == name or zoo.paper(other) != zoo.paper(name):
            continue
        gc.collect()  # some take half a gigabyte
        with skip_init():
            model = zoo.build_model(other, **({"auxiliary": False} if "auxiliary" in zoo.arguments(other) else {}))
        for source, table in SOURCES.items():
            try:
                tensor_maps = table.find(model)
                given = unwrapped(table.prepare(other, dict(arrays)), [place.key for place in tensor_maps.values()])
            except WeightsError:
                continue
            head = ("logits/kernel", "logits/bias")  # of however many classes
            body = [place for key, place in tensor_maps.items() if key not in head]
            if all(place.key in given and given[place.key].shape == place.shape for place in body):
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
    """Convert a weights file, into or out of the library's `.npz`.

    Args:
        path: a foreign file, see `kvision.convert.formats.read`; or an `.npz` of ours, which goes out.
        out: an `.npz` for a foreign file; else a `.pth`, `.safetensors` or `.h5`.
        model: the network that the weights are of; an `.npz` of ours says it itself.
        source: whose names the foreign file has: "torchvision", "timm", "keras", "slim", "frossard" or "kvision". The
            default is found from the names, or on the way out from the suffix.
        skip: patterns of names, ours or theirs, that may be without a counterpart.
        input_shape, classes, arguments: of the network, where they are not the default and cannot be read off the file.
        compare: run the network and the source framework's on the same images, where that is installed.
        manifest: fields of the manifest to state, such as dataset and license; see `kvision.weights.save`.

    Raises:
        WeightsError: the file is damaged, or does not fit the network; nothing is written then.
        ValueError: an unknown network or argument.
    """
    from kvision.layers import skip_init  # here, because it imports Keras

    suffix = os.path.splitext(os.fspath(out))[1]
    if os.path.splitext(os.fspath(path))[1] == ".npz" and suffix != ".npz":
        return _send(path, out, suffix, source, compare)
    if suffix != ".npz":
        raise weights_error(out, "conversion is into .npz, or from .npz into .pth, .safetensors or .h5")
    if model is None:
        raise weights_error(path, "does not say of which network it is: name it (--model)")
    zoo.arguments(model)  # an unknown name ends here
    found = formats.read(path)
    source = _lineage(source, found.arrays, found.format)
    table = SOURCES[source]
    try:
        network, own_arguments = _build(
            model, found.arrays, source, input_shape, classes, dict(arguments or {}), _patterns(skip)
        )
        count, skipped, buffers = import_arrays(network, found.arrays, source, skip)
    except WeightsError as error:
        raise weights_error(path, f"{error}{_sister(model, found.arrays)}") from None
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
    save(network, out, arguments=own_arguments, provenance=provenance, **manifest)
    left = found.arrays.keys() - table.prepare(model, dict(found.arrays)).keys() if source == "slim" else ()
    difference = None
    if compare and not skipped:  # what was written, in a network built from it
        with skip_init():
            again = create_model(model, weights=out)
        arrays = unwrapped(found.arrays, [place.key for place in table.find(again).values()])
        difference = difference_from_peer(again, source, arrays)
    ignored = [*found.ignored, *sorted(left)]
    return Report(os.fspath(path), os.fspath(out), model, source, count, skipped, ignored, difference)


def _send(path, out, suffix: str, source: str | None, compare: bool) -> Report:
    """Ours to theirs."""
    if suffix not in WRITERS:
        raise weights_error(out, f"weights go out as {', '.join(WRITERS)}")
    writer, default = WRITERS[suffix]
    source = _lineage(source or default, {}, "npz")
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
    difference = difference_from_peer(network, source, arrays) if compare else None
    return Report(os.fspath(path), os.fspath(out), name, source, len(arrays), difference=difference)
