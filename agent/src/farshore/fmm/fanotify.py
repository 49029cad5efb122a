"""The fanotify engine: one mark for a whole filesystem, instead of a watch for each directory.

An event names the directory by the filesystem's own handle, for which the path that leads to it now is found, and the
entry in it. So new directories need nobody's attention, and nothing is missed in them. The price is that all that
happens on the filesystem is told, and is to be thrown away where it is not protected.

How hints stay true, although an event tells of the past and its path is that of now:

- Paths of directories are remembered until a directory is renamed. That event names the old place and the new one, and
  both are reported as RESCAN: whatever was resolved to the one or to the other meanwhile, all of it is looked at.
- What happened in a directory that is gone since needs no path: its own removal, or its move out of the tree, is an
  event of the directory above.
- A mark dies with the filesystem that is unmounted. The kernel's list of marks tells; then the filesystem that lies
  there now is marked, and everything on it is in doubt.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from farshore.fmm import fan, mounts
from farshore.fmm.engine import Engine
from farshore.fmm.patterns import STAGING
from farshore.fmm.protected import (
    OTHER_FILESYSTEM,
    PARENT,
    REMEDIES,
    RESCAN,
    RESCAN_INTERVAL,
    ROOT_INTERVAL,
    Protected,
    show,
)
from farshore.fmm.scanner import ABSENT
from farshore.fmm.types import Kind, Root
from farshore.log import Log

log = Log(__name__)

_EVENTS = fan.CREATE | fan.DELETE | fan.RENAME | fan.MODIFY | fan.ATTRIB | fan.CLOSE_WRITE
_ENTRY = fan.CREATE | fan.DELETE
# Not O_PATH: handles cannot be opened through such a descriptor.
_HANDLE = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_IS_GONE = ABSENT | {errno.ESTALE}
#: Paths of directories that are remembered, most of them of such as are not protected.
_MOST_PATHS = 200_000

_REMEDIES = REMEDIES | {
    errno.EPERM: "not permitted; give the agent CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH, or let inotify watch",
    errno.EINVAL: "this kernel is too old for it (Linux 5.17 is needed); let inotify watch",
    errno.ENOSYS: "this kernel, or its C library, does not have it; let inotify watch",
    errno.ENODEV: "this filesystem cannot be watched as a whole; let inotify watch",
    errno.EOPNOTSUPP: "this filesystem has no file handles; let inotify watch",
    errno.EXDEV: "this subvolume cannot be watched as a whole; let inotify watch",
    errno.ENOTDIR: "it is mounted on a single file",
    errno.EMFILE: "too many open files, or groups of fanotify; raise LimitNOFILE of the unit, or the limit: "
    "sysctl -w fs.fanotify.max_user_groups=1024",
}

_KINDS = {
    fan.CREATE: Kind.CREATED,
    fan.DELETE: Kind.DELETED,
    fan.MODIFY: Kind.MODIFIED,
    # A file written through a mapping reports nothing until it is unmapped and so finally closed.
    fan.CLOSE_WRITE: Kind.MODIFIED,
    fan.ATTRIB: Kind.ATTRIBUTES,
    fan.ACCESS: Kind.ATTRIBUTES,
}
_FROM: int = Kind.MOVED_FROM.value
_TO: int = Kind.MOVED_TO.value


class _Bits(dict[int, int]):
    """From an event's mask to the kinds of a hint; the kernel joins several events of one name."""

    def __missing__(self, mask: int) -> int:
        bits = 0
        for one, kind in _KINDS.items():
            if mask & one:
                bits |= kind.value
        self[mask] = bits or Kind.ATTRIBUTES.value
        return self[mask]


_BITS = _Bits()

#: Where a directory lies: in which roots, each with the beginning of the paths of what it holds; None: the root is a
#: single file in it.
_Places = tuple[tuple[Protected, bytes | None], ...]


def why_not(roots: Sequence[Root]) -> str:
    """Why the engine cannot watch ``roots`` on this machine; "" when it can."""
    try:
        group = fan.create()
    except OSError as error:
        return _reason(error)
    try:
        for root in roots:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path = _directory_of(root.path)
                fan.mark_filesystem(group, path, _EVENTS | fan.ON_DIRECTORY)
                _try_handle(path)
    except OSError as error:
        return f"{show(root.path)}: {_reason(error)}"
    finally:
        os.close(group)
    return ""


