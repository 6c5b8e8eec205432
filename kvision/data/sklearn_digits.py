"""scikit-learn's handwritten digits: 1,797 images of 8x8 (Alpaydin and Kaynak 1998, UCI "optdigits").

They need no download. They are not MNIST and are named "digits".
"""

import importlib.util

import numpy as np
from PIL import Image

from kvision.data.dataset import Dataset, DataUnavailable

SIZE = 28
TEST_IMAGES = 360


def load_digits() -> Dataset:
    """Load the digits, enlarged to 28x28x1. The last 360, mostly by other writers than the first 1,437, are the test
    split.

    Raises:
        DataUnavailable: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise DataUnavailable(
            "the data set 'digits' is part of scikit-learn, which is not installed: pip install scikit-learn"
        )
    import sklearn.datasets

    bundle = sklearn.datasets.load_digits()
    # Stored as 0..16, bright ink on a dark background as in MNIST.
    small = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    images = np.stack([Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in small])
    labels = bundle.target.astype(np.int32)
    return Dataset(
        "digits",
        images[:-TEST_IMAGES, :, :, None],
        labels[:-TEST_IMAGES],
        images[-TEST_IMAGES:, :, :, None],
        labels[-TEST_IMAGES:],
        classes=tuple("0123456789"),
        source="scikit-learn's bundled digits, enlarged from 8x8",
    )
