"""The source's end of a verification: it leads, finds what differs, and has it repaired by the ordinary path.

Both sides go over their trees first, each at its own pace, with all contents if that is wanted; the source compares
its disk with its index on the way. Then it descends, by the directories' digests, to where the replica differs from
the index. All of that says only where to look: the two sides were seen at different moments. What decides is a Look,
which the replica answers behind all transactions before it, just as the index was when the Look was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Protocol, TypeVar

import msgspec

from farshore import durable
from farshore.config import Verification, read_rate
from farshore.control.api import Drift, VerificationReport, VerificationStatus
from farshore.dbm import wire
from farshore.dbm.bandwidth import local_now
from farshore.dbm.index import Index, IndexView, Known
from farshore.dbm.messages import (
    MAX_LOOK,
    Digests,
    EndSurvey,
    Entry,
    Item,
    Look,
    Seen,
    Survey,
    Surveyed,
    WantDigests,
)
from farshore.dbm.planner import Planner
from farshore.dbm.verify import digests, schedule
from farshore.dbm.verify.judge import Facts, Finding, Verdict, judge, replica_differs
from farshore.dbm.verify.origin import Origin, Path
from farshore.dbm.verify.reading import Budget, ContentReader, Store, be_idle, forget
from farshore.dbm.verify.survey import Surveyor, join
from farshore.errors import FarshoreError, PeerUnreachable, ProtocolError, StateError
from farshore.fmm.types import FileKind, Hint, Kind, Observed, Root
from farshore.log import Log

_log = Log(__name__)
_T = TypeVar("_T")
_VERSION = 1
_STATE = "verify.json"
_STORE = "survey.db"
#: Seconds between two looks at whether one is due, or may go on.
_LOOK_AROUND = 20.0
_WAIT = 0.2
#: Questions for directories on their way at once.
_QUESTIONS = 16
#: A path that is changing is looked at again so often, after so many seconds, twice as many each time.
_ATTEMPTS = 6
_REST = 0.25
#: What differs again after it was sent anew so often stays as it is.
_REPAIRS = 2
#: Differing paths that a report names, and answers that one question may have.
_NAMED = 100
_MOST_ITEMS = 10_000_000
#: No content has this digest.
_NO_CONTENT = b""


class UnderWay(FarshoreError):
    """A verification of group {0} with other options is under way"""

    exit_code = 35


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

    def same_as(self, other: Order) -> bool:
        """Whether both ask for the same."""
        mine, theirs = ((o.contents, o.repair, o.from_source) for o in (self, other))
        return mine == theirs


class _Saved(msgspec.Struct):
    """What outlives a restart."""

    since: float
    order: Order | None = None
    last: VerificationReport | None = None
    version: int = _VERSION


class Line(Protocol):
    """What a verification needs of the sender whose connection it uses."""

    @property
    def comparable(self) -> bool:
        """True when the index tells what the replica has, and everything that is protected is there."""

    def between(self) -> AbstractAsyncContextManager[object]:
        """While entered, no transaction is planned or sent."""

    async def send(self, frames: list[bytes]) -> None:
        """Send frames; returns when more may follow."""

    async def with_index(self, call: Callable[[Index, Planner], _T]) -> _T:
        """Have ``call`` done with the index as it will be when all that was sent has come through."""

    def known(self, entry: Entry) -> Known:
        """What the index is to say of what the replica has told; raises ProtocolError."""

    def held(self, paths: Iterable[Path]) -> set[Path]:
        """Which of the paths are dirty, or on their way."""

    def doubt(self, hints: Sequence[Hint], changed: int) -> int:
        """So many entries of the index were changed, and these paths are to be looked at; returns a mark number."""

    async def wait_settled(self, mark: int) -> None:
        """Return when all that was marked below ``mark`` is durable on the replica."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A path that differed, and how far its repair is."""

    finding: Finding
    differences: tuple[str, ...]
    sent: int = 0
    repaired: bool = False


