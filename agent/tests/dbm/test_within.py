"""Contents that are followed through a transaction, as a tree of dictionaries has them."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import DIRECTORY, FILE

from farshore.dbm.messages import Copy, Link, MakeDir, Move, Operation, Put, Remove
from farshore.dbm.replica.stage import Staged
from farshore.dbm.replica.within import Before, Within

_NAMES = (b"a", b"b", b"c")


def _below(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(top + b"/")


class _Tree:
    """Files by their paths, each with what ``Within`` should tell of it, and directories."""

    def __init__(self) -> None:
        self.files: dict[bytes, Staged | bytes | Before] = {}
        self.directories: set[bytes] = {b""}

    def do(self, operation: Operation, staged: Staged | None) -> None:
        match operation:
            case Put(path=path, data=data):
                self.files[path] = data
            case Copy(path=path):
                assert staged is not None
                self.files[path] = staged
            case Link(path=path, to=to):
                self.files[path] = self.files[to]
            case MakeDir(path=path):
                self.directories.add(path)
            case Remove(path=path):
                self.files = {each: what for each, what in self.files.items() if not _below(each, path)}
                self.directories = {each for each in self.directories if not _below(each, path)}
            case Move(path=path, to=to):
                self.files.pop(to, None)
                self.files = {self._moved(each, path, to): what for each, what in self.files.items()}
                self.directories = {self._moved(each, path, to) for each in self.directories}

    @staticmethod
    def _moved(each: bytes, path: bytes, to: bytes) -> bytes:
        return to + each[len(path) :] if _below(each, path) else each

    def operation(self, chance: random.Random) -> Operation | None:
        """One that makes sense, or none."""
        above = chance.choice(sorted(self.directories))
        path = b"/".join([*([above] if above else []), chance.choice(_NAMES)])
        there = sorted([*self.files, *self.directories - {b""}])
        kind = chance.choice((Put, Put, Copy, Link, MakeDir, Remove, Move, Move))
        if kind is MakeDir and path not in there:
            return MakeDir(0, path, DIRECTORY)
        if kind is Remove and path in there:
            return Remove(0, path)
        if path in self.directories:
            return None
        if kind is Put:
            return Put(0, path, FILE, chance.randbytes(8))
        if kind is Copy and self.files:
            return Copy(0, path, FILE, 0, chance.choice(sorted(self.files)), b"")
        if kind is Link and self.files:
            return Link(0, path, chance.choice(sorted(self.files)))
        if kind is Move and there:
            source = chance.choice(there)
            return None if _below(path, source) else Move(0, source, path)
        return None


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_file_is_found(seed: int) -> None:
    chance = random.Random(seed)
    tree = _Tree()
    for _ in range(20):
        operation = tree.operation(chance)
        if operation is not None:
            tree.do(operation, Staged(-1, b"before") if isinstance(operation, Copy) else None)
    tree.files = {path: Before(path) for path in tree.files}
    within = Within()
    for number in range(40):
        operation = tree.operation(chance)
        if operation is None:
            continue
        staged = Staged(-1, b"%d" % number) if isinstance(operation, Copy) else None
        tree.do(operation, staged)
        within.note(operation, staged)
        for path, what in tree.files.items():
            assert within.find(0, path) == what


def test_roots_are_apart() -> None:
    within = Within()
    within.note(Put(1, b"f", FILE, b"new"), None)
    within.note(Move(1, b"f", b"g"), None)
    assert within.find(0, b"g") == Before(b"g")
    assert within.find(1, b"g") == b"new"
