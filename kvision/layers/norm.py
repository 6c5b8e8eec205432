"""Normalization: batch norm and its variants (frozen, fused into the layer before it, synchronized over replicas, with
statistics of many images), and local response normalization.

Batch norm is Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167; `batch_norm` has PyTorch's defaults: epsilon
1e-5 and momentum 0.9. Functions of a model change the layers of functional models, and of nested ones where stated.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from kvision.layers.initializers import Constant

BatchNorm = keras.layers.BatchNormalization
FUSABLE = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
)


def batch_norm(*, name: str, momentum: float = 0.9, epsilon: float = 1e-5, **options) -> keras.layers.Layer:
    """Create a batch norm over the last axis (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167)."""
    constants = {
        "gamma_initializer": Constant(1.0),
        "beta_initializer": Constant(),
        "moving_mean_initializer": Constant(),
        "moving_variance_initializer": Constant(1.0),
    }
    options = {"momentum": momentum, "epsilon": epsilon, **constants, **options}
    return keras.layers.BatchNormalization(name=name, **options)


@keras.saving.register_keras_serializable("kvision")
class LocalResponseNorm(keras.layers.Layer):
    """Divides each value by `(k + alpha * s) ** beta`, where s sums the squares of its `size` nearest channels.

    Krizhevsky, Sutskever and Hinton 2012 (see `kvision.models.alexnet`), section 3.3, with its values as defaults.
    Channels beyond the first and last count as 0. Caffe, PyTorch and cuDNN first divide their alpha by `size`: theirs
    is `size` times the one here.

    Args:
        size: number of channels in a sum, centered on the value's own; odd.

    Raises:
        ValueError: an even size.
    """

    def __init__(self, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75, **options):
        super().__init__(**options)
        if size % 2 == 0:
            raise ValueError(f"local response normalization needs an odd number of channels, got {size}")
        self.size, self.k, self.alpha, self.beta = size, k, alpha, beta

    def call(self, x):
        wide = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))  # the square of 256 overflows float16
        channels, reach = x.shape[-1], self.size // 2
        squares = ops.pad(wide * wide, ((0, 0), (0, 0), (0, 0), (reach, reach)))
        total = sum(squares[..., i : i + channels] for i in range(self.size))
        return ops.cast(wide * (self.k + self.alpha * total) ** -self.beta, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        arguments = {"size": self.size, "k": self.k, "alpha": self.alpha, "beta": self.beta}
        return {**super().get_config(), **arguments}


def batch_norms(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the batch norms of a model, including nested models, in the network's order."""
    nested = [(layer, batch_norms(layer) if hasattr(layer, "layers") else []) for layer in model.layers]
    return [norm for layer, inner in nested for norm in ([layer] if isinstance(layer, BatchNorm) else inner)]


def freeze_batch_norm(model: keras.Model) -> list[str]:
    """Freeze every batch norm: in training, too, it uses its running statistics and updates neither them nor its scale
    and offset.

    Returns:
        The names of the frozen layers.
    """
    for layer in batch_norms(model):
        layer.trainable = False
    return [layer.name for layer in batch_norms(model)]


