"""Rebuild new content from its base and a delta, trusting neither."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from farshore.delta.errors import DeltaCorrupt
from farshore.delta.format import (
    HEADER,
    MIN_BLOCK_SIZE,
    TRAILER,
    VARINT_LIMIT,
    DeltaHeader,
    header_size,
    parse_header,
)
from farshore.delta.leaves import LeafHasher, Leaves

# A copy is carried out in pieces of this size.
COPY_PIECE = 1 << 20

_OFFSET_LIMIT = 1 << 63


class RandomReader(Protocol):
    """What a base is read from: ``pread`` may return less than asked, b"" only at the end."""

    def pread(self, offset: int, length: int, /) -> bytes: ...


class FdReader:
    """A base that is an open file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, offset: int, length: int, /) -> bytes:
        return os.pread(self._fd, length, offset)


class BytesReader:
    """A base in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def pread(self, offset: int, length: int, /) -> bytes:
        return self._data[offset : offset + length]


@dataclass(frozen=True)
class Applied:
    """What was written: `length` in bytes and its BLAKE3-256."""

    length: int
    digest: bytes


class Applier:
    """Takes a delta in chunks of any size and hands the new content to `write`, in order.

    What has been written is right only once :meth:`finish` has returned: until then the caller
    keeps it where nobody takes it for the real thing. Memory stays below a few MiB, and some 55 MB
    for each TiB of content, whatever the delta says. `limit`, in bytes, bounds what a delta may
    produce; a few bytes of it can otherwise ask for any amount. After an error every further call
    raises DeltaCorrupt.

    `copy`, if given, is called as ``copy(base_offset, piece)`` in place of ``write(piece)`` for
    what comes from the base, in pieces of at most COPY_PIECE bytes; a destination that shares
    the base's blocks already need not write them again. The calls of both together are in the
    order of the new content.

    `known`, the leaves of the base, `keep` and `notes` belong together and save the reading of
    what stays where it was. Where `known` are the leaves of the base that the delta was made for,
    ``keep(offset, length)`` is called before whole blocks that are to be copied from `offset` of
    the base to `offset` of the new content; if it returns True it has seen to them, and they are
    neither read nor written, else it is not asked again for this range; the base must not have
    changed since `known` was made. `notes` is called once, for an open, empty file that takes the leaves of the
    new content, or None: see :meth:`leaves`.
    """

    def __init__(
        self,
        base: RandomReader | None,
        write: Callable[[bytes | memoryview], object],
        *,
        limit: int | None = None,
        copy: Callable[[int, bytes], object] | None = None,
        keep: Callable[[int, int], bool] | None = None,
        known: Leaves | None = None,
        notes: Callable[[], int | None] | None = None,
    ) -> None:
        self._base = base
        self._write = write
        self._write_copy = copy
        self._keep = keep
        self._known = known
        self._notes = notes
        self._limit = limit
        self._pending = bytearray()
        self._step: Callable[[memoryview], int] = self._read_header
        self._literal_left = 0
        self._length = 0
        self._whole = LeafHasher(MIN_BLOCK_SIZE)
        self._expected: tuple[int, bytes] | None = None
        self._broken = False
        # Known once the first chunks have been fed; says which base the delta was made for.
        self.header: DeltaHeader | None = None

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the delta; raise DeltaCorrupt when they make no sense."""
        self._check_usable()
        self._broken = True
        view = memoryview(chunk).cast("B")
        # What was left over is less than one header, so joining it costs little; only that much
        # of the chunk is joined, and the rest is worked on where it lies.
        while self._pending and len(view):
            before = len(self._pending)
            taken = min(len(view), 64)
            joined = memoryview(bytes(self._pending) + bytes(view[:taken]))
            done = self._run(joined)
            if done >= before:
                self._pending.clear()
                view = view[done - before :]
            else:
                del self._pending[:done]
                self._pending += view[:taken]
                view = view[taken:]
        if len(view):
            done = self._run(view)
            self._pending += view[done:]
        self._broken = False

    def finish(self) -> Applied:
        """Return what was written; raise DeltaCorrupt when the delta is cut short, or when the
        content is not the one that it was made from."""
        self._check_usable()
        self._broken = True
        if self._expected is None:
            raise DeltaCorrupt("it is cut short")
        length, digest = self._expected
        if self._length != length:
            raise DeltaCorrupt(f"it gives {self._length} bytes instead of {length}")
        if self._whole.digest() != digest:
            raise DeltaCorrupt("the content it gives has another digest than the original")
        self._broken = False
        return Applied(length, digest)

    def leaves(self) -> Leaves | None:
        """After :meth:`finish`, once: the leaves of the new content, in the file from `notes`, which
        becomes theirs; None when there are few, or they could not be noted."""
        file, self._whole.noted = self._whole.noted, None
        if self.header is None or self._expected is None or file is None:
            return None
        return Leaves(file, self.header.block_size, *self._expected)

    def _check_usable(self) -> None:
        if self._broken:
            raise DeltaCorrupt("an earlier part of it failed")

    def _run(self, view: memoryview) -> int:
        """Carry out all complete steps in `view`; return how many bytes they took."""
        done = 0
        while done < len(view):
            taken = self._step(view[done:])
            if not taken:
                break
            done += taken
        return done

    # Each step returns how many bytes it took; 0 means that it needs more of them.

    def _read_header(self, view: memoryview) -> int:
        if len(view) < HEADER.size:
            return 0
        size = header_size(view)
        if len(view) < size:
            return 0
        self.header = parse_header(view[:size])
        if self.header.base_length is not None and self._base is None:
            raise DeltaCorrupt("it needs a base and there is none")
        self._whole = LeafHasher(self.header.block_size, self._notes)
        if self._known is not None and not self._known.belong_to(self.header):
            self._known = None
        self._step = self._read_instruction
        return size

    def _read_instruction(self, view: memoryview) -> int:
        found = _varint(view, 0)
        if found is None:
            return 0
        value, end = found
        if value == 0:
            self._step = self._read_trailer
            return end
        length = value >> 1
        if not value & 1:
            self._reserve(length)
            self._literal_left = length
            self._step = self._read_literal
            return end
        found = _varint(view, end)
        if found is None:
            return 0
        offset, end = found
        self._copy(offset, length)
        return end

    def _read_literal(self, view: memoryview) -> int:
        part = view[: self._literal_left]
        self._count(part)
        self._write(part)
        self._literal_left -= len(part)
        if not self._literal_left:
            self._step = self._read_instruction
        return len(part)

    def _read_trailer(self, view: memoryview) -> int:
        if len(view) < TRAILER.size:
            return 0
        self._expected = TRAILER.unpack(view[: TRAILER.size])
        self._step = self._read_nothing
        return TRAILER.size

    def _read_nothing(self, view: memoryview) -> int:
        raise DeltaCorrupt("there is more after its end")

    def _reserve(self, length: int) -> None:
        if length == 0:
            raise DeltaCorrupt("an instruction of length 0")
        if self._limit is not None and self._length + length > self._limit:
            raise DeltaCorrupt(f"it gives more than {self._limit} bytes")

    def _copy(self, offset: int, length: int) -> None:
        self._reserve(length)
        header = self.header
        if header is None or header.base_length is None or self._base is None:
            raise DeltaCorrupt("it copies from a base and has none")
        if offset + length > header.base_length or offset + length > _OFFSET_LIMIT:
            raise DeltaCorrupt(f"it copies beyond the base's {header.base_length} bytes")
        refused = False
        while length:
            size = min(length, COPY_PIECE)
            if not refused and self._known is not None and offset == self._length:
                blocks = self._whole_blocks(length)
                if blocks:
                    kept = self._keep_blocks(offset, blocks)
                    offset += kept
                    length -= kept
                    refused = not kept
                    continue
                # Up to where blocks may be kept.
                size = min(size, self._known.block_size - offset % self._known.block_size)
            piece = self._base.pread(offset, size)
            if not piece:
                raise DeltaCorrupt(f"the base ends at {offset}")
            self._count(piece)
            if self._write_copy is None:
                self._write(piece)
            else:
                self._write_copy(offset, piece)
            offset += len(piece)
            length -= len(piece)

    def _whole_blocks(self, length: int) -> int:
        """Return how many of the blocks that begin here, within `length` bytes, may be kept."""
        assert self._known is not None
        return length // self._known.block_size if self._keep is not None and self._whole.can_repeat() else 0

    def _keep_blocks(self, offset: int, blocks: int) -> int:
        """Take blocks that are copied by their leaves, if that is possible; return how many bytes."""
        assert self._known is not None
        assert self._keep is not None
        length = blocks * self._known.block_size
        if not self._keep(offset, length):
            return 0
        self._whole.repeat(self._known, blocks)
        self._length += length
        return length

    def _count(self, piece: bytes | memoryview) -> None:
        self._whole.update(piece)
        self._length += len(piece)


def _varint(view: memoryview, start: int) -> tuple[int, int] | None:
    """Return the varint at `start` and where it ends, None when it is not all there."""
    value = 0
    for i in range(VARINT_LIMIT):
        if start + i >= len(view):
            return None
        byte = view[start + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            if value >> 64 or (byte == 0 and i):
                break
            return value, start + i + 1
    raise DeltaCorrupt("a number is malformed")
