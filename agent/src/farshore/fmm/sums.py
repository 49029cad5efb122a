"""What all entries of a directory look like, in one number: read from the disk by machine code, several at a time.

An entry's mark is a hash of its name and of all that lstat tells of it and by which a change is noticed. The sum of the
marks of a directory's entries can be kept up to date entry by entry, in any order, and compared with what is on the
disk without a look at any entry. Marks are keyed with a secret of each index, so that nobody can make two changes that
cancel each other out; by chance, a change goes unnoticed once in 2^64 times.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from farshore.fmm.libc import (
    D_NAME,
    D_RECLEN,
    DIRECTORY,
    ENOENT,
    ENTRIES,
    OPEN,
    TYPE,
    close,
    getdents,
    kernel,
    lstat,
    openat,
)
from farshore.fmm.patterns import STAGING

u8: Any = np.uint8
u64: Any = np.uint64
i64: Any = np.int64
Array = Any

#: Words of an entry's record before its name: mode with type, owners, size, mtime, ctime, device, inode, name's length.
_WORDS = 8
_MOST_NAME = 256
_RECORD = struct.Struct(f"<3Q2q3Q{_MOST_NAME}s")
#: Room for the names of subdirectories in one call.
_NAMES = 1 << 20

# The constants of MurmurHash3's finaliser (Austin Appleby, public domain), and the golden ratio.
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_S33 = np.uint64(33)
_LOW = np.uint64(0xFFFFFFFF)
_S32 = np.uint64(32)

_SOCKET = 0o140000
_STAGING = np.frombuffer(STAGING, np.uint8)


class Sum(NamedTuple):
    """Of a directory: the number of its entries, and the sums of the lower and the upper halves of their marks."""

    entries: int
    low: int
    high: int


#: Of a directory that holds nothing.
NOTHING = Sum(0, 0, 0)


@kernel("uint64(uint64, uint64)", inline="always")
def _mixed(state: Any, word: Any) -> Any:
    state = (state ^ word) * _MIX_1
    state ^= state >> _S33
    return state * _MIX_2 + _STEP


@kernel("uint64(uint64[::1], int64, uint64)")
def _hash(words: Array, count: int, key: Any) -> Any:
    """The mark of a record of ``count`` words."""
    state = key
    for i in range(count):
        state = _mixed(state, words[i])
    return state ^ (state >> _S33)


# So short that it is not worth letting other threads have the interpreter.
@kernel("int64(uint64[::1], uint64)", nogil=False)
def _signed_mark(record: Array, key: Any) -> Any:
    """The mark of a record that holds all its words, as the signed number of the same bits."""
    return i64(_hash(record, _WORDS + (min(i64(record[_WORDS - 1]), i64(_MOST_NAME)) + 7) // 8, key))


@kernel(
    "int64(int32, uint8[::1], int64[::1], int64, uint64, uint64[:, ::1], uint8[::1], int64[::1], uint8[::1], "
    "uint8[::1], uint64[::1])"
)
def _sum_up(
    root: int,
    paths: Array,
    starts: Array,
    first: int,
    key: Any,
    sums: Array,
    names: Array,
    owners: Array,
    buffer: Array,
    status: Array,
    record: Array,
) -> int:
    """Sum up the directories from ``first`` on; returns where it ended: not all, if there is no room for more names.

    Directory i has the path at ``starts[i]``, ended by a zero byte and relative to ``root``, a descriptor. ``sums[i]``
    becomes entries, low, high, and 1 if all could be read. Subdirectories: names, each ended by a zero byte, and for
    each the number of its directory in ``owners``, which begins with their count and the bytes they take.
    """
    words = status.view(np.uint64)
    halves = status.view(np.uint32)
    quarters = status.view(np.uint16)
    bytes_of = record.view(np.uint8)
    found, used = owners[0], owners[1]
    total = starts.shape[0]
    for i in range(first, total):
        before_found, before_used = found, used
        sums[i, 0] = sums[i, 1] = sums[i, 2] = sums[i, 3] = u64(0)
        fd = openat(np.int32(root), np.uintp(paths.ctypes.data + starts[i]), np.int32(OPEN))
        if fd < 0:
            continue
        good = True
        full = False
        while good:
            length = getdents(fd, np.uintp(buffer.ctypes.data), np.uintp(ENTRIES))
            if length <= 0:
                good = length == 0
                break
            at = i64(0)
            while at < length:
                size = i64(buffer[at + D_RECLEN]) | (i64(buffer[at + D_RECLEN + 1]) << 8)
                name = at + D_NAME
                end = name
                while buffer[end] != 0:
                    end += 1
                at += size
                count = end - name
                if buffer[name] == 46:
                    if count == 1 or (count == 2 and buffer[name + 1] == 46):
                        continue
                    if count >= _STAGING.shape[0]:
                        ours = True
                        for k in range(_STAGING.shape[0]):
                            ours &= buffer[name + k] == _STAGING[k]
                        if ours:
                            continue
                code = lstat(fd, np.uintp(buffer.ctypes.data + name), np.uintp(status.ctypes.data))
                if code == ENOENT:
                    # Gone since it was listed.
                    continue
                if code != 0 or count >= _MOST_NAME:
                    good = False
                    break
                mode = i64(quarters[14])
                if mode & TYPE == _SOCKET:
                    continue
                record[0] = u64(mode)
                record[1] = u64(halves[5]) | (u64(halves[6]) << _S32)
                record[2] = words[5]
                record[3] = words[14] * u64(1000000000) + u64(halves[30])
                record[4] = words[12] * u64(1000000000) + u64(halves[26])
                major, minor = u64(halves[34]), u64(halves[35])
                # As makedev(3) puts them together.
                record[5] = (
                    ((major & u64(0xFFFFF000)) << _S32)
                    | ((major & u64(0xFFF)) << u64(8))
                    | ((minor & u64(0xFFFFFF00)) << u64(12))
                    | (minor & u64(0xFF))
                )
                record[6] = words[4]
                record[7] = u64(count)
                filled = _WORDS + (count + 7) // 8
                record[filled - 1] = u64(0)
                for k in range(count):
                    bytes_of[8 * _WORDS + k] = buffer[name + k]
                mark = _hash(record, filled, key)
                sums[i, 0] += u64(1)
                sums[i, 1] += mark & _LOW
                sums[i, 2] += mark >> _S32
                if mode & TYPE == DIRECTORY:
                    if used + count + 1 > names.shape[0] or found + 3 > owners.shape[0]:
                        full = True
                        good = False
                        break
                    for k in range(count + 1):
                        names[used + k] = buffer[name + k]
                    used += count + 1
                    owners[2 + found] = i
                    found += 1
        close(fd)
        if full and before_found:
            # Those of this directory come with the next call.
            return i
        sums[i, 3] = u64(1) if good else u64(0)
        if not good:
            found, used = before_found, before_used
        owners[0], owners[1] = found, used
    return int(total)


class Marker:
    """Makes marks that are keyed with ``key``, for one thread at a time."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._record = np.zeros(_WORDS + _MOST_NAME // 8, np.uint64)
        self._bytes = self._record.data.cast("B")

    def mark(
        self,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        mtime_ns: int,
        ctime_ns: int,
        dev: int,
        ino: int,
    ) -> int:
        """The mark of an entry, as a signed number of 64 bits: ``mode`` with the type, all as lstat tells it."""
        _RECORD.pack_into(self._bytes, 0, mode, uid | gid << 32, size, mtime_ns, ctime_ns, dev, ino, len(name), name)
        return _signed_mark(self._record, self._key)  # type: ignore[no-any-return]


