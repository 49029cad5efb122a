"""Row 5: inputs made to be slow, against our own speed on random data."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import inputs, peers, stats
from bench.context import Context
from bench.model import Criterion, Limit, RowResult, Sample
from bench.processes import TooSlow, need, run
from bench.rows.kernels import on_one_core

SIZE = 64 << 20
#: Seconds that a peer may take for one input.
_PATIENCE = 60.0


class Hostile:
    """An engine that can be made slow by what is in a file can be stopped by whoever writes the file."""

    rows: ClassVar[Mapping[int, str]] = {
        5: "hostile input: zeros, short periods, equal weak sums, Thue-Morse, against random data"
    }

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure ours in a process on one core, and the peers once per input."""
        need("rsync", "rdiff")
        row = RowResult(5, "hostile input", self.rows[5])
        size = context.size(SIZE, 1 << 20)
        context.say(f"    ours, {len(inputs.HOSTILE) - 1} inputs of {size >> 20} MiB")
        speeds: dict[str, list[float]] = {}
        for record in on_one_core("hostile", size, context.pairs, 3600):
            name = record["name"]
            row.runs.setdefault(name, []).append(Sample(record["seconds"], record["cpu"]))
            row.runs.setdefault("random", []).append(Sample(record["random seconds"]))
            speeds.setdefault(name, []).append(record["random seconds"] / record["seconds"])
        for name, values in speeds.items():
            row.criteria.append(Criterion(f"{name}: speed / random", "×", tuple(values), 0.3, 0.6, "higher"))
        row.limits.append(Limit("our speed on random data", size / _median(row.runs["random"]) / 1e9, "GB/s"))
        self._peers(context, row, min(size, (16 if context.quick else 64) << 20))
        return [row]

    def _peers(self, context: Context, row: RowResult, size: int) -> None:
        rates: dict[str, dict[str, float]] = {"rsync": {}, "rdiff": {}}
        with tempfile.TemporaryDirectory(prefix="farshore-bench-", dir="/dev/shm") as directory:
            place = Path(directory)
            for name, make in inputs.HOSTILE.items():
                old, new = make(size)
                (place / "old").write_bytes(old)
                (place / "new").write_bytes(new)
                seconds = dict.fromkeys(rates, float("inf"))
                with contextlib.suppress(TooSlow):
                    options = ["--no-whole-file", "--ignore-times"]
                    sample = peers.rsync(f"{place}/new", f"{place}/old", options, place, timeout=_PATIENCE)
                    seconds["rsync"] = sample.seconds
                (place / "old").write_bytes(old)
                with contextlib.suppress(TooSlow):
                    run(["rdiff", "signature", f"{place}/old", f"{place}/sig"], timeout=_PATIENCE)
                    words = ["rdiff", "delta", f"{place}/sig", f"{place}/new", f"{place}/delta"]
                    seconds["rdiff"] = run(words, timeout=_PATIENCE).seconds
                for file in place.iterdir():
                    file.unlink()
                for peer, each in seconds.items():
                    rates[peer][name] = len(new) / each / 1e9
                shown = "  ".join(f"{peer} {rates[peer][name]:.3f} GB/s" for peer in rates)
                context.say(f"    {name:<18} {shown}")
        for peer, found in rates.items():
            for name, rate in found.items():
                if name != "random" and found["random"]:
                    ratio = (rate / found["random"],)
                    label = f"{name}: {peer}'s speed / its own on random"
                    row.criteria.append(Criterion(label, "×", ratio, None, None, "higher", binding=False))
        row.series["peers GB/s"] = rates
        row.notes.append(
            f"A peer that takes more than {_PATIENCE:g} s for {size >> 20} MiB has speed 0; each ran once."
        )


def _median(samples: Sequence[Sample | None]) -> float:
    return stats.median([s.seconds for s in samples if s is not None])
