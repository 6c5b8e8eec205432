"""Tasks on the engine: evaluation with a padded batch, two phases over two models, a momentum teacher."""

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.data.batches import Batches
from kvision.data.device import DeviceDataset
from kvision.data.preprocessing import Preprocessing
from kvision.layers import batch_norm, logits
from kvision.random import rng
from kvision.tasks import Phase, add, mean
from kvision.tasks.classification import Classification, class_scores, log_probabilities
from kvision.training.evaluation import evaluate, evaluation_totals
from kvision.training.trainer import Schedule, fit
from tests.arrays import noise, value

layers = keras.layers


@pytest.fixture
def float64():
    engine.configure("float64")
    yield
    engine.configure("float32")


def fill(model, seed):
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        drawn = generator.normal(size=tuple(variable.shape)) / 2
        variable.assign(abs(drawn) + 0.5 if "variance" in variable.path else drawn)
    return model


# Means


def test_means_add_up():
    first, second = {"loss": (6.0, 3), "seen": (np.ones(2), 3)}, {"loss": (1.0, 1), "other": (2.0, 4)}
    found = add(first, second)
    assert mean(found) == {"loss": 7 / 4, "other": 0.5}
    np.testing.assert_array_equal(add(found, first)["seen"][0], [2, 2])
    assert np.isnan(mean({"loss": (0.0, 0)})["loss"])


# Classification


def classifier():
    inputs = keras.Input((6, 6, 3), name="image")
    return fill(keras.Model(inputs, logits(4)(layers.Flatten()(inputs))), 1)


def build_batches(make_images, n=11, classes=4):
    return Batches(*make_images(n, 6, 6, classes=classes), 4, 1, Preprocessing(mean=(0.5,), std=(0.25,)))


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("size", [4, 11])
def test_evaluation_is_exact_with_a_padded_last_batch(make_images, where, size):
    """Every figure against NumPy, of the logits of all images at once."""
    top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="of_keras")
    task = Classification(label_smoothing=0.1, metrics=[top], top_k=(2,), per_class=True, calibration=5)
    model, batches = classifier(), build_batches(make_images)
    model.layers[-1].kernel.regularizer = keras.regularizers.L2(0.3)
    runner = engine.create(model, task)
    data = batches if where == "host" else DeviceDataset(batches)
    found = evaluate(runner, data, size)
    scores = np.concatenate([runner.predict(batches.make_batch(p)) for p in batches.in_order(11, pad=False)])
    labels, logs = batches.labels, log_probabilities(scores)
    penalty = 0.3 * (value(model.layers[-1].kernel).astype(np.float64) ** 2).sum()
    smooth = 0.9 * np.eye(4)[labels] + 0.1 / 4
    right = scores.argmax(axis=1) == labels
    hits = (scores > scores[np.arange(11), labels][:, None]).sum(axis=1) < 2
    confidence = np.exp(logs.max(axis=1))
    places = np.minimum((confidence * 5).astype(int), 4)
    gaps = [abs((confidence - right)[places == i].sum()) for i in range(5)]
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (labels, scores.argmax(axis=1)), 1)
    expected = {
        "loss": -(smooth * logs).sum(axis=1).mean() + penalty,
        "accuracy": right.mean(),
        "top_2": hits.mean(),
        "of_keras": hits.mean(),
        "calibration_error": sum(gaps) / 11,
        **{name: scores.mean() for name, scores in class_scores(confusion).items()},
    }
    assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(evaluation_totals(runner, data, size)["confusion"][0], confusion)


