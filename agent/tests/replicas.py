"""For tests: a replica's end in this process, and a source made by hand that speaks to it over a socket."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from farshore import delta
from farshore.dbm import receiver, wire
from farshore.dbm.messages import (
    Ack,
    Applied,
    Begin,
    Cause,
    Chunk,
    Commit,
    FromReplica,
    Meta,
    Nak,
    Partial,
    Patch,
    Unkept,
    Upload,
    Uploaded,
)
from farshore.dbm.receiver import Applier
from farshore.dbm.unkept import Unkept as Register
from farshore.fmm.types import Root

FILE = Meta(0o644, os.getuid(), os.getgid(), 1, 1, [])
DIRECTORY = Meta(0o755, os.getuid(), os.getgid(), 1, 1, [])
GENEROUS = 60.0
_HEAD = struct.Struct(">IB")
_CODEC: wire.Codec[FromReplica] = wire.Codec(FromReplica)
T = TypeVar("T")


class Gate:
    """A group that is content; ``checks`` may be replaced."""

    def __init__(self) -> None:
        self.checks: Callable[[int], None] = lambda epoch: None
        self.in_steps = 0
        #: Why it applies nothing.
        self.stalled = ""

    def check_epoch(self, epoch: int) -> None:
        self.checks(epoch)

    def in_step(self) -> None:
        self.in_steps += 1


class Source:
    """The other end of a socket: frames go out in plain blocks, and come so."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(GENEROUS)
        self._messages: list[FromReplica] = []
        #: The uploads that the replica said to have, and what it last said to lack, of the messages that were read.
        self.uploaded: list[int] = []
        #: The last transaction that it said to have applied.
        self.applied = 0
        #: Why it applies nothing.
        self.stalled = ""
        self.unkept: list[Cause] = []

    def put(self, *messages: object) -> None:
        """Send messages, in blocks of at most 1 MiB."""
        block = b""
        for message in messages:
            frame = wire.frame(message)
            if block and len(block) + len(frame) > 1 << 20:
                self.sock.sendall(_HEAD.pack(1 + len(block), 0) + block)
                block = b""
            block += frame
        if block:
            self.sock.sendall(_HEAD.pack(1 + len(block), 0) + block)

    def read(self) -> FromReplica | None:
        """The next message; None at the end."""
        while not self._messages:
            head = self._exactly(_HEAD.size)
            if head is None:
                return None
            length, kind = _HEAD.unpack(head)
            assert kind == 0
            body = self._exactly(length - 1)
            assert body is not None
            at = 0
            while at < len(body):
                (size,) = struct.unpack_from(">I", body, at)
                self._messages.append(_CODEC.decode(body[at + 4 : at + 4 + size], "replica"))
                at += 4 + size
        return self._messages.pop(0)

    def verdict(self) -> Ack | Nak:
        """The next one of these, an Ack once what it acknowledges is applied.

        That an upload is complete, or what is unkept, may come before it.
        """
        acked: Ack | None = None
        while True:
            message = self.read()
            match message:
                case Uploaded(upload=number):
                    self.uploaded.append(number)
                case Ack():
                    acked = message
                case Unkept(causes=causes):
                    self.unkept = causes
                case Applied(seq=seq, stalled=stalled):
                    self.stalled = stalled
                    self.applied = seq
                    if acked is not None and seq >= acked.seq:
                        return acked
                case Nak():
                    return message
                case _:
                    raise AssertionError(message)

    def until_acked(self, seq: int) -> None:
        """Read until transaction ``seq`` is acknowledged."""
        while True:
            answer = self.verdict()
            assert isinstance(answer, Ack), answer
            if answer.seq == seq:
                return

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            try:
                piece = self.sock.recv(count - len(data))
            except ConnectionError:
                return None
            if not piece:
                return None
            data += piece
        return data


async def serve(sock: socket.socket, applier: Applier, gate: Gate, worker: ThreadPoolExecutor) -> None:
    """The replica's end of a socket."""
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        await receiver.serve(reader, writer, "source", applier, gate, worker, compress=False)
    finally:
        writer.close()


