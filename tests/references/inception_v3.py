"""torchvision's Inception v3, https://github.com/pytorch/vision/blob/main/torchvision/models/inception.py

Without `transform_input`, which is preprocessing.
"""

import torch
from torch import nn
from torch.nn import functional


class Unit(nn.Module):
    def __init__(self, inputs, filters, size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(filters, eps=1e-3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def average(x):
    return functional.avg_pool2d(x, 3, 1, 1)


class InceptionA(nn.Module):
    def __init__(self, inputs, pooled, scaled):
        super().__init__()
        self.branch1x1 = Unit(inputs, scaled(64), 1)
        self.branch5x5_1 = Unit(inputs, scaled(48), 1)
        self.branch5x5_2 = Unit(scaled(48), scaled(64), 5, padding=2)
        self.branch3x3dbl_1 = Unit(inputs, scaled(64), 1)
        self.branch3x3dbl_2 = Unit(scaled(64), scaled(96), 3, padding=1)
        self.branch3x3dbl_3 = Unit(scaled(96), scaled(96), 3, padding=1)
        self.branch_pool = Unit(inputs, scaled(pooled), 1)
        self.width = scaled(64) * 2 + scaled(96) + scaled(pooled)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1
        )


class InceptionB(nn.Module):
    def __init__(self, inputs, scaled):
        super().__init__()
        self.branch3x3 = Unit(inputs, scaled(384), 3, 2)
        self.branch3x3dbl_1 = Unit(inputs, scaled(64), 1)
        self.branch3x3dbl_2 = Unit(scaled(64), scaled(96), 3, padding=1)
        self.branch3x3dbl_3 = Unit(scaled(96), scaled(96), 3, 2)
        self.width = scaled(384) + scaled(96) + inputs

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], 1)


class InceptionC(nn.Module):
    def __init__(self, inputs, n, scaled):
        super().__init__()
        n, last, wide, tall = scaled(n), scaled(192), {"padding": (0, 3)}, {"padding": (3, 0)}
        self.branch1x1 = Unit(inputs, last, 1)
        self.branch7x7_1 = Unit(inputs, n, 1)
        self.branch7x7_2 = Unit(n, n, (1, 7), **wide)
        self.branch7x7_3 = Unit(n, last, (7, 1), **tall)
        self.branch7x7dbl_1 = Unit(inputs, n, 1)
        self.branch7x7dbl_2 = Unit(n, n, (7, 1), **tall)
        self.branch7x7dbl_3 = Unit(n, n, (1, 7), **wide)
        self.branch7x7dbl_4 = Unit(n, n, (7, 1), **tall)
        self.branch7x7dbl_5 = Unit(n, last, (1, 7), **wide)
        self.branch_pool = Unit(inputs, last, 1)
        self.width = 4 * last

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, inputs, scaled):
        super().__init__()
        n = scaled(192)
        self.branch3x3_1 = Unit(inputs, n, 1)
        self.branch3x3_2 = Unit(n, scaled(320), 3, 2)
        self.branch7x7x3_1 = Unit(inputs, n, 1)
        self.branch7x7x3_2 = Unit(n, n, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(n, n, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(n, n, 3, 2)
        self.width = scaled(320) + n + inputs

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, functional.max_pool2d(x, 3, 2)], 1)


class InceptionE(nn.Module):
    def __init__(self, inputs, scaled):
        super().__init__()
        n = scaled(384)
        self.branch1x1 = Unit(inputs, scaled(320), 1)
        self.branch3x3_1 = Unit(inputs, n, 1)
        self.branch3x3_2a = Unit(n, n, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(n, n, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(inputs, scaled(448), 1)
        self.branch3x3dbl_2 = Unit(scaled(448), n, 3, padding=1)
        self.branch3x3dbl_3a = Unit(n, n, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(n, n, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(inputs, scaled(192), 1)
        self.width = scaled(320) + 4 * n + scaled(192)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        sides = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        sides += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *sides, self.branch_pool(average(x))], 1)


class Head(nn.Module):
    def __init__(self, inputs, classes, scaled):
        super().__init__()
        self.conv0 = Unit(inputs, scaled(128), 1)
        self.conv1 = Unit(scaled(128), scaled(768), 5)
        self.fc = nn.Linear(scaled(768), classes)

    def forward(self, x):
        return self.fc(self.conv1(self.conv0(functional.avg_pool2d(x, 5, 3))).mean((2, 3)))


class Inception3(nn.Module):
    def __init__(self, width, auxiliary, classes):
        super().__init__()
        scaled = lambda filters: max(1, int(filters * width))  # noqa: E731
        self.Conv2d_1a_3x3 = Unit(3, scaled(32), 3, 2)
        self.Conv2d_2a_3x3 = Unit(scaled(32), scaled(32), 3)
        self.Conv2d_2b_3x3 = Unit(scaled(32), scaled(64), 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(scaled(64), scaled(80), 1)
        self.Conv2d_4a_3x3 = Unit(scaled(80), scaled(192), 3)
        self.Mixed_5b = InceptionA(scaled(192), 32, scaled)
        self.Mixed_5c = InceptionA(self.Mixed_5b.width, 64, scaled)
        self.Mixed_5d = InceptionA(self.Mixed_5c.width, 64, scaled)
        self.Mixed_6a = InceptionB(self.Mixed_5d.width, scaled)
        self.Mixed_6b = InceptionC(self.Mixed_6a.width, 128, scaled)
        self.Mixed_6c = InceptionC(self.Mixed_6b.width, 160, scaled)
        self.Mixed_6d = InceptionC(self.Mixed_6c.width, 160, scaled)
        self.Mixed_6e = InceptionC(self.Mixed_6d.width, 192, scaled)
        if auxiliary:
            self.AuxLogits = Head(self.Mixed_6e.width, classes, scaled)
        self.Mixed_7a = InceptionD(self.Mixed_6e.width, scaled)
        self.Mixed_7b = InceptionE(self.Mixed_7a.width, scaled)
        self.Mixed_7c = InceptionE(self.Mixed_7b.width, scaled)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(self.Mixed_7c.width, classes)
        self.auxiliary = auxiliary

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, 2))))
        x = fourth = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = self.fc(self.dropout(x.mean((2, 3))))
        return (x, self.AuxLogits(fourth)) if self.auxiliary else x


def build(name, classes, width=1.0, auxiliary=False):
    return Inception3(width, auxiliary, classes)
