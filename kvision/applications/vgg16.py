"""Compatible with `keras.applications.vgg16`."""

from kvision.applications.application import Application, decode_predictions

__all__ = ["VGG16", "decode_predictions", "preprocess_input"]

VGG16 = Application("VGG16", "vgg16", least=32)
preprocess_input = VGG16.preprocess_input
