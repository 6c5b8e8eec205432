"""Seconds to 94 % on CIFAR-10: the recipe of airbench94 on one accelerator, run after run in one process.

    KERAS_BACKEND=torch python -m benchmarks.speedrun --n 10 --data FOLDER --write

As the published record counts (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3), a run's time begins with
training images in the device's memory and compiled programs, and ends with the scores of the test images: it holds the
whitening layer, training and the six views of test images. It also holds the initial weights, which the published
scripts leave out; their share is given beside it. Each run has its own seed. What was compiled is that of a short run
before the first, which is not counted.

The recipe is that of airbench94_muon (https://github.com/KellerJordan/cifar10-airbench): Muon for the filters, SGD for
the batch norms' offsets, the last layer and, in the first three epochs, the whitening layer's bias. Its loss is the sum
over a batch where ours is the mean, and it divides the features by 256 where our network divides them by 9: the rates
below are the same ones in these units. As in https://github.com/hiverge/cifar10-speedrun the six views are made of the
quarter of the test images that the network is least sure of. `--recipe app` is the app's own recipe.
"""

import importlib
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
from kvision import engine, flags, zoo
from kvision.data.batches import PARAMS, Augmentation, Batches
from kvision.data.device import DeviceDataset
from kvision.data.tta import TTA
from kvision.experiment import build, build_optimizer
from kvision.layers import skip_init, whitening_kernel_on_device
from kvision.report import environment
from kvision.run_data import build_batches, build_preprocessing, read_data
from kvision.tasks.classification import Classification, log_probabilities, score
from kvision.training import evaluation, trainer
from kvision.training.muon import Muon
from kvision.training.schedules import schedule
from kvision.weights.initialization import initialize

ROOT = Path(__file__).resolve().parent.parent
WHITENED = 5000  # training images that the whitening layer is set from, as in `kvision.experiment`
UNSURE = 0.25  # share of the test images that are scored on all views

# airbench94_muon, in the units of a mean loss and of features divided by 9.
MUON = replace(
    RECIPES["airbench94"],
    epochs=8,
    batch_size=2000,
    optimizer="sgd",
    learning_rate=0.24,  # of Muon
    momentum=0.6,
    weight_decay=0.0,
    warmup=0.0,
    bias_factor=1.0,
    lookahead=None,
)
BIAS_RATE, HEAD_RATE = 0.053 * 2000, 0.67 * 2000 * (9 / 256) ** 2
DECAY = 2e-6 * 2000  # share of a variable that a step of the full rate takes away
WHITEN_EPOCHS = 3  # in which the whitening layer's bias is trained
TEST_BATCH = 5000


def muon(recipe, steps: int, whiten_epochs: int = WHITEN_EPOCHS) -> Muon:
    """The recipe's optimizer, of epochs of so many steps."""
    total, whiten = recipe.epochs * steps, {}
    if whiten_epochs:
        whiten["whiten_conv/bias"] = schedule("linear", BIAS_RATE, whiten_epochs * steps), DECAY / BIAS_RATE
    return Muon(
        schedule("linear", recipe.learning_rate, total),
        recipe.momentum,
        steps=3,
        dtype="bfloat16",
        normalize=True,
        sgd=whiten
        | {
            ".*bn/beta": (schedule("linear", BIAS_RATE, total), DECAY / BIAS_RATE),
            "logits/kernel": (schedule("linear", HEAD_RATE, total), DECAY / HEAD_RATE),
        },
        sgd_momentum=0.85,
    )


