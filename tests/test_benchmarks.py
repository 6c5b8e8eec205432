import importlib
import json
import sys
import time

import keras
import numpy as np
import pytest

from benchmarks import engine as benchmark
from benchmarks import peers
from kvision import engine, flags, zoo
from kvision.layers import skip_init
from kvision.weights import named_variables
from kvision.weights.initialization import initialize

BACKEND = keras.backend.backend()
BATCH, STEPS = 8, 3
SIDES = {"resnet20": 32, "vgg_small": 32, "resnet50": 64}  # of images in pixels


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """A ResNet-50 of one narrow block a stage: quickly compiled, with all that the deep one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.RESNET50, "blocks", (1, 1, 1, 1))
        patch.setitem(peers.RESNET50, "width", 8)
        yield


def data(network):
    generator = np.random.default_rng(0)
    labels = np.arange(BATCH * STEPS, dtype=np.int32) % 10
    shape = (len(labels), SIDES[network], SIDES[network], 3)
    images = generator.integers(0, 256, shape, np.uint8) // 2 + (12 * labels[:, None, None, None])
    return images.astype(np.uint8), labels


@pytest.fixture
def as_they_are(monkeypatch):
    """kvision's contender sees images neither flipped nor moved, in the order of `batches`."""
    monkeypatch.setattr(benchmark, "Augmentation", lambda **_: None)


def batches(network):
    """All images and labels as peers take them, in the order of kvision's first epoch."""
    pairs = benchmark.Batches(*data(network), BATCH, 0, benchmark.PREPROCESSING).epoch(0)
    pairs = map(dict.values, pairs)
    return [np.concatenate(arrays) for arrays in zip(*pairs, strict=True)]


_known = {}


@pytest.fixture
def kvision_losses(as_they_are):
    """(losses, parameters) of kvision's contender on a network."""

    def losses(network):
        if network not in _known:
            clock = benchmark.Clock(1)
            count = benchmark.train_engine(network, *data(network), BATCH, clock, steps=STEPS)
            clock.finish()
            _known[network] = clock.losses, count
        return _known[network]

    return losses


def initial(network):
    """The weights that kvision's contender starts from."""
    name, arguments = benchmark.NETWORKS[network]
    with skip_init():
        model = zoo.build_model(name, data(network)[0].shape[1:], peers.CLASSES[network], **arguments)
    initialize(model, 0)
    trainable = {id(variable) for variable in model.trainable_variables}
    return {
        key: np.array(keras.ops.convert_to_numpy(variable.value))
        for key, variable in named_variables(model).items()
        if id(variable) in trainable
    }


def peer(name):
    if name == "flax_peer":
        pytest.importorskip("flax")
        pytest.importorskip("optax")
    return importlib.import_module(f"benchmarks.peers.{name}").train


PEERS = ["keras_peer", benchmark.BY_HAND[BACKEND]]


@pytest.mark.parametrize("network", benchmark.NETWORKS)
@pytest.mark.parametrize("name", PEERS)
def test_peers_train_the_same_network(network, name, kvision_losses):
    clock = benchmark.Clock(1)
    count = peer(name)(network, *batches(network), BATCH, clock, steps=STEPS, weights=initial(network))
    clock.finish()
    losses, parameters = kvision_losses(network)
    assert count == parameters
    assert clock.losses[0] == pytest.approx(losses[0], rel=1e-5)
    # Nesterov's momentum: the second loss shows its look ahead, the third its memory. Rounding grows tenfold a step.
    assert clock.losses == pytest.approx(losses, rel=1e-2)
    assert [count for count, *_ in clock.ends] == [0, 1, 2, 3]


def test_peers_take_the_first_batch_again():
    clock = benchmark.Clock(1)
    images, labels = (array[:BATCH] for array in batches("resnet50"))
    peer(PEERS[1])("resnet50", images, labels, BATCH, clock, steps=3)
    clock.finish()
    assert len(clock.losses) == 3
    assert clock.losses[2] < clock.losses[0]
    again = importlib.import_module("benchmarks.peers.keras_peer")._again(np.arange(3), 7)
    assert again.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("name", ["engine", *(name for name in PEERS if name != "tensorflow_peer")])
def test_contenders_compute_in_bfloat16(name, kvision_losses):
    losses, _ = kvision_losses("resnet50")
    clock = benchmark.Clock(1)
    given = {"steps": STEPS, "dtype": "bfloat16"}
    try:
        if name == "engine":
            benchmark.train_engine("resnet50", *data("resnet50"), BATCH, clock, **given)
        else:
            peer(name)("resnet50", *batches("resnet50"), BATCH, clock, weights=initial("resnet50"), **given)
    finally:
        engine.configure()
    clock.finish()
    assert clock.losses[0] != losses[0]
    assert clock.losses == pytest.approx(losses, rel=0.1)


