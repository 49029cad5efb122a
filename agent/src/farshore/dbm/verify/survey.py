"""Going over a tree for the digests of its directories, from the bottom up.

What the tree is, a listing tells: ``Disk`` lists what lies on disk; the source compares that with the index
(``dbm.verify.origin``). Later questions for the digests in one directory list it anew and take what lies below its
directories from the survey: that may be of another moment, and so a difference between two sides only says where to
look (see ``messages.Look``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from farshore.dbm.messages import Item
from farshore.dbm.owners import Owners
from farshore.dbm.verify import digests
from farshore.dbm.verify.reading import ContentReader, Store
from farshore.errors import UnsafePath
from farshore.fmm import scanner
from farshore.fmm.limits import Boundaries, lasting_excess
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Observed, Root
from farshore.log import Log

_log = Log(__name__)


class Listing(Protocol):
    """Tells what lies directly in a directory."""

    def names(self, root: int, path: bytes, bucket: int) -> dict[bytes, tuple[bytes, bool]]:
        """By name, the own digest and whether it is a directory; with ``bucket`` above -1, only what belongs there."""


@dataclass(slots=True)
class _Level:
    path: bytes
    items: dict[bytes, Item]
    #: Directories that were not gone over yet; the last is next.
    pending: list[bytes] = field(default_factory=list)


class Surveyor:
    """Goes over ``roots`` trees that ``listing`` tells of, and keeps what it finds in ``store``. For one thread.

    ``unknown`` stands for the digest of what was not gone over.
    """

    def __init__(self, listing: Listing, roots: int, store: Store, unknown: bytes, check: Callable[[], None]) -> None:
        self._listing = listing
        self._roots = roots
        self._unknown = unknown
        self._store = store
        self._check = check
        self._listed: tuple[int, bytes] | None = None
        self._items: list[Item] = []
        #: Names that were seen so far.
        self.paths = 0

    def survey(self) -> list[bytes]:
        """The digests of all below each root; raises what ``check`` raises."""
        return [self._subtree(root) for root in range(self._roots)]

    def items(self, root: int, path: bytes, bucket: int = -1) -> list[Item]:
        """What lies in a directory now, with what the survey found below its directories."""
        if self._listed == (root, path):
            return [each for each in self._items if bucket < 0 or digests.bucket_of(each.name) == bucket]
        found = []
        for name, (own, is_directory) in self._listing.names(root, path, bucket).items():
            below = None
            if is_directory:
                below = self._store.below(root, join(path, name)) or self._unknown
            found.append(Item(name, own, below))
        if bucket < 0 and len(found) > digests.FEW_NAMES:
            # Questions for its buckets follow.
            self._listed, self._items = (root, path), found
        return found

    def _subtree(self, root: int) -> bytes:
        # No recursion: a tree may be deeper than Python's stack.
        levels = [self._level(root, b"")]
        while True:
            self._check()
            level = levels[-1]
            if level.pending:
                levels.append(self._level(root, join(level.path, level.pending.pop())))
                continue
            digest = digests.directory_digest(level.items.values())
            self._store.set_below(root, level.path, digest)
            levels.pop()
            if not levels:
                return digest
            name = level.path.rpartition(b"/")[2]
            item = levels[-1].items[name]
            levels[-1].items[name] = Item(name, item.own, digest)

    def _level(self, root: int, path: bytes) -> _Level:
        items, pending = {}, []
        for name, (own, is_directory) in self._listing.names(root, path, -1).items():
            items[name] = Item(name, own, self._unknown if is_directory else None)
            if is_directory:
                pending.append(name)
        self.paths += len(items)
        pending.sort(reverse=True)
        return _Level(path, items, pending)


class Disk:
    """Lists what lies on disk below ``roots``; with ``contents``, files are read for it. Limits leave files alone.

    ``owners``: they go by name.
    """

    def __init__(self, roots: list[Root], reader: ContentReader, contents: bool, owners: Owners | None = None) -> None:
        self._owners = owners
        self._roots = roots
        self._filters = [Filter(root) for root in roots]
        self._boundaries = Boundaries(roots)
        self._reader = reader
        self._contents = contents

    def names(self, root: int, path: bytes, bucket: int) -> dict[bytes, tuple[bytes, bool]]:
        """See Listing."""
        found = {}
        now_ns = time.time_ns()
        for seen in self.observe(root, path):
            if seen.kind is FileKind.FILE and lasting_excess(self._roots[root], seen.size, seen.mtime_ns, now_ns):
                continue
            name = seen.path.rpartition(b"/")[2]
            if bucket < 0 or digests.bucket_of(name) == bucket:
                content = self.content(seen)
                own = digests.UNKNOWN_THERE if content == b"" else digests.of_observed(seen, content, self._owners)
                found[name] = own, seen.kind is FileKind.DIRECTORY
        return found

    def observe(self, root: int, path: bytes) -> list[Observed]:
        """What lies in a directory, without what is never replicated, or is on a filesystem that is left alone."""
        found: list[Observed] = []
        self._boundaries.forget()
        if self._boundaries.mount_of(root, path) is not None:
            return found
        for seen in scanner.observe_directory(self._roots[root].path, root, path, self._filters[root], _unreadable):
            self._reader.breathe()
            if seen.kind is not FileKind.SOCKET:
                found.append(seen)
        return found

    def content(self, seen: Observed) -> bytes | None:
        """The digest of a file's content, b"" when it is not known; None when contents are not compared."""
        if not self._contents or seen.kind is not FileKind.FILE:
            return None
        try:
            return self._reader.digest(seen) or b""
        except OSError as error:
            _unreadable(seen.path, error)
        except UnsafePath:
            pass  # Longer than any that is replicated.
        return b""


def _unreadable(path: bytes, error: OSError) -> None:
    """Whoever looks closer will be told that it is not known."""
    _log.debug("cannot be verified", path=os.fsdecode(path), reason=error.strerror or error)


def join(path: bytes, name: bytes) -> bytes:
    """The path of a name in a directory; b"" is the root."""
    return path + b"/" + name if path else name
