"""The replica's end of a group's stream: stage, make durable, apply, acknowledge.

Content goes into temporary files as it arrives. On Commit everything staged is made durable, the operations are
applied in order, their names are made durable, and only then the transaction is acknowledged: what the source was
told is there survives a power cut. Blocking work runs in one worker thread, ``Applier`` below; the stream itself
is handled by ``serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from farshore import delta
from farshore.dbm import wire
from farshore.dbm.index import parent_of
from farshore.dbm.messages import (
    Ack,
    Begin,
    Chunk,
    Commit,
    Entries,
    Entry,
    FromSource,
    InStep,
    Link,
    ListTree,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Move,
    Nak,
    NoSignature,
    Operation,
    Patch,
    Ping,
    Pong,
    Put,
    Refused,
    Remove,
    SetMeta,
    WantSignature,
)
from farshore.dbm.replica.stage import Stage, Staged
from farshore.dbm.replica.tree import BaseUnknown, Tree, syncfs
from farshore.errors import ProtocolError, StaleEpoch, StateError, UnsafePath
from farshore.fmm.types import FileKind, Root
from farshore.log import Log

_log = Log(__name__)
CODEC: wire.Codec[FromSource] = wire.Codec(FromSource)

#: Up to this many changes, single fsyncs are cheaper than writing back the whole filesystem.
_FEW = 16
#: Operations that one transaction may hold; a peer that sends more is broken or hostile.
MAX_OPERATIONS = 20_000
#: Bytes of paths, link targets and attributes that one transaction may hold; contents are not kept in memory.
MAX_METADATA = 64 << 20
_BLOCK_MESSAGES = 256
_BLOCK_BYTES = 1 << 20
_ENTRIES_PER_FRAME = 200
_OPERATIONS = (MakeDir, Put, Patch, MakeSymlink, MakeNode, Link, Move, Remove, SetMeta)
_ZERO = bytes(4096)
_NUMBER = struct.Struct(">Q")
_ALIVE_SECONDS = 5.0
_T = TypeVar("_T")


class Gate(Protocol):
    """What a group lets its stream do; asked at every transaction, as the owner may change at any moment."""

    def check_epoch(self, epoch: int) -> None:
        """Raises StaleEpoch when this node is not the replica of a source at ``epoch``."""

    def in_step(self) -> None:
        """The source said that everything was sent."""

    def problem(self, texts: list[str]) -> None:
        """Metadata that could not be kept."""


@dataclass
class _Transaction:
    seq: int
    operations: list[Operation] = field(default_factory=list)
    staged: dict[int, Staged] = field(default_factory=dict)
    failure: Nak | None = None
    metadata: int = 0


class _SparseFile:
    """Writes to a descriptor; whole blocks of zeros become holes when ``sparse``."""

    def __init__(self, handle: int, sparse: bool) -> None:
        self._handle = handle
        self._sparse = sparse
        self._at = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if self._sparse:
            for start in range(0, len(view), len(_ZERO)):
                piece = view[start : start + len(_ZERO)]
                if piece != _ZERO[: len(piece)]:
                    self._write(piece, self._at + start)
        else:
            self._write(view, self._at)
        self._at += len(view)

    def finish(self) -> None:
        os.ftruncate(self._handle, self._at)

    def _write(self, view: memoryview, at: int) -> None:
        while view:
            done = os.pwrite(self._handle, view, at)
            view, at = view[done:], at + done


class Applier:
    """Stages and applies transactions of one group. All methods run in one thread."""

    def __init__(self, roots: list[tuple[str, Root]], state: Path) -> None:
        self.names = [name for name, _ in roots]
        self._trees = [Tree(root.path, root) for _, root in roots]
        self._stages = [Stage(tree.root, state / str(i)) for i, tree in enumerate(self._trees)]
        self._started = os.open(state / "started", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._open: _Transaction | None = None
        self._patch: tuple[Patch, Any, _SparseFile, int, int | None] | None = None

    @property
    def kept_aside(self) -> int:
        """Files of this side that were kept before they were overwritten."""
        return sum(tree.kept_aside for tree in self._trees)

    @property
    def started(self) -> int:
        """The last transaction that was begun to be applied; 0 when there was none."""
        data = os.pread(self._started, _NUMBER.size, 0)
        return int(_NUMBER.unpack(data)[0]) if len(data) == _NUMBER.size else 0

    def interrupt(self) -> None:
        """End the reading of contents that is under way, if any; may be called from any thread."""
        for tree in self._trees:
            tree.interrupted.set()

    def keep_aside(self, directory: Path | None, judge: Callable[[int, bytes, os.stat_result], bool]) -> None:
        """Keep what ``judge`` says nobody else has, below ``directory``; None ends it."""
        for number, tree in enumerate(self._trees):
            if directory is None:
                tree.keep_aside(None, None)
            else:
                tree.keep_aside(os.fsencode(directory / str(number)), partial(judge, number))

    def close(self) -> None:
        """Drop an open transaction and give back all handles."""
        self.abort()
        os.close(self._started)
        for tree in self._trees:
            tree.close()

    def abort(self) -> None:
        """Forget the open transaction and its staged files."""
        if self._patch is not None:
            self._close_patch()
        self._open = None
        for stage in self._stages:
            stage.clean()
        for tree in self._trees:
            tree.end()

    def handle(self, messages: list[FromSource]) -> list[Ack | Nak]:
        """Take a run of messages in order; returns an Ack or Nak for each Commit among them.

        Raises ProtocolError when they do not follow each other as they must.
        """
        answers: list[Ack | Nak] = []
        for message in messages:
            if isinstance(message, Begin):
                if self._open is not None:
                    raise ProtocolError("the source", "Begin within a transaction")
                self._open = _Transaction(message.seq)
            elif self._open is None:
                raise ProtocolError("the source", f"{type(message).__name__} outside of a transaction")
            elif isinstance(message, Commit):
                answers.append(self._commit(message.seq))
            elif isinstance(message, Chunk):
                self._chunk(message)
            elif isinstance(message, _OPERATIONS):
                self._operation(message)
            else:
                raise ProtocolError("the source", f"{type(message).__name__} within a transaction")
        return answers

    def entries(self, digests: bool) -> Iterator[list[Entry]]:
        """The whole tree in parts; with ``digests``, every file is read."""
        part: list[Entry] = []
        size = 0
        for number, tree in enumerate(self._trees):
            for entry in tree.entries(number, digests):
                cost = len(entry.path) + sum(len(n) + len(v) for n, v in entry.meta.xattrs) + 100
                if part and (len(part) >= _ENTRIES_PER_FRAME or size + cost > wire.CHUNK):
                    yield part
                    part, size = [], 0
                part.append(entry)
                size += cost
        yield part

    def signature(self, root: int, path: bytes) -> bytes | None:
        """The signature of the file at ``path``, None when there is none."""
        handle = self._tree(root).open_file(path)
        if handle is None:
            return None
        with os.fdopen(handle, "rb") as source:
            return delta.sign(source, length_hint=os.fstat(handle).st_size).to_bytes()

    # --- staging

    def _tree(self, root: int) -> Tree:
        if not 0 <= root < len(self._trees):
            raise ProtocolError("the source", f"root {root} of {len(self._trees)}")
        return self._trees[root]

    def _operation(self, operation: Operation) -> None:
        transaction = self._transaction()
        if self._patch is not None:
            raise ProtocolError("the source", "an operation before the last chunk of a delta")
        if len(transaction.operations) >= MAX_OPERATIONS:
            raise ProtocolError("the source", f"more than {MAX_OPERATIONS} operations in a transaction")
        tree = self._tree(operation.root)
        transaction.metadata += _metadata_size(operation)
        if transaction.metadata > MAX_METADATA:
            raise ProtocolError("the source", f"more than {MAX_METADATA} bytes of metadata in a transaction")
        # The content goes to disk; kept in memory as well, a transaction of many files would fill it.
        kept = msgspec.structs.replace(operation, data=b"") if isinstance(operation, Put) else operation
        transaction.operations.append(kept)
        if transaction.failure is not None:
            return
        with self._failing(operation):
            if isinstance(operation, Put):
                staged, handle = self._stages[operation.root].create()
                try:
                    _SparseFile(handle, False).write(operation.data)
                    tree.prepare(handle, operation.meta)
                finally:
                    os.close(handle)
                transaction.staged[len(transaction.operations) - 1] = staged
        if isinstance(operation, Patch):
            self._begin_patch(operation, tree)

    def _begin_patch(self, operation: Patch, tree: Tree) -> None:
        transaction = self._transaction()
        with self._failing(operation):
            base = tree.open_file(operation.path) if operation.based else None
            if operation.based and base is None:
                raise BaseUnknown(operation.path, "there is no file to build on")
            try:
                staged, handle = self._stages[operation.root].create()
            except BaseException:
                if base is not None:
                    os.close(base)
                raise
            transaction.staged[len(transaction.operations) - 1] = staged
            out = _SparseFile(handle, operation.sparse)
            reader = None if base is None else delta.FdReader(base)
            self._patch = (operation, delta.Applier(reader, out.write), out, handle, base)

    def _chunk(self, chunk: Chunk) -> None:
        transaction = self._transaction()
        if self._patch is None:
            if transaction.failure is None:
                raise ProtocolError("the source", "a chunk that belongs to nothing")
            return
        operation, applier, out, handle, _ = self._patch
        with self._failing(operation):
            applier.feed(chunk.data)
            if chunk.last:
                applier.finish()
                out.finish()
                self._tree(operation.root).prepare(handle, operation.meta)
        if chunk.last or transaction.failure is not None:
            self._close_patch()

    def _close_patch(self) -> None:
        assert self._patch is not None
        _, _, _, handle, base = self._patch
        self._patch = None
        os.close(handle)
        if base is not None:
            os.close(base)

    @contextlib.contextmanager
    def _failing(self, operation: Operation) -> Iterator[None]:
        """What goes wrong here fails the transaction, not the stream."""
        transaction = self._transaction()
        unknown = True
        try:
            yield
            return
        except (BaseUnknown, UnsafePath, delta.DeltaCorrupt) as error:
            reason = str(error)
        except StateError as error:
            unknown = False
            reason = str(error)
        except OSError as error:
            unknown = False
            reason = f"{os.fsdecode(operation.path)!r}: {error.strerror or error}"
        transaction.failure = Nak(transaction.seq, operation.root, operation.path, reason, unknown)

    # --- committing

    def _commit(self, seq: int) -> Ack | Nak:
        transaction = self._transaction()
        if seq != transaction.seq or self._patch is not None:
            raise ProtocolError("the source", f"Commit {seq} does not end transaction {transaction.seq}")
        try:
            if transaction.failure is None:
                self._sync_staged(transaction)
                # From here on the tree may hold a part of it, which the source must learn if we are cut off.
                os.pwrite(self._started, _NUMBER.pack(seq), 0)
                os.fdatasync(self._started)
                self._apply(transaction)
            if transaction.failure is not None:
                return transaction.failure
            return Ack(seq, self._problems())
        except OSError as error:
            return Nak(seq, 0, b"", f"making it durable: {error.strerror or error}", False)
        finally:
            self.abort()

    def _sync_staged(self, transaction: _Transaction) -> None:
        if len(transaction.staged) <= _FEW:
            for staged in transaction.staged.values():
                handle = os.open(staged.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staged.directory)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            return
        for directory in {staged.directory for staged in transaction.staged.values()}:
            syncfs(directory)

    def _apply(self, transaction: _Transaction) -> None:
        touched: dict[int, set[bytes | None]] = {}
        for number, operation in enumerate(transaction.operations):
            with self._failing(operation):
                self._apply_one(operation, transaction.staged.get(number))
            if transaction.failure is not None:
                return
            directories = touched.setdefault(operation.root, set())
            directories.add(parent_of(operation.path))
            if isinstance(operation, Move):
                directories.add(parent_of(operation.to))
            if isinstance(operation, (MakeDir, SetMeta)):
                directories.add(operation.path)
        for root, directories in touched.items():
            if len(directories) <= _FEW and len(transaction.operations) <= 4 * _FEW:
                self._trees[root].sync(directories)
            else:
                self._trees[root].sync_all(directories)

    def _apply_one(self, operation: Operation, staged: Staged | None) -> None:
        tree = self._tree(operation.root)
        match operation:
            case MakeDir(path=path, meta=meta):
                tree.make_directory(path, meta)
            case Put(path=path, meta=meta) | Patch(path=path, meta=meta):
                assert staged is not None
                tree.place(staged, path, meta)
            case MakeSymlink(path=path, meta=meta, target=target):
                tree.make_symlink(path, meta, target)
            case MakeNode(path=path, meta=meta, kind=kind, rdev=rdev):
                try:
                    file_kind = FileKind(kind)
                except ValueError:
                    raise ProtocolError("the source", f"{kind} is no kind of file") from None
                tree.make_node(path, meta, file_kind, rdev)
            case Link(path=path, to=to):
                tree.link(path, to)
            case Move(path=path, to=to):
                tree.move(path, to)
            case Remove(path=path):
                tree.remove(path)
            case SetMeta(path=path, meta=meta):
                tree.set_meta(path, meta)

    def _problems(self) -> list[str]:
        texts = [text for tree in self._trees for text in tree.problems]
        for tree in self._trees:
            tree.problems.clear()
        return texts

    def _transaction(self) -> _Transaction:
        assert self._open is not None
        return self._open


def _metadata_size(operation: Operation) -> int:
    """About how many bytes of memory an operation keeps until its transaction ends."""
    size = 200 + len(operation.path)
    if isinstance(operation, (Link, Move)):
        size += len(operation.to)
    else:
        if isinstance(operation, MakeSymlink):
            size += len(operation.target)
        if not isinstance(operation, Remove):
            size += sum(len(name) + len(value) + 100 for name, value in operation.meta.xattrs)
    return size


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    peer: str,
    applier: Applier,
    gate: Gate,
    worker: ThreadPoolExecutor,
) -> None:
    """Serve a group's stream after its Hello until it ends; raises ProtocolError on what does not belong there.

    ``worker`` is the one thread in which the applier lives; StaleEpoch is answered with Refused and ends the stream.
    """
    loop = asyncio.get_running_loop()
    block: list[FromSource] = []
    size = epoch = 0
    try:
        while (message := await CODEC.read(reader, peer)) is not None:
            match message:
                case Ping():
                    writer.write(CODEC.encode(Pong()))
                case InStep():
                    gate.in_step()
                case ListTree(digests=digests):
                    await _send_entries(writer, applier.entries(digests), loop, worker)
                case WantSignature(root=root, path=path):
                    await _send_signature(writer, applier, root, path, loop, worker)
                case _:
                    if isinstance(message, Begin):
                        epoch = message.epoch
                    block.append(message)
                    if isinstance(message, (Put, Chunk)):
                        size += len(message.data)
                    if not (isinstance(message, Commit) or len(block) >= _BLOCK_MESSAGES or size >= _BLOCK_BYTES):
                        continue
                    gate.check_epoch(epoch)
                    taken, block, size = block, [], 0
                    for answer in await loop.run_in_executor(worker, applier.handle, taken):
                        writer.write(CODEC.encode(answer))
                        if isinstance(answer, Ack):
                            gate.problem(answer.problems)
                        else:
                            _log.warning("transaction refused", peer=peer, path=answer.path, reason=answer.reason)
            await writer.drain()
    except StaleEpoch as error:
        writer.write(CODEC.encode(Refused(str(error), True, error.args[2])))
    finally:
        # Not awaited: the task may be on its way out, and the worker does things in order.
        worker.submit(applier.abort)


async def _send_entries(
    writer: asyncio.StreamWriter,
    parts: Iterator[list[Entry]],
    loop: asyncio.AbstractEventLoop,
    worker: ThreadPoolExecutor,
) -> None:
    alive = CODEC.encode(Entries([], False))
    while (part := await _telling(writer, alive, loop.run_in_executor(worker, next, parts, None))) is not None:
        writer.write(CODEC.encode(Entries(part, False)))
        await writer.drain()
    writer.write(CODEC.encode(Entries([], True)))


async def _telling(writer: asyncio.StreamWriter, alive: bytes, work: asyncio.Future[_T]) -> _T:
    """Wait for ``work``, however long it takes, and send ``alive`` every few seconds meanwhile."""
    while True:
        done, _ = await asyncio.wait({work}, timeout=_ALIVE_SECONDS)
        if done:
            return work.result()
        writer.write(alive)
        await writer.drain()


async def _send_signature(
    writer: asyncio.StreamWriter,
    applier: Applier,
    root: int,
    path: bytes,
    loop: asyncio.AbstractEventLoop,
    worker: ThreadPoolExecutor,
) -> None:
    try:
        work = loop.run_in_executor(worker, applier.signature, root, path)
        signature = await _telling(writer, CODEC.encode(Chunk(b"", False)), work)
    except (UnsafePath, OSError) as error:
        _log.warning("no signature", path=path, reason=error)
        signature = None
    if signature is None:
        writer.write(CODEC.encode(NoSignature()))
        return
    for start in range(0, len(signature), wire.CHUNK):
        piece = signature[start : start + wire.CHUNK]
        writer.write(CODEC.encode(Chunk(piece, start + wire.CHUNK >= len(signature))))
        await writer.drain()
