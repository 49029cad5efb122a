"""A peer that lies, links that appear, bytes at the port: a short campaign; `make fuzz` runs a long one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import DIRECTORY, FILE, Replica

from farshore.control import api
from farshore.dbm import receiver, wire
from farshore.dbm.blocks import PLAIN
from farshore.dbm.messages import (
    Ack,
    Begin,
    Commit,
    Drop,
    Entries,
    FromReplica,
    InStep,
    ListTree,
    MakeDir,
    Meta,
    Move,
    Nak,
    Ping,
    Put,
    Upload,
)
from farshore.dbm.unkept import MAX_CAUSES
from farshore.errors import ProtocolError

MIB = 1 << 20
REQUESTS: wire.Codec[api.Request] = wire.Codec(api.Request)
ANSWERS: wire.Codec[api.Answer] = wire.Codec(api.Answer)
REPLICA: wire.Codec[FromReplica] = wire.Codec(FromReplica)


# --- what is decoded


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200) | hostile.FRAMES.filter(hostile.fits).map(lambda frame: wire.frame(frame)[4:]), st.data()
)
def test_a_frame_is_a_message_or_an_error_of_ours(body: bytes, data: st.DataObject) -> None:
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    for codec in (receiver.CODEC, REQUESTS, ANSWERS, REPLICA):
        with contextlib.suppress(ProtocolError):
            codec.decode(bytes(changed), "peer")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "head", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 90_000]
)
def test_what_a_frame_announces_costs_nothing(head: bytes) -> None:
    good = wire.frame(MakeDir(0, b"d", Meta(1, 2, 3, 4, 5, [])))[4:-1]
    tracemalloc.start()
    try:
        for body in (head, good + head):
            with pytest.raises(ProtocolError):
                receiver.CODEC.decode(body, "peer")
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 7))
def test_a_frame_that_is_read_is_whole_or_an_error_of_ours(data: bytes, piece: int) -> None:
    async def read() -> bytes | None:
        reader = asyncio.StreamReader()
        for at in range(0, len(data), piece):
            reader.feed_data(data[at : at + piece])
        reader.feed_eof()
        return await wire.read_frame(reader, "peer")

    length = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else 0
    if not data:
        assert asyncio.run(read()) is None
    elif 0 < length <= len(data) - 4:
        assert asyncio.run(read()) == data[4 : 4 + length]
    else:
        with pytest.raises(ProtocolError):
            asyncio.run(read())


# --- what costs a peer nothing


@pytest.fixture
def slow(replica: Replica) -> Iterator[Callable[[], None]]:
    """A replica whose worker does nothing, as if it waited for its disk, until the call that is returned."""
    gate = threading.Event()
    replica._worker.submit(gate.wait, 60)
    yield gate.set
    gate.set()


def flooded(replica: Replica, frames: bytes, count: int, seconds: float) -> int:
    """Send ``frames`` again and again, ``count`` MiB at most, for some seconds; returns the memory that it took."""
    block = frames * (MIB // len(frames))
    data = struct.pack(">IB", 1 + len(block), PLAIN) + block
    sock = replica.source.sock
    tracemalloc.start()
    try:
        sock.settimeout(1)
        ends = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(count):
                sock.sendall(data)
                if time.monotonic() > ends:
                    break
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_small_messages_by_the_million_are_held_back(replica: Replica, slow: Callable[[], None]) -> None:
    """While the disk is slow, what arrives is not gathered without end."""
    replica.source.put(*replica.transaction(Put(0, b"f", FILE, b"x")))
    assert flooded(replica, wire.frame(InStep()), 16, 20) < 200 * MIB
    slow()
    replica.disconnect()
    replica.seq = 1
    assert isinstance(replica.send(Put(0, b"after", FILE, b"x")), Ack)


def test_empty_transactions_by_the_million_are_held_back(replica: Replica, slow: Callable[[], None]) -> None:
    # A number only grows, so each pair of frames is another.
    def pairs(first: int) -> bytes:
        return b"".join(wire.frame(Begin(1, n)) + wire.frame(Commit(n)) for n in range(first, first + 20_000))

    sock = replica.source.sock
    sock.settimeout(3)
    tracemalloc.start()
    try:
        with contextlib.suppress(TimeoutError, ConnectionError):
            for part in range(30):
                body = pairs(1 + part * 20_000)
                sock.sendall(struct.pack(">IB", 1 + len(body), PLAIN) + body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    slow()
    replica.disconnect()
    assert peak < 150 * MIB


def test_a_block_of_messages_leaves_the_loop_to_others(replica: Replica) -> None:
    """Uploads that are opened and dropped, and questions: other connections of the node have their turn meanwhile."""
    longest = 0.0
    stop = False

    async def tick() -> None:
        nonlocal longest
        while not stop:
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)

    ticking = asyncio.run_coroutine_threadsafe(tick(), replica._loop)
    opened = b"".join(wire.frame(Upload(n, 0, b"f", False, False, 0)) + wire.frame(Drop(n)) for n in range(30_000))
    for body in (opened, wire.frame(Ping()) * 100_000):
        replica.source.put(Ping())
        body = body[: 2 * MIB]
        with contextlib.suppress(ConnectionError):
            replica.source.sock.sendall(struct.pack(">IB", 1 + len(body), PLAIN) + body)
        time.sleep(0.5)
        replica.disconnect()
    stop = True
    ticking.result(60)
    # A machine that is busy makes it wait too; it was a minute when each upload was looked for among all of them.
    assert longest < 10


def test_the_path_of_an_upload_fits_into_a_welcome(replica: Replica) -> None:
    """It would be told to the next that connects, who could never be welcomed."""
    for number in range(4):
        replica.source.put(Upload(number, 0, b"x" * 600_000 + b"%d" % number, False, False, 0))
        assert isinstance(replica.source.verdict(), Nak)
        replica.disconnect()
    assert replica.partials() == []


def test_an_answer_to_a_long_path_fits_into_a_frame(replica: Replica) -> None:
    for path in (b"x" * 1_000_000, b"x/" * 500_000, b"\xff" * 900_000):
        answer = replica.send(Move(0, path, b"a"))
        assert isinstance(answer, Nak)
        assert len(answer.path) <= 4096
        assert len(answer.reason) <= 1000


def test_a_tree_deeper_than_any_name_is_listed_as_far_as_it_has_names(replica: Replica) -> None:
    """Moves make it: each puts what is there into something as deep again."""
    below = [b"".join([b"/" + b"n" * 200] * n) for n in range(20)]
    replica.send(*(MakeDir(0, b"d" + path, DIRECTORY) for path in below))
    for _ in range(6):
        replica.send(*(MakeDir(0, b"e" + path, DIRECTORY) for path in below))
        answer = replica.send(Move(0, b"d", b"e" + below[-1] + b"/d"), Move(0, b"e", b"d"))
        assert isinstance(answer, Ack)
    replica.source.put(ListTree(False))
    paths: list[bytes] = []
    last = False
    while not last:
        part = replica.source.read()
        assert part is not None
        if isinstance(part, Entries):
            paths += [entry.path for entry in part.entries]
            last = part.last
    assert 2000 < max(map(len, paths)) <= 4096
    hostile.remove(replica.root)
    replica.root.mkdir()


def test_no_attribute_of_another_system_is_set(replica: Replica) -> None:
    names = [b"trusted.overlay.origin", b"security.selinux", b"security.ima", b"odd.%d", b"user.kept"]
    meta = Meta(0o644, os.getuid(), os.getgid(), 1, 1, [(name, b"x") for name in names])
    replica.send(Put(0, b"f", meta, b""))
    assert os.listxattr(replica.root / "f") == ["user.kept"]
    many = Meta(0o644, os.getuid(), os.getgid(), 1, 1, [(b"n%d.x" % n, b"") for n in range(1000)])
    replica.send(Put(0, b"f", many, b""))
    assert 2 < len(replica.source.unkept) <= MAX_CAUSES + 1


# --- the campaign, short


def test_a_peer_that_lies_harms_nothing_but_its_own_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSHORE_FUZZ_DIR", str(tmp_path))
    hostile.lie(20, 20)
    assert hostile.Liar.counts["answered"] > 20
    assert hostile.Liar.counts["refused"] > 20


def test_links_that_appear_lead_nowhere(tmp_path: Path) -> None:
    counts = hostile.race(tmp_path, 4, 1)
    assert counts["swaps"] > 10
    assert counts.get("taken", 0) + counts.get("refused", 0) > 10


async def test_bytes_at_the_port_stop_nothing(tmp_path: Path) -> None:
    assert sum((await hostile.spray(tmp_path, 5, 1)).values()) > 20
