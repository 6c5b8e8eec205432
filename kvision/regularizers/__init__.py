"""What keeps a network from learning its training images by heart.

On weights (`weights`): penalties, constraints, decay, by the names of variables. On activations (`activations`): layers
that add noise. On samples (`samples`): mixup, CutMix, random erasing. Batch norm's other forms (`batch_norm`): frozen,
folded, synchronised, recalibrated. What works through the loss, the optimizer or the epochs is in
`kvision.tasks.classification` (label smoothing) and `kvision.training` (clipping, averages of the weights, early
stopping); Cutout, like a shift or a flip, is in `kvision.data.batches`.
"""

from kvision.regularizers.weights import KERNELS, MaxNorm, Orthogonal, attach, constrain, decay

__all__ = ["KERNELS", "MaxNorm", "Orthogonal", "attach", "constrain", "decay"]
