"""What became of a file's content: whether most of it is still there, and whether it looks encrypted now.

Only samples are looked at: a file up to 64 KiB as a whole, of a larger one 16 pieces of 4 KiB that are spread over it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

#: Bytes of a sample, and of each of its pieces.
SAMPLE = 64 << 10
PIECE = 4 << 10
#: Nothing is said of fewer bytes.
LEAST = 256
#: The chi-square statistic of random bytes over 256 values has a mean of 255 and a standard deviation of 22.6: these
#: are 6 of them away. What is even beyond chance, such as a table of all bytes, is not random either.
_CHI_LEAST, _CHI_MOST = 120.0, 390.0
#: A part of a content that looks random counts when so much of the sample has changed.
_CHANGED_LEAST = 0.25

#: How formats begin whose content is compressed and would look random.
_MAGIC = (
    b"\x1f\x8b",  # gzip
    b"PK\x03\x04",  # zip, and with it OpenDocument, OOXML, jar
    b"PK\x05\x06",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"\x28\xb5\x2f\xfd",  # zstd
    b"\x04\x22\x4d\x18",  # lz4
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\x07",
    b"\x5d\x00\x00",  # lzma
    b"\x89LZO",
    b"MSCF",
    b"hsqs",
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"RIFF",  # WebP, AVI, WAV
    b"\x00\x00\x01\x00",  # Windows icons, of PNGs
    b"OggS",
    b"fLaC",
    b"ID3",
    b"\xff\xfb",  # MP3 without tags
    b"\xff\xf3",
    b"\xff\xf1",  # AAC
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"%PDF",
    b"wOFF",
    b"wOF2",
    b"PACK",  # git
    b"\x7fELF",
    b"MZ",
    b"!<arch>\n",  # Debian packages
    b"\xed\xab\xee\xdb",  # RPM packages
    b"SQLite format 3\x00",
    b"PAR1",
    b"Obj\x01",
    b"\x89HDF",
    b"QFI\xfb",
    b"KDMV",
)
#: What MP4, HEIF and AVIF have behind four bytes.
_MAGIC_AT_4 = b"ftyp"


class Content(Protocol):
    """A file's bytes, to be read anywhere."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from ``offset``, as far as there are any; raises OSError."""
        ...

    def close(self) -> None:
        """Give it back."""


class Inline:
    """Bytes at hand."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """See ``Content``."""
        return self._data[offset : offset + length]

    def close(self) -> None:
        """See ``Content``."""


class Opened:
    """An open file, whose descriptor this owns."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = os.fstat(handle).st_size

    def read(self, offset: int, length: int) -> bytes:
        """See ``Content``."""
        return os.pread(self._handle, length, offset)

    def close(self) -> None:
        """See ``Content``."""
        os.close(self._handle)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``kept``: the share of the old content that is still there, 0 to 1. ``turned``: it looks encrypted now."""

    kept: float
    turned: bool


def spots(size: int) -> list[tuple[int, int]]:
    """Where a sample of so many bytes is taken: (offset, length), the first at the begin, the last at the end."""
    if size <= SAMPLE:
        return [(0, size)] if size else []
    count = SAMPLE // PIECE
    return [((size - PIECE) * i // (count - 1), PIECE) for i in range(count)]


def sample(content: Content) -> bytes:
    """Up to 64 KiB of a content, its begin included."""
    return b"".join(content.read(offset, length) for offset, length in spots(content.size))


def looks_random(data: bytes) -> bool:
    """Whether ``data``, which begins as its file does, looks encrypted rather than written or compressed.

    Bytes that are as even as those of a cipher, and do not begin like a format that is known to be compressed. False
    for fewer than LEAST bytes. What is compressed well in a format that is not known is taken for encrypted.
    """
    if len(data) < LEAST or data[:64].isascii() or _has_magic(data):
        return False
    return _is_even(np.frombuffer(data, np.uint8))


def compare(before: Content, after: Content) -> Outcome:
    """What became of a content; raises OSError."""
    old_sample: list[bytes] = []
    shift = after.size - before.size
    kept = seen = 0
    changed: list[NDArray[np.uint8]] = []
    for offset, length in spots(before.size):
        old = np.frombuffer(piece := before.read(offset, length), np.uint8)
        old_sample.append(piece)
        same, new = _same(old, after, offset)
        changed.append(new[~same[: new.size]])
        if shift:
            # What stands behind a part that grew or shrank is where it was, counted from the end.
            same |= _same_behind(old, after, offset, shift)
        kept += int(np.count_nonzero(same))
        seen += old.size
    share = kept / seen if seen else 1.0
    if seen < LEAST or share == 1.0 or looks_random(b"".join(old_sample)):
        return Outcome(share, False)
    new_sample = sample(after)
    return Outcome(share, _turned(b"".join(old_sample), new_sample, np.concatenate(changed), seen))


def _turned(old: bytes, new: bytes, changed: NDArray[np.uint8], seen: int) -> bool:
    if looks_random(new):
        return True
    if _has_magic(new):
        return False
    # Some encrypt only the begin of a large file, or every other piece of it.
    if looks_random(new[:PIECE]) and not looks_random(old[:PIECE]):
        return True
    return changed.size >= max(LEAST, seen * _CHANGED_LEAST) and _is_even(changed)


def _same(old: NDArray[np.uint8], after: Content, offset: int) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """Which bytes of ``old`` are at the same place in ``after``, and what is there."""
    same = np.zeros(old.size, np.bool_)
    new = np.frombuffer(after.read(offset, old.size), np.uint8)
    same[: new.size] = old[: new.size] == new
    return same, new


def _same_behind(old: NDArray[np.uint8], after: Content, offset: int, shift: int) -> NDArray[np.bool_]:
    """Which bytes of ``old`` are at the same distance from the end of ``after``."""
    same = np.zeros(old.size, np.bool_)
    missing = max(0, -(offset + shift))
    if missing < old.size:
        new = np.frombuffer(after.read(offset + shift + missing, old.size - missing), np.uint8)
        same[missing : missing + new.size] = old[missing : missing + new.size] == new
    return same


def _has_magic(data: bytes) -> bool:
    if data.startswith(_MAGIC) or data.startswith(_MAGIC_AT_4, 4):
        return True
    # A zlib stream, such as git's loose objects: RFC 1950, section 2.2.
    return data[:1] == b"\x78" and int.from_bytes(data[:2]) % 31 == 0


def _is_even(data: NDArray[np.uint8]) -> bool:
    counts = np.bincount(data, minlength=256).astype(np.float64)
    chi = float(counts @ counts) * 256 / data.size - data.size
    return _CHI_LEAST < chi < _CHI_MOST
