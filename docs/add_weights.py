"""Add a run's weights to `weights/`: `python docs/add_weights.py RUN [EVALUATION ...]`, from the top of the repository.

RUN is the folder of the training run; each EVALUATION is that of a run with `--weights RUN/weights.npz --epochs 0` on
another backend. The manifest gets the accuracy on those backends and the license; the arrays do not change.
"""

import json
import sys
from pathlib import Path

import numpy as np

from kvision.weights.archive import Archive, write
from kvision.weights.npz import MANIFEST

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def add_weights(run: Path, evaluations: list[Path]) -> Path:
    """Write the file; ValueError for an evaluation of other weights or of another data set."""
    trained = json.loads((run / "metrics.json").read_text())
    with Archive(run / "weights.npz") as archive:
        arrays = {key: archive.read(key) for key in archive.members}
    manifest = json.loads(bytes(arrays[MANIFEST]))
    for folder in evaluations:
        scored = json.loads((folder / "metrics.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        same = Path(config["weights"] or "").resolve() == (run / "weights.npz").resolve() and config["epochs"] == 0
        if not same or any(scored[key] != trained[key] for key in ("dataset", "test_images")):
            raise ValueError(f"{folder} is no evaluation of {run}/weights.npz on the same images")
        manifest["accuracy"][scored["backend"]] = scored["test_accuracy"]
    manifest["license"] = "Apache-2.0"
    manifest["provenance"]["versions"] = trained["versions"]
    arrays[MANIFEST] = np.frombuffer(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode(), np.uint8)
    path = WEIGHTS / f"{manifest['architecture']}.{manifest['dataset']}.npz"
    write(path, arrays)
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(add_weights(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]))
