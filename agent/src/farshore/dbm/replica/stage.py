"""A place for content that is on its way into the tree: on the same filesystem, so that a rename takes it there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from farshore.errors import StateError

#: Names that begin so are ours and are never replicated.
PREFIX = b".farshore-"


@contextlib.contextmanager
def _unnoticed(directory: bytes) -> Iterator[None]:
    """What is done in ``directory`` leaves its times as they were: they belong to the replica."""
    before = os.stat(directory)
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
        self._directory: bytes | None = None
        for choice in self._choices[1:]:
            shutil.rmtree(choice, ignore_errors=True)  # what a crash left behind
        shutil.rmtree(self._choices[0], ignore_errors=True)

    def create(self) -> tuple[bytes, int]:
        """A new empty file, private to us: its path and a descriptor for reading and writing."""
        directory = self._directory or self._choose()
        path = directory + b"/" + secrets.token_hex(8).encode()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return path, os.open(path, flags, 0o600)
        except FileNotFoundError:
            if directory == self._choices[2]:
                with _unnoticed(self._root):
                    os.mkdir(directory, 0o700)
            else:
                os.makedirs(directory, 0o700, exist_ok=True)
            return path, os.open(path, flags, 0o600)

    def clean(self) -> None:
        """Remove what a transaction left, and the directory too when it stands in or beside the tree."""
        if self._directory is None:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                os.unlink(self._directory + b"/" + name)
            if self._directory == self._choices[1]:
                os.rmdir(self._directory)
            elif self._directory == self._choices[2]:
                with _unnoticed(self._root):
                    os.rmdir(self._directory)

    def _choose(self) -> bytes:
        into = self._root if os.path.isdir(self._root) else os.path.dirname(self._root)
        cause: OSError | None = None
        with _unnoticed(into):
            for choice in self._choices:
                try:
                    self._probe(choice, into)
                except OSError as error:
                    cause = error
                    with contextlib.suppress(OSError):
                        os.rmdir(choice)
                    continue
                self._directory = choice
                return choice
        raise StateError(os.fsdecode(self._root), f"no place for temporary files that reaches it: {cause}")

    @staticmethod
    def _probe(choice: bytes, into: bytes) -> None:
        """Rename a file from ``choice`` into the tree and remove it; raises OSError when that does not work."""
        probe = into + b"/" + PREFIX + b"probe-" + secrets.token_hex(4).encode()
        source = choice + b"/probe"
        os.makedirs(choice, 0o700, exist_ok=True)
        os.close(os.open(source, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            os.rename(source, probe)
        except OSError:
            os.unlink(source)
            raise
        os.unlink(probe)
