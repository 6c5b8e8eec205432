"""Schedules, optimizers, the loop, and runs that stop and go on."""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

from kvision.data.batches import Augmentation, Batches
from kvision.data.mixing import CutMix, MixedBatches, Mixup, RandomErasing
from kvision.data.preprocessing import Preprocessing
from kvision.layers import activation, batch_norm, conv, dropout, logits
from kvision.layers.regularizers import MaxNorm, add_constraint
from kvision.tasks.classification import (
    Classification,
    confusion_matrix,
    cross_entropy,
    log_probabilities,
    score,
    top_losses,
)
from kvision.training import evaluation, optimizers, schedules, trainer
from kvision.training.averaging import EMA, SWA, Lookahead
from kvision.training.optimizers import LearningRateMultipliers, make_optimizer
from kvision.training.schedules import schedule
from kvision.training.trainer import DivergedError, EarlyStopping, Schedule, fit
from kvision.weights.initialization import initialize
from tests.arrays import figures, take_step

layers = keras.layers


def everything(model, optimizer):
    """All arrays of a run, dropout's generators included."""
    return [np.array(ops.convert_to_numpy(v.value)) for v in (*model.variables, *optimizer.variables)]


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


# Schedules


def straight(step, peak, total, warmup):
    return peak * (0.2 + 0.8 * step / warmup if step < warmup else (total - step) / (total - warmup))


def half_cosine(step, peak, total, warmup):
    if step < warmup:
        return peak * (0.2 + 0.8 * step / warmup)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def flat(step, peak, total, warmup):
    return peak * (0.2 + 0.8 * step / warmup if step < warmup else 1)


