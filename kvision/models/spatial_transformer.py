"""Spatial transformer networks: a layer that rectifies images, and networks for distorted MNIST digits.

Jaderberg, Simonyan, Zisserman and Kavukcuoglu 2015, "Spatial transformer networks", https://arxiv.org/abs/1506.02025.
A localization network computes the parameters of a transformation from the image, `SpatialTransformer` resamples the
image by it, and a classifier reads the result. All are trained by the classifier's loss alone.

Variants: `stn_cnn` is the classifier alone, `stn_affine` and `stn_thin_plate` put a transformer before it (the paper's
CNN, ST-CNN Aff and ST-CNN TPS). The classifier: 9x9 and 7x7 convolutions without padding, each followed by 2x2 max
pooling. The localization network: two 5x5 convolutions of 20 filters with 2x2 max pooling between them, on the image at
half its size, and 20 fully connected units. The classifier's widths are ours, chosen for the paper's budget of about
400,000 parameters. The paper initializes the localization network's last layer to zero weights and the identity's bias;
here the weights are small instead (a hundredth of the usual), so that all layers train from the first step.
"""

from functools import partial

import keras
import numpy as np
from keras import ops

from kvision.layers import VarianceScaling, activation, avg_pool, conv, dense, logits, max_pool
from kvision.models import Paper

PAPER = Paper(
    "Spatial transformer networks",
    "Jaderberg, Simonyan, Zisserman and Kavukcuoglu",
    2015,
    "https://arxiv.org/abs/1506.02025",
    input_shape=(28, 28, 1),
)


def pixel_centers(size: int) -> np.ndarray:
    """Return the normalized positions of a row's pixels: -1 and 1 are the outer edges of the first and last pixel."""
    return (2 * np.arange(size) + 1) / size - 1


def control_points(points: int) -> np.ndarray:
    """Return (points**2, 2) of (x, y): a square grid from -1 to 1, row by row."""
    line = np.linspace(-1, 1, points)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def thin_plate_basis(places: np.ndarray, points: int) -> np.ndarray:
    """Return the weight of each control point's displacement at each position: (n, 2) to (n, points**2).

    The thin plate spline (Bookstein 1989, https://doi.org/10.1109/34.24792) through given values v at the control
    points is linear in them: `[U, 1, x, y] @ inverse([[K, P], [P', 0]])[:, :len(v)] @ v`, with U and K of r**2 log r**2
    at the distances r to the control points and the rows (1, x, y) of the control points in P.
    """

    def kernel(a, b):
        square = ((a[:, None] - b[None]) ** 2).sum(axis=-1)
        return square * np.log(np.where(square > 0, square, 1))

    def affine(a):
        return np.concatenate([np.ones((len(a), 1)), a], axis=1)

    control = control_points(points)
    system = np.block([[kernel(control, control), affine(control)], [affine(control).T, np.zeros((3, 3))]])
    return np.concatenate([kernel(places, control), affine(places)], axis=1) @ np.linalg.inv(system)[:, : len(control)]


def bilinear(image, x, y, border: str = "zeros"):
    """Sample images bilinearly at given pixels, by gather and arithmetic: the same on every backend.

    Args:
        image: (n, h, w, c) floats; h and w are known.
        x, y: (n, rows, columns) floats, column and row; the first pixel's center is 0.
        border: "zeros", the image is surrounded by zeros; "edge", its outermost pixels extend without limit.

    Returns:
        (n, rows, columns, c) of the image's dtype, with gradients to all three; outside the image x and y have none.
    """
    if border == "zeros":
        image, x, y = ops.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))), x + 1, y + 1
    height, width, channels = image.shape[1:]
    flat = ops.reshape(image, (-1, channels))
    first = ops.arange(ops.shape(image)[0], dtype="int32")[:, None, None] * (height * width)

    def split(place, size):  # the pixels on both sides, and the fraction of the way between them
        place = ops.clip(place, 0, size - 1)
        before = ops.floor(place)
        # Clip again, because NaN must not become an index; it still appears in the result.
        index = ops.clip(ops.cast(before, "int32"), 0, size - 1)
        return index, ops.minimum(index + 1, size - 1), ops.cast(place - before, image.dtype)[..., None]

    left, right, across = split(x, width)
    upper, lower, down = split(y, height)

    def row(index):
        start, end = (ops.take(flat, first + index * width + column, axis=0) for column in (left, right))
        return start + across * (end - start)

    top = row(upper)
    return top + down * (row(lower) - top)


