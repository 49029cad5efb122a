"""Files that are written through mappings, by another process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore.fmm import Hint, Kind, Root, mounts
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
    return Mapped(
        [Root(os.fsencode(tmp_path / "top"), exclude=("*.tmp",))], clock=clock, proc=tmp_path / "proc", threaded=False
    )


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
        assert Hint(0, b"f", Kind.MODIFIED) in Mapped([Root(os.fsencode(tmp_path / "top"))]).look(all_now=True)
    finally:
        process.process.kill()
        process.process.communicate()


def test_processes_that_may_not_be_looked_into_are_a_problem(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/17").mkdir(parents=True)
    for name in ("maps", "statm"):
        (tmp_path / "proc/17" / name).touch()
    mapped = Mapped([Root(os.fsencode(tmp_path))], clock=clock, proc=tmp_path / "proc", threaded=False)
    real = open

    def refuse(path: str | bytes, *arguments: object, **named: object) -> object:
        if os.fsencode(path).endswith(b"17/maps"):
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


def test_a_root_behind_a_link(tmp_path: Path, mapped: Mapped, clock: Clock) -> None:
    (tmp_path / "link").symlink_to("top")
    behind = Mapped([Root(os.fsencode(tmp_path / "link"))], clock=clock, proc=tmp_path / "proc", threaded=False)
    with mapper(tmp_path / "top/f"):
        assert behind.look() == [Hint(0, b"f", Kind.MODIFIED)]


def test_files_that_share_device_and_inode_are_told_by_their_paths(
    mapped: Mapped, tmp_path: Path, clock: Clock
) -> None:
    """As in two subvolumes of a Btrfs."""
    os.link(tmp_path / "top/f", tmp_path / "top/g")
    with mapper(tmp_path / "top/f"), mapper(tmp_path / "top/g"):
        assert {hint.path for hint in mapped.look()} == {b"f", b"g"}


def test_a_mount_below_a_root_and_another_of_what_is_in_it(
    tmp_path: Path, mapped: Mapped, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem that is also mounted elsewhere, as for a container."""
    status = os.stat(tmp_path)
    device = os.major(status.st_dev), os.minor(status.st_dev)
    here, foreign = os.fsencode(tmp_path), (0, 7777)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/db").write_bytes(bytes(100))
    table = [
        mounts.Mount(foreign, b"/", b"/", "ext4"),
        mounts.Mount(device, b"/data", here + b"/top/d", "xfs"),
        mounts.Mount(device, b"/data", here + b"/elsewhere", "xfs"),
    ]
    monkeypatch.setattr(mounts, "table", lambda: table)
    told = Kind.ATTRIBUTES, (status.st_dev, os.stat(tmp_path / "elsewhere/db").st_ino)
    with mapper(tmp_path / "elsewhere/db"):
        assert mapped.look() == [Hint(0, b"", *told)]
        alone = Root(here + b"/top", one_filesystem=True)
        assert Mapped([alone], clock=clock, proc=tmp_path / "proc", threaded=False).look() == []


def test_threads_of_the_kernel_are_asked_now_and_then_only(
    tmp_path: Path, mapped: Mapped, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = tmp_path / "proc/17"
    process.mkdir()
    (process / "statm").write_text("0 0 0 0 0 0 0\n")
    asked: list[tuple[bytes, bytes]] = []
    real = Mapped._read
    monkeypatch.setattr(Mapped, "_read", lambda self, pid, name: (asked.append((pid, name)), real(self, pid, name))[1])
    for _ in range(4):
        assert mapped.look() == []
        clock.now += 30
    assert asked.count((b"17", b"statm")) == 1 and (b"17", b"maps") not in asked
    assert mapped.problem == ""
    # A helper of the kernel becomes a program.
    status = os.stat(tmp_path / "top/f")
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    (process / "statm").write_text("1 1")
    (process / "maps").write_text(f"7f00-7f01 rw-s 00000000 {device} {status.st_ino} {tmp_path / 'top/f'}\n")
    assert mapped.look() == [Hint(0, b"f", Kind.MODIFIED)]


def test_the_paths_of_other_filesystems_are_not_touched(
    tmp_path: Path, mapped: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = tmp_path / "proc/17"
    process.mkdir()
    (process / "statm").write_text("1 1")
    (process / "maps").write_text("7f00-7f01 rw-s 00000000 00:fffff 77 /mnt/dead/file\n")
    asked = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **named: (asked.append(path), real(path, **named))[1])
    assert mapped.look() == []
    assert not [path for path in asked if b"dead" in os.fsencode(path)]


def test_a_process_that_does_not_answer_stops_nobody(
    tmp_path: Path, mapped: Mapped, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = Hint(0, b"f", Kind.MODIFIED)
    searched = Mapped([Root(os.fsencode(tmp_path / "top"))], clock=clock, proc=tmp_path / "proc")
    with mapper(tmp_path / "top/f"):
        monkeypatch.setattr(mapping, "_WAIT_SECONDS", 60.0)
        assert searched.look(all_now=True) == [hint]
        assert searched.problem == ""
        monkeypatch.setattr(mapping, "_WAIT_SECONDS", 0.2)
        process = tmp_path / "proc/17"
        process.mkdir()
        (process / "statm").write_text("1 1")
        os.mkfifo(process / "maps")
        # What is known is told all the same, and the problem.
        assert searched.look(all_now=True) == [hint]
        assert "does not end; process 17 is being asked" in searched.problem
        os.utime(tmp_path / "top/f", ns=(1, 1))
        clock.now += 40
        assert searched.look() == [hint]
        with open(process / "maps", "wb"):
            pass  # it answers
        (process / "maps").unlink()
        monkeypatch.setattr(mapping, "_WAIT_SECONDS", 60.0)
        deadline = time.monotonic() + 60
        while searched.problem:
            assert time.monotonic() < deadline
            searched.look(all_now=True)
        assert searched.count == 1
