"""The replica's end of a group's stream.

The event loop reads blocks, sorts what is in them, and sends answers. Transactions are staged and made durable by one
thread (``replica.staging``), uploads fed by another (``replica.upload``), and what was made durable is applied by the
group's worker (``replica.commit``). Queues between them are bounded: when one is full, nothing more is read.
Only what survives a power cut is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from farshore.dbm import wire
from farshore.dbm.blocks import BlockReader, BlockWriter, tune
from farshore.dbm.messages import (
    MAX_UPLOADS,
    Ack,
    Applied,
    Begin,
    Cause,
    Chunk,
    Commit,
    Drop,
    EndSurvey,
    Entries,
    Entry,
    FromSource,
    Hello,
    InStep,
    ListTree,
    Look,
    Nak,
    Names,
    NoSignature,
    Patch,
    Ping,
    Pong,
    Put,
    Refused,
    SignaturePart,
    Survey,
    Unkept,
    Uploaded,
    WantDigests,
    WantSignature,
)
from farshore.dbm.messages import Upload as UploadFrame
from farshore.dbm.owners import Leaving, OwnersDiffer
from farshore.dbm.replica.commit import Applier, Listener, refusal
from farshore.dbm.replica.intake import Inbox, Switch
from farshore.dbm.replica.paths import MAX_PATH
from farshore.dbm.replica.staging import Item, Stager, metadata_size
from farshore.dbm.replica.survey import Surveys
from farshore.dbm.replica.upload import Upload, Uploader
from farshore.errors import ProtocolError, StaleEpoch, UnsafePath
from farshore.log import Log

__all__ = ["CODEC", "Applier", "Gate", "serve"]

_log = Log(__name__)
CODEC: wire.Codec[FromSource] = wire.Codec(FromSource)

#: Bytes of operations, and of chunks, that may wait for their threads.
QUEUE_BYTES = 8 << 20
#: Answers that may wait for a source that does not read them.
_MOST_ANSWERS = 256
_ALIVE_SECONDS = 5.0
#: Seconds after which a verification's question does not wait any longer for a replica that applies nothing.
_HELD_SECONDS = 0.5
#: Bytes of memory that a message without content counts for: a peer may send nothing but such.
_LEAST = 100
#: Messages that are sorted before others of the event loop have their turn, some ms: a block of 2 MiB may hold 200,000.
_IN_A_ROW = 1000
#: The source is told how many files lack something after so many seconds.
_UNKEPT_SECONDS = 5.0
#: A step of an upload that is under way when the connection ends has so long to end in good order.
_GRACE_SECONDS = 10.0
_T = TypeVar("_T")


class Gate(Protocol):
    """What a group lets its stream do; asked at every transaction, as the owner may change at any moment."""

    def check_epoch(self, epoch: int) -> None:
        """Raises StaleEpoch when this node is not the replica of a source at ``epoch``. Any thread may ask."""

    def in_step(self) -> None:
        """The source said that everything was sent."""


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    peer: str,
    applier: Applier,
    gate: Gate,
    worker: ThreadPoolExecutor,
    compress: bool = True,
) -> None:
    """Serve a group's stream after its Welcome until it ends; raises ProtocolError on what does not belong there.

    ``worker`` is the one thread in which the applier lives: what is submitted to it after this has returned finds the
    connection's threads ended and its uploads suspended. StaleEpoch is answered with Refused and ends the stream.
    """
    tune(writer)
    session = _Session(BlockReader(reader, peer), BlockWriter(writer, compress=compress), peer, applier, gate, worker)
    try:
        await session.run()
    finally:
        session.end()


class _Outbox:
    """Answers on their way to the source, as many in a block as have come together."""

    def __init__(self, blocks: BlockWriter) -> None:
        self._blocks = blocks
        self._frames: list[bytes] = []
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    def put(self, message: object) -> None:
        """Send ``message`` soon."""
        self._frames.append(wire.frame(message))
        self._emptied.clear()
        self._filled.set()

    async def room(self) -> None:
        """Wait until not too much waits."""
        while len(self._frames) > _MOST_ANSWERS:
            await self._emptied.wait()

    async def run(self) -> None:
        """Send until cancelled, or until the source is gone, which is no fault of its stream."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self._filled.wait()
                await self.flush()

    async def flush(self) -> None:
        """Send what is there."""
        frames, self._frames = self._frames, []
        self._filled.clear()
        if frames:
            await self._blocks.send(frames)
        self._emptied.set()