@keras.saving.register_keras_serializable("kvision")
class SpatialTransformer(keras.layers.Layer):
    """Resamples an image by a parametrized transformation.

    Positions are normalized: x to the right and y downwards, -1 and 1 at the outer edges of the outermost pixels (not
    their centers), so that a transformation is independent of the resolution. The affine kind is PyTorch's
    `affine_grid` and `grid_sample` with `align_corners=False`, and padding_mode "zeros" or "border".

    Called on [image, theta]: image (n, h, w, c), and theta
    - (n, 6), kind "affine": the rows of the 2x3 matrix that maps (x, y, 1) of the output to (x, y) of the image; the
      identity is (1, 0, 0, 0, 1, 0);
    - (n, 2 points**2), kind "thin_plate": (dx, dy) for each of a grid of control points of the output, from -1 to 1
      row by row: the displacement of its source in the image. A thin plate spline interpolates between them; zeros are
      the identity.

    Returns (n, *size, c) in the layer's compute dtype; positions are computed in at least float32.

    Args:
        kind: "affine" or "thin_plate".
        size: (height, width) of the output; None is the image's.
        points: control points on a side of the grid, at least 2.
        border: values outside the image, as for `bilinear`.

    Raises:
        ValueError: an unknown kind or border, too few points, an image of unknown size, a theta of another length.
    """

    def __init__(
        self,
        kind: str = "affine",
        size: tuple[int, int] | None = None,
        points: int = 4,
        border: str = "zeros",
        **options,
    ):
        super().__init__(autocast=False, **options)  # theta in bfloat16 would be inaccurate by pixels
        if kind not in ("affine", "thin_plate"):
            raise ValueError(f"{self.name}: kind must be 'affine' or 'thin_plate', got {kind!r}")
        if border not in ("zeros", "edge"):
            raise ValueError(f"{self.name}: border must be 'zeros' or 'edge', got {border!r}")
        if points < 2:
            raise ValueError(f"{self.name}: a thin plate needs at least 2 control points on a side, got {points}")
        self.kind, self.points, self.border = kind, points, border
        self.size = None if size is None else tuple(size)

    def build(self, input_shape):
        image, theta = input_shape
        if len(image) != 4 or None in image[1:]:
            raise ValueError(f"{self.name}: the image must be (n, h, w, c) with h, w and c known, got {tuple(image)}")
        length = 6 if self.kind == "affine" else 2 * self.points**2
        if tuple(theta[1:]) != (length,):
            raise ValueError(f"{self.name}: theta must be (n, {length}) for kind {self.kind!r}, got {tuple(theta)}")
        height, width = self.size or image[1:3]
        x, y = np.meshgrid(pixel_centers(width), pixel_centers(height))
        self._positions = x, y
        if self.kind == "thin_plate":
            basis = thin_plate_basis(np.stack([x.ravel(), y.ravel()], axis=-1), self.points)
            self._basis = basis.T.reshape(self.points**2, height, width)

    def call(self, inputs):
        image, theta = inputs
        height, width = image.shape[1:3]
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        constant = partial(ops.convert_to_tensor, dtype=dtype)
        theta = ops.cast(theta, dtype)
        x, y = map(constant, self._positions)
        # Sums of products, because a matrix product may have lower precision than its operands.
        if self.kind == "affine":
            a, b, c, d, e, f = (theta[:, i, None, None] for i in range(6))
            x, y = a * x + b * y + c, d * x + e * y + f
        else:
            basis, moves = constant(self._basis), ops.reshape(theta, (-1, self.points**2, 2, 1, 1))
            x, y = (place + ops.sum(moves[:, :, i] * basis, axis=1) for i, place in enumerate((x, y)))
        x, y = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
        return bilinear(ops.cast(image, self.compute_dtype), x, y, self.border)

    def compute_output_shape(self, input_shape):
        image, _ = input_shape
        return (image[0], *(self.size or image[1:3]), image[3])

    def get_config(self):
        arguments = {"kind": self.kind, "size": self.size, "points": self.points, "border": self.border}
        return {**super().get_config(), **arguments}


