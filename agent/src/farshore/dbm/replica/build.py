"""Build the content of a staged file at the cost of what changes in it.

Where the filesystem shares blocks between files (XFS, btrfs), the new file begins as a clone of the old one: what stays
where it was needs no write, other whole blocks of the old file are cloned to their new place. Elsewhere the new file
is written from beginning to end. Either way it is nobody's file until it is complete, and what it holds was hashed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Callable, Iterator

import blake3
import numpy

from farshore import delta
from farshore.dbm.replica.stage import Staged

# ioctl_ficlonerange(2), fallocate(2), sync_file_range(2)
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_SYNC_WRITE = 2
_RANGE = struct.Struct("=qQQQ")

#: Zeros become holes in units of this many bytes, aligned in the file.
_HOLE = 4096
#: Shorter ranges are written: a call that clones costs about as much as writing them.
_LEAST_CLONE = 64 << 10
#: Where nothing was written, shorter holes are not made sure of.
_LEAST_PUNCH = 64 << 10
#: After so many written bytes the system is told to begin with writing back: a sync at the end has less to wait for.
_WRITE_BACK = 4 << 20
_READ = 1 << 20
#: Bytes that the kernel copies at a time.
_COPY = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_Identity = tuple[int, int, int]


class Building:
    """A staged file whose content comes in order, by ``write`` and ``copy``; ``handle`` and ``base`` become its own.

    ``check`` is called before each step and may raise. All methods raise OSError.
    """

    def __init__(
        self, staged: Staged, handle: int, base: int | None, *, sparse: bool, check: Callable[[], None]
    ) -> None:
        self.staged = staged
        self.handle = handle
        self.base = base
        self.sparse = sparse
        self._check = check
        self._at = 0
        self._written = self._written_back = 0
        self._copied = self._kept = False
        #: The size that the clone began with; None when it is no clone.
        self._cloned: int | None = None
        self._block = _HOLE
        self._base_was: _Identity | None = None
        if base is not None:
            self._base_was = _identity(base)
            self._cloned = _clone(handle, base)
            self._block = os.fstatvfs(handle).f_frsize

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self._check()
        view = memoryview(data)
        if self.sparse:
            for start, end, empty in _runs(view, self._at, whole=self._cloned is not None):
                if empty:
                    self._make_hole(self._at + start, end - start)
                else:
                    self._write(view[start:end], self._at + start)
        else:
            self._write(view, self._at)
        self._at += len(view)

    def copy(self, offset: int, piece: bytes) -> None:
        """Append ``piece``, which the base has at ``offset``."""
        self._check()
        if not self._copied and offset != self._at and self._cloned is not None:
            # Everything has moved: to write over shared blocks costs more than to write anew.
            self._cloned = min(self._cloned, self._at)
            os.ftruncate(self.handle, self._cloned)
        self._copied = True
        if self._is_there(offset, len(piece)) or self._clone_range(offset, len(piece)):
            self._at += len(piece)
        else:
            self.write(piece)

    def keep(self, offset: int, length: int) -> bool:
        """Append what the base has at the same ``offset`` without having seen it; False when that cannot be done."""
        self._check()
        assert offset == self._at
        if not (self._is_there(offset, length) or self._clone_range(offset, length) or self._copy_range(length)):
            return False
        self._copied = self._kept = True
        self._at += length
        return True

    def finish(self, digest: bytes) -> None:
        """All is there: its size, and that it is what was hashed; raises DeltaCorrupt when it is not."""
        os.ftruncate(self.handle, self._at)
        # What was cloned was hashed as the base was read, at another moment, and what was kept, before.
        shared = self._cloned is not None or self._kept
        if shared and self.base is not None and _identity(self.base) != self._base_was:
            hasher = blake3.blake3()
            for block in read_blocks(self.handle, self._check):
                hasher.update(block)
            if hasher.digest() != digest:
                raise delta.DeltaCorrupt("the file that it builds on changed meanwhile")
        self._release_base()

    def sync(self) -> None:
        """Make the content durable."""
        os.fdatasync(self.handle)

    def close(self) -> None:
        """Give back the handles; the file stays. Idempotent."""
        self._release_base()
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _release_base(self) -> None:
        if self.base is not None:
            os.close(self.base)
            self.base = None

    def _write(self, view: memoryview, at: int) -> None:
        while view:
            done = os.pwrite(self.handle, view, at)
            view, at = view[done:], at + done
            self._begin_to_write_back(done)

    def _begin_to_write_back(self, written: int) -> None:
        self._written += written
        if self._written - self._written_back >= _WRITE_BACK:
            self._written_back = self._written
            _libc.sync_file_range(self.handle, 0, 0, _SYNC_WRITE)

    def _make_hole(self, at: int, length: int) -> None:
        if self._cloned is None or at >= self._cloned:
            # Nothing was ever there, but XFS allocates beyond the end of a file that grows.
            if length < _LEAST_PUNCH:
                return
            os.ftruncate(self.handle, at + length)
        if _libc.fallocate(self.handle, _KEEP_SIZE | _PUNCH_HOLE, at, length) == 0:
            return
        if ctypes.get_errno() != errno.EOPNOTSUPP:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if self._cloned is not None and at < self._cloned:
            self._write(memoryview(bytes(length)), at)

    def _is_there(self, offset: int, length: int) -> bool:
        """Whether the clone has these bytes of the base where they belong now."""
        return self._cloned is not None and offset == self._at and offset + length <= self._cloned

    def _copy_range(self, length: int) -> bool:
        """Have the kernel copy what the base has at the same place; False when it does not. Holes would not remain."""
        if self._cloned is not None or self.base is None or self.sparse:
            return False
        at, end = self._at, self._at + length
        while at < end:
            self._check()
            try:
                done = os.copy_file_range(self.base, self.handle, min(end - at, _COPY), at, at)
            except OSError as error:
                if error.errno in _NO_CLONE:
                    return False
                raise
            if not done:
                return False
            at += done
            self._begin_to_write_back(done)
        return True

    def _clone_range(self, offset: int, length: int) -> bool:
        """Share whole blocks of the base; False when the bytes must be written."""
        if self._cloned is None or self.base is None:
            return False
        if length < _LEAST_CLONE or (offset | self._at | length) % self._block:
            return False
        try:
            fcntl.ioctl(self.handle, _FICLONERANGE, _RANGE.pack(self.base, offset, length, self._at))
        except OSError as error:
            if error.errno in _NO_CLONE:
                return False
            raise
        return True


_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.ENOSYS)


def copy_file(building: Building, known: delta.Leaves | None = None) -> bytes:
    """Fill a building with its whole base; returns its BLAKE3-256. With its leaves ``known`` it need not be read.

    Raises OSError and DeltaCorrupt.
    """
    assert building.base is not None
    if known is not None and building.keep(0, known.length):
        building.finish(known.digest)
        return known.digest
    hasher = blake3.blake3()
    at = 0
    for block in read_blocks(building.base, lambda: None):
        hasher.update(block)
        building.copy(at, block)
        at += len(block)
    digest = hasher.digest()
    building.finish(digest)
    return digest


def read_blocks(handle: int, check: Callable[[], None]) -> Iterator[bytes]:
    """The content of a file from its beginning; ``check`` is called before each block and may raise."""
    at = 0
    while True:
        check()
        block = os.pread(handle, _READ, at)
        if not block:
            return
        yield block
        at += len(block)


def room(handle: int, sparse: bool) -> int:
    """How many bytes the content of a file on this filesystem may have: more does not fit or makes no sense."""
    status = os.fstatvfs(handle)
    if sparse or not status.f_blocks:
        # The latter where the filesystem knows no size of its own: ramfs, tmpfs without a limit, some of FUSE's.
        return 1 << 50
    return status.f_frsize * status.f_blocks


def _clone(handle: int, base: int) -> int | None:
    """Make an empty file a clone of ``base``; returns its size, None where files cannot share blocks."""
    try:
        fcntl.ioctl(handle, _FICLONE, base)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return None
        raise
    return os.fstat(handle).st_size


def _identity(handle: int) -> _Identity:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _runs(view: memoryview, at: int, *, whole: bool) -> Iterator[tuple[int, int, bool]]:
    """Cut what goes to offset ``at`` into runs (start, end, holds only zeros).

    Those of zeros are aligned blocks; unless ``whole``, also the part of one at either end.
    """
    head = min(-at % _HOLE, len(view))
    blocks = (len(view) - head) // _HOLE
    tail = head + blocks * _HOLE
    empty = numpy.zeros(blocks + 2, dtype=bool)
    if blocks:
        data = numpy.frombuffer(view[head:tail], dtype=numpy.uint8).reshape(blocks, _HOLE)
        numpy.logical_not(data.any(axis=1), out=empty[1:-1])
    if not whole:
        empty[0], empty[-1] = not any(view[:head]), not any(view[tail:])
    # Where one kind of blocks gives way to the other; block 0 is what comes before the first aligned one.
    changes = [0, *(numpy.flatnonzero(numpy.diff(empty)) + 1).tolist(), blocks + 2]
    for first, last in itertools.pairwise(changes):
        start = 0 if first == 0 else head + (first - 1) * _HOLE
        end = len(view) if last == blocks + 2 else head + (last - 1) * _HOLE
        if start < end:
            yield start, end, bool(empty[first])
