"""What a benchmark row gives: figures of every run, criteria with their verdicts, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bench import stats

Verdict = Literal["stretch", "must", "missed", "not measured"]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Sample:
    """One run of one contestant. Seconds of wall and CPU (user and system, all its processes); bytes on the wire."""

    seconds: float
    cpu: float | None = None
    wire: int | None = None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limit:
    """What the machine itself can do, measured in the same run."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Criterion:
    """One figure that has a must and perhaps a stretch. ``values`` are those of the pairs; their median counts.

    ``binding`` false: shown, without a part in the row's verdict.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    must: float | None
    stretch: float | None = None
    better: Better = "lower"
    binding: bool = True

    @property
    def value(self) -> float | None:
        """The median."""
        return stats.median(self.values) if self.values else None

    @property
    def verdict(self) -> Verdict:
        """How the median stands to must and stretch."""
        value = self.value
        if value is None or self.must is None:
            return "not measured"
        if self.stretch is not None and self._reached(value, self.stretch):
            return "stretch"
        return "must" if self._reached(value, self.must) else "missed"

    def _reached(self, value: float, wanted: float) -> bool:
        return value <= wanted if self.better == "lower" else value >= wanted


@dataclass
class RowResult:
    """One row of the table. ``runs``: contestant to its samples, one per pair, None where it has none."""

    number: int
    title: str
    work: str
    runs: dict[str, list[Sample | None]] = field(default_factory=dict)
    criteria: list[Criterion] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Curves and other material of the charts; numbers only.
    series: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the binding criteria."""
        binding = [c.verdict for c in self.criteria if c.binding]
        if self.error or not binding or "not measured" in binding:
            return "missed" if "missed" in binding else "not measured"
        if "missed" in binding:
            return "missed"
        return "must" if "must" in binding else "stretch"

    def seconds(self, contestant: str) -> list[float | None]:
        """Wall seconds of a contestant, pair by pair."""
        return [None if s is None else s.seconds for s in self.runs.get(contestant, [])]

    def wire(self, contestant: str) -> list[float | None]:
        """Bytes on the wire of a contestant, pair by pair."""
        return [None if s is None or s.wire is None else float(s.wire) for s in self.runs.get(contestant, [])]

    def compare(
        self,
        ours: str,
        theirs: str,
        must: float | None,
        stretch: float | None = None,
        *,
        of: Literal["seconds", "wire"] = "seconds",
        binding: bool = True,
    ) -> None:
        """Add the criterion "ours / theirs", pair by pair."""
        pick = self.seconds if of == "seconds" else self.wire
        what = "time" if of == "seconds" else "bytes"
        ratios = stats.pair_ratios(pick(ours), pick(theirs))
        self.criteria.append(
            Criterion(f"{what} / {theirs}", "×", tuple(ratios), must, stretch, binding=binding and must is not None)
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return {
            "row": self.number,
            "title": self.title,
            "work": self.work,
            "verdict": self.verdict,
            "criteria": [asdict(c) | {"median": c.value, "verdict": c.verdict} for c in self.criteria],
            "runs": {name: [None if s is None else asdict(s) for s in samples] for name, samples in self.runs.items()},
            "medians": {name: summary(samples) for name, samples in self.runs.items()},
            "limits": [asdict(limit) for limit in self.limits],
            "notes": self.notes,
            "series": self.series,
            "error": self.error,
        }


def summary(samples: Sequence[Sample | None]) -> dict[str, Any]:
    """Median, least and most of each figure that the samples have."""
    there = [s for s in samples if s is not None]
    result: dict[str, Any] = {"runs": len(there)}
    columns: dict[str, list[float]] = {
        "seconds": [s.seconds for s in there],
        "cpu": [s.cpu for s in there if s.cpu is not None],
        "wire": [float(s.wire) for s in there if s.wire is not None],
    }
    for name in dict.fromkeys(key for s in there for key in s.extra):
        columns[name] = [s.extra[name] for s in there if name in s.extra]
    for name, values in columns.items():
        if values:
            result[name] = {"median": stats.median(values), "min": min(values), "max": max(values)}
    return result
