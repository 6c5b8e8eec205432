"""JAX: layers of a functional model's graph in a form that XLA computes faster than Keras's own.

On a CPU two of XLA's gradients are slow: a convolution's gradient with respect to its kernel takes 2.5 to 5 times as
long as the convolution, that of 2x2 max pooling 31 times as long as the pooling. Computed in chunks of the batch, as a
convolution in XLA's own layout, the first takes 1.1 to 3 times as long; max pooling as a maximum of slices takes, with
its gradient, 1.6 times as long as the plain pooling. Other devices keep XLA's gradient of a convolution. (Minimum of 5
to 7 timings on two cores of a Xeon with AVX-512, JAX 0.10.2, shapes of ResNet-20 and airbench_small at batch sizes 128
and 240.)
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import keras
from jax import lax

from kvision.engine.fuse import is_channels_last

CHUNKS = 16  # the best of 4, 16 and 48 on most of those shapes
CHUNK = 8  # images in a chunk at least: fewer gain nothing, and every loop costs compilation
LAYOUT = ("NHWC", "HWIO", "NHWC")
WIDE = ("float32", "float64")  # sums of lower precisions are left to XLA


def lower(layer, pads=None, relu=False):
    kind = type(layer)
    if relu:  # XLA joins it to what is before
        return None
    if kind is keras.layers.Conv2D and is_channels_last(layer) and layer.padding in ("same", "valid"):
        return lambda x, **_: _conv(layer, x, pads)
    if kind is keras.layers.DepthwiseConv2D and pads:
        return lambda x, **_: layer(jnp.pad(x, ((0, 0), *pads, (0, 0))))
    if kind is keras.layers.MaxPooling2D and layer.padding == "valid" and is_channels_last(layer):
        return lambda x, **_: _max_pool(x.astype(layer.compute_dtype), layer.pool_size, layer.strides)
    return None


def _conv(layer, x, pads):
    """What `layer(x)` computes, `pads` zeros around the image."""
    dtype, strides, window = layer.compute_dtype, layer.strides, layer.kernel_size
    if pads is None:
        reach = [(size - 1) * rate + 1 for size, rate in zip(window, layer.dilation_rate, strict=True)]
        pads = lax.padtype_to_pads(x.shape[1:3], reach, strides, layer.padding.upper())
    pads, strides = tuple(map(tuple, pads)), tuple(strides)
    x, kernel = x.astype(dtype), layer.kernel.value.astype(dtype)
    plain = layer.groups == 1 and tuple(layer.dilation_rate) == (1, 1) and dtype in WIDE
    if not plain or jax.default_backend() != "cpu":
        y = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            pads,
            rhs_dilation=layer.dilation_rate,
            dimension_numbers=LAYOUT,
            feature_group_count=layer.groups,
        )
    # XLA takes 290 times as long for a window larger than the image (3x3 on the last maps of a VGG, 2x2 pixels).
    elif min(x.shape[1:3]) < max(window):
        y = _multiply_windows(x, kernel, strides, pads)
    else:
        y = convolve(x, kernel, strides, pads)
    if layer.use_bias:
        y = y + layer.bias.value.astype(dtype)
    return layer.activation(y) if layer.activation is not None else y


def _multiply_windows(x, kernel, strides, padding):
    """The same convolution as one matrix product of all windows, for maps so small that they cost no memory."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    windows = jnp.concatenate(list(_slices(x, kernel.shape[:2], strides)), axis=-1)
    return windows @ kernel.reshape(-1, kernel.shape[-1])


def _slices(x, window, strides):
    """For each place in the window, the pixels that it meets: (n, rows, columns, c), row by row."""
    rows, columns = ((size - side) // step + 1 for size, side, step in zip(x.shape[1:3], window, strides, strict=True))
    for i in range(window[0]):
        for j in range(window[1]):
            stop = i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1
            yield x[:, i : stop[0] : strides[0], j : stop[1] : strides[1]]


def _max_pool(x, window, strides):
    """The maximum of each window; on a tie the gradient goes to the first, as XLA's and PyTorch's do."""
    return reduce(
        lambda best, values: jnp.where((best >= values) | jnp.isnan(best), best, values), _slices(x, window, strides)
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x, kernel, strides, padding):
    """A convolution of (n, h, w, i) by (kh, kw, i, o) whose gradient to the kernel is quick on a CPU."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def _forward(x, kernel, strides, padding):
    return convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, gradient):
    x, kernel = saved
    plain = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=LAYOUT)
    (to_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(gradient)
    return to_x, _kernel_gradient(x, gradient, kernel.shape, strides, padding)


def _kernel_gradient(x, gradient, shape, strides, padding):
    # The kernel's gradient is a convolution of the images by the output's gradient, batch and channels changing places.
    n = len(x)
    chunks = next(count for count in range(max(1, min(CHUNKS, n // CHUNK)), 0, -1) if n % count == 0)

    def add(total, chunk):
        images, gradients = chunk
        part = lax.conv_general_dilated(
            images.transpose(3, 1, 2, 0),
            gradients.transpose(1, 2, 0, 3),
            (1, 1),
            padding,
            rhs_dilation=strides,
            dimension_numbers=LAYOUT,
        )
        return total + part[:, : shape[0], : shape[1]], None

    if chunks == 1:
        return add(0, (x, gradient))[0].transpose(1, 2, 0, 3)
    start = jnp.zeros((shape[2], shape[0], shape[1], shape[3]), x.dtype)
    pieces = (array.reshape(chunks, n // chunks, *array.shape[1:]) for array in (x, gradient))
    total, _ = lax.scan(add, start, tuple(pieces))
    return total.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
