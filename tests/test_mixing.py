"""Mixup, CutMix and random erasing against loops in NumPy; frozen parameters; use in training."""

import hashlib

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.data.batches import Batches
from kvision.data.mixing import CutMix, MixedBatches, Mixup, RandomErasing
from kvision.data.preprocessing import Preprocessing
from kvision.layers import logits
from kvision.random import rng
from kvision.tasks.classification import Classification
from kvision.training.optimizers import make_optimizer
from kvision.training.trainer import fit
from kvision.weights.initialization import initialize
from tests.arrays import noise

TARGETS = np.eye(3, dtype=np.float32)[np.arange(7) % 3]


def applied(kind, images, targets, params):
    found = kind.apply(ops.convert_to_tensor(images), ops.convert_to_tensor(targets), params)
    return [ops.convert_to_numpy(tensor) for tensor in found]


# The closed forms


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_blends_images_and_targets(lam):
    images, permutation = noise(7, 5, 6, 3), np.array([3, 1, 0, 6, 5, 4, 2], np.int32)
    found, targets = applied(Mixup(), images, TARGETS, {"lam": np.float32(lam), "permutation": permutation})
    for i, j in enumerate(permutation):
        np.testing.assert_allclose(found[i], lam * images[i] + (1 - lam) * images[j], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(targets[i], lam * TARGETS[i] + (1 - lam) * TARGETS[j], rtol=1e-6, atol=1e-7)
    assert found.dtype == targets.dtype == np.float32


@pytest.mark.parametrize("box", [(1, 3, 2, 6), (0, 5, 0, 6), (2, 2, 3, 3), (4, 5, 0, 1)])
def test_cutmix_pastes_a_rectangle_and_mixes_targets_by_area(box):
    images, permutation = noise(7, 5, 6, 3), np.array([3, 1, 0, 6, 5, 4, 2], np.int32)
    found, targets = applied(CutMix(), images, TARGETS, {"box": np.array(box, np.int32), "permutation": permutation})
    top, bottom, left, right = box
    lam = 1 - (bottom - top) * (right - left) / 30
    for i, j in enumerate(permutation):
        expected = images[i].copy()
        expected[top:bottom, left:right] = images[j, top:bottom, left:right]
        np.testing.assert_array_equal(found[i], expected)
        np.testing.assert_allclose(targets[i], lam * TARGETS[i] + (1 - lam) * TARGETS[j], rtol=1e-6, atol=1e-7)


def test_erasing_puts_noise_into_each_rectangle():
    images, grain = noise(7, 5, 6, 3), noise(7, 5, 6, 3, seed=1)
    boxes = np.array([[0, 0, 0, 0], [1, 3, 2, 6], [0, 5, 0, 6], [4, 5, 5, 6], [2, 2, 1, 4], [0, 1, 0, 6], [3, 5, 0, 2]])
    found, targets = applied(RandomErasing(), images, TARGETS, {"box": boxes.astype(np.int32), "noise": grain})
    for i, (top, bottom, left, right) in enumerate(boxes):
        expected = images[i].copy()
        expected[top:bottom, left:right] = grain[i, top:bottom, left:right]
        np.testing.assert_array_equal(found[i], expected)
    np.testing.assert_array_equal(targets, TARGETS)


# Parameters. The digests are of this order.
ORDER = ("box", "noise", "permutation", "lam")


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_samples_from_beta(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); the permutation is one."""
    generator = np.random.default_rng(0)
    params = [Mixup(alpha).make_params(generator, (6, 4, 4, 3)) for _ in range(4000)]
    lams = np.array([row["lam"] for row in params], np.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert lams.mean() == pytest.approx(0.5, abs=4 * np.sqrt(variance / 4000))
    assert lams.var() == pytest.approx(variance, rel=0.1)
    assert all(sorted(row["permutation"]) == list(range(6)) for row in params[:50])
    assert len({tuple(row["permutation"]) for row in params}) > 600  # of 720


def test_cutmix_samples_rectangles_around_uniform_centers():
    generator = np.random.default_rng(0)
    boxes = np.array([CutMix().make_params(generator, (2, 32, 16, 3))["box"] for _ in range(4000)])
    top, bottom, left, right = boxes.T
    assert (top >= 0).all() and (bottom <= 32).all() and (left >= 0).all() and (right <= 16).all()
    assert (top <= bottom).all() and (left <= right).all()
    # A rectangle that is not clipped has the image's proportions, up to rounding.
    whole = (top > 0) & (bottom < 32) & (left > 0) & (right < 16)
    assert (abs((bottom - top)[whole] / 2 - (right - left)[whole]) <= 2).all() and whole.sum() > 500
    # The center is uniform and the relative side sqrt(1 - uniform), of density 2 s: 1/4 are below half of the image.
    middle = whole & (bottom - top < 16)
    assert (bottom - top < 15).mean() > 0.25  # clipping makes some smaller
    assert np.corrcoef(top[middle] + bottom[middle], left[middle] + right[middle])[0, 1] == pytest.approx(0, abs=0.1)


def test_erasing_samples_areas_and_aspects_in_their_range():
    kind, generator = RandomErasing(0.5), np.random.default_rng(0)
    boxes = kind.make_params(generator, (4000, 40, 60, 1))["box"]
    top, bottom, left, right = boxes.T
    height, width = bottom - top, right - left
    erased = height * width > 0
    assert erased.mean() == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 4000))
    height, width = height[erased], width[erased]
    # Sides are truncated to integers.
    assert ((height + 1) * (width + 1) > 0.02 * 2400).all() and (height * width <= 0.4 * 2400).all()
    assert ((height + 1) / width > 0.3).all() and (height / (width + 1) < 1 / 0.3).all()
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= 40).all() and (right <= 60).all()
    assert top[erased].min() == 0 and bottom[erased].max() == 40 and right[erased].max() == 60


def test_erased_areas_are_uniform():
    boxes = RandomErasing(1.0, aspect=1.0).make_params(np.random.default_rng(0), (2000, 400, 400, 1))["box"]
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 400**2
    np.testing.assert_allclose(np.quantile(areas, [0, 0.25, 0.5, 0.75, 1]), [0.02, 0.115, 0.21, 0.305, 0.4], atol=0.015)


def test_an_image_without_a_fitting_rectangle_is_unchanged():
    boxes = RandomErasing(1.0, area=(0.7, 0.9)).make_params(np.random.default_rng(0), (2000, 10, 10, 1))["box"]
    fits = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) > 0
    assert 1000 < fits.sum() < 2000 and (boxes >= 0).all() and (boxes <= 10).all()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Mixup(0.4), "5cf048c46a5b6a42"),
        (CutMix(1.0), "8e2020a4e31cf6ad"),
        (RandomErasing(0.7), "06db14cb9c86971d"),
    ],
    ids=["mixup", "cutmix", "erasing"],
)
def test_params_are_frozen(kind, expected):
    """The same numbers on every backend and every machine."""
    params = kind.make_params(rng(3, "samples", 1, 2), (16, 8, 8, 3))
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(params[name]).tobytes() for name in ORDER if name in params))
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(0), "mixup: alpha of the distribution .* must be positive, got 0"),
        (lambda: CutMix(-1.0), "CutMix: alpha.* got -1.0"),
        (lambda: RandomErasing(1.5), "the probability must be from 0 to 1, got 1.5"),
        (lambda: RandomErasing(area=(0.5, 0.1)), r"areas must be in order.*got \(0.5, 0.1\) and 0.3"),
        (lambda: RandomErasing(aspect=3.0), "got .* and 3.0"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In a run


def batches(make_images, n=13):
    return Batches(*make_images(n, 6, 6), 4, 1, Preprocessing(mean=(0.5,), std=(0.25,)))


def test_each_batch_is_a_function_of_seed_epoch_and_step(make_images):
    plain = batches(make_images)
    mixed = MixedBatches(plain, 3, [Mixup(1.0), CutMix(1.0)], RandomErasing(0.5))
    assert (mixed.steps, mixed.batch_size, mixed.preprocessing) == (3, 4, plain.preprocessing)
    to_numpy = lambda pairs: [[ops.convert_to_numpy(tensor) for tensor in pair.values()] for pair in pairs]  # noqa: E731
    second = to_numpy(mixed.epoch(1))
    for (found, targets), (images, labels), step in zip(
        second, map(dict.values, plain.epoch(1)), range(3), strict=True
    ):
        generator = rng(1, "samples", 1, step)
        one_hot = np.eye(3, dtype=np.float32)[labels]
        kind = (Mixup(1.0), CutMix(1.0))[generator.integers(2)]
        for one in (kind, RandomErasing(0.5)):
            images, one_hot = applied(one, images, one_hot, one.make_params(generator, images.shape))
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(targets, one_hot)
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
        assert found.shape == images.shape and targets.dtype == found.dtype == np.float32
    for again, first in zip(to_numpy(mixed.epoch(1)), second, strict=True):
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])
    for again, first in zip(to_numpy(mixed.epoch(1, 1)), second[1:], strict=True):
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])


def test_each_batch_gets_one_of_two_transforms(make_images):
    mixed = MixedBatches(batches(make_images, 400), 3, [Mixup(1.0), CutMix(1.0)])
    plain = [np.sort(images.ravel()) for images, _ in map(dict.values, batches(make_images, 400).epoch(0))]
    pairs = zip(mixed.epoch(0), plain, strict=True)
    # CutMix keeps existing values; mixup makes new ones.
    cut = [np.isin(ops.convert_to_numpy(batch["image"]).ravel(), values).all() for batch, values in pairs]
    assert 30 < sum(cut) < 70


def test_a_run_trains_on_mixed_batches(make_images):
    """Steps of softmax regression on mixed batches are those of the closed form."""
    inputs = keras.Input((6, 6, 3), name="image")
    model = keras.Model(inputs, logits(3)(keras.layers.Flatten(name="flatten")(inputs)), name="net")
    initialize(model, 0)
    mixed = MixedBatches(batches(make_images), 3, [Mixup(0.5)], RandomErasing(0.3))
    weights, bias = (ops.convert_to_numpy(v.value).astype(np.float64) for v in model.trainable_variables)
    losses, hits = [], 0
    for images, targets in map(dict.values, mixed.epoch(0)):
        x, t = (ops.convert_to_numpy(tensor).astype(np.float64) for tensor in (images, targets))
        x = x.reshape(4, -1)
        scores = x @ weights + bias
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        losses.append(-(t * np.log(p)).sum(axis=1).mean())
        hits += (scores.argmax(axis=1) == t.argmax(axis=1)).sum()
        weights, bias = weights - 0.01 * x.T @ (p - t) / 4, bias - 0.01 * (p - t).mean(axis=0)
    optimizer = make_optimizer("sgd", 0.01, momentum=0.0)
    history = fit(model, Classification(), optimizer, mixed, epochs=1)
    np.testing.assert_allclose(history.step_losses, losses, rtol=1e-4)
    assert history.epochs[0]["accuracy"] == hits / 12
    found = ops.convert_to_numpy(model.trainable_variables[0].value)
    np.testing.assert_allclose(found, weights, rtol=1e-3, atol=1e-5)
    # Inference does not mix.
    images = noise(5, 6, 6, 3)
    again = [engine.create(model).predict(images) for _ in range(2)]
    np.testing.assert_array_equal(*again)
