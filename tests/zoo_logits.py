"""Logits of every network of the zoo in a small form, with weights drawn by name: the same on every backend.

`zoo_logits.json` holds them, made by `KERAS_BACKEND=torch python -m tests.zoo_logits`. They keep the backends equal
where each is tested alone, and a network as it was; whether it is the paper's, other tests tell.
"""

import json
import math
import re
from pathlib import Path

import numpy as np

from kvision.random import rng

FILE = Path(__file__).parent / "zoo_logits.json"


def cifar_densenet_width(compressed: bool, layers: int, growth: int = 4) -> int:
    width = 2 * growth if compressed else 16
    for block in range(3):
        width += layers * growth
        if compressed and block < 2:
            width //= 2
    return width


def densenet_width(*layers: int, growth: int = 4) -> int:
    width = 2 * growth
    for i, count in enumerate(layers):
        width = width + count * growth if i == 0 else width // 2 + count * growth
    return width


# By patterns of names: image shape, arguments that make it narrow, width of the features, stages. Full depth. The last
# maps have three pixels a side where that costs little: JAX computes convolutions on smaller ones in another way, which
# takes longer to compile.
SMALL = {
    "softmax": ((4, 4, 2), {}, 32, 0),
    "mlp": ((4, 4, 2), {"hidden": (9, 7)}, 7, 2),
    "mnist_cnn": ((8, 9, 1), {"hidden": 7}, 7, 1),
    "cifar_cnn": ((10, 12, 3), {"hidden": 7}, 7, 2),
    r"airbench\w+": ((10, 9, 3), {"widths": (6, 8, 10)}, 10, 3),
    r"resnet(20|32|44|56|110)": ((12, 13, 3), {}, 64, 3),
    r"wide_resnet\w*": ((12, 13, 3), {"width": 2}, 128, 3),
    "densenet_40_12": ((12, 13, 3), {"growth": 4}, cifar_densenet_width(False, 12), 3),
    "densenet_bc_100_12": ((12, 13, 3), {"growth": 4}, cifar_densenet_width(True, 16), 3),
    "densenet_bc_250_24": ((12, 13, 3), {"growth": 4}, cifar_densenet_width(True, 41), 3),
    "densenet_bc_190_40": ((12, 13, 3), {"growth": 4}, cifar_densenet_width(True, 31), 3),
    "alexnet": ((63, 67, 3), {"filters": (4, 8, 6, 6, 8), "hidden": 32}, 8, 3),
    "alexnet_2012": ((67, 70, 3), {"filters": (4, 8, 6, 6, 8), "hidden": 32}, 8, 3),
    "googlenet": ((33, 35, 3), {"width": 0.1}, 100, 5),
    "inception_v1": ((31, 33, 3), {"width": 0.1}, 100, 5),
    "inception_v1_tf_slim": ((33, 35, 3), {"width": 0.1}, 100, 5),
    r"inception_v2(_tf_slim)?": ((33, 35, 3), {"width": 0.1}, 101, 5),
    r"inception_v3(_keras)?": ((75, 77, 3), {"width": 0.1}, 203, 5),
    r"vgg\d+(_bn)?": ((96, 97, 3), {"hidden": 7, "width": 4}, 32, 5),
    "resnet(18|34)": ((33, 40, 3), {"width": 4}, 32, 4),
    r"resnet(50|101|152)(_keras|_tf_slim)?": ((33, 40, 3), {"width": 4}, 128, 4),
    r"squeezenet\w+": ((44, 60, 3), {}, 512, 3),
    "densenet121(_keras)?": ((40, 33, 3), {"growth": 4}, densenet_width(6, 12, 24, 16), 4),
    "densenet169(_keras)?": ((40, 33, 3), {"growth": 4}, densenet_width(6, 12, 32, 32), 4),
    "densenet201(_keras)?": ((40, 33, 3), {"growth": 4}, densenet_width(6, 12, 48, 32), 4),
    r"mobilenet_v2(_keras)?": ((33, 40, 3), {"width": 0.25}, 1280, 5),
    r"stn_\w+": ((28, 29, 1), {"filters": (4, 6)}, 24, 2),
    r"mnasnet\w+": ((40, 33, 3), {"width": 0.25}, 1280, 5),
    "autoencoder": ((4, 6, 2), {"code": 5}, 5, 0),
    "deep_autoencoder": ((4, 6, 2), {"hidden": (9, 8, 7)}, 2, 3),
    "conv_autoencoder": ((12, 8, 1), {"widths": (4, 6), "code": 5}, 5, 2),
    "unet_denoiser": ((12, 8, 1), {"widths": (4, 6)}, 6, 1),
}


def small_form(name: str) -> tuple:
    """The row of `SMALL` that a network's name matches; every network needs one."""
    rows = [row for pattern, row in SMALL.items() if re.fullmatch(pattern, name)]
    if len(rows) != 1:
        raise LookupError(f"{len(rows)} rows of SMALL match {name}: expected one")
    return rows[0]


def classes_of(name: str) -> int | None:
    """10, or None of a network that gives an image."""
    from kvision import zoo

    return None if zoo.paper(name).classes is None else 10


def fill(model) -> None:
    """Set every variable to random values drawn by its name, the statistics of batch norm too."""
    for variable in model.weights:
        generator, shape = rng(0, "zoo", variable.path), tuple(variable.shape)
        values = generator.standard_normal(shape, np.float32)
        if variable.name == "kernel":  # the deviation keeps the scale of what passes
            values *= math.sqrt(2 / math.prod(shape[:2] if shape[-1] == 1 else shape[:-1]))
        elif variable.name in ("gamma", "moving_variance"):
            values = generator.uniform(0.5, 1.5, shape)
        else:
            values /= 10
        variable.assign(values.astype(np.float32))


def images(model) -> np.ndarray:
    """Two images of noise for a network, float32."""
    return rng(0, "zoo", "images").standard_normal((2, *model.input_shape[1:]), np.float32)


def main() -> None:
    from kvision import engine, zoo

    made = {}
    for name in zoo.list_models():
        shape, model_kwargs, *_ = small_form(name)
        model = zoo.build_model(name, shape, classes_of(name), **model_kwargs)
        fill(model)
        made[name] = engine.create(model).predict(images(model)).tolist()
    rows = (f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in made.items())
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
