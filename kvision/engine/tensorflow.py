"""TensorFlow: the step is one `tf.function`; the variables hold the state. XLA stays off: it is slower on a CPU.

A functional model's graph is walked here instead of calling the model. So batch norm can be TensorFlow's fused one,
both ways; Keras composes it of a dozen operations, each a pass over the activations.
"""

import keras
import tensorflow as tf

from kvision.engine import main_output


class Engine:
    def __init__(self, model, optimizer=None, loss=None):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self._step = tf.function(self._train, jit_compile=False, autograph=False)
        self._forward = tf.function(self._infer, jit_compile=False, autograph=False)

    def _call(self, images, training):
        if not hasattr(self.model, "_run_through_graph"):
            return self.model(images, training=training)
        return self.model._run_through_graph(images, operation_fn=lambda layer: _operation(layer, training))

    def _train(self, images, labels):
        with tf.GradientTape() as tape:
            outputs = self._call(images, training=True)
            loss = self.loss(labels, outputs) + sum(self.model.losses)
        variables = self.model.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        self.optimizer.apply(gradients, variables)
        classes = tf.argmax(labels, axis=-1) if labels.shape.rank == 2 else tf.cast(labels, tf.int64)
        correct = tf.reduce_sum(tf.cast(tf.argmax(main_output(outputs), axis=-1) == classes, tf.int32))
        return loss, correct

    def _infer(self, images):
        return main_output(self._call(images, training=False))

    def train_step(self, images, labels):
        return self._step(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def predict(self, images):
        return self._forward(tf.convert_to_tensor(images)).numpy()

    def push(self):
        pass


def mean_over_replicas(x):
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, x)


def _operation(layer, training):
    if type(layer) is keras.layers.BatchNormalization and not layer.renorm and not layer.synchronized:
        return lambda x, mask=None: _batch_norm(layer, x, mask, training)
    if getattr(layer, "_call_has_training_arg", False):
        return lambda *args, **kwargs: layer(*args, **{**kwargs, "training": training})
    return layer


def _batch_norm(layer, x, mask, training):
    """What `layer(x, training=training)` computes, and the same new running statistics."""
    if mask is not None or x.shape.rank != 4 or x.dtype != tf.float32 or layer.axis not in (-1, 3):
        return layer(x, training=training, mask=mask)
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
        count = tf.cast(tf.size(x) // tf.shape(x)[-1], x.dtype)
        for running, batch in ((mean, batch_mean), (variance, batch_variance * ((count - 1) / count))):
            running.assign(running.value * layer.momentum + batch * (1 - layer.momentum))
    return y
