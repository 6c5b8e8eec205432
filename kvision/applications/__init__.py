"""Constructors compatible with `keras.applications`: `VGG16(include_top=False, weights=path, pooling="avg")`.

Each has Keras's arguments, `preprocess_input` and `decode_predictions`; Keras's modules (`vgg16`, `resnet50` ...) have
them as functions. A name that Keras has, too, builds Keras's network (`ResNet50` is the zoo's `resnet50_keras`,
`InceptionV3` its `inception_v3_keras`), so that weights converted from there fit; a weights file of a related
network, such as torchvision's `resnet50`, builds that one.
"""

from kvision.applications import densenet, inception_v3, mobilenet_v2, resnet, resnet50, vgg16, vgg19
from kvision.applications.application import Application
from kvision.applications.densenet import DenseNet121, DenseNet169, DenseNet201
from kvision.applications.inception_v3 import InceptionV3
from kvision.applications.mobilenet_v2 import MobileNetV2
from kvision.applications.resnet import ResNet50, ResNet101, ResNet152
from kvision.applications.vgg16 import VGG16
from kvision.applications.vgg19 import VGG19

AlexNet = Application("AlexNet", "alexnet")
VGG11 = Application("VGG11", "vgg11")
VGG13 = Application("VGG13", "vgg13")
GoogLeNet = Application("GoogLeNet", "googlenet")
InceptionV1 = Application("InceptionV1", "inception_v1_tf_slim")
InceptionV2 = Application("InceptionV2", "inception_v2")
ResNet18 = Application("ResNet18", "resnet18")
ResNet34 = Application("ResNet34", "resnet34")
ResNet20 = Application("ResNet20", "resnet20")
ResNet56 = Application("ResNet56", "resnet56")
WideResNet = Application("WideResNet", "wide_resnet")
SqueezeNet = Application("SqueezeNet", "squeezenet1_1")
MNASNet = Application("MNASNet", "mnasnet1_0")

NAMES: dict[str, str] = {
    name: value.architecture for name, value in list(globals().items()) if isinstance(value, Application)
}
__all__ = [
    "VGG11",
    "VGG13",
    "VGG16",
    "VGG19",
    "AlexNet",
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "GoogLeNet",
    "InceptionV1",
    "InceptionV2",
    "InceptionV3",
    "MNASNet",
    "MobileNetV2",
    "ResNet18",
    "ResNet20",
    "ResNet34",
    "ResNet50",
    "ResNet56",
    "ResNet101",
    "ResNet152",
    "SqueezeNet",
    "WideResNet",
    "densenet",
    "inception_v3",
    "mobilenet_v2",
    "resnet",
    "resnet50",
    "vgg16",
    "vgg19",
]
