"""One backend: what it computes, layer by layer and step by step, kept for the parent to compare.

`KERAS_BACKEND=jax python -m kvision.parity.worker FOLDER` answers the question in a folder and leaves its result there.
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
from kvision.engine.fuse import is_graph, nodes_of
from kvision.flags import UsageError
from kvision.parity.loading import build, draw, start
from kvision.parity.result import Result
from kvision.parity.spec import Spec
from kvision.parity.tensors import Tensor, keep
from kvision.tasks.classification import cross_entropy
from kvision.training import optimizers, schedules, trainer

WARMUP, MOMENTUM, WEIGHT_DECAY, SHIFT = 0.2, 0.9, 5e-4, 4  # of the steps
PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,))
# Attributes that every layer has and that say nothing of what it computes.
COMMON = {
    *("name", "built", "autocast", "supports_jit", "supports_masking", "stateful", "rank", "seed", "inputs", "outputs"),
    *("training", "call_signature_parameters", "lora_enabled", "lora_rank", "lora_alpha"),
}


def numbered(names: Iterable[str]) -> list[str]:
    """Names of which none is twice: a layer that runs twice is also `name (2)`."""
    unique: dict[str, None] = {}
    for name in names:
        other, times = name, 1
        while other in unique:
            times += 1
            other = f"{name} ({times})"
        unique[other] = None
    return list(unique)


def kept(names: Iterable[str], arrays: Iterable) -> list[Tensor]:
    """What is kept of some arrays; the names are made unique."""
    return [keep(name, array) for name, array in zip(numbered(names), arrays, strict=True)]


# The model


def _number_of_classes(outputs) -> int | None:
    """How many classes, where every output is (n, classes); None where the model is no classifier."""
    shapes = [tuple(output.shape) for output in keras.tree.flatten(outputs)]
    return shapes[0][1] if all(len(shape) == 2 and shape[1] for shape in shapes) else None


def _plain(value):
    """A setting as JSON has it; None for what is none."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(item, bool | int | float | str | list | tuple) for item in value
    ):
        return [_plain(item) for item in value]
    return None


def _settings(operation) -> dict[str, object]:
    # Its attributes and not get_config(), which a user's layer may lack and which takes Keras seconds for a network.
    settings = {
        name: getattr(value, "__name__", None) if name == "activation" else _plain(value)
        for name, value in vars(operation).items()
        if not name.startswith("_") and name not in COMMON
    }
    return {name: value for name, value in settings.items() if value is not None}


def graph(model) -> tuple[list[dict], list[str]]:
    """The operations of a functional model in the order in which Keras runs them, and which of them are outputs."""
    nodes = nodes_of(model)
    names = dict(zip(map(id, nodes), numbered(node.operation.name for node in nodes), strict=True))
    operations = [
        {
            "name": names[id(node)],
            "type": type(node.operation).__name__,
            "settings": _settings(node.operation),
            "inputs": [names[id(parent)] for parent in node.parent_nodes if id(parent) in names],
            "dtype": getattr(node.operation, "compute_dtype", None),
            "random": bool(node.operation.__dict__.get("_seed_generators"))
            and type(node.operation).__module__.startswith("keras."),
        }
        for node in nodes
    ]
    history = [output._keras_history for output in model.outputs]
    return operations, [names[id(item.operation._inbound_nodes[item.node_index])] for item in history]


def _notes(model, spec: Spec, classes: int | None, operations: list[dict]) -> list[str]:
    notes = []
    if classes is None:
        notes.append("the outputs are not (n, classes): the loss is the mean of their squares")
    elif {"Softmax", "softmax"} & {operations[-1]["type"], operations[-1]["settings"].get("activation")}:
        notes.append(f"{operations[-1]['name']} is a softmax: the loss takes its outputs as logits all the same")
    if not is_graph(model):
        notes.append(f"{model.name} is no functional model: its layers cannot be told apart, only its outputs are seen")
    other = [operation["name"] for operation in operations if operation["dtype"] not in (None, spec.dtype)]
    if other:
        notes.append(f"layers that do not compute in {spec.dtype}: {', '.join(other[:5])}" + " ..." * (len(other) > 5))
    return notes


# The losses


def _cross_entropy(labels, outputs):
    # Of the outputs as numbers: on TensorFlow Keras sees a softmax before a cross-entropy and leaves it out.
    return cross_entropy()(labels, keras.tree.map_structure(lambda output: output * 1, outputs))


