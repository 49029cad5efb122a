"""What the limits of a protected path leave alone: files too large, too young or too old, and other filesystems.

A regular file beyond a limit is neither sent, nor overwritten or removed on the replica. The verdicts are pure; what
lies on another filesystem is looked up (``Boundaries``), and who is too young is remembered until it is old enough
(``Young``).

- Sizes and times are what lstat tells here, or what the replica's copy has when nothing is here any more.
- Ages are of the wall clock, as modification times are. A time in the future is age 0.
- Only directories are asked for their filesystem, as ``rsync -x`` does: on some filesystems, files have device numbers
  of their own. A mount point is kept as an empty directory.
"""

from __future__ import annotations

import heapq
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from farshore.fmm.types import Hint, Kind, Root

_SECOND = 10**9
_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
_DURATIONS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
#: So many files that are too young, or are left alone, are known by name; of more, only that there are more.
MOST_YOUNG = 100_000
MOST_NAMED = 20_000
#: A file that was never old enough for so many times ``min_age``, and so many seconds, is told of.
_LONG = 10
_LONG_SECONDS = 60.0

#: What is at a mount point.
MOUNTED = "is the mount point of another filesystem, which one_filesystem leaves alone; not protected"
#: Why something within the limits is not sent: what the replica has there is left alone.
HOLDS = "the replica has a directory there with files that the limits leave alone; not protected"
OVER = "the replica has a file there that is larger than max_size, and is not overwritten; not protected"
KEPT_MOUNT = "gone here; the replica has another filesystem mounted there, which is kept"
#: Of files that are never as old as ``min_age``.
RESTLESS = "changes again before it is as old as min_age, for long by now; not protected as it is"


@dataclass(frozen=True, slots=True)
class Excess:
    """The ``limit`` that a file is beyond; ``text`` says how, and goes behind its name."""

    limit: Literal["max_size", "min_age", "max_age"]
    text: str


def is_limited(root: Root) -> bool:
    """Whether anything can be left alone."""
    return bool(root.max_size or root.min_age or root.max_age or root.one_filesystem)


def excess(root: Root, size: int, mtime_ns: int, now_ns: int, slack_ns: int = 0) -> Excess | None:
    """The limit that a regular file here is beyond at the wall clock's ``now_ns``, None when there is none such.

    With ``slack_ns``, it counts as too young for so much longer.
    """
    lasting = lasting_excess(root, size, mtime_ns, now_ns)
    if lasting is not None:
        return lasting
    if root.min_age and _age(mtime_ns, now_ns) < root.min_age * _SECOND + slack_ns:
        return Excess("min_age", f"is younger than min_age {_duration(root.min_age)}")
    return None


def lasting_excess(root: Root, size: int, mtime_ns: int, now_ns: int) -> Excess | None:
    """As ``excess``, without that a file is too young, which is no reason to keep a copy of it."""
    if too_large(root, size):
        return Excess("max_size", f"is larger than max_size {_size(root.max_size)}")
    if root.max_age and _age(mtime_ns, now_ns) > root.max_age * _SECOND:
        return Excess("max_age", f"is older than max_age {_duration(root.max_age)}")
    return None


def too_large(root: Root, size: int) -> bool:
    """Whether a file of so many bytes is larger than allowed."""
    return 0 < root.max_size < size


def copy_excess(root: Root, size: int, mtime_ns: int, told_ns: int, now_ns: int) -> Excess | None:
    """The limit that has the replica keep its copy of a file that is gone here; None when the copy goes too.

    ``told_ns``: when the copy was made from what was here, 0 when that is not known. What was within the limits then
    was protected, and is removed as ever, however old it has become.
    """
    return lasting_excess(root, size, mtime_ns, told_ns or now_ns)


def keeps_listed(root: Root, size: int, *, made_here: bool) -> bool:
    """Whether a file of the replica is not even overwritten: too large, and not ``made_here`` from what was here."""
    return not made_here and too_large(root, size)


