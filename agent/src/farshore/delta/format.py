"""The delta stream, byte by byte (all integers little-endian).

    header    "FSDL", version u8, flags u8 (bit 0: there is a base), two zero bytes, block size u32
              with a base: its length u64 and its BLAKE3-256, 32 bytes
    LITERAL   varint(length << 1), then `length` bytes of content
    COPY      varint(length << 1 | 1), varint(offset in the base)
    END       varint(0)
    trailer   length of the new content u64, its BLAKE3-256, 32 bytes

A varint holds 7 bits a byte, the lowest first; the top bit says that more follow; it never
exceeds 64 bits. Lengths of instructions are never 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from farshore.delta.errors import DeltaCorrupt

MIN_BLOCK_SIZE = 1024
MAX_BLOCK_SIZE = 1 << 20
STRONG_BYTES = 16
DIGEST_BYTES = 32

# Literals are cut so that a chunk of the stream stays within CHUNK_LIMIT.
LITERAL_LIMIT = 120 << 10
CHUNK_LIMIT = 256 << 10

MAGIC = b"FSDL"
VERSION = 1
FLAG_BASE = 1
VARINT_LIMIT = 10
END = b"\0"

HEADER = struct.Struct("<4sBBHI")
BASE = struct.Struct(f"<Q{DIGEST_BYTES}s")
TRAILER = struct.Struct(f"<Q{DIGEST_BYTES}s")


def is_block_size(block_size: int) -> bool:
    """Tell whether blocks can have that size: a power of two, so that each is a whole subtree of
    BLAKE3's tree of 1 KiB chunks."""
    return MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE and block_size & (block_size - 1) == 0


@dataclass(frozen=True)
class DeltaHeader:
    """What a delta says of itself: its block size and the base it must be applied to (length
    None: no base)."""

    block_size: int
    base_length: int | None = None
    base_digest: bytes = b""

    def to_bytes(self) -> bytes:
        flags = 0 if self.base_length is None else FLAG_BASE
        head = HEADER.pack(MAGIC, VERSION, flags, 0, self.block_size)
        if self.base_length is None:
            return head
        return head + BASE.pack(self.base_length, self.base_digest)


def header_size(start: bytes | bytearray | memoryview) -> int:
    """Return how long the header is that begins with these HEADER.size bytes."""
    magic, version, flags, zero, block_size = HEADER.unpack(start[: HEADER.size])
    if magic != MAGIC:
        raise DeltaCorrupt("it does not begin like one")
    if version != VERSION:
        raise DeltaCorrupt(f"version {version} is not known, only {VERSION}")
    if flags & ~FLAG_BASE or zero:
        raise DeltaCorrupt("unknown flags")
    if not is_block_size(block_size):
        raise DeltaCorrupt(f"block size {block_size}")
    return HEADER.size + (BASE.size if flags & FLAG_BASE else 0)


def parse_header(data: bytes | bytearray | memoryview) -> DeltaHeader:
    """Read the header at the start of `data`; raise DeltaCorrupt when there is none."""
    if len(data) < HEADER.size or len(data) < header_size(data):
        raise DeltaCorrupt("the header is cut short")
    _, _, flags, _, block_size = HEADER.unpack(data[: HEADER.size])
    if not flags & FLAG_BASE:
        return DeltaHeader(block_size)
    length, digest = BASE.unpack(data[HEADER.size : HEADER.size + BASE.size])
    return DeltaHeader(block_size, length, digest)


def varint(value: int) -> bytes:
    """Return `value`, 0 or more, in 7-bit groups, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def literal(data: bytes | bytearray | memoryview) -> bytes:
    return varint(len(data) << 1) + data


def copy(offset: int, length: int) -> bytes:
    return varint(length << 1 | 1) + varint(offset)


def trailer(length: int, digest: bytes) -> bytes:
    return END + TRAILER.pack(length, digest)
