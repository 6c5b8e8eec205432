"""One step of training and prediction on each backend: three floors of one house, chosen by `KERAS_BACKEND`.

Each floor has a class `Engine` with the same methods, so that nothing above knows which it stands on:

- `Engine(model, optimizer, loss, gradient_accumulation_steps, metrics)`; `optimizer` and `loss` may be None where only
  `predict` is called. With `gradient_accumulation_steps` a batch is cut into so many equal parts, whose mean gradient
  makes the step; batch norm sees each part. `metrics` are Keras metrics of labels and
  logits, updated by what a training step shows.
- `train_step(images, labels) -> (loss, correct)`: one step; both are scalars still on the device. Labels are integers
  (n,) or, where samples are mixed, targets (n, classes), of which `correct` counts the largest.
- `train_steps(pictures, draws) -> (losses, correct)`: one step for each of `draws`, int32 (k, 6, n), of
  `kvision.data.device.DeviceDataset`; both have k values, still on the device. On an accelerator they are one program.
- `value_and_grad(images, labels) -> (loss, gradients)`: the same without the update: the gradient of each of
  `model.trainable_variables`. Running statistics and the generators of noise move on as in a step. An optimizer that
  scales the loss scales these gradients.
- `evaluate(images, labels) -> (loss, correct)`: in inference mode, penalties included, still on the device.
- `predict(images) -> logits`: NumPy in, NumPy out, in inference mode. Of a model with a list of outputs (auxiliary
  heads) the first is predicted; the loss sees them all.
- `predict_on_device(pictures, draws) -> logits`: NumPy (k, n, classes), of pictures on the device likewise. Keras's own
  step (`kind="keras"`) has neither this nor `train_steps`.
- `layer_outputs(images, training) -> [(layer, outputs)]`: what every layer of a functional model gives, NumPy arrays in
  the order of execution.
- `sync_variables()`: bring the model's and the optimizer's variables up to date. Where the engine keeps the state
  elsewhere between steps (JAX), they cannot be read until then. What is assigned to a variable
  after it counts in the next step.

And a function `mean_over_replicas(tensor)`, the differentiable mean over the replicas that train together, for
`kvision.layers.norm.synchronise`: of the replicas of `tf.distribute`, of the processes of
`torch.distributed`; on JAX the tensor itself, because a program on a sharded batch is one program.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence

import numpy as np

BACKENDS = ("jax", "tensorflow", "torch")
ENGINES = ("native", "keras")


def installed(backend: str) -> bool:
    """Whether a backend is installed; nothing is imported to find out."""
    return importlib.util.find_spec(backend) is not None


def backend_module():
    """The module of the active backend.

    Raises:
        RuntimeError: Keras runs on a backend that this project has no floor for.
    """
    import keras  # here, because it imports the backend

    name = keras.backend.backend()
    if name not in BACKENDS:
        raise RuntimeError(
            f"kvision trains on {', '.join(BACKENDS)}, and KERAS_BACKEND is {name!r}: set it to one of them"
        )
    return importlib.import_module(f"kvision.engine.{name}")


def accelerated() -> bool:
    """Whether the active backend computes on something faster than a CPU."""
    return backend_module().accelerated()


def full_precision():
    """A context in which float32 is float32: GPUs shorten the factors of a product to 10 bits (TF32) by default."""
    return backend_module().full_precision()


def main_output(outputs):
    """The logits of a model that may have auxiliary heads: its only output, or the first of several.

    Raises:
        TypeError: the model gives something else, as a dictionary.
    """
    main = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
    if not hasattr(main, "shape"):
        raise TypeError(
            "kvision trains models that return a tensor, or a list of tensors of which the first is the logits; "
            f"this one returned a {type(outputs).__name__}. {INSTEAD}"
        )
    return main


INSTEAD = "Train it with Keras's own model.compile(...) and model.fit(...)."


def check_model(model) -> None:
    """Refuse a model that an engine cannot run.

    Raises:
        TypeError: it is no Keras model.
        ValueError: it is not built, has several inputs or nested ones, or outputs that are not a tensor or a list.
    """
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(f"expected a keras.Model, got a {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"{model.name} is not built: build it first, by model.build(input_shape) or by calling it on a batch"
        )
    for name, wanted in (("inputs", "one input tensor"), ("outputs", "a tensor, or a list of tensors, as output")):
        tensors = getattr(model, name, None)  # a subclass of keras.Model has none: its outputs are seen in the call
        structure = getattr(model, name.removesuffix("s"), None)
        if tensors and (isinstance(structure, dict) or (name == "inputs" and len(tensors) > 1)):
            what = f"a {type(structure).__name__} of {len(tensors)} {name}"
            raise ValueError(f"kvision trains models with {wanted}, and {model.name} has {what}. {INSTEAD}")


def check_targets(labels) -> None:
    """Refuse labels that are neither class numbers nor shares of classes; tensors on a device are taken as they are.

    Args:
        labels: integers (n,), or (n, height, width) for logits of each pixel; or floating targets (n, classes) that sum
            to 1 in each row.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(labels, np.ndarray):
        return
    if labels.ndim != 2 and labels.dtype.kind in "iu":  # of two axes they could be counts of classes
        return
    if labels.ndim == 2 and labels.dtype.kind == "f":
        if np.allclose(labels.sum(axis=1), 1, atol=1e-3):
            return
        raise ValueError(f"targets (n, classes) must sum to 1 in each row; these are not shares of classes. {INSTEAD}")
    raise ValueError(
        f"expected integer labels (n,) or floating targets (n, classes), got {labels.dtype} of shape {labels.shape}. "
        f"{INSTEAD}"
    )


