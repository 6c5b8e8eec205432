"""What is to be compared, and what can be seen of it without a backend."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvision.flags import UsageError
from kvision.parity.compare import LIMITS


@dataclass(frozen=True)
class Spec:
    """What is to be compared.

    Args:
        model: a network of the zoo, a `.keras` file, or `module:function` whose function returns a `keras.Model`.
        dtype: "float64" or "float32".
        input_shape: (height, width, channels); None takes the model's own.
        classes: how many, of a network of the zoo or a function that takes `classes`; None takes the model's own.
        own: arguments of the network's or the function's own.
        batch: images a step.
        steps: training steps; 0 takes none.
        learning_rate: the largest of the schedule.
        data: folder or file of a data set, as `kvision.data.load` reads it; None draws the images.
    """

    model: str
    dtype: str = "float64"
    input_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    own: Mapping[str, object] = field(default_factory=dict)
    batch: int = 8
    steps: int = 5
    seed: int = 0
    learning_rate: float = 0.01
    data: str | None = None


def check(spec: Spec) -> None:
    """See what can be seen of a question before a backend is started.

    Raises:
        UsageError: one clear line.
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
            "--input-shape must be an image's, height x width x channels as in 32x32x3, "
            f"got {'x'.join(map(str, shape))}"
        )
    path = Path(spec.model)
    if path.suffix == ".keras":
        if not path.is_file():
            raise UsageError(f"{path}: no such file; expected a model that Keras saved")
    elif path.suffix in (".h5", ".npz", ".pth", ".pt", ".onnx", ".safetensors", ".json"):
        raise UsageError(f"{path}: parity reads networks of the zoo, .keras files and module:function")
