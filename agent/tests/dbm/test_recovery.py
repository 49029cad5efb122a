"""Errors, kills and races at the worst moments: nothing acknowledged is lost, and no state of the past is made up."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filesystems import mounted
from pasts import transaction
from replicas import DIRECTORY, FILE

from farshore.config import BrakeConfig
from farshore.dbm.messages import Link, MakeDir, MakeSymlink, Meta, Move, Operation, Put, Remove
from farshore.dbm.replica.commit import Applier
from farshore.dbm.replica.guard import Guard, Held, store
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.staging import _check_numbers
from farshore.dbm.replica.upload import Interrupted, Upload
from farshore.dbm.replica.view import Progress, copy_out
from farshore.errors import ProtocolError
from farshore.fmm.types import Root


class Replica:
    """An applier, and another one in its place after a kill."""

    def __init__(self, base: Path, *, guarded: bool = False) -> None:
        self._base = base
        self._guarded = guarded
        self.root = base / "root"
        self.state = base / "state"
        self.root.mkdir()
        self.state.mkdir()
        self.seq = 0
        self.open()

    def open(self) -> Applier:
        root = os.fsencode(self.root)
        guard = Guard("web", BrakeConfig(), [root], self.state, armed=True) if self._guarded else None
        self.applier = Applier([("root", Root(root))], self.state, guard=guard)
        return self.applier

    def accept(self, *operations: Operation) -> None:
        self.seq += 1
        self.applier.accept([transaction(self.seq, *operations)])

    def tell(self, *operations: Operation) -> None:
        self.accept(*operations)
        self.applier.work()
        assert self.applier.stalled == ""

    def fail_at(self, count: int, code: int) -> None:
        """Let the operation that is number ``count`` from now on fail, once, before it does anything."""
        carry_out, left = self.applier._operator.carry_out, [count]

        def failing(todo: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(code, os.strerror(code))
            carry_out(todo)

        self.applier._operator.carry_out = failing  # type: ignore[method-assign]

    def killed(self, act: Callable[[], object]) -> None:
        """Do something that ends with a SIGKILL, in another process, and open the replica again."""
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                act()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        self.open()

    def now(self) -> dict[str, bytes | None]:
        return listing(self.root)

    def was(self, seq: int, newest_ns: int = 0) -> tuple[dict[str, bytes | None], list[bytes]]:
        """A state of the past, and what is missing in it."""
        target = self._base / "restored"
        shutil.rmtree(target, ignore_errors=True)
        progress = Progress()
        copy_out(self.applier.view(0, seq, newest_ns), b"", os.fsencode(target), progress)
        return listing(target), progress.missing


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    return Replica(tmp_path)


def listing(top: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(top)): path.read_bytes() if path.is_file() else None for path in top.rglob("*")}


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_accepted_during_a_checkpoint_stays(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"))
    synced, go_on = threading.Event(), threading.Event()
    sync = os.fdatasync

    def slow(handle: int) -> None:
        sync(handle)
        if threading.current_thread() is staging:
            synced.set()
            go_on.wait(60)

    monkeypatch.setattr(os, "fdatasync", slow)
    staging = threading.Thread(target=replica.accept, args=[Put(0, b"b", FILE, b"2")])
    staging.start()
    assert synced.wait(60)
    checkpoint = threading.Thread(target=replica.applier.checkpoint)
    checkpoint.start()
    time.sleep(0.05)
    go_on.set()
    staging.join()
    checkpoint.join()
    again = replica.open()
    again.work()
    assert replica.now() == {"a": b"1", "b": b"2"}


def test_what_was_left_out_is_not_undone(replica: Replica) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"), MakeDir(0, b"d", DIRECTORY), Put(0, b"b", FILE, b"2"))
    before = replica.now()
    # The second one also takes what is at its target to where it is kept, before it fails.
    replica.tell(Move(0, b"a", b"no such directory/b"))
    os.rename(replica.root / "a", replica.root.parent / "away")
    carry_out = replica.applier._operator.carry_out

    def gone(todo: Any) -> None:
        (replica.root / "a").unlink()
        carry_out(todo)

    os.rename(replica.root.parent / "away", replica.root / "a")
    replica.applier._operator.carry_out = gone  # type: ignore[method-assign]
    replica.tell(Move(0, b"a", b"b"))
    assert replica.applier.doubts == [(0, b"a")]
    del before["a"]  # Somebody else has removed it.
    assert replica.was(1) == (before, [])
    replica.applier.close()
    replica.open()
    assert replica.was(1) == (before, [])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_was_set_aside_is_not_undone(replica: Replica, count: int) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"), Put(0, b"b", FILE, b"2"), Put(0, b"c", FILE, b"3"))
    before = replica.now()
    replica.accept(Remove(0, b"c"), Remove(0, b"b"), Move(0, b"a", b"q"))
    replica.fail_at(count, errno.EIO)
    replica.applier.work()
    assert replica.applier.stalled
    replica.applier.set_aside("a promotion")
    assert replica.was(1) == (before, [])


@pytest.mark.parametrize(("part", "call", "count"), [("_mark", "move", 2), ("_journal", "set_aside", 1)])
def test_a_kill_while_changes_are_set_aside(replica: Replica, part: str, call: str, count: int) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"))
    replica.accept(Put(0, b"x", FILE, b"2"), Put(0, b"y", FILE, b"2"), Put(0, b"z", FILE, b"3"))
    replica.fail_at(3, errno.EIO)
    replica.applier.work()
    owner = getattr(replica.applier, part)
    real, left = getattr(owner, call), [count]

    def last(*given: Any) -> None:
        real(*given)
        left[0] -= 1
        if not left[0]:
            die()

    setattr(owner, call, last)
    replica.killed(lambda: replica.applier.set_aside("rejected"))
    assert replica.applier.diverged == "rejected"
    assert replica.applier.waiting == 0
    replica.seq = replica.applier.started
    assert replica.seq == 2
    replica.tell(Put(0, b"n1", FILE, b"A"), Put(0, b"n2", FILE, b"B"), Put(0, b"n3", FILE, b"C"))
    assert {"n1", "n2", "n3"} <= set(replica.now())


def test_what_must_be_compared_is_remembered(replica: Replica) -> None:
    replica.applier.diverged = "something"
    assert replica.open().diverged == "something"
    replica.applier.diverged = ""
    assert replica.open().diverged == ""


def test_a_kill_while_rejected_changes_are_dropped(tmp_path: Path) -> None:
    replica = Replica(tmp_path, guarded=True)
    replica.tell(Put(0, b"a", FILE, b"1"))
    store(replica.state / "held.json", Held("a reason", 1.0, 2, True))
    replica.open()
    replica.accept(Put(0, b"a", FILE, b"encrypted"))
    replica.applier.work()
    guard = replica.applier.guard
    assert guard is not None
    guard.approve = die  # type: ignore[assignment]
    replica.killed(replica.applier.approve)
    replica.applier.work()
    assert replica.now() == {"a": b"1"}
    assert replica.applier.diverged
    replica.applier.approve()
    replica.applier.work()
    assert replica.applier.held is None
    assert replica.now() == {"a": b"1"}


def test_a_passing_error_does_not_lead_to_another_place(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"))
    replica.applier.checkpoint()
    replica.tell(Move(0, b"a", b"b"), Put(0, b"a", FILE, b"2"))
    rename, failed = os.rename, []

    def failing(*given: Any, **where: Any) -> None:
        if given[0] == b"probe" and not failed:
            failed.append(1)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        rename(*given, **where)

    monkeypatch.setattr(os, "rename", failing)
    again = replica.open()
    again.work()
    again.work()
    assert failed
    assert again.stalled == ""
    assert replica.now() == {"a": b"2", "b": b"1"}


def test_a_full_disk_costs_no_history_that_is_needed(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    replica.tell(*(Put(0, b"%d" % number, FILE, b"old") for number in range(9)))
    replica.accept(*(Remove(0, b"%d" % number) for number in range(9)))
    replica.fail_at(5, errno.ENOSPC)
    replica.applier.work()
    assert replica.applier.stalled
    again = replica.open()
    again.work()
    assert again.doubts == []
    assert replica.now() == {}
    with pytest.raises(NotRemembered, match="reaches back"):
        again.history.check_seq(0, 2)
    assert len(replica.was(1)[0]) == 9
    # What goes first is what is applied and synced; at last, nothing of it stays.
    monkeypatch.setattr(again.history, "_is_short", lambda: True)
    assert again.make_room()
    assert not list(replica.state.glob("0/stage/h*/*"))


def test_a_kept_file_that_is_gone_is_missing_not_absent(replica: Replica) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"), MakeDir(0, b"d", DIRECTORY), Put(0, b"d/b", FILE, b"2"))
    replica.tell(Put(0, b"a", FILE, b"new"), Remove(0, b"d"))
    replica.applier.checkpoint()
    replica.applier.history._segments.remove = die  # type: ignore[assignment]
    replica.killed(replica.applier.make_room)
    assert replica.was(1) == ({}, [b"a", b"d"])


def test_half_a_transaction_is_no_state(replica: Replica) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"), Put(0, b"b", FILE, b"2"))
    replica.applier.checkpoint()
    replica.applier.history._segments.leave()
    replica.accept(Put(0, b"a", FILE, b"new"), Remove(0, b"b"), Remove(0, b"a"))
    note, noted = replica.applier.history.note, []

    def noting(steps: Any) -> None:
        noted.append(1)
        if len(noted) == 2:
            die()
        note(steps)

    replica.applier.history.note = noting  # type: ignore[method-assign]
    replica.killed(replica.applier.work)
    replica.applier.work()
    replica.applier.checkpoint()
    assert len(replica.applier.history.chapters) == 3
    assert replica.was(1) == ({"a": b"1", "b": b"2"}, [])
    while len(replica.applier.history.chapters) > 1:
        replica.applier.history._drop_oldest()
    with pytest.raises(NotRemembered, match="reaches back to transaction 2 only"):
        replica.applier.view(0, 1)
    assert replica.was(2) == ({}, [])


def test_a_merged_segment_covers_no_later_one(replica: Replica) -> None:
    segments = replica.applier.history._segments
    for number in range(5, 9):
        segments.begin(number)
        segments.append([(number, b"x")])
    segments.replace([5, 6, 7], [(5, b"x")])
    segments.remove(8)
    segments.append([(9, b"later")])
    found: list[int] = []
    again = type(segments)(replica.state / "history", "history", lambda number, place, body: found.append(number))
    assert (again.damage, found) == ("", [5, 9])


def test_what_was_left_out_can_be_merged(replica: Replica) -> None:
    replica.tell(Put(0, b"a", FILE, b"1"))
    replica.accept(Move(0, b"a", b"no such directory/b"))
    replica.accept(Put(0, b"c", FILE, b"3"))
    replica.applier.work()
    assert replica.applier.doubts == [(0, b"a")]
    replica.applier.checkpoint()
    history = replica.applier.history
    # What was left out of the second transaction is told after the third was looked up.
    assert [step.seq for step in history.steps(history.chapters[0])] == [1, 2, 3, 2]
    history._merge([*history.chapters])
    again = replica.open()
    assert again.history.problem == ""
    assert again.history.chapters[0].last == 3


def test_an_application_changes_what_the_history_shares_with_the_tree(replica: Replica) -> None:
    replica.tell(Put(0, b"a", FILE, b"old"), Link(0, b"b", b"a"))
    replica.tell(Remove(0, b"b"))
    time.sleep(0.02)
    promoted = time.time_ns()
    time.sleep(0.02)
    (replica.root / "a").write_bytes(b"encrypted in its place")
    assert replica.was(1, promoted) == ({}, [b"a", b"b"])


def test_what_is_mounted_in_a_directory_that_is_removed_stays(replica: Replica) -> None:
    place = replica.root / "d" / "m"
    place.mkdir(parents=True)
    with mounted(place):
        (place / "precious").write_bytes(b"1")
        replica.tell(Remove(0, b"d"))
        assert replica.applier.doubts == [(0, b"d")]
        assert (place / "precious").exists()


@pytest.mark.parametrize(
    "operation",
    [
        MakeSymlink(0, b"l", FILE, b"a\0b"),
        Put(0, b"f", Meta(0o644, 0, 0, 1, 1, [(b"user.a\0b", b"")]), b""),
    ],
)
def test_what_no_system_call_takes_is_refused_before_it_is_accepted(operation: Operation) -> None:
    with pytest.raises(ProtocolError, match="zero byte"):
        _check_numbers(operation)


def test_an_upload_whose_opening_was_interrupted_is_no_fault() -> None:
    upload = Upload(0, b"f", based=False, sparse=False)
    upload.opened = True
    with pytest.raises(Interrupted):
        upload.feed(b"x", True)
