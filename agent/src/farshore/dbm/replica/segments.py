"""Append-only files of checksummed records, in segments: what the journal and the history are written in.

A record is a header, a body, and a BLAKE3-128 of both. What ends in the middle of a record was never synced, and is cut
off. Where a record is damaged though others follow, it was: the file counts up to there, and says so.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import blake3

from farshore import durable
from farshore.errors import StateError

_MAGIC = b"FSR1"
#: Magic, bytes of the body, number.
_HEAD = struct.Struct(">4sIQ")
_DIGEST = 16
#: A segment that is larger is followed by a new one.
SEGMENT_BYTES = 32 << 20
#: No record is larger: metadata and contents of a transaction are bounded when they arrive.
MAX_BODY = 1 << 30
#: How the body begins that tells which segments another one was put in the place of; no body of others does.
_COVERS = b"\xc1covers"
_SEGMENT = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is: the number that its segment is named by, an offset and a length in bytes."""

    segment: int
    offset: int
    length: int


class Segments:
    """Records in files of ``directory`` that end in ``suffix``; numbers never fall.

    One thread appends, one drops, any may read. ``last`` is the highest number, ``bytes`` what all take; ``damage`` is
    what was wrong with a record that must have been whole, "" if nothing. When it is opened, ``found`` is called
    with each record's number, place and body, in order. No body begins with 0xC1. Raises StateError.
    """

    def __init__(self, directory: Path, suffix: str, found: Callable[[int, Place, bytes], None]) -> None:
        self._directory = directory
        #: A segment must not be dropped while something is appended to it.
        self._lock = threading.Lock()
        self._suffix = suffix
        self.damage = ""
        self.last = 0
        self.bytes = 0
        #: Of each segment, by the number that it is named by, the size and the last number in it.
        self._sizes: dict[int, int] = {}
        self._lasts: dict[int, int] = {}
        self._current = -1
        self._handle = -1
        #: Segments that another one was put in the place of: their numbers are not used again.
        self._covered: set[int] = set()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open(found)
        except OSError as error:
            raise StateError(directory, error.strerror or str(error)) from error

    def append(self, records: Sequence[tuple[int, bytes]]) -> list[Place]:
        """Append numbers and bodies and make them durable, by one write and one sync; raises OSError.

        When it fails, none of them is there.
        """
        if not records:
            return []
        with self._lock:
            return self._append(records)

    def _append(self, records: Sequence[tuple[int, bytes]]) -> list[Place]:
        if self._handle < 0 or self._sizes[self._current] >= SEGMENT_BYTES:
            self.begin(records[0][0])
        start = at = self._sizes[self._current]
        parts: list[bytes] = []
        places = []
        for number, body in records:
            parts += _encode(number, body)
            length = _HEAD.size + len(body) + _DIGEST
            places.append(Place(self._current, at, length))
            at += length
        try:
            _write(self._handle, b"".join(parts))
            os.fdatasync(self._handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, start)
                os.fdatasync(self._handle)
            # What a failed sync left in the file is not known: nothing is ever written behind it.
            self.leave()
            raise
        self._sizes[self._current] = at
        self._lasts[self._current] = self.last = records[-1][0]
        self.bytes += at - start
        return places

    def read(self, place: Place) -> bytes:
        """The body at ``place``; raises StateError when it is not what was written."""
        path = self.path(place.segment)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                data = os.pread(handle, place.length, place.offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise StateError(path, error.strerror or str(error)) from error
        found = _decode(data)
        if found is None:
            raise StateError(path, f"the record at byte {place.offset} is damaged")
        return found[1]

    def drop(self, number: int) -> None:
        """Remove the segments that hold nothing above ``number``."""
        with self._lock:
            for segment, last in sorted(self._lasts.items()):
                if last > number:
                    return
                self.remove(segment)

    def all(self) -> list[int]:
        """The segments, the oldest first."""
        return sorted(self._sizes)

    def records(self, segment: int) -> list[tuple[int, bytes]]:
        """Numbers and bodies of a segment; raises StateError when it is damaged."""
        path = self.path(segment)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StateError(path, error.strerror or str(error)) from error
        found = []
        at = 0
        while at < self._sizes[segment]:
            record = _record(data, at)
            if record is None:
                raise StateError(path, f"the record at byte {at} is damaged")
            if not record[1].startswith(_COVERS):
                found.append(record)
            at += _HEAD.size + len(record[1]) + _DIGEST
        return found

    def replace(self, segments: Sequence[int], records: Sequence[tuple[int, bytes]]) -> None:
        """Put ``records`` in the place of successive segments, none of which is written to; raises OSError.

        After a crash, it is the old ones or the new one, which tells what may be left of the others.
        """
        first = segments[0]
        covers = (records[0][0] if records else first, _COVERS + _pack(segments[1:]))
        data = b"".join([part for number, body in (covers, *records) for part in _encode(number, body)])
        temporary = self.path(first).with_suffix(".new")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, self.path(first))
        durable.sync_directory(self._directory)
        for segment in segments[1:]:
            os.unlink(self.path(segment))
        self._covered.update(segments[1:])
        last = self._lasts[segments[-1]]
        for segment in segments:
            self.bytes -= self._sizes.pop(segment)
            del self._lasts[segment]
        self._sizes[first], self._lasts[first] = len(data), last
        self.bytes += len(data)

    def remove(self, segment: int) -> None:
        """Remove a segment; raises OSError."""
        if segment == self._current:
            self.leave()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(segment))
        self.bytes -= self._sizes.pop(segment)
        del self._lasts[segment]

    def set_aside(self, place: Path) -> None:
        """Move all segments to the directory ``place``; numbers go on growing. Raises OSError."""
        with self._lock:
            self.leave()
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for segment in self.all():
                path = self.path(segment)
                path.rename(place / path.name)
            self._sizes.clear()
            self._lasts.clear()
            self.bytes = 0

    def begin(self, number: int) -> None:
        """Let what follows, from ``number`` on, be in a new segment, whose name is durable; raises OSError."""
        self.leave()
        number = max(number, max(self._sizes, default=-1) + 1)
        while number in self._covered:
            number += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(self.path(number), flags, 0o600)
        try:
            durable.sync_directory(self._directory)
        except BaseException:
            os.close(handle)
            raise
        self._handle, self._current = handle, number
        self._sizes[number] = self._lasts[number] = 0

    def leave(self) -> None:
        """Give the handle back; what is appended next is in a new segment."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._current = -1

    def path(self, segment: int) -> Path:
        """The file of a segment."""
        return self._directory / f"{segment:020d}.{self._suffix}"

    def _open(self, found: Callable[[int, Place, bytes], None]) -> None:
        names = sorted(int(path.stem) for path in self._directory.glob(f"*.{self._suffix}") if path.stem.isdigit())
        for count, segment in enumerate(names, 1):
            path = self.path(segment)
            if self.damage:
                # What follows a gap is kept for whoever wants to look at it, and used for nothing.
                path.rename(path.with_suffix(".damaged"))
                continue
            if segment in self._covered:
                path.unlink()
                continue
            data = path.read_bytes()
            end = self._scan(segment, data, found)
            if end < len(data):
                if count < len(names) or self._goes_on(data, end):
                    self.damage = f"{path.name} is damaged at byte {end}"
                os.truncate(path, end)
            if not end:
                path.unlink()

    def _scan(self, segment: int, data: bytes, found: Callable[[int, Place, bytes], None]) -> int:
        """Note the records of a segment; returns where the last whole one ends."""
        at = 0
        while (record := _record(data, at)) is not None and record[0] >= self.last:
            number, body = record
            length = _HEAD.size + len(body) + _DIGEST
            if body.startswith(_COVERS):
                self._covered.update(_unpack(body))
            else:
                found(number, Place(segment, at, length), body)
            at += length
            self._sizes[segment] = at
            self._lasts[segment] = self.last = number
            self.bytes += length
        return at

    def _goes_on(self, data: bytes, end: int) -> bool:
        """Whether a whole record stands behind ``end``: then what is damaged there was not the last write's end."""
        at = data.find(_MAGIC, end + 1)
        while at >= 0:
            if _record(data, at) is not None:
                return True
            at = data.find(_MAGIC, at + 1)
        return False


