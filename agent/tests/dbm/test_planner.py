"""What the planner tells of a tree that is hard to read, and what its index and sender hold on to."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from msgspec.structs import replace
from nodes import Pair, until
from trees import differences

from farshore.dbm import planner as planning
from farshore.dbm import uploads
from farshore.dbm.index import LINEAGE, Index, IndexDamaged, Known, _known, set_aside
from farshore.dbm.messages import (
    Begin,
    Commit,
    Copy,
    Drop,
    Entry,
    FromSource,
    Link,
    MakeDir,
    Meta,
    Move,
    Operation,
    Patch,
    Put,
    Remove,
    SetMeta,
)
from farshore.dbm.planner import Planned, Planner
from farshore.dbm.wire import Codec
from farshore.dbm.work import Batch, Job, Work
from farshore.errors import NotInTime, ProtocolError
from farshore.fmm import scanner
from farshore.fmm.dirty import Dirty
from farshore.fmm.types import FileKind, Hint, Inode, Kind, Root
from farshore.fmm.view import Live

CODEC: Codec[FromSource] = Codec(FromSource)


def inode_of(path: Path) -> Inode:
    status = path.stat()
    return status.st_dev, status.st_ino


class Source:
    """A tree, and a planner whose every transaction the replica acknowledges."""

    def __init__(self, base: Path, exclude: tuple[str, ...] = ()) -> None:
        self.tree = base / "tree"
        self.tree.mkdir()
        self.index = Index(base / "index.db")
        self.root = Root(os.fsencode(self.tree), exclude=exclude)
        self.planner = Planner(self.index, [self.root], 1)
        self.seq = 0
        self.last = Planned(0)
        self.ended: list[object] = []
        #: The paths that were read as large files.
        self.jobs: list[bytes] = []

    def one(self, batch: Batch) -> list[FromSource]:
        self.index.begin()
        self.last = self.planner.transaction(batch, self.seq + 1)
        self.seq += bool(self.last.frames)
        self.ended += self.last.ended
        self.index.commit()
        sent = [CODEC.decode(frame[4:], "test") for frame in [*self.last.loose, *self.last.frames]]
        return [message for message in sent if not isinstance(message, (Begin, Commit))]

    def all(self, batch: Batch) -> list[FromSource]:
        sent: list[FromSource] = []
        for _ in range(1000):
            sent += self.one(batch)
            if batch.finished:
                return sent
        raise AssertionError("the batch never ends")

    def tell(self, *hints: Hint) -> list[FromSource]:
        """All that is sent for the hints; a rescan of everything when there are none."""
        hints = hints or (Hint(0, b"", Kind.RESCAN),)
        items = [
            Dirty(hint.root, hint.path, hint.kind, 0, number, frozenset([hint.inode] if hint.inode else []))
            for number, hint in enumerate(hints)
        ]
        batch = Batch.of(items)
        works = list(batch.works)
        self.ended.clear()
        sent = self.all(batch)
        while self.planner.new_jobs:
            job = self.planner.new_jobs.pop()
            self.read(job)
            sent += self.all(self.planner.deliver(job))
        assert set(map(id, self.ended)) == set(map(id, works))
        assert [work.left for work in works] == [0] * len(works)
        return sent

    def read(self, job: Job) -> None:
        """What a slot of the uploads does, without sending."""
        self.jobs.append(job.path)
        blob = self.index.get_signature(job.root, job.base)
        try:
            reading = uploads._Reading(self.planner.view, job, uploads._parsed(blob), threading.Event())
            if job.hash_only:
                job.content = reading.hash()
                return
            job.number = 7
            while reading.piece() is not None:
                pass
            job.content = reading.content
        except OSError as error:
            job.problem = error


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    made = Source(tmp_path)
    yield made
    made.index.close()


def paths_of(messages: Iterable[FromSource], kind: type) -> list[bytes]:
    return [message.path for message in messages if isinstance(message, kind)]


def fail(monkeypatch: pytest.MonkeyPatch, bad: bytes) -> None:
    real, look = scanner.observe, scanner.look

    def observe(root_path: bytes | int, root: int, path: bytes) -> object:
        if path == bad:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(root_path, root, path)

    def lstat(directories: scanner.Directories, path: bytes) -> object:
        if path == bad:
            raise PermissionError(errno.EACCES, "Permission denied")
        return look(directories, path)

    monkeypatch.setattr(scanner, "observe", observe)
    monkeypatch.setattr(scanner, "look", lstat)


# --- a root that is not there


def test_nothing_is_removed_because_the_root_is_missing(source: Source) -> None:
    (source.tree / "f").write_text("1")
    source.tell()
    source.tree.rename(source.tree.with_name("away"))
    assert source.tell(Hint(0, b"f", Kind.MODIFIED)) == []
    assert source.planner.absent_roots == {0}
    source.tree.with_name("away").rename(source.tree)
    assert paths_of(source.tell(), Remove) == []
    assert source.planner.absent_roots == set()
    (source.tree / "f").unlink()
    assert paths_of(source.tell(Hint(0, b"f", Kind.DELETED)), Remove) == [b"f"]


def test_a_filesystem_that_was_just_made_empties_nothing(source: Source) -> None:
    (source.tree / "f").write_text("1")
    source.tell()
    source.index.set_fact(source.planner._device_key(0), b"1")
    (source.tree / "f").unlink()
    (source.tree / "lost+found").mkdir()
    assert paths_of(source.tell(), Remove) == []
    assert source.planner.absent_roots == {0}
    (source.tree / "g").write_text("2")
    assert paths_of(source.tell(), Remove) == [b"f"]


def test_an_unmounted_root_is_known_after_the_index_was_cleared(source: Source) -> None:
    source.tell()
    # Filled only later, without a look at the root itself.
    (source.tree / "f").write_text("1")
    source.tell(Hint(0, b"f", Kind.CREATED))
    key = source.planner._device_key(0)
    assert source.index.get_fact(key) == str(source.tree.stat().st_dev).encode()
    listed = list(source.index)
    source.index.set_fact(key, b"1")
    source.index.set_fact(LINEAGE, b"x")
    source.index.clear()
    assert source.index.get_fact(LINEAGE) is None
    source.index.put_all(listed)
    (source.tree / "f").unlink()
    assert paths_of(source.tell(), Remove) == []
    assert paths_of(source.tell(Hint(0, b"f", Kind.DELETED)), Remove) == []
    assert source.planner.absent_roots == {0}


def test_a_tree_that_was_emptied_is_emptied_there(source: Source) -> None:
    (source.tree / "f").write_text("1")
    source.tell()
    (source.tree / "f").unlink()
    assert paths_of(source.tell(), Remove) == [b"f"]


# --- what cannot be read


def test_a_bad_sector_stops_only_its_file(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = source.tree / "bad"
    bad.write_bytes(os.urandom(200_000))
    number = bad.stat().st_ino

    def check(self: uploads._Reading) -> None:
        if self._before.st_ino == number:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(uploads._Reading, "_check", check)
    (source.tree / "other").write_text("2")
    sent = source.tell()
    assert paths_of(sent, Put) == [b"other"]
    assert [message.upload for message in sent if isinstance(message, Drop)] == [7]
    assert any("Input/output error" in text for text in source.planner.problems.values())
    assert source.tell() == []
    monkeypatch.undo()
    assert paths_of(source.tell(Hint(0, b"bad", Kind.MODIFIED)), Patch) == [b"bad"]
    assert source.planner.problems == {}


def test_a_large_file_that_failed_in_the_middle_is_not_tried_by_the_clock(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt would send what comes before once more."""
    bad, closed = source.tree / "bad", source.tree / "closed"
    bad.write_bytes(os.urandom(200_000))
    closed.write_bytes(os.urandom(200_000))
    number = bad.stat().st_ino
    real_open = Live.open

    def check(self: uploads._Reading) -> None:
        if self._before.st_ino == number:
            raise OSError(errno.EIO, "Input/output error")

    def open_(self: Live, root: int, path: bytes) -> int:
        if path == b"closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_open(self, root, path)

    monkeypatch.setattr(uploads._Reading, "_check", check)
    monkeypatch.setattr(Live, "open", open_)
    source.tell()
    assert {path for _, path, _ in source.planner.problems} == {b"bad", b"closed"}
    assert source.planner.unread() == [Hint(0, b"closed", Kind.MODIFIED)]


