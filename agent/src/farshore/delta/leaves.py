"""Digests of content of which most is known: the leaves of its BLAKE3 tree, block by block, kept in a file.

Who keeps them beside content that was verified once can tell the digest of a changed version from the blocks that
changed alone. Nothing wrong can come of leaves that are damaged: the digest that they give is compared with the one
that the changed version is known to have.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from blake3 import blake3

from farshore.delta import kernels
from farshore.delta.errors import DeltaCorrupt
from farshore.delta.format import DeltaHeader
from farshore.delta.signature import Sums, TreeTop, check_block_size, chunk_shift, window_span
from farshore.delta.vectors import LANES

#: Bytes of a chaining value.
_CV = 32
#: Leaves of so many bytes are not noted: those of 32 GiB in blocks of 4 KiB.
MOST_NOTED = 256 << 20
_NO_SUMS: Sums = np.empty(0, np.uint32)


class Leaves:
    """The chaining values of the blocks of content of `length` bytes with BLAKE3-256 `digest`: 32 bytes for each
    block of `block_size`, from the beginning of the open file `fd`, which becomes the object's own."""

    def __init__(self, fd: int, block_size: int, length: int, digest: bytes) -> None:
        self.fd = fd
        self.block_size = block_size
        self.length = length
        self.digest = digest

    @property
    def size(self) -> int:
        """How many bytes they take."""
        return -(-self.length // self.block_size) * _CV

    def belong_to(self, header: DeltaHeader) -> bool:
        """Whether they are those of the base that the delta with this header was made for."""
        same = self.block_size == header.block_size and self.length == header.base_length
        return same and self.digest == header.base_digest

    def read(self, first: int, count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Return the CVs of `count` blocks from number `first`, uint32 (count, 8); raise DeltaCorrupt when the file
        does not hold them, and OSError."""
        data = os.pread(self.fd, count * _CV, first * _CV)
        if len(data) != count * _CV:
            raise DeltaCorrupt("the leaves of the base are cut short")
        return np.frombuffer(data, np.uint32).reshape(-1, 8)

    def duplicate(self) -> Leaves:
        """Return an object of its own for the same leaves."""
        return Leaves(os.dup(self.fd), self.block_size, self.length, self.digest)

    def close(self) -> None:
        """Give back the file. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class LeafHasher:
    """The BLAKE3-256 of content that comes in order: as bytes, or as blocks whose leaves are known.

    `notes` is called once, when a window of 2 MiB has come, for a file that takes the leaves of all of it, not to be
    closed by this object. Where there is none, or it cannot take them (a full disk, more than MOST_NOTED), `noted` is
    None, the file is empty, and the digest is the same.
    """

    def __init__(self, block_size: int, notes: Callable[[], int | None] | None = None) -> None:
        self._size = check_block_size(block_size)
        self._shift = chunk_shift(block_size)
        self._scratch = kernels.make_scratch(block_size)
        self._rows = window_span(block_size) // block_size
        self._cvs = np.empty((self._rows + LANES, 8), np.uint32)
        # Leaves in the window, and in those before it.
        self._row = 0
        self._before = 0
        # A block that is not complete, or that may be the only one: then its hash is no leaf's.
        self._edge = np.empty(block_size, np.uint8)
        self._edge_length = 0
        self._top = TreeTop(self._scratch.lanes)
        self._notes = notes
        #: The file that has the leaves.
        self.noted: int | None = None
        self.length = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        new = np.frombuffer(data, np.uint8)
        self.length += len(new)
        at = 0
        while at < len(new):
            if self._edge_length == self._size:
                self._hash_edge()
            whole = min((len(new) - at) // self._size, self._rows - self._row)
            if whole and not self._edge_length and (self._row or self._before):
                self._hash(new, at, whole * self._size)
                self._row += whole
                at += whole * self._size
                self._flush_full()
            else:
                end = min(len(new), at + self._size - self._edge_length)
                self._edge[self._edge_length : self._edge_length + end - at] = new[at:end]
                self._edge_length += end - at
                at = end

    def can_repeat(self) -> bool:
        """Whether blocks may follow by their leaves: at the end of any block. Not at the beginning, as content of a
        single block has no leaf."""
        return self.length > 0 and self.length % self._size == 0

    def repeat(self, known: Leaves, blocks: int) -> None:
        """Take the next `blocks` blocks, which are the full ones that `known` has at the same place; only where
        `can_repeat`. Raises DeltaCorrupt and OSError."""
        if self._edge_length:
            self._hash_edge()
        self.length += blocks * self._size
        while blocks:
            count = min(blocks, self._rows - self._row)
            self._cvs[self._row : self._row + count] = known.read(self._before + self._row, count)
            self._row += count
            blocks -= count
            self._flush_full()

    def digest(self) -> bytes:
        """Return the digest of all that was taken; nothing may follow."""
        if self.length <= self._size:
            return blake3(self._edge.data[: self._edge_length]).digest()
        if self._edge_length:
            self._hash_edge()
        if self._row:
            self._flush()
        return self._top.root()

    def _hash(self, data: np.ndarray[Any, np.dtype[np.uint8]], start: int, length: int) -> None:
        first = self._before + self._row
        cvs = self._cvs[self._row :]
        kernels.sign_window(data, start, length, first, self._shift, _NO_SUMS, cvs, self._scratch)

    def _hash_edge(self) -> None:
        self._hash(self._edge, 0, self._edge_length)
        self._edge_length = 0
        self._row += 1
        self._flush_full()

    def _flush_full(self) -> None:
        if self._row == self._rows:
            if not self._before and self._notes is not None:
                self.noted = self._notes()
            self._flush()

    def _flush(self) -> None:
        if self.noted is not None and not self._note(self.noted, self._cvs[: self._row].tobytes()):
            with contextlib.suppress(OSError):
                os.ftruncate(self.noted, 0)
            self.noted = None
        self._top.add(self._cvs, self._row)
        self._before += self._row
        self._row = 0

    def _note(self, file: int, cvs: bytes) -> bool:
        at = self._before * _CV
        try:
            return at + len(cvs) <= MOST_NOTED and os.pwrite(file, cvs, at) == len(cvs)
        except OSError:
            return False