def setting(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    n: int = setting(10, "runs, of seeds 0, 1, 2 ...")
    first: int = setting(0, "the first of the seeds")
    recipe: str = setting("muon", "airbench94_muon's, or the app's for --model", choices=("muon", "app"))
    model: str = setting("airbench94", "network that is trained")
    epochs: int | None = setting(None, "none takes the recipe's")
    learning_rate: float | None = setting(None, "none takes the recipe's")
    tta: str | None = setting(None, "none takes the recipe's")
    whiten_epochs: int = setting(WHITEN_EPOCHS, "of muon's: epochs in which the whitening layer's bias is trained")
    unsure: float = setting(UNSURE, "share of the test images, the least sure ones, that are scored on the views")
    compile: bool = setting(True, "PyTorch: compile the step; JAX's is compiled in any case")
    dtype: str = setting("bfloat16", "what layers compute in", choices=tuple(engine.POLICIES))
    max_train_samples: int | None = setting(None, "train on so many images; none takes all")
    max_test_samples: int | None = setting(None, "test on so many images; none takes all")
    data: str | None = setting(None, "folder with CIFAR-10; none looks in the usual places", metavar="FOLDER")
    output_dir: str | None = setting(None, "file for every single figure; none is docs/measured/speedrun-BACKEND.json")
    write: bool = setting(False, "put the table of all such files into docs/engine.md; with --n 0 do only this")

    def __post_init__(self):
        flags.check(self, "n first whiten_epochs", lambda value: value >= 0, "at least 0")
        flags.check(self, "epochs max_train_samples max_test_samples", lambda value: value >= 1, "at least 1")
        flags.check(self, "unsure", lambda value: 0 < value <= 1, "above 0 and at most 1")


def recipe_of(config: Config):
    """The recipe with what the command line changes."""
    if config.model not in RECIPES:
        raise flags.UsageError(f"--model {config.model} has no recipe in apps.cifar10; choose of {', '.join(RECIPES)}")
    if config.recipe == "muon" and not config.model.startswith("airbench"):
        raise flags.UsageError(
            f"--recipe muon is of airbench94 and airbench_small: give --recipe app for {config.model}"
        )
    recipe = replace(MUON, model=config.model) if config.recipe == "muon" else RECIPES[config.model]
    own = {name: getattr(config, name) for name in ("epochs", "learning_rate", "tta", "dtype", "data")}
    return replace(recipe, **{name: value for name, value in own.items() if value is not None})


def build_muon(recipe, dataset, whiten_epochs: int = WHITEN_EPOCHS):
    """The network with a bias in its whitening layer, whose kernel is frozen, and its preprocessing."""
    with skip_init():  # each run sets the weights
        model = zoo.build_model(recipe.model, dataset.input_shape, len(dataset.classes), whiten_bias=True)
    layer = model.get_layer("whiten_conv")
    layer.kernel.trainable, layer.bias.trainable = False, whiten_epochs > 0
    return model, build_preprocessing(dataset)


class Course:
    """Everything that stays from run to run: images, network, compiled programs.

    Args:
        recipe: a configuration of `kvision.experiment`.
        with_muon: whether its optimizer is `muon`'s.
        whiten_epochs: of it, epochs in which the whitening layer's bias is trained.
        unsure: share of the test images that are scored on the recipe's views, the others on the image alone.
    """

    def __init__(
        self,
        recipe,
        dataset,
        with_muon: bool = False,
        unsure: float = 1.0,
        whiten_epochs: int = WHITEN_EPOCHS,
    ):
        self.recipe, self.dataset, self.unsure = recipe, dataset, unsure
        if with_muon:
            self.model, self.preprocessing = build_muon(recipe, dataset, whiten_epochs)
        else:
            self.model, self.preprocessing, _ = build(recipe, dataset)
        self.batches = build_batches(recipe, dataset, self.preprocessing)
        steps = self.batches.steps
        self.optimizer = muon(recipe, steps, whiten_epochs) if with_muon else build_optimizer(recipe, steps, {})
        self.optimizer.build(self.model.trainable_variables)
        self.fresh = trainer.values(self.optimizer.variables)
        self.task = Classification(label_smoothing=recipe.label_smoothing)
        self.engine = engine.create(self.model, self.task, self.optimizer)
        self.data = DeviceDataset(self.batches)
        self.whitened = keras.ops.convert_to_tensor(dataset.x_train[:WHITENED])
        padded = Augmentation(crop_padding=1, padding_mode="reflect")
        self.test = DeviceDataset(Batches(dataset.x_test, dataset.y_test, 1, 0, self.preprocessing, padded))
        self.total = recipe.epochs * steps
        self.steps_per_execution = trainer.steps_per_execution(steps)

    def begin(self, seed: int) -> None:
        """Initial weights."""
        initialize(self.model, seed)
        trainer.assign(self.optimizer.variables, self.fresh)
        self.batches.reseed(seed)
        keras.ops.convert_to_numpy(self.model.variables[-1].value)  # until they have come to the device

    def train(self, steps: int) -> float:
        """The first steps of a run; the loss of the last one."""
        if self.recipe.whiten:
            layer = self.model.get_layer("whiten_conv")
            constants = self.preprocessing.constants("float64")
            layer.kernel.assign(whitening_kernel_on_device(self.whitened, *constants, layer.kernel_size[0]))
        left, means = steps, None
        for epoch in range(self.recipe.epochs):
            params = list(self.batches.params(epoch))
            for first in range(0, min(left, len(params)), self.steps_per_execution):
                chunk = np.stack(params[first : first + self.steps_per_execution])
                means = self.engine.train_steps(self.data, chunk)
            left -= len(params)
            if left <= 0:
                break
        total, weight = (keras.ops.convert_to_numpy(leaf)[-1] for leaf in means["loss"])
        loss = float(total / weight)
        if hasattr(self.optimizer, "finalize_variable_values"):
            self.engine.sync_variables()
            self.optimizer.finalize_variable_values(self.model.trainable_variables)
        return loss

    def test_logits(self) -> np.ndarray:
        """Logits of the test images: of all alone, and of the least sure ones the mean over their views."""
        tta = TTA[self.recipe.tta]
        if self.unsure == 1:
            return evaluation.predict_on_device(self.engine, self.test, TEST_BATCH, self.recipe.tta)
        logits = evaluation.predict_on_device(self.engine, self.test, TEST_BATCH)
        count = max(1, round(self.unsure * len(logits)))
        unsure = np.argpartition(log_probabilities(logits).max(axis=-1), count - 1)[:count].astype(np.int32)
        moved = [view for view in tta if view[1:] != (0, False)]  # the image alone is known
        params = np.zeros((len(moved), len(PARAMS), count), np.int32)
        params[:, 0] = unsure
        for param, (_, move, mirrored) in zip(params, moved, strict=True):
            param[1:3], param[3] = self.test.padding - move, mirrored
        weights = np.array([weight for weight, *_ in moved], np.float32)
        logits[unsure] *= 1 - weights.sum()
        logits[unsure] += np.tensordot(weights, self.engine.predict_on_device(self.test, params), axes=1)
        return logits

    def run(self, seed: int, steps: int | None = None) -> dict[str, float]:
        """One run, or its first steps: seconds of its parts and of all, accuracy of each image alone and on views."""
        started = time.perf_counter()
        self.begin(seed)
        begun = time.perf_counter()
        loss = self.train(steps or self.total)
        trained = time.perf_counter()
        logits = self.test_logits()
        ended = time.perf_counter()
        alone = evaluation.predict_on_device(self.engine, self.test, TEST_BATCH)
        return {
            "seed": seed,
            "seconds": ended - started,
            "initial_seconds": begun - started,
            "train_seconds": trained - begun,
            "accuracy": score(logits, self.dataset.y_test)["accuracy"],
            "alone": score(alone, self.dataset.y_test)["accuracy"],
            "last_loss": loss,
        }


def table(reports: list[dict]) -> str:
    """The runs as a Markdown table."""
    lines = [
        "| backend | device | recipe | epochs | accuracy, mean of n | of each image alone | at least 94 % | seconds "
        "| of it initial weights | of it training | n |",
        f"| --- | --- | --- |{' ---: |' * 8}",
    ]
    for report in reports:
        runs = report["runs"]
        accuracies, seconds = [run["accuracy"] for run in runs], [run["seconds"] for run in runs]
        spread = f" ± {100 * stdev(accuracies):.2f}" if len(runs) > 1 else ""
        lines.append(
            f"| {report['backend']} | {report['device']} | {report.get('recipe', 'app')} | {report['epochs']} | "
            f"{mean(accuracies):.2%}{spread} | "
            f"{mean(run['alone'] for run in runs):.2%} | {sum(value >= 0.94 for value in accuracies)} of {len(runs)} | "
            f"{mean(seconds):.2f} | {mean(run.get('initial_seconds', 0) for run in runs):.2f} | "
            f"{mean(run['train_seconds'] for run in runs):.2f} | {len(runs)} |"
        )
    versions = {name: version for report in reports for name, version in report["versions"].items()}
    lines.append("")
    lines.append(
        f"`python -m benchmarks.speedrun`, {', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"{', '.join(sorted({report['dtype'] for report in reports}))}. ± is the standard deviation of one run. A "
        "run's seconds hold initial weights, whitening, training and the scoring of the test images; "
        "what was compiled before does not count."
    )
    return "\n".join(lines)


def main(argv=None) -> None:
    config = Config(**flags.parse(Config, argv, prog="benchmarks.speedrun", description=__doc__, defaults=Config()))
    backend = keras.backend.backend()
    out = Path(config.output_dir or ROOT / "docs" / "measured" / f"speedrun-{backend}.json")
    if config.n:
        recipe = recipe_of(config)
        engine.configure(recipe.dtype)
        dataset, _ = read_data(recipe, DATASETS, log=lambda text: print(text, file=sys.stderr))
        dataset = dataset.subset(train=config.max_train_samples, test=config.max_test_samples, seed=0)
        course = Course(recipe, dataset, config.recipe == "muon", config.unsure, config.whiten_epochs)
        if backend == "torch" and config.compile:
            importlib.import_module("kvision.engine.torch_compiled").compile_steps(course.engine)
        started = time.perf_counter()
        course.run(config.first, steps=course.steps_per_execution + 1)
        hardware = environment.hardware()
        report = {
            "command": " ".join(
                ["python -m benchmarks.speedrun", *flags.arguments(config, ("data", "output_dir", "write"))]
            ),
            "backend": backend,
            "device": hardware["gpus"][0].partition(",")[0] if engine.accelerated() else "cpu",
            "model": recipe.model,
            "recipe": config.recipe,
            "compiled": backend == "jax" or (backend == "torch" and config.compile),
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
