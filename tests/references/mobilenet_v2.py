"""torchvision's MobileNetV2, https://github.com/pytorch/vision/blob/main/torchvision/models/mobilenetv2.py"""

from torch import nn

# expansion, filters, blocks, first stride
ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def scaled(filters, width):
    value = filters * width
    near = max(8, int(value + 4) // 8 * 8)
    return near + 8 if near < 0.9 * value else near


def unit(inputs, filters, size=1, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, filters, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters), nn.ReLU6())


class Block(nn.Module):
    def __init__(self, inputs, filters, stride, expansion):
        super().__init__()
        wide = inputs * expansion
        self.joined = stride == 1 and inputs == filters
        self.conv = nn.Sequential(
            *([unit(inputs, wide)] if expansion > 1 else []),
            unit(wide, wide, 3, stride, wide),
            nn.Conv2d(wide, filters, 1, bias=False),
            nn.BatchNorm2d(filters),
        )

    def forward(self, x):
        return x + self.conv(x) if self.joined else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        inputs = scaled(32, width)
        features = [unit(3, inputs, 3, 2)]
        for expansion, filters, blocks, stride in ROWS:
            filters = scaled(filters, width)
            for j in range(blocks):
                features.append(Block(inputs, filters, 1 if j else stride, expansion))
                inputs = filters
        last = scaled(1280, max(1.0, width))
        self.features = nn.Sequential(*features, unit(inputs, last))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def build(name, classes, width=1.0):
    return MobileNetV2(width, classes)
