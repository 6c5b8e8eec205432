"""The manifest of a weights file, a description of its network, checked when it is written and read.

docs/npz.md describes it.
"""

import json
import math
import re
from types import NoneType

import numpy as np

from kvision.data.preprocessing import Preprocessing
from kvision.untrusted import READ_ERRORS, Budget, name_fault, unique
from kvision.weights.archive import Archive, WeightsError, shorten, weights_error

FORMAT = "kvision-npz"
FORMAT_VERSION = 1
MANIFEST = "__manifest__"
MAX_MANIFEST = 64 << 20  # bytes
MAX_IMAGE = 1 << 24  # values: 2,364 pixels square in three channels
FLOAT32_MAX = 3.4028234663852886e38

# Fields that the caller states, with their types. The others are computed.
STATED = {
    "architecture": (str,),
    "arguments": (dict,),
    "classes": (list, NoneType),
    "input_size": (list, NoneType),
    "preprocessing": (dict, NoneType),
    "dataset": (str, NoneType),
    "accuracy": (dict,),
    "license": (str, NoneType),
    "provenance": (dict,),
}


def to_json(value, place: str):
    """Return `value` as JSON types, with lists for tuples; ValueError, with `place`, if JSON does not support it."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_json(item, f"{place}.{key}" if place else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{place}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{place} in the manifest is {str(value)[:40]} ({type(value).__name__}); JSON supports strings, finite "
        "numbers, true, false, null, lists, and dictionaries with strings for keys"
    )


def check_fields(manifest: dict) -> None:
    """Raise ValueError if a stated field is missing or does not match docs/npz.md."""
    for field, types in STATED.items():
        if not isinstance(manifest.get(field, 0), types):
            names = " or ".join(
                {dict: "an object", list: "a list", str: "a string", NoneType: "null"}[t] for t in types
            )
            got = f"is {str(manifest[field])[:40]!r}" if field in manifest else "is missing"
            raise ValueError(f"{field} in the manifest {got}; it must be {names}")
    classes, size, accuracy = manifest["classes"], manifest["input_size"], manifest["accuracy"]
    if classes is not None:
        expected = manifest["arguments"].get("classes", len(classes))
        if len(classes) != expected or not all(isinstance(name, str) for name in classes):
            raise ValueError(
                f"classes in the manifest must be {expected} strings, one per logit, got {len(classes)} entries"
            )
    if size is not None and not (len(size) == 2 and all(type(length) is int and length > 0 for length in size)):
        raise ValueError(f"input_size in the manifest must be [height, width] in pixels, got {str(size)[:40]}")
    for backend, value in accuracy.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"accuracy.{backend} in the manifest must be a number from 0 to 1, got {str(value)[:40]}")
    for field in ("architecture", "dataset", "license"):
        if fault := name_fault(manifest[field] or ""):
            raise ValueError(f"{field} in the manifest {fault}")
    for name in classes or ():
        if fault := name_fault(name):
            raise ValueError(f"a name in classes in the manifest {fault}")
    _check_image("input_size", [*(size or ()), 1])
    _check_image("arguments.input_shape", manifest["arguments"].get("input_shape") or ())
    if manifest["preprocessing"] is not None:
        try:
            Preprocessing.from_json(manifest["preprocessing"])
        except TypeError as error:
            raise ValueError(f"malformed preprocessing in the manifest: {error}") from None


def _check_image(field: str, shape: object) -> None:
    """Raise ValueError if an image of a shape is impossible or too large: it would be made and fed to a network."""
    lengths = [1 if length is None else length for length in shape] if isinstance(shape, list | tuple) else [None]
    if not all(type(length) is int and length > 0 for length in lengths) or math.prod(lengths) > MAX_IMAGE:
        raise ValueError(
            f"{field} in the manifest must be positive integers, with at most {MAX_IMAGE:,} values per image; got "
            f"{str(shape)[:40]}"
        )


def _check_probe(probe: object) -> None:
    """Raise ValueError if the probe is not the logits of four images."""
    if probe is None:
        return
    shape, logits = (probe.get("shape"), probe.get("logits")) if isinstance(probe, dict) else (None, None)
    if not isinstance(shape, list) or len(shape) != 4 or shape[0] != 4:
        raise ValueError(f"probe.shape in the manifest must be [4, height, width, channels], got {str(shape)[:40]}")
    _check_image("probe.shape", shape[1:])
    rows = logits if isinstance(logits, list) and len(logits) == 4 else [None]
    if not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows) or not all(
        type(value) in (int, float) and abs(value) <= FLOAT32_MAX for row in rows for value in row
    ):
        raise ValueError("probe.logits in the manifest must be 4 rows of float32 numbers")


def max_parameters(parameters: int) -> int:
    """Return the maximum number of values in the kernels of a network whose file has `parameters` values.

    Twice as many plus a million: a network may be requested with another head or other channels than its file's.
    """
    return 2 * parameters + (1 << 20)


def _parse_int(text: str) -> int:
    if len(text) > 20:  # more than 64 bits, which NumPy and Keras do not support
        raise ValueError(f"{text[:40]}... is beyond 64 bits")
    return int(text)


def _parse_float(text: str) -> float:
    if not math.isfinite(value := float(text)):  # 1e999 reads as infinity
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def read_manifest(archive: Archive, required: bool = True) -> dict:
    """Read the manifest of an open file, checked against the headers of its arrays; {} if there is none.

    Raises:
        WeightsError: it is missing although `required`, malformed, of a newer format, or does not list exactly the
            file's arrays.
    """
    path = archive.path
    if MANIFEST not in archive.members:
        if required:
            raise weights_error(
                path,
                "has no manifest, so its contents and integrity are unknown; load(..., manifest_required=False) "
                "accepts it",
            )
        return {}
    member = archive.members[MANIFEST]
    if member.dtype != np.uint8 or len(member.shape) != 1 or member.size > MAX_MANIFEST:
        raise weights_error(path, f"the manifest must be at most {MAX_MANIFEST:,} bytes in one row, got {member.shape}")
    try:
        # JSON as Python's objects takes up to thirty times its bytes.
        Budget(archive.bytes).take(30 * member.size, "its manifest")
        manifest = json.loads(
            archive.read(MANIFEST).tobytes().decode("utf-8"),
            parse_float=_parse_float,
            parse_int=_parse_int,
            parse_constant=_parse_float,
            object_pairs_hook=unique,
        )
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        json.dumps(manifest, ensure_ascii=False).encode("utf-8")  # raises on lone surrogates
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        raise weights_error(path, f"the manifest is not JSON as in docs/npz.md ({error})") from None
    if manifest.get("format") != FORMAT:
        raise weights_error(
            path, f"the manifest is of format {str(manifest.get('format'))[:40]!r}, expected {FORMAT!r}"
        )
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise weights_error(path, f"format_version in the manifest is {str(version)[:40]!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise weights_error(
            path, f"has format version {version}, this kvision reads up to {FORMAT_VERSION}: upgrade kvision"
        )
    try:
        check_fields(manifest)
        _check_probe(manifest.get("probe"))
    except READ_ERRORS as error:
        raise weights_error(path, str(error)) from None
    _check_arrays(archive, manifest)
    return manifest


def _check_arrays(archive: Archive, manifest: dict) -> None:
    entries, members = manifest.get("arrays"), archive.members
    if not isinstance(entries, dict):
        raise weights_error(archive.path, "the manifest lists no arrays")
    if missing := entries.keys() - members.keys():
        raise weights_error(archive.path, f"lacks arrays that its manifest lists: {shorten(sorted(missing))}")
    if extra := members.keys() - entries.keys() - {MANIFEST}:
        raise weights_error(archive.path, f"contains arrays that its manifest does not list: {shorten(sorted(extra))}")
    for key, entry in entries.items():
        member = members[key]
        stated = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else None
        found = (list(member.shape), member.dtype.name)
        if stated != found and (stated, member.dtype) != ((found[0], "bfloat16"), np.uint16):
            raise weights_error(archive.path, f"{key} is {found}, its manifest states {str(stated)[:80]}")
        if not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
            raise weights_error(archive.path, f"the manifest states no sha256 of {key}")
