"""Several runs of an app started at once, none with a folder named: a folder each, and each its own right result.

    KERAS_BACKEND=torch python -m tests.at_once --runs 8 [--write]

Each run has another seed, all have the same network and so the same folder name to begin with. Afterwards one process
makes the same runs again, one after the other, each in a folder that is named. Right is a run whose weights, losses and
score are, bit for bit, those of its seed there; its checkpoints too. Exit code 1 where a run failed, shared a folder or
is not right. `--write` records the result in docs/measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvision.files import sha256, write_json
from kvision.report import environment
from kvision.weights.archive import Archive, digest
from kvision.weights.npz import MANIFEST
from tests.datasets import write_shapes

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--model",
    "mlp",
    "--max-train-samples",
    "400",
    "--max-test-samples",
    "100",
    "--batch-size",
    "40",
    "--epochs",
    "2",
]


def words(data: Path, seed: int) -> list[str]:
    """The flags of a run."""
    return ["--data", str(data), *FLAGS, "--seed", str(seed)]


def alone(data: Path, folder: Path, runs: int) -> None:
    """The runs one after the other in this process, in `folder`/SEED."""
    from apps import cifar10
    from kvision.experiment import command

    for seed in range(runs):
        code = command(cifar10.main, cifar10.RECIPES, "", [*words(data, seed), "--output-dir", str(folder / str(seed))])
        if code:
            sys.exit(code)


def outcome(folder: Path) -> dict:
    """What a run came to: all that does not depend on time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": metrics["seed"],
        "configured_seed": json.loads((folder / "config.json").read_text())["seed"],
        "test_correct": metrics["test_correct"],
        "test_loss": metrics["test_loss"],
        "losses": [row["loss"] for row in rows],
        "step_losses": json.loads((folder / "trace.json").read_text())["step_losses"],
        "stated_sha256_is_the_files": metrics["weights_sha256"] == sha256(folder / "weights.npz"),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "weights": arrays_of(folder / "weights.npz"),
    }


def arrays_of(path: Path) -> dict[str, str]:
    """The sha256 of each array of a weights file; its manifest, which states the command, aside."""
    with Archive(path) as archive:
        return {key: digest(archive.read(key)) for key in archive.members if key != MANIFEST}


def run(folder: Path, runs: int) -> dict:
    """Start the runs in `folder`, wait for them, compare; the record."""
    data, backend = folder / "shapes.npz", os.environ.get("KERAS_BACKEND", "tensorflow")
    write_shapes(data)
    (folder / "work").mkdir()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.time()
    processes = []
    for seed in range(runs):
        with open(folder / f"{seed}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "apps.cifar10", *words(data, seed)],
                    cwd=folder / "work",
                    env=environ,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait() for process in processes]
    seconds = time.time() - started
    for seed, code in enumerate(codes):
        if code:
            print(f"run {seed}: exit code {code}\n{(folder / f'{seed}.log').read_text()[-2000:]}", file=sys.stderr)
    arguments = [sys.executable, "-m", "tests.at_once", "--alone", str(folder), "--runs", str(runs)]
    subprocess.run(arguments, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, check=True)
    folders = sorted(path for path in (folder / "work" / "runs").iterdir())
    found = {place.name: outcome(place) for place in folders if (place / "metrics.json").exists()}
    expected = [outcome(folder / "alone" / str(seed)) for seed in range(runs)]
    right = [place for place, result in found.items() if result == expected[result["seed"]]]
    return {
        "command": f"KERAS_BACKEND={backend} python -m tests.at_once --runs {runs}",
        "runs": runs,
        "exit_codes": codes,
        "folders": {place: found[place]["seed"] if place in found else None for place in (f.name for f in folders)},
        "seeds": len({result["seed"] for result in found.values()}),
        "right": len(right),
        "passed": codes == [0] * runs and len(folders) == runs == len(right) == len({found[p]["seed"] for p in right}),
        "seconds": seconds,
        "versions": environment.versions(backend),
        "hardware": environment.hardware(),
    }


def main(argv=None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="record the result in docs/measured")
    parser.add_argument("--alone", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.alone:
        alone(Path(arguments.alone) / "shapes.npz", Path(arguments.alone) / "alone", arguments.runs)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        record = run(Path(temporary), arguments.runs)
    print(json.dumps(record, indent=1))
    if arguments.write:
        write_json(ROOT / "docs" / "measured" / f"at-once-{os.environ.get('KERAS_BACKEND', 'tensorflow')}.json", record)
    return int(not record["passed"])


if __name__ == "__main__":
    sys.exit(main())