def test_scores_of_classes():
    """Of three classes, of which nothing is the last and nothing is taken for the second."""
    found = class_scores(np.array([[3, 0, 1], [2, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(found["precision"], [3 / 5, 0, 0])
    np.testing.assert_allclose(found["recall"], [3 / 4, 0, 0])
    np.testing.assert_allclose(found["f1"], [2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4), 0, 0])


def test_several_labels_of_an_image():
    model, x = classifier(), noise(5, 6, 6, 3)
    targets = (noise(5, 4, seed=1) > 0).astype(np.float32)
    runner = engine.create(model, Classification(multi_label=True), keras.optimizers.SGD(0.1))
    scores = runner.predict(x).astype(np.float64)
    means = mean(
        {name: tuple(map(float, pair)) for name, pair in runner.train_step({"image": x, "label": targets}).items()}
    )
    expected = np.log1p(np.exp(scores)) - targets * scores
    assert means["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert means["accuracy"] == pytest.approx(((scores > 0) == targets).mean())
    with pytest.raises(ValueError, match=r"expected targets .* from 0 to 1"):
        runner.train_step({"image": x, "label": 2 * targets})


def test_weights_of_examples():
    """The loss is the weighted mean, and an example of weight 0 changes nothing."""
    x, labels = noise(6, 6, 6, 3), np.arange(6, dtype=np.int32) % 4
    weight = np.array([1, 2, 0, 1, 0.5, 0], np.float32)
    results = []
    for change in (0, 9):
        runner = engine.create(classifier(), Classification(), keras.optimizers.SGD(0.1))
        shown = x + change * (weight == 0)[:, None, None, None].astype(np.float32)
        logs = log_probabilities(runner.predict(shown))[np.arange(6), labels]
        (total, count), *_ = runner.train_step({"image": shown, "label": labels, "weight": weight}).values()
        runner.sync_variables()
        assert float(count) == 4.5 and float(total) == pytest.approx(-(weight * logs).sum(), rel=1e-5)
        results.append(value(runner.model.layers[-1].kernel))
    np.testing.assert_allclose(*results, rtol=1e-6)
    with pytest.raises(ValueError, match="the loss is a function, which takes none"):
        task = Classification(lambda labels, outputs: ops.mean(outputs))
        engine.create(classifier(), task).program.check({"label": labels, "weight": weight})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(keras.losses.MeanSquaredError(), label_smoothing=0.1), "is of the default loss"),
        (lambda: engine.create({"a": classifier(), "b": classifier()}, Classification()), "trains one model, got a, b"),
        (
            lambda: engine.create(classifier(), Gan(), keras.optimizers.SGD()),
            "an optimizer for each phase: critic, gen",
        ),
        (
            lambda: engine.create(gan(), Gan(), {"critic": keras.optimizers.SGD()}),
            r"only one of them has \['generator'",
        ),
        (lambda: engine.create({"generator": classifier()}, Gan()), r"phase 'critic' trains \['critic'\]"),
        (lambda: engine.create(gan(), Gan()).value_and_grad({}, "third"), "phases are critic, generator; got 'third'"),
    ],
    ids=["smoothing", "models", "optimizer", "optimizers", "model", "phase"],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Two phases


def gan():
    """A generator of three numbers from two and a critic of them, both with a batch norm."""
    models = {}
    for seed, (name, inputs, outputs) in enumerate((("generator", 2, 3), ("critic", 3, 1))):
        x = start = keras.Input((inputs,))
        x = layers.Activation("tanh", name="tanh")(batch_norm(name="bn")(layers.Dense(4, name="first")(x)))
        models[name] = fill(keras.Model(start, layers.Dense(outputs, name="last")(x), name=name), seed)
    return models


def softplus(x):
    return ops.log(1 + ops.exp(x))


class Gan:
    def phases(self):
        return [Phase("critic", self.criticize, "critic"), Phase("generator", self.generate, ["generator"])]

    def criticize(self, models, batch):
        real = models["critic"](batch["image"])
        fake = models["critic"](models["generator"](batch["latent"]))
        return ops.mean(softplus(-real)) + ops.mean(softplus(fake)), {"real": (ops.sum(real), real.shape[0])}

    def generate(self, models, batch):
        return ops.mean(softplus(-models["critic"](models["generator"](batch["latent"])))), {}

    def metrics(self, models, batch):
        fake = models["critic"](models["generator"](batch["latent"]))
        return {"fake": (ops.sum(fake), fake.shape[0])}


def network(weights, x, statistics=None):
    """In NumPy, in training mode; `statistics` get the mean and the biased variance of the batch norm's input."""
    kernel, bias, gamma, beta, last, end = weights
    x = x @ kernel + bias
    center, spread = x.mean(axis=0), ((x - x.mean(axis=0)) ** 2).mean(axis=0)
    if statistics is not None:
        statistics.append((center, spread))
    return np.tanh((x - center) / np.sqrt(spread + 1e-5) * gamma + beta) @ last + end


def slope(function, weights):
    """The gradient by complex steps: exact to rounding, of any analytic function."""
    found = []
    for i, weight in enumerate(weights):
        gradient = np.zeros(weight.shape)
        for place in np.ndindex(weight.shape):
            moved = [w.astype(complex) for w in weights]
            moved[i][place] += 1e-30j
            gradient[place] = function(moved).imag / 1e-30
        found.append(gradient)
    return found


SPLUS = lambda x: np.log(1 + np.exp(x))  # noqa: E731


class PlainGan:
    """The same training in NumPy: SGD with momentum for the critic, plain SGD for the generator."""

    def __init__(self, models):
        self.weights = {name: [value(v) for v in model.trainable_variables] for name, model in models.items()}
        self.running = {name: [value(v) for v in model.non_trainable_variables] for name, model in models.items()}
        self.speeds = [np.zeros_like(w) for w in self.weights["critic"]]

    def keep(self, name, statistics):
        for pair in statistics:
            self.running[name] = [0.9 * old + 0.1 * new for old, new in zip(self.running[name], pair, strict=True)]

    def step(self, image, latent):
        fake, seen = network(self.weights["generator"], latent), []
        criticize = lambda w, s=None: SPLUS(-network(w, image, s)).mean() + SPLUS(network(w, fake, s)).mean()  # noqa: E731
        losses = [criticize(self.weights["critic"], seen)]
        self.keep("critic", seen)
        gradients = slope(criticize, self.weights["critic"])
        self.speeds = [0.9 * speed - 0.1 * gradient for speed, gradient in zip(self.speeds, gradients, strict=True)]
        self.weights["critic"] = [w + speed for w, speed in zip(self.weights["critic"], self.speeds, strict=True)]
        seen = []
        generate = lambda w, s=None: SPLUS(-network(self.weights["critic"], network(w, latent, s))).mean()  # noqa: E731
        losses.append(generate(self.weights["generator"], seen))
        self.keep("generator", seen)
        gradients = slope(generate, self.weights["generator"])
        self.weights["generator"] = [w - 0.2 * g for w, g in zip(self.weights["generator"], gradients, strict=True)]
        return losses


def gan_engine(models=None, **options):
    # Keras casts a Python number by way of float32 on TensorFlow.
    optimizers = {"critic": keras.optimizers.SGD(0.1, momentum=np.float64(0.9)), "generator": keras.optimizers.SGD(0.2)}
    return engine.create(models or gan(), Gan(), optimizers, **options)


def test_two_phases_are_those_of_numpy(float64):
    """Losses, weights and batch statistics of three steps in float64; each phase leaves the other's model alone."""
    runner = gan_engine()
    plain, generator = PlainGan(runner.program.models), np.random.default_rng(3)
    for _ in range(3):
        batch = {"image": generator.normal(size=(6, 3)), "latent": generator.normal(size=(6, 2))}
        means = runner.train_step(batch)
        found = [
            float(total) / float(weight) for total, weight in (means[f"{n}_loss"] for n in ("critic", "generator"))
        ]
        assert found == pytest.approx(plain.step(**batch), rel=1e-10) and "real" in means
    runner.sync_variables()
    for name, model in runner.program.models.items():
        for variable, expected in zip(model.trainable_variables, plain.weights[name], strict=True):
            np.testing.assert_allclose(value(variable), expected, rtol=0, atol=1e-10, err_msg=variable.path)
        for variable, expected in zip(model.non_trainable_variables, plain.running[name], strict=True):
            np.testing.assert_allclose(value(variable), expected, rtol=0, atol=1e-10, err_msg=variable.path)


def test_the_gradient_of_a_phase(float64):
    """Against NumPy; the variables of the other model, statistics included, are as before bit for bit."""
    models, generator = gan(), np.random.default_rng(3)
    batch = {"image": generator.normal(size=(6, 3)), "latent": generator.normal(size=(6, 2))}
    plain = PlainGan(models)
    before = {name: [value(v) for v in model.variables] for name, model in models.items()}
    loss, gradients = gan_engine(models).value_and_grad(batch, "generator")
    generate = lambda w: SPLUS(-network(plain.weights["critic"], network(w, batch["latent"]))).mean()  # noqa: E731
    assert float(loss) == pytest.approx(generate(plain.weights["generator"]), rel=1e-12)
    for found, expected in zip(gradients, slope(generate, plain.weights["generator"]), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=0, atol=1e-12)
    moved = {
        name: [not np.array_equal(value(v), old) for v, old in zip(model.variables, before[name], strict=True)]
        for name, model in models.items()
    }
    assert not any(moved["critic"]) and sum(moved["generator"]) == 2


class Latent:
    """Batches of vectors that are images' pixels, with numbers to make others of."""

    batch_size, steps, preprocessing = 4, 3, None

    def epoch(self, epoch, start=0):
        for step in range(start, self.steps):
            if (epoch, step) == getattr(self, "stop", None):
                raise KilledError
            drawn = rng(0, "gan", epoch, step)
            image, latent = drawn.normal(size=(4, 3)), drawn.normal(size=(4, 2))
            yield {"image": image.astype(np.float32), "latent": latent.astype(np.float32)}


class KilledError(Exception):
    pass


def everything(models, optimizers, *variables):
    found = [v for model in models.values() for v in model.variables]
    found += [v for optimizer in optimizers.values() for v in optimizer.variables]
    return [value(variable).tobytes() for variable in (*found, *variables)]


def test_a_run_of_two_phases_resumes_to_the_bit(tmp_path):
    """Two models and two optimizers are in its checkpoints, and the losses of both phases in its history."""

    def train(stop=None, folder=None):
        models = gan()
        optimizers = {"critic": keras.optimizers.Adam(0.01), "generator": keras.optimizers.SGD(0.2, momentum=0.9)}
        loader = Latent()
        loader.stop = stop
        history = fit(models, Gan(), optimizers, loader, epochs=2, checkpoint=folder, schedule=Schedule(save_every=1))
        names = ("critic_loss", "generator_loss", "real", "critic_learning_rate", "generator_learning_rate")
        return everything(models, optimizers), [[row[name] for name in names] for row in history.epochs]

    whole = train()
    with pytest.raises(KilledError):
        train((1, 1), tmp_path)
    assert train(None, tmp_path) == whole
    assert whole[1][0][:2] != whole[1][1][:2] and whole[1][0][3:] == pytest.approx([0.01, 0.2])


# A momentum teacher


class Distillation:
    """A student learns what a teacher says, which is the running average of the student's weights."""

    def __init__(self, models, momentum=0.8):
        self.momentum, self.pairs = momentum, [(models["teacher"].variables, models["student"].variables)]
        self.variables = models["teacher"].variables

    def loss(self, models, batch):
        said = ops.stop_gradient(models["teacher"](batch["image"], training=False))
        loss = ops.mean(ops.square(models["student"](batch["image"]) - said))
        for teacher, student in zip(*self.pairs[0], strict=True):
            teacher.assign(self.momentum * teacher.value + (1 - self.momentum) * ops.stop_gradient(student.value))
        return loss, {}

    def metrics(self, models, batch):
        return {"loss": (ops.sum(models["teacher"](batch["image"])), 1)}


def school():
    models = {}
    for seed, name in enumerate(("student", "teacher")):
        x = start = keras.Input((3,))
        x = layers.Dense(4, activation="tanh", name="first")(x)
        models[name] = fill(keras.Model(start, layers.Dense(2, name="last")(x), name=name), seed)
    return models


def mlp(weights, x):
    return np.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3]


def test_a_momentum_teacher_is_that_of_numpy(float64):
    """The student's weights and the teacher's after four steps in float64."""
    models, generator = school(), np.random.default_rng(3)
    runner = engine.create(models, Distillation(models), keras.optimizers.SGD(0.3))
    student, teacher = ([value(v) for v in models[name].variables] for name in ("student", "teacher"))
    for _ in range(4):
        x = generator.normal(size=(5, 3))
        total, weight = runner.train_step({"image": x})["loss"]
        said = mlp(teacher, x)
        objective = lambda w: ((mlp(w, x) - said) ** 2).mean()  # noqa: B023, E731
        assert float(total) / float(weight) == pytest.approx(objective(student), rel=1e-10)
        gradients = slope(objective, student)
        teacher = [0.8 * t + 0.2 * s for t, s in zip(teacher, student, strict=True)]
        student = [w - 0.3 * g for w, g in zip(student, gradients, strict=True)]
    runner.sync_variables()
    for name, expected in (("student", student), ("teacher", teacher)):
        for variable, wanted in zip(models[name].variables, expected, strict=True):
            np.testing.assert_allclose(value(variable), wanted, rtol=0, atol=1e-10, err_msg=variable.path)


def test_a_run_with_a_teacher_resumes_to_the_bit(tmp_path):
    def train(stop=None, folder=None):
        models, optimizer, loader = school(), keras.optimizers.Adam(0.01), Latent()
        loader.stop = stop
        task = Distillation(models)
        fit(models, task, optimizer, loader, epochs=2, checkpoint=folder, schedule=Schedule(save_every=2))
        return everything(models, {"": optimizer}, *task.variables)

    whole = train()
    with pytest.raises(KilledError):
        train((1, 2), tmp_path)
    assert train(None, tmp_path) == whole


def test_parts_of_a_batch_of_several_arrays_make_the_step_of_the_whole():
    """Of two phases, whose models have no batch norm here."""

    def plain_gan():
        models = {}
        for seed, (name, inputs, outputs) in enumerate((("generator", 2, 3), ("critic", 3, 1))):
            start = keras.Input((inputs,))
            models[name] = fill(keras.Model(start, layers.Dense(outputs)(start), name=name), seed)
        return models

    found = []
    for count in (1, 3):
        runner = gan_engine(plain_gan(), gradient_accumulation_steps=count)
        for seed in range(2):
            means = runner.train_step({"image": noise(6, 3, seed=seed), "latent": noise(6, 2, seed=seed + 9)})
        runner.sync_variables()
        losses = [float(ops.convert_to_numpy(total)) for total, _ in means.values()]
        found.append([losses, *(value(v) for model in runner.program.models.values() for v in model.variables)])
    for whole, parts in zip(*found, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