def stairs(step, peak, total, warmup):
    return peak * (1 if step < total // 2 else 0.1 if step < total * 3 // 4 else 0.01)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("total", [40, 41])
@pytest.mark.parametrize(
    ("kind", "expected"), [("linear", straight), ("cosine", half_cosine), ("constant", flat), ("steps", stairs)]
)
def test_schedules(kind, expected, total, warmup):
    rate, steps = schedule(kind, 0.3, total, warmup), round(warmup * total)
    for step in range(total):
        wanted = expected(step, 0.3, total, steps)
        assert float(ops.convert_to_numpy(rate(step))) == pytest.approx(wanted, rel=1e-5, abs=1e-7), step


def test_a_schedule_ends_at_zero_and_stays():
    rate = schedule("linear", 0.3, 10)
    assert [float(ops.convert_to_numpy(rate(step))) for step in (10, 11, 50)] == [0, 0, 0]


def test_schedules_survive_their_configuration():
    rate = schedule("cosine", 0.3, 40, 0.25)
    again = type(rate).from_config(json.loads(json.dumps(rate.get_config())))
    assert float(ops.convert_to_numpy(again(17))) == float(ops.convert_to_numpy(rate(17)))


def test_unknown_schedules_and_optimizers_are_named():
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, linear, steps, got 'sawtooth'"):
        schedule("sawtooth", 0.1, 10)
    with pytest.raises(ValueError, match="'linear', 'cosine' or not"):
        schedules.WarmupSchedule(0.1, 10, kind="steps")
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adam, adamw, got 'lion'"):
        make_optimizer("lion", 0.1)


# Optimizers


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_takes_kernels_alone(name):
    """With gradients of zero nothing moves but what decays: by learning rate times decay of itself."""
    x = inputs = keras.Input((4, 4, 2))
    x = batch_norm(name="bn")(conv(3, 3, name="conv", use_bias=True)(x))
    model = keras.Model(inputs, logits(3)(layers.Flatten()(x)))
    for variable in model.trainable_variables:
        variable.assign(np.full(tuple(variable.shape), 2.0, np.float32))
    optimizer = make_optimizer(name, 0.5, weight_decay=0.1)
    optimizer.build(model.trainable_variables)
    optimizer.apply([ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    for variable in model.trainable_variables:
        expected = 2 * (1 - 0.5 * 0.1) if variable.name == "kernel" else 2
        np.testing.assert_allclose(ops.convert_to_numpy(variable.value), expected, rtol=1e-6, err_msg=variable.path)


def test_optimizers_take_their_momentum():
    assert make_optimizer("sgd", 0.1, momentum=0.8).get_config()["nesterov"]
    assert not make_optimizer("sgd", 0.1, momentum=0.0).get_config()["nesterov"]
    assert make_optimizer("adam", 0.1, momentum=0.8).get_config()["beta_1"] == 0.8
    assert make_optimizer("adamw", 0.1).get_config()["weight_decay"] is None


CLIPS = {
    "clip_value": lambda gradients, limit: [np.clip(g, -limit, limit) for g in gradients],
    "clip_norm": lambda gradients, limit: [g * min(1, limit / np.linalg.norm(g.ravel())) for g in gradients],
    "clip_global_norm": lambda gradients, limit: [
        g * min(1, limit / np.sqrt(sum((g**2).sum() for g in gradients))) for g in gradients
    ],
}


@pytest.mark.parametrize("limit", [0.05, 100.0])
@pytest.mark.parametrize("kind", CLIPS)
def test_gradients_are_clipped(kind, limit):
    """A step of the engine on softmax regression; a large limit changes nothing."""
    inputs = keras.Input((5,))
    model = keras.Model(inputs, logits(3)(inputs))
    initialize(model, 0)
    x, labels = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.arange(6, dtype=np.int32) % 3
    before = [array.astype(np.float64) for array in trainer.values(model.variables)]
    scores = x @ before[0] + before[1]
    apart = (np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(3)[labels]) / 6
    expected = CLIPS[kind]([x.T.astype(np.float64) @ apart, apart.sum(axis=0)], limit)
    optimizer = make_optimizer("sgd", 1.0, momentum=0.0, **{kind: limit})
    optimizer.build(model.trainable_variables)
    runner = trainer.engines.create(model, Classification(), optimizer)
    take_step(runner, x, labels)
    runner.sync_variables()
    for old, new, gradient in zip(before, trainer.values(model.variables), expected, strict=True):
        np.testing.assert_allclose(old - new, gradient, rtol=1e-3, atol=1e-6)


def test_one_way_of_clipping():
    with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue` and `global_clipnorm`"):
        make_optimizer("sgd", 0.1, clip_value=1.0, clip_norm=1.0)


# Averages of the weights


AVERAGES = {
    "ema": (lambda inner: EMA(inner, 0.3), [1, 0.9, 9 / 11, 9 / 12, 0.7, 0.7, 0.7]),
    "swa": (lambda inner: SWA(inner, 3, 2), [1, 1, 1, 0, 1 / 2, 0, 1 / 3]),
    "swa_each": (lambda inner: SWA(inner, 1), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7]),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_the_weights_follows_its_closed_form(make_images, kind):
    """Beside a training that does not know of it; the newest weights' share after each step stands in the table."""
    make, shares = AVERAGES[kind]
    (model, inner, batches), (twin, plain, _) = run(make_images, width=0), run(make_images, width=0)
    optimizer = make(inner)
    runners = []
    for one, of in ((model, optimizer), (twin, plain)):
        of.build(one.trainable_variables)
        runners.append(trainer.engines.create(one, Classification(), of))
    expected = [np.zeros(tuple(v.shape)) for v in model.trainable_variables]
    steps = (batch for epoch in range(3) for batch in batches.epoch(epoch))
    for share, batch in zip(shares, steps, strict=False):
        for runner in runners:
            runner.train_step(batch)
            runner.sync_variables()
        weights = trainer.values(model.trainable_variables)
        assert same(weights, trainer.values(twin.trainable_variables))
        expected = [(1 - share) * old + share * new for old, new in zip(expected, weights, strict=True)]
        for average, wanted in zip(trainer.values(optimizer.averages), expected, strict=True):
            np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-7)
    assert int(ops.convert_to_numpy(optimizer.iterations)) == len(shares)
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == pytest.approx(half_cosine(7, 0.1, 12, 0), rel=1e-5)


def test_an_average_is_taken_after_constraints(make_images):
    model, inner, batches = run(make_images, width=0)
    add_constraint(model, MaxNorm(0.1))
    optimizer = SWA(inner, 1)
    fit(model, Classification(), optimizer, batches, epochs=1)
    (kernel, _) = trainer.values(optimizer.averages)
    assert np.sqrt((kernel**2).sum(axis=0)).max() <= 0.1 * (1 + 1e-5)


def test_fit_scores_and_leaves_the_average(make_images):
    """With the batch norm's statistics under it, pooled over the epoch's batches; training is what it would be."""
    test = make_images(10, 6, 6, seed=2)
    (model, inner, batches), (twin, plain, _) = run(make_images), run(make_images)
    optimizer = EMA(inner, 0.9)
    history = fit(
        model,
        Classification(),
        optimizer,
        batches,
        epochs=2,
        evaluations={"test": test},
        schedule=Schedule(eval_every=1),
    )
    other = fit(
        twin, Classification(), plain, batches, epochs=2, evaluations={"test": test}, schedule=Schedule(eval_every=1)
    )
    assert history.step_losses == other.step_losses
    assert history.epochs[-1]["test_loss"] != other.epochs[-1]["test_loss"]
    assert same(trainer.values(model.trainable_variables), trainer.values(optimizer.averages))
    scores = evaluation.predict(trainer.engines.create(model), test[0], batches.preprocessing)
    assert score(scores, test[1])["loss"] == pytest.approx(history.epochs[-1]["test_loss"], rel=1e-6)
    maps = keras.Model(model.input, model.get_layer("conv").output)
    seen = np.concatenate([trainer.engines.create(maps).predict(batch["image"]) for batch in batches.epoch(1)])
    for name, wanted in (("mean", seen.mean(axis=(0, 1, 2))), ("variance", seen.var(axis=(0, 1, 2)))):
        (found,) = trainer.values([getattr(model.get_layer("bn"), f"moving_{name}")])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_average_is_no_part_of_a_run_without_steps(make_images):
    model, inner, batches = run(make_images, width=0)
    before = trainer.values(model.trainable_variables)
    fit(model, Classification(), EMA(inner), batches, epochs=0)
    assert same(trainer.values(model.trainable_variables), before)


def test_averages_survive_their_configuration():
    inner = make_optimizer("sgd", 0.1, momentum=0.7)
    for optimizer in (EMA(inner, 0.5), SWA(inner, 4, 3)):
        again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer))))
        assert type(again) is type(optimizer) and again.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda inner: EMA(inner, 1.0), "decay .* must be at least 0 and below 1, got 1.0"),
        (lambda inner: SWA(inner, 0), "at least 1 step, every at least 1; got 0 and 1"),
    ],
)
def test_bad_averages_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(make_optimizer("sgd", 0.1))


# Lookahead


def softmax_slope(weights, x, labels):
    """The gradients of softmax regression in double: kernel and bias."""
    scores = x @ weights[0] + weights[1]
    apart = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(weights[1].size)[labels]
    return x.T @ apart / len(x), apart.mean(axis=0)


@pytest.mark.parametrize(("every", "decay"), [(5, 0.95), (4, 0.95), (1, 0.9), (3, 0.0), (20, 0.95)])
def test_lookahead_follows_its_reference(every, decay):
    """12 steps of 10, the last two of which keep no more than the tenth; slow weights and fast ones after each."""
    inputs = keras.Input((5,))
    model = keras.Model(inputs, logits(3)(inputs))
    initialize(model, 0)
    x, labels = np.random.default_rng(0).normal(size=(6, 5)), np.arange(6, dtype=np.int32) % 3
    fast = [array.astype(np.float64) for array in trainer.values(model.variables)]
    slow = fast
    optimizer = Lookahead(make_optimizer("sgd", 1.0, momentum=0.0), total=10, every=every, decay=decay)
    optimizer.build(model.trainable_variables)
    runner = trainer.engines.create(model, Classification(), optimizer)
    for step in range(1, 13):
        take_step(runner, x.astype(np.float32), labels)
        runner.sync_variables()
        fast = [w - g for w, g in zip(fast, softmax_slope(fast, x, labels), strict=True)]
        if step % every == 0:
            kept = decay**every * min(step / 10, 1) ** 3
            slow = fast = [kept * s + (1 - kept) * f for s, f in zip(slow, fast, strict=True)]
        for variables, wanted in ((model.trainable_variables, fast), (optimizer.slow, slow)):
            for found, expected in zip(trainer.values(variables), wanted, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=str(step))
        if step % every == 0:
            assert same(trainer.values(model.trainable_variables), trainer.values(optimizer.slow))
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 12


@pytest.mark.parametrize("steps", [None, 5])
def test_fit_scores_and_leaves_the_slow_weights(make_images, steps):
    """After the last step, which is none that draws back, and of a run that a callback cuts short."""
    test = make_images(10, 6, 6, seed=2)
    model, inner, batches = run(make_images, width=0)
    optimizer = Lookahead(inner, total=6, every=4)
    history = fit(
        model,
        Classification(),
        optimizer,
        batches,
        epochs=2,
        evaluations={"test": test},
        schedule=Schedule(max_steps=steps, eval_every=1),
    )
    assert same(trainer.values(model.trainable_variables), trainer.values(optimizer.slow))
    scores = evaluation.predict(trainer.engines.create(model), test[0], batches.preprocessing)
    assert score(scores, test[1])["loss"] == pytest.approx(history.epochs[-1]["test_loss"], rel=1e-6)
    twin, inner, _ = run(make_images, width=0)
    optimizer = Lookahead(inner, total=6, every=4)
    stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(twin, "stop_training", True))
    fit(twin, Classification(), optimizer, batches, epochs=2, callbacks=[stop])
    assert same(trainer.values(twin.trainable_variables), trainer.values(optimizer.slow))


def test_lookahead_goes_on_after_its_last_step(make_images):
    """A second run with the same optimizer; JAX must not give the memory of one variable away for two."""
    model, inner, batches = run(make_images, width=0)
    optimizer = Lookahead(inner, total=6, every=4)
    for _ in range(2):
        fit(model, Classification(), optimizer, batches, epochs=1)
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 6


def test_kerass_own_fit_leaves_the_slow_weights(make_images):
    model, inner, batches = run(make_images, width=0)
    optimizer = Lookahead(inner, total=4, every=3)
    images, labels = next(batches.epoch(0)).values()
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, labels, batch_size=2, epochs=2, verbose=0)
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 4
    assert same(trainer.values(model.trainable_variables), trainer.values(optimizer.slow))


def test_lookahead_survives_its_configuration():
    optimizer = Lookahead(make_optimizer("sgd", 0.1, momentum=0.7), 40, 3, 0.9)
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer))))
    assert type(again) is Lookahead and again.get_config() == optimizer.get_config()
    assert (again.total, again.every, again.decay) == (40, 3, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 0}, "at least 1 step in all and at least 1 at a time, got 0 and 5"),
        ({"total": 9, "every": 0}, "at least 1 step in all and at least 1 at a time, got 9 and 0"),
        ({"total": 9, "decay": 1.0}, "decay of the slow weights must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_lookaheads_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(make_optimizer("sgd", 0.1), **options)


# Early stopping


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "best", "over"),
    [
        ([3], 1, 0, 0, False),
        ([3, 2, 1], 1, 0, 2, False),
        ([3, 2, 2], 1, 0, 1, True),
        ([3, 2, 2.5, 2.1], 3, 0, 1, False),
        ([3, 2, 2.5, 2.1, 2.2], 3, 0, 1, True),
        ([3, 2.9, 2.8, 2.7], 3, 0.5, 0, True),
        ([3, 2.9, 2.4, 2.3], 3, 0.5, 2, False),
        ([3, float("nan"), 2], 2, 0, 2, False),
    ],
)
def test_early_stopping_waits_for_the_best(losses, patience, min_delta, best, over):
    rows, stopping = [{"validation_loss": loss} for loss in losses], EarlyStopping(patience, min_delta)
    assert (stopping.best(rows), stopping.is_over(rows)) == (best, over)


def test_early_stopping_brings_the_best_epoch_back(make_images):
    """Labels that are wrong on the validation images: the loss there soon rises."""
    images, labels = make_images(13, 6, 6)
    model, optimizer, batches = run(make_images, width=0)
    states = []
    history = fit(
        model,
        Classification(),
        optimizer,
        batches,
        epochs=20,
        early_stopping=EarlyStopping(2),
        on_epoch=lambda history: states.append(trainer.values(model.variables)),
        evaluations={"validation": (images, (labels + 1) % 3)},
    )
    losses = [row["validation_loss"] for row in history.epochs]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 20 and "test_loss" not in history.epochs[0]
    assert same(trainer.values(model.variables), states[best]) and not same(states[best], states[-1])
    scores = evaluation.predict(trainer.engines.create(model), images, batches.preprocessing)
    assert score(scores, (labels + 1) % 3)["loss"] == pytest.approx(losses[best], rel=1e-6)


def test_early_stopping_wants_images_of_its_own(make_images):
    model, optimizer, batches = run(make_images, width=0)
    with pytest.raises(ValueError, match="goes by validation_loss: give evaluations="):
        fit(model, Classification(), optimizer, batches, epochs=1, early_stopping=EarlyStopping(1))
    with pytest.raises(ValueError, match="requires a patience of at least 1 and no negative min_delta, got 0 and 0"):
        EarlyStopping(0)


# Scores


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(smoothing):
    generator = np.random.default_rng(0)
    scores, labels = 3 * generator.normal(size=(7, 4)), np.arange(7) % 4
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    expected = -(target * (scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))).sum(axis=1).mean()
    found = cross_entropy(smoothing)(ops.array(labels, "int32"), ops.array(scores, "float32"))
    assert float(ops.convert_to_numpy(found)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match="label smoothing must be at least 0 and below 1"):
        cross_entropy(smoothing)


def test_log_probabilities_of_large_logits():
    found = log_probabilities(np.array([[1000.0, 0.0], [-1e4, -1e4], [0.0, math.log(3)]], np.float32))
    expected = [[0, -1000], [-math.log(2)] * 2, [-math.log(4), math.log(3 / 4)]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


FOUR = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.0999, 0.8001], [0.25, 0.5, 0.25]]))


def test_score():
    found = score(FOUR, np.array([0, 1, 0, 1]))
    assert found == {
        "accuracy": 0.5,
        "correct": 2,
        "loss": pytest.approx(-np.log([0.7, 0.3, 0.1, 0.5]).mean()),
    }


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_confusion_matrix(dtype):
    """Row the true class, column the predicted one; a hundred classes are more than a byte's worth of cells."""
    labels, predicted = np.arange(300) % 100, (np.arange(300) * 7) % 100
    expected = np.zeros((100, 100), int)
    for row, column in zip(labels, predicted, strict=True):
        expected[row, column] += 1
    np.testing.assert_array_equal(confusion_matrix(np.eye(100)[predicted], labels.astype(dtype)), expected)


def test_top_losses():
    found = top_losses(FOUR, np.array([0, 1, 0, 2]))
    assert [(index, predicted) for index, predicted, _ in found] == [(2, 2), (1, 0), (3, 1)]
    assert [confidence for *_, confidence in found] == pytest.approx([0.8001, 0.6, 0.5])
    assert top_losses(FOUR, np.array([0, 1, 0, 2]), count=1) == found[:1]
    assert top_losses(FOUR, np.array([0, 0, 2, 1])) == []


# Runs


def network(width):
    x = inputs = keras.Input((6, 6, 3), name="image")
    if width:
        x = activation("relu", name="relu")(batch_norm(name="bn")(conv(width, 3, name="conv")(x)))
    x = dropout(0.3, name="dropout")(layers.Flatten(name="flatten")(x))
    return keras.Model(inputs, logits(3)(x), name="net")


def run(make_images, width=4, kind="sgd", seed=0):
    """Model, optimizer and batches of a run with everything that has a state; one layer where `width` is 0."""
    model = network(width)
    initialize(model, seed)
    inner = make_optimizer(kind, schedule("cosine", 0.1, 12), weight_decay=0.01)
    optimizer = LearningRateMultipliers(inner, {"bn/.*": 4.0} if width else {})
    images, labels = make_images(13, 6, 6)
    augmentation = Augmentation(True, 1, "reflect", 2)
    batches = Batches(images, labels, 4, 1, Preprocessing(mean=(0.5,), std=(0.25,)), augmentation)
    return model, optimizer, batches


class KilledError(Exception):
    pass


def kill_after(epochs):
    def on_epoch(history):
        if len(history.epochs) == epochs:
            raise KilledError

    return on_epoch


TIMES = {"seconds", "images_per_second"}


def without_times(history):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in history.epochs]


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(make_images, tmp_path):
    """To the bit: weights, statistics, optimizer, dropout's generators, history."""
    test = make_images(10, 6, 6, seed=2)
    model, optimizer, batches = run(make_images)
    whole = fit(
        model,
        Classification(label_smoothing=0.1),
        optimizer,
        batches,
        epochs=4,
        evaluations={"test": test},
        schedule=Schedule(eval_every=1),
    )
    expected = everything(model, optimizer)

    path = tmp_path / "checkpoints"
    first, optimizer, batches = run(make_images)
    with pytest.raises(KilledError):
        fit(
            first,
            Classification(label_smoothing=0.1),
            optimizer,
            batches,
            epochs=4,
            checkpoint=path,
            on_epoch=kill_after(2),
            evaluations={"test": test},
            schedule=Schedule(eval_every=1),
        )
    model, optimizer, batches = run(make_images, seed=99)  # whose own initial weights must not matter
    seen = []
    resumed = fit(
        model,
        Classification(label_smoothing=0.1),
        optimizer,
        batches,
        epochs=4,
        checkpoint=path,
        on_epoch=lambda history: seen.append(len(history.epochs)),
        evaluations={"test": test},
        schedule=Schedule(eval_every=1),
    )
    assert same(everything(model, optimizer), expected)
    assert without_times(resumed) == without_times(whole)
    assert resumed.step_losses == whole.step_losses and len(whole.step_losses) == 12
    assert seen == [2, 3, 4]  # what was already there is shown at once
    # A finished run does nothing more.
    again = fit(
        model,
        Classification(label_smoothing=0.1),
        optimizer,
        batches,
        epochs=4,
        checkpoint=path,
        evaluations={"test": test},
        schedule=Schedule(eval_every=1),
    )
    assert vars(again) == vars(resumed) and same(everything(model, optimizer), expected)


@pytest.mark.parametrize("kind", ["ema", "swa", "lookahead", "early_stopping"])
def test_what_a_regularized_run_keeps_survives_a_stop(make_images, tmp_path, kind):
    """Averages, slow weights, the best epoch so far and mixed samples too, with clipped gradients and a bound on the
    norms."""
    wrap = {
        "ema": lambda o: EMA(o, 0.9),
        "swa": lambda o: SWA(o, 6, 3),
        "lookahead": lambda o: Lookahead(o, 12, 5),
    }
    images, labels = make_images(10, 6, 6, seed=2)

    def start(seed=0, checkpoint=None, on_epoch=lambda history: None):
        model, _, batches = run(make_images, seed=seed)
        add_constraint(model, MaxNorm(0.5))
        optimizer = make_optimizer("adam", 0.01, clip_global_norm=0.5)
        optimizer = wrap.get(kind, wrap["ema"])(optimizer)
        stopping = {"early_stopping": EarlyStopping(1)} if kind not in wrap else {}
        sets = {"test": (images, labels)} | ({} if kind in wrap else {"validation": (images, labels)})
        batches = MixedBatches(batches, 3, [Mixup(), CutMix()], RandomErasing())
        history = fit(
            model,
            Classification(label_smoothing=0.1),
            optimizer,
            batches,
            epochs=4,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            evaluations=sets,
            schedule=Schedule(eval_every=1),
            **stopping,
        )
        return everything(model, optimizer), without_times(history)

    whole, rows = start()
    path = tmp_path / "checkpoints"
    with pytest.raises(KilledError):
        start(checkpoint=path, on_epoch=kill_after(2))
    for _ in range(2):  # the second time there is nothing left to do
        resumed, again = start(seed=99, checkpoint=path)
        assert same(resumed, whole) and again == rows


def test_dropout_goes_on_where_it_stopped(make_images, tmp_path):
    """The comparison above would see other masks: with another state of the generator the next losses differ."""
    losses = []
    for touch in (False, True):
        model, optimizer, batches = run(make_images, width=0)
        if touch:
            (state,) = [v for v in model.variables if "seed" in v.path]
            state.assign(np.array([5, 7], np.uint32))
        losses.append(fit(model, Classification(), optimizer, batches, epochs=1).step_losses)
    assert losses[0] != losses[1]


def test_history_of_an_epoch(make_images):
    """Against the same epoch taken by hand."""
    test = make_images(10, 6, 6, seed=2)
    model, optimizer, batches = run(make_images, width=0)
    history = fit(
        model,
        Classification(),
        optimizer,
        batches,
        epochs=1,
        evaluations={"test": test},
        schedule=Schedule(eval_every=1),
    )
    (row,) = history.epochs
    twin, twin_optimizer, _ = run(make_images, width=0)
    twin_optimizer.build(twin.trainable_variables)
    runner = trainer.engines.create(twin, Classification(), twin_optimizer)
    steps = [figures(runner.train_step(batch)) for batch in batches.epoch(0)]
    losses, correct = [float(loss) for loss, _ in steps], sum(int(count) for _, count in steps)
    tested = score(evaluation.predict(runner, test[0], batches.preprocessing), test[1])
    assert len(losses) == 3 and history.step_losses == pytest.approx(losses, rel=1e-6)  # two programs, on older XLA
    assert (row["epoch"], row["loss"], row["accuracy"]) == (1, pytest.approx(np.mean(losses)), correct / 12)
    assert (row["test_accuracy"], row["test_loss"]) == (tested["accuracy"], pytest.approx(tested["loss"]))
    assert row["learning_rate"] == pytest.approx(half_cosine(3, 0.1, 12, 0), rel=1e-5)
    assert row["seconds"] > 0 and row["images_per_second"] > 0
    assert history.seconds_to_first_step > 0 and history.compile_seconds >= 0
    assert trainer.describe(row, 5).startswith("epoch 1/5  loss ") and "test accuracy" in trainer.describe(row, 5)


@pytest.mark.parametrize(("epochs", "steps", "expected"), [(4, 5, 5), (1, 5, 3), (2, None, 6), (3, 3, 3), (0, None, 0)])
def test_steps_bound_a_run(make_images, epochs, steps, expected):
    model, optimizer, batches = run(make_images, width=0)
    history = fit(model, Classification(), optimizer, batches, epochs=epochs, schedule=Schedule(max_steps=steps))
    assert int(ops.convert_to_numpy(optimizer.iterations)) == len(history.step_losses) == expected
    assert [row["epoch"] for row in history.epochs] == list(range(1, math.ceil(expected / 3) + 1))
    if expected == 5:  # the accuracy of a part of an epoch is over the images of that part
        assert history.epochs[-1]["accuracy"] * 8 == int(history.epochs[-1]["accuracy"] * 8)


def test_a_run_keeps_its_first_losses_alone(make_images, monkeypatch):
    monkeypatch.setattr(trainer, "TRACED_STEPS", 4)
    model, optimizer, batches = run(make_images, width=0)
    assert len(fit(model, Classification(), optimizer, batches, epochs=3).step_losses) == 4


@pytest.mark.parametrize("at", [0, 1, 2, 4, 5])
def test_a_diverged_run_says_where(make_images, tmp_path, at):
    """The step whose batch holds the poisoned image, of 3 in each of 2 epochs; the last checkpoint stays."""
    images, _ = make_images(12, 6, 6)
    labels = np.zeros(12, int)
    labels[0] = 1
    model, optimizer, _ = run(make_images, width=0)
    make = lambda seed: Batches(images, labels, 4, seed, Preprocessing())  # noqa: E731
    where = lambda seed: [batch["label"].any() for epoch in (0, 1) for batch in make(seed).epoch(epoch)]  # noqa: E731
    # The second epoch is poisoned by the loss below; in the first, another seed has the image in each place.
    epoch = at // 3
    seed = next(seed for seed in range(100) if where(seed)[at])
    batches = make(seed)
    shown = batches.epoch

    def tame(number, start=0):
        keep = int(number == epoch)
        return (batch | {"label": keep * batch["label"]} for batch in shown(number, start))

    batches.epoch = tame
    plain = cross_entropy()

    def loss(labels, scores):
        return plain(labels, scores) + ops.where(ops.max(labels) > 0, float("nan"), 0.0)

    path = tmp_path / "checkpoints"
    last = f"the last good checkpoint is {path}/step-00000003.npz" if epoch else "no checkpoint was written before"
    with pytest.raises(DivergedError, match=f"the loss is nan at step {at + 1}; {last}; try a smaller --learning-rate"):
        fit(model, Classification(loss), optimizer, batches, epochs=2, checkpoint=path)
    assert path.exists() == bool(epoch)
    assert np.isfinite(everything(model, optimizer)[0]).all()  # the model can be looked at, on every backend
