"""One training, killed at random moments and resumed until it ends, against the same training left alone.

    KERAS_BACKEND=torch python -m tests.kills --kills 50 [--write]

A small but real run (convolutions, batch norm, dropout, momentum, augmentation, a schedule, an average of the weights,
early stopping, a Keras callback with a state) writes a checkpoint every second step. The parent follows it and sends
SIGKILL: at a random step and a random part of a step after it, or as soon as it sees the temporary file of a
checkpoint that is being written, and a random moment later. What is left goes on in a new process. At the end weights,
optimizer, history and losses must be those of the run left alone, bit for bit; exit code 1 where they are not.

With KVISION_DATA set the images are CIFAR-10's, else drawn. `--write` records the result in docs/measured.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from kvision.data import Dataset, load
from kvision.report import environment
from tests.datasets import real_data

ROOT = Path(__file__).parent.parent
IMAGES, BATCH, EVERY = 240, 24, 2  # of the training, of a step; steps from checkpoint to checkpoint
STEPS = IMAGES // BATCH
LIFE = 6  # batches that a process draws at most before it is killed
IN_A_WRITE = 0.5  # share of the kills that wait for a checkpoint's temporary file
WRITE_SECONDS = 0.01  # how long after the file was seen the signal is sent at most: about what a write takes


def child(folder: Path, epochs: int) -> None:
    """Train in `folder`, going on from its checkpoints, and write there what came of it (result.json)."""
    import keras

    from kvision.data.batches import Augmentation, Batches
    from kvision.data.preprocessing import Preprocessing
    from kvision.layers import activation, batch_norm, conv, dropout, global_pool, logits
    from kvision.tasks.classification import Classification
    from kvision.training import averaging, optimizers, schedules, trainer
    from kvision.weights.initialization import initialize

    warnings.filterwarnings("error", message=".*passed over")  # a kill breaks no checkpoint
    with np.load(folder.parent / "data.npz") as data:
        x, y = data["x"], data["y"]
    x_inputs = inputs = keras.Input(x.shape[1:], name="image")
    for i, filters in enumerate((16, 32), start=1):
        x_inputs = conv(filters, 3, 2, name=f"stage{i}_conv")(x_inputs)
        x_inputs = activation("relu", name=f"stage{i}")(batch_norm(name=f"stage{i}_bn")(x_inputs))
    outputs = logits(10)(dropout(0.3, name="dropout")(global_pool()(x_inputs)))
    model = keras.Model(inputs, outputs, name="killed")
    initialize(model, 0)
    rate = schedules.schedule("cosine", 0.05, epochs * STEPS, 0.1)
    optimizer = averaging.EMA(optimizers.make_optimizer("sgd", rate, weight_decay=1e-3), 0.95)
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    batches = Batches(x[:IMAGES], y[:IMAGES], BATCH, 0, preprocessing, Augmentation(True, 2, "reflect", 4))
    draw = batches.params

    def params(epoch, start=0):
        for step, drawn in enumerate(draw(epoch, start), start):
            # What the parent follows: the steps, and before the average is scored the batches for its statistics.
            print(f"batch {epoch * STEPS + step}", flush=True)
            yield drawn

    batches.params = params
    held = (x[IMAGES:], y[IMAGES:])
    history = trainer.fit(
        model,
        Classification(label_smoothing=0.1),
        optimizer,
        batches,
        epochs=epochs,
        early_stopping=trainer.EarlyStopping(epochs),
        callbacks=[keras.callbacks.EarlyStopping(patience=epochs, restore_best_weights=True)],
        checkpoint=folder / "checkpoints",
        evaluations={"validation": held},
        schedule=trainer.Schedule(save_every=EVERY),
    )
    times = {"seconds", "images_per_second"}
    rows = [{key: value for key, value in row.items() if key not in times} for row in history.epochs]
    parts = {
        "model": [np.asarray(keras.ops.convert_to_numpy(v.value)).tobytes() for v in model.variables],
        "optimizer": [np.asarray(keras.ops.convert_to_numpy(v.value)).tobytes() for v in optimizer.variables],
        "history": [json.dumps([rows, history.step_losses]).encode()],
    }
    result = {name: hashlib.sha256(b"".join(pieces)).hexdigest() for name, pieces in parts.items()}
    result |= {"epochs": len(rows), "loss": [rows[0]["loss"], rows[-1]["loss"]]}
    (folder / "result.json").write_text(json.dumps(result))


def start(folder: Path, epochs: int) -> subprocess.Popen:
    """A process that trains in `folder`."""
    words = [sys.executable, "-m", "tests.kills", "--child", str(folder), "--epochs", str(epochs)]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)


def fail(folder: Path, message: str) -> None:
    """Raise with what the child said last."""
    raise RuntimeError(f"{message}\n{(folder / 'log').read_text()[-3000:]}")


def kill_once(folder: Path, epochs: int, generator: np.random.Generator) -> dict:
    """Start a process, let it take some steps, kill it; what was hit."""
    process = start(folder, epochs)
    checkpoints = folder / "checkpoints"
    at, aimed = int(generator.integers(1, LIFE + 1)), bool(generator.random() < IN_A_WRITE)
    seen, clock, duration = [], None, 0.0
    try:
        for line in process.stdout:
            now = time.perf_counter()
            duration = now - clock if clock else duration  # of the last step: the first compiles
            clock = now
            seen.append(int(line.split()[1]))
            if len(seen) == at:
                break
        else:
            process.wait()
            fail(folder, f"the run ended by itself, with exit code {process.returncode}")
        if aimed:
            deadline = time.perf_counter() + 60
            while not any(name.endswith(".tmp") for name in _names(checkpoints)):
                if process.poll() is not None or time.perf_counter() > deadline:
                    fail(folder, "no checkpoint was written before the run's end")
            time.sleep(generator.random() * WRITE_SECONDS)
        else:
            time.sleep(generator.random() * duration)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    left = [name for name in _names(checkpoints) if name.endswith(".tmp")]
    return {
        "first_step": seen[0],
        "batches_drawn": at,
        "aimed_at_a_write": aimed,
        "left_a_temporary_file": bool(left),
    }


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def write_data(path: Path) -> str:
    """The images and labels of both runs; the data set's name."""
    dataset: Dataset = load("cifar10", real_data()) if real_data() else load("shapes10", log=lambda line: None)
    part = dataset.subset(train=IMAGES + 60, seed=0)
    np.savez(path, x=part.x_train, y=part.y_train)
    return dataset.name


