"""Row 8: files that nobody closes: a log that is appended to, and a file that is written through a mapping."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import data, held, limits, peers, stats
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Criterion, RowResult, Sample
from bench.nodes import Pair, check_same
from bench.processes import BenchError, Daemon, need, wait_until

#: Seconds of changes; the peers, which are waited for much longer, get half.
SECONDS = 20.0
APPENDS = 40
MAPPED = 8
#: Seconds that a change may take to appear; one that has not by then counts as this.
PATIENCE = 60.0
_PAUSE = 0.002
_FILES = {"append": "log/held.log", "mapped": "map/held.dat"}
_WORDS = {"append": "appended", "mapped": "mapped"}

Start = Callable[[Path, Path], peers.Lsyncd | peers.Syncthing]


class HeldOpen:
    """What a watcher that waits for files to be closed never sees."""

    rows: ClassVar[Mapping[int, str]] = {
        8: "a file held open, appended to / written through a mapping: until it is on the replica"
    }

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure; both files of a tree are open before anybody watches it, and change at random moments."""
        need("lsyncd", "rsync")
        row = RowResult(8, "files held open", self.rows[8])
        load = Load.of(context)
        latencies: dict[str, list[float]] = {}

        def keep(name: str, sample: Sample, found: Mapping[str, list[float]]) -> Sample:
            for kind, values in found.items():
                latencies.setdefault(f"{name}, {_WORDS[kind]}", []).extend(values)
            return sample

        with field_of_play(context, 1 << 30, 2 << 30) as field:
            with Held(field.source / "ours", context.logs) as files, our_pair(context, field) as pair:
                row.runs = context.turns({OURS: lambda _: keep(OURS, *files.measure(load, pair.replica, pair))})
                # What was never seen is in the figures; what is lost even when the files were closed is no result.
                files.close()
                check_same(pair)

            def theirs(name: str, start: Start) -> Sample:
                return keep(name, *_peer(context, field, Load.of(context, 0.5), start))

            contestants: dict[str, Callable[[int], Sample]] = {}
            for name, start in _peers(context).items():
                contestants[name] = lambda _, name=name, start=start: theirs(name, start)  # type: ignore[misc]
            row.runs |= context.turns(contestants, 1)
            row.limits.append(limits.fsync(field.target))
        _judge(row)
        row.series["latency ms"] = {name: stats.curve_ms(values) for name, values in latencies.items() if values}
        row.notes += [
            f"{load.appends} lines of {held.LINE} bytes, and {load.mapped} single pages of {held.MAPPED >> 20} MiB "
            f"that are mapped with MAP_SHARED, at random moments of {load.seconds:g} s; neither file is closed, no "
            "mapping ends, and nobody calls msync. The peers get half as many in half the time.",
            "A change counts when it is in the replica's file, where ours puts it once it is durable ('durable p50 s': "
            "when the source was told so). What the peers show there is in memory yet.",
            "lsyncd waits for files to be closed, as it comes; '+ Modify' is its inotifyMode 'CloseWrite or Modify'. "
            "syncthing gathers changes for its 10 s. A write through a mapping makes no event, so neither of them sees "
            "it before something else makes them look, syncthing once an hour.",
        ]
        return [row]


class Load:
    """How many changes of each kind, in how many seconds."""

    def __init__(self, seconds: float, appends: int, mapped: int) -> None:
        self.seconds = seconds
        self.appends = appends
        self.mapped = mapped

    @classmethod
    def of(cls, context: Context, part: float = 1.0) -> Load:
        """At this run's scale, and that part of it."""
        share = max(0.2, part * min(1.0, context.scale))
        return cls(SECONDS * share, round(APPENDS * share), max(2, round(MAPPED * share)))

    def moments(self, chance: random.Random) -> list[tuple[float, str]]:
        """When which kind of change is made, in order."""
        kinds = ["append"] * self.appends + ["mapped"] * self.mapped
        return sorted((chance.uniform(0.0, self.seconds), kind) for kind in kinds)


