"""PyTorch: layers of a functional model's graph in a form that PyTorch computes faster than Keras's own.

Batch norm is PyTorch's own operation (Keras composes it of a dozen operations, each a pass over the activations), a
ReLU after it works in place, and convolution and pooling get channels_last format: Keras's (n, h, w, c) viewed as
(n, c, h, w) is exactly that, but Keras copies it first. LSTM and GRU are PyTorch's own, one call for all time steps.
"""

import keras
import torch

from kvision.engine.fuse import is_channels_last

F = torch.nn.functional
EXACT = ("float32", "float64")  # of variables


RECURRENT = {keras.layers.LSTM: keras.layers.LSTMCell, keras.layers.GRU: keras.layers.GRUCell}


class BatchStatistics:
    """What the batch norms of one pass saw, kept for all layers together: one by one it would be 5 operations each."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.layers, self.means, self.deviations = [], [], []

    def add(self, layer, mean, deviation):
        """`deviation` is 1 / sqrt(variance + epsilon) of the biased variance, which is what Keras keeps."""
        if layer in self.layers:  # called twice in a pass: its statistics move twice, one after the other
            self.keep()
        self.layers.append(layer)
        self.means.append(mean)
        self.deviations.append(deviation)

    @torch.no_grad()
    def keep(self):
        """Move the running statistics toward these."""
        if not self.layers:
            return
        variances = torch._foreach_pow(self.deviations, -2)
        torch._foreach_sub_(variances, [layer.epsilon for layer in self.layers])
        for momentum in {layer.momentum for layer in self.layers}:
            running, seen = [], []
            for layer, mean, variance in zip(self.layers, self.means, variances, strict=True):
                if layer.momentum == momentum:
                    running += [layer.moving_mean.value, layer.moving_variance.value]
                    seen += [mean, variance]
            seen = [new.to(old.dtype) for old, new in zip(running, seen, strict=True)]
            torch._foreach_lerp_(running, seen, 1 - momentum)
        self.clear()


def lower(layer, pads=None, relu=False, *, training, statistics):
    kind, exact = type(layer), layer.variable_dtype in EXACT
    last = is_channels_last(layer) if hasattr(layer, "data_format") else True
    if kind in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D) and last and (pads or _is_symmetric(layer)):
        return lambda x, **_: _conv(layer, x, pads)
    if kind is keras.layers.MaxPooling2D and layer.padding == "valid" and last:
        return lambda x, **_: _max_pool(layer, x)
    if kind is keras.layers.BatchNormalization and exact and layer.axis in (-1, layer.input_spec.ndim - 1):
        return lambda x, **_: _batch_norm(layer, x, training, relu, statistics)
    if kind is keras.layers.Dense:
        return lambda x, **_: _dense(layer, x)
    if kind in RECURRENT and _is_fused(layer):
        return lambda x, **_: _recurrent(layer, x)
    if kind is keras.layers.Activation:
        return lambda x, **_: layer.activation(_cast(x, layer))
    if kind is keras.layers.Add:
        return lambda terms, **_: _add(layer, terms, relu)
    return None


def _is_symmetric(layer):
    """Whether a convolution pads both sides alike."""
    return layer.padding == "valid" or (all(size % 2 for size in layer.kernel_size) and max(layer.strides) == 1)


def _cast(x, layer):
    return x.to(getattr(torch, layer.compute_dtype))


def _conv(layer, x, pads):
    """What `layer(x)` computes, `pads` zeros around the image."""
    depthwise = type(layer) is keras.layers.DepthwiseConv2D
    x, kernel = _cast(x, layer), _cast(layer.kernel.value, layer)
    if pads and any(above != below for above, below in pads):
        x, pads = F.pad(x, (0, 0, *pads[1], *pads[0])), None
    groups = x.shape[-1] if depthwise else layer.groups
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        (kernel.permute(2, 3, 0, 1).flatten(0, 1)[:, None] if depthwise else kernel.permute(3, 2, 0, 1)),
        _cast(layer.bias.value, layer) if layer.use_bias else None,
        stride=layer.strides,
        padding=tuple(above for above, _ in pads) if pads else layer.padding,
        dilation=layer.dilation_rate,
        groups=groups,
    ).permute(0, 2, 3, 1)
    return layer.activation(y) if layer.activation is not None else y


def _dense(layer, x):
    """What `layer(x)` computes."""
    x = torch.matmul(_cast(x, layer), _cast(layer.kernel.value, layer))
    if layer.use_bias:
        x = x + _cast(layer.bias.value, layer)
    return layer.activation(x) if layer.activation is not None else x


def _add(layer, terms, relu):
    """The sum of tensors of one shape; with `relu` what is below 0 becomes 0, in the sum's memory."""
    first, second, *others = terms
    if len({term.ndim for term in terms}) > 1:
        y = layer(terms)
        return F.relu(y) if relu else y
    y = _cast(first, layer) + _cast(second, layer)
    for other in others:
        y = y + _cast(other, layer)
    return F.relu_(y) if relu else y


