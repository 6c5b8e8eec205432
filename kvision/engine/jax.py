"""JAX: the step is one compiled function from state to state; the state's memory is reused.

On a CPU two of XLA's gradients are slow: that of a convolution to its kernel takes 2.5 to 5 times the convolution's own
time, that of 2x2 max pooling 31 times. Cut into chunks of the batch and written as a convolution in XLA's own layout,
the first takes 1.1 to 3 times; as a maximum of slices, pooling and its gradient take 1.6 times the plain pooling. So a
functional model's graph is walked here with those two in place; other devices keep XLA's. (Least of 5 to 7 timings on
two cores of a Xeon with AVX-512, JAX 0.10.2, shapes of ResNet-20 and airbench_small at batch 128 and 240.)
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax

from kvision.engine import main_output

CHUNKS = 16  # the best of 4, 16 and 48 on most of those shapes
CHUNK = 8  # images in one at least: fewer gain nothing, and every loop costs compilation
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Engine:
    def __init__(self, model, optimizer=None, loss=None):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self._state = None
        self._step = jax.jit(self._train, donate_argnums=0)
        self._forward = jax.jit(self._infer)

    def _call(self, images, training):
        if jax.default_backend() != "cpu" or not hasattr(self.model, "_run_through_graph"):
            return self.model(images, training=training)
        return self.model._run_through_graph(images, operation_fn=lambda layer: _operation(layer, training))

    def _scope(self, trainable, fixed):
        variables = (*self.model.trainable_variables, *self.model.non_trainable_variables)
        return keras.StatelessScope(state_mapping=list(zip(variables, (*trainable, *fixed), strict=True)))

    def _objective(self, trainable, fixed, images, labels):
        with self._scope(trainable, fixed) as scope:
            outputs = self._call(images, training=True)
            loss = self.loss(labels, outputs) + sum(self.model.losses)
        fixed = [scope.get_current_value(variable) for variable in self.model.non_trainable_variables]
        return loss, (fixed, main_output(outputs))

    def _train(self, state, images, labels):
        trainable, fixed, slots = state
        gradient = jax.value_and_grad(self._objective, has_aux=True)
        (loss, (fixed, logits)), gradients = gradient(trainable, fixed, images, labels)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        classes = jnp.argmax(labels, axis=-1) if labels.ndim == 2 else labels
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == classes)
        return (trainable, fixed, slots), (loss, correct)

    def _infer(self, trainable, fixed, images):
        with self._scope(trainable, fixed):
            return main_output(self._call(images, training=False))

    def _variables(self):
        slots = self.optimizer.variables if self.optimizer else []
        return self.model.trainable_variables, self.model.non_trainable_variables, slots

    def train_step(self, images, labels):
        if self._state is None:
            # A tuple of lists, as the step returns: another structure would be compiled anew.
            self._state = tuple([variable.value for variable in group] for group in self._variables())
        self._state, result = self._step(self._state, images, labels)
        return result

    def predict(self, images):
        self.push()
        trainable, fixed, _ = ([variable.value for variable in group] for group in self._variables())
        return np.asarray(self._forward(trainable, fixed, images))

    def push(self):
        if self._state is not None:
            for group, values in zip(self._variables(), self._state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)
            self._state = None


def mean_over_replicas(x):
    return x


def _operation(layer, training):
    if type(layer) is keras.layers.Conv2D and layer.groups == 1 and layer.dilation_rate == (1, 1):
        return lambda x, mask=None: _conv(layer, x)
    if type(layer) is keras.layers.MaxPooling2D and layer.padding == "valid" and layer.data_format == "channels_last":
        return lambda x, mask=None: _max_pool(x, layer.pool_size, layer.strides)
    if getattr(layer, "_call_has_training_arg", False):
        return lambda *args, **kwargs: layer(*args, **{**kwargs, "training": training})
    return layer


def _conv(layer, x):
    """What `layer(x)` computes."""
    if (
        layer.compute_dtype != "float32"
        or layer.data_format != "channels_last"
        or layer.padding not in ("same", "valid")
    ):
        return layer(x)
    strides, window = layer.strides, layer.kernel_size
    padding = lax.padtype_to_pads(x.shape[1:3], window, strides, layer.padding.upper())
    # XLA takes 290 times as long for a window larger than the image (3x3 on the last maps of a VGG, 2x2 pixels).
    compute = _multiply_windows if min(x.shape[1:3]) < max(window) else convolve
    y = compute(x, layer.kernel.value, tuple(strides), tuple(map(tuple, padding)))
    if layer.use_bias:
        y = y + layer.bias.value
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
