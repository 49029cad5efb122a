"""Blocks: what is sent arrives, in order, and smaller where it can be; what is malformed is an error of ours."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any, cast

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.config import Bandwidth
from farshore.dbm import blocks
from farshore.dbm.bandwidth import Pacer
from farshore.dbm.blocks import BlockReader, BlockWriter, Rates, tune
from farshore.dbm.wire import MAX_FRAME
from farshore.errors import ProtocolError

KIB, MIB = 1 << 10, 1 << 20


class Pipe:
    """A writer whose bytes a reader can be given."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.writes: list[int] = []

    def write(self, data: bytes | memoryview) -> None:
        self.written += data
        self.writes.append(len(data))

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def as_writer(self) -> asyncio.StreamWriter:
        return cast(asyncio.StreamWriter, self)

    def blocks(self) -> list[tuple[int, bytes]]:
        """Kind and body of each block."""
        found, at = [], 0
        while at < len(self.written):
            length, kind = struct.unpack_from(">IB", self.written, at)
            found.append((kind, bytes(self.written[at + 5 : at + 4 + length])))
            at += 4 + length
        return found


class Clock:
    """A clock that goes on when somebody sleeps by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def reader_of(data: bytes | bytearray) -> BlockReader:
    stream = asyncio.StreamReader()
    stream.feed_data(bytes(data))
    stream.feed_eof()
    return BlockReader(stream, "bak1")


async def read_all(data: bytes | bytearray) -> list[bytes]:
    reader = reader_of(data)
    found: list[bytes] = []
    while (bodies := await reader.read()) is not None:
        found += bodies
    return found


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def block(kind: int, body: bytes) -> bytes:
    return struct.pack(">IB", 1 + len(body), kind) + body


def text(size: int, seed: int = 0) -> bytes:
    chosen = random.Random(seed)
    words = [bytes(chosen.choices(b"etaoinshrdlu", k=chosen.randint(2, 9))) for _ in range(500)]
    return b" ".join(chosen.choices(words, k=size // 3 + 1))[:size]


BODIES = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.builds(lambda n, seed: random.Random(seed).randbytes(n), st.integers(1, 300_000), st.integers(0, 9)),
    st.builds(lambda n, seed: text(n, seed), st.integers(1, 300_000), st.integers(0, 9)),
    st.builds(bytes, st.integers(1, MAX_FRAME)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(BODIES, max_size=4), max_size=8), st.booleans())
def test_what_is_sent_arrives(calls: list[list[bytes]], compress: bool) -> None:
    async def run() -> None:
        pipe = Pipe()
        writer = BlockWriter(pipe.as_writer(), compress=compress)
        for bodies in calls:
            await writer.send([frame(body) for body in bodies])
        sent = [body for bodies in calls for body in bodies]
        assert await read_all(pipe.written) == sent
        assert writer.wire_bytes == len(pipe.written)
        assert writer.plain_bytes == sum(4 + len(body) for body in sent)
        assert all(kind == blocks.PLAIN for kind, _ in pipe.blocks()) or compress

    asyncio.run(run())


async def test_the_largest_frames_arrive_at_each_end_of_compressibility() -> None:
    bodies = [bytes(MAX_FRAME), os.urandom(MAX_FRAME), b"x", os.urandom(MAX_FRAME - 1), bytes(MAX_FRAME)]
    pipe = Pipe()
    await BlockWriter(pipe.as_writer()).send([frame(body) for body in bodies])
    assert await read_all(pipe.written) == bodies
    with pytest.raises(ProtocolError, match="this node"):
        await BlockWriter(pipe.as_writer()).send([frame(bytes(MAX_FRAME + 1))])


async def test_calls_do_not_mix_and_keep_their_order() -> None:
    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer())
    calls = [[frame(b"%d-%d" % (i, k) + text(100 * KIB, k)) for k in range(5)] for i in range(8)]
    await asyncio.gather(*map(writer.send, calls))
    assert [frame(body) for body in await read_all(pipe.written)] == [f for call in calls for f in call]


async def test_blocks_profit_from_those_before() -> None:
    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer(), clock=Clock())
    body = os.urandom(2 * KIB).hex().encode()
    await writer.send([frame(body)])
    first = writer.wire_bytes
    await writer.send([frame(body)])
    assert writer.wire_bytes - first < first / 20


async def test_tiny_blocks_go_plain() -> None:
    pipe = Pipe()
    await BlockWriter(pipe.as_writer()).send([frame(bytes(20))])
    assert pipe.blocks() == [(blocks.PLAIN, frame(bytes(20)))]


async def test_what_does_not_compress_goes_plain_and_a_change_is_noticed() -> None:
    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer(), clock=Clock())
    for _ in range(64):
        await writer.send([frame(os.urandom(128 * KIB))])
    plain = sum(len(body) for kind, body in pipe.blocks() if kind == blocks.PLAIN)
    assert plain > 0.7 * writer.plain_bytes
    assert writer.wire_bytes < 1.001 * writer.plain_bytes
    pipe.written.clear()
    for i in range(32):
        await writer.send([frame(text(128 * KIB, i))])
    unnoticed = sum(len(body) for kind, body in pipe.blocks() if kind == blocks.PLAIN)
    assert unnoticed <= MIB


async def test_one_small_block_in_vain_costs_little() -> None:
    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer(), clock=Clock())
    for i in range(20):
        await writer.send([frame(os.urandom(300))])
        await writer.send([frame(text(40 * KIB, i))])
    assert writer.wire_bytes < 0.6 * writer.plain_bytes


# --- the limit ---------------------------------------------------------------------------------------


async def test_a_limited_connection_writes_in_pieces_at_its_pace() -> None:
    clock = Clock()
    pacer = Pacer(Bandwidth("5Mbit/s"), clock, sleep=clock.sleep)
    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer(), compress=False, pacer=pacer, clock=clock)
    await writer.send([frame(os.urandom(250 * KIB)) for _ in range(10)])
    assert clock.now == pytest.approx(writer.wire_bytes / (5e6 / 8), rel=0.05)
    assert max(pipe.writes) <= 5e6 / 8 * 0.025
    assert len(await read_all(pipe.written)) == 10


async def test_a_slow_limit_has_everything_compressed() -> None:
    clock = Clock()
    pacer = Pacer(Bandwidth("5Mbit/s"), clock, sleep=clock.sleep)
    writer = BlockWriter(Pipe().as_writer(), pacer=pacer, clock=clock)
    for i in range(20):
        await writer.send([frame(text(250 * KIB, i))])
    assert writer.wire_bytes < 0.5 * writer.plain_bytes


async def test_after_half_a_block_nothing_follows() -> None:
    async def forever(seconds: float) -> None:
        await asyncio.Event().wait()

    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer(), pacer=Pacer(Bandwidth("1Mbit/s"), Clock(), sleep=forever))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await writer.send([frame(os.urandom(100 * KIB))])
    with pytest.raises(ConnectionResetError, match="cut off"):
        await writer.send([frame(b"more")])


async def test_a_slow_compressor_works_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "expected", lambda self, size: float(size))
    pipe = Pipe()
    writer = BlockWriter(pipe.as_writer(), clock=Clock())
    calls = [[frame(b"%d" % i + text(200 * KIB, i)) for i in range(3)] for _ in range(4)]
    await asyncio.gather(*map(writer.send, calls))
    assert [frame(body) for body in await read_all(pipe.written)] == [f for call in calls for f in call]
    assert writer.wire_bytes < 0.6 * writer.plain_bytes
    giving_up = asyncio.create_task(writer.send(calls[0]))
    await asyncio.sleep(0)
    giving_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await giving_up
    with pytest.raises(ConnectionResetError, match="cut off"):
        await writer.send(calls[0])


# --- whether to compress -----------------------------------------------------------------------------


def simulate(link: float, compressor: float, left: float, source: float, seconds: float) -> tuple[float, float]:
    """Send through a link and a compressor of these bytes/s; rate and share of compressed bytes in the later half.

    ``left`` is what the compressor leaves of a byte, ``source`` the rate at which blocks are made.
    """
    clock = Clock()
    rates = Rates(clock)
    size, buffered, drained = 256 * KIB, 0.0, 0.0
    sent = compressed = 0
    since = None
    while clock.now < seconds:
        clock.now += size / source
        compressing = size / compressor if rates.compress else 0.0
        clock.now += compressing
        buffered = max(buffered - (clock.now - drained) * link, 0) + size * (left if rates.compress else 1)
        blocked = max(buffered - 2 * blocks.BUFFERED, 0) / link
        drained = clock.now
        clock.now += blocked
        if clock.now > seconds / 2:
            since = since or clock.now
            sent += size
            compressed += size * rates.compress
        rates.sent(size, compressing, blocked)
    assert since is not None
    return sent / (clock.now - since), compressed / sent


@pytest.mark.parametrize(
    ("link", "compressor", "left", "source"),
    [
        (2.5e9, 230e6, 0.3, 3e9),  # loopback
        (1.2e9, 230e6, 0.3, 3e9),  # 10 Gbit/s
        (1.2e9, 230e6, 0.3, 400e6),  # 10 Gbit/s, and the disk is the brake
        (1.2e9, 900e6, 0.03, 3e9),
        (1.2e9, 3e9, 0.01, 3e9),
        (118e6, 230e6, 0.3, 3e9),  # 1 Gbit/s
        (118e6, 230e6, 0.3, 150e6),
        (118e6, 230e6, 0.9, 3e9),
        (118e6, 60e6, 0.3, 3e9),  # a weak processor
        (30e6, 230e6, 0.3, 3e9),
        (5e6, 230e6, 0.3, 3e9),
        (0.6e6, 230e6, 0.9, 3e9),
    ],
)
def test_the_faster_way_is_found(link: float, compressor: float, left: float, source: float) -> None:
    rate, _ = simulate(link, compressor, left, source, 20)
    best = max(
        1 / max(1 / source + 1 / compressor, left / link),
        1 / max(1 / source, 1 / link),
    )
    assert rate > 0.82 * best


@pytest.mark.parametrize(
    ("link", "source", "share"),
    [(1.2e9, 3e9, 0.0), (1.2e9, 15e6, 1.0), (118e6, 3e9, 1.0), (10e6, 3e9, 1.0), (1.2e9, 60e6, 1.0)],
)
def test_bytes_are_saved_where_that_does_not_brake(link: float, source: float, share: float) -> None:
    _, compressed = simulate(link, 230e6, 0.3, source, 20)
    assert compressed == pytest.approx(share, abs=0.1)


# --- what is malformed -------------------------------------------------------------------------------


def bomb(size: int) -> bytes:
    stream = zstandard.ZstdCompressor(level=19).compressobj()
    return stream.compress(bytes(size)) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def zstd(data: bytes, window_log: int = blocks.WINDOW_LOG) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00\x00", "the stream ended within a block"),
        (block(0, frame(b"abc"))[:-1], "the stream ended within a block"),
        (block(2, frame(b"abc")), "a block of kind 2; allowed are 0 and 1"),
        (struct.pack(">IB", 0, 0), "a block of 0 bytes"),
        (struct.pack(">IB", 1, 0), "a block of 1 bytes"),
        (struct.pack(">IB", 2 + blocks.MAX_BLOCK, 0), "a block of 2097154 bytes"),
        (struct.pack(">IB", 0xFFFFFFFF, 1), "a block of 4294967295 bytes"),
        (block(0, b"\x00\x00"), "ends within a frame"),
        (block(0, frame(b"abc") + b"\x00\x00\x00\x09abc"), "ends within a frame"),
        (block(0, frame(b"")), "a frame of 0 bytes"),
        (block(0, frame(bytes(MAX_FRAME + 1))), "a frame of 1048577 bytes"),
        (block(1, b"nonsense"), "zstd does not understand"),
        (block(1, zstd(frame(b"abc"), 24)), "zstd does not understand"),
        (block(1, zstd(frame(b"abc"))[:6]), "inflates to nothing"),
        (block(1, struct.pack("<II", 0x184D2A50, 0xFFFFFFFF)), "inflates to nothing"),
        (block(1, zstd(b"\x00\x00\x00\x09abc")), "ends within a frame"),
        (block(1, zstd(bytes(blocks.MAX_BLOCK + 1))), "inflates to more than 2097152 bytes"),
        (block(1, bomb(100 * MIB)), "inflates to more than 2097152 bytes"),
    ],
)
async def test_what_is_malformed_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        await read_all(data)
    assert "bak1" in str(caught.value)
    assert words in str(caught.value)


async def test_a_bomb_is_stopped_while_it_inflates() -> None:
    data = block(1, bomb(1 << 30))
    assert len(data) < 100 * KIB
    before = resident_peak()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="inflates to more"):
            await read_all(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * MIB
    assert resident_peak() - before < 32 * MIB


async def test_bombs_by_the_dozen_leave_nothing_behind() -> None:
    """Each ends a connection; who makes a new one each time must not fill the memory."""
    data = block(1, bomb(8 << 20))
    for bad in (data, data[:200] + bytes(len(data) - 200)):
        for round in range(45):
            if round == 5:
                before = resident()
            with pytest.raises(ProtocolError):
                await read_all(bad)
        assert resident() - before < 20 * MIB


def resident() -> int:
    """The memory, in bytes, that this process has."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * KIB for line in status if line.startswith("VmRSS"))


