"""torchvision's ResNets, https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py"""

import torch
from torch import nn

BLOCKS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}


class Block(nn.Module):
    def __init__(self, inputs, convolutions):
        super().__init__()
        self.depth, width, stride = len(convolutions), inputs, 1
        for k, (filters, size, step) in enumerate(convolutions, start=1):
            setattr(self, f"conv{k}", nn.Conv2d(width, filters, size, step, size // 2, bias=False))
            setattr(self, f"bn{k}", nn.BatchNorm2d(filters))
            width, stride = filters, stride * step
        self.downsample = None
        if inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = x
        for k in range(1, self.depth + 1):
            y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y if k == 1 else torch.relu(y)))
        return torch.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    def __init__(self, blocks, bottleneck, width, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for i, count in enumerate(blocks):
            f, stage = width * 2**i, []
            for j in range(count):
                stride = 2 if i and not j else 1
                row = [(f, 1, 1), (f, 3, stride), (4 * f, 1, 1)] if bottleneck else [(f, 3, stride), (f, 3, 1)]
                stage.append(Block(inputs, row))
                inputs = row[-1][0]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def build(name, classes, blocks=None, width=64):
    depth = name.removeprefix("resnet")
    return ResNet(blocks or BLOCKS[depth], int(depth) >= 50, width, classes)
