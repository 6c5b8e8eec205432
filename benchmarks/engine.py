"""How fast kvision trains, beside Keras's `model.fit` and what one writes by hand in each framework.

    python -m benchmarks.engine --n 3

Every contender trains the same networks on the same images in a fresh process; a round is every contender once, and
each round begins with another one. Wanted are the extras `all` and `benchmark`. The contenders:

- engine: kvision as `kvision.training.fit` drives it, flips and shifts of 4 pixels included;
- fit: the network in plain Keras layers, `model.compile`, `model.fit`;
- by_hand: Flax and Optax; TensorFlow's own functions; PyTorch's modules. See `benchmarks/peers`;
- compiled: the last with `torch.compile`;
- engine_compiled: kvision on PyTorch with `--input device`, its step one program of PyTorch's compiler;
- graphed: PyTorch by hand, every step a CUDA graph's replay, on a GPU alone; scanned: JAX by hand, `--chunk` steps in
  one program. They are not measured unless `--contenders` names them.

The others get float32 batches that are in memory already (the GPU's, where there is one), without flips and shifts:
that favors them. All count correct answers, and wait for the loss of the step before the last one dispatched.

On a GPU (a call may name fewer contenders, and `--after FILE` adds its rows to those of the call before):

    python -m benchmarks.engine --backends jax,torch --models resnet20:128,resnet50:128 --dtype bfloat16 \
        --input device --chunk 20 --warmup 20 --steps 60 --n 1 --no-warm --patience 90 \
        --contenders engine,by_hand,graphed,scanned,fit,compiled \
        --section gpu --write --out docs/measured/engine-gpu.json

Start-up is the time from the start of the process to the end of the first step. Where compiled programs can be kept on
disk (kvision on JAX, torch.compile), "cold" begins with an empty folder and "warm" with that of the cold process before
it. Peak memory is the process's own; torch.compile's compiler processes come on top.

Each framework chooses its own threads: variables that would tell it otherwise are kept from the processes.
"""

import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import peers
from docs.update import put
from kvision import engine, flags
from kvision.data import load
from kvision.data.batches import Augmentation, Batches
from kvision.data.preprocessing import Preprocessing
from kvision.data.synthetic import load_shapes10
from kvision.report import environment

ROOT = Path(__file__).resolve().parent.parent
BY_HAND = {"jax": "flax_peer", "tensorflow": "tensorflow_peer", "torch": "torch_peer"}
CONTENDERS = ("engine", "engine_compiled", "fit", "by_hand", "compiled", "graphed", "scanned")
ONLY = {
    "engine_compiled": "torch",
    "compiled": "torch",
    "graphed": "torch",
    "scanned": "jax",
}  # contenders of one backend
# Names and arguments in the zoo.
NETWORKS = {
    "resnet20": ("resnet20", {}),
    "vgg_small": ("vgg11_bn", {"width": peers.VGG["width"], "hidden": peers.VGG["hidden"], "dropout_rate": 0.0}),
    "resnet50": ("resnet50", peers.RESNET50),
}
SECTIONS = {"cpu": "engine", "gpu": "engine-gpu"}  # of docs/engine.md, and what its comments call them
PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
# What would make contenders unequal, or like none that a reader of the table can run.
KEPT_BACK = ("OMP_", "MKL_", "OPENBLAS_", "XLA_", "JAX_", "TF_", "TORCH", "KERAS_BACKEND", "KMP_", "GOMP_")


