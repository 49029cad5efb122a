"""Signatures: what one must know of old content to describe new content by it."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from farshore.delta import kernels
from farshore.delta.errors import SignatureCorrupt
from farshore.delta.format import DIGEST_BYTES, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, STRONG_BYTES, is_block_size
from farshore.delta.vectors import LANES

BLOCK_SIZE = 4096

# Content of more bytes than this has larger blocks, no more than so many of them: its signature
# takes 10 MiB, an index for the scan not much more.
LARGE = 16 << 30
LARGE_BLOCKS = 1 << 19

# How much content is looked at at a time: what stays in a cache between reading and hashing, but
# enough to make light of what each window costs by itself.
WINDOW = 2 << 20

_ZEROS = memoryview(bytes(1 << 20))

MAGIC = b"FSSG"
VERSION = 2
_HEADER = struct.Struct(f"<4sBBHIQ{DIGEST_BYTES}s")
_CHECK_BYTES = 16


Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Sums = np.ndarray[Any, np.dtype[np.uint32]]
Cvs = np.ndarray[Any, np.dtype[np.uint32]]


class BinaryReader(Protocol):
    """What content is read from; ``readinto`` is used where there is one."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Signature:
    """Checksums of content cut into blocks of `block_size`, the last of which may be shorter.

    `weak`: uint32, one per block, the paper's s(k, l); `strong`: 16 bytes per block, see below;
    `digest`: BLAKE3-256 of the whole; `length`: in bytes.

    The strong checksum of a block is the chaining value, cut to 128 bits, of the subtree that
    covers it in the BLAKE3 tree of the whole content (never the root's, also where there is but
    one block). So one pass gives both these and the digest; and so equal blocks at different
    places have different strong checksums: to compare a block with the base's number k one hashes
    it as number k.
    """

    block_size: int
    length: int
    weak: Sums
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
        parts = (header, self.weak.astype("<u4", copy=False).tobytes(), self.strong)
        check = blake3()
        for part in parts:
            check.update(part)
        return b"".join((*parts, check.digest(_CHECK_BYTES)))

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
        if not is_block_size(block_size):
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
    """Return the block size for content of `length` bytes: BLOCK_SIZE, and for content larger
    than LARGE the power of two that keeps it within LARGE_BLOCKS blocks."""
    size = BLOCK_SIZE
    if length > LARGE:
        while size < MAX_BLOCK_SIZE and length > size * LARGE_BLOCKS:
            size *= 2
    return size


def check_block_size(block_size: int) -> int:
    """Return `block_size`; raise ValueError unless it is one that blocks can have."""
    if not is_block_size(block_size):
        raise ValueError(
            f"block size {block_size}: allowed are powers of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
        )
    return block_size


def sign(source: BinaryReader, block_size: int | None = None, *, length_hint: int | None = None) -> Signature:
    """Read `source` to its end, once, and return its signature.

    Memory: one window and 20 bytes per block. `length_hint`, in bytes, chooses the block size
    when none is given.
    """
    size = preferred_block_size(length_hint or 0) if block_size is None else check_block_size(block_size)
    span = window_span(size)
    window = np.empty(span, np.uint8)
    signer = BlockSigner(size, span)
    source = skipping_holes(source)
    while True:
        got = read_full(source, window.data)
        signer.add(window, 0, got)
        if got < span:
            return signer.finish()


