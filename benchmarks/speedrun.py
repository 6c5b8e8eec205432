"""Seconds to 94 % on CIFAR-10: the recipe of airbench94 on one accelerator, run after run in one process.

    KERAS_BACKEND=torch python -m benchmarks.speedrun --n 10 --data FOLDER --write

As the published record counts (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3), a run's time begins with
training images in the device's memory and compiled programs, and ends with the scores of the test images: it holds the
initial weights, the whitening layer, training and the six views of each test image. Each run has its own seed. What was
compiled is that of a short run before the first, which is not counted.
"""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import keras
import numpy as np

from apps.cifar10 import DATASETS, RECIPES
from docs.update import put
from kvision import engine, flags, training
from kvision.data.batches import Augmentation, Batches
from kvision.engine.pictures import Pictures
from kvision.run import batches_of, build, optimizer_of, read_data, whiten
from kvision.tasks.classification import cross_entropy, score
from kvision.tracking import environment
from kvision.weights.initial import initialize

ROOT = Path(__file__).resolve().parent.parent
WHITENED = 5000  # training images that the whitening layer is set from, as in `kvision.run`


def setting(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    n: int = setting(10, "runs, of seeds 0, 1, 2 ...")
    first: int = setting(0, "the first of the seeds")
    model: str = setting("airbench94", "network whose recipe is run")
    epochs: int | None = setting(None, "none takes the recipe's")
    learning_rate: float | None = setting(None, "none takes the recipe's")
    views: str | None = setting(None, "none takes the recipe's")
    dtype: str = setting("bfloat16", "what layers compute in", choices=tuple(engine.POLICIES))
    limit: int | None = setting(None, "train on so many images; none takes all")
    limit_test: int | None = setting(None, "test on so many images; none takes all")
    data: str | None = setting(None, "folder with CIFAR-10; none looks in the usual places", metavar="FOLDER")
    out: str | None = setting(None, "file for every single figure; none is docs/measured/speedrun-BACKEND.json")
    write: bool = setting(False, "put the table of all such files into docs/engine.md; with --n 0 do only this")

    def __post_init__(self):
        flags.expect(self, "n first", lambda value: value >= 0, "at least 0")
        flags.expect(self, "epochs limit limit_test", lambda value: value >= 1, "at least 1")


def recipe_of(config: Config):
    """The app's recipe with what the command line changes."""
    if config.model not in RECIPES:
        raise flags.UsageError(f"--model {config.model} has no recipe in apps.cifar10; choose of {', '.join(RECIPES)}")
    own = {name: getattr(config, name) for name in ("epochs", "learning_rate", "views", "dtype", "data")}
    return replace(RECIPES[config.model], **{name: value for name, value in own.items() if value is not None})


class Course:
    """Everything that stays from run to run: images, network, compiled programs."""

    def __init__(self, recipe, dataset):
        self.recipe, self.dataset = recipe, dataset
        self.model, self.preprocessing, _ = build(recipe, dataset)
        self.batches = batches_of(recipe, dataset, self.preprocessing)
        self.optimizer = optimizer_of(recipe, self.batches.steps, {})
        self.optimizer.build(self.model.trainable_variables)
        self.fresh = training.values(self.optimizer.variables)
        self.engine = engine.create(self.model, self.optimizer, cross_entropy(recipe.label_smoothing))
        self.pictures = Pictures(self.batches)
        border = Augmentation(shift=1, border="reflect")
        self.test = Pictures(Batches(dataset.x_test, dataset.y_test, 1, 0, self.preprocessing, border))
        self.total = recipe.epochs * self.batches.steps
        self.at_once = training.steps_at_once(self.batches.steps)

    def run(self, seed: int, steps: int | None = None) -> dict[str, float]:
        """One run, or its first steps: seconds of training and of all, accuracy of each image alone and on views."""
        started = time.perf_counter()
        initialize(self.model, seed)
        training.assign(self.optimizer.variables, self.fresh)
        if self.recipe.whiten:
            whiten(self.model, self.preprocessing(self.dataset.x_train[:WHITENED]))
        self.batches.reseed(seed)
        left, losses = steps or self.total, None
        for epoch in range(self.recipe.epochs):
            draws = list(self.batches.draws(epoch))
            for first in range(0, min(left, len(draws)), self.at_once):
                chunk = np.stack(draws[first : first + self.at_once])
                losses, _ = self.engine.train_steps(self.pictures, chunk)
            left -= len(draws)
            if left <= 0:
                break
        loss = float(keras.ops.convert_to_numpy(losses)[-1])
        if hasattr(self.optimizer, "finalize_variable_values"):
            self.engine.push()
            self.optimizer.finalize_variable_values(self.model.trainable_variables)
        trained = time.perf_counter()
        logits = training.predict_pictures(self.engine, self.test, views=self.recipe.views)
        ended = time.perf_counter()
        alone = training.predict_pictures(self.engine, self.test)
        return {
            "seed": seed,
            "seconds": ended - started,
            "train_seconds": trained - started,
            "accuracy": score(logits, self.dataset.y_test)["accuracy"],
            "alone": score(alone, self.dataset.y_test)["accuracy"],
            "last_loss": loss,
        }


def table(reports: list[dict]) -> str:
    """The runs as a Markdown table."""
    lines = [
        "| backend | device | epochs | accuracy, mean of n | of each image alone | at least 94 % | seconds "
        "| of it training | n |",
        f"| --- | --- |{' ---: |' * 7}",
    ]
    for report in reports:
        runs = report["runs"]
        accuracies, seconds = [run["accuracy"] for run in runs], [run["seconds"] for run in runs]
        spread = f" ± {100 * stdev(accuracies):.2f}" if len(runs) > 1 else ""
        lines.append(
            f"| {report['backend']} | {report['device']} | {report['epochs']} | {mean(accuracies):.2%}{spread} | "
            f"{mean(run['alone'] for run in runs):.2%} | {sum(value >= 0.94 for value in accuracies)} of {len(runs)} | "
            f"{mean(seconds):.2f} | {mean(run['train_seconds'] for run in runs):.2f} | {len(runs)} |"
        )
    versions = {name: version for report in reports for name, version in report["versions"].items()}
    lines.append("")
    lines.append(
        f"`python -m benchmarks.speedrun`, {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{', '.join(sorted({report['dtype'] for report in reports}))}. ± is the standard deviation of one run. A "
        "run's seconds hold initial weights, whitening, training and the scoring of the test images on their views; "
        "what was compiled before does not count."
    )
    return "\n".join(lines)


def main(argv=None) -> None:
    config = Config(**flags.parse(Config, argv, prog="benchmarks.speedrun", description=__doc__, defaults=Config()))
    backend = keras.backend.backend()
    out = Path(config.out or ROOT / "docs" / "measured" / f"speedrun-{backend}.json")
    if config.n:
        recipe = recipe_of(config)
        engine.configure(recipe.dtype)
        dataset, _ = read_data(recipe, DATASETS, log=lambda text: print(text, file=sys.stderr))
        dataset = dataset.subset(train=config.limit, test=config.limit_test, seed=0)
        course = Course(recipe, dataset)
        started = time.perf_counter()
        course.run(config.first, steps=course.at_once + 1)
        hardware = environment.hardware()
        report = {
            "command": " ".join(["python -m benchmarks.speedrun", *flags.arguments(config, ("data", "out", "write"))]),
            "backend": backend,
            "device": hardware["gpus"][0].partition(",")[0] if engine.accelerated() else "cpu",
            "model": recipe.model,
            "epochs": recipe.epochs,
            "learning_rate": recipe.learning_rate,
            "dtype": recipe.dtype,
            "dataset": dataset.name,
            "compile_seconds": time.perf_counter() - started,
            "hardware": hardware,
            "versions": environment.versions(backend),
            "runs": [],
        }
        for seed in range(config.first, config.first + config.n):
            report["runs"].append(course.run(seed))
            print(json.dumps(report["runs"][-1]), file=sys.stderr, flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
        print(table([report]))
    if config.write:
        files = sorted((ROOT / "docs" / "measured").glob("speedrun-*.json"))
        page = ROOT / "docs" / "engine.md"
        page.write_text(put(page.read_text(), "speedrun", table([json.loads(file.read_text()) for file in files])))


if __name__ == "__main__":
    main()
