"""PyTorch by hand: modules in channels_last format, SGD with its fused update; with `torch.compile` and without; on a
GPU also with a CUDA graph's replay for a step.

(The fused update takes 0.25 ms for 270,000 numbers in 70 tensors on two cores of a Xeon, foreach 0.8, the plain one
0.9.)
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import CLASSES, LEARNING_RATES, MOMENTUM, RESNET50, VGG, WEIGHT_DECAY


class Block(nn.Module):
    def __init__(self, inputs, filters):
        super().__init__()
        self.strides = 1 if inputs == filters else 2
        self.missing = filters - inputs
        self.conv1 = nn.Conv2d(inputs, filters, 3, self.strides, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.missing:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        return F.relu(y + x, inplace=True)


def resnet20() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    inputs = 16
    for filters in (16, 32, 64):
        for _ in range(3):
            layers.append(Block(inputs, filters))
            inputs = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES["resnet20"]))


def vgg_small() -> nn.Module:
    layers, inputs = [], 3
    for factor, count in zip((1, 2, 4, 8, 8), VGG["convolutions"], strict=True):
        for _ in range(count):
            filters = factor * VGG["width"]
            layers += [nn.Conv2d(inputs, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
            inputs = filters
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(inputs, VGG["hidden"]), nn.ReLU(inplace=True)]
        inputs = VGG["hidden"]
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES["vgg_small"]))


class Bottleneck(nn.Module):
    def __init__(self, inputs, filters, strides):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, strides, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.changes = inputs != 4 * filters
        # Made in the order of kvision's variables, which has the shortcut's before the third's.
        if self.changes:
            self.shortcut_conv = nn.Conv2d(inputs, 4 * filters, 1, strides, bias=False)
        self.conv3 = nn.Conv2d(filters, 4 * filters, 1, bias=False)
        if self.changes:
            self.shortcut_bn = nn.BatchNorm2d(4 * filters)
        self.bn3 = nn.BatchNorm2d(4 * filters)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.changes:
            x = self.shortcut_bn(self.shortcut_conv(x))
        return F.relu(y + x, inplace=True)


def resnet50() -> nn.Module:
    width = RESNET50["width"]
    layers = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, padding=1))
    inputs = width
    for stage, count in enumerate(RESNET50["blocks"]):
        for i in range(count):
            layers.append(Bottleneck(inputs, width * 2**stage, 2 if stage and i == 0 else 1))
            inputs = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES["resnet50"]))


NETWORKS = {"resnet20": resnet20, "vgg_small": vgg_small, "resnet50": resnet50}
EAGER_STEPS = 3  # before a capture: momenta are made, cuDNN's algorithms chosen


def train(
    network, images, labels, batch_size, clock, *, steps, dtype="float32", weights=None, compiled=False, graphed=False
) -> int:
    """As the package says; with `compiled` by `torch.compile`, with `graphed` by a CUDA graph of a step.

    Raises:
        RuntimeError: `graphed` without a CUDA device.
    """
    if graphed and not torch.cuda.is_available():
        raise RuntimeError("graphed replays a CUDA graph, and PyTorch finds no CUDA device: leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True  # every batch has one shape, for which the best algorithm is then found
    model = NETWORKS[network]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model = model.to(device=device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    if weights is not None:
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
        for parameter, value in zip(parameters, weights.values(), strict=True):
            parameter.data.copy_(torch.from_numpy(value.transpose(axes[value.ndim])))
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATES[network], momentum=MOMENTUM, nesterov=True, fused=True)
    mixed = dtype == "bfloat16"

    def objective(images, labels):
        # A capture wants no casts that are kept (PyTorch's notes on CUDA graphs); every weight is cast once anyhow.
        with torch.autocast(device, torch.bfloat16, enabled=mixed, cache_enabled=not graphed):
            logits = model(images)
        logits = logits.float()
        return F.cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).sum()

    if compiled:
        objective = torch.compile(objective)

    def step(images, labels):
        loss, correct = objective(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), correct

    # As channels_last wants them: nothing is moved.
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(labels).to(device).long()
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    clock.start()
    if graphed:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # a capture must not be on the default one, nor what it repeats
            _replay(step, optimizer, batches, steps, clock)
    else:
        for i in range(steps):
            loss, _ = step(*batches[i % len(batches)])
            clock.step(loss)
    return sum(parameter.numel() for parameter in parameters)


def _replay(step, optimizer, batches, steps, clock):
    """Some steps as they are, the others by one CUDA graph."""
    for i in range(EAGER_STEPS):
        loss, _ = step(*batches[i % len(batches)])
        clock.step(loss)
    shown, answers = (torch.empty_like(tensor) for tensor in batches[0])
    optimizer.zero_grad()  # so that the capture makes the gradients in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        loss, _ = step(shown, answers)
    for i in range(EAGER_STEPS, steps):
        images, labels = batches[i % len(batches)]
        shown.copy_(images)
        answers.copy_(labels)
        graph.replay()
        clock.step(loss)  # which copies it from the device before the next replay overwrites it
