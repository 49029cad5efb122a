"""The replica of one group: transactions are made durable in the journal, then applied to the trees, in order.

``accept`` makes transactions durable: from then on the source is told that they are there, and they survive a power
cut. ``work`` applies what has been accepted: what each operation finds is written down first (``undo``), so that
carrying it out once more after a crash ends alike, and so that there is a history (``history``). How far each tree
is, its own filesystem tells (``progress``). From time to time the trees are synced and the journal's mark is moved
(``checkpoint``).

An operation that the tree does not allow, as it is not what the source believes, is left out, and its path is in doubt:
the source is told, and sends anew what belongs there. When the disk is full, nothing is left out: applying stops, and
goes on once there is room.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import shutil
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from farshore import delta, durable
from farshore.config import History as Retention
from farshore.dbm import wire
from farshore.dbm.messages import (
    Cause,
    Entry,
    MakeDir,
    Move,
    Nak,
    Operation,
    Put,
    SetMeta,
)
from farshore.dbm.messages import Partial as PartialUpload
from farshore.dbm.owners import Owners
from farshore.dbm.reading import CheckedReader
from farshore.dbm.replica.brake import Hold
from farshore.dbm.replica.contents import Content, Inline, Opened
from farshore.dbm.replica.guard import Guard, Held
from farshore.dbm.replica.history import History, reserve_of
from farshore.dbm.replica.journal import Journal, Record
from farshore.dbm.replica.leaves import LeafStore
from farshore.dbm.replica.mark import Mark, Position
from farshore.dbm.replica.operator import Operator
from farshore.dbm.replica.paths import MAX_PATH
from farshore.dbm.replica.progress import Progress, name_of
from farshore.dbm.replica.repair import Repair
from farshore.dbm.replica.segments import Place
from farshore.dbm.replica.stage import Stage, Staged
from farshore.dbm.replica.tree import BaseUnknown, Tree
from farshore.dbm.replica.undo import Kept, Slicer, Step, Todo, steps
from farshore.dbm.replica.upload import Interrupted, Upload
from farshore.dbm.replica.view import View
from farshore.dbm.replica.within import Within
from farshore.dbm.unkept import Unkept
from farshore.errors import FarshoreError, ProtocolError, StateError, UnsafePath
from farshore.fmm.types import Root
from farshore.log import Log

_log = Log(__name__)
#: Uploads that are kept for the next connection, at most.
MAX_SUSPENDED = 16
#: Bytes of accepted transactions that are kept in memory until they are applied; what is more is read from the journal.
MEMORY_BYTES = 64 << 20
#: Bytes of accepted transactions after which no more are taken, unless they are held.
BACKLOG_BYTES = 512 << 20
#: The trees are synced after so many operations, so many bytes, or so many seconds.
CHECKPOINT_OPERATIONS = 50_000
CHECKPOINT_BYTES = 256 << 20
CHECKPOINT_SECONDS = 10.0
#: Bytes of memory that a transaction without operations counts for.
TRANSACTION_BYTES = 2000
#: Transactions of so few bytes are taken when others find too little room.
_SMALL_BYTES = 64 << 10
#: Where it is remembered that the source must compare.
_DIVERGED = "diverged"
#: Paths in doubt that are remembered one by one.
MAX_DOUBTS = 1000
#: These stop the applying; any other error leaves the operation out.
_STOPPING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR}
)
#: So often it is told what was applied, while much is.
_TELL_SECONDS = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ENTRIES_PER_FRAME = 200
#: Characters of the reason in a Nak.
_MAX_REASON = 1000
_OPERATIONS: wire.Codec[Operation] = wire.Codec(Operation)


@dataclass(slots=True)
class Transaction:
    """A transaction as it is staged: its operations, and the files that hold contents of them."""

    seq: int
    epoch: int
    operations: list[tuple[Operation, Staged | None]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    metadata: int = 0
    size: int = 0
    more: bool = False
    time_ns: int = 0
    #: The contents that it puts somewhere, for copies within it.
    within: Within = field(default_factory=Within)
    #: Paths whose content or existence it changes.
    touched: set[tuple[int, bytes]] = field(default_factory=set)

    def touch(self, operation: Operation) -> None:
        """Note what ``operation`` changes: other than a directory that is made, or metadata."""
        kind = type(operation)
        if kind is not MakeDir and kind is not SetMeta:
            self.touched.add((operation.root, operation.path))
            if isinstance(operation, Move):
                self.touched.add((operation.root, operation.to))

    def touches(self, root: int, path: bytes) -> bool:
        """Whether what is at ``path`` afterwards may not be what is there before."""
        touched = self.touched
        if not touched:
            return False
        while (root, path) not in touched:
            if not path:
                return False
            path = path.rpartition(b"/")[0]
        return True


@dataclass(slots=True)
class _Waiting:
    """A transaction that was accepted and is not applied; ``transaction`` is None when it has to be read again."""

    seq: int
    more: bool
    place: Place
    transaction: Transaction | None

    @property
    def size(self) -> int:
        """Bytes that it counts for: what it takes in the journal, and in memory, however little is in it."""
        return self.place.length + TRANSACTION_BYTES


class Listener:
    """Whoever wants to know what becomes of accepted transactions; called in the applier's thread."""

    def applied(self, seq: int, stalled: str) -> None:
        """All up to ``seq`` is applied.

        ``stalled`` says why nothing else is applied at the moment, "" if nothing stands in the way.
        """

    def doubted(self, nak: Nak) -> None:
        """An operation was left out."""


