"""How high the kernel's limits must be for what is to be watched."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

_LIMITS = Path("/proc/sys/fs")
#: On a machine of the least memory (fs/notify/inotify/inotify_user.c).
_DEFAULT_WATCHES = 8192
#: For each directory, so many watches: a tree may double before the limit has to be raised again.
_SPARE = 2


def count_directories(top: bytes, most: float = math.inf) -> int:
    """How many directories there are at and below ``top``, as far as they can be read; 0 when there is none.

    Symbolic links are not followed, but for ``top`` itself; what is mounted below counts, as it is watched. Above
    ``most`` it does not count on.
    """
    if not os.path.isdir(top):
        return 0
    count = 0
    pending = [top]
    while pending and count <= most:
        count += 1
        try:
            with os.scandir(pending.pop()) as entries:
                pending += [entry.path for entry in entries if _is_directory(entry)]
        except OSError:
            # It is gone, or nobody may look into it; what watches says so.
            continue
    return count


def watches_for(directories: int) -> int:
    """What ``fs.inotify.max_user_watches`` should be, at least: a power of two, so that it seldom changes."""
    return 1 << max(0, _SPARE * directories - 1).bit_length() if directories else 0


def count_all(paths: Iterable[bytes], most: float = math.inf) -> int:
    """How many directories there are at and below ``paths``, which lie apart; above ``most`` it does not count on."""
    count = 0
    for path in paths:
        count += count_directories(path, most - count)
    return count


def most_watches() -> int:
    """What ``fs.inotify.max_user_watches`` is."""
    found = limit("inotify", "max_user_watches")
    return _DEFAULT_WATCHES if found is None else found


def limit(engine: str, name: str) -> int | None:
    """One of the kernel's limits of ``inotify`` or ``fanotify``, None if it does not tell."""
    try:
        return int((_LIMITS / engine / name).read_bytes())
    except (OSError, ValueError):
        return None


def _is_directory(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
