"""The transformer against the paper's equations 3 to 7 in float64, and against PyTorch's sampler."""

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.models.spatial_transformer import (
    VARIANTS,
    SpatialTransformer,
    bilinear,
    control_points,
    thin_plate_basis,
)
from kvision.weights.initialization import initialize
from tests.arrays import Objective, noise, take_step, value

IDENTITY = np.array([1, 0, 0, 0, 1, 0], np.float32)
IMAGE = (3, 6, 5, 2)
SIZES = [None, (4, 9)]


def pixel_centers(size):
    return (np.arange(size) + 0.5) / size * 2 - 1


def sampled(image, x, y, border):
    """Values, and their slopes by x and y: sums over all pixels of the tent kernel; x, y (n, rows, columns) in pixels.

    Returns:
        values, slopes by x, slopes by y, each (n, rows, columns, c), and the weights (n, rows, columns, h, w).
    """
    height, width = image.shape[1:3]
    inside = np.ones_like(x), np.ones_like(y)
    if border == "edge":
        inside = (x > 0) & (x < width - 1), (y > 0) & (y < height - 1)
        x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)

    def tent(place, size, inside):
        offset = np.arange(size) - place[..., None]
        near = abs(offset) < 1
        return np.maximum(0, 1 - abs(offset)), np.where(offset >= 0, 1, -1) * near * inside[..., None]

    (across, slope_x), (down, slope_y) = tent(x, width, inside[0]), tent(y, height, inside[1])
    sums = (
        np.einsum("nrch,nrcw,nhwk->nrck", *pair, image) for pair in ((down, across), (down, slope_x), (slope_y, across))
    )
    return *sums, np.einsum("nrch,nrcw->nrchw", down, across)


def pixels(x, y, image_shape):
    height, width = image_shape[1:3]
    return (x + 1) * width / 2 - 0.5, (y + 1) * height / 2 - 0.5


def affine_places(theta, size):
    """Equation 1: (n, rows, columns) of x and of y, normalized."""
    y, x = np.meshgrid(pixel_centers(size[0]), pixel_centers(size[1]), indexing="ij")
    places = np.einsum("nij,jrc->nirc", theta.reshape(-1, 2, 3).astype(np.float64), np.stack([x, y, np.ones_like(x)]))
    return places[:, 0], places[:, 1]


def thin_plate_places(theta, size, points):
    """By solving for the spline's coefficients, one position at a time."""
    line = np.linspace(-1, 1, points)
    control = np.array([(x, y) for y in line for x in line])

    def bend(a, b):
        distance = np.hypot(*(a - b))
        return 0.0 if distance == 0 else 2 * distance**2 * np.log(distance)

    system = np.zeros((len(control) + 3,) * 2)
    for i, a in enumerate(control):
        system[i, : len(control)] = [bend(a, b) for b in control]
        system[i, len(control) :] = system[len(control) :, i] = 1, *a
    right = np.concatenate([control + theta.reshape(-1, len(control), 2), np.zeros((len(theta), 3, 2))], axis=1)
    coefficients = np.linalg.solve(system[None], right)
    places = np.zeros((len(theta), *size, 2))
    for i, y in enumerate(pixel_centers(size[0])):
        for j, x in enumerate(pixel_centers(size[1])):
            row = np.array([*(bend(np.array([x, y]), b) for b in control), 1, x, y])
            places[:, i, j] = row @ coefficients
    return places[..., 0], places[..., 1]


def thetas(kind, n=3, points=3):
    """Return transformations that sample outside the image, too."""
    if kind == "affine":
        return IDENTITY + noise(n, 6, seed=4) * np.float32(0.4)
    return noise(n, 2 * points**2, seed=5) * np.float32(0.6)


def places(kind, theta, size):
    return affine_places(theta, size) if kind == "affine" else thin_plate_places(theta, size, 3)


