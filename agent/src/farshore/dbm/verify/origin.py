"""The source's side of a verification: what the index says, and whether the disk here still says so."""

from __future__ import annotations

import time

from farshore.dbm.index import IndexView, Known
from farshore.dbm.messages import Entry
from farshore.dbm.owners import Owners
from farshore.dbm.planner import MAX_PATH
from farshore.dbm.replica.paths import PREFIX
from farshore.dbm.verify import digests, judge
from farshore.dbm.verify.reading import ContentReader
from farshore.dbm.verify.survey import Disk, join
from farshore.fmm import limits, scanner
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Observed, Root

#: Paths to look at closely that are remembered, at most; the rest is left for the next verification.
MOST_SUSPECTS = 100_000
#: What has just become old enough is sent a moment later.
_SLACK_NS = 10 * 10**9


class Origin:
    """Lists what the index says of the replica (see ``survey.Listing``).

    While ``comparing``, it looks at the disk too; what is not as the index says becomes one of ``suspects``, which is
    no more than a reason to look closely. ``owners``: they go by name. For one thread.
    """

    def __init__(
        self, view: IndexView, roots: list[Root], reader: ContentReader, contents: bool, owners: Owners | None = None
    ) -> None:
        self._view = view
        self._owners = owners
        self._roots = roots
        self._filters = [Filter(root) for root in roots]
        self._boundaries = limits.Boundaries(roots)
        self._disk = Disk(roots, reader, contents)
        self._reader = reader
        self._contents = contents
        self.comparing = True
        self.suspects: set[tuple[int, bytes]] = set()
        #: True when there were more.
        self.too_many = False

    def names(self, root: int, path: bytes, bucket: int) -> dict[bytes, tuple[bytes, bool]]:
        """See ``survey.Listing``."""
        known = self._known(root, path)
        contents = self._compared(root, path, known) if self.comparing else {}
        found = {}
        for name, each in known.items():
            if bucket < 0 or digests.bucket_of(name) == bucket:
                found[name] = self._own(each, contents.get(name)), each.kind is FileKind.DIRECTORY
        return found

    def look(self, root: int, path: bytes) -> tuple[Observed | None, bytes | None] | None:
        """What is here at ``path``, and the digest of its content: None when it is no file, or not to be read now.

        None at all when not even what is there can be told.
        """
        try:
            seen = scanner.observe(self._roots[root].path, root, path)
        except OSError:
            return None
        if seen is None or seen.kind is FileKind.SOCKET:
            return None, None
        if seen.kind is not FileKind.FILE:
            return seen, None
        try:
            return seen, self._reader.digest(seen)
        except OSError:
            return seen, None

    def leaves_alone(self, root: int, path: bytes, kept: bool | None, there: Entry | None) -> bool:
        """Whether the limits leave alone what is here at ``path``, or what is ``there`` on the replica.

        ``kept``: the index's entry says that the replica keeps what it has when nothing is here; None if it says that
        it is not even overwritten.
        """
        limit = self._roots[root]
        if not limits.is_limited(limit):
            return False
        self._boundaries.forget()
        if self._boundaries.mount_of(root, path.rpartition(b"/")[0]) is not None:
            return True
        if self._boundaries.mount_of(root, path) is not None:
            # Nobody tells when what is in it, and with that its time, changes.
            return there is not None and there.kind == int(FileKind.DIRECTORY)
        try:
            seen = scanner.observe(limit.path, root, path)
        except OSError:
            return False
        if seen is None:
            return kept is not False or (
                there is not None
                and there.kind == int(FileKind.FILE)
                and limits.lasting_excess(limit, there.size, there.meta.mtime_ns, time.time_ns()) is not None
            )
        if kept and seen.kind is not FileKind.DIRECTORY and there is not None and there.kind == int(FileKind.DIRECTORY):
            return True
        return seen.kind is FileKind.FILE and (kept is None or self._is_beyond(seen))

    def _is_beyond(self, seen: Observed) -> bool:
        limit, now_ns = self._roots[seen.root], time.time_ns()
        return limits.excess(limit, seen.size, seen.mtime_ns, now_ns, _SLACK_NS) is not None

    def suspect(self, root: int, path: bytes) -> None:
        """Have a path looked at closely, unless it is too long for a replica, as the planner tells anyway.

        Nor what lies on a filesystem that is left alone.
        """
        if len(path) > MAX_PATH or self._boundaries.mount_of(root, path.rpartition(b"/")[0]) is not None:
            return
        if len(self.suspects) < MOST_SUSPECTS:
            self.suspects.add((root, path))
        else:
            self.too_many = True

    def _known(self, root: int, path: bytes) -> dict[bytes, Known]:
        known: dict[bytes, Known] = {}
        self._boundaries.forget()
        if self._boundaries.mount_of(root, path) is not None:
            return known
        now_ns = time.time_ns()
        for each in self._view.children(root, path):
            if each.kind is FileKind.FILE and limits.lasting_excess(
                self._roots[root], each.size, each.mtime_ns, now_ns
            ):
                continue
            name = each.path.rpartition(b"/")[2]
            if not name.startswith(PREFIX) and self._filters[root].allows(each.path, each.kind is FileKind.DIRECTORY):
                known[name] = each
        return known

    def _compared(self, root: int, path: bytes, known: dict[bytes, Known]) -> dict[bytes, bytes]:
        """Compare a directory here with the index; returns the digests of contents that the index does not know."""
        unknown: dict[bytes, bytes] = {}
        missing = set(known)
        for seen in self._disk.observe(root, path):
            name = seen.path.rpartition(b"/")[2]
            each = known.get(name)
            missing.discard(name)
            if seen.kind is FileKind.FILE and self._is_beyond(seen):
                continue
            if each is None or judge.source_differs(each, seen):
                self.suspect(root, seen.path)
                continue
            content = self._disk.content(seen)
            if content is None:
                continue
            if each.digest is None and content:
                unknown[name] = content
            elif content != each.digest:
                self.suspect(root, seen.path)
        for name in missing:
            self.suspect(root, join(path, name))
        return unknown

    def _own(self, known: Known, content: bytes | None) -> bytes:
        if judge.in_doubt(known):
            return digests.UNKNOWN_HERE
        if not self._contents or known.kind is not FileKind.FILE:
            return digests.of_known(known, None, self._owners)
        if known.digest is None and content is None:
            seen, content = self.look(known.root, known.path) or (None, None)
            if seen is None or judge.source_differs(known, seen):
                content = None
        content = known.digest or content
        return digests.UNKNOWN_HERE if content is None else digests.of_known(known, content, self._owners)
