"""Transfer learning from five classes of CIFAR-10 to the others: `KERAS_BACKEND=torch python -m apps.transfer`.

A VGG is trained on the first half of the classes (or loaded from `--weights`). Then its head is replaced, the rest is
frozen, and the new head is trained on 50 images of each other class (a linear probe). `--unfreeze stage5` then
fine-tunes that stage at a tenth of the learning rate. The baseline is the same network trained from scratch on the same
images.

Weights of other classes than the data set's transfer to all its classes, two or more:
`python -m apps.transfer --weights resnet20.cifar10 --data PHOTOS`.

Test accuracy: linear probe 54.0 %, with stage 5 unfrozen 56.5 %, from scratch 39.8 % (PyTorch, seed 0, one run), a
    margin
of 16.7 points. It takes about 25 minutes on one core of a Xeon with AVX-512, 15 of them for the source classes.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from kvision import flags
from kvision.config import Config, flag
from kvision.convert import find, pretrained_weights
from kvision.data import Dataset
from kvision.experiment import NEW_HEAD, command, run_folder, store_config, train
from kvision.files import write_json
from kvision.run_data import read_data
from kvision.training import finetune
from kvision.weights import inspect

DATASETS = ("cifar10", "shapes10")
HEAD = r"(.*_)?logits"  # the last layer of every network of the zoo, and of its auxiliary heads


@dataclass(frozen=True)
class TransferConfig(Config):
    """A run of this app; `epochs`, `learning_rate` and so on apply to the new head and to the baseline."""

    per_class: int = flag(50, "training images of each target class")
    source_classes: str | None = flag(None, "comma-separated source classes", none="the first half")
    source_epochs: int = flag(3, "epochs on the source classes, without --weights")
    source_learning_rate: float = flag(0.05, "maximum learning rate on the source classes")
    unfreeze: str | None = flag(None, "then unfreeze layers with this prefix, as stage5", metavar="PREFIX")
    unfreeze_epochs: int = flag(10, "epochs with the unfrozen layers")
    learning_rate_factor: float = flag(0.1, "learning-rate factor of the unfrozen layers")

    def __post_init__(self):
        super().__post_init__()
        flags.check(self, "per_class source_epochs unfreeze_epochs", lambda value: value >= 1, "at least 1")
        flags.check(self, "source_learning_rate learning_rate_factor", lambda value: value > 0, "a positive number")


RECIPE = TransferConfig(
    app="transfer",
    model="vgg11_bn",
    epochs=40,
    eval_every=10,
    batch_size=50,
    learning_rate=0.05,
    warmup=0.1,
    l2=2.5e-4,
    flip=True,
    crop_padding=4,
    hidden=512,
)


def split(config: TransferConfig, dataset: Dataset) -> tuple[Dataset | None, Dataset]:
    """Split into the data set of the source classes and a few images of the target classes.

    If `--weights` has none of the data set's classes, all classes are targets and the first data set is None.

    Raises:
        flags.UsageError: too few classes, or `--source-classes` is invalid.
    """
    classes = dataset.classes
    if config.weights is not None and config.source_classes is None:
        trained = (inspect(find(config.weights))["manifest"] or {}).get("classes") or ()
        if not set(trained) & set(classes):
            return None, dataset.per_class(config.per_class, config.seed)
    if len(classes) < 4 and config.source_classes is None:
        raise flags.UsageError(
            f"{dataset.name} has {len(classes)} classes, too few to split into source and target classes: give "
            f"--weights, a file or pretrained weights ({', '.join(pretrained_weights())})"
        )
    first = config.source_classes.split(",") if config.source_classes else classes[: len(classes) // 2]
    rest = [name for name in classes if name not in first]
    if (unknown := set(first) - set(classes)) or len(first) < 2 or len(rest) < 2:
        wrong = f"unknown are {', '.join(sorted(unknown))}" if unknown else "it must leave at least two classes"
        raise flags.UsageError(f"--source-classes takes two or more of {', '.join(classes)}; {wrong}")
    return dataset.select(first), dataset.select(rest).per_class(config.per_class, config.seed)


def main(config: TransferConfig = RECIPE) -> dict:
    """Run the comparison; returns the content of metrics.json and the run folder."""
    with run_folder(config) as folder:
        return train_all(config, folder)


def train_all(config: TransferConfig, folder: Path) -> dict:
    """Train the networks, each in a subfolder of `folder`; returns as `main`."""
    # --max-train-samples and --max-test-samples apply to the source classes.
    dataset, note = read_data(replace(config, max_train_samples=None, max_test_samples=None), DATASETS)
    source, target = split(config, dataset)
    store_config(config, folder)
    few = replace(config, max_train_samples=None, weights=None, new_head=False)

    weights = config.weights
    if weights is None:
        print(f"1. train {config.model} on the source classes {', '.join(source.classes)}")
        first = replace(
            config, epochs=config.source_epochs, learning_rate=config.source_learning_rate, batch_size=125, eval_every=1
        )
        train(first, source, folder / "source", note=note)
        weights = str(folder / "source" / "weights.npz")
    print(f"2. train a new head for {', '.join(target.classes)}, {config.per_class} images a class, the rest frozen")
    top = train(
        replace(few, weights=weights, l2=0.0),
        target,
        folder / "head",
        note=note,
        skip=[NEW_HEAD],
        prepare=lambda model: finetune.freeze(model, except_=HEAD),
    )
    best = top
    if config.unfreeze:
        print(f"3. unfreeze {config.unfreeze}, at {config.learning_rate_factor} of the learning rate")

        def unfreeze(model):
            finetune.freeze(model, except_=HEAD)
            finetune.unfreeze(model, config.unfreeze)

        best = train(
            replace(few, weights=str(folder / "head" / "weights.npz"), epochs=config.unfreeze_epochs, hidden=None),
            target,
            folder / "unfrozen",
            note=note,
            prepare=unfreeze,
            factors={rf"(?!{HEAD}).*": config.learning_rate_factor},
        )
    print("4. baseline: train the same network from scratch on the same images")
    scratch = train(few, target, folder / "scratch", note=note)

    margin = best["test_accuracy"] - scratch["test_accuracy"]
    result = best | {
        "head_accuracy": top["test_accuracy"],
        "scratch_accuracy": scratch["test_accuracy"],
        "margin": margin,
        "weights": Path(weights).name if config.weights else "source/weights.npz",  # no local path
        "folder": str(folder),
    }
    write_json(folder / "metrics.json", result)
    print(
        f"Transfer to {len(target.classes)} classes of {dataset.name} from {config.per_class} images each: "
        f"{best['test_accuracy']:.2%}, from scratch {scratch['test_accuracy']:.2%}: {100 * margin:+.1f} points"
    )
    return result


if __name__ == "__main__":
    sys.exit(command(main, {RECIPE.model: RECIPE}, __doc__, otherwise=replace(RECIPE, hidden=None)))