def run(folder: Path, kills: int, seed: int = 0, log=print) -> dict:
    """Both trainings, in `folder`; the record."""
    generator = np.random.default_rng(seed)
    epochs = max(3, -(-kills * LIFE // STEPS))
    name = write_data(folder / "data.npz")
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    hits = []
    for number in range(kills):
        hits.append(kill_once(folder / "killed", epochs, generator))
        log(f"kill {number + 1}: {hits[-1]}")
    for which in ("killed", "whole"):
        process = start(folder / which, epochs)
        process.communicate()
        if process.returncode:
            fail(folder / which, f"exit code {process.returncode}")
    whole, killed = (json.loads((folder / which / "result.json").read_text()) for which in ("whole", "killed"))
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    return {
        "command": f"KERAS_BACKEND={backend} python -m tests.kills --kills {kills}",
        "dataset": name,
        "kills": kills,
        "aimed_at_a_write": sum(hit["aimed_at_a_write"] for hit in hits),
        "left_a_temporary_file": sum(hit["left_a_temporary_file"] for hit in hits),
        "steps": epochs * STEPS,
        "steps_from_checkpoint_to_checkpoint": EVERY,
        "identical": whole == killed,
        "left_alone": whole,
        "killed": killed,
        "moments": hits,
        "versions": environment.versions(backend),
        "hardware": environment.hardware(),
    }


def main(argv=None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--write", action="store_true", help="record the result in docs/measured")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        child(Path(arguments.child), arguments.epochs)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        record = run(Path(temporary), arguments.kills, arguments.seed)
    print(json.dumps({key: value for key, value in record.items() if key != "moments"}, indent=1))
    if arguments.write:
        path = ROOT / "docs" / "measured" / f"kills-{os.environ.get('KERAS_BACKEND', 'tensorflow')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    return int(not record["identical"])


if __name__ == "__main__":
    sys.exit(main())
