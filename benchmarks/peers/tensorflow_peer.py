"""TensorFlow by hand: variables, `tf.nn`, one `tf.function`, batch norm and Nesterov's update in one operation each."""

import math

import tensorflow as tf

from benchmarks.peers import CLASSES, LEARNING_RATES, MOMENTUM, RESNET50, VGG, WEIGHT_DECAY

WINDOWS = {"conv": 3, "biased conv": 3, "pointwise conv": 1, "stem conv": 7}


class _Network(tf.Module):
    """Variables are made as `layers` names them; `self[name]` is one of them."""

    def __init__(self):
        super().__init__()
        self.weights, self.statistics = {}, {}
        for kind, name, inputs, outputs in self.layers():
            if kind == "bn":
                self.weights |= {f"{name}/gamma": tf.ones(outputs), f"{name}/beta": tf.zeros(outputs)}
                self.statistics |= {f"{name}/mean": tf.zeros(outputs), f"{name}/variance": tf.ones(outputs)}
                continue
            shape = (inputs, outputs) if kind == "dense" else (WINDOWS[kind], WINDOWS[kind], inputs, outputs)
            deviation = math.sqrt(2 / math.prod(shape[:-1]))
            self.weights[f"{name}/kernel"] = tf.random.truncated_normal(shape, stddev=deviation)
            if kind in ("dense", "biased conv"):
                self.weights[f"{name}/bias"] = tf.zeros(outputs)
        self.weights = {key: tf.Variable(value, name=key.replace("/", "_")) for key, value in self.weights.items()}
        self.statistics = {key: tf.Variable(value, trainable=False) for key, value in self.statistics.items()}

    def conv(self, x, name, strides=1):
        kernel = self.weights[f"{name}/kernel"]
        reach = kernel.shape[0] // 2
        padding = [[0, 0], [reach, reach], [reach, reach], [0, 0]] if strides > 1 else "SAME"
        x = tf.nn.conv2d(x, kernel, strides, padding)
        bias = self.weights.get(f"{name}/bias")
        return x if bias is None else tf.nn.bias_add(x, bias)

    def norm(self, x, name):
        mean, variance = self.statistics[f"{name}/mean"], self.statistics[f"{name}/variance"]
        x, new_mean, new_variance = tf.compat.v1.nn.fused_batch_norm(
            x,
            self.weights[f"{name}/gamma"],
            self.weights[f"{name}/beta"],
            mean,
            variance,
            epsilon=1e-5,
            exponential_avg_factor=0.1,
        )
        mean.assign(new_mean)
        variance.assign(new_variance)
        return x

    def dense(self, x, name):
        return tf.nn.bias_add(x @ self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"])


class ResNet20(_Network):
    def blocks(self):
        inputs = 16
        for stage, filters in enumerate((16, 32, 64), start=1):
            for i in range(1, 4):
                yield f"stage{stage}_block{i}", inputs, filters
                inputs = filters

    def layers(self):
        yield "conv", "stem_conv", 3, 16
        yield "bn", "stem_bn", 16, 16
        for name, inputs, filters in self.blocks():
            yield "conv", f"{name}_1_conv", inputs, filters
            yield "bn", f"{name}_1_bn", filters, filters
            yield "conv", f"{name}_2_conv", filters, filters
            yield "bn", f"{name}_2_bn", filters, filters
        yield "dense", "logits", 64, CLASSES["resnet20"]

    def __call__(self, x):
        x = tf.nn.relu(self.norm(self.conv(x, "stem_conv"), "stem_bn"))
        for name, inputs, filters in self.blocks():
            y = self.conv(x, f"{name}_1_conv", 1 if inputs == filters else 2)
            y = tf.nn.relu(self.norm(y, f"{name}_1_bn"))
            y = self.norm(self.conv(y, f"{name}_2_conv"), f"{name}_2_bn")
            if inputs != filters:
                missing = filters - inputs
                x = tf.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (missing // 2, missing // 2)))
            x = tf.nn.relu(x + y)
        return self.dense(tf.reduce_mean(x, axis=(1, 2)), "logits")


class VGGSmall(_Network):
    def layers(self):
        inputs = 3
        for stage, (factor, count) in enumerate(zip((1, 2, 4, 8, 8), VGG["convolutions"], strict=True), start=1):
            for i in range(1, count + 1):
                filters = factor * VGG["width"]
                yield "biased conv", f"stage{stage}_{i}_conv", inputs, filters
                yield "bn", f"stage{stage}_{i}_bn", filters, filters
                inputs = filters
        yield "dense", "head_1_dense", inputs, VGG["hidden"]
        yield "dense", "head_2_dense", VGG["hidden"], VGG["hidden"]
        yield "dense", "logits", VGG["hidden"], CLASSES["vgg_small"]

    def __call__(self, x):
        for stage, count in enumerate(VGG["convolutions"], start=1):
            for i in range(1, count + 1):
                x = tf.nn.relu(self.norm(self.conv(x, f"stage{stage}_{i}_conv"), f"stage{stage}_{i}_bn"))
            x = tf.nn.max_pool2d(x, 2, 2, "VALID")
        x = tf.reshape(x, (x.shape[0], -1))
        for i in (1, 2):
            x = tf.nn.relu(self.dense(x, f"head_{i}_dense"))
        return self.dense(x, "logits")


class ResNet50(_Network):
    def blocks(self):
        inputs = RESNET50["width"]
        for stage, count in enumerate(RESNET50["blocks"], start=1):
            filters = RESNET50["width"] * 2 ** (stage - 1)
            for i in range(1, count + 1):
                yield f"stage{stage}_block{i}", inputs, filters, 2 if stage > 1 and i == 1 else 1
                inputs = 4 * filters

    def layers(self):
        yield "stem conv", "stem_conv", 3, RESNET50["width"]
        yield "bn", "stem_bn", 3, RESNET50["width"]
        for name, inputs, filters, _ in self.blocks():
            yield "pointwise conv", f"{name}_1_conv", inputs, filters
            yield "bn", f"{name}_1_bn", filters, filters
            yield "conv", f"{name}_2_conv", filters, filters
            yield "bn", f"{name}_2_bn", filters, filters
            yield "pointwise conv", f"{name}_3_conv", filters, 4 * filters
            yield "bn", f"{name}_3_bn", filters, 4 * filters
            if inputs != 4 * filters:
                yield "pointwise conv", f"{name}_shortcut_conv", inputs, 4 * filters
                yield "bn", f"{name}_shortcut_bn", filters, 4 * filters
        yield "dense", "logits", 4 * filters, CLASSES["resnet50"]

    def __call__(self, x):
        x = tf.nn.relu(self.norm(self.conv(x, "stem_conv", 2), "stem_bn"))
        x = tf.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # behind a ReLU a zero is as good as no pixel
        x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        for name, inputs, filters, strides in self.blocks():
            y = tf.nn.relu(self.norm(self.conv(x, f"{name}_1_conv"), f"{name}_1_bn"))
            y = tf.nn.relu(self.norm(self.conv(y, f"{name}_2_conv", strides), f"{name}_2_bn"))
            y = self.norm(self.conv(y, f"{name}_3_conv"), f"{name}_3_bn")
            if inputs != 4 * filters:
                x = self.norm(self.conv(x, f"{name}_shortcut_conv", strides), f"{name}_shortcut_bn")
            x = tf.nn.relu(x + y)
        return self.dense(tf.reduce_mean(x, axis=(1, 2)), "logits")


NETWORKS = {"resnet20": ResNet20, "vgg_small": VGGSmall, "resnet50": ResNet50}


def train(network, images, labels, batch_size, clock, *, steps, dtype="float32", weights=None) -> int:
    """As the package says, but in float32 alone.

    Raises:
        ValueError: another dtype.
    """
    if dtype != "float32":
        raise ValueError(f"the loop by hand in TensorFlow is written for float32, got {dtype}: leave it out")
    model = NETWORKS[network]()
    variables = model.weights
    for name, value in (weights or {}).items():
        variables[name].assign(value)
    momenta = {name: tf.Variable(tf.zeros_like(variable)) for name, variable in variables.items()}

    @tf.function(autograph=False, jit_compile=False)
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        for name, gradient in tape.gradient(loss, dict(variables)).items():
            variable = variables[name]
            if name.endswith("kernel"):
                gradient += WEIGHT_DECAY * variable
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=variable.handle,
                accum=momenta[name].handle,
                lr=LEARNING_RATES[network],
                grad=gradient,
                momentum=MOMENTUM,
                use_nesterov=True,
            )
        correct = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1, output_type=tf.int32) == labels, tf.int32))
        return loss, correct

    batches = [(images[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    if tf.config.list_physical_devices("GPU"):
        batches = [tuple(map(tf.constant, pair)) for pair in batches]
    clock.start()
    for i in range(steps):
        loss, _ = step(*map(tf.constant, batches[i % len(batches)]))
        clock.step(loss)
    return sum(math.prod(variable.shape) for variable in variables.values())
