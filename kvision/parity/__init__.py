"""Whether a model computes the same on every backend: `python -m kvision parity resnet20`.

Each backend is a child process of its own (Keras knows one at a time), and all start from the same weights and the same
images. A child keeps the output of every layer at inference and in training, the loss, the gradient of each weight, and
the losses and weights of some steps with augmentation, momentum, weight decay and a schedule. What is compared are
those. Where they part, the first layer to do so is named: its inputs agreed, so the fault lies there.

In float64 rounding is so small that what parts is an error: a padding, an epsilon, a layer that computes in float32. In
float32 the forward pass and the first loss tell; later losses part by rounding alone, and are shown and not judged.

What is asked is in `spec`; the parent in `parent`, its command in `cli`; a child in `child`, its model and images
in `subject`; what it leaves in `result` and `tensors`; who is right in `verdict`; the words in `report`. `child` and
`subject` import Keras, and no other file here imports them.
"""

from kvision.parity.cli import add_commands
from kvision.parity.launcher import compare
from kvision.parity.report import text
from kvision.parity.spec import Spec

__all__ = ["Spec", "add_commands", "compare", "text"]
