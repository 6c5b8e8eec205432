"""What a run ran on: versions, hardware, memory, time.

The system and the metadata of installed packages are asked; nothing is imported for it.
"""

import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from kvision import __version__

_IMPORTED = time.perf_counter()

# Distributions of each Keras backend, by the names under which package registries know them.
PACKAGES = {
    "jax": ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-macos", "tf-nightly"),
    "torch": ("torch",),
}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions(backend: str | None = None) -> dict[str, str]:
    """Versions by distribution name: python, kvision, keras, numpy, pillow and the active backend's packages.

    Args:
        backend: "jax", "tensorflow" or "torch"; None asks Keras where it is imported already, and where it is
            not, lists the packages of every backend installed.

    Packages that are not installed are left out.
    """
    if backend is None and "keras" in sys.modules:
        backend = sys.modules["keras"].backend.backend()
    found = {"python": platform.python_version(), "kvision": __version__}
    wanted = PACKAGES.get(backend) if backend else [name for names in PACKAGES.values() for name in names]
    for name in ("keras", "numpy", "pillow", *(wanted or ())):
        version = _installed(name)
        if version:
            found[name] = version
    return found


def hardware() -> dict[str, str | int | list[str] | None]:
    """The machine: cpu (its model), cores (usable by this process), memory_bytes (or None), gpus, system."""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_bytes": _memory(),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
    }


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as nvidia-smi tells them; none where it does not answer."""
    wanted = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(["nvidia-smi", *wanted], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu() -> str:
    # Processors other than x86 name no model there.
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    # Linux alone has affinity; a machine of 64 cores often lends a process two.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, round(int(quota) / int(period))))  # a container's share of the time
    return cores


def load_average() -> float | None:
    """Processes that ran or waited for a core in the last minute, all of the machine's; None where it does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def peak_memory_bytes() -> int | None:
    """The most resident memory this process has had, in bytes, shared libraries included; None on Windows."""
    # Linux carries ru_maxrss over from the process that started this one, so that a large parent makes every
    # child look large (getrusage(2)); VmHWM belongs to this process's memory alone.
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", _read("/proc/self/status"), re.MULTILINE)
    if peak:
        return int(peak.group(1)) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def seconds_since_process_start() -> float:
    """Seconds since the system started this process, the interpreter's own start included.

    Linux tells it to 10 ms. Elsewhere, and where the system's answer makes no sense, the count begins with
    the import of this module.
    """
    known = time.perf_counter() - _IMPORTED
    try:
        # Field 22 of proc(5), in clock ticks since boot; field 2, in parentheses, may hold blanks.
        ticks = int(_read("/proc/self/stat").rpartition(")")[2].split()[19])
        spent = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, ValueError, OSError):
        return known
    return spent if spent >= known - 0.05 else known
