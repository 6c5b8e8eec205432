"""Compatible with `keras.applications.resnet`."""

from kvision.applications.application import Application, decode_predictions

__all__ = ["ResNet50", "ResNet101", "ResNet152", "decode_predictions", "preprocess_input"]

ResNet50 = Application("ResNet50", "resnet50_keras", least=32)
ResNet101 = Application("ResNet101", "resnet101_keras", least=32)
ResNet152 = Application("ResNet152", "resnet152_keras", least=32)
preprocess_input = ResNet50.preprocess_input
