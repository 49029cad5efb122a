"""Everything of the delta engine that runs as machine code.

Rules of this file: explicit signatures, ``nogil``, no logging, no exceptions. numba promotes
``uint32 + uint32`` to ``uint64``, so every arithmetic step is cast back to ``uint32``; sums that
wrap modulo 2**32 are still right modulo the checksum's M = 2**16. Indices are ``int64``
throughout, because numba turns ``int64 + uint64`` into a float; inner loops run over slices,
because ``data[offset + i]`` costs a test for negative indices and with it the vectorisation.
Each kernel has its counterpart in :mod:`farshore.delta.reference`, which the tests hold it to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

# Imported by name: only some of the numba versions we support carry type information.
_numba: Any = importlib.import_module("numba")

# To mypy these would be signed or unsigned "Any" anyway, and its promotions are not numba's.
Array = Any
u16: Any = np.uint16
u32: Any = np.uint32
i64: Any = np.int64

_F = TypeVar("_F", bound=Callable[..., Any])

# Positions whose checksums are computed before any of them is looked up: the serial recurrence
# and the lookups each run in a tight loop of their own.
SCAN_BATCH = 512

# Longest run of occupied slots in the hash set. What would need a longer one is left out, which
# costs a match, never time.
MAX_PROBES = 64

# State a scan carries between calls: a and b of the window it last reported.
STATE_WORDS = 2


def _kernel(signature: str) -> Callable[[_F], _F]:
    def compile_it(function: _F) -> _F:
        try:
            compiled: _F = _numba.njit(signature, nogil=True, cache=True)(function)
        except Exception:
            # No directory for the cache may be writable, or what lies in it may be damaged:
            # neither is a reason not to start. An error of the kernel itself comes up again.
            compiled = _numba.njit(signature, nogil=True)(function)
        return compiled

    return compile_it


@_kernel("void(uint8[::1], int64, int64, int64, uint32[::1])")
def weak_sums(data: Array, start: int, count: int, block_size: int, out: Array) -> None:
    """Write s(k, l) of `count` adjacent blocks, the first at `start`, to `out`."""
    for block in range(count):
        first = start + block * block_size
        row = data[first : first + block_size]
        a = u32(0)
        b = u32(0)
        for i in range(block_size):
            x = u32(row[i])
            a = u32(a + x)
            b = u32(b + u32(u32(block_size - i) * x))
        out[block] = u32((a & u32(0xFFFF)) | u32(b << u32(16)))


@_kernel("int64(uint8[::1], int64, int64, int64, Array(uint32, 1, 'C', True), int64)")
def weak_run(data: Array, start: int, count: int, block_size: int, weak: Array, block: int) -> int:
    """Return how many adjacent blocks at `start`, at most `count`, have the weak sums of the
    base's blocks from `block` on."""
    count = min(count, len(weak) - block)
    for done in range(count):
        first = start + done * block_size
        row = data[first : first + block_size]
        a = u32(0)
        b = u32(0)
        for i in range(block_size):
            x = u32(row[i])
            a = u32(a + x)
            b = u32(b + u32(u32(block_size - i) * x))
        s = u32((a & u32(0xFFFF)) | u32(b << u32(16)))
        if s != weak[block + done]:
            return done
    return count


@_kernel("int64(uint32[::1], uint32, int64, uint32, uint32[::1], uint32, uint32[::1])")
def fill_set(
    weak: Array,
    factor: int,
    table_shift: int,
    empty: int,
    table: Array,
    filter_shift: int,
    bits: Array,
) -> int:
    """Put the distinct sums `weak` into the open-addressed `table` (filled with `empty`) and the
    bitmap `bits`; return how many found no place within MAX_PROBES."""
    mask = len(table) - 1
    half = len(bits) >> 1
    lost = 0
    for i in range(len(weak)):
        s = weak[i]
        if s == empty:
            lost += 1
            continue
        h = u32(s * factor)
        slot = i64(h >> u32(table_shift))
        placed = False
        for _ in range(MAX_PROBES):
            if table[slot] == empty:
                table[slot] = s
                placed = True
                break
            slot = (slot + 1) & mask
        if placed:
            f = u32(h >> filter_shift)
            word = i64(f >> u32(5))
            bits[word] = u32(bits[word] | u32(u32(1) << (f & u32(31))))
            swapped = u32(u32(s >> u32(16)) | u32(s << u32(16)))
            f = u32(u32(swapped * factor) >> filter_shift)
            word = half + i64(f >> u32(5))
            bits[word] = u32(bits[word] | u32(u32(1) << (f & u32(31))))
        else:
            lost += 1
    return lost


