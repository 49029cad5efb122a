"""A place for content that is on its way into the tree: on the same filesystem, so that a rename takes it there.

The place may lie within the tree, whose content a peer decides: it is reached by a handle, never through a symbolic
link, it must be ours, and nothing is removed from it that was not made here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from farshore.dbm.replica.paths import PREFIX
from farshore.errors import StateError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OURS = re.compile(rb"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Staged:
    """A staged file: its name, and a handle of its directory that is valid until ``Stage.clean``."""

    directory: int
    name: bytes


@contextlib.contextmanager
def _unnoticed(directory: int) -> Iterator[None]:
    """What is done in ``directory`` leaves its times as they were: they belong to the replica."""
    before = os.fstat(directory)
    yield
    os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))


class Stage:
    """Temporary files for one root.

    The state directory is preferred. Where a rename from there does not reach the root (another filesystem, or
    another mount of the same one), the directory beside the root is used, and at last one within the root, which
    exists only while a transaction is open.
    """

    def __init__(self, root: bytes, state: Path) -> None:
        self._root = root
        tag = PREFIX + b"stage"
        self._choices = [
            os.fsencode(state) + b"/stage",
            os.path.dirname(root) + b"/" + tag + b"-" + os.path.basename(root),
            root + b"/" + tag,
        ]
        self._choice: bytes | None = None
        self._directory: int | None = None
        self._made: set[bytes] = set()
        for choice in self._choices:
            self._clear(choice)

    def create(self) -> tuple[Staged, int]:
        """A new empty file, private to us, and a descriptor for reading and writing it.

        Raises StateError when there is no place for it, and OSError.
        """
        if self._directory is None:
            self._directory = self._choose() if self._choice is None else self._open(self._choice)
        staged = Staged(self._directory, secrets.token_hex(8).encode())
        handle = _create(staged)
        self._made.add(staged.name)
        return staged, handle

    def clean(self) -> None:
        """Remove what a transaction left, and the directory too when it stands in or beside the tree."""
        if self._directory is None or self._choice is None:
            return
        try:
            for name in self._made:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory)
        finally:
            os.close(self._directory)
            self._directory = None
            self._made.clear()
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
                for name in os.listdir(directory):
                    if _OURS.fullmatch(os.fsencode(name)):
                        os.unlink(name, dir_fd=directory)
            finally:
                os.close(directory)
            self._drop(choice)

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

    def _choose(self) -> int:
        into = self._root if os.path.isdir(self._root) else os.path.dirname(self._root)
        cause: OSError | None = None
        target = os.open(into, _DIRECTORY)
        try:
            with _unnoticed(target):
                for choice in self._choices:
                    try:
                        directory = self._open(choice)
                        try:
                            self._probe(directory, target)
                        except OSError:
                            os.close(directory)
                            self._drop(choice)
                            raise
                    except OSError as error:
                        cause = error
                        continue
                    self._choice = choice
                    return directory
        finally:
            os.close(target)
        raise StateError(os.fsdecode(self._root), f"no place for temporary files that reaches it: {cause}")

    @staticmethod
    def _probe(directory: int, into: int) -> None:
        """Rename a file from ``directory`` into the tree and remove it; raises OSError when that does not work."""
        source = Staged(directory, secrets.token_hex(8).encode())
        probe = PREFIX + b"probe-" + secrets.token_hex(4).encode()
        os.close(_create(source))
        try:
            os.rename(source.name, probe, src_dir_fd=directory, dst_dir_fd=into)
        except OSError:
            os.unlink(source.name, dir_fd=directory)
            raise
        os.unlink(probe, dir_fd=into)


def _create(staged: Staged) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(staged.name, flags, 0o600, dir_fd=staged.directory)


def _open_ours(above: int, name: bytes) -> int:
    """Open a directory that nobody else can write to; raises OSError when it is a link or somebody else's."""
    handle = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    status = os.fstat(handle)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(handle)
        raise PermissionError(errno.EPERM, "others can write to it", os.fsdecode(name))
    return handle
