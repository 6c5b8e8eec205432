"""torchvision's AlexNet, https://github.com/pytorch/vision/blob/main/torchvision/models/alexnet.py"""

from torch import nn
from torch.nn import functional


class AlexNet(nn.Module):
    def __init__(self, filters, hidden, classes):
        super().__init__()
        first, second, third, fourth, fifth = filters
        self.features = nn.Sequential(
            nn.Conv2d(3, first, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, fourth, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fourth, fifth, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(36 * fifth, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x):
        return self.classifier(functional.adaptive_avg_pool2d(self.features(x), (6, 6)).flatten(1))


def build(name, classes, filters=(64, 192, 384, 256, 256), hidden=4096):
    return AlexNet(filters, hidden, classes)
