"""The history of a replica: every state can be gone back to, and ageing loses nothing that it should keep."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import differences

from farshore.config import History as Retention
from farshore.dbm import wire
from farshore.dbm.messages import Link, MakeDir, MakeNode, MakeSymlink, Meta, Move, Operation, Put, Remove, SetMeta
from farshore.dbm.replica.commit import Applier, Transaction
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.undo import Kept
from farshore.dbm.replica.view import Progress, copy_out
from farshore.fmm.types import FileKind, Root

SECOND = 10**9


def meta(chance: random.Random, directory: bool = False) -> Meta:
    xattrs = [(b"user.k", b"%d" % chance.randrange(9))] if chance.random() < 0.2 else []
    times = chance.randrange(10**18), chance.randrange(10**18)
    return Meta(
        chance.choice([0o755, 0o700] if directory else [0o644, 0o600]), os.getuid(), os.getgid(), *times, xattrs
    )


class Past:
    """A replica that is told random transactions, and copies of its tree after each of them."""

    def __init__(self, base: Path, seed: int, retention: Retention | None = None) -> None:
        self.base = base
        self.chance = random.Random(seed)
        self.now = 1_700_000_000 * SECOND
        self.retention = retention or Retention()
        self.root = base / "root"
        self.root.mkdir(parents=True)
        (base / "state").mkdir()
        self.seq = 0
        self.copies: dict[int, Path] = {}
        self.times: dict[int, int] = {}
        self.open()
        self.note()

    def open(self) -> None:
        self.applier = Applier(
            [("root", Root(os.fsencode(self.root)))], self.base / "state", self.retention, lambda: self.now
        )

    def note(self) -> None:
        """Remember how the tree is now."""
        copy = self.base / f"copy-{self.seq}"
        os.system(f"cp -a '{self.root}' '{copy}'")
        self.copies[self.seq] = copy
        self.times[self.seq] = self.now

    def tell(self, *operations: Operation) -> None:
        """A transaction, which is applied."""
        self.seq += 1
        transaction = Transaction(self.seq, 1)
        for operation in operations:
            transaction.operations.append((operation, None))
            transaction.bodies.append(wire.frame(operation)[4:])
        self.applier.accept([transaction])
        self.applier.work()
        assert self.applier.stalled == ""
        assert self.applier.applied == self.seq

    def paths(self, *, directories: bool) -> list[bytes]:
        found = []
        for where, names, files in os.walk(os.fsencode(self.root)):
            for name in names if directories else files:
                path = os.path.relpath(os.path.join(where, name), os.fsencode(self.root))
                if not directories or not os.path.islink(os.path.join(where, name)):
                    found.append(path)
        return sorted(found)

    def operation(self) -> Operation | None:
        """Something that the tree allows now."""
        chance = self.chance
        directories, files = self.paths(directories=True), self.paths(directories=False)
        above = chance.choice([b"", *directories])
        new = (above + b"/" if above else b"") + b"n%d" % chance.randrange(6)
        is_directory = new in directories
        match chance.randrange(9):
            case 0 | 1:
                return None if is_directory else Put(0, new, meta(chance), chance.randbytes(chance.randrange(50)))
            case 2:
                return None if new in files else MakeDir(0, new, meta(chance, True))
            case 3:
                gone = chance.choice([None, *files, *directories])
                return None if gone is None else Remove(0, gone)
            case 4:
                what = chance.choice([None, *files, *directories])
                if what is None or new == what or new.startswith(what + b"/") or what.startswith(new + b"/"):
                    return None
                return None if is_directory or (new in files and what in directories) else Move(0, what, new)
            case 5:
                changed = chance.choice([None, *files])
                if changed is None or os.path.islink(os.path.join(os.fsencode(self.root), changed)):
                    return None
                return SetMeta(0, changed, meta(chance))
            case 6:
                changed = chance.choice([b"", *directories])
                return SetMeta(0, changed, meta(chance, True))
            case 7:
                other = chance.choice([None, *files])
                return None if other is None or other == new or is_directory else Link(0, new, other)
            case _:
                if is_directory:
                    return None
                if chance.random() < 0.5:
                    return MakeSymlink(0, new, Meta(0o777, os.getuid(), os.getgid(), 5, chance.randrange(99), []), b"x")
                return MakeNode(0, new, meta(chance), int(FileKind.FIFO), 0)

    def step(self) -> None:
        """A transaction of a few operations that don't meet, as a source would send."""
        first = self.operation()
        if first is None:
            return
        self.tell(first)
        self.note()

    def restored(self, seq: int) -> Path:
        """The state after ``seq``, in a place of its own."""
        target = self.base / "restored"
        shutil.rmtree(target, ignore_errors=True)
        progress = Progress()
        copy_out(self.applier.view(0, seq), b"", os.fsencode(target), progress)
        assert progress.missing == []
        return target

    def check(self, seq: int) -> None:
        """The state after ``seq`` is what it was."""
        assert differences(self.copies[seq], self.restored(seq)) == []

    def close(self) -> None:
        self.applier.close()


