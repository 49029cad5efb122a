"""A place beside the tree, on the same filesystem, so that a rename leads there and back: for content that is on its
way into the tree, and for what was taken out of it and is kept.

The place may lie within the tree, whose content a peer decides: it is reached by a handle, never through a symbolic
link, it must be ours, and nothing is removed from it that was not made here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import stat
import threading
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from farshore.dbm.replica.paths import PREFIX
from farshore.errors import StateError
from farshore.fmm.attributes import is_replicated

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OURS = re.compile(rb"[0-9a-f]{16}")
#: How the names of files begin that tell how far the tree is in the journal (``progress``).
PROGRESS = b"since-"
#: Handles of folders that are kept open.
_OPEN_FOLDERS = 8
#: These say nothing about a place.
_PASSING = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.ENOSPC, errno.EDQUOT)
_PERMISSIONS = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO


class Staged(NamedTuple):
    """A staged file: its name, and a handle of its directory that is valid until the file is placed or discarded."""

    directory: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Birth:
    """What a new file in the stage is given by the system: ids, the permissions that it may have, and whether
    attributes (a default ACL's) come with it."""

    uid: int
    gid: int
    permissions: int
    attributes: bool


@contextlib.contextmanager
def _unnoticed(directory: int) -> Iterator[None]:
    """What is done in ``directory`` leaves its times as they were: they belong to the replica."""
    before = os.fstat(directory)
    yield
    os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))


class Stage:
    """Temporary files for one root, and folders of what is kept. May be used from several threads.

    The state directory is preferred. Where a rename from there does not reach the root (another filesystem, or
    another mount of the same one), the directory beside the root is used, and at last one within the root; these
    exist only while there is something in them.

    Of what is found there, temporary files go, but for those in ``needed``.
    """

    def __init__(self, root: bytes, state: Path, needed: Container[bytes] = ()) -> None:
        self._root = root
        self._needed = needed
        self._choices = _choices(root, state)
        self._choice: bytes | None = None
        self._directory: int | None = None
        self._birth = Birth(-1, -1, 0, True)
        prefix = secrets.token_hex(4).encode()
        self._names = (b"%s%08x" % (prefix, n & 0xFFFFFFFF) for n in itertools.count())
        self._made: set[bytes] = set()
        self._folders: dict[bytes, int] = {}
        self._lock = threading.Lock()
        for choice in self._choices:
            self._clear(choice)

    @property
    def birth(self) -> Birth:
        """What files that ``create`` returned were born with."""
        return self._birth

    def create(self, mode: int = 0o600) -> tuple[Staged, int]:
        """A new empty file that only we can reach, and a descriptor for reading and writing it.

        Its permissions are those of ``mode`` as far as ``birth.permissions`` has them. Raises StateError when there
        is no place for it, and OSError.
        """
        with self._lock:
            directory = self._ready()
            name = next(self._names)
            handle = os.open(name, _NEW, mode & _PERMISSIONS, dir_fd=directory)
            self._made.add(name)
        return Staged(directory, name), handle

    def name(self) -> Staged:
        """A name that nothing has yet; what is made there is ours from now on. Raises as ``create``."""
        with self._lock:
            directory = self._ready()
            name = next(self._names)
            self._made.add(name)
        return Staged(directory, name)

    def fixed(self, name: bytes) -> Staged:
        """A file of a known name; whoever makes it takes care of it. Raises as ``create``."""
        with self._lock:
            return Staged(self._ready(), name)

    def folder(self, name: bytes) -> int:
        """A handle of the folder ``name`` of what is kept, which is made if need be; it stays the stage's."""
        with self._lock:
            handle = self._folders.get(name)
            if handle is None:
                directory = self._ready()
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=directory)
                while len(self._folders) >= _OPEN_FOLDERS:
                    os.close(self._folders.pop(next(iter(self._folders))))
                handle = self._folders[name] = _open_ours(directory, name)
        return handle

    def drop_folder(self, name: bytes) -> None:
        """Remove a folder that is empty; nothing is done about another."""
        with self._lock:
            handle = self._folders.pop(name, None)
            if handle is not None:
                os.close(handle)
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=self._ready())

    def place(self) -> bytes:
        """Where all that is, as an absolute path; raises as ``create``."""
        with self._lock:
            self._ready()
            assert self._choice is not None
            return self._choice

    def sync(self) -> None:
        """Make the names in the stage durable; raises OSError."""
        if self._directory is not None:
            os.fsync(self._directory)

    def needed(self, staged: Staged) -> None:
        """A file is named by the journal now: it stays until it is released."""
        self._made.discard(staged.name)

    def release(self, name: bytes) -> None:
        """Remove a file that is not needed any more."""
        with self._lock, contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._ready())

    def _ready(self) -> int:
        directory = self._directory
        if directory is None:
            directory = self._choose() if self._choice is None else self._open(self._choice)
            try:
                self._birth = _birth(directory, next(self._names))
            except BaseException:
                os.close(directory)
                raise
            self._directory = directory
        return directory

    def placed(self, staged: Staged) -> None:
        """A file was renamed into the tree."""
        self._made.discard(staged.name)

    def discard(self, staged: Staged) -> None:
        """Remove a file that will not be placed, or was copied into the tree."""
        with self._lock:
            if staged.name in self._made:
                self._made.discard(staged.name)
                with contextlib.suppress(OSError):
                    os.unlink(staged.name, dir_fd=staged.directory)

    def rest(self, leave: bool = False) -> None:
        """When nothing is staged, a directory that stands in or beside the tree goes; ``leave``: any handle, too."""
        if self._directory is None or self._made:
            return
        with self._lock:
            if not self._made and (leave or self._choice != self._choices[0]):
                self._leave()

    def close(self) -> None:
        """Remove all that is staged, and give back the directory."""
        with self._lock:
            for name in self._made:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory)
            self._made.clear()
            self._leave()

    def _leave(self) -> None:
        while self._folders:
            os.close(self._folders.popitem()[1])
        if self._directory is None or self._choice is None:
            return
        os.close(self._directory)
        self._directory = None
        if self._choice != self._choices[0]:
            self._drop(self._choice)

    def _clear(self, choice: bytes) -> None:
        """Remove what a crash left behind."""
        with contextlib.suppress(OSError):
            above = self._above(choice)
            try:
                directory = _open_ours(above, os.path.basename(choice))
            finally:
                os.close(above)
            try:
                for name in map(os.fsencode, os.listdir(directory)):
                    if self._is_left(name):
                        os.unlink(name, dir_fd=directory)
            finally:
                os.close(directory)
            self._drop(choice)

    def _is_left(self, name: bytes) -> bool:
        """Whether nobody needs a file that is found in the stage."""
        if name.startswith(PROGRESS):
            return name not in self._needed
        return _OURS.fullmatch(name) is not None and name not in self._needed

    def _drop(self, choice: bytes) -> None:
        with contextlib.suppress(OSError):
            above = self._above(choice)
            try:
                with _unnoticed(above):
                    os.rmdir(os.path.basename(choice), dir_fd=above)
            finally:
                os.close(above)

    def _above(self, choice: bytes) -> int:
        # What is above the root and the state directory is the administrator's and may lead through links.
        nofollow = os.O_NOFOLLOW if choice == self._choices[2] else 0
        return os.open(os.path.dirname(choice), _DIRECTORY | nofollow)

    def _open(self, choice: bytes) -> int:
        """A handle of the directory ``choice``, which is made if need be; raises OSError when it is not ours."""
        if choice == self._choices[0]:
            os.makedirs(os.path.dirname(choice), 0o700, exist_ok=True)
        above, name = self._above(choice), os.path.basename(choice)
        try:
            with contextlib.suppress(FileExistsError), _unnoticed(above):
                os.mkdir(name, 0o700, dir_fd=above)
            return _open_ours(above, name)
        finally:
            os.close(above)

    def _into(self) -> bytes:
        """Where files will be renamed to."""
        return self._root if os.path.isdir(self._root) else os.path.dirname(self._root)

    def _choose(self) -> int:
        cause: OSError | None = None
        target = os.open(self._into(), _DIRECTORY)
        try:
            for choice in self._choices:
                try:
                    directory = self._open(choice)
                    try:
                        _check_reach(directory, target)
                    except OSError:
                        os.close(directory)
                        self._drop(choice)
                        raise
                except OSError as error:
                    if error.errno in _PASSING:
                        raise
                    cause = error
                    continue
                self._choice = choice
                return directory
        finally:
            os.close(target)
        raise StateError(os.fsdecode(self._root), f"no place for temporary files that reaches it: {cause}")


