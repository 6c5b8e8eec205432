"""Compatible with `keras.applications.vgg19`."""

from kvision.applications.application import Application, decode_predictions

__all__ = ["VGG19", "decode_predictions", "preprocess_input"]

VGG19 = Application("VGG19", "vgg19", least=32)
preprocess_input = VGG19.preprocess_input
