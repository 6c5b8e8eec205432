"""The environment of a run: package versions, hardware, memory, time.

It reads the system and the metadata of installed packages, and imports none of them.
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

# Distributions of each Keras backend, by their names in package registries.
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
        backend: "jax", "tensorflow" or "torch"; None is the backend of an imported Keras, or all installed backends if
            Keras is not imported.

    Packages that are not installed are left out.
    """
    if backend is None and "keras" in sys.modules:
        backend = sys.modules["keras"].backend.backend()
    found = {"python": platform.python_version(), "kvision": __version__}
    packages = PACKAGES.get(backend) if backend else [name for names in PACKAGES.values() for name in names]
    for name in ("keras", "numpy", "pillow", *(packages or ())):
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
    """Name, memory and driver of each NVIDIA GPU, from nvidia-smi; empty if it fails."""
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in output.splitlines() if line.strip()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu() -> str:
    # /proc/cpuinfo has no model name on processors other than x86.
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    # Only Linux has CPU affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, round(int(quota) / int(period))))  # a container's CPU quota
    return cores


def load_average() -> float | None:
    """The load average of the last minute, of the whole machine; None where the system has none."""
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
    """The peak resident memory of this process in bytes, shared libraries included; None on Windows."""
    # On Linux ru_maxrss is inherited from the parent process (getrusage(2)); VmHWM is that of this process.
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
    """Seconds since the system started this process, the interpreter's start included.

    The resolution is 10 ms on Linux. On other systems, and for implausible values, the count begins with the import of
    this module.
    """
    known = time.perf_counter() - _IMPORTED
    try:
        # Field 22 of proc(5), in clock ticks since boot; field 2, in parentheses, may hold blanks.
        ticks = int(_read("/proc/self/stat").rpartition(")")[2].split()[19])
        spent = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, ValueError, OSError):
        return known
    return spent if spent >= known - 0.05 else known
