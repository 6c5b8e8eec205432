"""Idelbayev's CIFAR ResNets, https://github.com/akamaster/pytorch_resnet_cifar10: option A, zeros on both sides."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.stride, self.missing = stride, filters - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + functional.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing // 2)))


class ResNet(nn.Module):
    def __init__(self, blocks, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for i, filters in enumerate((16, 32, 64), start=1):
            stage = []
            for j in range(blocks):
                stage.append(Block(inputs, filters, 2 if i > 1 and j == 0 else 1))
                inputs = filters
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build(name, classes):
    return ResNet((int(name.removeprefix("resnet")) - 2) // 6, classes)