class Held:
    """Two files of a tree that are held open by processes of their own. Use as a context manager."""

    def __init__(self, tree: Path, logs: Path) -> None:
        self._tree = tree
        self._logs = logs
        self._chance = random.Random(8)
        self._writers: dict[str, Daemon] = {}
        self._sizes: dict[str, int] = {}
        self._count = dict.fromkeys(_FILES, 0)

    def __enter__(self) -> Held:
        try:
            for kind, name in _FILES.items():
                path = self._tree / name
                path.parent.mkdir(parents=True)
                data.random_file(path, held.MAPPED if kind == "mapped" else 1 << 20)
                self._sizes[kind] = path.stat().st_size
                words = [sys.executable, "-m", "bench.held", kind, str(path)]
                self._writers[kind] = writer = Daemon(words, self._logs / "held.log", control=True)
                if (said := writer.read()) != "ready":
                    raise BenchError(f"the writer of {path}: {said}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, and with them what they hold."""
        for writer in self._writers.values():
            writer.stop(5)
        self._writers.clear()

    def in_step(self, target: Path) -> bool:
        """Whether a copy of both files is there, by their sizes."""
        try:
            return all((target / name).stat().st_size == self._sizes[kind] for kind, name in _FILES.items())
        except FileNotFoundError:
            return False

    def measure(self, load: Load, target: Path, pair: Pair | None = None) -> tuple[Sample, dict[str, list[float]]]:
        """Change both files while `target` is looked at: figures, and the seconds until each change was there.

        `pair`: whose source is asked when it was told that a line is durable.
        """
        moments = load.moments(self._chance)
        pending: dict[tuple[str, int], float] = {}
        found: dict[str, list[float]] = {kind: [] for kind in _FILES}
        durable = Durable(pair)
        began = time.monotonic()
        while moments or pending:
            now = time.monotonic()
            if moments and began + moments[0][0] <= now:
                _, kind = moments.pop(0)
                if kind == "append":
                    durable.expect(alone=not any(other == kind for other, _ in pending))
                number = self._count[kind]
                self._count[kind] += 1
                when = float(self._writers[kind].ask(str(number)))
                pending[kind, number] = when
                if kind == "append":
                    durable.begin(when)
            durable.look()
            for (kind, number), when in list(pending.items()):
                offset = held.offset_of(kind, number, self._sizes[kind])
                if held.arrived(target / _FILES[kind], offset, number):
                    found[kind].append(time.monotonic() - when)
                    del pending[kind, number]
            if now > began + load.seconds + PATIENCE:
                break
            time.sleep(_PAUSE)
        unseen = {kind: sum(1 for other, _ in pending if other == kind) for kind in _FILES}
        extra: dict[str, float] = {}
        for kind, values in found.items():
            extra |= figures(kind, values, unseen[kind])
        if durable.seconds:
            extra["durable p50 s"] = stats.median(durable.seconds)
        return Sample(time.monotonic() - began, None, None, extra), found


def figures(kind: str, values: Sequence[float], unseen: int) -> dict[str, float]:
    """Median and worst of the seconds until changes were seen; what was not is as late as was waited for."""
    late = [*values, *[PATIENCE] * unseen]
    word = _WORDS[kind]
    found = {f"{word} p50 s": stats.median(late), f"{word} worst s": max(late)}
    return found | {f"{word} unseen": float(unseen)}


class Durable:
    """When the source was told that a line is durable: the number of the last durable transaction has grown.

    That can be told only of a line that is alone on its way.
    """

    def __init__(self, pair: Pair | None) -> None:
        self._pair = pair
        self._before: int | None = None
        self._when: float | None = None
        self.seconds: list[float] = []

    def expect(self, *, alone: bool) -> None:
        """A line is about to be written."""
        self._when = None
        self._before = self._pair.status().seq if self._pair is not None and alone else None

    def begin(self, when: float) -> None:
        """It was written."""
        self._when = when if self._before is not None else None

    def look(self) -> None:
        """Ask the source, if a line is on its way."""
        if self._when is None or self._before is None or self._pair is None:
            return
        if self._pair.status().seq > self._before:
            self.seconds.append(time.monotonic() - self._when)
            self._when = None


def _peers(context: Context) -> dict[str, Start]:
    both = "CloseWrite or Modify"
    logs = context.logs
    found: dict[str, Start] = {
        "lsyncd, default": lambda source, target: peers.Lsyncd(source, target, logs / "lsyncd", None),
        "lsyncd delay=1 + Modify": lambda source, target: peers.Lsyncd(source, target, logs / "lsyncd", 1, on=both),
    }
    if not context.quick:
        found["lsyncd delay=0 + Modify"] = lambda source, target: peers.Lsyncd(
            source, target, logs / "lsyncd", 0, on=both
        )
        found["syncthing, default"] = lambda source, target: peers.Syncthing(source, target, logs / "syncthing", 10.0)
    return found


def _peer(context: Context, field: Field, load: Load, start: Start) -> tuple[Sample, dict[str, list[float]]]:
    source, target = field.source / "peer", field.target / "peer"
    try:
        with Held(source, context.logs) as files:
            daemon = start(source, target)
            try:
                wait_until(lambda: files.in_step(target), "the peer to be in step", timeout=120, interval=0.2)
                return files.measure(load, target)
            finally:
                daemon.stop()
    finally:
        for tree in (source, target):
            shutil.rmtree(tree, ignore_errors=True)


def _judge(row: RowResult) -> None:
    for name, samples in row.runs.items():
        ours = name == OURS
        for word, must, stretch in (("appended", 1.0, 0.1), ("mapped", 30.0, 5.0)):
            for which in ("p50", "worst"):
                key = f"{word} {which} s"
                values = tuple(s.extra[key] for s in samples if s is not None and key in s.extra)
                label = f"{word}, {which}" + ("" if ours else f", {name}")
                bounds = (must, stretch) if ours else (None, None)
                row.criteria.append(Criterion(label, "s", values, bounds[0], bounds[1], binding=ours))
            unseen = sum(s.extra.get(f"{word} unseen", 0.0) for s in samples if s is not None)
            if unseen:
                row.notes.append(
                    f"{name}, {word}: {unseen:g} changes not within {PATIENCE:g} s of the last; each counts as so late."
                )
