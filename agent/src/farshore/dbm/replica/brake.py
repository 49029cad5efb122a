"""The mass-change brake: decide whether a transaction may be applied to the replica, or is held for a human to judge.

An administrator's mistake, a broken program or ransomware changes a large part of a group within a short time. Such
changes are durable here before they are judged, so holding them back loses nothing; applying them might.

``Brake`` is a pure decision: it is told what each transaction would do (``change.describe`` finds that out), in the
order in which they are applied, and remembers as much of the past as its windows need, within a fixed bound. Three
things trip it, each above a share of the group's files:

- files of before were rewritten or removed, within the configured window or within an hour;
- the group became smaller, within the same windows;
- contents turned into such that look encrypted, within a day, which a slow attack does not escape.

A root that a transaction would leave empty trips it too.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from farshore.config import BrakeConfig

#: Seconds of the windows beside the configured one: for losses, and for contents that turn random.
HOUR = 3600.0
DAY = 86400.0
#: Marks that one window remembers; beyond them it counts a sample, with a standard error of about 1 %.
MOST_MARKS = 1 << 15
#: An original that is removed and a random content that is added to its directory belong together for so many seconds.
PAIR_SECONDS = 600.0
#: Fewer contents that turned random are a person's doing.
LEAST_TURNED = 10
#: A root that is emptied was worth something when the group loses so many files or bytes within the hour.
EMPTIED_FILES = 10
EMPTIED_BYTES = 1 << 20
_MOST_DIRECTORIES = 4096
_STEPS = 60


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction would do to a group's files; directories are none.

    Files are named by marks (``change.mark``), numbers that stand for a root and a path. ``rewritten``: most of a
    content was replaced; ``edited`` counts those of which most stays. ``renamed`` has pairs of marks, old and new.
    ``grown_files`` and ``grown_bytes``: what the group holds afterwards, less what it held before. ``turned``: files
    whose content looked ordinary and looks random now. ``plain_removed`` and ``random_added`` are pairs (directory's
    mark, file's mark): ordinary contents that were removed, random ones that were added. ``emptied``: roots that held
    something and hold nothing afterwards.
    """

    added: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()
    edited: int = 0
    removed: tuple[int, ...] = ()
    #: Removed beyond the marks that a change may name.
    removed_unnamed: int = 0
    renamed: tuple[tuple[int, int], ...] = ()
    grown_files: int = 0
    grown_bytes: int = 0
    added_bytes: int = 0
    rewritten_bytes: int = 0
    removed_bytes: int = 0
    turned: tuple[int, ...] = ()
    plain_removed: tuple[tuple[int, int], ...] = ()
    random_added: tuple[tuple[int, int], ...] = ()
    emptied: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pass:
    """Apply it."""


@dataclass(frozen=True, slots=True)
class Warn:
    """Apply it, and tell the administrator why it is unusual."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Do not apply it, nor anything that follows, until the administrator has decided."""

    reason: str


Verdict = Pass | Warn | Hold


