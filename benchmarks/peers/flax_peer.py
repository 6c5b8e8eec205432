"""JAX by hand: Flax's linen for the network, Optax for the update, one compiled step whose state's memory is reused.

Linen rather than nnx: a step is the same program in both, and nnx spends longer in Python around it. Initial values are
drawn within one compiled function too; one operation at a time, each would be compiled for every shape. `scanned` takes
several steps in one program.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.peers import CLASSES, LEARNING_RATES, MOMENTUM, RESNET50, VGG, WEIGHT_DECAY

_conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=nn.initializers.he_normal())
_norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5)


class ResNet20(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, dtype=self.dtype)
        x = conv(16, use_bias=False, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        for stage, filters in enumerate((16, 32, 64), start=1):
            for i in range(1, 4):
                name, strides = f"stage{stage}_block{i}", 2 if stage > 1 and i == 1 else 1
                y = conv(filters, strides=strides, use_bias=False, name=f"{name}_1_conv")(x)
                y = nn.relu(norm(name=f"{name}_1_bn")(y))
                y = conv(filters, use_bias=False, name=f"{name}_2_conv")(y)
                y = norm(name=f"{name}_2_bn")(y)
                if x.shape != y.shape:
                    missing = filters - x.shape[-1]
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (missing // 2, missing // 2)))
                x = nn.relu(x + y)
        return nn.Dense(CLASSES["resnet20"], dtype=self.dtype, name="logits")(x.mean(axis=(1, 2)))


class VGGSmall(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, dtype=self.dtype)
        dense = partial(nn.Dense, dtype=self.dtype)
        for stage, (factor, count) in enumerate(zip((1, 2, 4, 8, 8), VGG["convolutions"], strict=True), start=1):
            for i in range(1, count + 1):
                x = conv(factor * VGG["width"], name=f"stage{stage}_{i}_conv")(x)
                x = nn.relu(norm(name=f"stage{stage}_{i}_bn")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for i in (1, 2):
            x = nn.relu(dense(VGG["hidden"], kernel_init=nn.initializers.he_normal(), name=f"head_{i}_dense")(x))
        return dense(CLASSES["vgg_small"], name="logits")(x)


class ResNet50(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        conv = partial(_conv, dtype=self.dtype, use_bias=False)
        pointwise = partial(conv, kernel_size=(1, 1), padding=0)
        norm = partial(_norm, dtype=self.dtype)
        width = RESNET50["width"]
        x = conv(width, kernel_size=(7, 7), strides=2, padding=3, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, count in enumerate(RESNET50["blocks"], start=1):
            filters = width * 2 ** (stage - 1)
            for i in range(1, count + 1):
                name, strides = f"stage{stage}_block{i}", 2 if stage > 1 and i == 1 else 1
                y = pointwise(filters, name=f"{name}_1_conv")(x)
                y = nn.relu(norm(name=f"{name}_1_bn")(y))
                y = conv(filters, strides=strides, name=f"{name}_2_conv")(y)
                y = nn.relu(norm(name=f"{name}_2_bn")(y))
                y = pointwise(4 * filters, name=f"{name}_3_conv")(y)
                y = norm(name=f"{name}_3_bn")(y)
                if x.shape != y.shape:
                    x = pointwise(4 * filters, strides=strides, name=f"{name}_shortcut_conv")(x)
                    x = norm(name=f"{name}_shortcut_bn")(x)
                x = nn.relu(x + y)
        return nn.Dense(CLASSES["resnet50"], dtype=self.dtype, name="logits")(x.mean(axis=(1, 2)))


NETWORKS = {"resnet20": ResNet20, "vgg_small": VGGSmall, "resnet50": ResNet50}
_NAMES = {"gamma": "scale", "beta": "bias"}  # what Flax calls them


def _kernels(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def train(network, images, labels, batch_size, clock, *, steps, dtype="float32", weights=None, chunk=None) -> int:
    """As the package says; with `chunk`, a divisor of `steps`, so many steps are one program's."""
    model = NETWORKS[network](jnp.dtype(dtype))
    update = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_kernels),
        optax.scale(-LEARNING_RATES[network]),
    )

    @jax.jit
    def create(key):
        variables = model.init(key, jnp.zeros((1, *images.shape[1:])))
        return variables["params"], variables["batch_stats"], update.init(variables["params"])

    def advance(state, images, labels):
        params, statistics, slots = state

        def objective(params):
            variables = {"params": params, "batch_stats": statistics}
            logits, changed = model.apply(variables, images, mutable=["batch_stats"])
            logits = logits.astype(jnp.float32)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (changed["batch_stats"], (logits.argmax(axis=-1) == labels).sum())

        (loss, (statistics, correct)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, slots = update.update(gradients, slots, params)
        return (optax.apply_updates(params, updates), statistics, slots), (loss, correct)

    @partial(jax.jit, donate_argnums=0)
    def scan(state, images, labels, which):
        return jax.lax.scan(lambda state, i: advance(state, images[i], labels[i]), state, which)

    step = jax.jit(advance, donate_argnums=0)
    params, *rest = create(jax.random.key(0))
    if weights is not None:
        layers = [path.split("/") for path in weights]
        given = {layer: {} for layer, _ in layers}
        for (layer, name), value in zip(layers, weights.values(), strict=True):
            given[layer][_NAMES.get(name, name)] = jnp.array(value)
        params = jax.tree.map(lambda old, new: new.reshape(old.shape), params, given)
    count = sum(value.size for value in jax.tree.leaves(params))
    state = (params, *rest)
    batches = len(images) // batch_size
    images, labels = (array.reshape(batches, batch_size, *array.shape[1:]) for array in (images, labels))
    if chunk:
        images, labels = jax.device_put((images, labels))
        clock.start()
        for first in range(0, steps, chunk):
            which = (first + np.arange(chunk, dtype=np.int32)) % batches
            state, (losses, _) = scan(state, images, labels, which)
            clock.steps(losses)
        return count
    pairs = list(zip(images, labels, strict=True))
    if jax.default_backend() != "cpu":
        pairs = jax.block_until_ready(jax.device_put(pairs))
    clock.start()
    for i in range(steps):
        state, (loss, _) = step(state, *pairs[i % batches])
        clock.step(loss)
    return count
