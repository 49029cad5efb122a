"""What is mounted, as /proc/self/mountinfo tells it (proc(5))."""

from __future__ import annotations

import os
import re

_TABLE = "/proc/self/mountinfo"
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def points() -> list[bytes]:
    """Where something is mounted in this process's namespace, in the order in which that was done. Raises OSError."""
    with open(_TABLE, "rb") as table:
        return [_plain(line.split(b" ", 5)[4]) for line in table]


def points_below(path: bytes) -> list[bytes]:
    """As ``points``, only those below a real path."""
    above = path.rstrip(b"/") + b"/"
    return sorted({point for point in points() if point.startswith(above) and point != above})


def kinds() -> dict[int, str]:
    """The type of the filesystem on each device that is mounted; empty when that is not told."""
    found = {}
    try:
        with open(_TABLE, "rb") as table:
            for line in table:
                major, _, minor = line.split(b" ", 3)[2].partition(b":")
                found[os.makedev(int(major), int(minor))] = line.partition(b" - ")[2].split(b" ", 1)[0].decode()
    except OSError:
        return {}
    return found


def _plain(text: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), text)