@pytest.fixture
def base() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="farshore-history-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_every_state_can_be_gone_back_to(seed: int) -> None:
    base = Path(tempfile.mkdtemp(prefix="farshore-history-"))
    past = Past(base, seed)
    try:
        for _ in range(25):
            past.step()
        for seq in reversed(past.copies):
            past.check(seq)
        past.close()
        past.open()
        for seq in past.copies:
            past.check(seq)
    finally:
        past.close()
        shutil.rmtree(base)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_ageing_keeps_a_state_for_each_hour_and_day(seed: int) -> None:
    base = Path(tempfile.mkdtemp(prefix="farshore-history-"))
    past = Past(base, seed, Retention("1h", "1d", "10d", "90%"))
    try:
        for _ in range(40):
            past.step()
            past.now += past.chance.choice([60, 700, 3600, 30_000]) * SECOND
            past.applier.checkpoint()
            if past.chance.random() < 0.3:
                past.applier.history.thin()
        past.applier.history.thin()
        history = past.applier.history
        whole = [chapter for chapter in history.chapters if not chapter.merged]
        for chapter in history.chapters:
            if chapter.first - 1 in past.copies:
                past.check(chapter.first - 1)
        for chapter in whole:
            for seq in range(chapter.first, chapter.last + 1):
                if seq in past.copies:
                    past.check(seq)
        kept = list((base / "state" / "0" / "stage").glob("h*/*"))
        entries = [entry for each in history.chapters for step in history.steps(each) for entry in step.entries]
        assert len(kept) == sum(isinstance(entry, Kept) for entry in entries)
    finally:
        past.close()
        shutil.rmtree(base)


def test_a_time_names_the_state_that_was_there_then(base: Path) -> None:
    past = Past(base, 1)
    for number in range(5):
        past.now += 10 * SECOND
        past.tell(Put(0, b"f", meta(past.chance), b"%d" % number))
        past.note()
    history = past.applier.history
    for seq in range(1, 6):
        assert history.at_time(past.times[seq], 5) == seq
        assert history.at_time(past.times[seq] + 5 * SECOND, 5) == seq
    with pytest.raises(NotRemembered, match="reaches back to"):
        history.at_time(past.times[1] - 60 * SECOND, 5)
    with pytest.raises(NotRemembered, match="no transaction 9"):
        past.applier.view(0, 9)
    assert [type(entry).__name__ for _, entry in history.versions(0, b"f")] == ["Kept"] * 4 + ["Absent"]
    past.close()


def test_a_lack_of_space_takes_the_oldest(base: Path) -> None:
    past = Past(base, 1, Retention(space="1MB"))
    for number in range(12):
        past.now += 700 * SECOND
        past.tell(Put(0, b"f%d" % (number % 2), meta(past.chance), os.urandom(200_000)))
        past.note()
        past.applier.history.thin()
    history = past.applier.history
    assert 0 < history.kept <= 10**6
    assert history.chapters[0].first > 1
    past.check(11)
    with pytest.raises(NotRemembered, match="reaches back to transaction"):
        past.applier.view(0, 1)
    past.close()


def test_without_a_history_nothing_is_kept(base: Path) -> None:
    past = Past(base, 1, Retention("0", "0", "0"))
    past.tell(Put(0, b"f", meta(past.chance), b"1"))
    past.tell(Put(0, b"f", meta(past.chance), b"2"))
    past.tell(Remove(0, b"f"))
    past.applier.checkpoint()
    assert list((base / "state" / "0" / "stage").iterdir()) == []
    assert past.applier.history.chapters == []
    past.close()


def test_a_damaged_history_is_told_and_stops_nothing(base: Path) -> None:
    past = Past(base, 1)
    for number in range(3):
        past.tell(Put(0, b"f", meta(past.chance), b"%d" % number))
    past.close()
    (log,) = (base / "state" / "history").iterdir()
    data = bytearray(log.read_bytes())
    data[40] ^= 1
    log.write_bytes(data)
    past.open()
    assert "damaged" in past.applier.history.problem
    past.tell(Put(0, b"f", meta(past.chance), b"4"))
    assert (past.root / "f").read_bytes() == b"4"
    past.close()


def test_holes_and_large_contents_come_back(base: Path) -> None:
    past = Past(base, 1)
    (past.root / "sparse").write_bytes(b"x")
    os.truncate(past.root / "sparse", 64 << 20)
    past.note()
    past.tell(Remove(0, b"sparse"))
    restored = past.restored(0) / "sparse"
    assert restored.stat().st_size == 64 << 20
    assert restored.stat().st_blocks * 512 < 1 << 20
    assert restored.read_bytes()[:2] == b"x\0"
    past.close()
