"""Everything of the delta engine that runs as machine code, but for the vectors themselves.

Rules of this file: explicit signatures, ``nogil``, no logging, no exceptions. numba promotes
``uint32 + uint32`` to ``uint64``, so every arithmetic step is cast back to ``uint32``. Indices are
``int64`` throughout, because numba turns ``int64 + uint64`` into a float. Each kernel has its
counterpart in :mod:`farshore.delta.reference`, which the tests hold it to; what needs explicit
vectors is in :mod:`farshore.delta.vectors`.

A chaining value (CV) is a row of 8 words in an array of shape (rows, 8). Kernels hash LANES rows
at a time, so such an array has LANES rows to spare behind those that count.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from farshore.delta import vectors
from farshore.delta.vectors import LANES, ROLL_STEP, SUM_STEP

# Imported by name: only some of the numba versions we support carry type information.
_numba: Any = importlib.import_module("numba")
_types: Any = _numba.types

# To mypy these would be signed or unsigned "Any" anyway, and its promotions are not numba's.
Array = Any
u16: Any = np.uint16
u32: Any = np.uint32
i64: Any = np.int64

_F = TypeVar("_F", bound=Callable[..., Any])

# BLAKE3 hashes chunks of this many bytes, in blocks of 64; its flags are those of the specification.
CHUNK = 1024
CHUNK_SHIFT = 10
_CHUNK_BLOCKS = 16
_CHUNK_START = 1
_CHUNK_END = 2
_PARENT = 4
_ROOT = 8

# Blocks that are hashed together: enough to fill the lanes at every level of their trees.
GROUP = LANES

# While chunks are hashed, what lies so many bytes behind them is fetched from memory: the processor
# does not foresee that many rows. More than this no longer finds room in a first cache of 32 KiB.
_AHEAD = 16 << 10

# Most positions that are summed before any of them is looked up. The first batch after a match is
# shorter, and each that finds nothing is followed by one of twice the length.
SCAN_BATCH = 1024
_FIRST_BATCH = 64

# Candidates wait for company, to be hashed side by side, for at most so many batches.
_PATIENCE = 8

# Longest run of occupied slots in the hash table. What would need a longer one is left out, which
# costs a match, never time.
MAX_PROBES = 64

# Most blocks with the same weak sum that are compared with one position.
MAX_CHAIN = 8

# What a match carries from window to window, and what it gives back, in an int64 array: where to
# go on in `data`; the base's block that continues the copy which ended there, or -1; by how much
# that copy was shifted (its offset in the new content less that in the base); how many false
# alarms are still allowed; how many there were; the block that a search has found.
POSITION, FOLLOW, SHIFT, BUDGET, ALARMS, FOUND = range(6)
STATE_WORDS = 6


class Base(NamedTuple):
    """The checksums of the base: weak uint32 (blocks), strong uint32 (blocks, 4), and its length."""

    weak: Array
    strong: Array
    length: int


class Index(NamedTuple):
    """Where the scan finds the full blocks of a base by their weak sums; an empty `heads`: nowhere.

    `filter` and `sieve` are bitmaps, by hashes of the sum. `keys` and `heads` are a hash table,
    open-addressed: a sum, and the first block that has it, or -1; `following` leads from each
    block to the next one with the same sum, or to -1.
    """

    factor: Any  # np.uint32
    filter_shift: int
    sieve_shift: int
    table_shift: int
    filter: Array
    sieve: Array
    keys: Array
    heads: Array
    following: Array


class Scratch(NamedTuple):
    """Working memory: `lanes` for hash_rows; `cvs`; `starts` and `numbers`, which blocks to hash;
    `edge`, a chunk that is not full; `sums`, `slots` and `hits` of a batch of positions."""

    lanes: Array
    cvs: Array
    starts: Array
    numbers: Array
    edge: Array
    sums: Array
    slots: Array
    hits: Array


def make_scratch(block_size: int) -> Scratch:
    """Return working memory for blocks of `block_size` bytes: 32 * GROUP bytes for each KiB of it."""
    return Scratch(
        lanes=np.zeros(2 * LANES, np.int64),
        cvs=np.zeros((GROUP * block_size // CHUNK + LANES, 8), np.uint32),
        starts=np.zeros(GROUP, np.int64),
        numbers=np.zeros(GROUP, np.int64),
        edge=np.zeros(CHUNK, np.uint8),
        sums=np.zeros(SCAN_BATCH + ROLL_STEP + 1, np.uint32),
        slots=np.zeros(SCAN_BATCH + ROLL_STEP + 1, np.uint32),
        hits=np.zeros(SCAN_BATCH + 1, np.uint16),
    )


_int64 = _types.int64
_uint32 = _types.uint32
# What is hashed and scanned may be what bytes() holds.
_Bytes = _types.Array(_types.uint8, 1, "C", True)
_Words = _types.uint32[::1]
_Longs = _types.int64[::1]
_Cvs = _types.uint32[:, ::1]
_Base = _types.NamedTuple((_types.Array(_uint32, 1, "C", True), _types.Array(_uint32, 2, "C", True), _int64), Base)
_Index = _types.NamedTuple(
    (_uint32, _int64, _int64, _int64, _Words, _Words, _Words, _types.int32[::1], _types.int32[::1]), Index
)
_Scratch = _types.NamedTuple(
    (_Longs, _Cvs, _Longs, _Longs, _types.uint8[::1], _Words, _Words, _types.uint16[::1]), Scratch
)


def _kernel(result: Any, *arguments: Any) -> Callable[[_F], _F]:
    signature = result(*arguments)

    def compile_it(function: _F) -> _F:
        try:
            compiled: _F = _numba.njit(signature, nogil=True, cache=True)(function)
        except Exception:
            # No directory for the cache may be writable, or what lies in it may be damaged:
            # neither is a reason not to start. An error of the kernel itself comes up again.
            compiled = _numba.njit(signature, nogil=True)(function)
        return compiled

    return compile_it


# Weak sums


@_kernel(_uint32, _Bytes, _int64, _int64)
def weak_sum(data: Array, start: int, length: int) -> int:
    """Return s(k, l) of the `length` bytes from `start`."""
    steps = length // SUM_STEP
    s = vectors.block_sums(data, start, steps)
    a = u32(s & u32(0xFFFF))
    b = u32(s >> u32(16))
    for i in range(start + steps * SUM_STEP, start + length):
        a = u32(a + u32(data[i]))
        b = u32(b + a)
    return u32((a & u32(0xFFFF)) | u32(b << u32(16)))  # type: ignore[no-any-return]


# Strong hashes


# Between these functions go addresses: numba counts the references of each array that is handed on, which costs more
# than some of them do. `table` is that of a Scratch's `lanes`, and `rows` that of the first of some CVs.


@_kernel(_types.void, _int64, _int64, _int64, _int64, _int64, _int64, _int64, _int64)
def _hash_rows(
    table: int, blocks: int, last: int, flags: int, first_flags: int, last_flags: int, ahead: int, out: int
) -> None:
    """Call the vectors' function of that name, so that its machine code is there once."""
    vectors.hash_rows(table, blocks, last, flags, first_flags, last_flags, ahead, out)


