"""JAX by hand: Flax's linen for the network, Optax for the update, one compiled step whose state's memory is reused.

Linen rather than nnx: a step is the same program in both, and nnx spends longer in Python around it. Initial values are
drawn within one compiled function too; one operation at a time, each would be compiled for every shape.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.peers import CLASSES, LEARNING_RATE, MOMENTUM, VGG, WEIGHT_DECAY

_conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=nn.initializers.he_normal())
_norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5)


class ResNet20(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = _conv(16, use_bias=False, name="stem_conv")(x)
        x = nn.relu(_norm(name="stem_bn")(x))
        for stage, filters in enumerate((16, 32, 64), start=1):
            for i in range(1, 4):
                name, strides = f"stage{stage}_block{i}", 2 if stage > 1 and i == 1 else 1
                y = _conv(filters, strides=strides, use_bias=False, name=f"{name}_1_conv")(x)
                y = nn.relu(_norm(name=f"{name}_1_bn")(y))
                y = _conv(filters, use_bias=False, name=f"{name}_2_conv")(y)
                y = _norm(name=f"{name}_2_bn")(y)
                if x.shape != y.shape:
                    missing = filters - x.shape[-1]
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (missing // 2, missing // 2)))
                x = nn.relu(x + y)
        return nn.Dense(CLASSES, name="logits")(x.mean(axis=(1, 2)))


class VGGSmall(nn.Module):
    @nn.compact
    def __call__(self, x):
        for stage, (factor, count) in enumerate(zip((1, 2, 4, 8, 8), VGG["convolutions"], strict=True), start=1):
            for i in range(1, count + 1):
                x = _conv(factor * VGG["width"], name=f"stage{stage}_{i}_conv")(x)
                x = nn.relu(_norm(name=f"stage{stage}_{i}_bn")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for i in (1, 2):
            x = nn.relu(nn.Dense(VGG["hidden"], kernel_init=nn.initializers.he_normal(), name=f"head_{i}_dense")(x))
        return nn.Dense(CLASSES, name="logits")(x)


NETWORKS = {"resnet20": ResNet20, "vgg_small": VGGSmall}
_NAMES = {"gamma": "scale", "beta": "bias"}  # what Flax calls them


def _kernels(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def train(network, images, labels, batch_size, clock, weights=None) -> int:
    model = NETWORKS[network]()
    update = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_kernels),
        optax.scale(-LEARNING_RATE),
    )

    @jax.jit
    def create(key):
        variables = model.init(key, jnp.zeros((1, 32, 32, 3)))
        return variables["params"], variables["batch_stats"], update.init(variables["params"])

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        params, statistics, slots = state

        def objective(params):
            variables = {"params": params, "batch_stats": statistics}
            logits, changed = model.apply(variables, images, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (changed["batch_stats"], (logits.argmax(axis=-1) == labels).sum())

        (loss, (statistics, correct)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, slots = update.update(gradients, slots, params)
        return (optax.apply_updates(params, updates), statistics, slots), (loss, correct)

    params, *rest = create(jax.random.key(0))
    if weights is not None:
        layers = [path.split("/") for path in weights]
        given = {layer: {} for layer, _ in layers}
        for (layer, name), value in zip(layers, weights.values(), strict=True):
            given[layer][_NAMES.get(name, name)] = jnp.array(value)
        params = jax.tree.map(lambda old, new: new.reshape(old.shape), params, given)
    count = sum(value.size for value in jax.tree.leaves(params))
    state = (params, *rest)
    clock.start()
    for i in range(0, len(images), batch_size):
        state, (loss, _) = step(state, images[i : i + batch_size], labels[i : i + batch_size])
        clock.step(loss)
    return count
