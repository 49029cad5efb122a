"""Where the replica's tree is in the journal: everything before is applied and on the tree's own disk."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import NamedTuple

import blake3

from farshore import durable
from farshore.errors import StateError

_MAGIC = b"FSM2"
_SLOT = struct.Struct(">4sQQI")
_DIGEST = 16
#: Each slot is a sector of its own, so that no write damages the other.
_APART = 4096


class Position(NamedTuple):
    """Transactions up to ``seq`` are applied, and of the next one its first ``operations``."""

    seq: int = 0
    operations: int = 0


class Mark:
    """A position in a file of two slots that are written in turns: after a crash one of them is whole.

    ``fresh``: there was no file. Raises StateError when neither slot is whole, and OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.position = Position()
        self._turn = 0
        self.fresh = not path.exists()
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(path, error.strerror or str(error)) from error
        try:
            if os.fstat(self._handle).st_size:
                self._load()
            else:
                self.fresh = True
                self.move(Position())
                durable.sync_directory(path.parent)
        except BaseException:
            os.close(self._handle)
            raise

    def move(self, position: Position) -> None:
        """Write a position down, durably; raises OSError."""
        turn = self._turn + 1
        data = _SLOT.pack(_MAGIC, turn, position.seq, position.operations)
        data += blake3.blake3(data).digest(length=_DIGEST)
        os.pwrite(self._handle, data, turn % 2 * _APART)
        os.fdatasync(self._handle)
        self._turn, self.position = turn, position

    def close(self) -> None:
        """Give the handle back."""
        with contextlib.suppress(OSError):
            os.close(self._handle)

    def _load(self) -> None:
        for slot in range(2):
            data = os.pread(self._handle, _SLOT.size + _DIGEST, slot * _APART)
            body, digest = data[: _SLOT.size], data[_SLOT.size :]
            if len(digest) < _DIGEST or blake3.blake3(body).digest(length=_DIGEST) != digest:
                continue
            magic, turn, *position = _SLOT.unpack(body)
            if magic == _MAGIC and turn > self._turn:
                self._turn, self.position = turn, Position(*position)
        if not self._turn:
            raise StateError(self._path, "is damaged: it does not say what was applied")
