"""The door of `keras.applications`, on the zoo: `VGG16(include_top=False, weights=path, pooling="avg")`.

Each name is callable with Keras's arguments and has its `preprocess_input` and `decode_predictions`. A name that Keras
has too builds Keras's wiring (`ResNet50` is the zoo's `resnet50_v1`, `InceptionV3` its `inception_v3_tf`), so that
weights converted from there fit; a weights file of a sister network, such as torchvision's `resnet50`, builds that one.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import keras
import numpy as np

from kvision import zoo
from kvision.weights import WeightsError, find, inspect, keras_applications, preprocess, published_preprocessing

NAMES = {
    "AlexNet": "alexnet",
    "VGG11": "vgg11",
    "VGG13": "vgg13",
    "VGG16": "vgg16",
    "VGG19": "vgg19",
    "GoogLeNet": "googlenet",
    "InceptionV1": "inception_v1_tf",
    "InceptionV2": "inception_v2",
    "InceptionV3": "inception_v3_tf",
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50_v1",
    "ResNet101": "resnet101_v1",
    "ResNet152": "resnet152_v1",
    "ResNet20": "resnet20",
    "ResNet56": "resnet56",
    "WideResNet": "wide_resnet",
    "SqueezeNet": "squeezenet1_1",
    "DenseNet121": "densenet121_tf",
    "DenseNet169": "densenet169_tf",
    "DenseNet201": "densenet201_tf",
    "MobileNetV2": "mobilenet_v2_tf",
    "MNASNet": "mnasnet1_0",
}
__all__ = [*NAMES]  # noqa: PLE0604 (they come from __getattr__)


@dataclass(frozen=True)
class Application:
    """One network behind the familiar door."""

    name: str
    architecture: str

    def __call__(
        self,
        include_top: bool = True,
        weights: str | os.PathLike | None = None,
        input_shape: tuple[int, int, int] | None = None,
        pooling: str | None = None,
        classes: int | None = None,
        classifier_activation: str | None = "softmax",
        **own,
    ) -> keras.Model:
        """Build the network.

        Args:
            include_top: end in class probabilities; False ends in the last maps (n, h, w, c), or as `pooling` says.
            weights: a weights file or the name of one that ships, as for `kvision.create_model`. None draws initial
                values; ImageNet's are not part of the library and come in by `kvision weights convert`.
            input_shape: (height, width, channels); the default is that of the weights or the published one.
            pooling: without top, "avg" or "max" of the last maps over the pixels, or None.
            classes: how many; the default is that of the weights or the published number.
            classifier_activation: of the top; None ends in logits.
            own: arguments of the network's own, see `kvision.zoo.arguments`.

        Raises:
            ValueError: an argument that the network does not take.
            kvision.weights.WeightsError: the weights are missing or of another network.
        """
        if pooling not in (None, "avg", "max"):
            raise ValueError(f"pooling must be None, 'avg' or 'max', got {pooling!r}")
        architecture = self.architecture if weights is None else self._of(weights)
        if include_top:
            model = zoo.create_model(architecture, input_shape, classes, weights, **own)
            if classifier_activation is None:
                return model
            outputs = model.outputs[0]  # auxiliary heads have no place behind this door
            outputs = keras.layers.Activation(classifier_activation, name="predictions")(outputs)
            return keras.Model(model.input, outputs, name=architecture)
        model = zoo.create_model(architecture, input_shape, 0, weights, **own)
        if pooling == "avg":
            return model
        maps = model.layers[-1].input
        if pooling == "max":
            maps = keras.layers.GlobalMaxPooling2D(name="max_pool")(maps)
        return keras.Model(model.input, maps, name=architecture)

    def _of(self, weights) -> str:
        if weights == "imagenet":
            raise WeightsError(
                "imagenet: no ImageNet weights ship; convert a file of Keras's, torchvision's or TF-Slim's with "
                f"`python -m kvision weights convert FILE --model {self.architecture} -o OUT.npz` and give its path"
            )
        stated = (inspect(find(weights))["manifest"] or {}).get("architecture", self.architecture)
        sisters = zoo.list_models()
        if stated not in sisters or zoo.paper(stated) != zoo.paper(self.architecture):
            raise WeightsError(
                f"{os.fspath(weights)}: a file of {stated}, which is none of the networks of {self.name}"
            )
        return stated

    def preprocess_input(self, images: np.ndarray, weights: str | os.PathLike | None = None) -> np.ndarray:
        """Network input, float32, of images (n, h, w, c) with values 0 to 255 at the network's size.

        Args:
            weights: those that the images are for; the default is what the published weights expect.
        """
        if weights is not None:
            prepare = preprocess(weights)
        elif self.architecture in keras_applications.CONSTRUCTORS:  # Keras's own, where there are several
            prepare = keras_applications.preprocessing(self.architecture)
        else:
            prepare = published_preprocessing(self.architecture)
        if prepare is None:
            raise ValueError(
                f"nobody published weights of {self.architecture}; give the weights that the images are for"
            )
        return prepare(np.asarray(images))

    def decode_predictions(
        self, predictions: np.ndarray, top: int = 5, classes: Iterable[str] | None = None
    ) -> list[list[tuple]]:
        """For each row of probabilities the `top` best as (class, name, probability).

        Args:
            predictions: (n, classes).
            classes: their names, as a weights file's manifest lists them; without, ImageNet's thousand, whose names
                Keras downloads.

        Raises:
            ValueError: another number of classes than of names.
        """
        predictions = np.asarray(predictions)
        if classes is None:
            return keras.applications.imagenet_utils.decode_predictions(predictions, top=top)
        names = list(classes)
        if predictions.ndim != 2 or predictions.shape[1] != len(names):
            raise ValueError(f"expected predictions of shape (n, {len(names)}), got {predictions.shape}")
        order = np.argsort(-predictions, axis=1, kind="stable")[:, :top]
        return [[(int(i), names[i], float(row[i])) for i in best] for row, best in zip(predictions, order, strict=True)]


def __getattr__(name: str) -> Application:
    if name in NAMES:
        return Application(name, NAMES[name])
    raise AttributeError(f"module 'kvision.applications' has no attribute {name!r}; it has {', '.join(NAMES)}")
