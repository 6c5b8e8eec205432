"""Logits of reference networks with random weights: what networks built from the same weights must give.

`golden.json` holds them, so that a backend can be tested where the reference's framework is not installed. Made by
`KERAS_BACKEND=torch python -m tests.golden`; in PyTorch's environment a test makes them anew and compares.
"""

import importlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvision.random import rng

FILE = Path(__file__).parent / "golden.json"


@dataclass(frozen=True)
class Case:
    """One network of a reference: `reference` is a module of `tests.references`."""

    name: str
    reference: str
    input_shape: tuple[int, int, int] = (32, 32, 3)
    classes: int = 10
    model_kwargs: dict = field(default_factory=dict)


# Sizes are the smallest that take every branch of the network.
CASES = [
    Case("resnet20", "cifar_resnet"),
    # Maps of 8x1 pixels, averaged and repeated to 6x6.
    Case("alexnet", "alexnet", (300, 70, 3), model_kwargs={"filters": (6, 8, 10, 9, 7), "hidden": 8}),
    Case("googlenet", "googlenet", (66, 79, 3), model_kwargs={"width": 0.25, "auxiliary": True}),
    Case("inception_v3", "inception_v3", (299, 305, 3), model_kwargs={"width": 0.1, "auxiliary": True}),
    # Maps of 7x8 and 10x7 pixels, which are averaged to 7x7.
    Case("vgg11", "vgg", (224, 256, 3), model_kwargs={"hidden": 8, "width": 4}),
    Case("vgg11_bn", "vgg", (320, 224, 3), model_kwargs={"hidden": 8, "width": 4}),
    Case("resnet18", "resnet", (33, 40, 3), model_kwargs={"width": 8}),
    Case("resnet50", "resnet", (40, 33, 3), model_kwargs={"width": 8, "blocks": (2, 2, 1, 1)}),
    Case("squeezenet1_0", "squeezenet", (44, 60, 3)),
    Case("squeezenet1_1", "squeezenet", (44, 60, 3)),
    Case("densenet121", "densenet", (64, 77, 3), model_kwargs={"layers": (1, 2, 1, 2), "growth": 8}),
    Case("mobilenet_v2", "mobilenet_v2", (33, 40, 3), model_kwargs={"width": 0.5}),
    Case("mnasnet0_5", "mnasnet", (40, 33, 3)),
]


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values for a tensor of a PyTorch network, by its name: batch norm's statistics are random too."""
    generator = rng(0, "golden", key)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.array(0, np.int64)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf == "weight":  # the deviation keeps the scale of what passes
        return generator.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[1:])))
    return generator.standard_normal(shape, np.float32) * np.float32(0.1)


def images(shape: tuple[int, int, int]) -> np.ndarray:
    """Two images of noise, float32 (2, height, width, channels)."""
    return rng(0, "golden", "images").standard_normal((2, *shape), np.float32)


def reference(case: Case):
    """The PyTorch network of a case with its random weights, in inference mode."""
    import torch

    module = importlib.import_module(f"tests.references.{case.reference}").build(
        case.name, case.classes, **case.model_kwargs
    )
    state = {key: torch.from_numpy(draw(key, tuple(value.shape))) for key, value in module.state_dict().items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def logits(module, shape: tuple[int, int, int]) -> np.ndarray:
    """What a PyTorch network gives for `images(shape)`; of a network with several outputs the first."""
    import torch

    with torch.inference_mode():
        outputs = module(torch.from_numpy(images(shape)).permute(0, 3, 1, 2).contiguous())
    return (outputs[0] if isinstance(outputs, tuple | list) else outputs).numpy()


def main() -> None:
    made = {case.name: logits(reference(case), case.input_shape).tolist() for case in CASES}
    rows = (f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in made.items())
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
