"""The paper's algorithm as the paper writes it: slow, plain, and the oracle of the tests.

Source: P. Yang, T. Li, K. Zhao, J. K. Liao, "An Internet Based Disaster Recovery System",
Disaster Recovery Journal, Winter 2005. The strong checksum is BLAKE3 cut to 128 bits in place
of the paper's MD4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from farshore.delta import format as stream

M = 1 << 16


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


def strong(data: bytes) -> bytes:
    """Return the 128-bit checksum of a block."""
    return blake3(data).digest(stream.STRONG_BYTES)


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
        tuple((weak(block), strong(block)) for block in blocks),
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
    known: dict[int, dict[bytes, int]] = {}
    for number, (s, digest) in enumerate(full):
        known.setdefault(s, {}).setdefault(digest, number)
    tail_key = base.blocks[-1]

    def is_tail(position: int) -> bool:
        block = new[position : position + tail]
        return len(block) == tail > 0 and (weak(block), strong(block)) == tail_key

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
        candidates = known.get(combine(*state))
        found: int | None = None
        if candidates is not None:
            key = strong(new[position : position + size])
            found = candidates.get(key)
            # The paper's A takes any block; the one that continues the copy makes it longer.
            following = after_copy // size
            if 0 <= after_copy < tail_at and base.blocks[following][1] == key:
                found = following
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
