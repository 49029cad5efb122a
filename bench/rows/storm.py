"""Row 11: more events at once than the kernel keeps: what is on the replica when all is over."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import peers
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Criterion, RowResult, Sample
from bench.processes import (
    BenchError,
    Daemon,
    TooSlow,
    descendants,
    die_with_parent,
    need,
    run,
    settle,
    sysctl,
    wait_until,
)

EVENTS = 1_000_000
DIRECTORIES = 1000
PROCESSES = 4
#: The kernel's queue may not be longer than this.
QUEUE = 16_384
_MOST_PAIRS = 2
_ENGINES = ("inotify", "fanotify")
_LIMIT = 300.0
_PEER_LIMIT = 120.0
#: Seconds for which the watcher stands still when the storm begins.
_STOPPED = 2.0
_TIME, _DIFFERENCES = "s until the same", "differences"


class EventStorm:
    """An unpacked archive, a build, a tool gone wild: the events that tell of it are lost, the files are not."""

    rows: ClassVar[Mapping[int, str]] = {11: "1M events at once, far over the kernel's queue: differences afterwards"}

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure; the clock starts when the last change is made."""
        need("lsyncd", "rsync")
        row = RowResult(11, "1M events at once", self.rows[11])
        events = context.size(EVENTS, 1000)
        with contextlib.ExitStack() as stack:
            for name in ("fs.inotify.max_queued_events", "fs.fanotify.max_queued_events"):
                stack.enter_context(sysctl(name, lambda now: min(now, QUEUE)))
            field = stack.enter_context(field_of_play(context, 1 << 30, 3 << 30))
            contestants: dict[str, Callable[[int], Sample]] = {}
            for engine in _ENGINES:
                contestants[f"{OURS}, {engine}"] = lambda _, engine=engine: _ours(  # type: ignore[misc]
                    context, field, events, engine
                )
            row.runs = context.turns(contestants, min(_MOST_PAIRS, context.pairs))
            others: dict[str, Callable[[int], Sample]] = {"lsyncd delay=1": lambda _: _lsyncd(context, field, events)}
            if not context.quick:
                others["syncthing"] = lambda _: _syncthing(context, field, events)
            row.runs |= context.turns(others, 1)
        judge(row, events)
        return [row]


def judge(row: RowResult, events: int) -> None:
    """Add the criteria and the notes."""
    for name, samples in row.runs.items():
        binding = name.startswith(OURS)
        for key, unit in ((_DIFFERENCES, ""), (_TIME, "s")):
            judged = binding and key == _DIFFERENCES
            values = tuple(s.extra[key] for s in samples if s is not None and key in s.extra)
            must = 0.0 if judged else None
            row.criteria.append(Criterion(f"{key}, {name}", unit, values, must, binding=judged))
    row.notes += [
        f"{PROCESSES} processes create, rename, rewrite and delete files in {DIRECTORIES} directories until there "
        f"were {events} events, as inotify counts them; fs.inotify.max_queued_events and its fanotify counterpart "
        f"are {QUEUE} at most. 'wall s' is the storm and what follows; '{_TIME}' begins when the storm is over.",
        f"The process that watches is stopped for the first {_STOPPED:g} s, as on a machine that is too busy, so "
        "that the queue overflows whatever the engine. Ours is done when the flush is answered that was asked for "
        "when the storm was over.",
        "Differences: what rsync -n finds in names, contents (--checksum), modes, owners, links and times; "
        "with the peers, in what they keep: lsyncd calls rsync -a, syncthing's are names and contents.",
        f"The peers are looked at every 2 s until there is no difference, at most for {_PEER_LIMIT:g} s.",
    ]


def storm(tree: Path, events: int, watcher: Daemon) -> None:
    """Have all processes change the tree, and wait for them; raises BenchError when one fails."""
    names = [path.name for path in sorted(tree.iterdir()) if path.name.startswith("s")]
    stopped = descendants(watcher.pid)
    children = []
    try:
        _signal(stopped, signal.SIGSTOP)
        for number in range(PROCESSES):
            share = names[number::PROCESSES]
            words = [sys.executable, "-m", "bench.storm", str(tree), str(number), str(events // PROCESSES), *share]
            children.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent))
        time.sleep(_STOPPED)
    finally:
        _signal(stopped, signal.SIGCONT)
        # Each is waited for, whatever became of the others.
        codes = [child.wait() for child in children]
    if any(codes):
        raise BenchError("the storm ended early")


