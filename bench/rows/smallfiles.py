"""Row 6: a hundred thousand small files appear at once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench import data, limits, peers
from bench.context import OURS, Context, Field, field_of_play, our_pair
from bench.model import Limit, RowResult, Sample
from bench.nodes import Pair, check_same
from bench.processes import BenchError, need, run, settle, syncfs, wait_until

FILES = 100_000
DIRECTORIES = 100
SIZE = 1024
RSYNC = "rsync -a"
_LSYNCD_LIMIT = 300.0
_SYNCTHING_LIMIT = 300.0


class SmallFiles:
    """An unpacked archive, a restored mailbox, a deployment."""

    rows: ClassVar[Mapping[int, str]] = {6: "100,000 new files of 1 KiB: until all are durable"}

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Measure; the files are made beside the tree, and renames of their directories start the clock."""
        need("rsync", "lsyncd")
        row = RowResult(6, "100,000 small files", self.rows[6])
        files = how_many(row, context.scale)
        room = room_for(files)
        with field_of_play(context, room, room) as field:
            still = prepare(field, "still", files)
            with our_pair(context, field) as pair:

                def ours(number: int, pair: Pair = pair) -> Sample:
                    return measure_ours(field, pair, files, number)

                def lsyncd(delay: int | None) -> Sample:
                    return _lsyncd(context, field, files, delay)

                row.runs = context.turns(
                    {
                        OURS: ours,
                        RSYNC: lambda _: _rsync(field, still),
                        "lsyncd delay=1": lambda _: lsyncd(1),
                    }
                )
                check_same(pair)
            row.runs |= context.turns(
                {"lsyncd delay=0": lambda _: lsyncd(0), "lsyncd, default": lambda _: lsyncd(None)}, 1
            )
            if not context.quick:
                row.runs |= context.turns({"syncthing": lambda _: _syncthing(context, field, files)}, 1)
            row.limits += [limits.fsync(field.target), _plain_copy(field, still)]
        row.compare(OURS, "lsyncd delay=1", 0.5)
        row.compare(OURS, RSYNC, 1.3, 0.9)
        for name in ("lsyncd delay=0", "lsyncd, default", "syncthing"):
            if name in row.runs:
                row.compare(OURS, name, None)
        row.notes.append(
            "lsyncd and syncthing are done when the target holds all files; syncfs follows, on their clock."
        )
        return [row]


def move_in(prepared: Path, tree: Path) -> None:
    """Rename the directories of `prepared` into `tree`."""
    for name in sorted(os.listdir(prepared)):
        os.rename(prepared / name, tree / name)


def how_many(row: RowResult, share: float) -> int:
    """That share of the files, at least one in each directory; other than all is noted."""
    files = max(DIRECTORIES, round(FILES * share))
    if files != FILES:
        row.notes.append(f"This run: {files} files.")
    return files


def room_for(files: int) -> int:
    """Bytes of a filesystem: a file of 1 KiB takes a block and an inode, and directories and logs take theirs.

    Four times over: XFS gives back what was removed in the background, and a contestant may begin before it has.
    """
    return files * 8192 * 4 + (768 << 20)


def prepare(field: Field, name: str, files: int) -> Path:
    """Make the files beside the trees, durably."""
    prepared = field.source / name
    data.small_files(prepared, files, DIRECTORIES, SIZE)
    syncfs(field.source)
    return prepared


def measure_ours(
    field: Field, pair: Pair, files: int, number: int, switch: Callable[[bool], None] = lambda on: None
) -> Sample:
    """Move prepared files in, until all are durable on the replica; what was moved in is removed again.

    ``switch`` is told when the measurement begins and when it is over.
    """
    prepared = prepare(field, f"prepared-{number}", files)
    switch(True)
    try:
        sample = pair.measure(lambda: move_in(prepared, pair.source))
        there = data.count_files(pair.replica)
        if there != files:
            raise BenchError(f"after the flush, the replica has {there} files of {files}")
    finally:
        switch(False)
        empty(pair.source)
        prepared.rmdir()
    pair.flush()
    settle(pair.cpu)
    field.trim()
    return sample


def empty(tree: Path) -> None:
    """Remove what is in a directory."""
    for name in os.listdir(tree):
        shutil.rmtree(tree / name)


def _rsync(field: Field, still: Path) -> Sample:
    target = field.target / "rsync"
    target.mkdir()
    syncfs(field.target)
    sample = peers.rsync(f"{still}/", f"{target}/", ["-a", "--whole-file"], field.target)
    _gone(field, target)
    return sample


def _lsyncd(context: Context, field: Field, files: int, delay: int | None) -> Sample:
    source, target = field.source / "lsyncd", field.target / "lsyncd"
    source.mkdir()
    daemon = peers.Lsyncd(source, target, context.logs / "lsyncd", delay)
    try:
        sample = _until_there(daemon, field, source, target, files, _LSYNCD_LIMIT)
    finally:
        daemon.stop()
        _move_out(source, field)
        _gone(field, target)
    return sample


def _syncthing(context: Context, field: Field, files: int) -> Sample:
    source, target = field.source / "syncthing", field.target / "syncthing"
    source.mkdir()
    daemon = peers.Syncthing(source, target, context.logs / "syncthing")
    try:
        return _until_there(daemon, field, source, target, files, _SYNCTHING_LIMIT)
    finally:
        daemon.stop()
        for left in (".stfolder", "probe"):
            path = source / left
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        _move_out(source, field)
        _gone(field, target)


def _until_there(
    daemon: peers.Lsyncd | peers.Syncthing, field: Field, source: Path, target: Path, files: int, limit: float
) -> Sample:
    settle(daemon.cpu)
    cpu = daemon.cpu()
    counter = data.Counter(target, files, DIRECTORIES)
    began = time.monotonic()
    move_in(field.source / "still", source)
    wait_until(counter.complete, f"all {files} files at {target.name}", timeout=limit)
    syncfs(field.target)
    seconds = time.monotonic() - began
    settle(daemon.cpu, most=10)
    return Sample(seconds, daemon.cpu() - cpu)


def _move_out(source: Path, field: Field) -> None:
    move_in(source, field.source / "still")
    source.rmdir()


def _gone(field: Field, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    syncfs(field.target)
    field.trim()


def _plain_copy(field: Field, still: Path) -> Limit:
    target = field.target / "copy"
    began = time.monotonic()
    run(["cp", "-a", "--reflink=never", str(still), str(target)])
    syncfs(field.target)
    limit = Limit("plain copy (cp -a and syncfs)", time.monotonic() - began, "s")
    shutil.rmtree(target)
    return limit
