"""A replica whose process is killed at any call, again and again, ends as one that never was."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pasts import Past, transaction
from replicas import DIRECTORY, FILE
from trees import differences

from farshore.dbm.messages import Link, MakeDir, Move, Operation, Put, Remove
from farshore.dbm.replica import commit
from farshore.dbm.replica.commit import Applier
from farshore.dbm.replica.view import Progress, copy_out
from farshore.fmm.types import Root

#: What a process may have reached when it is killed: each of these calls changes something, or makes it durable.
_CALLS = (
    *("link", "rename", "unlink", "rmdir", "mkdir", "symlink", "mknod", "truncate", "ftruncate"),
    *("chmod", "chown", "utime", "setxattr", "removexattr", "write", "pwrite", "fsync", "fdatasync"),
)


class Victim:
    """A replica of two trees, of which each life is a process of its own."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self.roots = [base / "one", base / "two"]
        self._state = base / "state"
        for directory in (*self.roots, self._state):
            directory.mkdir(parents=True)

    def open(self) -> Applier:
        return Applier([(root.name, Root(os.fsencode(root))) for root in self.roots], self._state)

    def live(self, told: Sequence[Sequence[Operation]], *, calls: int = 0, rest: int = 0) -> bool:
        """Take all transactions that were not accepted yet, and apply them; returns whether that was finished.

        It is killed instead of the call that is number ``calls``, and rests after so many operations, with little
        memory; 0: it is not, and as it likes. Raises AssertionError when anything was left out.
        """
        child = os.fork()
        if not child:
            code = 1
            try:
                if calls:
                    _die_at(calls)
                if rest:
                    commit.CHECKPOINT_OPERATIONS = rest
                    commit.MEMORY_BYTES = 6000
                self._apply(told, close=not calls)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status == 0

    def _apply(self, told: Sequence[Sequence[Operation]], *, close: bool) -> None:
        applier = self.open()
        assert applier.diverged == ""
        for number, operations in enumerate(told, 1):
            if number > applier.started:
                applier.accept([transaction(number, *operations)])
        applier.work()
        assert applier.stalled == ""
        assert applier.doubts == []
        assert applier.applied == max(len(told), applier.started)
        if close:
            applier.close()

    def restored(self, root: int, seq: int) -> Path:
        """A tree after ``seq`` as the history has it, in a place of its own."""
        target = self._base / f"restored-{root}-{seq}"
        applier = self.open()
        try:
            progress = Progress()
            copy_out(applier.view(root, seq), b"", os.fsencode(target), progress)
            assert progress.missing == []
        finally:
            applier.close()
        return target


def _die_at(count: int) -> None:
    """Let this process die by SIGKILL instead of the call that is number ``count``."""
    left = count

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counted

    for name in _CALLS:
        setattr(os, name, dying(getattr(os, name)))


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="farshore-replay-"))
    try:
        yield base
    finally:
        shutil.rmtree(base)


def _told(past: Past, count: int) -> list[Operation]:
    """Lead a tree through random operations, of which a copy is kept after each; returns them."""
    told: list[Operation] = []
    while len(told) < count:
        operation = past.operation()
        if operation is not None:
            past.tell(operation)
            past.note()
            told.append(operation)
    assert past.applier.doubts == []
    past.close()
    return told


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
@example(seed=195)  # Operations that were looked up, and not reached, outlive a sync of the trees.
@example(seed=56)  # A directory is removed, with what was just put into it.
@example(seed=366)  # Metadata is given to a file by one name, and then by another one that it has just got.
def test_a_replica_that_is_killed_ends_as_one_that_never_was(seed: int) -> None:
    chance = random.Random(seed)
    with _place() as base:
        past = Past(base / "twin", seed)
        operations = _told(past, 40)
        #: After how many operations each transaction ends.
        ends = sorted({*chance.sample(range(1, len(operations)), chance.randrange(len(operations))), len(operations)})
        told = [_twice(operations[begin:end]) for begin, end in itertools.pairwise([0, *ends])]
        victim = Victim(base / "victim")
        for _ in range(chance.randrange(1, 7)):
            known = told[: chance.randrange(1, len(told) + 1)] if chance.random() < 0.3 else told
            calls = chance.choice([1, 20, 100, 800]) * chance.randrange(1, 8)
            victim.live(known, calls=calls, rest=chance.choice([0, 1, 3, 10]))
        assert victim.live(told)
        for root in victim.roots:
            assert differences(past.root, root, times_of_directories=False) == []
        for seq in (0, *chance.sample(range(1, len(told) + 1), min(3, len(told)))):
            before = past.copies[ends[seq - 1] if seq else 0]
            for root in range(2):
                assert differences(before, victim.restored(root, seq), times_of_directories=False) == []


def _twice(operations: Sequence[Operation]) -> list[Operation]:
    """The same in both trees."""
    return [msgspec.structs.replace(operation, root=root) for operation in operations for root in range(2)]


def test_contents_that_a_power_cut_took_are_written_anew(tmp_path: Path) -> None:
    victim = Victim(tmp_path)
    data = os.urandom(9000)
    names = ("empty", "zeros", "short", "moved", "linked", "in a directory", "other", "kept")
    put = [Put(0, name.encode(), FILE, data + name.encode()) for name in names]
    moved: list[Operation] = [
        *(Move(0, b"moved", b"elsewhere"), Link(0, b"second", b"linked"), MakeDir(0, b"d", DIRECTORY)),
        *(Move(0, b"in a directory", b"d/in a directory"), Move(0, b"d", b"e"), Remove(0, b"kept")),
    ]
    # With an end that is no end, so that nothing is at rest.
    assert victim.live([put, moved], calls=1_000_000)
    (root, _) = victim.roots
    (kept,) = victim._state.glob("0/stage/h*/2.5")
    lost = {
        root / "empty": b"",
        root / "zeros": bytes(9000),
        root / "short": data[:4096],
        root / "elsewhere": b"",
        root / "second": data[:4096] + bytes(10),
        root / "e/in a directory": b"",
        root / "other": b"somebody's",
        kept: b"",
    }
    for path, content in lost.items():
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    assert victim.live([put, moved])
    assert (root / "other").read_bytes() == b"somebody's", "what is no loss is somebody's change"
    del lost[root / "other"]
    assert [path for path in lost if not path.read_bytes().startswith(data)] == []
    assert {(path.stat().st_mtime_ns, path.stat().st_mode & 0o7777) for path in lost} == {(1, 0o644)}
    assert (root / "linked").samefile(root / "second")
