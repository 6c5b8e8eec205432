"""Layers of the networks. The functions return a layer, or a short chain of layers, to be called on a tensor:
`conv(64, 3, name="stem_conv")(x)`.

Defaults shared by all networks are set here; the rows of `VARIANTS` state where a published network differs.
"""

from kvision.layers.conv import (
    ConstantPad2D,
    conv,
    depthwise_conv,
    least_side,
    up_conv,
)
from kvision.layers.dense import (
    activation,
    dense,
    logits,
)
from kvision.layers.initializers import (
    Constant,
    Dirac,
    VarianceScaling,
    skip_init,
    whitening_kernel,
    whitening_kernel_on_device,
)
from kvision.layers.noise import (
    DropBlock,
    Dropout,
    GaussianNoise,
    ShakeShake,
    SpatialDropout,
    StochasticDepth,
    dropout,
)
from kvision.layers.norm import (
    BatchStatistics,
    LocalResponseNorm,
    SynchronizedBatchNorm,
    batch_norm,
    batch_norms,
    batch_statistics_model,
    freeze_batch_norm,
    fuse_conv_bn,
    sync_batch_norm,
    update_bn,
)
from kvision.layers.pooling import (
    AdaptiveAveragePooling2D,
    avg_pool,
    global_pool,
    max_pool,
)
from kvision.layers.regularizers import (
    KERNELS,
    MaxNorm,
    Orthogonal,
    Sum,
    add_constraint,
    add_regularizer,
    match,
    set_weight_decay_mask,
)

__all__ = [
    "KERNELS",
    "AdaptiveAveragePooling2D",
    "BatchStatistics",
    "Constant",
    "ConstantPad2D",
    "Dirac",
    "DropBlock",
    "Dropout",
    "GaussianNoise",
    "LocalResponseNorm",
    "MaxNorm",
    "Orthogonal",
    "ShakeShake",
    "SpatialDropout",
    "StochasticDepth",
    "Sum",
    "SynchronizedBatchNorm",
    "VarianceScaling",
    "activation",
    "add_constraint",
    "add_regularizer",
    "avg_pool",
    "batch_norm",
    "batch_norms",
    "batch_statistics_model",
    "conv",
    "dense",
    "depthwise_conv",
    "dropout",
    "freeze_batch_norm",
    "fuse_conv_bn",
    "global_pool",
    "least_side",
    "logits",
    "match",
    "max_pool",
    "set_weight_decay_mask",
    "skip_init",
    "sync_batch_norm",
    "up_conv",
    "update_bn",
    "whitening_kernel",
    "whitening_kernel_on_device",
]
