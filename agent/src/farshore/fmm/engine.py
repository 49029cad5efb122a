"""What both engines have in common: the life of a watcher, and the proof that it has seen everything."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from farshore.fmm import kernel
from farshore.fmm.cookies import Cookies
from farshore.fmm.errors import WatchError
from farshore.fmm.mounts import TABLE
from farshore.fmm.protected import GONE, RESCAN, RESCAN_INTERVAL, ROOT_INTERVAL, Protected, check_overlaps, show
from farshore.fmm.types import Counts, Hint
from farshore.log import Log

_log = Log(__name__)
_CHUNK = 1 << 18

R = TypeVar("R", bound=Protected)


class Engine(ABC, Generic[R]):
    """A Watcher (see ``types``) but for how the kernel is asked. ``clock`` is a monotonic clock."""

    #: How a configuration and a status call it; also of its limits in /proc/sys/fs.
    name: ClassVar[str]

    def __init__(self, roots: list[R], cookies: Path | None, clock: Callable[[], float]) -> None:
        self._roots = roots
        self._clock = clock
        self._state = "new"
        #: What the kernel's events are read from, -1 while nothing is watched.
        self._fd = -1
        self._cookies = Cookies(cookies)
        #: Whether changes of our own would be told of.
        self._has_proof = False
        self._trouble: str | None = None
        #: What the log was told of it.
        self._last_trouble = ""
        self._problems: tuple[str, ...] = ()
        self._problems_changed = False
        #: Reasons for which parts of roots are not watched that the log was told.
        self._logged: set[tuple[int, str]] = set()
        self._unwatched = 0
        self._overflows = 0
        self._events = 0
        self._counts = Counts(self.name)
        self._check_now = False
        #: The kernel's table of mounts, which tells by itself when it changes; -1 while nothing is watched.
        self._mount_table = -1
        self._mounts_changed = False
        self._next_check = 0.0
        self._next_rescan = 0.0
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # The Watcher protocol.

    def start(self) -> Sequence[Hint]:
        """Begin to watch; returns a RESCAN hint for each root.

        Raises WatchError when no root can be watched (none exists, say), or one lies in another one; nothing is held
        then. Where some can be, the others are problems, looked at now and then, and watched as soon as they can be.
        """
        if self._state == "closed":
            raise ValueError("the watcher is closed")
        if self._state == "paused":
            return self.resume()
        if self._state == "new":
            check_overlaps(self._roots)
            self._open()
            unwatched = [root for root in self._roots if not root.watched]
            if unwatched and len(unwatched) == len(self._roots):
                first = unwatched[0]
                reason = self._trouble or first.problem or "unknown"
                self._shut()
                self._trouble = None
                self._take()
                raise WatchError(first.path, reason)
            self._state = "running"
            for root in unwatched:
                self._warn_of(root)
        self._doubt_all()
        return self._take()

    def read(self, timeout: float) -> Sequence[Hint]:
        """Hints since the last call; blocks for at most ``timeout`` seconds for the first one."""
        deadline = self._clock() + timeout
        over = False
        while True:
            running = self._state == "running"
            if running:
                self._pump()
            hints = self._take()
            now = self._clock()
            if hints or over or now >= deadline or self._state == "closed":
                return hints
            # Who waits shortly only is not woken for the roots: they are looked at when he comes again.
            until = min(deadline, self._next_check) if running and timeout > ROOT_INTERVAL else deadline
            ready = self._wait(max(0.0, until - now))
            over = self._wake_fd in ready or (not ready and until == deadline)

    def drain(self) -> Sequence[Hint]:
        """Every hint for changes made before the call; returns without waiting for more.

        What cannot be watched at the moment is reported as RESCAN.
        """
        if self._state == "running":
            self._catch_up()
            self._settle_all()
        return self._take()

    def pause(self) -> None:
        """Stop watching and give back the kernel's resources. Idempotent."""
        if self._state == "running":
            self._shut()
            self._state = "paused"
            self._problems = ()
            self._unwatched = 0
            self._note_counts()

    def resume(self) -> Sequence[Hint]:
        """Watch again; returns RESCAN hints that cover the gap. Idempotent.

        A root that cannot be watched any more is a problem, not an error.
        """
        if self._state != "paused":
            return []
        self._open()
        self._state = "running"
        self._doubt_all()
        return self._take()

    def wake(self) -> None:
        """Make a blocked ``read``, or the next one, return at once. Any thread may call it."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Release everything. Idempotent."""
        self._shut()
        self._cookies.close()
        self._state = "closed"
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1

    def problems(self) -> Sequence[str]:
        """What limits the view now, each with its remedy; empty when all is watched.

        As of the end of the last other call; any thread may ask.
        """
        return self._problems

    def counts(self) -> Counts:
        """See Watcher."""
        return self._counts

    # What an engine does its own way.

    @abstractmethod
    def _open(self) -> None:
        """Begin to be told, and watch every root; what stands in the way is trouble, or a problem of a root."""

    @abstractmethod
    def _shut(self) -> None:
        """Stop being told, and forget all that is watched. Idempotent."""

    @abstractmethod
    def _pump(self) -> None:
        """Work off what is queued, up to one buffer, and whatever is due by now."""

    @abstractmethod
    def _digest(self, data: bytes) -> None:
        """Work off the events that were read."""

    @abstractmethod
    def _queued(self) -> float:
        """The bytes that are queued, infinite if that is not known."""

    @abstractmethod
    def _settle_all(self) -> None:
        """Look at all that is in doubt, and report what is not watched."""

    @abstractmethod
    def _unwatched_parts(self) -> dict[tuple[int, str], list[bytes]]:
        """What below the roots cannot be watched: paths, by the number of the root and the reason."""

    @abstractmethod
    def _directories(self) -> int:
        """How many directories are watched."""

    # What they share.

    def _read(self) -> int:
        """Work off one buffer; returns its bytes, 0 when nothing is queued."""
        if self._fd < 0:
            return 0
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return 0
        self._digest(data)
        return len(data)

    def _catch_up(self) -> None:
        """Work off what happened before the call: all that is queued, up to a change of our own."""
        fd = self._fd
        if fd < 0:
            return
        proof = self._has_proof and self._cookies.make()
        left = self._queued()
        while self._fd == fd and (self._cookies.expected if proof else left > 0):
            overflows = self._overflows
            size = self._read()
            if self._overflows > overflows:
                # All is in doubt, and watched anew, perhaps by a descriptor of the same number.
                return
            if not size:
                if proof:
                    # Events are queued before the change that they tell of has returned.
                    _log.error("a change of our own was not told of; looking at everything again", engine=self.name)
                    self._begin_again()
                return
            left -= size

    def _overflow(self) -> None:
        """Events were lost, and with them what was known of the tree."""
        self._overflows += 1
        _log.warning(
            "event queue overflowed; looking at everything again",
            limit=kernel.limit(self.name, "max_queued_events"),
            remedy=f"sysctl -w fs.{self.name}.max_queued_events=N, then farshore pause and farshore resume",
        )
        self._begin_again()

    def _begin_again(self) -> None:
        # What was made before will not be told of.
        self._cookies.expected = b""
        self._shut()
        self._open()
        for root in self._roots:
            root.marks = {b"": root.marks.get(b"", 0) | RESCAN}

    def _doubt_all(self) -> None:
        for root in self._roots:
            root.mark(b"", RESCAN)

    def _cannot_start(self, trouble: str) -> None:
        self._trouble = trouble
        if self._state != "new" and trouble != self._last_trouble:
            # Else whoever starts it is told by a WatchError, at each attempt.
            _log.error("nothing can be watched; it is tried again every second", engine=self.name, reason=trouble)
            self._last_trouble = trouble

    def _has_started(self) -> None:
        self._last_trouble = ""

    def _cannot_watch(self, root: R, reason: str) -> None:
        new, root.problem = root.problem is None, reason
        if new and self._state != "new":
            self._warn_of(root)

    def _warn_of(self, root: R) -> None:
        _log.warning(
            f"root cannot be watched; that is tried every second, and it is looked at every {RESCAN_INTERVAL:g} s",
            path=root.path,
            reason=root.problem,
        )

    def _lost(self, root: R) -> None:
        """It is not where it was."""
        root.problem = GONE
        _log.warning("root is gone; it is looked for every second", path=root.path, remedy="put it back")

    def _open_mount_table(self) -> None:
        """Raises OSError."""
        if self._mount_table < 0:
            self._mount_table = os.open(TABLE, os.O_RDONLY | os.O_CLOEXEC)

    def _close_mount_table(self) -> None:
        if self._mount_table >= 0:
            os.close(self._mount_table)
            self._mount_table = -1
        self._mounts_changed = False

    def _look_at_mounts(self) -> None:
        if self._mount_table >= 0:
            poll = select.poll()
            poll.register(self._mount_table, select.POLLPRI)
            if poll.poll(0):
                self._mounts_changed = self._check_now = True

    def _doubt_lost(self) -> None:
        for root in self._roots:
            if not root.watched:
                root.mark(b"", RESCAN)

    def _take(self) -> list[Hint]:
        if self._problems_changed:
            self._problems_changed = False
            parts = self._unwatched_parts()
            self._problems = self._list_problems(parts)
            for index, reason in parts.keys() - self._logged:
                _log.warning(
                    f"not all is watched; what is not is looked at every {RESCAN_INTERVAL:g} s instead",
                    path=os.path.join(self._roots[index].path, min(parts[index, reason])),
                    directories=len(parts[index, reason]),
                    reason=reason,
                )
            self._logged = set(parts)
            self._unwatched = sum(map(len, parts.values())) + sum(not root.watched for root in self._roots)
        self._note_counts()
        hints: list[Hint] = []
        for root in self._roots:
            if root.marks:
                hints += root.take()
        return hints

    def _note_counts(self) -> None:
        self._counts = Counts(self.name, self._directories(), self._unwatched, self._overflows, self._events)

    def _list_problems(self, parts: dict[tuple[int, str], list[bytes]]) -> tuple[str, ...]:
        found = [] if self._trouble is None else [self._trouble]
        for root in self._roots:
            if root.problem is not None:
                found.append(f"{show(root.path)}: {root.problem}")
        for (index, reason), paths in parts.items():
            first = show(os.path.join(self._roots[index].path, min(paths)))
            what = first if len(paths) == 1 else f"{first} and {len(paths) - 1} more directories"
            found.append(f"{what}: not watched, looked at every {RESCAN_INTERVAL:g} s instead: {reason}")
        return tuple(found)

    def _wait(self, seconds: float) -> set[int]:
        """Wait for events or for ``wake``; the descriptors that are ready."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if self._fd >= 0:
            poll.register(self._fd, select.POLLIN)
        if self._mount_table >= 0:
            poll.register(self._mount_table, select.POLLPRI)
        ready = {fd for fd, _ in poll.poll(seconds * 1000)}
        if self._mount_table in ready:
            # Once told, it is not told again.
            self._mounts_changed = self._check_now = True
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        return ready
