import gc
import signal

import keras  # noqa: F401 (imported before the line below)
import numpy as np
import pytest

# A backend is a million objects: passing over them in every collection takes longer than many a test.
gc.collect()
gc.freeze()

# A shell's job in the background begins with Ctrl-C ignored, and so would the tests of it and their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def numpy_seed():
    """Seeds NumPy's global generator, from which `kvision.layers.VarianceScaling` draws when Keras calls it."""
    np.random.seed(0)


@pytest.fixture
def make_images():
    """`make_images(n, height, width, channels)`: uint8 noise, and labels 0, 1, 2, 0 ... as int32."""

    def draw(n=12, height=8, width=8, channels=3, classes=3, seed=0):
        images = np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)
        return images, np.arange(n, dtype=np.int32) % classes

    return draw
