"""Changes of our own, by which a watcher proves that it has seen everything that was changed before.

The kernel queues events in the order in which things happen. So whoever makes a file in a directory that is watched,
and reads until that file is told of, has read all that happened before.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path


class Cookies:
    """The directory in which they are made: ``place``, or one that ``close`` removes again."""

    def __init__(self, place: Path | None) -> None:
        self._own = place is None
        self._place = place
        self._token = secrets.token_hex(8).encode()
        self._last = 0
        #: The name that is waited for, b"" while none is.
        self.expected = b""
        #: Where they are made, b"" where none can be.
        self.path = b""

    def prepare(self) -> bytes:
        """Make the directory if need be; its path, b"" when that cannot be done."""
        try:
            if self._place is None:
                self._place = Path(tempfile.mkdtemp(prefix="farshore-cookies-"))
            self._place.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path = os.fsencode(self._place.resolve())
        except OSError:
            self.path = b""
        return self.path

    def make(self) -> bool:
        """Make the next; False when that cannot be done, as the disk is full, or read-only."""
        self.expected = b""
        if not self.path:
            return False
        self._last += 1
        # Each has another name: the kernel joins events that are alike to the one that waits already. And nobody else
        # has it, so that the name alone tells.
        name = b"%b-%d" % (self._token, self._last)
        path = os.path.join(self.path, name)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except OSError:
            return False
        with contextlib.suppress(OSError):
            os.unlink(path)
        self.expected = name
        return True

    def seen(self, name: bytes) -> None:
        """Something was told of ``name`` in their directory."""
        if name == self.expected:
            self.expected = b""

    def close(self) -> None:
        """Remove what was made."""
        if self._own and self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)
