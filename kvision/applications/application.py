"""The constructor of one network, compatible with `keras.applications`."""

import os
from collections.abc import Iterable

import keras
import numpy as np

from kvision import zoo
from kvision.convert import create_model, find, keras_applications, preprocess, published_preprocessing
from kvision.weights import WeightsError, inspect


class Application:
    """A constructor with the signature of Keras's, and its `preprocess_input`.

    Args:
        name: the constructor's name.
        architecture: the network's name in the zoo.
        least: minimum side in pixels that Keras's constructor accepts; None if Keras has no such network.
    """

    def __init__(self, name: str, architecture: str, least: int | None = None):
        self.name, self.architecture, self.least = name, architecture, least

    def __repr__(self) -> str:
        return f"kvision.applications.{self.name}"

    def __call__(
        self,
        include_top: bool = True,
        weights: str | os.PathLike | None = None,
        input_tensor: keras.KerasTensor | None = None,
        input_shape: tuple[int | None, int | None, int] | None = None,
        pooling: str | None = None,
        classes: int | None = None,
        classifier_activation: str | None = "softmax",
        name: str | None = None,
        **model_kwargs: object,
    ) -> keras.Model:
        """Build the network.

        Args:
            include_top: end in class probabilities; False ends in the last maps (n, h, w, c), or as `pooling` says.
            weights: a weights file or the name of pretrained weights, as for `kvision.create_model`; None initializes
                randomly. ImageNet's weights are not part of the library: import them by `kvision weights convert`.
            input_tensor: a Keras tensor of images (n, h, w, c), such as `keras.Input` or another layer's output; the
                model starts at its input.
            input_shape: (height, width, channels); the default is that of the tensor, the weights, or the published
                one. Without top, height and width may be None: any size.
            pooling: without top, "avg" or "max" of the last maps over the pixels, or None.
            classes: number of classes; the default is that of the weights or the published one.
            classifier_activation: of the top; None returns logits.
            name: of the model; the default is the zoo's.
            model_kwargs: model-specific arguments, see `kvision.zoo.arguments`.

        Raises:
            ValueError: an unsupported argument or size.
            kvision.weights.WeightsError: the weights are missing or of another network.
        """
        if pooling not in (None, "avg", "max"):
            raise ValueError(f"pooling must be None, 'avg' or 'max', got {pooling!r}")
        if input_tensor is not None:
            input_shape = self._merge_shapes(input_tensor, input_shape)
        if input_shape is not None:
            self._check_shape(input_shape, include_top)
        architecture = self.architecture if weights is None else self._find_architecture(weights)
        model = create_model(architecture, input_shape, classes if include_top else 0, weights, **model_kwargs)
        outputs = model.outputs[0]  # without auxiliary heads, as in Keras
        if include_top and classifier_activation is not None:
            outputs = keras.layers.Activation(classifier_activation, name="predictions")(outputs)
        elif not include_top and pooling != "avg":
            outputs = model.layers[-1].input
            if pooling == "max":
                outputs = keras.layers.GlobalMaxPooling2D(name="max_pool")(outputs)
        model = keras.Model(model.inputs[0], outputs, name=name or architecture)
        return model if input_tensor is None else _connect(model, input_tensor)

    def _merge_shapes(self, tensor, shape) -> tuple[int | None, int | None, int]:
        """Return (height, width, channels) of a tensor's images, completed by `shape`."""
        if not keras.backend.is_keras_tensor(tensor) or len(tensor.shape) != 4:
            raise ValueError(
                f"input_tensor must be a Keras tensor of images (n, height, width, channels), such as "
                f"keras.Input((224, 224, 3)), got {tensor!r}"
            )
        found = tuple(tensor.shape[1:])
        if shape is not None and any(None not in (a, b) and a != b for a, b in zip(found, shape, strict=True)):
            raise ValueError(f"input_tensor has images of shape {found}, but input_shape is {tuple(shape)}")
        return tuple(a if b is None else b for a, b in zip(found, shape or found, strict=True))

    def _check_shape(self, shape, include_top: bool) -> None:
        if len(shape) != 3:
            raise ValueError(f"input_shape must be (height, width, channels), got {shape!r}")
        if include_top and None in shape:
            raise ValueError(f"include_top requires a known size: input_shape is {tuple(shape)}")
        if self.least and any(size is not None and size < self.least for size in shape[:2]):
            raise ValueError(f"{self.name} needs images of at least {self.least}x{self.least} pixels, got {shape}")

    def _find_architecture(self, weights) -> str:
        if weights == "imagenet":
            raise WeightsError(
                "imagenet: no ImageNet weights are included; convert a file of Keras, torchvision or TF-Slim with "
                f"`python -m kvision weights convert FILE --model {self.architecture} -o OUT.npz` and give its path"
            )
        stated = (inspect(find(weights))["manifest"] or {}).get("architecture", self.architecture)
        if stated not in zoo.list_models() or zoo.paper(stated) != zoo.paper(self.architecture):
            raise WeightsError(
                f"{os.fspath(weights)}: a file of {stated}, which is not one of the networks of {self.name}"
            )
        return stated

    def preprocess_input(self, images: np.ndarray, weights: str | os.PathLike | None = None) -> np.ndarray:
        """Return network input, float32, for an image (h, w, c) or several, values 0 to 255, at the network's size.

        Args:
            weights: the weights to prepare the images for; the default is the published ones.
        """
        if weights is not None:
            prepare = preprocess(weights)
        elif self.architecture in keras_applications.CONSTRUCTORS:  # Keras's own, where there are several
            prepare = keras_applications.preprocessing(self.architecture)
        else:
            prepare = published_preprocessing(self.architecture)
        if prepare is None:
            raise ValueError(
                f"no weights of {self.architecture} are published; give the weights to prepare the images for"
            )
        images = np.asarray(images)
        return prepare(images[None])[0] if images.ndim == 3 else prepare(images)

    def decode_predictions(
        self, predictions: np.ndarray, top: int = 5, classes: Iterable[str] | None = None
    ) -> list[list[tuple]]:
        """Return for each row of probabilities the `top` best as (class, name, probability).

        Args:
            predictions: (n, classes).
            classes: the classes' names, as in a weights file's manifest; the default is ImageNet's thousand, whose
                names Keras downloads.

        Raises:
            ValueError: different numbers of classes and names.
        """
        return decode_predictions(predictions, top, classes)


