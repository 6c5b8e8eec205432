"""Programs that show what kvision does, a page each: `python -m apps.cifar10 --help`."""
