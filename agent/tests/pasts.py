"""For tests: a replica that is told random transactions, and what its tree was after each of them."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from trees import differences

from farshore.config import History as Retention
from farshore.dbm import wire
from farshore.dbm.messages import Link, MakeDir, MakeNode, MakeSymlink, Meta, Move, Operation, Put, Remove, SetMeta
from farshore.dbm.replica.commit import Applier, Transaction
from farshore.dbm.replica.view import Progress, copy_out
from farshore.fmm.types import FileKind, Root

SECOND = 10**9


def random_meta(chance: random.Random, directory: bool = False) -> Meta:
    xattrs = [(b"user.k", b"%d" % chance.randrange(9))] if chance.random() < 0.2 else []
    times = chance.randrange(10**18), chance.randrange(10**18)
    return Meta(
        chance.choice([0o755, 0o700] if directory else [0o644, 0o600]), os.getuid(), os.getgid(), *times, xattrs
    )


def transaction(seq: int, *operations: Operation) -> Transaction:
    """A transaction of what needs no staged content."""
    made = Transaction(seq, 1)
    for operation in operations:
        made.operations.append((operation, None))
        made.bodies.append(wire.frame(operation)[4:])
    return made


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
        self.applier.accept([transaction(self.seq, *operations)])
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
                return (
                    None if is_directory else Put(0, new, random_meta(chance), chance.randbytes(chance.randrange(50)))
                )
            case 2:
                return None if new in files else MakeDir(0, new, random_meta(chance, True))
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
                return SetMeta(0, changed, random_meta(chance))
            case 6:
                changed = chance.choice([b"", *directories])
                return SetMeta(0, changed, random_meta(chance, True))
            case 7:
                other = chance.choice([None, *files])
                return None if other is None or other == new or is_directory else Link(0, new, other)
            case _:
                if is_directory:
                    return None
                if chance.random() < 0.5:
                    return MakeSymlink(0, new, Meta(0o777, os.getuid(), os.getgid(), 5, chance.randrange(99), []), b"x")
                return MakeNode(0, new, random_meta(chance), int(FileKind.FIFO), 0)

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
