"""Row 4: the engine's kernels on one core, in memory, beside other hashes and librsync."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench import inputs
from bench.context import Context
from bench.model import Criterion, Limit, RowResult, Sample
from bench.processes import need, run

SIZE = 256 << 20


def on_one_core(what: str, size: int, pairs: int, timeout: float) -> list[dict[str, Any]]:
    """What ``bench.worker``, bound to one core, measures of contents of so many bytes, within ``timeout`` s."""
    words = [sys.executable, "-m", "bench.worker", what, "--size", str(size), "--pairs", str(pairs)]
    return [json.loads(line) for line in run(words, timeout=timeout).output.splitlines()]


class Kernels:
    """How fast content can be signed, and scanned when nothing of it is known."""

    rows: ClassVar[Mapping[int, str]] = {4: "kernels, one core: aligned signature / scan with no match"}

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure in a process that is bound to one core."""
        need("rdiff", "taskset")
        row = RowResult(4, "kernels", self.rows[4])
        size = context.size(SIZE, 1 << 20)
        context.say(f"    our kernels, blake3, xxh3 and memcpy over {size >> 20} MiB")
        for record in on_one_core("kernels", size, context.pairs, 1800):
            row.runs.setdefault(record["name"], []).append(Sample(record["seconds"], record["cpu"]))
        context.say("    librsync")
        self._librsync(context, row, size)
        rates = {
            name: tuple(size / s.seconds / 1e9 for s in samples if s is not None) for name, samples in row.runs.items()
        }
        row.criteria += [
            Criterion("aligned signature", "GB/s", rates["signature kernel"], 3.5, 8.0, "higher"),
            Criterion("scan with no match", "GB/s", rates["scan kernel, no match"], 0.4, 0.8, "higher"),
        ]
        row.criteria += [
            Criterion(name, "GB/s", values, None, None, "higher", binding=False)
            for name, values in rates.items()
            if name not in ("signature kernel", "scan kernel, no match", "memcpy")
        ]
        memcpy = [s.seconds for s in row.runs.pop("memcpy") if s is not None]
        row.limits.append(Limit("memcpy", size / sorted(memcpy)[len(memcpy) // 2] / 1e9, "GB/s"))
        row.notes.append(
            "The kernels work on content in memory. 'sign' and 'scan, no match' are the whole way that a file takes: "
            "reading into a window, and for the scan signing it as well, and hashing every chance hit."
        )
        row.notes.append(
            "A signature is weak sums, strong hashes and the hash of the whole: it can't be faster than its hash."
        )
        return [row]

    def _librsync(self, context: Context, row: RowResult, size: int) -> None:
        with tempfile.TemporaryDirectory(prefix="farshore-bench-", dir="/dev/shm") as name:
            place = Path(name)
            size = min(size, 64 << 20)
            old, new = inputs.unrelated(size)
            (place / "old").write_bytes(old)
            (place / "new").write_bytes(new)
            scale = context.size(SIZE, 1 << 20) / size
            steps = {
                "rdiff signature": (["-b", "4096", "signature", f"{place}/old"], place / "sig"),
                "rdiff delta, no match": (["delta", f"{place}/sig", f"{place}/new"], place / "delta"),
            }
            for _ in range(context.pairs):
                for what, (words, result) in steps.items():
                    result.unlink(missing_ok=True)
                    done = run(["taskset", "-c", "0", "rdiff", *words, str(result)], timeout=300)
                    row.runs.setdefault(what, []).append(Sample(done.seconds * scale, done.cpu * scale))
