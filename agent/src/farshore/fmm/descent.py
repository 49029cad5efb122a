"""Add inotify watches to many directories at one go, by machine code.

For each directory that is a few microseconds of system calls; done one by one from Python, it is ten times that, and a
tree of 100,000 directories is not watched before seconds have passed in which nothing is protected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from farshore.fmm.libc import (
    BASIC_STATS,
    D_NAME,
    D_RECLEN,
    D_TYPE,
    DIRECTORY,
    ENOENT,
    ENTRIES,
    OPEN,
    TYPE,
    close,
    errno_location,
    getdents,
    inotify_add_watch,
    kernel,
    lstat,
    openat,
    statx,
)

i64: Any = np.int64
Array = Any

#: Room for the names of subdirectories in one call.
_NAMES = 1 << 20
#: Directories that are watched in one call, at most.
MOST = 1024
_PROC = np.frombuffer(b"/proc/self/fd/", np.uint8)
_DT_DIR, _DT_UNKNOWN = 4, 0
_AT_EMPTY_PATH = 0x1000

#: In place of an error's number. It lies on another filesystem than it should; it could not be listed in this room.
ELSEWHERE, TOO_LARGE = 1 << 20, 1 << 21


class Found(NamedTuple):
    """What became of one directory.

    ``wd``: its watch, or, negative, why it has none: an error's number, or ELSEWHERE. ``problem``: 0, or why its
    subdirectories are not known although it is watched: an error's number, or TOO_LARGE. ``names`` of these.
    """

    wd: int
    problem: int
    names: list[bytes]


@kernel("int32(int32, int32, uint32, uint8[::1])")
def _watch(inotify: int, fd: int, mask: int, path: Array) -> int:
    """The watch of an open directory, or minus an error's number."""
    end = _PROC.shape[0]
    digits = 1
    rest = fd // 10
    while rest:
        digits += 1
        rest //= 10
    rest = fd
    for k in range(digits):
        path[end + digits - 1 - k] = 48 + rest % 10
        rest //= 10
    path[end + digits] = 0
    wd = inotify_add_watch(inotify, np.uintp(path.ctypes.data), np.uint32(mask))
    return int(wd) if wd >= 0 else -int(errno_location()[0])


@kernel(
    "void(int32, int32, uint32, int64, uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], "
    "int64[:, ::1], uint8[::1], int64[::1], uint8[::1], uint8[::1], uint8[::1])"
)
def _descend(
    top: int,
    inotify: int,
    mask: int,
    device: int,
    strings: Array,
    parents: Array,
    expected: Array,
    lasts: Array,
    children: Array,
    codes: Array,
    found: Array,
    names: Array,
    owners: Array,
    buffer: Array,
    status: Array,
    path: Array,
) -> None:
    """Watch ``children``, and list them.

    ``parents`` and ``children`` are places in ``strings``: of a path relative to ``top``, of a name in that directory,
    each ended by a zero byte. The children of parent i end before ``lasts[i]``; they are left alone if its watch, which
    ``codes[i]`` becomes, is not the expected one. ``found[j]`` becomes the watch of child j, and its problem.
    Subdirectories: names, each ended by a zero byte, and the numbers of their directories in ``owners``, which begins
    with their count and the bytes they take.
    """
    words = status.view(np.uint32)
    quarters = status.view(np.uint16)
    used = i64(0)
    count = i64(0)
    child = i64(0)
    for i in range(parents.shape[0]):
        above = openat(np.int32(top), np.uintp(strings.ctypes.data + parents[i]), np.int32(OPEN))
        codes[i] = -int(errno_location()[0]) if above < 0 else _watch(inotify, above, mask, path)
        for j in range(child, lasts[i]):
            if codes[i] != expected[i]:
                break
            fd = openat(above, np.uintp(strings.ctypes.data + children[j]), np.int32(OPEN))
            if fd < 0:
                found[j, 0] = -int(errno_location()[0])
                continue
            if device >= 0:
                empty = strings.ctypes.data + strings.shape[0] - 1
                if statx(
                    fd,
                    np.uintp(empty),
                    np.int32(_AT_EMPTY_PATH),
                    np.uint32(BASIC_STATS),
                    np.uintp(status.ctypes.data),
                ):
                    found[j, 0] = -int(errno_location()[0])
                    close(fd)
                    continue
                if (i64(words[34]) << 32 | i64(words[35])) != device:
                    found[j, 0] = -ELSEWHERE
                    close(fd)
                    continue
            found[j, 0] = _watch(inotify, fd, mask, path)
            before_used, before_count = used, count
            while found[j, 0] >= 0 and found[j, 1] == 0:
                length = getdents(fd, np.uintp(buffer.ctypes.data), np.uintp(ENTRIES))
                if length < 0:
                    found[j, 1] = int(errno_location()[0])
                if length <= 0:
                    break
                at = i64(0)
                while at < length:
                    size = i64(buffer[at + D_RECLEN]) | (i64(buffer[at + D_RECLEN + 1]) << 8)
                    kind = buffer[at + D_TYPE]
                    name = at + D_NAME
                    at += size
                    if kind != _DT_DIR and kind != _DT_UNKNOWN:
                        continue
                    end = name
                    while buffer[end] != 0:
                        end += 1
                    if buffer[name] == 46 and (end == name + 1 or (end == name + 2 and buffer[name + 1] == 46)):
                        continue
                    if kind == _DT_UNKNOWN:
                        code = lstat(fd, np.uintp(buffer.ctypes.data + name), np.uintp(status.ctypes.data))
                        if code == ENOENT:
                            continue
                        if code != 0:
                            found[j, 1] = i64(code)
                            break
                        if quarters[14] & TYPE != DIRECTORY:
                            continue
                    if used + end - name + 1 > names.shape[0] or count + 3 > owners.shape[0]:
                        found[j, 1] = TOO_LARGE
                        break
                    for k in range(end - name + 1):
                        names[used + k] = buffer[name + k]
                    used += end - name + 1
                    owners[2 + count] = j
                    count += 1
            if found[j, 1] != 0:
                used, count = before_used, before_count
            close(fd)
        child = lasts[i]
        if above >= 0:
            close(above)
    owners[0], owners[1] = count, used