def test_kvision_makes_batches_on_the_device(kvision_losses):
    losses, _ = kvision_losses("resnet50")
    clock = benchmark.Clock(STEPS)
    benchmark.train_engine("resnet50", *data("resnet50"), BATCH, clock, steps=STEPS, input="device", chunk=STEPS)
    clock.finish()
    assert clock.losses == pytest.approx(losses, rel=1e-2)
    assert [count for count, *_ in clock.ends] == [0, STEPS]


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's contender")
def test_steps_of_one_program_are_the_same_steps(kvision_losses):
    clock = benchmark.Clock(STEPS)
    given = {"steps": STEPS, "chunk": STEPS, "weights": initial("resnet50")}
    peer("flax_peer")("resnet50", *batches("resnet50"), BATCH, clock, **given)
    clock.finish()
    assert clock.losses == pytest.approx(kvision_losses("resnet50")[0], rel=1e-2)
    assert [count for count, *_ in clock.ends] == [0, STEPS]


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's contender")
def test_a_cuda_graph_wants_a_gpu():
    if sys.modules["torch"].cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="finds no CUDA device: leave it out"):
        peer("torch_peer")("resnet50", *batches("resnet50"), BATCH, None, steps=STEPS, graphed=True)


def row(contender, images, seconds, start="cold", **more):
    figures = {"images_per_second": images, "seconds_to_first_step": seconds, "compile_seconds": 1.0}
    figures |= {"step_cpu_seconds": 10 / images, "peak_memory_bytes": 2**30, "parameters": 7}
    what = {"model": "resnet20", "batch_size": 128, "backend": "torch"}
    return {**what, "contender": contender, "start": start, **figures, **more}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_medians_and_ratios_of_medians():
    rows = [row("fit", images, 4.0) for images in (50, 20, 10)] + [
        row("engine", images, 3.0) for images in (10, 90, 40)
    ]
    rows += [row("compiled", 80, 1.5, start="warm"), {**row("compiled", 0.1, 0), "failed": "no compiler"}]
    _, _, *lines = map(cells, benchmark.table(rows).splitlines())
    assert lines[0] == ["resnet20", "128", "torch", "kvision", "40", "250 ms", "3.0 s", "1.0 s", "1,024 MiB", "3"]
    assert lines[1][3:] == [
        "`model.fit`", "20 (2.00)", "500 ms (0.50)", "4.0 s (0.75)", "1.0 s", "1,024 MiB (1.00)", "3"
    ]  # fmt: skip
    assert lines[2][3:] == ["`torch.compile`", "failed: no compiler", "", "", "", "", "0"]
    assert lines[3][3:5] == ["`torch.compile`, second start", "80 (0.50)"]
    assert lines[3][6] == "1.5 s (2.00)"


def test_table_has_the_memory_of_the_gpu_where_there_is_one():
    rows = [row("engine", 40, 3.0, peak_device_bytes=2**30), row("fit", 20, 3.0, peak_device_bytes=2**31)]
    rows.append(row("engine", 60, 3.0, batch_size=1024))
    head, _, *lines = map(cells, benchmark.table(rows).splitlines())
    place = head.index("on the GPU")
    assert [line[place] for line in lines] == ["1,024 MiB", "2,048 MiB (0.50)", ""]
    assert "on the GPU" not in benchmark.table(rows[2:])


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
    seen = []
    for number in range(4):
        clock.step(Loss(number))
        seen.append(list(waited))
    assert seen == [[0], [0], [0, 1], [0, 1, 2]]
    clock.finish()
    assert clock.losses == [0, 1, 2, 3]


def test_clock_divides_the_time_of_a_program_among_its_steps(monkeypatch):
    clock, now = benchmark.Clock(4), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])

    class Losses:
        """Done so many seconds after those before."""

        def __init__(self, seconds, values):
            self.seconds, self.values, self.shape = seconds, values, (len(values),)

        def __array__(self, dtype=None, copy=None):
            now[0] += self.seconds
            return np.asarray(self.values, dtype)

    clock.start()
    for chunk, seconds in enumerate((60.0, 4.0, 4.4, 8.0)):  # the first compiles
        clock.steps(Losses(seconds, [4.0 - chunk] * 4))
    figures = clock.figures()
    assert figures["step_seconds"] == pytest.approx(1.1)
    assert figures["step_cpu_seconds"] == pytest.approx(2 * 16.4 / 12)
    assert figures["compile_seconds"] == pytest.approx(60 - 4 * 1.1)
    assert (figures["first_loss"], figures["last_loss"]) == (4.0, 1.0)


