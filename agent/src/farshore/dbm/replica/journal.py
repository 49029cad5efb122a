"""The replica's journal: the ordered record of transactions that makes an acknowledgement durable.

A transaction is appended and synced before it is acknowledged, and applied to the tree afterwards (``commit``). How far
the trees are on their disks is written down from time to time (``mark``); what follows is kept until then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from farshore.dbm.replica.segments import Place, Segments
from farshore.errors import StateError

_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Record:
    """A transaction as it is written down.

    ``bodies`` are operations as they came over the wire, ``staged`` the names of files in the stage, by the number of
    their operation. ``more``: the next transaction belongs to the same state. Times in ns of the wall clock.
    """

    seq: int
    epoch: int
    time_ns: int
    bodies: Sequence[bytes]
    staged: dict[int, bytes]
    more: bool = False


class _Head(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    time_ns: int
    more: bool
    staged: dict[int, bytes]


class Journal:
    """The journal in ``directory``; one thread appends, one drops, any may read. Raises StateError.

    ``found`` are the transactions that were there when it was opened, with their places; ``keep`` of them are the
    contents that are named by those above ``after``.
    """

    def __init__(self, directory: Path, after: int) -> None:
        self.found: list[tuple[int, bool, Place]] = []
        self.staged: set[bytes] = set()

        def note(number: int, place: Place, body: bytes) -> None:
            if number > after:
                head = _split(body)[0]
                self.found.append((number, head.more, place))
                self.staged.update(head.staged.values())

        self._segments = Segments(directory, "journal", note)

    @property
    def last(self) -> int:
        """The number of the last transaction, 0 if there is none."""
        return self._segments.last

    @property
    def bytes(self) -> int:
        """What it takes on the disk."""
        return self._segments.bytes

    @property
    def damage(self) -> str:
        """What was wrong with it when it was opened; "" if nothing was."""
        return self._segments.damage

    def append(self, records: Sequence[Record]) -> list[Place]:
        """Append transactions and make them durable together; raises OSError, and then none of them is there."""
        return self._segments.append([(record.seq, _join(record)) for record in records])

    def read(self, seq: int, place: Place) -> Record:
        """Transaction ``seq``, which is at ``place``; raises StateError when it is damaged."""
        body = self._segments.read(place)
        try:
            head, at = _split(body)
            return Record(seq, head.epoch, head.time_ns, list(_bodies(body, at)), head.staged, head.more)
        except (msgspec.MsgspecError, struct.error) as error:
            raise StateError(self._segments.path(place.segment), f"transaction {seq}: {error}") from error

    def drop(self, seq: int) -> None:
        """Transactions up to ``seq`` are needed no more."""
        self._segments.drop(seq)

    def set_aside(self, place: Path) -> None:
        """Move all that it holds to the directory ``place``, and begin anew behind it; raises OSError."""
        self._segments.set_aside(place)

    def close(self) -> None:
        """Give the handle back; everything stays."""
        self._segments.leave()


def _join(record: Record) -> bytes:
    head = msgspec.msgpack.encode(_Head(record.epoch, record.time_ns, record.more, record.staged))
    parts = [_LENGTH.pack(len(head)), head]
    for body in record.bodies:
        parts += (_LENGTH.pack(len(body)), body)
    return b"".join(parts)


def _split(body: bytes) -> tuple[_Head, int]:
    """The head of a record, and where its operations begin."""
    (length,) = _LENGTH.unpack_from(body)
    at = _LENGTH.size + length
    return msgspec.msgpack.decode(body[_LENGTH.size : at], type=_Head), at


def _bodies(body: bytes, at: int) -> Iterator[bytes]:
    while at < len(body):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        yield body[at : at + length]
        at += length
