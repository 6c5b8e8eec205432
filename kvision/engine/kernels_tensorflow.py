"""TensorFlow: layers of a functional model's graph in a form that TensorFlow computes faster than Keras's own.

Batch norm is TensorFlow's fused operation in both directions (Keras composes it of a dozen operations, each a pass over
the activations), and a convolution pads its input itself.
"""

import keras
import tensorflow as tf

HALVES = ("float16", "bfloat16")


def lower(layer, pads=None, relu=False, *, training):
    kind = type(layer)
    if kind is keras.layers.Conv2D and pads and layer.groups == 1:
        return lambda x, **_: _conv(layer, x, pads)
    if pads:
        return lambda x, **_: layer(tf.pad(x, ((0, 0), *pads, (0, 0))))
    if kind is keras.layers.BatchNormalization and layer.variable_dtype == "float32" and _is_fused(layer):
        return lambda x, **_: _batch_norm(layer, x, training, relu)
    return None


def _conv(layer, x, pads):
    """What `layer(x)` computes, `pads` zeros around the image."""
    dtype = layer.compute_dtype
    y = tf.nn.conv2d(
        tf.cast(x, dtype),
        tf.cast(layer.kernel.value, dtype),
        layer.strides,
        [[0, 0], *map(list, pads), [0, 0]],
        dilations=layer.dilation_rate,
    )
    if layer.use_bias:
        y = tf.nn.bias_add(y, tf.cast(layer.bias.value, dtype))
    return layer.activation(y) if layer.activation is not None else y


def _is_fused(layer):
    """Whether TensorFlow has a batch norm like it: of images (n, h, w, c), in float32 or less."""
    return layer.input_spec.ndim == 4 and layer.axis in (-1, 3) and layer.compute_dtype in ("float32", *HALVES)


def _batch_norm(layer, x, training, relu):
    """What `layer(x, training=training)` computes, and the same new running statistics."""
    y = _fused_batch_norm(layer, tf.cast(x, layer.compute_dtype), training)
    return tf.nn.relu(y) if relu else y


def _fused_batch_norm(layer, x, training):
    training = training and layer.trainable
    mean, variance = layer.moving_mean, layer.moving_variance
    y, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=layer.gamma.value if layer.scale else tf.ones_like(mean.value),
        offset=layer.beta.value if layer.center else tf.zeros_like(mean.value),
        mean=[] if training else mean.value,
        variance=[] if training else variance.value,
        epsilon=layer.epsilon,
        is_training=training,
    )
    if training:
        # The operation gives the unbiased variance; Keras keeps the biased one.
        count = tf.cast(tf.size(x) // tf.shape(x)[-1], tf.float32)
        for running, batch in ((mean, batch_mean), (variance, batch_variance * ((count - 1) / count))):
            running.assign(running.value * layer.momentum + batch * (1 - layer.momentum))
    return y