def seconds_to_wait(root: Root, mtime_ns: int, now_ns: int) -> float:
    """Seconds until a file is as old as ``min_age``: never more than that, whatever its time."""
    return max(0.0, root.min_age - _age(mtime_ns, now_ns) / _SECOND)


def oldest_ns(root: Root, now_ns: int) -> int | None:
    """What was modified before is older than ``max_age``; None when nothing is too old."""
    return now_ns - root.max_age * _SECOND if root.max_age else None


def not_protected(text: str) -> str:
    """What is told of a file that is beyond a limit."""
    return f"{text}; not protected"


def _age(mtime_ns: int, now_ns: int) -> int:
    return max(0, now_ns - mtime_ns)


def _size(count: int) -> str:
    return next(f"{count // unit}{name}" for unit, name in _SIZES if count % unit == 0)


def _duration(seconds: int) -> str:
    return next(f"{seconds // unit}{name}" for unit, name in _DURATIONS if seconds % unit == 0)


class Boundaries:
    """Tells what lies on another filesystem than its root, for roots with ``one_filesystem``. One thread at a time.

    It looks at the disk as it is now, and remembers what it saw until it is to ``forget`` it.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = roots
        self._any = any(root.one_filesystem for root in roots)
        self._seen: dict[tuple[int, bytes], tuple[int, bytes | None]] = {}

    def mount_of(self, root: int, directory: bytes) -> bytes | None:
        """The mount point that a directory is, or lies below; None on the root's filesystem, or if it is not there."""
        if not self._any or not directory or not self._roots[root].one_filesystem:
            return None
        found = self._seen.get((root, directory))
        if found is not None:
            return found[1]
        top = self._look(root, b"")
        if top is None:
            return None
        mount = None
        end = directory.find(b"/")
        while True:
            path = directory if end < 0 else directory[:end]
            known = self._seen.get((root, path))
            if known is None:
                device = top if mount is not None else self._look(root, path)
                if device is None:
                    return mount
                if mount is None and device != top:
                    mount = path
                self._seen[root, path] = device, mount
            else:
                mount = known[1]
            if end < 0:
                return mount
            end = directory.find(b"/", end + 1)

    def forget(self) -> None:
        """See what came since."""
        self._seen.clear()

    def _look(self, root: int, path: bytes) -> int | None:
        """The device of a directory; None when there is none."""
        known = self._seen.get((root, path))
        if known is not None:
            return known[0]
        base = self._roots[root].path
        try:
            # The root's own path may lead through a link, as the administrator named it.
            status = os.lstat(base + b"/" + path) if path else os.stat(base)
        except OSError:
            return None
        if not stat.S_ISDIR(status.st_mode):
            return None
        if not path:
            self._seen[root, path] = status.st_dev, None
        return status.st_dev


#: What tells that a file is as it was: size, modification and change time.
Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Waiting:
    stamp: Stamp
    due: float
    since: float