@_kernel(_types.void, _int64, _int64)
def _hash_chunks(table: int, out: int) -> None:
    """Write the CVs of LANES full chunks to the address `out`."""
    _hash_rows(table, _CHUNK_BLOCKS, 64, 0, _CHUNK_START, _CHUNK_END, _AHEAD, out)


@_kernel(_int64, _int64, _int64, _int64, _int64)
def _parents(rows: int, count: int, table: int, flags: int) -> int:
    """Replace the first `count` CVs by those of their parents; return how many these are.

    An odd one at the end is promoted as it is. Repeated, this gives the tree of BLAKE3, for
    there, too, the left side is always a complete tree.
    """
    pairs = count >> 1
    # The spare rows that the last group of lanes writes may lie over the one to be promoted.
    spare = rows + ((count + LANES - 1) << 5)
    if count & 1:
        vectors.copy_row(rows + ((count - 1) << 5), spare)
    last = rows + ((pairs - 1) << 6)
    for first in range(0, pairs, LANES):
        vectors.set_rows(table, rows + (first << 6), 64, last, 0, 0)
        _hash_rows(table, 1, 64, flags, 0, 0, 0, rows + (first << 5))
    if count & 1:
        vectors.copy_row(spare, rows + (pairs << 5))
    return (count + 1) >> 1


@_kernel(_types.void, _int64, _int64, _int64, _int64)
def _reduce(rows: int, count: int, wanted: int, table: int) -> None:
    while count > wanted:
        count = _parents(rows, count, table, _PARENT)


@_kernel(_types.void, _Cvs, _int64, _int64, _Longs)
def reduce_cvs(cvs: Array, count: int, wanted: int, lanes: Array) -> None:
    """Replace `count` CVs by those of the `wanted` (1 or 2) subtrees at the top of their tree."""
    _reduce(cvs.ctypes.data, count, wanted, lanes.ctypes.data)