class BlockSigner:
    """Collects the checksums of content that arrives in windows of `span` bytes, a power of two
    of whole blocks; only the last window may be shorter.

    `keep` false: only the digest is kept.
    """

    def __init__(self, block_size: int, span: int, *, keep: bool = True) -> None:
        self._size = block_size
        self._shift = chunk_shift(block_size)
        self._keep = keep
        blocks = span // block_size
        self._sums = np.empty(blocks, np.uint32)
        self._cvs = np.empty((blocks + LANES, 8), np.uint32)
        self._scratch = kernels.make_scratch(block_size)
        self._weak: list[Sums] = []
        self._strong: list[bytes] = []
        self._top = TreeTop(self._scratch.lanes)
        self._only = blake3(b"").digest()
        self.length = 0

    def add(self, data: Bytes, start: int, count: int) -> tuple[Sums, Sums]:
        """Sign the `count` bytes from `start`; return the weak (blocks) and the strong (blocks, 4)
        checksums, as uint32; they hold until the next call."""
        blocks = -(-count // self._size)
        first = self.length // self._size
        kernels.sign_window(data, start, count, first, self._shift, self._sums, self._cvs, self._scratch)
        weak, strong = self._sums[:blocks], self._cvs[:blocks, :4].copy()
        if self._keep:
            self._weak.append(weak.copy())
            self._strong.append(strong.tobytes())
        if not first and blocks == 1:
            # Maybe the only block: then the digest is no chaining value of a subtree.
            self._only = blake3(data.data[start : start + count]).digest()
        if blocks:
            self._top.add(self._cvs, blocks)
        self.length += count
        return weak, strong

    def digest(self) -> bytes:
        """Return the BLAKE3-256 of all that was added."""
        if self.length <= self._size:
            return self._only
        return self._top.root()

    def finish(self) -> Signature:
        """Return the signature of all that was added; nothing may be added afterwards."""
        weak = np.concatenate(self._weak) if self._weak else np.empty(0, np.uint32)
        self._weak.clear()
        strong = b"".join(self._strong)
        self._strong.clear()
        return Signature(self._size, self.length, weak, strong, self.digest())


class TreeTop:
    """The upper part of a BLAKE3 tree whose leaves come in windows, of a power of two of blocks each; only the last
    may have fewer. `lanes`: working memory of the kernels."""

    def __init__(self, lanes: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._lanes = lanes
        # Of each window the two halves of its tree, or the one block that it has.
        self._halves: list[bytes] = []

    def add(self, cvs: Cvs, count: int) -> None:
        """Take the `count` CVs of the next window, which are overwritten; `cvs` has LANES rows more."""
        kernels.reduce_cvs(cvs, count, 2, self._lanes)
        self._halves.append(cvs[: min(count, 2)].tobytes())

    def root(self) -> bytes:
        """Return the digest of content with all these blocks, of which there are two or more."""
        halves = np.frombuffer(b"".join(self._halves), np.uint32).reshape(-1, 8)
        cvs = np.zeros((len(halves) + LANES, 8), np.uint32)
        cvs[: len(halves)] = halves
        kernels.root_cv(cvs, len(halves), self._lanes)
        digest: bytes = cvs[0].tobytes()
        return digest


def chunk_shift(block_size: int) -> int:
    """Return the binary logarithm of the number of BLAKE3's chunks in a block."""
    return (block_size // kernels.CHUNK).bit_length() - 1


def window_span(block_size: int, limit: int = WINDOW) -> int:
    """Return the length of a window: the power of two of whole blocks that fits into `limit`, at
    least one block."""
    return block_size << max(0, (limit // block_size).bit_length() - 1)


def skipping_holes(source: BinaryReader) -> BinaryReader:
    """Return a reader of the same content that does not read the holes of a sparse file, if
    `source` is one, unbuffered; else `source`."""
    if not isinstance(source, io.FileIO):
        return source
    about = os.fstat(source.fileno())
    sparse = stat.S_ISREG(about.st_mode) and about.st_blocks * 512 < about.st_size
    return _SparseReader(source) if sparse else source


class _SparseReader:
    """Gives zeros for holes; to have the kernel fill pages of its cache with them costs more
    than to hash them."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._fd = file.fileno()
        # No hole is before this offset, from the current one on.
        self._data_end = 0

    def read(self, size: int, /) -> bytes:
        data = bytearray(size)
        return bytes(data[: self.readinto(memoryview(data))])

    def readinto(self, view: memoryview, /) -> int:
        at = self._file.tell()
        if at >= self._data_end:
            hole = min(self._hole(at), len(view), len(_ZEROS))
            if hole > 0:
                view[:hole] = _ZEROS[:hole]
                self._file.seek(at + hole)
                return hole
        wanted = min(len(view), self._data_end - at) if at < self._data_end else len(view)
        # Only a file that does not block is read in vain, and regular ones do.
        return self._file.readinto(view[:wanted]) or 0

    def _hole(self, at: int) -> int:
        """Return how long the hole at `at` is, 0 where data is."""
        try:
            start = os.lseek(self._fd, at, os.SEEK_DATA)
            if start == at:
                self._data_end = os.lseek(self._fd, at, os.SEEK_HOLE)
        except OSError as error:
            # There is no more data, or the filesystem does not know of holes.
            start = os.fstat(self._fd).st_size if error.errno == errno.ENXIO else at
        os.lseek(self._fd, at, os.SEEK_SET)
        return start - at


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
