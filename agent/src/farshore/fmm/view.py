"""Where the files of a group are read: live, or below a snapshot of one moment.

Whatever is told of a file is told as of the live one: its device, its inode and its times. So what was learnt from a
snapshot holds for the live tree and for the next snapshot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from farshore.fmm import scanner
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Observed, Root


class View(Protocol):
    """One way to see the roots of a group, by their numbers.

    ``look``, ``open`` and ``forget`` belong to one thread; the others may be called from any.
    """

    #: True when nothing that is seen can change.
    still: bool

    def moment_ns(self) -> int:
        """The wall clock at which what is read from now on may have been as it is, at the earliest."""

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        """What lstat tells of ``path`` (not b""), None when nothing is there; raises OSError when that is not known."""

    def observe(self, root: int, path: bytes) -> Observed | None:
        """The state of a path, None when it does not exist. Raises OSError."""

    def open(self, root: int, path: bytes) -> int:
        """A descriptor for reading the file at ``path`` (not b""). Raises OSError."""

    def open_beneath(self, root: int, path: bytes) -> int:
        """As ``open``, for any path and from any thread."""

    def status(self, handle: int, root: int, path: bytes) -> os.stat_result:
        """What fstat tells of what was opened at ``path``."""

    def observed(self, status: os.stat_result, root: int, path: bytes, handle: int) -> Observed:
        """The state of what was opened, of which ``status`` was told."""

    def names(self, root: int, path: bytes, filter: Filter) -> Iterator[tuple[bytes, bool]]:
        """The names in a directory that ``filter`` allows, each with whether it is a directory. Raises OSError."""

    def is_empty(self, root: int) -> bool:
        """True when a root holds nothing, or cannot be read."""

    def forget(self) -> None:
        """See what came since."""


class Live:
    """The roots as they are now; without access times' being changed."""

    still = False

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = [root.path for root in roots]
        self._directories = [scanner.Directories(path) for path in self._roots]

    def moment_ns(self) -> int:
        """Now."""
        return time.time_ns()

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        """See View."""
        return scanner.look(self._directories[root], path)

    def observe(self, root: int, path: bytes) -> Observed | None:
        """See View."""
        return scanner.observe(self._roots[root], root, path)

    def open(self, root: int, path: bytes) -> int:
        """See View."""
        return scanner.open_file(self._directories[root], path)

    def open_beneath(self, root: int, path: bytes) -> int:
        """See View."""
        return scanner.open_file_beneath(self._roots[root], path)

    def status(self, handle: int, root: int, path: bytes) -> os.stat_result:
        """See View."""
        return os.fstat(handle)

    def observed(self, status: os.stat_result, root: int, path: bytes, handle: int) -> Observed:
        """See View."""
        return scanner.observed(status, root, path, handle)

    def names(self, root: int, path: bytes, filter: Filter) -> Iterator[tuple[bytes, bool]]:
        """See View."""
        return scanner.list_directory(self._roots[root], path, filter)

    def is_empty(self, root: int) -> bool:
        """See View."""
        try:
            with os.scandir(self._roots[root]) as entries:
                # A filesystem that was just made has that directory, and nothing else.
                return all(entry.name == b"lost+found" for entry in entries)
        except OSError:
            return True

    def forget(self) -> None:
        """Close the handles of directories."""
        for directories in self._directories:
            directories.forget()


class Elsewhere(Live):
    """The roots below a snapshot that keeps inodes and times, but has a device number of its own.

    ``roots`` are where they lie in it, ``devices`` the live filesystems' numbers by the snapshots'. ``taken_ns``: the
    wall clock just before it was taken.
    """

    still = True

    def __init__(self, roots: Sequence[Root], devices: Mapping[int, int], taken_ns: int) -> None:
        super().__init__(roots)
        self._devices = devices
        self._taken_ns = taken_ns

    def moment_ns(self) -> int:
        """When the snapshot was taken."""
        return self._taken_ns

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        """See View."""
        status = super().look(root, path)
        return None if status is None else self._as_live(status)

    def observe(self, root: int, path: bytes) -> Observed | None:
        """See View."""
        seen = super().observe(root, path)
        return None if seen is None else replace(seen, dev=self._devices.get(seen.dev, seen.dev))

    def status(self, handle: int, root: int, path: bytes) -> os.stat_result:
        """See View."""
        return self._as_live(os.fstat(handle))

    def _as_live(self, status: os.stat_result) -> os.stat_result:
        live = self._devices.get(status.st_dev)
        return status if live is None else changed(status, live)


