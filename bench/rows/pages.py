"""Rows 1 and 2: one per cent of the pages of a large file change in place."""

from __future__ import annotations

import filecmp
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import data, disk, limits, peers
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Criterion, Limit, RowResult, Sample
from bench.nodes import Pair, check_same
from bench.processes import BenchError, need, run

SIZE = 1 << 30
SHARE = 0.01
RSYNC = "rsync --no-whole-file"
INPLACE = "rsync --inplace"
SMALL_BLOCKS = "rsync --block-size=4096"
RDIFF = "rdiff"
RDIFF_4K = "rdiff -b 4096"
COPY = "cp"


class Pages:
    """The most frequent change of a large file: pages overwritten, as databases and mail stores do."""

    rows: ClassVar[Mapping[int, str]] = {
        1: "1 GiB, 1% of its 4 KiB pages changed: change to durable on the replica",
        2: "the same: bytes on the wire / bytes changed",
    }

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure on XFS in memory and, unless quick, on the machine's own disk."""
        need("rsync", "rdiff", "ss")
        time_row = RowResult(1, "1% of pages changed, time", self.rows[1])
        wire_row = RowResult(2, "1% of pages changed, bytes", self.rows[2])
        size = context.size(SIZE)
        with field_of_play(context, 3 * size + (256 << 20), 10 * size + (512 << 20)) as field:
            context.say("  XFS with reflink, in memory")
            time_row.runs, changed = _contest(context, field, size, everyone=True)
            source = field.source / "peers" / "file"
            time_row.limits += [
                limits.cached_read(source),
                limits.memcpy(context.size(256 << 20, 1 << 20)),
                limits.plain_copy(source, field.target),
                limits.fsync(field.target),
                limits.loopback(context.logs / "iperf3.log"),
            ]
        _judge(time_row)
        if not context.quick:
            self._own_disk(context, time_row, size)
        for name, samples in time_row.runs.items():
            if name in (OURS, RSYNC, INPLACE, SMALL_BLOCKS, RDIFF, RDIFF_4K):
                wire_row.runs[name] = samples
                values = tuple(s.wire / changed for s in samples if s is not None and s.wire is not None)
                label = "bytes on the wire / bytes changed"
                label += "" if name == OURS else f", {name}"
                wire_row.criteria.append(Criterion(label, "×", values, 1.15, 1.03, binding=name == OURS))
        wire_row.limits.append(Limit("bytes changed", float(changed), "B"))
        wire_row.notes.append(
            "Ours: both directions of the connection, by the kernel, TLS included. rsync: sent and received. "
            "rdiff: signature and delta."
        )
        return [row for row in (time_row, wire_row) if row.number in wanted]

    def _own_disk(self, context: Context, row: RowResult, size: int) -> None:
        place = Path("/var/tmp")
        kind = disk.kind(place)
        context.say(f"  {kind}, the machine's own disk")
        with field_of_play(context, 3 * size + (256 << 20), 0, place) as field:
            runs, _ = _contest(context, field, size, everyone=False)
            fsync = limits.fsync(field.target)
            copied = limits.plain_copy(field.source / "peers" / "file", field.target)
        for name, samples in runs.items():
            row.runs[f"{name}, own disk"] = samples
        row.limits += [Limit(f"{each.name}, own disk", each.value, each.unit) for each in (fsync, copied)]
        row.compare(f"{OURS}, own disk", f"{RSYNC}, own disk", 0.35, 0.15, binding=False)
        row.notes.append(f"Own disk: {kind} at {place}, the replica only; the source stays in memory.")


def _judge(row: RowResult) -> None:
    row.compare(OURS, RSYNC, 0.35, 0.15)
    row.compare(OURS, SMALL_BLOCKS, 0.35, 0.15)
    row.compare(OURS, RDIFF, 0.15)
    row.compare(OURS, RDIFF_4K, 0.15)
    row.compare(OURS, INPLACE, 0.35, 0.15, binding=False)
    row.compare(OURS, COPY, None)
    row.notes += [
        "The clock of ours starts before the pages are written, that of the peers when they have been.",
        "rsync --inplace is beside only: interrupted, it leaves a torn file, which ours and plain rsync don't.",
    ]


def _contest(
    context: Context, field: Field, size: int, *, everyone: bool
) -> tuple[dict[str, list[Sample | None]], int]:
    chance = random.Random(1)
    new = field.source / "peers" / "file"
    new.parent.mkdir()
    data.random_file(new, size)
    contestants: dict[str, Callable[[int], Sample]] = {}
    changed = 0

    def ours(pair: Pair) -> Callable[[int], Sample]:
        def once(_: int) -> Sample:
            nonlocal changed
            # The peers' file changes alike; theirs is written while nobody's clock runs.
            pages = data.random_pages(size, SHARE, chance)
            changed = len(pages) * data.PAGE
            data.write_pages(new, pages)
            return pair.measure(lambda: data.write_pages(pair.source / "file", pages))

        return once

    def with_rsync(name: str, *options: str) -> None:
        target = field.target / name.replace(" ", "_") / "file"
        contestants[name] = lambda _: peers.rsync(
            str(new), str(target), ["-t", "--no-whole-file", *options], field.target
        )

    def with_rdiff(name: str, *options: str) -> None:
        target = field.target / name.replace(" ", "_") / "file"
        contestants[name] = lambda _: peers.rdiff(new, target, options)

    (field.source / "ours").mkdir()
    _copy(new, field.source / "ours" / "file")
    context.say("    bringing the trees in step")
    with our_pair(context, field) as pair:
        contestants[OURS] = ours(pair)
        with_rsync(RSYNC)
        if everyone:
            with_rsync(INPLACE, "--inplace")
            with_rsync(SMALL_BLOCKS, "--block-size=4096")
            with_rdiff(RDIFF)
            if not context.quick:
                with_rdiff(RDIFF_4K, "-b", "4096")
            contestants[COPY] = lambda _: peers.copy(new, field.target / COPY / "file")
        for name in contestants:
            if name != OURS:
                (field.target / name.replace(" ", "_")).mkdir()
                _copy(new, field.target / name.replace(" ", "_") / "file")
        runs = context.turns(contestants)
        check_same(pair)
        for name in contestants:
            if name != OURS and runs[name][-1] is not None:
                _check_file(new, field.target / name.replace(" ", "_") / "file", name)
    return runs, changed


def _copy(source: Path, target: Path) -> None:
    peers.copy(source, target)
    # With the same time, rsync sees that they are alike.
    run(["touch", "-r", str(source), str(target)])


def _check_file(a: Path, b: Path, name: str) -> None:
    if not filecmp.cmp(a, b, shallow=False):
        raise BenchError(f"{name} has not made {b} equal to {a}")
