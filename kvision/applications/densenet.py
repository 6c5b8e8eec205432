"""Compatible with `keras.applications.densenet`."""

from kvision.applications.application import Application, decode_predictions

__all__ = ["DenseNet121", "DenseNet169", "DenseNet201", "decode_predictions", "preprocess_input"]

DenseNet121 = Application("DenseNet121", "densenet121_keras", least=32)
DenseNet169 = Application("DenseNet169", "densenet169_keras", least=32)
DenseNet201 = Application("DenseNet201", "densenet201_keras", least=32)
preprocess_input = DenseNet121.preprocess_input
