"""Example programs, one page each: `python -m apps.cifar10 --help`."""
