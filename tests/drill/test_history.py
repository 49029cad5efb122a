"""What users were promised, and what the figures make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from farshore_drill import history, timeline
from farshore_drill.history import Attempt, Figures, History


class Past:
    """A history in the making; each entry ends at ``at`` and took 10 ms."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []

    def put(self, at: float, doc: int, version: int, by: str, status: int = 201) -> Past:
        sha = f"{doc}.{version}"
        self.attempts.append(Attempt("put", doc, version, at - 0.01, at, 1000 + at, status, by, sha=sha))
        return self

    def get(self, at: float, doc: int, version: int, by: str, why: str = "read", whole: bool = True) -> Past:
        status, sha = (200, f"{doc}.{version}") if version else (404, "")
        attempt = Attempt("get", doc, version, at - 0.01, at, 1000 + at, status, by, why, sha, whole)
        self.attempts.append(attempt)
        return self

    def nothing(self, began: float, at: float) -> Past:
        self.attempts.append(Attempt("put", 99, None, began, at, 1000 + at, 0, ""))
        return self

    def figures(self) -> Figures:
        ordered = sorted(self.attempts, key=lambda attempt: attempt.ended)
        return history.measure(History(ordered, "m", True, True), "web1", "bak1")


def disaster() -> Past:
    """web1 answers until 10.0 and is dead; bak1 answers from 13.0 to 20.0; web1 again from 20.5."""
    past = Past().put(1, 1, 1, "web1").put(9.5, 2, 1, "web1").put(10, 3, 1, "web1")
    past.nothing(10.2, 11.2)
    past.put(13, 4, 1, "bak1")
    return past


def end(past: Past, **found: int) -> Past:
    past.put(20, 5, 1, "bak1").put(20.5, 6, 1, "web1")
    for doc in range(1, 7):
        past.get(30 + doc, doc, found.get(f"d{doc}", 1), "web1", why="verify")
    return past


def test_nothing_is_lost_when_the_backup_had_everything() -> None:
    past = disaster().get(14, 1, 1, "bak1", "audit").get(14.1, 2, 1, "bak1", "audit").get(14.2, 3, 1, "bak1", "audit")
    figures = end(past).figures()
    assert figures.rto_seconds == pytest.approx(3.0)
    assert figures.rpo_seconds == 0
    assert figures.failback_pause_seconds == pytest.approx(7.0)
    assert figures.user_writes_lost_at_switch == 0
    assert figures.user_writes_lost_after_failback == 0
    assert (figures.user_writes_before, figures.user_writes_away, figures.user_writes_after) == (3, 2, 1)
    assert figures.user_documents_verified == 6


def test_a_write_that_the_backup_did_not_have_is_lost_at_the_switch_and_only_there() -> None:
    past = disaster().get(14, 1, 1, "bak1").get(14.1, 2, 0, "bak1").get(14.2, 3, 0, "bak1")
    figures = end(past, d2=0, d3=0).figures()
    assert figures.user_writes_lost_at_switch == 2
    # The oldest of them was acknowledged at 9.5; the first request without an answer was sent at 10.2.
    assert figures.rpo_seconds == pytest.approx(0.7)
    assert figures.user_writes_lost_after_failback == 0


def test_a_damaged_document_does_not_hold_the_write() -> None:
    past = disaster().get(14, 1, 1, "bak1", whole=False)
    assert past.figures().user_writes_lost_at_switch == 1


def test_what_was_there_counts_as_it_was_before_users_wrote_there() -> None:
    past = disaster().get(14, 2, 0, "bak1").put(14.1, 2, 2, "bak1").get(15, 2, 2, "bak1", "audit")
    assert past.figures().user_writes_lost_at_switch == 1


def test_a_document_that_was_written_unread_is_unknown_and_not_called_safe() -> None:
    past = disaster().put(14.1, 2, 2, "bak1").get(15, 2, 2, "bak1", "audit").get(15, 1, 1, "bak1").get(15, 3, 1, "bak1")
    figures = past.figures()
    assert figures.user_writes_unobserved_at_switch == 1
    assert figures.user_writes_lost_at_switch == 0


@pytest.mark.parametrize(
    ("found", "lost"),
    [({"d4": 0}, 1), ({"d5": 0, "d6": 0}, 2), ({"d1": 0}, 1), ({}, 0)],
)
def test_what_is_missing_at_the_end_is_counted(found: dict[str, int], lost: int) -> None:
    past = disaster().get(14, 1, 1, "bak1").get(14, 2, 1, "bak1").get(14, 3, 1, "bak1")
    assert end(past, **found).figures().user_writes_lost_after_failback == lost


def test_an_older_version_at_the_end_is_a_lost_write() -> None:
    past = disaster().get(14, 1, 1, "bak1").put(15, 1, 2, "bak1").put(16, 1, 3, "bak1")
    assert end(past).figures().user_writes_lost_after_failback == 2


def test_a_later_version_at_the_end_is_a_write_whose_answer_got_lost() -> None:
    past = disaster().get(14, 1, 1, "bak1").put(15, 1, 2, "bak1", status=0)
    assert end(past, d1=2).figures().user_writes_lost_after_failback == 0


def test_content_that_nobody_wrote_is_a_lost_write() -> None:
    past = end(disaster().get(14, 1, 1, "bak1"))
    past.attempts[-1] = replace(past.attempts[-1], sha="something else")
    assert past.figures().user_writes_lost_after_failback == 1


def test_a_document_that_could_not_be_read_at_the_end_is_not_called_safe() -> None:
    past = end(disaster())
    past.attempts.pop()
    assert past.figures().user_writes_lost_after_failback == 1


def test_without_a_switch_nothing_is_measured() -> None:
    figures = Past().put(1, 1, 1, "web1").nothing(2, 3).figures()
    assert (figures.rto_seconds, figures.rpo_seconds, figures.failback_pause_seconds) == (None, None, None)
    assert figures.user_requests_unanswered == 1


def lines() -> Iterator[str]:
    yield json.dumps({"k": "meta", "mono": 0, "w": 1000, "url": "u", "marker": "m", "writes": True})
    yield json.dumps({"k": "put", "d": 1, "v": 1, "s": 201, "by": "web1", "t0": 1, "t1": 1.1, "w": 1001, "sha": "x"})
    yield '{"k": "put", "d": 2, "v"'


def test_a_history_that_was_cut_off_is_read_and_known_as_incomplete() -> None:
    past = history.load(lines())
    assert len(past.attempts) == 1
    assert not past.complete
    assert past.marker == "m"


def test_the_timeline_counts_each_request_once_and_leaves_the_drills_own_readings_out() -> None:
    past = end(disaster().get(14, 1, 1, "bak1", "audit"))
    line = timeline.bins(History(past.attempts, "m", True, True), "web1", "bak1")
    assert line is not None
    assert (sum(line["local"]), sum(line["backup"]), sum(line["failed"])) == (4, 2, 1)
    assert line["start"] == pytest.approx(1000.99)
