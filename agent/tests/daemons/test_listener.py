"""The door of a node: revoked peers, floods, and those who say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest
from authority import Authority
from nodes import Pair, running_pair, until

from farshore import tls
from farshore.config import NodeRef
from farshore.control import api, client
from farshore.daemons import admission, listener, node
from farshore.dbm import wire


def reference(pair: Pair) -> NodeRef:
    return NodeRef("remote", "127.0.0.1", pair.remote.port)


async def ended(sock: socket.socket) -> None:
    """Wait until the other side has ended a connection."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            while await loop.sock_recv(sock, 65536):
                pass
    sock.close()


async def dialled(pair: Pair) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", pair.remote.port))
    return sock


@pytest.mark.parametrize("lost", ["local", "remote"])
async def test_a_peer_that_is_revoked_loses_its_stream(
    tmp_path: Path, authority: Authority, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either end notices: the one that accepted, or the one that connected."""
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.05)
    async with running_pair(tmp_path, crl=True) as pair:
        await pair.own("local", 1)
        (pair.local_tree / "a").write_text("1")
        await pair.local.groups["web"].flush(60)
        replica, source = pair.remote.groups["web"], pair.local.groups["web"]
        authority.revoke("stranger")
        await asyncio.sleep(0.3)
        assert replica._session is not None
        authority.revoke("stranger", lost)
        await until(lambda: replica._session is None, "the stream goes on")
        (pair.local_tree / "b").write_text("2")
        await until(lambda: source._sender is not None and not source._sender.connected, "it is still connected")
        await asyncio.sleep(0.5)
        assert not (pair.remote_tree / "b").exists()
        # The list was wrong: everything goes on by itself.
        authority.revoke()
        await pair.local.groups["web"].flush(60)
        assert (pair.remote_tree / "b").read_text() == "2"


async def test_a_flood_from_one_address_keeps_the_gateway_in(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Strangers' addresses in a test are those of the loopback's network."""
    await pair.own("local", 1)
    door = pair.remote._listener.admission
    silent = []
    for _ in range(150):
        sock = socket.socket()
        sock.bind(("127.6.6.6", 0))
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", pair.remote.port))
        silent.append(sock)
    await until(lambda: door.pending > 0, "nobody came in")
    assert door.pending <= admission.MOST_PENDING_ADDRESS
    keys = tls.client_context(tls.Tls(pair.keys / "ca.crt", pair.keys / "gateway.crt", pair.keys / "gateway.key"))
    for _ in range(10):
        assert isinstance(await client.ask_peer(reference(pair), keys, api.StatusRequest(), 30), api.NodeStatus)
    (pair.local_tree / "still").write_text("works")
    await pair.local.groups["web"].flush(60)
    assert (pair.remote_tree / "still").read_text() == "works"
    assert 0 < caplog.text.count("too many") <= 2
    for sock in silent:
        sock.close()
    await until(lambda: door.pending == 0, "what is gone still counts")


async def test_who_says_nothing_is_put_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the handshake, in the middle of it, after it, and after an answer."""
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(node, "FIRST_FRAME_SECONDS", 0.2)
    monkeypatch.setattr(node, "_IDLE_SECONDS", 0.2)
    await ended(await dialled(pair))
    half = await dialled(pair)
    await asyncio.get_running_loop().sock_sendall(half, bytes.fromhex("16030100ff0100"))
    await ended(half)
    keys = tls.client_context(tls.Tls(pair.keys / "ca.crt", pair.keys / "gateway.crt", pair.keys / "gateway.key"))
    for said in (b"", b"\0\0", wire.frame(api.StatusRequest()), wire.frame(api.StatusRequest()) + b"\0\0\0"):
        reader, writer = await tls.connect(reference(pair), keys)
        writer.write(said)
        async with asyncio.timeout(60):
            await reader.read()
        writer.close()
    await until(lambda: not pair.remote._listener._connections, "a connection is left")
    assert pair.remote._listener.admission.pending == 0


async def test_who_takes_no_answers_is_put_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_IDLE_SECONDS", 0.3)
    keys = tls.client_context(tls.Tls(pair.keys / "ca.crt", pair.keys / "gateway.crt", pair.keys / "gateway.key"))
    reader, writer = await tls.connect(reference(pair), keys)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        for _ in range(2000):
            writer.write(wire.frame(api.StatusRequest()) * 100)
    await until(lambda: not pair.remote._listener._connections, "it is still there")
    writer.transport.abort()


async def test_an_identity_has_few_connections(pair: Pair) -> None:
    keys = tls.client_context(tls.Tls(pair.keys / "ca.crt", pair.keys / "stranger.crt", pair.keys / "stranger.key"))
    made = [await tls.connect(reference(pair), keys) for _ in range(6)]
    await until(lambda: pair.remote._listener.admission._identities["stranger"] == node.MOST_OF_OTHER, "too few")
    async with asyncio.timeout(60):
        for reader, _ in made[node.MOST_OF_OTHER :]:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
    for _, writer in made:
        writer.close()
    await until(lambda: not pair.remote._listener.admission._identities, "they still count")
    _, writer = await tls.connect(reference(pair), keys)
    writer.close()


@pytest.mark.parametrize(
    "raw", [b"\0", b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\x16\x03\x01\xff\xff" + b"\xff" * 70_000]
)
async def test_raw_bytes_at_the_port_end_their_own_connection(pair: Pair, raw: bytes) -> None:
    sock = await dialled(pair)
    with contextlib.suppress(ConnectionError):
        await asyncio.get_running_loop().sock_sendall(sock, raw)
        sock.shutdown(socket.SHUT_WR)
    await ended(sock)
    sock = await dialled(pair)
    await asyncio.get_running_loop().sock_sendall(sock, os.urandom(1000))
    sock.close()
    await until(lambda: pair.remote._listener.admission.pending == 0, "what is gone still counts")
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)


async def test_a_node_that_stops_leaves_no_connection(pair: Pair) -> None:
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    silent = await dialled(pair)
    half = await dialled(pair)
    await until(lambda: pair.remote._listener.admission.pending == 2, "they did not come in")
    await asyncio.sleep(0.2)
    late = await dialled(pair)
    await pair.remote.stop()
    for each in (silent, half, late):
        await ended(each)
    assert not pair.remote._listener._connections
    assert pair.remote._listener.admission.pending == 0
    pair.remote = type(pair.remote)(pair.remote.config)
    await pair.remote.start(None)
    (pair.local_tree / "b").write_text("2")
    await pair.local.groups["web"].flush(60)
