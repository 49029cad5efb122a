"""The small typed values that flow out of FMM, and the Watcher protocol behind which engines stand."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

#: A device, and the number of an inode on it.
Inode = tuple[int, int]


class Kind(enum.Flag):
    """What a hint says happened. Hints are never trusted: the state on disk is the truth."""

    CREATED = enum.auto()
    DELETED = enum.auto()
    MODIFIED = enum.auto()
    MOVED_FROM = enum.auto()
    MOVED_TO = enum.auto()
    ATTRIBUTES = enum.auto()
    #: Everything below the path is in doubt: a new directory, an overflow, a resume.
    RESCAN = enum.auto()


@dataclass(frozen=True, slots=True)
class Root:
    """One protected path of a group on this node.

    ``path`` is absolute, a directory or a single file. ``include`` and ``exclude`` are gitignore
    patterns relative to it; a path is protected when no exclude matches it or an include does.
    ``max_size`` in bytes, ``min_age`` and ``max_age`` in seconds are limits on regular files, 0 is none;
    with ``one_filesystem``, what is mounted below is left alone. ``fmm.limits`` says what they mean.
    """

    path: bytes
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size: int = 0
    min_age: int = 0
    max_age: int = 0
    one_filesystem: bool = False


@dataclass(frozen=True, slots=True)
class Hint:
    """Something may have changed at ``path`` (relative to root number ``root``; b"" is the root itself).

    ``inode``, a device and a number, is told of a file that had other names, too: what was done through this name
    changed the file under all of them and is reported for none, and by now another file may have this name, or none.
    """

    root: int
    path: bytes
    kind: Kind
    inode: Inode | None = None


class FileKind(enum.IntEnum):
    """The type of a filesystem object, as it is stored in the index and sent on the wire."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    CHARACTER_DEVICE = 5
    BLOCK_DEVICE = 6
    SOCKET = 7


class Observed(msgspec.Struct, frozen=True, gc=False):
    """The state of one path as lstat, readlink and listxattr told it, all at about one moment.

    Times are nanoseconds since the epoch, ``mode`` holds the permission bits only (07777),
    ``blocks`` counts 512-byte units, ``xattrs`` is sorted by name and includes POSIX ACLs
    (``system.posix_acl_access`` and ``_default``). ``unlisted``: there are more attributes than the kernel can list.
    """

    root: int
    path: bytes
    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    dev: int
    ino: int
    nlink: int
    rdev: int
    blocks: int
    target: bytes | None
    xattrs: tuple[tuple[bytes, bytes], ...]
    unlisted: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """What a watcher sees and has seen.

    ``directories`` are watched now; ``unwatched`` directories and roots are not, and are scanned instead. The kernel's
    queue ``overflows`` and its ``events`` count since the watcher was made.
    """

    engine: str
    directories: int = 0
    unwatched: int = 0
    overflows: int = 0
    events: int = 0


class Watcher(Protocol):
    """Reports that something changed under the roots it was made for.

    All calls come from one thread, but for ``wake``, ``problems`` and ``counts``, which any thread may call.
    """

    def start(self) -> Sequence[Hint]:
        """Begin to watch; returns a RESCAN hint for each root, as what came before was not seen.

        Raises WatchError when a root cannot be watched at all.
        """

    def read(self, timeout: float) -> Sequence[Hint]:
        """Hints since the last call; blocks for at most ``timeout`` seconds for the first one."""

    def drain(self) -> Sequence[Hint]:
        """Every hint for changes made before the call; returns without waiting for more."""

    def pause(self) -> None:
        """Stop watching and give back the kernel's resources. Idempotent."""

    def resume(self) -> Sequence[Hint]:
        """Watch again; returns RESCAN hints that cover the gap. Idempotent."""

    def wake(self) -> None:
        """Make a blocked ``read`` return at once."""

    def close(self) -> None:
        """Release everything. Idempotent."""

    def problems(self) -> Sequence[str]:
        """What limits the view now, each with its remedy; empty when all is watched."""

    def counts(self) -> Counts:
        """How much is watched now, and what has come of it so far, as of the last other call."""
