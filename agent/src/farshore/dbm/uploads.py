"""Large files, on their way to the replica beside the transactions.

A file is read by a thread of its own and sent in pieces, between which transactions go their way. What the replica
had received of a file when the connection broke is not sent again.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import blake3

from farshore import delta
from farshore.dbm import wire
from farshore.dbm.index import Known
from farshore.dbm.messages import INLINE_MAX, MAX_UPLOADS, Chunk, Partial, Upload
from farshore.dbm.reading import CheckedReader, digest_of
from farshore.dbm.work import Content, Job
from farshore.fmm.types import FileKind
from farshore.fmm.view import View

#: Files up to this size have a slot of their own, so that they need not wait for a file of hours. A larger one, and
#: what comes after it meanwhile, is put into place when the replica has told that all of it is on its disk: no
#: transaction has to wait for that.
SMALL = 16 << 20
_LIMITS = (None, SMALL)
_SLOTS = len(_LIMITS)
#: A file that changed while it was read is read again after as long as the reading took, at most so many seconds.
MAX_REST = 5.0
#: A file is read when it was left alone for as long as about a fifth of the reading takes, at most QUIET_SECONDS; but
#: at the latest MAX_WAIT seconds after it was found changed. Who writes many pages is seldom done with the first.
QUIET_SECONDS = 0.1
MAX_WAIT = 1.0
_QUIET_PER_BYTE = 1e-10
#: A delta's header names its base: only a prefix that holds it tells that what follows will fit.
_MIN_RESUME = 64
#: A piece is handed to the event loop when it has so many bytes, or seconds.
_PIECE_BYTES = 256 << 10
_PIECE_SECONDS = 0.01
_T = TypeVar("_T")


class Line(Protocol):
    """What uploads need of the connection that they go over."""

    def between(self) -> AbstractAsyncContextManager[object]:
        """While entered, no transaction is planned or sent."""

    async def known_base(self, job: Job) -> Known | None:
        """What the index has of the job's base."""

    async def known_signature(self, job: Job) -> bytes | None:
        """Its signature there."""

    async def ask_signature(self, job: Job) -> bytes | None:
        """The signature of the replica's file, None when it has none."""

    async def send(self, frames: list[bytes]) -> None:
        """Send frames; returns when more may follow."""

    def piece(self) -> int:
        """Bytes of content to send at once."""

    async def done(self, job: Job) -> None:
        """The job has its content, or its problem."""


