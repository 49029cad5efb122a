"""Files that are written through shared mappings, of which the kernel reports nothing until they are unmapped.

Who has such a mapping is told by /proc/PID/maps (proc(5)); whose memory has the size that it had is mostly not asked
again. The first write to a page since it was written back sets the file's modification time, on all filesystems that
have a disk; so that is looked at every second. Further writes to the same page change nothing that stat tells, and on
filesystems in memory none does: so the content is compared now and then as well, at a pace that costs little.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
#: So long a caller waits for a search; one that takes so much longer is a problem.
_WAIT_SECONDS = 5.0
_LONG_SECONDS = 30.0
#: Every so many searches, all processes are asked.
_THOROUGH = 5
#: A content is compared after so many seconds, and so many more for each byte, while the file was written lately.
_CONTENT_SECONDS = 8.0
_CONTENT_SECONDS_PER_BYTE = 1 / 50e6
#: So long after its time has changed, the kernel has written a page back for certain, and the next write sets it again.
_RESTED_SECONDS = 600.0
_CAP_SYS_PTRACE = 19
#: What a thread of the kernel has, and there may be a thousand of these: only when all are asked, they are again.
_NO_MEMORY = b"0"
_UNTIMED = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})

#: A shared mapping that may be written; device, inode and path.
_WRITABLE = re.compile(
    rb"^[0-9a-f-]+ [r-]w[x-]s [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+) ([1-9][0-9]*) +(/[^\n]*)$", re.MULTILINE
)
_SHARED = b"s "

#: Device, inode and path: two subvolumes of a Btrfs share the first two.
_Key = tuple[bytes, bytes, bytes]
#: Where paths are whose filesystem is not told.
_NOWHERE = mounts.Mount((0, 0), b"/", b"/", "")


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


@dataclass
class _Search:
    """A search of all processes: the one that is being asked, and what came of it when it is ``done``."""

    started: float
    process: bytes = b""
    files: dict[_Key, _File] = field(default_factory=dict)
    denied: int = 0
    seconds: float = 0.0
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Mapped:
    """Finds the mapped files of ``roots``, and reports when they have, or may have, changed.

    ``clock`` is a monotonic clock, ``proc`` where the processes are told of. For one thread; ``problem`` and ``count``
    may be read by any. Processes are searched in a thread of its own, as one that hangs, or whose filesystem does, may
    never answer; without ``threaded`` that is done at once.
    """

    def __init__(
        self,
        roots: Sequence[Root],
        *,
        clock: Callable[[], float] = time.monotonic,
        proc: Path = Path("/proc"),
        threaded: bool = True,
    ) -> None:
        self._roots = [(index, root, Filter(root)) for index, root in enumerate(roots)]
        self._clock = clock
        self._proc = os.fsencode(proc)
        self._threaded = threaded
        self._files: dict[_Key, _File] = {}
        self._own = b"%d" % os.getpid()
        self._next_look = self._next_find = float("-inf")
        self._search: _Search | None = None
        #: By process, the size of its memory, and the mappings that it had. Of the search that is under way.
        self._told: dict[bytes, tuple[bytes, list[_Key]]] = {}
        self._searches = 0
        #: Why some may be missed, "" when none are.
        self.problem = ""

    @property
    def count(self) -> int:
        """How many files are mapped, by the last search."""
        return len(self._files)

    def look(self, *, all_now: bool = False) -> list[Hint]:
        """What has to be looked at by now; with ``all_now``, every file that is mapped at this moment.

        For these it waits some seconds at most, and says in ``problem`` when they could not be found; then it returns
        those that are known.
        """
        now = self._clock()
        if now < self._next_look and not all_now:
            return []
        self._next_look = now + _LOOK_SECONDS
        found = self._collect()
        if all_now:
            found += self._find_now(now)
        elif self._search is None and now >= self._next_find:
            self._begin(now, thorough=False)
            found += self._collect()
        elif self._search is not None and now - self._search.started > _LONG_SECONDS:
            self._note_hanging(self._search)
        for file in self._files.values():
            if self._is_due(file, now) or all_now:
                file.compared = now
                found.append(file.hint)
        return list(dict.fromkeys(found))

    def _find_now(self, now: float) -> list[Hint]:
        found: list[Hint] = []
        deadline = time.monotonic() + _WAIT_SECONDS
        # One that is under way may have asked already those that have mapped something since.
        for fresh in (False, True):
            if fresh:
                self._begin(now, thorough=True)
            search = self._search
            if search is None:
                continue
            known = bool(self.problem) and now - search.started > _WAIT_SECONDS
            if not search.done.wait(0 if known else max(0.0, deadline - time.monotonic())):
                self._note_hanging(search)
                break
            found += self._collect()
        return found

    def _begin(self, now: float, thorough: bool) -> None:
        search = self._search = _Search(now)
        self._searches += 1
        if thorough or self._searches % _THOROUGH == 0:
            self._told = {}
        if not self._threaded:
            self._run(search, self._files)
            return
        try:
            threading.Thread(target=self._run, args=(search, self._files), name="mapped", daemon=True).start()
        except RuntimeError as error:
            search.error = error
            search.done.set()

    def _run(self, search: _Search, before: dict[_Key, _File]) -> None:
        try:
            self._find(search, before)
        except Exception as error:
            search.error = error
        search.seconds = self._clock() - search.started
        search.done.set()

    def _collect(self) -> list[Hint]:
        """Take over what a search that is done has found; returns the hints of files that are not mapped any more."""
        search = self._search
        if search is None or not search.done.is_set():
            return []
        self._search = None
        self._next_find = search.started + min(_FIND_SECONDS[1], max(_FIND_SECONDS[0], search.seconds / _FIND_SHARE))
        if search.error is not None:
            self._tell(f"the search for mapped files failed: {search.error}")
            return []
        before, self._files = self._files, search.files
        self._note(search.denied)
        # The kernel reports the end of a mapping, but not of one in a file that others have open still.
        return [file.hint for key, file in before.items() if key not in search.files]

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

    def _find(self, search: _Search, before: dict[_Key, _File]) -> None:
        told, self._told = self._told, {}
        places = _Places(self._roots)
        for process in os.listdir(self._proc):
            if not process.isdigit() or process == self._own:
                continue
            search.process = process
            last = told.get(process)
            if last is not None and last[0] == _NO_MEMORY:
                self._told[process] = last
                continue
            try:
                size = self._read(process, b"statm").split(b" ", 1)[0]
                if size == _NO_MEMORY:
                    mappings = []
                elif last is not None and last[0] == size:
                    mappings = last[1]
                else:
                    mappings = self._mappings(process)
            except PermissionError:
                search.denied += 1
                continue
            except OSError:
                continue
            self._told[process] = size, mappings
            for key in mappings:
                if key in search.files:
                    continue
                device, inode, name = key
                path = name.replace(rb"\012", b"\n")
                mount = places.of(_device(device), path)
                # Another's filesystem may not answer: it is not even asked.
                if mount is None:
                    continue
                known = before.get(key)
                if known is not None and _has_inode(known.where, int(inode)):
                    search.files[key] = known
                    continue
                file = self._resolve(process, int(inode), path, places, mount, search.started)
                if file is not None:
                    search.files[key] = file

    def _mappings(self, process: bytes) -> list[_Key]:
        text = self._read(process, b"maps")
        return _WRITABLE.findall(text) if _SHARED in text else []

    def _read(self, process: bytes, name: bytes) -> bytes:
        with open(os.path.join(self._proc, process, name), "rb", buffering=0) as file:
            return file.read()

    def _resolve(
        self, process: bytes, inode: int, path: bytes, places: _Places, mount: mounts.Mount, now: float
    ) -> _File | None:
        """What is to be looked at, if the file may be protected: its path or, where that is another's, its inode."""
        untimed = mount.kind in _UNTIMED
        status = _status(path) if places.is_on(path, mount) else None
        if status is not None and status.st_ino == inode:
            for place in places.roots:
                for top in place.tops:
                    if _lies_in(path, top):
                        below = path[len(top.rstrip(b"/")) + 1 :]
                        if below and not place.filter.allows(below, False):
                            return None
                        return _file(path, Hint(place.index, below, Kind.MODIFIED), untimed, now)
            if status.st_nlink == 1 and not places.shows(path) and os.path.realpath(path) == path:
                return None
        # In a container, behind a link, or under another name.
        where = os.path.join(self._proc, process, b"root") + path
        status = _status(where)
        if status is None or status.st_ino != inode:
            return None
        for place in places.roots:
            if mount.device in place.devices:
                hint = Hint(place.index, b"", Kind.ATTRIBUTES, (status.st_dev, inode))
                return _file(where, hint, untimed, now)
        return None

    def _note_hanging(self, search: _Search) -> None:
        process = f"; process {search.process.decode()} is being asked" if search.process else ""
        self._tell(f"the search for mapped files does not end{process}; what is written through them may be missed")

    def _note(self, denied: int) -> None:
        # Whoever runs it for his own files sees his own processes only, and need not be told; nor is there anything to
        # be done where even the right to trace does not help.
        problem = ""
        if denied and os.geteuid() == 0 and not _may_trace():
            problem = (
                f"files that {denied} processes write through mappings are seen only when they are closed: "
                "/proc/PID/maps is closed to the agent; give it CAP_SYS_PTRACE"
            )
        self._tell(problem)

    def _tell(self, problem: str) -> None:
        if problem and not self.problem:
            _log.warning("mapped files are not all seen", reason=problem)
        self.problem = problem


