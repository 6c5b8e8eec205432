"""Memory estimates before a run starts: the activations of a batch, the kernels of a network."""

import math

import keras

# For images of up to this many pixels a recipe's batch size is kept; for larger ones it may not fit.
SMALL_IMAGE = 64 * 64
# Bytes of layer outputs for the batch of a step. A training step of ResNet-50 at 224 x 224 with 4 images, 600
# MiB, peaks at 1.2 GB on PyTorch, 1.4 GB on TensorFlow and 1.5 GB on JAX, all of the process (two cores, float32).
ACTIVATIONS = 768 << 20
# Numbers in one kernel, for images larger than the network was published for. With gradient and momentum such a kernel
# takes 0.8 GB.
LARGEST_KERNEL = 1 << 26


def activation_bytes(model: keras.Model) -> int:
    """Return the float32 bytes of all layer outputs for one image: at most what a step keeps for its gradient."""
    outputs = [tensor for layer in model.layers for tensor in _flat(layer.output)]
    return 4 * sum(math.prod(tensor.shape[1:]) for tensor in outputs)


def batch_within(model: keras.Model, batch_size: int, budget: int = ACTIVATIONS) -> int:
    """Return `batch_size`, or the largest power of two, at least 1, whose activations fit into `budget` bytes."""
    each = activation_bytes(model)
    if math.prod(model.input_shape[1:3]) <= SMALL_IMAGE or each * batch_size <= budget:
        return batch_size
    return 1 << max(0, (budget // each).bit_length() - 1)


def largest_kernel(shape: tuple[int, int, int], published: tuple[int, int, int]) -> int | None:
    """Return the maximum number of values in a kernel for images of `shape`; None if they are no larger than those that
    the network was published for."""
    return LARGEST_KERNEL if math.prod(shape[:2]) > math.prod(published[:2]) else None


def _flat(outputs) -> list:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
