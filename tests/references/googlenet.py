"""torchvision's GoogLeNet, https://github.com/pytorch/vision/blob/main/torchvision/models/googlenet.py

Without `transform_input`, which is preprocessing.
"""

import torch
from torch import nn
from torch.nn import functional

# 1x1, 3x3 reduce, 3x3, 5x5 reduce, "5x5" (whose window is 3), pool projection
ROWS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class Unit(nn.Module):
    def __init__(self, inputs, filters, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(filters, eps=1e-3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Inception(nn.Module):
    def __init__(self, inputs, one, reduce3, three, reduce5, five, pooled):
        super().__init__()
        self.branch1 = Unit(inputs, one, 1)
        self.branch2 = nn.Sequential(Unit(inputs, reduce3, 1), Unit(reduce3, three, 3))
        self.branch3 = nn.Sequential(Unit(inputs, reduce5, 1), Unit(reduce5, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(inputs, pooled, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Head(nn.Module):
    def __init__(self, inputs, filters, hidden, classes):
        super().__init__()
        self.conv = Unit(inputs, filters, 1)
        self.fc1 = nn.Linear(16 * filters, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x):
        x = self.conv(functional.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
        return self.fc2(functional.dropout(self.fc1(x).relu(), 0.7, self.training))


class GoogLeNet(nn.Module):
    def __init__(self, width, auxiliary, classes):
        super().__init__()
        scaled = lambda filters: max(1, int(filters * width))  # noqa: E731
        self.conv1 = Unit(3, scaled(64), 7, 2)
        self.conv2 = Unit(scaled(64), scaled(64), 1)
        self.conv3 = Unit(scaled(64), scaled(192), 3)
        inputs = scaled(192)
        for place, row in ROWS.items():
            row = tuple(map(scaled, row))
            setattr(self, f"inception{place}", Inception(inputs, *row))
            inputs = row[0] + row[2] + row[4] + row[5]
            if auxiliary and place in ("4a", "4d"):
                setattr(self, "aux1" if place == "4a" else "aux2", Head(inputs, scaled(128), scaled(1024), classes))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(inputs, classes)
        self.auxiliary = auxiliary

    def forward(self, x):
        pool = lambda x, size: functional.max_pool2d(x, size, 2, ceil_mode=True)  # noqa: E731
        x = self.conv3(self.conv2(pool(self.conv1(x), 3)))
        x = self.inception3b(self.inception3a(pool(x, 3)))
        x = first = self.inception4a(pool(x, 3))
        x = second = self.inception4d(self.inception4c(self.inception4b(x)))
        x = self.inception5b(self.inception5a(pool(self.inception4e(x), 2)))
        x = self.fc(self.dropout(x.mean((2, 3))))
        return (x, self.aux1(first), self.aux2(second)) if self.auxiliary else x


def build(name, classes, width=1.0, auxiliary=False):
    return GoogLeNet(width, auxiliary, classes)