class Applier:
    """The replica of one group: its trees, its journal and history, and what is kept between connections.

    ``accept`` belongs to one thread, everything else to another one, the applier's; ``interrupt``, ``touches``,
    ``when_applied`` and what can be read of the state may be called from any. Raises StateError.
    """

    def __init__(
        self,
        roots: list[tuple[str, Root]],
        state: Path,
        retention: Retention | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        guard: Guard | None = None,
        unkept: Unkept | None = None,
        owners: Owners | None = None,
    ) -> None:
        self.state = state
        self.roots = [root for _, root in roots]
        self.names = [name for name, _ in roots]
        #: Metadata that could not be kept.
        self.unkept = Unkept() if unkept is None else unkept
        #: Where owners go by name: how, else None.
        self.owners = owners
        self.trees = [Tree(root.path, root, self.unkept) for _, root in roots]
        self._now_ns = now_ns
        #: Asked before each transaction is applied; None: nobody is.
        self.guard = guard
        #: Transactions up to here are not judged: they were approved.
        self._approved = 0
        #: Transactions up to here were judged: they are not counted once more when applying them has to be tried again.
        self._judged = 0
        self._diverged = self._load_diverged()
        self._mark = self._open_mark(state)
        self._journal = Journal(state / "journal", self._mark.position.seq)
        if self._journal.damage:
            self.diverged = f"the journal: {self._journal.damage}"
        needed = self._journal.staged | ({name_of(self._mark.position)} if self._journal.found else set())
        self.stages = [Stage(tree.root, state / str(i), needed) for i, tree in enumerate(self.trees)]
        self._progress = [Progress(stage) for stage in self.stages]
        self.history = History(
            state / "history", self.stages, retention or Retention(), self._mark.position.seq, now_ns
        )
        self.leaves = LeafStore(state)
        self._slicer = Slicer(self.trees, self.history.folder)
        self._operator = Operator(self.trees, self.stages, self.leaves)
        #: Set once, ends all work but the applying of what was accepted.
        self.interrupted = threading.Event()
        self.listener = Listener()
        #: Why nothing is applied at the moment, "" if nothing stands in the way.
        self.stalled = ""
        self._suspended: OrderedDict[tuple[int, bytes], Upload] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque(
            _Waiting(seq, more, place, None) for seq, more, place in self._journal.found
        )
        self._journal.found.clear()
        self._in_memory = 0
        self._operator.inherited = self._journal.last
        self._backlog = sum(each.size for each in self._waiting)
        self._calls: deque[tuple[int, Callable[[], None]]] = deque()
        self._told_at = 0.0
        #: What was applied when it was tended last.
        self._tended = self._mark.position
        #: What is applied.
        self._position = self._mark.position
        #: How many operations are applied since the mark, and how many an earlier process had applied to each tree.
        self._count = 0
        self._found = [0] * len(self.trees)
        #: Whether it was looked up what an earlier process had applied.
        self._recovered = not self._waiting
        #: Operations that were applied since the trees were synced.
        self._operations = 0
        self._checkpoint_at = time.monotonic()
        self._doubts: dict[tuple[int, bytes], None] = dict.fromkeys(self._load_doubts())

    # --- what may be asked

    @property
    def diverged(self) -> str:
        """Why the source must compare everything anew: what is recorded here does not tell what the tree holds.

        It is remembered until "" is set, as whoever has it compare has made sure of that.
        """
        return self._diverged

    @diverged.setter
    def diverged(self, why: str) -> None:
        self._diverged = why
        path = self.state / _DIVERGED
        try:
            if why:
                durable.write(path, why.encode("utf-8", "surrogateescape"))
            else:
                path.unlink(missing_ok=True)
        except (StateError, OSError) as error:
            _log.error("cannot be remembered", error, path=str(path), diverged=why)

    @property
    def kept_aside(self) -> int:
        """Files of this side that were kept before they were overwritten."""
        return sum(tree.kept_aside for tree in self.trees)

    @property
    def started(self) -> int:
        """The last transaction that was accepted; 0 when there was none."""
        return max(self._journal.last, self._mark.position.seq)

    @property
    def applied(self) -> int:
        """The last transaction that was applied in full."""
        return self._position.seq

    @property
    def complete(self) -> int:
        """The last transaction that was accepted and may be applied: the last that completes a state."""
        with self._lock:
            return next((each.seq for each in reversed(self._waiting) if not each.more), self._position.seq)

    @property
    def backlog(self) -> int:
        """Bytes of transactions that were accepted and are not applied yet."""
        return self._backlog

    @property
    def doubts(self) -> list[tuple[int, bytes]]:
        """Paths of which the tree may not hold what was accepted."""
        return list(self._doubts)

    @property
    def waiting(self) -> int:
        """Transactions that were accepted and are not applied yet."""
        return len(self._waiting)

    @property
    def held(self) -> Held | None:
        """Why nothing is applied until the administrator decides; None when nothing is held."""
        return None if self.guard is None else self.guard.held

    def touches(self, root: int, path: bytes) -> bool:
        """Whether something that was accepted and is not applied yet changes what is at ``path``."""
        with self._lock:
            waiting = list(self._waiting)
        return any(each.transaction is None or each.transaction.touches(root, path) for each in waiting)

    def has_room(self) -> bool:
        """Whether more may be accepted now."""
        # What belongs to no complete state cannot be applied, so waiting for that would never end.
        return self.backlog < BACKLOG_BYTES or self.held is not None or self.complete <= self.applied

    def interrupt(self) -> None:
        """End the work that is under way, for good; may be called from any thread."""
        self.interrupted.set()
        self.stop_reading()

    def stop_reading(self) -> None:
        """End the reading of contents that is under way, if any; may be called from any thread."""
        for tree in self.trees:
            tree.interrupted.set()

    def begin_session(self) -> None:
        """A connection begins."""
        if not self.interrupted.is_set():
            for tree in self.trees:
                tree.interrupted.clear()

    def end_session(self) -> None:
        """A connection has ended, and its threads."""
        for stage in self.stages:
            stage.rest(leave=True)
        self.store_unkept()
        self._end()

    def keep_aside(self, directory: Path | None, judge: Callable[[int, bytes, os.stat_result], bool]) -> None:
        """Keep what ``judge`` says nobody else has, below ``directory``; None ends it."""
        for number, tree in enumerate(self.trees):
            if directory is None:
                tree.keep_aside(None, None)
            else:
                tree.keep_aside(os.fsencode(directory / str(number)), partial(judge, number))

    def close(self) -> None:
        """Drop what is staged for no transaction and give back all handles; what was accepted stays."""
        with contextlib.suppress(OSError, StateError):
            self.checkpoint()
        self.drop_suspended()
        self.leaves.close()
        self._mark.close()
        self._journal.close()
        self.history.close()
        for progress in self._progress:
            progress.close()
        for stage in self.stages:
            stage.close()
        for tree in self.trees:
            tree.close()

    def tree(self, root: int) -> Tree:
        """The tree of root number ``root``; raises ProtocolError when there is none."""
        if not 0 <= root < len(self.trees):
            raise ProtocolError("the source", f"root {root} of {len(self.trees)}")
        return self.trees[root]

    def place(self, root: int, path: bytes) -> bytes:
        """Where a path of root number ``root`` is."""
        return self.trees[root].full(path)

    def unkept_version(self) -> int:
        """Grows when something changes in what ``unkept_causes`` tells."""
        return self.unkept.version + (self.owners.unkept.version if self.owners is not None else 0)

    def unkept_causes(self) -> list[Cause]:
        """All metadata that is not kept, owners without an account included."""
        return self.unkept.causes() + (self.owners.unkept.causes() if self.owners is not None else [])

    def begin_unkept_round(self) -> None:
        """A full comparison begins."""
        self.unkept.begin_round()
        if self.owners is not None:
            self.owners.unkept.begin_round()

    def end_unkept_round(self) -> None:
        """All was compared."""
        self.unkept.end_round()
        if self.owners is not None:
            self.owners.unkept.end_round()

    def store_unkept(self) -> None:
        """Write down what is not kept."""
        self.unkept.store()
        if self.owners is not None:
            self.owners.unkept.store()

    # --- reading

    def entries(self, digests: bool) -> Iterator[list[Entry]]:
        """The whole tree in parts; with ``digests``, every file is read."""
        part: list[Entry] = []
        size = 0
        for number, tree in enumerate(self.trees):
            for entry in tree.entries(number, digests):
                cost = len(entry.path) + sum(len(n) + len(v) for n, v in entry.meta.xattrs) + 100
                if part and (len(part) >= _ENTRIES_PER_FRAME or size + cost > wire.CHUNK):
                    yield part
                    part, size = [], 0
                part.append(entry)
                size += cost
        yield part

    def signature(self, root: int, path: bytes) -> bytes | None:
        """The signature of the file at ``path``, None when there is none; raises Interrupted."""
        tree = self.tree(root)
        handle = tree.open_file(path)
        self._end()
        if handle is None:
            return None

        def check() -> None:
            if tree.interrupted.is_set():
                raise Interrupted

        with io.FileIO(handle) as source:
            size = os.fstat(handle).st_size
            return delta.sign(CheckedReader(source, check), length_hint=size).to_bytes()

    # --- the past

    def view(self, root: int, seq: int, newest_ns: int = 0) -> View:
        """Root number ``root`` as it was after transaction ``seq``; raises StateError, OSError, NotRemembered.

        What is in the tree and was changed there after ``newest_ns`` (0: nothing was) is not known.
        """
        seq = self.history.check_seq(seq, self.applied)
        view = View(self.trees[root].root, self._place_of, newest_ns)
        for step in self.history.back_to(seq):
            view.undo(step, root)
        return view

    def _place_of(self, kept: Kept) -> bytes:
        return b"/".join((self.stages[kept.root].place(), kept.folder, kept.name))

    # --- uploads that outlive their connection

    def suspended(self) -> list[PartialUpload]:
        """What can be gone on with."""
        return [
            PartialUpload(upload.root, upload.path, upload.based, upload.received, upload.received_digest())
            for upload in self._suspended.values()
        ]

    def suspend(self, upload: Upload) -> None:
        """Keep an upload for the next connection; one that failed, or is too many, is dropped."""
        old = self._suspended.pop((upload.root, upload.path), None)
        if old is not None and old is not upload:
            self.drop(old)
        if not upload.resumable:
            self.drop(upload)
            return
        self._suspended[upload.root, upload.path] = upload
        while len(self._suspended) > MAX_SUSPENDED:
            self.drop(self._suspended.popitem(last=False)[1])

    def resume(self, root: int, path: bytes) -> Upload | None:
        """Take out what was suspended for this path."""
        return self._suspended.pop((root, path), None)

    def drop_suspended(self) -> None:
        """Nobody will go on with them."""
        while self._suspended:
            self.drop(self._suspended.popitem()[1])

    def drop(self, upload: Upload) -> None:
        """Give back what an upload holds."""
        staged = upload.close()
        if staged is not None:
            self.stages[upload.root].discard(staged)

    # --- accepting

    def accept(self, transactions: Sequence[Transaction]) -> None:
        """Make transactions durable; they are applied by ``work``. Raises OSError, and then none was accepted."""
        if not transactions:
            return
        self._check_room(sum(transaction.size for transaction in transactions))
        now = self._now_ns()
        records = []
        for transaction in transactions:
            transaction.time_ns = now
            staged = {number: each.name for number, (_, each) in enumerate(transaction.operations) if each is not None}
            records.append(
                Record(transaction.seq, transaction.epoch, now, transaction.bodies, staged, transaction.more)
            )
        roots = {operation.root for each in transactions for operation, staged in each.operations if staged is not None}
        for root in roots:
            self.stages[root].sync()
        places = self._journal.append(records)
        for transaction in transactions:
            for operation, each in transaction.operations:
                if each is not None:
                    self.stages[operation.root].needed(each)
            for upload in transaction.uploads:
                upload.close()
            transaction.bodies.clear()
        with self._lock:
            for transaction, place in zip(transactions, places, strict=True):
                waiting = _Waiting(transaction.seq, transaction.more, place, transaction)
                self._backlog += waiting.size
                if self._in_memory + waiting.size <= MEMORY_BYTES:
                    self._in_memory += waiting.size
                else:
                    waiting.transaction = None
                self._waiting.append(waiting)

    def abandon(self, transactions: list[Transaction]) -> None:
        """Remove what was staged for transactions that were not accepted; complete uploads are kept."""
        for transaction in transactions:
            staged_uploads = {upload.staged for upload in transaction.uploads}
            for operation, staged in transaction.operations:
                if staged is not None and staged not in staged_uploads:
                    self.stages[operation.root].discard(staged)
            for upload in transaction.uploads:
                self.suspend(upload)
        for stage in self.stages:
            stage.rest()

    def when_applied(self, call: Callable[[], None]) -> None:
        """Call ``call``, in the applier's thread, once what was accepted is applied and ``work`` was called.

        Of a state that is not complete nothing is waited for: it may be the source's own question that it waits for.
        """
        waiting = self.complete, call
        with self._lock:
            # A peer may say a thousand times that all is in step.
            if not self._calls or self._calls[-1] != waiting:
                self._calls.append(waiting)

    def forget_calls(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._calls.clear()

    def _check_room(self, size: int) -> None:
        """Raises OSError when what is accepted could not be applied for lack of room."""
        places = {os.fsencode(self.state), *(os.path.dirname(tree.root) for tree in self.trees)}
        places |= {tree.root for tree in self.trees if os.path.isdir(tree.root)}
        for place in places:
            status = os.statvfs(place)
            if not status.f_blocks:
                # It knows no size of its own, see ``build.room``.
                continue
            reserve = reserve_of(status)
            if size <= _SMALL_BYTES:
                # What removes files must still come through.
                reserve //= 4
            if status.f_bavail * status.f_frsize < reserve + 2 * size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(place))

    def make_room_for(self, error: Exception, worker: ThreadPoolExecutor) -> None:
        """If ``error`` says that a disk is full, let go of the oldest history; may be called from any thread."""
        if isinstance(error, OSError) and error.errno in _FULL:
            worker.submit(self.make_room)

    def make_room(self) -> bool:
        """Let go of the oldest history until there is room again; returns whether any was let go."""
        with contextlib.suppress(OSError):
            self.checkpoint()
        return self.history.make_room()

    # --- applying

    def work(self) -> None:
        """Apply what was accepted, as far as it can be applied; never raises OSError."""
        try:
            if not self._recovered:
                self._recover()
            while (batch := self._next()) is not None:
                if not self._apply(batch):
                    break
                self._rest_if_due()
            self._call()
        except OSError as error:
            self._stall(error)
        except StateError as error:
            self._stall(OSError(errno.EIO, str(error)))
        finally:
            self._end()

    def tend(self) -> None:
        """What is to be done now and then: try again what stopped, sync what rests, thin the history."""
        self.work()
        try:
            # At rest, what is in the trees is made durable there soon.
            rests = self._position == self._tended
            self._tended = self._position
            if rests or time.monotonic() - self._checkpoint_at > CHECKPOINT_SECONDS:
                self.checkpoint()
            self.history.thin()
        except OSError as error:
            self._stall(error)
        finally:
            self._end()

    def drain(self) -> None:
        """Apply all that was accepted and belongs to a complete state; raises StateError when that cannot be done."""
        self.work()
        if self.stalled:
            raise StateError(self.state, f"what was received cannot be applied: {self.stalled}")
        try:
            self.checkpoint()
        except OSError as error:
            raise StateError(self.state, error.strerror or str(error)) from error

    def approve(self) -> Held | None:
        """Apply what is held, or, if it was rejected, drop it and have the source compare everything; returns it.

        Raises StateError, OSError.
        """
        if self.held is not None and self.held.rejected:
            # First, as what is not held any more would be applied by the next process.
            self.set_aside("rejected changes were dropped")
        held = None if self.guard is None else self.guard.approve()
        if held is not None and not held.rejected:
            self._approved = self.started
        return held

    def set_aside(self, why: str) -> Path | None:
        """Apply nothing of what was accepted and is not applied; returns where its journal is kept, if there was any.

        The source must compare everything anew, as ``diverged`` says with ``why``. Raises StateError, OSError.
        """
        with self._lock:
            count, last = len(self._waiting), self.started
        if not count:
            return None
        self.checkpoint()
        place = self.state / f"aside-journal-{self._now_ns() // 10**9}"
        position = self._position
        for looked_up in self.history.not_reached(position.seq, position.operations):
            self._note_undone(*looked_up, failed=False)
        self.diverged = why
        # From here on nothing of it is applied any more, whether the journal is still there or not.
        self._position = Position(last)
        self._move_mark()
        self._journal.set_aside(place)
        with self._lock:
            self._waiting.clear()
            self._backlog = self._in_memory = 0
        self.history.settled(last)
        self._recovered = True
        _log.warning("what was received is set aside", transactions=count, kept=str(place), reason=why)
        return place

    def _note_undone(self, seq: int, first: int, last: int, *, failed: bool) -> None:
        """Write down that operations were left out, or will never be reached; raises OSError."""
        found = [entry for number in range(first, last) for entry in self.history.known(seq, number) or []]
        effect = self._operator.took_effect(found, failed=failed)
        self.history.note([Step(seq, self._now_ns(), first, last, effect, undone=True)])

    def forget_incomplete(self) -> None:
        """Drop what belongs to a state that is not complete, as the source learns what the trees hold.

        Raises StateError, OSError.
        """
        if self.held is not None or self.complete > self.applied:
            return
        with self._lock:
            waiting = list(self._waiting)
        dropped = [each.transaction or self._read(each) for each in waiting]
        diverged = self.diverged
        place = self.set_aside("a state that was not complete is dropped")
        self.diverged = diverged
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        for transaction in dropped:
            for operation, staged in transaction.operations:
                if staged is not None:
                    self.stages[operation.root].release(staged.name)

    def in_step(self) -> None:
        """The source has sent everything, and all of it is applied."""
        self._settle_doubts()
        self.drop_suspended()
        self.end_unkept_round()
        if self.guard is not None:
            self.guard.in_step()

    def checkpoint(self) -> None:
        """Make durable in the trees what was applied, and forget its journal; raises OSError."""
        self._checkpoint_at = time.monotonic()
        if self._position == self._mark.position:
            return
        for tree in self.trees:
            tree.sync()
        self._move_mark()
        self._journal.drop(self._position.seq)
        self.history.settled(self._position.seq)
        for stage in self.stages:
            stage.rest()

    def _move_mark(self) -> None:
        """All that was applied is durable in the trees: from here on is counted anew."""
        self._mark.move(self._position)
        for progress in self._progress:
            progress.clear()
        self._found = [0] * len(self.trees)
        self._count = 0
        self._operations = self._operator.bytes = 0

    def _rest_if_due(self) -> None:
        if (
            self._operations >= CHECKPOINT_OPERATIONS
            or self._operator.bytes >= CHECKPOINT_BYTES
            or time.monotonic() - self._checkpoint_at > CHECKPOINT_SECONDS
        ):
            self.checkpoint()

    def _next(self) -> list[_Waiting] | None:
        """The transactions of the next complete state, and what follows, as far as it is at hand; None: nothing is."""
        if self.held is not None:
            return None
        with self._lock:
            complete = 0
            operations = 0
            for count, each in enumerate(self._waiting, 1):
                if complete and (operations >= CHECKPOINT_OPERATIONS or each.transaction is None):
                    break
                operations += len(each.transaction.operations) if each.transaction is not None else 1
                if not each.more:
                    complete = count
            return list(itertools.islice(self._waiting, complete)) if complete else None

    def _apply(self, batch: list[_Waiting]) -> bool:
        """Apply transactions, up to one that is held; False when that stopped."""
        try:
            batch = batch[: self._judge(batch)]
            for part in _parts(batch):
                self._apply_part(part)
        except OSError as error:
            self._stall(error)
            return False
        if batch:
            self.stalled = ""
        self._tell()
        return bool(batch)

    def _apply_part(self, part: list[_Waiting]) -> None:
        """Raises OSError when that stopped; what was applied until then stays so."""
        todos = self._todos(part)
        done = iter(part)
        at = next(done)
        with contextlib.suppress(StopIteration):
            while todos:
                ahead = list(itertools.takewhile(lambda todo: not todo.done, itertools.islice(todos, _SLICE_LOOK)))
                chosen = [todos.popleft() for _ in range(self._slicer.slice(ahead) if ahead else 1)]
                if ahead and not chosen[0].known:
                    self.history.note(steps(chosen))
                for todo in chosen:
                    while todo.seq != at.seq:
                        self._finished(at)
                        at = next(done)
                    if not todo.done:
                        self._apply_one(todo)
                    self._count = todo.count
                    self._position = Position(todo.seq - 1, todo.number + 1)
            while True:
                self._finished(at)
                at = next(done)

    def _todos(self, part: list[_Waiting]) -> deque[Todo]:
        """What is to be done for transactions, with what is known of it from before; raises OSError."""
        todos: deque[Todo] = deque()
        count = self._count
        #: Roots in which something is still to be done: only the first of that may have been cut off.
        begun: set[int] = set()
        for each in part:
            transaction = each.transaction or self._read(each)
            skip = self._position.operations if each.seq == self._position.seq + 1 else 0
            for number, (operation, staged) in enumerate(transaction.operations[skip:], skip):
                count += 1
                todo = Todo(each.seq, transaction.time_ns, number, count, operation, staged)
                todo.done = count <= self._found[operation.root]
                known = self.history.known(each.seq, number)
                if known is not None:
                    todo.known, todo.undo = True, known
                    todo.again = not todo.done and operation.root not in begun
                if not todo.done:
                    begun.add(operation.root)
                todos.append(todo)
        return todos

    def _recover(self) -> None:
        """Learn how far an earlier process, or this machine before a power cut, came after the mark.

        Raises OSError, StateError.
        """
        self._found = [progress.read(self._mark.position) for progress in self._progress]
        last = max(self._found)
        with self._lock:
            waiting = list(self._waiting)
        by_seq = {each.seq: each for each in waiting}
        repair = Repair(
            self.trees, self.stages, lambda seq: [operation for operation, _ in self._read(by_seq[seq]).operations]
        )
        for each in waiting:
            if self._count >= last:
                break
            for todo in self._todos([each]):
                self._count = todo.count
                if todo.done:
                    repair.follow(todo)
        self._count = 0
        repair.run()
        self._recovered = True

    def _judge(self, batch: list[_Waiting]) -> int:
        """How many of the transactions may be applied: all, or those before the state in which one is held.

        Raises OSError.
        """
        guard = self.guard
        if guard is None:
            return len(batch)
        complete = 0
        for count, each in enumerate(batch, 1):
            if each.seq <= self._judged:
                complete = count if not each.more else complete
                continue
            transaction = each.transaction or self._read(each)
            operations = [operation for operation, _ in transaction.operations]
            contents = {id(operation): staged for operation, staged in transaction.operations if staged is not None}

            def after(operation: Operation, contents: dict[int, Staged] = contents) -> Content | None:
                return self._content(operation, contents.get(id(operation)))

            if transaction.seq <= self._approved or self.history.known(transaction.seq, 0) is not None:
                guard.note(operations, after)
            else:
                try:
                    verdict = guard.judge(transaction.seq, operations, after)
                except StateError as error:
                    raise OSError(errno.EIO, str(error)) from error
                if isinstance(verdict, Hold):
                    return complete
            self._judged = each.seq
            if not transaction.more:
                complete = count
        return complete

    def _content(self, operation: Operation, staged: Staged | None) -> Content | None:
        """What an operation brings, for the guard to look at."""
        if isinstance(operation, Put):
            return Inline(operation.data)
        if staged is None:
            return None
        try:
            place = self.stages[operation.root].fixed(staged.name)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            return Opened(os.open(place.name, flags, dir_fd=place.directory))
        except OSError:
            return None

    def _finished(self, each: _Waiting) -> None:
        """A transaction is applied."""
        self._position = Position(each.seq, 0)
        with self._lock:
            gone = self._waiting.popleft()
            assert gone is each
            self._backlog -= each.size
            if each.transaction is not None:
                self._in_memory -= each.size
        self._operator.bytes += each.place.length
        if time.monotonic() - self._told_at > _TELL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        for tree in self.trees:
            tree.restore()
        held = self.held
        why = self.stalled or ("" if held is None else f"{held.state}: {held.reason}")
        self.listener.applied(self._position.seq, why)

    def _call(self) -> None:
        """Tell those who wait for what is applied."""
        while True:
            with self._lock:
                if not self._calls or self._calls[0][0] > self._position.seq:
                    return
                _, call = self._calls.popleft()
            call()

    def _stall(self, error: OSError) -> None:
        """Applying stopped; it is tried again."""
        if error.errno in _FULL and self.make_room():
            _log.warning("the disk is full; the oldest history is gone", state=str(self.state))
        where = error.filename or self.state
        reason = f"{os.fsdecode(where) if isinstance(where, bytes) else where}: {error.strerror or error}"
        if reason != self.stalled:
            _log.error("nothing can be applied", state=str(self.state), reason=reason)
        self.stalled = reason
        self._tell()

    def _read(self, each: _Waiting) -> Transaction:
        """A transaction from the journal; raises OSError when that cannot be read."""
        try:
            record = self._journal.read(each.seq, each.place)
        except StateError as error:
            raise OSError(errno.EIO, str(error)) from error
        transaction = Transaction(record.seq, record.epoch, more=record.more, time_ns=record.time_ns)
        for number, body in enumerate(record.bodies):
            operation = _OPERATIONS.decode(body, "the journal")
            name = record.staged.get(number)
            transaction.operations.append((operation, None if name is None else Staged(-1, name)))
        return transaction

    def _apply_one(self, todo: Todo) -> None:
        """Apply an operation; what the tree does not allow is in doubt. Raises OSError when nothing can be applied."""
        self._operations += 1
        try:
            try:
                self._operator.carry_out(todo)
            except StateError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _STOPPING:
                    raise
                self._doubt(todo, error)
                if todo.undo:
                    self._note_undone(todo.seq, todo.number, todo.number + 1, failed=True)
            self._progress[todo.operation.root].tell(self._mark.position, todo.count)
        except StateError as error:
            raise OSError(errno.EIO, str(error)) from error

    # --- doubts

    def _doubt(self, todo: Todo, error: Exception) -> None:
        """An operation was left out: sooner or later the source sends anew what belongs there."""
        root, path = todo.operation.root, todo.operation.path
        if isinstance(error, (FarshoreError, OSError)):
            _log.warning("left out", path=path, seq=todo.seq, reason=str(error))
        else:
            _log.error("left out", error, path=path, seq=todo.seq)
        if len(self._doubts) >= MAX_DOUBTS:
            self.diverged = f"more than {MAX_DOUBTS} paths differ from what the source believes"
        else:
            self._doubts[root, path] = None
            self._store_doubts()
        self.listener.doubted(Nak(todo.seq, root, path[:MAX_PATH], str(error)[:_MAX_REASON], True))

    def _settle_doubts(self) -> None:
        """The source has sent anew what was in doubt."""
        if self._doubts:
            self._doubts.clear()
            self._store_doubts()

    def _store_doubts(self) -> None:
        durable.write(self.state / "doubts", msgspec.msgpack.encode(list(self._doubts)))

    def _load_diverged(self) -> str:
        try:
            return (self.state / _DIVERGED).read_bytes().decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{self.state / _DIVERGED}: {error}"

    def _load_doubts(self) -> list[tuple[int, bytes]]:
        try:
            return msgspec.msgpack.decode((self.state / "doubts").read_bytes(), type=list[tuple[int, bytes]])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError) as error:
            self.diverged = f"{self.state / 'doubts'}: {error}"
            return []

    # --- how

    def _open_mark(self, state: Path) -> Mark:
        path = state / "applied"
        try:
            mark = Mark(path)
        except StateError as error:
            self.diverged = str(error)
            path.rename(path.with_suffix(".damaged"))
            mark = Mark(path)
        return mark

    def _end(self) -> None:
        for tree in self.trees:
            tree.end()


