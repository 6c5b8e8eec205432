"""Images on the device: what a step shows, what it learns and what a run becomes are as with images from the host."""

import keras
import numpy as np
import pytest
from keras import ops

from kvision import engine
from kvision.data.batches import Augmentation, Batches
from kvision.data.device import MAX_PIXELS, DeviceDataset
from kvision.data.mixing import MixedBatches, Mixup
from kvision.data.preprocessing import Preprocessing
from kvision.layers import activation, batch_norm, conv, logits, max_pool
from kvision.tasks.classification import Classification
from kvision.training import evaluation, trainer
from kvision.training.optimizers import make_optimizer
from kvision.training.schedules import WarmupSchedule
from kvision.training.trainer import Execution, Schedule, fit, values
from kvision.weights.initialization import initialize
from tests.arrays import figures

layers, array = keras.layers, ops.convert_to_numpy
RGB = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
BGR = Preprocessing(mean=(103.9, 116.8, 123.7), std=(1.0, 1.0, 1.0), scale=1.0, channel_order="bgr")


def build_batches(make_images, augmentation=None, preprocessing=RGB, n=29, size=4):
    images, labels = make_images(n, 8, 7, channels=3)
    return Batches(images, labels, size, 3, preprocessing, augmentation)


def network():
    inputs = keras.Input((8, 7, 3))
    x = activation("relu", name="relu")(batch_norm(name="bn")(conv(6, 3, name="conv")(inputs)))
    x = layers.GlobalAveragePooling2D(name="mean")(max_pool(2, name="pool")(x))
    model = keras.Model(inputs, logits(3)(x))
    initialize(model, 1)
    return model


def optimizer():
    return make_optimizer("sgd", WarmupSchedule(0.1, 14, 3), momentum=0.9, weight_decay=1e-2)


def build_engine(model, optimizer):
    optimizer.build(model.trainable_variables)
    return engine.create(model, Classification(label_smoothing=0.1), optimizer)


@pytest.mark.parametrize("preprocessing", [RGB, BGR], ids=["rgb", "bgr"])
@pytest.mark.parametrize(
    "augmentation",
    [None, Augmentation(flip=True), Augmentation(True, 2, "reflect"), Augmentation(False, 3, "zero", 4)],
    ids=["plain", "flip", "shift", "cutout"],
)
def test_the_device_shows_what_the_host_shows(make_images, augmentation, preprocessing):
    batches = build_batches(make_images, augmentation, preprocessing)
    shown = DeviceDataset(batches)
    for epoch in (0, 1):
        for params, batch in zip(batches.params(epoch), batches.epoch(epoch), strict=True):
            found, images = shown.make_batch(shown.tensors, ops.convert_to_tensor(params)), batch["image"]
            np.testing.assert_allclose(array(found["image"]), images, rtol=1e-6, atol=1e-6 * np.abs(images).max())
            np.testing.assert_array_equal(array(found["label"]), batch["label"])


@pytest.mark.parametrize("accelerated", [False, True])
def test_many_steps_are_one_after_the_other(make_images, accelerated, monkeypatch):
    """Seven steps by three calls, one of several steps: on JAX also as the loop that an accelerator runs."""
    if keras.backend.backend() == "jax":
        monkeypatch.setattr(engine.backend_module(), "accelerated", lambda: accelerated)
    batches = build_batches(make_images, Augmentation(True, 1))
    one, many = (build_engine(network(), optimizer()) for _ in range(2))
    expected = [[float(x) for x in figures(one.train_step(batch))] for batch in batches.epoch(0)]
    shown, params = DeviceDataset(batches), list(batches.params(0))
    assert len(params) == 7
    results = [many.train_steps(shown, np.stack(part)) for part in (params[:1], params[1:6], params[6:])]
    losses, correct = map(np.concatenate, zip(*map(figures, results), strict=True))
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-5)
    np.testing.assert_array_equal(correct, [count for _, count in expected])
    one.sync_variables()
    many.sync_variables()
    for weights, others in zip(values(one.model.variables), values(many.model.variables), strict=True):
        np.testing.assert_allclose(weights, others, rtol=1e-5, atol=1e-6)