class _Question:
    """An answer that comes in parts."""

    def __init__(self) -> None:
        self.parts: list[Digests | Seen] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Verifier:
    """Verifies one group at ``epoch``: when asked, and by ``settings``. All methods are the event loop's.

    ``barrier`` returns when all changes made before are marked dirty; ``may_run`` tells whether the source is watched.
    The state directory ``state`` keeps the last report, and an order that is not done.
    """

    def __init__(
        self,
        group: str,
        epoch: int,
        roots: list[Root],
        state: FilePath,
        settings: Verification,
        barrier: Callable[[], Awaitable[object]],
        may_run: Callable[[], bool],
    ) -> None:
        self._group = group
        self._epoch = epoch
        self._roots = roots
        self._state = state
        self._settings = settings
        self._barrier = barrier
        self._may_run = may_run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"verify-{group}", initializer=be_idle)
        self._asked = asyncio.Event()
        self._stopped = threading.Event()
        self._numbers = 0
        self._questions: dict[int, _Question] = {}
        self._slots = asyncio.Semaphore(_QUESTIONS)
        self._surveyed: asyncio.Future[list[bytes]] | None = None
        self._phase = ""
        #: What differed, by path, of the order that is under way; it outlives a broken connection.
        self._found: dict[Path, _Found] = {}
        self._withheld: set[Path] = set()
        self._busy: set[Path] = set()
        self._read_replica = 0
        # Used in the thread.
        self._store: Store | None = None
        self._view: IndexView | None = None
        self._reader: ContentReader | None = None
        self._origin: Origin | None = None
        self._surveyor: Surveyor | None = None
        self._saved = self._load()

    # --- for other rooms

    def request(self, contents: bool, repair: bool, from_source: bool, rate: float | None) -> str:
        """Begin one, or join the same one that is under way; returns its name. Raises UnderWay, StateError."""
        order = self._new_order(False, contents, repair, from_source, rate)
        under_way = self._saved.order
        if under_way is not None:
            if not under_way.same_as(order):
                raise UnderWay(self._group)
            return under_way.run
        self._begin(order)
        return order.run

    def status(self) -> VerificationStatus:
        """How far it is, and what came out last."""
        order, last = self._saved.order, self._saved.last
        reader, surveyor = self._reader, self._surveyor
        return VerificationStatus(
            run=order.run if order else "",
            phase=(self._phase or "waiting") if order else "",
            started=order.started if order else 0.0,
            paths=surveyor.paths if order and surveyor else 0,
            read_source=order.read_source + (reader.read if reader else 0) if order else 0,
            read_replica=order.read_replica + self._read_replica if order else 0,
            due=self._due(),
            last=last,
        )

    def answered(self, message: Surveyed | Digests | Seen) -> None:
        """The replica has told something; raises ProtocolError when nobody wanted to know it."""
        order = self._saved.order
        if isinstance(message, Surveyed):
            if order is None or message.run != bytes.fromhex(order.run) or self._surveyed is None:
                return  # of one that was given up
            self._read_replica = message.read
            if message.problem:
                self._give_up(FarshoreError(f"the replica: {message.problem}"))
            elif message.done and not self._surveyed.done():
                self._surveyed.set_result(message.roots)
            return
        if isinstance(message, Seen):
            self._read_replica = message.read
        question = self._questions.get(message.number)
        if question is None:
            raise ProtocolError("the replica", f"an answer to question {message.number}, which nobody asked")
        question.parts.append(message)
        if message.last:
            del self._questions[message.number]
            if not question.done.done():
                question.done.set_result(None)

    def _give_up(self, error: FarshoreError) -> None:
        """Nothing more will be answered."""
        waiting: list[asyncio.Future[Any]] = [question.done for question in self._questions.values()]
        if self._surveyed is not None:
            waiting.append(self._surveyed)
        for each in waiting:
            if not each.done():
                each.set_exception(error)

    def close(self) -> None:
        """End all work; the order stays for the next to take up."""
        self._stopped.set()
        self._pool.shutdown(wait=False)

    async def session(self, line: Line) -> None:
        """Verify over one connection whenever it is time, until cancelled; raises what the connection ends with."""
        try:
            while True:
                order = await self._next_order(line)
                try:
                    report = await self._verify(line, order)
                except (PeerUnreachable, ConnectionError):
                    raise
                except (FarshoreError, OSError, sqlite3.Error) as error:
                    report = self._report(order, "failed", str(error) or type(error).__name__)
                except Exception as error:
                    _log.error("the verification failed", error, group=self._group)
                    report = self._report(order, "failed", f"internal error: {error}")
                await self._end(line, report)
        finally:
            await self._pause()

    # --- orders

    def _load(self) -> _Saved:
        path = self._state / _STATE
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
            if saved.version != _VERSION:
                raise ValueError
        except (OSError, ValueError):
            # What is lost is when the last one was, and what it found.
            saved = _Saved(time.time())
            self._store_state(saved)
        if saved.order is not None and saved.order.epoch != self._epoch:
            saved.last = self._report(saved.order, "failed", "the owner changed before it was done")
            saved.order = None
            self._store_state(saved)
        return saved

    def _store_state(self, saved: _Saved) -> None:
        try:
            durable.write(self._state / _STATE, msgspec.json.encode(saved))
        except StateError as error:
            _log.warning("the verification's state is not kept", group=self._group, reason=error)

    def _new_order(self, scheduled: bool, contents: bool, repair: bool, from_source: bool, rate: float | None) -> Order:
        if rate is None:
            configured = read_rate("verify.rate", self._settings.rate)
            rate = 0.0 if configured == float("inf") else configured
        run = secrets.token_hex(8)
        return Order(run, self._epoch, time.time(), scheduled, contents, repair, from_source, rate)

    def _begin(self, order: Order) -> None:
        self._saved.order = order
        self._store_state(self._saved)
        self._found.clear()
        self._withheld.clear()
        self._asked.set()

    def _due(self) -> float | None:
        last = self._saved.last
        ended, failed = (last.ended, last.result == "failed") if last else (None, False)
        return schedule.next_run(self._settings, self._group, self._saved.since, ended, failed)

    async def _next_order(self, line: Line) -> Order:
        """The order that is under way, or the next one when it is time and can be done."""
        while True:
            self._asked.clear()
            if self._saved.order is None and schedule.may_start(self._settings, self._due(), time.time(), local_now()):
                self._begin(self._new_order(True, self._settings.contents, True, False, None))
            if self._saved.order is not None:
                self._phase = "waiting"
                while not self._can(line):  # noqa: ASYNC110 - it depends on many things, none with an event
                    await asyncio.sleep(_WAIT)
                return self._saved.order
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AROUND):
                    await self._asked.wait()

    def _can(self, line: Line) -> bool:
        return (
            self._may_run() and line.comparable and not line.held((number, b"") for number in range(len(self._roots)))
        )

    # --- one of them

    async def _verify(self, line: Line, order: Order) -> VerificationReport:
        _log.info("verifying", group=self._group, run=order.run, contents=order.contents)
        self._phase = "reading"
        ours, theirs = await self._survey(line, order)
        self._phase = "comparing"
        origin = self._origin
        assert origin is not None
        origin.comparing = False
        await self._compare(line, origin, ours, theirs)
        suspects = origin.suspects | {(number, b"") for number in range(len(self._roots))} | set(self._found)
        for _ in range(_REPAIRS + 1):
            mark = await self._examine(line, order, suspects)
            suspects = {path for path, found in self._found.items() if found.sent and not found.repaired}
            if mark is None or not suspects:
                break
            self._phase = "repairing"
            await line.wait_settled(mark)
        for path in self._busy:
            # It was sent anew, and changes already.
            if path in self._found and self._found[path].sent:
                self._is_same(path)
        if origin.too_many:
            return self._report(order, "drift", "more differs than can be remembered; verify again")
        unrepaired = any(not found.repaired for found in self._found.values())
        return self._report(order, "drift" if unrepaired else "repaired" if self._found else "clean", "")

    async def _survey(self, line: Line, order: Order) -> tuple[list[bytes], list[bytes]]:
        """Have both sides go over their trees; returns the digests of all below each root, here and there."""
        self._stopped = threading.Event()
        self._read_replica = 0
        surveyed = self._surveyed = asyncio.get_running_loop().create_future()
        await line.send([wire.frame(Survey(bytes.fromhex(order.run), order.contents, order.rate))])
        ours = await self._in_thread(self._go_over, order, self._stopped)
        theirs = await surveyed
        if len(theirs) != len(ours):
            raise ProtocolError("the replica", f"{len(theirs)} roots of {len(ours)}")
        return ours, theirs

    def _go_over(self, order: Order, stopped: threading.Event) -> list[bytes]:
        """In the thread."""
        self._put_away()
        budget = Budget(order.rate, stopped)
        store = self._store = Store(self._state / _STORE, bytes.fromhex(order.run))
        view = self._view = IndexView(self._state / "index.db")
        reader = self._reader = ContentReader(self._roots, store, budget, spare_cache=True)
        origin = self._origin = Origin(view, self._roots, reader, order.contents)
        surveyor = Surveyor(origin, len(self._roots), store, digests.UNKNOWN_HERE, budget.check)
        self._surveyor = surveyor
        return surveyor.survey()

    def _put_away(self) -> None:
        """In the thread."""
        store, self._store = self._store, None
        view, self._view = self._view, None
        if store is not None:
            store.close()
        if view is not None:
            view.close()

    async def _pause(self) -> None:
        """The connection has ended: what was read is kept for the next."""
        self._stopped.set()
        self._questions.clear()
        order, reader = self._saved.order, self._reader
        self._reader = None
        self._phase = ""
        if order is not None:
            self._saved.order = msgspec.structs.replace(
                order,
                read_source=order.read_source + (reader.read if reader else 0),
                read_replica=order.read_replica + self._read_replica,
            )
            self._store_state(self._saved)
        self._read_replica = 0
        with contextlib.suppress(RuntimeError):
            self._pool.submit(self._put_away)

    async def _end(self, line: Line, report: VerificationReport) -> None:
        self._saved.order, self._saved.last = None, report
        self._store_state(self._saved)
        self._phase = ""
        self._reader = self._surveyor = self._origin = None
        for drift in report.drifts:
            what = ", ".join(drift.differences)
            _log.warning("differed", group=self._group, path=drift.path, finding=drift.finding, what=what)
        tell = _log.info if report.result in ("clean", "repaired") else _log.warning
        tell(
            "verified",
            group=self._group,
            result=report.result,
            reason=report.reason,
            paths=report.paths,
            differed=sum(report.findings.values()),
            unrepaired=report.unrepaired,
            read_source=report.read_source,
            read_replica=report.read_replica,
            seconds=round(report.ended - report.started, 1),
        )
        self._found.clear()
        self._withheld.clear()
        self._busy = set()

        def tidy() -> None:
            self._put_away()
            forget(self._state / _STORE)

        await self._in_thread(tidy)
        await line.send([wire.frame(EndSurvey())])

    def _report(self, order: Order, result: str, reason: str) -> VerificationReport:
        reader, surveyor, found = self._reader, self._surveyor, self._found
        findings: dict[str, int] = {}
        for each in found.values():
            findings[each.finding.value] = findings.get(each.finding.value, 0) + 1
        named = sorted(found.items(), key=lambda item: (item[1].repaired, item[0]))[:_NAMED]
        return VerificationReport(
            run=order.run,
            scheduled=order.scheduled,
            contents=order.contents,
            started=order.started,
            ended=time.time(),
            result=result,
            reason=reason,
            paths=surveyor.paths if surveyor else 0,
            read_source=order.read_source + (reader.read if reader else 0),
            read_replica=order.read_replica + self._read_replica,
            findings=findings,
            unrepaired=sum(not each.repaired for each in found.values()),
            busy=len(self._busy),
            withheld=len(self._withheld),
            drifts=[
                Drift(self._display(path), each.finding.value, list(each.differences), each.repaired)
                for path, each in named
            ],
        )

    def _display(self, path: Path) -> str:
        root, below = path
        full = join(self._roots[root].path, below) if below else self._roots[root].path
        return full.decode("utf-8", "backslashreplace")

    # --- where to look

    async def _compare(self, line: Line, origin: Origin, ours: list[bytes], theirs: list[bytes]) -> None:
        """Descend to where the replica's digests differ from the index's; what differs becomes a suspect."""
        todo = [(number, b"") for number in range(len(ours)) if ours[number] != theirs[number]]
        while todo:
            some, todo = todo[:_QUESTIONS], todo[_QUESTIONS:]
            for below in await asyncio.gather(*(self._directory(line, origin, *each) for each in some)):
                todo += below

    async def _directory(self, line: Line, origin: Origin, root: int, path: bytes) -> list[Path]:
        """Compare what lies in a directory; returns the directories in it to go on with."""
        assert self._surveyor is not None
        in_buckets, theirs = await self._ask_digests(line, root, path, -1)
        ours = await self._in_thread(self._surveyor.items, root, path)
        if not in_buckets:
            return self._differing(origin, root, path, ours, theirs)
        mine: dict[int, list[Item]] = {}
        for item in ours:
            mine.setdefault(digests.bucket_of(item.name), []).append(item)
        here = {item.name: item.own for item in digests.buckets(ours)}
        there = {item.name: item.own for item in theirs}
        below: list[Path] = []
        for name in sorted(set(here) | set(there)):
            if len(name) != 1:
                raise ProtocolError("the replica", f"{name!r} is no bucket")
            if here.get(name) == there.get(name):
                continue
            held: list[Item] = []
            if name in there:
                _, held = await self._ask_digests(line, root, path, name[0])
            below += self._differing(origin, root, path, mine.get(name[0], []), held)
        return below

    def _differing(self, origin: Origin, root: int, path: bytes, ours: list[Item], theirs: list[Item]) -> list[Path]:
        here, there = ({item.name: item for item in items} for items in (ours, theirs))
        below = []
        for name in here.keys() | there.keys():
            mine, other = here.get(name), there.get(name)
            where = join(path, name)
            if mine is None or other is None or mine.own != other.own:
                origin.suspect(root, where)
            if mine is not None and other is not None and mine.below != other.below and mine.below and other.below:
                below.append((root, where))
        return below

    async def _ask_digests(self, line: Line, root: int, path: bytes, bucket: int) -> tuple[bool, list[Item]]:
        async with self._slots:
            number, question = self._question()
            await line.send([wire.frame(WantDigests(number, root, path, bucket))])
            await question.done
        items: list[Item] = []
        in_buckets = False
        for part in question.parts:
            if not isinstance(part, Digests):
                raise ProtocolError("the replica", f"{type(part).__name__} instead of Digests")
            in_buckets = part.buckets
            items += part.items
            if len(items) > _MOST_ITEMS:
                raise ProtocolError("the replica", f"a directory with more than {_MOST_ITEMS} names")
        return in_buckets, items

    def _question(self) -> tuple[int, _Question]:
        self._numbers += 1
        question = self._questions[self._numbers] = _Question()
        return self._numbers, question

    # --- looking closely

    async def _examine(self, line: Line, order: Order, suspects: set[Path]) -> int | None:
        """Look at the suspects, and act on what is the matter with them.

        What is changing is looked at again, until it rests or for the last time. Returns the mark number below which
        all that was sent anew lies; None when nothing was.
        """
        left, mark = suspects, None
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_REST * 2 ** (attempt - 1))
            again: set[Path] = set()
            for root, some in _portions(left):
                busy, marked = await self._examine_some(line, order, root, some)
                again |= busy
                mark = marked or mark
            left = again
            if not left:
                break
        self._busy = left
        return mark

    async def _examine_some(
        self, line: Line, order: Order, root: int, paths: list[bytes]
    ) -> tuple[set[Path], int | None]:
        """Returns the paths that are changing, and a mark number when something was sent anew."""
        known, there, held = await self._look(line, root, paths)
        resting = [path for path in paths if (root, path) not in held]
        here = await self._in_thread(self._look_here, root, resting)
        verdicts: dict[bytes, Verdict] = {}
        for path in resting:
            verdicts[path] = judge(Facts(known[path], there.get(path), *here[path]))
        again = set(held)
        wrong: dict[bytes, Verdict] = {}
        for path, verdict in verdicts.items():
            if verdict.finding is Finding.MOVING:
                again.add((root, path))
            elif verdict.finding is Finding.SAME:
                self._is_same((root, path))
            else:
                wrong[path] = verdict
        if not wrong:
            return again, None
        # What was seen here a moment ago may be a change whose event was on its way then.
        await self._barrier()
        async with line.between():
            held = line.held((root, path) for path in wrong)
            hints, changed = await line.with_index(
                lambda index, planner: self._act(index, planner, line, order, root, wrong, known, there, held, again)
            )
            mark = line.doubt(hints, changed) if hints else None
        return again, mark

    async def _look(
        self, line: Line, root: int, paths: list[bytes]
    ) -> tuple[dict[bytes, Known | None], dict[bytes, Entry], set[Path]]:
        """What the index says, what the replica has at the same moment, and which of the paths are under way."""
        await self._barrier()
        async with line.between():
            known = await line.with_index(lambda index, _: {path: index.get(root, path) for path in paths})
            held = line.held((root, path) for path in paths)
            number, question = self._question()
            await line.send([wire.frame(Look(number, root, paths))])
        await question.done
        there: dict[bytes, Entry] = {}
        for part in question.parts:
            if not isinstance(part, Seen):
                raise ProtocolError("the replica", f"{type(part).__name__} instead of Seen")
            for entry in part.entries:
                if entry.root != root or entry.path not in known:
                    raise ProtocolError("the replica", f"it tells of {entry.path!r}, which nobody asked for")
                line.known(entry)
                there[entry.path] = entry
        return known, there, held

    def _look_here(self, root: int, paths: list[bytes]) -> dict[bytes, tuple[Observed | None, bytes | None]]:
        """In the thread."""
        assert self._origin is not None
        return {path: self._origin.look(root, path) for path in paths}

    def _is_same(self, path: Path) -> None:
        found = self._found.get(path)
        if found is not None:
            self._found[path] = replace(found, repaired=True)

    # --- repairing

    def _act(
        self,
        index: Index,
        planner: Planner,
        line: Line,
        order: Order,
        root: int,
        wrong: dict[bytes, Verdict],
        known: dict[bytes, Known | None],
        there: dict[bytes, Entry],
        held: set[Path],
        again: set[Path],
    ) -> tuple[list[Hint], int]:
        """In the sender's worker: note what is wrong, and have the index say what the replica really has.

        Returns the hints that have the paths looked at, and how many entries were changed.
        """
        withheld = {(number, path) for number, path, _ in planner.problems}
        hints: list[Hint] = []
        changed = 0
        index.begin()
        for path, verdict in wrong.items():
            key = root, path
            if key in held or index.get(root, path) != known[path]:
                again.add(key)
                continue
            if key in withheld and verdict.finding is Finding.UNSEEN:
                if key not in self._found:
                    self._withheld.add(key)
                continue
            found = self._found.get(key) or _Found(verdict.finding, verdict.differences)
            if found.sent < _REPAIRS and _is_repaired_by(order, verdict.finding):
                found = replace(found, sent=found.sent + 1)
                entry, before = there.get(path), known[path]
                if replica_differs(before, entry):
                    adopt(index, root, path, before, None if entry is None else line.known(entry))
                    changed += 1
                elif before is not None and verdict.finding is Finding.UNTRACED:
                    # Read again, it will not be what the index says, and be sent.
                    index.put(msgspec.structs.replace(before, ctime_ns=0))
                    changed += 1
                hints.append(_hint(root, path, before, entry))
            self._found[key] = replace(found, repaired=False)
        return hints, changed

    async def _in_thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)


