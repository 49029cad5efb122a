"""Bring back what a replica's tree was: beside it, or in its place. Runs in the applier's thread, so nothing changes
the tree meanwhile; what arrives gathers in the journal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from farshore.control.api import Span, Version
from farshore.dbm.replica.commit import Applier
from farshore.dbm.replica.exchange import CannotRestore, begin, check_mounts, clear, make_ready, name_at
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.undo import Absent, Kept, Moved, Step, Undo, WasDirectory, WasMeta
from farshore.dbm.replica.view import Progress, copy_out
from farshore.errors import UsageError

_SECOND = 10**9


@dataclass(frozen=True, slots=True)
class When:
    """Which state is meant: the one after transaction ``seq``, or the one at a time of the wall clock, or the last."""

    seq: int | None = None
    time_ns: int | None = None

    def resolve(self, applier: Applier) -> int:
        """The transaction after which the state was; raises NotRemembered, StateError."""
        if self.time_ns is not None:
            return applier.history.at_time(self.time_ns, applier.applied)
        return applier.history.check_seq(applier.applied if self.seq is None else self.seq, applier.applied)


def find(applier: Applier, path: str) -> tuple[int, bytes]:
    """Root number and path below it of an absolute path; raises UsageError when it is not protected."""
    wanted = os.fsencode(path).rstrip(b"/")
    for number, tree in enumerate(applier.trees):
        if wanted == tree.root:
            return number, b""
        if wanted.startswith(tree.root + b"/"):
            return number, wanted[len(tree.root) + 1 :]
    known = ", ".join(os.fsdecode(tree.root) for tree in applier.trees)
    raise UsageError(f"{path!r} does not lie in this group's tree here; allowed: a path in {known}")


def spans(applier: Applier) -> list[Span]:
    """What there is of a history, the oldest first."""
    return [
        Span(
            chapter.first,
            chapter.last,
            chapter.first_ns / _SECOND,
            chapter.last_ns / _SECOND,
            not chapter.merged,
            chapter.entries,
            chapter.kept,
        )
        for chapter in applier.history.chapters
    ]


def versions(applier: Applier, path: str, most: int) -> list[Version]:
    """What changed at a path, the last first; raises UsageError, StateError."""
    root, below = find(applier, path)
    found = []
    for step, entry in applier.history.versions(root, below):
        found.append(_version(applier, step, entry))
        if len(found) >= most:
            break
    return found


def _version(applier: Applier, step: Step, entry: Undo) -> Version:
    where = applier.trees[entry.root].root + (b"/" + entry.path if entry.path else b"")
    size, mtime = 0, 0.0
    match entry:
        case Absent():
            was = "nothing"
        case Kept(kind=kind):
            was = {0o100000: "file", 0o040000: "directory", 0o120000: "link"}.get(kind, "other")
            size, mtime = entry.size, entry.mtime_ns / _SECOND
        case WasDirectory():
            was = "directory"
        case WasMeta(meta=meta):
            was, mtime = "metadata", meta.mtime_ns / _SECOND
        case Moved():
            was = "moved"
        case _:
            was = "other"
    name = os.fsdecode(where).encode("utf-8", "replace").decode()
    return Version(step.seq, step.time_ns / _SECOND, was, size, mtime, name)


def restore_to(
    applier: Applier, path: str, when: When, target: str, newest_ns: int, progress: Progress, check: Callable[[], None]
) -> str:
    """Make copies below the directory ``target`` of what was at ``path`` ("" for all); returns what was done.

    What changed on disk after ``newest_ns`` without the journal (0: nothing did) is not what it was, and left out.
    Raises CannotRestore, NotRemembered, UsageError, OSError, and what ``check`` raises.
    """
    base = os.fsencode(target)
    if not os.path.isabs(base):
        raise UsageError(f"{target!r} is not an absolute path")
    for tree in applier.trees:
        if (base + b"/").startswith(tree.root + b"/") or (tree.root + b"/").startswith(base + b"/"):
            raise CannotRestore(target, f"lies in, or above, {os.fsdecode(tree.root)}; choose a directory apart")
    seq = when.resolve(applier)
    os.makedirs(base, 0o700, exist_ok=True)
    made = []
    for root, below in _chosen(applier, path):
        name = os.path.basename(below or applier.trees[root].root)
        out = base + b"/" + name
        if os.path.lexists(out):
            raise CannotRestore(os.fsdecode(out), "is there already; choose an empty directory")
        copy_out(applier.view(root, seq, newest_ns), below, out, progress, check)
        made.append(os.fsdecode(out))
    return _told(progress, seq, "in " + ", ".join(made))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Copies that wait to take their place: the ``name`` of the work directories, their roots, and what it will be."""

    name: str
    roots: tuple[int, ...]
    text: str