def _record(data: bytes, at: int) -> tuple[int, bytes] | None:
    """Number and body of the record that begins at ``at``; None when there is none."""
    if len(data) - at < _HEAD.size:
        return None
    magic, length, _ = _HEAD.unpack_from(data, at)
    if magic != _MAGIC or length > MAX_BODY:
        return None
    return _decode(data[at : at + _HEAD.size + length + _DIGEST])


def _decode(data: bytes) -> tuple[int, bytes] | None:
    """Number and body of the record that ``data`` is; None when it is damaged."""
    if len(data) < _HEAD.size + _DIGEST:
        return None
    magic, length, number = _HEAD.unpack_from(data)
    head, body, digest = data[: _HEAD.size], data[_HEAD.size : -_DIGEST], data[-_DIGEST:]
    if magic != _MAGIC or length != len(body) or _digest(head, body) != digest:
        return None
    return number, body


def _encode(number: int, body: bytes) -> tuple[bytes, bytes, bytes]:
    head = _HEAD.pack(_MAGIC, len(body), number)
    return head, body, _digest(head, body)


def _pack(segments: Sequence[int]) -> bytes:
    return b"".join(map(_SEGMENT.pack, segments))


def _unpack(body: bytes) -> list[int]:
    return [segment for (segment,) in _SEGMENT.iter_unpack(body[len(_COVERS) :])]


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _digest(head: bytes, body: bytes) -> bytes:
    hasher = blake3.blake3(head)
    hasher.update(body)
    return hasher.digest(length=_DIGEST)
