"""Synthetic data sets, generated from a seed without network: ten color shapes, ten digits.

A shape is a signed distance in pixels, negative inside, so that clipping it gives an edge that is smooth over one
pixel. All images of a class are rendered at once. The same seed gives the same images on the same platform.
"""

import numpy as np

from kvision.data.dataset import Dataset

TRAIN_IMAGES, TEST_IMAGES = 5_000, 1_000


def _disc(u, v):
    return np.hypot(u, v) - 0.85


def _square(u, v):
    return np.maximum(abs(u), abs(v)) - 0.75


def _triangle(u, v):
    return np.maximum(abs(u) * 0.866 - v * 0.5, v) - 0.5


def _cross(u, v):
    u, v = abs(u), abs(v)
    return np.maximum(np.maximum(u, v) - 0.95, np.minimum(u, v) - 0.3)


def _ring(u, v):
    return abs(np.hypot(u, v) - 0.7) - 0.2


def _star(u, v):
    # Folded into one of ten equal wedges of a five-pointed star: from a tip at radius 1 to a notch at radius 0.4.
    angle = np.arctan2(u, -v)
    wedge = abs(angle - np.rint(angle / (0.4 * np.pi)) * (0.4 * np.pi))
    radius = np.hypot(u, v)
    x, y = radius * np.cos(wedge), radius * np.sin(wedge)
    notch_x, notch_y = 0.4 * np.cos(0.2 * np.pi), 0.4 * np.sin(0.2 * np.pi)
    normal = np.array([notch_y, 1 - notch_x]) / np.hypot(notch_y, 1 - notch_x)
    return (x - 1) * normal[0] + y * normal[1]


def _horizontal_stripes(u, v):
    return np.maximum(_square(u, v), abs((v * 1.8 + 0.35) % 0.9 - 0.45) / 1.8 - 0.125)


def _vertical_stripes(u, v):
    return _horizontal_stripes(v, u)


def _checker(u, v):
    # 3 x 3 cells: filled if row and column are both even or both odd.
    column, row = abs((u + 0.25) % 1 - 0.5) - 0.25, abs((v + 0.25) % 1 - 0.5) - 0.25
    return np.maximum(_square(u, v), np.maximum(np.minimum(column, -row), -np.maximum(column, -row)))


def _diamond(u, v):
    return (abs(u) + abs(v) * 0.8) * 0.78 - 0.72


SHAPES = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
    "horizontal_stripes": _horizontal_stripes,
    "vertical_stripes": _vertical_stripes,
    "checker": _checker,
    "diamond": _diamond,
}


def load_shapes10(seed: int = 0) -> Dataset:
    """Generate ten classes of 32x32 color shapes: 5,000 training and 1,000 test images, balanced over the classes.

    Position, size, rotation (up to 15 degrees, so that squares and diamonds differ), both colors, a lighting gradient
    and noise are random. No single pixel predicts the class: a linear model fails where a convolution does not.
    """
    rng = np.random.default_rng([seed, 10])
    images, labels = [], []
    for count in (TRAIN_IMAGES, TEST_IMAGES):
        y = rng.permutation(np.arange(count, dtype=np.int32) % len(SHAPES))
        x = np.empty((count, 32, 32, 3), np.uint8)
        for index, distance in enumerate(SHAPES.values()):
            x[y == index] = _render_shape(distance, int((y == index).sum()), rng)
        images.append(x)
        labels.append(y)
    return Dataset(
        "shapes10",
        images[0],
        labels[0],
        images[1],
        labels[1],
        classes=tuple(SHAPES),
        source=f"synthetic, seed {seed}",
    )


def _render_shape(distance, count: int, rng: np.random.Generator) -> np.ndarray:
    """Render (count, 32, 32, 3) uint8 images of one shape."""

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    radius = uniform(6.5, 13, 1, 1)
    room = 15.5 - radius * 0.8
    angle = uniform(-np.pi / 12, np.pi / 12, 1, 1)
    row, column = np.mgrid[:32, :32].astype(np.float32) - 15.5
    x = (column - room * uniform(-1, 1, 1, 1)) / radius
    y = (row - room * uniform(-1, 1, 1, 1)) / radius
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    ink = np.clip(0.5 - distance(u, v) * radius, 0, 1)[..., None]

    # The shape's color is the background's, moved by 70 to 170 towards the farther end of each of one to three
    # channels, so that the two are distinct.
    background = uniform(20, 235, 1, 1, 3)
    moved = uniform(0, 1, 1, 1, 3) < 0.6
    moved[np.arange(count), 0, 0, rng.integers(0, 3, count)] = True
    foreground = background + np.where(background > 127, -1, 1) * uniform(70, 170, 1, 1, 3) * moved
    light = 1 + uniform(-0.012, 0.012, 1, 1) * row + uniform(-0.012, 0.012, 1, 1) * column
    noise = rng.standard_normal((count, 32, 32, 3), np.float32) * uniform(4, 20, 1, 1, 1)
    values = (background + (foreground - background) * ink) * light[..., None] + noise
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    """Return points of an elliptic arc, angles in turns, 0 to the right and 0.25 down."""
    turns = np.linspace(start, end, 2 + round(8 * abs(end - start)))
    return [(x + rx * float(np.cos(2 * np.pi * t)), y + ry * float(np.sin(2 * np.pi * t))) for t in turns]


