"""Logits and variables of TF-Slim's networks with random weights: `golden_slim.json`.

TF-Slim needs a TensorFlow from before Keras 3, so this is run in an environment, with tensorflow-cpu 2.15
and tf-slim 1.1: `python -m tests.golden_slim`. The tests compare with the file on every backend.
"""

import json
import math
from pathlib import Path

import numpy as np

from kvision.random import rng

FILE = Path(__file__).parent / "golden_slim.json"
# By our names: the module and function there, and images of the least size that it takes.
NETWORKS = {
    "resnet50_tf_slim": ("resnet_v1", "resnet_v1_50", (33, 40, 3)),
    "inception_v1_tf_slim": ("inception_v1", "inception_v1", (224, 224, 3)),
    "inception_v3_keras": ("inception_v3", "inception_v3", (139, 150, 3)),
}
CLASSES = 10


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values for a variable of TF-Slim's, by its name."""
    generator, leaf = rng(0, "slim", key), key.rsplit("/", 1)[-1]
    if leaf in ("gamma", "moving_variance"):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    values = generator.standard_normal(shape, np.float32)
    return values * np.float32(math.sqrt(2 / math.prod(shape[:-1])) if leaf == "weights" else 0.1)


def images(shape: tuple[int, int, int]) -> np.ndarray:
    """Two images of noise, float32."""
    return rng(0, "slim", "images").standard_normal((2, *shape), np.float32)


def main() -> None:
    import importlib
    import sys

    import tensorflow.compat.v1 as tf

    for name in ("", ".base", ".convolutional", ".core", ".normalization", ".pooling"):  # where Keras 2.15 has them
        module = importlib.import_module(f"keras.src.legacy_tf_layers{name}")
        sys.modules[f"tf_keras.legacy_tf_layers{name}"] = module
    sys.modules["tf_keras"] = importlib.import_module("keras")
    import tf_slim

    made = {}
    for ours, (module, function, shape) in NETWORKS.items():
        nets = importlib.import_module(f"tf_slim.nets.{module}")
        with tf.Graph().as_default(), tf.Session() as session:
            scope = getattr(nets, f"{module.replace('_v1', '') if 'resnet' in module else module}_arg_scope")()
            with tf_slim.arg_scope(scope):
                logits, _ = getattr(nets, function)(tf.constant(images(shape)), num_classes=CLASSES, is_training=False)
            variables = [v for v in tf.global_variables() if not v.op.name.endswith("global_step")]
            for variable in variables:
                variable.load(draw(variable.op.name, tuple(variable.shape.as_list())), session)
            made[ours] = {
                "logits": session.run(logits).reshape(2, CLASSES).tolist(),
                "variables": {v.op.name: v.shape.as_list() for v in variables},
            }
    FILE.write_text(json.dumps(made, indent=0) + "\n")


if __name__ == "__main__":
    main()