def setting(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    n: int = setting(3, "rounds; 0 measures nothing, and makes the table of the file that --out names")
    backends: str = setting("jax,tensorflow,torch", "which backends, with commas", metavar="NAMES")
    models: str = setting(
        "resnet20,vgg_small", "which networks, with commas; resnet20:64 at batch size 64", metavar="NAMES"
    )
    contenders: str = setting("engine,fit,by_hand,compiled", "which contenders, with commas", metavar="NAMES")
    batch_size: int = setting(128, "images a step, where --models names no number")
    steps: int = setting(30, "steps for the median")
    warmup: int = setting(5, "steps before these")
    dtype: str = setting("float32", "what layers compute in", choices=("float32", "bfloat16"))
    input: str = setting("device", "where kvision moves and scales its images", choices=("host", "device"))
    chunk: int = setting(1, "steps that kvision, and scanned, take in one program")
    warm: bool = setting(True, "measure second starts too")
    patience: int = setting(900, "seconds for a process")
    data: str | None = setting(None, "folder with CIFAR-10; without, images are drawn", metavar="FOLDER")
    out: str = setting("docs/measured/engine.json", "file for every single figure", metavar="FILE")
    after: str | None = setting(None, "report of an earlier call, whose rows come first", metavar="FILE")
    write: bool = setting(False, "put the table into docs/engine.md too")
    section: str = setting("cpu", "with --write: into which of its tables", choices=tuple(SECTIONS))
    once: str | None = setting(None, "measure this contender in this process, and print JSON", choices=CONTENDERS)
    inputs: str | None = setting(None, "with --once: the images' file", metavar="FILE")
    cache: str | None = setting(None, "with --once: folder for compiled programs", metavar="FOLDER")

    def __post_init__(self):
        flags.check(self, "n", lambda value: value >= 0, "at least 0")
        flags.check(self, "batch_size steps warmup chunk patience", lambda value: value > 0, "at least 1")
        flags.check(self, "steps warmup", lambda value: value % self.chunk == 0, f"a multiple of --chunk {self.chunk}")
        flags.check(self, "chunk", lambda value: value == 1 or self.input == "device", "1 without --input device")
        for name, known in (("backends", BY_HAND), ("contenders", CONTENDERS)):
            flags.check(
                self, name, lambda value, known=known: {*value.split(",")} <= {*known}, f"of {', '.join(known)}"
            )
        known = f"of {', '.join(NETWORKS)}, each with a batch size of at least 1 behind a colon or none"
        flags.check(self, "models", lambda _: all(n in NETWORKS and size > 0 for n, size in self.networks), known)

    @property
    def networks(self) -> list[tuple[str, int]]:
        """Names and batch sizes of `models`; a size that is no number is 0."""
        pairs = []
        for entry in self.models.split(","):
            name, colon, size = entry.partition(":")
            pairs.append((name, (int(size) if size.isdigit() else 0) if colon else self.batch_size))
        return pairs


def coming(losses):
    """A function that waits for losses on the device, () or (k,), and gives them as a list of floats."""
    if getattr(losses, "is_cuda", False):
        # PyTorch's `item` would wait for whatever was dispatched by the time it is called, the next step too.
        torch = sys.modules["torch"]
        host = torch.empty(losses.shape, dtype=losses.dtype, device="cpu", pin_memory=True)
        host.copy_(losses.detach(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait():
            copied.synchronize()
            return host.ravel().tolist()

        return wait
    return lambda: np.asarray(losses).tolist() if len(getattr(losses, "shape", ())) else [float(losses)]


class Clock:
    """Times the steps of one contender.

    Attributes:
        losses: of the steps that are done, floats.
        ends: (steps, seconds, CPU seconds) whenever so many steps were found done; the first is the start.
    """

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.losses, self.ends, self._coming = [], [], []

    def start(self) -> None:
        """The first step begins."""
        self._stamp()

    def step(self, loss) -> None:
        """A step was dispatched; waits for the loss of the one before, as `kvision.training.fit` does."""
        self.steps(loss)

    def steps(self, losses) -> None:
        """Several steps were dispatched as one, whose losses are (k,); waits for those dispatched before."""
        self._coming.append(coming(losses))
        if len(self._coming) > 1 or not self.losses:
            self._wait()

    def finish(self) -> None:
        """Waits for all that was dispatched."""
        while self._coming:
            self._wait()

    def _wait(self) -> None:
        self.losses += self._coming.pop(0)()
        if len(self.ends) == 1:
            self.seconds_to_first_step = environment.seconds_since_process_start()
        self._stamp()

    def _stamp(self) -> None:
        self.ends.append((len(self.losses), time.perf_counter(), time.process_time()))

    def figures(self) -> dict[str, float]:
        """What was measured; the time of steps that were dispatched as one is divided evenly among them.

        Raises:
            ArithmeticError: the loss is not finite, or did not fall.
        """
        self.finish()
        losses = self.losses
        last = float(np.mean(losses[-max(1, len(losses) // 4) :]))
        if not np.isfinite(losses).all() or last >= losses[0]:
            raise ArithmeticError(
                f"in {len(losses)} steps the loss went from {losses[0]:.3f} to {last:.3f}: it must be finite and fall; "
                "give it at least 20 steps"
            )
        counts, seconds, cpu = np.transpose(self.ends)
        measured = np.arange(self.warmup, len(losses) + 1)
        steps = np.diff(np.interp(measured, counts, seconds))
        step = float(np.median(steps))
        cpu_before, cpu_after = np.interp(measured[[0, -1]], counts, cpu)
        return {
            "step_seconds": step,
            "step_seconds_of_thirds": [float(np.median(part)) for part in np.array_split(steps, 3) if len(part)],
            "step_cpu_seconds": float(cpu_after - cpu_before) / (len(losses) - self.warmup),
            "seconds_to_first_step": self.seconds_to_first_step,
            "compile_seconds": max(0.0, float(seconds[1] - seconds[0] - counts[1] * step)),
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }


def train_engine(
    network,
    images,
    labels,
    batch_size,
    clock,
    *,
    steps,
    dtype="float32",
    cache=None,
    input="host",
    chunk=1,
    compiled=False,
) -> int:
    """kvision; like `train` of `benchmarks.peers`, but of uint8 images.

    Args:
        input: "host", where batches are made while training goes on, or "device", which has all images and makes them.
        chunk: with input "device": steps in one program, a divisor of `steps`.
        compiled: with input "device" on PyTorch: whether the step is compiled.
    """
    from kvision import zoo
    from kvision.layers import skip_init
    from kvision.tasks.classification import Classification
    from kvision.training import optimizers
    from kvision.weights.initialization import initialize

    engine.configure(dtype, compile_cache=cache)
    name, arguments = NETWORKS[network]
    with skip_init():
        model = zoo.build_model(name, images.shape[1:], peers.CLASSES[network], **arguments)
    initialize(model, 0)
    optimizer = optimizers.make_optimizer(
        "sgd", peers.LEARNING_RATES[network], momentum=peers.MOMENTUM, weight_decay=peers.WEIGHT_DECAY
    )
    trainer = engine.create(model, Classification(), optimizer)
    batches = Batches(images, labels, batch_size, 0, PREPROCESSING, Augmentation(flip=True, crop_padding=4))
    if input == "device":
        from kvision.data.device import DeviceDataset

        if compiled:
            importlib.import_module("kvision.engine.torch_compiled").compile_steps(trainer)
        dataset = DeviceDataset(batches)
        params = itertools.chain.from_iterable(map(batches.params, itertools.count()))
        clock.start()
        for _ in range(0, steps, chunk):
            means = trainer.train_steps(dataset, np.stack(list(itertools.islice(params, chunk))))
            clock.steps(means["loss"][0] / batch_size)
    else:
        shown = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
        clock.start()
        for batch in itertools.islice(shown, steps):
            clock.step(trainer.train_step(batch)["loss"][0] / batch_size)
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)


def pictures_of(network: str, batch_size: int, steps: int, inputs: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images and int32 labels, whole batches of them and no more than there are steps.

    ResNet-50's are noise, of ten of its classes: two batches, which it can learn by heart. The others' are in the file
    `inputs`.
    """
    if network == "resnet50":
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (2 * batch_size, 224, 224, 3), np.uint8)
        labels = generator.integers(0, 10, len(images), np.int32)
    else:
        with np.load(inputs) as archive:
            images, labels = archive["images"], archive["labels"]
    if len(images) < batch_size:
        raise ValueError(f"a batch of {batch_size} wants as many images, and there are {len(images)}")
    n = min(steps, len(images) // batch_size) * batch_size
    return images[:n], labels[:n]


def peak_device_bytes(backend: str) -> int | None:
    """The most memory of the GPU that this process's arrays have had, by the backend's own count; None on a CPU."""
    if backend == "torch":
        torch = sys.modules["torch"]
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    if backend == "jax":
        return (sys.modules["jax"].devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None


def measure(config: Config) -> dict[str, object]:
    """One contender on one network, in this process."""
    ((network, batch_size),) = config.networks
    steps = config.warmup + config.steps
    images, labels = pictures_of(network, batch_size, steps, config.inputs)
    clock = Clock(config.warmup)
    given = {"steps": steps, "dtype": config.dtype}
    if config.once in ("engine", "engine_compiled"):
        train = train_engine
        given |= {"cache": config.cache, "input": config.input, "chunk": config.chunk}
        given |= {"compiled": config.once == "engine_compiled"}
    else:
        peer = "keras_peer" if config.once == "fit" else BY_HAND[config.backends]
        train = importlib.import_module(f"benchmarks.peers.{peer}").train
        images = PREPROCESSING(images)
        given |= {"compiled": {"compiled": True}, "graphed": {"graphed": True}, "scanned": {"chunk": config.chunk}}.get(
            config.once, {}
        )
    count = train(network, images, labels, batch_size, clock, **given)
    figures = clock.figures()
    figures |= {"parameters": count, "images_per_second": batch_size / figures["step_seconds"]}
    if (peak := peak_device_bytes(config.backends)) is not None:
        figures["peak_device_bytes"] = peak
    return figures


def plan(config: Config) -> list[list[dict[str, object]]]:
    """The processes of a round: groups whose members run one after the other, as a warm start after its cold one.

    A contender meets all networks before the next one begins, so that of a call that is cut short the first are whole.
    """
    groups = []
    for contender in config.contenders.split(","):
        for model, batch_size in config.networks:
            for backend in config.backends.split(","):
                if ONLY.get(contender, backend) != backend:
                    continue
                keeps = config.warm and (contender, backend) in (("engine", "jax"), ("compiled", "torch"))
                what = {"backend": backend, "model": model, "batch_size": batch_size, "contender": contender}
                groups.append([{**what, "start": start} for start in (("cold", "warm") if keeps else ("cold",))])
    return groups


def inputs(config: Config) -> dict[str, np.ndarray]:
    """Images and labels of all networks but ResNet-50, as many as their steps see."""
    data = load("cifar10", config.data) if config.data else load_shapes10()
    n = (config.warmup + config.steps) * max(batch_size for _, batch_size in config.networks)
    return {"images": data.x_train[:n], "labels": data.y_train[:n]}


def surroundings(backend: str, cache: Path) -> dict[str, str]:
    """The environment of a contender's process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(KEPT_BACK)}
    own = {"KERAS_BACKEND": backend, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TF_CPP_MIN_LOG_LEVEL": "2"}
    return {**kept, **own}


# A convolution too, because a GPU's libraries are read when the first one runs.
WAKE = """
import keras, numpy, kvision.training.trainer
from kvision import zoo
zoo.list_models()
zeros = [numpy.zeros(shape, "float32") for shape in ((1, 8, 8, 4), (3, 3, 4, 4))]
keras.ops.convert_to_numpy(keras.ops.conv(*map(keras.ops.convert_to_tensor, zeros)))
"""


def wake(backend: str, cache: Path, patience: int) -> None:
    """Import once what contenders import: later processes find files in memory and modules compiled."""
    for statement in (WAKE, f"import benchmarks.peers.{BY_HAND[backend]}"):
        # Whatever comes: what cannot be imported here fails again, and is reported, where it is measured.
        run([sys.executable, "-c", statement], surroundings(backend, cache), patience)


def run(command: list[str], around: dict[str, str], patience: int) -> tuple[int | None, str, str]:
    """Exit code, standard output and errors of a process; None where it took more than `patience` seconds.

    Then those that it started end with it: torch.compile's would keep its output open.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=around,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, *told


def child(config: Config, what: dict[str, object], given: Path, cache: Path) -> dict[str, object]:
    """The row of one process; where it failed, it has "failed", the reason, and no figures."""
    command = [sys.executable, "-m", "benchmarks.engine", f"--once={what['contender']}"]
    command += [f"--backends={what['backend']}", f"--models={what['model']}:{what['batch_size']}"]
    command += [f"--inputs={given}", f"--cache={cache}"]
    command += [f"--{name}={getattr(config, name)}" for name in ("steps", "warmup", "dtype", "input", "chunk")]
    row = {**what, "load": os.getloadavg()[0]}
    code, out, errors = run(command, surroundings(what["backend"], cache), config.patience)
    if code is None:
        return {**row, "failed": f"took more than {config.patience} s"}
    if code:
        lines = [line for line in errors.splitlines() if line.strip()] or [f"exit code {code}"]
        return {**row, "failed": lines[-1][:300]}
    return {**row, **json.loads(out.splitlines()[-1])}


LABELS = {
    ("engine", "jax"): "kvision",
    ("engine", "tensorflow"): "kvision",
    ("engine", "torch"): "kvision",
    ("engine_compiled", "torch"): "kvision, compiled",
    ("fit", "jax"): "`model.fit`",
    ("fit", "tensorflow"): "`model.fit`",
    ("fit", "torch"): "`model.fit`",
    ("by_hand", "jax"): "Flax and Optax",
    ("by_hand", "tensorflow"): "`tf.function`",
    ("by_hand", "torch"): "`torch.nn`",
    ("compiled", "torch"): "`torch.compile`",
    ("graphed", "torch"): "`torch.nn`, CUDA graph",
    ("scanned", "jax"): "Flax and Optax, scanned",
}
# A row's figure, its column, its factor and format there.
COLUMNS = (
    ("images_per_second", "images/s", 1, "{:,.0f}"),
    ("step_cpu_seconds", "CPU time a step", 1000, "{:,.0f} ms"),
    ("seconds_to_first_step", "to first step", 1, "{:.1f} s"),
    ("compile_seconds", "of it compiling", 1, "{:.1f} s"),
    ("peak_memory_bytes", "peak memory", 2**-20, "{:,.0f} MiB"),
    ("peak_device_bytes", "on the GPU", 2**-20, "{:,.0f} MiB"),
)
COMPARED = (
    "images_per_second",
    "step_cpu_seconds",
    "seconds_to_first_step",
    "peak_memory_bytes",
    "peak_device_bytes",
)


def table(rows: list[dict]) -> str:
    """Medians as a Markdown table.

    In parentheses: kvision's (its cold start's) as a multiple of this contender's, on the same backend and network.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["model"], row["batch_size"], list(BY_HAND).index(row["backend"]))
        groups.setdefault((*key, CONTENDERS.index(row["contender"]), row["start"]), []).append(row)
    good = {key: [row for row in group if "failed" not in row] for key, group in groups.items()}
    columns = [column for column in COLUMNS if any(column[0] in row for group in good.values() for row in group)]
    medians = {
        key: {name: median(row[name] for row in rows) for name, *_ in columns if all(name in row for row in rows)}
        for key, rows in good.items()
        if rows
    }
    head = ["network", "batch", "backend", "contender", *(title for _, title, *_ in columns), "n"]
    lines = [f"| {' | '.join(head)} |", f"| --- | ---: | --- | --- |{' ---: |' * (len(columns) + 1)}"]
    for key in sorted(groups):
        row, own, ours = groups[key][0], medians.get(key), medians.get((*key[:3], CONTENDERS.index("engine"), "cold"))
        label = LABELS[row["contender"], row["backend"]] + (", second start" if row["start"] == "warm" else "")
        cells = []
        for name, _, factor, form in columns:
            cell = form.format(factor * own[name]) if own and name in own else ""
            if cell and ours and own is not ours and name in COMPARED and name in ours:
                cell += f" ({ours[name] / own[name]:.2f})"
            cells.append(cell)
        if own is None:
            cells = ["failed: " + row["failed"].replace("|", "\\|"), *cells[1:]]
        cells = [row["model"], str(row["batch_size"]), row["backend"], label, *cells, str(len(good[key]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def note(report: dict) -> str:
    """What stands below the table: how it was measured."""
    hardware = report["hardware"]
    memory = f", {hardware['memory_bytes'] / 2**30:.0f} GiB" if hardware["memory_bytes"] else ""
    machine = ", ".join([*hardware.get("gpus", []), f"{hardware['cores']} cores of {hardware['cpu']}{memory}"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    loads = [row["load"] for row in report["rows"] if "load" in row]
    return (
        f"Medians of n processes each: `{report['command']}` on {machine}, "
        f"{versions}. In parentheses: kvision's as a multiple of this contender's. When a process began, the machine's "
        f"load of the last minute was {min(loads):.1f} to {max(loads):.1f}."
    )


def check_parameters(rows: list[dict]) -> None:
    """Raises ValueError where contenders trained networks of unequal size."""
    sizes: dict[str, set[int]] = {}
    for row in rows:
        if "failed" not in row:
            sizes.setdefault(row["model"], set()).add(row["parameters"])
    for model, counts in sizes.items():
        if len(counts) > 1:
            raise ValueError(f"every contender's {model} must have as many parameters, they have {sorted(counts)}")


def versions() -> dict[str, str]:
    """Those of a run's packages, and of what only peers use."""
    found = environment.versions()
    for name in ("flax", "optax"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def rounds(config: Config, command: str) -> dict[str, object]:
    """The report of all rounds; after each process it is written to `config.out`.

    Raises:
        ValueError: `config.after` was measured on another machine or with other versions.
    """
    rows: list[dict] = []
    report = {
        "command": command,
        "n": config.n,
        "hardware": environment.hardware(),
        "versions": versions(),
        "rows": rows,
    }
    if config.after:
        before = json.loads(Path(config.after).read_text())
        theirs, ours = ((r["hardware"]["cpu"], r["hardware"]["gpus"], r["versions"]) for r in (before, report))
        if theirs != ours:
            raise ValueError(f"{config.after} was measured elsewhere: on {theirs}, and here are {ours}")
        rows += before["rows"]
        report["command"] = f"{before['command']} && {command}"
    groups = plan(config)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.npz"
        if any(network != "resnet50" for network, _ in config.networks):
            np.savez(given, **inputs(config))
        for backend in config.backends.split(","):
            wake(backend, Path(folder) / "woken", config.patience)
        for turn in range(config.n):
            first = turn * len(groups) // config.n
            for i, group in enumerate(groups[first:] + groups[:first]):
                for what in group:
                    rows.append({"round": turn, **child(config, what, given, Path(folder) / f"cache-{turn}-{i}")})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                    Path(config.out).write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(argv=None) -> None:
    config = Config(**flags.parse(Config, argv, prog="benchmarks.engine", description=__doc__, defaults=Config()))
    if config.once:
        print(json.dumps(measure(config)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process that is being measured ends too
    own = ("data", "out", "after", "write", "section", "patience")
    command = " ".join(["python -m benchmarks.engine", *flags.arguments(config, own)])
    report = rounds(config, command) if config.n else json.loads(Path(config.out).read_text())
    check_parameters(report["rows"])
    content = f"{table(report['rows'])}\n\n{note(report)}"
    print(content)
    if config.write:
        page = ROOT / "docs" / "engine.md"
        page.write_text(put(page.read_text(), SECTIONS[config.section], content))


if __name__ == "__main__":
    main()
