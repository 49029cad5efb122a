"""The index, beside a dictionary that is told the same."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from farshore.dbm import index as index_module
from farshore.dbm.index import Index, IndexView, Known
from farshore.errors import StateError
from farshore.fmm.types import FileKind

# Names around "/" in the order of bytes, where ranges over directories go wrong first.
NAMES = [b"a", b"a.", b"a0"]
DIRECTORIES = [b"", b"a", b"a0"]
PATHS = [b"", b"a", b"a.", b"a0", b"a/a", b"a/a.", b"a0/a", b"a/a/a"]
# Of blocks that are looked into together, the first, a middle and the last one; and numbers that need all 64 bits.
INODES = [1, 5, 63, 64, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
ROOTS = st.sampled_from([0, 0, 0, 1])
ANY = st.sampled_from(PATHS)
BELOW = st.sampled_from(PATHS[1:])


def entry(root: int, path: bytes, ino: int) -> Known:
    return Known(root, path, FileKind.FILE, 0o644, 0, 0, 1, 2, 3, 4, ino, 1, 0, None, (), b"d" * 32)


def is_in(path: bytes, directory: bytes) -> bool:
    """Whether ``path`` is ``directory`` or below it."""
    return not directory or path == directory or path.startswith(directory + b"/")


@dataclass
class Model:
    entries: dict[tuple[int, bytes], Known] = field(default_factory=dict)

    def children(self, root: int, path: bytes) -> set[bytes]:
        return {
            found for number, found in self.entries if number == root and found and found.rpartition(b"/")[0] == path
        }

    def remove(self, root: int, path: bytes) -> None:
        for key in [key for key in self.entries if key[0] == root and is_in(key[1], path)]:
            del self.entries[key]


class IndexMachine(RuleBasedStateMachine):
    """Whatever is done to the index, what it tells of any path is what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="farshore-index-")
        self.index = Index(Path(self.directory.name) / "index.db")
        self.index.begin()
        self.model, self.committed = Model(), Model()

    @rule(root=ROOTS, path=ANY, ino=st.sampled_from(INODES))
    def put(self, root: int, path: bytes, ino: int) -> None:
        self.index.put(entry(root, path, ino))
        self.model.entries[root, path] = entry(root, path, ino)

    @rule(root=ROOTS, path=st.sampled_from(DIRECTORIES))
    def list_and_get(self, root: int, path: bytes) -> None:
        assert set(self.index.children(root, path)) == self.model.children(root, path)
        for name in NAMES:
            child = path + b"/" + name if path else name
            assert self.index.get(root, child) == self.model.entries.get((root, child))

    @rule(ino=st.sampled_from(INODES))
    def look_for_inode(self, ino: int) -> None:
        there = {key for key, known in self.model.entries.items() if known.ino == ino}
        assert self.index.may_have_inode(ino) or not there
        found = {(known.root, known.path) for root in (0, 1) for known in self.index.by_inode(root, 4, ino)}
        assert found == there

    @rule(root=ROOTS, path=ANY)
    def remove(self, root: int, path: bytes) -> None:
        self.index.remove(root, path)
        self.model.remove(root, path)

    @rule(root=ROOTS, path=BELOW, to=BELOW)
    def move(self, root: int, path: bytes, to: bytes) -> None:
        if is_in(path, to) or is_in(to, path):
            return
        self.index.move(root, path, to)
        moved = {key: known for key, known in self.model.entries.items() if key[0] == root and is_in(key[1], path)}
        self.model.remove(root, to)
        for (number, old), known in moved.items():
            del self.model.entries[number, old]
            new = to + old[len(path) :]
            self.model.entries[number, new] = entry(number, new, known.ino)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.model.entries.clear()

    @rule()
    def commit(self) -> None:
        self.index.commit()
        self.index.begin()
        self.committed = Model(dict(self.model.entries))

    @rule()
    def rollback(self) -> None:
        self.index.rollback()
        self.index.begin()
        self.model = Model(dict(self.committed.entries))

    @invariant()
    def every_path_is_told(self) -> None:
        for root in (0, 1):
            for path in PATHS:
                assert self.index.get(root, path) == self.model.entries.get((root, path)), (root, path)

    def teardown(self) -> None:
        self.index.close()
        self.directory.cleanup()


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestIndex = IndexMachine.TestCase


@pytest.mark.parametrize("blocks", [1, 1024])
def test_an_inode_that_is_not_known_is_told_from_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    monkeypatch.setattr(index_module, "_MOST_BLOCKS", blocks)
    monkeypatch.setattr(index_module, "_MOST_IN_BLOCK", 3)
    index = Index(tmp_path / "index.db")
    index.begin()
    # As many as nobody reads for one block: there, any inode may be known. What has no inode does not count.
    index.put_all([entry(0, b"names/%d" % number, 700) for number in range(3)])
    index.put_all([entry(0, b"listed/%d" % number, 0) for number in range(9)])
    index.put(entry(1, b"other", 64))
    expected = {0: True, 1: False, 63: False, 64: True, 65: False, 700: True, 701: True, 768: False}
    for _ in range(2):
        assert {ino: index.may_have_inode(ino) for ino in expected} == expected
    index.put(entry(0, b"new", 65))
    assert index.may_have_inode(65)
    assert not index.may_have_inode(66)
    index.close()


def test_an_inode_that_was_removed_is_known_again_when_that_is_taken_back(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    index.begin()
    index.put(entry(0, b"a", 700))
    index.commit()
    index.begin()
    index.remove(0, b"a")
    assert not index.may_have_inode(700)
    index.rollback()
    assert index.may_have_inode(700)
    index.close()


def test_a_view_sees_what_is_committed_while_the_index_is_written(tmp_path: Path) -> None:
    path = tmp_path / "in#dex ?.db"
    with pytest.raises(StateError):
        IndexView(path).children(0, b"")
    index = Index(path)
    index.begin()
    index.put_all([entry(0, b"a", 1), entry(0, b"a/b", 2), entry(0, b"", 3), entry(1, b"c", 4)])
    view = IndexView(path)
    assert view.children(0, b"") == []
    index.commit()
    assert view.children(0, b"") == [entry(0, b"a", 1)]
    assert view.children(0, b"a") == [entry(0, b"a/b", 2)]
    index.begin()
    index.remove(0, b"a")
    assert view.children(0, b"") == [entry(0, b"a", 1)]
    index.commit()
    assert view.children(0, b"") == view.children(0, b"a") == []
    view.close()
    index.close()
