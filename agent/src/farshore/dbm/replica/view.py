"""The past of a tree: what it was after some transaction, found by undoing, in the mind only, all that came later.

A ``View`` is a tree of names that is read from the disk where somebody looks, and nowhere else, so that undoing the
removal of a directory with a million files costs one step. Each node says where its object really is now: in the
replica's tree, or among what the history keeps. ``copy_out`` makes files of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from farshore.dbm.messages import Meta
from farshore.dbm.replica import metadata
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.paths import PREFIX
from farshore.dbm.replica.tree import read_meta
from farshore.dbm.replica.undo import Absent, Kept, Moved, Step, Times, WasDirectory, WasMeta

_FICLONE = 0x40049409
_COPY = 8 << 20
_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ENOSYS)


@dataclass(slots=True)
class Node:
    """Something that was in the tree. ``place`` is where it is now, None for a directory that is nowhere any more.

    ``children`` are the names in a directory, None as long as nobody looked. ``meta`` is that of a directory that is
    nowhere, ``times`` are those of another one whose names have changed since: atime and mtime in ns.
    """

    place: bytes | None
    is_directory: bool
    children: dict[bytes, Node] | None = None
    meta: Meta | None = None
    times: tuple[int, int] | None = None

    def look(self) -> dict[bytes, Node]:
        """The names in a directory; raises OSError."""
        if self.children is None:
            self.children = {}
            # What the history has lost is told as missing when it is made (``_make``), not here.
            if self.place is not None and os.path.lexists(self.place):
                with os.scandir(self.place) as found:
                    for entry in found:
                        name = os.fsencode(entry.name)
                        if not name.startswith(PREFIX):
                            below = self.place + b"/" + name
                            self.children[name] = Node(below, entry.is_dir(follow_symlinks=False))
        return self.children


class View:
    """A root as it was. ``kept`` tells the absolute path of what a ``Kept`` entry names.

    Files in the tree whose ctime is after ``newest_ns`` were changed by others since, and are not known; 0: none was.
    """

    def __init__(self, root: bytes, kept: Callable[[Kept], bytes], newest_ns: int = 0) -> None:
        self._kept = kept
        self._root = root + b"/"
        self._newest_ns = newest_ns
        self._metas: dict[tuple[int, int], Meta] = {}
        self.top: Node | None = _node_at(root)

    def undo(self, step: Step, root: int) -> None:
        """Go back before what a step of root number ``root`` has done; the last step comes first. Raises OSError."""
        for entry in reversed(step.entries):
            if entry.root != root:
                continue
            match entry:
                case Absent(path=path):
                    self._put(path, None)
                case Kept(path=path):
                    self._put(path, Node(self._kept(entry), stat.S_ISDIR(entry.kind)))
                case WasDirectory(path=path, meta=meta):
                    self._put(path, Node(None, True, {}, meta))
                case WasMeta():
                    self._remember(entry)
                case Times(path=path, atime_ns=atime, mtime_ns=mtime):
                    self._remember_times(path, atime, mtime)
                case Moved(path=path, to=to):
                    node = self.find(to)
                    if node is not None:
                        self._put(to, None)
                        self._put(path, node)

    def find(self, path: bytes) -> Node | None:
        """What was at ``path``; None if nothing was."""
        node = self.top
        for name in path.split(b"/") if path else []:
            if node is None or not node.is_directory:
                return None
            node = node.look().get(name)
        return node

    def meta_of(self, node: Node) -> Meta:
        """The metadata that ``node`` had; raises OSError."""
        if node.place is None:
            assert node.meta is not None
            meta = node.meta
        else:
            status = os.lstat(node.place)
            meta = self._metas.get((status.st_dev, status.st_ino)) or _meta_at(node.place, status)
        if node.times is None:
            return meta
        return Meta(meta.mode, meta.uid, meta.gid, *node.times, meta.xattrs)

    def is_known(self, node: Node, status: os.stat_result) -> bool:
        """Whether a file is still what it was."""
        assert node.place is not None
        in_tree = node.place.startswith(self._root) or node.place + b"/" == self._root
        return not (self._newest_ns and (in_tree or status.st_nlink > 1) and status.st_ctime_ns > self._newest_ns)

    def _put(self, path: bytes, node: Node | None) -> None:
        """Let ``node``, or nothing, be at ``path``."""
        if not path:
            self.top = node
            return
        above, _, name = path.rpartition(b"/")
        parent = self.find(above)
        if parent is None or not parent.is_directory:
            # What it lay in is undone later, or was never seen.
            return
        names = parent.look()
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node

    def _remember(self, entry: WasMeta) -> None:
        # By its inode: other names of the same file had it, too, wherever they are by now. What was given the number
        # since then did not exist at that time, so it is not seen any more.
        self._metas[entry.device, entry.inode] = entry.meta
        node = self.find(entry.path)
        if node is None:
            return
        if node.place is None:
            node.meta, node.times = entry.meta, None
            return
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(node.place)
            if (status.st_dev, status.st_ino) == (entry.device, entry.inode):
                node.times = None

    def _remember_times(self, path: bytes, atime: int, mtime: int) -> None:
        node = self.find(path)
        if node is not None:
            node.times = atime, mtime


@dataclass(slots=True)
class Progress:
    """What a restore has done so far; ``size`` in bytes; ``missing`` are paths whose content is gone."""

    files: int = 0
    size: int = 0
    missing: list[bytes] = field(default_factory=list)


def copy_out(
    view: View, path: bytes, target: bytes, progress: Progress, check: Callable[[], None] = lambda: None
) -> None:
    """Make ``target``, where nothing is, what was at ``path``; raises NotRemembered, OSError, what ``check`` raises.

    Files that were one stay one. Contents are shared with the replica where the filesystem can.
    """
    node = view.find(path)
    if node is None:
        raise NotRemembered(os.fsdecode(path) or "the root", "was not there at that time")
    _make(view, node, path, target, progress, {}, check)


def _make(
    view: View,
    node: Node,
    path: bytes,
    target: bytes,
    progress: Progress,
    links: dict[tuple[int, int], bytes],
    check: Callable[[], None],
) -> None:
    directories: list[tuple[Node, bytes]] = []
    stack = [(node, path, target)]
    while stack:
        check()
        node, path, target = stack.pop()
        if node.is_directory and node.place is not None and not os.path.lexists(node.place):
            progress.missing.append(path)
            continue
        if node.is_directory:
            os.mkdir(target, 0o700)
            directories.append((node, target))
            for name, below in sorted(node.look().items(), reverse=True):
                stack.append((below, path + b"/" + name if path else name, target + b"/" + name))
            continue
        try:
            made = _make_file(view, node, target, progress, links)
        except FileNotFoundError:
            made = False
        if not made:
            progress.missing.append(path)
    # Times and permissions of directories come last, the deepest first.
    for node, target in reversed(directories):
        give(target, view.meta_of(node))


def _make_file(view: View, node: Node, target: bytes, progress: Progress, links: dict[tuple[int, int], bytes]) -> bool:
    """Make a file; returns False when it is not known any more."""
    assert node.place is not None
    status = os.lstat(node.place)
    if not view.is_known(node, status):
        return False
    meta = view.meta_of(node)
    first = links.get((status.st_dev, status.st_ino))
    if first is not None:
        os.link(first, target, follow_symlinks=False)
        return True
    if stat.S_ISREG(status.st_mode):
        _copy_content(node.place, target)
        progress.size += status.st_size
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(node.place), target)
    else:
        os.mknod(target, status.st_mode, status.st_rdev)
    give(target, meta)
    progress.files += 1
    links[status.st_dev, status.st_ino] = target
    return True


def _copy_content(source: bytes, target: bytes) -> None:
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.ioctl(writing, _FICLONE, reading)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                _copy_data(reading, writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_data(reading: int, writing: int) -> None:
    """Copy what is no hole."""
    size = os.fstat(reading).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(reading, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(reading, at, os.SEEK_HOLE)
        os.lseek(writing, at, os.SEEK_SET)
        os.lseek(reading, at, os.SEEK_SET)
        while at < end:
            done = os.sendfile(writing, reading, None, min(end - at, _COPY))
            if not done:
                break
            at += done
    os.ftruncate(writing, size)


def give(target: bytes, meta: Meta) -> None:
    """Give what was made its metadata; what cannot be kept here is left out."""
    handle = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        there = os.fstat(handle)
        metadata.give(
            b"/proc/self/fd/%d" % handle,
            meta,
            lambda cause: None,
            metadata.Clock(),
            owner=(there.st_uid, there.st_gid),
            mode=stat.S_IMODE(there.st_mode),
            bare=False,
            link=stat.S_ISLNK(there.st_mode),
            device=there.st_dev,
        )
    finally:
        os.close(handle)


def _node_at(place: bytes) -> Node | None:
    try:
        return Node(place, stat.S_ISDIR(os.lstat(place).st_mode))
    except FileNotFoundError:
        return None


def _meta_at(place: bytes, status: os.stat_result) -> Meta:
    directory = os.open(os.path.dirname(place), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return read_meta(directory, os.path.basename(place), status)
    finally:
        os.close(directory)
