"""Data sets without files: shapes and labels, reproducibility, difficulty for a linear model."""

import numpy as np
import pytest
from PIL import Image

from kvision.data import DataUnavailable, load

pytestmark = pytest.mark.backend_free

SYNTHETIC = {"shapes10": (32, 32, 3), "synthetic_digits": (28, 28, 1)}


@pytest.mark.parametrize(("name", "shape"), SYNTHETIC.items())
def test_a_synthetic_data_set_is_balanced_and_reproducible(name, shape):
    one, same, other = (load(name, seed=seed) for seed in (3, 3, 4))
    assert (one.name, one.input_shape, one.source) == (name, shape, "synthetic, seed 3")
    assert np.bincount(one.y_train).tolist() == [500] * 10
    assert np.bincount(one.y_test).tolist() == [100] * 10
    np.testing.assert_array_equal(one.x_train, same.x_train)
    np.testing.assert_array_equal(one.y_test, same.y_test)
    assert not np.array_equal(one.x_train, other.x_train)
    # No image occurs twice, in either split.
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


@pytest.fixture(scope="module")
def shapes10():
    return load("shapes10").subset(train=3000, test=500)


def test_a_linear_model_fails_on_shapes10(shapes10):
    assert 0.05 < linear_accuracy(shapes10, lambda x: x[:, ::2, ::2] / 255) < 0.3


def test_shapes10_is_learnable(shapes10):
    # The power spectrum is independent of position: with it, the same linear model suffices.
    def spectrum(x):
        x = x - x.mean((1, 2), dtype=np.float32, keepdims=True)
        power = (abs(np.fft.fft2(x, axes=(1, 2))) ** 2).sum(-1)
        power = np.fft.fftshift(power, (1, 2))[:, 6:27, 6:27]
        return np.log(power / power.mean((1, 2), keepdims=True) + 0.01)

    assert linear_accuracy(shapes10, spectrum) > 0.8


def test_synthetic_digits_are_learnable_but_not_trivial():
    assert 0.6 < linear_accuracy(load("synthetic_digits"), lambda x: x[:, ::2, ::2] / 255) < 0.97


def test_digits_are_those_of_scikit_learn():
    pytest.importorskip("sklearn")
    dataset = load("digits")
    assert (dataset.name, dataset.input_shape) == ("digits", (28, 28, 1))
    assert (len(dataset.y_train), len(dataset.y_test)) == (1437, 360)
    from sklearn.datasets import load_digits

    reference = load_digits()
    np.testing.assert_array_equal(np.concatenate([dataset.y_train, dataset.y_test]), reference.target)
    # Downsampled, each image is close to the original.
    small = [Image.fromarray(image[..., 0]).resize((8, 8), Image.Resampling.BOX) for image in dataset.x_test]
    difference = np.stack(small) * (16 / 255) - reference.images[1437:]
    assert abs(difference).mean() < 1


def test_digits_without_scikit_learn_raise_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match="pip install scikit-learn"):
        load("digits")
