"""A small training in the active backend, the child process of `tests/test_compare.py`.

    python -m tests.elsewhere FOLDER [CHECKPOINT ...]

Trains for two epochs of four steps from the start, with a checkpoint after each step in FOLDER/checkpoints, or goes on
from each CHECKPOINT given; writes the weights as FOLDER/0.npz, FOLDER/1.npz and so on.
"""

import shutil
import sys
from pathlib import Path

import keras
import numpy as np

from kvision.data.batches import Augmentation, Batches
from kvision.data.preprocessing import Preprocessing
from kvision.layers import activation, batch_norm, conv, global_pool, logits
from kvision.layers.noise import Dropout
from kvision.tasks.classification import Classification
from kvision.training.averaging import EMA
from kvision.training.checkpoints import Checkpoints
from kvision.training.optimizers import make_optimizer
from kvision.training.schedules import schedule
from kvision.training.trainer import Schedule, fit
from kvision.weights.initialization import initialize


def train(checkpoints: Path) -> dict[str, np.ndarray]:
    """The weights at the end, the optimizer's variables too, by name."""
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = activation("relu", name="relu")(batch_norm(name="bn")(conv(8, 3, name="conv")(x)))
    model = keras.Model(inputs, logits(3)(Dropout(0.3, seed=1, name="dropout")(global_pool()(x))), name="elsewhere")
    initialize(model, 0)
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
    labels = np.arange(32, dtype=np.int32) % 3
    images[:, :4] //= (1 + labels[:, None, None, None]).astype(np.uint8)
    batches = Batches(images, labels, 8, 0, Preprocessing(mean=(0.5,), std=(0.25,)), Augmentation(True, 1))
    optimizer = EMA(make_optimizer("adam", schedule("cosine", 1e-3, 8), weight_decay=0.01), 0.9)
    told = [keras.callbacks.EarlyStopping("loss", patience=5)]
    options = {"checkpoint": Checkpoints(checkpoints, keep=99), "schedule": Schedule(save_every=1), "callbacks": told}
    history = fit(model, Classification(), optimizer, batches, epochs=2, **options)
    variables = [*model.trainable_variables, *model.non_trainable_variables, *optimizer.variables]
    arrays = {str(i): keras.ops.convert_to_numpy(variable.value) for i, variable in enumerate(variables)}
    return arrays | {"losses": np.array(history.step_losses)}


def main(folder: Path, checkpoints: list[Path]) -> None:
    """Both ways, see above."""
    folder.mkdir(parents=True)
    if not checkpoints:
        np.savez(folder / "0.npz", **train(folder / "checkpoints"))
    for i, checkpoint in enumerate(checkpoints):
        own = folder / f"from{i}"
        own.mkdir()
        shutil.copy(checkpoint, own)
        np.savez(folder / f"{i}.npz", **train(own))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
