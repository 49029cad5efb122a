"""A place for content that is on its way into the tree: on the same filesystem, so that a rename takes it there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from farshore.errors import StateError

#: Names that begin so are ours and are never replicated.
PREFIX = b".farshore-"


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
            os.makedirs(directory, 0o700, exist_ok=True)
            return path, os.open(path, flags, 0o600)

    def clean(self) -> None:
        """Remove what a transaction left, and the directory too when it stands in or beside the tree."""
        if self._directory is None:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                os.unlink(self._directory + b"/" + name)
            if self._directory != self._choices[0]:
                os.rmdir(self._directory)

    def _choose(self) -> bytes:
        into = self._root if os.path.isdir(self._root) else os.path.dirname(self._root)
        cause: OSError | None = None
        for choice in self._choices:
            probe = into + b"/" + PREFIX + b"probe-" + secrets.token_hex(4).encode()
            source = choice + b"/probe"
            try:
                os.makedirs(choice, 0o700, exist_ok=True)
                os.close(os.open(source, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
                try:
                    os.rename(source, probe)
                    os.unlink(probe)
                except OSError:
                    os.unlink(source)
                    raise
            except OSError as error:
                cause = error
                with contextlib.suppress(OSError):
                    os.rmdir(choice)
                continue
            self._directory = choice
            return choice
        raise StateError(os.fsdecode(self._root), f"no place for temporary files that reaches it: {cause}")
