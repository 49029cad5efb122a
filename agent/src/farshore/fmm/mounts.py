"""What is mounted, as /proc/self/mountinfo tells it (proc(5))."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

TABLE = "/proc/self/mountinfo"
_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table: where the directory ``inner`` of a filesystem is mounted.

    ``device`` is the filesystem's own, which on Btrfs is not that of any file.
    """

    device: tuple[int, int]
    inner: bytes
    point: bytes
    kind: str


def table() -> list[Mount]:
    """All that is mounted, in the order in which that was done. Raises OSError."""
    found = []
    with open(TABLE, "rb") as lines:
        for line in lines:
            _, _, device, inner, point, _ = line.split(b" ", 5)
            major, _, minor = device.partition(b":")
            kind = line.partition(b" - ")[2].split(b" ", 1)[0].decode("utf-8", "replace")
            found.append(Mount((int(major), int(minor)), _plain(inner), _plain(point), kind))
    return found


def below(path: bytes, mounted: Iterable[Mount]) -> frozenset[Mount]:
    """Of what is ``mounted``, what lies below a real path."""
    above = path.rstrip(b"/") + b"/"
    return frozenset(mount for mount in mounted if mount.point.startswith(above) and mount.point != above)


def points_below(path: bytes) -> list[bytes]:
    """Where something is mounted below a real path now: each place once, after what is above it. Raises OSError."""
    return sorted({mount.point for mount in below(path, table())})


def _plain(text: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), text)
