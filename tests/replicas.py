"""A batch norm on two replicas of half a batch each: `python -m tests.replicas FOLDER` writes replicas.npz.

The child process of `tests/test_layers_norm.py`, one way for each backend: a JAX program on a batch that
two devices share, TensorFlow's MirroredStrategy on two logical CPUs, two PyTorch processes joined by gloo.
"""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

from kvision import engine
from kvision.layers.norm import SynchronizedBatchNorm
from tests.arrays import noise

X, T = noise(8, 2, 2, 3) * 2 + 5, noise(8, 2, 2, 3, seed=1)
GAMMA, BETA = np.array([1, 2, 3], np.float32), np.array([0.5, 0, -0.5], np.float32)


def build(layer):
    layer.build((None, 2, 2, 3))
    layer.gamma.assign(GAMMA)
    layer.beta.assign(BETA)
    return layer


def on_jax():
    """Plain batch norm: a program on a sharded batch is one program, whose moments are the whole batch's."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    assert len(jax.devices()) == 2
    layer = build(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5))
    halves = NamedSharding(Mesh(np.array(jax.devices()), ("replica",)), PartitionSpec("replica"))
    x, t = jax.device_put(X, halves), jax.device_put(T, halves)
    trainable, fixed = (
        [v.value for v in group] for group in (layer.trainable_variables, layer.non_trainable_variables)
    )

    @jax.jit
    def step(trainable, x, t):
        def objective(trainable, x):
            y, state = layer.stateless_call(trainable, fixed, x, training=True)
            return (t * y).sum(), (y, state)

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(trainable, x)

    ((to_gamma, to_beta), to_x), (y, (mean, variance)) = step(trainable, x, t)
    assert y.sharding.is_equivalent_to(halves, 4)
    return y, mean, variance, to_x, to_gamma, to_beta


def on_tensorflow():
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    with strategy.scope():
        layer = build(SynchronizedBatchNorm(engine.backend_module().mean_over_replicas, momentum=0.9, epsilon=1e-5))

    @tf.function
    def step(x, t):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(t * y)
        to_x, to_gamma, to_beta = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, [to_gamma, to_beta])
        return y, to_x, *total

    def half(array):
        take = lambda context: tf.constant(np.split(array, 2)[context.replica_id_in_sync_group])  # noqa: E731
        return strategy.experimental_distribute_values_from_function(take)

    y, to_x, to_gamma, to_beta = (
        strategy.experimental_local_results(r) for r in strategy.run(step, (half(X), half(T)))
    )
    together = lambda halves: np.concatenate([half.numpy() for half in halves])  # noqa: E731
    moving = (keras.ops.convert_to_numpy(v.value) for v in (layer.moving_mean, layer.moving_variance))
    return together(y), *moving, together(to_x), to_gamma[0], to_beta[0]


def on_torch(folder: Path):
    """This process starts another; both join a group over a file."""
    import torch
    import torch.distributed as group

    rank = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    other = None if rank else subprocess.Popen([sys.executable, "-m", "tests.replicas", str(folder), "1"])
    group.init_process_group("gloo", init_method=f"file://{folder.resolve()}/group", rank=rank, world_size=2)

    layer = build(SynchronizedBatchNorm(engine.backend_module().mean_over_replicas, momentum=0.9, epsilon=1e-5))
    x, t = (torch.tensor(np.split(array, 2)[rank]) for array in (X, T))
    y = layer(x.requires_grad_(), training=True)
    variables = [x, *(v.value for v in layer.trainable_variables)]
    to_x, *to_weights = torch.autograd.grad((t * y).sum(), variables)
    for gradient in to_weights:
        group.all_reduce(gradient)

    def together(half):
        halves = [torch.empty_like(half) for _ in range(2)]
        group.all_gather(halves, half.detach().contiguous())
        return torch.cat(halves)

    results = together(y), layer.moving_mean.value, layer.moving_variance.value, together(to_x), *to_weights
    group.destroy_process_group()
    if rank:
        sys.exit(0)
    assert other.wait() == 0
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": lambda: on_torch(folder)}[keras.backend.backend()]()
    names = ("output", "moving_mean", "moving_variance", "to_x", "to_gamma", "to_beta")
    arrays = {name: keras.ops.convert_to_numpy(result) for name, result in zip(names, results, strict=True)}
    np.savez(folder / "replicas.npz", **arrays)