def _directory_of(path: bytes) -> bytes:
    return path if os.path.isdir(path) else os.path.dirname(path)


def _try_handle(path: bytes) -> None:
    """Raises OSError unless handles may be opened here."""
    mount = os.open(path, _HANDLE)
    try:
        os.close(fan.open_handle(mount, fan.handle_of(path)))
    finally:
        os.close(mount)


class _Mount:
    """A mount on which something protected lies: a directory of it, and its filesystem's number in events."""

    __slots__ = ("device", "fsid", "listed", "path")

    def __init__(self, path: bytes, listed: int | None) -> None:
        self.path = path
        self.device = os.stat(path).st_dev
        self.fsid = fan.filesystem_of(path)
        #: Its device in the kernel's list of marks, which is not what stat tells on Btrfs; None if that is not known.
        self.listed = listed

    def is_same(self, marked: set[int], mounts_changed: bool) -> bool:
        """Whether its filesystem is still there, and still marked."""
        try:
            if os.stat(self.path).st_dev != self.device:
                return False
        except OSError:
            return False
        return not mounts_changed if self.listed is None else self.listed in marked


class _Watched(Protected):
    """A root; ``real`` is its path without links, ``mounts`` what it lies on and what is mounted below it."""

    __slots__ = ("above", "handle", "marked", "mounts", "points", "real", "unwatched")

    def __init__(self, index: int, root: Root) -> None:
        super().__init__(index, root)
        self.marked = False
        self.real = b""
        #: Of the directory: its inode's number alone may be that of the next one at its place.
        self.handle = b""
        #: The entries that lead to it, each as a directory and a name in it.
        self.above: frozenset[tuple[bytes, bytes]] = frozenset()
        self.mounts: list[_Mount] = []
        #: Where something is mounted below it; known where that is left alone.
        self.points: set[bytes] = set()
        #: Filesystems below it that cannot be watched, each with the reason.
        self.unwatched: dict[bytes, str] = {}

    @property
    def watched(self) -> bool:
        return self.marked


