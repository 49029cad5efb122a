"""What the limits of a path leave alone, and when what is too young is looked at again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filesystems import mounted
from hypothesis import given
from hypothesis import strategies as st

from farshore.fmm import limits
from farshore.fmm.fanotify import FanotifyWatcher, why_not
from farshore.fmm.types import Hint, Kind, Root

SECOND = 10**9
DAY = 86_400 * SECOND
NOW = 1_800_000_000 * SECOND


def verdict(root: Root, size: int = 0, age: float = 0.0, slack: float = 0.0) -> str | None:
    found = limits.excess(root, size, NOW - int(age * SECOND), NOW, int(slack * SECOND))
    return None if found is None else found.text


def test_without_limits_nothing_is_left_alone() -> None:
    assert not limits.is_limited(Root(b"/srv"))
    assert verdict(Root(b"/srv"), 1 << 62, 1e9) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(10**10, "10GB"), (1500 * 10**6, "1500MB"), (2 * 10**12, "2TB"), (64_000, "64kB"), (4096, "4096B")],
)
def test_a_file_of_just_the_limit_is_within_it(size: int, text: str) -> None:
    root = Root(b"/srv", max_size=size)
    assert limits.is_limited(root)
    assert verdict(root, size) is None
    assert verdict(root, size + 1) == f"is larger than max_size {text}"
    assert (limits.too_large(root, size), limits.too_large(root, size + 1)) == (False, True)


def test_ages_are_counted_from_the_modification() -> None:
    young, old = Root(b"/srv", min_age=30), Root(b"/srv", max_age=90 * 86_400)
    assert verdict(young, age=29.9) == "is younger than min_age 30s"
    assert verdict(young, age=30) is None
    assert verdict(young, age=35, slack=10) is not None and verdict(young, age=41, slack=10) is None
    assert verdict(old, age=90 * 86_400) is None
    assert verdict(old, age=90 * 86_400 + 1) == "is older than max_age 90d"


def test_a_time_in_the_future_is_age_0() -> None:
    root = Root(b"/srv", min_age=3600, max_age=7200)
    assert verdict(root, age=-1e9) == "is younger than min_age 1h"
    assert limits.seconds_to_wait(root, NOW + 10**18, NOW) == 3600
    assert limits.seconds_to_wait(root, NOW - 3000 * SECOND, NOW) == 600
    assert limits.seconds_to_wait(root, NOW - 9000 * SECOND, NOW) == 0


def test_a_copy_goes_when_it_was_within_the_limits_as_it_was_made() -> None:
    root = Root(b"/srv", max_size=1000, min_age=60, max_age=86_400)

    def kept(size: int, mtime_ns: int, told_ns: int) -> bool:
        return limits.copy_excess(root, size, mtime_ns, told_ns, NOW) is not None

    assert kept(1001, NOW, NOW) and not kept(1000, NOW - SECOND, 0)
    assert kept(10, NOW - 2 * DAY, 0), "who made it, and when, is not known"
    assert not kept(10, NOW - 2 * DAY, NOW - DAY - SECOND)
    assert kept(10, NOW - 3 * DAY, NOW - DAY)


def test_only_what_was_not_made_from_here_is_never_overwritten() -> None:
    root = Root(b"/srv", max_size=1000)
    assert limits.keeps_listed(root, 1001, made_here=False)
    assert not limits.keeps_listed(root, 1001, made_here=True)
    assert not limits.keeps_listed(root, 1000, made_here=False)


@given(st.integers(0, 10**6 * 86_400), st.integers(-(2**63), 2**63), st.integers(0, 2**62))
def test_nobody_waits_longer_than_the_least_age(least: int, mtime_ns: int, now_ns: int) -> None:
    root = Root(b"/srv", min_age=least)
    assert 0 <= limits.seconds_to_wait(root, mtime_ns, now_ns) <= least


# --- who is too young

ROOT = Root(b"/srv", min_age=30)
STAMP = (1, 2, 3)


def test_what_is_too_young_is_due_when_it_is_old_enough() -> None:
    young = limits.Young([ROOT])
    assert young.next_due() is None
    assert young.must_wait(0, b"a", STAMP, 30.0, 100.0)
    assert young.must_wait(0, b"b", STAMP, 10.0, 100.0)
    assert young.must_wait(0, b"a", STAMP, 30.0, 120.0), "it was seen just so before, and waits no longer"
    assert (young.next_due(), young.due(109.0)) == (110.0, [])
    assert young.due(110.0) == [Hint(0, b"b", Kind.MODIFIED)]
    assert young.is_waiting(0, b"b"), "until it was looked at"
    assert not young.must_wait(0, b"b", STAMP, 30.0, 111.0), "whatever its time says"
    assert not young.is_waiting(0, b"b")
    assert young.due(130.0) == [Hint(0, b"a", Kind.MODIFIED)]
    assert young.next_due() is None


def test_what_changes_meanwhile_waits_anew_and_is_told_of_when_that_never_ends() -> None:
    young = limits.Young([ROOT])
    now = 0.0
    for number in range(40):
        assert young.must_wait(0, b"log", (number, 0, 0), 30.0, now)
        assert young.waits_long(0, b"log", now) is (now > 300)
        now += 10
        young.due(now)
    young.forget(0, b"log")
    assert (young.due(1e9), young.is_waiting(0, b"log")) == ([], False)


def test_what_changed_when_it_was_due_waits_anew() -> None:
    young = limits.Young([ROOT])
    young.must_wait(0, b"a", STAMP, 30.0, 0.0)
    assert len(young.due(30.0)) == 1
    assert young.must_wait(0, b"a", (9, 9, 9), 30.0, 30.0)
    assert (young.due(59.0), len(young.due(60.0))) == ([], 1)


def test_of_too_many_the_whole_root_is_looked_at_again() -> None:
    young = limits.Young([ROOT], most=10)
    for number in range(1000):
        assert young.must_wait(0, b"%d" % number, STAMP, 30.0, 100.0 + number / 1000)
    assert not young.is_waiting(0, b"10")
    found = young.due(131.0)
    assert found.count(Hint(0, b"", Kind.RESCAN)) == 1 and len(found) == 11
    assert young.due(1e9) == []


def test_the_queue_does_not_grow_with_what_changes_all_the_time() -> None:
    young = limits.Young([ROOT])
    for number in range(20_000):
        young.must_wait(0, b"log", (number, 0, 0), 30.0, number / 100)
    assert len(young._queue) < 3000


# --- what is left alone


def test_what_is_left_alone_is_counted_by_reason() -> None:
    left = limits.LeftAlone(most=5)
    for number in range(8):
        left.note(0, b"d/%d" % number, "large")
    left.note(0, b"old", "old")
    assert sorted(left.counts()) == [("large", 5, (0, b"d/0"), True), ("old", 0, None, True)]
    assert left.why(0, b"d/3") == "large"
    left.note(0, b"d/0", None)
    left.forget_more()
    assert left.counts() == [("large", 4, (0, b"d/1"), False)]
    left.note(0, b"dd", "large")
    left.note(1, b"d/1", "large")  # beyond the most
    left.forget_below(0, b"d")
    assert left.counts() == [("large", 1, (0, b"dd"), True)]


# --- other filesystems


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Path]:
    """Another filesystem, in memory, in a root."""
    place = tmp_path / "root" / "deep" / "mnt"
    place.mkdir(parents=True)
    with mounted(place):
        yield place


def test_a_mount_point_and_what_is_below_it_lie_on_another_filesystem(another: Path, tmp_path: Path) -> None:
    (another / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    for path in (tmp_path / "root", tmp_path / "link"):
        found = limits.Boundaries([Root(os.fsencode(path), one_filesystem=True)])
        for _ in range(2):  # the second time, it knows
            assert found.mount_of(0, b"") is found.mount_of(0, b"deep") is found.mount_of(0, b"deep/none") is None
            for below in (b"deep/mnt", b"deep/mnt/a/b", b"deep/mnt/a"):
                assert found.mount_of(0, below) == b"deep/mnt"
    plain = limits.Boundaries([Root(os.fsencode(tmp_path / "root"))])
    assert plain.mount_of(0, b"deep/mnt") is None


def test_what_was_mounted_since_is_seen_after_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    found = limits.Boundaries([Root(os.fsencode(tmp_path), one_filesystem=True)])
    assert found.mount_of(0, b"d") is None
    look = os.lstat

    def elsewhere(path: bytes) -> os.stat_result:
        status = look(path)
        return os.stat_result((*status[:2], status.st_dev + 1, *status[3:]))

    monkeypatch.setattr(os, "lstat", elsewhere)
    assert found.mount_of(0, b"d") is None
    found.forget()
    assert found.mount_of(0, b"d") == b"d"


@pytest.mark.parametrize("one", [True, False])
def test_fanotify_tells_of_another_filesystem_only_where_it_is_protected(
    another: Path, tmp_path: Path, one: bool
) -> None:
    root = Root(os.fsencode(tmp_path / "root"), one_filesystem=one)
    if reason := why_not([root]):
        pytest.skip(reason)
    watcher = FanotifyWatcher([root])
    try:
        watcher.start()
        (tmp_path / "root" / "deep" / "f").write_text("x")
        (another / "g").write_text("x")
        seen = {hint.path for hint in watcher.drain()}
        assert b"deep/f" in seen and (b"deep/mnt/g" in seen) is not one
        assert watcher.problems() == ()
    finally:
        watcher.close()


def test_fanotify_tells_of_what_is_bound_from_the_same_filesystem(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    root = Root(os.fsencode(tmp_path / "root"), one_filesystem=True)
    (tmp_path / "root" / "bound").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    if reason := why_not([root]):
        pytest.skip(reason)
    with mounted(tmp_path / "root" / "bound", "--bind", str(tmp_path / "other")):
        watcher = FanotifyWatcher([root])
        try:
            watcher.start()
            (tmp_path / "root" / "bound" / "f").write_text("x")
            assert b"bound/f" in {hint.path for hint in watcher.drain()}
        finally:
            watcher.close()
