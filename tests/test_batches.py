"""Batches and augmentation against a simple reference that handles one image at a time."""

import itertools

import numpy as np
import pytest

from kvision.data.batches import Augmentation, Batches
from kvision.data.preprocessing import Preprocessing
from kvision.random import rng

PREPROCESSING = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def build_batches(make_images, augmentation=None, n=11, batch_size=4, seed=5, height=6, width=7):
    images, _ = make_images(n, height, width)
    return Batches(images, np.arange(n), batch_size, seed, PREPROCESSING, augmentation), images


def raw(batches, epoch):
    """Return the uint8 images of an epoch and their indices."""
    shown, numbers = [], []
    for images, labels in map(dict.values, batches.epoch(epoch)):
        stored = (images * PREPROCESSING.std + np.array(PREPROCESSING.mean)) * 255
        shown.append(np.rint(stored).astype(np.uint8))
        numbers.append(labels)
    return np.concatenate(shown), np.concatenate(numbers)


def mirrored(index, size):
    """Return the position in 0..size-1 that a reflection at each end maps to `index`."""
    while not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index


def reference(image, flipped, move, padding_mode, center, cutout):
    """Augment one image pixel by pixel: cropped, then flipped, then cut out."""
    height, width = image.shape[:2]
    moved = np.zeros_like(image)
    for i, j in itertools.product(range(height), range(width)):
        row, column = i + move[0], j + move[1]
        if padding_mode == "reflect":
            row, column = mirrored(row, height), mirrored(column, width)
        if 0 <= row < height and 0 <= column < width:
            moved[i, width - 1 - j if flipped else j] = image[row, column]
    for i, j in itertools.product(range(height), range(width)):
        if cutout and all(0 <= at - c + cutout // 2 < cutout for at, c in zip((i, j), center, strict=True)):
            moved[i, j] = 0
    return moved


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("crop_padding", "padding_mode"), [(0, "zero"), (2, "zero"), (2, "reflect"), (7, "reflect")])
@pytest.mark.parametrize("cutout", [0, 3, 4])
def test_an_epoch_equals_the_reference(make_images, flip, crop_padding, padding_mode, cutout):
    batches, images = build_batches(make_images, Augmentation(flip, crop_padding, padding_mode, cutout))
    mirror_first = rng(5, "flip").random(11) < 0.5
    for epoch in (0, 3):
        order = rng(5, "order", epoch).permutation(11)
        steps = list(batches.epoch(epoch))
        assert len(steps) == batches.steps == 2
        for step, (shown, labels) in enumerate(map(dict.values, steps)):
            indices = order[4 * step : 4 * step + 4]
            np.testing.assert_array_equal(labels, indices)
            assert (labels.dtype, shown.dtype) == (np.int32, np.float32)
            draws = rng(5, "augment", epoch, step)
            moves = (
                draws.integers(0, 2 * crop_padding + 1, (2, 4)).T - crop_padding
                if crop_padding
                else np.zeros((4, 2), int)
            )
            centers = draws.integers(0, (6, 7), (4, 2)) if cutout else np.zeros((4, 2), int)
            for image, index, move, center in zip(shown, indices, moves, centers, strict=True):
                flipped = flip and mirror_first[index] != (epoch % 2 == 1)
                expected = reference(images[index], flipped, move, padding_mode, center, cutout)
                np.testing.assert_array_equal(image, PREPROCESSING(expected[None])[0])


def test_an_epoch_contains_every_image_once(make_images):
    batches, images = build_batches(make_images, n=12)
    shown, numbers = raw(batches, 0)
    assert sorted(numbers) == list(range(12))
    np.testing.assert_array_equal(shown, images[numbers])


def test_every_epoch_drops_other_images(make_images):
    batches, _ = build_batches(make_images, n=11)
    epochs = [set(raw(batches, epoch)[1]) for epoch in range(12)]
    assert all(len(numbers) == 8 for numbers in epochs)
    assert len({frozenset(numbers) for numbers in epochs}) > 6
    assert set.union(*epochs) == set(range(11))


