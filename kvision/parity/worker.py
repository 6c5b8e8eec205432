"""Runs a model on one backend, layer by layer and step by step, and saves the result for the parent process.

`KERAS_BACKEND=jax python -m kvision.parity.worker FOLDER` reads the specification in a folder and writes its result
there.
"""

import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from kvision import engine
from kvision.data import DataError
from kvision.data.batches import Augmentation, Batches
from kvision.data.preprocessing import Preprocessing
from kvision.engine.fuse import is_graph
from kvision.engine.keras_internals import has_generators, nodes_of, producer_of
from kvision.flags import UsageError
from kvision.parity.loading import build, make_images, start
from kvision.parity.result import Result
from kvision.parity.spec import Spec
from kvision.parity.tensors import Tensor, keep
from kvision.tasks.classification import cross_entropy
from kvision.training import optimizers, schedules, trainer

WARMUP, MOMENTUM, WEIGHT_DECAY, SHIFT = 0.2, 0.9, 5e-4, 4  # of the steps
PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,))
# Attributes of every layer that do not affect what it computes.
COMMON = {
    *("name", "built", "autocast", "supports_jit", "supports_masking", "stateful", "rank", "seed", "inputs", "outputs"),
    *("training", "call_signature_parameters", "lora_enabled", "lora_rank", "lora_alpha"),
}


def numbered(names: Iterable[str]) -> list[str]:
    """Make names unique: the second call of a layer becomes `name (2)`."""
    unique: dict[str, None] = {}
    for name in names:
        other, times = name, 1
        while other in unique:
            times += 1
            other = f"{name} ({times})"
        unique[other] = None
    return list(unique)


def summarize(names: Iterable[str], arrays: Iterable) -> list[Tensor]:
    """Summarize arrays under unique names."""
    return [keep(name, array) for name, array in zip(numbered(names), arrays, strict=True)]


# The model


def _number_of_classes(outputs) -> int | None:
    """The number of classes if every output is (n, classes); None if the model is no classifier."""
    shapes = [tuple(output.shape) for output in keras.tree.flatten(outputs)]
    return shapes[0][1] if all(len(shape) == 2 and shape[1] for shape in shapes) else None


def _plain(value):
    """A setting as a JSON value; None for other objects."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(item, bool | int | float | str | list | tuple) for item in value
    ):
        return [_plain(item) for item in value]
    return None


def _settings(operation) -> dict[str, object]:
    # Attributes, because a custom layer may lack get_config(), which also takes seconds for a network.
    settings = {
        name: getattr(value, "__name__", None) if name == "activation" else _plain(value)
        for name, value in vars(operation).items()
        if not name.startswith("_") and name not in COMMON
    }
    return {name: value for name, value in settings.items() if value is not None}


def graph(model) -> tuple[list[dict], list[str]]:
    """The operations of a functional model in Keras's execution order, and the names of its outputs."""
    nodes = nodes_of(model)
    names = dict(zip(map(id, nodes), numbered(node.operation.name for node in nodes), strict=True))
    operations = [
        {
            "name": names[id(node)],
            "type": type(node.operation).__name__,
            "settings": _settings(node.operation),
            "inputs": [names[id(parent)] for parent in node.parent_nodes if id(parent) in names],
            "dtype": getattr(node.operation, "compute_dtype", None),
            "random": has_generators(node.operation) and type(node.operation).__module__.startswith("keras."),
        }
        for node in nodes
    ]
    return operations, [names[id(producer_of(output))] for output in model.outputs]


def _notes(model, spec: Spec, classes: int | None, operations: list[dict]) -> list[str]:
    notes = []
    if classes is None:
        notes.append("the outputs are not (n, classes): the loss is the mean of their squares")
    elif {"Softmax", "softmax"} & {operations[-1]["type"], operations[-1]["settings"].get("activation")}:
        notes.append(f"{operations[-1]['name']} is a softmax, but the loss takes its outputs as logits")
    if not is_graph(model):
        notes.append(f"{model.name} is no functional model: only its outputs are compared, not its layers")
    other = [operation["name"] for operation in operations if operation["dtype"] not in (None, spec.dtype)]
    if other:
        notes.append(f"layers that do not compute in {spec.dtype}: {', '.join(other[:5])}" + " ..." * (len(other) > 5))
    return notes


# The tasks


class ClassScores:
    """The task of a classifier: the cross-entropy of its outputs as logits, whatever they are."""

    def loss(self, models, batch):
        # The product hides a softmax from Keras, which on TensorFlow would use its inputs as the logits.
        outputs = keras.tree.map_structure(lambda output: output * 1, models(batch["image"]))
        return cross_entropy()(batch["label"], outputs), {}