@dataclass(frozen=True)
class _Place:
    """A root: its paths, as it is named and as it is, and the filesystems that it and the mounts below it are of."""

    index: int
    filter: Filter
    tops: tuple[bytes, ...]
    devices: frozenset[tuple[int, int]]


class _Places:
    """Where the roots are by now. Raises OSError when the kernel does not tell what is mounted."""

    def __init__(self, roots: Sequence[tuple[int, Root, Filter]]) -> None:
        table = mounts.table()
        self._filesystems = {mount.device: mount for mount in table}
        # The last one of those at the same place is on top.
        self._points = {mount.point: mount for mount in table}
        self.roots: list[_Place] = []
        #: What the roots hold, as directories of filesystems.
        self._inner: set[tuple[tuple[int, int], bytes]] = set()
        for index, root, filter in roots:
            real = os.path.realpath(root.path)
            inner = {self._inside(real)}
            if not root.one_filesystem:
                inner |= {(mount.device, mount.inner) for mount in table if _lies_in(mount.point, real)}
            self._inner |= inner
            tops = tuple(dict.fromkeys((root.path.rstrip(b"/") or b"/", real)))
            self.roots.append(_Place(index, filter, tops, frozenset(device for device, _ in inner)))
        self._devices = {device for place in self.roots for device in place.devices}

    def of(self, device: tuple[int, int], path: bytes) -> mounts.Mount | None:
        """A mount of the filesystem that is told to hold a file; None where that can be in no root."""
        if device in self._devices:
            return self._filesystems.get(device)
        # Some kernels tell of the layer that holds the file.
        if any(_lies_in(path, top) for place in self.roots for top in place.tops):
            mount = self._at(path)
            return mount if mount.kind == "overlay" else None
        return None

    def is_on(self, path: bytes, mount: mounts.Mount) -> bool:
        """Whether a path of ours is on the same filesystem."""
        return self._at(path).device == mount.device

    def shows(self, path: bytes) -> bool:
        """Whether what a real path names may be in a root, by another mount."""
        device, inner = self._inside(path)
        return any(device == other and _lies_in(inner, top) for other, top in self._inner)

    def _inside(self, real: bytes) -> tuple[tuple[int, int], bytes]:
        mount = self._at(real)
        below = real[len(mount.point.rstrip(b"/")) :]
        return mount.device, (mount.inner.rstrip(b"/") + below.rstrip(b"/")) or b"/"

    def _at(self, path: bytes) -> mounts.Mount:
        while path not in self._points and path != b"/":
            path = path.rpartition(b"/")[0] or b"/"
        return self._points.get(path, _NOWHERE)


def _lies_in(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(top.rstrip(b"/") + b"/")


def _device(text: bytes) -> tuple[int, int]:
    major, _, minor = text.partition(b":")
    return int(major, 16), int(minor, 16)


def _file(where: bytes, hint: Hint, untimed: bool, now: float) -> _File | None:
    status = _status(where)
    if status is None:
        return None
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
