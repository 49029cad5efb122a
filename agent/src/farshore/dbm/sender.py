"""The source's end of a group's stream: connect, compare once in full, then follow.

One transaction is under way at a time; while it is, changes gather, so that under load transactions grow by
themselves. Everything that blocks (disk, index, delta) happens in one worker thread; the event loop only moves
frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from farshore import tls
from farshore.config import NodeRef
from farshore.dbm import wire
from farshore.dbm.index import LINEAGE, SEQ, Index, IndexDamaged, Known, clamp_time, is_damage, set_aside
from farshore.dbm.messages import (
    Ack,
    Begin,
    Chunk,
    Commit,
    Entries,
    Entry,
    FromReplica,
    FromSource,
    Hello,
    InStep,
    ListTree,
    Nak,
    NoSignature,
    Ping,
    Pong,
    Refused,
    WantSignature,
    Welcome,
)
from farshore.dbm.planner import MAX_PATH, Batch, Messages, Planner, dirty_everything
from farshore.dbm.replica import paths
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
#: A commit may have to write back much; a dead peer is noticed by TCP long before.
_ANSWER_SECONDS = 600.0
_BACKOFF = (0.1, 5.0)
_BLOCK = 512 << 10
_TAKE = 2000
#: A signature may take so many bytes, and so many more for each byte of the file.
_SIGNATURE_BYTES = 64 << 20
_SIGNATURE_SHARE = 24 / 4096
#: Seconds of silence after which TCP gives a connection up.
_DEAD_SECONDS = 15


class ReplicaCannot(FarshoreError):
    """{0} cannot take the change: {1}"""


class _Pending(msgspec.Struct, frozen=True):
    """What a transaction changes, written down before its Commit leaves.

    Not synced: losing it in a power cut costs a full comparison, nothing else.
    """

    seq: int
    drastic: bool
    paths: list[tuple[int, bytes]]

    def write(self, path: Path) -> None:
        """Replace what is written down."""
        temporary = path.with_name(path.name + ".new")
        temporary.write_bytes(msgspec.msgpack.encode(self))
        temporary.rename(path)

    @classmethod
    def read(cls, path: Path) -> _Pending | None:
        """What was written down; None when there is nothing that can be relied on."""
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return None


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
        self._batches: list[Batch] = []
        self._wake = asyncio.Event()
        self._progress = asyncio.Condition()
        self._told_in_step = False
        self._naks = 0
        self.connected = False
        self.comparing = False
        self.compared = False
        self.reason = "not connected yet"
        self.seq = 0
        self.sent_bytes = 0
        self.replica_problems: dict[str, None] = {}

    # --- for other threads and rooms

    def wake(self) -> None:
        """Something was marked dirty; may be called from any thread."""
        self._loop.call_soon_threadsafe(self._wake.set)

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
        return self._planner.problems.get((min(self._planner.absent_roots), b"", "root"), "a protected path is missing")

    def problems(self) -> list[str]:
        """What could not be read here or kept there."""
        mine = list(self._planner.problems.values()) if self._planner else []
        return mine + [f"{self._peer.node}: {text}" for text in self.replica_problems]

    async def wait_durable(self, mark: int, timeout: float) -> None:
        """Return when everything marked below ``mark`` is durable on the replica; raises NotInTime with the cause."""

        def done() -> bool:
            lowest = self._dirty.lowest_mark()
            settled = lowest is None or lowest >= mark
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
            self._worker.submit(self._close_index)
            self._worker.shutdown(wait=False)

    def _close_index(self) -> None:
        index, self._index = self._index, None
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
            self._planner = Planner(self._index, [root for _, root in self._roots])
        return self._index, self._planner

    async def _connect_and_send(self) -> None:
        reader, writer = await tls.connect(self._peer, self._context)
        _detect_death(writer)
        try:
            await self._session(reader, writer)
        finally:
            self.connected = False
            writer.close()
            await self._give_back()

    async def _give_back(self) -> None:
        """What was not acknowledged is dirty again."""
        batches, self._batches = self._batches, []
        try:
            await asyncio.shield(self._loop.run_in_executor(self._worker, self._rollback))
        finally:
            for batch in batches:
                self._dirty.restore(batch.items)
            if batches:
                self._wake.set()

    def _rollback(self) -> None:
        if self._index is not None:
            self._index.rollback()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names = [name for name, _ in self._roots]
        writer.write(_CODEC.encode(Hello(wire.PROTOCOL, self._group, self._epoch, names)))
        welcome = await self._read(reader, 30)
        if not isinstance(welcome, Welcome):
            raise ProtocolError(self._peer.node, f"{type(welcome).__name__} instead of Welcome")
        self._on_confirmed()
        index, planner = await self._in_worker(self._open_index)
        hints = await self._in_worker(self._resume, index, planner, welcome)
        if hints is None:
            await self._compare(reader, writer, index, welcome)
            hints = dirty_everything(range(len(self._roots)))
            planner.looked_at = 0
        elif not self.compared:
            # Nobody watched before this process began, and the watcher may take long to start.
            hints = [*hints, *dirty_everything(range(len(self._roots)))]
        self._dirty.mark(hints, time.monotonic())
        self.connected = self.compared = True
        self.reason = "replicating"
        self._told_in_step = False
        _log.info("replicating", group=self._group, to=self._peer.node, epoch=self._epoch)
        while True:
            self._wake.clear()
            items = self._dirty.take(_TAKE)
            if items:
                self._batches.append(Batch(items))
            if self._batches:
                # The newest first, then the oldest by turns: a full scan of hours does not hold up what changes now.
                await self._transaction(reader, writer, index, planner, self._batches[-1])
                if len(self._batches) > 1:
                    await self._transaction(reader, writer, index, planner, self._batches[0])
                continue
            if not self._told_in_step and not self._absent():
                self._told_in_step = True
                writer.write(_CODEC.encode(InStep()))
                _log.info("in step", group=self._group, paths=await self._in_worker(index.count))
            self.comparing = False
            await self._note_progress()
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                writer.write(_CODEC.encode(Ping()))
                answer = await self._read(reader, 30)
                if not isinstance(answer, Pong):
                    raise ProtocolError(self._peer.node, f"{type(answer).__name__} instead of Pong") from None

    def _resume(self, index: Index, planner: Planner, welcome: Welcome) -> list[Hint] | None:
        """What must be looked at before the index can be relied on again; None when it must be made anew.

        The replica may have begun a transaction whose acknowledgement never came. What it changes was written
        down before its Commit was sent.
        """
        self.seq = int(index.get_fact(SEQ) or b"0")
        if index.get_fact(LINEAGE) != welcome.lineage:
            return None
        if welcome.started == self.seq:
            return []
        pending = _Pending.read(self._pending_path)
        if pending is None or not (pending.seq == welcome.started == self.seq + 1) or pending.drastic:
            return None
        self.seq = welcome.started
        index.begin()
        hints = planner.doubt(pending.paths)
        index.set_fact(SEQ, str(self.seq).encode())
        index.commit()
        return hints

    async def _compare(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, index: Index, welcome: Welcome
    ) -> None:
        """Learn what the replica has, as another history made it; then every path is looked at."""
        self.comparing = True
        self.reason = "comparing in full"
        _log.info("comparing in full", group=self._group, with_=self._peer.node)
        await self._in_worker(index.begin)
        await self._in_worker(index.clear)
        writer.write(_CODEC.encode(ListTree(digests=not welcome.was_in_step)))
        while True:
            part = await self._read(reader, _ANSWER_SECONDS)
            if not isinstance(part, Entries):
                raise ProtocolError(self._peer.node, f"{type(part).__name__} instead of Entries")
            # What is too long to be named cannot be told about either; it goes with what it lies in.
            known = [self._known(entry) for entry in part.entries if len(entry.path) <= MAX_PATH]
            await self._in_worker(index.put_all, known)
            if part.last:
                break
        self.seq = welcome.started
        await self._in_worker(index.set_fact, LINEAGE, welcome.lineage)
        await self._in_worker(index.set_fact, SEQ, str(self.seq).encode())
        await self._in_worker(index.commit)

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

    async def _transaction(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        index: Index,
        planner: Planner,
        batch: Batch,
    ) -> None:
        seq = self.seq + 1
        await self._in_worker(index.begin)
        messages = planner.transaction(batch)
        answer: bytes | None = None
        opened = False
        while True:
            frames, want, ended = await self._in_worker(_gather, messages, answer)
            if frames and not opened:
                opened = True
                frames.insert(0, _CODEC.encode(Begin(self._epoch, seq)))
            self.sent_bytes += sum(map(len, frames))
            writer.writelines(frames)
            await writer.drain()
            if ended:
                break
            answer = await self._want_signature(reader, writer, index, want) if want else None
        if opened:
            pending = _Pending(seq, planner.drastic, sorted(planner.changed))
            await self._in_worker(pending.write, self._pending_path)
            writer.write(_CODEC.encode(Commit(seq)))
            verdict = await self._read(reader, _ANSWER_SECONDS)
            if isinstance(verdict, Nak):
                await self._refused(index, planner, verdict)
            if not isinstance(verdict, Ack) or verdict.seq != seq:
                raise ProtocolError(self._peer.node, f"{verdict!r} instead of Ack({seq})")
            self._naks = 0
            self.seq = seq
            await self._in_worker(index.set_fact, SEQ, str(seq).encode())
            for text in verdict.problems:
                self.replica_problems[text] = None
        await self._in_worker(index.commit)
        if batch.finished:
            again, planner.again = planner.again, []
            self._dirty.mark(again, time.monotonic())
            self._dirty.settle(batch.items)
            self._batches.remove(batch)
            await self._note_progress()

    async def _refused(self, index: Index, planner: Planner, nak: Nak) -> NoReturn:
        """Raises PeerRefused or ReplicaCannot: a new connection finds out how far the replica came."""
        await self._in_worker(index.rollback)
        if not nak.unknown_base:
            raise ReplicaCannot(self._peer.node, nak.reason)
        self._naks += 1
        _log.warning("the replica differs from the index", group=self._group, path=nak.path, reason=nak.reason)
        await self._in_worker(index.begin)
        if self._naks > 1:
            # Doubting one path did not help: what is known of the replica is wrong on a larger scale.
            self._naks = 0
            await self._in_worker(index.clear)
        else:
            self._dirty.mark(await self._in_worker(planner.doubt, [(nak.root, nak.path)]), time.monotonic())
        await self._in_worker(index.commit)
        raise PeerRefused(self._peer.node, nak.reason)

    async def _want_signature(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, index: Index, want: WantSignature
    ) -> bytes | None:
        known = await self._in_worker(index.get, want.root, want.path)
        most = _SIGNATURE_BYTES + int((known.size if known else 0) * _SIGNATURE_SHARE)
        writer.write(_CODEC.encode(want))
        blob = bytearray()
        while True:
            part = await self._read(reader, _ANSWER_SECONDS)
            if isinstance(part, NoSignature):
                return None
            if not isinstance(part, Chunk):
                raise ProtocolError(self._peer.node, f"{type(part).__name__} instead of a signature")
            blob += part.data
            if len(blob) > most:
                raise ProtocolError(self._peer.node, f"a signature of more than {most} bytes")
            if part.last:
                return bytes(blob)

    async def _note_progress(self) -> None:
        async with self._progress:
            self._progress.notify_all()

    async def _in_worker(self, call: Callable[..., _T], *args: object) -> _T:
        return await self._loop.run_in_executor(self._worker, call, *args)

    async def _read(self, reader: asyncio.StreamReader, timeout: float) -> FromReplica:
        """The replica's next message; Refused is raised as the error it stands for."""
        try:
            async with asyncio.timeout(timeout):
                message = await _CODEC.read(reader, self._peer.node)
        except TimeoutError:
            raise PeerUnreachable(self._peer.node, f"no answer within {timeout:g} s") from None
        if message is None:
            raise PeerUnreachable(self._peer.node, "it closed the connection")
        if isinstance(message, Refused):
            if message.stale:
                raise StaleEpoch(self._group, self._epoch, message.epoch)
            raise PeerRefused(self._peer.node, message.reason)
        return message


def _gather(messages: Messages, answer: bytes | None) -> tuple[list[bytes], WantSignature | None, bool]:
    """Run the planner on for about a block: the frames, a signature that it waits for, and whether it has ended."""
    frames: list[bytes] = []
    size = 0
    try:
        message: FromSource = messages.send(answer) if answer is not None else next(messages)
        while True:
            if isinstance(message, WantSignature):
                return frames, message, False
            frame = _CODEC.encode(message)
            frames.append(frame)
            size += len(frame)
            if size >= _BLOCK:
                return frames, None, False
            message = next(messages)
    except StopIteration:
        return frames, None, True


def _detect_death(writer: asyncio.StreamWriter) -> None:
    """Let TCP notice a peer that is gone, also when nothing is sent."""
    sock = writer.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_SECONDS * 1000)
