"""Compatible with `keras.applications.resnet50`."""

from kvision.applications.resnet import ResNet50, decode_predictions, preprocess_input

__all__ = ["ResNet50", "decode_predictions", "preprocess_input"]
