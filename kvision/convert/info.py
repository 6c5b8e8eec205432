"""Facts about each network: its paper, size, cost and pretrained weights."""

import gc
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvision.data.preprocessing import Preprocessing
from kvision.weights.npz import inspect
from kvision.zoo import arguments, build_model, default_shape, list_models, module, multiply_adds, paper


@dataclass(frozen=True)
class ModelInfo:
    """Facts about an untrained network.

    Args:
        title, authors, year, address: of the paper.
        file: of `kvision.models`.
        input_shape, classes: the defaults, used for the figures below; `classes` is None if the output is an image.
        parameters: number of trainable values.
        flops: multiply-adds of the convolutions and dense layers for one image, as He et al. 2015 count FLOPs.
        stages: the last layer of each stage and the shape (height, width, channels) of its maps.
        preprocessing: of its published or pretrained weights; None if there are none.
        arguments: model-specific arguments with their defaults.
        weights: names of the pretrained weights.
    """

    name: str
    title: str
    authors: str
    year: int
    address: str
    file: str
    input_shape: tuple[int, int, int]
    classes: int | None
    parameters: int
    flops: int
    stages: dict[str, tuple[int, ...]]
    preprocessing: Preprocessing | None
    arguments: dict[str, object]
    weights: tuple[str, ...]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        lines = {
            "paper": f"{self.authors} {self.year}, {self.title}, {self.address}",
            "file": self.file,
            "images": shape if self.classes is None else f"{shape}, {self.classes} classes",
            "parameters": f"{self.parameters:,}",
            "FLOPs": f"{self.flops:,} multiply-adds an image",
            "stages": ", ".join(f"{layer} {'x'.join(map(str, size))}" for layer, size in self.stages.items()),
            "preprocessing": json.dumps(self.preprocessing.to_json()) if self.preprocessing else "of the weights",
            "arguments": ", ".join(f"{key}={value!r}" for key, value in self.arguments.items()),
            "weights": ", ".join(self.weights),
        }
        return "\n".join([self.name, *(f"  {key:<13} {text}" for key, text in lines.items() if text)])


def model_info(name: str) -> ModelInfo:
    """Return paper, size and cost of a network, which is built without initial values.

    Raises:
        UnknownModelError: the zoo has no such network.
    """
    from kvision.convert import pretrained_weights, published_preprocessing
    from kvision.layers import skip_init  # here, because it imports Keras

    with skip_init():
        model = build_model(name)
    published = paper(name)
    files = {key: path for key, path in pretrained_weights().items() if key.partition(".")[0] == name}
    preprocessing = published_preprocessing(name)
    if files and preprocessing is None:
        preprocessing = Preprocessing.from_json(inspect(next(iter(files.values())))["manifest"]["preprocessing"] or {})
    stages = [layer for layer in model.layers if re.fullmatch(r"stage\d+", layer.name)]
    return ModelInfo(
        name=name,
        title=published.title,
        authors=published.authors,
        year=published.year,
        address=published.address,
        file=f"kvision/models/{module(name).__name__.rpartition('.')[2]}.py",
        input_shape=default_shape(name),
        classes=published.classes,
        parameters=sum(math.prod(variable.shape) for variable in model.trainable_variables),
        flops=multiply_adds(model),
        stages={layer.name: tuple(layer.output.shape[1:]) for layer in stages},
        preprocessing=preprocessing,
        arguments=arguments(name),
        weights=tuple(files),
    )


def markdown_table(folder: str | os.PathLike = "weights") -> str:
    """Return the zoo as a Markdown table: each network at its default size, with scores of the pretrained weights.

    Args:
        folder: of weights files, whose manifests state network and accuracy.
    """
    scores: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob("*.npz")):
        manifest = inspect(path)["manifest"] or {}
        accuracy = ", ".join(f"{value:.2%} ({backend})" for backend, value in sorted(manifest["accuracy"].items()))
        scores.setdefault(manifest["architecture"], []).append(f"`{path.stem}`: {accuracy}")
    rows = [
        "| model | paper's file | images | trainable parameters | multiply-adds | pretrained weights |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for name in list_models():
        info = model_info(name)
        gc.collect()  # models contain reference cycles, and some take half a gigabyte
        shape = "x".join(map(str, info.input_shape))
        rows.append(
            f"| `{name}` | `{info.file.removeprefix('kvision/')}` | {shape} | {info.parameters:,} | "
            f"{info.flops / 1e6:,.0f} M | {'; '.join(scores.get(name, []))} |"
        )
    return "\n".join(rows)
