"""What each regularizer does to one network that overfits: `KERAS_BACKEND=torch python -m apps.regularize`.

A small residual network overfits 2,000 images of CIFAR-10. The run is repeated with each regularizer alone, with the
same initial weights, order and schedule. The run folder gets a table (table.md, metrics.json) and report.html with the
curves: training accuracy (without augmentation, in inference mode), test accuracy on all 10,000 images, and their gap.

Accuracy in percent (PyTorch on a CPU, seed 0, one run each, standard error half a point; train, test):

    none               100.0  50.9      stochastic_depth    88.7  52.0
    l1                 100.0  51.8      shake_shake         85.5  54.2
    l2                 100.0  53.0      mixup               88.1  53.5
    elastic_net        100.0  52.6      cutmix              76.4  53.2
    weight_decay       100.0  54.2      cutout              85.7  53.2
    orthogonal          98.8  53.5      erasing             97.8  53.0
    max_norm            97.8  52.9      flip_and_shift      67.6  54.4
    dropout             85.5  51.1      label_smoothing    100.0  49.0
    spatial_dropout     85.3  53.1      frozen_batch_norm   56.1  44.0
    dropblock           92.3  51.9      clipping            87.8  49.7
    gaussian_noise      83.8  50.6      ema                100.0  50.8
    early_stopping      51.2  42.4      swa                100.0  51.2

The settings come from short trials, not from a search. Early stopping ends the run while the learning rate is still
high; it requires a schedule that does not depend on the last epoch. A row takes 40 to 130 s on one thread of an AMD
EPYC with other load, all rows 50 minutes.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras

from kvision import engine, experiment, files, flags, run_data
from kvision.config import HELD_OUT, Config, flag
from kvision.data import Dataset
from kvision.layers import activation, batch_norm, conv, global_pool, logits, max_pool, norm
from kvision.layers.noise import DropBlock, Dropout, GaussianNoise, ShakeShake, SpatialDropout, StochasticDepth
from kvision.random import key
from kvision.report import environment, page
from kvision.report.run_report import column, fractions_to_percent
from kvision.report.svg import bar_chart, line_chart
from kvision.tasks import classification
from kvision.training import evaluation, schedules, trainer
from kvision.weights.initialization import initialize

DATASETS = ("cifar10", "shapes10")


@dataclass(frozen=True)
class Row:
    """One regularizer: its setting as text, and either flags of a run, or a layer and its position in each block."""

    setting: str
    flags: dict[str, object] = field(default_factory=dict)
    position: str | None = None
    layer: Callable | None = None
    prepare: Callable = lambda model: None


ROWS = {
    "none": Row("the plain network"),
    "l1": Row("1e-4", {"l1": 1e-4}),
    "l2": Row("2e-3", {"l2": 2e-3}),
    "elastic_net": Row("L1 5e-5, L2 1e-3", {"l1": 5e-5, "l2": 1e-3}),
    "weight_decay": Row("decoupled, 0.05", {"weight_decay": 0.05}),
    "orthogonal": Row("1e-2", {"orthogonal": 1e-2}),
    "max_norm": Row("1", {"max_norm": 1.0}),
    "dropout": Row("0.3 in each branch", position="branch", layer=lambda **options: Dropout(0.3, **options)),
    "spatial_dropout": Row(
        "0.2 in each branch", position="branch", layer=lambda **options: SpatialDropout(0.2, **options)
    ),
    "dropblock": Row(
        "0.2 in each branch, 3 pixels", position="branch", layer=lambda **options: DropBlock(0.2, 3, **options)
    ),
    "gaussian_noise": Row(
        "stddev 0.5 in each branch", position="branch", layer=lambda **options: GaussianNoise(0.5, **options)
    ),
    "stochastic_depth": Row(
        "0.3, each block", position="residual", layer=lambda **options: StochasticDepth(0.3, **options)
    ),
    "shake_shake": Row("instead of the mean", position="sum", layer=ShakeShake),
    "mixup": Row("alpha 1", {"mixup": 1.0}),
    "cutmix": Row("alpha 1", {"cutmix": 1.0}),
    "cutout": Row("16 pixels", {"cutout": 16}),
    "erasing": Row("half of the images", {"random_erasing": 0.5}),
    "flip_and_shift": Row("4 pixels", {"flip": True, "crop_padding": 4}),
    "label_smoothing": Row("0.1", {"label_smoothing": 0.1}),
    "frozen_batch_norm": Row("identity, learning rate 0.02", {"learning_rate": 0.02}, prepare=norm.freeze_batch_norm),
    "clipping": Row("global norm 0.5", {"clip_norm": 0.5}),
    "ema": Row("0.99", {"ema": 0.99}),
    "swa": Row("the last half, constant rate", {"swa": 0.5, "schedule": "constant"}),
    "early_stopping": Row("patience 5, 10 % validation split", {"early_stopping": 5}),
}


@dataclass(frozen=True)
class RegularizeConfig:
    """A run of this app. Raises `flags.UsageError` for an invalid value."""

    only: str | None = flag(None, f"comma-separated rows of {', '.join(ROWS)}", none="all", metavar="ROWS")
    epochs: int = flag(30, "passes over the training images")
    batch_size: int = flag(100, "images a step")
    learning_rate: float = flag(0.1, "maximum learning rate of the schedule")
    schedule: str = flag("cosine", "learning-rate schedule", choices=schedules.SCHEDULES)
    max_train_samples: int = flag(2000, "use N training images, balanced over the classes")
    max_test_samples: int | None = flag(None, "use N test images", none="all")
    eval_every: int = flag(5, "evaluate every N epochs")
    seed: int = flag(0, "seed of weights, order and noise")
    data: str | None = flag(None, "folder or file of the data set", none="cache, ./data or download", metavar="PATH")
    output_dir: str | None = flag(None, "run folder", none="a new one below runs/", metavar="FOLDER")

    def __post_init__(self):
        if unknown := [name for name in self.rows() if name not in ROWS]:
            raise flags.UsageError(f"--only must be of {', '.join(ROWS)}, got {', '.join(unknown)}")
        self.config("none")  # raises for invalid numbers

    def rows(self) -> list[str]:
        """The names of the rows to run, the plain network first."""
        return list(ROWS) if self.only is None else list(dict.fromkeys(["none", *self.only.split(",")]))

    def config(self, name: str) -> Config:
        """The configuration of a row's run."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "only"}
        return Config(app="regularize", warmup=0.1, **values | ROWS[name].flags)


