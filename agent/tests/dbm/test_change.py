"""What a transaction would do: the same as what it does when it is applied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from brakes import META, Memory
from hypothesis import example, given, settings
from hypothesis import strategies as st

from farshore.dbm.messages import Copy, Link, MakeDir, MakeSymlink, Move, Operation, Patch, Put, Remove, SetMeta
from farshore.dbm.replica.brake import MOST_MARKS, Change
from farshore.dbm.replica.change import MOST_SAMPLES, TreeSight, count, describe, mark

TEXT = b"once upon a time there was a file with some words in it, and that was all. " * 20
NAMES = [b"a", b"b", b"d", b"d/a", b"d/b", b"d/e", b"d/e/a", b"d/e/b", b"f", b"f/a", b"f/e"]
DATA = [b"", b"1", TEXT, TEXT[::-1], bytes(100)]


def put(path: bytes, data: bytes = TEXT) -> Put:
    return Put(0, path, META, data)


def marks(*paths: bytes) -> tuple[int, ...]:
    return tuple(mark(0, path) for path in paths)


def memory(*paths: bytes, data: bytes = TEXT) -> Memory:
    made = Memory()
    for path in paths:
        made.files[path] = data
        while path := path.rpartition(b"/")[0]:
            made.directories.add(path)
    return made


def what(sight: Memory, *operations: Operation) -> Change:
    return describe(operations, sight, sight.after)


def possible(sight: Memory, operation: Operation) -> bool:
    """Whether a source whose picture of the tree is right may send it."""

    def has_parent(path: bytes) -> bool:
        parent = path.rpartition(b"/")[0]
        return not parent or parent in sight.directories

    match operation:
        case Move(path=path, to=to):
            here = path in sight.files or path in sight.directories
            into_itself = (to + b"/").startswith(path + b"/") or (path + b"/").startswith(to + b"/")
            return here and has_parent(to) and not into_itself
        case Link(path=path, to=to):
            return to in sight.files and has_parent(path) and path not in sight.directories
        case Remove():
            return True
        case _:
            return has_parent(operation.path)


PATHS = st.sampled_from(NAMES)
OPERATIONS = st.one_of(
    st.builds(put, PATHS, st.sampled_from(DATA)),
    st.builds(lambda p: MakeDir(0, p, META), PATHS),
    st.builds(lambda p: Remove(0, p), PATHS),
    st.builds(lambda p, to: Move(0, p, to), PATHS, PATHS),
    st.builds(lambda p, to: Link(0, p, to), PATHS, PATHS),
    st.builds(lambda p: SetMeta(0, p, META), PATHS),
)


@given(st.lists(OPERATIONS, max_size=12), st.lists(OPERATIONS, max_size=10))
@example([MakeDir(0, b"d", META), put(b"d/a")], [Move(0, b"d", b"a")])
@settings(deadline=None, max_examples=500)
def test_a_description_is_what_happens(first: list[Operation], then: list[Operation]) -> None:
    sight, applied = Memory(), Memory()
    for operation in first:
        if possible(applied, operation):
            applied.apply(operation)
    sight.files, sight.directories = dict(applied.files), set(applied.directories)
    taken = []
    for operation in then:
        if possible(applied, operation):
            taken.append(operation)
            applied.apply(operation)
    change = describe(taken, sight, sight.after)
    assert change.grown_files == len(applied.files) - len(sight.files)
    assert change.grown_bytes == sum(map(len, applied.files.values())) - sum(map(len, sight.files.values()))
    away = {mark(0, path) for path in sight.files if path not in applied.files}
    told = {*change.removed, *change.rewritten, *(old for old, _ in change.renamed)}
    assert away <= told | _edited_over(taken) | _gone_along(taken, sight)
    had = any(True for _ in sight.names(0))
    assert change.emptied == ((0,) if had and not any(True for _ in applied.names(0)) else ())


def _gone_along(operations: list[Operation], sight: Memory) -> set[int]:
    """Files that are where a directory was moved to, which loses none of them and is not told of each."""
    went = Memory()
    went.files = {path: path for path in sight.files}
    went.directories = set(sight.directories)
    along: set[int] = set()
    for operation in operations:
        if isinstance(operation, Move) and operation.path in went.directories:
            below = operation.path + b"/"
            along |= {mark(0, origin) for path, origin in went.files.items() if origin and path.startswith(below)}
        # What comes anew comes from nowhere.
        went.apply(put(operation.path, b"") if isinstance(operation, Put | Link) else operation)
    return along & {mark(0, origin) for origin in went.files.values()}


def _edited_over(operations: list[Operation]) -> set[int]:
    """Files that took another one's place, or had a content put over theirs, and may have gone on from there."""
    return {mark(0, each.path) for each in operations if isinstance(each, (Move, Put, Link))}


