"""A program that uses the library as the README says; `mypy --strict` must take it (`tests/test_typing.py`)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kvision
from kvision.applications import VGG16
from kvision.data.batches import Batches
from kvision.tasks.classification import Classification

folder = Path("runs")
names: list[str] = kvision.list_models("resnet*")
info = kvision.model_info(names[0])
size: tuple[int, int, int] = info.input_shape
count: int = info.parameters
model = kvision.create_model("resnet20", (32, 32, 3), classes=10)
trained = kvision.create_model("resnet20", weights="resnet20.cifar10")
images: NDArray[np.uint8] = np.zeros((2, 32, 32, 3), np.uint8)
ready = kvision.preprocess("resnet20.cifar10")(images)

kvision.weights.save(model, folder / "model.npz", dataset="cifar10")
kvision.weights.load(model, folder / "model.npz", adapt_input=False)
report: kvision.convert.Verification = kvision.convert.verify(folder / "model.npz")
good: bool = report.ok

dataset: kvision.data.Dataset = kvision.data.load("cifar10")
features = VGG16(include_top=False, weights=None, pooling="avg")
same = kvision.applications.VGG16(include_top=False)
optimizer = kvision.training.optimizers.make_optimizer("sgd", 0.1)
rates = kvision.training.schedules.schedule("cosine", 0.1, 100)
fit = kvision.training.fit(
    model,
    Classification(),
    optimizer,
    Batches(images, np.zeros(2, np.int32), 2, 0, kvision.preprocess("resnet20.cifar10")),
    epochs=1,
)

history = kvision.fit(model, images, np.zeros(2), batch_size=2, epochs=2, checkpoint=folder)
epochs: list[int] = history.epoch
