"""Learning-rate schedules."""

import math

import keras
from keras import ops

SCHEDULES = ("constant", "cosine", "linear", "steps")


@keras.saving.register_keras_serializable("kvision")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A straight line up to `peak` in `warmup` steps, then down to 0 at `total`, straight or along half a cosine.

    Args:
        start: the first step's share of `peak`.
        kind: "linear", "cosine" or "constant" (no way down).
    """

    def __init__(self, peak: float, total: int, warmup: int = 0, start: float = 0.2, kind: str = "linear"):
        if kind not in ("linear", "cosine", "constant"):
            raise ValueError(f"a schedule goes down 'linear', 'cosine' or not ('constant'), got {kind!r}")
        self.peak, self.total, self.warmup, self.start, self.kind = peak, total, warmup, start, kind

    def __call__(self, step):
        step = ops.cast(step, keras.config.floatx())
        up = self.start + (1 - self.start) * step / max(1, self.warmup)
        left = ops.clip((self.total - step) / max(1, self.total - self.warmup), 0.0, 1.0)
        if self.kind == "cosine":
            left = 0.5 - 0.5 * ops.cos(math.pi * left)
        down = ops.ones_like(left) if self.kind == "constant" else left
        return self.peak * ops.where(step < self.warmup, up, down)

    def get_config(self):
        names = ("peak", "total", "warmup", "start", "kind")
        return {name: getattr(self, name) for name in names}


def schedule(kind: str, peak: float, total: int, warmup: float = 0.0):
    """The learning rate over `total` steps.

    Args:
        kind: "constant"; "linear" or "cosine", down to 0 at the end; "steps", a tenth after half of the steps and a
            hundredth after three quarters (He et al. 2015, section 4.2).
        peak: the largest rate.
        warmup: the share of the steps in which the rate rises to `peak`, from a fifth of it.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if kind == "steps":
        boundaries = [total // 2 - 1, total * 3 // 4 - 1]  # the last step of each part
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, [peak, peak / 10, peak / 100])
    return WarmupSchedule(peak, total, round(warmup * total), kind=kind)
