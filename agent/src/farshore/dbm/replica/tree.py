"""Apply operations to one root of the replica.

Every operation names a state to reach and may be repeated. What the operation needs and does not find (the source of
a move, the base of a delta, a parent directory) raises BaseUnknown: the source's picture of this tree is wrong there
and must be made anew. Metadata that cannot be kept is a problem to report, not a reason to refuse the content.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import itertools
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial

from farshore.dbm.messages import Entry, Meta
from farshore.dbm.reading import CheckedReader, digest_of
from farshore.dbm.replica import metadata
from farshore.dbm.replica.paths import MISSING, PREFIX, Handles, check, open_regular, remove_tree
from farshore.dbm.replica.stage import Birth, Stage, Staged
from farshore.dbm.unkept import Unkept
from farshore.errors import FarshoreError, UnsafePath
from farshore.fmm import scanner
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Root

#: What says that a file can have no further name there: mounts, limits, filesystems without such names.
_NO_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP)
#: Staged files whose metadata could not be kept in full, and that are not placed yet, at most.
_MOST_PENDING = 100_000
_READ = 1 << 20
#: Longer paths are kept aside under a short name: the system takes 4096 bytes, the place aside included.
_LONG_PATH = 2048
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
    """The files below one root; ``root`` is absolute. One thread at a time.

    A root that is a symbolic link to a directory is that directory: the administrator's link, as none is ever made
    in a root's place here.
    """

    def __init__(self, root: bytes, patterns: Root, unkept: Unkept | None = None) -> None:
        self.root = root.rstrip(b"/")
        if os.path.islink(self.root) and os.path.isdir(self.root):
            self.root = os.path.realpath(self.root)
        self._filter = Filter(patterns)
        self._handles = Handles(self.root)
        #: Metadata that could not be kept.
        self.unkept = Unkept() if unkept is None else unkept
        # Of staged files, by device and inode, until they are placed.
        self._pending: dict[tuple[int, int], list[str]] = {}
        self._clock = metadata.Clock()
        #: Where to keep what nobody else has, and the judge of what that is; None in the ordinary case.
        self._aside: bytes | None = None
        self._rescue: Rescue | None = None
        #: Device and inode of the files that were placed since keep_aside: the source has them.
        self._placed: set[tuple[int, int]] = set()
        self.kept_aside = 0
        #: Set from another thread, ends the reading of contents for good: a change of owner must not wait for it.
        self.interrupted = threading.Event()
        os.makedirs(os.path.dirname(self.root), exist_ok=True)

    def close(self) -> None:
        """Give back the directory handles."""
        self.end()

    def keep_aside(self, directory: bytes | None, judge: Rescue | None) -> None:
        """Keep files of which ``judge`` says that nobody else has them below ``directory``; None ends it."""
        self._aside, self._rescue = directory, judge
        self._placed.clear()

    # --- reading

    def open_file(self, path: bytes) -> int | None:
        """A descriptor for reading the regular file at ``path``; None when there is none."""
        return open_regular(self._handles, path)

    def open_apart(self, path: bytes) -> int | None:
        """As ``open_file``, from any thread, while another one changes the tree; raises PermissionError more often."""
        handles = Handles(self.root, widening=False)
        try:
            return open_regular(handles, path)
        finally:
            handles.forget()

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
        self.end()

    def _digest(self, path: bytes) -> bytes | None:
        handle = self.open_file(path)
        if handle is None:
            return None

        def check() -> None:
            if self.interrupted.is_set():
                raise InterruptedError(errno.EINTR, "the listing was interrupted")

        with io.FileIO(handle) as file:
            return digest_of(CheckedReader(file, check))[1]

    # --- writing

    def make_directory(self, path: bytes, meta: Meta) -> None:
        """Make sure that a directory stands at ``path``."""
        with self._expecting(path):
            parent, name = self._handles.writable_parent(check(path))
            there = self._lstat(parent, name)
            if there is not None and not stat.S_ISDIR(there.st_mode):
                self._discard(parent, name, path, there)
                there = None
            if there is None:
                os.mkdir(name, 0o700, dir_fd=parent)
            self._apply_meta(parent, name, path, meta, FileKind.DIRECTORY)
            self._handles.settled(path)

    def prepare(self, handle: int, meta: Meta, birth: Birth | None = None) -> None:
        """Give a staged file its metadata before it gets its name; ``birth``: it is as it was created for ``meta``."""
        causes: list[str] = []
        owner = mode = None
        if birth is not None:
            owner = birth.uid, birth.gid
            mode = None if birth.attributes else meta.mode & birth.permissions
        bare = birth is not None and not birth.attributes
        metadata.give(handle, meta, causes.append, self._clock, owner=owner, mode=mode, bare=bare)
        if causes or self._pending:
            # What is told of a staged file is known by its path only when it is placed.
            status = os.fstat(handle)
            self._pending.pop((status.st_dev, status.st_ino), None)
            if causes and len(self._pending) < _MOST_PENDING:
                self._pending[status.st_dev, status.st_ino] = causes

    def place(self, stage: Stage, staged: Staged, path: bytes, meta: Meta) -> None:
        """Rename a staged, durable file that was prepared with ``meta`` to its name in the tree."""
        try:
            parent, name = self._handles.writable_parent(path)
            if self._pending or self.unkept:
                self._settle_placed(staged, path)
            if self._rescue is None:
                try:
                    os.rename(staged.name, name, src_dir_fd=staged.directory, dst_dir_fd=parent)
                    stage.placed(staged)
                    return
                except OSError as error:
                    if error.errno not in (errno.EISDIR, errno.EXDEV):
                        raise
            self._place_over(stage, staged, path, meta)
        except OSError as error:
            raise _unexpected(path, error) from None

    def _place_over(self, stage: Stage, staged: Staged, path: bytes, meta: Meta) -> None:
        """As ``place``, where it matters what is there."""
        parent, name = self._handles.parent(path)
        there = self._lstat(parent, name)
        if there is not None:
            if stat.S_ISDIR(there.st_mode):
                self._discard(parent, name, path, there)
                parent, name = self._handles.parent(path)
            else:
                self._rescue_copy(parent, name, path, there)
        try:
            os.rename(staged.name, name, src_dir_fd=staged.directory, dst_dir_fd=parent)
            stage.placed(staged)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # Another filesystem is mounted somewhere below the root.
            self._place_copy(staged, parent, name, path, meta)
            stage.discard(staged)
        if self._rescue is not None:
            placed = os.stat(name, dir_fd=parent, follow_symlinks=False)
            self._placed.add((placed.st_dev, placed.st_ino))

    def full(self, path: bytes) -> bytes:
        """The absolute path of ``path``."""
        return self.root + b"/" + path if path else self.root

    def status(self, path: bytes) -> os.stat_result:
        """What is at ``path``, which was just placed; raises OSError."""
        parent, name = self._handles.parent(path)
        return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def make_symlink(self, path: bytes, meta: Meta, target: bytes) -> None:
        """Put a symbolic link at ``path``; its target is data and is never followed."""
        self._no_link_as_root(path)
        self._replace(path, lambda parent, name: os.symlink(target, name, dir_fd=parent))
        with self._expecting(path):
            parent, name = self._handles.parent(path)
            self._apply_meta(parent, name, path, meta, FileKind.SYMLINK)

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
            if path:
                self.remove(path)
            self.unkept.settle(
                self.full(path), [f"{kind.name.lower().replace('_', ' ')} cannot be made: not permitted"]
            )
            return
        with self._expecting(path):
            parent, name = self._handles.parent(path)
            self._apply_meta(parent, name, path, meta, kind)

    def link(self, path: bytes, to: bytes) -> None:
        """Make ``path`` another name of the file at ``to``."""
        with self._expecting(to):
            source_parent, source_name = self._handles.parent(check(to))
            source = os.stat(source_name, dir_fd=source_parent, follow_symlinks=False)
        if stat.S_ISLNK(source.st_mode):
            self._no_link_as_root(path)
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = self._lstat(parent, name)
            if there is not None and (there.st_dev, there.st_ino) == (source.st_dev, source.st_ino):
                return
        self._replace(path, lambda parent, name: self._link_or_copy(to, source, parent, name, path))

    def _link_or_copy(self, to: bytes, source: os.stat_result, parent: int, name: bytes, path: bytes) -> None:
        source_parent, source_name = self._handles.parent(to)
        try:
            os.link(source_name, name, src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)
            if self.unkept:
                self.unkept.linked(self.full(path), self.full(to))
        except OSError as error:
            if error.errno not in _NO_LINK or not stat.S_ISREG(source.st_mode):
                raise
            seen = scanner.observe(self.root, 0, to)
            if seen is None or seen.kind is not FileKind.FILE:
                raise BaseUnknown(to, "it vanished meanwhile") from None
            meta = Meta(seen.mode, seen.uid, seen.gid, seen.atime_ns, seen.mtime_ns, list(seen.xattrs))
            self._place_copy(Staged(source_parent, source_name), parent, name, path, meta)
            self.unkept.note(self.full(path), f"hard links cannot be kept, copies are: {error.strerror}")

    def move(self, path: bytes, to: bytes) -> None:
        """Rename ``path`` to ``to``."""
        if not path or not to:
            raise BaseUnknown(path, "a root cannot be moved")
        with self._expecting(path):
            parent, name = self._handles.writable_parent(check(path))
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(there.st_mode):
                self._handles.widen(path)  # its .. is going to change
        with self._expecting(to):
            parent, name = self._handles.parent(path)
            to_parent, to_name = self._handles.writable_parent(check(to))
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
        if self.unkept:
            self.unkept.moved(self.full(path), self.full(to), below=stat.S_ISDIR(there.st_mode))
        self._handles.moved(path, to)

    def remove(self, path: bytes) -> None:
        """Make sure that nothing is at ``path``."""
        if not path:
            raise BaseUnknown(path, "a root is never removed")
        try:
            parent, name = self._handles.writable_parent(check(path))
        except OSError as error:
            if error.errno in MISSING:
                return
            raise
        there = self._lstat(parent, name)
        if there is not None:
            self._discard(parent, name, path, there)
        elif self.unkept:
            # A device that could not be made, for example.
            self.unkept.gone(self.full(path), below=False)

    def set_meta(self, path: bytes, meta: Meta) -> None:
        """Give ``path`` this metadata."""
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            self._apply_meta(parent, name, path, meta, _kind(there.st_mode))
            self._handles.settled(path)

    def sync(self, paths: set[bytes | None]) -> None:
        """Make directories' names and files' metadata durable (None: beside the root).

        What is gone needs it no more.
        """
        self._handles.restore()
        for path in paths:
            try:
                os.fsync(self._handles.directory(path))
            except FileNotFoundError:
                continue
            except (NotADirectoryError, PermissionError):
                if path is None or not self._sync_file(path):
                    self.sync_all(paths)
                    return

    def sync_all(self, paths: set[bytes | None]) -> None:
        """As ``sync``, by writing back all filesystems that ``paths`` lie on: one call instead of thousands."""
        self._handles.restore()
        done: set[int] = set()
        for path in {None, *(path if path is None else _above(path) for path in paths), *paths}:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                handle = self._handles.directory(path)
                device = os.fstat(handle).st_dev
                if device not in done:
                    syncfs(handle)
                    done.add(device)

    def end(self) -> None:
        """A transaction ends: no handle may outlive it, as directories may be moved by others."""
        with contextlib.suppress(OSError):
            self._handles.restore()
        self._handles.forget()

    # --- how

    @staticmethod
    def _no_link_as_root(path: bytes) -> None:
        if not path:
            # It would lead everything that follows to where the source likes.
            raise UnsafePath(path, "a root's place is not for a symbolic link")

    def _sync_file(self, path: bytes) -> bool:
        """Make a file's metadata durable; False when it is of a kind, or has a mode, that does not permit it."""
        try:
            handle = self.open_file(path)
        except PermissionError:
            return False
        if handle is None:
            return False
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return True

    def _place_copy(self, staged: Staged, parent: int, name: bytes, path: bytes, meta: Meta) -> None:
        """Copy a staged file beside ``name``, make it durable, and rename it."""
        temporary = PREFIX + os.urandom(8).hex().encode()
        source = os.open(staged.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staged.directory)
        with os.fdopen(source, "rb") as reader:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            target = os.open(temporary, flags, 0o600, dir_fd=parent)
            try:
                with os.fdopen(target, "wb") as writer:
                    status = os.fstat(source)
                    sparse = status.st_blocks * 512 < status.st_size
                    while block := reader.read(_READ):
                        if sparse and not block.strip(b"\0"):
                            writer.seek(len(block), os.SEEK_CUR)
                        else:
                            writer.write(block)
                    writer.truncate()
                    causes: list[str] = []
                    give = partial(metadata.give, owner=None, mode=None, bare=False, device=os.fstat(target).st_dev)
                    give(target, meta, causes.append, self._clock)
                    self.unkept.settle(self.full(path), causes)
                    os.fsync(target)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                os.unlink(temporary, dir_fd=parent)
                raise

    def _replace(self, path: bytes, make: Callable[[int, bytes], None]) -> None:
        """Make something under a name of ours and rename it over ``path``: never a moment without either."""
        with self._expecting(path):
            parent, name = self._handles.writable_parent(check(path))
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
        if self.unkept:
            self.unkept.gone(self.full(path), below=stat.S_ISDIR(there.st_mode))
        if stat.S_ISDIR(there.st_mode):
            self._handles.forget()
            parent, name = self._handles.parent(path)
            # All that is removed is looked at, what the patterns exclude too: it would be lost as well.
            remove_tree(parent, name, path, None if self._rescue is None else self._rescue_copy)
        else:
            self._rescue_copy(parent, name, path, there)
            os.unlink(name, dir_fd=parent)

    def _rescue_copy(self, parent: int, name: bytes, path: bytes, there: os.stat_result) -> None:
        """Keep what is about to be lost, when nobody else is known to have it."""
        if self._rescue is None or self._aside is None or not stat.S_ISREG(there.st_mode):
            return
        identity = there.st_dev, there.st_ino
        if identity in self._placed:
            if there.st_nlink == 1:
                self._placed.discard(identity)  # the number is free for another file now
            return
        if not self._rescue(path, there):
            return
        target = self._free_name(path or os.path.basename(self.root), identity)
        if target is None:
            return
        try:
            os.link(name, target, src_dir_fd=parent, follow_symlinks=False)
        except OSError:
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                with os.fdopen(source, "rb") as reader, open(target, "xb") as writer:
                    shutil.copyfileobj(reader, writer)
                    writer.flush()
                    os.fsync(writer.fileno())
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(target)
                raise
        self.kept_aside += 1

    def _free_name(self, path: bytes, identity: tuple[int, int]) -> bytes | None:
        """Where to keep a file of this path; None when that very file is kept already.

        What was kept before may be a file where a directory is needed, the reverse, or an earlier state.
        """
        assert self._aside is not None
        if len(path) > _LONG_PATH:
            path = b"long-" + hashlib.sha256(path).hexdigest().encode()
        for number in itertools.count():
            target = self._aside + (b"~%d" % number if number else b"") + b"/" + path
            try:
                os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
                there = os.lstat(target)
            except FileNotFoundError:
                return target
            except (FileExistsError, NotADirectoryError):
                continue
            if (there.st_dev, there.st_ino) == identity:
                return None
        raise AssertionError("unreachable")

    def _apply_meta(self, parent: int, name: bytes, path: bytes, meta: Meta, kind: FileKind) -> None:
        """Change what differs: a change that changes nothing would cost a write of the inode all the same."""
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            there = os.fstat(handle)
            link = stat.S_ISLNK(there.st_mode)
            if link is not (kind is FileKind.SYMLINK):
                raise BaseUnknown(name, "it has become a symbolic link" if link else "it is no symbolic link any more")
            causes: list[str] = []
            metadata.give(
                # Most calls take no O_PATH descriptor; this leads to what it stands for, a link itself included.
                b"/proc/self/fd/%d" % handle,
                meta,
                causes.append,
                self._clock,
                owner=(there.st_uid, there.st_gid),
                mode=stat.S_IMODE(there.st_mode),
                bare=False,
                link=link,
                device=there.st_dev,
            )
        finally:
            os.close(handle)
        if causes or self.unkept:
            self.unkept.settle(self.full(path), causes)

    def _settle_placed(self, staged: Staged, path: bytes) -> None:
        """What could not be kept of a staged file is known under its path from now on."""
        status = os.stat(staged.name, dir_fd=staged.directory, follow_symlinks=False)
        self.unkept.settle(self.full(path), self._pending.pop((status.st_dev, status.st_ino), ()))

    @staticmethod
    def _unreadable(path: bytes, error: OSError) -> None:
        # A replica that cannot be read in full must not pass for one that holds less.
        raise error

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
            raise _unexpected(path, error) from None


def _unexpected(path: bytes, error: OSError) -> Exception:
    """What ``error`` says of the source's picture of the tree: BaseUnknown, or the error itself."""
    if error.errno in MISSING or error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
        return BaseUnknown(path, error.strerror or str(error))
    return error


def _above(path: bytes) -> bytes | None:
    return path.rpartition(b"/")[0] if path else None


def _kind(mode: int) -> FileKind:
    if stat.S_ISDIR(mode):
        return FileKind.DIRECTORY
    return FileKind.SYMLINK if stat.S_ISLNK(mode) else FileKind.FILE
