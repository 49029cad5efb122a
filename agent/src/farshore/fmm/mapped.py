"""Files that are written through shared mappings, of which the kernel reports nothing until they are unmapped.

Who has such a mapping is told by /proc/PID/maps (proc(5)); whose memory has the size that it had is mostly not asked
again. The first write to a page since it was written back sets the
file's modification time, on all filesystems that have a disk; so that is looked at every second. Further writes to the
same page change nothing that stat tells, and on filesystems in memory none does: so the content is compared now and
then as well, at a pace that costs little.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from farshore.fmm import mounts
from farshore.fmm.patterns import Filter
from farshore.fmm.types import Hint, Kind, Root
from farshore.log import Log

_log = Log(__name__)

#: Seconds between looks at the files, and between searches for them: these take so much longer the more they cost.
_LOOK_SECONDS = 1.0
_FIND_SECONDS = (4.0, 20.0)
_FIND_SHARE = 1 / 2500
#: Every so many searches, all processes are asked.
_THOROUGH = 5
#: A content is compared after so many seconds, and so many more for each byte, while the file was written lately.
_CONTENT_SECONDS = 8.0
_CONTENT_SECONDS_PER_BYTE = 1 / 50e6
#: So long after its time has changed, the kernel has written a page back for certain, and the next write sets it again.
_RESTED_SECONDS = 600.0
_CAP_SYS_PTRACE = 19
_UNTIMED = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})

#: A shared mapping that may be written; device, inode and path.
_WRITABLE = re.compile(
    rb"^[0-9a-f-]+ [r-]w[x-]s [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+) ([1-9][0-9]*) +(/[^\n]*)$", re.MULTILINE
)
_SHARED = b"s "


@dataclass
class _File:
    """One mapped file: how to look at it, and what to report. ``changed`` and ``compared`` are of our clock."""

    where: bytes
    hint: Hint
    untimed: bool
    state: tuple[int, int]
    changed: float
    compared: float
    size: int


class Mapped:
    """Finds the mapped files of ``roots``, and reports when they have, or may have, changed.

    ``clock`` is a monotonic clock, ``proc`` where the processes are told of. For one thread; ``problem`` and ``count``
    may be read by any.
    """

    def __init__(
        self, roots: Sequence[Root], *, clock: Callable[[], float] = time.monotonic, proc: Path = Path("/proc")
    ) -> None:
        self._roots = [(index, root.path.rstrip(b"/"), Filter(root)) for index, root in enumerate(roots)]
        self._clock = clock
        self._proc = os.fsencode(proc)
        self._files: dict[tuple[bytes, bytes], _File] = {}
        self._own = b"%d" % os.getpid()
        self._next_look = self._next_find = float("-inf")
        #: By process, the size of its memory, and the mappings that it had.
        self._told: dict[bytes, tuple[bytes, list[tuple[bytes, bytes, bytes]]]] = {}
        self._searches = 0
        #: Why some may be missed, "" when none are.
        self.problem = ""

    @property
    def count(self) -> int:
        """How many files are mapped, by the last search."""
        return len(self._files)

    def look(self, *, all_now: bool = False) -> list[Hint]:
        """What has to be looked at by now; with ``all_now``, every file that is mapped at this moment."""
        now = self._clock()
        if now < self._next_look and not all_now:
            return []
        self._next_look = now + _LOOK_SECONDS
        found = []
        if now >= self._next_find or all_now:
            found = self._find(now, thorough=all_now)
        for file in self._files.values():
            if self._is_due(file, now) or all_now:
                file.compared = now
                found.append(file.hint)
        return list(dict.fromkeys(found))

    def _is_due(self, file: _File, now: float) -> bool:
        status = _status(file.where)
        if status is not None and (status.st_mtime_ns, status.st_size) != file.state:
            file.state = (status.st_mtime_ns, status.st_size)
            file.changed, file.size = now, status.st_size
            return True
        pause = _CONTENT_SECONDS + file.size * _CONTENT_SECONDS_PER_BYTE
        if not file.untimed and now - file.changed > _RESTED_SECONDS:
            pause = max(pause, _RESTED_SECONDS)
        return now - file.compared >= pause

    def _find(self, now: float, thorough: bool) -> list[Hint]:
        """Search all processes; returns the hints of files that are not mapped any more."""
        before, self._files = self._files, {}
        told, self._told = self._told, {}
        self._searches += 1
        if thorough or self._searches % _THOROUGH == 0:
            told = {}
        denied = 0
        kinds: dict[int, str] | None = None
        for process in os.listdir(self._proc):
            if not process.isdigit() or process == self._own:
                continue
            try:
                size = self._read(process, b"statm").split(b" ", 1)[0]
                last = told.get(process)
                mappings = last[1] if last is not None and last[0] == size else self._mappings(process)
            except PermissionError:
                denied += 1
                continue
            except OSError:
                continue
            self._told[process] = size, mappings
            for device, inode, path in mappings:
                key = (device, inode)
                if key in self._files:
                    continue
                known = before.pop(key, None)
                if known is not None and _has_inode(known.where, int(inode)):
                    self._files[key] = known
                    continue
                kinds = mounts.kinds() if kinds is None else kinds
                file = self._resolve(process, int(inode), path.replace(rb"\012", b"\n"), kinds, now)
                if file is not None:
                    self._files[key] = file
        self._next_find = now + min(_FIND_SECONDS[1], max(_FIND_SECONDS[0], (self._clock() - now) / _FIND_SHARE))
        self._note(denied)
        # The kernel reports the end of a mapping, but not of one in a file that others have open still.
        return [file.hint for file in before.values()]

    def _mappings(self, process: bytes) -> list[tuple[bytes, bytes, bytes]]:
        text = self._read(process, b"maps")
        return _WRITABLE.findall(text) if _SHARED in text else []

    def _read(self, process: bytes, name: bytes) -> bytes:
        with open(os.path.join(self._proc, process, name), "rb", buffering=0) as file:
            return file.read()

    def _resolve(self, process: bytes, inode: int, path: bytes, kinds: dict[int, str], now: float) -> _File | None:
        """What is to be looked at, if the file may be protected: its path or, where that is another's, its inode."""
        status = _status(path)
        if status is not None and status.st_ino == inode:
            for index, root, filter in self._roots:
                if path == root or path.startswith(root + b"/"):
                    below = path[len(root) + 1 :]
                    if below and not filter.allows(below, False):
                        return None
                    return _file(path, Hint(index, below, Kind.MODIFIED), kinds, now)
            if status.st_nlink == 1 and os.path.realpath(path) == path:
                return None
        # In a container, behind a link, or under another name.
        where = os.path.join(self._proc, process, b"root") + path
        status = _status(where)
        if status is None or status.st_ino != inode:
            return None
        for index, root, _ in self._roots:
            top = _status(root)
            if top is not None and top.st_dev == status.st_dev:
                hint = Hint(index, b"", Kind.ATTRIBUTES, (status.st_dev, inode))
                return _file(where, hint, kinds, now)
        return None

    def _note(self, denied: int) -> None:
        # Whoever runs it for his own files sees his own processes only, and need not be told; nor is there anything to
        # be done where even the right to trace does not help.
        problem = ""
        if denied and os.geteuid() == 0 and not _may_trace():
            problem = (
                f"files that {denied} processes write through mappings are seen only when they are closed: "
                "/proc/PID/maps is closed to the agent; give it CAP_SYS_PTRACE"
            )
        if problem and not self.problem:
            _log.warning("mapped files are not all seen", reason=problem)
        self.problem = problem


def _file(where: bytes, hint: Hint, kinds: dict[int, str], now: float) -> _File | None:
    status = _status(where)
    if status is None:
        return None
    untimed = kinds.get(status.st_dev) in _UNTIMED
    # Reported at once: it may have been written to for long.
    state = (status.st_mtime_ns, status.st_size)
    return _File(where, hint, untimed, state, now, float("-inf"), status.st_size)


def _may_trace() -> bool:
    """Whether this process has CAP_SYS_PTRACE (capabilities(7))."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(mask >> _CAP_SYS_PTRACE & 1)


def _status(path: bytes) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _has_inode(path: bytes, inode: int) -> bool:
    status = _status(path)
    return status is not None and status.st_ino == inode