@_kernel(_types.void, _Cvs, _int64, _Longs)
def root_cv(cvs: Array, count: int, lanes: Array) -> None:
    """Replace `count` CVs, 2 or more, by the root of their tree: cvs[0] is then the digest."""
    rows, table = cvs.ctypes.data, lanes.ctypes.data
    _reduce(rows, count, 2, table)
    _parents(rows, 2, table, _PARENT | _ROOT)


@_kernel(_types.void, _Bytes, _int64, _int64, _Scratch)
def hash_blocks(data: Array, count: int, shift: int, scratch: Scratch) -> None:
    """Write the CVs of `count` blocks, at most GROUP, of CHUNK << `shift` bytes to scratch.cvs.

    Block i begins at scratch.starts[i] of `data` and is hashed as block number scratch.numbers[i]
    of its content.
    """
    starts, numbers, lanes = scratch.starts, scratch.numbers, scratch.lanes
    content, table, rows = data.ctypes.data, lanes.ctypes.data, scratch.cvs.ctypes.data
    chunks = count << shift
    inner = (1 << shift) - 1
    for first in range(0, chunks, LANES):
        for lane in range(LANES):
            chunk = min(first + lane, chunks - 1)
            lanes[lane] = content + starts[chunk >> shift] + ((chunk & inner) << CHUNK_SHIFT)
            lanes[LANES + lane] = (numbers[chunk >> shift] << shift) + (chunk & inner)
        _hash_chunks(table, rows + (first << 5))
    for _ in range(shift):
        chunks = _parents(rows, chunks, table, _PARENT)


@_kernel(_types.void, _int64, _int64, _int64, _int64, _int64, _int64)
def _hash_partial(start: int, length: int, first_chunk: int, edge: int, rows: int, table: int) -> None:
    """As `hash_partial`, the last chunk being at the address `edge` if it is not full."""
    full = length >> CHUNK_SHIFT
    chunks = full
    last = start + ((full - 1) << CHUNK_SHIFT)
    for first in range(0, full, LANES):
        vectors.set_rows(table, start + (first << CHUNK_SHIFT), CHUNK, last, first_chunk + first, 1)
        _hash_chunks(table, rows + (first << 5))
    rest = length & (CHUNK - 1)
    if rest:
        vectors.set_rows(table, edge, 0, edge, first_chunk + full, 0)
        blocks = (rest + 63) >> 6
        last = rest - ((blocks - 1) << 6)
        _hash_rows(table, blocks, last, 0, _CHUNK_START, _CHUNK_END, 0, rows + (full << 5))
        chunks += 1
    _reduce(rows, chunks, 1, table)


@_kernel(_types.void, _Bytes, _int64, _int64, _int64, _Scratch)
def hash_partial(data: Array, start: int, length: int, first_chunk: int, scratch: Scratch) -> None:
    """Write the CV of a short block, of 1 or more bytes, to scratch.cvs[0]; its first chunk is
    number `first_chunk` of the content."""
    edge = scratch.edge
    rest = length & (CHUNK - 1)
    if rest:
        for i in range(CHUNK):
            edge[i] = data[start + length - rest + i] if i < rest else 0
    rows, table = scratch.cvs.ctypes.data, scratch.lanes.ctypes.data
    _hash_partial(data.ctypes.data + start, length, first_chunk, edge.ctypes.data, rows, table)


@_kernel(_types.void, _Bytes, _int64, _int64, _int64, _int64, _Words, _Cvs, _Scratch)
def sign_window(
    data: Array, start: int, length: int, first_block: int, shift: int, weak: Array, cvs: Array, scratch: Scratch
) -> None:
    """Write the weak sums and the CVs of the blocks of data[start : start + length], the last of
    which may be shorter, to `weak`, unless it is empty, and `cvs`; the first is number `first_block` of its
    content."""
    size = CHUNK << shift
    full = length // size
    content, out = data.ctypes.data + start, cvs.ctypes.data
    table, rows = scratch.lanes.ctypes.data, scratch.cvs.ctypes.data
    summed = 0 if len(weak) else full
    for first in range(0, full, GROUP):
        chunks = min(GROUP, full - first) << shift
        before = first << shift
        last = content + ((before + chunks - 1) << CHUNK_SHIFT)
        for row in range(0, chunks, LANES):
            # What is read for the weak sums is still in the first cache when it is hashed.
            while summed << shift < before + min(row + LANES, chunks):
                weak[summed] = weak_sum(data, start + summed * size, size)
                summed += 1
            chunk = before + row
            number = (first_block << shift) + chunk
            vectors.set_rows(table, content + (chunk << CHUNK_SHIFT), CHUNK, last, number, 1)
            _hash_chunks(table, rows + (row << 5))
        for _ in range(shift):
            chunks = _parents(rows, chunks, table, _PARENT)
        for i in range(chunks):
            vectors.copy_row(rows + (i << 5), out + ((first + i) << 5))
    if length > full * size:
        at = start + full * size
        if len(weak):
            weak[full] = weak_sum(data, at, length - full * size)
        hash_partial(data, at, length - full * size, (first_block + full) << shift, scratch)
        vectors.copy_row(rows, out + (full << 5))


