"""What the tree was before: the undo records of all transactions, and the files that they name.

The history is written in chapters of some minutes, each a segment of the log. As it ages, chapters are merged into one
for each hour, then one for each day, and dropped in the end: of a merged chapter, only the state at its beginning can
be gone back to, so of each path only the first thing that it undoes is needed. When there is no room, the oldest
chapters go before anything else suffers. Nothing that a source can send shortens it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from farshore import durable
from farshore.config import History as Retention
from farshore.dbm.replica.paths import remove_tree
from farshore.dbm.replica.segments import Place, Segments
from farshore.dbm.replica.stage import Stage
from farshore.dbm.replica.undo import Absent, Kept, Moved, Step, Undo, WasDirectory, WasMeta
from farshore.errors import FarshoreError, StateError
from farshore.log import Log

_log = Log(__name__)
_SECOND = 10**9
#: A chapter ends after so many seconds or entries, or when it takes so small a part of all the space.
CHAPTERS_IN_SPACE = 16
CHAPTER_SECONDS = 600
CHAPTER_ENTRIES = 20_000
#: This much stays free on each filesystem that is written to, but no more than this part of a small one.
RESERVE_BYTES = 64 << 20
RESERVE_SHARE = 20
_HOUR, _DAY = 3600, 86_400
_BLOCK = 512
#: The size of a filesystem that knows none of its own.
_ANY = 1 << 50
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Step] = msgspec.msgpack.Decoder(Step)


class NotRemembered(FarshoreError):
    """{0}: {1}"""

    exit_code = 29


@dataclass(slots=True)
class Chapter:
    """A part of the history: transactions ``first`` to ``last``, made durable from ``first_ns`` to ``last_ns``.

    ``kept`` is what its files take, in bytes. ``merged``: only the state before it can be gone back to.
    """

    segment: int
    first: int
    last: int
    first_ns: int
    last_ns: int
    kept: int = 0
    entries: int = 0
    merged: bool = False
    #: Whether it has all of its first transaction.
    whole: bool = True

    @property
    def floor(self) -> int:
        """The earliest transaction after which the state can be had with this chapter as the first one."""
        return self.first - 1 if self.whole else self.first

    def take(self, step: Step) -> None:
        """Take up a step."""
        self.last, self.last_ns = max(self.last, step.seq), max(self.last_ns, step.time_ns)
        self.entries += len(step.entries)
        self.kept += sum(entry.blocks * _BLOCK for entry in step.entries if isinstance(entry, Kept))
        self.merged = self.merged or step.merged


class History:
    """The history of one group in ``directory``, whose files are in the folders of ``stages``. One thread at a time.

    ``after`` is the last transaction that is known to be applied. Raises StateError.
    """

    def __init__(
        self,
        directory: Path,
        stages: Sequence[Stage],
        retention: Retention,
        after: int,
        now_ns: Callable[[], int],
    ) -> None:
        self._stages = stages
        self._retention = retention
        self._now_ns = now_ns
        self._after = after
        self.chapters: list[Chapter] = []
        #: What the operations found that may have to be applied again: how far each transaction was looked up.
        self._known: dict[int, int] = {}
        self._found: dict[tuple[int, int], list[Undo]] = {}
        self._segments = Segments(directory, "history", self._note_found)
        self.problem = self._segments.damage

    def close(self) -> None:
        """Give the handles back; everything stays."""
        self._segments.leave()

    # --- writing

    def folder(self) -> bytes:
        """The folder for what is taken away now."""
        return b"h%016x" % (self.chapters[-1].first if self.chapters else 0)

    def note(self, steps: Sequence[Step]) -> None:
        """Write down, durably, what operations found that are about to be applied; raises OSError."""
        if not steps:
            return
        chapter = self.chapters[-1] if self.chapters else None
        if chapter is None or (steps[0].first == 0 and steps[0].seq > chapter.last and self._is_full(chapter)):
            self._segments.begin(steps[0].seq)
        places = self._segments.append(_records(steps, self._segments.last))
        for step, place in zip(steps, places, strict=True):
            self._take(step, place.segment)
            self._remember(step)

    def not_reached(self, seq: int, operations: int) -> list[tuple[int, int, int]]:
        """What was looked up behind the first ``operations`` of transaction ``seq`` + 1: (transaction, first, last)."""
        found = []
        for known, last in sorted(self._known.items()):
            first = operations if known == seq + 1 else 0
            if known > seq and first < last:
                found.append((known, first, last))
        return found

    def known(self, seq: int, number: int) -> list[Undo] | None:
        """What an operation found when it may have been applied before; None when it was not."""
        if number >= self._known.get(seq, 0):
            return None
        return self._found.get((seq, number), [])

    def settled(self, seq: int) -> None:
        """All up to transaction ``seq`` is applied and durable in the trees."""
        self._after = max(self._after, seq)
        for known in [known for known in self._known if known <= seq]:
            del self._known[known]
        for found in [found for found in self._found if found[0] <= seq]:
            del self._found[found]
        if not self._retention.enabled:
            while self.chapters and self.chapters[0].last <= seq:
                self._drop_oldest()

    def _is_full(self, chapter: Chapter) -> bool:
        age = self._now_ns() - chapter.first_ns
        if chapter.entries >= CHAPTER_ENTRIES or age >= CHAPTER_SECONDS * _SECOND or chapter.merged:
            return True
        return chapter.kept * CHAPTERS_IN_SPACE > self._limit()

    def _note_found(self, number: int, place: Place, body: bytes) -> None:
        step = _decoder.decode(body)
        self._take(step, place.segment)
        if step.seq > self._after:
            self._remember(step)

    def _take(self, step: Step, segment: int) -> None:
        if not self.chapters or self.chapters[-1].segment != segment:
            first = Chapter(segment, step.seq, step.seq, step.time_ns, step.time_ns, whole=step.first == 0)
            self.chapters.append(first)
        self.chapters[-1].take(step)

    def _remember(self, step: Step) -> None:
        self._known[step.seq] = max(step.last, self._known.get(step.seq, 0))
        if step.undone:
            for number in range(step.first, step.last):
                self._found.pop((step.seq, number), None)
        for entry in step.entries:
            self._found.setdefault((step.seq, entry.op), []).append(entry)

    # --- reading

    @property
    def kept(self) -> int:
        """Bytes that its files take. What shares blocks with other files is counted in full."""
        return sum(chapter.kept for chapter in self.chapters)

    @property
    def since_ns(self) -> int | None:
        """The wall clock of the oldest state that can be gone back to, at the latest; None when there is no history."""
        return self.chapters[0].first_ns if self.chapters else None

    def steps(self, chapter: Chapter) -> list[Step]:
        """What a chapter undoes, in the order in which it was done; raises StateError."""
        try:
            return [_decoder.decode(body) for _, body in self._segments.records(chapter.segment)]
        except msgspec.MsgspecError as error:
            raise StateError(self._segments.path(chapter.segment), f"is damaged: {error}") from error

    def back_to(self, seq: int) -> Iterator[Step]:
        """What has to be undone, the last first, to get to the state after transaction ``seq``; raises StateError."""
        undone = _Undone()
        for chapter in reversed(self.chapters):
            if chapter.last <= seq:
                return
            for step in reversed(self.steps(chapter)):
                if step.seq > seq:
                    yield undone.without(step)

    def at_time(self, time_ns: int, applied: int) -> int:
        """The last transaction of the state that was there at a time of the wall clock; ``applied`` is the newest one.

        In a merged chapter that is the state at its beginning. Raises StateError; NotRemembered when that is too long
        ago.
        """
        found = applied
        for chapter in reversed(self.chapters):
            if chapter.last_ns <= time_ns:
                return found
            found = chapter.first - 1
            if chapter.first_ns > time_ns or chapter.merged:
                if chapter.first_ns <= time_ns:
                    return found
                continue
            before = [step.seq for step in self.steps(chapter) if step.time_ns <= time_ns]
            return max(before, default=found)
        if self.chapters:
            raise NotRemembered("the history", f"reaches back to {_clock(self.chapters[0].first_ns)} only")
        if applied:
            raise NotRemembered("the history", "is empty; only the last state is there")
        return found

    def time_of(self, seq: int) -> int:
        """The wall clock, in ns, when the state after transaction ``seq`` was reached; 0 when that is too long ago.

        Raises StateError.
        """
        for chapter in reversed(self.chapters):
            if chapter.last <= seq:
                return chapter.last_ns
            if chapter.first <= seq:
                times = [step.time_ns for step in self.steps(chapter) if step.seq <= seq]
                if times:
                    return times[-1]
        return 0

    def check_seq(self, seq: int, applied: int) -> int:
        """The state after transaction ``seq``, or the nearest one before it that is remembered."""
        if not 0 <= seq <= applied:
            raise NotRemembered("the history", f"there is no transaction {seq}; the last one is {applied}")
        if not self.chapters and seq < applied:
            raise NotRemembered("the history", "is empty; only the last state is there")
        for chapter in self.chapters:
            if chapter.merged and chapter.first <= seq < chapter.last:
                self._check_floor(chapter.first - 1)
                return chapter.first - 1
        self._check_floor(seq)
        return seq

    def _check_floor(self, seq: int) -> None:
        if self.chapters and seq < self.chapters[0].floor:
            raise NotRemembered("the history", f"reaches back to transaction {self.chapters[0].floor} only")

    def versions(self, root: int, path: bytes) -> Iterator[tuple[Step, Undo]]:
        """What changed at ``path`` of a root, or what it lay in, the last first, following it through its moves."""
        undone = _Undone()
        for chapter in reversed(self.chapters):
            for step in map(undone.without, reversed(self.steps(chapter))):
                for entry in reversed(step.entries):
                    if entry.root != root:
                        continue
                    if isinstance(entry, Moved) and _is_in(path, entry.to):
                        yield step, entry
                        path = entry.path + path[len(entry.to) :]
                    elif isinstance(entry, (Absent, Kept, WasDirectory)):
                        if _is_in(path, entry.path):
                            yield step, entry
                    elif isinstance(entry, WasMeta) and entry.path == path:
                        yield step, entry

    def renumber(self, numbers: Mapping[int, int], directory: Path) -> None:
        """Write the history to ``directory`` as one of other roots: ``numbers`` has the new one of each that stays.

        All of it must be settled. Where a chapter is damaged, nothing older is taken along. Raises StateError, OSError.
        """
        shutil.rmtree(directory, ignore_errors=True)
        segments = Segments(directory, "history", lambda number, place, body: None)
        last = 0
        for chapter in self.chapters:
            try:
                steps = [_with_numbers(step, numbers) for step in self.steps(chapter)]
            except StateError as error:
                _log.error("a part of the history is lost", reason=error)
                for segment in segments.all():
                    segments.remove(segment)
                continue
            if steps:
                records = _records(steps, last)
                segments.begin(chapter.segment)
                segments.append(records)
                last = records[-1][0]
        segments.leave()
        durable.sync_directory(directory.parent)

    # --- ageing

    def thin(self) -> None:
        """Merge and drop what is old, and what is more than there is space for; raises OSError, StateError."""
        if not self.chapters or not self._retention.enabled:
            return
        now = self._now_ns()
        oldest = now - self._retention.longest * _SECOND
        while len(self.chapters) > 1 and self.chapters[0].last <= self._after and self.chapters[0].last_ns < oldest:
            self._drop_oldest()
        for run in self._runs(now):
            self._merge(run)
        limit = self._limit()
        while len(self.chapters) > 1 and self.chapters[0].last <= self._after and self.kept > limit:
            _log.warning("the history takes more space than it may; its oldest part goes", limit=limit)
            self._drop_oldest()

    def make_room(self) -> bool:
        """Something found the disk full: drop the oldest chapter, and more until there is well more than the reserve.

        Returns whether there was any.
        """
        dropped = False
        while self.chapters and self.chapters[0].last <= self._after and (not dropped or self._is_short()):
            self._drop_oldest()
            dropped = True
        if self.chapters and (not dropped or self._is_short()):
            dropped = self._shed() or dropped
        return dropped

    def _shed(self) -> bool:
        """Of the oldest chapter, keep what may be needed to apply something once more; returns whether more was there.

        Raises OSError.
        """
        chapter = self.chapters[0]
        steps: list[Step] = []
        with contextlib.suppress(StateError):
            steps = self.steps(chapter)
        needed = [step for step in steps if step.seq > self._after]
        if not needed or len(needed) == len(steps):
            return False
        kept = [entry for step in steps if step.seq <= self._after for entry in step.entries if isinstance(entry, Kept)]
        self._remove_all(kept)
        self._segments.leave()
        self._segments.replace([chapter.segment], _records(needed))
        del self.chapters[0]
        later, self.chapters = self.chapters, []
        for step in needed:
            self._take(step, chapter.segment)
        self.chapters += later
        self._drop_folders(kept)
        return True

    def _runs(self, now: int) -> list[list[Chapter]]:
        """Chapters that should be one, the last chapter aside."""
        runs: dict[tuple[int, int], list[Chapter]] = {}
        for chapter in self.chapters[:-1]:
            if chapter.last > self._after:
                break  # its notes may be needed to apply it once more
            age = (now - chapter.last_ns) // _SECOND
            if age >= self._retention.seconds("hourly"):
                runs.setdefault((_DAY, chapter.first_ns // _SECOND // _DAY), []).append(chapter)
            elif age >= self._retention.seconds("all"):
                runs.setdefault((_HOUR, chapter.first_ns // _SECOND // _HOUR), []).append(chapter)
        return [run for run in runs.values() if len(run) > 1 or not run[0].merged]

    def _merge(self, run: list[Chapter]) -> None:
        steps, dropped = merge([step for chapter in run for step in self.steps(chapter)])
        # The files first: after a crash in between, the same are found to be dropped again.
        self._remove_all(dropped)
        self._segments.replace([chapter.segment for chapter in run], _records(steps))
        merged = Chapter(
            run[0].segment, run[0].first, run[-1].last, run[0].first_ns, run[-1].last_ns, whole=run[0].whole
        )
        for step in steps:
            merged.take(step)
        at = self.chapters.index(run[0])
        self.chapters[at : at + len(run)] = [merged]
        self._drop_folders(dropped)

    def _drop_oldest(self) -> None:
        chapter = self.chapters[0]
        kept: list[Kept] = []
        with contextlib.suppress(StateError):
            kept = [entry for step in self.steps(chapter) for entry in step.entries if isinstance(entry, Kept)]
        self._remove_all(kept)
        self._segments.remove(chapter.segment)
        del self.chapters[0]
        self._drop_folders(kept)

    def _drop_folders(self, entries: Sequence[Kept]) -> None:
        for root, folder in {(entry.root, entry.folder) for entry in entries}:
            if root < len(self._stages):
                self._stages[root].drop_folder(folder)

    def _remove_all(self, entries: Sequence[Kept]) -> None:
        """Remove kept files; one that cannot be removed does not keep the others."""
        for entry in entries:
            try:
                self._remove(entry)
            except OSError as error:
                _log.warning("something of the history cannot be removed", path=entry.path, reason=str(error))

    def _remove(self, entry: Kept) -> None:
        if entry.root >= len(self._stages):
            return
        with contextlib.suppress(FileNotFoundError):
            folder = self._stages[entry.root].folder(entry.folder)
            if stat.S_ISDIR(entry.kind):
                remove_tree(folder, entry.name, entry.path, None)
            else:
                os.unlink(entry.name, dir_fd=folder)

    def _limit(self) -> int:
        sizes = []
        for stage in self._stages:
            with contextlib.suppress(OSError, StateError):
                status = os.statvfs(stage.place())
                sizes.append(status.f_blocks * status.f_frsize or _ANY)
        return self._retention.space_of(min(sizes, default=0))

    def _is_short(self) -> bool:
        for stage in self._stages:
            with contextlib.suppress(OSError, StateError):
                status = os.statvfs(stage.place())
                if status.f_blocks and status.f_bavail * status.f_frsize < 2 * reserve_of(status):
                    return True
        return False


class _Undone:
    """Leaves out what operations would have done that were left out; the steps come in reverse order."""

    def __init__(self) -> None:
        self._ranges: dict[int, list[range]] = {}

    def without(self, step: Step) -> Step:
        """``step`` with what took effect."""
        if step.undone:
            self._ranges.setdefault(step.seq, []).append(range(step.first, step.last))
            return step
        undone = self._ranges.get(step.seq)
        if undone is None:
            return step
        entries = [entry for entry in step.entries if not any(entry.op in numbers for numbers in undone)]
        return msgspec.structs.replace(step, entries=entries)


def _with_numbers(step: Step, numbers: Mapping[int, int]) -> Step:
    entries = [
        msgspec.structs.replace(entry, root=numbers[entry.root]) for entry in step.entries if entry.root in numbers
    ]
    return msgspec.structs.replace(step, entries=entries)


def _records(steps: Sequence[Step], last: int = 0) -> list[tuple[int, bytes]]:
    """Numbers of records never fall; of an operation that was left out is told after others were looked up."""
    return [(last := max(last, step.seq), _encoder.encode(step)) for step in steps]


def _is_in(path: bytes, directory: bytes) -> bool:
    """Whether ``path`` is ``directory`` or lies in it."""
    return path == directory or path.startswith(directory + b"/") or not directory


def _clock(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / _SECOND).isoformat(" ", "seconds")


def reserve_of(status: os.statvfs_result) -> int:
    """Bytes that stay free on a filesystem: what was accepted must have room to be applied."""
    return min(RESERVE_BYTES, status.f_blocks * status.f_frsize // RESERVE_SHARE)


def merge(steps: Sequence[Step]) -> tuple[list[Step], list[Kept]]:
    """The steps that lead to the same beginning with the fewest entries, and the kept files that are not needed then.

    Of what is undone at one path, or below it, only the first needs to be, unless something was moved in between. What
    concerns a file of several names stays: another one of them may need it.
    """
    undone = _Undone()
    steps = [undone.without(step) for step in reversed(steps)][::-1]
    objects: set[tuple[int, bytes]] = set()
    metas: set[tuple[int, bytes]] = set()
    times: set[tuple[int, bytes]] = set()
    merged: list[Step] = []
    dropped: list[Kept] = []
    for number, step in enumerate(steps):
        entries: list[Undo] = []
        for entry in step.entries:
            key = entry.root, entry.path
            if isinstance(entry, Moved):
                if entry.directory:
                    for known in (objects, metas, times):
                        known.clear()
                else:
                    for known in (objects, metas, times):
                        known -= {key, (entry.root, entry.to)}
                    # What it came to lie in may be new, and yet be needed for what lies there now.
                    above = entry.to
                    while above:
                        above = above.rpartition(b"/")[0]
                        objects.discard((entry.root, above))
                entries.append(entry)
            elif isinstance(entry, (Kept, WasMeta)) and entry.links > 1:
                if isinstance(entry, Kept):
                    objects.add(key)
                entries.append(entry)
            elif _has_above(objects, *key):
                if isinstance(entry, Kept):
                    dropped.append(entry)
            elif isinstance(entry, (Absent, Kept, WasDirectory)):
                objects.add(key)
                entries.append(entry)
            elif isinstance(entry, WasMeta):
                if key not in metas:
                    metas.add(key)
                    entries.append(entry)
            elif key not in times and key not in metas:
                times.add(key)
                entries.append(entry)
        if entries or number in (0, len(steps) - 1):
            merged.append(Step(step.seq, step.time_ns, step.first, step.last, entries, True, step.undone))
    return merged, dropped


def _has_above(objects: set[tuple[int, bytes]], root: int, path: bytes) -> bool:
    """Whether ``path``, or a directory that it lies in, is one of ``objects``."""
    while (root, path) not in objects:
        if not path:
            return False
        path = path.rpartition(b"/")[0]
    return True
