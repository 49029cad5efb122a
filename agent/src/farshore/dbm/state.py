"""A state of the group that is on its way: what was dirty when its snapshot was taken, and how much of it is left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from farshore.fmm.dirty import Dirty


@dataclass
class Cycle:
    """``own`` is settled by the snapshot that is being sent; ``later`` may have changed after it was taken.

    Both are in flight until the cycle ends. ``left`` counts the works that have not ended. ``taken``: the monotonic
    clock just before the snapshot was taken.
    """

    own: list[Dirty]
    later: list[Dirty]
    left: int
    taken: float


def merged(own: Iterable[Dirty], later: Iterable[Dirty]) -> list[Dirty]:
    """Each path once, with all that was told of it; a path that comes after what it lies in stays after it."""
    found: dict[tuple[int, bytes], Dirty] = {}
    for item in (*own, *later):
        known = found.get((item.root, item.path))
        if known is not None:
            item = replace(known, kind=known.kind | item.kind, inodes=known.inodes | item.inodes)
        found[item.root, item.path] = item
    return sorted(found.values(), key=lambda item: (item.path.count(b"/"), item.path != b"", item.mark_no))