def network(input_shape: tuple[int, int, int], classes: int, row: Row, seed: int) -> keras.Model:
    """Build a residual network of two blocks with 16 and 32 filters, whose residual is the mean of two branches.

    `row.layer` follows the ReLU of each branch (position "branch"), follows the mean ("residual"), or replaces it
    ("sum").
    """

    def insert(position, x, name):
        if row.position != position:
            return x
        return row.layer(name=name, seed=key(seed, name))(x)

    x = inputs = keras.Input(input_shape, name="image")
    x = conv(16, 3, 2, name="stem_conv")(x)
    x = activation("relu", name="stem")(batch_norm(name="stem_bn")(x))
    for i, filters in enumerate((16, 32), start=1):
        branches = []
        for side in ("a", "b"):
            name = f"stage{i}_{side}"
            y = conv(filters, 3, name=f"{name}_1_conv")(x)
            y = activation("relu", name=f"{name}_1_relu")(batch_norm(name=f"{name}_1_bn")(y))
            y = conv(filters, 3, name=f"{name}_2_conv")(insert("branch", y, f"{name}_noise"))
            branches.append(batch_norm(name=f"{name}_2_bn")(y))
        mean = keras.layers.Average(name=f"stage{i}_mean")
        y = insert("sum", branches, f"stage{i}_noise") if row.position == "sum" else mean(branches)
        y = insert("residual", y, f"stage{i}_noise")
        if x.shape != y.shape:
            x = batch_norm(name=f"stage{i}_shortcut_bn")(conv(filters, 1, name=f"stage{i}_shortcut_conv")(x))
        x = activation("relu", name=f"stage{i}")(keras.layers.Add(name=f"stage{i}_add")([x, y]))
        x = max_pool(2, name=f"stage{i}_pool")(x)
    return keras.Model(inputs, logits(classes)(global_pool()(x)), name="regularize")


def train(name: str, config: RegularizeConfig, dataset: Dataset, log=print) -> dict:
    """Train the network with one regularizer; returns its row of the table."""
    row, run, started = ROWS[name], config.config(name), time.perf_counter()
    model = network(dataset.input_shape, len(dataset.classes), row, run.seed)
    initialize(model, run.seed)
    preprocessing = run_data.build_preprocessing(dataset)
    row.prepare(model)
    experiment.regularize_weights(run, model)
    part, validation = (
        run_data.train_validation_split(dataset, HELD_OUT, run.seed) if run.early_stopping else (dataset, None)
    )
    batches = run_data.build_batches(run, part, preprocessing)
    train, test = (part.x_train, part.y_train), (dataset.x_test, dataset.y_test)
    evaluations = {"test": test, "train": train} | ({} if validation is None else {"validation": validation})
    history = trainer.fit(
        model,
        classification.Classification(label_smoothing=run.label_smoothing),
        experiment.build_optimizer(run, batches.steps, {}),
        batches,
        epochs=run.epochs,
        evaluations=evaluations,
        schedule=trainer.Schedule(eval_every=run.eval_every),
        early_stopping=trainer.EarlyStopping(run.early_stopping) if run.early_stopping else None,
        label=name,
    )
    runner = engine.create(model)
    scored = {
        f"{which}_{figure}": value
        for which, (images, labels) in (("train", train), ("test", test))
        for figure, value in classification.score(evaluation.predict(runner, images, preprocessing), labels).items()
    }
    gap = scored["train_accuracy"] - scored["test_accuracy"]
    log(f"{name}: train {scored['train_accuracy']:.2%}, test {scored['test_accuracy']:.2%}, gap {100 * gap:.2f} points")
    result = {"regularizer": name, "setting": row.setting, **scored, "gap": gap}
    return {**result, "seconds": time.perf_counter() - started, "history": history.epochs}