class Brake:
    """Judges the transactions of one group. One thread at a time; ``held`` may be read from any.

    ``clock`` tells monotonic seconds. ``armed``: the tree was filled before, so what is rewritten or removed counts;
    otherwise only an emptied root does, until ``in_step``. ``held``: the reason of a hold that a restart interrupted.
    """

    def __init__(self, config: BrakeConfig, clock: Callable[[], float], *, armed: bool = True, held: str = "") -> None:
        self._config = config
        self._clock = clock
        self._armed = armed
        #: Why everything is held; "" while nothing is.
        self.held = held
        #: What was warned of last, as long as it is so; "" otherwise.
        self.warning = ""
        self.files = 0
        self.bytes = 0
        spans = (config.window, max(HOUR, config.window))
        self._windows = [_Window(span) for span in dict.fromkeys(spans)]
        self._turned = _Distinct(max(DAY, config.window))
        self._pairs = _Pairs()
        #: When a path was added, for the longest window of losses.
        self._young: OrderedDict[int, float] = OrderedDict()

    def note_total(self, files: int, size: int) -> None:
        """The tree holds so many files and bytes: told once, after they were counted; ``judge`` keeps it up to date."""
        self.files, self.bytes = files, size
        self._reset(self._clock())

    def in_step(self) -> None:
        """The tree was filled: from here on, what is rewritten or removed counts."""
        if not self._armed:
            self._armed = True
            self._young.clear()
            self._reset(self._clock())

    def judge(self, change: Change) -> Verdict:
        """Whether ``change`` may be applied; what is judged Pass or Warn counts as applied."""
        if self.held:
            # However it is configured now: the administrator decides.
            return Hold(self.held)
        if self._config.mode == "off":
            self._grow(change)
            return Pass()
        now = self._clock()
        before = self.files, self.bytes
        for window in self._windows:
            window.totals.note(now, *before)
        self._count(change, now)
        files_before = self.files
        self._grow(change)
        reason = self._emptied(change, now) or (self._over(now, files_before) if self._armed else "")
        if not reason:
            self.warning = ""
            return Pass()
        if self._config.mode == "hold":
            self.files, self.bytes = before
            self.held = reason
            return Hold(reason)
        known, self.warning = self.warning, reason
        return Pass() if known else Warn(reason)

    def note(self, change: Change) -> None:
        """``change`` is applied without being judged: it was approved, or is replayed after a crash."""
        self._grow(change)
        now = self._clock()
        for window in self._windows:
            # The group is as large as it is by somebody's decision: nothing is missing.
            window.totals.clear()
            window.totals.note(now, self.files, self.bytes)

    def approve(self) -> None:
        """What was held is applied (tell it by ``note``); what comes after it is judged afresh."""
        self.held = ""
        self.warning = ""
        self._reset(self._clock())

    # --- how

    def _reset(self, now: float) -> None:
        for window in self._windows:
            window.clear()
            window.totals.note(now, self.files, self.bytes)
        self._turned.clear()
        self._pairs.clear()

    def _grow(self, change: Change) -> None:
        self.files = max(0, self.files + change.grown_files)
        self.bytes = max(0, self.bytes + change.grown_bytes)

    def _count(self, change: Change, now: float) -> None:
        if not self._armed:
            return
        young = self._young
        for window in self._windows:
            lost = window.lost
            since = now - lost.span
            for marks in (change.removed, change.rewritten):
                # A file that came within the window was not there when it began.
                lost.add((m for m in marks if young.get(m, -math.inf) <= since), now)
            if change.removed_unnamed:
                lost.add_unnamed(change.removed_unnamed, now)
        for mark in change.removed:
            young.pop(mark, None)
        for old, new in change.renamed:
            if (added := young.pop(old, None)) is not None:
                young[new] = added
        for mark in change.added:
            young[mark] = now
            young.move_to_end(mark)
        self._forget_young(now)
        self._turned.add(change.turned, now)
        self._turned.add(self._pairs.found(change.plain_removed, change.random_added, now), now)

    def _forget_young(self, now: float) -> None:
        young = self._young
        since = now - self._windows[-1].lost.span
        while young and (len(young) > MOST_MARKS or next(iter(young.values())) <= since):
            young.popitem(last=False)

    def _emptied(self, change: Change, now: float) -> str:
        if not change.emptied:
            return ""
        files, size = self._windows[-1].totals.peak(now)
        if files - self.files < EMPTIED_FILES and size - self.bytes < EMPTIED_BYTES:
            return ""
        return f"a protected path would be empty: {files - self.files:,} of {files:,} files of the group are gone"

    def _over(self, now: float, files: int) -> str:
        """Why this is too much; "" when it is not."""
        config = self._config
        for window in self._windows:
            within = _span(window.lost.span)
            base = window.totals.base(now)
            lost = min(base, window.lost.count(now))
            if base >= config.least_files and lost * 100 > base * config.most_share:
                what = f"were rewritten or removed within {within}"
                return _sentence(lost, base, what, config.most_share)
            peak = window.totals.peak(now)[0]
            gone = peak - self.files
            if peak >= config.least_files and gone * 100 > peak * config.most_share:
                return _sentence(gone, peak, f"were removed within {within}", config.most_share)
        turned = self._turned.count(now)
        # Encrypting into new files makes the group larger for a while: then what it was before counts.
        before = self._windows[-1].totals.base(now)
        files = before if 2 * before > files else files
        if files >= config.least_files and turned >= LEAST_TURNED and turned * 100 > files * config.entropy_share:
            what = f"turned into contents that look encrypted within {_span(self._turned.span)}"
            return _sentence(min(turned, files), files, what, config.entropy_share)
        return ""


class _Window:
    """What the group lost within a span of time, and how large it was."""

    def __init__(self, span: float) -> None:
        self.lost = _Distinct(span)
        self.totals = _Totals(span)

    def clear(self) -> None:
        self.lost.clear()
        self.totals.clear()