def adopt(index: Index, root: int, path: bytes, known: Known | None, there: Known | None) -> None:
    """Have the index say what the replica really has at ``path``, as a full comparison would.

    What the source has there is then sent by the ordinary path. Belongs to the index's open transaction.
    """
    if there is None or (known is not None and known.kind is not there.kind):
        index.remove(root, path)
    if there is None:
        return
    digest = there.digest
    if digest is None and there.kind is FileKind.FILE:
        # It could not be read there. Of another size, it is another content; whatever it is, it must be compared.
        digest = known.digest if known is not None and known.size == there.size else None
        digest = digest or _NO_CONTENT
    if known is None or known.digest != digest:
        index.set_signature(root, path, None)
    index.put(msgspec.structs.replace(there, digest=digest))


def _is_repaired_by(order: Order, finding: Finding) -> bool:
    """What the source changed is sent in any case; what may be its damage, only when that was asked for."""
    if finding is Finding.UNTRACED:
        return order.from_source
    return order.repair or finding is Finding.UNSEEN


def _hint(root: int, path: bytes, known: Known | None, entry: Entry | None) -> Hint:
    is_directory = known is not None and known.kind is FileKind.DIRECTORY
    if is_directory and entry is not None and entry.kind == int(FileKind.DIRECTORY):
        # Only its own metadata differ: nothing below it is in doubt.
        return Hint(root, path, Kind.ATTRIBUTES)
    return Hint(root, path, Kind.RESCAN | Kind.MODIFIED)


def _portions(paths: set[Path]) -> list[tuple[int, list[bytes]]]:
    """The paths by root, in portions that one Look can name, parents before what lies below them."""
    portions: list[tuple[int, list[bytes]]] = []
    for root, path in sorted(paths):
        if not portions or portions[-1][0] != root or len(portions[-1][1]) >= MAX_LOOK:
            portions.append((root, []))
        portions[-1][1].append(path)
    return portions
