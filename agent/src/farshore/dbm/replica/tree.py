"""Apply operations to one root of the replica.

Every operation names a state to reach and may be repeated. What the operation needs and does not find (the source of
a move, the base of a delta, a parent directory) raises BaseUnknown: the source's picture of this tree is wrong there
and must be made anew. Metadata that cannot be kept is a problem to report, not a reason to refuse the content.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial

import blake3

from farshore.dbm.messages import Entry, Meta
from farshore.dbm.replica.paths import Handles, check
from farshore.dbm.replica.stage import PREFIX
from farshore.errors import FarshoreError
from farshore.fmm import scanner
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Root

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_CANNOT_KEEP = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
_READ = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)

#: Told before a file that this side may not have sent is overwritten or removed: (path, its lstat).
Rescue = Callable[[bytes, os.stat_result], bool]


def syncfs(handle: int) -> None:
    """Write back the whole filesystem that ``handle`` lies on (syncfs(2)); raises OSError."""
    if _libc.syncfs(handle) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class BaseUnknown(FarshoreError):
    """{0!r}: {1}"""


class Tree:
    """The files below one root; ``root`` is absolute. One thread at a time."""

    def __init__(self, root: bytes, patterns: Root) -> None:
        self.root = root.rstrip(b"/")
        self._filter = Filter(patterns)
        self._handles = Handles(self.root)
        #: Metadata that could not be kept since the last look, by cause.
        self.problems: dict[str, None] = {}
        #: Where to keep what nobody else has, and the judge of what that is; None in the ordinary case.
        self.aside: bytes | None = None
        self.rescue: Rescue | None = None
        self.kept_aside = 0
        os.makedirs(os.path.dirname(self.root), exist_ok=True)

    def close(self) -> None:
        """Give back the directory handles."""
        self._handles.forget()

    # --- reading

    def open_file(self, path: bytes) -> int | None:
        """A descriptor for reading the regular file at ``path``; None when there is none."""
        try:
            parent, name = self._handles.parent(check(path))
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            if error.errno in _MISSING:
                return None
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        return handle

    def entries(self, root: int, digests: bool) -> Iterator[Entry]:
        """All that is in the tree, parents before children; with ``digests``, every file is read."""
        for seen in scanner.walk(self.root, root, b"", self._filter, self._unreadable):
            if seen.kind is FileKind.SOCKET:
                continue
            digest = None
            if digests and seen.kind is FileKind.FILE:
                digest = self._digest(seen.path)
                if digest is None:
                    continue
            meta = Meta(seen.mode, seen.uid, seen.gid, seen.atime_ns, seen.mtime_ns, list(seen.xattrs))
            yield Entry(root, seen.path, int(seen.kind), meta, seen.size, seen.nlink, seen.rdev, seen.target, digest)
        self._handles.forget()

    def _digest(self, path: bytes) -> bytes | None:
        handle = self.open_file(path)
        if handle is None:
            return None
        hasher = blake3.blake3()
        try:
            while block := os.read(handle, _READ):
                hasher.update(block)
        finally:
            os.close(handle)
        return hasher.digest()

    # --- writing

    def make_directory(self, path: bytes, meta: Meta) -> None:
        """Make sure that a directory stands at ``path``."""
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = self._lstat(parent, name)
            if there is not None and not stat.S_ISDIR(there.st_mode):
                self._discard(parent, name, path, there)
                there = None
            if there is None:
                os.mkdir(name, 0o700, dir_fd=parent)
            self._apply_meta(parent, name, meta, FileKind.DIRECTORY)

    def prepare(self, handle: int, meta: Meta) -> None:
        """Give a staged file its metadata before it gets its name."""
        where = f"/proc/self/fd/{handle}".encode()
        self._keep("owner", lambda: os.fchown(handle, meta.uid, meta.gid))
        os.fchmod(handle, meta.mode)
        self._apply_xattrs(where, meta, follow=True)
        os.utime(handle, ns=(meta.atime_ns, meta.mtime_ns))

    def place(self, staged: bytes, path: bytes) -> None:
        """Rename a staged, durable file to its name in the tree."""
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = self._lstat(parent, name)
            if there is not None:
                if stat.S_ISDIR(there.st_mode):
                    self._discard(parent, name, path, there)
                else:
                    self._rescue_copy(parent, name, path, there)
            os.rename(staged, name, dst_dir_fd=parent)

    def make_symlink(self, path: bytes, meta: Meta, target: bytes) -> None:
        """Put a symbolic link at ``path``; its target is data and is never followed."""
        self._replace(path, lambda parent, name: os.symlink(target, name, dir_fd=parent))
        with self._expecting(path):
            parent, name = self._handles.parent(path)
            self._apply_meta(parent, name, meta, FileKind.SYMLINK)

    def make_node(self, path: bytes, meta: Meta, kind: FileKind, rdev: int) -> None:
        """Put a fifo or, where permitted, a device node at ``path``."""
        types = {
            FileKind.FIFO: stat.S_IFIFO,
            FileKind.CHARACTER_DEVICE: stat.S_IFCHR,
            FileKind.BLOCK_DEVICE: stat.S_IFBLK,
        }
        if kind not in types:
            raise BaseUnknown(path, f"{kind!r} is not a kind of node")
        try:
            self._replace(path, lambda parent, name: os.mknod(name, types[kind] | 0o600, device=rdev, dir_fd=parent))
        except PermissionError:
            self.problems[f"{kind.name.lower().replace('_', ' ')}: not permitted to make one"] = None
            return
        with self._expecting(path):
            parent, name = self._handles.parent(path)
            self._apply_meta(parent, name, meta, kind)

    def link(self, path: bytes, to: bytes) -> None:
        """Make ``path`` another name of the file at ``to``."""
        with self._expecting(to):
            source_parent, source_name = self._handles.parent(check(to))
            source = os.stat(source_name, dir_fd=source_parent, follow_symlinks=False)
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = self._lstat(parent, name)
            if there is not None and (there.st_dev, there.st_ino) == (source.st_dev, source.st_ino):
                return
        self._replace(
            path,
            lambda parent, name: os.link(
                self._handles.parent(to)[1],
                name,
                src_dir_fd=self._handles.parent(to)[0],
                dst_dir_fd=parent,
                follow_symlinks=False,
            ),
        )

    def move(self, path: bytes, to: bytes) -> None:
        """Rename ``path`` to ``to``."""
        if not path or not to:
            raise BaseUnknown(path, "a root cannot be moved")
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        with self._expecting(to):
            to_parent, to_name = self._handles.parent(check(to))
            target = self._lstat(to_parent, to_name)
            if target is not None and stat.S_ISDIR(target.st_mode):
                self._discard(to_parent, to_name, to, target)
            elif target is not None:
                self._rescue_copy(to_parent, to_name, to, target)
                if stat.S_ISDIR(there.st_mode):
                    os.unlink(to_name, dir_fd=to_parent)
                elif (target.st_dev, target.st_ino) == (there.st_dev, there.st_ino):
                    # rename(2) between two names of one file does nothing; the old name must go.
                    os.unlink(name, dir_fd=parent)
                    return
            parent, name = self._handles.parent(path)
            to_parent, to_name = self._handles.parent(to)
            self._rename(parent, name, to_parent, to_name)
        self._handles.forget()

    def remove(self, path: bytes) -> None:
        """Make sure that nothing is at ``path``."""
        if not path:
            raise BaseUnknown(path, "a root is never removed")
        try:
            parent, name = self._handles.parent(check(path))
        except OSError as error:
            if error.errno in _MISSING:
                return
            raise
        there = self._lstat(parent, name)
        if there is not None:
            self._discard(parent, name, path, there)

    def set_meta(self, path: bytes, meta: Meta) -> None:
        """Give ``path`` this metadata."""
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            self._apply_meta(parent, name, meta, _kind(there.st_mode))

    def sync(self, directories: set[bytes | None]) -> None:
        """Make the names in ``directories`` durable (None: beside the root); one that is gone needs it no more."""
        for path in directories:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.fsync(self._handles.directory(path))

    def sync_all(self) -> None:
        """Make everything on the root's filesystem durable: one call instead of thousands."""
        syncfs(self._handles.directory(None))

    def end(self) -> None:
        """A transaction ends: no handle may outlive it, as directories may be moved by others."""
        self._handles.forget()

    # --- how

    def _replace(self, path: bytes, make: Callable[[int, bytes], None]) -> None:
        """Make something under a name of ours and rename it over ``path``: never a moment without either."""
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = self._lstat(parent, name)
            if there is None:
                make(parent, name)
                return
            if stat.S_ISDIR(there.st_mode):
                self._discard(parent, name, path, there)
                parent, name = self._handles.parent(path)
                make(parent, name)
                return
            self._rescue_copy(parent, name, path, there)
            temporary = PREFIX + os.urandom(8).hex().encode()
            make(parent, temporary)
            try:
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                os.unlink(temporary, dir_fd=parent)
                raise

    def _rename(self, parent: int, name: bytes, to_parent: int, to_name: bytes) -> None:
        try:
            os.rename(name, to_name, src_dir_fd=parent, dst_dir_fd=to_parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # Below one root there may be several mounts, or an overlay that cannot rename a lower directory.
            raise BaseUnknown(name, "it cannot be renamed across filesystems") from None

    def _discard(self, parent: int, name: bytes, path: bytes, there: os.stat_result) -> None:
        if stat.S_ISDIR(there.st_mode):
            if self.rescue is not None:
                self._rescue_below(path)
            self._handles.forget()
            parent, name = self._handles.parent(path)
            shutil.rmtree(name, dir_fd=parent)
        else:
            self._rescue_copy(parent, name, path, there)
            os.unlink(name, dir_fd=parent)

    def _rescue_below(self, path: bytes) -> None:
        for seen in list(scanner.walk(self.root, 0, path, self._filter, self._unreadable)):
            if seen.kind is not FileKind.DIRECTORY:
                parent, name = self._handles.parent(seen.path)
                there = self._lstat(parent, name)
                if there is not None:
                    self._rescue_copy(parent, name, seen.path, there)

    def _rescue_copy(self, parent: int, name: bytes, path: bytes, there: os.stat_result) -> None:
        """Keep what is about to be lost, when nobody else is known to have it."""
        if self.rescue is None or self.aside is None or not stat.S_ISREG(there.st_mode):
            return
        if not self.rescue(path, there):
            return
        target = self.aside + b"/" + (path or os.path.basename(self.root))
        os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
        if os.path.lexists(target):
            return
        try:
            os.link(name, target, src_dir_fd=parent, follow_symlinks=False)
        except OSError:
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            with os.fdopen(source, "rb") as reader, open(target, "xb") as writer:
                shutil.copyfileobj(reader, writer)
                os.fsync(writer.fileno())
        self.kept_aside += 1

    def _apply_meta(self, parent: int, name: bytes, meta: Meta, kind: FileKind) -> None:
        self._keep("owner", lambda: os.chown(name, meta.uid, meta.gid, dir_fd=parent, follow_symlinks=False))
        where = f"/proc/self/fd/{parent}/".encode() + name
        if kind is not FileKind.SYMLINK:
            # chmod follows links; the kind was read a moment ago and a handle of ours pins the directory.
            handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                where = f"/proc/self/fd/{handle}".encode()
                if stat.S_ISLNK(os.fstat(handle).st_mode):
                    raise BaseUnknown(name, "it has become a symbolic link")
                os.chmod(where, meta.mode)
                self._apply_xattrs(where, meta, follow=True)
            finally:
                os.close(handle)
        else:
            self._apply_xattrs(where, meta, follow=False)
        os.utime(name, ns=(meta.atime_ns, meta.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _apply_xattrs(self, where: bytes, meta: Meta, follow: bool) -> None:
        wanted = dict(meta.xattrs)
        try:
            there = {os.fsencode(name) for name in os.listxattr(where, follow_symlinks=follow)}
        except OSError:
            there = set()
        for name in there - set(wanted):
            if scanner.is_replicated_xattr(name):
                self._keep(_namespace(name), partial(os.removexattr, where, name, follow_symlinks=follow))
        for name, value in wanted.items():
            self._keep(_namespace(name), partial(os.setxattr, where, name, value, follow_symlinks=follow))

    @staticmethod
    def _unreadable(path: bytes, error: OSError) -> None:
        # A replica that cannot be read in full must not pass for one that holds less.
        raise error

    def _keep(self, what: str, change: Callable[[], None]) -> None:
        try:
            change()
        except OSError as error:
            if error.errno not in _CANNOT_KEEP:
                raise
            self.problems[f"{what} cannot be kept here: {error.strerror}"] = None

    @staticmethod
    def _lstat(parent: int, name: bytes) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _expecting(self, path: bytes) -> Iterator[None]:
        """What is missing here was expected by the source: its picture of the tree is wrong."""
        try:
            yield
        except OSError as error:
            if error.errno in _MISSING or error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
                raise BaseUnknown(path, error.strerror or str(error)) from None
            raise


def _namespace(name: bytes) -> str:
    return "xattr " + name.split(b".", 1)[0].decode("ascii", "replace")


def _kind(mode: int) -> FileKind:
    if stat.S_ISDIR(mode):
        return FileKind.DIRECTORY
    return FileKind.SYMLINK if stat.S_ISLNK(mode) else FileKind.FILE
