from __future__ import annotations

import asyncio
import socket
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from farshore.ipts import tunnel


def ike(state: bytes, **children: bytes) -> dict[str, Any]:
    return {
        "sites": OrderedDict(
            {
                "state": state,
                "child-sas": {
                    f"{name}-1": {"name": name.encode(), "state": value, "bytes-in": b"10", "bytes-out": b"20"}
                    for name, value in children.items()
                },
            }
        )
    }


@pytest.mark.parametrize(
    ("sas", "line"),
    [
        ([], "down: no IKE SA"),
        ([ike(b"CONNECTING")], "down: IKE SA sites is CONNECTING"),
        ([ike(b"ESTABLISHED")], "down: IKE SA sites has no child SA"),
        ([ike(b"ESTABLISHED", net=b"INSTALLING")], "down: IKE SA sites has no child SA"),
        ([ike(b"ESTABLISHED", net=b"INSTALLED")], "up (net: 10 bytes in, 20 out)"),
        ([ike(b"CONNECTING"), ike(b"ESTABLISHED", net=b"INSTALLED")], "up (net: 10 bytes in, 20 out)"),
    ],
)
def test_describe(sas: list[dict[str, Any]], line: str) -> None:
    assert tunnel.describe(sas) == line


async def test_no_charon(tmp_path: Path) -> None:
    assert (await tunnel.state(tmp_path / "charon.vici")).startswith("down: charon does not run")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "charon.vici"))
    assert (await tunnel.state(tmp_path / "charon.vici")).startswith("down: charon does not run")


async def test_a_charon_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "charon.vici"))
        sock.listen()
        assert (await tunnel.state(tmp_path / "charon.vici", 0.1)).startswith("unknown: charon did not answer")


async def test_a_charon_that_talks_nonsense_is_reported(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "charon.vici"))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"\x00\x00\x00\x01\x77")

        thread = threading.Thread(target=serve)
        thread.start()
        assert (await tunnel.state(tmp_path / "charon.vici", 2.0)).startswith("unknown: ")
        await asyncio.to_thread(thread.join)


async def test_a_charon_that_answers(tmp_path: Path) -> None:
    """The packets that charon sends for list-sas with one SA, as its VICI documentation describes them."""

    def packet(body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + body

    def text(kind: int, name: bytes, value: bytes | None = None) -> bytes:
        head = bytes([kind, len(name)]) + name
        return head if value is None else head + len(value).to_bytes(2, "big") + value

    section_start, section_end, key_value = 1, 2, 3
    message = (
        text(section_start, b"sites")
        + text(key_value, b"state", b"ESTABLISHED")
        + text(section_start, b"child-sas")
        + text(section_start, b"net-1")
        + text(key_value, b"name", b"net")
        + text(key_value, b"state", b"INSTALLED")
        + text(key_value, b"bytes-in", b"1")
        + text(key_value, b"bytes-out", b"2")
        + bytes([section_end] * 3)
    )
    event = bytes([7, len(b"list-sa")]) + b"list-sa" + message
    event_confirm, command_response = packet(b"\x05"), packet(b"\x01")

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "charon.vici"))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            with connection:
                for answer in (event_confirm, packet(event) + command_response, event_confirm):
                    if not connection.recv(1000):
                        return
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert await tunnel.state(tmp_path / "charon.vici") == "up (net: 1 bytes in, 2 out)"
        await asyncio.to_thread(thread.join)