class Replica:
    """A replica of one root, or of several, and a connection to it."""

    def __init__(self, base: Path, roots: tuple[str, ...] = ("root",)) -> None:
        self.base = base
        self.root = base / roots[0]
        self.state = base / "state"
        self.state.mkdir(exist_ok=True)
        self.gate = Gate()
        self.unkept_path: Path | None = None
        self.seq = 0
        self._roots = [(name, Root(os.fsencode(f"{base}/{name}"), exclude=("*.tmp",))) for name in roots]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._worker = ThreadPoolExecutor(1)
        self._served: Future[None] | None = None
        self._source: Source | None = None
        self.open()

    def open(self) -> None:
        """Open the replica's state."""
        self.applier = self.work(lambda: Applier(self._roots, self.state, unkept=Register(self.unkept_path)))

    def close(self) -> None:
        """End the connection and give back everything but the loop."""
        self.disconnect()
        self.work(self.applier.close)

    def finish(self) -> None:
        """Close, and end the loop too."""
        self.close()
        self._worker.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GENEROUS)
        self._loop.close()

    def work(self, call: Callable[[], T]) -> T:
        """Do something in the applier's thread."""
        return self._worker.submit(call).result(GENEROUS)

    @property
    def source(self) -> Source:
        """The connection, which is made when there is none."""
        if self._source is None:
            ours, theirs = socket.socketpair()
            self._source = Source(ours)
            self._served = asyncio.run_coroutine_threadsafe(
                serve(theirs, self.applier, self.gate, self._worker), self._loop
            )
        return self._source

    def disconnect(self) -> BaseException | None:
        """Cut the connection; returns the error that had ended it before, if any."""
        if self._source is not None:
            self._source.sock.close()
        return self.ended()

    def ended(self) -> BaseException | None:
        """Wait until the connection has ended by itself; returns the error that ended it."""
        source, served = self._source, self._served
        self._source = self._served = None
        if source is None or served is None:
            return None
        try:
            return served.exception(GENEROUS)
        finally:
            source.sock.close()
            self.work(lambda: None)

    def begin(self) -> int:
        """The number of the next transaction."""
        self.seq += 1
        return self.seq

    def transaction(self, *operations: object) -> list[object]:
        """A transaction with these operations."""
        seq = self.begin()
        return [Begin(1, seq), *operations, Commit(seq)]

    def send(self, *operations: object) -> Ack | Nak:
        """Send a transaction and wait for the answer; after a Nak, the next one has a new connection."""
        self.source.put(*self.transaction(*operations))
        answer = self.source.verdict()
        if isinstance(answer, Nak):
            assert self.disconnect() is None
        return answer

    def partials(self) -> list[Partial]:
        """What Welcome would say of uploads."""
        return self.work(self.applier.suspended)


def chunks(number: int, stream: bytes, size: int = 64 << 10, last: bool = True) -> list[Chunk]:
    """A delta stream in chunks."""
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)] or [b""]
    return [Chunk(number, piece, last and at == len(pieces) - 1) for at, piece in enumerate(pieces)]


def upload(number: int, path: bytes, stream: bytes, *, based: bool = False, sparse: bool = False) -> list[object]:
    """A whole upload for root 0."""
    return [Upload(number, 0, path, based, sparse, 0), *chunks(number, stream)]


def put_whole(number: int, path: bytes, new: bytes, old: bytes | None = None, sparse: bool = False) -> list[object]:
    """Frames before a transaction, with its Patch as the last of the list."""
    return [*upload(number, path, stream(new, old), based=old is not None, sparse=sparse), Patch(0, path, FILE, number)]


def stream(new: bytes, old: bytes | None = None) -> bytes:
    """The delta that makes ``new`` of ``old``."""
    import io

    signature = None if old is None else delta.sign(io.BytesIO(old), length_hint=len(old))
    encoder = delta.Encoder(signature)
    return b"".join(encoder.encode(io.BytesIO(new)))
