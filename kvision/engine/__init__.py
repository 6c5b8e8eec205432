"""One step of training and prediction on each backend: three floors of one house, chosen by `KERAS_BACKEND`.

Each floor has a class `Engine` with the same methods, so that nothing above knows which it stands on:

- `Engine(model, optimizer, loss)`; `optimizer` and `loss` may be None where only `predict` is wanted.
- `train_step(images, labels) -> (loss, correct)`: one step; both are scalars still on the device. Labels are integers
  (n,) or, where samples are mixed, targets (n, classes), of which `correct` counts the largest.
- `predict(images) -> logits`: NumPy in, NumPy out, in inference mode. Of a model with a list of outputs (auxiliary
  heads) the first is predicted; the loss sees them all.
- `push()`: bring the model's and the optimizer's variables up to date. Where the floor keeps the state elsewhere
  between steps (JAX), they cannot be read until then.

And a function `mean_over_replicas(tensor)`, the differentiable mean over the replicas that train together, for
`kvision.regularizers.batch_norm.synchronise`: of the replicas of `tf.distribute`, of the processes of
`torch.distributed`; on JAX the tensor itself, because a program on a sharded batch is one program.
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


def main_output(outputs):
    """The logits of a model that may have auxiliary heads: its only output, or the first of several."""
    return outputs[0] if isinstance(outputs, list | tuple) else outputs


def create(model, optimizer=None, loss=None):
    """The active backend's `Engine` for this model."""
    return floor().Engine(model, optimizer, loss)