class Catalogue:
    """Copies of the files, made one by one, and what was seen of the whole tree when they were made.

    The root itself is ``b""``. ``copies`` names the file that holds the content of an inode, or tells the number of the
    error with which it could not be copied.
    """

    still = True

    def __init__(self, taken_ns: int) -> None:
        self._taken_ns = taken_ns
        self._seen: dict[tuple[int, bytes], tuple[os.stat_result, Observed]] = {}
        self._names: dict[tuple[int, bytes], list[tuple[bytes, bool]]] = {}
        self._copies: dict[tuple[int, int], bytes | int] = {}
        self._unknown: dict[tuple[int, bytes], int] = {}

    # --- making it

    def add(self, status: os.stat_result, seen: Observed) -> None:
        """Take over what was seen of a path; its directory comes first."""
        key = seen.root, seen.path
        self._seen[key] = status, seen
        if seen.kind is FileKind.DIRECTORY:
            self._names[key] = []
        if seen.path:
            above, _, name = seen.path.rpartition(b"/")
            self._names[seen.root, above].append((name, seen.kind is FileKind.DIRECTORY))

    def add_unknown(self, root: int, path: bytes, error: OSError) -> None:
        """What is at a path, or below it, could not be found out."""
        self._unknown[root, path] = error.errno or errno.EIO

    def has_copy(self, status: os.stat_result) -> bool:
        """Whether the content of this inode was copied, or could not be."""
        return (status.st_dev, status.st_ino) in self._copies

    def copied(self, status: os.stat_result, copy: bytes | int) -> None:
        """Where the content of an inode is, or why there is none."""
        self._copies[status.st_dev, status.st_ino] = copy

    # --- reading it

    def moment_ns(self) -> int:
        """When the first copy was made."""
        return self._taken_ns

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        """See View."""
        found = self._find(root, path)
        return None if found is None else found[0]

    def observe(self, root: int, path: bytes) -> Observed | None:
        """See View."""
        found = self._find(root, path)
        return None if found is None else found[1]

    def open(self, root: int, path: bytes) -> int:
        """See View."""
        return self.open_beneath(root, path)

    def open_beneath(self, root: int, path: bytes) -> int:
        """See View."""
        found = self._find(root, path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        copy = self._copies.get((found[0].st_dev, found[0].st_ino), errno.EIO)
        if isinstance(copy, int):
            raise OSError(copy, os.strerror(copy))
        try:
            return os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            # Not told as such: nobody must take the file itself for removed.
            raise OSError(errno.EIO, "its copy is gone") from None

    def status(self, handle: int, root: int, path: bytes) -> os.stat_result:
        """See View."""
        found = self._find(root, path)
        assert found is not None
        return found[0]

    def observed(self, status: os.stat_result, root: int, path: bytes, handle: int) -> Observed:
        """See View."""
        found = self._find(root, path)
        assert found is not None
        return found[1]

    def names(self, root: int, path: bytes, filter: Filter) -> Iterator[tuple[bytes, bool]]:
        """See View."""
        if (root, path) in self._unknown:
            raise OSError(self._unknown[root, path], os.strerror(self._unknown[root, path]))
        if self._find(root, path) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        names = self._names.get((root, path))
        if names is None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        prefix = path + b"/" if path else b""
        return ((name, is_dir) for name, is_dir in names if filter.allows(prefix + name, is_dir))

    def is_empty(self, root: int) -> bool:
        """See View."""
        return not self._names.get((root, b""))

    def forget(self) -> None:
        """Nothing comes."""

    def _find(self, root: int, path: bytes) -> tuple[os.stat_result, Observed] | None:
        found = self._seen.get((root, path))
        if found is None and self._unknown:
            # What could not be looked into may hold it.
            above = path
            while True:
                with contextlib.suppress(KeyError):
                    code = self._unknown[root, above]
                    raise OSError(code, os.strerror(code))
                if not above:
                    break
                above = above.rpartition(b"/")[0]
        return found


def changed(status: os.stat_result, device: int) -> os.stat_result:
    """``status`` with another number of the device."""
    made: Any = status.__reduce__()
    values, named = made[1]
    return os.stat_result((values[0], values[1], device, *values[3:]), named)
