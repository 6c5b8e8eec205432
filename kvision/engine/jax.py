"""JAX: the step is one compiled function from state to state; the state's memory is reused."""

import jax
import jax.numpy as jnp
import numpy as np


class Engine:
    def __init__(self, model, optimizer=None, loss=None):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self._state = None
        self._step = jax.jit(self._train, donate_argnums=0)
        self._forward = jax.jit(self._infer)

    def _objective(self, trainable, fixed, images, labels):
        logits, fixed, penalties = self.model.stateless_call(
            trainable, fixed, images, training=True, return_losses=True
        )
        return self.loss(labels, logits) + sum(penalties), (fixed, logits)

    def _train(self, state, images, labels):
        trainable, fixed, slots = state
        gradient = jax.value_and_grad(self._objective, has_aux=True)
        (loss, (fixed, logits)), gradients = gradient(trainable, fixed, images, labels)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return (trainable, fixed, slots), (loss, correct)

    def _infer(self, trainable, fixed, images):
        return self.model.stateless_call(trainable, fixed, images, training=False)[0]

    def _variables(self):
        slots = self.optimizer.variables if self.optimizer else []
        return self.model.trainable_variables, self.model.non_trainable_variables, slots

    def train_step(self, images, labels):
        if self._state is None:
            self._state = [[variable.value for variable in group] for group in self._variables()]
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
