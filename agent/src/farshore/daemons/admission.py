"""Who may come in, as long as nobody knows who it is, and how many of each who is known.

A handshake costs some 3 ms of the event loop, a connection some 300 KiB. So that a flood takes neither from the peers
that matter, addresses that are known (a configured peer's, or one from which a peer or a gateway has come before) have
a share that strangers cannot use up, and each address has a limit of its own. What no limit by address can tell apart
is a flood from a peer's own address; its connections that are open already go on.

Pure: time is injected, and nothing here does any I/O.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: Connections whose handshake and first frame are not over: of all, of all strangers, of one address.
MOST_PENDING = 128
MOST_PENDING_STRANGERS = 64
MOST_PENDING_ADDRESS = 32
#: Handshakes per second, and at once: of one known address (a peer of many groups comes with all of them when the link
#: is back), of one stranger, of all strangers. The last is some 6 % of a core.
KNOWN_RATE, KNOWN_BURST = 20.0, 64.0
STRANGER_RATE, STRANGER_BURST = 5.0, 16.0
STRANGERS_RATE, STRANGERS_BURST = 20.0, 40.0
#: Connections of one identity, to which come two for each group that it has a part in; of one with no part in anything.
MOST_OF_PEER = 32
MOST_OF_OTHER = 4
#: Addresses that are kept in mind.
MOST_KNOWN, MOST_STRANGERS = 64, 4096
#: Seconds for which a cause is not logged again; causes that are kept in mind.
QUIET_SECONDS = 60.0
MOST_CAUSES = 256


@dataclass(slots=True)
class Bucket:
    """Lets ``rate`` things per second pass, and ``burst`` at once."""

    rate: float
    burst: float
    level: float
    at: float

    def fill(self, now: float) -> float:
        """What may pass at ``now``. A clock that steps back gives nothing."""
        self.level = min(self.burst, self.level + max(0.0, now - self.at) * self.rate)
        self.at = now
        return self.level


class Admission:
    """The limits of one listener. ``known``: addresses that count as known from the beginning, and always."""

    def __init__(self, clock: Callable[[], float], known: Iterable[str] = ()) -> None:
        self._clock = clock
        self._configured = frozenset(known)
        self._learned: OrderedDict[str, None] = OrderedDict()
        self._pending: Counter[str] = Counter()
        self._pending_strangers = 0
        self._buckets: OrderedDict[tuple[str, bool], Bucket] = OrderedDict()
        self._strangers = Bucket(STRANGERS_RATE, STRANGERS_BURST, STRANGERS_BURST, clock())
        self._identities: Counter[str] = Counter()

    def configure(self, known: Iterable[str]) -> None:
        """These addresses count as known from now on, and those of before no longer, unless they were learnt."""
        self._configured = frozenset(known)

    @property
    def pending(self) -> int:
        """Connections of which nobody knows yet whose they are."""
        return self._pending.total()

    def is_known(self, address: str) -> bool:
        """Whether ``address`` is a peer's."""
        return address in self._configured or address in self._learned

    def enter(self, address: str) -> Ticket | str:
        """Let a connection from ``address`` begin its handshake: a ticket to give back, or why it may not."""
        known = self.is_known(address)
        if self.pending >= MOST_PENDING:
            return "too many connections in their handshake"
        if self._pending[address] >= MOST_PENDING_ADDRESS:
            return "too many connections of one address in their handshake"
        if not known and self._pending_strangers >= MOST_PENDING_STRANGERS:
            return "too many connections of strangers in their handshake"
        now = self._clock()
        own = self._bucket(address, known, now)
        if own.fill(now) < 1:
            return "too many handshakes of one address"
        if not known:
            if self._strangers.fill(now) < 1:
                return "too many handshakes of strangers"
            self._strangers.level -= 1
        own.level -= 1
        self._pending[address] += 1
        self._pending_strangers += not known
        return Ticket(self, address, known)

    def learn(self, address: str) -> None:
        """A peer or a gateway has proved to be at ``address``."""
        if address not in self._configured:
            self._learned[address] = None
            self._learned.move_to_end(address)
            while len(self._learned) > MOST_KNOWN:
                self._learned.popitem(last=False)

    def identify(self, identity: str, most: int) -> bool:
        """Count a connection of ``identity``; False, and not counted, when it has ``most`` already."""
        if self._identities[identity] >= most:
            return False
        self._identities[identity] += 1
        return True

    def leave(self, identity: str) -> None:
        """A connection that was identified has ended."""
        self._identities[identity] -= 1
        if self._identities[identity] <= 0:
            del self._identities[identity]

    def _bucket(self, address: str, known: bool, now: float) -> Bucket:
        key = (address, known)
        bucket = self._buckets.get(key)
        if bucket is None:
            rate, burst = (KNOWN_RATE, KNOWN_BURST) if known else (STRANGER_RATE, STRANGER_BURST)
            bucket = self._buckets[key] = Bucket(rate, burst, burst, now)
            while len(self._buckets) > MOST_STRANGERS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket

    def _settle(self, address: str, known: bool) -> None:
        self._pending[address] -= 1
        if self._pending[address] <= 0:
            del self._pending[address]
        self._pending_strangers -= not known


class Ticket:
    """A connection that counts as one of which nobody knows whose it is, until it is given back."""

    def __init__(self, admission: Admission, address: str, known: bool) -> None:
        self._admission: Admission | None = admission
        self._address = address
        self._known = known

    def give_back(self) -> None:
        """It is known now, or gone. May be repeated."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._settle(self._address, self._known)


@dataclass(slots=True)
class _Cause:
    since: float
    kept_quiet: int = 0
    last: str = ""


class Causes:
    """What to log of things that may happen thousands of times: each cause at once, then once for QUIET_SECONDS.

    Nothing that a peer chooses is part of a cause but its certified name, so that there are few.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._causes: OrderedDict[str, _Cause] = OrderedDict()

    def note(self, cause: str, detail: str) -> bool:
        """It has happened; True when it is to be logged now, otherwise ``due`` will tell."""
        known = self._causes.get(cause)
        if known is not None:
            known.kept_quiet += 1
            known.last = detail
            return False
        self._causes[cause] = _Cause(self._clock())
        while len(self._causes) > MOST_CAUSES:
            self._causes.popitem(last=False)
        return True

    def due(self) -> list[tuple[str, int, str]]:
        """The causes to be logged again: how often each has happened since, and the last detail."""
        now = self._clock()
        told = []
        for cause, known in list(self._causes.items()):
            if now - known.since < QUIET_SECONDS:
                continue
            if known.kept_quiet:
                told.append((cause, known.kept_quiet, known.last))
                self._causes[cause] = _Cause(now)
            else:
                del self._causes[cause]
        return told
