"""torchvision's MnasNets, https://github.com/pytorch/vision/blob/main/torchvision/models/mnasnet.py"""

from torch import nn

# window, first stride, expansion, filters, blocks
STACKS = ((3, 2, 3, 24, 3), (5, 2, 3, 40, 3), (5, 2, 6, 80, 3), (3, 1, 6, 96, 2), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))


def scaled(filters, width):
    value = filters * width
    near = max(8, int(value + 4) // 8 * 8)
    return near + 8 if near < 0.9 * value else near


def unit(inputs, filters, size=1, stride=1, groups=1):
    return [nn.Conv2d(inputs, filters, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(filters)]


class Block(nn.Module):
    def __init__(self, inputs, filters, size, stride, expansion):
        super().__init__()
        wide = inputs * expansion
        self.joined = stride == 1 and inputs == filters
        self.layers = nn.Sequential(
            *unit(inputs, wide), nn.ReLU(), *unit(wide, wide, size, stride, wide), nn.ReLU(), *unit(wide, filters)
        )

    def forward(self, x):
        return x + self.layers(x) if self.joined else self.layers(x)


class MnasNet(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        first, inputs = scaled(32, width), scaled(16, width)
        layers = [*unit(3, first, 3, 2), nn.ReLU(), *unit(first, first, 3, 1, first), nn.ReLU(), *unit(first, inputs)]
        for size, stride, expansion, filters, blocks in STACKS:
            filters, stack = scaled(filters, width), []
            for j in range(blocks):
                stack.append(Block(inputs, filters, size, 1 if j else stride, expansion))
                inputs = filters
            layers.append(nn.Sequential(*stack))
        self.layers = nn.Sequential(*layers, *unit(inputs, 1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.layers(x).mean((2, 3)))


def build(name, classes):
    return MnasNet(float(name.removeprefix("mnasnet").replace("_", ".")), classes)
