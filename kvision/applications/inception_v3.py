"""Compatible with `keras.applications.inception_v3`."""

from kvision.applications.application import Application, decode_predictions

__all__ = ["InceptionV3", "decode_predictions", "preprocess_input"]

InceptionV3 = Application("InceptionV3", "inception_v3_keras", least=75)
preprocess_input = InceptionV3.preprocess_input
