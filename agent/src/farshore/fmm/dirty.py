"""The set of paths that may have changed and are not yet durable on the other side."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from farshore.fmm.types import Hint, Inode, Kind

_Key = tuple[int, bytes]
#: So many files of several names are remembered for one path; after that everything below its root is in doubt.
MOST_INODES = 64
#: As many when they were found while the path was looked at, or are mapped.
MOST_INODES_LATER = 50_000
_NONE: frozenset[Inode] = frozenset()


@dataclass(frozen=True, slots=True)
class Dirty:
    """One path to look at. ``since`` and ``mark_no`` are those of its first mark since it was last taken.

    ``inodes`` are those of the hints.
    """

    root: int
    path: bytes
    kind: Kind
    since: float
    mark_no: int
    inodes: frozenset[Inode] = frozenset()


@dataclass(frozen=True, slots=True)
class Wait:
    """What a path waits for: its own mark, or the rescan of ``at``, a directory above; ``taken``: it is in flight."""

    since: float
    at: bytes
    taken: bool


class _Entry:
    __slots__ = ("bits", "inodes", "mark_no", "since")

    def __init__(self, bits: int, since: float, mark_no: int) -> None:
        self.bits = bits
        self.since = since
        self.mark_no = mark_no
        self.inodes: set[Inode] | frozenset[Inode] = _NONE

    def remember(self, inodes: Collection[Inode]) -> None:
        if inodes:
            # Most entries have none, and need no set of their own.
            if not isinstance(self.inodes, set):
                self.inodes = set()
            self.inodes.update(inodes)


class DirtySet:
    """Coalesces hints per path, remembers how long each waits, and gives them out oldest first.

    A path that was taken is in flight until it is settled (durable on the other side) or restored
    (sending failed); it keeps its age meanwhile. A mark that arrives while it is in flight makes a
    new entry with its own age. All methods are safe to call from any thread. Times are seconds of
    one monotonic clock, the caller's; a time earlier than one seen before is taken as that one.

    A RESCAN does not swallow marks below it: walking a large directory may take hours, and a file
    that changed just now must not wait for that.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._dirty: dict[_Key, _Entry] = {}
        self._queue: list[tuple[int, _Key]] = []
        self._flight: dict[int, Dirty] = {}
        # Every mark number that is waiting or in flight, with its time. Numbers are given out in
        # growing order, so the first one alive in _order is the lowest.
        self._alive: dict[int, float] = {}
        self._order: deque[int] = deque()
        self._next = 1
        self._latest = float("-inf")

    def mark(self, hints: Iterable[Hint], now: float) -> None:
        """Remember ``hints``, marked at ``now``."""
        with self._changed:
            now = self._latest = max(now, self._latest)
            for hint in hints:
                entry = self._entry((hint.root, hint.path), hint.kind, now)
                if hint.inode is not None:
                    entry.remember((hint.inode,))
                    # Files that are mapped are told of by the root; a scan would not compare their contents.
                    by_root = not hint.path and hint.kind == Kind.ATTRIBUTES
                    if len(entry.inodes) > (MOST_INODES_LATER if by_root else MOST_INODES):
                        entry.inodes = set()
                        self._entry((hint.root, b""), Kind.RESCAN, now)
            if self._dirty:
                self._changed.notify_all()

    def take(self, limit: int) -> list[Dirty]:
        """Remove up to ``limit`` paths, the oldest first, but each after its own dirty ancestors.

        The oldest path always comes along, with all of its dirty ancestors, even where that exceeds
        ``limit``: so none waits for ever. What is returned is in flight.
        """
        taken: list[Dirty] = []
        with self._changed:
            while self._dirty and len(taken) < limit:
                number, key = self._queue[0]
                if not self._is_waiting(number, key):
                    heapq.heappop(self._queue)
                    continue
                chain = self._ancestors(key)
                if taken and len(taken) + len(chain) + 1 > limit:
                    break
                heapq.heappop(self._queue)
                for each in (*chain, key):
                    taken.append(self._launch(each))
        return taken

    def restore(self, items: Iterable[Dirty]) -> None:
        """Put back what was taken, as old as it was; what is not in flight is ignored."""
        with self._changed:
            for item in items:
                if self._flight.pop(item.mark_no, None) is None:
                    continue
                key = (item.root, item.path)
                entry = self._dirty.get(key)
                if entry is None:
                    entry = self._dirty[key] = _Entry(item.kind.value, item.since, item.mark_no)
                else:
                    entry.bits |= item.kind.value
                    entry.since = min(entry.since, item.since)
                    del self._alive[max(entry.mark_no, item.mark_no)]
                    entry.mark_no = min(entry.mark_no, item.mark_no)
                heapq.heappush(self._queue, (entry.mark_no, key))
                entry.remember(item.inodes)
                if len(entry.inodes) > MOST_INODES_LATER:
                    entry.inodes = set()
                    self._entry((item.root, b""), Kind.RESCAN, self._latest)
            self._tidy()
            if self._dirty:
                self._changed.notify_all()

    def settle(self, items: Iterable[Dirty]) -> None:
        """Forget what was taken: it is durable. What is not in flight is ignored."""
        with self._changed:
            for item in items:
                if self._flight.pop(item.mark_no, None) is not None:
                    del self._alive[item.mark_no]
            self._tidy()

    def oldest(self) -> float | None:
        """When the oldest change that waits or is in flight was marked; None when there is none."""
        with self._changed:
            lowest = self._lowest()
            return None if lowest is None else self._alive[lowest]

    def count(self) -> int:
        """How many paths wait, plus how many are in flight."""
        with self._changed:
            return len(self._alive)

    def held(self, paths: Iterable[_Key]) -> set[_Key]:
        """Which of ``paths`` wait or are in flight, themselves or by the rescan of a directory above."""
        with self._changed:
            exact = set(self._dirty)
            above = {key for key, entry in self._dirty.items() if entry.bits & Kind.RESCAN.value}
            for item in self._flight.values():
                exact.add((item.root, item.path))
                if Kind.RESCAN in item.kind:
                    above.add((item.root, item.path))
        return {key for key in paths if key in exact or (above and _lies_in(key, above))}

    def waits_below(self, mark: int) -> bool:
        """Whether a path waits that was marked before ``mark`` was the next number."""
        with self._changed:
            queue = self._queue
            while queue and not self._is_waiting(*queue[0]):
                heapq.heappop(queue)
            return bool(queue) and queue[0][0] < mark

    def waits(self, root: int, path: bytes) -> Wait | None:
        """Since when, and why, ``path`` may have changed; None when it was not marked, or is settled."""
        with self._changed:
            exact = [Wait(self._dirty[root, path].since, path, False)] if (root, path) in self._dirty else []
            above: list[Wait] = []
            for item in self._flight.values():
                if item.root == root and item.path == path:
                    exact.append(Wait(item.since, path, True))
                elif item.root == root and Kind.RESCAN in item.kind and _is_below(path, item.path):
                    above.append(Wait(item.since, item.path, True))
            here = path
            while here:
                here = here.rpartition(b"/")[0]
                entry = self._dirty.get((root, here))
                if entry is not None and entry.bits & Kind.RESCAN.value:
                    above.append(Wait(entry.since, here, False))
        return min(exact or above, key=lambda wait: wait.since, default=None)

    def count_below(self, root: int, path: bytes) -> int:
        """How many paths below a directory wait or are in flight."""
        with self._changed:
            found = {key for key in self._dirty if key[0] == root and _is_below(key[1], path)}
            found |= {
                (item.root, item.path)
                for item in self._flight.values()
                if item.root == root and _is_below(item.path, path)
            }
        return len(found)

    def waiting(self) -> int:
        """How many paths wait."""
        with self._changed:
            return len(self._dirty)

    def lowest_mark(self) -> int | None:
        """The lowest mark number that waits or is in flight; None when there is none.

        All marks made before a call of ``next_mark`` are settled when this is None or not below
        what that call returned.
        """
        with self._changed:
            return self._lowest()

    def next_mark(self) -> int:
        """The number that the next mark will get."""
        with self._changed:
            return self._next

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until there is something to take; tells whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._dirty), timeout)

    def _entry(self, key: _Key, kind: Kind, now: float) -> _Entry:
        """Mark a path; every mark uses up a number."""
        number = self._next
        self._next = number + 1
        entry = self._dirty.get(key)
        if entry is not None:
            entry.bits |= kind.value
            return entry
        entry = self._dirty[key] = _Entry(kind.value, now, number)
        self._alive[number] = now
        self._order.append(number)
        heapq.heappush(self._queue, (number, key))
        return entry

    def _is_waiting(self, number: int, key: _Key) -> bool:
        """False for what _queue still holds of an entry that is gone."""
        entry = self._dirty.get(key)
        return entry is not None and entry.mark_no == number

    def _lowest(self) -> int | None:
        order = self._order
        while order and order[0] not in self._alive:
            order.popleft()
        return order[0] if order else None

    def _tidy(self) -> None:
        # What _queue and _order hold of entries that are gone is skipped when it comes to the front;
        # behind an old entry that nobody can deliver it would pile up.
        if len(self._queue) > 2 * len(self._dirty) + 1024:
            self._queue = [(entry.mark_no, key) for key, entry in self._dirty.items()]
            heapq.heapify(self._queue)
        if len(self._order) > 2 * len(self._alive) + 1024:
            self._order = deque(sorted(self._alive))

    def _ancestors(self, key: _Key) -> list[_Key]:
        root, path = key
        found = []
        while path:
            path = path.rpartition(b"/")[0]
            if (root, path) in self._dirty:
                found.append((root, path))
        found.reverse()
        return found

    def _launch(self, key: _Key) -> Dirty:
        entry = self._dirty.pop(key)
        item = Dirty(key[0], key[1], Kind(entry.bits), entry.since, entry.mark_no, frozenset(entry.inodes))
        self._flight[item.mark_no] = item
        return item


def _is_below(path: bytes, directory: bytes) -> bool:
    return path != directory and (not directory or path.startswith(directory + b"/"))


def _lies_in(key: _Key, directories: set[_Key]) -> bool:
    root, path = key
    while (root, path) not in directories:
        if not path:
            return False
        path = path.rpartition(b"/")[0]
    return True
