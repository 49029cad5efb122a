"""Stage transactions as they arrive, and have them accepted in groups.

A thread of its own gathers operations, writes large contents into staged files, and makes what is complete durable in
the journal (``Applier.accept``), while what was accepted before is applied by another one. A group is accepted when
nothing more has arrived, or when it is large or old: a single change is not held up, and many share a sync.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from farshore import delta
from farshore.dbm import wire
from farshore.dbm.messages import (
    Ack,
    Begin,
    Commit,
    Copy,
    Link,
    MakeNode,
    MakeSymlink,
    Move,
    Nak,
    Names,
    Operation,
    Patch,
    Remove,
)
from farshore.dbm.owners import Arriving
from farshore.dbm.replica.build import Building, copy_file
from farshore.dbm.replica.commit import TRANSACTION_BYTES, Applier, Transaction, refusal
from farshore.dbm.replica.intake import Inbox, Interrupted, Switch
from farshore.dbm.replica.paths import check
from farshore.dbm.replica.stage import Staged
from farshore.dbm.replica.tree import BaseUnknown
from farshore.dbm.replica.upload import Upload
from farshore.dbm.replica.within import Before
from farshore.errors import ProtocolError
from farshore.fmm.types import FileKind

#: Operations that one transaction may hold; a peer that sends more is broken or hostile.
MAX_OPERATIONS = 20_000
#: Bytes of paths, link targets and attributes that one transaction may hold; contents are not kept in memory.
MAX_METADATA = 64 << 20
#: A group is handed over when it has so many operations, bytes, or seconds since its first commit.
GROUP_OPERATIONS = 20_000
GROUP_BYTES = 64 << 20
GROUP_SECONDS = 0.2
#: User and group numbers are below; the last of them means nobody to chown(2).
_ID = (1 << 32) - 1
_NODES = (FileKind.FIFO, FileKind.CHARACTER_DEVICE, FileKind.BLOCK_DEVICE)

#: A call: what is to be done once all before it is applied. An Upload: it is to be opened. A tuple: an operation, as it
#: is and as it came, with the upload that a Patch puts into place.
Item = Begin | Commit | Names | Upload | tuple[Operation, bytes, Upload | None] | Callable[[], None]


class _Refused(Exception):
    """Ends the taking of transactions; with the Nak to send after what is complete, if it was not sent yet."""

    def __init__(self, nak: Nak | None) -> None:
        super().__init__()
        self.nak = nak


class Stager:
    """The thread that stages the transactions of one connection.

    ``worker`` is the thread of the applier, ``check_epoch`` is called before a group is accepted, ``deliver`` with the
    answers to it, ``fail`` with an error that ends the connection.
    """

    def __init__(
        self,
        applier: Applier,
        inbox: Inbox[Item],
        switch: Switch,
        worker: ThreadPoolExecutor,
        check_epoch: Callable[[int], None],
        deliver: Callable[[list[Ack | Nak]], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._applier = applier
        self._inbox = inbox
        self._switch = switch
        self._worker = worker
        self._check_epoch = check_epoch
        self._deliver = deliver
        self._fail = fail
        self._owners = Arriving(applier.owners, applier.place)
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._open: Transaction | None = None
        #: What the journal has already is no new transaction, whoever sends it.
        self._last_seq = applier.started
        self._batch: list[Transaction] = []
        self._batch_operations = self._batch_size = 0
        self._batch_since = 0.0
        self._refused = False
        #: An upload that failed: nothing may follow.
        self._upload_refused: Nak | None = None
        #: The applier has work to do already.
        self._is_working = threading.Event()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> list[Transaction]:
        """Wait until it has ended, after the switch; returns what was not handed over."""
        self._thread.join()
        left, self._batch = self._batch, []
        if self._open is not None:
            left.append(self._open)
            self._open = None
        return left

    def refuse(self, nak: Nak) -> None:
        """An upload failed. May be called from any thread."""
        if self._upload_refused is None:
            self._upload_refused = nak
        self._inbox.poke()
        self._switch.notify()

    # --- the thread

    def _run(self) -> None:
        try:
            while (items := self._inbox.take()) is not None:
                try:
                    self._take_all(items)
                except _Refused as refused:
                    if refused.nak is not None:
                        self._end_with(refused.nak)
        except Interrupted:
            return
        except BaseException as error:
            self._fail(error)

    def _take_all(self, items: list[Item]) -> None:
        if self._refused:
            return
        for item in items:
            if isinstance(item, tuple):
                self._operation(*item)
            elif isinstance(item, Commit):
                self._commit(item)
                if self._is_due():
                    self._hand_over()
            elif isinstance(item, Begin):
                self._begin(item)
            elif isinstance(item, Upload):
                self._open_upload(item)
            elif isinstance(item, Names):
                self._owners.learn(item)
            else:
                self._hand_over()
                self._applier.when_applied(item)
                self._work()
        if self._upload_refused is not None:
            raise _Refused(self._upload_refused)
        if self._inbox.empty:
            self._hand_over()

    def _begin(self, begin: Begin) -> None:
        if self._open is not None:
            raise ProtocolError("the source", "Begin within a transaction")
        if not self._last_seq < begin.seq < 1 << 63:
            raise ProtocolError("the source", f"transaction {begin.seq} after {self._last_seq}")
        self._last_seq = begin.seq
        self._open = Transaction(begin.seq, begin.epoch)

    def _commit(self, commit: Commit) -> None:
        transaction = self._open
        if transaction is None or transaction.seq != commit.seq:
            what = "none" if transaction is None else str(transaction.seq)
            raise ProtocolError("the source", f"Commit {commit.seq} does not end the open transaction: {what}")
        self._open = None
        transaction.more = commit.more
        if not self._batch:
            self._batch_since = time.monotonic()
        self._batch.append(transaction)
        self._batch_operations += len(transaction.operations)
        self._batch_size += transaction.size + TRANSACTION_BYTES

    def _operation(self, operation: Operation, body: bytes, upload: Upload | None) -> None:
        """Stage an operation of the open transaction; ``upload`` holds what a Patch puts into place."""
        transaction = self._open
        if transaction is None:
            raise ProtocolError("the source", f"{type(operation).__name__} outside of a transaction")
        if len(transaction.operations) >= MAX_OPERATIONS:
            raise ProtocolError("the source", f"more than {MAX_OPERATIONS} operations in a transaction")
        transaction.metadata += metadata_size(operation)
        if transaction.metadata > MAX_METADATA:
            raise ProtocolError("the source", f"more than {MAX_METADATA} bytes of metadata in a transaction")
        root = operation.root
        if not 0 <= root < len(self._applier.trees):
            raise ProtocolError("the source", f"root {root} of {len(self._applier.trees)}")
        _check_numbers(operation)
        try:
            _check_paths(operation)
            translated = self._owners.translated(operation)
            if translated is not operation:
                # What is written down is done again after a crash, when nobody tells whom the source's numbers mean.
                operation, body = translated, wire.encode(translated)
            staged = self._stage(operation, upload)
        except (_Refused, Interrupted, ProtocolError):
            raise
        except Exception as error:
            self._applier.make_room_for(error, self._worker)
            raise _Refused(refusal(transaction.seq, root, operation.path, error)) from None
        transaction.size += len(body)
        transaction.bodies.append(body)
        transaction.operations.append((operation, staged))
        transaction.touch(operation)
        transaction.within.note(operation, staged)

    # --- kinds of operations

    def _stage(self, operation: Operation, upload: Upload | None) -> Staged | None:
        match operation:
            case Patch():
                assert upload is not None
                return self._patch(operation, upload)
            case Copy():
                return self._copy(operation)
            case MakeNode(kind=kind) if kind not in _NODES:
                raise ProtocolError("the source", f"{kind} is no kind of node")
        return None

    def _patch(self, operation: Patch, upload: Upload) -> Staged:
        transaction = self._open
        assert transaction is not None
        if upload.root != operation.root:
            raise ProtocolError("the source", f"an upload for root {upload.root} is put to root {operation.root}")
        if not (upload.complete or upload.failure):
            # What is complete before need not wait with it.
            self._hand_over()
            self._switch.wait(lambda: upload.complete or upload.failure is not None)
        if upload.failure is not None:
            raise _Refused(upload.failure)
        transaction.uploads.append(upload)
        staged, handle = upload.content()
        try:
            self._applier.trees[operation.root].prepare(handle, operation.meta)
            os.fsync(handle)
            status = os.fstat(handle)
            leaves = upload.take_leaves()
            if leaves is not None:
                upload.forget_base()
                self._applier.leaves.add(status, leaves)
        finally:
            os.close(handle)
        return staged

    def _copy(self, operation: Copy) -> Staged:
        root, path = operation.source_root, operation.source
        transaction = self._open
        assert transaction is not None
        self._applier.tree(root)
        try:
            found = transaction.within.find(root, path)
            if isinstance(found, bytes):
                source = os.memfd_create("content", os.MFD_CLOEXEC)
                os.write(source, found)
                os.lseek(source, 0, os.SEEK_SET)
            elif isinstance(found, Before):
                source = self._open_file(root, found.path)
            else:
                source = os.open(found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.directory)
            return self._copied(operation, source)
        except (BaseUnknown, delta.DeltaCorrupt) as error:
            raise _Refused(refusal(transaction.seq, root, path, error)) from None

    def _copied(self, operation: Copy, source: int) -> Staged:
        stage = self._applier.stages[operation.root]
        try:
            status = os.fstat(source)
            sparse = status.st_blocks * 512 < status.st_size
            staged, handle = stage.create()
        except BaseException:
            os.close(source)
            raise
        building: Building | None = None
        known: delta.Leaves | None = None
        try:
            building = Building(staged, handle, source, sparse=sparse, check=self._switch.check)
            # Only now: a change of the source from here on is noticed when the building is finished.
            known = self._applier.leaves.of(source)
            if copy_file(building, known) != operation.digest:
                raise BaseUnknown(operation.source, "it has another content")
            self._applier.trees[operation.root].prepare(handle, operation.meta)
            os.fsync(handle)
            if known is not None:
                self._applier.leaves.add(os.fstat(handle), known)
                known = None
        except BaseException:
            stage.discard(staged)
            raise
        finally:
            if known is not None:
                known.close()
            if building is not None:
                building.close()
            else:
                os.close(handle)
                os.close(source)
        return staged

    # --- uploads

    def _open_upload(self, upload: Upload) -> None:
        root = upload.root
        try:
            # What is not based names it in vain; but it is kept, and told about in Welcome, if the connection breaks.
            check(upload.path)
            base = self._open_file(root, upload.path) if upload.based else None
            try:
                staged, handle = self._applier.stages[root].create()
            except BaseException:
                if base is not None:
                    os.close(base)
                raise
            try:
                upload.open(staged, handle, base, self._applier.leaves)
            except BaseException:
                self._applier.stages[root].discard(staged)
                raise
        except Interrupted:
            raise
        except Exception as error:
            self._applier.make_room_for(error, self._worker)
            upload.failure = refusal(0, root, upload.path, error)
            raise _Refused(upload.failure) from None
        finally:
            upload.opened = True
            self._switch.notify()

    def _open_file(self, root: int, path: bytes) -> int:
        """Open a file for reading as it is after all complete transactions; raises BaseUnknown when there is none."""
        check(path)
        if any(each.touches(root, path) for each in self._batch) or self._applier.touches(root, path):
            self._settle()
        tree = self._applier.tree(root)
        try:
            handle = tree.open_apart(path)
        except PermissionError:
            # A directory that must be opened up for it: only where all is done in order.
            opened = self._worker.submit(tree.open_file, path)
            opened.add_done_callback(lambda _: self._switch.notify())
            self._switch.wait(opened.done)
            handle = opened.result()
        if handle is None:
            raise BaseUnknown(path, "there is no such file")
        return handle

    # --- groups

    def _is_due(self) -> bool:
        return (
            self._batch_operations >= GROUP_OPERATIONS
            or self._batch_size >= GROUP_BYTES
            or time.monotonic() - self._batch_since >= GROUP_SECONDS
        )

    def _hand_over(self) -> None:
        """Have the group accepted, and applied after what was accepted before."""
        if not self._batch:
            return
        self._switch.wait(lambda: self._refused or self._applier.has_room())
        if self._refused:
            raise _Refused(None)
        batch, self._batch = self._batch, []
        self._batch_operations = self._batch_size = 0
        try:
            for epoch in {transaction.epoch for transaction in batch}:
                self._check_epoch(epoch)
            if self._applier.interrupted.is_set():
                raise Interrupted
            self._owners.store()
            self._applier.accept(batch)
        except BaseException as error:
            self._worker.submit(self._applier.abandon, batch)
            if isinstance(error, OSError):
                self._applier.make_room_for(error, self._worker)
                where = f"{error.filename}: " if error.filename else ""
                reason = f"making it durable: {where}{error.strerror or error}"
                raise _Refused(Nak(batch[0].seq, 0, b"", reason, False)) from None
            raise
        self._deliver([Ack(batch[-1].seq)])
        self._work()

    def _work(self) -> None:
        """Have the applier work, unless it has still to begin with what it was asked before."""
        if not self._is_working.is_set():
            self._is_working.set()
            self._worker.submit(self._let_work)

    def _let_work(self) -> None:
        """In the applier's thread."""
        self._is_working.clear()
        try:
            self._applier.work()
        except BaseException as error:
            self._fail(error)
        self._switch.notify()

    def _settle(self) -> None:
        """Wait until all complete transactions are applied."""
        self._hand_over()
        applied = threading.Event()

        def told() -> None:
            applied.set()
            self._switch.notify()

        self._applier.when_applied(told)
        self._work()
        self._switch.wait(lambda: self._refused or applied.is_set())
        if self._refused:
            raise _Refused(None)

    def stop(self) -> None:
        """The source was told that something was refused: nothing more is taken. May be called from any thread."""
        self._refused = True
        self._switch.notify()

    def _end_with(self, nak: Nak) -> None:
        """Hand over what is complete, with ``nak`` as the end of it; what follows is not taken."""
        with contextlib.suppress(_Refused):
            self._hand_over()
        if self._open is not None:
            left, self._open = self._open, None
            self._worker.submit(self._applier.abandon, [left])
        if not self._refused:
            self._refused = True
            self._deliver([nak])


