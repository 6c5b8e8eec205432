"""Verification of a weights file, and comparison of two files."""

import math
import os
from dataclasses import dataclass, field

import numpy as np

from kvision import zoo
from kvision.untrusted import READ_ERRORS
from kvision.weights.archive import Archive, weights_error
from kvision.weights.manifest import MANIFEST, max_parameters, read_manifest
from kvision.weights.npz import load, probe_logits


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Args:
        path: the file.
        architecture: name of the rebuilt network.
        parameters: number of values in the file.
        difference: largest difference of the logits from the manifest's, over the largest of those; None without
            probe.
        tolerance: maximum difference that counts as rounding.
    """

    path: str
    architecture: str
    parameters: int
    difference: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference is None or self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.difference is None:
            found = "no probe logits to compare"
        else:
            found = f"probe logits differ by {self.difference:.1e} of their scale (at most {self.tolerance:.0e})"
        verdict = "ok" if self.ok else "WRONG"
        return f"{self.path}: {verdict}, {self.architecture}, {self.parameters:,} parameters, {found}"


def verify(path: str | os.PathLike, tolerance: float = 1e-4) -> Verification:
    """Check every hash of a file, rebuild its network, load it strictly and compare its probe logits.

    Args:
        path: a file of `kvision.weights.save`, of a network in the zoo.
        tolerance: maximum difference of a logit, relative to the largest logit. The default is for float32; hardware
            that computes convolutions in reduced precision needs more.

    Raises:
        WeightsError: the file is damaged or its network cannot be rebuilt. Different logits do not raise: see `.ok`.
    """
    with Archive(path) as archive:
        manifest = read_manifest(archive)
        for key in archive.members:  # the zip's checksums, which other readers use
            archive.read(key)
        parameters = sum(int(np.prod(m.shape)) for key, m in archive.members.items() if key != MANIFEST)
    architecture, probe = manifest["architecture"], manifest.get("probe")
    model = rebuild(path, manifest)
    load(model, path)
    return Verification(os.fspath(path), architecture, parameters, _difference(path, model, manifest, probe), tolerance)


def rebuild(path: str | os.PathLike, manifest: dict):
    """Rebuild the network of a manifest of `path`, with zeros as kernels, to be filled by `load`.

    Raises:
        WeightsError: an unknown network or argument, or arguments that make it larger than all of the file's arrays.
    """
    from kvision.layers import skip_init  # here, because it imports Keras

    parameters = sum(math.prod(entry["shape"]) for entry in manifest["arrays"].values())
    try:
        with skip_init(max_parameters(parameters)):
            return zoo.build_model(manifest["architecture"], **manifest["arguments"])
    except READ_ERRORS as error:
        reason = str(error) or type(error).__name__
        message = f"{manifest['architecture']} cannot be rebuilt from the manifest's arguments: {reason}"
        raise weights_error(path, message) from None


def _difference(path, model, manifest: dict, probe: dict | None) -> float | None:
    if probe is None:
        return None
    try:
        expected = np.asarray(probe["logits"], np.float32)
        shape = list(probe["shape"])
        if len(shape) != 4 or any(
            expected_side not in (None, side) for expected_side, side in zip(model.input_shape, shape, strict=True)
        ):
            raise ValueError(f"images of shape {shape}, the model reads {model.input_shape}")
        logits = probe_logits(model, tuple(shape[1:]), manifest["preprocessing"])
        if expected.shape != logits.shape or not expected.size:
            raise ValueError(f"logits of shape {expected.shape}, the model gives {logits.shape}")
    except READ_ERRORS as error:
        raise weights_error(path, f"the manifest's probe cannot be repeated: {error}") from None
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(logits - expected).max()) / scale


@dataclass(frozen=True)
class Difference:
    """The differences between two weights files.

    Args:
        only_a, only_b: names of arrays in one file only.
        shapes: {name: (shape in a, shape in b)} for different shapes.
        largest: {name: largest absolute difference} of the arrays of one shape; infinite if only one is NaN.
        manifest: {field: (value in a, value in b)} for architecture, arguments, classes and preprocessing.
    """

    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, tuple] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """True if both files give the same network: same arrays, same values, same use."""
        return not (self.only_a or self.only_b or self.shapes or self.manifest or any(self.largest.values()))


def diff(path_a: str | os.PathLike, path_b: str | os.PathLike) -> Difference:
    """Compare two weights files, with or without manifests, array by array.

    Raises:
        WeightsError: one of them cannot be read; hashes and checksums are verified.
    """
    with Archive(path_a) as a, Archive(path_b) as b:
        manifest_a, manifest_b = read_manifest(a, required=False), read_manifest(b, required=False)
        keys_a, keys_b = a.members.keys() - {MANIFEST}, b.members.keys() - {MANIFEST}
        shapes, largest = {}, {}
        for key in sorted(keys_a & keys_b):
            if a.members[key].shape != b.members[key].shape:
                shapes[key] = (a.members[key].shape, b.members[key].shape)
            else:
                largest[key] = _largest(_read(a, key, manifest_a), _read(b, key, manifest_b))
    stated = {}
    if manifest_a and manifest_b:
        fields = ("architecture", "arguments", "classes", "preprocessing")
        stated = {name: (manifest_a[name], manifest_b[name]) for name in fields if manifest_a[name] != manifest_b[name]}
    return Difference(sorted(keys_a - keys_b), sorted(keys_b - keys_a), shapes, largest, stated)


def _read(archive: Archive, key: str, manifest: dict) -> np.ndarray:
    return archive.read(key, manifest["arrays"][key]["sha256"] if manifest else None)


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
