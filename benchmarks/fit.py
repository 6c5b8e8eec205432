"""How fast `kvision.fit` trains, beside `model.fit`, on the active backend.

    KERAS_BACKEND=torch python -m benchmarks.fit --rounds 5

Each network is compiled twice from the same weights. A round is an epoch of each, in turn; the first round, in which
programs are compiled, does not count. Printed are the examples per second, medians over the rounds, and their ratio.
"""

import argparse
import time
from statistics import median

import keras
import numpy as np
from keras import layers

import kvision


def mlp():
    stack = [layers.Flatten(), layers.Dense(512, activation="relu"), layers.Dropout(0.2), layers.Dense(10)]
    return keras.Sequential([keras.Input((28, 28, 1)), *stack])


def lstm():
    return keras.Sequential([keras.Input((28, 28)), layers.LSTM(128), layers.Dense(10)])


NETWORKS = {  # the network, the shape of an example, the batch size
    "mlp": (mlp, (28, 28, 1), 128),
    "mnist_cnn": (lambda: kvision.create_model("mnist_cnn", (28, 28, 1), classes=10), (28, 28, 1), 128),
    "resnet20": (lambda: kvision.create_model("resnet20", (32, 32, 3), classes=10), (32, 32, 3), 128),
    "lstm": (lstm, (28, 28), 128),
}


def measure(name: str, rounds: int, steps: int) -> tuple[float, float]:
    """Examples per second of `kvision.fit` and of `model.fit`."""
    make, shape, batch_size = NETWORKS[name]
    generator = np.random.default_rng(0)
    x = generator.normal(size=(steps * batch_size, *shape)).astype(np.float32)
    y = generator.integers(0, 10, len(x))
    models, seconds = [make(), make()], ([], [])
    models[1].set_weights(models[0].get_weights())
    for model in models:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"])
    for number in range(rounds + 1):
        for which, fit in enumerate((kvision.fit, lambda model, *given, **options: model.fit(*given, **options))):
            start = time.perf_counter()
            fit(models[which], x, y, batch_size=batch_size, verbose=0)
            if number:
                seconds[which].append(time.perf_counter() - start)
    own, kerass = (len(x) / median(times) for times in seconds)
    return own, kerass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of these, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="epochs that count")
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    arguments = parser.parse_args()
    print(f"{keras.backend.backend()}: examples/s   kvision.fit  model.fit  ratio")
    for name in arguments.networks.split(","):
        own, kerass = measure(name, arguments.rounds, arguments.steps)
        print(f"{name:24s}{own:12,.0f}{kerass:11,.0f}{own / kerass:7.2f}", flush=True)


if __name__ == "__main__":
    main()
