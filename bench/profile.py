"""Where the time goes in rows 1 and 6: both nodes sampled while the work is done, and the samples put into stages."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import data
from bench.context import Context, Field, field_of_play
from bench.nodes import Pair
from bench.processes import syncfs, wait_until
from bench.rows import pages, smallfiles

#: Stage, and what a stack shows of it: matched against the frames, innermost first. The first that matches counts.
STAGES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (stage, re.compile(pattern))
    for stage, pattern in (
        ("wait", r"^(selectors\.py|threading\.py|queue\.py|.*/(selectors|threading|queue)\.py):"),
        ("wait", r"poll\.poll\("),
        ("wait", r"^concurrent/futures/thread\.py:_worker:|^.*/concurrent/futures/thread\.py:_worker:"),
        ("sync", r"(fsync|fdatasync|syncfs|sync_file_range)\("),
        ("reflink", r"(FICLONE|copy_file_range|reflink|ioctl)"),
        ("rename and names", r"os\.(rename|replace|link|unlink|mkdir|rmdir|symlink)\("),
        ("index", r"^dbm/index\.py:|execute(many)?\(|\.commit\(\)"),
        ("weak sums", r"weak_(sums|run|scan)?\(|^delta/.*:weak_"),
        ("strong hash", r"blake3|\bstrong_sums\(|whole\.update|\.digest\(\)|hasher\.|_hash\("),
        ("scan for matches", r"scan\(|_follow|find_strong|fill_set|^delta/encode\.py:_?(take|compare|find|match)"),
        ("compression", r"zstd|compress"),
        ("read files", r"read_full|readinto|preadv?\(|os\.read\(|\.read\("),
        ("stage: write files", r"pwritev?\(|os\.(write|truncate|posix_fallocate|ftruncate)\(|^dbm/replica/stage\.py:"),
        ("look at files", r"os\.(l?stat|fstat|listxattr|getxattr|scandir|listdir|open|close)\(|^fmm/scanner\.py:"),
        ("metadata", r"os\.(chmod|fchmod|chown|fchown|utime|setxattr|removexattr)\("),
        ("TLS and sockets", r"sslproto|^ssl\.py:|/ssl\.py:|selector_events|asyncio/streams|sock\.|^tls\.py:"),
        ("messages", r"^dbm/(wire|messages)\.py:|msgspec|\.encode\(|\.decode\("),
        ("watch", r"^fmm/"),
        ("plan", r"^dbm/planner\.py:"),
        ("sender", r"^dbm/sender\.py:"),
        ("receiver and tree", r"^dbm/(receiver|replica/).*:"),
        ("delta engine, other", r"^delta/"),
        ("event loop", r"asyncio/"),
    )
)
OTHER = "other"


def stage_of(stack: Iterable[str]) -> str:
    """The stage of a stack, innermost frame first."""
    for frame in stack:
        for stage, pattern in STAGES:
            if pattern.search(frame):
                return stage
    return OTHER


def run(context: Context, row: int) -> str:
    """Do the row's work three times under sampling and return the tables as Markdown."""
    work = {1: _pages, 6: _files}[row]
    size = context.size(pages.SIZE)
    room = (3 * size if row == 1 else round(smallfiles.FILES * context.scale) * 20_000) + (1 << 30)
    with field_of_play(context, room, room) as field:
        return work(context, field)


def _pair(context: Context, field: Field) -> Pair:
    samples = str(context.logs / "samples-{}.json")
    states = (field.source / "ours-state", field.target / "ours-state")
    wrapper = [sys.executable, "-m", "bench.sampled"]
    return Pair(field.source / "ours", field.target / "ours", *states, context.logs, wrapper=wrapper, samples=samples)


def _pages(context: Context, field: Field) -> str:
    size = context.size(pages.SIZE)
    (field.source / "ours").mkdir()
    data.random_file(field.source / "ours" / "file", size)
    chance = random.Random(1)
    with _pair(context, field) as pair:

        def change() -> Callable[[], None]:
            new = data.random_pages(size, pages.SHARE, chance)
            return lambda: data.write_pages(pair.source / "file", new)

        return _profiled(context, pair, f"row 1, {size >> 20} MiB", change)


def _files(context: Context, field: Field) -> str:
    files = max(smallfiles.DIRECTORIES, round(smallfiles.FILES * context.scale))
    with _pair(context, field) as pair:
        number = 0

        def change() -> Callable[[], None]:
            nonlocal number
            smallfiles.empty(pair.source)
            pair.flush()
            number += 1
            prepared = field.source / f"prepared-{number}"
            data.small_files(prepared, files, smallfiles.DIRECTORIES, smallfiles.SIZE)
            syncfs(field.source)
            return lambda: smallfiles.move_in(prepared, pair.source)

        return _profiled(context, pair, f"row 6, {files} files", change)


def _profiled(context: Context, pair: Pair, title: str, prepare: Callable[[], Callable[[], None]]) -> str:
    rounds: list[dict[str, dict[str, Any]]] = []
    seconds = []
    for number in range(3):
        change = prepare()
        # Not until their CPU rests: the sampler's own doesn't.
        time.sleep(1.0)
        for daemon in pair.daemons.values():
            os.kill(daemon.pid, signal.SIGUSR1)
        time.sleep(0.02)
        began = time.monotonic()
        change()
        pair.flush()
        seconds.append(time.monotonic() - began)
        rounds.append({name: _collect(context, pair, name) for name in pair.daemons})
        context.say(f"    {number + 1}  {seconds[-1]:.3f} s")
    parts = [f"### Where the time goes: {title}"]
    parts.append(
        f"Wall time until durable: {', '.join(f'{s:.2f}' for s in seconds)} s, sampled (sampling itself costs some). "
        "Fractions are of wall time, summed over the threads of a process, so that they exceed 100 % where threads "
        "work side by side. *running*: on a core or waiting for one; *blocked*: in a call that the disk, the "
        "network or another thread holds up. Threads that wait for work are left out."
    )
    for name in ("source", "replica"):
        parts.append(table(name, [each[name] for each in rounds]))
    return "\n\n".join(parts) + "\n"


def _collect(context: Context, pair: Pair, name: str) -> dict[str, Any]:
    path = Path(str(context.logs / "samples-{}.json").format(name))
    path.unlink(missing_ok=True)
    os.kill(pair.daemons[name].pid, signal.SIGUSR2)
    wait_until(path.exists, f"the samples of {name}", timeout=30, interval=0.005)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(name: str, rounds: Iterable[dict[str, Any]]) -> str:
    """Stages of one process with their fractions of wall time, and the source lines that are seen most."""
    total = 0
    running: Counter[str] = Counter()
    blocked: Counter[str] = Counter()
    lines: Counter[tuple[str, str]] = Counter()
    for each in rounds:
        total += each["rounds"]
        for _, on_core, stack, count in each["stacks"]:
            stage = stage_of(stack)
            if stage == "wait":
                continue
            (running if on_core else blocked)[stage] += count
            lines[stage, stack[0]] += count
    total = max(1, total)
    rows = [f"| {name}: stage | running | blocked |", "|---|---:|---:|"]
    both = running + blocked
    for stage, count in both.most_common():
        if count >= 0.005 * total:
            rows.append(f"| {stage} | {running[stage] / total:.0%} | {blocked[stage] / total:.0%} |")
    rows.append(f"| all | {sum(running.values()) / total:.0%} | {sum(blocked.values()) / total:.0%} |")
    seen = [f"    {count / total:4.0%}  {stage:<18} {line[:110]}" for (stage, line), count in lines.most_common(12)]
    return "\n".join(rows) + "\n\n" + "\n".join(seen)
