"""The paper's algorithm as the paper writes it: slow, plain, and the oracle of the tests.

Source: P. Yang, T. Li, K. Zhao, J. K. Liao, "An Internet Based Disaster Recovery System",
Disaster Recovery Journal, Winter 2005. In place of the paper's MD4 the strong checksum of a block
is the chaining value, cut to 128 bits, of its subtree in the BLAKE3 tree of the whole content.
BLAKE3 is written down after J. O'Connor, J.-P. Aumasson, S. Neves, Z. Wilcox-O'Hearn, "BLAKE3: one
function, fast everywhere", section 2.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from farshore.delta import format as stream

M = 1 << 16

CHUNK = 1024
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
WORD = 0xFFFFFFFF


def sums(data: bytes) -> tuple[int, int]:
    """Return a(k, l) and b(k, l) of the bytes X_k .. X_l."""
    size = len(data)
    a = sum(data) % M
    b = sum((size - i) * x for i, x in enumerate(data)) % M
    return a, b


def combine(a: int, b: int) -> int:
    """Return s = a + 2**16 b."""
    return a + M * b


def weak(data: bytes) -> int:
    """Return s(k, l) of the bytes X_k .. X_l."""
    return combine(*sums(data))


def roll(a: int, b: int, size: int, leaving: int, entering: int) -> tuple[int, int]:
    """Return a(k+1, l+1) and b(k+1, l+1) from a(k, l) and b(k, l), where l - k + 1 = `size`."""
    a = (a - leaving + entering) % M
    b = (b - size * leaving + a) % M
    return a, b


def rolling(data: bytes, size: int) -> Iterator[int]:
    """Yield s of every window of `size` bytes, from the first to the last."""
    if len(data) < size:
        return
    a, b = sums(data[:size])
    yield combine(a, b)
    for k in range(len(data) - size):
        a, b = roll(a, b, size, data[k], data[k + size])
        yield combine(a, b)


def compress(cv: tuple[int, ...], block: bytes, counter: int, flags: int) -> tuple[int, ...]:
    """Return the chaining value that `block`, at most 64 bytes, makes of `cv`: 8 words."""
    m = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    v = [*cv, *IV[:4], counter & WORD, counter >> 32, len(block), flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(COLUMNS + DIAGONALS):
            for x, turn_d, turn_b in ((m[2 * i], 16, 12), (m[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + x) & WORD
                t = v[d] ^ v[a]
                v[d] = t >> turn_d | t << 32 - turn_d & WORD
                v[c] = (v[c] + v[d]) & WORD
                t = v[b] ^ v[c]
                v[b] = t >> turn_b | t << 32 - turn_b & WORD
        m = [m[i] for i in PERMUTATION]
    return tuple(v[i] ^ v[i + 8] for i in range(8))


@functools.lru_cache(maxsize=4096)
def chunk_cv(chunk: bytes, number: int, root: int = 0) -> tuple[int, ...]:
    """Return the chaining value of a chunk, which is number `number` of the content."""
    cv: tuple[int, ...] = IV
    parts = [chunk[i : i + 64] for i in range(0, len(chunk), 64)] or [b""]
    for i, part in enumerate(parts):
        flags = CHUNK_START * (i == 0) | (CHUNK_END | root) * (i == len(parts) - 1)
        cv = compress(cv, part, number, flags)
    return cv


def subtree_cv(data: bytes, first_chunk: int = 0, root: int = 0) -> tuple[int, ...]:
    """Return the chaining value of the subtree over `data`, which begins with chunk number
    `first_chunk` of the content. The left side has the largest power of two of chunks that
    leaves something for the right."""
    if len(data) <= CHUNK:
        return chunk_cv(data, first_chunk, root)
    left = 1 << ((len(data) - 1) // CHUNK).bit_length() - 1
    sides = data[: left * CHUNK], data[left * CHUNK :]
    block = struct.pack("<16I", *subtree_cv(sides[0], first_chunk), *subtree_cv(sides[1], first_chunk + left))
    return compress(IV, block, 0, PARENT | root)


def digest(data: bytes) -> bytes:
    """Return the BLAKE3-256 of `data`."""
    return struct.pack("<8I", *subtree_cv(data, 0, ROOT))


def strong(data: bytes, first_chunk: int) -> bytes:
    """Return the 128-bit checksum of a block, which begins with chunk number `first_chunk`."""
    return struct.pack("<8I", *subtree_cv(data, first_chunk))[: stream.STRONG_BYTES]


@dataclass(frozen=True)
class Reference:
    """What host B sends of its old file."""

    block_size: int
    length: int
    digest: bytes
    blocks: tuple[tuple[int, bytes], ...]


def sign(data: bytes, block_size: int) -> Reference:
    """Cut `data` into blocks, the last of which may be shorter, and sign each."""
    blocks = [data[i : i + block_size] for i in range(0, len(data), block_size)]
    return Reference(
        block_size,
        len(data),
        blake3(data).digest(),
        tuple((weak(block), strong(block, i * block_size // CHUNK)) for i, block in enumerate(blocks)),
    )


def matches(base: Reference | None, new: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (position in `new`, offset in the base, length), greedily from the left.

    Every full block of the base is looked for at every byte offset. Its short last block, if it
    has one, is looked for at three places only: where the copy of the block before it ends, at
    its own offset, and at the very end of `new`.
    """
    if base is None or not base.blocks:
        return
    size = base.block_size
    tail = base.length % size
    tail_at = base.length - tail
    full = base.blocks[:-1] if tail else base.blocks
    known: dict[int, list[int]] = {}
    for number, (s, _) in enumerate(full):
        known.setdefault(s, []).append(number)
    tail_key = base.blocks[-1]

    def is_tail(position: int) -> bool:
        block = new[position : position + tail]
        return len(block) == tail > 0 and (weak(block), strong(block, tail_at // CHUNK)) == tail_key

    position = 0
    after_copy = -1
    state: tuple[int, int] | None = None
    while position < len(new):
        if (after_copy == tail_at or position == tail_at) and is_tail(position):
            yield position, tail_at, tail
            position += tail
            after_copy, state = -1, None
            continue
        if position + size > len(new):
            break
        if state is None:
            state = sums(new[position : position + size])
        candidates = known.get(combine(*state), [])
        # The paper's A takes any block; the one that continues the copy makes it longer.
        following = after_copy // size
        found: int | None = None
        for number in sorted(candidates, key=lambda number: number != following):
            if strong(new[position : position + size], number * size // CHUNK) == base.blocks[number][1]:
                found = number
                break
        if found is not None:
            yield position, found * size, size
            position += size
            after_copy, state = (found + 1) * size, None
            continue
        after_copy = -1
        if position + size < len(new):
            state = roll(*state, size, new[position], new[position + size])
        position += 1
    for at in (tail_at, len(new) - tail):
        if at >= position and is_tail(at):
            yield at, tail_at, tail
            position = at + tail


def encode(base: Reference | None, new: bytes, block_size: int) -> bytes:
    """Return the delta that makes `new` out of the base."""
    if base is None:
        header = stream.DeltaHeader(block_size)
    else:
        header = stream.DeltaHeader(base.block_size, base.length, base.digest)
    out = [header.to_bytes()]
    position = 0
    for at, offset, length in matches(base, new):
        out.extend(_literals(new[position:at]))
        out.append(stream.copy(offset, length))
        position = at + length
    out.extend(_literals(new[position:]))
    out.append(stream.trailer(len(new), blake3(new).digest()))
    return b"".join(out)


def literal_bytes(base: Reference | None, new: bytes) -> int:
    """Return how many bytes of `new` the base does not give."""
    return len(new) - sum(length for _, _, length in matches(base, new))


def _literals(data: bytes) -> Iterable[bytes]:
    for i in range(0, len(data), stream.LITERAL_LIMIT):
        yield stream.literal(data[i : i + stream.LITERAL_LIMIT])