@keras.saving.register_keras_serializable("kvision")
class AffineIdentity(VarianceScaling):
    """Initializes the bias of a layer of affine parameters to the identity."""

    def __init__(self):
        super().__init__()

    def sample(self, shape, generator):
        return np.array([1, 0, 0, 0, 1, 0], np.float32)

    def get_config(self):
        return {}


def localization(x, kind: str):
    """Compute the parameters of `SpatialTransformer` of this kind from images (n, h, w, c)."""
    x = avg_pool(2, name="locate_half")(x)
    x = conv(20, 5, name="locate_1_conv", padding="valid", use_bias=True)(x)
    x = activation("relu", name="locate_1_relu")(x)
    x = max_pool(2, name="locate_1_pool")(x)
    x = conv(20, 5, name="locate_2_conv", padding="valid", use_bias=True)(x)
    x = activation("relu", name="locate_2_relu")(x)
    x = keras.layers.Flatten(name="locate_flatten")(x)
    x = dense(20, name="locate_hidden_dense")(x)
    x = activation("relu", name="locate_hidden")(x)
    outputs, bias = (6, AffineIdentity()) if kind == "affine" else (32, "zeros")
    small = VarianceScaling(1e-4, "in")
    options = {"bias_initializer": bias, "dtype": keras.config.floatx()}  # full precision under a mixed policy, too
    return dense(outputs, name="locate_theta", initializer=small, **options)(x)


def spatial_transformer_network(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    kind: str,
    filters: tuple[int, int] = (64, 128),
    name: str,
) -> keras.Model:
    """Build a model from images (n, h, w, c) to logits (n, classes), or to the last pooling's features if
    `classes` is 0.

    The layer `transformer` returns the rectified images, `locate_theta` the parameters.

    Args:
        kind: "affine", "thin_plate" with 16 control points, or "none", the classifier alone.
        filters: of the classifier's two convolutions.

    Raises:
        ValueError: images smaller than 28x28 pixels, which the localization network needs.
    """
    if min(input_shape[:2]) < 28:
        height, width, _ = input_shape
        raise ValueError(f"a spatial transformer network needs images of at least 28x28 pixels, got {height}x{width}")
    x = inputs = keras.Input(input_shape, name="image")
    if kind != "none":
        x = SpatialTransformer(kind, name="transformer")([x, localization(x, kind)])
    for i, (width, window) in enumerate(zip(filters, (9, 7), strict=True), start=1):
        x = conv(width, window, name=f"stage{i}_conv", padding="valid", use_bias=True)(x)
        x = activation("relu", name=f"stage{i}_relu")(x)
        x = max_pool(2, name=f"stage{i}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    outputs = logits(classes)(x) if classes else x
    return keras.Model(inputs, outputs, name=name)


VARIANTS = {
    "stn_cnn": partial(spatial_transformer_network, kind="none", name="stn_cnn"),
    "stn_affine": partial(spatial_transformer_network, kind="affine", name="stn_affine"),
    "stn_thin_plate": partial(spatial_transformer_network, kind="thin_plate", name="stn_thin_plate"),
}