def transform(layer, image, theta):
    return ops.convert_to_numpy(layer([ops.convert_to_tensor(image), ops.convert_to_tensor(theta)]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("border", ["zeros", "edge"])
@pytest.mark.parametrize("kind", ["affine", "thin_plate"])
def test_the_papers_equations(kind, border, size):
    image, theta = noise(*IMAGE), thetas(kind)
    layer = SpatialTransformer(kind, size, points=3, border=border)
    x, y = pixels(*places(kind, theta, size or IMAGE[1:3]), IMAGE)
    expected = sampled(image, x, y, border)[0]
    assert ((x < 0) | (x > 4)).any() and ((y < -1) | (y > 6)).any()
    found = transform(layer, image, theta)
    assert found.shape == layer.compute_output_shape([IMAGE, theta.shape]) == (3, *(size or IMAGE[1:3]), 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the peer is PyTorch's")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("border", ["zeros", "edge"])
def test_affine_equals_pytorch(border, size):
    """Values and both gradients."""
    import torch

    image = torch.tensor(noise(*IMAGE), requires_grad=True)
    theta = torch.tensor(thetas("affine"), requires_grad=True)
    coefficients = torch.tensor(noise(3, *(size or IMAGE[1:3]), 2, seed=6))
    found = SpatialTransformer("affine", size, border=border)([image, theta])
    grid = torch.nn.functional.affine_grid(theta.reshape(-1, 2, 3), (3, 2, *(size or IMAGE[1:3])), align_corners=False)
    mode = {"zeros": "zeros", "edge": "border"}[border]
    planes = torch.nn.functional.grid_sample(image.permute(0, 3, 1, 2), grid, padding_mode=mode, align_corners=False)
    peer = planes.permute(0, 2, 3, 1)
    torch.testing.assert_close(found, peer, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad((y * coefficients).sum(), (image, theta)) for y in (found, peer))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class Given(keras.layers.Layer):
    """A layer that returns a trainable tensor instead of its input."""

    def __init__(self, start, **options):
        super().__init__(**options)
        self.start = start

    def build(self, input_shape):
        self.values = self.add_weight(shape=self.start.shape, initializer="zeros", name="values")
        self.values.assign(self.start)

    def call(self, x):
        return ops.convert_to_tensor(self.values)

    def compute_output_shape(self, input_shape):
        return (None, *self.start.shape[1:])


@pytest.mark.parametrize("border", ["zeros", "edge"])
@pytest.mark.parametrize("kind", ["affine", "thin_plate"])
def test_gradients(kind, border):
    """Of a sum of squares, in a compiled step: to the image by the weights, to theta by equations 6 and 7."""
    image, theta, target = noise(*IMAGE), thetas(kind), noise(*IMAGE, seed=6)
    inputs = keras.Input((1,))
    given = [Given(start)(inputs) for start in (image, theta)]
    model = keras.Model(inputs, SpatialTransformer(kind, points=3, border=border)(given))
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(model.trainable_variables)
    runner = engine.create(
        model, Objective(lambda _, outputs: ops.sum(ops.square(ops.subtract(outputs, target))) / 2), optimizer
    )
    take_step(runner, np.zeros((3, 1), np.float32), np.zeros(IMAGE[:-1], np.int32))
    runner.sync_variables()
    to_image, to_theta = (start - value(v) for start, v in zip((image, theta), model.trainable_variables, strict=True))

    x, y = places(kind, theta, IMAGE[1:3])
    values, slope_x, slope_y, weights = sampled(image, *pixels(x, y, IMAGE), border)
    coefficients = values - target
    np.testing.assert_allclose(to_image, np.einsum("nrchw,nrck->nhwk", weights, coefficients), atol=1e-4)
    by_x, by_y = ((slope * coefficients).sum(axis=-1) * size / 2 for slope, size in ((slope_x, 5), (slope_y, 6)))
    if kind == "affine":
        v, u = np.meshgrid(pixel_centers(6), pixel_centers(5), indexing="ij")
        expected = [(by * factor).sum(axis=(1, 2)) for by in (by_x, by_y) for factor in (u, v, 1)]
    else:
        unit = np.eye(18)
        moved = np.stack(thin_plate_places(unit, (6, 5), 3)) - np.stack(thin_plate_places(0 * unit[:1], (6, 5), 3))
        expected = [(by_x * a + by_y * b).sum(axis=(1, 2)) for a, b in zip(*moved, strict=True)]
    np.testing.assert_allclose(to_theta, np.stack(expected, axis=1), atol=2e-4)


@pytest.mark.parametrize("size", [(6, 5), (9, 4)])
def test_identity(size):
    """Exact at the image's size, and equal for both kinds at any size."""
    image = noise(*IMAGE)
    affine = transform(SpatialTransformer("affine", size), image, np.tile(IDENTITY, (3, 1)))
    plate = transform(SpatialTransformer("thin_plate", size), image, np.zeros((3, 32), np.float32))
    np.testing.assert_allclose(plate, affine, atol=2e-6)
    if size == IMAGE[1:3]:
        np.testing.assert_allclose(affine, image, atol=2e-6)


def test_known_transformations():
    """Shift by a pixel, reflection, quarter turn."""
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    turns = {
        (1, 0, 0.5, 0, 1, 0): np.pad(image[0, :, 1:, 0], ((0, 0), (0, 1))),
        (-1, 0, 0, 0, 1, 0): image[0, :, ::-1, 0],
        (1, 0, 0, 0, -1, 0): image[0, ::-1, :, 0],
        (0, -1, 0, 1, 0, 0): np.rot90(image[0, :, :, 0]),
    }
    for theta, expected in turns.items():
        found = transform(SpatialTransformer(), image, np.array([theta], np.float32))
        np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-4)


@pytest.mark.parametrize("points", [2, 3, 4])
def test_thin_plate_basis(points):
    """It interpolates the control points, and reproduces affine displacements exactly."""
    control = control_points(points)
    np.testing.assert_allclose(thin_plate_basis(control, points), np.eye(points**2), atol=1e-12)
    places = noise(50, 2)
    plane = np.array([0.3, -0.2, 0.7])
    values = control @ plane[1:] + plane[0]
    np.testing.assert_allclose(thin_plate_basis(places, points) @ values, places @ plane[1:] + plane[0], atol=1e-12)


def test_sampling_outside_the_image():
    """Zeros, or the outermost pixel, at any distance; a NaN position gives NaN."""
    image = np.full((1, 2, 3, 1), 5, np.float32)
    x = np.array([[[-1.0, -0.5, 2.5, 3.0, 1e30, -np.inf, 1]]], np.float32)
    sample = lambda border, x: ops.convert_to_numpy(bilinear(*map(ops.convert_to_tensor, (image, x, 0 * x)), border))  # noqa: E731
    np.testing.assert_array_equal(sample("edge", np.where(np.isinf(x), -1e9, x)).ravel(), 5)
    np.testing.assert_array_equal(sample("zeros", np.where(np.isinf(x), -1e9, x)).ravel(), [0, 2.5, 2.5, 0, 0, 0, 5])
    assert np.isnan(sample("zeros", np.where(np.isinf(x), np.nan, x)).ravel()).tolist() == [0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype):
    """Positions stay in full precision; only the pixels' values are rounded."""
    image, theta = noise(2, 40, 40, 1), thetas("affine", 2)
    full = transform(SpatialTransformer(), image, theta)
    layer = SpatialTransformer(dtype=f"mixed_{dtype}")
    half = layer([ops.convert_to_tensor(image), ops.convert_to_tensor(theta)])
    assert keras.backend.standardize_dtype(half.dtype) == dtype
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(half, "float32")), full, atol=0.05)