class _Distinct:
    """How many different marks came within the last ``span`` seconds: exact up to MOST_MARKS, an estimate beyond.

    The estimate is adaptive sampling (Flajolet, "On adaptive sampling", 1990): only marks that are divisible by a
    power of two are kept, each standing for as many; marks are hashes, so their low bits are even.
    """

    def __init__(self, span: float) -> None:
        self.span = span
        self._marks: OrderedDict[int, float] = OrderedDict()
        self._mask = 0
        self._unnamed: deque[tuple[float, int]] = deque()

    def __len__(self) -> int:
        return len(self._marks) + len(self._unnamed)

    def clear(self) -> None:
        self._marks.clear()
        self._unnamed.clear()
        self._mask = 0

    def add(self, marks: Iterable[int], now: float) -> None:
        """These were seen; for one that was seen before, this time counts."""
        kept = self._marks
        for mark in marks:
            if not mark & self._mask:
                kept[mark] = now
                kept.move_to_end(mark)
        self._forget(now)
        while len(kept) > MOST_MARKS:
            self._mask = self._mask << 1 | 1
            for mark in [each for each in kept if each & self._mask]:
                del kept[mark]

    def add_unnamed(self, count: int, now: float) -> None:
        """So many more, of which no two are the same."""
        self._forget(now)
        step = self.span / _STEPS
        if self._unnamed and now - self._unnamed[-1][0] < step:
            since, before = self._unnamed.pop()
            self._unnamed.append((since, before + count))
        else:
            self._unnamed.append((now, count))

    def count(self, now: float) -> int:
        """How many there are."""
        self._forget(now)
        return len(self._marks) * (self._mask + 1) + sum(count for _, count in self._unnamed)

    def _forget(self, now: float) -> None:
        since = now - self.span
        kept = self._marks
        while kept and next(iter(kept.values())) <= since:
            kept.popitem(last=False)
        if not kept:
            self._mask = 0
        while self._unnamed and self._unnamed[0][0] <= since:
            self._unnamed.popleft()


class _Totals:
    """How many files and bytes the group held over the last ``span`` seconds, in steps of a sixtieth of it."""

    def __init__(self, span: float) -> None:
        self._span = span
        #: Begin of a step, files at its begin, and the most files and bytes in it.
        self._steps: deque[tuple[float, int, int, int]] = deque()

    def clear(self) -> None:
        self._steps.clear()

    def note(self, now: float, files: int, size: int) -> None:
        """The group holds so much now."""
        steps = self._steps
        if steps and now - steps[-1][0] < self._span / _STEPS:
            begin, first, most, largest = steps.pop()
            steps.append((begin, first, max(most, files), max(largest, size)))
        else:
            steps.append((now, files, files, size))
        self._forget(now)

    def base(self, now: float) -> int:
        """How many files there were when the span began, or when counting did."""
        self._forget(now)
        return self._steps[0][1] if self._steps else 0

    def peak(self, now: float) -> tuple[int, int]:
        """The most files, and the most bytes, within the span."""
        self._forget(now)
        return max((s[2] for s in self._steps), default=0), max((s[3] for s in self._steps), default=0)

    def _forget(self, now: float) -> None:
        # The last step that began before the span did tells how it was at its begin.
        while len(self._steps) > 1 and self._steps[1][0] <= now - self._span:
            self._steps.popleft()


class _Pairs:
    """Originals that were removed where random contents were added: what a program does that encrypts into new files.

    In the memory of each directory is only which of the two came more often of late; the marks are those of the file
    that completed a pair.
    """

    def __init__(self) -> None:
        #: By directory: the time of the last, and how many random contents wait for an original (below 0: the reverse).
        self._waiting: OrderedDict[int, tuple[float, int]] = OrderedDict()

    def clear(self) -> None:
        self._waiting.clear()

    def found(
        self, plain_removed: Iterable[tuple[int, int]], random_added: Iterable[tuple[int, int]], now: float
    ) -> list[int]:
        """The marks of the pairs that are complete now."""
        marks = [mark for directory, mark in random_added if self._meets(directory, 1, now)]
        marks += [mark for directory, mark in plain_removed if self._meets(directory, -1, now)]
        while len(self._waiting) > _MOST_DIRECTORIES:
            self._waiting.popitem(last=False)
        return marks

    def _meets(self, directory: int, kind: int, now: float) -> bool:
        last, waiting = self._waiting.pop(directory, (now, 0))
        if now - last > PAIR_SECONDS:
            waiting = 0
        self._waiting[directory] = now, waiting + kind
        return waiting * kind < 0


def _sentence(part: int, whole: int, what: str, allowed: float) -> str:
    share = 100 * part / whole
    shown = f"{share:.0f}" if share >= allowed + 1 else f"{share:.2f}"
    return f"{part:,} of {whole:,} files ({shown}%) {what}; allowed are {allowed:g}%"


def _span(seconds: float) -> str:
    for size, unit in ((DAY, "d"), (HOUR, "h")):
        if seconds >= size and seconds % size == 0:
            count = seconds / size
            return f"{count:g} {unit}" if (unit, count) != ("d", 1) else "24 h"
    return f"{seconds:g} s"
