"""What was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from bench import disk, peers


def describe() -> dict[str, Any]:
    """Cores, processor, memory, kernel, file systems, versions of ours and of the peers."""
    from farshore import __version__

    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        "kernel": platform.release(),
        "system": _field(Path("/etc/os-release"), "PRETTY_NAME", "=").strip('"'),
        "python": platform.python_version(),
        "filesystems": {
            "/var/tmp": disk.kind(Path("/var/tmp")),
            "rows 1-3, 6-12": "XFS with reflink on a loop device in /dev/shm",
        },
        "farshore": __version__,
        "peers": peers.versions(),
        "libraries": _libraries(),
    }


def load() -> float:
    """The machine's load over the last minute: figures from a busy machine are of little worth."""
    return os.getloadavg()[0]


def _libraries() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("numba", "numpy", "blake3", "xxhash", "msgspec"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _field(path: Path, name: str, separator: str = ":") -> str:
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            key, found, value = line.partition(separator)
            if found and key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return "unknown"
