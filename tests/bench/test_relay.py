"""The relay: the bytes arrive as they were, and never before their time."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from bench.relay import Line, Relay, answer


class Echo:
    """Answers with what it got, once the other side has said all."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    got = bytearray()
                    while piece := connection.recv(1 << 16):
                        got += piece
                    connection.sendall(got)


@contextlib.contextmanager
def relayed(line: Line) -> Iterator[Relay]:
    echo = Echo()
    relay = Relay(("127.0.0.1", 0), ("127.0.0.1", echo.port), line)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()
        echo.listener.close()


def there_and_back(relay: Relay, content: bytes) -> tuple[bytes, float]:
    """What comes back, and after how many seconds."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", relay.port), 30) as connection:

        def say() -> None:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=say)
        sender.start()
        got = bytearray()
        while piece := connection.recv(1 << 16):
            got += piece
        sender.join()
    return bytes(got), time.monotonic() - began


@pytest.mark.parametrize(
    "line",
    [
        Line(),
        Line(delay=0.02),
        Line(rate=40e6),
        Line(delay=0.005, jitter=0.01, loss=0.001, chance=random.Random(1)),
        Line(delay=0.01, buffer=100_000),
    ],
)
def test_bytes_arrive_as_they_were(line: Line) -> None:
    content = os.urandom(3_000_001)
    with relayed(line) as relay:
        got, seconds = there_and_back(relay, content)
        assert got == content
        assert seconds >= 2 * line.delay
        counted = relay.stats()
        assert counted["there"] == counted["back"] == len(content)


def test_rate_is_kept() -> None:
    content = os.urandom(2_000_000)
    with relayed(Line(rate=10e6)) as relay:
        _, seconds = there_and_back(relay, content)
        # Each way takes its 0.2 s; the echo begins after the whole way there.
        assert seconds >= 0.4


def test_delay_can_be_changed() -> None:
    with relayed(Line()) as relay:
        there_and_back(relay, b"before")
        assert answer(relay, ["delay", "0.1"]) == "ok"
        got, seconds = there_and_back(relay, b"after")
        assert got == b"after"
        assert seconds >= 0.2
        assert "what is" in answer(relay, ["nonsense"])


def test_connection_to_nobody_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    relay = Relay(("127.0.0.1", 0), ("127.0.0.1", port), Line())
    relay.start()
    try:
        with socket.create_connection(("127.0.0.1", relay.port), 10) as connection:
            assert connection.recv(1) == b""
    finally:
        relay.stop()


def test_loss_holds_up_for_a_timeout() -> None:
    assert Line(loss=1.0).held_up(1) == 0.2
    assert Line(loss=1.0, delay=0.3).held_up(1) == 0.6
    assert Line().held_up(1) == 0.0