def _signal(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def prepare(tree: Path) -> None:
    """The directories in which it happens."""
    for number in range(DIRECTORIES):
        (tree / f"s{number:04d}").mkdir(parents=True)


def differences(source: Path, target: Path, how: str, *options: str) -> int:
    """Paths at which two trees differ, as rsync sees it with the options `how` (``-aHX``)."""
    words = ["rsync", "-n", how, "--delete", "--itemize-changes", *options, f"{source}/", f"{target}/"]
    # What vanishes meanwhile is no fault of rsync's, and a difference.
    return len(run(words, timeout=600, allowed=(0, 23, 24)).output.splitlines())


def _ours(context: Context, field: Field, events: int, engine: str) -> Sample:
    prepare(field.source / "ours")
    try:
        with our_pair(context, field, engine=engine) as pair:
            settle(pair.cpu)
            cpu, began = pair.cpu(), time.monotonic()
            storm(pair.source, events, pair.daemons["source"])
            over = time.monotonic()
            pair.flush(_LIMIT)
            done = time.monotonic()
            found = differences(pair.source, pair.replica, "-aHX", "--checksum")
            watch = pair.status().watch
            overflows = 0 if watch is None else watch.overflows
            extra = {_TIME: done - over, _DIFFERENCES: float(found), "overflows": float(overflows)}
            return Sample(done - began, pair.cpu() - cpu, None, extra)
    finally:
        _clear(field)


def _lsyncd(context: Context, field: Field, events: int) -> Sample:
    source, target = field.source / "peer", field.target / "peer"
    prepare(source)
    work = context.logs / "lsyncd"
    daemon = peers.Lsyncd(source, target, work, 1)
    try:
        wait_until(lambda: not differences(source, target, "-a"), "lsyncd to be in step", timeout=60, interval=1.0)
        sample = _converge(daemon, source, target, events, "-a")
        text = (work / "lsyncd.log").read_text(encoding="utf-8", errors="replace")
        return Sample(sample.seconds, sample.cpu, None, sample.extra | {"overflows": float(text.count("OVERFLOW"))})
    finally:
        daemon.stop()
        _clear(field)


def _syncthing(context: Context, field: Field, events: int) -> Sample:
    source, target = field.source / "peer", field.target / "peer"
    prepare(source)
    daemon = peers.Syncthing(source, target, context.logs / "syncthing", 10.0)
    try:
        return _converge(daemon, source, target, events, "-rl", "--exclude=.stfolder", "--exclude=.stversions")
    finally:
        daemon.stop()
        _clear(field)


def _converge(
    daemon: peers.Lsyncd | peers.Syncthing, source: Path, target: Path, events: int, how: str, *options: str
) -> Sample:
    settle(daemon.cpu)
    cpu, began = daemon.cpu(), time.monotonic()
    storm(source, events, daemon.source)
    over = time.monotonic()
    quick = [*options, "--size-only"] if how == "-rl" else options
    left: list[int] = []

    def same() -> bool:
        daemon.source.check()
        left.append(differences(source, target, how, *quick))
        return not left[-1]

    extra: dict[str, float] = {}
    with contextlib.suppress(TooSlow):
        wait_until(same, "the same tree", timeout=_PEER_LIMIT, interval=2.0)
        extra[_TIME] = time.monotonic() - over
    seconds = time.monotonic() - began
    extra[_DIFFERENCES] = float(differences(source, target, how, "--checksum", *options))
    return Sample(seconds, daemon.cpu() - cpu, None, extra)


def _clear(field: Field) -> None:
    for place in (field.source, field.target):
        for path in place.iterdir():
            shutil.rmtree(path, ignore_errors=True)
    field.trim()