def _parts(batch: list[_Waiting]) -> Iterator[list[_Waiting]]:
    """Transactions that fit into memory together."""
    part: list[_Waiting] = []
    size = 0
    for each in batch:
        if part and size + each.size > MEMORY_BYTES:
            yield part
            part, size = [], 0
        part.append(each)
        size += each.size
    if part:
        yield part


#: Operations that are looked at for the next slice, at most.
_SLICE_LOOK = 2000


def refusal(seq: int, root: int, path: bytes, error: Exception) -> Nak:
    """The answer to what failed with ``error``; raises it when it is none of those that fail only the transaction."""
    # An answer must fit into a frame, whatever the source calls a path.
    path = path[:MAX_PATH]
    match error:
        case BaseUnknown() | UnsafePath() | delta.DeltaCorrupt():
            return Nak(seq, root, path, str(error)[:_MAX_REASON], True)
        case StateError():
            return Nak(seq, root, path, str(error)[:_MAX_REASON], False)
        case OSError():
            reason = f"{os.fsdecode(path)!r}: {error.strerror or error}"
            return Nak(seq, root, path, reason[-_MAX_REASON:], False)
        case OverflowError() | ValueError():
            raise ProtocolError("the source", f"a number in an operation on {path!r} is out of range") from None
    raise error