class MobileNetV2Application(Application):
    """MobileNetV2: Keras's constructor has another order of arguments, and `alpha`."""

    def __call__(
        self,
        input_shape: tuple[int | None, int | None, int] | None = None,
        alpha: float | None = None,
        include_top: bool = True,
        weights: str | os.PathLike | None = None,
        input_tensor: keras.KerasTensor | None = None,
        pooling: str | None = None,
        classes: int | None = None,
        classifier_activation: str | None = "softmax",
        name: str | None = None,
        **model_kwargs: object,
    ) -> keras.Model:
        """Build the network, see `Application`.

        Args:
            alpha: factor on all filter counts, the zoo's `width`; the default is that of the weights, or 1.
        """
        if alpha is not None:
            if not alpha > 0:
                raise ValueError(f"alpha must be a positive number, got {alpha!r}")
            model_kwargs["width"] = alpha
        arguments = (include_top, weights, input_tensor, input_shape, pooling, classes, classifier_activation, name)
        return super().__call__(*arguments, **model_kwargs)


def decode_predictions(
    predictions: np.ndarray, top: int = 5, classes: Iterable[str] | None = None
) -> list[list[tuple]]:
    """See `Application.decode_predictions`."""
    predictions = np.asarray(predictions)
    if classes is None:
        return keras.applications.imagenet_utils.decode_predictions(predictions, top=top)
    names = list(classes)
    if predictions.ndim != 2 or predictions.shape[1] != len(names):
        raise ValueError(f"expected predictions of shape (n, {len(names)}), got {predictions.shape}")
    order = np.argsort(-predictions, axis=1, kind="stable")[:, :top]
    return [[(int(i), names[i], float(row[i])) for i in best] for row, best in zip(predictions, order, strict=True)]


def _connect(model: keras.Model, tensor) -> keras.Model:
    """Return a model of the same layers applied to `tensor`."""
    results = {}

    def call(layer, *arguments, **options):
        results[layer.name] = layer(*arguments, **options)
        return results[layer.name]

    # The clone's input is `tensor` itself; the model returned here starts at the inputs that `tensor` comes from.
    keras.models.clone_model(model, input_tensors=tensor, clone_function=lambda layer: layer, call_function=call)
    inputs = keras.utils.get_source_inputs(tensor)
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, results[model.layers[-1].name], name=model.name)