class Uploads:
    """Carries out the jobs of one connection, two at a time: in the second slot only files up to SMALL."""

    def __init__(self, view: View, line: Line, partials: list[Partial]) -> None:
        #: Where files are read; set before the jobs that are to be read there are added.
        self.view = view
        self._line = line
        self._partials = {(partial.root, partial.path): partial for partial in partials}
        self._numbers = itertools.count(1)
        self._jobs: list[Job] = []
        self._changed = asyncio.Event()
        # Large ones from their first piece on, and what came behind them: until the replica has all of it.
        self._building: dict[int, asyncio.Event] = {}
        # Numbers of those that the replica holds until they are put into place.
        self._waiting: set[int] = set()
        self._room = asyncio.Event()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_SLOTS, thread_name_prefix="upload")
        self._rest: dict[tuple[int, bytes], float] = {}

    def add(self, job: Job) -> None:
        """Have a file read, and sent when need be."""
        now = job.since = time.monotonic()
        self._rest = {key: until for key, until in self._rest.items() if until > now}
        job.not_before = self._rest.get((job.root, job.path), 0.0)
        self._jobs.append(job)
        self._changed.set()

    def uploaded(self, number: int) -> None:
        """The replica has all of an upload."""
        if number in self._building:
            self._building[number].set()

    def ended(self, numbers: Iterable[int]) -> None:
        """The replica was told what becomes of these uploads."""
        self._waiting.difference_update(numbers)
        self._room.set()

    async def run(self) -> None:
        """Work until cancelled; raises what the line raises."""
        slots = [asyncio.create_task(self._slot(limit)) for limit in _LIMITS]
        try:
            await asyncio.gather(*slots)
        finally:
            self._stopped.set()
            for slot in slots:
                slot.cancel()
            await asyncio.gather(*slots, return_exceptions=True)
            self._pool.shutdown(wait=False)

    async def _slot(self, limit: int | None) -> None:
        while True:
            job = await self._next(limit)
            try:
                await self._carry_out(job)
            except OSError as error:
                job.problem = error
            await self._line.done(job)

    async def _next(self, limit: int | None) -> Job:
        while True:
            now = time.monotonic()
            fitting = [job for job in self._jobs if limit is None or job.size <= limit]
            for job in fitting:
                if job.not_before <= now:
                    job.not_before = now + self._restless(job, now)
                if job.not_before <= now:
                    self._jobs.remove(job)
                    return job
            self._changed.clear()
            wait = min((job.not_before - now for job in fitting), default=None)
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _restless(self, job: Job, now: float) -> float:
        """Seconds for which it is better to leave the file alone, as somebody is writing to it."""
        if self.view.still:
            return 0.0
        try:
            seen = self.view.observe(job.root, job.path)
        except OSError:
            return 0.0
        if seen is None:
            return 0.0
        quiet = min(QUIET_SECONDS, job.size * _QUIET_PER_BYTE)
        left = quiet - (time.time() - seen.mtime_ns / 1e9)
        return min(left, job.since + MAX_WAIT - now) if 0 < left <= quiet else 0.0

    async def _carry_out(self, job: Job) -> None:
        if job.hash_only:
            hashing = self._read(job, None)
            job.content = self._let_rest(job, await self._in_thread(hashing.hash))
            return
        while len(self._waiting) >= MAX_UPLOADS - _SLOTS:
            self._room.clear()
            await self._room.wait()
        known = await self._line.known_base(job)
        base = await self._signature(job, known)
        if base is None and _is_base(known):
            base = await self._in_thread(_parsed, await self._line.ask_signature(job))
        reading, skip = await self._go_on(job, base)
        async with self._line.between():
            again = await self._line.known_base(job)
            if again != known:
                # The replica has, or will have, something else at this path by now.
                reading, skip = self._read(job, await self._signature(job, again)), 0
            await self._announce(job, reading, skip)
        await self._send(job, reading)

    async def _signature(self, job: Job, known: Known | None) -> delta.Signature | None:
        """The signature of the job's base that the index has, None when there is none or ``known`` is no base."""
        return await self._in_thread(_parsed, await self._line.known_signature(job)) if _is_base(known) else None

    def _let_rest(self, job: Job, content: Content) -> Content:
        """Returns ``content``. If the file changed while it was read, just now, it is left alone for a while."""
        if not content.is_settled:
            took = (time.time_ns() - content.started_ns) / 1e9
            self._rest[job.root, job.path] = time.monotonic() + min(MAX_REST, took)
        return content

    async def _go_on(self, job: Job, base: delta.Signature | None) -> tuple[_Reading, int]:
        """A reading from where an earlier connection left it, and the bytes of the delta that the replica has."""
        reading = self._read(job, base)
        partial = self._partials.pop((job.root, job.base), None)
        if partial is not None and partial.based == reading.based and partial.received >= _MIN_RESUME:
            if await self._in_thread(reading.skip, partial.received, partial.digest):
                return reading, partial.received
            reading = self._read(job, base)
        return reading, 0

    def _read(self, job: Job, base: delta.Signature | None) -> _Reading:
        return _Reading(self.view, job, base, self._stopped)

    async def _announce(self, job: Job, reading: _Reading, skip: int) -> None:
        job.number = next(self._numbers)
        self._waiting.add(job.number)
        if job.size > SMALL:
            self._building[job.number] = asyncio.Event()
        await self._line.send([wire.frame(Upload(job.number, job.root, job.base, reading.based, reading.sparse, skip))])

    async def _send(self, job: Job, reading: _Reading) -> None:
        """Send all of it. Returns when it may be put into place without a transaction having to wait for long."""
        try:
            await self._send_pieces(job, reading)
            assert reading.content is not None
            content = self._let_rest(job, reading.content)
            if content.length > SMALL or self._building:
                self._building.setdefault(job.number, asyncio.Event())
            await self._line.send([wire.frame(Chunk(job.number, b"", True))])
            if job.number in self._building:
                await self._building[job.number].wait()
        finally:
            self._building.pop(job.number, None)
        job.content = content

    async def _send_pieces(self, job: Job, reading: _Reading) -> None:
        # One piece is read while the one before it is sent.
        ahead = asyncio.ensure_future(self._in_thread(reading.piece))
        try:
            while (piece := await ahead) is not None:
                ahead = asyncio.ensure_future(self._in_thread(reading.piece))
                view = memoryview(piece)
                while view:
                    size = self._line.piece()
                    await self._line.send([wire.frame(Chunk(job.number, bytes(view[:size]), False))])
                    view = view[size:]
        finally:
            ahead.cancel()

    async def _in_thread(self, call: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)


