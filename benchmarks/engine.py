"""How fast kvision trains, beside Keras's `model.fit` and what one writes by hand in each framework.

    python -m benchmarks.engine --n 3

Every contender trains the same networks on the same images in a fresh process; a round is every contender once, and
each round begins with another one. Wanted are the extras `all` and `benchmark`. The contenders:

- engine: kvision as `kvision.training.fit` drives it, flips and shifts of 4 pixels included;
- fit: the network in plain Keras layers, `model.compile`, `model.fit`;
- by_hand: Flax and Optax; TensorFlow's own functions; PyTorch's modules. See `benchmarks/peers`;
- compiled: the last with `torch.compile`.

The others get float32 batches that are in memory already, without flips and shifts: that favours them. All count
correct answers, and wait for the loss of the step before the last one dispatched.

Start-up is the time from the start of the process to the end of the first step. Where compiled programs can be kept on
disk (kvision on JAX, torch.compile), "cold" begins with an empty folder and "warm" with that of the cold process before
it. Peak memory is the process's own; torch.compile's compiler processes come on top.

Each framework chooses its own threads: variables that would tell it otherwise are kept from the processes.
"""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
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
from kvision.data.drawn import load_shapes10
from kvision.data.preprocessing import Preprocessing
from kvision.tracking import environment

ROOT = Path(__file__).resolve().parent.parent
BY_HAND = {"jax": "flax_peer", "tensorflow": "tensorflow_peer", "torch": "torch_peer"}
CONTENDERS = ("engine", "fit", "by_hand", "compiled")
# Names and arguments in the zoo.
NETWORKS = {
    "resnet20": ("resnet20", {}),
    "vgg_small": ("vgg11_bn", {"width": peers.VGG["width"], "hidden": peers.VGG["hidden"], "dropout_rate": 0.0}),
}
PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
# What would make contenders unequal, or like none that a reader of the table can run.
KEPT_BACK = ("OMP_", "MKL_", "OPENBLAS_", "XLA_", "JAX_", "TF_", "TORCH", "KERAS_BACKEND", "KMP_", "GOMP_")
PATIENCE = 900  # seconds for a process


