"""Frames in blocks: what the stream between source and replica is made of after Hello and Welcome.

A block is a four-byte big-endian length of what follows, one byte for its kind, and its body: whole frames as they
are (``PLAIN``), or the next piece of the connection's zstd stream (``ZSTD``, RFC 8878), flushed, which inflates to
whole frames. Each direction is one zstd stream with one context, so a block profits from those before it. Plain
blocks are not part of that history.

What arrives is treated as hostile: a length is checked before its bytes are read, and inflating stops at the limit.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, cast

import zstandard

from farshore.dbm.bandwidth import Pacer
from farshore.dbm.wire import MAX_FRAME
from farshore.errors import ProtocolError

#: Bytes of frames in one block: no reader takes more.
MAX_BLOCK = 2 << 20
#: Bytes of a compressed body: zstd adds at most 1/256 to what does not compress, and a header of 18 bytes.
MAX_PIECE = MAX_BLOCK + (MAX_BLOCK >> 7)
#: Where a writer cuts: a full Chunk and some small frames. A larger frame is a block of its own.
CUT = 320 << 10
#: Blocks below this go plain: acknowledgements and the like. A transaction of one small operation, 110 to 170 bytes,
#: becomes 27 to 58 through the history, in 7 us.
TINY = 64

#: Measured in blocks of 256 KiB on a Python source tree, PostgreSQL's pages, and its WAL. Level 1 leaves 32, 2.3 and
#: 6.4 % at 230, 1290 and 840 MB/s; level 2, with this window, 29, 2.3 and 6.5 % at 210, 920 and 510; level 3 27, 2.7
#: and 5.9 % at 120, 680 and 470. In blocks of 4 KiB, level 2 is better than level 1 on all three.
#: A window of 4 MiB costs no time, and finds what comes again in a later block.
LEVEL = 2
WINDOW_LOG = 22
#: What a reader takes, at most: the decoder's memory.
MAX_WINDOW = 8 << 20

#: Seconds of compressing that leave the event loop for a thread: 256 KiB of text, but not of PostgreSQL's pages.
#: Measured, over sockets on two cores: text 30 % faster so, the others no faster, and a block of text stops the
#: loop for 1 ms otherwise.
IN_THREAD = 0.5e-3
_THREADS = ThreadPoolExecutor(2, "zstd")

PLAIN, ZSTD = 0, 1
_HEAD = struct.Struct(">IB")
_LENGTH = struct.Struct(">I")

#: Kernel and transport hold this much that is not on its way yet: a small transaction waits behind it.
UNSENT = 256 << 10
BUFFERED = 512 << 10


def tune(writer: asyncio.StreamWriter) -> None:
    """Set a connection's socket and buffers: nothing is delayed, and little queues up where it cannot be overtaken.

    The send buffer stays the kernel's to size: what is in flight is not limited here, so that a long fat path fills.
    """
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    writer.transport.set_write_buffer_limits(high=BUFFERED)


class Gain:
    """Whether the data of the moment compresses, judged by what the last tries saved.

    After a try in vain, up to as many bytes go plain as were tried, and twice as many after each further one, at
    most ``LONGEST``: little time is lost on data that does not compress, and data that does is noticed soon.
    """

    #: A smaller saved share is not worth the time of both ends.
    WORTH = 0.03
    LONGEST = 768 << 10

    def __init__(self) -> None:
        self._pause = 0
        self._left = 0

    def worth_a_try(self, size: int) -> bool:
        """Whether the next block, of ``size`` bytes, is to be compressed; one that is not counts as sent plain."""
        if size > self._left:
            return True
        self._left -= size
        return False

    def tried(self, plain: int, wire: int) -> None:
        """A block of ``plain`` bytes became ``wire`` bytes."""
        if wire <= plain * (1 - self.WORTH):
            self._pause = self._left = 0
        else:
            self._pause = min(max(2 * self._pause, plain), self.LONGEST)
            self._left = self._pause


class Rates:
    """Whether compressing is worth its time: sending both ways is measured, and compressing done unless it brakes.

    Below ``SLOW`` bytes/s it is always worth it: the processor has time, and bytes cost money. Above, where the
    compressor takes much of the time and the link never makes us wait, sending plain is tried, and where it is
    plainly faster, stays. From there, once the link does make us wait, compressing is tried again. A try in vain
    doubles the time to the next.
    """

    SLOW = 20e6
    #: Plain must be faster by this factor.
    MARGIN = 1.15
    #: Seconds and bytes that a measurement needs, and seconds that always suffice.
    SPAN, BYTES, LONGEST_SPAN = 0.05, 2 << 20, 0.5
    #: Seconds between tries.
    SHORTEST, LONGEST = 0.5, 8.0
    #: Shares of the time: the link "never makes us wait", "does"; the compressor "takes much".
    NEVER, DOES, MUCH = 0.05, 0.10, 0.25

    def __init__(self, clock: Callable[[], float]) -> None:
        self.compress = True
        self._clock = clock
        self._pause = self.SHORTEST
        self._next_try = 0.0
        self._before: float | None = None
        self._settling = False
        #: Bytes/s of the compressor, and when that was measured.
        self._speed, self._speed_at = float("inf"), 0.0
        self._restart(clock())

    def sent(self, plain: int, compressing: float, blocked: float) -> None:
        """``plain`` bytes were sent, with so many seconds in the compressor and so many waiting for the link."""
        self._plain += plain
        self._compressing += compressing
        self._blocked += blocked
        if compressing:
            self._compressed += plain
        now = self._clock()
        span = now - self._start
        if span >= self.SPAN and (self._plain >= self.BYTES or span >= self.LONGEST_SPAN):
            self._judge(now, span)
            self._restart(now)

    def expected(self, size: int) -> float:
        """The seconds that compressing ``size`` bytes will take, by the last measurement; 0 before it."""
        return size / self._speed

    def _judge(self, now: float, span: float) -> None:
        rate = self._plain / span
        if self._compressing:
            self._speed, self._speed_at = self._compressed / self._compressing, now
        if rate < self.SLOW:
            self.compress, self._before, self._settling, self._pause = True, None, False, self.SHORTEST
        elif self._settling:
            # Buffers fill or empty after a change, which says nothing of the link.
            self._settling = False
        elif self._before is not None:
            compressed, plain = (rate, self._before) if self.compress else (self._before, rate)
            tried, self._before = self.compress, None
            self.compress = plain <= compressed * self.MARGIN
            self._settling = self.compress != tried
            self._pause = min(2 * self._pause, self.LONGEST) if self._settling else self.SHORTEST
            self._next_try = now + self._pause
        elif now >= self._next_try and self._worth_a_try(now, rate, span):
            self._before, self._settling = rate, True
            self.compress = not self.compress

    def _worth_a_try(self, now: float, rate: float, span: float) -> bool:
        if self.compress:
            return self._blocked < self.NEVER * span and self._compressing > self.MUCH * span
        fast_enough = self._speed * self.MARGIN > rate or now > self._speed_at + self.LONGEST
        return self._blocked > self.DOES * span and fast_enough

    def _restart(self, now: float) -> None:
        self._start = now
        self._plain = self._compressed = 0
        self._compressing = self._blocked = 0.0


class BlockWriter:
    """Frames in blocks, compressed where that pays, not faster than the bandwidth limit allows.

    ``wire_bytes`` and ``plain_bytes`` count what went through so far, as blocks and as frames.
    """

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        *,
        compress: bool = True,
        pacer: Pacer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.wire_bytes = 0
        self.plain_bytes = 0
        self._writer = writer
        self._pacer = pacer
        self._clock = clock
        self._stream: zstandard.ZstdCompressionObj | None = None
        if compress:
            parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=WINDOW_LOG)
            self._stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        self._gain = Gain()
        self._rates = Rates(clock)
        self._turn = asyncio.Lock()
        self._torn = False

    async def send(self, frames: Sequence[bytes]) -> None:
        """Write ``frames``, each as ``wire.frame`` made it, in order.

        Returns when the transport's buffer and the limit allow more. Calls from several tasks do not mix, first come
        first served. Raises what the transport does when the connection is lost; ConnectionResetError also after a
        call that was cancelled within a block, as nothing can follow half a block.
        """
        async with self._turn:
            for block in _cut(frames):
                if self._torn:
                    raise ConnectionResetError("a block was cut off; the connection is of no use any more")
                await self._send(block)

    async def _send(self, frames: list[bytes]) -> None:
        size = sum(map(len, frames))
        compressing = blocked = 0.0
        # What the compressor has in its history must go, whole, or nothing can any more.
        self._torn = True
        if self._stream is not None and self._compresses(size):
            block, compressing = await self._compressed(self._stream, frames, size)
        else:
            block = b"".join((_HEAD.pack(1 + size, PLAIN), *frames))
        if self._pacer is None:
            self._writer.write(block)
        else:
            blocked = await self._pace(self._pacer, block)
        self._torn = False
        self.plain_bytes += size
        self.wire_bytes += len(block)
        blocked += await self._timed(self._writer.drain())
        self._rates.sent(size, compressing, blocked)
        if size >= CUT // 2 and blocked < 1e-3:
            # A link that takes everything at once would never let another task run.
            await asyncio.sleep(0)

    def _compresses(self, size: int) -> bool:
        return size >= TINY and self._rates.compress and self._gain.worth_a_try(size)

    async def _compressed(
        self, stream: zstandard.ZstdCompressionObj, frames: list[bytes], size: int
    ) -> tuple[bytes, float]:
        """The block, and the seconds that the compressor worked."""

        def compress() -> tuple[bytes, float]:
            began = self._clock()
            body = stream.compress(b"".join(frames)) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            return body, self._clock() - began

        if self._rates.expected(size) < IN_THREAD:
            body, seconds = compress()
        else:
            body, seconds = await asyncio.get_running_loop().run_in_executor(_THREADS, compress)
        self._gain.tried(size, len(body))
        return _HEAD.pack(1 + len(body), ZSTD) + body, seconds

    async def _pace(self, pacer: Pacer, block: bytes) -> float:
        """Write ``block`` in the pieces that the limit allows; the seconds that this waited."""
        rest = memoryview(block)
        blocked = 0.0
        while True:
            piece = rest[: pacer.piece()]
            blocked += await self._timed(pacer.take(len(piece)))
            self._writer.write(piece)
            rest = rest[len(piece) :]
            if not rest:
                return blocked
            blocked += await self._timed(self._writer.drain())

    async def _timed(self, wait: Awaitable[None]) -> float:
        began = self._clock()
        await wait
        return self._clock() - began


class BlockReader:
    """The frames of the blocks that arrive from ``peer``."""

    def __init__(self, reader: asyncio.StreamReader, peer: str) -> None:
        self._reader = reader
        self._peer = peer
        self._pieces = _Pieces()
        # Not its stream_writer: that leaks its buffer, of 2 MiB, whenever it is stopped by an error of ours.
        self._stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(
            cast(IO[bytes], self._pieces), read_size=MAX_PIECE, read_across_frames=True
        )
        # The decoder keeps back what there is no room for: one byte over the limit, there is room for all that is
        # allowed.
        self._plain = memoryview(bytearray(MAX_BLOCK + 1))

    async def read(self) -> list[bytes] | None:
        """The bodies of all frames of the next block, None at the end of the stream.

        Raises ProtocolError on anything malformed; nothing can be read after that.
        """
        try:
            length, kind = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise self._error("the stream ended within a block") from None
            return None
        if kind not in (PLAIN, ZSTD):
            raise self._error(f"a block of kind {kind}; allowed are {PLAIN} and {ZSTD}")
        limit = MAX_BLOCK if kind == PLAIN else MAX_PIECE
        if not 1 < length <= 1 + limit:
            raise self._error(f"a block of {length} bytes; allowed are 2..{1 + limit}")
        try:
            body = await self._reader.readexactly(length - 1)
        except asyncio.IncompleteReadError:
            raise self._error("the stream ended within a block") from None
        return self._split(body if kind == PLAIN else self._inflate(body))

    def _inflate(self, body: bytes) -> bytes:
        self._pieces.put(body)
        size = 0
        try:
            while size <= MAX_BLOCK and (done := self._stream.readinto1(self._plain[size:])):
                size += done
        except _Dry:
            pass
        except zstandard.ZstdError as error:
            raise self._error(f"a block that zstd does not understand: {error}") from None
        if size > MAX_BLOCK:
            raise self._error(f"a block inflates to more than {MAX_BLOCK} bytes")
        if not size:
            raise self._error("a block inflates to nothing")
        return bytes(self._plain[:size])

    def _split(self, plain: bytes) -> list[bytes]:
        frames = []
        at = 0
        while at < len(plain):
            if at + _LENGTH.size > len(plain):
                raise self._error("a block ends within a frame")
            (length,) = _LENGTH.unpack_from(plain, at)
            at += _LENGTH.size
            if not 0 < length <= MAX_FRAME:
                raise self._error(f"a frame of {length} bytes; allowed are 1..{MAX_FRAME}")
            if at + length > len(plain):
                raise self._error("a block ends within a frame")
            frames.append(plain[at : at + length])
            at += length
        return frames

    def _error(self, what: str) -> ProtocolError:
        return ProtocolError(self._peer, what)


class _Dry(Exception):
    """All of a piece was read."""


class _Pieces:
    """Where the decoder reads: it comes to no end with a piece, as b"" would tell it."""

    def __init__(self) -> None:
        self._piece = b""

    def put(self, piece: bytes) -> None:
        """What is to be read next."""
        self._piece = piece

    def read(self, size: int) -> bytes:
        """The piece, once; raises _Dry after it. It is not longer than ``size``."""
        piece, self._piece = self._piece, b""
        if not piece:
            raise _Dry
        return piece


def _cut(frames: Sequence[bytes]) -> Iterator[list[bytes]]:
    """``frames`` in lists of at most CUT bytes or one frame; raises ProtocolError on one that no reader takes."""
    block: list[bytes] = []
    size = 0
    for frame in frames:
        if len(frame) > _LENGTH.size + MAX_FRAME:
            raise ProtocolError("this node", f"a frame of {len(frame) - _LENGTH.size} bytes is over {MAX_FRAME}")
        if block and size + len(frame) > CUT:
            yield block
            block, size = [], 0
        block.append(frame)
        size += len(frame)
    if block:
        yield block
