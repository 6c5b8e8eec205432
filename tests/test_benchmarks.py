import importlib

import keras
import numpy as np
import pytest

from benchmarks import engine as benchmark
from kvision import zoo
from kvision.layers import blank
from kvision.weights import named_variables
from kvision.weights.initial import initialize

BACKEND = keras.backend.backend()
BATCH, STEPS = 8, 3


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    labels = np.arange(BATCH * STEPS, dtype=np.int32) % 10
    images = generator.integers(0, 256, (len(labels), 32, 32, 3), np.uint8) // 2 + (12 * labels[:, None, None, None])
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def kvision_losses(data):
    """(losses, parameters) of kvision's contender by network, on the images as they are."""

    def run(network):
        clock = benchmark.Clock(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark, "Augmentation", lambda **_: None)
            count = benchmark.train_engine(network, *data, BATCH, clock)
        return [float(loss) for loss in clock.losses], count

    return {network: run(network) for network in benchmark.NETWORKS}


def initial(network):
    """The weights that kvision's contender starts from."""
    name, arguments = benchmark.NETWORKS[network]
    with blank():
        model = zoo.create_model(name, (32, 32, 3), 10, **arguments)
    initialize(model, 0)
    trainable = {id(variable) for variable in model.trainable_variables}
    return {
        key: np.array(keras.ops.convert_to_numpy(variable.value))
        for key, variable in named_variables(model).items()
        if id(variable) in trainable
    }


@pytest.mark.parametrize("network", benchmark.NETWORKS)
@pytest.mark.parametrize("peer", ["keras_peer", benchmark.BY_HAND[BACKEND]])
def test_peers_train_the_same_network(network, peer, data, kvision_losses):
    if peer == "flax_peer":
        pytest.importorskip("flax")
        pytest.importorskip("optax")
    train = importlib.import_module(f"benchmarks.peers.{peer}").train
    batches = list(benchmark.Batches(*data, BATCH, 0, benchmark.PREPROCESSING).epoch(0))
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    clock = benchmark.Clock(1)
    count = train(network, images, labels, BATCH, clock, weights=initial(network))
    losses, parameters = kvision_losses[network]
    found = [float(loss) for loss in clock.losses]
    print("LOSSES", network, peer, losses, found)
    assert count == parameters
    assert found[0] == pytest.approx(losses[0], rel=1e-5)
    assert len(clock.stamps) == STEPS
    assert found == pytest.approx(losses, rel=2e-3)
