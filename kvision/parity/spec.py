"""The specification of a comparison, and its checks that need no backend."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvision.flags import UsageError
from kvision.parity.compare import LIMITS


@dataclass(frozen=True)
class Spec:
    """The specification of a comparison.

    Args:
        model: a network of the zoo, a `.keras` file, or `module:function` whose function returns a `keras.Model`.
        dtype: "float64" or "float32".
        input_shape: (height, width, channels); None takes the model's.
        classes: number of classes, for a network of the zoo or a function that takes `classes`; None takes the default.
        model_kwargs: model-specific arguments of the network or the function.
        batch: images a step.
        steps: training steps; 0 takes none.
        seed: seed of the initial weights, images and order.
        learning_rate: the maximum learning rate of the schedule.
        data: folder or file of a data set, as `kvision.data.load` reads it; None makes synthetic images.
    """

    model: str
    dtype: str = "float64"
    input_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    batch: int = 8
    steps: int = 5
    seed: int = 0
    learning_rate: float = 0.01
    data: str | None = None


def check(spec: Spec) -> None:
    """Check a specification before a backend is started.

    Raises:
        UsageError: an invalid value; a one-line message.
    """
    if spec.dtype not in LIMITS:
        raise UsageError(f"--dtype must be one of {', '.join(LIMITS)}, got {spec.dtype!r}")
    for name, least in (("batch", 1), ("steps", 0), ("seed", 0)):
        if getattr(spec, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(spec, name)}")
    if not (spec.learning_rate > 0 and math.isfinite(spec.learning_rate)):
        raise UsageError(f"--learning-rate must be a positive number, got {spec.learning_rate}")
    if spec.classes is not None and spec.classes < 1:
        raise UsageError(f"--classes must be at least 1, got {spec.classes}")
    shape = spec.input_shape
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise UsageError(
            f"--input-shape must be height x width x channels as in 32x32x3, got {'x'.join(map(str, shape))}"
        )
    path = Path(spec.model)
    if path.suffix == ".keras":
        if not path.is_file():
            raise UsageError(f"{path}: no such file; expected a model that Keras saved")
    elif path.suffix in (".h5", ".npz", ".pth", ".pt", ".onnx", ".safetensors", ".json"):
        raise UsageError(f"{path}: expected a network of the zoo, a .keras file or module:function")