def test_what_could_not_be_read_is_forgotten_when_it_is_of_another_kind(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.tree / "f").write_text("1")
    real_open = Live.open

    def open_(self: Live, root: int, path: bytes) -> int:
        if path == b"f":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_open(self, root, path)

    monkeypatch.setattr(Live, "open", open_)
    source.tell()
    assert list(source.planner.problems) == [(0, b"f", "content")]
    (source.tree / "f").unlink()
    (source.tree / "f").symlink_to("elsewhere")
    source.tell(Hint(0, b"f", Kind.CREATED))
    assert source.planner.problems == {}


# --- large files


LARGE = 100_000


def test_a_large_file_goes_as_an_upload_and_then_as_nothing(source: Source) -> None:
    (source.tree / "f").write_bytes(os.urandom(LARGE))
    sent = source.tell()
    assert [message.upload for message in sent if isinstance(message, Patch)] == [7]
    assert source.tell() == []
    (source.tree / "f").write_bytes((source.tree / "f").read_bytes())
    assert paths_of(source.tell(Hint(0, b"f", Kind.MODIFIED)), Patch) == []


def test_the_holes_of_a_large_file_are_not_read(source: Source) -> None:
    size = 64 << 20
    with (source.tree / "f").open("wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(os.urandom(5000))

    def characters_read() -> int:
        (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
        return int(line.split()[1])

    before = characters_read()
    assert paths_of(source.tell(), Patch) == [b"f"]
    assert characters_read() - before < size // 4


def test_content_that_is_there_under_another_name_is_copied_there(source: Source) -> None:
    (source.tree / "a").write_bytes(os.urandom(LARGE))
    source.tell()
    shutil.copy(source.tree / "a", source.tree / "b")
    sent = source.tell(Hint(0, b"b", Kind.CREATED))
    assert [(m.path, m.source) for m in sent if isinstance(m, Copy)] == [(b"b", b"a")]
    assert paths_of(sent, Patch) == []
    (source.tree / "c").write_bytes(os.urandom(LARGE))
    sent = source.tell(Hint(0, b"c", Kind.CREATED))
    assert (paths_of(sent, Copy), paths_of(sent, Patch)) == ([], [b"c"])
    # The copy is as good a base as the original.
    assert source.index.get_signature(0, b"b") == source.index.get_signature(0, b"a") is not None


def test_a_file_that_changes_while_it_is_read_is_fuzzy_and_read_again(source: Source) -> None:
    source.tell()
    path = source.tree / "f"
    path.write_bytes(os.urandom(LARGE))
    batch = Batch.of([Dirty(0, b"f", Kind.CREATED, 0, 1)])
    source.all(batch)
    (job,) = source.planner.new_jobs
    source.planner.new_jobs.clear()
    source.read(job)
    with path.open("ab") as file:
        file.write(b"more")
    assert paths_of(source.all(source.planner.deliver(job)), Patch) == [b"f"]
    known = source.index.get(0, b"f")
    assert known is not None and (known.ctime_ns, known.size) == (0, LARGE)
    assert [hint.path for hint in source.planner.again] == [b"f"]
    assert paths_of(source.tell(*source.planner.again), Patch) == [b"f"]


def test_who_looks_at_a_file_that_is_being_read_waits_for_it(source: Source) -> None:
    (source.tree / "f").write_bytes(os.urandom(LARGE))
    first, second = (Batch.of([Dirty(0, b"f", Kind.MODIFIED, 0, number)]) for number in (1, 2))
    source.all(first)
    source.all(second)
    (job,) = source.planner.new_jobs
    source.planner.new_jobs.clear()
    assert source.ended == []
    source.read(job)
    (source.tree / "f").unlink()
    sent = source.all(source.planner.deliver(job))
    assert [message.upload for message in sent if isinstance(message, Drop)] == [7]
    assert {id(work) for work in source.ended} == {id(work) for work in (*first.works, *second.works)}


def test_a_large_file_renamed_is_moved(source: Source) -> None:
    (source.tree / "f").write_bytes(os.urandom(LARGE))
    while not (known := source.index.get(0, b"f")) or not known.ctime_ns:
        source.tell()
    (source.tree / "f").rename(source.tree / "g")
    sent = source.tell(Hint(0, b"f", Kind.MOVED_FROM), Hint(0, b"g", Kind.MOVED_TO))
    assert [(m.path, m.to) for m in sent if isinstance(m, Move)] == [(b"f", b"g")]
    assert paths_of(sent, Patch) == []


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_name_never_holds_what_it_never_held(source: Source, size: int, replaces: bool) -> None:
    """Saving by a rename: the replica has the new file's beginning under its old name."""
    if replaces:
        (source.tree / "g").write_bytes(b"before" * size)
    (source.tree / "new").write_bytes(os.urandom(size))
    source.tell()
    with (source.tree / "new").open("ab") as file:
        file.write(b"and the end of it")
    (source.tree / "new").rename(source.tree / "g")
    sent = source.tell(Hint(0, b"new", Kind.MOVED_FROM), Hint(0, b"g", Kind.MOVED_TO))
    told = [(type(m), m.path) for m in sent if isinstance(m, (Put, Patch, Move, Remove))]
    assert told == [(Put if size == 100 else Patch, b"g"), (Remove, b"new")]


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("how", ["not opened", "not read"])
def test_a_renamed_file_that_cannot_be_read_is_not_lost(
    source: Source, monkeypatch: pytest.MonkeyPatch, size: int, how: str
) -> None:
    """An earlier content on the replica is worth more than none."""
    (source.tree / "old").write_bytes(os.urandom(size))
    source.tell()
    with (source.tree / "old").open("ab") as file:
        file.write(b"and the end of it")
    (source.tree / "old").rename(source.tree / "new")

    def bad(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    if how == "not opened":
        monkeypatch.setattr(scanner, "open_file", bad)
    else:
        monkeypatch.setattr(os, "read", bad)
        monkeypatch.setattr(uploads._Reading, "_check", bad)
    sent = source.tell(Hint(0, b"new", Kind.MOVED_TO), Hint(0, b"old", Kind.MOVED_FROM))
    assert [(m.path, m.to) for m in sent if isinstance(m, Move)] == [(b"old", b"new")]
    assert paths_of(sent, Remove) == []
    assert source.planner.problems
    monkeypatch.undo()
    (source.tree / "new").touch()
    sent = source.tell(Hint(0, b"new", Kind.MODIFIED))
    assert paths_of(sent, Put if size == 100 else Patch) == [b"new"]


def test_a_large_file_that_grew_and_was_renamed_is_sent_as_its_change(source: Source) -> None:
    (source.tree / "part").write_bytes(os.urandom(LARGE))
    source.tell()
    with (source.tree / "part").open("ab") as file:
        file.write(b"the end")
    (source.tree / "part").rename(source.tree / "whole")
    pieces: list[bytes] = []
    piece = uploads._Reading.piece

    def noted(reading: uploads._Reading) -> bytes | None:
        data = piece(reading)
        pieces.append(data or b"")
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads._Reading, "piece", noted)
        source.tell(Hint(0, b"whole", Kind.MOVED_TO), Hint(0, b"part", Kind.MOVED_FROM))
    assert source.jobs == [b"part", b"whole"], "each is read once"
    assert len(b"".join(pieces)) < LARGE // 10
    assert source.index.get(0, b"part") is None
    assert source.index.get_signature(0, b"whole") is not None


def test_a_second_name_of_a_large_file_is_a_link(source: Source) -> None:
    (source.tree / "f").write_bytes(os.urandom(LARGE))
    source.tell()
    os.link(source.tree / "f", source.tree / "g")
    assert paths_of(source.tell(Hint(0, b"g", Kind.CREATED)), Link) == [b"g"]
    with (source.tree / "g").open("r+b") as file:
        file.write(os.urandom(10))
    sent = source.tell(Hint(0, b"g", Kind.MODIFIED))
    assert (paths_of(sent, Patch), paths_of(sent, Link)) == ([b"g"], [b"f"])


def test_an_error_hides_no_later_removal(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.tree / "f").write_text("1")
    source.tell()
    fail(monkeypatch, b"f")
    assert source.tell(Hint(0, b"f", Kind.MODIFIED)) == []
    assert len(source.planner.problems) == 1
    monkeypatch.undo()
    (source.tree / "f").unlink()
    assert paths_of(source.tell(Hint(0, b"f", Kind.DELETED)), Remove) == [b"f"]
    assert source.planner.problems == {}


def test_a_parent_that_cannot_be_observed_ends_the_attempt(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.tell()
    (source.tree / "d").mkdir()
    (source.tree / "d" / "f").write_text("1")
    fail(monkeypatch, b"d")
    assert source.tell(Hint(0, b"d/f", Kind.CREATED)) == []
    assert [key[1] for key in source.planner.problems] == [b"d"]


def test_what_is_too_long_is_a_problem(source: Source) -> None:
    here = os.open(source.tree, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    sent = source.tell()
    assert max(map(len, paths_of(sent, MakeDir))) <= 4096
    assert any(text.endswith("longer than 4096 bytes") for text in source.planner.problems.values())


def test_attributes_that_fit_into_no_frame_are_left_out(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MAX_XATTRS", 50)
    (source.tree / "f").write_text("1")
    os.setxattr(source.tree / "f", "user.large", b"x" * 60)
    sent = source.tell()
    assert [message.meta.xattrs for message in sent if isinstance(message, Put)] == [[]]
    assert len(source.planner.problems) == 1
    assert source.tell(Hint(0, b"f", Kind.ATTRIBUTES)) == []
    os.removexattr(source.tree / "f", "user.large")
    source.tell(Hint(0, b"f", Kind.ATTRIBUTES))
    assert source.planner.problems == {}


def test_times_that_64_bits_do_not_hold(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.tree / "f").write_text("1")
    real = scanner.observed

    def observed(status: os.stat_result, root: int, path: bytes, handle: int) -> object:
        seen = real(status, root, path, handle)
        return planning.replace(seen, mtime_ns=1 << 64, atime_ns=-(1 << 64)) if path == b"f" else seen

    monkeypatch.setattr(scanner, "observed", observed)
    (meta,) = [message.meta for message in source.tell() if isinstance(message, Put)]
    assert (meta.mtime_ns, meta.atime_ns) == ((1 << 63) - 1, -(1 << 63))
    assert source.tell() == []


# --- what differs


def test_a_link_broken_with_equal_content_is_sent(source: Source) -> None:
    (source.tree / "a").write_text("same")
    os.link(source.tree / "a", source.tree / "b")
    source.tell()
    shutil.copy2(source.tree / "b", source.tree.with_name("copy"))
    source.tree.with_name("copy").rename(source.tree / "b")
    assert b"b" in paths_of(source.tell(Hint(0, b"b", Kind.MOVED_TO)), Put)


def test_a_directory_in_doubt_is_set_again(source: Source) -> None:
    (source.tree / "d").mkdir()
    source.tell()
    (source.tree / "d").chmod(0o700)
    source.tell(Hint(0, b"d", Kind.ATTRIBUTES))
    assert (0, b"d") in source.last.changed
    assert not source.last.drastic
    assert source.tell() == []
    hints = source.planner.doubt([(0, b"d")])
    assert paths_of(source.tell(*hints), SetMeta) == [b"d"]


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_in_doubt_below_what_is_in_doubt_is_removed(source: Source, turned: bool) -> None:
    """The replica may have a directory and what was in it, when the acknowledgements of both were lost."""
    source.tell()
    (source.tree / "d").mkdir()
    source.index.begin()
    doubts = [(0, b"d"), (0, b"d/gone"), (0, b"d/e"), (0, b"d/e/gone")]
    hints = source.planner.doubt(reversed(doubts) if turned else doubts)
    source.index.commit()
    sent = source.tell(*hints)
    assert paths_of(sent, MakeDir)[0] == b"d"
    assert {b"d/gone", b"d/e"} <= set(paths_of(sent, Remove))


def test_what_is_in_doubt_stays_so_when_the_directory_comes_into_doubt_again(source: Source) -> None:
    """Two connections ended in a row, and the second had told of the directory, and not yet of what was in it."""
    source.tell()
    (source.tree / "d").mkdir()
    for doubts in ([(0, b"d"), (0, b"d/gone"), (0, b"d/e"), (0, b"d/e/gone")], [(0, b"d")]):
        source.index.begin()
        source.planner.doubt(doubts)
        source.index.commit()
    sent = source.tell()
    assert paths_of(sent, MakeDir)[0] == b"d"
    assert {b"d/gone", b"d/e"} <= set(paths_of(sent, Remove))
    assert source.tell() == []


def test_a_link_that_came_and_went_unseen(source: Source) -> None:
    """What was written through it shows under no name of which a hint tells."""
    for name in ("a", "b"):
        (source.tree / name).write_bytes(b"old")
    source.tell()
    for name in ("a", "b"):
        os.link(source.tree / name, source.tree / f"{name}2")
        (source.tree / f"{name}2").write_bytes(b"new")
        (source.tree / f"{name}2").unlink()
    kind = Kind.CREATED | Kind.MODIFIED | Kind.DELETED
    assert not source.tell(Hint(0, b"a2", kind), Hint(0, b"b2", kind))
    sent = source.tell(
        *(Hint(0, name + b"2", kind, inode_of(source.tree / os.fsdecode(name))) for name in (b"a", b"b"))
    )
    assert sorted(paths_of(sent, Put)) == [b"a", b"b"]
    # Nothing else was looked at.
    assert source.planner.looked_at < 15


@pytest.mark.parametrize("kind", [Kind.MODIFIED, Kind.CREATED | Kind.MOVED_TO])
def test_a_link_that_gave_its_name_to_another_file(source: Source, kind: Kind) -> None:
    (source.tree / "a").write_bytes(b"old")
    (source.tree / "b").write_bytes(b"was a link to a for a moment")
    source.tell()
    (source.tree / "a").write_bytes(b"new")
    assert paths_of(source.tell(Hint(0, b"b", kind, inode_of(source.tree / "a"))), Put) == [b"a"]


def test_a_link_that_gave_its_name_to_a_directory(source: Source) -> None:
    (source.tree / "a").write_bytes(b"old")
    source.tell()
    (source.tree / "a").write_bytes(b"new")
    (source.tree / "b").mkdir()
    sent = source.tell(Hint(0, b"b", Kind.CREATED | Kind.RESCAN, inode_of(source.tree / "a")))
    assert paths_of(sent, Put) == [b"a"]


def test_a_link_that_came_and_went_under_a_name_that_is_known(source: Source) -> None:
    (source.tree / "a").write_bytes(b"old")
    (source.tree / "b").write_bytes(b"another file")
    source.tell()
    (source.tree / "b").unlink()
    os.link(source.tree / "a", source.tree / "b")
    (source.tree / "b").write_bytes(b"new")
    (source.tree / "b").unlink()
    kind = Kind.CREATED | Kind.MODIFIED | Kind.DELETED
    sent = source.tell(Hint(0, b"b", kind, inode_of(source.tree / "a")))
    assert paths_of(sent, Put) == [b"a"]
    assert paths_of(sent, Remove) == [b"b"]


def test_a_name_that_moved_before_new_content_came_is_linked_to_it(source: Source) -> None:
    (source.tree / "d").mkdir()
    (source.tree / "a").write_bytes(b"old")
    os.link(source.tree / "a", source.tree / "d" / "b")
    source.tell()
    (source.tree / "d").rename(source.tree / "e")
    (source.tree / "a").write_bytes(b"new")
    assert paths_of(source.tell(Hint(0, b"a", Kind.MODIFIED)), Put) == [b"a"]
    # Looked at once more, before what is below the new name is.
    sent = source.tell(Hint(0, b"e", Kind.MOVED_TO), Hint(0, b"a", Kind.MODIFIED))
    assert paths_of(sent, Move) == [b"d"]
    assert [(message.path, message.to) for message in sent if isinstance(message, Link)] == [(b"e/b", b"a")]


def test_what_was_written_through_a_lost_name_shows_under_one_that_is_left(source: Source) -> None:
    for name in ("b", "c", "d"):
        if name == "b":
            (source.tree / "b").write_text("before")
        else:
            os.link(source.tree / "b", source.tree / name)
    source.tell()
    (source.tree / "b").write_text("written")
    (source.tree / "b").unlink()
    (source.tree / "c").unlink()
    sent = source.tell(Hint(0, b"b", Kind.DELETED))
    assert [(message.path, message.data) for message in sent if isinstance(message, Put)] == [(b"d", b"written")]
    assert b"b" in paths_of(sent, Remove)


def test_a_file_of_many_names_is_looked_at_as_often_as_it_has_names(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, looks, lstat = 200, 0, source.planner._lstat

    def counted(root: int, path: bytes) -> os.stat_result | None:
        nonlocal looks
        looks += 1
        return lstat(root, path)

    monkeypatch.setattr(source.planner, "_lstat", counted)
    (source.tree / "f").write_text("1")
    (source.tree / "d").mkdir()
    source.tell()
    names = [b"d/%d" % number for number in range(count)]
    for name in names:
        os.link(source.tree / "f", os.fsencode(source.tree) + b"/" + name)
    # So that what is read now is known for sure.
    time.sleep(0.05)
    assert sorted(paths_of(source.tell(*(Hint(0, name, Kind.CREATED) for name in names)), Link)) == sorted(names)
    assert looks < 10 * count
    # Each of them is told to have changed, and one reading is enough.
    looks = 0
    assert not source.tell(*(Hint(0, name, Kind.MODIFIED) for name in names))
    assert looks < 10 * count
    looks, gone = 0, names[: count // 2]
    for name in gone:
        os.unlink(os.fsencode(source.tree) + b"/" + name)
    time.sleep(0.05)
    assert sorted(paths_of(source.tell(*(Hint(0, name, Kind.DELETED) for name in gone)), Remove)) == sorted(gone)
    assert looks < 10 * count
    looks = 0
    shutil.rmtree(source.tree / "d")
    time.sleep(0.05)
    assert paths_of(source.tell(Hint(0, b"d", Kind.DELETED)), Remove) == [b"d"]
    assert looks < 10 * count


@pytest.mark.parametrize("together", [True, False])
def test_a_file_of_many_names_that_all_go(source: Source, monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """Each of them is asked for the others, of which none is left."""
    count, rows, known = 300, 0, source.index.each_by_inode

    def counted(root: int, dev: int, ino: int) -> Iterator[Known]:
        nonlocal rows
        for each in known(root, dev, ino):
            rows += 1
            yield each

    (source.tree / "d").mkdir()
    (source.tree / "d" / "0").write_text("1")
    for number in range(1, count):
        os.link(source.tree / "d" / "0", source.tree / "d" / str(number))
    source.tell()
    monkeypatch.setattr(source.index, "each_by_inode", counted)
    names = [b"d/%d" % number for number in range(count)]
    if together:
        shutil.rmtree(source.tree / "d")
        assert paths_of(source.tell(Hint(0, b"d", Kind.DELETED)), Remove) == [b"d"]
    else:
        for name in names:
            os.unlink(os.fsencode(source.tree) + b"/" + name)
        assert sorted(paths_of(source.tell(*(Hint(0, name, Kind.DELETED) for name in names)), Remove)) == sorted(names)
    assert rows < 10 * count


def renaming(source: Source, monkeypatch: pytest.MonkeyPatch, old: Path, new: Path) -> None:
    """Rename something at the source as soon as a file's content was told."""
    emit = source.planner._emit

    def told(operation: Operation, content: int = 0) -> None:
        emit(operation, content)
        if isinstance(operation, Put) and old.exists():
            old.rename(new)

    monkeypatch.setattr(source.planner, "_emit", told)


def test_a_directory_that_moves_after_something_in_it_was_told_gets_its_times(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.tree / "d" / "sub").mkdir(parents=True)
    (source.tree / "d" / "sub" / "f").write_bytes(b"old")
    source.tell()
    (source.tree / "d" / "sub" / "f").write_bytes(b"new")
    renaming(source, monkeypatch, source.tree / "d", source.tree / "e")
    sent = source.tell(Hint(0, b"d/sub/f", Kind.MODIFIED), Hint(0, b"e", Kind.MOVED_TO | Kind.RESCAN))
    assert paths_of(sent, Move) == [b"d"]
    # What was put into it on the replica changed its times, though nothing has changed them here.
    assert b"e/sub" in paths_of(sent, SetMeta)


def test_a_directory_that_was_away_for_a_moment_gets_its_times(
    source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (source.tree / "d").mkdir()
    (source.tree / "d" / "f").write_bytes(b"old")
    source.tell()
    (source.tree / "d" / "f").write_bytes(b"new")
    away = tmp_path / "away"
    renaming(source, monkeypatch, source.tree / "d", away)
    sent = source.tell(Hint(0, b"d/f", Kind.MODIFIED))
    assert paths_of(sent, Put) == [b"d/f"]
    assert b"d" not in paths_of(sent, SetMeta)
    assert [(hint.path, hint.kind) for hint in source.planner.again if not hint.kind & Kind.MODIFIED] == [
        (b"d", Kind.ATTRIBUTES)
    ]
    away.rename(source.tree / "d")
    assert b"d" in paths_of(source.tell(*source.planner.again), SetMeta)


def test_a_link_in_doubt_has_the_file_that_it_names_looked_at(source: Source) -> None:
    """The index may have forgotten the new name, and with it whose it was."""
    (source.tree / "a").write_bytes(b"old")
    source.tell()
    os.link(source.tree / "a", source.tree / "b")
    assert paths_of(source.tell(Hint(0, b"b", Kind.CREATED)), Link) == [b"b"]
    changed = set(source.last.changed)
    source.index.begin()
    source.index.remove(0, b"b")
    (source.tree / "b").write_bytes(b"new")
    (source.tree / "b").unlink()
    hints = source.planner.doubt(changed)
    source.index.commit()
    assert paths_of(source.tell(*hints), Put) == [b"a"]


def test_the_other_names_of_what_is_in_doubt_are_looked_at(source: Source) -> None:
    (source.tree / "a").write_bytes(b"old")
    os.link(source.tree / "a", source.tree / "b")
    source.tell()
    (source.tree / "b").write_bytes(b"new")
    (source.tree / "b").unlink()
    source.index.begin()
    hints = source.planner.doubt([(0, b"b")])
    source.index.commit()
    sent = source.tell(*hints)
    assert paths_of(sent, Put) == [b"a"]
    assert paths_of(sent, Remove) == [b"b"]


@pytest.mark.parametrize("way", ["replaced", "removed", "with its directory"])
def test_other_names_are_looked_at_though_the_connection_ends(source: Source, way: str) -> None:
    """What was written through a name that is gone shows under the others; the index forgets at once who they are."""
    (source.tree / "d").mkdir()
    (source.tree / "large").write_bytes(os.urandom(100_000))
    os.link(source.tree / "large", source.tree / "d" / "name")
    (source.tree / "new").write_text("new")
    source.tell()
    os.setxattr(source.tree / "d" / "name", b"user.note", b"x")
    changed = b"d" if way == "with its directory" else b"d/name"
    if way == "replaced":
        (source.tree / "new").rename(source.tree / "d" / "name")
    elif way == "removed":
        (source.tree / "d" / "name").unlink()
    else:
        shutil.rmtree(source.tree / "d")
    batch = Batch.of([Dirty(0, changed, Kind.DELETED | Kind.CREATED, 0, 1, frozenset())])
    (work,) = batch.works
    source.all(batch)
    # The large file is to be read, when the connection ends: all jobs are forgotten, and the work is dirty again.
    assert source.planner.new_jobs
    assert work.left
    source.planner.forget_jobs()
    batch = Batch.of([work.item])
    sent = source.all(batch)
    while source.planner.new_jobs:
        job = source.planner.new_jobs.pop()
        source.read(job)
        sent += source.all(source.planner.deliver(job))
    assert [
        (message.path, message.meta.xattrs)
        for message in sent
        if isinstance(message, SetMeta) and message.path == b"large"
    ] == [(b"large", [(b"user.note", b"x")])]


def test_two_large_files_that_got_each_others_inodes(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is looked at because of the other; both are read once."""
    monkeypatch.setattr(planning, "LOOK_SECONDS", 0.001)
    for name in ("a", "b"):
        (source.tree / name).write_bytes(os.urandom(LARGE))
    source.tell()
    source.jobs.clear()
    (source.tree / "a").rename(source.tree / "c")
    (source.tree / "b").rename(source.tree / "a")
    (source.tree / "c").rename(source.tree / "b")
    for name in ("a", "b"):
        with (source.tree / name).open("r+b") as file:
            file.write(name.encode())
    time.sleep(0.03)
    sent = source.tell()
    assert sorted(source.jobs) == [b"a", b"b"]
    assert sorted(paths_of(sent, Patch)) == [b"a", b"b"]
    assert not source.tell()


def test_a_directory_replaced_is_drastic(source: Source) -> None:
    (source.tree / "d").mkdir()
    source.tell()
    (source.tree / "d").rmdir()
    (source.tree / "d").write_text("file")
    sent = source.tell(Hint(0, b"d", Kind.CREATED))
    assert paths_of(sent, Put) == [b"d"]
    assert source.last.drastic


def test_a_file_replaced_by_an_excluded_directory_is_removed(tmp_path: Path) -> None:
    source = Source(tmp_path, exclude=("x/",))
    (source.tree / "x").write_text("1")
    source.tell()
    (source.tree / "x").unlink()
    (source.tree / "x").mkdir()
    assert paths_of(source.tell(), Remove) == [b"x"]
    assert source.tell() == []
    source.index.close()


def test_a_long_walk_is_cut_into_transactions(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (source.tree / str(number)).write_text("1")
    source.tell()
    real = scanner.look

    def slow(directories: scanner.Directories, path: bytes) -> object:
        time.sleep(0.03)
        return real(directories, path)

    monkeypatch.setattr(scanner, "look", slow)
    batch = Batch.of([Dirty(0, b"", Kind.RESCAN, 0, 1)])
    source.one(batch)
    assert not batch.finished


# --- the index and the sender


def test_inode_numbers_use_all_64_bits(source: Source) -> None:
    row = (1, 0, 0, 0, 0, 0, 0, -1, -2, 1, 0, None, None, None, 0)
    source.index.put(_known(0, b"f", row))
    assert [known.path for known in source.index.by_inode(0, (1 << 64) - 1, (1 << 64) - 2)] == [b"f"]


def test_a_damaged_index_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(b"no database at all" * 500)
    with pytest.raises(IndexDamaged):
        Index(path)
    assert set_aside(path).exists()
    Index(path).close()


async def test_a_damaged_index_is_made_anew(pair: Pair) -> None:
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    await pair.local.stop()
    (index,) = (pair.base / "local-state").rglob("index.db")
    index.write_bytes(b"no database at all" * 500)
    (pair.local_tree / "b").write_text("2")
    pair.local = type(pair.local)(pair.local.config)
    await pair.local.start(None)
    await pair.local.groups["web"].flush(60)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert index.with_name("index.db.damaged").exists()


async def test_a_first_session_looks_at_everything(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    await pair.local.stop()
    (pair.local_tree / "b").write_text("written while nobody watched")
    pair.local = type(pair.local)(pair.local.config)
    group = pair.local.groups["web"]
    await pair.local.start(None)
    while not (group._sender and group._sender.in_step):  # noqa: ASYNC110 - looked at as often as possible
        await asyncio.sleep(0.001)
    # Nothing more is sent; what the replica has accepted by now, it applies.
    await group._stop_source()
    await until((pair.remote_tree / "b").exists, "it was sent before all was in step")


async def test_what_was_taken_is_restored_when_the_rollback_fails(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    item = Dirty(0, b"a", Kind.MODIFIED, 0, 1)
    restored: list[object] = []
    monkeypatch.setattr(sender._dirty, "restore", lambda items: restored.extend(items))

    def broken() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sender, "_rollback", broken)
    sender._works = {Work(item): None}
    with pytest.raises(sqlite3.OperationalError):
        await sender._give_back()
    assert restored == [item]
    monkeypatch.undo()


async def test_a_replicas_entries_are_checked(pair: Pair) -> None:
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    meta = Meta(0o644, 0, 0, 0, 1 << 63, [])
    good = Entry(0, b"a", int(FileKind.FILE), meta, 1, 1, 0, None, None)
    assert sender._known(good).mtime_ns == (1 << 63) - 1
    for path in (b"../a", b"/a", b"a//b"):
        with pytest.raises(ProtocolError):
            sender._known(Entry(0, path, int(FileKind.FILE), meta, 1, 1, 0, None, None))
    with pytest.raises(ProtocolError):
        sender._known(Entry(0, b"a", int(FileKind.FILE), meta, 1 << 63, 1, 0, None, None))


async def test_a_missing_root_empties_no_replica(pair: Pair) -> None:
    (pair.local_tree / "d").mkdir()
    (pair.local_tree / "d" / "f").write_text("precious")
    await pair.own("local", 1)
    group = pair.local.groups["web"]
    await group.flush(60)
    await pair.remote.stop()
    (pair.local_tree / "d" / "f").touch()
    pair.local_tree.rename(pair.base / "away")
    pair.remote = type(pair.remote)(pair.remote.config)
    await pair.remote.start(None)
    with pytest.raises(NotInTime):
        await group.flush(2)
    assert (pair.remote_tree / "d" / "f").read_text() == "precious"


async def test_a_job_is_delivered_where_others_begin_to_wait_for_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, who begins to wait at that moment would wait for ever."""
    threads: list[str] = []
    deliver, transaction = planning.Planner.deliver, planning.Planner.transaction

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name)
            return call(*arguments)

        return noting

    monkeypatch.setattr(planning.Planner, "deliver", noted(deliver))
    monkeypatch.setattr(planning.Planner, "transaction", noted(transaction))
    (pair.local_tree / "large").write_bytes(os.urandom(LARGE))
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    assert len(threads) > 2
    assert len(set(threads)) == 1


def test_what_a_power_cut_may_have_taken_back_is_read_again(source: Source) -> None:
    source.index.begin_boot("one")
    for name in ("old", "same", "taken-back"):
        (source.tree / name).write_bytes(b"new")
    time.sleep(0.03)  # beyond the clock's tick, within which lstat is not believed at all
    source.tell()
    source.tell()
    # Of these the disk has the content that the replica had before, under the times and the size of the new one.
    for name in (b"old", b"taken-back"):
        known = source.index.get(0, name)
        assert known is not None
        assert known.ctime_ns
        source.index.begin()
        source.index.put(replace(known, digest=b"o" * 32, ctime_ns=known.ctime_ns))
        source.index.commit()
    assert source.index.begin_boot("one") == 0
    assert source.tell() == []
    assert source.index.begin_boot("two") == 3
    assert sorted(paths_of(source.tell(), Put)) == [b"old", b"taken-back"]
    assert source.tell() == []
    assert source.index.begin_boot("two") == 0


def test_what_changed_long_before_a_power_cut_is_not_read_again(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.index.begin_boot("one")
    (source.tree / "f").write_bytes(b"x")
    time.sleep(0.03)
    source.tell()
    source.tell()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3600 * 10**9)
    source.index.begin()
    source.index.commit()
    assert source.index.begin_boot("two") == 0


def test_a_time_in_the_future_and_a_clock_that_steps_back_hold_nothing_up(tmp_path: Path) -> None:
    source = Source(tmp_path)
    now = [time.time_ns()]
    root = Root(os.fsencode(source.tree), min_age=1)
    source.planner = Planner(source.index, [root], 1, clock=lambda: now[0])
    (source.tree / "f").write_bytes(b"x")
    now[0] -= 10**18
    sent = source.tell()
    assert [type(each) for each in sent if isinstance(each, Put)] == []
    limit = time.monotonic() + 30
    while not (hints := source.planner.young.due(time.monotonic())):
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert hints == [Hint(0, b"f", Kind.MODIFIED)]
    assert [each.path for each in source.tell(*hints) if isinstance(each, Put)] == [b"f"]
    now[0] += 10**18 + 10**10
    assert [each for each in source.tell() if isinstance(each, Put)] == []


def test_a_file_that_is_left_alone_takes_what_the_replica_has_of_it_along(tmp_path: Path) -> None:
    source = Source(tmp_path)
    (source.tree / "a").write_bytes(b"x" * 100)
    source.tell()
    root = Root(os.fsencode(source.tree), max_size=50)
    source.planner = Planner(source.index, [root], 1)
    (source.tree / "d").mkdir()
    (source.tree / "a").rename(source.tree / "d" / "b")
    sent = source.tell()
    assert [each for each in sent if isinstance(each, Move)] == [Move(0, b"a", b"d/b")]
    assert [type(each) for each in sent if isinstance(each, (MakeDir, Remove, Put))] == [MakeDir]
    assert source.tell() == []
    assert source.planner.left_alone.why(0, b"d/b") is not None