COLUMNS = ("regularizer", "setting", "train", "test", "gap, points", "test minus none, points")


def cells(rows: list[dict]) -> list[list[str]]:
    """The cells of the table, row by row."""
    plain = rows[0]["test_accuracy"]
    return [
        [
            row["regularizer"].replace("_", " "),
            row["setting"],
            page.percent(row["train_accuracy"]),
            page.percent(row["test_accuracy"]),
            f"{100 * row['gap']:.2f}",
            f"{100 * (row['test_accuracy'] - plain):+.2f}",
        ]
        for row in rows
    ]


def markdown(rows: list[dict]) -> str:
    """The table as Markdown."""
    lines = [COLUMNS, ("---", "---", "---:", "---:", "---:", "---:"), *cells(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_report(folder: Path, result: dict) -> None:
    """Write report.html: the table, bar charts of test accuracy and gap, and the curves of each row."""
    rows = result["rows"]
    curve = lambda row, key: fractions_to_percent(column(row["history"], key))  # noqa: E731
    plain, charts = curve(rows[0], "test_accuracy"), []
    for row in rows:
        series = {"train": curve(row, "train_accuracy"), "test": curve(row, "test_accuracy")}
        series |= {"test, none": plain} if row is not rows[0] else {}
        charts.append(
            line_chart(series, row["regularizer"].replace("_", " "), "epoch", "accuracy, %", zero=True, height=240)
        )
    names = [row["regularizer"].replace("_", " ") for row in rows]
    bars = (
        bar_chart({n: 100 * row["test_accuracy"] for n, row in zip(names, rows, strict=True)}, "%", "Test accuracy"),
        bar_chart({n: 100 * row["gap"] for n, row in zip(names, rows, strict=True)}, "points", "Gap"),
    )
    header = (
        "<h1>Regularizers</h1><p>One network, the same initial weights and batches, on "
        f"{result['train_images']:,} images of {page.escape(result['dataset'])}; each regularizer alone, one run each. "
        "Training accuracy is measured without augmentation, in inference mode.</p>"
    )
    more = [("command", f"`{result['command']}`"), ("seed", str(result["seed"]))]
    sections = [
        page.section(
            "Results", page.table(COLUMNS, [[page.escape(c) for c in line] for line in cells(rows)], range(2, 6))
        ),
        page.section("Side by side", f'<div class="charts">{"".join(bars)}</div>'),
        page.section("Curves", f'<div class="charts">{"".join(charts)}</div>'),
        page.environment_section(result["versions"], result["hardware"], more),
    ]
    files.write_text(folder / "report.html", page.document("Regularizers", header, *sections))


def main(config: RegularizeConfig = RegularizeConfig(), log=print) -> dict:
    """Run the rows; returns the content of metrics.json and the run folder."""
    with experiment.run_folder(config.config("none")) as folder:
        return train_rows(config, folder, log)


def train_rows(config: RegularizeConfig, folder: Path, log=print) -> dict:
    """Run the rows in a folder; returns as `main`."""
    sized = dataclasses.replace(
        config.config("none"), model="resnet20"
    )  # photos are resized to the size of CIFAR-10's images
    dataset, note = run_data.read_data(sized, DATASETS, log)
    dataset = dataset.subset(train=config.max_train_samples, test=config.max_test_samples, seed=config.seed)
    files.write_json(folder / "config.json", dataclasses.asdict(dataclasses.replace(config, output_dir=None)))
    backend, rows = keras.backend.backend(), []
    words = [
        word
        for item in dataclasses.fields(config)
        if (value := getattr(config, item.name)) != item.default and item.name != "output_dir"
        for word in (f"--{item.name.replace('_', '-')}", "..." if item.name == "data" else str(value))
    ]
    result = {
        "app": "regularize",
        "backend": backend,
        "dataset": dataset.name,
        "note": note,
        "train_images": len(dataset.x_train),
        "test_images": len(dataset.x_test),
        "seed": config.seed,
        "rows": rows,
        "versions": environment.versions(backend),
        "hardware": environment.hardware(),
        "command": f"KERAS_BACKEND={backend} python -m {flags.app_module('regularize')} {shlex.join(words)}".strip(),
    }
    for name in config.rows():
        rows.append(train(name, config, dataset, log))
        # Written after each row, so that a stopped run keeps its rows.
        files.write_json(folder / "metrics.json", result)
        files.write_text(folder / "table.md", markdown(rows))
        write_report(folder, result)
    log(markdown(rows))
    log(folder / "report.html")
    return {**result, "folder": str(folder)}


def command(argv=None) -> int:
    """Run the app from the command line; returns the exit code."""
    prog = f"python -m {flags.app_module('regularize')}"
    given = flags.parse(RegularizeConfig, argv, prog=prog, description=__doc__, defaults=RegularizeConfig())
    return flags.run_cli(prog, lambda: main(RegularizeConfig(**given)) and None, experiment.ERRORS)


if __name__ == "__main__":
    sys.exit(command())
