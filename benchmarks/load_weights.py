"""How long does a weights file take to load, beside safetensors? `python -m benchmarks.load_weights --n 9`

VGG-16 for CIFAR-10 with 25 million parameters, 101 MB: `kvision.weights.load`, which checks every hash, against
`safetensors.numpy.load_file` and the same assignments. Interleaved, medians, from files that the system has in memory.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import keras
import numpy as np
import safetensors.numpy as peer
from keras import ops

from kvision import weights, zoo
from kvision.layers import skip_init
from kvision.weights.initialization import initialize


def wait(model) -> None:
    """Until the device has all variables."""
    for variable in model.weights:
        np.asarray(ops.convert_to_numpy(variable.value)).reshape(-1)[:1].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=9)
    count = parser.parse_args().n
    with skip_init():
        model = zoo.build_model("vgg16", (32, 32, 3), 10, hidden=2048)
    initialize(model, 0)
    variables = weights.named_variables(model)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "a.npz", Path(folder) / "a.safetensors"
        weights.save(model, ours, arguments={"hidden": 2048})
        peer.save_file({key: np.array(ops.convert_to_numpy(v.value)) for key, v in variables.items()}, theirs)

        def load_peer():
            for key, array in peer.load_file(theirs).items():
                variables[key].assign(array)

        seconds = {"kvision": [], "safetensors": []}
        for _ in range(count + 1):  # the first warms up
            for name, load in (("kvision", lambda: weights.load(model, ours)), ("safetensors", load_peer)):
                start = time.perf_counter()
                load()
                wait(model)
                seconds[name].append(time.perf_counter() - start)
        size = ours.stat().st_size / 1e6
    medians = {name: 1000 * median(values[1:]) for name, values in seconds.items()}
    print(
        f"{keras.backend.backend()}, {size:.0f} MB, n={count}: kvision {medians['kvision']:.0f} ms, safetensors "
        f"{medians['safetensors']:.0f} ms, ratio {medians['kvision'] / medians['safetensors']:.2f}"
    )


if __name__ == "__main__":
    main()
