"""TensorFlow: the step is one `tf.function`; the variables hold the state. XLA stays off: it is slower on a CPU.

In a functional model's graph batch norm is TensorFlow's fused one, both ways (Keras composes it of a dozen operations,
each a pass over the activations), and a convolution puts the zeros around its input itself.
"""

from contextlib import contextmanager
from functools import partial

import keras
import tensorflow as tf

from kvision.engine import innermost, main_output
from kvision.engine.graph import Graph, Taps, is_graph, nested, parts, replaceable

HALVES = ("float16", "bfloat16")


def configure(dtype: str, deterministic: bool, compile_cache) -> None:
    if deterministic:
        tf.config.experimental.enable_op_determinism()  # for the whole process: TensorFlow knows no way back
        tf.random.set_seed(0)  # or what draws numbers without a seed of its own would fail


def accelerated() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


@contextmanager
def full_precision():
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


class Engine:
    def __init__(self, model, optimizer=None, loss=None, accumulate=1):
        self.model, self.optimizer, self.loss, self.accumulate = model, optimizer, loss, accumulate
        function = partial(tf.function, jit_compile=False, autograph=False)
        self._step = function(self._train)
        self._shown = function(lambda pictures, tensors, draw: self._train(*pictures.show(tensors, draw)))
        self._gradients = function(lambda images, labels: self._differentiate(images, labels)[::2])
        self._forward = function(self._infer)
        self._forward_shown = function(lambda pictures, tensors, draw: self._infer(pictures.show(tensors, draw)[0]))
        self._score = function(self._judge)
        self._graphs = {}
        if optimizer is not None and not tf.distribute.has_strategy():
            _fuse(innermost(optimizer))

    def _call(self, images, training):
        if not is_graph(self.model):
            return self.model(images, training=training)
        if training not in self._graphs:
            self._graphs[training] = Graph(self.model, partial(_ready, training=training))
        return self._graphs[training](tf.cast(images, self.model.inputs[0].dtype))

    def _part(self, images, labels):
        variables = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = self._call(images, training=True)
            loss = self.loss(labels, outputs) + sum(self.model.losses)
            scaled = self.optimizer.scale_loss(loss) if self.optimizer else loss
        return loss, _count(labels, main_output(outputs)), tape.gradient(scaled, variables)

    def _differentiate(self, images, labels):
        if self.accumulate == 1:
            return self._part(images, labels)
        pieces = [tf.stack(piece) for piece in zip(*parts(self.accumulate, (images, labels)), strict=True)]

        def add(i, *sums):
            loss, correct, gradients = self._part(*(piece[i] for piece in pieces))
            return i + 1, *(total + more for total, more in zip(sums, (loss, correct, *gradients), strict=True))

        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in self.model.trainable_variables]
        start = (0, tf.zeros((), keras.config.floatx()), 0, *zeros)
        # One part at a time: side by side they would need the memory that accumulation is to save.
        _, loss, correct, *gradients = tf.while_loop(
            lambda i, *_: i < self.accumulate, add, start, parallel_iterations=1
        )
        return loss / self.accumulate, correct, [total / self.accumulate for total in gradients]

    def _train(self, images, labels):
        loss, correct, gradients = self._differentiate(images, labels)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return loss, correct

    def _infer(self, images):
        return main_output(self._call(images, training=False))

    def _judge(self, images, labels):
        outputs = self._call(images, training=False)
        return self.loss(labels, outputs), _count(labels, main_output(outputs))

    def train_step(self, images, labels):
        return self._step(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def train_steps(self, pictures, draws):
        results = [self._shown(pictures, pictures.tensors, draw) for draw in tf.unstack(draws)]
        return [tf.stack(values) for values in zip(*results, strict=True)]

    def value_and_grad(self, images, labels):
        return self._gradients(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def predict(self, images):
        return self._forward(tf.convert_to_tensor(images)).numpy()

    def predict_shown(self, pictures, draws):
        results = [self._forward_shown(pictures, pictures.tensors, draw) for draw in tf.unstack(draws)]
        return tf.stack(results).numpy()

    def evaluate(self, images, labels):
        return self._score(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def tap(self, images, training=False):
        seen = Taps()
        Graph(self.model, partial(_ready, training=training), joined=False)(tf.convert_to_tensor(images), seen)
        return seen.rows

    def push(self):
        pass


def _fuse(optimizer):
    """Let SGD with momentum update by TensorFlow's one operation for it, which computes what Keras's seven do."""
    if type(optimizer) is not keras.optimizers.SGD or not optimizer.momentum:
        return

    def update(gradient, variable, learning_rate):
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=optimizer.momentums[optimizer._get_variable_index(variable)].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
            momentum=tf.constant(optimizer.momentum, variable.dtype),
            use_nesterov=optimizer.nesterov,
        )

    optimizer.update_step = update


def mean_over_replicas(x):
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, x)


def _count(labels, logits):
    """How many of the largest logits are right."""
    classes = tf.argmax(labels, axis=-1) if labels.shape.rank == 2 else tf.cast(labels, tf.int64)
    return tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == classes, tf.int32))


def _ready(layer, pads=None, relu=False, *, training):
    kind = type(layer)
    if is_graph(layer):
        return nested(layer, partial(_ready, training=training))
    if kind is keras.layers.Conv2D and pads and layer.groups == 1:
        return lambda x, **_: _conv(layer, x, pads)
    if pads:
        return lambda x, **_: layer(tf.pad(x, ((0, 0), *pads, (0, 0))))
    if kind is keras.layers.BatchNormalization and replaceable(layer) and not layer.renorm and not layer.synchronized:
        return lambda x, mask=None, **_: _batch_norm(layer, x, mask, training, relu)
    if kind is keras.layers.Add and relu:
        return lambda x, **_: tf.nn.relu(layer(x))
    if getattr(layer, "_call_has_training_arg", False):
        return lambda *args, **kwargs: layer(*args, **{**kwargs, "training": training})
    return layer


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


def _batch_norm(layer, x, mask, training, relu):
    """What `layer(x, training=training)` computes, and the same new running statistics."""
    fused = x.dtype == tf.float32 or (x.dtype.name in HALVES and x.dtype.name == layer.compute_dtype)
    if mask is not None or x.shape.rank != 4 or not fused or layer.axis not in (-1, 3):
        y = layer(x, training=training, mask=mask)
    else:
        y = _fused_batch_norm(layer, x, training)
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
