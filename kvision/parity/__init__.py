"""Compares a model between backends, layer by layer: `python -m kvision parity resnet20`.

Each backend runs in a child process, because Keras supports one backend a process. All start from the same weights and
images. A child records the output of every layer in inference and training mode, the loss, the gradient of each weight,
and the losses and weights of some steps with augmentation, momentum, weight decay and a schedule. These records are
compared. The first layer that diverges is reported: its inputs agreed, so the error is in that layer.

In float64 rounding is so small that any difference is an error: a padding, an epsilon, a layer that computes in
float32. In float32 the forward pass and the first loss are checked; later losses diverge by rounding alone, and are
reported but not checked.

`spec` defines a comparison; `launcher` starts the child processes, `cli` is the command; `worker` is a child,
`loading` its model and images; `result` and `tensors` are its records; `compare` checks them, `report` formats the
result as text. `worker` and `loading` import Keras, and no other file here imports them.
"""

from kvision.parity.cli import add_commands
from kvision.parity.launcher import compare
from kvision.parity.report import text
from kvision.parity.spec import Spec

__all__ = ["Spec", "add_commands", "compare", "text"]
