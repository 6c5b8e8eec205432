"""Test-time augmentation against a pixel-by-pixel reference, and the mean of its logits."""

import keras
import numpy as np
import pytest

from kvision.data.preprocessing import Preprocessing
from kvision.data.tta import TTA, augmented_views
from kvision.layers import logits
from kvision.training import evaluation, trainer
from kvision.weights.initialization import initialize
from tests.test_batches import mirrored

# For each view: the source (row, column) of a view's pixel (row, column) in an image of this width.
SOURCES = {
    "as it is": (lambda row, column, width: (row, column)),
    "mirrored": (lambda row, column, width: (row, width - 1 - column)),
    "up and left": (lambda row, column, width: (row + 1, column + 1)),
    "up and left, mirrored": (lambda row, column, width: (row + 1, width - column)),
    "down and right": (lambda row, column, width: (row - 1, column - 1)),
    "down and right, mirrored": (lambda row, column, width: (row - 1, width - 2 - column)),
}
EXPECTED = {
    "none": {"as it is": 1},
    "flip": {"as it is": 1 / 2, "mirrored": 1 / 2},
    "flip_shift": {place: 1 / 4 if place in ("as it is", "mirrored") else 1 / 8 for place in SOURCES},
}


def reference(images, place):
    height, width = images.shape[1:3]
    view = np.empty_like(images)
    for row in range(height):
        for column in range(width):
            source, origin = SOURCES[place](row, column, width)
            view[:, row, column] = images[:, mirrored(source, height), mirrored(origin, width)]
    return view


@pytest.mark.parametrize("name", TTA)
def test_views_equal_the_reference(make_images, name):
    images, _ = make_images(3, 5, 7)
    found = list(augmented_views(images, name))
    assert [weight for weight, _ in found] == list(EXPECTED[name].values())
    for (_, view), place in zip(found, EXPECTED[name], strict=True):
        assert view.dtype == np.uint8
        np.testing.assert_array_equal(view, reference(images, place), err_msg=place)


def test_an_unknown_name_raises(make_images):
    with pytest.raises(ValueError, match="tta must be one of none, flip, flip_shift, got 'zoomed'"):
        list(augmented_views(make_images(1)[0], "zoomed"))


@pytest.mark.parametrize("name", TTA)
def test_predictions_are_mean_logits(make_images, name):
    """The weighted mean over the views of all images, including the last incomplete batch."""
    inputs = keras.Input((5, 7, 3))
    outputs = logits(4)(keras.layers.Dense(6, "tanh")(keras.layers.Flatten()(inputs)))
    model = keras.Model(inputs, outputs)
    initialize(model, 0)
    engine, preprocessing = trainer.engines.create(model), Preprocessing(mean=(0.5,), std=(0.25,))
    images, _ = make_images(8, 5, 7)
    found = evaluation.predict(engine, images, preprocessing, 3, tta=name)
    expected = sum(
        weight * engine.predict(preprocessing(reference(images, place))).astype(np.float64)
        for place, weight in EXPECTED[name].items()
    )
    assert found.shape == (8, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    alone = evaluation.predict(engine, images, preprocessing, 3)
    assert np.array_equal(found, alone) == (name == "none")
