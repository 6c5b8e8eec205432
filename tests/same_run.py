"""ResNet-20 on every backend from the same start, checked; then one backend's weights scored by the others.

    python -m tests.same_run

With KVISION_DATA set the images are CIFAR-10's, else drawn. The rate is small, so that 20 steps part by rounding alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from kvision.compare import compare, passed
from kvision.engine import BACKENDS
from kvision.report.compare_report import comparison_table
from tests.datasets import real_data, write_shapes


def main() -> int:
    """The exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = real_data() or write_shapes(folder / "shapes.npz")
        flags = ["--data", data, "--model", "resnet20", "--max-test-samples", "2000"]
        trained = compare(
            "cifar10",
            [*flags, "--max-steps", "20", "--learning-rate", "0.001", "--schedule", "constant"],
            folder / "train",
        )
        print(comparison_table(trained))
        if not passed(trained):
            return 1

        weights = folder / "train" / BACKENDS[0] / "weights.npz"
        scored = compare("cifar10", [*flags, "--weights", str(weights), "--epochs", "0"], folder / "score")
        logits = {row["backend"]: np.asarray(row["initial_logits"]) for row in scored["rows"]}
        correct = {row["backend"]: row["test_correct"] for row in scored["rows"]}
        correct["at the end of training"] = trained["rows"][0]["test_correct"]
        apart = max(float(np.abs(values - logits[BACKENDS[0]]).max()) for values in logits.values())
        print(
            f"the weights of {BACKENDS[0]}: correct answers {json.dumps(correct)}, logits apart by at most {apart:.2g}"
        )
        if len(set(correct.values())) > 1 or apart > 1e-4:
            return 1
        for backend in BACKENDS:
            environment = {**os.environ, "KERAS_BACKEND": backend}
            words = [sys.executable, "-m", "kvision", "weights", "verify", str(weights)]
            if subprocess.run(words, env=environment).returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
