"""Rows 9 and 10: a million files that rest: what it costs to watch them, and to look at all of them after a restart."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import data, peers
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Criterion, Limit, RowResult, Sample
from bench.nodes import Pair
from bench.processes import BenchError, Daemon, descendants, memory_of, need, run, settle, syncfs, sysctl, wait_until

FILES = 1_000_000
SIZE = 100
IDLE = 60.0
#: Restarts of each engine: each takes as long as it takes, and there are many of other rows.
_MOST_PAIRS = 3
_ENGINES = ("inotify", "fanotify")
RSYNC = "rsync -an"
_LSYNCD_LIMIT = 240.0
_SYNCTHING_LIMIT = 240.0
_CPU, _MEMORY = "% of a core", "MB (PSS)"


class Million:
    """A mail store, a home directory, a media library: nearly all of it rests nearly always."""

    rows: ClassVar[Mapping[int, str]] = {
        9: "idle with 1M files in 100k directories: CPU and memory on the source",
        10: "restart with 1M files, nothing changed: until it is in step and all was looked at",
    }

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure both with one tree; the idle minute of each engine follows its last restart."""
        need("lsyncd", "rsync", "find")
        idle = RowResult(9, "1M files at rest", self.rows[9])
        restart = RowResult(10, "restart with 1M files", self.rows[10])
        files = max(data.PARTS * data.LEAVES, round(FILES * context.scale))
        directories = files // data.LEAVES
        # A file takes a block and an inode on each side, and the peers have a tenth of them once more.
        room = files * 3000 + (1 << 30)
        with (
            sysctl("fs.inotify.max_user_watches", lambda now: max(now, directories * 3 // 2)),
            field_of_play(context, room, room + files * 2000, block=1024) as field,
        ):
            context.say(f"    making {files} files in {directories} directories")
            data.forest(field.source / "ours", files, SIZE)
            syncfs(field.source)
            began = time.monotonic()
            context.say("    bringing the trees in step")
            with our_pair(context, field, engine=_ENGINES[0]) as pair:
                restart.limits.append(Limit("first sync of the empty replica", time.monotonic() - began, "s"))
                self._ours(context, pair, field, idle, restart, wanted)
                _check(pair, files)
            if 9 in wanted:
                self._peers(context, field, idle, files)
        self._judge(idle, restart)
        for row in (idle, restart):
            if files != FILES:
                row.notes.append(f"This run: {files} files in {directories} directories.")
        return [row for row in (idle, restart) if row.number in wanted]

    def _ours(
        self, context: Context, pair: Pair, field: Field, idle: RowResult, restart: RowResult, wanted: Sequence[int]
    ) -> None:
        pairs = min(_MOST_PAIRS, context.pairs) if 10 in wanted else 1

        def ours(engine: str, number: int) -> Sample:
            sample = pair.restart(engine)
            if 9 in wanted and number == pairs - 1:
                name = f"{OURS}, {engine}"
                idle.runs[name] = [_idle(context, pair.daemons["source"])]
            return sample

        contestants: dict[str, Callable[[int], Sample]] = {}
        for engine in _ENGINES:
            contestants[f"{OURS}, {engine}"] = lambda number, engine=engine: ours(engine, number)  # type: ignore[misc]
        if 10 in wanted:
            contestants[RSYNC] = lambda _: _dry_run(pair)
        restart.runs = context.turns(contestants, pairs)
        if 10 in wanted:
            restart.limits += [_walk(pair.source, 1), _walk(pair.source, 2)]

    def _peers(self, context: Context, field: Field, row: RowResult, files: int) -> None:
        source, target = field.source / "ours", field.target / "ours"

        def lsyncd() -> Sample:
            daemon = peers.Lsyncd(source, target, context.logs / "lsyncd", None, patience=_LSYNCD_LIMIT)
            try:
                return _idle(context, daemon.source)
            finally:
                daemon.stop()

        def syncthing() -> Sample:
            # It hashes every file, on both sides, before it is ready: a tenth is what the time allows for.
            part, there = source / "p0", field.target / "syncthing"
            count = files // data.PARTS
            daemon = peers.Syncthing(part, there, context.logs / "syncthing", 10.0, patience=_SYNCTHING_LIMIT)
            try:
                complete = lambda: data.count_tree(there) >= count  # noqa: E731
                wait_until(complete, f"syncthing's first sync of {count} files", timeout=_SYNCTHING_LIMIT, interval=1.0)
                return _idle(context, daemon.source)
            finally:
                daemon.stop()
                shutil.rmtree(there, ignore_errors=True)

        contestants: dict[str, Callable[[int], Sample]] = {"lsyncd": lambda _: lsyncd()}
        if not context.quick:
            contestants[f"syncthing, {files // data.PARTS} files"] = lambda _: syncthing()
        row.runs |= context.turns(contestants, 1)

    def _judge(self, idle: RowResult, restart: RowResult) -> None:
        for name, samples in idle.runs.items():
            binding = name.startswith(OURS)
            for key, what, unit, must, stretch in (
                (_CPU, "CPU", "% of a core", 0.2, 0.05),
                (_MEMORY, "memory", "MB", 600.0, 300.0),
            ):
                values = tuple(s.extra[key] for s in samples if s is not None)
                bounds = (must, stretch) if binding else (None, None)
                idle.criteria.append(Criterion(f"{what}, {name}", unit, values, bounds[0], bounds[1], binding=binding))
        idle.notes += [
            f"{IDLE:g} s in which nothing changes, once everything rests after a start. CPU and memory are those of "
            "the processes on the source: our node; lsyncd; the syncthing that sends. PSS divides what is shared.",
            "The kernel's own memory for watches comes on top: 'kernel MB' is by how much its memory that cannot be "
            "reclaimed shrank when the process ended. What watches pin in the caches of names and inodes is not in it.",
        ]
        for engine in _ENGINES:
            name = f"{OURS}, {engine}"
            ratios = [
                a.seconds / b.seconds
                for a, b in zip(restart.runs.get(name, []), restart.runs.get(RSYNC, []), strict=False)
                if a is not None and b is not None
            ]
            restart.criteria.append(Criterion(f"time / {RSYNC}, {engine}", "×", tuple(ratios), 1.0, 0.3))
        restart.notes += [
            "The page cache is warm, and names and inodes are cached, for all alike. Ours is timed from the start of "
            "the source's process; CPU is that of both nodes.",
            "rsync -an --delete compares the same two trees, by size and time, on the same two cores.",
        ]


def _check(pair: Pair, files: int) -> None:
    """Nothing changed, so nothing may have been changed."""
    for tree in (pair.source, pair.replica):
        if (there := data.count_tree(tree)) != files:
            raise BenchError(f"{tree} has {there} files instead of {files}")


def _dry_run(pair: Pair) -> Sample:
    done = run(["rsync", "-an", "--delete", "--itemize-changes", f"{pair.source}/", f"{pair.replica}/"], timeout=900)
    if done.output.strip():
        raise BenchError(f"the replica differs from the source: {done.output.splitlines()[0]}")
    return Sample(done.seconds, done.cpu)


def _walk(tree: Path, workers: int) -> Limit:
    """Every name looked at with lstat, and nothing done about it."""
    words = f"printf '%s\\0' {tree}/p* | xargs -0 -n 1 -P {workers} sh -c 'exec find \"$0\" -printf \"%s %T@ %i\\n\"'"
    done = run(["sh", "-c", f"{words} >/dev/null"], timeout=600)
    return Limit(f"find with lstat, {workers} at a time", done.seconds, "s")


def _unreclaimable() -> float:
    """MB of the kernel's objects that it cannot give back."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("SUnreclaim:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _idle(context: Context, daemon: Daemon) -> Sample:
    """A minute in which nothing happens; then the process is ended, to see what the kernel gets back."""
    settle(daemon.cpu, most=60.0, interval=1.0, share=0.02)
    seconds = max(5.0, IDLE * min(1.0, context.scale) * (0.5 if context.quick else 1.0))
    cpu, began = daemon.cpu(), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    daemon.check()
    spent = daemon.cpu() - cpu
    used = memory_of(descendants(daemon.pid))
    extra = {_CPU: 100.0 * spent / took, _MEMORY: used["pss"], "MB (RSS)": used["rss"], "most MB (RSS)": used["peak"]}
    before = _unreclaimable()
    daemon.stop(60)
    # Watches are taken apart after their process is gone.
    time.sleep(2.0)
    extra["kernel MB"] = max(0.0, before - _unreclaimable())
    return Sample(took, spent, None, extra)
