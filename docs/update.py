"""Write the generated parts of the READMEs: `python docs/update.py`, from the top of the repository.

The accuracies come from `docs/measured/*.json`, the metrics.json of runs; the models from the zoo; the weights from
their manifests. A measured run has no "source" (a local path), and has "shared_machine": true if other work ran beside
it.
"""

import json
import re
from pathlib import Path

from kvision.convert import markdown_table
from kvision.weights import write_table

ROOT = Path(__file__).resolve().parent.parent


def scores() -> str:
    """The table of the measured runs."""
    rows = [
        "| app | model | data set | backend | test accuracy | training | images/s | to first step | peak memory |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    machines, shared = set(), []
    for path in sorted((ROOT / "docs" / "measured").glob("*.json")):
        run = json.loads(path.read_text())
        if "test_accuracy" not in run:  # another table, or not the training of an app
            continue
        hardware, versions = run["hardware"], run["versions"]
        gpus = "".join(f"{gpu}, " for gpu in hardware.get("gpus", ()))
        machines.add(
            f"{gpus}{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_bytes'] / 2**30:.0f} GiB, "
            f"Keras {versions['keras']}, Python {versions['python']}"
        )
        if run.get("shared_machine"):
            shared.append(f"{run['model']} on {run['backend']}")
        accuracy = f"{run['test_accuracy']:.2%}"
        if "tta_accuracy" in run:
            accuracy += f" ({run['tta_accuracy']:.2%} with test-time augmentation {run['tta']})"
        engine = ", ".join(f"{name} {versions[name]}" for name in versions if name.startswith(run["backend"]))
        engine += "".join(f", {gpu.partition(',')[0]}" for gpu in hardware.get("gpus", ()))
        rows.append(
            f"| {run['app']} | `{run['model']}` | {run['dataset']} | {engine} | {accuracy} | "
            f"{run['train_seconds']:.0f} s | {run['images_per_second']:,.0f} | {run['seconds_to_first_step']:.1f} s | "
            f"{run['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    note = f"One run each, seed 0, on {'; '.join(sorted(machines))}. The commands are in `docs/measured/*.json`."
    if shared:
        note += f" Other work ran on the machine meanwhile, so these times are too long: {', '.join(shared)}."
    return "\n".join([*rows, "", note])


def regularizers() -> str:
    """The table of `apps.regularize`; its metrics.json is stored without the rows' histories."""
    run = json.loads((ROOT / "docs" / "measured" / "regularize.json").read_text())
    lines = ["| regularizer | setting | train | test | gap |", "| --- | --- | ---: | ---: | ---: |"]
    for row in run["rows"]:
        name = row["regularizer"].replace("_", " ")
        shares = f"{row['train_accuracy']:.2%} | {row['test_accuracy']:.2%} | {100 * row['gap']:.2f}"
        lines.append(f"| {name} | {row['setting']} | {shares} |")
    versions, hardware = run["versions"], run["hardware"]
    note = (
        f"{run['train_images']:,} training and {run['test_images']:,} test images of {run['dataset']}, seed "
        f"{run['seed']}, one run each: `{run['command']}` on {hardware['cpu']}, Keras {versions['keras']}, "
        f"{run['backend']} {versions[run['backend']]}. One run's test accuracy has a standard error of half a point."
    )
    return "\n".join([*lines, "", note])


def put(text: str, mark: str, content: str) -> str:
    """Replace the text between the two comments of `mark`."""
    pattern = rf"(<!-- {mark}:start -->\n).*?(<!-- {mark}:end -->)"
    replaced, count = re.subn(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of comments <!-- {mark}:start --> and <!-- {mark}:end -->, found {count}")
    return replaced


def readme(text: str) -> str:
    """Update the generated parts of the README's text."""
    parts = {"scores": scores(), "regularizers": regularizers(), "models": markdown_table(ROOT / "weights")}
    for mark, content in parts.items():
        text = put(text, mark, content)
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text()))
    write_table(ROOT / "weights", ROOT / "weights" / "README.md")
