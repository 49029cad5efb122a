"""The users' history: what they were promised, by whom, and what became of it.

All durations are differences of the users' own monotonic clock; the wall clock only places them among other events.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

#: Seconds around the switch back in which the longest pause is looked for.
AROUND = 10.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request. ``version`` is what was written or found (0: nothing there), None when that is not known."""

    kind: str
    doc: int
    version: int | None
    began: float
    ended: float
    wall: float
    status: int
    by: str
    why: str = ""
    sha: str = ""
    whole: bool = True

    @property
    def served(self) -> bool:
        """Whether the service did what was asked."""
        return 200 <= self.status < 300

    @property
    def answered(self) -> bool:
        """Whether there was an answer at all, if only that there is nothing."""
        return 0 < self.status < 500


@dataclass(frozen=True, slots=True)
class History:
    """All attempts in the order in which they ended. ``complete``: the users got to their verification's end."""

    attempts: Sequence[Attempt]
    marker: str
    writes: bool
    complete: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """What the history says. None: it could not be measured."""

    rpo_seconds: float | None = None
    rto_seconds: float | None = None
    failback_pause_seconds: float | None = None
    user_writes_acknowledged: int = 0
    user_writes_before: int = 0
    user_writes_away: int = 0
    user_writes_after: int = 0
    user_writes_lost_at_switch: int = 0
    user_writes_unobserved_at_switch: int = 0
    user_writes_lost_after_failback: int = 0
    user_requests: int = 0
    user_requests_unanswered: int = 0
    user_documents: int = 0
    user_documents_verified: int = 0
    #: Wall-clock times: last answer of the failed server, first of the backup, last of the backup, first after it.
    last_local: float | None = None
    first_backup: float | None = None
    last_backup: float | None = None
    first_home: float | None = None
    lost: list[str] = field(default_factory=list)


def load(lines: Iterable[str]) -> History:
    """Read a history; a last line that was cut off by a crash is left out."""
    attempts: list[Attempt] = []
    marker, writes, complete = "", True, False
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["k"] == "meta":
            marker, writes = entry["marker"], entry.get("writes", True)
        elif entry["k"] == "end":
            complete = True
        else:
            attempts.append(_attempt(entry))
    attempts.sort(key=lambda attempt: attempt.ended)
    return History(attempts, marker, writes, complete)


def _attempt(entry: dict[str, Any]) -> Attempt:
    return Attempt(
        kind=entry["k"],
        doc=entry["d"],
        version=entry.get("v"),
        began=entry["t0"],
        ended=entry["t1"],
        wall=entry["w"],
        status=entry["s"],
        by=entry.get("by", ""),
        why=entry.get("why", ""),
        sha=entry.get("sha", ""),
        whole=entry.get("ok", True),
    )


def measure(history: History, local: str, backup: str) -> Figures:
    """The figures of a drill in which ``local`` failed and ``backup`` stood in for it."""
    attempts = history.attempts
    requests = [a for a in attempts if a.why != "verify"]
    away = next((a for a in requests if a.served and a.by == backup), None)
    before = [a for a in requests if a.served and a.by == local and (away is None or a.ended <= away.ended)]
    home = next((a for a in requests if away and a.served and a.by == local and a.ended > away.ended), None)
    acknowledged = [a for a in attempts if a.kind == "put" and a.served]
    last_local = before[-1] if before else None
    failed = _failed_at(requests, last_local)
    lost, unobserved = _missing_at_switch(attempts, local, backup, away)
    gone = list(_missing_at_end(attempts, set(lost)))
    last_backup = [a for a in requests if a.served and a.by == backup and (home is None or a.ended <= home.ended)]
    rpo = None
    if away and failed is not None and history.writes and acknowledged:
        rpo = max(0.0, failed - min((a.ended for a in lost.values()), default=failed))
    return Figures(
        rpo_seconds=rpo,
        rto_seconds=away.ended - last_local.ended if away and last_local else None,
        failback_pause_seconds=_pause(acknowledged if history.writes else requests, home),
        user_writes_acknowledged=len(acknowledged),
        user_writes_before=sum(a.by == local and (away is None or a.ended <= away.ended) for a in acknowledged),
        user_writes_away=sum(a.by == backup for a in acknowledged),
        user_writes_after=sum(a.by == local and away is not None and a.ended > away.ended for a in acknowledged),
        user_writes_lost_at_switch=len(lost),
        user_writes_unobserved_at_switch=unobserved,
        user_writes_lost_after_failback=len(gone),
        user_requests=len(requests),
        user_requests_unanswered=sum(not a.answered for a in requests),
        user_documents=len({a.doc for a in acknowledged}),
        user_documents_verified=len({a.doc for a in attempts if a.why == "verify" and a.version is not None}),
        last_local=last_local.wall if last_local else None,
        first_backup=away.wall if away else None,
        last_backup=last_backup[-1].wall if last_backup else None,
        first_home=home.wall if home else None,
        lost=[_name(a) for a in lost.values()] + gone,
    )


