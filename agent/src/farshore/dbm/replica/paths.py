"""Reach a path below a root without trusting it: by directory handles, never through a symbolic link."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable

from farshore.errors import UnsafePath
from farshore.fmm.patterns import STAGING

#: Names that begin so are ours and are never replicated.
PREFIX = STAGING

#: What opening a path says when nothing is there, or something else stands in its way.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

#: Told of a file, before it is removed if it is: (handle of its directory, its name there, its path, its lstat).
Visitor = Callable[[int, bytes, bytes, os.stat_result], None]

#: Bytes of a path, the system's own limit.
MAX_PATH = 4096
_MAX_NAME = 255
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_NAMES = (b"", b".", b"..")
#: How a mount point's name has what is not printed there (proc(5)).
_ESCAPED = re.compile(rb"\\([0-7]{3})")
#: Directory handles that one root keeps open while a group of transactions is applied, at most.
_CACHED_HANDLES = 128


def check(path: bytes) -> bytes:
    """Return ``path`` if it is relative and plain; raises UnsafePath otherwise. b"" is the root itself."""
    if not path:
        return path
    _check_length(path)
    for name in path.split(b"/"):
        _check_name(path, name)
    return path


def _check_length(path: bytes) -> None:
    if len(path) > MAX_PATH:
        raise UnsafePath(path[:80] + b"...", f"{len(path)} bytes; allowed are {MAX_PATH}")
    if b"\0" in path:
        raise UnsafePath(path, "it holds a NUL byte")


def _check_name(path: bytes, name: bytes) -> None:
    if name in _NO_NAMES:
        raise UnsafePath(path, "it is absolute, or has an empty, . or .. component")
    if name.startswith(PREFIX):
        raise UnsafePath(path, f"names that begin with {PREFIX.decode()} are the replica's own")
    if len(name) > _MAX_NAME:
        raise UnsafePath(path, f"a component has {len(name)} bytes; allowed are {_MAX_NAME}")


class Handles:
    """Directory handles below one root, opened component by component and cached while nothing moves.

    A directory that is missing raises FileNotFoundError, one that is a symbolic link or a file
    NotADirectoryError: nothing outside the root is ever reached.
    """

    def __init__(self, root: bytes, *, widening: bool = True) -> None:
        self._root = root
        #: By path; None is the directory that holds the root, and no path of a peer's can be that key.
        self._cache: OrderedDict[bytes | None, int] = OrderedDict()
        #: Root may do everything; with ``widening``, anybody else gives himself the rights that he lacks.
        self._widening = widening and os.geteuid() != 0
        #: Directories that were given all rights for us, by path: their device and inode, and their true mode.
        self._widened: dict[bytes, tuple[tuple[int, int], int]] = {}

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """Handle of the directory that holds ``path``, and the name in it; raises UnsafePath. The handle stays ours."""
        if not path:
            return self.directory(None), os.path.basename(self._root)
        _check_length(path)
        head, slash, name = path.rpartition(b"/")
        _check_name(path, name)
        handle = self._cache.get(head)
        if handle is None or not head:
            if slash and not head:
                raise UnsafePath(path, "it is absolute")
            # Only what was checked is ever a key.
            return self.directory(head), name
        self._cache.move_to_end(head)
        return handle, name

    def directory(self, path: bytes | None) -> int:
        """Handle of a directory; b"" is the root, None the directory that holds the root."""
        handle = self._cache.get(path)
        if handle is None:
            handle = self._open(path)
            while len(self._cache) >= _CACHED_HANDLES:
                os.close(self._cache.popitem(last=False)[1])
            self._cache[path] = handle
        else:
            self._cache.move_to_end(path)
        return handle

    def writable_parent(self, path: bytes) -> tuple[int, bytes]:
        """As ``parent``; a directory of ours that forbids it to us can be changed until ``restore``."""
        parent, name = self.parent(path)
        if path and self._widening:
            self.widen(path.rpartition(b"/")[0])
        return parent, name

    def widen(self, path: bytes) -> None:
        """Let us change the directory at ``path`` until ``restore``, if it is ours and we are not root."""
        if not self._widening:
            return
        handle = self.directory(path)
        status = os.fstat(handle)
        if _grant(handle, status):
            self._note(path, status)

    def settled(self, path: bytes) -> None:
        """The directory at ``path`` was given its true mode: nothing is to be restored."""
        self._widened.pop(path, None)

    def moved(self, path: bytes, to: bytes) -> None:
        """What was at ``path`` is at ``to`` now."""
        for old in [p for p in self._widened if p == path or p.startswith(path + b"/")]:
            self._widened[to + old[len(path) :]] = self._widened.pop(old)
        self.forget()

    def true_mode(self, status: os.stat_result) -> int:
        """The mode that something has, of which ``status`` was told, or will have again after ``restore``."""
        for identity, mode in self._widened.values():
            if identity == _identity(status):
                return mode
        return stat.S_IMODE(status.st_mode)

    def restore(self) -> None:
        """Give directories that were widened their true modes, the deepest first."""
        while self._widened:
            path = max(self._widened, key=lambda each: (each.count(b"/") + bool(each), each))
            identity, mode = self._widened.pop(path)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                handle = self.directory(path)
                if _identity(os.fstat(handle)) == identity:
                    os.fchmod(handle, mode)

    def _note(self, path: bytes, status: os.stat_result) -> None:
        known = self._widened.get(path)
        if known is None or known[0] != _identity(status):
            self._widened[path] = (_identity(status), stat.S_IMODE(status.st_mode))

    def _open(self, path: bytes | None) -> int:
        # The root and what is above it are the administrator's; below it nothing is trusted.
        if path is None:
            return os.open(os.path.dirname(self._root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not path:
            return os.open(os.path.basename(self._root), _OPEN_DIRECTORY, dir_fd=self.directory(None))
        check(path)
        # openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS would be one call, by ctypes: 1.9 us instead of 2.1
        # for one component, the usual case as the directory above is at hand, and 2.5 instead of 5.2 for four. That is
        # not worth a second way in.
        at = self._nearest(path)
        handle = os.dup(self.directory(at))
        try:
            for name in path[len(at) :].lstrip(b"/").split(b"/"):
                at = at + b"/" + name if at else name
                below, before = _open_directory(handle, name, self._widening)
                if before is not None:
                    self._note(at, before)
                os.close(handle)
                handle = below
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _nearest(self, path: bytes) -> bytes:
        """The nearest directory above ``path`` whose handle is at hand; the root if there is none."""
        at = path.rpartition(b"/")[0]
        while at and at not in self._cache:
            at = at.rpartition(b"/")[0]
        return at

    def forget(self) -> None:
        """Close all handles: after a directory was moved or removed, and at the end of a transaction."""
        while self._cache:
            os.close(self._cache.popitem()[1])


def mounts() -> list[bytes]:
    """Where something is mounted, as absolute paths without links."""
    with open("/proc/self/mountinfo", "rb") as file:
        return [_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), line.split()[4]) for line in file]


def open_regular(handles: Handles, path: bytes) -> int | None:
    """A descriptor for reading the regular file at ``path``; None when there is none. Raises OSError, UnsafePath."""
    try:
        parent, name = handles.parent(path)
        inert = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in MISSING:
            return None
        raise
    try:
        if not stat.S_ISREG(os.fstat(inert).st_mode):
            return None
        # Only now: to open a device's node, which a peer may have made, is to use the device.
        return os.open(f"/proc/self/fd/{inert}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(inert)


def remove_tree(parent: int, name: bytes, path: bytes = b"", before: Visitor | None = None) -> None:
    """Remove the directory ``name`` in ``parent`` and all below it, never through a symbolic link.

    ``path`` is where the directory is, for ``before``, which is told of everything but directories.
    """
    _through_tree(parent, name, path, before, remove=True)
    os.rmdir(name, dir_fd=parent)


def visit_tree(parent: int, name: bytes, path: bytes, visitor: Visitor) -> None:
    """Tell ``visitor`` of all below the directory ``name`` in ``parent`` that is no directory."""
    _through_tree(parent, name, path, visitor, remove=False)


def _through_tree(parent: int, name: bytes, path: bytes, visitor: Visitor | None, *, remove: bool) -> None:
    """Any depth takes two handles and no recursion."""
    here = _enter(parent, name)
    trail: list[bytes] = []
    levels: list[tuple[tuple[int, int], list[bytes]]] = []
    try:
        levels.append((_identity(os.fstat(here)), _files_of(here, path, trail, visitor, remove=remove)))
        while True:
            below = levels[-1][1]
            if below:
                deeper = _enter(here, below[-1])
                os.close(here)
                here = deeper
                trail.append(below.pop())
                levels.append((_identity(os.fstat(here)), _files_of(here, path, trail, visitor, remove=remove)))
                continue
            levels.pop()
            if not levels:
                break
            above = os.open(b"..", _OPEN_DIRECTORY, dir_fd=here)
            os.close(here)
            here = above
            # Whoever moves it meanwhile must not lead us out of the tree.
            if _identity(os.fstat(here)) != levels[-1][0]:
                raise OSError(errno.EBUSY, "a directory was moved while it was removed")
            left = trail.pop()
            if remove:
                os.rmdir(left, dir_fd=here)
    finally:
        os.close(here)


def _files_of(here: int, path: bytes, trail: list[bytes], visitor: Visitor | None, *, remove: bool) -> list[bytes]:
    """Tell of all but directories in ``here``, and remove them if need be; returns the names of the directories."""
    below = []
    with os.scandir(here) as found:
        entries = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in found]
    for name, is_directory in entries:
        if is_directory:
            below.append(name)
            continue
        with contextlib.suppress(FileNotFoundError):
            if visitor is not None:
                where = b"/".join([*([path] if path else []), *trail, name])
                visitor(here, name, where, os.stat(name, dir_fd=here, follow_symlinks=False))
            if remove:
                os.unlink(name, dir_fd=here)
    return below


def _enter(parent: int, name: bytes) -> int:
    """Open a directory that is to be emptied; one of ours that forbids it to us is given all rights."""
    handle, _ = _open_directory(parent, name)
    if os.geteuid() != 0:
        _grant(handle, os.fstat(handle))
    return handle


def _open_directory(parent: int, name: bytes, widening: bool = True) -> tuple[int, os.stat_result | None]:
    """Open a directory, and give it all rights for us where we may not; then its state before is told too."""
    try:
        return os.open(name, _OPEN_DIRECTORY, dir_fd=parent), None
    except PermissionError:
        if not widening:
            raise
        inert = os.open(name, _OPEN_DIRECTORY | os.O_PATH, dir_fd=parent)
    try:
        before = os.fstat(inert)
        # fchmod(2) does not take an O_PATH descriptor.
        os.chmod(f"/proc/self/fd/{inert}", stat.S_IMODE(before.st_mode) | stat.S_IRWXU)
    finally:
        os.close(inert)
    return os.open(name, _OPEN_DIRECTORY, dir_fd=parent), before


def _grant(handle: int, status: os.stat_result) -> bool:
    """Give us all rights on a directory of ours that lacks some; returns whether it was changed."""
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IRWXU == stat.S_IRWXU:
        return False
    os.fchmod(handle, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
