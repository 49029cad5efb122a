"""Descending, by the digests of directories, to where the replica is not what the index says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from farshore.dbm.messages import Item
from farshore.dbm.verify import digests
from farshore.dbm.verify.asking import AT_ONCE, Asking
from farshore.dbm.verify.survey import join

Path = tuple[int, bytes]
#: Lists what this side says of a directory: see ``Surveyor.items``.
ItemsOf = Callable[[int, bytes], Awaitable[list[Item]]]


@dataclass(slots=True)
class Differing:
    """Names in a directory that differ themselves, and directories below which something does."""

    names: list[bytes] = field(default_factory=list)
    below: list[bytes] = field(default_factory=list)

    def add(self, ours: list[Item], theirs: list[Item]) -> None:
        """Compare two lists of the same directory, or of the same bucket of it.

        What lies in a directory that only one side has is no difference of its own.
        """
        here, there = ({item.name: item for item in items} for items in (ours, theirs))
        for name in here.keys() | there.keys():
            mine, other = here.get(name), there.get(name)
            if mine is None or other is None or mine.own != other.own:
                self.names.append(name)
            if mine is not None and other is not None and mine.below and other.below and mine.below != other.below:
                self.below.append(name)


async def descend(
    asking: Asking, ours: list[bytes], theirs: list[bytes], items_of: ItemsOf, suspect: Callable[[int, bytes], None]
) -> None:
    """Call ``suspect`` for all paths that differ, beginning with the digests of all below each root here and there."""
    todo = [(root, b"") for root in range(len(ours)) if ours[root] != theirs[root]]
    while todo:
        some, todo = todo[:AT_ONCE], todo[AT_ONCE:]
        found = await asyncio.gather(*(_directory(asking, items_of, *each) for each in some))
        for (root, path), differing in zip(some, found, strict=True):
            for name in differing.names:
                suspect(root, join(path, name))
            todo += [(root, join(path, name)) for name in differing.below]


async def _directory(asking: Asking, items_of: ItemsOf, root: int, path: bytes) -> Differing:
    in_buckets, theirs = await asking.digests(root, path)
    ours = await items_of(root, path)
    found = Differing()
    if not in_buckets:
        found.add(ours, theirs)
        return found
    here: dict[bytes, list[Item]] = {}
    for item in ours:
        here.setdefault(bytes([digests.bucket_of(item.name)]), []).append(item)
    there = {bucket.name: bucket.own for bucket in theirs}
    for bucket in sorted(here.keys() | there.keys()):
        mine = here.get(bucket, [])
        if there.get(bucket) != digests.directory_digest(mine):
            _, held = await asking.digests(root, path, bucket[0]) if bucket in there else (False, [])
            found.add(mine, held)
    return found