def _max_pool(layer, x):
    """What `layer(x)` computes."""
    pooled = F.max_pool2d(_cast(x, layer).permute(0, 3, 1, 2), layer.pool_size, layer.strides)
    return pooled.permute(0, 2, 3, 1)


def _batch_norm(layer, x, training, relu, statistics):
    """What `layer(x, training=training)` computes; what the running statistics become of is added to `statistics`.

    The sums are float32's where x is of less precision, as Keras's are.
    """
    x = _cast(x, layer)
    x = x.movedim(-1, 1) if x.ndim > 2 else x
    gamma = layer.gamma.value if layer.scale else None
    beta = layer.beta.value if layer.center else None
    running = layer.moving_mean.value, layer.moving_variance.value
    if training and layer.trainable:
        if x.is_cuda and gamma is None:  # there PyTorch's gradient wants one where there is an offset
            gamma = torch.ones_like(running[0])
        y, mean, deviation = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, layer.epsilon)
        statistics.add(layer, mean, deviation)
    else:
        y = F.batch_norm(x, *running, gamma, beta, eps=layer.epsilon)
    y = F.relu_(y) if relu else y
    return y.movedim(1, -1) if y.ndim > 2 else y


def _is_fused(layer):
    """Whether PyTorch has a recurrent layer like it. On a GPU Keras calls cuDNN itself."""
    cell = layer.cell
    return (
        type(cell) is RECURRENT[type(layer)]
        and "call" not in vars(cell)
        and layer.compute_dtype in EXACT
        and cell.compute_dtype == layer.compute_dtype
        and cell.activation is keras.activations.tanh
        and cell.recurrent_activation is keras.activations.sigmoid
        and not (cell.dropout or cell.recurrent_dropout or layer.stateful)
        and getattr(cell, "reset_after", True)
        and layer.use_cudnn == "auto"
    )


def _recurrent(layer, x):
    """What `layer(x)` computes."""
    if x.is_cuda:
        return layer(x)
    x, cell = _cast(x, layer), layer.cell
    x = x.flip(1) if layer.go_backwards else x
    weights = [cell.kernel.value, cell.recurrent_kernel.value]
    state = x.new_zeros(1, x.shape[0], layer.units)
    lstm = type(layer) is keras.layers.LSTM
    if layer.use_bias:
        bias = cell.bias.value
        weights += [bias, torch.zeros_like(bias)] if lstm else list(bias)
    weights = [_cast(weight, layer) for weight in weights]
    if lstm:
        sequence, *states = torch.lstm(
            x,
            (state, state),
            [weight.T if weight.ndim == 2 else weight for weight in weights],
            layer.use_bias,
            1,
            0.0,
            False,
            False,
            True,
        )
    else:
        weights = [_reset_first(weight).T if weight.ndim == 2 else _reset_first(weight) for weight in weights]
        sequence, *states = torch.gru(x, state, weights, layer.use_bias, 1, 0.0, False, False, True)
    states = [state[0] for state in states]
    output = sequence if layer.return_sequences else states[0]
    return (output, *states) if layer.return_state else output


def _reset_first(weight):
    """A GRU's weight, whose gates Keras keeps as (update, reset, new), as PyTorch has them: (reset, update, new)."""
    update, reset, new = weight.chunk(3, dim=-1)
    return torch.cat([reset, update, new], dim=-1)
