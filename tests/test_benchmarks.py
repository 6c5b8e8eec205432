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
    assert count == parameters
    assert found[0] == pytest.approx(losses[0], rel=1e-5)
    # Nesterov's momentum: the second loss shows its look ahead, the third its memory. Rounding grows tenfold a step.
    assert found == pytest.approx(losses, rel=1e-2)
    assert len(clock.stamps) == STEPS


def row(contender, images, seconds, start="cold", **more):
    figures = {"images_per_second": images, "seconds_to_first_step": seconds, "compile_seconds": 1.0}
    figures |= {"step_cpu_seconds": 10 / images, "peak_memory_bytes": 2**30, "parameters": 7}
    return {"model": "resnet20", "backend": "torch", "contender": contender, "start": start, **figures, **more}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_medians_and_ratios_of_medians():
    rows = [row("fit", images, 4.0) for images in (50, 20, 10)] + [
        row("engine", images, 3.0) for images in (10, 90, 40)
    ]
    rows += [row("compiled", 80, 1.5, start="warm"), {**row("compiled", 0.1, 0), "failed": "no compiler"}]
    _, _, *lines = map(cells, benchmark.table(rows).splitlines())
    assert lines[0] == ["resnet20", "torch", "kvision", "40", "250 ms", "3.0 s", "1.0 s", "1,024 MiB", "3"]
    assert lines[1][2:] == [
        "`model.fit`", "20 (2.00)", "500 ms (0.50)", "4.0 s (0.75)", "1.0 s", "1,024 MiB (1.00)", "3"
    ]  # fmt: skip
    assert lines[2][2:] == ["`torch.compile`", "failed: no compiler", "", "", "", "", "0"]
    assert lines[3][2:4] == ["`torch.compile`, second start", "80 (0.50)"]
    assert lines[3][5] == "1.5 s (2.00)"


def test_networks_of_unequal_size_are_refused():
    rows = [row("engine", 1, 1), row("fit", 1, 1), {**row("compiled", 1, 1, parameters=8), "failed": "no compiler"}]
    benchmark.check_parameters(rows)
    with pytest.raises(ValueError, match=r"resnet20 must have as many parameters.*\[7, 8\]"):
        benchmark.check_parameters([*rows, row("by_hand", 1, 1, parameters=8)])


@pytest.mark.parametrize("losses", [[2.0, 1.0, float("nan"), 0.5], [2.0, 1.0, 2.0, 3.0]])
def test_a_loss_that_does_not_fall_is_no_measurement(losses):
    clock = benchmark.Clock(1)
    clock.start()
    for loss in losses:
        clock.step(loss)
    with pytest.raises(ArithmeticError, match="finite and fall"):
        clock.figures()


def test_clock_waits_for_the_step_before_the_last():
    waited = []

    class Loss(float):
        def __float__(self):
            waited.append(int(self))
            return float.__float__(self)

    clock = benchmark.Clock(1)
    clock.start()
    for number in range(4):
        clock.step(Loss(number))
    assert waited == [0, 0, 1, 2]


def test_a_process_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XLA_FLAGS", "--x")
    around = benchmark.surroundings(BACKEND, tmp_path)
    assert around["KERAS_BACKEND"] == BACKEND
    assert not {"OMP_NUM_THREADS", "XLA_FLAGS"} & around.keys()
    what = {"backend": BACKEND, "model": "resnet20", "contender": "engine", "start": "cold"}
    failed = benchmark.child(benchmark.Config(), what, tmp_path / "absent.npz", tmp_path)
    assert failed["failed"].startswith("FileNotFoundError")
    assert failed.items() >= what.items()


def test_a_round_has_every_contender_once():
    groups = benchmark.plan(benchmark.Config(models="resnet20"))
    members = [[(what["backend"], what["contender"], what["start"]) for what in group] for group in groups]
    pairs = [[(*which, "cold"), (*which, "warm")] for which in (("jax", "engine"), ("torch", "compiled"))]
    assert all(pair in members for pair in pairs)
    plain = [group for group in members if group not in pairs]
    once = {(backend, name) for backend in benchmark.BY_HAND for name in ("engine", "fit", "by_hand")}
    assert sorted(plain) == sorted([(*which, "cold")] for which in once - {("jax", "engine")})
