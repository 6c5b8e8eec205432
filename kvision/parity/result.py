"""The result of one backend, which its process writes to two files for the parent."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvision.parity.tensors import Tensor


@dataclass
class Result:
    """The result of one backend.

    Args:
        operations: the operations of the graph in the order of execution: name, type, settings (a dictionary of plain
            values), inputs (names of operations), dtype, random (whether it uses the backend's random generator).
        outputs: the names of the operations that give the model's outputs.
        tensors: by stage, in order: "initial", "inference_layers" and "training_layers" (one an operation, computed
            layer by layer), "inference" (of the fused graph, as in evaluation), "gradients", "weights". Names are
            unique within a stage.
        loss: the loss at the initial weights, in training mode.
        losses: the losses of the steps from there.
        notes: remarks on the model for the report.
    """

    backend: str
    operations: list[dict]
    outputs: list[str]
    tensors: dict[str, list[Tensor]]
    loss: float
    losses: list[float]
    notes: list[str]

    def save(self, folder: Path) -> None:
        arrays = {f"{stage}/{i}": t.values for stage, kept in self.tensors.items() for i, t in enumerate(kept)}
        np.savez(folder / f"{self.backend}.npz", **arrays)
        rows = {
            stage: [{k: v for k, v in vars(tensor).items() if k != "values"} for tensor in kept]
            for stage, kept in self.tensors.items()
        }
        (folder / f"{self.backend}.json").write_text(json.dumps({**vars(self), "tensors": rows}))

    @classmethod
    def load(cls, folder: Path, backend: str) -> "Result":
        content = json.loads((folder / f"{backend}.json").read_text())
        with np.load(folder / f"{backend}.npz", allow_pickle=False) as file:
            content["tensors"] = {
                stage: [
                    Tensor(**{**row, "shape": tuple(row["shape"]), "values": file[f"{stage}/{i}"]})
                    for i, row in enumerate(rows)
                ]
                for stage, rows in content["tensors"].items()
            }
        return cls(**content)
