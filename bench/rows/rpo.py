"""Row 7: how old is what would be lost: from a write to when it is durable on the replica."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import data, limits, peers, stats
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Criterion, RowResult, Sample
from bench.nodes import check_same
from bench.processes import BenchError, Daemon, TooSlow, need, wait_until

FILES = 2000
DIRECTORIES = 20
SIZE = 4096
RATE = 200.0
SECONDS = 20.0
ROUND_TRIP = 0.020
#: Seconds that what was written last may take to appear.
_DRAIN = 30.0


class RecoveryPoint:
    """A steady load of small writes to random files, seen by an observer on the replica's side."""

    rows: ClassVar[Mapping[int, str]] = {7: "RPO at 200 changes per second, above half the round trip"}

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure without delay and with a round trip of 20 ms; the peers without."""
        row = RowResult(7, "RPO at 200 changes/s", self.rows[7])
        seconds = SECONDS * min(1.0, context.scale) * (0.5 if context.quick else 1.0)
        seconds = max(seconds, 2.0)
        curves: dict[str, list[float]] = {}
        away = f"{OURS}, round trip {ROUND_TRIP * 1e3:g} ms"
        with field_of_play(context, 1 << 30, 1 << 30) as field:
            tree = field.source / "ours"
            data.small_files(tree, FILES, DIRECTORIES, SIZE)
            with our_pair(context, field, relay=True) as pair:
                assert pair.relay is not None
                relay = pair.relay

                def ours(name: str, delay: float) -> Sample:
                    relay.set_delay(delay)
                    load = Load(tree, pair.replica, pair.cpu, context.logs)
                    sample = load.run(seconds, delay)
                    curves.setdefault(name, []).extend(load.latencies)
                    relay.set_delay(0.0)
                    pair.flush()
                    return sample

                row.runs = context.turns({OURS: lambda _: ours(OURS, 0.0), away: lambda _: ours(away, ROUND_TRIP / 2)})
                check_same(pair)
            row.limits.append(limits.fsync(field.target))

            def theirs(name: str, start: Callable[[Path, Path], peers.Lsyncd | peers.Syncthing]) -> Sample:
                load, sample = _peer(context, field, start, seconds)
                curves.setdefault(name, []).extend(load.latencies)
                return sample

            contestants: dict[str, Callable[[int], Sample]] = {}
            for delay in (0, 1):
                contestants[f"lsyncd delay={delay}"] = lambda _, delay=delay: theirs(  # type: ignore[misc]
                    f"lsyncd delay={delay}",
                    lambda source, target: peers.Lsyncd(source, target, context.logs / "lsyncd", delay),
                )
            if not context.quick:
                contestants["syncthing"] = lambda _: theirs(
                    "syncthing", lambda source, target: peers.Syncthing(source, target, context.logs / "syncthing")
                )
            row.runs |= context.turns(contestants, 1)
        self._judge(row, (OURS, away), curves)
        row.notes += [
            f"{RATE:g} writes of 16 bytes per second for {seconds:g} s, to random files of {FILES} of 4 KiB.",
            "A change counts when its content appears in the replica's tree, where ours puts it once it is durable. "
            "What the peers show there is in memory yet.",
            "Half the round trip is taken off, as no line is faster. The peers ran without delay.",
        ]
        return [row]

    def _judge(self, row: RowResult, ours: Sequence[str], curves: dict[str, list[float]]) -> None:
        for name, samples in row.runs.items():
            for percent, must, stretch in ((50, 20.0, 3.0), (99, 100.0, 15.0)):
                values = tuple(
                    s.extra[f"p{percent} ms"] for s in samples if s is not None and f"p{percent} ms" in s.extra
                )
                binding = name in ours
                row.criteria.append(
                    Criterion(
                        f"p{percent}, {name}",
                        "ms",
                        values,
                        must if binding else None,
                        stretch if binding else None,
                        binding=binding,
                    )
                )
            unseen = sum(s.extra.get("unseen", 0.0) for s in samples if s is not None)
            if unseen:
                row.notes.append(f"{name}: {unseen:g} changes did not appear within {_DRAIN:g} s after the last write.")
        row.series["latency ms"] = {name: stats.curve_ms(values) for name, values in curves.items()}


def latencies(
    written: Sequence[tuple[float, str, int]], seen: Sequence[tuple[float, str, int]]
) -> tuple[list[float], int]:
    """Seconds from each write to when it, or a later one to the same file, was first seen; and how many never were.

    Both are (seconds, file, stamp), with stamps that grow. A later content holds the earlier change, too.
    """
    pending: dict[str, list[tuple[float, int]]] = {}
    for when, name, stamp in written:
        pending.setdefault(name, []).append((when, stamp))
    found: list[float] = []
    for when, name, stamp in sorted(seen):
        rest = []
        for each in pending.get(name, ()):
            if each[1] <= stamp:
                found.append(when - each[0])
            else:
                rest.append(each)
        if name in pending:
            pending[name] = rest
    return found, sum(len(rest) for rest in pending.values())


class Load:
    """Writes to random files of `tree` and has `replica` observed."""

    def __init__(self, tree: Path, replica: Path, cpu: Callable[[], float], logs: Path) -> None:
        self._tree = tree
        self._replica = replica
        self._cpu = cpu
        self._logs = logs
        self.latencies: list[float] = []

    def run(self, seconds: float, one_way: float) -> Sample:
        """Write for some seconds; the sample has p50, p99 and the most in milliseconds, `one_way` taken off."""
        observer = Daemon(
            [sys.executable, "-m", "bench.observer", str(self._replica)], self._logs / "observer.log", control=True
        )
        try:
            if (said := observer.read()) != "ready":
                raise BenchError(f"the observer of {self._replica}: {said}")
            cpu, began = self._cpu(), time.monotonic()
            written = self._write(seconds)
            took = time.monotonic() - began
            with contextlib.suppress(TooSlow):
                last = {name: stamp for _, name, stamp in written}
                wait_until(lambda: self._arrived(last), "the last change", timeout=_DRAIN, interval=0.25)
            # What was seen last is in the observer's queue.
            time.sleep(0.2)
            spent = self._cpu() - cpu
            assert observer.process.stdin is not None
            observer.process.stdin.close()
            seen = json.loads(observer.read())
        finally:
            observer.stop()
        raw, unseen = latencies(written, [(when, name, stamp) for when, name, stamp in seen])
        self.latencies = [max(0.0, each - one_way) for each in raw]
        if not self.latencies:
            return Sample(took, spent, None, {"unseen": float(unseen)})
        extra = {
            "p50 ms": stats.percentile(self.latencies, 50) * 1e3,
            "p99 ms": stats.percentile(self.latencies, 99) * 1e3,
            "most ms": max(self.latencies) * 1e3,
            "unseen": float(unseen),
        }
        return Sample(took, spent, None, extra)

    def _write(self, seconds: float) -> list[tuple[float, str, int]]:
        chance = random.Random(7)
        paths = sorted(str(path) for path in self._tree.glob("d*/f*"))
        written = []
        began = time.monotonic()
        # Stamps grow from run to run, so that an old content never passes for a new one.
        first = time.monotonic_ns()
        for number in range(int(seconds * RATE)):
            wait = began + number / RATE - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            path = chance.choice(paths)
            stamp = first + number
            handle = os.open(path, os.O_WRONLY)
            when = time.monotonic()
            os.pwrite(handle, stamp.to_bytes(8, "big") + os.urandom(8), 0)
            os.close(handle)
            written.append((when, os.path.basename(path), stamp))
        return written

    def _arrived(self, last: dict[str, int]) -> bool:
        from bench.observer import read_stamp

        for name in list(last):
            place = next(self._replica.glob(f"d*/{name}"), None)
            if place is None or read_stamp(str(place)) < last[name]:
                return False
            del last[name]
        return True


def _peer(
    context: Context,
    field: Field,
    start: Callable[[Path, Path], peers.Lsyncd | peers.Syncthing],
    seconds: float,
) -> tuple[Load, Sample]:
    need("lsyncd")
    source, target = field.source / "peer", field.target / "peer"
    data.small_files(source, FILES, DIRECTORIES, SIZE)
    daemon: peers.Lsyncd | peers.Syncthing | None = None
    try:
        daemon = start(source, target)
        wait_until(lambda: data.count_files(target) >= FILES, "the peer to be in step", timeout=120, interval=0.2)
        load = Load(source, target, daemon.cpu, context.logs)
        return load, load.run(seconds, 0.0)
    finally:
        if daemon is not None:
            daemon.stop()
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
