"""torchvision's SqueezeNets, https://github.com/pytorch/vision/blob/main/torchvision/models/squeezenet.py"""

import torch
from torch import nn

# The first convolution, then "pool" or a fire (squeeze, expand).
LAYERS = {
    "squeezenet1_0": (
        (96, 7),
        ("pool", (16, 64), (16, 64), (32, 128), "pool", (32, 128), (48, 192), (48, 192), (64, 256), "pool", (64, 256)),
    ),
    "squeezenet1_1": (
        (64, 3),
        ("pool", (16, 64), (16, 64), "pool", (32, 128), (32, 128), "pool", (48, 192), (48, 192), (64, 256), (64, 256)),
    ),
}


class Fire(nn.Module):
    def __init__(self, inputs, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self, name, classes):
        super().__init__()
        (inputs, size), rows = LAYERS[name]
        layers = [nn.Conv2d(3, inputs, size, 2), nn.ReLU()]
        for row in rows:
            if row == "pool":
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            else:
                layers.append(Fire(inputs, *row))
                inputs = 2 * row[1]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(inputs, classes, 1), nn.ReLU())

    def forward(self, x):
        return self.classifier(self.features(x)).mean((2, 3))


def build(name, classes):
    return SqueezeNet(name, classes)
