"""Compatible with `keras.applications.mobilenet_v2`."""

from kvision.applications.application import MobileNetV2Application, decode_predictions

__all__ = ["MobileNetV2", "decode_predictions", "preprocess_input"]

MobileNetV2 = MobileNetV2Application("MobileNetV2", "mobilenet_v2_keras", least=32)
preprocess_input = MobileNetV2.preprocess_input
