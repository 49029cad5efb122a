"""Inputs that delta engines fear, as pairs of an old and a new content. Pure, and reproducible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 4096


def random_bytes(size: int, seed: int) -> bytes:
    """Random bytes, the same for the same seed."""
    return np.random.default_rng(seed).bytes(size)


def unrelated(size: int) -> tuple[bytes, bytes]:
    """Random against other random data: the ordinary worst case, and the measure of the others."""
    return random_bytes(size, 1), random_bytes(size, 2)


def zeros(size: int) -> tuple[bytes, bytes]:
    """Zeros, against zeros of other lengths with one other byte before them."""
    return bytes(size), b"x" + bytes(size - 4096)


def period(length: int) -> Callable[[int], tuple[bytes, bytes]]:
    """A random pattern of `length` bytes repeated, against the same shifted by one byte that breaks it."""

    def make(size: int) -> tuple[bytes, bytes]:
        pattern = random_bytes(length, 3)
        old = (pattern * (size // length + 1))[:size]
        return old, b"\xff" + old[:-1]

    return make


def equal_weak_sums(size: int) -> tuple[bytes, bytes]:
    """Blocks that all have the same weak sum and are all different.

    To a constant, +d, -2d, +d is added at three neighbouring bytes: neither the sum of the bytes nor the sum of the
    bytes times their places changes, so both halves of the rolling checksum stay what they were, and so they
    do in every window that holds such triples as a whole. The new content has another d than the old one: almost every
    offset is a candidate, and none is a match.
    """
    return _triples(size, 1, 4), _triples(size, 3, 5)


def _triples(size: int, amount: int, seed: int) -> bytes:
    blocks = -(-size // BLOCK)
    chance = np.random.default_rng(seed)
    content = np.full(blocks * BLOCK, 128, np.uint8)
    for third in range(3):
        at = np.arange(blocks) * BLOCK + third * 1200 + chance.integers(0, 1190, blocks)
        content[at] += np.uint8(amount)
        content[at + 1] -= np.uint8(2 * amount)
        content[at + 2] += np.uint8(amount)
    return content[:size].tobytes()


def thue_morse(size: int) -> tuple[bytes, bytes]:
    """The Thue-Morse sequence, whose pieces have equal sums of many orders, against itself from a third on.

    The sequence breaks polynomial checksums modulo powers of two (Prouhet, Tarry, Escott).
    """
    order = max(1, (size + size // 3).bit_length())
    sequence = np.zeros(1, np.uint8)
    for _ in range(order):
        sequence = np.concatenate((sequence, 1 - sequence))
        if len(sequence) >= size + size // 3:
            break
    start = size // 3 | 1
    old = sequence[:size]
    new = sequence[start : start + size] ^ np.uint8(0)
    return old.tobytes(), new.tobytes()


#: Name to maker; the first is what the others are measured by.
HOSTILE: dict[str, Callable[[int], tuple[bytes, bytes]]] = {
    "random": unrelated,
    "zeros": zeros,
    **{f"period {length}": period(length) for length in (1, 2, 3, 7, 4095, 4097)},
    "equal weak sums": equal_weak_sums,
    "Thue-Morse": thue_morse,
}