class _Session(Listener):
    """One connection."""

    def __init__(
        self,
        blocks: BlockReader,
        answers: BlockWriter,
        peer: str,
        applier: Applier,
        gate: Gate,
        worker: ThreadPoolExecutor,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._blocks = blocks
        self._outbox = _Outbox(answers)
        self._peer = peer
        self._applier = applier
        self._gate = gate
        self._worker = worker
        self._switch = Switch()
        self._operations: Inbox[Item] = Inbox(self._loop, QUEUE_BYTES)
        self._chunks: Inbox[tuple[Upload, bytes | None, bool]] = Inbox(self._loop, QUEUE_BYTES)
        self._stager = Stager(
            applier, self._operations, self._switch, worker, gate.check_epoch, self._deliver, self._fail
        )
        self._uploader = Uploader(
            self._chunks, self._switch, self._upload_failed, self._upload_complete, self._drop, self._fail
        )
        self._surveys = Surveys(applier, self._tell, self._fail)
        #: The uploads that the source can still speak of, by their number.
        self._open: dict[int, Upload] = {}
        #: All whose last chunk has arrived, of these.
        self._sent: set[int] = set()
        #: All that may have to be suspended when the connection ends.
        self._alive: list[Upload] = []
        self._look_for_closed = 4 * MAX_UPLOADS
        #: A transaction or an upload was refused: all that follows is read and not taken.
        self._refused = False
        #: What has been answered: nothing is told to be applied before it was told to be durable.
        self._acked = 0
        self._applied: Applied | None = None
        self._no_signature_told = False
        self._settling: asyncio.Future[bool] | None = None
        self._failure: asyncio.Future[None] = self._loop.create_future()
        #: What the source was told of metadata that is not kept, when, and the register's version then.
        self._unkept: list[Cause] = []
        self._unkept_at = -math.inf
        self._unkept_version = 0
        # What is sorted out of the block at hand.
        self._items: list[Item] = []
        self._items_size = 0
        self._pieces: list[tuple[Upload, bytes | None, bool]] = []
        self._pieces_size = 0

    async def run(self) -> None:
        """Serve until the stream ends; raises what ends it otherwise."""
        self._applier.begin_session()
        self._applier.listener = self
        self._tell_unkept()
        self._stager.start()
        self._uploader.start()
        tasks: list[asyncio.Future[None]] = [
            asyncio.ensure_future(self._read()),
            asyncio.ensure_future(self._outbox.run()),
        ]
        try:
            await asyncio.wait([*tasks, self._failure], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        try:
            for part in (self._failure, *tasks):
                if part.done() and not part.cancelled():
                    part.result()
        except StaleEpoch as error:
            self._outbox.put(Refused(str(error), True, error.args[2]))
            await self._outbox.flush()
        except OwnersDiffer as error:
            self._outbox.put(Refused(str(error), False, 0))
            await self._outbox.flush()

    def end(self) -> None:
        """Let the threads end; the worker cleans up after them."""
        self._switch.end()
        self._operations.end()
        self._chunks.end()
        self._applier.stop_reading()
        self._applier.forget_calls()
        self._surveys.end()
        if not self._failure.done():
            self._failure.cancel()
        elif not self._failure.cancelled():
            self._failure.exception()
        # Not awaited: the task may be on its way out, and the worker does things in order.
        self._worker.submit(self._finish)

    def _finish(self) -> None:
        grace = 0.0 if self._applier.interrupted.is_set() else _GRACE_SECONDS
        if not self._uploader.join(grace):
            for upload in self._alive:
                upload.abandoned = True
            self._uploader.join(None)
        self._applier.abandon(self._stager.join())
        self._applier.forget_calls()
        if self._applier.listener is self:
            self._applier.listener = Listener()
        for upload in self._alive:
            if not upload.closed:
                self._applier.suspend(upload)
        self._applier.end_session()

    # --- what arrives

    async def _read(self) -> None:
        in_a_row = 0
        while (bodies := await self._next()) is not None:
            for body in bodies:
                message = CODEC.decode(body, self._peer)
                if not self._sort(message, body):
                    await self._answer(message)
                in_a_row += 1
                if in_a_row >= _IN_A_ROW:
                    in_a_row = 0
                    await asyncio.sleep(0)
                    await self._outbox.room()
            await self._flush()
            await self._outbox.room()

    async def _next(self) -> list[bytes] | None:
        # A source that is gone is no fault of its stream, however it went.
        with contextlib.suppress(ConnectionError):
            return await self._blocks.read()
        return None

    def _sort(self, message: FromSource, body: bytes) -> bool:
        """Put a message in its queue; False when it is a question, which is answered before anything else is read."""
        kind = type(message)
        if kind is Ping or kind is ListTree or kind is WantSignature or kind is Look:
            return False
        if isinstance(message, (Survey, EndSurvey, WantDigests)):
            self._surveys.take(message)
            return True
        if self._refused:
            return True
        if kind is Put:
            self._add((message, body, None), len(body) + 200)  # type: ignore[arg-type]
        elif isinstance(message, Chunk):
            self._chunk(message)
        elif isinstance(message, Begin):
            self._gate.check_epoch(message.epoch)
            self._add(message, _LEAST)
        elif isinstance(message, Commit):
            self._add(message, _LEAST)
        elif isinstance(message, UploadFrame):
            self._upload(message)
        elif isinstance(message, Patch):
            self._patch(message, body)
        elif isinstance(message, Drop):
            upload = self._take_out(message.upload)
            self._pieces.append((upload, None, True))
            self._pieces_size += _LEAST
        elif isinstance(message, InStep):
            self._add(self._in_step, _LEAST)
        elif isinstance(message, Names):
            self._add(message, _LEAST * (1 + len(message.users) + len(message.groups)))
        elif isinstance(message, Hello):
            raise ProtocolError(self._peer, "Hello for a second time")
        else:
            self._add((message, body, None), metadata_size(message))  # type: ignore[arg-type]
        return True

    def _add(self, item: Item, size: int) -> None:
        self._items.append(item)
        self._items_size += size

    async def _flush(self) -> None:
        """Hand over what was sorted; returns when the queues have room again."""
        for inbox, items, size in (
            (self._operations, self._items, self._items_size),
            (self._chunks, self._pieces, self._pieces_size),
        ):
            if items and not inbox.put(items, size):  # type: ignore[arg-type]
                await self._telling(Pong(), inbox.room())
        self._items, self._items_size = [], 0
        self._pieces, self._pieces_size = [], 0

    def _in_step(self) -> None:
        """In the worker, once all before is applied."""
        self._applier.in_step()
        self._loop.call_soon_threadsafe(self._are_in_step)

    def _are_in_step(self) -> None:
        self._gate.in_step()
        self._tell_unkept()

    # --- uploads

    def _upload(self, frame: UploadFrame) -> None:
        """An upload begins, or goes on."""
        number, root, path = frame.upload, frame.root, frame.path
        if number in self._open:
            raise ProtocolError(self._peer, f"upload {number} begins again")
        if len(self._open) >= MAX_UPLOADS:
            raise ProtocolError(self._peer, f"more than {MAX_UPLOADS} uploads at once")
        self._applier.tree(root)
        old = self._applier.resume(root, path)
        if len(self._alive) >= self._look_for_closed:
            # Not each time: a peer may open and drop them faster than they are closed.
            self._alive = [upload for upload in self._alive if not upload.closed]
            self._look_for_closed = 2 * len(self._alive) + 4 * MAX_UPLOADS
        if old is not None:
            self._alive.append(old)
        if frame.skip:
            if old is None or old.based != frame.based or old.received != frame.skip:
                raise ProtocolError(self._peer, f"there are no {frame.skip} bytes of an upload for {path!r}")
            old.resume(frame.sparse)
            self._open[number] = old
            return
        if old is not None:
            self._pieces.append((old, None, True))
        upload = self._open[number] = Upload(root, path, frame.based, frame.sparse)
        self._alive.append(upload)
        self._add(upload, 200 + len(path))

    def _chunk(self, chunk: Chunk) -> None:
        upload = self._open.get(chunk.upload)
        if upload is None or chunk.upload in self._sent:
            raise ProtocolError(self._peer, f"a chunk of upload {chunk.upload}, which is not open")
        if chunk.last:
            self._sent.add(chunk.upload)
        self._pieces.append((upload, chunk.data, chunk.last))
        self._pieces_size += len(chunk.data) + 100

    def _patch(self, patch: Patch, body: bytes) -> None:
        if patch.upload not in self._sent:
            raise ProtocolError(self._peer, f"a Patch with upload {patch.upload}, which is not complete")
        self._add((patch, body, self._take_out(patch.upload)), metadata_size(patch))

    def _take_out(self, number: int) -> Upload:
        upload = self._open.pop(number, None)
        if upload is None:
            raise ProtocolError(self._peer, f"upload {number} is not open")
        self._sent.discard(number)
        return upload

    def _upload_failed(self, upload: Upload, error: Exception) -> None:
        """In the thread of the uploads."""
        self._applier.make_room_for(error, self._worker)
        upload.failure = refusal(0, upload.root, upload.path, error)
        self._stager.refuse(upload.failure)

    def _upload_complete(self, upload: Upload) -> None:
        """In the thread of the uploads."""
        self._loop.call_soon_threadsafe(self._tell_complete, upload)

    def _tell_complete(self, upload: Upload) -> None:
        for number, each in self._open.items():
            if each is upload:
                self._outbox.put(Uploaded(number))

    def _drop(self, upload: Upload) -> None:
        """In the thread of the uploads."""
        self._applier.drop(upload)

    # --- answers

    def _deliver(self, answers: Sequence[Ack | Nak]) -> None:
        """From the stager: a group is accepted, or not."""
        self._loop.call_soon_threadsafe(self._answered, answers)

    def _answered(self, answers: Sequence[Ack | Nak]) -> None:
        for answer in answers:
            if isinstance(answer, Ack):
                self._acked = answer.seq
                self._outbox.put(answer)
                if self._applied is not None:
                    self._tell_applied(self._applied)
            elif not self._refused:
                self._outbox.put(answer)
                _log.warning("refused", peer=self._peer, seq=answer.seq, path=answer.path, reason=answer.reason)
                self._refused = True
                self._stager.stop()
                self._operations.shut()
                self._chunks.shut()
                if self._settling is not None and not self._settling.done():
                    self._settling.set_result(False)

    def applied(self, seq: int, stalled: str) -> None:
        """In the worker."""
        self._loop.call_soon_threadsafe(self._tell_applied, Applied(seq, stalled))
        self._switch.notify()

    def _tell_applied(self, message: Applied) -> None:
        self._applied = None
        self._tell_unkept()
        if message.seq > self._acked:
            # The worker was quicker than the answer to what was accepted.
            self._applied = message
        else:
            self._outbox.put(message)

    def doubted(self, nak: Nak) -> None:
        """In the worker: an operation was left out."""
        self._loop.call_soon_threadsafe(self._answered, [nak])

    def _tell(self, message: object) -> None:
        """From any thread: send ``message`` soon."""
        self._loop.call_soon_threadsafe(self._outbox.put, message)

    def _tell_unkept(self) -> None:
        """Tell the source what is not kept, if that has changed: a new cause at once, a number now and then."""
        version = self._applier.unkept_version()
        if version == self._unkept_version:
            return
        causes = self._applier.unkept_causes()
        now = time.monotonic()
        news = {cause.text for cause in causes} != {cause.text for cause in self._unkept}
        if news or now - self._unkept_at >= _UNKEPT_SECONDS:
            self._unkept, self._unkept_at, self._unkept_version = causes, now, version
            self._outbox.put(Unkept(causes))
            self._worker.submit(self._applier.store_unkept)

    def _fail(self, error: BaseException) -> None:
        """From any thread: the connection cannot go on."""

        def told() -> None:
            if not self._failure.done():
                self._failure.set_exception(error)

        self._loop.call_soon_threadsafe(told)

    async def _answer(self, message: FromSource) -> None:
        """Answer a question: Ping at once, the others when all that came before them is applied."""
        if isinstance(message, Ping):
            self._tell_unkept()
            self._outbox.put(Pong())
            return
        await self._flush()
        if isinstance(message, Look):
            await self._look(message)
            return
        if not await self._settled():
            return
        if isinstance(message, ListTree):
            await self._work(Pong(), self._applier.forget_incomplete)
            self._applier.begin_unkept_round()
            await self._send_entries(self._applier.entries(message.digests))
        elif isinstance(message, WantSignature):
            await self._send_signature(message.root, message.path)

    async def _look(self, message: Look) -> None:
        """Answer when all before it is applied; while nothing is, a verification must not hold up the stream."""
        settled = asyncio.ensure_future(self._settled())
        try:
            while not (await asyncio.wait({settled}, timeout=_HELD_SECONDS))[0]:
                if self._applier.held is not None or self._applier.stalled:
                    self._surveys.give_up("it applies nothing at the moment; see its status")
                    return
        finally:
            settled.cancel()
        if settled.result():
            (await self._work(Pong(), self._surveys.look, message))()

    async def _settled(self) -> bool:
        """Wait until all that came is applied; False when something was refused."""
        if self._refused:
            return False
        done = self._settling = self._loop.create_future()

        def told() -> None:
            if not done.done():
                done.set_result(True)

        def settle() -> None:
            self._applier.checkpoint()
            self._loop.call_soon_threadsafe(told)

        if not self._operations.put([settle], 0):
            await self._telling(Pong(), self._operations.room())
        return await self._telling(Pong(), done)

    async def _send_entries(self, parts: Iterator[list[Entry]]) -> None:
        leaving = Leaving(self._applier.owners)
        while (part := await self._work(Entries([], False), next, parts, None)) is not None:
            for names in await self._work(Entries([], False), leaving.listed, part, self._applier.place):
                self._outbox.put(names)
            self._outbox.put(Entries(part, False))
            await self._outbox.room()
        self._outbox.put(Entries([], True))

    async def _send_signature(self, root: int, path: bytes) -> None:
        try:
            signature = await self._work(SignaturePart(b"", False), self._applier.signature, root, path)
        except (UnsafePath, OSError) as error:
            if not self._no_signature_told:
                self._no_signature_told = True
                _log.warning("no signature", path=path[:MAX_PATH], reason=error)
            signature = None
        if signature is None:
            self._outbox.put(NoSignature())
            return
        for start in range(0, len(signature), wire.CHUNK):
            piece = signature[start : start + wire.CHUNK]
            self._outbox.put(SignaturePart(piece, start + wire.CHUNK >= len(signature)))
            await self._outbox.room()

    async def _work(self, alive: object, call: Callable[..., _T], *args: object) -> _T:
        return await self._telling(alive, self._loop.run_in_executor(self._worker, call, *args))

    async def _telling(self, alive: object, work: Awaitable[_T]) -> _T:
        """Wait for ``work``, however long it takes, and send ``alive`` every few seconds meanwhile."""
        future = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({future}, timeout=_ALIVE_SECONDS))[0]:
                self._outbox.put(alive)
        finally:
            if not future.done():
                future.cancel()
        return future.result()