def resident_peak() -> int:
    """The most memory, in bytes, that this process ever had, zstd's own included."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * KIB for line in status if line.startswith("VmHWM"))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_stream_never_fails_otherwise(data: st.DataObject) -> None:
    async def run() -> None:
        pipe = Pipe()
        writer = BlockWriter(pipe.as_writer())
        for i in range(4):
            await writer.send([frame(text(2000, i)), frame(b"x" * 30)])
        changed = bytearray(pipe.written)
        for at in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=3)):
            changed[at] = data.draw(st.integers(0, 255))
        try:
            await read_all(changed[: data.draw(st.integers(0, len(changed)))])
        except ProtocolError as error:
            assert "bak1" in str(error)

    asyncio.run(run())


# --- over sockets ------------------------------------------------------------------------------------


async def test_a_tuned_connection_holds_back_and_everything_arrives() -> None:
    arrived: list[bytes] = []
    go, done = asyncio.Event(), asyncio.Event()

    async def serve(stream: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        await go.wait()
        reader = BlockReader(stream, "web1")
        while (bodies := await reader.read()) is not None:
            arrived.extend(bodies)
        out.close()
        done.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    _, out = await asyncio.open_connection(*server.sockets[0].getsockname())
    tune(out)
    sock: Any = out.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == blocks.UNSENT
    writer = BlockWriter(out)
    bodies = [os.urandom(256 * KIB) for _ in range(100)]
    sending = asyncio.create_task(writer.send([frame(body) for body in bodies]))
    await asyncio.sleep(0.3)
    assert not sending.done()
    assert cast(Any, out.transport).get_write_buffer_size() <= blocks.BUFFERED + blocks.CUT
    go.set()
    await sending
    out.close()
    await done.wait()
    server.close()
    assert arrived == bodies


async def test_what_is_no_internet_socket_is_tuned_as_far_as_it_goes() -> None:
    ends = socket.socketpair()
    _, out = await asyncio.open_connection(sock=ends[0])
    tune(out)
    assert cast(Any, out.transport).get_write_buffer_limits()[1] == blocks.BUFFERED
    out.close()
    ends[1].close()


def test_cutting_keeps_every_frame() -> None:
    frames: Iterable[bytes] = [frame(bytes(n)) for n in (1, 255 * KIB, 100 * KIB, MAX_FRAME, 1, 1)]
    cut = list(blocks._cut(list(frames)))
    assert [f for part in cut for f in part] == frames
    assert all(len(part) == 1 or sum(map(len, part)) <= blocks.CUT for part in cut)