def _find_fusable(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Return the batch norms that can be fused into the convolution or dense layer before, by that layer's name."""
    uses, calls, maker = Counter(map(id, model.outputs)), Counter(), {}
    nodes = [node for depth in model._nodes_by_depth.values() for node in depth]
    for node in nodes:
        uses.update(map(id, node.arguments.keras_tensors))
        calls[id(node.operation)] += 1
        maker |= {id(tensor): node.operation for tensor in node.outputs}
    pairs = {}
    for node in nodes:
        norm = node.operation
        if not isinstance(norm, BatchNorm) or norm.renorm or len(node.arguments.keras_tensors) != 1:
            continue
        (x,) = node.arguments.keras_tensors
        layer = maker[id(x)]
        alone = uses[id(x)] == 1 and calls[id(layer)] == calls[id(norm)] == 1
        last = norm.axis in (-1, len(x.shape) - 1) and getattr(layer, "data_format", "channels_last") == "channels_last"
        if alone and last and type(layer) in FUSABLE and layer.activation is keras.activations.linear:
            pairs[layer.name] = norm
    return pairs


def fuse_conv_bn(model: keras.Model) -> keras.Model:
    """Return the same network for inference, with each batch norm fused into the convolution or dense layer before it.

    With `scale = gamma / sqrt(variance + epsilon)` the kernel becomes `kernel * scale` and the bias
    `(bias - mean) * scale + beta`, computed in float64 (Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section
    3.2). Names stay; fused batch norms are removed.

    A batch norm stays if it does not directly follow such a layer (pre-activation, DenseNet), if that layer's output is
    used elsewhere, if the layer has an activation or is shared, and in nested models: `batch_norms(fused)` lists those.

    Raises:
        ValueError: the model is not functional, so its graph cannot be read.
    """
    if not hasattr(model, "_nodes_by_depth"):
        raise ValueError(f"fuse_conv_bn needs a functional model, and {model.name} is a {type(model).__name__}")
    pairs = _find_fusable(model)
    removed = {norm.name for norm in pairs.values()}

    def clone(layer):
        biased = {"use_bias": True} if layer.name in pairs else {}
        return type(layer).from_config(layer.get_config() | biased)

    def call(layer, *arguments, **options):
        return arguments[0] if layer.name in removed else layer(*arguments, **options)

    fused = keras.models.clone_model(model, clone_function=clone, call_function=call)
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer) or layer.name in removed:
            continue
        new, norm = fused.get_layer(layer.name), pairs.get(layer.name)
        new.trainable = layer.trainable
        new.set_weights(_fuse(layer, norm) if norm else layer.get_weights())
    return fused


def _fuse(layer, norm) -> list[np.ndarray]:
    """Return the kernel and bias of `layer` fused with `norm`, float32."""
    kernel, *bias = (weights.astype(np.float64) for weights in layer.get_weights())
    read = lambda variable: np.asarray(ops.convert_to_numpy(variable.value), np.float64)  # noqa: E731
    scale = (read(norm.gamma) if norm.scale else 1.0) / np.sqrt(read(norm.moving_variance) + norm.epsilon)
    offset = (bias[0] if bias else 0.0) - read(norm.moving_mean)
    offset = offset * scale + (read(norm.beta) if norm.center else 0.0)
    # A depthwise kernel (h, w, channels, multiplier) makes channels * multiplier outputs.
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    kernel = kernel * (scale.reshape(kernel.shape[-2:]) if depthwise else scale)
    return [kernel.astype(np.float32), offset.astype(np.float32)]


@keras.saving.register_keras_serializable("kvision")
class BatchStatistics(keras.layers.Layer):
    """Applies a batch norm in training mode and also returns the batch's mean and biased variance: three outputs."""

    def __init__(self, norm: BatchNorm, **options):
        super().__init__(**options)
        self.norm = norm

    def call(self, x):
        norm, y = self.norm, ops.cast(x, "float32")
        axes = [axis for axis in range(len(x.shape)) if axis != norm.axis % len(x.shape)]
        mean = ops.mean(y, axes, keepdims=True)
        variance = ops.mean(ops.square(y - mean), axes)  # E[x^2] - E[x]^2 is inaccurate for a large mean
        mean = ops.squeeze(mean, axes)
        gamma, beta = (norm.gamma if norm.scale else None), (norm.beta if norm.center else None)
        y = ops.batch_normalization(y, mean, variance, norm.axis, beta, gamma, norm.epsilon)
        return ops.cast(y, x.dtype), mean[None], variance[None]

    def compute_output_spec(self, x):
        statistics = [keras.KerasTensor((1, x.shape[self.norm.axis]), "float32") for _ in range(2)]
        return keras.KerasTensor(x.shape, x.dtype), *statistics