@_kernel(_types.boolean, _Cvs, _int64, _Base, _int64)
def _is_block(cvs: Array, row: int, base: Base, block: int) -> bool:
    different = u32(0)
    for word in range(4):
        different |= cvs[row, word] ^ base.strong[block, word]
    return different == u32(0)  # type: ignore[no-any-return]


# The index


@_kernel(_uint32, _uint32, _uint32)
def _sieve_hash(s: int, factor: int) -> int:
    """Return a hash that is independent enough of s * factor."""
    swapped = u32(u32(s >> u32(16)) | u32(s << u32(16)))
    return u32(swapped * factor)  # type: ignore[no-any-return]


@_kernel(_int64, _types.Array(_uint32, 1, "C", True), _Index)
def fill_index(weak: Array, index: Index) -> int:
    """Put the blocks with the sums `weak` into `index`, which is empty; return how many distinct
    sums there are. A sum that finds no place within MAX_PROBES is left out."""
    mask = len(index.heads) - 1
    distinct = 0
    # From the last to the first, so that chains ascend.
    for block in range(len(weak) - 1, -1, -1):
        s = weak[block]
        h = u32(s * index.factor)
        slot = i64(h >> u32(index.table_shift))
        for _ in range(MAX_PROBES):
            head = index.heads[slot]
            if head < 0 or index.keys[slot] == s:
                index.following[block] = head
                index.heads[slot] = block
                index.keys[slot] = s
                if head < 0:
                    distinct += 1
                    f = i64(h >> u32(index.filter_shift))
                    index.filter[f >> 5] = u32(index.filter[f >> 5] | u32(u32(1) << u32(f & 31)))
                    f = i64(_sieve_hash(s, index.factor) >> u32(index.sieve_shift))
                    index.sieve[f >> 5] = u32(index.sieve[f >> 5] | u32(u32(1) << u32(f & 31)))
                break
            slot = (slot + 1) & mask
    return distinct


@_kernel(_int64, _Index, _uint32)
def first_block(index: Index, s: int) -> int:
    """Return the first block with the weak sum `s`, or -1."""
    mask = len(index.heads) - 1
    slot = i64(u32(s * index.factor) >> u32(index.table_shift))
    for _ in range(MAX_PROBES):
        head = index.heads[slot]
        if head < 0 or index.keys[slot] == s:
            return i64(head)  # type: ignore[no-any-return]
        slot = (slot + 1) & mask
    return -1


# The scan


@_kernel(_int64, _Bytes, _int64, _int64, _int64, _Index, _Scratch)
def scan_batch(data: Array, start: int, count: int, size: int, index: Index, scratch: Scratch) -> int:
    """Note in scratch.hits which of the `count` positions from `start`, at most SCAN_BATCH, have
    windows whose weak sum may be in the index; return how many.

    scratch.sums[0] is s of the first. Afterwards scratch.sums[i] is s of position start + i, for
    i up to `count`. Reads at most ROLL_STEP bytes beyond the last window.
    """
    sums, slots, hits = scratch.sums, scratch.slots, scratch.hits
    slots[0] = u32(sums[0] * index.factor) >> u32(index.filter_shift)
    steps = (count + ROLL_STEP - 1) // ROLL_STEP
    vectors.roll_sums(data, start, steps, size, sums[0], index.factor, index.filter_shift, sums, slots)
    # A branch for each survivor would be mispredicted: both sieves do without.
    bits = index.filter
    found = 0
    batch = slots[:count]
    for i in range(count):
        f = batch[i]
        hits[found] = u16(i)
        found += i64((bits[f >> u32(5)] >> (f & u32(31))) & u32(1))
    bits = index.sieve
    shift = u32(index.sieve_shift)
    again = 0
    for k in range(found):
        hit = hits[k]
        f = u32(_sieve_hash(sums[hit], index.factor) >> shift)
        hits[again] = hit
        again += i64((bits[f >> u32(5)] >> (f & u32(31))) & u32(1))
    return again