def test_a_process_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XLA_FLAGS", "--x")
    around = benchmark.surroundings(BACKEND, tmp_path)
    assert around["KERAS_BACKEND"] == BACKEND
    assert not {"OMP_NUM_THREADS", "XLA_FLAGS"} & around.keys()
    what = {"backend": BACKEND, "model": "resnet20", "batch_size": 8, "contender": "engine", "start": "cold"}
    failed = benchmark.child(benchmark.Config(), what, tmp_path / "absent.npz", tmp_path)
    assert failed["failed"].startswith("FileNotFoundError")
    assert failed.items() >= what.items()


def test_a_process_that_hangs_ends_with_those_it_started(tmp_path):
    sleep = "import time; time.sleep(60)"
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    before = time.monotonic()
    code, *_ = benchmark.run([sys.executable, "-c", started], benchmark.surroundings(BACKEND, tmp_path), 1)
    assert code is None
    assert time.monotonic() - before < 30


def test_a_round_has_every_contender_once():
    every = ",".join(benchmark.CONTENDERS)
    groups = benchmark.plan(benchmark.Config(models="resnet20", contenders=every))
    members = [[(what["backend"], what["contender"], what["start"]) for what in group] for group in groups]
    pairs = [[(*which, "cold"), (*which, "warm")] for which in (("jax", "engine"), ("torch", "compiled"))]
    assert all(pair in members for pair in pairs)
    plain = [group for group in members if group not in pairs]
    once = {(backend, name) for backend in benchmark.BY_HAND for name in ("engine", "fit", "by_hand")}
    once |= {("torch", "engine_compiled"), ("torch", "graphed"), ("jax", "scanned")}
    assert sorted(plain) == sorted([(*which, "cold")] for which in once - {("jax", "engine")})
    cold = benchmark.plan(benchmark.Config(models="resnet20", contenders=every, warm=False))
    assert [group[:1] for group in groups] == cold


def test_models_have_batch_sizes():
    config = benchmark.Config(models="resnet20,resnet20:1024,resnet50:64")
    assert config.networks == [("resnet20", 128), ("resnet20", 1024), ("resnet50", 64)]
    for wrong in ("resnet19", "resnet20:", "resnet20:0", "resnet20:x"):
        with pytest.raises(flags.UsageError, match="--models must be of resnet20"):
            benchmark.Config(models=wrong)
    with pytest.raises(flags.UsageError, match="--chunk must be 1 without --input device"):
        benchmark.Config(chunk=5, input="host")
    with pytest.raises(flags.UsageError, match="--steps must be a multiple of --chunk 4"):
        benchmark.Config(chunk=4, warmup=4, input="device")


def test_pictures_are_whole_batches(tmp_path):
    np.savez(tmp_path / "inputs.npz", images=np.zeros((10, 32, 32, 3), np.uint8), labels=np.zeros(10, np.int32))
    given = tmp_path / "inputs.npz"
    assert [len(array) for array in benchmark.pictures_of("resnet20", 4, 30, given)] == [8, 8]
    assert len(benchmark.pictures_of("resnet20", 4, 1, given)[0]) == 4
    with pytest.raises(ValueError, match="a batch of 11 wants as many images, and there are 10"):
        benchmark.pictures_of("resnet20", 11, 30, given)
    images, labels = benchmark.pictures_of("resnet50", 2, 30, None)
    assert images.shape == (4, 224, 224, 3) and images.dtype == np.uint8 and set(labels) <= set(range(10))


def test_a_report_is_written_after_every_process(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    seen = []

    def child(config, what, given, cache):
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        return {**what, "failed": "nothing"}

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(benchmark, "wake", lambda *_: None)
    config = benchmark.Config(n=1, backends=BACKEND, models="resnet50:8", contenders="fit,by_hand", out=str(out))
    benchmark.rounds(config, "first")
    assert seen == [0, 1]
    more = benchmark.Config(n=1, backends=BACKEND, models="resnet50:8", contenders="fit", after=str(out), out=str(out))
    report = benchmark.rounds(more, "second")
    assert (len(report["rows"]), report["command"]) == (3, "first && second")
    out.write_text(json.dumps({**report, "versions": {}}))
    with pytest.raises(ValueError, match="was measured elsewhere"):
        benchmark.rounds(more, "third")
