"""What a run takes in memory before it takes it: the activations of a batch, the kernels of a network."""

import math

import keras

# In images of up to this many pixels a recipe's batch is what its author chose. Larger ones came with no such thought.
SMALL_IMAGE = 64 * 64
# Bytes of layer outputs that the batch of a step may have. A training step of ResNet-50 at 224 x 224 with 4 images, 600
# MiB, peaks at 1.2 GB on PyTorch, 1.4 GB on TensorFlow and 1.5 GB on JAX, all of the process (two cores, float32).
ACTIVATIONS = 768 << 20
# Numbers in one kernel, of images larger than the network was published for. With its gradient and its momentum such a
# one takes 0.8 GB.
LARGEST_KERNEL = 1 << 26


def activation_bytes(model: keras.Model) -> int:
    """Bytes in float32 of what all layers give for one image: what a step keeps for its gradient, at most."""
    outputs = [tensor for layer in model.layers for tensor in _flat(layer.output)]
    return 4 * sum(math.prod(tensor.shape[1:]) for tensor in outputs)


def batch_within(model: keras.Model, batch_size: int, budget: int = ACTIVATIONS) -> int:
    """`batch_size`, or the largest power of two whose activations keep to `budget` bytes, at least 1."""
    each = activation_bytes(model)
    if math.prod(model.input_shape[1:3]) <= SMALL_IMAGE or each * batch_size <= budget:
        return batch_size
    return 1 << max(0, (budget // each).bit_length() - 1)


def largest_kernel(shape: tuple[int, int, int], published: tuple[int, int, int]) -> int | None:
    """How many numbers a kernel may have for images of `shape`, where the network was published for another one; None
    where those are no larger."""
    return LARGEST_KERNEL if math.prod(shape[:2]) > math.prod(published[:2]) else None


def _flat(outputs) -> list:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
