"""The source's end of a verification: it leads, finds what differs, and has it repaired by the ordinary path.

Both sides go over their trees first, each at its own pace, with all contents if that is wanted; the source compares
its disk with its index on the way. Then it descends, by the directories' digests, to where the replica differs from
the index. All of that says only where to look: the two sides were seen at different moments. What decides is a Look,
which the replica answers behind all transactions before it, just as the index was when the Look was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Protocol, TypeVar

from msgspec import structs

from farshore.config import Verification, read_rate
from farshore.control.api import Drift, VerificationReport, VerificationStatus
from farshore.dbm.bandwidth import local_now
from farshore.dbm.index import Index, IndexView, Known
from farshore.dbm.messages import MAX_LOOK, Digests, Entry, Item, Seen, Surveyed
from farshore.dbm.owners import Owners
from farshore.dbm.planner import Planner
from farshore.dbm.verify import digests, schedule
from farshore.dbm.verify.asking import Asking
from farshore.dbm.verify.descent import Path, descend
from farshore.dbm.verify.judge import Facts, Finding, Verdict, judge, replica_differs
from farshore.dbm.verify.orders import Book, Order
from farshore.dbm.verify.origin import Origin
from farshore.dbm.verify.reading import Budget, ContentReader, Store, be_idle, forget
from farshore.dbm.verify.survey import Surveyor, join
from farshore.errors import FarshoreError, PeerUnreachable
from farshore.fmm.types import FileKind, Hint, Kind, Observed, Root
from farshore.log import Log

_log = Log(__name__)
_T = TypeVar("_T")
_STORE = "survey.db"
#: Seconds between two looks at whether one is due, or may go on.
_LOOK_AROUND = 20.0
_WAIT = 0.2
#: A path that is changing is looked at again so often, after so many seconds, twice as many each time.
_ATTEMPTS = 6
_REST = 0.25
#: What differs again after it was sent anew so often stays as it is.
_REPAIRS = 2
#: Differing paths that a report names, the bytes of a path that are told, and paths that are logged.
_NAMED = 32
_LONGEST = 400
_LOGGED = 1000
#: No content has this digest.
_NO_CONTENT = b""


class UnderWay(FarshoreError):
    """A verification of group {0} with other options is under way"""

    exit_code = 35


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
    """A path that differed, how often it was sent anew, and whether it is alike everywhere now."""

    finding: Finding
    differences: tuple[str, ...]
    sent: int = 0
    repaired: bool = False


@dataclass(slots=True)
class _Scene:
    """Some paths of one root, as the index says, the replica has, and the source has them.

    ``known`` and ``there`` are of one moment. ``again``: those that are changing.
    """

    root: int
    paths: list[bytes]
    known: dict[bytes, Known | None]
    there: dict[bytes, Entry]
    wrong: dict[bytes, Verdict]
    again: set[Path]


class _Reading:
    """What goes over the source's side for one order. Made, used and closed in the thread, but for its counters."""

    def __init__(
        self, state: FilePath, roots: list[Root], order: Order, stopped: threading.Event, owners: Owners | None
    ) -> None:
        budget = Budget(order.rate, stopped)
        budget.check()
        self._store = Store(state / _STORE, bytes.fromhex(order.run))
        self._view = IndexView(state / "index.db")
        self.reader = ContentReader(roots, self._store, budget, spare_cache=True)
        self.origin = Origin(self._view, roots, self.reader, order.contents, owners)
        self.surveyor = Surveyor(self.origin, len(roots), self._store, digests.UNKNOWN_HERE, budget.check)

    def go_over(self) -> list[bytes]:
        """The digests of all below each root."""
        found = self.surveyor.survey()
        self.origin.comparing = False
        return found

    def look(
        self, root: int, paths: list[bytes], kept: dict[bytes, bool | None], there: dict[bytes, Entry]
    ) -> dict[bytes, tuple[Observed | None, bytes | None] | None]:
        """What is here at each path, and the digest of its content; see ``Origin.look``.

        What the limits leave alone is not among it: see ``Origin.leaves_alone``.
        """
        return {
            path: self.origin.look(root, path)
            for path in paths
            if not self.origin.leaves_alone(root, path, kept.get(path, False), there.get(path))
        }

    def close(self) -> None:
        """Keep what was read."""
        self._store.close()
        self._view.close()