def test_configuration():
    layer = SpatialTransformer("thin_plate", (3, 7), points=5, border="edge", name="warp")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.get_config() == layer.get_config()
    assert (again.kind, tuple(again.size), again.points, again.border) == ("thin_plate", (3, 7), 5, "edge")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpatialTransformer("projective", name="warp"), "warp: kind must be .*, got 'projective'"),
        (lambda: SpatialTransformer(border="reflect", name="warp"), "warp: border must be .*, got 'reflect'"),
        (lambda: SpatialTransformer("thin_plate", points=1, name="warp"), "warp: .* at least 2 .*, got 1"),
        (lambda: SpatialTransformer(name="w").build([(None, 4, None, 1), (None, 6)]), r"w: the image must be \(n, h"),
        (lambda: SpatialTransformer(name="w").build([(None, 4, 4, 1), (None, 5)]), r"w: theta must be \(n, 6\) .*5"),
        (
            lambda: SpatialTransformer("thin_plate", name="w").build([(None, 4, 4, 1), (None, 6)]),
            r"w: theta must be \(n, 32\) for kind 'thin_plate', got \(None, 6\)",
        ),
        (
            lambda: VARIANTS["stn_affine"]((28, 27, 1), 10),
            "a spatial transformer network needs images of at least 28x28 pixels, got 28x27",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["stn_affine", "stn_thin_plate"])
def test_a_network_starts_from_the_identity(name):
    model = VARIANTS[name]((28, 29, 2), 3, filters=(4, 5))
    initialize(model, 0)
    features = [model.get_layer(layer).output for layer in ("locate_theta", "transformer")]
    images = noise(2, 28, 29, 2)
    theta, straight = map(ops.convert_to_numpy, keras.Model(model.input, features)(ops.convert_to_tensor(images)))
    identity = IDENTITY if name == "stn_affine" else 0
    assert 0 < abs(theta - identity).max() < 0.06
    assert straight.shape == images.shape
    assert abs(straight - images)[:, 2:-2, 2:-2].mean() < 0.5 * abs(images).mean()  # within a pixel, of white noise