def batch_statistics_model(model: keras.Model) -> keras.Model | None:
    """Return a model from images (n, h, w, c) to the statistics of its batch norms, (1, 2 k): the mean of each of the k
    channels in the order of the layers, then the variances. Batch norms use the batch's statistics; all other layers
    work as at inference, without dropout.

    It shares the layers of `model`, which must be functional. Frozen batch norms are treated as other layers; None if
    no other batch norm exists.
    """
    found = {}

    def call(layer, *arguments, **options):
        if not isinstance(layer, BatchNorm) or not layer.trainable:
            return layer(*arguments, **options)
        y, *found[layer.name] = BatchStatistics(layer, name=f"{layer.name}_moments")(arguments[0])
        return y

    clone = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    if not found:
        return None
    # Calls follow the graph, whose order differs from that of `model.layers`.
    means, variances = zip(*(found[layer.name] for layer in model.layers if layer.name in found), strict=True)
    return keras.Model(clone.inputs, ops.concatenate([*means, *variances], axis=-1))


def update_bn(model: keras.Model, statistics: Sequence[np.ndarray]) -> None:
    """Set the running statistics to those of many images instead of the last few batches, as needed after averaging
    weights (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2).

    The batches' moments are pooled: the variance is that within the batches plus that of their means (Wu and Johnson
    2021, https://arxiv.org/abs/2105.07576).

    Args:
        statistics: the predictions of `batch_statistics_model(model)` for batches of equal size.
    """
    means, variances = np.split(np.concatenate(statistics).astype(np.float64), 2, axis=1)
    mean = means.mean(axis=0)
    variance = variances.mean(axis=0) + means.var(axis=0)
    at = 0
    for layer in model.layers:
        if isinstance(layer, BatchNorm) and layer.trainable:
            stop = at + layer.moving_mean.shape[0]
            layer.moving_mean.assign(mean[at:stop].astype(np.float32))
            layer.moving_variance.assign(variance[at:stop].astype(np.float32))
            at = stop


@keras.saving.register_keras_serializable("kvision")
class SynchronizedBatchNorm(BatchNorm):
    """Batch norm over the images of all replicas, which must have equal batch sizes.

    Args:
        average: returns the mean of a tensor over the replicas, differentiable; None uses the replica alone. Not saved.
    """

    def __init__(self, average: Callable | None = None, **options):
        super().__init__(**options)
        self.average = average or (lambda x: x)

    def _moments(self, inputs, mask):
        if mask is not None:
            raise ValueError(f"{self.name}: synchronized batch norm does not support a mask")
        # Two averages, because E[x^2] - E[x]^2 is inaccurate for a large mean.
        mean = self.average(ops.mean(inputs, self._reduction_axes))
        shape = [-1 if axis == self.axis % len(inputs.shape) else 1 for axis in range(len(inputs.shape))]
        apart = inputs - ops.reshape(mean, shape)
        return mean, self.average(ops.mean(ops.square(apart), self._reduction_axes))


def sync_batch_norm(model: keras.Model, average: Callable) -> keras.Model:
    """Return the same network, including weights, whose batch norms compute their moments over all replicas.

    Args:
        average: see `SynchronizedBatchNorm`; `kvision.engine.backend_module().mean_over_replicas` for replicas of
            PyTorch's `torch.distributed` or TensorFlow's `MirroredStrategy`. JAX does not need it: a program on a
            sharded batch computes the moments of the whole batch.
    """

    def clone(layer):
        if isinstance(layer, BatchNorm):
            return SynchronizedBatchNorm(average, **layer.get_config())
        return type(layer).from_config(layer.get_config())

    synchronized = keras.models.clone_model(model, clone_function=clone)
    synchronized.set_weights(model.get_weights())
    return synchronized
