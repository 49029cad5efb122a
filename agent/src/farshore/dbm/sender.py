"""The source's end of a group's stream: connect, compare once in full, then follow.

Transactions follow each other without waiting for the replica's acknowledgements. The index is ahead of the replica:
it tells what the replica will have. It is committed when everything on its way was acknowledged, and after a cut rolled
back to there; what was on its way then is in doubt, and is looked at anew. Everything that blocks (disk, index, delta)
happens in worker threads; the event loop only moves frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sqlite3
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import msgspec

from farshore import tls
from farshore.config import Bandwidth, NodeRef
from farshore.dbm import wire
from farshore.dbm.bandwidth import Pacer
from farshore.dbm.blocks import BlockReader, BlockWriter, tune
from farshore.dbm.index import LINEAGE, SEQ, Index, IndexDamaged, Known, clamp_time, is_damage, set_aside
from farshore.dbm.messages import (
    Ack,
    Cause,
    Entries,
    Entry,
    FromReplica,
    Hello,
    InStep,
    ListTree,
    Nak,
    Names,
    NoSignature,
    Ping,
    Pong,
    Refused,
    SignaturePart,
    Unkept,
    Uploaded,
    WantSignature,
    Welcome,
)
from farshore.dbm.owners import Arriving, Leaving, Owners
from farshore.dbm.planner import MAX_OPERATIONS, MAX_PATH, Planned, Planner, dirty_everything
from farshore.dbm.replica import paths
from farshore.dbm.unkept import texts
from farshore.dbm.uploads import Uploads
from farshore.dbm.work import Batch, Job, Work
from farshore.errors import (
    FarshoreError,
    NotInTime,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    StaleEpoch,
    UnsafePath,
)
from farshore.fmm.dirty import DirtySet
from farshore.fmm.types import FileKind, Hint, Root
from farshore.log import Log

_T = TypeVar("_T")
_log = Log(__name__)
_CODEC: wire.Codec[FromReplica] = wire.Codec(FromReplica)

_PING_SECONDS = 5.0
_PONG_SECONDS = 30.0
#: A commit may have to write back much; a dead peer is noticed by TCP long before.
_ANSWER_SECONDS = 600.0
_BACKOFF = (0.1, 5.0)
#: Seconds of silence after which TCP gives a connection up.
_DEAD_SECONDS = 15
_TAKE = 2000
#: A signature may take so many bytes, and so many more for each byte of the file.
_SIGNATURE_BYTES = 64 << 20
_SIGNATURE_SHARE = 24 / 1024
#: What may be on its way: enough for 100 ms and 1 Gbit/s, and little enough to be done again after a cut.
_FLIGHT_OPERATIONS = 20_000
_FLIGHT_BYTES = 64 << 20
#: The index's fact that says how owners are told.
_OWNERS = "owners"
#: The index is committed at the latest after so many changes or seconds, for which sending stops until all that is
#: on its way was acknowledged.
_COMMIT_PATHS = 50_000
_COMMIT_SECONDS = 10.0
#: While something is on its way, what changes gathers for so long before it is sent too; the more is on its way, the
#: longer.
_GATHER_SECONDS = 0.005
_GATHER_MOST = 0.2
_GATHER_PER_OPERATION = 1e-5
#: So many paths need not gather any longer.
_ENOUGH = MAX_OPERATIONS // 2


class ReplicaCannot(FarshoreError):
    """{0} cannot take the change: {1}"""


class _Sent(msgspec.Struct, frozen=True):
    """What a transaction changes, written down before it leaves."""

    seq: int
    drastic: bool
    paths: list[tuple[int, bytes]]


class _Pending:
    """The transactions that left since the index was committed.

    Not synced: losing it in a power cut costs a full comparison, nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close

    def close(self) -> None:
        """Close the file; what is in it stays."""
        self._file.close()

    def add(self, plan: Planned) -> None:
        """Write down a transaction that is about to leave."""
        record = msgspec.msgpack.encode(_Sent(plan.seq, plan.drastic, list(plan.changed)))
        self._file.write(len(record).to_bytes(4, "big") + record)

    def clear(self) -> None:
        """All of it is in the index."""
        self._file.truncate(0)

    def between(self, committed: int, started: int) -> list[_Sent] | None:
        """The transactions above ``committed`` up to ``started``; None unless all of them are written down."""
        self._file.seek(0)
        found = []
        while (head := self._file.read(4)) and len(head) == 4:
            body = self._file.read(int.from_bytes(head, "big"))
            try:
                sent = msgspec.msgpack.decode(body, type=_Sent)
            except msgspec.MsgspecError:
                break
            if committed < sent.seq <= started:
                found.append(sent)
        return found if [sent.seq for sent in found] == list(range(committed + 1, started + 1)) else None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A transaction that is on its way."""

    seq: int
    operations: int
    size: int


class _Inbox:
    """The replica's messages, one by one."""

    def __init__(self, reader: asyncio.StreamReader, peer: str) -> None:
        self._blocks = BlockReader(reader, peer)
        self._peer = peer
        self._bodies: deque[bytes] = deque()

    async def next(self) -> FromReplica | None:
        """The next message, None at the end of the stream."""
        while not self._bodies:
            bodies = await self._blocks.read()
            if bodies is None:
                return None
            self._bodies.extend(bodies)
        return _CODEC.decode(self._bodies.popleft(), self._peer)