def _failed_at(requests: Sequence[Attempt], last_local: Attempt | None) -> float | None:
    """The latest moment at which the failure can have been: the first request that got no answer was sent then."""
    if last_local is None:
        return None
    unanswered = [a.began for a in requests if not a.answered and a.ended > last_local.ended]
    return max(last_local.ended, min(unanswered, default=last_local.ended))


def _missing_at_switch(
    attempts: Sequence[Attempt], local: str, backup: str, away: Attempt | None
) -> tuple[dict[tuple[int, int], Attempt], int]:
    """The writes that ``local`` acknowledged before the switch and ``backup`` did not have.

    What it had of a document shows in the first reading there, before anybody wrote it there. Documents that were
    written there unread tell nothing; their acknowledged writes are counted apart.
    """
    if away is None:
        return {}, 0
    promised = [
        a for a in attempts if a.kind == "put" and a.served and a.by == local and a.ended <= away.ended
    ]  # fmt: skip
    seen: dict[int, int] = {}
    written: set[int] = set()
    for a in attempts:
        if a.by != backup:
            continue
        if a.kind == "put":
            written.add(a.doc)
        elif a.version is not None and a.doc not in written:
            # A document that is there but damaged does not hold the write.
            seen.setdefault(a.doc, a.version if a.whole else 0)
    lost = {(a.doc, a.version or 0): a for a in promised if a.doc in seen and (a.version or 0) > seen[a.doc]}
    return lost, sum(a.doc not in seen for a in promised)


def _missing_at_end(attempts: Sequence[Attempt], forgiven: set[tuple[int, int]]) -> Iterator[str]:
    """Acknowledged writes that the verification did not find, but for those lost at the switch already.

    A document may hold a later version than the last acknowledged one: a write whose answer got lost.
    """
    found: dict[int, tuple[int, bool]] = {}
    sent: dict[tuple[int, int], str] = {}
    content: dict[int, str] = {}
    for a in attempts:
        if a.kind == "put":
            sent[a.doc, a.version or 0] = a.sha
        elif a.why == "verify" and a.version is not None:
            found[a.doc] = (a.version, a.whole)
            content[a.doc] = a.sha
    for a in attempts:
        version = a.version or 0
        if a.kind != "put" or not a.served or (a.doc, version) in forgiven:
            continue
        there, whole = found.get(a.doc, (0, False))
        right = whole and content[a.doc] == sent.get((a.doc, there), "?")
        if there < version or not right:
            yield f"{_name(a)}: {_found(there, right, a.doc in found)}"


def _found(version: int, right: bool, read: bool) -> str:
    if not read:
        return "could not be read at the end"
    if not version:
        return "is not there at the end"
    return f"version {version} is there at the end" + ("" if right else ", damaged")


def _name(a: Attempt) -> str:
    return f"document {a.doc} version {a.version}, acknowledged by {a.by}"


def _pause(acknowledged: Sequence[Attempt], home: Attempt | None) -> float | None:
    """The longest time without a success around the switch back."""
    if home is None:
        return None
    times = [a.ended for a in acknowledged if a.served and abs(a.ended - home.ended) <= AROUND]
    return max((later - earlier for earlier, later in pairwise(times)), default=None)
