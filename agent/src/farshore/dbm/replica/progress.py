"""How far a tree is in the journal, told by its own filesystem.

Each operation that was applied to the tree is counted since the last mark: the count is the modification time, in
seconds, of an empty file that lies with the stage, and so on the tree's filesystem. A filesystem with a journal (ext4,
XFS) writes changes of names and inodes back in their order. So whatever is cut off when, by a kill or by the power,
afterwards the count and the tree are of one moment, or one operation apart, and nothing has to be synced for that.

The file's name tells the mark from which is counted: what is found under another name counts nothing.
"""

from __future__ import annotations

import contextlib
import os
import stat

from farshore.dbm.replica.mark import Position
from farshore.dbm.replica.stage import PROGRESS, Stage

#: Times are kept by any filesystem up to here; nobody applies so many operations without a sync.
_MOST = (1 << 31) - 1
_SECOND = 1_000_000_000


class Progress:
    """The count for one root, whose stage is ``stage``. All methods raise OSError, StateError."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._handle: int | None = None
        self._name = b""

    def read(self, mark: Position) -> int:
        """How many operations after ``mark`` were applied, those of other roots included, when the last one was."""
        file = self._stage.fixed(name_of(mark))
        try:
            there = os.stat(file.name, dir_fd=file.directory, follow_symlinks=False)
        except FileNotFoundError:
            return 0
        self._name = file.name
        return there.st_mtime_ns // _SECOND if stat.S_ISREG(there.st_mode) else 0

    def tell(self, mark: Position, count: int) -> None:
        """The operation that is number ``count`` after ``mark`` was applied."""
        if self._handle is None:
            self._open(mark)
        assert self._handle is not None
        os.utime(self._handle, (0, min(count, _MOST)))

    def clear(self) -> None:
        """What was counted is made durable, and the mark is moved."""
        self.close()
        if self._name:
            self._stage.release(self._name)
            self._name = b""

    def close(self) -> None:
        """Give the handle back; the count stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self, mark: Position) -> None:
        name = name_of(mark)
        there = self._stage.fixed(name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileNotFoundError):
            self._handle = os.open(name, flags, dir_fd=there.directory)
            self._name = name
            return
        # It never stands there with the time at which it was made.
        staged, handle = self._stage.create()
        try:
            os.utime(handle, (0, 0))
            os.rename(staged.name, name, src_dir_fd=staged.directory, dst_dir_fd=there.directory)
        except BaseException:
            os.close(handle)
            self._stage.discard(staged)
            raise
        self._stage.placed(staged)
        self._handle, self._name = handle, name


def name_of(mark: Position) -> bytes:
    """The name under which is counted from ``mark`` on."""
    return PROGRESS + b"%x.%x" % (mark.seq, mark.operations)
