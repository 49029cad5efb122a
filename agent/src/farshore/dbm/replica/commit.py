"""Make groups of staged transactions durable, and apply them to the trees of one protection group.

A group is made durable as a whole, then the number of its last transaction is written down, then it is applied in
order, and when its names are durable too, it is acknowledged: what the source was told is there survives a power cut,
and what it was not told of, it knows to look at.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from farshore import delta
from farshore.dbm import wire
from farshore.dbm.messages import (
    Ack,
    Cause,
    Copy,
    Entry,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Move,
    Nak,
    Operation,
    Patch,
    Put,
    Remove,
    SetMeta,
)
from farshore.dbm.messages import Partial as PartialUpload
from farshore.dbm.owners import Owners
from farshore.dbm.reading import CheckedReader
from farshore.dbm.replica.leaves import LeafStore
from farshore.dbm.replica.stage import Stage, Staged
from farshore.dbm.replica.tree import BaseUnknown, Tree, syncfs
from farshore.dbm.replica.upload import Interrupted, Upload
from farshore.dbm.unkept import Unkept
from farshore.errors import ProtocolError, StateError, UnsafePath
from farshore.fmm.types import FileKind, Root
from farshore.log import Log

_log = Log(__name__)
#: Up to this many, single syncs are not slower than writing back the whole filesystem, and wait for nobody else's data.
_FEW_FILES = 3
_FEW_DIRECTORIES = 3
#: Uploads that are kept for the next connection, at most.
MAX_SUSPENDED = 16
_ENTRIES_PER_FRAME = 200
_READ = 1 << 20
_NUMBER = struct.Struct(">Q")


@dataclass(slots=True)
class Transaction:
    """A transaction as it is staged: its operations, with the files that hold their contents."""

    seq: int
    epoch: int
    operations: list[tuple[Operation, Staged | None]] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    metadata: int = 0
    #: Where it put a content, for copies within it.
    contents: dict[tuple[int, bytes], Staged] = field(default_factory=dict)
    #: Paths whose content or existence it changes.
    touched: set[tuple[int, bytes]] = field(default_factory=set)

    def touch(self, operation: Operation) -> None:
        """Note what ``operation`` changes: other than a directory that is made, or metadata."""
        kind = type(operation)
        if kind is not MakeDir and kind is not SetMeta:
            self.touched.add((operation.root, operation.path))
            if isinstance(operation, Move):
                self.touched.add((operation.root, operation.to))


@dataclass(slots=True)
class Batch:
    """Transactions that are made durable together, what ended the taking of more, and what to call afterwards."""

    transactions: list[Transaction] = field(default_factory=list)
    refusal: Nak | None = None
    then: list[Callable[[], None]] = field(default_factory=list)
    operations: int = 0
    size: int = 0
    #: Paths whose content or existence it changes.
    touched: set[tuple[int, bytes]] = field(default_factory=set)

    def add(self, transaction: Transaction, size: int) -> None:
        """Take up a complete transaction with so many bytes of content and metadata."""
        self.transactions.append(transaction)
        self.operations += len(transaction.operations)
        self.size += size
        self.touched |= transaction.touched

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


class Applier:
    """The replica of one group: its trees, the places for staging, and what is kept between connections.

    One thread at a time but for ``interrupt``; ``trees`` and ``stages`` say what else is allowed.
    """

    def __init__(self, roots: list[tuple[str, Root]], state: Path, unkept: Unkept | None = None) -> None:
        self.names = [name for name, _ in roots]
        #: Metadata that could not be kept.
        self.unkept = Unkept() if unkept is None else unkept
        #: Where owners go by name: how, else None.
        self.owners: Owners | None = None
        self.trees = [Tree(root.path, root, self.unkept) for _, root in roots]
        self.stages = [Stage(tree.root, state / str(i)) for i, tree in enumerate(self.trees)]
        self.leaves = LeafStore(state)
        self._started = os.open(state / "started", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        #: Set once, ends all work: what is not applied yet will not be.
        self.interrupted = threading.Event()
        self._suspended: OrderedDict[tuple[int, bytes], Upload] = OrderedDict()

    @property
    def kept_aside(self) -> int:
        """Files of this side that were kept before they were overwritten."""
        return sum(tree.kept_aside for tree in self.trees)

    @property
    def started(self) -> int:
        """The last transaction that was begun to be applied; 0 when there was none."""
        data = os.pread(self._started, _NUMBER.size, 0)
        return int(_NUMBER.unpack(data)[0]) if len(data) == _NUMBER.size else 0

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
        """Drop all that is staged and give back all handles."""
        self.drop_suspended()
        self.leaves.close()
        os.close(self._started)
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

    # --- committing

    def commit(self, batch: Batch, check_epoch: Callable[[int], None]) -> list[Ack | Nak]:
        """Carry out a group; returns what to answer: at most one Ack, and a Nak if something was refused.

        Raises Interrupted when nothing of it was begun, and what ``check_epoch`` raises.
        """
        answers: list[Ack | Nak] = []
        transactions = batch.transactions
        try:
            if transactions:
                for epoch in {transaction.epoch for transaction in transactions}:
                    check_epoch(epoch)
                if self.interrupted.is_set():
                    raise Interrupted
                answers = self._carry_out(transactions)
        finally:
            self.abandon(transactions)
            self._end()
        if batch.refusal is not None and not (answers and isinstance(answers[-1], Nak)):
            answers.append(batch.refusal)
        return answers

    def abandon(self, transactions: list[Transaction]) -> None:
        """Remove what is left of their staged files; complete uploads that were not used are kept."""
        for transaction in transactions:
            # Those that were placed are in the tree already, and their names not in the stage.
            staged_uploads = {upload.staged for upload in transaction.uploads}
            for operation, staged in transaction.operations:
                if staged is None or not self.stages[operation.root].holds(staged):
                    continue
                if staged not in staged_uploads:
                    self.stages[operation.root].discard(staged)
            for upload in transaction.uploads:
                if upload.staged is not None and self.stages[upload.root].holds(upload.staged):
                    self.suspend(upload)
                else:
                    upload.close()
        for stage in self.stages:
            stage.rest()

    def _carry_out(self, transactions: list[Transaction]) -> list[Ack | Nak]:
        last = transactions[-1].seq
        failure: Nak | None = None
        done = 0
        try:
            if any(transaction.operations for transaction in transactions):
                self._sync_staged(transactions)
                # From here on the trees may hold a part of it, which the source must learn if we are cut off.
                self._note_started(last)
                done, failure = self._apply(transactions)
                self._sync_names(transactions[:done])
            else:
                self._note_started(last)
                done = len(transactions)
        except OSError as error:
            return [Nak(transactions[0].seq, 0, b"", f"making it durable: {error.strerror or error}", False)]
        answers: list[Ack | Nak] = []
        if done:
            answers.append(Ack(transactions[done - 1].seq))
        if failure is not None:
            answers.append(failure)
        return answers

    def _note_started(self, seq: int) -> None:
        os.pwrite(self._started, _NUMBER.pack(seq), 0)
        os.fdatasync(self._started)

    def _sync_staged(self, transactions: list[Transaction]) -> None:
        staged = [each for transaction in transactions for _, each in transaction.operations if each is not None]
        if len(staged) > _FEW_FILES:
            for directory in {each.directory for each in staged}:
                syncfs(directory)
            return
        for each in staged:
            handle = os.open(each.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=each.directory)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _apply(self, transactions: list[Transaction]) -> tuple[int, Nak | None]:
        """Returns how many were applied, and why the next one was not."""
        for number, transaction in enumerate(transactions):
            for operation, staged in transaction.operations:
                try:
                    self._apply_one(operation, staged)
                except Exception as error:
                    # Nothing after it was begun: less for the source to doubt.
                    os.pwrite(self._started, _NUMBER.pack(transaction.seq), 0)
                    return number, refusal(transaction.seq, operation.root, operation.path, error)
        return len(transactions), None

    def _apply_one(self, operation: Operation, staged: Staged | None) -> None:
        root = operation.root
        tree = self.trees[root]
        if staged is not None:
            assert isinstance(operation, (Put, Patch, Copy))
            tree.place(self.stages[root], staged, operation.path, operation.meta)
            if not isinstance(operation, Put):
                with contextlib.suppress(OSError):
                    self.leaves.placed(tree.status(operation.path))
            return
        match operation:
            case MakeDir(path=path, meta=meta):
                tree.make_directory(path, meta)
            case MakeSymlink(path=path, meta=meta, target=target):
                tree.make_symlink(path, meta, target)
            case MakeNode(path=path, meta=meta, kind=kind, rdev=rdev):
                tree.make_node(path, meta, FileKind(kind), rdev)
            case Link(path=path, to=to):
                tree.link(path, to)
            case Move(path=path, to=to):
                tree.move(path, to)
            case Remove(path=path):
                tree.remove(path)
            case SetMeta(path=path, meta=meta):
                tree.set_meta(path, meta)
            case _:
                raise AssertionError(f"{type(operation).__name__} without its content")

    def _sync_names(self, transactions: list[Transaction]) -> None:
        touched: list[set[bytes | None]] = [set() for _ in self.trees]
        for transaction in transactions:
            for operation, _ in transaction.operations:
                path = operation.path
                directories = touched[operation.root]
                directories.add(path.rpartition(b"/")[0] if path else None)
                if isinstance(operation, Move):
                    directories.add(operation.to.rpartition(b"/")[0])
                elif isinstance(operation, (MakeDir, SetMeta)):
                    directories.add(path)
        for tree, directories in zip(self.trees, touched, strict=True):
            if 0 < len(directories) <= _FEW_DIRECTORIES:
                tree.sync(directories)
            elif directories:
                tree.sync_all(directories)

    def _end(self) -> None:
        for tree in self.trees:
            tree.end()


def refusal(seq: int, root: int, path: bytes, error: Exception) -> Nak:
    """The answer to what failed with ``error``; raises it when it is none of those that fail only the transaction."""
    match error:
        case BaseUnknown() | UnsafePath() | delta.DeltaCorrupt():
            return Nak(seq, root, path, str(error), True)
        case StateError():
            return Nak(seq, root, path, str(error), False)
        case OSError():
            return Nak(seq, root, path, f"{os.fsdecode(path)!r}: {error.strerror or error}", False)
        case OverflowError() | ValueError():
            raise ProtocolError("the source", f"a number in an operation on {path!r} is out of range") from None
    raise error
