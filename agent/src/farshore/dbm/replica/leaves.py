"""What is known of the contents of large files of the replica, so that a change costs what it changes.

Each content was verified when it came. Its leaves stay in a file without a name; they count for as long as the file
in the tree is untouched since it was placed. What is missing here, after a restart for one, only costs one reading.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from farshore.delta import Leaves

#: Files whose leaves are kept at once, and their bytes (8 for each KiB of content in blocks of 4 KiB).
MOST_FILES = 64
MOST_BYTES = 1 << 30


@dataclass(slots=True)
class _Kept:
    leaves: Leaves
    size: int
    mtime_ns: int
    #: None until the file is placed.
    ctime_ns: int | None = None


class LeafStore:
    """The leaves of the files of one group, those used last; may be used from several threads."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], _Kept] = OrderedDict()
        self._bytes = 0

    def new_file(self) -> int | None:
        """A descriptor of an empty file for the leaves of new content; None when there is no place for it."""
        try:
            with tempfile.TemporaryFile(dir=self._state, buffering=0) as file:
                return os.dup(file.fileno())
        except OSError:
            return None

    def add(self, status: os.stat_result, leaves: Leaves) -> None:
        """Keep the leaves, which become the store's, of a file that is complete and will be placed."""
        if status.st_size != leaves.length:
            leaves.close()
            return
        with self._lock:
            self._drop(_key(status))
            self._kept[_key(status)] = _Kept(leaves, status.st_size, status.st_mtime_ns)
            self._bytes += leaves.size
            while self._kept and (len(self._kept) > MOST_FILES or self._bytes > MOST_BYTES):
                self._drop(next(iter(self._kept)))

    def placed(self, status: os.stat_result) -> None:
        """A file that was added is in the tree now; nothing is done about any other."""
        with self._lock:
            kept = self._kept.get(_key(status))
            if kept is None or kept.ctime_ns is not None:
                return
            if (kept.size, kept.mtime_ns) == (status.st_size, status.st_mtime_ns) and stat.S_ISREG(status.st_mode):
                kept.ctime_ns = status.st_ctime_ns
            else:
                self._drop(_key(status))

    def of(self, handle: int) -> Leaves | None:
        """The leaves of the file open as ``handle``, for the caller to close; None when they are not known."""
        status = os.fstat(handle)
        with self._lock:
            kept = self._kept.get(_key(status))
            if kept is None:
                return None
            now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if (kept.size, kept.mtime_ns, kept.ctime_ns) != now:
                return None
            self._kept.move_to_end(_key(status))
            try:
                return kept.leaves.duplicate()
            except OSError:
                return None

    def forget(self, status: os.stat_result) -> None:
        """The leaves of this file are of no use any more."""
        with self._lock:
            self._drop(_key(status))

    def close(self) -> None:
        """Give all files back."""
        with self._lock:
            while self._kept:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[int, int]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._bytes -= kept.leaves.size
            kept.leaves.close()


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