def prepare(
    applier: Applier, path: str, when: When, newest_ns: int, progress: Progress, check: Callable[[], None]
) -> Prepared:
    """Copy what was at ``path`` ("" for all), so that ``exchange`` can put it in the place of what is there now.

    Raises as ``restore_to``, and then nothing is left of it.
    """
    seq = when.resolve(applier)
    clear(places(applier))
    name = name_at(time.strftime("%Y%m%d-%H%M%S"))
    made = []
    kept = []
    try:
        for root, below in _chosen(applier, path):
            tree = applier.trees[root]
            work = begin(tree.root, applier.stages[root].place(), name)
            view = applier.view(root, seq, newest_ns)
            copy_out(view, below, work.new, progress, check)
            place = tree.root + (b"/" + below if below else b"")
            # Looked up before the exchange, which changes it.
            made.append((work, place, None if below or view.top is None else view.meta_of(view.top)))
            if os.path.lexists(place):
                kept.append(os.fsdecode(work.before))
        for work, place, meta in made:
            make_ready(work, place, meta)
        check()
    except BaseException:
        clear(places(applier))
        raise
    text = _told(progress, seq, "in place; what was there is in " + ", ".join(kept) if kept else "in place")
    return Prepared(name, tuple(root for root, _ in _chosen(applier, path)), text)


def prepare_exactly(applier: Applier, seq: int, progress: Progress, check: Callable[[], None]) -> Prepared:
    """As ``prepare``, for all as it was after transaction ``seq``, and no other one near it."""
    check_whole(applier, seq)
    return prepare(applier, "", When(seq=seq), 0, progress, check)


def check_whole(applier: Applier, seq: int) -> None:
    """Raises NotRemembered, CannotRestore, StateError, OSError when a root cannot become what it was after ``seq``."""
    nearest = applier.history.check_seq(seq, applier.applied)
    if nearest != seq:
        raise NotRemembered("the history", f"transaction {seq} is none of those that it can still go back to")
    for root, tree in enumerate(applier.trees):
        if applier.view(root, seq).top is None:
            raise NotRemembered(os.fsdecode(tree.root), "was not there at that time")
        check_mounts(tree.root, within=os.path.isdir(tree.root))


def named(seq: int, time_ns: int) -> str:
    """A state in words; ``time_ns`` is 0 when it is not known when it was."""
    if not time_ns:
        return f"transaction {seq}"
    return f"transaction {seq} of {datetime.fromtimestamp(time_ns / _SECOND).isoformat(' ', 'seconds')}"


def places(applier: Applier) -> list[tuple[bytes, Path]]:
    """The roots, and where the state of each is."""
    return [(tree.root, applier.state / str(number)) for number, tree in enumerate(applier.trees)]


def _chosen(applier: Applier, path: str) -> list[tuple[int, bytes]]:
    if path:
        return [find(applier, path)]
    return [(root, b"") for root in range(len(applier.trees))]


def _told(progress: Progress, seq: int, where: str) -> str:
    text = f"{progress.files} files, {progress.size} bytes, as they were after transaction {seq}, are {where}"
    if progress.missing:
        some = ", ".join(os.fsdecode(path) for path in progress.missing[:5])
        text += f"; {len(progress.missing)} are not known any more and left out: {some}"
    return text
