"""The dirty set: nothing is lost, and age and order are right."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farshore.fmm import Dirty, DirtySet, Hint, Kind
from farshore.fmm.dirty import MOST_INODES, Wait


def hint(path: bytes, kind: Kind = Kind.MODIFIED, root: int = 0) -> Hint:
    return Hint(root, path, kind)


def test_coalesces_and_keeps_the_first_age() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"a", Kind.CREATED)], 1.0)
    dirty.mark([hint(b"b"), hint(b"a", Kind.MODIFIED)], 2.0)
    dirty.mark([hint(b"a", Kind.MODIFIED, root=1)], 3.0)
    assert dirty.count() == 3
    assert dirty.oldest() == 1.0
    first, second, third = dirty.take(10)
    assert (first.path, first.kind, first.since) == (b"a", Kind.CREATED | Kind.MODIFIED, 1.0)
    assert (second.path, second.since) == (b"b", 2.0)
    assert (third.root, third.since) == (1, 3.0)
    assert first.mark_no < second.mark_no < third.mark_no < dirty.next_mark()


def test_the_files_behind_a_name_are_remembered() -> None:
    dirty = DirtySet()
    dirty.mark([Hint(0, b"a", Kind.CREATED, (1, 10)), hint(b"b")], 1.0)
    dirty.mark([hint(b"a"), Hint(0, b"a", Kind.MODIFIED, (1, 11))], 2.0)
    first, second = dirty.take(10)
    assert (first.inodes, second.inodes) == ({(1, 10), (1, 11)}, frozenset())
    dirty.mark([Hint(0, b"a", Kind.CREATED, (1, 12))], 3.0)
    dirty.restore([first, second])
    assert {item.path: len(item.inodes) for item in dirty.take(10)} == {b"a": 3, b"b": 0}


def test_too_many_files_behind_a_name_put_all_in_doubt() -> None:
    dirty = DirtySet()
    dirty.mark([Hint(2, b"a", Kind.CREATED, (1, number)) for number in range(MOST_INODES)], 1.0)
    assert dirty.count() == 1
    dirty.mark([Hint(2, b"a", Kind.CREATED, (1, 100))], 2.0)
    above, item = dirty.take(10)
    assert (above.root, above.path, above.kind, above.since) == (2, b"", Kind.RESCAN, 2.0)
    assert (item.path, item.since, item.inodes) == (b"a", 1.0, frozenset())


def test_what_is_in_flight_still_counts_until_it_is_settled() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"a")], 1.0)
    taken = dirty.take(1)
    assert dirty.take(1) == []
    assert (dirty.count(), dirty.oldest(), dirty.lowest_mark()) == (1, 1.0, taken[0].mark_no)
    dirty.mark([hint(b"a")], 5.0)
    assert dirty.count() == 2
    dirty.settle(taken)
    assert (dirty.count(), dirty.oldest()) == (1, 5.0)
    dirty.settle(taken)
    assert dirty.count() == 1
    dirty.settle(dirty.take(1))
    assert (dirty.count(), dirty.oldest(), dirty.lowest_mark()) == (0, None, None)


def test_restore_keeps_the_older_age() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"a", Kind.CREATED)], 1.0)
    taken = dirty.take(1)
    dirty.mark([hint(b"b")], 2.0)
    dirty.mark([hint(b"a", Kind.ATTRIBUTES)], 3.0)
    dirty.restore(taken)
    dirty.restore(taken)
    assert dirty.count() == 2
    again = dirty.take(10)
    assert again[0] == Dirty(0, b"a", Kind.CREATED | Kind.ATTRIBUTES, 1.0, taken[0].mark_no)
    assert again[1].path == b"b"


def test_a_barrier_is_passed_when_all_before_it_is_settled() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"a"), hint(b"b")], 1.0)
    barrier = dirty.next_mark()
    (first,) = dirty.take(1)
    dirty.mark([hint(b"a"), hint(b"c")], 2.0)
    dirty.settle([first])
    lowest = dirty.lowest_mark()
    assert lowest is not None
    assert lowest < barrier
    dirty.settle(dirty.take(1))
    lowest = dirty.lowest_mark()
    assert lowest is not None
    assert lowest >= barrier
    assert dirty.count() == 2


def test_what_waits_and_what_is_in_flight_is_held() -> None:
    dirty = DirtySet()
    asked = [(0, b"a"), (0, b"a/x"), (0, b"b"), (0, b"b/y/z"), (0, b"bc"), (1, b"a"), (0, b"")]
    assert dirty.held(asked) == set()
    dirty.mark([hint(b"a", Kind.ATTRIBUTES), hint(b"b", Kind.RESCAN | Kind.CREATED)], 1.0)
    held = {(0, b"a"), (0, b"b"), (0, b"b/y/z")}
    assert dirty.held(asked) == held
    taken = dirty.take(10)
    assert dirty.held(asked) == held
    dirty.mark([hint(b"", Kind.RESCAN, root=1)], 2.0)
    assert dirty.held(asked) == held | {(1, b"a")}
    dirty.settle(taken)
    assert dirty.held(asked) == {(1, b"a")}


def test_dirty_ancestors_come_first() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"d/e/f"), hint(b"x"), hint(b"d"), hint(b""), hint(b"d", root=1)], 1.0)
    assert [(d.root, d.path) for d in dirty.take(4)] == [(0, b""), (0, b"d"), (0, b"d/e/f"), (0, b"x")]
    assert [(d.root, d.path) for d in dirty.take(4)] == [(1, b"d")]


def test_the_oldest_is_never_starved_by_its_ancestors() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"d/f"), hint(b"d"), hint(b"")], 1.0)
    assert [d.path for d in dirty.take(1)] == [b"", b"d", b"d/f"]


def test_an_earlier_time_is_taken_as_the_latest_known() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"a")], 5.0)
    dirty.mark([hint(b"b")], 4.0)
    assert [d.since for d in dirty.take(2)] == [5.0, 5.0]


def test_wait_sees_marks_of_another_thread() -> None:
    dirty = DirtySet()
    assert not dirty.wait(0)
    marker = threading.Thread(target=dirty.mark, args=([hint(b"a")], 1.0))
    marker.start()
    assert dirty.wait(60)
    marker.join()
    dirty.settle(dirty.take(1))
    assert not dirty.wait(0)


def test_restored_wakes_waiters() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"a")], 1.0)
    taken = dirty.take(1)
    assert not dirty.wait(0)
    dirty.restore(taken)
    assert dirty.wait(0)


def test_endless_failures_do_not_pile_up() -> None:
    dirty = DirtySet()
    dirty.mark([hint(b"stuck/x"), hint(b"stuck")], 0.0)
    for n in range(5000):
        dirty.mark([hint(b"%d" % n)], 1.0)
        taken = dirty.take(10)
        dirty.restore(taken[:2])
        dirty.settle(taken[2:])
    assert len(dirty._queue) < 5000
    assert len(dirty._order) < 5000
    assert dirty.oldest() == 0.0


def test_many_threads_lose_nothing() -> None:
    dirty = DirtySet()
    settled: set[bytes] = set()
    lock = threading.Lock()
    done = threading.Event()

    def produce(name: bytes) -> None:
        for n in range(500):
            dirty.mark([hint(b"%s%d" % (name, n))], float(n))

    def consume() -> None:
        turn = 0
        while dirty.wait(0.01) or not done.is_set():
            taken = dirty.take(7)
            turn += 1
            if turn % 3 == 0:
                dirty.restore(taken)
            else:
                dirty.settle(taken)
                with lock:
                    settled.update(d.path for d in taken)

    producers = [threading.Thread(target=produce, args=(name,)) for name in (b"a", b"b", b"c")]
    consumers = [threading.Thread(target=consume) for _ in range(2)]
    for thread in producers + consumers:
        thread.start()
    for thread in producers:
        thread.join()
    done.set()
    for thread in consumers:
        thread.join()
    assert len(settled) == 1500
    assert dirty.count() == 0


paths = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3).map(b"/".join)
keys = st.tuples(st.integers(0, 1), paths)


class Model(RuleBasedStateMachine):
    """Against a slow and plain model: per path the marks that are not yet settled."""

    def __init__(self) -> None:
        super().__init__()
        self.dirty = DirtySet()
        self.now = 0.0
        self.waiting: dict[tuple[int, bytes], Dirty] = {}
        self.flight: list[list[Dirty]] = []

    @rule(keys=st.lists(keys, max_size=5), kind=st.sampled_from(list(Kind)), step=st.integers(0, 2))
    def mark(self, keys: list[tuple[int, bytes]], kind: Kind, step: int) -> None:
        self.now += step
        number = self.dirty.next_mark()
        self.dirty.mark([Hint(root, path, kind) for root, path in keys], self.now)
        for offset, key in enumerate(keys):
            old = self.waiting.get(key) or Dirty(*key, kind, self.now, number + offset)
            self.waiting[key] = Dirty(*key, old.kind | kind, old.since, old.mark_no)

    @rule(limit=st.integers(1, 6))
    def take(self, limit: int) -> None:
        taken = self.dirty.take(limit)
        assert bool(taken) == bool(self.waiting)
        if not taken:
            return
        oldest = min(self.waiting.values(), key=lambda d: d.mark_no)
        assert oldest in taken
        first = taken.index(oldest) + 1
        assert len(taken) <= max(limit, first)
        for at, item in enumerate(taken):
            assert self.waiting.pop((item.root, item.path)) == item
            for other in taken[at + 1 :]:
                assert not (other.root == item.root and item.path and (item.path + b"/").startswith(other.path + b"/"))
                assert not (other.root == item.root and not other.path), "the root comes before all"
        for item in taken:
            for root, path in self.waiting:
                assert not (root == item.root and path != item.path and (item.path + b"/").startswith(path + b"/"))
        self.flight.append(taken)

    @precondition(lambda self: self.flight)
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        self.dirty.settle(self.flight.pop(data.draw(st.integers(0, len(self.flight) - 1))))

    @precondition(lambda self: self.flight)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        items = self.flight.pop(data.draw(st.integers(0, len(self.flight) - 1)))
        self.dirty.restore(items)
        for item in items:
            key = (item.root, item.path)
            new = self.waiting.get(key, item)
            self.waiting[key] = Dirty(
                *key, new.kind | item.kind, min(new.since, item.since), min(new.mark_no, item.mark_no)
            )

    @invariant()
    def agrees(self) -> None:
        alive = [*self.waiting.values(), *(item for items in self.flight for item in items)]
        assert self.dirty.count() == len(alive)
        assert self.dirty.lowest_mark() == min((item.mark_no for item in alive), default=None)
        assert self.dirty.oldest() == min((item.since for item in alive), default=None)
        assert self.dirty.wait(0) == bool(self.waiting)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(st.lists(paths, min_size=1, max_size=30, unique=True), st.integers(1, 5))
def test_taking_in_small_portions_delivers_everything_once(marked: list[bytes], limit: int) -> None:
    dirty = DirtySet()
    for at, path in enumerate(marked):
        dirty.mark([hint(path)], float(at))
    seen = []
    while taken := dirty.take(limit):
        seen += [d.path for d in taken]
        dirty.settle(taken)
    assert sorted(seen) == sorted(marked)


def test_what_a_path_waits_for_is_told() -> None:
    dirty = DirtySet()
    assert dirty.waits(0, b"d/f") is None
    dirty.mark([Hint(0, b"d", Kind.RESCAN)], 1.0)
    dirty.mark([Hint(0, b"d/f", Kind.MODIFIED), Hint(0, b"e", Kind.MODIFIED)], 2.0)
    assert dirty.waits(0, b"d/f") == Wait(2.0, b"d/f", False), "its own mark says more"
    assert dirty.waits(0, b"d/x") == Wait(1.0, b"d", False)
    assert dirty.waits(0, b"dd") is dirty.waits(1, b"d/f") is dirty.waits(0, b"e/x") is None
    taken = dirty.take(10)
    assert dirty.waits(0, b"d/f") == Wait(2.0, b"d/f", True)
    assert dirty.waits(0, b"d/x/y") == Wait(1.0, b"d", True)
    assert (dirty.count_below(0, b""), dirty.count_below(0, b"d"), dirty.count_below(0, b"d/f")) == (3, 1, 0)
    dirty.mark([Hint(0, b"d/f", Kind.MODIFIED), Hint(0, b"d/g", Kind.MODIFIED)], 3.0)
    assert dirty.count_below(0, b"d") == 2
    dirty.settle(taken)
    assert dirty.waits(0, b"d/f") == Wait(3.0, b"d/f", False)
    assert dirty.waits(0, b"d/x") is None


def test_many_mapped_files_are_remembered_by_their_inodes() -> None:
    dirty = DirtySet()
    dirty.mark([Hint(0, b"", Kind.ATTRIBUTES, (1, number)) for number in range(1000)], 1.0)
    (item,) = dirty.take(10)
    assert item.kind == Kind.ATTRIBUTES and len(item.inodes) == 1000
    dirty.mark([Hint(0, b"", Kind.MODIFIED, (1, number)) for number in range(MOST_INODES + 1)], 2.0)
    (item,) = dirty.take(10)
    assert Kind.RESCAN in item.kind and not item.inodes
