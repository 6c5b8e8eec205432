"""TensorFlow: the step is one `tf.function`; the variables hold the state. XLA stays off: it is slower on a CPU."""

import tensorflow as tf


class Engine:
    def __init__(self, model, optimizer=None, loss=None):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self._step = tf.function(self._train, jit_compile=False, autograph=False)
        self._forward = tf.function(self._infer, jit_compile=False, autograph=False)

    def _train(self, images, labels):
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            loss = self.loss(labels, logits) + sum(self.model.losses)
        variables = self.model.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        self.optimizer.apply(gradients, variables)
        correct = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1, output_type=labels.dtype) == labels, tf.int32))
        return loss, correct

    def _infer(self, images):
        return self.model(images, training=False)

    def train_step(self, images, labels):
        return self._step(tf.convert_to_tensor(images), tf.convert_to_tensor(labels))

    def predict(self, images):
        return self._forward(tf.convert_to_tensor(images)).numpy()

    def push(self):
        pass
