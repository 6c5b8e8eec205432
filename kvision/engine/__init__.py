"""One step of training and prediction on each backend: three floors of one house, chosen by `KERAS_BACKEND`.

Each floor has a class `Engine` with the same methods, so that nothing above knows which it stands on:

- `Engine(model, optimizer, loss)`; `optimizer` and `loss` may be None where only `predict` is wanted.
- `train_step(images, labels) -> (loss, correct)`: one step; both are scalars still on the device.
- `predict(images) -> logits`: NumPy in, NumPy out, in inference mode.
- `push()`: bring the model's and the optimizer's variables up to date. Where the floor keeps the state elsewhere
  between steps (JAX), they cannot be read until then.
"""

import importlib
import importlib.util

FLOORS = ("jax", "tensorflow", "torch")


def installed(backend: str) -> bool:
    """Whether a backend is installed; nothing is imported to find out."""
    return importlib.util.find_spec(backend) is not None


def floor():
    """The module of the active backend.

    Raises:
        RuntimeError: Keras runs on a backend that this project has no floor for.
    """
    import keras  # here, because it imports the backend

    name = keras.backend.backend()
    if name not in FLOORS:
        raise RuntimeError(
            f"kvision trains on {', '.join(FLOORS)}, and KERAS_BACKEND is {name!r}: set it to one of them"
        )
    return importlib.import_module(f"kvision.engine.{name}")


def create(model, optimizer=None, loss=None):
    """The active backend's `Engine` for this model."""
    return floor().Engine(model, optimizer, loss)
