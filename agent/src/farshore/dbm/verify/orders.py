"""What verifications were ordered and what came out: kept in the group's state directory across restarts."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from farshore import durable
from farshore.control.api import VerificationReport
from farshore.errors import StateError
from farshore.log import Log

_log = Log(__name__)
_FILE = "verify.json"
_VERSION = 1


class Order(msgspec.Struct, frozen=True):
    """A verification that is to be done.

    ``rate`` in bytes/s, 0: any; ``read_source`` and ``read_replica`` are bytes that were read for it before.
    """

    run: str
    epoch: int
    started: float
    scheduled: bool
    contents: bool
    repair: bool
    from_source: bool
    rate: float
    read_source: int = 0
    read_replica: int = 0

    def wants_the_same(self, other: Order) -> bool:
        """Whether both ask for the same, though perhaps not as fast."""
        mine, theirs = ((each.contents, each.repair, each.from_source) for each in (self, other))
        return mine == theirs


class _Content(msgspec.Struct):
    since: float
    order: Order | None = None
    last: VerificationReport | None = None
    version: int = _VERSION


class Book:
    """The order that is not done yet, the last report, and since when the group is here (wall clock, seconds)."""

    def __init__(self, state: Path) -> None:
        self._path = state / _FILE
        try:
            self._content = msgspec.json.decode(self._path.read_bytes(), type=_Content)
            if self._content.version != _VERSION:
                raise ValueError
        except (OSError, ValueError, msgspec.MsgspecError):
            # What is lost is when the last one was, and what it found.
            self._content = _Content(time.time())
            self._store()

    @property
    def since(self) -> float:
        """When the group was first here."""
        return self._content.since

    @property
    def order(self) -> Order | None:
        """What is to be done, or being done."""
        return self._content.order

    @property
    def last(self) -> VerificationReport | None:
        """What came out of the last one."""
        return self._content.last

    def begin(self, order: Order) -> None:
        """This is to be done; also to change what is remembered of it."""
        self._content.order = order
        self._store()

    def end(self, report: VerificationReport) -> None:
        """It is done."""
        self._content.order, self._content.last = None, report
        self._store()

    def _store(self) -> None:
        try:
            durable.write(self._path, msgspec.json.encode(self._content))
        except StateError as error:
            _log.warning("what is known of verifications is not kept", reason=error)