def warm_up() -> None:
    """Load or compile the kernels; raises RuntimeError if they are wrong about a directory that holds nothing."""
    with tempfile.TemporaryDirectory(prefix="farshore-") as empty:
        top = os.open(empty, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if Room().sum_up(top, [b"."], 1) != [(NOTHING, [])] or not Marker(1).mark(b"x", *[0] * 8):
                raise RuntimeError("the self-test of reading directories failed")
        finally:
            os.close(top)


class Room:
    """What one thread needs to sum up directories."""

    def __init__(self) -> None:
        self._names = np.empty(_NAMES, np.uint8)
        self._owners = np.empty(2 + _NAMES // 4, np.int64)
        self._buffer = np.empty(ENTRIES, np.uint8)
        self._status = np.empty(256, np.uint8)
        self._record = np.zeros(_WORDS + _MOST_NAME // 8, np.uint64)

    def sum_up(self, root: int, paths: Sequence[bytes], key: int) -> list[tuple[Sum | None, list[bytes]]]:
        """For each of the directories, relative to the descriptor ``root``: its sum, and the names of those in it.

        No sum where something in it could not be read, or it is no directory, or too large for this.
        """
        ends = np.cumsum([len(path) + 1 for path in paths], dtype=np.int64)
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
        packed = np.frombuffer(b"\0".join(paths) + b"\0", np.uint8).copy()
        sums = np.zeros((len(paths), 4), np.uint64)
        below: list[list[bytes]] = [[] for _ in paths]
        first = 0
        while first < len(paths):
            self._owners[:2] = 0
            first = _sum_up(
                root,
                packed,
                starts,
                first,
                key,
                sums,
                self._names,
                self._owners,
                self._buffer,
                self._status,
                self._record,
            )
            count, used = int(self._owners[0]), int(self._owners[1])
            names = self._names[:used].tobytes().split(b"\0")
            for owner, name in zip(self._owners[2 : 2 + count].tolist(), names, strict=False):
                below[owner].append(name)
        rows = sums.tolist()
        return [
            (Sum(row[0], row[1], row[2]) if row[3] else None, names) for row, names in zip(rows, below, strict=True)
        ]
