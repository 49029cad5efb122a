"""Describe new content by the blocks of old content that it still holds.

Each window of the content goes through two stages. Aligned: block k of the new content is
compared with block k of the base, at memory speed; most real changes are pages overwritten or
bytes appended. Rolling: what that leaves is scanned at every byte offset for any block of the
base; after a hit the base's next block is tried first, so that shifted content is followed block
by block and not scanned.

The scan asks a set of weak sums; the strong hash of a hit is then looked up in a sorted list, so
that many base blocks with equal weak sums cost no more than one. What remains for an adversary
are false alarms, each the price of one strong hash; a window has a budget of them, and when it
is spent the rest of that window is compared aligned only.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from farshore.delta import format as stream
from farshore.delta import kernels
from farshore.delta.format import STRONG_BYTES
from farshore.delta.signature import (
    BLOCK_SIZE,
    WINDOW,
    BinaryReader,
    BlockSigner,
    Signature,
    check_block_size,
    read_full,
    strong_sums,
    weak_sums,
    window_span,
)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Most blocks hashed ahead while following a run: enough to hide the cost of the calls.
FOLLOW_LIMIT = 64

# False alarms a window may have, in strong hashes of its own length, beyond those that chance
# alone explains.
ALARM_PASSES = 2

# The scan reads one byte past the last window.
_PADDING = 64


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

    `block_size` must agree with the base's. `sign_new` false spares the strong hashes of blocks
    that changed, and leaves :attr:`signature` None. The results are valid once the iterator
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
        signer = BlockSigner(size) if self._sign_new else None
        whole = blake3()
        length = 0
        while True:
            got = read_full(source, view[head : head + span])
            whole.update(view[head : head + got])
            sums = None if signer is None else signer.add(data, head, got)
            if matcher is None:
                out.literal(view[head : head + got])
            else:
                matcher.take(length, got, got < span, sums)
            length += got
            yield from out.ready()
            if got < span:
                break
        self.length = length
        self.digest = whole.digest()
        out.end(length, self.digest)
        yield from out.ready()
        if signer is not None:
            self.signature = signer.finish(length, self.digest)
        self.stats = out.stats(0 if matcher is None else matcher.false_alarms)


def encode_bytes(signature: Signature | None, new: bytes) -> bytes:
    """Return the whole delta from the content of `signature` to `new`."""
    return b"".join(Encoder(signature, sign_new=False).encode(io.BytesIO(new)))


class _Writer:
    """Turns literals and copies into the stream; adjacent copies become one."""

    def __init__(self, header: bytes) -> None:
        self._buffer = bytearray(header)
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
            self._buffer += stream.varint(len(part) << 1)
            self._buffer += part
            self._literal_bytes += len(part)
            self._literals += 1
            self._cut()

    def copy(self, offset: int, length: int) -> None:
        if self._copy_length and self._copy_at + self._copy_length == offset:
            self._copy_length += length
            return
        self._flush_copy()
        self._copy_at = offset
        self._copy_length = length

    def end(self, length: int, digest: bytes) -> None:
        self._flush_copy()
        self._buffer += stream.trailer(length, digest)
        self._cut(everything=True)

    def ready(self) -> Iterator[bytes]:
        chunks, self._ready = self._ready, []
        yield from chunks

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
            self._buffer += stream.copy(self._copy_at, self._copy_length)
            self._copied_bytes += self._copy_length
            self._copies += 1
            self._copy_length = 0
            self._cut()

    def _cut(self, everything: bool = False) -> None:
        if everything or len(self._buffer) > stream.CHUNK_LIMIT - stream.LITERAL_LIMIT - 128:
            self._bytes += len(self._buffer)
            self._ready.append(bytes(self._buffer))
            self._buffer.clear()


class _Index:
    """Where the rolling scan finds the full blocks of a base; identical blocks are in it once."""

    def __init__(self, base: Signature) -> None:
        full = base.length // base.block_size
        strong = np.frombuffer(base.strong, "<u8").reshape(-1, 2)[:full]
        order = np.argsort(strong[:, 0], kind="stable")
        high = strong[order, 0].astype(np.uint64)
        first = np.ones(full, np.bool_)
        first[1:] = high[1:] != high[:-1]
        self.high = high[first]
        self.block = order[first].astype(np.int64)
        self.low = strong[self.block, 1].astype(np.uint64)
        weak = np.unique(base.weak[:full])
        self.distinct = len(weak)
        bits = max(self.distinct - 1, 1).bit_length()
        # A factor nobody can foresee, so that nobody can fill one stretch of the table.
        self.factor = random.SystemRandom().getrandbits(32) | 1
        self.empty = _absent(weak)
        self.table = np.full(2 << bits, self.empty, np.uint32)
        self.table_shift = 32 - (bits + 1)
        filter_bits = min(max(bits + 4, 10), 26)
        self.filter_shift = 32 - filter_bits
        # Two bitmaps, one behind the other.
        self.bits = np.zeros(2 << (filter_bits - 5), np.uint32)
        kernels.fill_set(
            weak,
            self.factor,
            self.table_shift,
            self.empty,
            self.table,
            self.filter_shift,
            self.bits,
        )

    def find(self, key: bytes) -> int:
        """Return the block with this strong hash, or -1."""
        high = int.from_bytes(key[:8], "little")
        low = int.from_bytes(key[8:], "little")
        return int(kernels.find_strong(self.high, self.low, self.block, high, low))


def _absent(weak: np.ndarray[Any, np.dtype[np.uint32]]) -> int:
    """Return the least value that the sorted, distinct `weak` does not hold."""
    gaps = np.flatnonzero(weak != np.arange(len(weak), dtype=np.uint32))
    return int(gaps[0]) if len(gaps) else len(weak)


class _Matcher:
    """Finds the base's blocks in one window after the other and tells the writer."""

    def __init__(self, base: Signature, data: Bytes, head: int, span: int, out: _Writer) -> None:
        self._base = base
        self._size = base.block_size
        self._full, self._tail = divmod(base.length, base.block_size)
        self._strong = np.frombuffer(base.strong, "<u8").reshape(-1, 2)
        self._tail_key = base.strong[self._full * STRONG_BYTES :]
        self._data = data
        self._view = data.data
        self._head = head
        self._span = span
        self._out = out
        self._index: _Index | None = None
        self._carry = 0
        # The base's block that continues the copy which ended at the current position, or -1.
        self._follow = -1
        self._state = np.zeros(kernels.STATE_WORDS, np.uint32)
        self._sums = np.empty(kernels.SCAN_BATCH, np.uint32)
        self._hits = np.empty(kernels.SCAN_BATCH + 1, np.uint16)
        self.false_alarms = 0

    def take(
        self,
        at: int,
        got: int,
        last: bool,
        sums: tuple[np.ndarray[Any, np.dtype[np.uint32]], bytes] | None,
    ) -> None:
        """Match the `got` bytes at `head`, which lie at offset `at` of the new content and have
        these weak and strong sums, as far as they are known."""
        size, head, view = self._size, self._head, self._view
        end = head + got
        # Positions from here on have no full block in this window.
        stop = end - size + 1
        aligned = self._compare_aligned(at, got, sums)
        matched = np.flatnonzero(aligned)
        breaks = np.flatnonzero(~aligned)
        first_block = at // size
        tail_position = self._full * size - at + head if self._tail else -1
        budget = ALARM_PASSES * (self._span // size) + 16
        budget_is_complete = False
        position = head - self._carry
        pending = position
        fresh = True

        while True:
            if (
                self._tail
                and (self._follow == self._full or position == tail_position)
                and position + self._tail <= end
                and self._is_tail(position)
            ):
                self._out.literal(view[pending:position])
                self._out.copy(self._full * size, self._tail)
                position = pending = position + self._tail
                self._follow, fresh = -1, True
                continue
            if position >= stop:
                break

            number, off = divmod(position - head, size)
            here = number >= 0 and not off and bool(aligned[number])
            block, count = self._follow, 0
            if 0 <= block < self._full and not (here and block == first_block + number):
                count = self._follow_run(position, end, block)
            if not count and here:
                block = first_block + number
                k = int(np.searchsorted(breaks, number))
                count = (int(breaks[k]) if k < len(breaks) else len(aligned)) - number
            if count:
                self._out.literal(view[pending:position])
                self._out.copy(block * size, count * size)
                position = pending = position + count * size
                self._follow, fresh = block + count, True
                continue

            self._follow = -1
            limit = tail_position if position < tail_position < stop else stop
            if budget <= 0 or not self._full:
                k = int(np.searchsorted(matched * size + head, position))
                position = min(limit, int(matched[k]) * size + head if k < len(matched) else stop)
                if position == pending and budget <= 0:
                    position = limit
                fresh = True
                continue
            index = self._index
            if index is None:
                index = self._index = _Index(self._base)
            if not budget_is_complete:
                # For random content chance alone gives four times span * distinct / 2**32,
                # because sums of random bytes keep close to their mean; and that four times.
                budget += (16 * self._span * index.distinct) >> 32
                budget_is_complete = True
            position = kernels.scan(
                self._data,
                position,
                limit,
                size,
                fresh,
                self._state,
                self._sums,
                self._hits,
                index.factor,
                index.table_shift,
                index.empty,
                index.table,
                index.filter_shift,
                index.bits,
            )
            fresh = True
            if position == limit:
                continue
            number, off = divmod(position - head, size)
            if number >= 0 and not off and aligned[number]:
                continue
            found = index.find(blake3(view[position : position + size]).digest(STRONG_BYTES))
            if found >= 0:
                self._out.literal(view[pending:position])
                self._out.copy(found * size, size)
                position = pending = position + size
                self._follow = found + 1
            else:
                self.false_alarms += 1
                budget -= 1
                position += 1
                fresh = False

        if last:
            for place in (tail_position, end - self._tail) if self._tail else ():
                if position <= place <= end - self._tail and self._is_tail(place):
                    self._out.literal(view[pending:place])
                    self._out.copy(self._full * size, self._tail)
                    position = pending = place + self._tail
            self._out.literal(view[pending:end])
            return
        self._out.literal(view[pending:position])
        self._carry = end - position
        self._data[head - self._carry : head] = self._data[position:end]

    def _compare_aligned(
        self,
        at: int,
        got: int,
        sums: tuple[np.ndarray[Any, np.dtype[np.uint32]], bytes] | None,
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return for each full block of the window whether the base has it at the same place."""
        size, head = self._size, self._head
        blocks = got // size
        first = at // size
        common = max(0, min(blocks, self._full - first))
        same = np.zeros(blocks, np.bool_)
        if not common:
            return same
        length = common * size
        weak = sums[0][:common] if sums else weak_sums(self._data, head, length, size)
        same[:common] = weak == self._base.weak[first : first + common]
        theirs = self._strong[first : first + common]
        if sums is not None:
            ours = np.frombuffer(sums[1], "<u8").reshape(-1, 2)[:common]
            same[:common] &= (ours == theirs).all(axis=1)
            return same
        hits = np.flatnonzero(same)
        if len(hits):
            keys = b"".join(
                [blake3(self._view[i : i + size]).digest(STRONG_BYTES) for i in (hits * size + head).tolist()]
            )
            ours = np.frombuffer(keys, "<u8").reshape(-1, 2)
            same[hits] = (ours == theirs[hits]).all(axis=1)
        return same

    def _follow_run(self, position: int, end: int, block: int) -> int:
        """Return how many blocks at `position` are the base's from `block` on.

        The number hashed ahead doubles with each success, so that what is hashed in vain stays
        in proportion to what is found.
        """
        size = self._size
        most = min((end - position) // size, self._full - block)
        done = 0
        ahead = 1
        while done < most:
            want = min(ahead, most - done)
            start = position + done * size
            count = kernels.weak_run(self._data, start, want, size, self._base.weak, block + done)
            if not count:
                break
            keys = strong_sums(self._view[start : start + count * size], size)
            ours = np.frombuffer(keys, "<u8").reshape(-1, 2)
            equal = (ours == self._strong[block + done : block + done + count]).all(axis=1)
            good = count if equal.all() else int(np.argmin(equal))
            self.false_alarms += good < count
            done += good
            if good < want:
                break
            ahead = min(2 * ahead, FOLLOW_LIMIT)
        return done

    def _is_tail(self, position: int) -> bool:
        weak = weak_sums(self._data, position, self._tail, self._tail)[0]
        if weak != self._base.weak[self._full]:
            return False
        block = self._view[position : position + self._tail]
        return blake3(block).digest(STRONG_BYTES) == self._tail_key
