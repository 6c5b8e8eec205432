"""Run an app on every installed backend and compare: `python -m apps.compare --check --model resnet20 --max-steps 100`.

All other flags are passed to the app (`--app cifar10` by default), the same on every backend.
"""

import argparse
import sys

from kvision import compare
from kvision.flags import app_module, run_cli


def main(argv=None) -> int:
    """Run the command; returns the exit code: 0, 1 if `--check` fails, 2 for invalid flags, 143 after SIGTERM."""
    prog = f"python -m {app_module('compare')}"
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_arguments(parser)
    return run_cli(prog, lambda: compare.main(*parser.parse_known_args(argv)), ())


if __name__ == "__main__":
    sys.exit(main())