def setting(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    n: int = setting(3, "rounds; 0 measures nothing, and makes the table of the file that --out names")
    backends: str = setting("jax,tensorflow,torch", "which backends, with commas", metavar="NAMES")
    models: str = setting("resnet20,vgg_small", "which networks, with commas", metavar="NAMES")
    contenders: str = setting(",".join(CONTENDERS), "which contenders, with commas", metavar="NAMES")
    batch_size: int = setting(128, "images a step")
    steps: int = setting(30, "steps for the median")
    warmup: int = setting(5, "steps before these")
    data: str | None = setting(None, "folder with CIFAR-10; without, images are drawn", metavar="FOLDER")
    out: str = setting("docs/measured/engine.json", "file for every single figure", metavar="FILE")
    write: bool = setting(False, "put the table into docs/engine.md too")
    once: str | None = setting(None, "measure this contender in this process, and print JSON", choices=CONTENDERS)
    inputs: str | None = setting(None, "with --once: the images' file", metavar="FILE")
    cache: str | None = setting(None, "with --once: folder for compiled programs", metavar="FOLDER")

    def __post_init__(self):
        flags.expect(self, "n", lambda value: value >= 0, "at least 0")
        flags.expect(self, "batch_size steps warmup", lambda value: value > 0, "at least 1")
        for name, known in (("backends", BY_HAND), ("models", NETWORKS), ("contenders", CONTENDERS)):
            flags.expect(
                self, name, lambda value, known=known: {*value.split(",")} <= {*known}, f"of {', '.join(known)}"
            )


class Clock:
    """Times the steps of one contender.

    Attributes:
        losses: of all steps.
        stamps: seconds at which each step, or the one before where the device may run behind, was done.
    """

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.losses, self.stamps = [], []

    def start(self) -> None:
        """The first step begins."""
        self.started = time.perf_counter()

    def step(self, loss) -> None:
        """A step was dispatched; waits for the loss of the one before, as `kvision.training.fit` does."""
        self.losses.append(loss)
        float(self.losses[max(0, len(self.losses) - 2)])
        self.stamp()

    def stamp(self) -> None:
        self.stamps.append(time.perf_counter())
        if len(self.stamps) == 1:
            self.seconds_to_first_step = environment.seconds_since_process_start()
        if len(self.stamps) == self.warmup:
            self.cpu_before = time.process_time()
        self.cpu_after = time.process_time()

    def figures(self) -> dict[str, float]:
        """What was measured.

        Raises:
            ArithmeticError: the loss is not finite, or did not fall.
        """
        losses = [float(loss) for loss in self.losses]
        last = float(np.mean(losses[-max(1, len(losses) // 4) :]))
        if not np.isfinite(losses).all() or last >= losses[0]:
            raise ArithmeticError(
                f"in {len(losses)} steps the loss went from {losses[0]:.3f} to {last:.3f}: it must be finite and fall; "
                "give it at least 20 steps"
            )
        step = median(np.diff(self.stamps[self.warmup - 1 :]))
        return {
            "step_seconds": step,
            "step_cpu_seconds": (self.cpu_after - self.cpu_before) / (len(self.stamps) - self.warmup),
            "seconds_to_first_step": self.seconds_to_first_step,
            "compile_seconds": max(0.0, self.stamps[0] - self.started - step),
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }


def train_engine(network, images, labels, batch_size, clock, cache=None) -> int:
    """kvision; like `train` of `benchmarks.peers`, but of uint8 images."""
    from kvision import training, zoo
    from kvision.layers import blank
    from kvision.tasks.classification import cross_entropy
    from kvision.weights.initial import initialize

    engine.configure(compile_cache=cache)
    name, arguments = NETWORKS[network]
    with blank():
        model = zoo.create_model(name, (32, 32, 3), peers.CLASSES, **arguments)
    initialize(model, 0)
    optimizer = training.make_optimizer(
        "sgd", peers.LEARNING_RATE, momentum=peers.MOMENTUM, weight_decay=peers.WEIGHT_DECAY
    )
    optimizer.build(model.trainable_variables)
    trainer = engine.create(model, optimizer, cross_entropy())
    batches = Batches(images, labels, batch_size, 0, PREPROCESSING, Augmentation(flip=True, shift=4))
    clock.start()
    for shown, answers in batches.epoch(0):
        loss, _ = trainer.train_step(shown, answers)
        clock.step(loss)
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)


def measure(config: Config) -> dict[str, object]:
    """One contender on one network, in this process."""
    with np.load(config.inputs) as archive:
        images, labels = archive["images"], archive["labels"]
    clock = Clock(config.warmup)
    if config.once == "engine":
        count = train_engine(config.models, images, labels, config.batch_size, clock, config.cache)
    else:
        shown, answers = zip(*Batches(images, labels, config.batch_size, 0, PREPROCESSING).epoch(0), strict=True)
        given = np.concatenate(shown), np.concatenate(answers)
        peer = "keras_peer" if config.once == "fit" else BY_HAND[config.backends]
        train = importlib.import_module(f"benchmarks.peers.{peer}").train
        more = {"compiled": True} if config.once == "compiled" else {}
        count = train(config.models, *given, config.batch_size, clock, **more)
    figures = clock.figures()
    return {"parameters": count, "images_per_second": config.batch_size / figures["step_seconds"], **figures}


def plan(config: Config) -> list[list[dict[str, str]]]:
    """The processes of a round: groups whose members run one after the other, as a warm start after its cold one."""
    groups = []
    for model in config.models.split(","):
        for backend in config.backends.split(","):
            for contender in config.contenders.split(","):
                if contender == "compiled" and backend != "torch":
                    continue
                keeps = (contender, backend) in (("engine", "jax"), ("compiled", "torch"))
                what = {"backend": backend, "model": model, "contender": contender}
                groups.append([{**what, "start": start} for start in (("cold", "warm") if keeps else ("cold",))])
    return groups


def inputs(config: Config) -> dict[str, np.ndarray]:
    """Images and labels for every step once; from the beginning again where the data set has fewer."""
    data = load("cifar10", config.data) if config.data else load_shapes10()
    which = np.arange((config.warmup + config.steps) * config.batch_size) % len(data.x_train)
    return {"images": data.x_train[which], "labels": data.y_train[which]}


def surroundings(backend: str, cache: Path) -> dict[str, str]:
    """The environment of a contender's process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(KEPT_BACK)}
    own = {"KERAS_BACKEND": backend, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TF_CPP_MIN_LOG_LEVEL": "2"}
    return {**kept, **own}


def wake(backend: str, cache: Path) -> None:
    """Import once what contenders import: later processes find files in memory and modules compiled."""
    packages = "import keras, kvision.training; from kvision import zoo; zoo.list_models()"
    for statement in (packages, f"import benchmarks.peers.{BY_HAND[backend]}"):
        command = [sys.executable, "-c", statement]
        # Without a check: what cannot be imported here fails again, and is reported, where it is measured.
        subprocess.run(command, cwd=ROOT, env=surroundings(backend, cache), capture_output=True)


def child(config: Config, what: dict[str, str], given: Path, cache: Path) -> dict[str, object]:
    """The row of one process; where it failed, it has "failed", the reason, and no figures."""
    command = [sys.executable, "-m", "benchmarks.engine", f"--once={what['contender']}"]
    command += [f"--backends={what['backend']}", f"--models={what['model']}", f"--inputs={given}", f"--cache={cache}"]
    command += [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in ("batch_size", "steps", "warmup")]
    around = surroundings(what["backend"], cache)
    row = {**what, "load": os.getloadavg()[0]}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=around, capture_output=True, text=True, check=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"took more than {PATIENCE} s"}
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [f"exit code {error.returncode}"]
        return {**row, "failed": lines[-1][:300]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


LABELS = {
    ("engine", "jax"): "kvision",
    ("engine", "tensorflow"): "kvision",
    ("engine", "torch"): "kvision",
    ("fit", "jax"): "`model.fit`",
    ("fit", "tensorflow"): "`model.fit`",
    ("fit", "torch"): "`model.fit`",
    ("by_hand", "jax"): "Flax and Optax",
    ("by_hand", "tensorflow"): "`tf.function`",
    ("by_hand", "torch"): "`torch.nn`",
    ("compiled", "torch"): "`torch.compile`",
}
# A row's figure, its column, its factor and format there.
COLUMNS = (
    ("images_per_second", "images/s", 1, "{:,.0f}"),
    ("step_cpu_seconds", "CPU time a step", 1000, "{:,.0f} ms"),
    ("seconds_to_first_step", "to first step", 1, "{:.1f} s"),
    ("compile_seconds", "of it compiling", 1, "{:.1f} s"),
    ("peak_memory_bytes", "peak memory", 2**-20, "{:,.0f} MiB"),
)
COMPARED = ("images_per_second", "step_cpu_seconds", "seconds_to_first_step", "peak_memory_bytes")


def table(rows: list[dict]) -> str:
    """Medians as a Markdown table.

    In parentheses: kvision's (its cold start's) as a multiple of this contender's, on the same backend and network.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["model"], list(BY_HAND).index(row["backend"]), CONTENDERS.index(row["contender"]), row["start"])
        groups.setdefault(key, []).append(row)
    good = {key: [row for row in group if "failed" not in row] for key, group in groups.items()}
    medians = {
        key: {name: median(row[name] for row in rows) for name, *_ in COLUMNS} for key, rows in good.items() if rows
    }
    head = ["network", "backend", "contender", *(title for _, title, *_ in COLUMNS), "n"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * 3}{' ---: |' * (len(COLUMNS) + 1)}"]
    for key in sorted(groups):
        row, own, ours = groups[key][0], medians.get(key), medians.get((*key[:2], CONTENDERS.index("engine"), "cold"))
        label = LABELS[row["contender"], row["backend"]] + (", second start" if row["start"] == "warm" else "")
        cells = [row["model"], row["backend"], label]
        for name, _, factor, form in COLUMNS:
            cell = form.format(factor * own[name]) if own else ""
            if own and ours and own is not ours and name in COMPARED:
                cell += f" ({ours[name] / own[name]:.2f})"
            cells.append(cell)
        if own is None:
            cells[3] = "failed: " + row["failed"].replace("|", "\\|")
        lines.append(f"| {' | '.join([*cells, str(len(good[key]))])} |")
    return "\n".join(lines)


def note(report: dict) -> str:
    """What stands below the table: how it was measured."""
    hardware = report["hardware"]
    memory = f", {hardware['memory_bytes'] / 2**30:.0f} GiB" if hardware["memory_bytes"] else ""
    machine = f"{hardware['cores']} cores of {hardware['cpu']}{memory}"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    loads = [row["load"] for row in report["rows"]]
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


def rounds(config: Config, command: str) -> dict[str, object]:
    """The report of all rounds; after each it is written to `config.out`."""
    peer_versions = {name: metadata.version(name) for name in ("flax", "optax") if importlib.util.find_spec(name)}
    versions = {**environment.versions(), **peer_versions}
    rows: list[dict] = []
    report = {"command": command, "n": config.n, "hardware": environment.hardware(), "versions": versions, "rows": rows}
    groups = plan(config)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.npz"
        np.savez(given, **inputs(config))
        for backend in config.backends.split(","):
            wake(backend, Path(folder) / "woken")
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
    command = " ".join(["python -m benchmarks.engine", *(sys.argv[1:] if argv is None else argv)])
    report = rounds(config, command) if config.n else json.loads(Path(config.out).read_text())
    check_parameters(report["rows"])
    content = f"{table(report['rows'])}\n\n{note(report)}"
    print(content)
    if config.write:
        page = ROOT / "docs" / "engine.md"
        page.write_text(put(page.read_text(), "engine", content))


if __name__ == "__main__":
    main()
