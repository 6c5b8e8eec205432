"""Native training and inference steps for JAX, TensorFlow and PyTorch, chosen by `KERAS_BACKEND`.

Each backend's module has a class `Engine` with the same methods; `create` makes one. A batch is a mapping of arrays
with one leading axis, such as {"image", "label"}; an optional "weight" (n,) weighs examples, and 0 marks padding. A
result is `Means`, {name: (sum, weight)}, which adds up over examples, steps and parts; its tensors stay on the device.

- `Engine(models, task, optimizers, gradient_accumulation_steps)`: `models` is a built `keras.Model` or a mapping of
  several by name, `task` an object as `kvision.tasks` describes, `optimizers` one, or a mapping by phase. `task` and
  `optimizers` may be None where only `predict` is called. With `gradient_accumulation_steps` a batch is divided into so
  many equal parts whose mean gradient makes the step; batch norm sees each part.
- `train_step(batch) -> Means`: one step of each phase. "loss" is the task's loss with the models' penalties
  (`model.losses`), weighted by the number of examples or the sum of "weight"; of several phases `<phase>_loss`.
- `train_steps(dataset, params) -> Means`: a step for each of `params`, int32 (k, 6, n), of a
  `kvision.data.device.DeviceDataset`; sums and weights have a leading axis of k. On an accelerator it is one program.
- `value_and_grad(batch, phase=None) -> (loss, gradients)`: the same without the update: the gradient of each trainable
  variable of the models that the phase trains. Running statistics and generators advance as in a step. An optimizer
  that scales the loss scales these gradients.
- `evaluate(batch) -> Means`: the task's metrics in inference mode, still on the device; "loss" is with penalties.
  `evaluate_on_device(dataset, param)` is the same of one step's params, int32 (6 or 7, n).
- `predict(batch)`: what the task predicts, NumPy in, NumPy out; of an array instead of a mapping the output of a single
  model, the first of several outputs. `predict_on_device(dataset, params)` stacks the predictions of each of `params`.
- `layer_outputs(inputs, training) -> [(layer, outputs)]`: what every layer of a functional model gives, NumPy arrays in
  the order of execution.
- `sync_variables()`: write the state back to the variables of models, optimizers and task. Where the engine keeps the
  state elsewhere between steps (JAX), they cannot be read before. What is assigned to a variable afterwards counts in
  the next step.
- `keras_steps() -> (train_step, test_step)`: the steps of a `kvision.tasks.compiled.Compiled`, as the methods of these
  names that Keras's own `fit` calls on the backend; the state is Keras's to keep.

A phase changes only the models that it trains: running statistics and generators of the others are as before after it.
Keras's own step (`engine="keras"`) has `train_step`, `evaluate`, `predict` and `sync_variables` alone.

Each backend's module also has:

- `why_keras(model)`: why Keras's own `fit` must train a compiled model, or None.
- `generator_states()` and `set_generator_states(states)`: the backend's global random generators as arrays, where it
  has such.
- `mean_over_replicas(tensor)`: the differentiable mean over the replicas that train together, for
  `kvision.layers.norm.sync_batch_norm`: of the replicas of `tf.distribute`, of the processes of `torch.distributed`; on
  JAX the tensor itself, because a program on a sharded batch is one program.
"""

import importlib
import os
import warnings
from collections.abc import Mapping

from kvision.keras_import import BACKENDS
from kvision.keras_import import installed as installed  # whether a backend is installed

ENGINES = ("native", "keras")


def backend_module():
    """The module of the active backend.

    Raises:
        RuntimeError: Keras runs on a backend that this project has no engine for.
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
    """The first output of a model: its only one, or the first of a list, as the logits before auxiliary heads.

    Raises:
        TypeError: the model gives something else, as a dictionary.
    """
    main = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
    if not hasattr(main, "shape"):
        raise TypeError(
            "expected a model that returns a tensor, or a list of tensors of which the first is the main one; this one "
            f"returned a {type(outputs).__name__}"
        )
    return main


def check_model(model) -> None:
    """Refuse a model that an engine cannot run.

    Raises:
        TypeError: it is no Keras model.
        ValueError: it is not built.
    """
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(f"expected a keras.Model, got a {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"{model.name} is not built: build it first, by model.build(input_shape) or by calling it on a batch"
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
    """A model is trained by Keras's own step, because its class overrides a part of that step."""


def create(models, task=None, optimizers=None, gradient_accumulation_steps: int = 1, engine: str = "native"):
    """The `Engine` of models and a task: the active backend's, or with `engine` "keras" Keras's own step.

    A single model whose class overrides `train_step`, `test_step`, `predict_step`, `compute_loss` or `compute_metrics`
    is trained by Keras's own step in any case, with a warning `HandedToKeras`.

    Raises:
        TypeError: a model that is no `keras.Model`; a task that Keras's own step cannot take.
        ValueError: an unknown engine; a model that is not built; phases and optimizers of other names; Keras's own step
            of several models, of several outputs or with `gradient_accumulation_steps`.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "native" and optimizers is not None and not isinstance(models, Mapping):
        check_model(models)
        own = importlib.import_module("kvision.engine.keras_internals").own_step(models)
        if own:
            engine = "keras"
            warnings.warn(
                f"{models.name} is trained by Keras's own step: its class overrides {', '.join(own)}",
                HandedToKeras,
                stacklevel=2,
            )
    module = backend_module() if engine == "native" else importlib.import_module("kvision.engine.keras")
    return module.Engine(models, task, optimizers, gradient_accumulation_steps)