def test_pictures_are_predicted_where_they_lie(make_images):
    batches = build_batches(make_images, Augmentation(True, 1))
    predictor, shown = engine.create(network(), Classification()), DeviceDataset(batches)
    found = predictor.predict_on_device(shown, np.stack(list(batches.params(2))))
    expected = [predictor.predict(images) for images, _ in map(dict.values, batches.epoch(2))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_more_pixels_than_are_counted_are_refused(make_images, monkeypatch):
    batches = build_batches(make_images)
    monkeypatch.setattr("kvision.data.device.MAX_PIXELS", batches.padded[..., 0].size)
    with pytest.raises(ValueError, match="29 padded images of 8x7 pixels are too many"):
        DeviceDataset(batches)
    assert MAX_PIXELS == 2**31


def test_a_run_is_the_same_with_images_on_the_device(make_images):
    """Losses, scores and weights of two epochs; in programs of one step and of several."""
    runs = []
    for options in ({"data_on": "host"}, {"data_on": "device"}, {"data_on": "device", "steps_per_execution": 3}):
        batches, model = build_batches(make_images, Augmentation(True, 1)), network()
        test = make_images(9, 8, 7, channels=3, seed=2)
        history = fit(
            model,
            Classification(),
            optimizer(),
            batches,
            epochs=2,
            evaluations={"test": test},
            schedule=Schedule(eval_every=1),
            execution=Execution(**options),
        )
        assert len(history.step_losses) == 14
        scores = [[row[key] for key in ("loss", "accuracy", "test_loss", "test_accuracy")] for row in history.epochs]
        runs.append([history.step_losses, scores, *values(model.variables)])
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class PowerCutError(Exception):
    pass


class Programs:
    """An engine that notes how many steps each of its programs has, and ends by force before step `end`."""

    def __init__(self, inner, end):
        self.inner, self.model, self.program = inner, inner.model, inner.program
        self.sync_variables, self.counts, self.end = inner.sync_variables, [], end

    def train_steps(self, dataset, params):
        if sum(self.counts) == self.end:
            raise PowerCutError
        self.counts.append(len(params))
        return self.inner.train_steps(dataset, params)


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [
        (None, 0, [3, 3, 1]),
        (None, 1, [1, 1, 3, 1]),
        (4, 0, [3, 1, 1, 1, 1]),
        (6, 3, [3, 1]),
    ],
)
def test_programs_lie_where_a_run_that_goes_on_has_them(make_images, monkeypatch, tmp_path, every, start, expected):
    """From a multiple of three steps to the next; one by one before, before a checkpoint and at an epoch's end."""
    create = engine.create

    def run(end=None, **options):
        noted = []

        def note(*arguments):
            noted.append(Programs(create(*arguments), end))
            return noted[0]

        monkeypatch.setattr(trainer.engines, "create", note)
        steps, every = options.pop("steps_per_execution", None), options.pop("save_every")
        options = {"schedule": Schedule(save_every=every), "execution": Execution("native", "device", steps)}
        loader = build_batches(make_images)
        fit(network(), Classification(), optimizer(), loader, epochs=1, checkpoint=tmp_path, **options)
        return noted[0].counts

    if start:
        with pytest.raises(PowerCutError):
            run(end=start, save_every=start)
    assert run(steps_per_execution=3, save_every=every) == expected


def test_images_that_cannot_lie_on_the_device_are_refused(make_images):
    mixed = MixedBatches(build_batches(make_images), 3, [Mixup()])
    for options, message in (
        ({"data_on": "gpu"}, "data_on must be one of auto, host, device, got 'gpu'"),
        ({"data_on": "device", "engine": "keras"}, "Keras's own step takes images from the host"),
        ({"steps_per_execution": 0}, "steps_per_execution must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            execution = Execution(**options)
            fit(network(), Classification(), optimizer(), build_batches(make_images), epochs=1, execution=execution)
    with pytest.raises(ValueError, match="images of MixedBatches cannot be made on the device"):
        fit(network(), Classification(), optimizer(), mixed, epochs=1, execution=Execution(data_on="device"))


@pytest.mark.parametrize(
    ("steps", "expected"), [(390, 39), (50, 50), (391, 23), (389, 50), (7, 50)], ids=lambda number: str(number)
)
def test_an_accelerator_takes_whole_programs_where_it_can(monkeypatch, steps, expected):
    monkeypatch.setattr(trainer.engines, "accelerated", lambda: True)
    assert trainer.program_steps(steps, None, trainer.Callbacks([], network())) == expected


@pytest.mark.parametrize("tta", ["none", "flip", "flip_shift"])
def test_tta_on_the_device_equals_the_host(make_images, tta):
    images, _ = make_images(11, 8, 7)
    predictor = engine.create(network(), Classification())
    shown = DeviceDataset(
        Batches(images, np.zeros(11, int), 1, 0, RGB, Augmentation(crop_padding=1, padding_mode="reflect"))
    )
    found = evaluation.predict_on_device(predictor, shown, batch_size=4, tta=tta)
    np.testing.assert_allclose(found, evaluation.predict(predictor, images, RGB, 4, tta), rtol=1e-5, atol=1e-6)


def test_shifted_views_require_padding(make_images):
    shown = DeviceDataset(build_batches(make_images))
    with pytest.raises(ValueError, match="tta 'flip_shift' moves images by 1 pixels, their border has 0"):
        evaluation.predict_on_device(engine.create(network(), Classification()), shown, tta="flip_shift")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"data_on": "host"}, False),
        ({"engine": "keras"}, False),
        ({"bytes": 100}, False),
        ({"own": 1}, False),
    ],
    ids=["auto", "host", "keras", "too many", "shows something else"],
)
def test_images_lie_on_the_device_where_they_can(make_images, monkeypatch, change, expected):
    batches = build_batches(make_images)
    if "bytes" in change:
        monkeypatch.setattr(trainer, "DEVICE_BYTES", change["bytes"])
    if "own" in change:
        batches.epoch = lambda epoch, start=0: iter(())
    found = trainer.device_dataset(batches, change.get("data_on", "auto"), change.get("engine") != "keras")
    assert isinstance(found, DeviceDataset) is expected


def test_images_of_a_float64_run_are_numpys(make_images):
    engine.configure("float64")
    try:
        assert trainer.device_dataset(build_batches(make_images), "auto", True) is None
    finally:
        engine.configure()
