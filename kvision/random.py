"""The random numbers of a run, keyed by what they are for.

`keras.random` gives other numbers on every backend, and a shared generator gives other numbers as soon as somebody
draws once more. Here a number depends on the run's seed and on its purpose alone: the initial kernel of `stage1_conv`,
the order of epoch 7. So every backend starts from the same weights and sees the same images, and a run that was stopped
draws the same numbers when it goes on.
"""

import hashlib

import numpy as np


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose: `stream(seed, "order", epoch)`.

    Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) takes its key from the SHA-256 of seed and
    purpose, so streams of different purposes are independent.
    """
    text = "\0".join(str(part) for part in (seed, *purpose))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