def _squares(labels, outputs):
    tensors = keras.tree.flatten(outputs)
    return sum(ops.mean(ops.square(tensor)) for tensor in tensors) / len(tensors)


# The answer


def _labels_for(loss, labels: np.ndarray) -> np.ndarray:
    """The labels; of outputs that are no classes one label, which an engine can compare with maps of any shape."""
    return labels if loss is _cross_entropy else np.zeros(1, np.int32)


def _layers(model, runner, batch, training: bool) -> list[Tensor]:
    """Every layer's output, of several all in one; of a model that is no graph, its outputs."""
    if not is_graph(model):
        outputs = keras.tree.flatten(model(ops.convert_to_tensor(batch), training=training))
        return kept(["outputs"] * len(outputs), map(ops.convert_to_numpy, outputs))
    rows = runner.layer_outputs(batch, training)
    joined = (
        arrays[0] if len(arrays) == 1 else np.concatenate([np.ravel(array) for array in arrays]) for _, arrays in rows
    )
    return kept((layer.name for layer, _ in rows), joined)


def _steps(model, spec: Spec, loss, images, labels) -> list[float]:
    """Train; the losses."""
    rates = schedules.schedule("cosine", spec.learning_rate, spec.steps, WARMUP)
    optimizer = optimizers.make_optimizer("sgd", rates, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    optimizer.build(model.trainable_variables)
    runner = engine.create(model, optimizer, loss)
    augmentation = Augmentation(True, min(SHIFT, *(side // 4 for side in images.shape[1:3])))
    batches = Batches(images, labels, spec.batch, spec.seed, PREPROCESSING, augmentation)
    losses = []
    for step in range(spec.steps):
        epoch, place = divmod(step, batches.steps)
        if place == 0:
            shown = batches.epoch(epoch)
        batch, batch_labels = next(shown)
        losses.append(float(runner.train_step(batch.astype(spec.dtype), _labels_for(loss, batch_labels))[0]))
    runner.sync_variables()
    return losses


def answer(spec: Spec) -> Result:
    """What the active backend computes; for a process of its own, whose dtype it sets.

    Raises:
        UsageError: no such model, or one that this test cannot run; one clear line.
        kvision.data.DataError: `data` cannot be read.
    """
    engine.configure(dtype=spec.dtype, deterministic=True)
    model, shape = build(spec)
    outputs = model.outputs if is_graph(model) else model(ops.zeros((1, *shape), spec.dtype))
    classes = _number_of_classes(outputs)
    images, labels = draw(spec, shape, classes)
    batch = PREPROCESSING(images[: spec.batch]).astype(spec.dtype)
    loss = _cross_entropy if classes else _squares
    start(model, spec)
    first = trainer.values(model.variables)
    weights = [variable for variable in model.weights if "float" in variable.dtype]
    paths = [variable.path for variable in weights]
    runner = engine.create(model, None, loss)
    tensors = {
        "initial": kept(paths, trainer.values(weights)),
        "inference": kept(["outputs"], [runner.predict(batch)]),
    }
    for stage, in_training in (("inference_layers", False), ("training_layers", True)):
        tensors[stage] = _layers(model, runner, batch, in_training)
        trainer.assign(model.variables, first)
    value, gradients = runner.value_and_grad(batch, _labels_for(loss, labels[: spec.batch]))
    tensors["gradients"] = kept(
        (variable.path for variable in model.trainable_variables),
        (
            np.zeros(variable.shape) if gradient is None else ops.convert_to_numpy(gradient)
            for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
        ),
    )
    value = float(value)
    del gradients, runner
    trainer.assign(model.variables, first)
    losses = _steps(model, spec, loss, images, labels) if spec.steps else []
    tensors["weights"] = kept(paths, trainer.values(weights))
    if is_graph(model):
        operations, outputs = graph(model)
    else:
        outputs = [tensor.name for tensor in tensors["inference_layers"]]
        blank = {"type": "", "settings": {}, "inputs": [], "dtype": None, "random": False}
        operations = [{"name": name, **blank} for name in outputs]
    notes = _notes(model, spec, classes, operations)
    return Result(keras.backend.backend(), operations, outputs, tensors, value, losses, notes)


def main(folder: Path) -> int:
    """Answer the question in a folder with the active backend; the exit code. A wrong question becomes a file there."""
    content = json.loads((folder / "question.json").read_text())
    if content["input_shape"] is not None:
        content["input_shape"] = tuple(content["input_shape"])
    try:
        answer(Spec(**content)).save(folder)
    except (UsageError, DataError) as error:
        (folder / "wrong").write_text(str(error))
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
