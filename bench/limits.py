"""What the machine itself can do: the limits that no program passes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench import stats
from bench.model import Limit
from bench.processes import BenchError, Daemon, free_port, need, run, syncfs, wait_until

_PIECE = 1 << 20


def memcpy(size: int = 256 << 20, rounds: int = 5) -> Limit:
    """Copy memory to memory, larger than the caches, one core."""
    source, target = memoryview(bytearray(os.urandom(1 << 20) * (size >> 20))), memoryview(bytearray(size))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - began)
    return Limit("memcpy", size / stats.median(seconds) / 1e9, "GB/s")


def cached_read(path: Path, rounds: int = 3) -> Limit:
    """Read a file that is in the page cache, whole, one core."""
    buffer = bytearray(_PIECE)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        seconds.append(time.perf_counter() - began)
    return Limit("page-cache read", path.stat().st_size / stats.median(seconds) / 1e9, "GB/s")


def fsync(place: Path, rounds: int = 30) -> Limit:
    """Make one written page durable."""
    path = place / ".bench-fsync"
    seconds = []
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(rounds):
            os.pwrite(handle, os.urandom(4096), 0)
            began = time.perf_counter()
            os.fsync(handle)
            seconds.append(time.perf_counter() - began)
    finally:
        os.close(handle)
        path.unlink()
    return Limit("fsync of one page", stats.median(seconds) * 1e3, "ms")


def plain_copy(source: Path, place: Path) -> Limit:
    """``cp`` of a file, made durable."""
    target = place / ".bench-copy"
    began = time.perf_counter()
    run(["cp", "--reflink=never", str(source), str(target)])
    syncfs(place)
    seconds = time.perf_counter() - began
    target.unlink()
    return Limit("plain copy (cp and syncfs)", seconds, "s")


def iperf3(port: int, through: int | None = None, *, seconds: int = 3, log: Path = Path("/dev/null")) -> Limit:
    """TCP on the loopback, or through a relay at port `through` that leads to `port`."""
    need("iperf3")
    server = Daemon(["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", str(port)], log)
    try:
        wait_until(lambda: _listens(port), "iperf3", timeout=5)
        done = run(["iperf3", "-c", "127.0.0.1", "-p", str(through or port), "-t", str(seconds), "-J"], timeout=60)
    finally:
        server.stop(2)
    return Limit("TCP (iperf3)" if through is None else "iperf3 through the relay", iperf3_rate(done.output), "GB/s")


def iperf3_rate(text: str) -> float:
    """Received GB/s of a report of ``iperf3 -J``; raises BenchError when there is none."""
    import json

    try:
        return float(json.loads(text)["end"]["sum_received"]["bits_per_second"]) / 8e9
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"iperf3's report can't be read: {text[-300:]}") from error


def loopback(log: Path) -> Limit:
    """TCP on the loopback."""
    return iperf3(free_port(), log=log)


def _listens(port: int) -> bool:
    with open("/proc/net/tcp", encoding="ascii") as file:
        return any(f":{port:04X} 00000000:0000 0A" in line for line in file)