class Descent:
    """What one thread needs to watch directories with the inotify instance ``inotify``, a descriptor, for ``mask``."""

    def __init__(self, inotify: int, mask: int) -> None:
        self._inotify = inotify
        self._mask = mask
        self._names = np.empty(_NAMES, np.uint8)
        self._owners = np.empty(2 + _NAMES // 4, np.int64)
        self._buffer = np.empty(ENTRIES, np.uint8)
        self._status = np.empty(256, np.uint8)
        self._path = np.zeros(_PROC.shape[0] + 16, np.uint8)
        self._path[: _PROC.shape[0]] = _PROC

    def watch(
        self, top: int, parents: Sequence[tuple[bytes, int, Sequence[bytes]]], device: int | None
    ) -> list[tuple[int, list[Found]]]:
        """Watch directories by their names in others, which are known by their paths, relative to ``top``.

        ``parents``: for each of these its path, its own watch, and the names, at least one. With ``device``, only what
        lies on it. Returns for each what its watch is, or minus an error's number if it cannot be opened; and, only if
        that is the one that was given, what became of each name.
        """
        strings: list[bytes] = []
        for path, _, names in parents:
            strings.append(path or b".")
            strings += names
        ends = np.cumsum([len(each) + 1 for each in strings], dtype=np.int64)
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
        counts = np.array([len(names) for _, _, names in parents], np.int64)
        lasts = np.cumsum(counts)
        # In the list, each parent comes before its children.
        heads = lasts - counts + np.arange(len(parents))
        codes = np.zeros(len(parents), np.int64)
        found = np.zeros((int(lasts[-1]), 2), np.int64)
        _descend(
            top,
            self._inotify,
            self._mask,
            -1 if device is None else os.major(device) << 32 | os.minor(device),
            np.frombuffer(b"\0".join(strings) + b"\0\0", np.uint8).copy(),
            starts[heads],
            np.array([wd for _, wd, _ in parents], np.int64),
            lasts,
            np.delete(starts, heads),
            codes,
            found,
            self._names,
            self._owners,
            self._buffer,
            self._status,
            self._path,
        )
        count, used = int(self._owners[0]), int(self._owners[1])
        below: list[list[bytes]] = [[] for _ in range(len(found))]
        names_found = self._names[:used].tobytes().split(b"\0")
        for owner, name in zip(self._owners[2 : 2 + count].tolist(), names_found, strict=False):
            below[owner].append(name)
        rows = found.tolist()
        result = []
        first = 0
        for code, (_, wd, _), last in zip(codes.tolist(), parents, lasts.tolist(), strict=True):
            there = range(first, last) if code == wd else ()
            result.append((code, [Found(rows[j][0], rows[j][1], below[j]) for j in there]))
            first = last
        return result