def test_what_is_new_changed_and_gone() -> None:
    sight = memory(b"x", b"y", b"z")
    change = what(sight, put(b"n"), put(b"x", TEXT + b"more"), put(b"y", bytes(900)), Remove(0, b"z"), Remove(0, b"-"))
    assert change.added == marks(b"n")
    assert change.edited == 1
    assert change.rewritten == marks(b"y")
    assert change.removed == marks(b"z")
    assert (change.added_bytes, change.removed_bytes, change.grown_files) == (len(TEXT), len(TEXT), 0)


def test_contents_that_come_as_uploads_and_copies() -> None:
    sight = memory(b"x", b"y")
    sight.coming = {b"x": os.urandom(5000), b"y": TEXT + TEXT, b"z": os.urandom(5000)}
    change = what(sight, Patch(0, b"x", META, 1), Copy(0, b"y", META, 0, b"x", b""), Patch(0, b"z", META, 2))
    assert change.rewritten == change.turned == marks(b"x")
    assert change.edited == 1
    assert change.random_added == ((mark(0, b""), mark(0, b"z")),)


def test_a_content_that_cannot_be_read_counts_as_another_one() -> None:
    sight = memory(b"x")
    change = describe([Patch(0, b"x", META, 1)], sight, lambda operation: None)
    assert change.rewritten == marks(b"x") and not change.turned


def test_a_rename_over_a_file_counts_by_its_content() -> None:
    sight = memory(b"x", b"y")
    sight.files[b"x.new"] = TEXT + b"more"
    sight.files[b"y.new"] = bytes(900)
    change = what(sight, Move(0, b"x.new", b"x"), Move(0, b"y.new", b"y"))
    assert change.edited == 1 and change.rewritten == marks(b"y")
    assert change.grown_files == -2 and not change.renamed


def test_a_log_that_is_rotated_within_a_transaction() -> None:
    change = what(memory(b"log", b"log.1"), Move(0, b"log.1", b"log.2"), Move(0, b"log", b"log.1"), put(b"log", b""))
    assert change.renamed == tuple(zip(marks(b"log.1", b"log"), marks(b"log.2", b"log.1"), strict=True))
    assert change.added == marks(b"log")
    assert not change.removed and not change.rewritten


def test_a_directory_goes_with_what_is_below_it_but_not_with_what_left_it() -> None:
    sight = memory(b"d/a", b"d/e/b", b"d/e/c", b"f/x")
    change = what(sight, Move(0, b"d/e/b", b"f/b"), Move(0, b"d/a", b"a"), put(b"d/n"), Remove(0, b"d"))
    assert change.removed == marks(b"d/e/c")
    assert change.grown_files == -1
    assert len(change.renamed) == 2


def test_contents_that_were_plain_are_paired_with_their_directory() -> None:
    sight = memory(b"d/a", b"d/b")
    sight.files[b"d/b"] = os.urandom(900)
    change = what(sight, put(b"d/a.locked", os.urandom(900)), Remove(0, b"d/a"), Remove(0, b"d/b"))
    assert change.plain_removed == ((mark(0, b"d"), mark(0, b"d/a")),)
    assert change.random_added == ((mark(0, b"d"), mark(0, b"d/a.locked")),)