class _Reading:
    """Reads the file of a job once, in one thread at a time; opened here, closed with the object's last use.

    ``base`` is the signature of what the replica has, None when the content goes whole. Every method raises OSError.
    """

    def __init__(self, view: View, job: Job, base: delta.Signature | None, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._base = base
        self.based = base is not None
        self._view = view
        self._place = job.root, job.path
        self._started = view.moment_ns()
        self._file = io.FileIO(view.open_beneath(*self._place))
        self._before = view.status(self._file.fileno(), *self._place)
        self.sparse = self._before.st_blocks * 512 < self._before.st_size
        self._encoder: delta.Encoder | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._pending = b""
        self.content: Content | None = None

    def hash(self) -> Content:
        """Read it all for its digest only."""
        with self._file:
            length, digest = digest_of(CheckedReader(self._file, self._check))
            return self._told(length, digest, None)

    def piece(self) -> bytes | None:
        """The next bytes of the delta; None at its end, when ``content`` is there."""
        self._begin()
        parts, size = [self._pending], len(self._pending)
        self._pending = b""
        until = time.monotonic() + _PIECE_SECONDS
        while size < _PIECE_BYTES and (piece := next(self._pieces, b"")):
            parts.append(piece)
            size += len(piece)
            if time.monotonic() >= until:
                break
        if size:
            return b"".join(parts)
        assert self._encoder is not None
        if self.content is None:
            signature = self._encoder.signature
            blob = None if signature is None else signature.to_bytes()
            with self._file:
                self.content = self._told(self._encoder.length, self._encoder.digest, blob)
        return None

    def skip(self, received: int, digest: bytes) -> bool:
        """Pass over the bytes that the replica has, if they have this BLAKE3-256; False when they are other ones."""
        self._begin()
        hasher = blake3.blake3()
        while received:
            piece = next(self._pieces, b"")
            if not piece:
                return False
            hasher.update(piece[:received])
            self._pending = piece[received:]
            received -= min(received, len(piece))
        return hasher.digest() == digest

    def _begin(self) -> None:
        if self._encoder is None:
            size = delta.preferred_block_size(self._before.st_size) if self._base is None else None
            self._encoder = delta.Encoder(self._base, block_size=size)
            self._pieces = self._encoder.encode(CheckedReader(self._file, self._check))

    def _check(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError("the connection is gone")

    def _told(self, length: int, digest: bytes, signature: bytes | None) -> Content:
        after = self._view.status(self._file.fileno(), *self._place)
        return Content(self._before, after, self._started, length, digest, signature)


def _is_base(known: Known | None) -> bool:
    """Whether a delta may refer to what the replica has."""
    return known is not None and known.kind is FileKind.FILE and known.size > INLINE_MAX


def _parsed(blob: bytes | None) -> delta.Signature | None:
    """The signature, None when there is none or it is of no use: then another is asked for, or all is sent."""
    try:
        return None if blob is None else delta.Signature.from_bytes(blob)
    except delta.SignatureCorrupt:
        return None