@_kernel(_int64, _Bytes, _int64, _int64, _Base, _Scratch, _Longs)
def _first_equal(data: Array, count: int, shift: int, base: Base, scratch: Scratch, state: Array) -> int:
    """Hash the `count` candidates in scratch.starts and scratch.numbers; return which is the first
    that is that block, or -1. Those before it were false alarms."""
    hash_blocks(data, count, shift, scratch)
    for i in range(count):
        if _is_block(scratch.cvs, i, base, scratch.numbers[i]):
            return i
        state[ALARMS] += 1
        state[BUDGET] -= 1
    return -1


@_kernel(_int64, _Bytes, _int64, _int64, _int64, _int64, _Base, _Index, _Scratch, _Longs)
def search(
    data: Array,
    start: int,
    limit: int,
    origin: int,
    shift: int,
    base: Base,
    index: Index,
    scratch: Scratch,
    state: Array,
) -> int:
    """Return the first position from `start` on, before `limit`, where a block of the base is, and
    put that block into state[FOUND]; return `limit` when there is none.

    `origin` is where offset 0 of the new content would be in `data`. When state[BUDGET] is spent
    the search ends early: it returns where, with -1 in state[FOUND].
    """
    size = CHUNK << shift
    full = base.length // size
    group = max(1, LANES >> shift)
    waiting = patience = 0
    span = _FIRST_BATCH
    scratch.sums[0] = weak_sum(data, start, size)
    position = start
    state[FOUND] = -1
    while position < limit:
        count = min(span, limit - position)
        hits = scan_batch(data, position, count, size, index, scratch)
        for k in range(hits):
            hit: int = i64(scratch.hits[k])
            s = scratch.sums[hit]
            block = first_block(index, s)
            if block < 0:
                continue
            place = position + hit
            # The block that would go on with the last copy, had nothing come between.
            expected = place - origin - state[SHIFT]
            expected = expected // size if expected >= 0 and expected % size == 0 else -1
            if not (0 <= expected < full and base.weak[expected] == s):
                expected = -1
            tries = MAX_CHAIN
            while block >= 0 and tries:
                tries -= 1
                if expected >= 0:
                    candidate, expected = expected, -2 - expected
                else:
                    candidate, block = block, i64(index.following[block])
                    if candidate == -2 - expected:
                        continue
                scratch.starts[waiting] = place
                scratch.numbers[waiting] = candidate
                waiting += 1
                if waiting == group:
                    equal = _first_equal(data, waiting, shift, base, scratch, state)
                    waiting = 0
                    if equal >= 0:
                        state[FOUND] = scratch.numbers[equal]
                        return int(scratch.starts[equal])
                    if state[BUDGET] <= 0:
                        return place + 1
        position += count
        scratch.sums[0] = scratch.sums[count]
        patience += 1
        if not waiting:
            patience = 0
        elif span < SCAN_BATCH or patience >= _PATIENCE or position >= limit:
            equal = _first_equal(data, waiting, shift, base, scratch, state)
            waiting = patience = 0
            if equal >= 0:
                state[FOUND] = scratch.numbers[equal]
                return int(scratch.starts[equal])
            if state[BUDGET] <= 0:
                return position
        span = min(2 * span, SCAN_BATCH)
    return limit


@_kernel(_int64, _Bytes, _int64, _int64, _int64, _int64, _Base, _Scratch, _Longs)
def follow_run(
    data: Array, start: int, most: int, block: int, shift: int, base: Base, scratch: Scratch, state: Array
) -> int:
    """Return how many blocks at `start`, at most `most`, are the base's from `block` on.

    The number hashed ahead doubles with each success, up to GROUP, so that what is hashed in vain
    stays in proportion to what is found.
    """
    size = CHUNK << shift
    done = 0
    ahead = max(1, LANES >> shift)
    while done < most:
        want = min(ahead, most - done)
        count = 0
        while count < want:
            at = start + (done + count) * size
            if weak_sum(data, at, size) != base.weak[block + done + count]:
                break
            scratch.starts[count] = at
            scratch.numbers[count] = block + done + count
            count += 1
        if not count:
            return done
        hash_blocks(data, count, shift, scratch)
        for i in range(count):
            if not _is_block(scratch.cvs, i, base, block + done + i):
                state[ALARMS] += 1
                return done + i
        done += count
        if count < want:
            return done
        ahead = min(2 * ahead, GROUP)
    return done