def test_few_contents_are_read_of_a_large_transaction() -> None:
    paths = [b"file %d" % number for number in range(2000)]
    sight = memory(*paths)
    change = what(sight, *(put(path, os.urandom(800)) for path in paths))
    assert len(change.turned) == len(change.rewritten) == 2000
    assert sight.contents_read == MOST_SAMPLES
    sight.contents_read = 0
    change = what(sight, *(Remove(0, path) for path in paths))
    assert len(change.removed) == 2000 and sight.contents_read == MOST_SAMPLES


def test_a_change_names_no_more_than_so_many_files() -> None:
    paths = [b"d/file %d" % number for number in range(MOST_MARKS + 500)]
    change = what(memory(*paths, data=b""), Remove(0, b"d"))
    assert len(change.removed) == MOST_MARKS and change.removed_unnamed == 500
    assert change.grown_files == -len(paths)


@pytest.mark.parametrize(
    ("operations", "emptied"),
    [
        ([Remove(0, b"d"), Remove(0, b"x")], True),
        ([Remove(0, b"d")], False),
        ([Remove(0, b"d"), Remove(0, b"x"), put(b"y")], False),
        ([Move(0, b"d", b"e"), Remove(0, b"x")], False),
        ([Remove(0, b"d"), Move(0, b"x", b"y"), Remove(0, b"y")], True),
        ([Remove(0, b"d/a")], False),
        ([], False),
    ],
    ids=range(7),
)
def test_a_root_that_is_emptied(operations: list[Operation], emptied: bool) -> None:
    sight = memory(b"d/a", b"x")
    sight.directories.add(b"lost+found")
    assert what(sight, *operations).emptied == ((0,) if emptied else ())


# --- on a filesystem


def test_trees_are_looked_at_without_leaving_them(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(TEXT)
    root = tmp_path / "root"
    (root / "d/e").mkdir(parents=True)
    (root / "d/e/file").write_bytes(TEXT)
    (root / "d/link").symlink_to(outside)
    (root / "out").symlink_to(outside)
    os.mkfifo(root / "pipe")
    (root / ".farshore-stage").mkdir()
    single = tmp_path / "single"
    single.write_bytes(b"12345")
    sight = TreeSight([os.fsencode(root), os.fsencode(single), os.fsencode(tmp_path / "missing")])
    try:
        assert count(sight, 3)[0] == 5
        for path in (b"out/secret", b"d/link/secret", b"../outside/secret", b"/etc/passwd", b"d/none/x"):
            assert sight.look(0, path) is None and sight.content(0, path) is None
        assert sight.content(0, b"pipe") is None and sight.content(0, b"d") is None
        content = sight.content(0, b"d/e/file")
        assert content is not None and content.read(5, 4) == TEXT[5:9]
        content.close()
        assert sorted(sight.names(0)) == [b"d", b"out", b"pipe"]
        change = describe([Remove(0, b"d"), MakeSymlink(0, b"out", META, b"x")], sight, lambda operation: None)
        assert set(change.removed) == set(marks(b"d/e/file", b"d/link"))
        assert change.edited == 1 and not change.emptied
        replaced = describe([put(b"", b"54321")], sight, lambda operation: None)
        assert replaced.grown_files == 1 - 4 and replaced.emptied == (0,)
        lost = describe([Put(1, b"", META, b"")], sight, lambda operation: None)
        assert lost.rewritten == (mark(1, b""),) and lost.grown_bytes == -5
    finally:
        sight.end()


def test_the_handles_of_a_transaction_are_given_back(tmp_path: Path) -> None:
    (tmp_path / "root/d").mkdir(parents=True)
    (tmp_path / "root/d/a").write_bytes(TEXT)
    sight = TreeSight([os.fsencode(tmp_path / "root")])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        describe([put(b"d/a", bytes(900)), put(b"d/b"), Remove(0, b"d")], sight, lambda operation: None)
        sight.end()
    assert len(os.listdir("/proc/self/fd")) == before