def _check_paths(operation: Operation) -> None:
    """Raises UnsafePath for a path that leads out of a root whatever there is."""
    check(operation.path)
    if isinstance(operation, (Link, Move)):
        check(operation.to)
    elif isinstance(operation, Copy):
        check(operation.source)


def _check_numbers(operation: Operation) -> None:
    """Raises ProtocolError for a number or a text that no system call takes: what is accepted must be possible."""
    if isinstance(operation, (Link, Move, Remove)):
        return
    meta = operation.meta
    target = operation.target if isinstance(operation, MakeSymlink) else b""
    if b"\0" in target or any(b"\0" in name for name, _ in meta.xattrs):
        raise ProtocolError("the source", f"a zero byte in a target or a name of an attribute of {operation.path!r}")
    times = (meta.atime_ns, meta.mtime_ns)
    fits = 0 <= meta.mode <= 0o7777 and 0 <= meta.uid < _ID and 0 <= meta.gid < _ID
    if not fits or not all(-(1 << 63) <= each < 1 << 63 for each in times):
        raise ProtocolError("the source", f"a number in an operation on {operation.path!r} is out of range")
    if isinstance(operation, MakeNode) and not 0 <= operation.rdev < 1 << 64:
        raise ProtocolError("the source", f"a device number of {operation.path!r} is out of range")


def metadata_size(operation: Operation) -> int:
    """About how many bytes of memory an operation keeps until its transaction ends."""
    size = 200 + len(operation.path)
    if isinstance(operation, (Link, Move)):
        return size + len(operation.to)
    if isinstance(operation, Remove):
        return size
    if isinstance(operation, MakeSymlink):
        size += len(operation.target)
    elif isinstance(operation, Copy):
        size += len(operation.source) + len(operation.digest)
    xattrs = operation.meta.xattrs
    if xattrs:
        size += sum(len(name) + len(value) + 100 for name, value in xattrs)
    return size