def _choices(root: bytes, state: Path) -> list[bytes]:
    tag = PREFIX + b"stage"
    return [
        os.fsencode(state) + b"/stage",
        os.path.dirname(root) + b"/" + tag + b"-" + os.path.basename(root),
        root + b"/" + tag,
    ]


def places(root: bytes, state: Path) -> list[bytes]:
    """Where something of the stage of ``root`` may be, of this process or an earlier one: what is there and is ours."""
    found = []
    for number, choice in enumerate(_choices(root, state)):
        with contextlib.suppress(OSError):
            above = os.open(os.path.dirname(choice), _DIRECTORY | (os.O_NOFOLLOW if number == 2 else 0))
            try:
                os.close(_open_ours(above, os.path.basename(choice)))
            finally:
                os.close(above)
            found.append(choice)
    return found


def _check_reach(directory: int, into: int) -> None:
    """Raises OSError with EXDEV when no rename leads from one directory into the other.

    Nothing is changed for that, as a kill in the middle would leave the replica changed: the kernel looks at the mounts
    before it finds that "." is no name to rename to.
    """
    if os.fstat(directory).st_dev != os.fstat(into).st_dev:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    try:
        os.rename(b"probe", b".", src_dir_fd=directory, dst_dir_fd=into)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


def _birth(directory: int, name: bytes) -> Birth:
    """Learn from a file that is made and removed: umask, a default ACL and setgid directories all have a say."""
    handle = os.open(name, _NEW, _PERMISSIONS, dir_fd=directory)
    try:
        status = os.fstat(handle)
        try:
            attributes = any(is_replicated(os.fsencode(each)) for each in os.listxattr(handle))
        except OSError:
            attributes = False
    finally:
        os.close(handle)
        os.unlink(name, dir_fd=directory)
    return Birth(status.st_uid, status.st_gid, status.st_mode & _PERMISSIONS, attributes)


def _open_ours(above: int, name: bytes) -> int:
    """Open a directory that nobody else can write to; raises OSError when it is a link or somebody else's."""
    handle = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    status = os.fstat(handle)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(handle)
        raise PermissionError(errno.EPERM, "others can write to it", os.fsdecode(name))
    return handle
