"""Loads the model of a comparison, sets its initial weights, and makes its images."""

import importlib
import inspect
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np

from kvision import zoo
from kvision.data import load
from kvision.engine.fuse import is_graph
from kvision.flags import UsageError
from kvision.layers import VarianceScaling, skip_init
from kvision.parity.spec import Spec
from kvision.random import rng
from kvision.weights.initialization import initialize


def with_dtype(path: Path, dtype: str, folder: Path) -> Path:
    """Copy a `.keras` file to `folder` with `dtype` in place of float32 in the config of each layer."""

    def convert(value, key=None):
        if isinstance(value, dict):
            if key == "dtype" and value.get("class_name") == "DTypePolicy" and value["config"]["name"] == "float32":
                return {**value, "config": {**value["config"], "name": dtype}}
            return {name: convert(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [convert(item) for item in value]
        return dtype if key == "dtype" and value == "float32" else value

    copy = folder / path.name
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == "config.json":
                content = json.dumps(convert(json.loads(content))).encode()
            target.writestr(entry, content)
    return copy


def _load_file(spec: Spec) -> keras.Model:
    zoo.list_models()  # imports and registers the custom layers of all networks
    if spec.model_kwargs or spec.classes is not None:
        raise UsageError(f"--set and --classes do not apply to a .keras file: {spec.model}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(spec.model)
        try:
            if spec.dtype != "float32":
                path = with_dtype(path, spec.dtype, Path(folder))
            return keras.saving.load_model(path, compile=False, safe_mode=True)
        except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"{spec.model} cannot be loaded: {reason} (give a model with custom code as module:function)"
            ) from None


def _call_function(spec: Spec) -> keras.Model:
    module, _, name = spec.model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UsageError(f"{spec.model}: cannot import {module}: {error}") from None
    except AttributeError:
        raise UsageError(f"{spec.model}: {module} has no {name}") from None
    arguments = dict(spec.model_kwargs)
    if spec.input_shape is not None:
        arguments["input_shape"] = spec.input_shape
    if spec.classes is not None:
        arguments["classes"] = spec.classes
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UsageError(f"{spec.model} cannot be called with {arguments or 'no arguments'}: {error}") from None
    model = function(**arguments)
    if not isinstance(model, keras.Model):
        raise UsageError(f"{spec.model} returned a {type(model).__name__}; expected a keras.Model")
    return model


def build(spec: Spec) -> tuple[keras.Model, tuple[int, int, int]]:
    """Load the model; returns it and the (height, width, channels) of its images.

    Raises:
        UsageError: no such model, or an unsupported one; a one-line message.
    """
    if spec.model.endswith(".keras"):
        model = _load_file(spec)
    elif ":" in spec.model:
        model = _call_function(spec)
    else:
        try:
            with skip_init():
                model = zoo.build_model(spec.model, spec.input_shape, spec.classes, **spec.model_kwargs)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if isinstance(model, keras.Sequential):
        if not model.built and spec.input_shape is not None:
            model.build((None, *spec.input_shape))
        if model.built:
            model = keras.Model(model.inputs, model.outputs, name=model.name)  # the same layers as a functional model
    shape = model.input_shape if is_graph(model) else (None, *(spec.input_shape or ()))
    return model, check_shape(spec, shape, is_graph(model))


def check_shape(spec: Spec, shape, graph: bool) -> tuple[int, int, int]:
    """The (height, width, channels) of the images for a model with inputs of `shape`; raises UsageError."""
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise UsageError(
            f"{spec.model} reads inputs of shape {shape}; expected one input of images (n, height, width, channels)"
            + ("" if graph else ": the model does not define its shape, give --input-shape")
        )
    image_shape = spec.input_shape or shape[1:]
    if any(side is None for side in image_shape):
        raise UsageError(f"{spec.model} reads images of any size {shape[1:]}: give --input-shape, as in 32x32x3")
    if any(side not in (None, given) for side, given in zip(shape[1:], image_shape, strict=True)):
        raise UsageError(f"{spec.model} reads images of {shape[1:]}, not of --input-shape {image_shape}")
    return tuple(image_shape)


def start(model, spec: Spec) -> None:
    """Set the initial weights and the random generators; a `.keras` file keeps its weights."""
    weights = [(variable, np.array(variable.numpy())) for variable in model.weights]
    try:
        initialize(model, spec.seed)
    except ValueError:  # a custom initializer without a NumPy equivalent
        for variable, value in weights:
            if value.size and (value != value.flat[0]).any():
                generator = rng(spec.seed, "initial", variable.path)
                variable.assign(VarianceScaling(1.0, "in").sample(value.shape, generator))
        for i, variable in enumerate(v for v in model.variables if v.dtype in ("uint32", "int32", "int64")):
            if tuple(variable.shape) == (2,):
                variable.assign(np.array([rng(spec.seed, "generator", i).integers(2**31), 0], np.uint32))
    if spec.model.endswith(".keras"):
        for variable, value in weights:
            variable.assign(value)


def make_images(spec: Spec, shape: tuple[int, int, int], classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Load or generate uint8 images and their labels, at most four batches."""
    count = 4 * spec.batch
    if spec.data is not None:
        dataset = load("cifar10", spec.data, size=shape[:2], log=lambda line: None)
        images, labels = dataset.x_train[:count], dataset.y_train[:count]
        if images.shape[1:] != shape:
            raise UsageError(f"--data has images of {images.shape[1:]}, and {spec.model} reads {shape}")
        return images, labels % (classes or 1)
    # Patches of color with noise: they have edges, and pooling windows rarely have equal maxima.
    generator = rng(spec.seed, "images")
    height, width, channels = shape
    patches = generator.integers(0, 192, (count, -(-height // 8), -(-width // 8), channels))
    images = patches.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    images = (images + generator.integers(0, 64, images.shape)).astype(np.uint8)
    return images, generator.integers(0, classes or 1, count).astype(np.int32)
