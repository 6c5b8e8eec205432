"""Data sets that need no file: they are whole, come from their seed, and can be learnt."""

import numpy as np
import pytest

from kvision.data import DataUnavailable, load

DRAWN = {"shapes10": (32, 32, 3), "drawn_digits": (28, 28, 1)}


@pytest.mark.parametrize(("name", "shape"), DRAWN.items())
def test_a_drawn_data_set_is_balanced_and_made_by_its_seed(name, shape):
    one, same, other = (load(name, seed=seed) for seed in (3, 3, 4))
    assert (one.name, one.input_shape, one.source) == (name, shape, "drawn from seed 3")
    assert np.bincount(one.y_train).tolist() == [500] * 10
    assert np.bincount(one.y_test).tolist() == [100] * 10
    np.testing.assert_array_equal(one.x_train, same.x_train)
    np.testing.assert_array_equal(one.y_test, same.y_test)
    assert not np.array_equal(one.x_train, other.x_train)
    # No image stands twice, in either split.
    every = np.concatenate([one.x_train, one.x_test]).reshape(6000, -1)
    assert len({image.tobytes() for image in every}) == 6000


def linear_accuracy(dataset, images):
    """Test accuracy of ridge regression on one-hot labels, images to features by `images`."""
    train, test = (images(x).reshape(len(x), -1).astype(np.float64) for x in (dataset.x_train, dataset.x_test))
    center = train.mean(0)
    train, test = train - center, test - center
    kernel = train.T @ train
    weights = np.linalg.solve(
        kernel + np.trace(kernel) / 1000 * np.eye(len(kernel)), train.T @ np.eye(10)[dataset.y_train]
    )
    return float((np.argmax(test @ weights, 1) == dataset.y_test).mean())


def test_shapes10_is_not_for_a_linear_model():
    assert 0.05 < linear_accuracy(load("shapes10"), lambda x: x[:, ::2, ::2] / 255) < 0.3


def test_shapes10_can_be_told_apart():
    # Undo what is random but the shape: ink of the strongest channel, centred and scaled, then the same linear model.
    def normal(x):
        x = x.astype(np.float32)
        # The background is the median of the border, whatever its color.
        border = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
        ink = abs(x - np.median(border, 1)[:, None, None]).max(-1)
        ink = (ink > 45).astype(np.float32)
        out = np.zeros((len(x), 16, 16), np.float32)
        for i, image in enumerate(ink):
            rows, columns = np.flatnonzero(image.sum(1) > 1), np.flatnonzero(image.sum(0) > 1)
            if len(rows) and len(columns):
                grid = [np.linspace(part[0], part[-1], 16).round().astype(int) for part in (rows, columns)]
                out[i] = image[np.ix_(*grid)]
        return out

    assert linear_accuracy(load("shapes10"), normal) > 0.8


def test_drawn_digits_can_be_learnt_but_not_at_once():
    assert 0.6 < linear_accuracy(load("drawn_digits"), lambda x: x[:, ::2, ::2] / 255) < 0.97


def test_digits_are_scikit_learns_under_their_own_name():
    pytest.importorskip("sklearn")
    dataset = load("digits")
    assert (dataset.name, dataset.input_shape) == ("digits", (28, 28, 1))
    assert (len(dataset.y_train), len(dataset.y_test)) == (1437, 360)
    from sklearn.datasets import load_digits

    reference = load_digits()
    np.testing.assert_array_equal(np.concatenate([dataset.y_train, dataset.y_test]), reference.target)
    # Shrunk again, each image is the bundled one.
    small = dataset.x_train.reshape(-1, 28, 28)[:, 2::4, 2::4][:, :7, :7]
    assert np.corrcoef(small.ravel(), reference.images[:1437, :7, :7].ravel())[0, 1] > 0.8


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match="pip install scikit-learn"):
        load("digits")
