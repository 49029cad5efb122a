"""From dirty paths to operations: the state of a path now, against what the index says the replica has.

Hints only say where to look. What is sent follows from the difference between disk and index alone, so a hint
that is lost, doubled or out of order costs time and never correctness. Runs in the source's worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import blake3
from msgspec.structs import replace

from farshore.dbm import wire
from farshore.dbm.census import Census
from farshore.dbm.index import RULES, Index, Known, clamp_time, parent_of
from farshore.dbm.messages import (
    INLINE_MAX,
    Begin,
    Commit,
    Copy,
    Drop,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Meta,
    Move,
    Operation,
    Patch,
    Put,
    Remove,
    SetMeta,
)
from farshore.dbm.owners import Leaving
from farshore.dbm.replica import paths
from farshore.dbm.unkept import shown, summary
from farshore.dbm.work import Batch, Content, Depth, Job, Work
from farshore.errors import UnsafePath
from farshore.fmm import limits, scanner
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Hint, Inode, Kind, Observed, Root
from farshore.fmm.view import Live, View
from farshore.log import Log

_log = Log(__name__)

#: A transaction is closed after so many operations or bytes of content.
MAX_OPERATIONS = 1000
MAX_BYTES = 4 << 20
#: It is closed after so much time of looking, too: what changes now must not wait for the end of a long walk.
LOOK_SECONDS = 0.25
#: The longest path that a replica takes.
MAX_PATH = 4096
#: Two changes within one tick of the kernel's clock leave equal times (10 ms at HZ=100): who changed so shortly
#: before being read may change again unseen by lstat, as in git's "racy" index entries.
_RACY_NS = 20_000_000
#: The kind of what may be there, or not: sockets are never on a replica.
_UNKNOWN = FileKind.SOCKET
#: Extended attributes beyond this would not fit into a frame together with the rest of a message.
_MAX_XATTRS = wire.MAX_FRAME - INLINE_MAX - 4 * MAX_PATH
_XATTR_OVERHEAD = 16
_INT64 = 1 << 63
#: Reasons for which something is not replicated that are told apart, at most.
_MOST_REASONS = 100
#: What of a path may be readable later, though nothing tells of it; so many paths are tried at one go.
_UNREAD = frozenset({"state", "content", "entries"})
_MOST_UNREAD = 1000
#: Seconds in which the log is told of one reason once.
_LOG_SECONDS = 3600.0
_REMEDIES = {
    errno.EACCES: "let the agent read it (CAP_DAC_READ_SEARCH)",
    errno.EPERM: "let the agent read it (CAP_DAC_READ_SEARCH)",
    errno.EIO: "the disk may be failing: see the kernel's log, and restore the file from the other server's copy",
    errno.ESTALE: "the network filesystem that it lies on has lost it: mount that anew",
}
#: What may have several names, besides files.
_LINKED = (FileKind.SYMLINK, FileKind.FIFO)
_NO_INODE = (-1, 0, 0)
_FAR_AWAY = "its time is before 1677 or after 2262, and is sent as the nearest of these"
#: As a number: flags are slow to combine.
_CONTENT = (Kind.MODIFIED | Kind.CREATED | Kind.MOVED_TO).value
#: Nobody said that it changed: it is in a directory that is listed, whose subdirectories are not.
_LISTED = Kind(0)
#: From so many known paths on, a part of the tree is compared by directories.
_MANY_PATHS = 2000


class _Unobservable(Exception):
    """An error hides whether a path exists. It is noted as a problem; whoever wanted to know gives the path up."""


@dataclass
class Planned:
    """A transaction to send. ``frames`` is empty when there is nothing to tell; ``loose`` frames belong to none.

    ``changed`` names the paths that it changes on the replica; with ``drastic``, a directory is moved, removed or
    replaced, so that what is below it changes too. ``uploads``: numbers of those that it puts into place or ends.
    ``ended``: works of which nothing is left to do. ``more``: the next transaction belongs to the same state;
    ``placed``: where something is put, when a snapshot is read. ``made_ns``: the wall clock.
    """

    seq: int
    frames: list[bytes] = field(default_factory=list)
    loose: list[bytes] = field(default_factory=list)
    operations: int = 0
    content: int = 0
    changed: set[tuple[int, bytes]] = field(default_factory=set)
    drastic: bool = False
    uploads: list[int] = field(default_factory=list)
    ended: list[Work] = field(default_factory=list)
    more: bool = False
    placed: set[tuple[int, bytes]] = field(default_factory=set)
    made_ns: int = field(default_factory=time.time_ns)


class Planner:
    """Plans the transactions of one group of ``epoch``.

    The index is ahead of the replica: it tells what the replica will have when all that was planned has come through.
    ``again`` holds hints for what changed while it was read, ``new_jobs`` large files that are to be read,
    ``new_census`` parts of the tree that are to be compared by directories. ``missed`` is what is not where it was, and
    may have been moved: it is to be given to ``look_for_missed`` when all that changed before was looked at. Only for
    whoever is ``assisted`` there is any of these two.
    """

    def __init__(
        self,
        index: Index,
        roots: list[Root],
        epoch: int,
        assisted: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._index = index
        self._assisted = assisted
        self._clock = clock
        self._roots = roots
        self._epoch = epoch
        self._filters = [Filter(root) for root in roots]
        self._rules = repr(roots).encode()
        self._rules_applied = index.get_fact(RULES) == self._rules
        self._limited = [limits.is_limited(root) for root in roots]
        self._boundaries = limits.Boundaries(roots)
        #: What is looked at again when it is old enough to be sent, and what the limits leave alone.
        self.young = limits.Young(roots)
        self.left_alone = limits.LeftAlone()
        #: Where the roots are read: live, or in the snapshot that is being sent.
        self.view: View = Live(roots)
        # What a state that is not complete yet puts at paths of the replica, where its tree has something else.
        self._unsettled: set[tuple[int, bytes]] = set()
        self._jobs: dict[tuple[int, bytes], Job] = {}
        # Where the replica has an earlier content of the file that is looked at, if that is another path; and by such
        # paths, the jobs whose deltas refer to them.
        self._base: bytes | None = None
        self._held: dict[tuple[int, bytes], Job] = {}
        self._plan = Planned(0)
        self._touched: set[tuple[int, bytes]] = set()
        # Directories that the replica surely has, as nothing was moved or removed since that was looked up.
        self._made: set[tuple[int, bytes]] = set()
        # The inode that is looked at, if the index knew no path of it.
        self._lonely = _NO_INODE
        # By root and inode, a name that the file had when another name of it was lost: the last one only.
        self._kept_name: dict[tuple[int, Inode], tuple[bytes]] = {}
        # By root, the last inode of which no name that the index knows was left, since the transaction began.
        self._nameless: tuple[int, Inode] | None = None
        self._content_sent = False
        # Files that failed in the middle of their content, with their ctime and size then.
        self._unreadable: dict[tuple[int, bytes], tuple[int, int]] = {}
        self.again: list[Hint] = []
        self.new_jobs: list[Job] = []
        self.new_census: list[Census] = []
        self.missed: list[tuple[int, bytes, Work]] = []
        #: Roots that are missing, or look as if they were not mounted: what is protected cannot be told from them.
        self.absent_roots: set[int] = set()
        #: Paths that were looked at so far.
        self.looked_at = 0
        #: Whom owners' numbers stand for is told where they go by name.
        self.owners = Leaving(None)
        #: What could not be read or told, by root, path and what of it ("root", "state", ...), with the reason.
        self.problems: dict[tuple[int, bytes, str], str] = {}
        # When the log was told of a reason; seldom, as there may be a million paths.
        self._logged: dict[str, float] = {}

    def transaction(self, batch: Batch, seq: int, more: Callable[[Planned], bool] | None = None) -> Planned:
        """Do a part of what is left of ``batch``: the next transaction, number ``seq``.

        Bounded in operations, bytes and time; a batch that is not finished is given in again. ``more`` tells of a plan
        whether what follows belongs to the same state.
        """
        plan = self._plan = Planned(seq)
        self._touched.clear()
        self._made.clear()
        self._nameless = None
        until = time.monotonic() + LOOK_SECONDS
        try:
            while not (batch.finished or plan.operations >= MAX_OPERATIONS or plan.content >= MAX_BYTES):
                work = self._step(batch)
                work.left -= 1
                if not work.left:
                    plan.ended.append(work)
                if time.monotonic() >= until:
                    break
            self._set_directories()
            plan.loose.extend(wire.frame(names) for names in self.owners.told())
        finally:
            # A later batch must see what came since.
            self.view.forget()
            self._boundaries.forget()
        if plan.frames:
            plan.more = more is not None and more(plan)
            self._close(plan)
        return plan

    def end_of_state(self, seq: int) -> Planned:
        """A transaction that changes nothing, and completes the state that those before it belong to."""
        plan = Planned(seq)
        self._close(plan)
        return plan

    def _close(self, plan: Planned) -> None:
        plan.frames.insert(0, wire.frame(Begin(self._epoch, plan.seq)))
        plan.frames.append(wire.frame(Commit(plan.seq, plan.more)))
        if plan.more:
            self._unsettled |= plan.placed
        else:
            self._unsettled.clear()

    def is_settled(self, root: int, path: bytes) -> bool:
        """True when the replica's tree has at ``path`` what the index says, or will have it before what comes next.

        Not so within a state that is not complete: what the replica keeps of it is in no place yet.
        """
        while self._unsettled:
            if (root, path) in self._unsettled:
                return False
            if not path:
                break
            path = path.rpartition(b"/")[0]
        return True

    def deliver(self, job: Job) -> Batch:
        """The batch that tells of a file that was read, and looks once more for all who waited for it."""
        batch = Batch(list(job.works))
        for work in reversed(job.works):
            # The first of them takes up what was read; the others need it only if it has changed since.
            batch.look(job.root, job.path, Kind.RESCAN if work is not job.works[0] else Kind.MODIFIED, work)
            work.left -= 1  # that it waited for the job
        self._held.pop((job.root, job.base), None)
        for work in job.base_works:
            batch.vanish(job.root, job.base, work)
            work.left -= 1
        return batch

    def forget_jobs(self) -> None:
        """No file is being read any more."""
        self._jobs.clear()
        self._held.clear()
        self.new_jobs.clear()
        self.new_census.clear()
        self.missed.clear()

    def take_up(self, census: Census) -> Batch:
        """The batch that looks at what a census has found."""
        work = census.work
        batch = Batch([work])
        if census.differing is None:
            batch.walk(census.root, census.path, work, Depth.THOROUGH)
        else:
            unknown = set(census.unknown)
            for path in reversed(census.differing):
                batch.walk(census.root, path, work, Depth.THOROUGH if path in unknown else Depth.SHALLOW)
            batch.look(census.root, census.path, _LISTED, work)
        work.left -= 1  # that it waited for the census
        return batch

    def look_for_missed(self, missed: list[tuple[int, bytes, Work]]) -> Batch:
        """The batch that removes what was missed, and has not turned up under another name."""
        batch = Batch([work for _, _, work in missed])
        for root, path, work in missed:
            batch.vanish(root, path, work, surely=True)
            work.left -= 1
        return batch

    def _step(self, batch: Batch) -> Work:
        if batch.todo:
            root, path, kind, work = batch.todo.pop()
            with contextlib.suppress(_Unobservable):
                self._look(batch, root, path, kind, work)
            if self._jobs:
                self._drop_unused(root, path)
        elif batch.walks:
            root, path, work, depth = batch.walks.pop()
            self._list(batch, root, path, work, depth)
        else:
            root, path, work, surely = batch.vanished.pop()
            with contextlib.suppress(_Unobservable):
                self._gone(batch, root, path, work, surely)
        return work

    def _drop_unused(self, root: int, path: bytes) -> None:
        """What was read of a file is of no use when the file has become something else meanwhile."""
        job = self._jobs.get((root, path))
        if job is not None and (job.content is not None or job.problem is not None):
            del self._jobs[root, path]
            self._drop(job)

    def _drop(self, job: Job) -> None:
        if job.number:
            self._plan.loose.append(wire.frame(Drop(job.number)))
            self._plan.uploads.append(job.number)

    def doubt(self, paths: Iterable[tuple[int, bytes]]) -> list[Hint]:
        """Of what the replica has at ``paths`` nothing is certain any more, not even that it has nothing there.

        Returns the hints that have them looked at. Belongs to the index's open transaction.
        """
        hints = []
        inodes = set()
        # Parents first: with the entry of what is no directory, all below it goes.
        for root, path in sorted(paths):
            known = self._index.get(root, path)
            if known is not None and known.kind is FileKind.DIRECTORY:
                # It is there, as only a drastic transaction would have changed that.
                self._index.put(_in_doubt(known))
                hints.append(Hint(root, path, Kind.ATTRIBUTES))
                continue
            if known is not None and (root, known.dev, known.ino) not in inodes:
                inodes.add((root, known.dev, known.ino))
                # If it is gone, what was written through it shows under other names only.
                hints += [Hint(other.root, other.path, Kind.MODIFIED) for other in self._names_besides(known)]
            if known is None or known.kind is not _UNKNOWN:
                # Below what was in doubt already, the replica may have what was, too: two connections ended in a row.
                self._index.remove(root, path)
            self._index.put(_unknown(root, path))
            hints.append(Hint(root, path, Kind.RESCAN | Kind.MODIFIED))
        return hints

    # --- where to look

    def _where(self, root: int, path: bytes) -> bytes:
        base = self._roots[root].path
        return base + b"/" + path if path else base

    def _note(self, root: int, path: bytes, what: str, why: str | None) -> None:
        """``why`` keeps ``what`` of the path from being replicated; None when nothing does any more."""
        if why is not None:
            self.problems[root, path, what] = why
            now = time.monotonic()
            if what in _UNREAD and now - self._logged.get(why, -math.inf) >= _LOG_SECONDS:
                self._logged[why] = now
                _log.warning("cannot be read; tried again now and then", path=self._where(root, path), reason=why)
        elif self.problems:
            self.problems.pop((root, path, what), None)

    def unread(self) -> list[Hint]:
        """What could not be read, to be tried again, as nobody tells when a disk or a permission is mended.

        Not large files that failed in the middle: each attempt would send what comes before once more. Any thread may
        ask.
        """
        found = [key for key in list(self.problems) if key[2] in _UNREAD and not self._is_costly(*key)]
        if len(found) > _MOST_UNREAD:
            found = random.sample(found, _MOST_UNREAD)
        return [Hint(root, path, Kind.RESCAN if what == "entries" else Kind.MODIFIED) for root, path, what in found]

    def _is_costly(self, root: int, path: bytes, what: str) -> bool:
        return what == "content" and self._unreadable.get((root, path), (0, 0))[1] > INLINE_MAX

    def summaries(self) -> list[str]:
        """The problems, by reason: how many paths there are, and one of them. Any thread may ask."""
        by_reason: dict[str, list[tuple[int, bytes]]] = {}
        for (root, path, _), why in list(self.problems.items()):
            by_reason.setdefault(why, []).append((root, path))
        lines = [summary(why, len(where), self._where(*where[0])) for why, where in by_reason.items()]
        for why, count, example, more in self.left_alone.counts():
            lines.append(summary(why, count, b"" if example is None else self._where(*example), more=more))
        if len(lines) > _MOST_REASONS:
            lines[_MOST_REASONS:] = [f"{len(lines) - _MOST_REASONS} more problems of other kinds"]
        return lines

    def why_absent(self, root: int) -> str:
        """Why a root that is missing is no such."""
        why = self.problems.get((root, b"", "root"), "the protected path is missing")
        return f"{shown(self._where(root, b''))}: {why}"

    def _forget_of_others(self, root: int, path: bytes, mode: int) -> None:
        """What could not be read at ``path`` was of another kind than what is there now."""
        if not stat.S_ISDIR(mode):
            self._note(root, path, "entries", None)
        if not stat.S_ISREG(mode):
            self._note(root, path, "content", None)

    def _forget_problems(self, root: int, path: bytes) -> None:
        """Nothing is at ``path``, so nothing is wrong there or below."""
        for key in [k for k in self.problems if k[0] == root and (k[1] == path or k[1].startswith(path + b"/"))]:
            del self.problems[key]
        if self._limited[root]:
            self.left_alone.forget_below(root, path)

    def _lstat(self, root: int, path: bytes) -> os.stat_result | None:
        """What lstat tells of a path below a root, None when nothing is there.

        Raises _Unobservable when neither can be found out.
        """
        try:
            status = self.view.look(root, path)
        except OSError as error:
            self._note(root, path, "state", _reason(error))
            raise _Unobservable from error
        self._note(root, path, "state", None)
        return status

    def _observe(self, root: int, path: bytes) -> Observed | None:
        """The state of a path as it can be told to the replica, None when nothing is there.

        Raises _Unobservable when neither can be found out.
        """
        try:
            seen = self.view.observe(root, path)
        except OSError as error:
            self._note(root, path, "state", _reason(error))
            if not path:
                self._absent(root, _reason(error))
            raise _Unobservable from error
        self._note(root, path, "state", None)
        return None if seen is None else self._tellable(seen)

    def _tellable(self, seen: Observed) -> Observed:
        """What was seen, within what a message can hold."""
        kept = _fitting(seen.xattrs)
        why = None
        if seen.unlisted:
            why = "it has more extended attributes than the system can list"
        elif len(kept) < len(seen.xattrs):
            why = "its extended attributes are too large to be all replicated"
            seen = replace(seen, xattrs=kept)
        self._note(seen.root, seen.path, "xattrs", why)
        times = seen.atime_ns, seen.mtime_ns, seen.ctime_ns
        if min(times) < -_INT64 or max(times) >= _INT64:
            atime, mtime, ctime = map(clamp_time, times)
            self._note(seen.root, seen.path, "times", None if mtime == seen.mtime_ns else _FAR_AWAY)
            seen = replace(seen, atime_ns=atime, mtime_ns=mtime, ctime_ns=ctime)
        elif self.problems:
            self._note(seen.root, seen.path, "times", None)
        return seen

    def _is_inode(self, root: int, path: bytes, dev: int, ino: int) -> bool:
        """True when just this inode is at ``path`` now; False also when that cannot be found out."""
        try:
            status = self._lstat(root, path) if path else None
        except _Unobservable:
            return False
        return status is not None and (status.st_dev, status.st_ino) == (dev, ino)

    def _list(self, batch: Batch, root: int, path: bytes, work: Work, depth: Depth) -> None:
        """Look at everything in one directory, and at what should be there and is not."""
        if self._boundaries.mount_of(root, path) is not None:
            for child in self._index.children(root, path):
                self._index.remove(root, child)
            return
        # One that could not be listed is not compared by its sums, which would not tell that it can be now.
        if depth is Depth.DEEP and (root, path, "entries") not in self.problems and self._is_large(root, path):
            work.left += 1
            key, sums = self._index.sums(root, path)
            filter = self._filters[root]
            self.new_census.append(Census(root, self._roots[root].path, path, filter, key, sums, work))
            return
        try:
            names = [name for name, _ in self.view.names(root, path, self._filters[root])]
        except (FileNotFoundError, NotADirectoryError):
            batch.vanish(root, path, work)
            return
        except OSError as error:
            self._note(root, path, "entries", _reason(error))
            return
        self._note(root, path, "entries", None)
        prefix = path + b"/" if path else b""
        there = {prefix + name for name in names}
        kind = _LISTED if depth is Depth.SHALLOW else Kind.RESCAN
        for child in sorted(there, reverse=True):
            batch.look(root, child, kind, work)
        for child in self._index.children(root, path):
            if child in there:
                continue
            known = self._index.get(root, child)
            if known and self._filters[root].allows(child, known.kind is FileKind.DIRECTORY):
                batch.vanish(root, child, work)
            else:
                self._index.remove(root, child)

    def _is_large(self, root: int, path: bytes) -> bool:
        """Whether so much is known below a directory that it is worth comparing it by directories.

        Not while the index may know what the rules leave alone by now: only who lists it forgets it.
        """
        if not self._assisted or self.view.still or not self._rules_applied:
            return False
        return self._index.has_below(root, path, _MANY_PATHS)

    def note_rules(self) -> None:
        """Everything was looked at by the roots' rules."""
        if not self._rules_applied:
            self._index.set_fact(RULES, self._rules)
            self._rules_applied = True

    def _look(self, batch: Batch, root: int, path: bytes, kind: Kind, work: Work) -> None:
        self.looked_at += 1
        if not self._can_name(root, path):
            return
        if not path:
            self._look_at_root(batch, root, kind, work)
            return
        status = self._lstat(root, path)
        if self._limited[root] and (status is None or not stat.S_ISREG(status.st_mode)):
            self.young.forget(root, path)
        if status is None:
            batch.vanish(root, path, work)
            return
        self._look_behind(batch, root, path, status, work)
        is_directory = stat.S_ISDIR(status.st_mode)
        if self.problems:
            self._forget_of_others(root, path, status.st_mode)
        known = self._index.get(root, path)
        if not self._filters[root].allows(path, is_directory):
            if known is not None and self._filters[root].allows(path, known.kind is FileKind.DIRECTORY):
                # What was protected is gone; something that is not took its place.
                self._remove(batch, known, work)
            return
        force = kind.value & _CONTENT != 0
        if self._limited[root] and self._leave_alone(batch, root, path, status, known, force, work):
            return
        # Of a file, lstat tells all; of others it is believed only where nobody said that they changed.
        believed = not force if stat.S_ISREG(status.st_mode) else kind is Kind.RESCAN or kind is _LISTED
        if not (believed and known is not None and known.is_unchanged(status)):
            self._sync(batch, status, root, path, known, force, work)
        if is_directory and Kind.RESCAN in kind:
            batch.walk(root, path, work)

    def _look_at_root(self, batch: Batch, root: int, kind: Kind, work: Work) -> None:
        seen = self._observe(root, b"")
        if seen is None:
            batch.vanish(root, b"", work)
            return
        if not self._has_root(root):
            return
        self._present(seen)
        self._look_behind(batch, root, b"", None, work)
        known = self._index.get(root, b"")
        if Kind.RESCAN in kind:
            self.left_alone.forget_more()
        if seen.kind is FileKind.FILE:
            unchanged = known is not None and known.same_identity(seen)
            if self._limited[root] and self._is_beyond(root, b"", seen.size, seen.mtime_ns, seen.ctime_ns, unchanged):
                return
            # A root that is a single file has no directory of ours to be looked up in.
            self._sync_single_file(batch, seen, known, kind.value & _CONTENT != 0, work)
        else:
            self._sync_other(batch, seen, known, work)
        if Kind.RESCAN in kind and seen.kind is FileKind.DIRECTORY:
            batch.walk(root, b"", work)

    # --- limits

    def _leave_alone(
        self,
        batch: Batch,
        root: int,
        path: bytes,
        status: os.stat_result,
        known: Known | None,
        force: bool,
        work: Work,
    ) -> bool:
        """Whether what is at ``path`` is left alone, here and on the replica; does what is to be done all the same."""
        if self._boundaries.mount_of(root, parent_of(path) or b"") is not None:
            # Forgotten, as what is excluded: if the other filesystem goes, nothing that was on it is to be removed.
            self._index.remove(root, path)
            return True
        if stat.S_ISDIR(status.st_mode):
            mounted = self._boundaries.mount_of(root, path) is not None
            self.left_alone.note(root, path, limits.MOUNTED if mounted else None)
            return False
        if stat.S_ISREG(status.st_mode):
            unchanged = known is not None and not force and known.is_unchanged(status)
            if self._is_beyond(root, path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, unchanged):
                self._follow(batch, root, path, known, work)
                return True
            if known is not None and limits.keeps_listed(self._roots[root], known.size, made_here=known.ino != 0):
                self.left_alone.note(root, path, limits.OVER)
                return True
        if known is not None and known.kind is FileKind.DIRECTORY and self.keeps(known):
            self.left_alone.note(root, path, limits.HOLDS)
            self._vanish_below(batch, known, work)
            return True
        self.left_alone.note(root, path, None)
        return False

    def _is_beyond(self, root: int, path: bytes, size: int, mtime_ns: int, ctime_ns: int, unchanged: bool) -> bool:
        """Whether a regular file is left alone; if it is too young, it is looked at again when it is old enough.

        ``unchanged``: the replica has it as it is.
        """
        limit, now_ns = self._roots[root], self._clock()
        found = limits.excess(limit, size, mtime_ns, now_ns)
        if found is not None and found.limit == "min_age":
            now, why = time.monotonic(), None
            seconds = limits.seconds_to_wait(limit, mtime_ns, now_ns)
            waits = not unchanged and self.young.must_wait(root, path, (size, mtime_ns, ctime_ns), seconds, now)
            if waits and self.young.waits_long(root, path, now):
                why = limits.RESTLESS
            self.left_alone.note(root, path, why)
            return waits
        self.young.forget(root, path)
        # That a file becomes old while the replica has it as it is, is no news.
        told = found is not None and not (unchanged and found.limit == "max_age")
        self.left_alone.note(root, path, limits.not_protected(found.text) if found is not None and told else None)
        return found is not None

    def _follow(self, batch: Batch, root: int, path: bytes, known: Known | None, work: Work) -> None:
        """What the replica has of a file that is left alone goes where its name went."""
        if known is not None and known.kind is not _UNKNOWN:
            if known.kind is FileKind.DIRECTORY:
                self._vanish_below(batch, known, work)
            return
        seen = self._observe(root, path)
        if known is not None:
            if seen is not None and seen.kind is FileKind.FILE:
                # What it has there may be this very file: that is kept when it goes here, and follows when it moves.
                self._index.put(replace(_known(seen, None, 0), ctime_ns=0))
            return
        if seen is None or seen.kind is not FileKind.FILE:
            batch.vanish(root, path, work)
        elif self._index.by_inode(root, seen.dev, seen.ino) and self._parents(batch, root, path, work):
            self._moved(batch, seen, work, readable=False)

    def keeps(self, known: Known) -> bool:
        """Whether the replica keeps what it has, or some of what is below, when that is gone here."""
        if not self._limited[known.root]:
            return False
        root, now_ns = self._roots[known.root], self._clock()
        if known.kind is FileKind.FILE:
            return _copy_excess(root, known, now_ns) is not None
        if known.kind is not FileKind.DIRECTORY:
            return False
        if root.one_filesystem and known.rdev:
            return True
        below = self._index.exceeding_below(
            known.root, known.path, root.max_size or None, limits.oldest_ns(root, now_ns), root.one_filesystem
        )
        return any(each.kind is FileKind.DIRECTORY or _copy_excess(root, each, now_ns) is not None for each in below)

    def kept(self, known: Known) -> bool | None:
        """As ``keeps``; None for what is not even overwritten."""
        is_file = known.kind is FileKind.FILE
        if is_file and limits.keeps_listed(self._roots[known.root], known.size, made_here=known.ino != 0):
            return None
        return self.keeps(known)

    def _keep(self, batch: Batch, known: Known, work: Work) -> bool:
        """Whether something that is gone here is left alone on the replica; of a directory, what can go goes."""
        root = self._roots[known.root]
        if self._boundaries.mount_of(known.root, parent_of(known.path) or b"") is not None:
            self._index.remove(known.root, known.path)
            return True
        if not self.keeps(known):
            return False
        if known.kind is FileKind.DIRECTORY:
            self.left_alone.note(known.root, known.path, limits.KEPT_MOUNT if known.rdev else None)
            self._vanish_below(batch, known, work)
            self._index.put(_without_inode(known))
        elif (found := _copy_excess(root, known, self._clock())) is not None:
            self.left_alone.note(known.root, known.path, f"gone here; the replica's copy {found.text}, and is kept")
            self._index.put(_without_inode(known))
        return True

    def _vanish_below(self, batch: Batch, known: Known, work: Work) -> None:
        for child in self._index.children(known.root, known.path):
            batch.vanish(known.root, child, work)

    # --- roots

    def _can_name(self, root: int, path: bytes) -> bool:
        """False for what is too long for the replica: it is a problem, not to be sent."""
        try:
            paths.check(path)
        except UnsafePath:
            longest = max(map(len, path.split(b"/")))
            why = f"path is longer than {MAX_PATH} bytes" if len(path) > MAX_PATH else f"a name has {longest} bytes"
            self._note(root, path, "name", why)
            return False
        return True

    def _absent(self, root: int, why: str) -> None:
        self.absent_roots.add(root)
        self._note(root, b"", "root", why)

    def _present(self, seen: Observed) -> None:
        """A root is there; remember the filesystem that it is on while it is filled."""
        self.absent_roots.discard(seen.root)
        self._note(seen.root, b"", "root", None)
        if (
            seen.kind is FileKind.DIRECTORY
            and self._device(seen.root) != seen.dev
            and not self.view.is_empty(seen.root)
        ):
            self._index.set_fact(self._device_key(seen.root), str(seen.dev).encode())

    def _device_key(self, root: int) -> str:
        return f"dev:{self._roots[root].path.hex()}"

    def _device(self, root: int) -> int | None:
        """The filesystem that a root was on when it was last seen filled; None when it never was."""
        fact = self._index.get_fact(self._device_key(root))
        return None if fact is None else int(fact)

    def _looks_unmounted(self, seen: Observed) -> bool:
        """An empty directory where a filled one of another filesystem was is a fault, not a wish."""
        if seen.kind is not FileKind.DIRECTORY or self._device(seen.root) in (None, seen.dev):
            return False
        return self.view.is_empty(seen.root)

    def _has_root(self, root: int) -> bool:
        """False when the root itself is missing or unusable: that says nothing about what is wanted below it."""
        seen = self._observe(root, b"")
        if seen is None:
            self._absent(root, "the protected path is missing")
        elif seen.kind is FileKind.SYMLINK:
            self._absent(root, "a symbolic link that leads to no directory; protect what it leads to")
        elif self._looks_unmounted(seen):
            self._absent(root, "empty, and on another filesystem than before; is it not mounted?")
        else:
            return True
        return False

    def _gone(self, batch: Batch, root: int, path: bytes, work: Work, surely: bool) -> None:
        known = self._index.get(root, path)
        seen = self._observe(root, path)
        if seen is not None:
            batch.look(root, path, Kind.RESCAN, work)
        elif not path:
            # An unmounted or vanished root is a fault here, not a wish to empty the replica.
            self._absent(root, "the protected path is missing")
        elif (root, path) in self._held:
            # What the replica has there is needed until the upload is complete; then it is looked at once more.
            work.left += 1
            self._held[root, path].base_works.append(work)
        elif self._has_root(root):
            self._forget_problems(root, path)
            self._unreadable.pop((root, path), None)
            self._look_behind(batch, root, path, None, work)
            if known is not None and not surely and self._may_have_moved(known, work):
                work.left += 1
                self.missed.append((root, path, work))
            elif known is not None:
                self._remove(batch, known, work)

    def _may_have_moved(self, known: Known, work: Work) -> bool:
        """Whether it is worth waiting until all that changed before was looked at: it may stand somewhere else.

        Removed at once, much would have to be sent again.
        """
        if not self._assisted or self.view.still:
            return False
        if known.kind is FileKind.DIRECTORY:
            return self._index.has_below(known.root, known.path, 1)
        if known.kind is not FileKind.FILE or known.size <= INLINE_MAX:
            return False
        item = work.item
        was_deleted = Kind.DELETED in item.kind and Kind.MOVED_FROM not in item.kind
        return not (was_deleted and (item.root, item.path) == (known.root, known.path))

    def _remove(self, batch: Batch, known: Known, work: Work) -> None:
        if self._limited[known.root] and self._keep(batch, known, work):
            return
        self._look_at_other_names(batch, known, work)
        self._emit(Remove(known.root, known.path))
        self._index.remove(known.root, known.path)

    def _look_at_other_names(self, batch: Batch, lost: Known, work: Work) -> None:
        """A name is lost: what was written through it shows under the other names of the file, unannounced.

        One of them tells of all. If that is lost, too, before it was looked at, it leads to the next.
        """
        names = self._index.linked_below(lost.root, lost.path) if lost.kind is FileKind.DIRECTORY else [lost]
        asked: set[Inode] = set()
        inodes: set[Inode] = set()
        for name in names:
            inode = name.dev, name.ino
            if name.kind is not FileKind.FILE or name.nlink < 2 or not name.ino or inode in asked:
                continue
            asked.add(inode)
            if self._look_at_another_name(batch, inode, lost.root, lost.path, work):
                inodes.add(inode)
        # If the connection ends before that is done, the index does not tell any more what the name stood for.
        work.remember(inodes)

    def _look_at_another_name(self, batch: Batch, inode: Inode, root: int, lost: bytes, work: Work) -> bool:
        """Returns whether a file has names but ``lost`` of ``root`` and what is below, as far as the index knows.

        Names in other roots are files of their own on the replica: none of them tells of another.
        """
        found = [
            self._look_at_one_name(batch, number, inode, lost if number == root else None, work)
            for number in range(len(self._roots))
        ]
        return any(found)

    def _look_at_one_name(self, batch: Batch, root: int, inode: Inode, lost: bytes | None, work: Work) -> bool:
        """As ``_look_at_another_name``, in one root."""
        if (root, inode) == self._nameless:
            return True
        known = (other.path for other in self._index.each_by_inode(root, *inode))
        found = maybe = False
        for path in itertools.chain(self._kept_name.get((root, inode), ()), known):
            if lost is not None and (path == lost or path.startswith(lost + b"/")):
                continue
            found = True
            if not path:
                # A root that is a single file.
                batch.look(root, path, Kind.MODIFIED, work)
                maybe = True
                continue
            if not self._filters[root].allows(path, False):
                continue
            try:
                status = self._lstat(root, path)
            except _Unobservable:
                batch.look(root, path, Kind.MODIFIED, work)
                maybe = True
                continue
            if status is not None and (status.st_dev, status.st_ino) == inode:
                self._kept_name = {(root, inode): (path,)}
                batch.look(root, path, Kind.MODIFIED, work)
                return True
        if found and not maybe:
            # Thousands of names, maybe, each of which asks the same when it is missed.
            self._nameless = root, inode
        return found

    def _look_behind(self, batch: Batch, root: int, path: bytes, status: os.stat_result | None, work: Work) -> None:
        """Look at the files that had the path as another name of theirs, and have not any more."""
        item = work.item
        if not item.inodes or (item.root, item.path) != (root, path):
            return
        for dev, ino in item.inodes:
            if status is not None and (status.st_dev, status.st_ino) == (dev, ino):
                continue
            self._look_at_another_name(batch, (dev, ino), root, path, work)

    def _names_besides(self, name: Known) -> list[Known]:
        """The other names of a file, in any root, as far as the index knows them."""
        if name.kind is not FileKind.FILE or name.nlink < 2 or not name.ino:
            return []
        names = (other for root in range(len(self._roots)) for other in self._index.by_inode(root, name.dev, name.ino))
        return [other for other in names if (other.root, other.path) != (name.root, name.path)]

    def _look_elsewhere(self, batch: Batch, seen: Observed, work: Work) -> None:
        """Something was told of a file of several names: those in other roots are files of their own on the replica."""
        for root in range(len(self._roots)):
            if root != seen.root:
                for other in self._index.by_inode(root, seen.dev, seen.ino):
                    batch.look(root, other.path, Kind.MODIFIED, work)

    # --- what to tell

    def _meta(self, seen: Observed) -> Meta:
        meta = Meta(seen.mode, seen.uid, seen.gid, seen.atime_ns, seen.mtime_ns, list(seen.xattrs))
        self.owners.use(meta)
        return meta

    def _emit(self, operation: Operation, content: int = 0) -> None:
        plan = self._plan
        plan.operations += 1
        plan.content += content
        plan.frames.append(wire.frame(operation))
        root = operation.root
        self._touch(root, operation.path)
        if isinstance(operation, (Move, Remove)):
            self._made.clear()
        if self.view.still and not isinstance(operation, (MakeDir, SetMeta)):
            plan.placed.add((root, operation.to if isinstance(operation, Move) else operation.path))
        if isinstance(operation, Move):
            self._touch(root, operation.to)
            if self._note_drastic(root, operation.path):
                self._touched = {(number, _after(operation, number, path)) for number, path in self._touched}
            self._note_drastic(root, operation.to)
        elif isinstance(operation, Remove):
            self._note_drastic(root, operation.path)
        elif isinstance(operation, Link):
            # If it is in doubt, what was written through the new name shows under this one.
            self._plan.changed.add((root, operation.to))

    def _touch(self, root: int, path: bytes) -> None:
        self._plan.changed.add((root, path))
        if path:
            self._touched.add((root, path.rpartition(b"/")[0]))

    def _note_drastic(self, root: int, path: bytes) -> bool:
        """What is at ``path`` is moved, removed or replaced; returns whether it is a directory."""
        known = self._index.get(root, path)
        is_directory = known is not None and known.kind is FileKind.DIRECTORY
        self._plan.drastic |= is_directory
        return is_directory

    def _set_directories(self) -> None:
        """What was done below them changed the directories' own times on the replica: set them last."""
        for root, path in sorted(self._touched, key=lambda item: item[1].count(b"/"), reverse=True):
            known = self._index.get(root, path)
            if known is None or known.kind is not FileKind.DIRECTORY:
                continue
            self._plan.changed.add((root, path))
            with contextlib.suppress(_Unobservable):
                if self._set_directory(root, path):
                    continue
            # It may come back as it was, and be set then.
            self._index.put(_in_doubt(known))
            self.again.append(Hint(root, path, Kind.ATTRIBUTES))
        self._touched.clear()

    def _set_directory(self, root: int, path: bytes) -> bool:
        """Tell the metadata of a directory that the replica has; False when there is none here."""
        seen = self._observe(root, path)
        if seen is None or seen.kind is not FileKind.DIRECTORY:
            return False
        if not path:
            if not self._has_root(root):
                return False
            self._present(seen)
        self._plan.frames.append(wire.frame(SetMeta(root, path, self._meta(seen))))
        self._index.put(self._directory_entry(seen, self._index.get(root, path)))
        return True

    def _sync(
        self, batch: Batch, status: os.stat_result, root: int, path: bytes, known: Known | None, force: bool, work: Work
    ) -> None:
        """Make the replica have what is at ``path``, of which ``status`` was told a moment ago."""
        if stat.S_ISREG(status.st_mode):
            handle, seen = self._open(batch, status, root, path, work)
            try:
                if seen is not None:
                    self._sync_file(batch, seen, known, force, work, handle)
            finally:
                if handle is not None:
                    os.close(handle)
            return
        other = self._observe(root, path)
        if other is None or other.kind is FileKind.FILE:
            batch.vanish(root, path, work)  # which looks at it once more
        else:
            self._sync_other(batch, other, known, work)

    def _open(
        self, batch: Batch, status: os.stat_result, root: int, path: bytes, work: Work
    ) -> tuple[int | None, Observed | None]:
        """Open a file, and tell what is seen of it; no handle when it cannot be read, nothing when it has changed."""
        try:
            handle = self.view.open(root, path)
        except OSError as error:
            if error.errno in scanner.ABSENT:
                batch.vanish(root, path, work)
                return None, None
            self._note(root, path, "content", _reason(error))
            return None, self._observe(root, path)
        try:
            now = self.view.status(handle, root, path)
            if (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino):
                return handle, self._tellable(self.view.observed(now, root, path, handle))
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        batch.look(root, path, Kind.MODIFIED, work)
        return None, None

    def _sync_other(self, batch: Batch, seen: Observed, known: Known | None, work: Work) -> None:
        """Make the replica have a directory, a link or a node as it was seen."""
        root, path = seen.root, seen.path
        if not self._parents(batch, root, path, work):
            batch.vanish(root, path, work)
            return
        if seen.kind is FileKind.SOCKET:
            # A socket lives as long as its server; there is nothing to keep.
            if known is not None:
                self._emit(Remove(root, path))
                self._index.remove(root, path)
            return
        known = self._settle_place(batch, seen, known, work)
        told = self._plan.operations
        if seen.kind is FileKind.DIRECTORY:
            self._sync_directory(batch, seen, known, work)
        else:
            self._sync_special(seen, known)
            if seen.nlink > 1 and self._plan.operations > told:
                self._look_elsewhere(batch, seen, work)

    def _sync_file(
        self,
        batch: Batch,
        seen: Observed,
        known: Known | None,
        force: bool,
        work: Work,
        handle: int | None,
    ) -> None:
        """Make the replica have the file that was seen; without a handle, its content cannot be read now."""
        if not self._parents(batch, seen.root, seen.path, work):
            batch.vanish(seen.root, seen.path, work)
            return
        self._base = None
        self._lonely = _NO_INODE
        known = self._settle_place(batch, seen, known, work, readable=handle is not None)
        if handle is not None:
            told = self._plan.operations
            self._file(batch, seen, known, force, work, handle)
            if seen.nlink > 1 and self._plan.operations > told:
                self._look_elsewhere(batch, seen, work)

    def _sync_single_file(self, batch: Batch, seen: Observed, known: Known | None, force: bool, work: Work) -> None:
        try:
            handle = self.view.open_beneath(seen.root, b"")
        except OSError as error:
            self._note(seen.root, b"", "content", _reason(error))
            return
        try:
            self._sync_file(batch, seen, known, force, work, handle)
        finally:
            os.close(handle)

    def _settle_place(
        self, batch: Batch, seen: Observed, known: Known | None, work: Work, readable: bool = True
    ) -> Known | None:
        """Move what was seen to its place if it was known elsewhere, and clear the place of what is of another kind.

        Returns what the replica has there then. ``readable``: see ``_moved``.
        """
        root, path = seen.root, seen.path
        if known is None or known.ino != seen.ino or known.kind != seen.kind:
            if known is not None:
                self._look_at_other_names(batch, known, work)
            known = self._moved(batch, seen, work, readable) or known
        if known is not None and known.kind is not seen.kind:
            if known.kind is FileKind.DIRECTORY:
                self._emit(Remove(root, path))
            if known.kind is not _UNKNOWN:
                # Below what is unknown, the replica may have what is in doubt as well.
                self._index.remove(root, path)
            # What takes its place may turn out to be unreadable; the replica has something there until then.
            self._index.put(_unknown(root, path))
            known = None
        return known

    def _parents(self, batch: Batch, root: int, path: bytes, work: Work) -> bool:
        """Make sure that the replica has the directory that ``path`` lies in; False when it is gone here."""
        parent = parent_of(path)
        if parent is None or (root, parent) in self._made:
            return True
        known = self._index.get(root, parent)
        if known is not None and known.kind is FileKind.DIRECTORY:
            self._made.add((root, parent))
            return True
        seen = self._observe(root, parent)
        if seen is None or seen.kind is not FileKind.DIRECTORY:
            return False
        self._sync_other(batch, seen, known, work)
        return self._index.get(root, parent) is not None

    def _moved(self, batch: Batch, seen: Observed, work: Work, readable: bool) -> Known | None:
        """If what was seen stood under another name that is free now, rename it on the replica.

        But not a file whose content the replica does not have as it is: who saves by renaming means that nobody ever
        sees anything else under the new name. It is sent there, and what the old name has can be the delta's base.
        Only if it is not ``readable``, an earlier content under the new name is better than none.
        """
        root, path = seen.root, seen.path
        if not path or (seen.nlink > 1 and seen.kind is not FileKind.DIRECTORY):
            return None
        same = self._index.by_inode(root, seen.dev, seen.ino) if self._index.may_have_inode(seen.ino) else []
        if not same:
            self._lonely = (root, seen.dev, seen.ino)
        for old in same:
            if old.kind is not seen.kind or old.path in (path, b""):
                continue
            if path.startswith(old.path + b"/") or old.path.startswith(path + b"/"):
                continue
            if self._index.longest_below(root, old.path) + len(path) - len(old.path) > MAX_PATH:
                continue
            if self._is_inode(root, old.path, seen.dev, seen.ino):
                continue
            if seen.kind is FileKind.DIRECTORY and self._holds(root, path):
                continue
            if (root, old.path) not in self._jobs:
                # Who is being read is looked at afterwards; two files that got each other's inodes would wait in turns.
                batch.vanish(root, old.path, work)
            if readable and seen.kind is FileKind.FILE and not _is_current(old, seen):
                if 2 * old.size >= seen.size > INLINE_MAX:
                    self._base = old.path
                return None
            self._emit(Move(root, old.path, path))
            self._index.move(root, old.path, path)
            if seen.kind is FileKind.DIRECTORY:
                batch.walk(root, path, work)
            return self._index.get(root, path)
        return None

    def _holds(self, root: int, path: bytes) -> bool:
        """Whether the replica has a directory at ``path`` that must not be overwritten."""
        known = self._index.get(root, path) if self._limited[root] else None
        return known is not None and known.kind is FileKind.DIRECTORY and self.keeps(known)

    def _sync_directory(self, batch: Batch, seen: Observed, known: Known | None, work: Work) -> None:
        if known is None:
            self._emit(MakeDir(seen.root, seen.path, self._meta(seen)))
            batch.walk(seen.root, seen.path, work, Depth.THOROUGH)
        else:
            if known.ino != seen.ino and known.ino:
                batch.walk(seen.root, seen.path, work)
            if not known.same_meta(seen):
                self._plan.operations += 1
                self._touched.add((seen.root, seen.path))
        self._index.put(self._directory_entry(seen, known))

    def _sync_special(self, seen: Observed, known: Known | None) -> None:
        names = list(self._other_names(seen)) if seen.nlink > 1 and seen.kind in _LINKED else []
        if known is not None and _doubtful(known, seen):
            known = None
        if names and (known is None or (known.dev, known.ino) != (seen.dev, seen.ino)):
            known = self._link(seen, names[0])
        if known is None or known.target != seen.target or known.rdev != seen.rdev:
            if seen.target is not None:
                self._emit(MakeSymlink(seen.root, seen.path, self._meta(seen), seen.target))
            else:
                self._emit(MakeNode(seen.root, seen.path, self._meta(seen), int(seen.kind), seen.rdev))
        elif not known.same_meta(seen):
            self._emit(SetMeta(seen.root, seen.path, self._meta(seen)))
        entry = self._entry(seen, None, known)
        self._index.put_all([entry, *(replace(entry, path=name.path) for name in names)])

    # --- files

    def _file(self, batch: Batch, seen: Observed, known: Known | None, force: bool, work: Work, handle: int) -> None:
        inode = (seen.root, seen.dev, seen.ino, seen.ctime_ns)
        # Whoever said that it changed did so before this batch was taken, and it was read since.
        if known is not None and known.same_identity(seen) and (not force or inode in batch.read):
            return
        if not force and self._unreadable.get((seen.root, seen.path), (None,))[0] == seen.ctime_ns:
            return
        if known is not None and known.listed_alike(seen) and not force:
            self._emit_meta(seen, known)
            self._index.put(self._entry(seen, None, known))
            self._disown(seen, [])
            return
        names: list[Known] = []
        if seen.nlink > 1:
            if known is None or (known.dev, known.ino) != (seen.dev, seen.ino):
                # One will do, however many names the file has.
                first = next(self._other_names(seen), None)
                if first is not None:
                    known = self._link(seen, first)
                    if known.same_identity(seen):
                        return
            names = list(self._other_names(seen))
        started = self.view.moment_ns()
        try:
            data = os.read(handle, INLINE_MAX + 1) if seen.size <= INLINE_MAX else None
            if data is None or len(data) > INLINE_MAX:
                read = self._large(batch, seen, known, work)
                if read is None:
                    return
                entry, content = read
                same = content.is_settled and clamp_time(content.after.st_ctime_ns) == seen.ctime_ns
                started = content.started_ns
            else:
                entry = self._small(seen, known, data)
                after = self.view.status(handle, seen.root, seen.path)
                same = (clamp_time(after.st_ctime_ns), after.st_size) == (seen.ctime_ns, seen.size) and (
                    clamp_time(after.st_mtime_ns) == seen.mtime_ns
                )
        except OSError as error:
            # Nothing of it was sent yet, so that only this file stays behind.
            self._cannot_read(seen, error)
            if known is None or known.ino != seen.ino:
                self._moved(batch, seen, work, readable=False)
            return
        self._note(seen.root, seen.path, "content", None)
        if self._unreadable:
            self._unreadable.pop((seen.root, seen.path), None)
        if not same:
            self.again.append(Hint(seen.root, seen.path, Kind.MODIFIED))
        # While it was not seen unchanged during a read it is fuzzy: its content must be read to be known.
        entry = entry if same and started - seen.ctime_ns > _RACY_NS else replace(entry, ctime_ns=0)
        self._index.put(entry)
        if seen.nlink > 1 and entry.ctime_ns:
            batch.read.add(inode)
        if self._content_sent or known is None or (known.dev, known.ino) != (seen.dev, seen.ino):
            self._disown(seen, names)
        for name in names:
            if self._content_sent:
                # New content came under one name, as a new file on the replica; the other names must follow.
                self._emit(Link(seen.root, name.path, seen.path))
                self._index.set_signature(seen.root, name.path, self._index.get_signature(seen.root, seen.path))
            self._index.put(replace(entry, path=name.path))

    def _entry(self, seen: Observed, digest: bytes | None, known: Known | None) -> Known:
        """What the replica has after what was told: ``seen``, of which ``known`` was known before."""
        told = (seen.root, seen.path) in self._plan.changed or known is None
        return _known(seen, digest, self._plan.made_ns if told or known is None else known.told_ns)

    def _directory_entry(self, seen: Observed, known: Known | None) -> Known:
        """As ``_entry``; that the replica has something mounted there stays known."""
        entry = self._entry(seen, None, known)
        return entry if known is None or not known.rdev else replace(entry, rdev=known.rdev)

    def _link(self, seen: Observed, name: Known) -> Known:
        """Tell that what was seen is another name of a file that the replica has as ``name``."""
        self._emit(Link(seen.root, seen.path, name.path))
        known = replace(name, path=seen.path, told_ns=self._plan.made_ns)
        self._index.put(known)
        self._index.set_signature(seen.root, seen.path, self._index.get_signature(seen.root, name.path))
        return known

    def _disown(self, seen: Observed, names: list[Known]) -> None:
        """No path but ``names`` may seem to be a name of this file on the replica.

        Inode numbers are used again; and new content comes as a new file, which a name that has moved does not stand
        for until it is linked to it.
        """
        if self._lonely == (seen.root, seen.dev, seen.ino):
            return
        mine = {seen.path, *(name.path for name in names)}
        for other in self._index.by_inode(seen.root, seen.dev, seen.ino):
            if other.path not in mine:
                self._index.put(replace(other, dev=0, ino=0, ctime_ns=0))

    def _other_names(self, seen: Observed) -> Iterator[Known]:
        """The names of the same object that the replica has and that are still its names here."""
        return (
            other
            for other in self._index.each_by_inode(seen.root, seen.dev, seen.ino)
            if other.path != seen.path
            and other.kind is seen.kind
            and self._is_inode(seen.root, other.path, seen.dev, seen.ino)
        )

    def _small(self, seen: Observed, known: Known | None, data: bytes) -> Known:
        """Send what differs of a small file's content and metadata; returns what the replica will have."""
        digest = blake3.blake3(data).digest()
        self._content_sent = not _has(known, seen, len(data), digest)
        if self._content_sent:
            self._emit(Put(seen.root, seen.path, self._meta(seen), data), len(data))
            if known is not None and known.size > INLINE_MAX:
                self._index.set_signature(seen.root, seen.path, None)
        else:
            self._emit_meta(seen, known)
        return self._entry(seen if len(data) == seen.size else replace(seen, size=len(data)), digest, known)

    def _large(self, batch: Batch, seen: Observed, known: Known | None, work: Work) -> tuple[Known, Content] | None:
        """Tell of a large file that was read, or have it read: then None is returned, and ``work`` waits for it.

        Raises the OSError with which the reading ended.
        """
        root, path = seen.root, seen.path
        job = self._jobs.get((root, path))
        if job is not None and job.problem is not None:
            del self._jobs[root, path]
            self._drop(job)
            if job.problem.errno in scanner.ABSENT:
                # It, or what it lies in, was away just then, and its change time does not tell that it is back.
                self._have_read(seen, None, job.hash_only, work)
                return None
            raise job.problem
        if job is None or job.content is None:
            self._have_read(seen, job, self._may_be_there(seen, known), work)
            return None
        content = job.content
        del self._jobs[root, path]
        if (content.before.st_dev, content.before.st_ino) != (seen.dev, seen.ino):
            self._drop(job)
            self._have_read(seen, None, False, work)
            return None
        self._content_sent = not _has(known, seen, content.length, content.digest)
        if not self._content_sent:
            self._drop(job)
            self._emit_meta(seen, known)
        elif not job.hash_only:
            self._emit(Patch(root, path, self._meta(seen), job.number))
            self._plan.uploads.append(job.number)
            self._index.set_signature(root, path, content.signature)
        elif not self._copy(seen, content):
            self._have_read(seen, None, False, work)
            return None
        return self._entry(replace(seen, size=content.length), content.digest, known), content

    def _have_read(self, seen: Observed, job: Job | None, hash_only: bool, work: Work) -> None:
        """Have a file read; when that is under way already, ``work`` is looked at once more afterwards."""
        if job is not None:
            if work not in job.works:
                work.left += 1
                job.works.append(work)
            return
        work.left += 1
        key = seen.root, seen.path
        job = self._jobs[key] = Job(*key, seen.size, [work], hash_only and not self._base, self._base or seen.path)
        if self._base:
            self._held[seen.root, self._base] = job
        self.new_jobs.append(job)

    def _may_be_there(self, seen: Observed, known: Known | None) -> bool:
        """True when it is worth hashing a file before it is sent: that costs little, and may spare all of it."""
        if known is None or known.size != seen.size:
            return self._index.has_size(seen.size)
        # What was only listed by the replica has no inode of ours.
        return known.digest is not None and (not known.ino or known.mtime_ns == seen.mtime_ns)

    def _copy(self, seen: Observed, content: Content) -> bool:
        """Have the replica copy the content from another of its files; False when it has none such."""
        for other in self._index.like(content.length, content.digest):
            if (other.root, other.path) != (seen.root, seen.path) and self.is_settled(other.root, other.path):
                self._emit(Copy(seen.root, seen.path, self._meta(seen), other.root, other.path, content.digest))
                signature = self._index.get_signature(other.root, other.path)
                self._index.set_signature(seen.root, seen.path, signature)
                return True
        return False

    def _emit_meta(self, seen: Observed, known: Known | None) -> None:
        if known is not None and not known.same_meta(seen):
            self._emit(SetMeta(seen.root, seen.path, self._meta(seen)))

    def _cannot_read(self, seen: Observed, error: OSError) -> None:
        """Leave the file alone until a hint, or another ctime, promises better."""
        self._note(seen.root, seen.path, "content", _reason(error))
        self._unreadable[seen.root, seen.path] = seen.ctime_ns, seen.size


