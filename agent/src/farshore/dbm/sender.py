"""The source's end of a group's stream: connect, compare once in full, then follow.

Transactions follow each other without waiting for the replica's acknowledgements. The index is ahead of the replica:
it tells what the replica will have. It is committed when everything on its way was acknowledged, and after a cut rolled
back to there; what was on its way then is in doubt, and is looked at anew. Everything that blocks (disk, index, delta)
happens in worker threads; the event loop only moves frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sqlite3
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import msgspec

from farshore import durable, tls
from farshore.config import Bandwidth, NodeRef
from farshore.dbm import wire
from farshore.dbm.bandwidth import Pacer
from farshore.dbm.blocks import BlockReader, BlockWriter, tune
from farshore.dbm.census import Census
from farshore.dbm.index import LINEAGE, OPEN, ROOTS, SEQ, Index, IndexDamaged, Known, clamp_time, is_damage, set_aside
from farshore.dbm.messages import (
    Ack,
    Applied,
    Cause,
    Digests,
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
    Seen,
    SignaturePart,
    Surveyed,
    Unkept,
    Uploaded,
    WantSignature,
    Welcome,
)
from farshore.dbm.owners import Arriving, Leaving, Owners
from farshore.dbm.planner import MAX_OPERATIONS, MAX_PATH, Planned, Planner, dirty_everything
from farshore.dbm.replica import paths
from farshore.dbm.roots import names_of
from farshore.dbm.snapshots import Snapshots
from farshore.dbm.state import Cycle, merged
from farshore.dbm.unkept import texts
from farshore.dbm.uploads import Uploads
from farshore.dbm.verify.verifier import Verifier
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
from farshore.fmm.dirty import Dirty, DirtySet
from farshore.fmm.types import FileKind, Hint, Root
from farshore.log import Log

_T = TypeVar("_T")
_log = Log(__name__)
_CODEC: wire.Codec[FromReplica] = wire.Codec(FromReplica)

_PING_SECONDS = 5.0
_MIND_SECONDS = 2.5
#: Seconds between looks at what could not be read.
_UNREAD_SECONDS = 30.0
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
_ALL = 1 << 62
#: Seconds for which the watcher may be asked, and after which a snapshot that failed is tried again.
_BARRIER_SECONDS = 60.0
#: So long, the first look at everything waits for the watcher.
_WATCHER_SECONDS = 10.0
#: The watcher may be so late to tell of a change on a busy machine.
_SEEN_SECONDS = 0.5
_AGAIN_SECONDS = 1.0
#: Files that are too young are looked after at least so often.
_MATURE_SECONDS = 1.0


class ReplicaCannot(FarshoreError):
    """{0} cannot take the change: {1}"""


class _Sent(msgspec.Struct, frozen=True):
    """What a transaction changes, written down before it leaves."""

    seq: int
    drastic: bool
    paths: list[tuple[int, bytes]]


class _Pending:
    """The transactions that left since the index was committed.

    Not synced: losing it in a power cut costs a full comparison, nothing else. But numbers are used again, for
    transactions of a connection that were never begun: what was written down of those must not come back.
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

    def reset(self) -> None:
        """A connection begins: what is in it does not count any more, nor after a power cut. Raises OSError."""
        self.clear()
        os.fsync(self._file.fileno())

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

    With ``snapshots``, whole states are sent, each read from a snapshot; ``barrier`` then returns when everything that
    changed before it was called is marked in ``dirty``. ``watched`` returns when the watcher has put all in doubt, as
    it does when it begins, or cannot.
    """

    def __init__(
        self,
        group: str,
        epoch: int,
        peer: NodeRef,
        context: ssl.SSLContext | tls.Credentials,
        roots: list[tuple[str, Root]],
        index_path: Path,
        dirty: DirtySet,
        on_confirmed: Callable[[], None],
        on_stale: Callable[[int], None],
        bandwidth: Bandwidth | None = None,
        compress: bool = True,
        snapshots: Snapshots | None = None,
        barrier: Callable[[], Awaitable[int]] | None = None,
        owners: Owners | None = None,
        watched: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._group = group
        self._epoch = epoch
        self._peer = peer
        self._context = context
        self._roots = roots
        self._root_names = names_of(roots)
        self._dirty = dirty
        self._on_confirmed = on_confirmed
        self._on_stale = on_stale
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"source-{group}")
        self._counter = ThreadPoolExecutor(1, thread_name_prefix=f"census-{group}")
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
        #: What the planner has others do; and those of the first that are not done yet.
        self._censuses: asyncio.Queue[Census] = asyncio.Queue()
        self._missed: asyncio.Queue[list[tuple[int, bytes, Work]]] = asyncio.Queue()
        self._counting: list[Census] = []
        self._looked = asyncio.Event()
        self._wake = asyncio.Event()
        self._acked = asyncio.Event()
        self._is_waking = False
        self._progress = asyncio.Condition()
        self._told_in_step = False
        self._doubts_below = 0
        self._naks = 0
        #: What the replica left out and was sent anew since it was last in step.
        self._doubted: set[tuple[int, bytes]] = set()
        self._snapshots = snapshots
        self._barrier = barrier
        self._watched = watched
        self._cycle: Cycle | None = None
        self._next_cycle = 0.0
        #: What changed before is durable there: when the snapshot of the last complete state was about to be taken.
        self._state_of = float("-inf")
        #: The last transaction that was sent, or one before this process began, said that more belongs to its state.
        self._open = False
        #: All marks below must be settled as soon as may be.
        self._wanted = 0
        #: Why no snapshot can be taken now; "" when nothing stands in the way.
        self.stuck = ""
        self.connected = False
        self.comparing = False
        self.compared = False
        self.reason = "not connected yet"
        #: The last transaction that the replica has made durable, and the last that its tree has.
        self.seq = 0
        self.applied = 0
        #: Why the replica's tree takes up nothing more, "" if it does.
        self.stalled = ""
        self._sent_before = 0
        #: Metadata that the replica could not keep, as it has told.
        self.unkept: list[Cause] = []
        #: Verifies over our connection, when it is given.
        self.verifier: Verifier | None = None

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

    def adopt(self, bandwidth: Bandwidth, compress: bool) -> None:
        """Another limit holds from now on, and the other from the next connection on."""
        self._pacer.adopt(bandwidth)
        self._compress = compress

    def oldest(self) -> float | None:
        """When the oldest change was made that may not be durable there; None when all that was seen is."""
        marked = self._dirty.oldest()
        if marked is None or self._snapshots is None:
            return marked
        return max(marked - _SEEN_SECONDS, self._state_of)

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

    def why_absent(self, root: int) -> str:
        """Why a protected path is not there; "" when it is."""
        if self._planner is None or root not in self._planner.absent_roots:
            return ""
        return self._planner.why_absent(root)

    def problems(self) -> list[str]:
        """What could not be read here or kept there."""
        mine = self._planner.summaries() if self._planner else []
        mine += [self.stuck] if self.stuck else []
        mine += self._snapshots.problems() if self._snapshots else []
        stalled = [f"cannot apply what it has received: {self.stalled}"] if self.stalled else []
        return mine + [f"{self._peer.node}: {text}" for text in [*stalled, *texts(self.unkept)]]

    async def wait_durable(self, mark: int, timeout: float, *, applied: bool) -> None:
        """Return when everything marked below ``mark`` is durable on the replica, and, if ``applied``, in its tree.

        Raises NotInTime with the cause.
        """
        until: int | None = None

        def done() -> bool:
            nonlocal until
            lowest = self._dirty.lowest_mark()
            # What a new connection puts in doubt may have changed long before it was marked.
            wanted = max(mark, self._doubts_below)
            if self._wanted < wanted:
                # A snapshot is taken for it, without waiting until it is time for one.
                self._wanted = wanted
                self._wake.set()
            settled = lowest is None or lowest >= wanted
            if not (self.connected and self.compared and settled and not self._absent()):
                until = None
                return False
            if until is None:
                until = self.seq
            return not applied or self.applied >= until

        try:
            async with asyncio.timeout(timeout), self._progress:
                await self._progress.wait_for(done)
        except TimeoutError:
            raise NotInTime(
                f"flush of group {self._group}",
                timeout,
                self._absent() or self._to_go(),
            ) from None

    def _to_go(self) -> str:
        """What a flush waits for."""
        count = self._dirty.count()
        if count == 0 and self.connected:
            return f"all is durable on {self._peer.node}, but not in its tree yet; {self.stalled or 'it is at work'}"
        return f"{count} paths to go; {self.stuck or self.reason}"

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
            self._counter.shutdown(wait=False, cancel_futures=True)
            if self._snapshots is not None:
                # A snapshot that is under way ends first, and whoever stands still for it is awake then.
                await asyncio.shield(self._loop.run_in_executor(self._snapshots.thread, self._snapshots.recover))

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
            doubtful = self._index.begin_boot(durable.boot_id())
            if doubtful:
                _log.info("read again, as the machine was started anew", group=self._group, files=doubtful)
            self._pending = _Pending(self._pending_path)
            self._planner = Planner(self._index, [root for _, root in self._roots], self._epoch, assisted=True)
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
        cycle, self._cycle = self._cycle, None
        for census in self._counting:
            census.stop()
        self._batches.clear()
        self._ended.clear()
        self._flights.clear()
        try:
            await asyncio.shield(self._loop.run_in_executor(self._worker, self._rollback))
        finally:
            self._dirty.restore(work.item for work in works)
            if cycle is not None:
                self._dirty.restore([*cycle.own, *cycle.later])
                self._next_cycle = 0.0
            self._drop_snapshot()
            if works or cycle is not None:
                self._wake.set()

    def _drop_snapshot(self) -> None:
        """Remove the snapshot in the background: its thread does things in order."""
        if self._snapshots is not None:
            self._snapshots.thread.submit(self._snapshots.try_drop)

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
        self.applied = welcome.applied
        self.stalled = ""
        self.unkept = []
        planner.owners = Leaving(self._owners)
        hints = await self._in_worker(self._resume, index, planner, welcome)
        if hints is None:
            await self._compare(inbox, index, welcome)
            hints = dirty_everything(range(len(self._roots)))
            planner.looked_at = 0
        elif not self.compared:
            # Nobody watched before this process began, nor does anybody before the watcher has started.
            await self._await_watcher()
            hints = [*hints, *dirty_everything(range(len(self._roots)))]
        if self._pending is not None:
            await self._in_worker(self._pending.reset)
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
        self._censuses = asyncio.Queue()
        self._missed = asyncio.Queue()
        self._counting = []
        self._uploads = Uploads(planner.view, self, welcome.uploads)
        self._open = await self._in_worker(self._note_open, index)
        follow = self._follow if self._snapshots is None else self._follow_states
        _log.info("replicating", group=self._group, to=self._peer.node, epoch=self._epoch)
        parts = [
            self._listen(inbox, index, planner),
            follow(index, planner),
            self._uploads.run(),
            self._take_censuses(planner),
            self._seek_missed(planner),
            self._mind(),
        ]
        if any(root.min_age for _, root in self._roots):
            parts.append(self._mature(planner))
        if self.verifier is not None:
            parts.append(self.verifier.session(self))
        await _until_one_ends(*parts)

    async def _await_watcher(self) -> None:
        """Not to look at everything for it once more; but it may take long to start."""
        if self._watched is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCHER_SECONDS):
                    await self._watched()

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

        The replica may have taken transactions whose acknowledgement never came. What they change was written down
        before they were sent. And it tells which paths do not hold what they should.
        """
        self.seq = int(index.get_fact(SEQ) or b"0")
        if index.get_fact(LINEAGE) != welcome.lineage or self._pending is None:
            return None
        if (index.get_fact(_OWNERS) or b"") != self._owners_mark:
            # Whose the replica's files are was told in another way.
            return None
        if index.get_fact(ROOTS) != self._root_names:
            # Its numbers stand for other paths.
            return None
        doubts = [(root, path) for root, path in welcome.doubts if 0 <= root < len(self._roots)]
        if any(each in self._doubted or self._is_directory(index, each) for each in doubts):
            # Sending it anew did not help, or what is missing is a directory: more is wrong than one path.
            self._doubted.clear()
            return None
        self._doubted.update(doubts)
        if welcome.started != self.seq:
            sent = self._pending.between(self.seq, welcome.started)
            if not sent or any(each.drastic for each in sent):
                return None
            self.seq = welcome.started
            doubts += [path for each in sent for path in each.paths]
        if not doubts:
            return []
        index.begin()
        hints = planner.doubt(set(doubts))
        index.set_fact(SEQ, str(self.seq).encode())
        index.commit()
        self._pending.clear()
        return hints

    @staticmethod
    def _is_directory(index: Index, path: tuple[int, bytes]) -> bool:
        known = index.get(*path)
        return known is not None and known.kind is FileKind.DIRECTORY

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
            if isinstance(part, Pong):
                # It has still to apply what it has accepted.
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
        await self._in_worker(index.set_fact, ROOTS, self._root_names)
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
                if self._open:
                    await self._end_state(planner, index)
                    continue
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
                self._note_flight(plan)
            elif not self._uncommitted:
                # Only what the index knows of this side has changed.
                await self._in_worker(index.commit)
            for work in plan.ended:
                # Also when it sent nothing: that it needs nothing may be due to what is still on its way.
                work.seq = self._last
            if self._cycle is None:
                self._ended.extend(plan.ended)
            else:
                self._cycle.left -= len(plan.ended)
            if batch.finished:
                self._batches.remove(batch)
            if plan.loose or plan.frames:
                await self.send([*plan.loose, *plan.frames])
        assert self._uploads is not None
        self._uploads.ended(plan.uploads)
        for job in planner.new_jobs:
            self._uploads.add(job)
        planner.new_jobs.clear()
        for census in planner.new_census:
            self._counting.append(census)
            self._censuses.put_nowait(census)
        planner.new_census.clear()
        if planner.missed:
            self._missed.put_nowait(planner.missed)
            planner.missed = []
        self._looked.set()
        again, planner.again = planner.again, []
        if again:
            self._dirty.mark(again, time.monotonic())
        await self._settle()

    def _note_flight(self, plan: Planned) -> None:
        """A transaction is about to leave."""
        if not self._flights and not self._uncommitted:
            self._committed_at = time.monotonic()
        self._last = plan.seq
        # At least one: also what changes nothing has a number, which is committed.
        self._uncommitted += max(1, len(plan.changed))
        self._flights.append(_Flight(plan.seq, plan.operations, sum(map(len, plan.frames))))
        self._drain |= plan.drastic
        self._open = plan.more

    def _plan(self, index: Index, planner: Planner, batch: Batch, seq: int) -> Planned:
        index.begin()
        cycle = self._cycle
        # Large files that are still read, and batches that wait, leave works behind that have not ended.
        plan = planner.transaction(batch, seq, None if cycle is None else lambda plan: cycle.left > len(plan.ended))
        if plan.frames:
            self._write_down(index, plan)
        return plan

    def _write_down(self, index: Index, plan: Planned) -> None:
        """Note what is about to leave; with the first that no state goes on behind, none is open on the replica."""
        if self._open and self._snapshots is None:
            index.set_fact(OPEN, b"0")
        if self._pending is not None:
            self._pending.add(plan)

    async def _commit(self, index: Index) -> None:
        await self._in_worker(self._commit_index, index)
        self._uncommitted = 0
        self._committed_at = time.monotonic()

    async def _tell_in_step(self, index: Index) -> None:
        self.comparing = False
        if not self._told_in_step and not self._absent():
            self._told_in_step = True
            self._doubted.clear()
            if self._planner is not None:
                await self._in_worker(self._planner.note_rules)
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

    # --- what the planner has others do

    async def _take_censuses(self, planner: Planner) -> None:
        """Compare parts of the tree by directories, while transactions go on."""
        while True:
            census = await self._censuses.get()
            started = time.monotonic()
            await self._loop.run_in_executor(self._counter, census.run)
            self._batches.append(await self._in_worker(planner.take_up, census))
            self._counting.remove(census)
            self._looked.set()
            self._wake.set()
            _log.debug(
                "compared by directories",
                group=self._group,
                path=census.path,
                differing=len(census.differing or ()),
                seconds=round(time.monotonic() - started, 2),
            )

    async def _seek_missed(self, planner: Planner) -> None:
        """Have removed what was missed, when everything that changed before was looked at."""
        while True:
            missed = await self._missed.get()
            mark = self._dirty.next_mark()
            if self._barrier is not None:
                # Where nothing is watched now, what is marked is all there is.
                with contextlib.suppress(FarshoreError, TimeoutError):
                    async with asyncio.timeout(_BARRIER_SECONDS):
                        mark = await self._barrier()
            await self._all_was_looked_at(mark)
            self._batches.append(await self._in_worker(planner.look_for_missed, missed))
            self._wake.set()

    async def _all_was_looked_at(self, mark: int) -> None:
        """Return when all was looked at that was marked below ``mark``, or was taken before."""
        await self._until_looked(lambda: not self._dirty.waits_below(mark))
        # What is taken later changed later, and is not waited for: that might never end.
        # Of what was taken, batches may begin censuses, whose results are batches again.
        await self._batches_end(self._batches[:])
        censuses = self._counting[:]
        await self._until_looked(lambda: not any(each in self._counting for each in censuses))
        await self._batches_end(self._batches[:])

    async def _batches_end(self, batches: list[Batch]) -> None:
        await self._until_looked(lambda: not any(each is there for each in batches for there in self._batches))

    async def _until_looked(self, condition: Callable[[], bool]) -> None:
        """Wait for what can only become true when something was looked at."""
        while not condition():
            self._looked.clear()
            await self._looked.wait()

    # --- whole states

    async def _follow_states(self, index: Index, planner: Planner) -> None:
        """As ``_follow``, but one snapshot after the other: all of it is one state of the replica."""
        while True:
            self._wake.clear()
            self._acked.clear()
            if self._uncommitted and not self._flights:
                await self._commit(index)
            cycle = self._cycle
            if cycle is None:
                await self._await_cycle(index, planner)
            elif self._must_drain() or self._is_full():
                await self._acked.wait()
            elif self._batches:
                await self._transaction(index, planner, self._batches[-1])
            elif cycle.left:
                await self._wake.wait()
            elif self._open:
                await self._end_state(planner, index)
            elif self._flights:
                await self._acked.wait()
            else:
                await self._end_cycle(index, planner, cycle)

    async def _await_cycle(self, index: Index, planner: Planner) -> None:
        """Begin a cycle if it is time for one, else wait for something to happen."""
        if not self._dirty.waiting():
            if self._open:
                # Nothing was given back, so nothing was cut off.
                await self._end_state(planner, index)
                return
            await self._tell_states_in_step(index)
            await self._wake.wait()
            return
        wait = self._next_cycle - time.monotonic()
        lowest = self._dirty.lowest_mark()
        if not self.stuck and lowest is not None and lowest < self._wanted:
            wait = 0.0
        if wait > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            return
        try:
            await self._begin_cycle(planner)
        except (FarshoreError, OSError, TimeoutError) as error:
            text = str(error) or "the watcher is still starting"
            if text != self.stuck:
                _log.warning("no snapshot", group=self._group, reason=text)
            self.stuck = text
            self._next_cycle = time.monotonic() + _AGAIN_SECONDS

    async def _begin_cycle(self, planner: Planner) -> None:
        """Take a snapshot, and all that was dirty before.

        What is marked between the first barrier and the second may have changed before the snapshot or after it: it is
        looked at with all else, and stays dirty. Raises what the snapshot raises, and TimeoutError when the watcher is
        silent.
        """
        assert self._snapshots is not None and self._barrier is not None and self._uploads is not None
        began = time.monotonic()
        own: list[Dirty] = []
        later: list[Dirty] = []
        try:
            async with asyncio.timeout(_BARRIER_SECONDS):
                await self._barrier()
            # Here and not by the clock: nothing is frozen, and no snapshot taken, for their sake alone.
            self._retry_unread()
            own = self._dirty.take(_ALL)
            taken = time.monotonic()
            view = await self._loop.run_in_executor(self._snapshots.thread, self._snapshots.take)
            async with asyncio.timeout(_BARRIER_SECONDS):
                await self._barrier()
            later = self._dirty.take(_ALL)
        except BaseException:
            self._dirty.restore([*own, *later])
            self._drop_snapshot()
            raise
        if self.stuck:
            _log.info("snapshots are taken again", group=self._group)
        self.stuck = ""
        self._next_cycle = began + self._snapshots.config.interval
        planner.view = self._uploads.view = view
        batch = Batch.of(merged(own, later))
        self._cycle = Cycle(own, later, len(batch.works), taken)
        self._batches = [batch]

    async def _end_state(self, planner: Planner, index: Index) -> None:
        """Tell the replica that the state is complete, with a transaction of its own."""
        async with self._between:
            plan = await self._in_worker(self._plan_end, index, planner, self._last + 1)
            self._note_flight(plan)
            await self.send(plan.frames)

    def _plan_end(self, index: Index, planner: Planner, seq: int) -> Planned:
        index.begin()
        plan = planner.end_of_state(seq)
        self._write_down(index, plan)
        return plan

    async def _end_cycle(self, index: Index, planner: Planner, cycle: Cycle) -> None:
        """All of a state is durable there, and complete."""
        self._cycle = None
        if planner.absent_roots:
            # Of what is not there, nothing was told; it is looked at again.
            self._dirty.restore(cycle.own)
        else:
            self._state_of = cycle.taken
        self._dirty.settle(cycle.own)
        self._dirty.restore(cycle.later)
        self._drop_snapshot()
        await self._tell_states_in_step(index)
        await self._note_progress()

    async def _tell_states_in_step(self, index: Index) -> None:
        """The replica has a whole state once all that was in doubt when the connection began is settled."""
        lowest = self._dirty.lowest_mark()
        if self._cycle is None and (lowest is None or lowest >= self._doubts_below):
            await self._tell_in_step(index)

    def _note_open(self, index: Index) -> bool:
        """Whether the replica may hold a state that is not complete; notes that it may from now on."""
        if self._snapshots is None:
            return index.get_fact(OPEN) == b"1"
        index.begin()
        index.set_fact(OPEN, b"1")
        index.commit()
        return True

    # --- listening

    async def _listen(self, inbox: _Inbox, index: Index, planner: Planner) -> None:
        owners = Arriving(self._owners)
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
                case Applied(seq=seq, stalled=stalled):
                    if seq > self.seq:
                        raise ProtocolError(self._peer.node, f"Applied({seq}) before it was acknowledged")
                    self.applied = max(self.applied, seq)
                    self.stalled = stalled
                    await self._note_progress()
                case Nak():
                    await self._refused(index, planner, message)
                case SignaturePart() | NoSignature():
                    if not self._asking.locked():
                        raise ProtocolError(self._peer.node, "a signature that nobody wants")
                    self._answers.put_nowait(message)
                case Uploaded(upload=number):
                    if self._uploads is not None:
                        self._uploads.uploaded(number)
                case Names():
                    owners.learn(message)
                case Seen() if self._owners is not None and self.verifier is not None:
                    entries = await self._in_worker(owners.listed, message.entries)
                    self.verifier.answered(msgspec.structs.replace(message, entries=entries))
                case Surveyed() | Digests() | Seen() if self.verifier is not None:
                    self.verifier.answered(message)
                case Unkept(causes=causes):
                    self.unkept = causes
                case Pong():
                    pass
                case _:
                    raise ProtocolError(self._peer.node, f"{type(message).__name__} now")

    async def _mind(self) -> None:
        """Notice a replica that is silent for too long, and a root, or what could not be read, that is there again."""
        asked, tried = 0.0, time.monotonic()
        while True:
            # Every second only while something is amiss: a source at rest should rest.
            await asyncio.sleep(1.0 if self._absent() or self._flights else _MIND_SECONDS)
            if self._planner is not None and self._planner.absent_roots:
                # One that was away for a moment only has not changed for the watcher.
                self._dirty.mark(dirty_everything(list(self._planner.absent_roots)), time.monotonic())
                self._wake.set()
            if time.monotonic() - tried >= _UNREAD_SECONDS and self._snapshots is None and self._retry_unread():
                tried = time.monotonic()
                self._wake.set()
            silent = time.monotonic() - self._heard
            waiting = bool(self._flights) or self._asking.locked()
            limit = _ANSWER_SECONDS if waiting else _PING_SECONDS + _PONG_SECONDS
            if silent > limit:
                raise PeerUnreachable(self._peer.node, f"no answer within {limit:g} s")
            if silent > _PING_SECONDS and not waiting and asked < self._heard:
                asked = time.monotonic()
                await self.send([wire.frame(Ping())])

    def _retry_unread(self) -> bool:
        """Have what could not be read looked at again; whether there is any of it."""
        hints = self._planner.unread() if self._planner is not None and self._planner.problems else []
        self._dirty.mark(hints, time.monotonic())
        return bool(hints)

    async def _mature(self, planner: Planner) -> None:
        """Have what was too young looked at when it is old enough."""
        while True:
            now = time.monotonic()
            hints = planner.young.due(now)
            if hints:
                self._dirty.mark(hints, now)
                self._wake.set()
            due = planner.young.next_due()
            await asyncio.sleep(_MATURE_SECONDS if due is None else min(_MATURE_SECONDS, max(0.02, due - now)))

    async def _refused(self, index: Index, planner: Planner, nak: Nak) -> NoReturn:
        """Raises PeerRefused or ReplicaCannot: a new connection finds out how far the replica came."""
        if not nak.unknown_base:
            raise ReplicaCannot(self._peer.node, nak.reason)
        _log.warning("the replica differs from the index", group=self._group, path=nak.path, reason=nak.reason)
        # What may still be planned meanwhile is rolled back when the connection ends.
        if nak.seq > self.seq or not nak.seq:
            # Otherwise it was taken, and left out later: the next Welcome tells.
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

    # --- what a verification needs

    @property
    def comparable(self) -> bool:
        """True when the index tells what the replica has, and everything that is protected is there."""
        return self.connected and self.compared and not self.comparing and not self.stalled and not self._absent()

    @property
    def all_acknowledged(self) -> bool:
        """True when nothing is on its way."""
        return not self._flights and self._cycle is None and not self._open

    async def with_index(self, call: Callable[[Index, Planner], _T]) -> _T:
        """Have ``call`` done in the worker, with the index as it will be when all that was sent has come through."""
        index, planner = self._index, self._planner
        if index is None or planner is None:
            raise PeerUnreachable(self._peer.node, "the connection is closed")
        return await self._in_worker(call, index, planner)

    def known(self, entry: Entry) -> Known:
        """What the index is to say of what the replica has told; raises ProtocolError."""
        return self._known(entry)

    def held(self, paths: Iterable[tuple[int, bytes]]) -> set[tuple[int, bytes]]:
        """Which of the paths are dirty, or on their way: all of them, while a state is not complete."""
        if self._cycle is not None or self._open:
            return set(paths)
        return self._dirty.held(paths)

    def doubt(self, hints: Sequence[Hint], changed: int) -> int:
        """So many entries of the index were changed, and these paths are to be looked at; returns a mark number."""
        if not self._flights and not self._uncommitted:
            self._committed_at = time.monotonic()
        self._uncommitted += changed
        self._dirty.mark(hints, time.monotonic())
        self._wake.set()
        return self._dirty.next_mark()

    async def wait_settled(self, mark: int) -> None:
        """Return when all that was marked below ``mark`` is durable on the replica."""

        def done() -> bool:
            lowest = self._dirty.lowest_mark()
            return lowest is None or lowest >= mark

        async with self._progress:
            await self._progress.wait_for(done)

    # --- what uploads need

    def between(self) -> AbstractAsyncContextManager[object]:
        """While entered, no transaction is planned or sent."""
        return self._between

    async def known_base(self, job: Job) -> Known | None:
        """The index's entry of the job's base; None when the replica has it in no place yet."""

        def look() -> Known | None:
            if self._index is None or self._planner is None or not self._planner.is_settled(job.root, job.base):
                return None
            return self._index.get(job.root, job.base)

        return await self._in_worker(look)

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
