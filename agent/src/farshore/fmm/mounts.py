"""What is mounted, as /proc/self/mountinfo tells it (proc(5))."""

from __future__ import annotations

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


def _plain(text: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), text)
