"""Training: the epochs, evaluation, checkpoints, optimizers, and what stops and resumes a run."""

from kvision.training import averaging, optimizers, schedules
from kvision.training.trainer import DivergedError, EarlyStopping, Execution, History, Schedule, fit

__all__ = [
    "DivergedError",
    "EarlyStopping",
    "Execution",
    "History",
    "Schedule",
    "averaging",
    "fit",
    "optimizers",
    "schedules",
]
