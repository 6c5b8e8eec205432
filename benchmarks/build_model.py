"""How long a network takes from nothing to its initial weights, beside Keras's own.

    KERAS_BACKEND=jax python -m benchmarks.build_model

Every figure is the median over n fresh processes, so compilations count. Beside the wall time stands the process's CPU
time, the one to compare on a machine that does other work too. The phases:

- imports: Keras with its backend, and kvision with the files of all its networks;
- create: `kvision.create_model(name)`, which makes the variables and draws their values;
- initialize: `kvision.weights.initialization.initialize(model, 0)`, which draws them anew for a seed;
- blank: `create` within `kvision.layers.skip_init()`, where kernels start as zeros, in a separate process;
- keras: `keras.applications.<peer>(weights=None)`, in a separate process.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from kvision import flags


@dataclass(frozen=True)
class Config:
    model: str = field(default="resnet50", metadata={"help": "a network of the zoo"})
    peer: str = field(default="ResNet50", metadata={"help": "its like in keras.applications"})
    n: int = field(default=5, metadata={"help": "processes for each median"})
    once: str = field(
        default="",
        metadata={"help": "measure one way in this process, and print JSON", "choices": ("create", "blank", "keras")},
    )


def measure(config: Config) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of each phase, in this process."""
    clocks = lambda: (time.perf_counter(), time.process_time())  # noqa: E731
    times, before = {}, clocks()

    def lap(phase: str) -> None:
        nonlocal before
        now = clocks()
        times[phase] = (now[0] - before[0], now[1] - before[1])
        before = clocks()

    import keras

    from kvision import zoo
    from kvision.layers import skip_init
    from kvision.weights.initialization import initialize

    zoo.arguments(config.model)
    lap("imports")
    if config.once == "keras":
        getattr(keras.applications, config.peer)(weights=None)
    elif config.once == "blank":
        with skip_init():
            zoo.build_model(config.model)
    else:
        model = zoo.build_model(config.model)
    lap(config.once)
    if config.once == "create":
        initialize(model, 0)
        lap("initialize")
    return times


def main(argv=None) -> None:
    config = Config(**flags.parse(Config, argv, prog="build_model", description=__doc__, defaults=Config()))
    if config.once:
        print(json.dumps(measure(config)))
        return
    runs: dict[str, list[tuple[float, float]]] = {}
    own = [f"--model={config.model}", f"--peer={config.peer}"]
    for _ in range(config.n):
        for once in ("create", "blank", "keras"):
            command = [sys.executable, "-m", "benchmarks.build_model", f"--once={once}", *own]
            child = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.PIPE)
            for phase, seconds in json.loads(child.stdout.splitlines()[-1]).items():
                runs.setdefault(phase, []).append(seconds)
    print(f"{'phase':<12}{'wall s':>8}{'CPU s':>8}{'n':>5}")
    for phase, seconds in runs.items():
        wall, cpu = (median(times) for times in zip(*seconds, strict=True))
        print(f"{phase:<12}{wall:>8.2f}{cpu:>8.2f}{len(seconds):>5}")


if __name__ == "__main__":
    main()