def test_two_epochs_flip_every_image_once(make_images):
    batches, images = build_batches(make_images, Augmentation(flip=True), n=12)
    sides = []
    for epoch in range(4):
        shown, numbers = raw(batches, epoch)
        plain = {i for image, i in zip(shown, numbers, strict=True) if (image == images[i]).all()}
        turned = {i for image, i in zip(shown, numbers, strict=True) if (image == images[i, :, ::-1]).all()}
        assert plain | turned == set(range(12)) and plain and turned
        sides.append(plain)
    assert sides[0] == sides[2] == set(range(12)) - sides[1] == set(range(12)) - sides[3]


def test_half_of_the_images_are_flipped(make_images):
    batches, _ = build_batches(make_images, Augmentation(flip=True), n=4000, height=1, width=1)
    assert abs(batches.flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("cutout", [1, 4, 5])
def test_cutout_blanks_a_square(cutout):
    white = np.full((200, 12, 9, 1), 255, np.uint8)
    batches = Batches(white, np.zeros(200, int), 200, 0, Preprocessing(), Augmentation(cutout=cutout))
    images = next(batches.epoch(0))["image"]
    sizes = set()
    for image in images[..., 0]:
        rows, columns = np.nonzero(image == 0)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == len(rows) and max(height, width) <= cutout
        sizes.add((height, width))
    # Complete in the middle, clipped at the border.
    assert (cutout, cutout) in sizes and (cutout == 1 or min(sizes)[0] < cutout)


def test_crops_are_uniform(make_images):
    """Each of the 25 crops at padding 2 is about equally frequent: chi-squared with 24 degrees of freedom."""
    image = np.zeros((1, 5, 5, 1), np.uint8)
    image[0, 2, 2] = 255
    batches = Batches(
        np.repeat(image, 5000, 0), np.zeros(5000, int), 5000, 0, Preprocessing(), Augmentation(crop_padding=2)
    )
    images = next(batches.epoch(0))["image"]
    counts = images.sum(axis=0).ravel()
    assert ((counts - 200) ** 2 / 200).sum() < 24 + 5 * np.sqrt(2 * 24)


def test_epochs_depend_on_seed_and_number_alone(make_images):
    everything = Augmentation(True, 2, "reflect", 3)
    first, second, other = (build_batches(make_images, everything, seed=seed)[0] for seed in (5, 5, 6))
    for _ in second.epoch(0):
        break  # an interrupted run
    list(second.epoch(2))
    a, b, c = (raw(batches, 1) for batches in (first, second, other))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert (a[1] != c[1]).any() and (a[1] != raw(first, 2)[1]).any()


def test_stored_images_are_not_modified(make_images):
    batches, images = build_batches(make_images, Augmentation(True, 0, "zero", 3))
    kept = images.copy()
    for epoch in range(2):
        list(batches.epoch(epoch))
    np.testing.assert_array_equal(images, kept)


def test_the_batch_size_is_at_most_the_number_of_images(make_images):
    batches, _ = build_batches(make_images, n=3, batch_size=100)
    assert (batches.batch_size, batches.steps) == (3, 1)
    assert len(next(batches.epoch(0))["label"]) == 3


@pytest.mark.parametrize(
    ("images", "labels", "batch_size", "message"),
    [
        (0, 0, 4, "got 0 and 4"),
        (4, 4, 0, "got 4 and 0"),
        (4, 3, 2, "one label per image, got 4 images and 3 labels"),
    ],
)
def test_invalid_arguments_raise(images, labels, batch_size, message):
    with pytest.raises(ValueError, match=message):
        Batches(np.zeros((images, 2, 2, 1), np.uint8), np.zeros(labels, int), batch_size, 0, Preprocessing())


GRAY = np.linspace(0, 1, 4 * 2 * 2).reshape(4, 2, 2, 1)
FAULTS = {
    "floats": (
        GRAY.astype(np.float32),
        None,
        TypeError,
        r"must be uint8, 0 to 255, got float32; .*value_range=\(0, 1\)",
    ),
    "int64": ((255 * GRAY).astype(int), None, TypeError, "got int64"),
    "flags": (GRAY > 0.5, None, TypeError, "array of bool"),
    "a list": (GRAY.tolist(), None, TypeError, "got list"),
    "255 in 0..1": (255 * GRAY, (0, 1), ValueError, r"must lie in 0\.\.1 as stated, got"),
    "300 in 0..255": (300 * GRAY, (0, 255), ValueError, r"must lie in 0\.\.255 as stated"),
    "nan": (np.where(GRAY > 0.9, np.nan, GRAY), (0, 1), ValueError, "nan"),
    "below 0": (GRAY - 0.1, (0, 1), ValueError, "must lie in"),
    "uint8 in 0..1": ((255 * GRAY).astype(np.uint8), (0, 1), ValueError, "must be floats, got uint8"),
    "another range": (GRAY, (-1, 1), ValueError, "value_range must be"),
    "three axes": (np.zeros((4, 2, 2), np.uint8), None, ValueError, r"got \(4, 2, 2\)"),
    "no pixels": (np.zeros((4, 0, 2, 1), np.uint8), None, ValueError, "must have pixels"),
}


@pytest.mark.parametrize(("images", "value_range", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_images_that_would_be_truncated_raise(images, value_range, kind, message):
    """Floats in 0..1 would silently become black images."""
    with pytest.raises(kind, match=message):
        Batches(images, [0, 1, 2, 3], 2, 0, Preprocessing(), value_range=value_range)


@pytest.mark.parametrize(
    ("images", "value_range"),
    [
        (GRAY, (0, 1)),
        (GRAY.astype(np.float16), (0, 1)),
        (255 * GRAY, (0, 255)),
        (np.rint(255 * GRAY).astype(int), (0, 255)),
    ],
)
def test_images_of_a_stated_range_become_uint8(images, value_range):
    kept = images.copy()
    batches = Batches(images, np.arange(4), 4, 0, Preprocessing(), value_range=value_range)
    assert batches.padded.dtype == np.uint8
    np.testing.assert_allclose(batches.padded, 255 * GRAY, atol=0.5 if images.dtype != np.float16 else 0.6)
    np.testing.assert_array_equal(images, kept)


@pytest.mark.parametrize(
    ("labels", "classes", "kind", "message"),
    [
        ([0.0, 1.0, 0.5], None, TypeError, "integers, the classes' indices, got float64"),
        (np.array([0, 1, 1], np.float32), None, TypeError, "got float32"),
        ([True, False, True], None, TypeError, "got bool"),
        (["0", "1", "1"], None, TypeError, "integers"),
        ([[1, 0], [0, 1], [1, 0]], None, ValueError, r"shape \(n,\).*got \(3, 2\)"),
        ([0, -1, 1], None, ValueError, r"must lie in 0\.\.\d+, got -1 to 1"),
        ([0, 1, 2], 2, ValueError, r"must lie in 0\.\.1, got 0 to 2"),
        (np.array([0, 1, 2**40]), None, ValueError, "must lie in"),
    ],
)
def test_labels_that_would_be_truncated_raise(labels, classes, kind, message):
    with pytest.raises(kind, match=message):
        Batches(np.zeros((3, 2, 2, 1), np.uint8), labels, 2, 0, Preprocessing(), classes=classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mode": "wrap"}, "padding_mode must be one of zero, reflect, got 'wrap'"),
        ({"crop_padding": -1}, "got -1 and 0"),
        ({"cutout": -2}, "got 0 and -2"),
    ],
)
def test_invalid_augmentations_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_generators_depend_on_the_whole_key():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a", 12), (0, "a", 1, 2), (0,), (0, "a1")]
    assert len({rng(*key).integers(2**63) for key in keys}) == len(keys)
    assert rng(0, "a", 1).integers(2**63) == rng(0, "a", "1").integers(2**63)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_an_epoch_can_start_at_a_step(make_images, monkeypatch, start):
    """It gives the same batches as the whole epoch from there; earlier ones are not made."""
    whole, _ = build_batches(make_images, Augmentation(True, 2, "reflect", 3), n=14)
    expected = list(whole.epoch(1))
    assert len(expected) == 3
    made, images = [], Batches.images
    monkeypatch.setattr(Batches, "images", lambda *arguments: made.append(1) or images(*arguments))
    found = list(whole.epoch(1, start))
    assert len(made) == len(found) == 3 - start
    for pair, wanted in zip(found, expected[start:], strict=True):
        for array, other in zip(pair.values(), wanted.values(), strict=True):
            np.testing.assert_array_equal(array, other)