class Verifier:
    """Verifies one group at ``epoch``: when asked, and by ``settings``. All methods are the event loop's.

    ``barrier`` returns when all changes made before are marked dirty; ``may_run`` tells whether the source is watched;
    ``owners``: they go by name.
    The group's state directory ``state`` keeps the last report, and an order that is not done.
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
        owners: Owners | None = None,
    ) -> None:
        self._owners = owners
        self._group = group
        self._epoch = epoch
        self._roots = roots
        self._tops: set[Path] = {(number, b"") for number in range(len(roots))}
        self._state = state
        self._settings = settings
        self._barrier = barrier
        self._may_run = may_run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"verify-{group}", initializer=be_idle)
        self._asked = asyncio.Event()
        self._stopped = threading.Event()
        self._asking: Asking | None = None
        self._reading: _Reading | None = None
        self._phase = ""
        #: What differed, by path, of the order that is under way; it outlives a broken connection.
        self._found: dict[Path, _Found] = {}
        self._withheld: set[Path] = set()
        self._busy: set[Path] = set()
        self._book = Book(state)
        if self._book.order is not None and self._book.order.epoch != epoch:
            self._book.end(self._report(self._book.order, "failed", "the owner changed before it was done"))

    # --- for other rooms

    def request(self, contents: bool, repair: bool, from_source: bool, rate: float | None) -> str:
        """Begin one, or join the same one that is under way; returns its name. Raises UnderWay."""
        order = self._new_order(False, contents, repair, from_source, rate)
        under_way = self._book.order
        if under_way is None:
            self._begin(order)
            return order.run
        if not under_way.wants_the_same(order):
            raise UnderWay(self._group)
        return under_way.run

    def adopt(self, settings: Verification) -> None:
        """The next verification that starts by itself does so by these."""
        self._settings = settings

    def status(self) -> VerificationStatus:
        """How far it is, and what came out last."""
        order = self._book.order
        return VerificationStatus(
            run=order.run if order else "",
            phase=(self._phase or "waiting") if order else "",
            started=order.started if order else 0.0,
            paths=self._reading.surveyor.paths if order and self._reading else 0,
            read_source=self._read_source(order) if order else 0,
            read_replica=self._read_replica(order) if order else 0,
            due=self._due(),
            last=self._book.last,
        )

    def answered(self, message: Surveyed | Digests | Seen) -> None:
        """The replica has told something."""
        if self._asking is not None:
            self._asking.answered(message)

    def close(self) -> None:
        """End all work; the order stays for the next to take up."""
        self._stopped.set()
        self._pool.shutdown(wait=False)

    async def session(self, line: Line) -> None:
        """Verify over one connection whenever it is time, until cancelled; raises what the connection ends with."""
        try:
            while True:
                order = await self._next_order(line)
                report = await self._carry_out(line, order)
                await self._end(report)
        finally:
            self._pause()

    # --- orders

    def _new_order(self, scheduled: bool, contents: bool, repair: bool, from_source: bool, rate: float | None) -> Order:
        if rate is None:
            configured = read_rate("verify.rate", self._settings.rate)
            rate = 0.0 if math.isinf(configured) else configured
        run = secrets.token_hex(8)
        return Order(run, self._epoch, time.time(), scheduled, contents, repair, from_source, rate)

    def _begin(self, order: Order) -> None:
        self._forget()
        self._book.begin(order)
        self._asked.set()

    def _forget(self) -> None:
        self._found.clear()
        self._withheld.clear()
        self._busy = set()

    def _due(self) -> float | None:
        last = self._book.last
        ended, failed = (last.ended, last.result == "failed") if last else (None, False)
        return schedule.next_run(self._settings, self._group, self._book.since, ended, failed)

    async def _next_order(self, line: Line) -> Order:
        """The order that is under way, or the next one, when it is time and can be done."""
        while True:
            self._asked.clear()
            if self._book.order is None and schedule.may_start(self._settings, self._due(), time.time(), local_now()):
                self._begin(self._new_order(True, self._settings.contents, True, False, None))
            if self._book.order is not None:
                self._phase = "waiting"
                await self._until(lambda: self._may_go_on(line) and not line.held(self._tops))
                return self._book.order
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AROUND):
                    await self._asked.wait()

    def _may_go_on(self, line: Line) -> bool:
        """Nothing can be told of a source that nobody watches, or that is not there."""
        return self._may_run() and line.comparable

    @staticmethod
    async def _until(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - it depends on many things, none with an event
            await asyncio.sleep(_WAIT)

    async def _carry_out(self, line: Line, order: Order) -> VerificationReport:
        """Do it all; a failure that is not the connection's is what is reported."""
        try:
            return await self._verify(line, order)
        except (PeerUnreachable, ConnectionError):
            raise
        except (FarshoreError, OSError, sqlite3.Error) as error:
            return self._report(order, "failed", str(error) or type(error).__name__)
        except Exception as error:
            _log.error("the verification failed", error, group=self._group)
            return self._report(order, "failed", f"internal error: {error}")

    def _pause(self) -> None:
        """The connection has ended: what was read is kept for the next. Nobody waits for the thread."""
        self._stopped.set()
        order = self._book.order
        if order is not None:
            read = {"read_source": self._read_source(order), "read_replica": self._read_replica(order)}
            self._book.begin(structs.replace(order, **read))
        self._phase = ""
        self._asking = None
        self._put_away()

    async def _end(self, report: VerificationReport) -> None:
        for path, found in sorted(self._found.items())[:_LOGGED]:
            what = ", ".join(found.differences)
            _log.warning(
                "differed", group=self._group, path=self._where(path), finding=found.finding.value, what=what,
                repaired=found.repaired,
            )  # fmt: skip
        for path in sorted(self._busy)[:_LOGGED]:
            _log.warning("not compared: it changes all the time, or cannot be read", path=self._where(path))
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
        asking, self._asking = self._asking, None
        self._book.end(report)
        self._phase = ""
        self._forget()
        self._put_away()
        self._pool.submit(forget, self._state / _STORE)
        if asking is not None:
            await asking.end_survey()

    def _put_away(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            with contextlib.suppress(RuntimeError):  # Closed meanwhile: what was not written down is read again.
                self._pool.submit(reading.close)

    # --- what is told

    def _read_source(self, order: Order) -> int:
        return order.read_source + (self._reading.reader.read if self._reading else 0)

    def _read_replica(self, order: Order) -> int:
        return order.read_replica + (self._asking.read if self._asking else 0)

    def _report(self, order: Order, result: str, reason: str = "") -> VerificationReport:
        findings: dict[str, int] = {}
        for each in self._found.values():
            findings[each.finding.value] = findings.get(each.finding.value, 0) + 1
        # What is not repaired first.
        named = sorted(self._found.items(), key=lambda item: (item[1].repaired, item[0]))[:_NAMED]
        return VerificationReport(
            run=order.run,
            scheduled=order.scheduled,
            contents=order.contents,
            started=order.started,
            ended=time.time(),
            result=result,
            reason=reason,
            paths=self._reading.surveyor.paths if self._reading else 0,
            read_source=self._read_source(order),
            read_replica=self._read_replica(order),
            findings=findings,
            unrepaired=sum(not each.repaired for each in self._found.values()),
            busy=len(self._busy),
            withheld=len(self._withheld),
            drifts=[
                Drift(self._where(path), each.finding.value, list(each.differences), each.repaired)
                for path, each in named
            ],
        )

    def _where(self, path: Path) -> str:
        root, below = path
        full = join(self._roots[root].path, below) if below else self._roots[root].path
        return (full if len(full) <= _LONGEST else full[:_LONGEST] + b"...").decode("utf-8", "backslashreplace")

    # --- one of them

    async def _verify(self, line: Line, order: Order) -> VerificationReport:
        _log.info("verifying", group=self._group, run=order.run, contents=order.contents)
        self._phase = "reading"
        stopped = self._stopped = threading.Event()
        asking = self._asking = Asking(line.send, bytes.fromhex(order.run))
        await asking.begin_survey(order.contents, order.rate)
        reading = self._reading = await self._in_thread(
            _Reading, self._state, self._roots, order, stopped, self._owners
        )
        ours = await self._in_thread(reading.go_over)
        theirs = await asking.surveyed(len(self._roots))
        self._phase = "comparing"
        origin = reading.origin

        async def items_of(root: int, path: bytes) -> list[Item]:
            return await self._in_thread(reading.surveyor.items, root, path)

        await descend(asking, ours, theirs, items_of, origin.suspect)
        suspects = origin.suspects | self._tops | self._found.keys()
        await self._repair_all(line, order, asking, reading, suspects)
        if origin.too_many:
            return self._report(order, "drift", "more differs than can be remembered; verify again")
        if any(not found.repaired for found in self._found.values()):
            return self._report(order, "drift")
        return self._report(order, "repaired" if self._found else "clean")

    async def _repair_all(
        self, line: Line, order: Order, asking: Asking, reading: _Reading, suspects: set[Path]
    ) -> None:
        """Look at the suspects, send anew what is to be, and look whether that has helped."""
        for _ in range(_REPAIRS + 1):
            mark = await self._examine(line, order, asking, reading, suspects)
            suspects = {path for path, found in self._found.items() if found.sent and not found.repaired}
            if mark is None or not suspects:
                break
            self._phase = "repairing"
            await line.wait_settled(mark)
        for path in self._busy & self._found.keys():
            if self._found[path].sent:
                # It was sent anew, and changes already.
                self._found[path] = replace(self._found[path], repaired=True)

    async def _examine(
        self, line: Line, order: Order, asking: Asking, reading: _Reading, suspects: set[Path]
    ) -> int | None:
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
                scene = await self._look(line, asking, reading, root, some)
                if scene.wrong:
                    mark = await self._act(line, order, scene) or mark
                again |= scene.again
            left = again
            if not left:
                break
        self._busy = left
        return mark

    async def _look(self, line: Line, asking: Asking, reading: _Reading, root: int, paths: list[bytes]) -> _Scene:
        """See how things are at some paths, and judge."""
        await self._until(lambda: self._may_go_on(line))
        await self._barrier()
        async with line.between():
            known = await line.with_index(lambda index, _: {path: index.get(root, path) for path in paths})
            kept = await line.with_index(
                lambda _, planner: {path: planner.kept(each) for path, each in known.items() if each is not None}
            )
            held = line.held((root, path) for path in paths)
            question = await asking.send_look(root, paths)
        there = await asking.seen(question, root, paths)
        for entry in there.values():
            line.known(entry)  # raises for what is no sound entry
        resting = [path for path in paths if (root, path) not in held]
        here = await self._in_thread(reading.look, root, resting, kept, there)
        scene = _Scene(root, paths, known, there, {}, held)
        for path in resting:
            if path not in here:
                if (root, path) in self._found:
                    self._found[root, path] = replace(self._found[root, path], repaired=True)
                continue
            seen = here[path]
            verdict = Verdict(Finding.MOVING) if seen is None else judge(Facts(known[path], there.get(path), *seen))
            if verdict.finding is Finding.MOVING:
                scene.again.add((root, path))
            elif verdict.finding is not Finding.SAME:
                scene.wrong[path] = verdict
            elif (root, path) in self._found:
                self._found[root, path] = replace(self._found[root, path], repaired=True)
        return scene

    async def _act(self, line: Line, order: Order, scene: _Scene) -> int | None:
        """Note what is wrong, and have it sent anew when it is to be; returns a mark number then."""
        # What was seen here a moment ago may be a change whose event was on its way then.
        await self._barrier()
        async with line.between():
            paths = {(scene.root, path) for path in scene.wrong}
            held = line.held(paths) if self._may_go_on(line) else paths
            hints, changed = await line.with_index(
                lambda index, planner: self._distrust(index, planner, line, order, scene, held)
            )
            return line.doubt(hints, changed) if hints else None

    def _distrust(
        self, index: Index, planner: Planner, line: Line, order: Order, scene: _Scene, held: set[Path]
    ) -> tuple[list[Hint], int]:
        """In the sender's worker: have the index say what the replica really has.

        Returns the hints that have the paths looked at, and how many entries were changed. What has changed since the
        scene was seen is left for another look.
        """
        withheld = {(number, path) for number, path, _ in planner.problems}
        hints: list[Hint] = []
        changed = 0
        for path, verdict in scene.wrong.items():
            key, before, entry = (scene.root, path), scene.known[path], scene.there.get(path)
            if key in held or index.get(*key) != before:
                scene.again.add(key)
                continue
            if key in withheld and key not in self._found and verdict.finding is Finding.UNSEEN:
                self._withheld.add(key)
                continue
            found = self._found.get(key) or _Found(verdict.finding, verdict.differences)
            if found.sent < _REPAIRS and _is_sent(order, verdict.finding):
                found = replace(found, sent=found.sent + 1)
                index.begin()
                if replica_differs(before, entry):
                    adopt(index, *key, before, None if entry is None else line.known(entry))
                    changed += 1
                elif before is not None and verdict.finding is Finding.UNTRACED:
                    # Read again, it will not be what the index says, and be sent.
                    index.put(structs.replace(before, ctime_ns=0))
                    changed += 1
                hints.append(_hint(*key, before, entry))
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
    # What could not be read there is no content that anything equals.
    digest = (there.digest or _NO_CONTENT) if there.kind is FileKind.FILE else None
    if known is None or known.digest != digest:
        index.set_signature(root, path, None)
    index.put(structs.replace(there, digest=digest))


def _is_sent(order: Order, finding: Finding) -> bool:
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