class Sender:
    """Sends what ``dirty`` holds for one group until ``run`` is cancelled.

    ``on_stale`` is called with the replica's epoch when it knows a newer one; ``on_confirmed`` when it accepted
    ours. State for ``status`` is in the public attributes.
    """

    def __init__(
        self,
        group: str,
        epoch: int,
        peer: NodeRef,
        context: ssl.SSLContext,
        roots: list[tuple[str, Root]],
        index_path: Path,
        dirty: DirtySet,
        on_confirmed: Callable[[], None],
        on_stale: Callable[[int], None],
        bandwidth: Bandwidth | None = None,
        compress: bool = True,
        owners: Owners | None = None,
    ) -> None:
        self._group = group
        self._epoch = epoch
        self._peer = peer
        self._context = context
        self._roots = roots
        self._dirty = dirty
        self._on_confirmed = on_confirmed
        self._on_stale = on_stale
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"source-{group}")
        self._loop = asyncio.get_running_loop()
        self._index_path = index_path
        self._pending_path = index_path.with_name("pending")
        self._index: Index | None = None
        self._planner: Planner | None = None
        self._pending: _Pending | None = None
        self._pacer = Pacer(bandwidth or Bandwidth())
        self._compress = compress
        self._owners = owners
        self._owners_mark = b"" if owners is None else owners.mark
        self._batches: list[Batch] = []
        self._oldest_next = False
        # All that was taken and is not settled, and of that, in the order of their transactions, what is done here.
        self._works: dict[Work, None] = {}
        self._ended: deque[Work] = deque()
        self._flights: deque[_Flight] = deque()
        self._last = 0
        self._uncommitted = 0
        self._committed_at = 0.0
        self._drain = False
        self._between = asyncio.Lock()
        self._asking = asyncio.Lock()
        self._answers: asyncio.Queue[FromReplica] = asyncio.Queue()
        self._heard = 0.0
        self._blocks: BlockWriter | None = None
        self._uploads: Uploads | None = None
        self._wake = asyncio.Event()
        self._acked = asyncio.Event()
        self._is_waking = False
        self._progress = asyncio.Condition()
        self._told_in_step = False
        self._doubts_below = 0
        self._naks = 0
        self.connected = False
        self.comparing = False
        self.compared = False
        self.reason = "not connected yet"
        #: The last transaction that the replica has made durable.
        self.seq = 0
        self._sent_before = 0
        #: Metadata that the replica could not keep, as it has told.
        self.unkept: list[Cause] = []

    # --- for other threads and rooms

    def wake(self) -> None:
        """Something was marked dirty; may be called from any thread."""
        if not self._is_waking:
            # Under load the watcher calls for every few events, and each call to the loop is a system call.
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._woken)

    def _woken(self) -> None:
        self._is_waking = False
        self._wake.set()

    @property
    def sent_bytes(self) -> int:
        """Bytes that were given to TLS so far."""
        return self._sent_before + (self._blocks.wire_bytes if self._blocks is not None else 0)

    @property
    def in_step(self) -> bool:
        """True when all that was seen so far is durable on the replica."""
        return self.connected and self.compared and self._dirty.count() == 0 and not self._absent()

    @property
    def looked_at(self) -> int:
        """Paths that were compared since the last full comparison began."""
        return self._planner.looked_at if self._planner else 0

    def _absent(self) -> str:
        """Why nothing can be promised now: a protected path is not there. "" when all are."""
        if self._planner is None or not self._planner.absent_roots:
            return ""
        return self._planner.why_absent(min(self._planner.absent_roots))

    def problems(self) -> list[str]:
        """What could not be read here or kept there."""
        mine = self._planner.summaries() if self._planner else []
        return mine + [f"{self._peer.node}: {text}" for text in texts(self.unkept)]

    async def wait_durable(self, mark: int, timeout: float) -> None:
        """Return when everything marked below ``mark`` is durable on the replica; raises NotInTime with the cause."""

        def done() -> bool:
            lowest = self._dirty.lowest_mark()
            # What a new connection puts in doubt may have changed long before it was marked.
            settled = lowest is None or lowest >= max(mark, self._doubts_below)
            return self.connected and self.compared and settled and not self._absent()

        try:
            async with asyncio.timeout(timeout), self._progress:
                await self._progress.wait_for(done)
        except TimeoutError:
            raise NotInTime(
                f"flush of group {self._group}",
                timeout,
                self._absent() or f"{self._dirty.count()} paths to go; {self.reason}",
            ) from None

    # --- the loop

    async def run(self) -> None:
        """Connect, send, and connect again, until cancelled or until the replica knows a newer epoch."""
        delay = _BACKOFF[0]
        try:
            while True:
                started = time.monotonic()
                try:
                    await self._connect_and_send()
                except StaleEpoch as error:
                    self.reason = str(error)
                    self._on_stale(error.args[2])
                    return
                except (FarshoreError, OSError) as error:
                    text = str(error) or type(error).__name__
                    if text != self.reason:
                        _log.warning("not replicating", group=self._group, reason=text)
                    self.reason = text
                except Exception as error:
                    # A fault of ours in one file must not end the protection of all others.
                    _log.error("sending failed", error, group=self._group)
                    self.reason = f"internal error: {error}"
                    if is_damage(error):
                        await self._in_worker(self._replace_index)
                if time.monotonic() - started > 10:
                    delay = _BACKOFF[0]
                await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                delay = min(2 * delay, _BACKOFF[1])
        finally:
            # Whoever comes next opens the same files.
            await asyncio.shield(self._loop.run_in_executor(self._worker, self._close_index))
            self._worker.shutdown(wait=False)

    def _close_index(self) -> None:
        index, self._index = self._index, None
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.close()
        if index is not None:
            index.close()

    def _replace_index(self) -> None:
        """Begin a new index, as a full comparison can rebuild all that a damaged one held."""
        with contextlib.suppress(sqlite3.Error):
            self._close_index()
        aside = set_aside(self._index_path)
        _log.error("the index was damaged; a new one is begun", group=self._group, kept=aside)

    def _open_index(self) -> tuple[Index, Planner]:
        if self._index is None or self._planner is None:
            try:
                self._index = Index(self._index_path)
            except IndexDamaged:
                self._replace_index()
                self._index = Index(self._index_path)
            self._pending = _Pending(self._pending_path)
            self._planner = Planner(self._index, [root for _, root in self._roots], self._epoch)
        return self._index, self._planner

    async def _connect_and_send(self) -> None:
        reader, writer = await tls.connect(self._peer, self._context)
        tune(writer)
        _detect_death(writer)
        try:
            await self._session(reader, writer)
        finally:
            self.connected = False
            if self._blocks is not None:
                self._sent_before += self._blocks.wire_bytes
                self._blocks = None
            writer.close()
            await self._give_back()

    async def _give_back(self) -> None:
        """What was not acknowledged is dirty again."""
        works, self._works = list(self._works), {}
        self._batches.clear()
        self._ended.clear()
        self._flights.clear()
        try:
            await asyncio.shield(self._loop.run_in_executor(self._worker, self._rollback))
        finally:
            self._dirty.restore(work.item for work in works)
            if works:
                self._wake.set()

    def _rollback(self) -> None:
        if self._planner is not None:
            self._planner.forget_jobs()
        if self._index is not None:
            self._index.rollback()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names = [name for name, _ in self._roots]
        writer.write(wire.frame(Hello(wire.PROTOCOL, self._group, self._epoch, names)))
        welcome = await self._handshake(reader)
        self._blocks = BlockWriter(writer, compress=self._compress, pacer=self._pacer)
        inbox = _Inbox(reader, self._peer.node)
        self._on_confirmed()
        index, planner = await self._in_worker(self._open_index)
        planner.owners = Leaving(self._owners)
        if self.unkept:
            self.unkept = []
        hints = await self._in_worker(self._resume, index, planner, welcome)
        if hints is None:
            await self._compare(inbox, index, welcome)
            hints = dirty_everything(range(len(self._roots)))
            planner.looked_at = 0
        elif not self.compared:
            # Nobody watched before this process began, and the watcher may take long to start.
            hints = [*hints, *dirty_everything(range(len(self._roots)))]
        self._dirty.mark(hints, time.monotonic())
        self._doubts_below = self._dirty.next_mark()
        self.connected = self.compared = True
        self.reason = "replicating"
        self._told_in_step = False
        self._last = self.seq
        self._uncommitted = 0
        self._drain = False
        self._heard = time.monotonic()
        self._answers = asyncio.Queue()
        self._uploads = Uploads([root for _, root in self._roots], self, welcome.uploads)
        _log.info("replicating", group=self._group, to=self._peer.node, epoch=self._epoch)
        await _until_one_ends(
            self._listen(inbox, index, planner), self._follow(index, planner), self._uploads.run(), self._mind()
        )

    async def _handshake(self, reader: asyncio.StreamReader) -> Welcome:
        try:
            async with asyncio.timeout(_PONG_SECONDS):
                welcome = await _CODEC.read(reader, self._peer.node)
        except TimeoutError:
            raise PeerUnreachable(self._peer.node, f"no answer within {_PONG_SECONDS:g} s") from None
        welcome = self._checked(welcome)
        if not isinstance(welcome, Welcome):
            raise ProtocolError(self._peer.node, f"{type(welcome).__name__} instead of Welcome")
        return welcome

    def _resume(self, index: Index, planner: Planner, welcome: Welcome) -> list[Hint] | None:
        """What must be looked at before the index can be relied on again; None when it must be made anew.

        The replica may have begun transactions whose acknowledgement never came. What they change was written down
        before they were sent.
        """
        self.seq = int(index.get_fact(SEQ) or b"0")
        if index.get_fact(LINEAGE) != welcome.lineage or self._pending is None:
            return None
        if (index.get_fact(_OWNERS) or b"") != self._owners_mark:
            # Whose the replica's files are was told in another way.
            return None
        if welcome.started == self.seq:
            return []
        sent = self._pending.between(self.seq, welcome.started)
        if not sent or any(each.drastic for each in sent):
            return None
        self.seq = welcome.started
        index.begin()
        hints = planner.doubt({path for each in sent for path in each.paths})
        index.set_fact(SEQ, str(self.seq).encode())
        index.commit()
        self._pending.clear()
        return hints

    async def _compare(self, inbox: _Inbox, index: Index, welcome: Welcome) -> None:
        """Learn what the replica has, as another history made it; then every path is looked at."""
        self.comparing = True
        self.reason = "comparing in full"
        _log.info("comparing in full", group=self._group, with_=self._peer.node)
        await self._in_worker(index.begin)
        await self._in_worker(index.clear)
        await self.send([wire.frame(ListTree(digests=not welcome.was_in_step))])
        owners = Arriving(self._owners)
        while True:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    part = self._checked(await inbox.next())
            except TimeoutError:
                raise PeerUnreachable(self._peer.node, f"no answer within {_ANSWER_SECONDS:g} s") from None
            if isinstance(part, Names):
                owners.learn(part)
                continue
            if isinstance(part, Unkept):
                self.unkept = part.causes
                continue
            if not isinstance(part, Entries):
                raise ProtocolError(self._peer.node, f"{type(part).__name__} instead of Entries")
            # What is too long to be named cannot be told about either; it goes with what it lies in.
            entries = await self._in_worker(owners.listed, part.entries)
            known = [self._known(entry) for entry in entries if len(entry.path) <= MAX_PATH]
            await self._in_worker(index.put_all, known)
            if part.last:
                break
        self.seq = welcome.started
        await self._in_worker(index.set_fact, LINEAGE, welcome.lineage)
        await self._in_worker(index.set_fact, _OWNERS, self._owners_mark)
        await self._in_worker(self._commit_index, index)

    def _commit_index(self, index: Index) -> None:
        index.set_fact(SEQ, str(self.seq).encode())
        index.commit()
        if self._pending is not None:
            self._pending.clear()

    def _known(self, entry: Entry) -> Known:
        try:
            kind = FileKind(entry.kind)
        except ValueError:
            raise ProtocolError(self._peer.node, f"{entry.kind} is no kind of file") from None
        if not 0 <= entry.root < len(self._roots):
            raise ProtocolError(self._peer.node, f"root {entry.root} of {len(self._roots)}")
        meta = entry.meta
        try:
            paths.check(entry.path)
        except UnsafePath as error:
            raise ProtocolError(self._peer.node, str(error)) from None
        numbers = (meta.mode, meta.uid, meta.gid, entry.size, entry.nlink)
        if not all(0 <= number < 1 << 63 for number in numbers) or not 0 <= entry.rdev < 1 << 64:
            raise ProtocolError(self._peer.node, f"{entry.path!r}: a number is out of range")
        return Known(
            root=entry.root,
            path=entry.path,
            kind=kind,
            mode=meta.mode,
            uid=meta.uid,
            gid=meta.gid,
            size=entry.size,
            mtime_ns=clamp_time(meta.mtime_ns),
            ctime_ns=0,
            dev=0,
            ino=0,
            nlink=entry.nlink,
            rdev=entry.rdev,
            target=entry.target,
            xattrs=tuple(meta.xattrs),
            digest=entry.digest,
        )

    # --- following

    async def _follow(self, index: Index, planner: Planner) -> None:
        """Send what changes, without waiting for more than must be waited for."""
        while True:
            self._wake.clear()
            self._acked.clear()
            if self._uncommitted and not self._flights:
                await self._commit(index)
            if self._must_drain() or self._is_full():
                await self._acked.wait()
                continue
            if self._batches or self._dirty.waiting():
                hold = self._gather()
                if hold > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(hold):
                            await self._acked.wait()
                await self._transaction(index, planner, self._next_batch())
                continue
            if not self._works:
                await self._tell_in_step(index)
            await self._wake.wait()

    def _must_drain(self) -> bool:
        """True while nothing may follow what is on its way, so that the index can be committed.

        After a drastic transaction, as what one changed cannot be told path by path if its acknowledgement is lost.
        """
        if not self._flights:
            self._drain = False
        elif self._uncommitted > _COMMIT_PATHS or time.monotonic() - self._committed_at > _COMMIT_SECONDS:
            self._drain = True
        return self._drain

    def _is_full(self) -> bool:
        return (
            sum(flight.operations for flight in self._flights) >= _FLIGHT_OPERATIONS
            or sum(flight.size for flight in self._flights) >= _FLIGHT_BYTES
        )

    def _gather(self) -> float:
        """Seconds for which what has changed should wait for company: none when nothing is on its way."""
        if not self._flights or self._batches or self._dirty.waiting() >= _ENOUGH:
            return 0.0
        operations = sum(flight.operations for flight in self._flights)
        return min(_GATHER_MOST, _GATHER_SECONDS + _GATHER_PER_OPERATION * operations)

    def _next_batch(self) -> Batch:
        """The newest, then the oldest by turns: a full scan of hours does not hold up what changes now.

        Something must wait, or be left of what was taken.
        """
        items = self._dirty.take(_TAKE)
        if items:
            batch = Batch.of(items)
            self._works.update(dict.fromkeys(batch.works))
            self._batches.append(batch)
        self._oldest_next = not self._oldest_next and not items
        return self._batches[0 if self._oldest_next else -1]

    async def _transaction(self, index: Index, planner: Planner, batch: Batch) -> None:
        async with self._between:
            plan = await self._in_worker(self._plan, index, planner, batch, self._last + 1)
            if plan.frames:
                if not self._flights and not self._uncommitted:
                    self._committed_at = time.monotonic()
                self._last = plan.seq
                self._uncommitted += len(plan.changed)
                self._flights.append(_Flight(plan.seq, plan.operations, sum(map(len, plan.frames))))
                self._drain |= plan.drastic
            elif not self._uncommitted:
                # Only what the index knows of this side has changed.
                await self._in_worker(index.commit)
            for work in plan.ended:
                # Also when it sent nothing: that it needs nothing may be due to what is still on its way.
                work.seq = self._last
            self._ended.extend(plan.ended)
            if batch.finished:
                self._batches.remove(batch)
            if plan.loose or plan.frames:
                await self.send([*plan.loose, *plan.frames])
        assert self._uploads is not None
        self._uploads.ended(plan.uploads)
        for job in planner.new_jobs:
            self._uploads.add(job)
        planner.new_jobs.clear()
        again, planner.again = planner.again, []
        if again:
            self._dirty.mark(again, time.monotonic())
        await self._settle()

    def _plan(self, index: Index, planner: Planner, batch: Batch, seq: int) -> Planned:
        index.begin()
        plan = planner.transaction(batch, seq)
        if plan.frames and self._pending is not None:
            self._pending.add(plan)
        return plan

    async def _commit(self, index: Index) -> None:
        await self._in_worker(self._commit_index, index)
        self._uncommitted = 0
        self._committed_at = time.monotonic()

    async def _tell_in_step(self, index: Index) -> None:
        self.comparing = False
        if not self._told_in_step and not self._absent():
            self._told_in_step = True
            await self.send([wire.frame(InStep())])
            _log.info("in step", group=self._group, paths=await self._in_worker(index.count))
        await self._note_progress()

    async def _settle(self) -> None:
        """What ended, and is durable there with all that was sent before it, is done."""
        settled = []
        while self._ended and self._ended[0].seq <= self.seq:
            work = self._ended.popleft()
            self._works.pop(work, None)
            settled.append(work.item)
        if settled:
            self._dirty.settle(settled)
            if not self._works and not self._dirty.waiting():
                self.comparing = False
            await self._note_progress()

    # --- listening

    async def _listen(self, inbox: _Inbox, index: Index, planner: Planner) -> None:
        while True:
            message = self._checked(await inbox.next())
            self._heard = time.monotonic()
            match message:
                case Ack(seq=seq):
                    if not self.seq < seq <= self._last:
                        raise ProtocolError(self._peer.node, f"Ack({seq}) after {self.seq} of {self._last}")
                    self._naks = 0
                    self.seq = seq
                    while self._flights and self._flights[0].seq <= seq:
                        self._flights.popleft()
                    await self._settle()
                    self._acked.set()
                    self._wake.set()
                case Nak():
                    await self._refused(index, planner, message)
                case SignaturePart() | NoSignature():
                    if not self._asking.locked():
                        raise ProtocolError(self._peer.node, "a signature that nobody wants")
                    self._answers.put_nowait(message)
                case Uploaded(upload=number):
                    if self._uploads is not None:
                        self._uploads.uploaded(number)
                case Unkept(causes=causes):
                    self.unkept = causes
                case Pong():
                    pass
                case _:
                    raise ProtocolError(self._peer.node, f"{type(message).__name__} now")

    async def _mind(self) -> None:
        """Notice a replica that is silent for too long."""
        asked = 0.0
        while True:
            await asyncio.sleep(1)
            silent = time.monotonic() - self._heard
            waiting = bool(self._flights) or self._asking.locked()
            limit = _ANSWER_SECONDS if waiting else _PING_SECONDS + _PONG_SECONDS
            if silent > limit:
                raise PeerUnreachable(self._peer.node, f"no answer within {limit:g} s")
            if silent > _PING_SECONDS and not waiting and asked < self._heard:
                asked = time.monotonic()
                await self.send([wire.frame(Ping())])

    async def _refused(self, index: Index, planner: Planner, nak: Nak) -> NoReturn:
        """Raises PeerRefused or ReplicaCannot: a new connection finds out how far the replica came."""
        if not nak.unknown_base:
            raise ReplicaCannot(self._peer.node, nak.reason)
        _log.warning("the replica differs from the index", group=self._group, path=nak.path, reason=nak.reason)
        # What may still be planned meanwhile is rolled back when the connection ends.
        await self._in_worker(self._distrust, index, planner, nak)
        raise PeerRefused(self._peer.node, nak.reason)

    def _distrust(self, index: Index, planner: Planner, nak: Nak) -> None:
        index.rollback()
        index.begin()
        self._naks += 1
        if self._naks > 1:
            # Doubting one path did not help: what is known of the replica is wrong on a larger scale.
            self._naks = 0
            index.clear()
        else:
            self._dirty.mark(planner.doubt([(nak.root, nak.path)]), time.monotonic())
        index.commit()

    def _checked(self, message: FromReplica | None) -> FromReplica:
        """The message; the end of the stream, and Refused, are raised as the errors that they stand for."""
        if message is None:
            raise PeerUnreachable(self._peer.node, "it closed the connection")
        if isinstance(message, Refused):
            if message.stale:
                raise StaleEpoch(self._group, self._epoch, message.epoch)
            raise PeerRefused(self._peer.node, message.reason)
        return message

    # --- what uploads need

    def between(self) -> AbstractAsyncContextManager[object]:
        """While entered, no transaction is planned or sent."""
        return self._between

    async def known_base(self, job: Job) -> Known | None:
        """The index's entry of the job's base."""
        return await self._in_worker(lambda: None if self._index is None else self._index.get(job.root, job.base))

    async def known_signature(self, job: Job) -> bytes | None:
        """The index's signature of the job's base."""

        def look() -> bytes | None:
            return None if self._index is None else self._index.get_signature(job.root, job.base)

        return await self._in_worker(look)

    async def ask_signature(self, job: Job) -> bytes | None:
        """The signature exchange of the paper: what the replica has as the job's base."""
        known = await self.known_base(job)
        most = _SIGNATURE_BYTES + int((known.size if known else 0) * _SIGNATURE_SHARE)
        async with self._asking:
            await self.send([wire.frame(WantSignature(job.root, job.base))])
            blob = bytearray()
            while True:
                part = await self._answers.get()
                if not isinstance(part, SignaturePart):
                    return None
                blob += part.data
                if len(blob) > most:
                    raise ProtocolError(self._peer.node, f"a signature of more than {most} bytes")
                if part.last:
                    return bytes(blob)

    async def send(self, frames: list[bytes]) -> None:
        """Send frames; returns when more may follow."""
        if self._blocks is None:
            raise PeerUnreachable(self._peer.node, "the connection is closed")
        await self._blocks.send(frames)

    def piece(self) -> int:
        """Bytes of content to send at once."""
        return min(wire.CHUNK, self._pacer.piece())

    async def done(self, job: Job) -> None:
        """A large file was read, and sent when need be."""
        if self._planner is not None:
            # In the worker: there, somebody may be about to wait for this job.
            self._batches.append(await self._in_worker(self._planner.deliver, job))
            self._wake.set()

    async def _note_progress(self) -> None:
        async with self._progress:
            self._progress.notify_all()

    async def _in_worker(self, call: Callable[..., _T], *args: object) -> _T:
        return await self._loop.run_in_executor(self._worker, call, *args)


async def _until_one_ends(*parts: Coroutine[object, object, None]) -> None:
    """Run all until one raises, and end the others; that error is raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # The first of them is the one that listens: it knows best why the connection ended.
    for task in tasks:
        if task in done:
            task.result()


def _detect_death(writer: asyncio.StreamWriter) -> None:
    """Let TCP notice a peer that is gone, also when nothing is sent."""
    sock = writer.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_SECONDS * 1000)