def _fitting(xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    """Of a file's attributes those that fit into a message, the small ones first: ACLs and capabilities are."""
    if sum(len(name) + len(value) + _XATTR_OVERHEAD for name, value in xattrs) <= _MAX_XATTRS:
        return xattrs
    kept, room = [], _MAX_XATTRS
    for name, value in sorted(xattrs, key=lambda each: len(each[0]) + len(each[1])):
        room -= len(name) + len(value) + _XATTR_OVERHEAD
        if room < 0:
            break
        kept.append((name, value))
    return tuple(sorted(kept))


def _copy_excess(root: Root, known: Known, now_ns: int) -> limits.Excess | None:
    return limits.copy_excess(root, known.size, known.mtime_ns, known.told_ns, now_ns)


def _reason(error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"


def _has(known: Known | None, seen: Observed, size: int, digest: bytes) -> bool:
    return known is not None and known.size == size and known.digest == digest and not _doubtful(known, seen)


def _is_current(known: Known, seen: Observed) -> bool:
    """Whether the replica surely has the content that was seen, though its ctime says that something has changed."""
    return bool(known.ctime_ns) and (known.size, known.mtime_ns) == (seen.size, seen.mtime_ns)


def _doubtful(known: Known, seen: Observed) -> bool:
    """A replica's file with several names that was not made from what is seen: it may be linked to what is separate."""
    return known.nlink > 1 and (known.dev, known.ino) != (seen.dev, seen.ino)


def _known(seen: Observed, digest: bytes | None, told_ns: int) -> Known:
    return Known(
        seen.root,
        seen.path,
        seen.kind,
        seen.mode,
        seen.uid,
        seen.gid,
        seen.size,
        seen.mtime_ns,
        seen.ctime_ns,
        seen.dev,
        seen.ino,
        seen.nlink,
        seen.rdev,
        seen.target,
        seen.xattrs,
        digest,
        told_ns,
    )


def _without_inode(known: Known) -> Known:
    """What is kept of something that is gone here: its inode may be that of something else now."""
    return replace(known, dev=0, ctime_ns=0)


def _in_doubt(directory: Known) -> Known:
    """An entry of a directory that is there, with metadata that nothing equals."""
    return replace(directory, mode=-1)


def _after(move: Move, root: int, path: bytes) -> bytes:
    """Where a path of root number ``root`` is after a directory was moved."""
    if root == move.root and (path == move.path or path.startswith(move.path + b"/")):
        return move.to + path[len(move.path) :]
    return path


def _unknown(root: int, path: bytes) -> Known:
    """An entry that equals nothing: something may be there."""
    return Known(root, path, _UNKNOWN, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, None, (), None)


def dirty_everything(roots: Iterable[int]) -> list[Hint]:
    """Hints that put every root in doubt."""
    return [Hint(root, b"", Kind.RESCAN) for root in roots]
