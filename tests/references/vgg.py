"""torchvision's VGGs, https://github.com/pytorch/vision/blob/main/torchvision/models/vgg.py

For maps of 7x7 pixels and more. torchvision repeats the pixels of smaller ones, our network leaves them as they are.
"""

from torch import nn
from torch.nn import functional

CONVOLUTIONS = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    def __init__(self, convolutions, normalized, hidden, width, classes):
        super().__init__()
        features, inputs = [], 3
        for filters, count in zip((1, 2, 4, 8, 8), convolutions, strict=True):
            filters *= width
            for _ in range(count):
                features.append(nn.Conv2d(inputs, filters, 3, padding=1))
                features += [nn.BatchNorm2d(filters)] if normalized else []
                features.append(nn.ReLU())
                inputs = filters
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Linear(7 * 7 * 8 * width, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x):
        return self.classifier(functional.adaptive_avg_pool2d(self.features(x), (7, 7)).flatten(1))


def build(name, classes, hidden=4096, width=64):
    depth, _, normalized = name.removeprefix("vgg").partition("_")
    return VGG(CONVOLUTIONS[depth], normalized == "bn", hidden, width, classes)