class OtherOutputs:
    """The task of any other model: the mean of its squared outputs."""

    def loss(self, models, batch):
        tensors = keras.tree.flatten(models(batch["image"]))
        return sum(ops.mean(ops.square(tensor)) for tensor in tensors) / len(tensors), {}


# The run


def _layers(model, runner, batch, training: bool) -> list[Tensor]:
    """The output of every layer, several outputs as one array; for a subclassed model, its outputs."""
    if not is_graph(model):
        outputs = keras.tree.flatten(model(ops.convert_to_tensor(batch), training=training))
        return summarize(["outputs"] * len(outputs), map(ops.convert_to_numpy, outputs))
    rows = runner.layer_outputs(batch, training)
    outputs = (
        arrays[0] if len(arrays) == 1 else np.concatenate([np.ravel(array) for array in arrays]) for _, arrays in rows
    )
    return summarize((layer.name for layer, _ in rows), outputs)


def _steps(model, spec: Spec, task, images, labels) -> list[float]:
    """Train for the steps of the specification; returns their losses."""
    rates = schedules.schedule("cosine", spec.learning_rate, spec.steps, WARMUP)
    optimizer = optimizers.make_optimizer("sgd", rates, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    runner = engine.create(model, task, optimizer)
    augmentation = Augmentation(True, min(SHIFT, *(side // 4 for side in images.shape[1:3])))
    batches = Batches(images, labels, spec.batch, spec.seed, PREPROCESSING, augmentation)
    losses = []
    for step in range(spec.steps):
        epoch, position = divmod(step, batches.steps)
        if position == 0:
            iterator = batches.epoch(epoch)
        batch = next(iterator)
        total, weight = runner.train_step(batch | {"image": batch["image"].astype(spec.dtype)})["loss"]
        losses.append(float(total) / float(weight))
    runner.sync_variables()
    return losses


def run(spec: Spec) -> Result:
    """Run a specification on the active backend; sets the dtype of the process.

    Raises:
        UsageError: no such model, or an unsupported one; a one-line message.
        kvision.data.DataError: `data` cannot be read.
    """
    engine.configure(dtype=spec.dtype, deterministic=True)
    model, shape = build(spec)
    outputs = model.outputs if is_graph(model) else model(ops.zeros((1, *shape), spec.dtype))
    classes = _number_of_classes(outputs)
    images, labels = make_images(spec, shape, classes)
    batch = PREPROCESSING(images[: spec.batch]).astype(spec.dtype)
    task = ClassScores() if classes else OtherOutputs()
    start(model, spec)
    first = trainer.values(model.variables)
    weights = [variable for variable in model.weights if "float" in variable.dtype]
    paths = [variable.path for variable in weights]
    runner = engine.create(model, task)
    tensors = {
        "initial": summarize(paths, trainer.values(weights)),
        "inference": summarize(["outputs"], [runner.predict(batch)]),
    }
    for stage, in_training in (("inference_layers", False), ("training_layers", True)):
        tensors[stage] = _layers(model, runner, batch, in_training)
        trainer.assign(model.variables, first)
    value, gradients = runner.value_and_grad({"image": batch, "label": labels[: spec.batch]})
    tensors["gradients"] = summarize(
        (variable.path for variable in model.trainable_variables),
        (
            np.zeros(variable.shape) if gradient is None else ops.convert_to_numpy(gradient)
            for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
        ),
    )
    value = float(value)
    del gradients, runner
    trainer.assign(model.variables, first)
    losses = _steps(model, spec, task, images, labels) if spec.steps else []
    tensors["weights"] = summarize(paths, trainer.values(weights))
    if is_graph(model):
        operations, outputs = graph(model)
    else:
        outputs = [tensor.name for tensor in tensors["inference_layers"]]
        unknown = {"type": "", "settings": {}, "inputs": [], "dtype": None, "random": False}
        operations = [{"name": name, **unknown} for name in outputs]
    notes = _notes(model, spec, classes, operations)
    return Result(keras.backend.backend(), operations, outputs, tensors, value, losses, notes)


def main(folder: Path) -> int:
    """Run the specification in a folder and save the result there; returns the exit code.

    The message of an invalid specification is written to the file `error`.
    """
    content = json.loads((folder / "spec.json").read_text())
    if content["input_shape"] is not None:
        content["input_shape"] = tuple(content["input_shape"])
    try:
        run(Spec(**content)).save(folder)
    except (UsageError, DataError) as error:
        (folder / "error").write_text(str(error))
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
