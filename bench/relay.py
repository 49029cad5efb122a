"""A long, narrow line for TCP, in user space: what NETEM would do, where the kernel has none.

    python -m bench.relay --listen 127.0.0.1:7000 --to 127.0.0.1:7820 --delay 0.05 --rate 12.5e6

Each direction of a connection is a pipe: bytes leave it `delay` seconds after they came (one way: the round trip is
twice that), at `rate` bytes per second at most, in order. It holds `buffer` bytes at most, by default as many as are
under way at the highest speed, so that the line and not the relay is the limit; when it is full, the sender waits.

What is different from a real line. TCP ends at the relay on both sides, so slow start and the congestion window of the
sender don't see the delay: the line behaves as one whose window is always open. ``jitter`` adds a random time to
each piece, never so that pieces overtake each other. ``loss`` is the share of lost segments of 1448 bytes; as TCP
delivers in order, a lost segment holds up what follows it until it is sent again, which is simulated as a pause of one
retransmission timeout: 0.2 s or the round trip, whichever is longer.

With ``--control``, lines on stdin are answered on stdout: ``stats`` (bytes each way), ``delay SECONDS``, ``rate BYTES``
(0: no limit); the relay ends with stdin. Without it, it runs until SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

#: Bytes that are read at once; a slow line is served in pieces of a few milliseconds.
PIECE = 1 << 18
SEGMENT = 1448
LEAST_TIMEOUT = 0.2
DEFAULT_BUFFER = 128 << 20
_PIECE_SECONDS = 0.002


@dataclass
class Line:
    """What the line is like; may be changed while it is in use. Seconds, bytes per second (0: no limit), shares."""

    delay: float = 0.0
    rate: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    buffer: int = DEFAULT_BUFFER
    chance: random.Random = field(default_factory=random.Random)

    def piece(self) -> int:
        """How much to read at once."""
        return min(PIECE, max(SEGMENT, int(self.rate * _PIECE_SECONDS))) if self.rate else PIECE

    def held_up(self, size: int) -> float:
        """Seconds that jitter and lost segments add to a piece of `size` bytes."""
        seconds = self.chance.random() * self.jitter if self.jitter else 0.0
        if self.loss:
            segments = -(-size // SEGMENT)
            if self.chance.random() < 1.0 - (1.0 - self.loss) ** segments:
                seconds += max(LEAST_TIMEOUT, 2.0 * self.delay)
        return seconds


class _Pipe:
    """One direction of one connection: one thread reads, one writes when a piece is due."""

    def __init__(self, line: Line, source: socket.socket, target: socket.socket, *, outward: bool) -> None:
        self.outward = outward
        self.line = line
        self.source = source
        self.target = target
        self.bytes = 0
        self._queue: deque[tuple[float, memoryview | None]] = deque()
        self._held = 0
        self._spare: list[bytearray] = []
        self._change = threading.Condition()
        self._broken = False
        self._free_at = 0.0
        self._last_due = 0.0
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in (self._read, self._write)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            self.abort()

    def abort(self) -> None:
        """End both sides at once."""
        with self._change:
            self._broken = True
            self._change.notify_all()
        for each in (self.source, self.target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        line = self.line
        while True:
            with self._change:
                while self._held >= line.buffer and not self._broken:
                    self._change.wait()
                if self._broken:
                    return
                buffer = self._spare.pop() if self._spare else bytearray(PIECE)
            got = self.source.recv_into(memoryview(buffer)[: line.piece()])
            now = time.monotonic()
            if got and not (line.delay or line.rate or line.jitter or line.loss) and not self._held:
                # Nothing waits before this and nothing delays it: no need to change threads.
                self.bytes += got
                self.target.sendall(memoryview(buffer)[:got])
                self._spare.append(buffer)
                continue
            with self._change:
                leaves = now
                if line.rate:
                    leaves = max(now, self._free_at) + got / line.rate
                    self._free_at = leaves
                self._last_due = max(self._last_due, leaves + line.delay + line.held_up(got))
                self._queue.append((self._last_due, memoryview(buffer)[:got] if got else None))
                self._held += got
                self._change.notify_all()
            if not got:
                return
            self.bytes += got

    def _write(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._broken:
                    self._change.wait()
                if self._broken:
                    return
                due, piece = self._queue[0]
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            if piece is None:
                with contextlib.suppress(OSError):
                    self.target.shutdown(socket.SHUT_WR)
                return
            self.target.sendall(piece)
            with self._change:
                self._queue.popleft()
                self._held -= len(piece)
                if len(self._spare) < 64:
                    assert isinstance(piece.obj, bytearray)
                    self._spare.append(piece.obj)
                self._change.notify_all()


class Relay:
    """Listens at `listen`, and connects each connection to `to` by a line of its own."""

    def __init__(self, listen: tuple[str, int], to: tuple[str, int], line: Line) -> None:
        self.line = line
        self._to = to
        self._listener = socket.create_server(listen, backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._pipes: set[_Pipe] = set()
        self._there = self._back = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def start(self) -> None:
        """Take connections, in threads."""
        self._thread.start()

    def stop(self) -> None:
        """End all connections and listen no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pipes = list(self._pipes)
        for pipe in pipes:
            pipe.abort()

    def stats(self) -> dict[str, int]:
        """Bytes read so far from those who connected (``there``) and from where they were led (``back``)."""
        with self._lock:
            there = self._there + sum(p.bytes for p in self._pipes if p.outward)
            back = self._back + sum(p.bytes for p in self._pipes if not p.outward)
            return {"there": there, "back": back, "connections": len(self._pipes) // 2}

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._to, 10)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        out = _Pipe(self.line, client, server, outward=True)
        back = _Pipe(self.line, server, client, outward=False)
        with self._lock:
            self._pipes |= {out, back}
        for pipe in (out, back):
            pipe.start()
        for pipe in (out, back):
            pipe.join()
        with self._lock:
            self._pipes -= {out, back}
            self._there += out.bytes
            self._back += back.bytes
        client.close()
        server.close()


def answer(relay: Relay, words: list[str]) -> str:
    """Carry out a line of control and return the answer, without newline."""
    match words:
        case ["stats"]:
            return json.dumps(relay.stats())
        case ["delay", seconds]:
            relay.line.delay = float(seconds)
        case ["rate", rate]:
            relay.line.rate = float(rate)
        case _:
            return f"what is {' '.join(words)!r}?"
    return "ok"


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


def main() -> int:
    """Run as a program; prints ``port N`` when it listens."""
    parser = argparse.ArgumentParser(prog="bench.relay", description="A TCP line with delay, rate, jitter and loss.")
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT", help="port 0: any")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="one way")
    parser.add_argument("--rate", type=float, default=0.0, metavar="BYTES", help="per second, each way; 0: no limit")
    parser.add_argument("--jitter", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--loss", type=float, default=0.0, metavar="SHARE", help="of segments, for example 0.001")
    parser.add_argument("--buffer", type=int, default=DEFAULT_BUFFER, metavar="BYTES", help="default: %(default)s")
    parser.add_argument("--control", action="store_true", help="take orders from stdin, end with it")
    options = parser.parse_args()
    line = Line(options.delay, options.rate, options.jitter, options.loss, options.buffer)
    relay = Relay(options.listen, options.to, line)
    relay.start()
    print(f"port {relay.port}", flush=True)
    if options.control:
        for text in sys.stdin:
            print(answer(relay, text.split()), flush=True)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
    relay.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
