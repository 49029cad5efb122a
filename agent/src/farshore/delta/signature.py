"""Signatures: what one must know of old content to describe new content by it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from farshore.delta import kernels
from farshore.delta.errors import SignatureCorrupt
from farshore.delta.format import DIGEST_BYTES, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, STRONG_BYTES

BLOCK_SIZE = 4096

# Above this many blocks the block size grows instead: a signature then stays below 80 MiB.
PREFERRED_BLOCKS = 1 << 22

# How much content is looked at at a time.
WINDOW = 4 << 20

MAGIC = b"FSSG"
VERSION = 1
_HEADER = struct.Struct(f"<4sBBHIQ{DIGEST_BYTES}s")
_CHECK_BYTES = 16


class BinaryReader(Protocol):
    """What content is read from; ``readinto`` is used where there is one."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Signature:
    """Checksums of content cut into blocks of `block_size`, the last of which may be shorter.

    `weak`: uint32, one per block, the paper's s(k, l); `strong`: 16 bytes per block, BLAKE3 of
    the block cut to 128 bits; `digest`: BLAKE3-256 of the whole; `length`: in bytes.
    """

    block_size: int
    length: int
    weak: np.ndarray[Any, np.dtype[np.uint32]]
    strong: bytes
    digest: bytes

    def __len__(self) -> int:
        """Return the number of blocks, the short last one included."""
        return len(self.weak)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Signature):
            return NotImplemented
        return (
            self.block_size == other.block_size
            and self.length == other.length
            and self.digest == other.digest
            and self.strong == other.strong
            and np.array_equal(self.weak, other.weak)
        )

    def __hash__(self) -> int:
        return hash((self.block_size, self.length, self.digest))

    def to_bytes(self) -> bytes:
        """Return the signature as a file: a header, the weak sums, the strong ones, a check."""
        header = _HEADER.pack(MAGIC, VERSION, STRONG_BYTES, 0, self.block_size, self.length, self.digest)
        body = header + self.weak.astype("<u4", copy=False).tobytes() + self.strong
        return body + blake3(body).digest(_CHECK_BYTES)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Signature:
        """Read what :meth:`to_bytes` wrote; raise SignatureCorrupt for anything else.

        Allocates no more than a small multiple of ``len(data)``.
        """
        view = memoryview(data).cast("B")
        if len(view) < _HEADER.size + _CHECK_BYTES:
            raise SignatureCorrupt("it is cut short")
        magic, version, strong_bytes, zero, block_size, length, digest = _HEADER.unpack(view[: _HEADER.size])
        if magic != MAGIC:
            raise SignatureCorrupt("it does not begin like one")
        if version != VERSION:
            raise SignatureCorrupt(f"version {version} is not known, only {VERSION}")
        if strong_bytes != STRONG_BYTES or zero:
            raise SignatureCorrupt("unknown parameters")
        if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
            raise SignatureCorrupt(f"block size {block_size}")
        blocks = -(-length // block_size)
        weak_end = _HEADER.size + 4 * blocks
        strong_end = weak_end + STRONG_BYTES * blocks
        if len(view) != strong_end + _CHECK_BYTES:
            raise SignatureCorrupt(f"{len(view)} bytes, where {blocks} blocks were announced")
        if blake3(view[:strong_end]).digest(_CHECK_BYTES) != bytes(view[strong_end:]):
            raise SignatureCorrupt("its check fails")
        weak = np.frombuffer(view[_HEADER.size : weak_end], "<u4").astype(np.uint32)
        return cls(block_size, length, weak, bytes(view[weak_end:strong_end]), digest)


def preferred_block_size(length: int) -> int:
    """Return the block size for content of `length` bytes: BLOCK_SIZE, and for very large
    content the power of two that keeps it within PREFERRED_BLOCKS blocks."""
    size = BLOCK_SIZE
    while size < MAX_BLOCK_SIZE and length > size * PREFERRED_BLOCKS:
        size *= 2
    return size


def check_block_size(block_size: int) -> int:
    """Return `block_size`; raise ValueError unless it is within MIN_ and MAX_BLOCK_SIZE."""
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block size {block_size}: allowed are {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}")
    return block_size


def sign(source: BinaryReader, block_size: int | None = None, *, length_hint: int | None = None) -> Signature:
    """Read `source` to its end, once, and return its signature.

    Memory: one window and 20 bytes per block. `length_hint`, in bytes, chooses the block size
    when none is given.
    """
    size = preferred_block_size(length_hint or 0) if block_size is None else check_block_size(block_size)
    span = window_span(size)
    window = np.empty(span, np.uint8)
    view = window.data
    whole = blake3()
    signer = BlockSigner(size)
    length = 0
    while True:
        got = read_full(source, view)
        whole.update(view[:got])
        signer.add(window, 0, got)
        length += got
        if got < span:
            return signer.finish(length, whole.digest())


class BlockSigner:
    """Collects the checksums of content that arrives in windows of whole blocks; only the last
    window may end with a shorter block."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._weak: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
        self._strong: list[bytes] = []

    def add(
        self, data: np.ndarray[Any, np.dtype[np.uint8]], start: int, count: int
    ) -> tuple[np.ndarray[Any, np.dtype[np.uint32]], bytes]:
        """Sign the `count` bytes from `start`; return their weak and strong checksums."""
        weak = weak_sums(data, start, count, self._size)
        strong = strong_sums(data.data[start : start + count], self._size)
        self._weak.append(weak)
        self._strong.append(strong)
        return weak, strong

    def finish(self, length: int, digest: bytes) -> Signature:
        weak = np.concatenate(self._weak) if self._weak else np.empty(0, np.uint32)
        return Signature(self._size, length, weak, b"".join(self._strong), digest)


def weak_sums(
    data: np.ndarray[Any, np.dtype[np.uint8]], start: int, count: int, block_size: int
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the weak sums of the blocks of data[start : start + count]."""
    full, rest = divmod(count, block_size)
    out = np.empty(full + bool(rest), np.uint32)
    kernels.weak_sums(data, start, full, block_size, out)
    if rest:
        kernels.weak_sums(data, start + full * block_size, 1, rest, out[full:])
    return out


def strong_sums(view: memoryview, block_size: int) -> bytes:
    """Return the strong hashes, joined, of the blocks of `view`."""
    return b"".join([blake3(view[i : i + block_size]).digest(STRONG_BYTES) for i in range(0, len(view), block_size)])


def window_span(block_size: int, limit: int = WINDOW) -> int:
    """Return the length of a window: as many whole blocks as fit into `limit`, at least one."""
    return max(1, limit // block_size) * block_size


def read_full(source: BinaryReader, view: memoryview) -> int:
    """Fill `view` from `source`; return how much was read, less than its length only at the
    end."""
    readinto = getattr(source, "readinto", None)
    filled = 0
    while filled < len(view):
        if readinto is not None:
            got = readinto(view[filled:])
        else:
            chunk = source.read(len(view) - filled)
            got = None if chunk is None else len(chunk)
            if got:
                view[filled : filled + got] = chunk
        if got is None:
            raise BlockingIOError("the source of a delta must be a blocking one")
        if not got:
            break
        filled += got
    return filled
