"""PyTorch: the step runs eagerly; the variables hold the state.

A functional model's graph is walked here instead of calling the model. So batch norm can be PyTorch's own: Keras
composes it of a dozen operations, each a pass over the activations. And convolution and pooling see channels_last
format: Keras's (n, h, w, c), looked at as (n, c, h, w), is just that, but Keras copies it first.
"""

import keras
import torch
from keras import ops

from kvision.engine import main_output


class Engine:
    def __init__(self, model, optimizer=None, loss=None):
        self.model, self.optimizer, self.loss = model, optimizer, loss

    def _call(self, images, training):
        images = ops.convert_to_tensor(images)
        if not hasattr(self.model, "_run_through_graph"):
            return self.model(images, training=training)
        return self.model._run_through_graph(images, operation_fn=lambda layer: _operation(layer, training))

    def train_step(self, images, labels):
        outputs, labels = self._call(images, training=True), ops.convert_to_tensor(labels)
        loss = self.loss(labels, outputs) + sum(self.model.losses)
        variables = self.model.trainable_variables
        gradients = torch.autograd.grad(loss, [variable.value for variable in variables])
        with torch.no_grad():
            self.optimizer.apply(gradients, variables)
            classes = labels.argmax(dim=-1) if labels.ndim == 2 else labels
            correct = (main_output(outputs).argmax(dim=-1) == classes).sum()
        return loss.detach(), correct

    def predict(self, images):
        with torch.inference_mode():
            return ops.convert_to_numpy(main_output(self._call(images, training=False)))

    def push(self):
        pass


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x / torch.distributed.get_world_size()

    @staticmethod
    def backward(context, gradient):
        return _Mean.apply(gradient)


def mean_over_replicas(x):
    return _Mean.apply(x) if torch.distributed.is_initialized() else x


def _operation(layer, training):
    if type(layer) is keras.layers.Conv2D and layer.data_format == "channels_last":
        return lambda x, mask=None: _conv(layer, x)
    if type(layer) is keras.layers.MaxPooling2D and layer.padding == "valid" and layer.data_format == "channels_last":
        return lambda x, mask=None: _max_pool(layer, x)
    if type(layer) is keras.layers.BatchNormalization and not layer.renorm and not layer.synchronized:
        return lambda x, mask=None: _batch_norm(layer, x, mask, training)
    if getattr(layer, "_call_has_training_arg", False):
        return lambda *args, **kwargs: layer(*args, **{**kwargs, "training": training})
    return layer


def _conv(layer, x):
    """What `layer(x)` computes."""
    even = any(size % 2 == 0 for size in layer.kernel_size)
    if layer.compute_dtype != "float32" or (layer.padding != "valid" and (even or max(layer.strides) > 1)):
        return layer(x)  # other precisions, and "same" where it pads one side more than the other
    y = torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2),
        layer.kernel.value.permute(3, 2, 0, 1),
        layer.bias.value if layer.use_bias else None,
        stride=layer.strides,
        padding=layer.padding,
        dilation=layer.dilation_rate,
        groups=layer.groups,
    ).permute(0, 2, 3, 1)
    return layer.activation(y) if layer.activation is not None else y


def _max_pool(layer, x):
    """What `layer(x)` computes."""
    pooled = torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2), layer.pool_size, layer.strides)
    return pooled.permute(0, 2, 3, 1)


def _batch_norm(layer, x, mask, training):
    """What `layer(x, training=training)` computes, and the same new running statistics."""
    if mask is not None or x.ndim != 4 or x.dtype != torch.float32 or layer.axis not in (-1, 3):
        return layer(x, training=training, mask=mask)
    x = x.permute(0, 3, 1, 2)
    gamma = layer.gamma.value if layer.scale else None
    beta = layer.beta.value if layer.center else None
    running = layer.moving_mean.value, layer.moving_variance.value
    if not (training and layer.trainable):
        y = torch.nn.functional.batch_norm(x, *running, gamma, beta, eps=layer.epsilon)
        return y.permute(0, 2, 3, 1)
    y, mean, deviation = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, layer.epsilon)
    with torch.no_grad():
        # `deviation` is 1 / sqrt(variance + epsilon) of the biased variance, which is what Keras keeps.
        for old, new in zip(running, (mean, deviation**-2 - layer.epsilon), strict=True):
            old.lerp_(new, 1 - layer.momentum)
    return y.permute(0, 2, 3, 1)