@_kernel(_types.boolean, _Bytes, _int64, _int64, _Base, _Scratch)
def _is_tail(data: Array, position: int, shift: int, base: Base, scratch: Scratch) -> bool:
    """Tell whether the base's short last block is at `position`."""
    full = base.length // (CHUNK << shift)
    tail = base.length - full * (CHUNK << shift)
    if weak_sum(data, position, tail) != base.weak[full]:
        return False
    hash_partial(data, position, tail, full << shift, scratch)
    return _is_block(scratch.cvs, 0, base, full)


@_kernel(_int64, _Longs, _int64, _int64, _int64, _int64, _int64, _int64, _Longs)
def _note_copy(
    copies: Array, row: int, position: int, offset: int, length: int, follow: int, origin: int, state: Array
) -> int:
    """Write a copy to row `row` of `copies`, go on behind it, and return the next row."""
    copies[3 * row] = position
    copies[3 * row + 1] = offset
    copies[3 * row + 2] = length
    state[POSITION] = position + length
    state[FOLLOW] = follow
    state[SHIFT] = position - origin - offset
    return row + 1


@_kernel(
    _int64,
    _Bytes,
    _int64,
    _int64,
    _int64,
    _types.boolean,
    _int64,
    _types.boolean[::1],
    _Base,
    _Index,
    _Scratch,
    _Longs,
    _Longs,
)
def match_window(
    data: Array,
    head: int,
    end: int,
    first: int,
    last: bool,
    shift: int,
    aligned: Array,
    base: Base,
    index: Index,
    scratch: Scratch,
    state: Array,
    copies: Array,
) -> int:
    """Find the base's blocks in data[state[POSITION] : end]; return how many copies were noted.

    data[head] is where block number `first` of the new content begins; `aligned` tells of the
    full blocks from there on which are the base's at the same place. Each copy is three numbers
    in `copies`: position in `data`, offset in the base, length; they ascend and don't overlap.
    `copies` has room for three and two for each block of `data`. Where no full block is left
    before `end` the work stops, at state[POSITION], and goes on in the next window, if this is
    not the `last`. An empty index: nothing is searched for.
    """
    size = CHUNK << shift
    full = base.length // size
    tail = base.length - full * size
    origin = head - first * size
    # Positions from here on have no full block in this window.
    stop = end - size + 1
    tail_position = origin + full * size if tail else -1
    rows = 0
    # The first aligned block from the current position on.
    near = 0
    while True:
        position = state[POSITION]
        if (
            tail
            and (state[FOLLOW] == full or position == tail_position)
            and position + tail <= end
            and _is_tail(data, position, shift, base, scratch)
        ):
            rows = _note_copy(copies, rows, position, full * size, tail, -1, origin, state)
            continue
        if position >= stop:
            break
        while near < len(aligned) and (not aligned[near] or head + near * size < position):
            near += 1
        near_position = head + near * size if near < len(aligned) else stop
        block = state[FOLLOW]
        count = 0
        if 0 <= block < full and not (position == near_position and block == first + near):
            count = follow_run(data, position, min((end - position) // size, full - block), block, shift,
                               base, scratch, state)  # fmt: skip
        if not count and position == near_position:
            block = first + near
            while near + count < len(aligned) and aligned[near + count]:
                count += 1
        if count:
            rows = _note_copy(copies, rows, position, block * size, count * size, block + count, origin, state)
            continue
        state[FOLLOW] = -1
        limit = min(near_position, stop)
        if position < tail_position:
            limit = min(limit, tail_position)
        if state[BUDGET] <= 0 or not len(index.heads):
            state[POSITION] = limit
            continue
        place = search(data, position, limit, origin, shift, base, index, scratch, state)
        state[POSITION] = place
        if place < limit and state[FOUND] >= 0:
            block = state[FOUND]
            rows = _note_copy(copies, rows, place, block * size, size, block + 1, origin, state)
    if last and tail:
        for place in (tail_position, end - tail):
            if state[POSITION] <= place <= end - tail and _is_tail(data, place, shift, base, scratch):
                rows = _note_copy(copies, rows, place, full * size, tail, -1, origin, state)
    return rows