@_kernel(
    "int64(uint8[::1], int64, int64, int64, boolean, uint32[::1], uint32[::1], uint16[::1],"
    " uint32, int64, uint32, uint32[::1], uint32, uint32[::1])"
)
def scan(
    data: Array,
    start: int,
    stop: int,
    block_size: int,
    fresh: bool,
    state: Array,
    sums: Array,
    hits: Array,
    factor: int,
    table_shift: int,
    empty: int,
    table: Array,
    filter_shift: int,
    bits: Array,
) -> int:
    """Roll the window over the positions `start` .. `stop` - 1; return the first whose weak sum
    is in the set, or `stop`.

    `fresh` false: `state` holds a and b of position `start` - 1, left by the call that reported
    it. `data` must hold one byte beyond the last window. `sums` and `hits` are scratch, of
    SCAN_BATCH elements and one more.
    """
    if start >= stop:
        return stop
    a = u32(0)
    b = u32(0)
    size = u32(block_size)
    mask = len(table) - 1
    half = len(bits) >> 1
    if fresh:
        row = data[start : start + block_size]
        for i in range(block_size):
            x = u32(row[i])
            a = u32(a + x)
            b = u32(b + u32(u32(block_size - i) * x))
    else:
        out = u32(data[start - 1])
        a = u32(state[0] + u32(u32(data[start - 1 + block_size]) - out))
        b = u32(state[1] + u32(a - u32(size * out)))
    position = start
    while position < stop:
        n = min(SCAN_BATCH, stop - position)
        leaving = data[position : position + n]
        entering = data[position + block_size : position + block_size + n]
        for i in range(n):
            sums[i] = u32((a & u32(0xFFFF)) | u32(b << u32(16)))
            out = u32(leaving[i])
            a = u32(a + u32(u32(entering[i]) - out))
            b = u32(b + u32(a - u32(size * out)))
        found = 0
        batch = sums[:n]
        for i in range(n):
            f = u32(u32(batch[i] * factor) >> filter_shift)
            hits[found] = u16(i)
            found += i64((bits[i64(f >> u32(5))] >> (f & u32(31))) & 1)
        # A branch for each survivor would be mispredicted; sift them once more without one.
        again = 0
        for k in range(found):
            hit = hits[k]
            s = sums[hit]
            swapped = u32(u32(s >> u32(16)) | u32(s << u32(16)))
            f = u32(u32(swapped * factor) >> filter_shift)
            hits[again] = hit
            word = half + i64(f >> u32(5))
            again += i64((bits[word] >> (f & u32(31))) & 1)
        for k in range(again):
            s = sums[hits[k]]
            if s == empty:
                continue
            slot = i64(u32(s * factor) >> u32(table_shift))
            for _ in range(MAX_PROBES):
                if table[slot] == s:
                    state[0] = s & u32(0xFFFF)
                    state[1] = s >> u32(16)
                    hit_at: int = position + i64(hits[k])
                    return hit_at
                if table[slot] == empty:
                    break
                slot = (slot + 1) & mask
        position += n
    return stop


@_kernel("int64(uint64[::1], uint64[::1], int64[::1], uint64, uint64)")
def find_strong(high: Array, low: Array, block: Array, want_high: int, want_low: int) -> int:
    """Return the base's block with that strong hash, or -1; `high` is sorted and distinct."""
    left = 0
    right = len(high)
    while left < right:
        middle = (left + right) >> 1
        if high[middle] < want_high:
            left = middle + 1
        else:
            right = middle
    if left < len(high) and high[left] == want_high and low[left] == want_low:
        found: int = block[left]
        return found
    return -1
