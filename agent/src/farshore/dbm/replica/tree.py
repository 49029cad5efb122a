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

import msgspec

from farshore.dbm import wire
from farshore.dbm.messages import Entry, Meta
from farshore.dbm.reading import CheckedReader, digest_of
from farshore.dbm.replica import metadata
from farshore.dbm.replica.paths import (
    MAX_PATH,
    MISSING,
    PREFIX,
    Handles,
    check,
    mounts,
    open_regular,
    remove_tree,
    visit_tree,
)
from farshore.dbm.replica.stage import Birth, Staged
from farshore.dbm.unkept import Unkept
from farshore.errors import FarshoreError
from farshore.fmm import scanner
from farshore.fmm.attributes import is_replicated
from farshore.fmm.limits import too_large
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Root

_NODES = {
    FileKind.FIFO: stat.S_IFIFO,
    FileKind.CHARACTER_DEVICE: stat.S_IFCHR,
    FileKind.BLOCK_DEVICE: stat.S_IFBLK,
}
#: What says that a file can have no further name there: mounts, limits, filesystems without such names.
_NO_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP)
#: Staged files whose metadata could not be kept in full, and that are not placed yet, at most.
_MOST_PENDING = 100_000
_READ = 1 << 20
#: Longer paths are kept aside under a short name: the system takes 4096 bytes, the place aside included.
_LONG_PATH = 2048
#: Bytes of attributes that an Entry has room for beside its path and target, each with what frames it.
_MOST_XATTRS = wire.MAX_FRAME - (64 << 10)
_XATTR_OVERHEAD = 16
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
        self._patterns = patterns
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
        #: The filesystems that were met since the last sync, each with a path on it.
        self._devices: dict[int, bytes] = {}
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
        """All that is in the tree, parents before children; with ``digests``, every file is read.

        But none that is larger than allowed, as nobody compares it. What is mounted below is left out where it is left
        alone; the ``rdev`` of its mount point is 1 then.
        """
        named = _Named(self._filter)
        device = 0
        for seen in scanner.walk(self.root, root, b"", named, self._unreadable):
            self._check_interrupted()
            if seen.kind is FileKind.SOCKET:
                continue
            device = device if seen.path else seen.dev
            if self._patterns.one_filesystem and seen.kind is FileKind.DIRECTORY and seen.dev != device:
                # The filter is asked once more before a directory is entered.
                named.closed.add(seen.path)
                seen = msgspec.structs.replace(seen, rdev=1)
            digest = None
            if digests and seen.kind is FileKind.FILE and not too_large(self._patterns, seen.size):
                digest = self._digest(seen.path)
                if digest is None:
                    continue
            # More than a frame holds is told as none: then they are set anew, or taken away.
            size = sum(len(name) + len(value) + _XATTR_OVERHEAD for name, value in seen.xattrs)
            xattrs = list(seen.xattrs) if size <= _MOST_XATTRS else []
            meta = Meta(seen.mode, seen.uid, seen.gid, seen.atime_ns, seen.mtime_ns, xattrs)
            yield Entry(root, seen.path, int(seen.kind), meta, seen.size, seen.nlink, seen.rdev, seen.target, digest)
        self.end()

    def _digest(self, path: bytes) -> bytes | None:
        handle = self.open_file(path)
        if handle is None:
            return None

        with io.FileIO(handle) as file:
            return digest_of(CheckedReader(file, self._check_interrupted))[1]

    def _check_interrupted(self) -> None:
        if self.interrupted.is_set():
            raise InterruptedError(errno.EINTR, "the listing was interrupted")

    # --- looking before writing

    def status(self, path: bytes) -> os.stat_result | None:
        """The lstat of what is at ``path``, None when nothing is; raises UnsafePath, OSError."""
        try:
            parent, name = self._handles.writable_parent(path)
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno in MISSING:
                return None
            raise
        self._devices.setdefault(there.st_dev, path)
        return there

    def metadata(self, path: bytes, status: os.stat_result) -> Meta:
        """The metadata of what is at ``path``, whose lstat is ``status``."""
        parent, name = self._handles.writable_parent(path)
        meta = read_meta(parent, name, status)
        mode = self._handles.true_mode(status)
        return meta if mode == meta.mode else msgspec.structs.replace(meta, mode=mode)

    def is_empty(self, path: bytes) -> bool:
        """Whether the directory at ``path`` is empty."""
        self._handles.widen(path)
        with os.scandir(self._handles.directory(path)) as found:
            return next(found, None) is None

    # --- writing

    def keep(self, path: bytes, folder: int, name: bytes, *, leave: bool) -> None:
        """Take what is at ``path``, no directory unless it has to go, to ``name`` in ``folder``, a directory's handle.

        With ``leave``, a file stays at ``path`` as well, until something else takes its place. What is there under that
        name already was taken before. Raises BaseUnknown when nothing is at ``path``.
        """
        if _lstat(folder, name) is not None:
            return
        with self._expecting(path):
            parent, here = self._handles.writable_parent(path)
            there = os.stat(here, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(there.st_mode):
                self._check_mounts(path)
                self._rescue_below(path)
                self._handles.widen(path)  # its .. is going to change
                self._handles.forget()
                parent, here = self._handles.parent(path)
            else:
                self._rescue_copy(parent, here, path, there)
        try:
            if leave and not stat.S_ISDIR(there.st_mode):
                try:
                    os.link(here, name, src_dir_fd=parent, dst_dir_fd=folder, follow_symlinks=False)
                    return
                except OSError as error:
                    if error.errno not in (errno.EMLINK, errno.EPERM, errno.ENOTSUP):
                        raise
            os.rename(here, name, src_dir_fd=parent, dst_dir_fd=folder)
            self._gone(path, there)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise _unexpected(path, error) from None
            self._note_no_history(path, there)
            if not leave or stat.S_ISDIR(there.st_mode):
                self._clear(parent, here, path, there)

    def remove_directory(self, path: bytes) -> None:
        """Remove the directory at ``path``, which is empty."""
        if not path:
            raise BaseUnknown(path, "a root is never removed")
        with self._expecting(path):
            parent, name = self._handles.writable_parent(path)
            self._handles.forget()
            parent, name = self._handles.parent(path)
            os.rmdir(name, dir_fd=parent)
        self.forget(path, below=True)

    def forget(self, path: bytes, *, below: bool = False) -> None:
        """Nothing is at ``path``, so nothing of it is not kept: a device that could not be made, for example."""
        if self.unkept:
            self.unkept.gone(self.full(path), below=below)

    def full(self, path: bytes) -> bytes:
        """The absolute path of ``path``."""
        return self.root + b"/" + path if path else self.root

    def make_directory(self, path: bytes, meta: Meta) -> None:
        """Make sure that a directory stands at ``path``, where no other thing does."""
        with self._expecting(path):
            parent, name = self._handles.writable_parent(check(path))
            with contextlib.suppress(FileExistsError):
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
            self._await_place(os.fstat(handle), causes)

    def _await_place(self, status: os.stat_result, causes: list[str]) -> None:
        """What could not be kept of something that is staged is known by its path only when it is placed."""
        self._pending.pop((status.st_dev, status.st_ino), None)
        if causes and len(self._pending) < _MOST_PENDING:
            self._pending[status.st_dev, status.st_ino] = causes

    def put(self, staged: Staged, path: bytes, meta: Meta) -> None:
        """Rename what was staged and prepared with ``meta`` to its name; what was there, no directory, is gone."""
        try:
            parent, name = self._handles.writable_parent(path)
            if self._pending or self.unkept:
                self._settle_placed(staged, path)
            try:
                os.rename(staged.name, name, src_dir_fd=staged.directory, dst_dir_fd=parent)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # Another filesystem is mounted somewhere below the root.
                self._copy_beside(staged, parent, name, path, meta)
                os.fsync(parent)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(staged.name, dir_fd=staged.directory)
            if self._rescue is not None:
                placed = os.stat(name, dir_fd=parent, follow_symlinks=False)
                self._placed.add((placed.st_dev, placed.st_ino))
        except OSError as error:
            raise _unexpected(path, error) from None

    def make_symlink(self, staged: Staged, path: bytes, meta: Meta, target: bytes) -> None:
        """Put a symbolic link at ``path``, by the free name ``staged``; its target is data and is never followed."""
        os.symlink(target, staged.name, dir_fd=staged.directory)
        self._prepare_name(staged, meta, FileKind.SYMLINK)
        self.put(staged, path, meta)

    def make_node(self, staged: Staged, path: bytes, meta: Meta, kind: FileKind, rdev: int) -> None:
        """Put a fifo or, where permitted, a device node at ``path``, by the free name ``staged``."""
        if kind not in _NODES:
            raise BaseUnknown(path, f"{kind!r} is not a kind of node")
        try:
            os.mknod(staged.name, _NODES[kind] | 0o600, device=rdev, dir_fd=staged.directory)
        except PermissionError:
            there = self.status(path) if path else None
            if there is not None and not stat.S_ISDIR(there.st_mode):
                self._clear(*self._handles.writable_parent(path), path, there)
            self.unkept.settle(
                self.full(path), [f"{kind.name.lower().replace('_', ' ')} cannot be made: not permitted"]
            )
            return
        self._prepare_name(staged, meta, kind)
        self.put(staged, path, meta)

    def link(self, staged: Staged, path: bytes, to: bytes) -> None:
        """Make ``path`` another name of the file at ``to``, by the free name ``staged``.

        When it can have none there, that becomes a copy, which is told. Raises BaseUnknown when there is no such file.
        """
        with self._expecting(to):
            self._handles.writable_parent(check(to))
            source = Staged(*self._handles.parent(to))
        if self.is_at(path, source):
            return
        with self._expecting(path):
            self._handles.writable_parent(path)
            source = Staged(*self._handles.parent(to))
            parent, name = self._handles.parent(path)
            try:
                _link(source, staged)
                os.rename(staged.name, name, src_dir_fd=staged.directory, dst_dir_fd=parent)
                if self.unkept:
                    self.unkept.linked(self.full(path), self.full(to))
                return
            except OSError as error:
                if error.errno not in _NO_LINK or stat.S_ISDIR(os.lstat(source.name, dir_fd=source.directory).st_mode):
                    raise
                cause = f"hard links cannot be kept, copies are: {error.strerror}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged.name, dir_fd=staged.directory)
            status = os.stat(source.name, dir_fd=source.directory, follow_symlinks=False)
            self._copy_beside(source, parent, name, path, read_meta(source.directory, source.name, status))
            self.unkept.note(self.full(path), cause)

    def move(self, path: bytes, to: bytes) -> None:
        """Rename ``path`` to ``to``, where no directory is."""
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
            target = _lstat(to_parent, to_name)
            if target is not None and (target.st_dev, target.st_ino) == (there.st_dev, there.st_ino):
                # rename(2) between two names of one file does nothing; the old name must go.
                os.unlink(name, dir_fd=parent)
                self.forget(path)
                return
            if target is not None and stat.S_ISDIR(there.st_mode):
                os.unlink(to_name, dir_fd=to_parent)
            parent, name = self._handles.parent(path)
            to_parent, to_name = self._handles.parent(to)
            self._rename(parent, name, to_parent, to_name)
        if self.unkept:
            self.unkept.moved(self.full(path), self.full(to), below=stat.S_ISDIR(there.st_mode))
        self._handles.moved(path, to)

    def set_meta(self, path: bytes, meta: Meta) -> None:
        """Give ``path`` this metadata."""
        with self._expecting(path):
            parent, name = self._handles.parent(check(path))
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            self._apply_meta(parent, name, path, meta, _kind(there.st_mode))
            self._handles.settled(path)

    def restore(self) -> None:
        """Give directories that were opened up for us their true modes."""
        self._handles.restore()

    def sync(self) -> None:
        """Write back the filesystem that the root lies on, and those below it that were met; raises OSError."""
        self._handles.restore()
        done: set[int] = set()
        met, self._devices = self._devices, {}
        for path in [None, b"", *(path.rpartition(b"/")[0] for path in met.values()), *met.values()]:
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

    def is_at(self, path: bytes, staged: Staged) -> bool:
        """Whether ``path`` is a name of the file that ``staged`` names too."""
        there, other = self.status(path), _lstat(staged.directory, staged.name)
        return there is not None and other is not None and (there.st_dev, there.st_ino) == (other.st_dev, other.st_ino)

    def is_link(self, path: bytes) -> bool:
        """Whether what is at ``path`` is a symbolic link."""
        there = self.status(path)
        return there is not None and stat.S_ISLNK(there.st_mode)

    def _copy_beside(self, source: Staged, parent: int, name: bytes, path: bytes, meta: Meta) -> None:
        """Copy ``source``, with ``meta``, beside ``name``, the place of ``path``, and rename the copy to that."""
        there = os.stat(source.name, dir_fd=source.directory, follow_symlinks=False)
        temporary = PREFIX + os.urandom(8).hex().encode()
        try:
            if stat.S_ISREG(there.st_mode):
                causes = self._copy_content(source, parent, temporary, meta)
            else:
                if stat.S_ISLNK(there.st_mode):
                    os.symlink(os.readlink(source.name, dir_fd=source.directory), temporary, dir_fd=parent)
                else:
                    os.mknod(temporary, there.st_mode, device=there.st_rdev, dir_fd=parent)
                causes = self._give(parent, temporary, meta, _kind(there.st_mode))[0]
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
            raise
        if causes or self.unkept:
            self.unkept.settle(self.full(path), causes)

    def _copy_content(self, copied: Staged, parent: int, name: bytes, meta: Meta) -> list[str]:
        """Returns why some of ``meta`` could not be kept."""
        causes: list[str] = []
        source = os.open(copied.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=copied.directory)
        with os.fdopen(source, "rb") as reader:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            target = os.open(name, flags, 0o600, dir_fd=parent)
            with os.fdopen(target, "wb") as writer:
                status = os.fstat(source)
                sparse = status.st_blocks * 512 < status.st_size
                while block := reader.read(_READ):
                    if sparse and not block.strip(b"\0"):
                        writer.seek(len(block), os.SEEK_CUR)
                    else:
                        writer.write(block)
                writer.truncate()
                device = os.fstat(target).st_dev
                metadata.give(
                    target, meta, causes.append, self._clock, owner=None, mode=None, bare=False, device=device
                )
                os.fsync(target)
        return causes

    def _rename(self, parent: int, name: bytes, to_parent: int, to_name: bytes) -> None:
        try:
            os.rename(name, to_name, src_dir_fd=parent, dst_dir_fd=to_parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # Below one root there may be several mounts, or an overlay that cannot rename a lower directory.
            raise BaseUnknown(name, "it cannot be renamed across filesystems") from None

    def _clear(self, parent: int, name: bytes, path: bytes, there: os.stat_result) -> None:
        """Remove what is there; nothing of it is kept."""
        self._gone(path, there)
        if stat.S_ISDIR(there.st_mode):
            self._check_mounts(path)
            self._handles.forget()
            parent, name = self._handles.parent(path)
            remove_tree(parent, name, path, None if self._rescue is None else self._rescue_copy)
        else:
            os.unlink(name, dir_fd=parent)

    def _check_mounts(self, path: bytes) -> None:
        """A directory in which something is mounted stays: what is mounted belongs to somebody else as well."""
        real = os.path.realpath(self.full(path))
        for point in mounts():
            if point.startswith(real + b"/") or point == real:
                raise BaseUnknown(path, f"something is mounted on {os.fsdecode(point)!r}")

    def _rescue_below(self, path: bytes) -> None:
        """Keep aside what nobody else is known to have of a directory that is about to go."""
        if self._rescue is None:
            return
        # All of it is looked at, what the patterns exclude too: it would be lost as well.
        parent, name = self._handles.parent(path)
        visit_tree(parent, name, path, self._rescue_copy)

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
        """Give what stands at ``path`` this metadata."""
        causes = self._give(parent, name, meta, kind)[0]
        if causes or self.unkept:
            self.unkept.settle(self.full(path), causes)

    def _prepare_name(self, staged: Staged, meta: Meta, kind: FileKind) -> None:
        """As ``prepare``, for what is no regular file."""
        causes, status = self._give(staged.directory, staged.name, meta, kind)
        if causes or self._pending:
            self._await_place(status, causes)

    def _give(self, parent: int, name: bytes, meta: Meta, kind: FileKind) -> tuple[list[str], os.stat_result]:
        """Change what differs: a change that changes nothing would cost a write of the inode all the same.

        Returns why some of it could not be kept, and what it was before.
        """
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
        return causes, there

    def _settle_placed(self, staged: Staged, path: bytes) -> None:
        """What could not be kept of a staged file is known under its path from now on."""
        status = os.stat(staged.name, dir_fd=staged.directory, follow_symlinks=False)
        self.unkept.settle(self.full(path), self._pending.pop((status.st_dev, status.st_ino), ()))

    def _gone(self, path: bytes, there: os.stat_result) -> None:
        self.forget(path, below=stat.S_ISDIR(there.st_mode))

    def _note_no_history(self, path: bytes, there: os.stat_result) -> None:
        """It is on a filesystem that is mounted somewhere below the root."""
        mount = path
        while mount:
            above = self.status(mount.rpartition(b"/")[0])
            if above is None or above.st_dev != there.st_dev:
                break
            mount = mount.rpartition(b"/")[0]
        # Below the mount, not of it: that it gets its metadata is no end of this.
        text = "what lies on a filesystem that is mounted below a protected path has no history"
        self.unkept.note(self.full(mount) + b"/", text)

    @staticmethod
    def _unreadable(path: bytes, error: OSError) -> None:
        # A replica that cannot be read in full must not pass for one that holds less.
        raise error

    @contextlib.contextmanager
    def _expecting(self, path: bytes) -> Iterator[None]:
        """What is missing here was expected by the source: its picture of the tree is wrong."""
        try:
            yield
        except OSError as error:
            raise _unexpected(path, error) from None


class _Named(Filter):
    """Leaves out what a source has no name for: moves can make a tree deeper than the system's longest path."""

    def __init__(self, inner: Filter) -> None:
        self._inner = inner
        self.plain = False
        #: Directories that are left out.
        self.closed: set[bytes] = set()

    def allows(self, path: bytes, is_dir: bool) -> bool:
        """See ``Filter.allows``."""
        return len(path) <= MAX_PATH and path not in self.closed and self._inner.allows(path, is_dir)


def _unexpected(path: bytes, error: OSError) -> Exception:
    """What ``error`` says of the source's picture of the tree: BaseUnknown, or the error itself."""
    if error.errno in MISSING or error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
        return BaseUnknown(path, error.strerror or str(error))
    return error


def read_meta(parent: int, name: bytes, status: os.stat_result) -> Meta:
    """The metadata of ``name`` in a directory, whose lstat is ``status``; raises OSError."""
    where = f"/proc/self/fd/{parent}/".encode() + name
    try:
        names = sorted(map(os.fsencode, os.listxattr(where, follow_symlinks=False)))
    except OSError:
        names = []
    xattrs = []
    for each in names:
        if is_replicated(each):
            with contextlib.suppress(OSError):
                xattrs.append((each, os.getxattr(where, each, follow_symlinks=False)))
    return Meta(
        stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_atime_ns, status.st_mtime_ns, xattrs
    )


def exists(parent: int, name: bytes) -> bool:
    """Whether there is anything under a name in a directory; raises OSError."""
    return _lstat(parent, name) is not None


def _lstat(parent: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _link(there: Staged, name: Staged) -> None:
    os.link(there.name, name.name, src_dir_fd=there.directory, dst_dir_fd=name.directory, follow_symlinks=False)


def _kind(mode: int) -> FileKind:
    if stat.S_ISDIR(mode):
        return FileKind.DIRECTORY
    return FileKind.SYMLINK if stat.S_ISLNK(mode) else FileKind.FILE
