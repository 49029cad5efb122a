"""Describe new content by the blocks of old content that it still holds.

Each window of the content goes through two stages. Aligned: block k of the new content is
compared with block k of the base, at the speed of hashing; most real changes are pages
overwritten or bytes appended. Rolling: what that leaves is scanned at every byte offset for any
block of the base; after a hit the base's next block is tried first, so that shifted content is
followed block by block and not scanned.

The scan asks a set of weak sums; of the base's blocks with that sum the first few are compared by
their strong checksums. What remains for an adversary are false alarms, each the price of one
strong checksum; a window has a budget of them, and when it is spent the rest of that window is
compared aligned only.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from farshore.delta import format as stream
from farshore.delta import kernels
from farshore.delta.signature import (
    BLOCK_SIZE,
    WINDOW,
    BinaryReader,
    BlockSigner,
    Bytes,
    Signature,
    Sums,
    check_block_size,
    chunk_shift,
    read_full,
    skipping_holes,
    window_span,
)

# A copy is told when it has this length: whoever applies the delta can begin before all is compared.
COPY_SPAN = 16 << 20

# False alarms a window may have, in strong hashes of its own length, beyond those that chance
# alone explains.
ALARM_PASSES = 2

# The scan reads beyond the last window of bytes by so much, at most.
_PADDING = 64

# Bits of the two bitmaps for each block, as powers of two. The first, asked at each position,
# shall stay in the L2 cache; beyond 2**24 bits that is lost anyway.
_FILTER_BITS = 3
_SIEVE_BITS = 5
_MOST_BITS = 26


@dataclass(frozen=True)
class DeltaStats:
    """Counts of one delta: bytes sent as they are, bytes taken from the base, instructions of
    each kind, strong hashes computed in vain, and the length of the delta itself."""

    literal_bytes: int = 0
    copied_bytes: int = 0
    copies: int = 0
    literals: int = 0
    false_alarms: int = 0
    delta_bytes: int = 0


class Encoder:
    """Makes the delta from `base` (None: there is none) to content that is read once.

    `block_size` must agree with the base's. `sign_new` false keeps no checksums of the new
    content, and leaves :attr:`signature` None. The results are valid once the iterator
    that :meth:`encode` returns is exhausted.
    """

    # Tests shrink it, so that small content crosses many windows.
    window = WINDOW

    def __init__(
        self,
        base: Signature | None,
        *,
        block_size: int | None = None,
        sign_new: bool = True,
    ) -> None:
        if base is not None and block_size not in (None, base.block_size):
            raise ValueError(f"block size {block_size}, but the base has {base.block_size}")
        if block_size is None:
            block_size = BLOCK_SIZE if base is None else base.block_size
        self.block_size = check_block_size(block_size)
        self._base = base if base is not None and len(base) else None
        self._header = (
            stream.DeltaHeader(block_size) if base is None else stream.DeltaHeader(block_size, base.length, base.digest)
        )
        self._sign_new = sign_new
        self.signature: Signature | None = None
        self.digest = b""
        self.length = 0
        self.stats = DeltaStats()

    def encode(self, source: BinaryReader) -> Iterator[bytes]:
        """Read `source` to its end and yield the delta in chunks of at most CHUNK_LIMIT bytes."""
        size = self.block_size
        span = window_span(size, self.window)
        # Windows are read to `head`; what the one before left unscanned is moved before it.
        head = size if self._base is not None else 0
        data = np.empty(head + span + _PADDING, np.uint8)
        view = data.data
        out = _Writer(self._header.to_bytes())
        matcher = None if self._base is None else _Matcher(self._base, data, head, span, out)
        signer = BlockSigner(size, span, keep=self._sign_new)
        source = skipping_holes(source)
        while True:
            got = read_full(source, view[head : head + span])
            weak, strong = signer.add(data, head, got)
            if matcher is None:
                out.literal(view[head : head + got])
            else:
                matcher.take(signer.length - got, got, got < span, weak, strong)
            yield from out.ready()
            if got < span:
                break
        self.length = signer.length
        self.digest = signer.digest()
        out.end(self.length, self.digest)
        yield from out.ready()
        if self._sign_new:
            self.signature = signer.finish()
        self.stats = out.stats(0 if matcher is None else matcher.false_alarms)


def encode_bytes(signature: Signature | None, new: bytes) -> bytes:
    """Return the whole delta from the content of `signature` to `new`."""
    return b"".join(Encoder(signature, sign_new=False).encode(io.BytesIO(new)))


class _Writer:
    """Turns literals and copies into the stream; adjacent copies become one, up to about COPY_SPAN bytes.

    Literals are taken by reference: :meth:`cut` must be called before they change.
    """

    def __init__(self, header: bytes) -> None:
        self._parts: list[bytes | memoryview] = [header]
        self._length = len(header)
        self._ready: list[bytes] = []
        self._copy_at = 0
        self._copy_length = 0
        self._bytes = 0
        self._literal_bytes = 0
        self._copied_bytes = 0
        self._copies = 0
        self._literals = 0

    def literal(self, data: memoryview) -> None:
        if len(data):
            self._flush_copy()
        for i in range(0, len(data), stream.LITERAL_LIMIT):
            part = data[i : i + stream.LITERAL_LIMIT]
            self._add(stream.varint(len(part) << 1))
            self._add(part)
            self._literal_bytes += len(part)
            self._literals += 1

    def copy(self, offset: int, length: int) -> None:
        if 0 < self._copy_length < COPY_SPAN and self._copy_at + self._copy_length == offset:
            self._copy_length += length
            return
        self._flush_copy()
        self._copy_at = offset
        self._copy_length = length

    def end(self, length: int, digest: bytes) -> None:
        self._flush_copy()
        self._add(stream.trailer(length, digest))

    def ready(self) -> list[bytes]:
        """Return what is complete, in chunks."""
        self.cut()
        chunks, self._ready = self._ready, []
        return chunks

    def stats(self, false_alarms: int) -> DeltaStats:
        return DeltaStats(
            literal_bytes=self._literal_bytes,
            copied_bytes=self._copied_bytes,
            copies=self._copies,
            literals=self._literals,
            false_alarms=false_alarms,
            delta_bytes=self._bytes,
        )

    def _flush_copy(self) -> None:
        if self._copy_length:
            self._add(stream.copy(self._copy_at, self._copy_length))
            self._copied_bytes += self._copy_length
            self._copies += 1
            self._copy_length = 0

    def _add(self, part: bytes | memoryview) -> None:
        if self._length + len(part) > stream.CHUNK_LIMIT:
            self.cut()
        self._parts.append(part)
        self._length += len(part)

    def cut(self) -> None:
        if self._parts:
            self._ready.append(b"".join(self._parts))
            self._bytes += self._length
            self._parts.clear()
            self._length = 0


_NO_INDEX = kernels.Index(
    np.uint32(1), 31, 31, 31, *(np.empty(0, np.uint32) for _ in range(3)), *(np.empty(0, np.int32) for _ in range(2))
)


def _bitmap_shift(bits: int) -> int:
    return 32 - min(max(bits, 10), _MOST_BITS)


def _make_index(weak: Sums) -> tuple[kernels.Index, int]:
    """Return the index of the full blocks with these weak sums, and how many distinct sums there
    are. Memory: 13 bytes for each block, rounded up to a power of two, and 4 more."""
    bits = max(len(weak) - 1, 1).bit_length()
    index = kernels.Index(
        # Nobody can foresee it, so nobody can fill one stretch of the table.
        factor=np.uint32(random.SystemRandom().getrandbits(32) | 1),
        filter_shift=_bitmap_shift(bits + _FILTER_BITS),
        sieve_shift=_bitmap_shift(bits + _SIEVE_BITS),
        table_shift=31 - bits,
        filter=np.zeros(1 << (27 - _bitmap_shift(bits + _FILTER_BITS)), np.uint32),
        sieve=np.zeros(1 << (27 - _bitmap_shift(bits + _SIEVE_BITS)), np.uint32),
        keys=np.zeros(2 << bits, np.uint32),
        heads=np.full(2 << bits, -1, np.int32),
        following=np.empty(len(weak), np.int32),
    )
    return index, int(kernels.fill_index(weak, index))


class _Matcher:
    """Finds the base's blocks in one window after the other and tells the writer."""

    def __init__(self, base: Signature, data: Bytes, head: int, span: int, out: _Writer) -> None:
        self._size = base.block_size
        self._shift = chunk_shift(base.block_size)
        self._full = base.length // base.block_size
        weak = base.weak.view()
        weak.flags.writeable = False
        strong = np.frombuffer(base.strong, np.uint32).reshape(-1, 4)
        self._base = kernels.Base(weak, strong, base.length)
        self._data = data
        self._view = data.data
        self._head = head
        self._span = span
        self._out = out
        self._index = _NO_INDEX
        self._distinct = 0
        self._scratch = kernels.make_scratch(base.block_size)
        self._carry = 0
        self._state = np.zeros(kernels.STATE_WORDS, np.int64)
        self._state[kernels.FOLLOW] = -1
        self._copies = np.empty(3 * (3 + 2 * (len(data) // base.block_size)), np.int64)

    @property
    def false_alarms(self) -> int:
        return int(self._state[kernels.ALARMS])

    def take(self, at: int, got: int, last: bool, weak: Sums, strong: Sums) -> None:
        """Match the `got` bytes at `head`, which lie at offset `at` of the new content and whose
        blocks have these checksums."""
        head, view, state = self._head, self._view, self._state
        end = head + got
        first = at // self._size
        aligned = self._compare_aligned(first, got // self._size, weak, strong)
        if got == self._span and not self._carry and state[kernels.FOLLOW] in (-1, first) and aligned.all():
            # Most windows of most files; there is nothing to search for.
            self._out.copy(at, got)
            state[kernels.FOLLOW] = first + got // self._size
            state[kernels.SHIFT] = 0
            return
        if self._full and not len(self._index.heads) and (self._carry or not aligned.all()):
            self._index, self._distinct = _make_index(self._base.weak[: self._full])
        pending = head - self._carry
        state[kernels.POSITION] = pending
        # For random content chance alone gives four times span * distinct / 2**32, because sums
        # of random bytes keep close to their mean; and that four times.
        state[kernels.BUDGET] = (
            ALARM_PASSES * (self._span // self._size) + 16 + ((16 * self._span * self._distinct) >> 32)
        )
        rows = kernels.match_window(
            self._data,
            head,
            end,
            first,
            last,
            self._shift,
            aligned,
            self._base,
            self._index,
            self._scratch,
            state,
            self._copies,
        )
        for position, offset, length in self._copies[: 3 * rows].reshape(-1, 3).tolist():
            self._out.literal(view[pending:position])
            self._out.copy(offset, length)
            pending = position + length
        # A position beyond the last copy was scanned in vain.
        position = end if last else int(state[kernels.POSITION])
        self._out.literal(view[pending:position])
        self._carry = end - position
        if self._carry:
            self._out.cut()
            self._data[head - self._carry : head] = self._data[position:end]

    def _compare_aligned(
        self, first: int, blocks: int, weak: Sums, strong: Sums
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return for each full block of the window whether the base has it at the same place."""
        same = np.zeros(blocks, np.bool_)
        common = max(0, min(blocks, self._full - first))
        if common:
            there = slice(first, first + common)
            same[:common] = weak[:common] == self._base.weak[there]
            # Two halves of 8 bytes each: a comparison, where all(axis=1) would be a loop.
            halves = strong[:common].view(np.uint64) == self._base.strong[there].view(np.uint64)
            same[:common] &= halves[:, 0] & halves[:, 1]
        return same
