"""Files that are written through mappings, by another process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore.fmm import Hint, Kind, Root
from farshore.fmm import mapped as mapping
from farshore.fmm.mapped import Mapped

from .conftest import Clock

MAPPER = """
import mmap, sys
file = open(sys.argv[1], "r+b")
mapping = mmap.mmap(file.fileno(), 0)
file.close()
print("mapped", flush=True)
for line in sys.stdin:
    mapping[0] = (mapping[0] + 1) % 256
    print("written", flush=True)
"""


class Mapper:
    """A process that has a file mapped, and writes to it on demand."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAPPER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect("mapped")

    def write(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("x\n")
        self.process.stdin.flush()
        self._expect("written")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == word + "\n"


@contextlib.contextmanager
def mapper(path: Path) -> Iterator[Mapper]:
    """One that the fixture's ``proc`` tells of, as only such processes are looked into."""
    made = Mapper(path)
    entry = next(above for above in path.parents if (above / "proc").is_dir()) / "proc" / str(made.process.pid)
    entry.symlink_to(f"/proc/{made.process.pid}")
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()
        entry.unlink()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mapped(tmp_path: Path, clock: Clock) -> Mapped:
    (tmp_path / "top/d").mkdir(parents=True)
    for name in ("f", "x.tmp", "d/two\nlines"):
        (tmp_path / "top" / name).write_bytes(bytes(8192))
    (tmp_path / "proc").mkdir()
    return Mapped([Root(os.fsencode(tmp_path / "top"), exclude=("*.tmp",))], clock=clock, proc=tmp_path / "proc")


def test_nothing_is_mapped(mapped: Mapped) -> None:
    assert mapped.look() == []
    assert (mapped.count, mapped.problem) == (0, "")


@pytest.mark.parametrize("name", ["f", "d/two\nlines"])
def test_a_write_is_seen_by_the_time(mapped: Mapped, clock: Clock, tmp_path: Path, name: str) -> None:
    hint = Hint(0, os.fsencode(name), Kind.MODIFIED)
    with mapper(tmp_path / "top" / name) as process:
        assert mapped.look() == [hint]  # found; what was written before is not known
        assert mapped.count == 1
        clock.now += 1.1
        assert mapped.look() == []
        os.utime(tmp_path / "top" / name, ns=(1, 1))
        clock.now += 1.1
        assert mapped.look() == [hint]
        process.write()
        clock.now += 1.1
        assert mapped.look() == [hint]
    clock.now += 30
    assert mapped.look() == [hint]  # not mapped any more
    assert mapped.count == 0
    clock.now += 30
    assert mapped.look() == []


def test_a_write_that_sets_no_time_is_seen_by_the_content(mapped: Mapped, clock: Clock, tmp_path: Path) -> None:
    hint = Hint(0, b"f", Kind.MODIFIED)
    with mapper(tmp_path / "top/f") as process:
        process.write()
        assert mapped.look() == [hint]
        # The page is writable now: nothing that stat tells changes before it was written back.
        process.write()
        seen = []
        for _ in range(12):
            clock.now += 1.0
            seen += mapped.look()
        assert seen == [hint]


def test_large_files_and_rested_ones_are_compared_seldom(mapped: Mapped, clock: Clock, tmp_path: Path) -> None:
    os.truncate(tmp_path / "top/f", 5 << 30)
    with mapper(tmp_path / "top/f"):
        mapped.look()
        times = []
        for _ in range(1000):
            clock.now += 1.0
            if mapped.look():
                times.append(clock.now)
        assert 5 <= len(times) <= 7  # at 50 MB/s, while it was changed lately
    os.truncate(tmp_path / "top/f", 8192)
    with mapper(tmp_path / "top/f"):
        mapped.look(all_now=True)
        clock.now += 700
        mapped.look()
        clock.now += 500
        assert mapped.look() == []
        clock.now += 101
        assert mapped.look() == [Hint(0, b"f", Kind.MODIFIED)]


def test_all_that_is_mapped_is_told_when_asked(mapped: Mapped, tmp_path: Path) -> None:
    mapped.look()
    with mapper(tmp_path / "top/f"):
        hint = Hint(0, b"f", Kind.MODIFIED)
        assert mapped.look() == []  # it is not time to search yet
        assert mapped.look(all_now=True) == [hint]
        assert mapped.look(all_now=True) == [hint]


def test_a_process_that_maps_another_file_of_the_same_size_is_seen_later(
    mapped: Mapped, clock: Clock, tmp_path: Path
) -> None:
    """The size of its memory is what it was; now and then, all are asked."""
    with mapper(tmp_path / "top/f") as process:
        mapped.look()
        size = next(iter(mapped._told.values()))[0]
        mapped._told = {str(process.process.pid).encode(): (size, [])}
        seen = []
        for _ in range(6):
            clock.now += 5
            seen.append(mapped.count)
            mapped.look()
        assert seen[1:4] == [0, 0, 0] and mapped.count == 1


def test_what_is_not_protected_is_not_looked_at(mapped: Mapped, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(bytes(100))
    with mapper(tmp_path / "top/x.tmp"), mapper(tmp_path / "outside"):
        assert [hint for hint in mapped.look() if hint.path] == []


def test_another_name_is_told_by_the_inode(mapped: Mapped, tmp_path: Path) -> None:
    os.link(tmp_path / "top/f", tmp_path / "other")
    status = os.stat(tmp_path / "other")
    with mapper(tmp_path / "other"):
        assert mapped.look() == [Hint(0, b"", Kind.ATTRIBUTES, (status.st_dev, status.st_ino))]


def test_a_name_that_was_given_to_another_file(mapped: Mapped, clock: Clock, tmp_path: Path) -> None:
    with mapper(tmp_path / "top/f"):
        mapped.look()
        (tmp_path / "new").write_bytes(b"new")
        os.rename(tmp_path / "new", tmp_path / "top/f")
        clock.now += 30
        mapped.look()
        # What is mapped has no name any more.
        assert mapped.count == 0


def test_every_process_of_the_machine_is_searched(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/f").write_bytes(bytes(100))
    process = Mapper(tmp_path / "top/f")
    try:
        assert Hint(0, b"f", Kind.MODIFIED) in Mapped([Root(os.fsencode(tmp_path / "top"))]).look()
    finally:
        process.process.kill()
        process.process.communicate()


def test_processes_that_may_not_be_looked_into_are_a_problem(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/17").mkdir(parents=True)
    for name in ("maps", "statm"):
        (tmp_path / "proc/17" / name).touch()
    mapped = Mapped([Root(os.fsencode(tmp_path))], clock=clock, proc=tmp_path / "proc")
    real = open

    def refuse(path: bytes, *arguments: object, **named: object) -> object:
        if bytes(path).endswith(b"17/maps"):
            raise PermissionError
        return real(path, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(mapping, "_may_trace", lambda: False)
    assert mapped.look() == []
    assert "1 processes" in mapped.problem and "CAP_SYS_PTRACE" in mapped.problem
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    mapped.look(all_now=True)
    assert mapped.problem == ""
