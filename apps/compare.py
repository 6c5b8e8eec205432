"""Run an app on every installed backend and compare: `python -m apps.compare --check --model resnet20 --max-steps 100`.

Flags that are not its own go to the app (`--app cifar10` by default), the same to every backend.
"""

import argparse
import sys

from kvision import compare
from kvision.flags import run_cli


def main(argv=None) -> int:
    """The exit code: 0, with `--check` 1 where the backends differ too much, 2 where the flags are wrong, 143 where
    SIGTERM came."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_arguments(parser)
    return run_cli("python -m apps.compare", lambda: compare.main(*parser.parse_known_args(argv)), ())


if __name__ == "__main__":
    sys.exit(main())