# Each digit is one or two pen strokes through points (x, y) in a box of -1 to 1, y down.
STROKES: tuple[tuple[list[tuple[float, float]], ...], ...] = (
    (_arc(0, 0, 0.55, 0.95, 0, 1),),
    ([(-0.3, -0.6), (0.05, -0.95), (0.05, 0.95)],),
    ([*_arc(0, -0.45, 0.5, 0.5, -0.5, 0.1), (-0.5, 0.95), (0.55, 0.95)],),
    (_arc(-0.05, -0.5, 0.5, 0.45, -0.45, 0.25) + _arc(-0.05, 0.45, 0.55, 0.5, -0.25, 0.42),),
    ([(0.15, -0.95), (-0.55, 0.3), (0.6, 0.3)], [(0.3, -0.3), (0.3, 0.95)]),
    ([(0.5, -0.95), (-0.4, -0.95), (-0.45, -0.1), *_arc(-0.05, 0.35, 0.55, 0.58, -0.35, 0.4)],),
    ([(0.35, -0.95), (-0.3, -0.2), *_arc(0, 0.42, 0.5, 0.52, -0.45, 0.6)],),
    ([(-0.55, -0.95), (0.55, -0.95), (-0.1, 0.95)],),
    (_arc(0, -0.48, 0.42, 0.46, 0.25, 1.25) + _arc(0, 0.46, 0.52, 0.5, -0.25, 0.75),),
    ([*_arc(0, -0.42, 0.5, 0.52, 0.05, 1.05), (0.45, 0.1), (0.2, 0.95)],),
)


def load_synthetic_digits(seed: int = 0) -> Dataset:
    """Generate the digits 0 to 9 from pen strokes, 28x28x1, bright on black: 5,000 training and 1,000 test images.

    Shift, scale, rotation, slant, thickness and the position of every point of a stroke are random.
    """
    rng = np.random.default_rng([seed, 28])
    images, labels = [], []
    for count in (TRAIN_IMAGES, TEST_IMAGES):
        y = rng.permutation(np.arange(count, dtype=np.int32) % len(STROKES))
        x = np.empty((count, 28, 28, 1), np.uint8)
        for index, strokes in enumerate(STROKES):
            x[y == index] = _render_strokes(strokes, int((y == index).sum()), rng)
        images.append(x)
        labels.append(y)
    return Dataset(
        "synthetic_digits",
        images[0],
        labels[0],
        images[1],
        labels[1],
        classes=tuple("0123456789"),
        source=f"synthetic, seed {seed}",
    )


def _render_strokes(strokes: tuple, count: int, rng: np.random.Generator) -> np.ndarray:
    """Render (count, 28, 28, 1) uint8 images of one digit."""

    def uniform(low, high):
        return rng.uniform(low, high, (count, 1)).astype(np.float32)

    angle, slant = uniform(-0.2, 0.2), uniform(-0.25, 0.35)
    wide, high = uniform(7, 10.5), uniform(8, 10.5)
    shift_x, shift_y = uniform(-2.5, 2.5), uniform(-2.5, 2.5)
    row, column = (axis.reshape(1, -1).astype(np.float32) - 13.5 for axis in np.mgrid[:28, :28])
    nearest = np.full((count, 28 * 28), np.inf, np.float32)
    for stroke in strokes:
        points = np.asarray(stroke, np.float32)[None] + rng.normal(0, 0.05, (count, len(stroke), 2)).astype(np.float32)
        x, y = points[..., 0] - slant * points[..., 1], points[..., 1]
        x, y = x * wide, y * high
        x, y = (
            x * np.cos(angle) - y * np.sin(angle) + shift_x,
            x * np.sin(angle) + y * np.cos(angle) + shift_y,
        )
        for i in range(len(stroke) - 1):
            ax, ay = x[:, i : i + 1], y[:, i : i + 1]
            dx, dy = x[:, i + 1 : i + 2] - ax, y[:, i + 1 : i + 2] - ay
            along = ((column - ax) * dx + (row - ay) * dy) / (dx * dx + dy * dy + 1e-6)
            np.clip(along, 0, 1, out=along)
            squared = (column - ax - along * dx) ** 2 + (row - ay - along * dy) ** 2
            np.minimum(nearest, squared, out=nearest)
    ink = np.clip(uniform(0.8, 1.9) + 0.5 - np.sqrt(nearest), 0, 1) * uniform(170, 255)
    ink += rng.standard_normal(ink.shape, np.float32) * (ink > 0) * 8
    return np.rint(ink.clip(0, 255)).astype(np.uint8).reshape(count, 28, 28, 1)
