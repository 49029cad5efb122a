"""The history of a replica: every state can be gone back to, and ageing loses nothing that it should keep."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pasts import SECOND, Past, random_meta

from farshore.config import History as Retention
from farshore.dbm.messages import Put, Remove
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.undo import Kept


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
@example(seed=38)  # A file is moved into a directory that goes, and both are of one day.
@example(seed=8198)
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
        past.tell(Put(0, b"f", random_meta(past.chance), b"%d" % number))
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
        past.tell(Put(0, b"f%d" % (number % 2), random_meta(past.chance), os.urandom(200_000)))
        past.note()
        past.applier.checkpoint()
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
    past.tell(Put(0, b"f", random_meta(past.chance), b"1"))
    past.tell(Put(0, b"f", random_meta(past.chance), b"2"))
    past.tell(Remove(0, b"f"))
    past.applier.checkpoint()
    assert list((base / "state" / "0" / "stage").iterdir()) == []
    assert past.applier.history.chapters == []
    past.close()


def test_a_damaged_history_is_told_and_stops_nothing(base: Path) -> None:
    past = Past(base, 1)
    for number in range(3):
        past.tell(Put(0, b"f", random_meta(past.chance), b"%d" % number))
    past.close()
    (log,) = (base / "state" / "history").iterdir()
    data = bytearray(log.read_bytes())
    data[40] ^= 1
    log.write_bytes(data)
    past.open()
    assert "damaged" in past.applier.history.problem
    past.tell(Put(0, b"f", random_meta(past.chance), b"4"))
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