class FanotifyWatcher(Engine[_Watched]):
    """Watches directory trees and single files with fanotify (the Watcher protocol of ``types``).

    Hints are as those of the inotify engine. What fanotify cannot tell: writes through a mapping that is never unmapped
    (``Mapped`` finds those); changes that other machines make on a network filesystem, or on this one through a
    server in the kernel. A change through another hard link is reported for the name that was used, if that lies in a
    root; for none, if that name was removed while somebody goes on writing to what he opened by it.

    ``reads`` also reports (as ATTRIBUTES) files that were only read. ``cookies`` is a directory of our own, by default
    a temporary one, for the changes by which ``drain`` proves that it has seen all. ``clock`` is a monotonic clock.
    Raises WatchError for roots that lie in each other and for patterns that are wrong.
    """

    name = "fanotify"

    def __init__(
        self,
        roots: Sequence[Root],
        *,
        reads: bool = False,
        cookies: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__([_Watched(index, root) for index, root in enumerate(roots)], cookies, clock)
        self._mask = _EVENTS | fan.ON_DIRECTORY | (fan.ACCESS if reads else 0)
        self._mounts: dict[bytes, list[_Mount]] = {}
        #: Descriptors of mounts, held while a buffer of events is worked off: longer, and nobody could unmount them.
        self._open_mounts: dict[bytes, int] = {}
        self._paths: dict[bytes, _Places] = {}

    # Events.

    def _pump(self) -> None:
        self._read()
        now = self._clock()
        if now >= self._next_check or self._check_now:
            self._check_roots()
        if now >= self._next_rescan:
            self._next_rescan = now + RESCAN_INTERVAL
            self._doubt_unwatched()

    def _queued(self) -> float:
        # FIONREAD counts the fixed parts of the events only.
        return math.inf

    def _settle_all(self) -> None:
        self._check_roots()
        self._doubt_lost()
        self._doubt_unwatched()

    def _digest(self, data: bytes) -> None:
        try:
            self._work_off(data)
        finally:
            self._close_mounts()

    def _work_off(self, data: bytes) -> None:
        for mask, where, to in fan.events(data):
            self._events += 1
            if where is None:
                if mask & fan.OVERFLOW:
                    self._overflow()
                    return
                continue
            if mask & fan.CREATE and self._cookies.expected:
                self._cookies.seen(where[2])
            is_directory = bool(mask & fan.ON_DIRECTORY)
            if to is not None:
                self._told(where, _FROM, is_directory, True)
                self._told(to, _TO, is_directory, True)
                if is_directory:
                    self._led_elsewhere(where, to)
                    # It, and all below, have other paths now.
                    self._paths.clear()
                    self._check_now = True
            elif is_directory and mask & (_EVENTS | fan.ACCESS) == fan.ACCESS:
                # Our own scans read directories.
                continue
            else:
                self._told(where, _BITS[mask & (_EVENTS | fan.ACCESS)], is_directory, bool(mask & _ENTRY))

    def _told(self, entry: fan.Entry, bits: int, is_directory: bool, of_entry: bool) -> None:
        fsid, handle, name = entry
        key = fsid + handle
        places = self._paths.get(key)
        if places is None:
            if len(self._paths) >= _MOST_PATHS:
                self._paths.clear()
            try:
                places = self._paths[key] = self._find(fsid, handle)
            except OSError as error:
                # Not that it is gone: who knows what it was.
                log.warning("a directory cannot be found; looking at everything again", reason=_reason(error))
                self._doubt_all()
                return
        for root, base in places:
            if base is None:
                self._file_event(root, name, bits, is_directory)
                continue
            if name == b".":
                path = base[:-1]
                if not root.plain and not root.filter.allows(path, True):
                    continue
                root.mark(path, bits)
                continue
            if name.startswith(STAGING):
                continue
            path = base + name
            if root.filter.allows(path, is_directory):
                root.mark(path, bits | RESCAN if is_directory and of_entry else bits)
            if of_entry:
                above = base[:-1]
                if root.plain or root.filter.allows(above, True):
                    root.mark(above, PARENT)

    def _led_elsewhere(self, *entries: fan.Entry) -> None:
        """What was resolved while a root, or a directory above it, had another name seemed to be nobody's."""
        for fsid, handle, name in entries:
            for root in self._roots:
                if (fsid + handle, name) in root.above:
                    root.mark(b"", RESCAN)

    def _file_event(self, root: Protected, name: bytes, bits: int, is_directory: bool) -> None:
        if name == root.name:
            root.mark(b"", bits)
            self._check_now |= is_directory

    def _find(self, fsid: bytes, handle: bytes) -> _Places:
        """Where the directory lies that ``handle`` stands for; raises OSError when that cannot be found out."""
        # Once each: the same directory may be seen at several places, and through several mounts.
        found: dict[tuple[int, bytes | None], tuple[Protected, bytes | None]] = {}
        for mount in self._mounts.get(fsid, ()):
            path = self._path_of(mount, handle)
            if path is None:
                continue
            for root in self._roots:
                if not root.watched:
                    continue
                if root.is_file:
                    if path == _top(root):
                        found[root.index, None] = root, None
                elif path == root.real:
                    found[root.index, b""] = root, b""
                elif path.startswith(root.real + b"/"):
                    base = path[len(root.real) + 1 :] + b"/"
                    found[root.index, base] = root, base
        return tuple(found.values())

    def _path_of(self, mount: _Mount, handle: bytes) -> bytes | None:
        """Where a directory is; None when it is gone. Raises OSError."""
        at = self._open_mounts.get(mount.path)
        try:
            if at is None:
                at = self._open_mounts[mount.path] = os.open(mount.path, _HANDLE)
            fd = fan.open_handle(at, handle)
        except OSError as error:
            if error.errno in _IS_GONE:
                return None
            raise
        try:
            return os.readlink(b"/proc/self/fd/%d" % fd)
        except OSError as error:
            return self._climb(fd) if error.errno == errno.ENAMETOOLONG else None
        finally:
            os.close(fd)

    def _climb(self, fd: int) -> bytes | None:
        """The path of a directory that is longer than the kernel tells at once, up to one that it does tell."""
        names: list[bytes] = []
        here = os.dup(fd)
        try:
            while True:
                status = os.fstat(here)
                above = os.open(b"..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
                os.close(here)
                here = above
                with os.scandir(here) as entries:
                    name = next((os.fsencode(e.name) for e in entries if e.inode() == status.st_ino), None)
                if name is None:
                    return None
                names.append(name)
                with contextlib.suppress(OSError):
                    top = os.readlink(b"/proc/self/fd/%d" % here)
                    return b"/".join([top, *reversed(names)])
        except OSError:
            return None
        finally:
            os.close(here)

    def _close_mounts(self) -> None:
        while self._open_mounts:
            os.close(self._open_mounts.popitem()[1])

    def _doubt_unwatched(self) -> None:
        for root in self._roots:
            for path in list(root.unwatched):
                root.mark(path, RESCAN)

    def _directories(self) -> int:
        # Nobody counts them: filesystems are watched.
        return 0

    # Roots and filesystems.

    def _open(self) -> None:
        self._trouble = None
        self._problems_changed = True
        try:
            self._fd = fan.create()
            self._open_mount_table()
            self._has_started()
        except OSError as error:
            self._cannot_start(f"fanotify does not start: {_reason(error)}")
            self._shut()
            return
        now = self._clock()
        self._next_check = now + ROOT_INTERVAL
        self._next_rescan = now + RESCAN_INTERVAL
        for root in self._roots:
            self._watch(root)
            root.rescan_at = now + RESCAN_INTERVAL
        # Afterwards, as a mark on Btrfs may have the kernel refuse those on other filesystems.
        self._watch_cookies()
        self._list_mounts()

    def _watch_cookies(self) -> None:
        self._has_proof = False
        if not self._cookies.prepare():
            return
        try:
            fan.mark_directory(self._fd, self._cookies.path, fan.CREATE)
            self._has_proof = True
        except OSError as error:
            log.debug("no proof that all was seen", reason=_reason(error))

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._close_mount_table()
        self._has_proof = False
        self._close_mounts()
        self._mounts.clear()
        self._paths.clear()
        self._check_now = False
        for root in self._roots:
            root.marked = False
            root.problem = None
            root.mounts = []
            root.unwatched = {}

    def _check_roots(self) -> None:
        """See whether every root, and every filesystem, is still what is watched; also when mounts have changed."""
        now = self._clock()
        self._next_check = now + ROOT_INTERVAL
        if self._fd < 0:
            self._open()
            for root in self._roots:
                if root.watched:
                    root.mark(b"", RESCAN)
            if self._fd < 0:
                for root in self._roots:
                    self._doubt_now_and_then(root, now)
                return
        self._look_at_mounts()
        self._check_now = False
        marked = fan.marked_devices(self._fd)
        for root in self._roots:
            if root.watched:
                self._check_root(root, marked)
            if not root.watched:
                self._doubt_now_and_then(root, now)
                self._watch(root)
                if root.watched:
                    log.info("root is watched again", path=root.path)
                    root.mark(b"", RESCAN)
        self._mounts_changed = False
        self._list_mounts()

    @staticmethod
    def _doubt_now_and_then(root: _Watched, now: float) -> None:
        """What is not watched is looked at instead."""
        if now >= root.rescan_at:
            root.mark(b"", RESCAN)
            root.rescan_at = now + RESCAN_INTERVAL

    def _check_root(self, root: _Watched, marked: set[int]) -> None:
        if not self._is_in_place(root):
            root.marked = False
            self._lost(root)
            root.mark(b"", RESCAN)
            root.rescan_at = self._clock() + RESCAN_INTERVAL
            return
        known = {mount.path: mount for mount in root.mounts}
        below = {os.path.join(root.real, path) for path in root.unwatched}
        there = set(self._mounts_of(root)) if self._mounts_changed else {*known, *below}
        # What was mounted, unmounted, or is another filesystem: what lies there is seen anew.
        changed = {
            path
            for path, mount in known.items()
            if path not in there or not mount.is_same(marked, self._mounts_changed)
        }
        changed |= below - there
        changed |= there - below - known.keys()
        if changed:
            self._mark(root)
        if self._mounts_changed and root.root.one_filesystem:
            points = set(mounts.points_below(root.real))
            if points != root.points:
                # What lies under a mount that is left alone is hidden, or in sight again, perhaps by another name.
                root.points = points
                root.mark(b"", RESCAN)
        for path in changed:
            root.mark(path[len(root.real) + 1 :], RESCAN)

    def _is_in_place(self, root: _Watched) -> bool:
        try:
            return root.in_place() and self._real(root) == root.real and fan.handle_of(_top(root)) == root.handle
        except OSError:
            return False

    def _watch(self, root: _Watched) -> None:
        """Mark the filesystems of ``root``, or say in its ``problem`` why not."""
        try:
            status = self._place(root)
            root.handle = fan.handle_of(_top(root))
            root.above = _entries_to(_top(root))
            if root.root.one_filesystem:
                root.points = set(mounts.points_below(root.real))
            self._mark(root)
        except OSError as error:
            self._cannot_watch(root, _reason(error))
            return
        root.identity = (status.st_dev, status.st_ino)
        root.marked = True
        root.device = root.device or status.st_dev
        root.problem = None if root.device == status.st_dev else OTHER_FILESYSTEM

    def _place(self, root: _Watched) -> os.stat_result:
        """Find out where a root lies; what stat tells of it, or of the directory that holds a single file."""
        was_file, root.is_file = root.is_file, False
        root.real = self._real(root)
        try:
            top = os.open(root.real, _HANDLE)
        except OSError as error:
            # A file that was there and is not now may be on its way back: watch its name.
            if error.errno not in ABSENT or not (was_file or os.path.lexists(root.path)):
                raise
            root.is_file = True
            root.real = self._real(root)
            return os.stat(root.parent)
        try:
            return os.fstat(top)
        finally:
            os.close(top)

    @staticmethod
    def _real(root: _Watched) -> bytes:
        """Where a root lies, by a path without links; a single file itself may be one."""
        if root.is_file:
            return os.path.join(os.path.realpath(root.parent), root.name)
        return os.path.realpath(root.path)

    def _mounts_of(self, root: _Watched) -> list[bytes]:
        """What ``root`` lies on, and what is mounted below it that is not left alone."""
        if root.is_file:
            return [_top(root)]
        below = mounts.points_below(root.real)
        if root.root.one_filesystem:
            # What is bound there from the same one is protected.
            device = _device(root.real)
            below = [path for path in below if _device(path) == device]
        return [root.real, *below]

    def _mark(self, root: _Watched) -> None:
        """Mark every filesystem of ``root``; raises OSError when that of the root itself cannot be marked."""
        root.mounts = []
        root.unwatched = {}
        self._paths.clear()
        for path in self._mounts_of(root):
            try:
                _try_handle(path)
                before = fan.marked_devices(self._fd)
                fan.mark_filesystem(self._fd, path, self._mask)
                root.mounts.append(_Mount(path, self._listed(path, before)))
            except OSError as error:
                if not root.mounts:
                    raise
                root.unwatched[path[len(root.real) + 1 :]] = _reason(error)

    def _listed(self, path: bytes, before: set[int]) -> int | None:
        """Which of the marked devices is that of ``path``, which was marked just now; None if that is not known."""
        marked = fan.marked_devices(self._fd)
        device = os.stat(path).st_dev
        if device in marked:
            return device
        added = marked - before
        if len(added) == 1:
            return added.pop()
        fsid = fan.filesystem_of(path)
        return next((mount.listed for mount in self._every_mount() if mount.fsid == fsid), None)

    def _list_mounts(self) -> None:
        """Bring what is derived from the roots up to date."""
        self._mounts = {}
        for mount in self._every_mount():
            self._mounts.setdefault(mount.fsid, []).append(mount)
        self._problems_changed = True

    def _every_mount(self) -> Iterable[_Mount]:
        for root in self._roots:
            if root.watched:
                yield from root.mounts

    def _unwatched_parts(self) -> dict[tuple[int, str], list[bytes]]:
        reasons: dict[tuple[int, str], list[bytes]] = {}
        for root in self._roots:
            for path, reason in root.unwatched.items():
                reasons.setdefault((root.index, reason), []).append(path)
        return reasons


def _entries_to(path: bytes) -> frozenset[tuple[bytes, bytes]]:
    """Each name in ``path``, a real one, with the directory that holds it, as far as those have handles."""
    found = set()
    while path != b"/":
        path, name = os.path.split(path)
        with contextlib.suppress(OSError):
            found.add((fan.filesystem_of(path) + fan.handle_of(path), name))
    return frozenset(found)


def _top(root: _Watched) -> bytes:
    """The directory of a root, or the one that holds a single file."""
    return os.path.dirname(root.real) if root.is_file else root.real


def _device(path: bytes) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None


def _reason(error: OSError) -> str:
    return _REMEDIES.get(error.errno or 0) or error.strerror or str(error)