POLICIES = {  # Keras's names of them
    "float32": "float32",
    "float64": "float64",
    "bfloat16": "mixed_bfloat16",
    "float16": "mixed_float16",
}


def configure(
    dtype: str = "float32", *, deterministic: bool = False, compile_cache: str | os.PathLike | None = None
) -> None:
    """Set up Keras and its backend for a run, before its model is built.

    Args:
        dtype: what is computed in. "float32" and "float64" are everything; in "bfloat16" and "float16" layers compute,
            while variables, logits and loss stay float32. Training in float16 wants `keras.optimizers.
            LossScaleOptimizer`.
        deterministic: whether two runs must give the same bits, at some cost of speed. On a GPU PyTorch wants the
            environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 for it, and says so.
        compile_cache: folder where compiled programs are kept for the next process. JAX alone uses it. Processes
            may share it. Where it holds more than 1 GiB, the programs unused for longest are removed. None leaves JAX's
            own setting, which is to keep none.

    Raises:
        ValueError: an unknown dtype.
    """
    import keras

    if dtype not in POLICIES:
        raise ValueError(f"dtype must be one of {', '.join(POLICIES)}, got {dtype!r}")
    keras.config.set_floatx("float64" if dtype == "float64" else "float32")
    # On JAX and PyTorch Keras 3.15 makes float32 of whatever means, variances and matrix products are of.
    double = dtype == "float64" or keras.backend.backend() == "tensorflow"
    importlib.import_module("kvision.engine.keras_internals").narrow_float64("float64" if double else "float32")
    keras.config.set_dtype_policy(POLICIES[dtype])
    backend_module().configure(dtype, deterministic, compile_cache)


class HandedToKeras(UserWarning):
    """A model is trained by Keras's own step, because it has a part of one of its own."""


def create(
    model, optimizer=None, loss=None, gradient_accumulation_steps: int = 1, kind: str = "native", metrics: Sequence = ()
):
    """The `Engine` of a model: the active backend's, or with `kind` "keras" Keras's own step.

    A model whose class has a `train_step`, `test_step`, `predict_step`, `compute_loss` or `compute_metrics` of its own
    is Keras's in any case, with a warning `HandedToKeras` that says so.

    Raises:
        ValueError: an unknown kind; a model that the engine cannot run (see `check_model`); Keras's own step of a model
            with several outputs or with `gradient_accumulation_steps`.
    """
    if kind not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {kind!r}")
    check_model(model)
    if kind == "native" and optimizer is not None:
        own = importlib.import_module("kvision.engine.keras_internals").own_step(model)
        if own:
            kind = "keras"
            warnings.warn(
                f"{model.name} is trained by Keras's own step: its class has {', '.join(own)} of its own",
                HandedToKeras,
                stacklevel=2,
            )
    module = backend_module() if kind == "native" else importlib.import_module("kvision.engine.keras")
    return module.Engine(model, optimizer, loss, gradient_accumulation_steps, metrics)
