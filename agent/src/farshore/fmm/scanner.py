"""What a path looks like now.

Nothing here follows a symbolic link below the root, in no component; the root's own path may
lead through some, as the administrator named it. Extended attributes are read through
/proc/self/fd, as Python has no call for them that is relative to a directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator

from farshore.errors import UnsafePath
from farshore.fmm.attributes import is_replicated
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Observed

_KINDS = {
    stat.S_IFREG: FileKind.FILE,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFLNK: FileKind.SYMLINK,
    stat.S_IFIFO: FileKind.FIFO,
    stat.S_IFCHR: FileKind.CHARACTER_DEVICE,
    stat.S_IFBLK: FileKind.BLOCK_DEVICE,
    stat.S_IFSOCK: FileKind.SOCKET,
}
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CACHED_HANDLES = 32
_DIRECTORY_HANDLE = _HANDLE | os.O_DIRECTORY
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: The path is not there: nothing, or something else than a directory, lies where a name should.
#: ELOOP and ENOTDIR are what O_NOFOLLOW answers where a symlink took a directory's place.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def open_beneath(root: bytes | int, path: bytes, flags: int) -> int:
    """Open ``path`` below ``root`` (a path, or a descriptor of the root directory); returns a descriptor.

    No component below the root may be a symlink, but for the last one where ``flags`` has O_PATH.
    b"" opens the root itself. Raises OSError, and UnsafePath for a path with empty, ``.`` or ``..``
    components.
    """
    if not path:
        return _open_root(root, flags)
    parts = path.split(b"/")
    for part in parts:
        if part in (b"", b".", b".."):
            raise UnsafePath(os.fsdecode(path), "a component is empty, . or ..")
    here = _open_root(root, os.O_PATH | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, _DIRECTORY_HANDLE, dir_fd=here)
            os.close(here)
            here = below
        return os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)


def observe(root_path: bytes | int, root: int, path: bytes) -> Observed | None:
    """The state of ``path`` below ``root_path``, or None when it does not exist.

    All of it is told of one and the same inode. Raises OSError when the state cannot be read
    (permissions, I/O errors), which says nothing about whether the path exists.
    """
    try:
        fd = open_beneath(root_path, path, _HANDLE)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    try:
        return _describe(fd, root, path)
    finally:
        os.close(fd)


class Directories:
    """Handles of the directories below one root, for looking at many paths without walking to each.

    A handle shows the directory that stood at its path when it was opened. Whoever must see what came since then
    forgets it first.
    """

    def __init__(self, root_path: bytes) -> None:
        self._root_path = root_path
        self._handles: OrderedDict[bytes, int] = OrderedDict()

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """Handle of the directory that holds ``path`` (not b""), and the name in it; raises OSError."""
        above, _, name = path.rpartition(b"/")
        handle = self._handles.get(above)
        if handle is None:
            handle = self._open(above)
        return handle, name

    def forget(self) -> None:
        """Close all handles."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _open(self, path: bytes) -> int:
        handle = open_beneath(self._root_path, path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        while len(self._handles) >= _CACHED_HANDLES:
            os.close(self._handles.popitem(last=False)[1])
        self._handles[path] = handle
        return handle


def look(directories: Directories, path: bytes) -> os.stat_result | None:
    """What lstat tells of ``path`` (not b""), None when nothing is there; raises OSError when that is not known."""
    try:
        parent, name = directories.parent(path)
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise


def open_file(directories: Directories, path: bytes) -> int:
    """A descriptor for reading the file at ``path``, whose access time the reading leaves alone if we may.

    Raises OSError. The caller has seen by ``look`` that it is a regular file.
    """
    parent, name = directories.parent(path)
    return _leaving_times(lambda flags: os.open(name, flags, dir_fd=parent))


def open_file_beneath(root_path: bytes, path: bytes) -> int:
    """As ``open_file``, for any path below a root and b"", the root itself, when that is a file."""
    return _leaving_times(lambda flags: open_beneath(root_path, path, flags))


def _leaving_times(open_it: Callable[[int], int]) -> int:
    """Open for reading; access times stay as they are where we may have that (the file is ours, or we are root)."""
    try:
        return open_it(_READ | os.O_NOATIME)
    except PermissionError:
        return open_it(_READ)


def observed(status: os.stat_result, root: int, path: bytes, handle: int) -> Observed:
    """The state of the file or directory that ``handle`` is open for reading on, and ``status`` was told of."""
    return _observed(status, root, path, None, _xattrs(handle))


def list_directory(root_path: bytes | int, path: bytes, filter: Filter) -> Iterator[tuple[bytes, bool]]:
    """The names in a directory that ``filter`` allows, each with whether it is a directory.

    In no order; names that appear or vanish meanwhile may or may not be among them. Raises OSError,
    at the first step too, when the directory is gone or cannot be read.
    """
    fd = open_beneath(root_path, path, _DIRECTORY)
    try:
        yield from _names(fd, path, filter)
    finally:
        os.close(fd)


def walk(
    root_path: bytes | int,
    root: int,
    path: bytes,
    filter: Filter,
    on_problem: Callable[[bytes, OSError], None],
) -> Iterator[Observed]:
    """Everything that ``filter`` allows from ``path`` downwards, each directory before what it holds.

    Entries that vanish meanwhile are left out. What cannot be read is given to ``on_problem`` with
    its path: whatever lies there or below is unknown, not absent.
    """
    try:
        top = observe(root_path, root, path)
    except OSError as error:
        on_problem(path, error)
        return
    if top is None or not filter.allows(path, top.kind is FileKind.DIRECTORY):
        return
    yield top
    pending = [path] if top.kind is FileKind.DIRECTORY else []
    while pending:
        for found in observe_directory(root_path, root, pending.pop(), filter, on_problem):
            yield found
            if found.kind is FileKind.DIRECTORY and filter.allows(found.path, True):
                pending.append(found.path)


def observe_directory(
    root_path: bytes | int,
    root: int,
    path: bytes,
    filter: Filter,
    on_problem: Callable[[bytes, OSError], None],
) -> Iterator[Observed]:
    """Everything that ``filter`` allows directly in one directory, which may be gone: then that is nothing.

    Problems are told of as ``walk`` does.
    """
    try:
        fd = open_beneath(root_path, path, _DIRECTORY)
    except OSError as error:
        if error.errno not in ABSENT:
            on_problem(path, error)
        return
    try:
        for name, _ in _names(fd, path, filter):
            found = _observe_in(fd, name, root, path + b"/" + name if path else name, on_problem)
            if found is not None:
                yield found
    except OSError as error:
        on_problem(path, error)
    finally:
        os.close(fd)


def _open_root(root: bytes | int, flags: int) -> int:
    if isinstance(root, int):
        return os.open(b".", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    try:
        return os.open(root, flags & ~os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in ABSENT or flags & os.O_DIRECTORY:
            raise
    # A root that leads to no directory is the one object of that name, be it a link.
    return os.open(root, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _names(fd: int, path: bytes, filter: Filter) -> Iterator[tuple[bytes, bool]]:
    base = path + b"/" if path else b""
    with os.scandir(fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            try:
                is_dir = entry.is_dir(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if filter.allows(base + name, is_dir):
                yield name, is_dir


def _observe_in(
    directory: int, name: bytes, root: int, path: bytes, on_problem: Callable[[bytes, OSError], None]
) -> Observed | None:
    try:
        fd = os.open(name, _HANDLE, dir_fd=directory)
        try:
            return _describe(fd, root, path)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in ABSENT:
            on_problem(path, error)
        return None


def _describe(fd: int, root: int, path: bytes) -> Observed:
    status = os.fstat(fd)
    target = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else None
    # What such a path leads to is the object itself, also where that is a symlink.
    return _observed(status, root, path, target, _xattrs(b"/proc/self/fd/%d" % fd))


def _observed(
    status: os.stat_result, root: int, path: bytes, target: bytes | None, xattrs: tuple[tuple[bytes, bytes], ...] | None
) -> Observed:
    return Observed(
        root=root,
        path=path,
        kind=kind_of(status),
        mode=status.st_mode & 0o7777,
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size,
        atime_ns=status.st_atime_ns,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        dev=status.st_dev,
        ino=status.st_ino,
        nlink=status.st_nlink,
        rdev=status.st_rdev,
        blocks=status.st_blocks,
        target=target,
        xattrs=xattrs or (),
        unlisted=xattrs is None,
    )


def kind_of(status: os.stat_result) -> FileKind:
    """What kind of object a stat tells of."""
    return _KINDS[stat.S_IFMT(status.st_mode)]


def _xattrs(handle: bytes | int) -> tuple[tuple[bytes, bytes], ...] | None:
    """The attributes that are replicated, sorted by name; None when they are more than the kernel can list."""
    try:
        names = os.listxattr(handle)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        if error.errno in (errno.E2BIG, errno.ERANGE):
            return None
        raise
    if not names:
        return ()
    found = []
    for each in names:
        name = os.fsencode(each)
        if not is_replicated(name):
            continue
        try:
            found.append((name, os.getxattr(handle, name)))
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
    found.sort()
    return tuple(found)