class Young:
    """Files that are too young to be sent, each to be looked at again when it is old enough. Any thread may call.

    Of a monotonic clock, so that no step of the wall clock, and no file's time in the future, makes any of them wait
    longer than ``min_age`` from when it was seen. When there are too many, all of their root is looked at again.
    """

    def __init__(self, roots: Sequence[Root], most: int = MOST_YOUNG) -> None:
        self._roots = roots
        self._most = most
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, bytes], _Waiting] = {}
        self._queue: list[tuple[float, tuple[int, bytes]]] = []
        #: Told of as due, and not looked at yet.
        self._ripe: dict[tuple[int, bytes], _Waiting] = {}
        #: When a root is to be looked at as a whole.
        self._whole: dict[int, float] = {}

    def must_wait(self, root: int, path: bytes, stamp: Stamp, seconds: float, now: float) -> bool:
        """Whether a file whose age is too low must wait; not when it was seen just so ``min_age`` ago."""
        key = root, path
        with self._lock:
            known = self._waiting.get(key) or self._ripe.pop(key, None)
            if known is not None and known.stamp == stamp and known.due <= now:
                self._waiting.pop(key, None)
                return False
            if known is not None and known.stamp == stamp and key in self._waiting:
                return True
            due = now + seconds
            if known is None and len(self._waiting) >= self._most:
                # By then, all that come until now are old enough.
                self._whole.setdefault(root, now + self._roots[root].min_age)
                return True
            self._waiting[key] = _Waiting(stamp, due, now if known is None else known.since)
            heapq.heappush(self._queue, (due, key))
            if len(self._queue) > 2 * len(self._waiting) + 1024:
                self._queue = [(each.due, key) for key, each in self._waiting.items()]
                heapq.heapify(self._queue)
            return True

    def forget(self, root: int, path: bytes) -> None:
        """It is old enough, or no file any more."""
        with self._lock:
            self._waiting.pop((root, path), None)
            self._ripe.pop((root, path), None)

    def is_waiting(self, root: int, path: bytes) -> bool:
        """Whether a file is too young."""
        with self._lock:
            return (root, path) in self._waiting or (root, path) in self._ripe

    def waits_long(self, root: int, path: bytes, now: float) -> bool:
        """Whether a file was never old enough for a long time, as it changes all the time."""
        with self._lock:
            known = self._waiting.get((root, path))
        return known is not None and now - known.since > max(_LONG * self._roots[root].min_age, _LONG_SECONDS)

    def due(self, now: float) -> list[Hint]:
        """What is to be looked at again now."""
        found = []
        with self._lock:
            while self._queue and self._queue[0][0] <= now:
                due, key = heapq.heappop(self._queue)
                known = self._waiting.get(key)
                if known is not None and known.due == due:
                    self._ripe[key] = self._waiting.pop(key)
                    found.append(Hint(*key, Kind.MODIFIED))
            for root in [root for root, due in self._whole.items() if due <= now]:
                del self._whole[root]
                found.append(Hint(root, b"", Kind.RESCAN))
        return found

    def next_due(self) -> float | None:
        """When something is to be looked at again; None when nothing waits."""
        with self._lock:
            times = [*self._whole.values(), *(due for due, _ in self._queue[:1])]
        return min(times, default=None)


class LeftAlone:
    """What is left alone, with the reasons. One thread changes it; any may ask for ``counts``."""

    def __init__(self, most: int = MOST_NAMED) -> None:
        self._most = most
        self._reasons: dict[tuple[int, bytes], str] = {}
        #: Reasons that more have than are known by name.
        self._more: set[str] = set()

    def note(self, root: int, path: bytes, reason: str | None) -> None:
        """Why ``path`` is left alone; None when it is not."""
        if reason is None:
            self._reasons.pop((root, path), None)
        elif len(self._reasons) < self._most or (root, path) in self._reasons:
            self._reasons[root, path] = reason
        else:
            self._more.add(reason)

    def why(self, root: int, path: bytes) -> str | None:
        """Why ``path`` is left alone, as far as it is known."""
        return self._reasons.get((root, path))

    def forget_below(self, root: int, path: bytes) -> None:
        """Nothing is at ``path`` any more, nor below it."""
        below = path + b"/"
        for key in [key for key in self._reasons if key[0] == root and (key[1] == path or key[1].startswith(below))]:
            del self._reasons[key]

    def forget_more(self) -> None:
        """All is looked at again, and told anew."""
        self._more.clear()

    def counts(self) -> list[tuple[str, int, tuple[int, bytes] | None, bool]]:
        """By reason, how many there are, one of them, and whether there are more than that."""
        found: dict[str, tuple[int, tuple[int, bytes] | None]] = {}
        for key, reason in list(self._reasons.items()):
            count, example = found.get(reason, (0, key))
            found[reason] = count + 1, example
        more = set(self._more)
        for reason in more:
            found.setdefault(reason, (0, None))
        return [(reason, count, example, reason in more) for reason, (count, example) in found.items()]
