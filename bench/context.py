"""What every row gets: how much to do, where, and how to tell."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from bench import disk
from bench.model import RowResult, Sample
from bench.nodes import Pair
from bench.processes import BenchError


@dataclass
class Context:
    """One run of the benchmarks. ``scale`` is a fraction of the full sizes; ``quick`` leaves out what takes long."""

    pairs: int
    scale: float
    quick: bool
    out: Path
    logs: Path
    #: Path of the mount namespace that the harness began in, for programs that must be seen from outside.
    outer_mounts: str = ""
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """A line of progress."""
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"{minutes:02d}:{seconds:02d}  {text}", flush=True)

    def size(self, full: int, unit: int = 4096) -> int:
        """A size at this run's scale, in whole units, at least one."""
        return max(1, round(full * self.scale / unit)) * unit

    def turns(
        self,
        contestants: Mapping[str, Callable[[int], Sample]],
        pairs: int | None = None,
    ) -> dict[str, list[Sample | None]]:
        """Let the contestants run in turns, A B A B; a contestant that fails keeps its place empty from then on."""
        runs: dict[str, list[Sample | None]] = {name: [] for name in contestants}
        failed: dict[str, str] = {}
        for number in range(self.pairs if pairs is None else pairs):
            for name, contestant in contestants.items():
                sample: Sample | None = None
                if name not in failed:
                    try:
                        sample = contestant(number)
                    except BenchError as error:
                        if name == OURS or name.startswith(OURS):
                            raise
                        failed[name] = str(error)
                        self.say(f"    {name} is out: {error}")
                runs[name].append(sample)
                if sample is not None:
                    self.say(f"    {number + 1}  {name:<34} {describe(sample)}")
        return runs


#: Our name among the contestants.
OURS = "farshore"


class Row(Protocol):
    """A family of rows that are measured together."""

    #: Numbers of the table's rows, and what they are, for ``--list``.
    rows: ClassVar[Mapping[int, str]]

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure the wanted rows; raises BenchError when nothing can be measured."""


def describe(sample: Sample) -> str:
    """A sample as progress shows it."""
    parts = [f"{sample.seconds:8.3f} s"]
    if sample.cpu is not None:
        parts.append(f"{sample.cpu:7.2f} s CPU")
    if sample.wire is not None:
        parts.append(f"{sample.wire / 1e6:10.3f} MB")
    parts += [f"{name} {value:.4g}" for name, value in sample.extra.items()]
    return "  ".join(parts)


@dataclass(frozen=True)
class Field:
    """Two file systems apart, so that making one durable doesn't make the other."""

    source: Path
    target: Path

    def trim(self) -> None:
        """Give freed memory back."""
        disk.trim(self.source)
        disk.trim(self.target)


@contextlib.contextmanager
def field_of_play(
    context: Context, source_size: int, target_size: int, target: Path | None = None, *, block: int = 4096
) -> Iterator[Field]:
    """A source on XFS in memory, with blocks of `block` bytes, and a target there, too, or in a fresh directory below
    `target`.
    """
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(disk.xfs("source", source_size, block))
        if target is None:
            place = stack.enter_context(disk.xfs("target", target_size, block))
        else:
            place = stack.enter_context(disk.directory(target))
        yield Field(source, place)


def our_pair(context: Context, field: Field, name: str = "ours", *, relay: bool = False, engine: str = "auto") -> Pair:
    """Two nodes whose trees are ``NAME`` on both sides of the field; their logs are kept in the output.

    `engine`: what the source watches with.
    """
    logs = context.logs / name
    shutil.rmtree(logs, ignore_errors=True)
    states = (field.source / f"{name}-state", field.target / f"{name}-state")
    return Pair(field.source / name, field.target / name, *states, logs, relay=relay, engine=engine)
