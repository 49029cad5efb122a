"""Row 12: many small files over a long line: does anything wait for a round trip?"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import limits, peers
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Criterion, Limit, RowResult, Sample
from bench.nodes import Pair, WanRelay, check_same
from bench.processes import free_port, need, syncfs
from bench.rows.smallfiles import how_many, measure_ours, prepare, room_for

ROUND_TRIP = 0.100
NEAR = f"{OURS}, 0 ms"
FAR = f"{OURS}, 100 ms"


class LongLine:
    """The same work through the same relay, with no delay and with a round trip of 100 ms, in turns."""

    rows: ClassVar[Mapping[int, str]] = {
        12: "100,000 files of 1 KiB over a line with 100 ms round trip, against the same at 0 ms"
    }

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure ours, and an rsync daemon through the same relay."""
        need("rsync", "iperf3")
        row = RowResult(12, "100 ms round trip", self.rows[12])
        files = how_many(row, context.scale * (0.2 if context.quick else 1.0))
        room = room_for(files)
        with field_of_play(context, room, room) as field:
            still = prepare(field, "still", files)
            module = field.target / "rsync"
            module.mkdir()
            with our_pair(context, field, relay=True) as pair, peers.rsync_daemon(module, context.logs) as port:
                relay = WanRelay(port, context.logs / "relay-rsync.log")
                try:
                    row.runs = context.turns(
                        {
                            NEAR: lambda n: _ours(field, pair, files, n, 0.0),
                            FAR: lambda n: _ours(field, pair, files, n, ROUND_TRIP / 2),
                            "rsync, 0 ms": lambda _: _rsync(field, still, module, relay, 0.0),
                            "rsync, 100 ms": lambda _: _rsync(field, still, module, relay, ROUND_TRIP / 2),
                        }
                    )
                finally:
                    relay.stop()
                check_same(pair)
            row.limits += [limits.loopback(context.logs / "iperf3.log"), *_relay_limits(context.logs)]
        for must, stretch, far, near in ((1.3, 1.05, FAR, NEAR), (None, None, "rsync, 100 ms", "rsync, 0 ms")):
            ratios = [
                a.seconds / b.seconds
                for a, b in zip(row.runs[far], row.runs[near], strict=True)
                if a is not None and b is not None
            ]
            name = "time at 100 ms / at 0 ms" + ("" if must else ", rsync")
            row.criteria.append(Criterion(name, "×", tuple(ratios), must, stretch, binding=must is not None))
        row.compare(FAR, "rsync, 100 ms", None)
        row.notes.append("The relay ends TCP on both sides, so slow start doesn't see the delay; the same for all.")
        return [row]


def _ours(field: Field, pair: Pair, files: int, number: int, delay: float) -> Sample:
    relay = pair.relay
    assert relay is not None
    return measure_ours(field, pair, files, number, lambda on: relay.set_delay(delay if on else 0.0))


def _rsync(field: Field, still: Path, module: Path, relay: WanRelay, delay: float) -> Sample:
    syncfs(field.target)
    relay.set_delay(delay)
    began = time.monotonic()
    sample = peers.rsync(f"{still}/", f"rsync://127.0.0.1:{relay.port}/m/", ["-a", "--whole-file"], field.target)
    seconds = time.monotonic() - began
    # The daemon's CPU is not the client's.
    sample = Sample(seconds, None, sample.wire)
    for each in module.iterdir():
        shutil.rmtree(each)
    syncfs(field.target)
    field.trim()
    return sample


def _relay_limits(logs: Path) -> list[Limit]:
    """What the relay itself carries, without delay and with it: nothing here is faster."""
    found = []
    for delay, name in ((0.0, "0 ms"), (ROUND_TRIP / 2, "100 ms")):
        port = free_port()
        relay = WanRelay(port, logs / "relay-limit.log", delay)
        try:
            limit = limits.iperf3(port, relay.port, log=logs / "iperf3.log")
        finally:
            relay.stop()
        found.append(Limit(f"{limit.name} at {name}", limit.value, limit.unit))
    return found
