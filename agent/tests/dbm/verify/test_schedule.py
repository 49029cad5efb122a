"""When a verification begins by itself."""

from __future__ import annotations

from datetime import datetime

from farshore.config import Verification
from farshore.dbm.verify.schedule import AGAIN, PERIODS, may_start, next_run

WEEK = PERIODS["week"]


def test_never_is_never() -> None:
    assert next_run(Verification("never"), "web", 0.0, 5.0, False) is None
    assert not may_start(Verification("never"), None, 1e12, datetime(2026, 1, 1))


def test_it_follows_the_last_one() -> None:
    assert next_run(Verification(), "web", 0.0, 1e9, False) == 1e9 + WEEK
    assert next_run(Verification(), "web", 0.0, 1e9, True) == 1e9 + AGAIN
    assert next_run(Verification("day"), "web", 0.0, 1e9, False) == 1e9 + WEEK / 7


def test_the_first_ones_are_spread_over_the_period() -> None:
    first = [next_run(Verification(), f"group{number}", 1e9, None, False) for number in range(50)]
    assert all(due is not None and 1e9 + WEEK / 10 <= due <= 1e9 + WEEK for due in first)
    assert len({round((due or 0) / 3600) for due in first}) > 20
    assert first == [next_run(Verification(), f"group{number}", 1e9, None, False) for number in range(50)]


def test_it_waits_for_its_window() -> None:
    night = Verification(days="sat", start="22:00", end="06:00")
    saturday, sunday, friday = (datetime(2026, 11, day, hour) for day, hour in ((28, 23), (29, 5), (27, 23)))
    assert may_start(night, 100.0, 100.0, saturday)
    assert may_start(night, 100.0, 100.0, sunday)
    assert not may_start(night, 100.0, 99.0, saturday)
    assert not may_start(night, 100.0, 100.0, friday)
