"""Stage transactions as they arrive, and hand them over in groups.

A thread of its own writes contents into staged files while the group before is made durable and applied. A group
is handed over when nothing more has arrived and the one before is done, or when it is large or old: a single change
is not held up, and many share the waits for the disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from farshore import delta
from farshore.dbm.messages import (
    Ack,
    Begin,
    Commit,
    Copy,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Move,
    Nak,
    Names,
    Operation,
    Patch,
    Put,
    Remove,
    SetMeta,
)
from farshore.dbm.owners import Arriving
from farshore.dbm.replica.build import Building, copy_file
from farshore.dbm.replica.commit import Applier, Batch, Transaction, refusal
from farshore.dbm.replica.intake import Inbox, Interrupted, Switch
from farshore.dbm.replica.stage import Staged
from farshore.dbm.replica.tree import BaseUnknown
from farshore.dbm.replica.upload import Upload
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
_OPERATIONS = (Put, MakeDir, Copy, MakeSymlink, MakeNode, Link, Move, Remove, SetMeta)
_NODES = (FileKind.FIFO, FileKind.CHARACTER_DEVICE, FileKind.BLOCK_DEVICE)

#: A call: what is to be done once all before it is applied. An Upload: it is to be opened. A pair: a Patch.
_Plain = Put | MakeDir | Copy | MakeSymlink | MakeNode | Link | Move | Remove | SetMeta
Item = Begin | Commit | Names | _Plain | Upload | tuple[Patch, Upload] | Callable[[], None]


class _Refused(Exception):
    """Ends the taking of transactions; with the Nak to send after what is complete, if it was not sent yet."""

    def __init__(self, nak: Nak | None) -> None:
        super().__init__()
        self.nak = nak


class Stager:
    """The thread that stages the transactions of one connection.

    ``worker`` is the thread of the applier, ``check_epoch`` is called there before a group is applied, ``deliver``
    with its answers and the calls to make then, ``fail`` with an error that ends the connection.
    """

    def __init__(
        self,
        applier: Applier,
        inbox: Inbox[Item],
        switch: Switch,
        worker: ThreadPoolExecutor,
        check_epoch: Callable[[int], None],
        deliver: Callable[[list[Ack | Nak], list[Callable[[], None]]], None],
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
        self._open_size = 0
        self._last_seq = 0
        self._batch = Batch()
        self._batch_since = 0.0
        self._in_flight: Batch | None = None
        self._refused = False
        #: An upload that failed: nothing may follow.
        self._upload_refused: Nak | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> list[Transaction]:
        """Wait until it has ended, after the switch; returns what was not handed over."""
        self._thread.join()
        left, self._batch = self._batch.transactions, Batch()
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
            if isinstance(item, _OPERATIONS):
                self._operation(item, None)
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
            elif isinstance(item, tuple):
                self._operation(*item)
            else:
                self._batch.then.append(item)
        if self._upload_refused is not None:
            raise _Refused(self._upload_refused)
        if self._in_flight is None and self._inbox.empty:
            self._hand_over()

    def _begin(self, begin: Begin) -> None:
        if self._open is not None:
            raise ProtocolError("the source", "Begin within a transaction")
        if not self._last_seq < begin.seq < 1 << 63:
            raise ProtocolError("the source", f"transaction {begin.seq} after {self._last_seq}")
        self._last_seq = begin.seq
        self._open = Transaction(begin.seq, begin.epoch)
        self._open_size = 0

    def _commit(self, commit: Commit) -> None:
        transaction = self._open
        if transaction is None or transaction.seq != commit.seq:
            what = "none" if transaction is None else str(transaction.seq)
            raise ProtocolError("the source", f"Commit {commit.seq} does not end the open transaction: {what}")
        self._open = None
        self._owners.store()
        if not self._batch.transactions:
            self._batch_since = time.monotonic()
        self._batch.add(transaction, self._open_size + transaction.metadata)

    def _operation(self, operation: Operation, upload: Upload | None) -> None:
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
        try:
            operation = self._owners.translated(operation)
            staged = self._stage(operation, upload)
        except (_Refused, Interrupted, ProtocolError):
            raise
        except Exception as error:
            raise _Refused(refusal(transaction.seq, root, operation.path, error)) from None
        if type(operation) is Put:
            # The content is on its way to disk; kept in memory as well, a group of many files would fill it.
            self._open_size += len(operation.data)
            operation = Put(root, operation.path, operation.meta, b"")
        transaction.operations.append((operation, staged))
        transaction.touch(operation)
        if staged is not None:
            transaction.contents[root, operation.path] = staged

    # --- kinds of operations

    def _stage(self, operation: Operation, upload: Upload | None) -> Staged | None:
        match operation:
            case Put():
                return self._put(operation)
            case Patch():
                assert upload is not None
                return self._patch(operation, upload)
            case Copy():
                return self._copy(operation)
            case MakeNode(kind=kind) if kind not in _NODES:
                raise ProtocolError("the source", f"{kind} is no kind of node")
        return None

    def _put(self, operation: Put) -> Staged:
        stage = self._applier.stages[operation.root]
        staged, handle = stage.create(operation.meta.mode)
        try:
            data = operation.data
            done = os.write(handle, data) if data else 0
            while done < len(data):
                done += os.write(handle, memoryview(data)[done:])
            self._applier.trees[operation.root].prepare(handle, operation.meta, stage.birth)
        except BaseException:
            stage.discard(staged)
            raise
        finally:
            os.close(handle)
        return staged

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
            made = transaction.contents.get((root, path))
            if made is not None:
                source = os.open(made.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=made.directory)
            else:
                source = self._open_file(root, path)
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
            upload.failure = refusal(0, root, upload.path, error)
            raise _Refused(upload.failure) from None
        finally:
            upload.opened = True
            self._switch.notify()

    def _open_file(self, root: int, path: bytes) -> int:
        """Open a file for reading as it is after all complete transactions; raises BaseUnknown when there is none."""
        if self._touches(root, path):
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

    def _touches(self, root: int, path: bytes) -> bool:
        batches = [self._batch] if self._in_flight is None else [self._in_flight, self._batch]
        return any(batch.touches(root, path) for batch in batches)

    # --- groups

    def _is_due(self) -> bool:
        batch = self._batch
        if batch.operations >= GROUP_OPERATIONS or batch.size >= GROUP_BYTES:
            return True
        # While the one before is under way, one more transaction costs nothing.
        return self._in_flight is None and time.monotonic() - self._batch_since >= GROUP_SECONDS

    def _hand_over(self) -> None:
        """Have the group made durable and applied, after the one before."""
        batch = self._batch
        if not (batch.transactions or batch.then or batch.refusal):
            return
        self._switch.wait(lambda: self._in_flight is None)
        if self._refused:
            raise _Refused(None)
        self._batch = Batch()
        self._in_flight = batch
        self._worker.submit(self._carry_out, batch)

    def _settle(self) -> None:
        """Wait until all complete transactions are applied."""
        self._hand_over()
        self._switch.wait(lambda: self._in_flight is None)
        if self._refused:
            raise _Refused(None)

    def _end_with(self, nak: Nak) -> None:
        """Hand over what is complete, with ``nak`` as the end of it; what follows is not taken."""
        self._batch.refusal = nak
        self._batch.then.clear()
        with contextlib.suppress(_Refused):
            self._hand_over()
        if self._open is not None:
            left, self._open = self._open, None
            self._worker.submit(self._applier.abandon, [left])
        self._refused = True

    def _carry_out(self, batch: Batch) -> None:
        """In the applier's thread."""
        try:
            answers = self._applier.commit(batch, self._check_epoch)
        except Interrupted:
            return
        except BaseException as error:
            self._fail(error)
            return
        if answers and isinstance(answers[-1], Nak):
            self._refused = True
            batch.then.clear()
        self._deliver(answers, batch.then)
        self._in_flight = None
        self._switch.notify()
        self._inbox.poke()


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
