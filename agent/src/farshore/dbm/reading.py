"""Reading the content of large files, from either end's side."""

from __future__ import annotations

import io
from collections.abc import Callable

import blake3

from farshore import delta

_READ = 1 << 20


class CheckedReader:
    """An open file's content from its current place on; holes of sparse files are not read.

    ``check`` is called before each step and may raise: whoever waits for the content can end it.
    """

    def __init__(self, file: io.FileIO, check: Callable[[], None]) -> None:
        self._source = delta.skipping_holes(file)
        self._check = check

    def readinto(self, view: memoryview, /) -> int:
        """Fill ``view``; returns how much was read, less than its length only at the end."""
        self._check()
        return delta.read_full(self._source, view)

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, b"" at the end."""
        self._check()
        return self._source.read(size)


def digest_of(reader: CheckedReader) -> tuple[int, bytes]:
    """Read to the end; returns the length in bytes and the BLAKE3-256."""
    hasher = blake3.blake3()
    length = 0
    while block := reader.read(_READ):
        hasher.update(block)
        length += len(block)
    return length, hasher.digest()
