"""Compare a large tree with the index, directory by directory, without a look at any entry that is as it was.

The index keeps for each entry a mark of all by which a change is noticed, and SQLite adds them up by directories. The
disk is read by machine code in a few threads, which does the same (``fmm.sums``). Where the sums are equal, nothing has
changed in the directory; the others are listed, and their entries looked at one by one.
"""

from __future__ import annotations

import os
import queue
import threading

from farshore.dbm.work import Work
from farshore.fmm.patterns import Filter
from farshore.fmm.scanner import ABSENT
from farshore.fmm.sums import NOTHING, Room, Sum
from farshore.log import Log

_log = Log(__name__)
#: Directories that a thread reads at one go.
_PART = 256
_MOST_THREADS = 4


class Census:
    """One comparison: of the directory ``path`` of root number ``root``, and all below it, for ``work``.

    ``key`` is that of the marks, ``known`` has the sums of all directories that hold anything by the index. What the
    index takes up later is seen as different, and looked at in vain. ``run`` finds ``differing``, the directories to be
    listed, each after those that it lies in, None when that could not be found out; and ``unknown``, those below which
    nothing could be found out. Any thread may call ``stop``.
    """

    def __init__(
        self, root: int, root_path: bytes, path: bytes, filter: Filter, key: int, known: dict[bytes, Sum], work: Work
    ) -> None:
        self.root = root
        self.path = path
        self.work = work
        self.differing: list[bytes] | None = None
        self.unknown: list[bytes] = []
        self._root_path = root_path
        self._filter = filter
        self._key = key
        self._known = known
        self._found: list[bytes] = []
        self._parts: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open_parts = 0
        self._failed = False

    def stop(self) -> None:
        """Have it end soon, without a result."""
        self._failed = True

    def run(self) -> None:
        """Do it; blocks. Raises nothing."""
        try:
            top = os.open(self._root_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            _log.warning("cannot compare by directories; looking at everything", root=self._root_path, reason=error)
            return
        try:
            self._read_all(top)
        finally:
            os.close(top)
        if not self._failed:
            self.differing = sorted(self._found)
        self._known.clear()

    def _read_all(self, top: int) -> None:
        self._hand_out([self.path])
        count = max(1, min(_MOST_THREADS, os.cpu_count() or 1))
        threads = [threading.Thread(target=self._work, args=(top,), name="census", daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, top: int) -> None:
        room = Room()
        while (part := self._parts.get()) is not None:
            try:
                if not self._failed:
                    self._compare(top, part, room)
            except Exception as error:
                self._failed = True
                _log.error("comparing by directories failed", error, root=self._root_path)
            with self._lock:
                self._open_parts -= 1
                if not self._open_parts:
                    for _ in range(_MOST_THREADS):
                        self._parts.put(None)

    def _hand_out(self, paths: list[bytes]) -> None:
        with self._lock:
            self._open_parts += -(-len(paths) // _PART)
        for at in range(0, len(paths), _PART):
            self._parts.put(paths[at : at + _PART])

    def _compare(self, top: int, paths: list[bytes], room: Room) -> None:
        known, allows, plain = self._known, self._filter.allows, self._filter.plain
        below: list[bytes] = []
        for path, (there, names) in zip(
            paths, room.sum_up(top, [path or b"." for path in paths], self._key), strict=True
        ):
            expected = known.get(path, NOTHING)
            if there != expected:
                self._found.append(path)
                if there is None:
                    # Whoever lists it finds out why, but does not go on below it.
                    below += self._directories_in(path)
                    continue
            if expected is NOTHING:
                # New, or filled since: all below it is looked at by whoever lists it.
                continue
            prefix = path + b"/" if path else b""
            children = [prefix + name for name in names]
            below += children if plain else [child for child in children if allows(child, True)]
        if below and not self._failed:
            self._hand_out(below)

    def _directories_in(self, path: bytes) -> list[bytes]:
        """The directories in one that could not be summed up; if it cannot be listed, all below is unknown."""
        try:
            with os.scandir(os.path.join(self._root_path, path)) as entries:
                names = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            if error.errno not in ABSENT:
                self.unknown.append(path)
            return []
        prefix = path + b"/" if path else b""
        return [prefix + name for name in names if self._filter.allows(prefix + name, True)]
