"""The watcher's thread: what it tells of itself, whatever watchers fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from farshore.errors import FarshoreError
from farshore.fmm.dirty import DirtySet
from farshore.fmm.errors import WatchError
from farshore.fmm.feed import Feed
from farshore.fmm.types import Counts, Hint


class Scripted:
    """A watcher that sees five events and one overflow, and fails when it is told to."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.fail = threading.Event()
        self._woken = threading.Event()
        self._counts = Counts("scripted")

    def start(self) -> Sequence[Hint]:
        self._counts = Counts("scripted", directories=self.number, overflows=1, events=5)
        return ()

    def read(self, timeout: float) -> Sequence[Hint]:
        self._woken.wait(timeout)
        self._woken.clear()
        if self.fail.is_set():
            raise WatchError(b"/srv", "it is gone")
        return ()

    def drain(self) -> Sequence[Hint]:
        return ()

    def pause(self) -> None:
        pass

    def resume(self) -> Sequence[Hint]:
        return ()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        pass

    def problems(self) -> Sequence[str]:
        return ()

    def counts(self) -> Counts:
        return self._counts


@pytest.fixture
def made() -> list[Scripted]:
    return []


@pytest.fixture
def feed(made: list[Scripted]) -> Iterator[Feed]:
    def make() -> Scripted:
        made.append(Scripted(len(made) + 1))
        return made[-1]

    running = Feed(make, DirtySet(), lambda: None)
    yield running
    running.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_counts_go_on_when_a_watcher_fails(feed: Feed, made: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farshore.fmm.feed._RETRY_SECONDS", 0.05)
    assert feed.counts() == Counts("starting") and feed.problems() == []
    feed.start()
    until(lambda: feed.watching)
    assert feed.counts() == Counts("scripted", 1, 0, 1, 5)
    assert not feed.failed
    made[0].fail.set()
    made[0].wake()
    until(lambda: len(made) == 2 and feed.watching)
    assert feed.counts() == Counts("scripted", 2, 0, 2, 10)
    assert not feed.failed


def test_a_watcher_that_fails_is_told_of(feed: Feed, made: list[Scripted]) -> None:
    feed.start()
    until(lambda: feed.watching)
    made[0].fail.set()
    made[0].wake()
    until(lambda: feed.failed)
    assert not feed.watching
    assert feed.problems() == ["Cannot watch /srv: it is gone"]


def test_that_it_began_is_told_once(feed: Feed, made: list[Scripted]) -> None:
    assert not feed.began.done()
    feed.start()
    feed.began.result(60)
    assert feed.watching
    made[0].fail.set()
    made[0].wake()
    until(lambda: feed.failed)
    assert feed.began.done()


def test_that_it_cannot_begin_is_told() -> None:
    def make() -> Scripted:
        raise OSError(24, "Too many open files")

    feed = Feed(make, DirtySet(), lambda: None)
    try:
        feed.start()
        feed.began.result(60)
        until(lambda: feed.failed)
    finally:
        feed.close()


def test_a_watcher_that_cannot_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farshore.fmm.feed._RETRY_SECONDS", 0.05)
    made: list[Scripted] = []
    short = threading.Event()
    callers: set[str] = set()

    def make() -> Scripted:
        callers.add(threading.current_thread().name)
        if short.is_set():
            raise OSError(24, "Too many open files")
        made.append(Scripted(len(made) + 1))
        return made[-1]

    feed = Feed(make, DirtySet(), lambda: None)
    try:
        feed.start()
        until(lambda: feed.watching)
        short.set()
        made[0].fail.set()
        made[0].wake()
        until(lambda: "Too many open files" in "".join(feed.problems()))
        assert feed.failed and not feed.watching
        short.clear()
        until(lambda: feed.watching)
        assert feed.barrier().result(60) == 1
        assert feed.problems() == [] and feed.counts() == Counts("scripted", 2, 0, 2, 10)
        assert callers == {"fmm"}
    finally:
        feed.close()


def test_requests_made_while_the_watcher_starts_are_answered(feed: Feed) -> None:
    answer = feed.barrier()
    feed.start()
    assert answer.result(60) == 1
    feed.close()
    with pytest.raises(FarshoreError, match="has ended"):
        feed.barrier().result(60)
