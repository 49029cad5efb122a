"""Comparing a tree with the index by directories: what differs is found, and nothing else is looked at."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.dbm import census as census_module
from farshore.dbm import planner as planning
from farshore.dbm.census import Census
from farshore.dbm.messages import FromSource, MakeDir, Move, Put, Remove
from farshore.dbm.work import Batch, Work
from farshore.fmm import Hint, Kind, Root
from farshore.fmm.dirty import Dirty
from farshore.fmm.patterns import Filter
from farshore.fmm.sums import NOTHING, Marker, Room

from .test_planner import Source, paths_of


class Assisted(Source):
    """A source whose planner has a census made of whatever it finds large."""

    def __init__(self, base: Path, exclude: tuple[str, ...] = ()) -> None:
        super().__init__(base, exclude)
        self.planner = planning.Planner(self.index, [self.root], 1, assisted=True)
        self.found: list[bytes] = []

    def settle(self, *hints: Hint) -> list[FromSource]:
        """All that is sent for the hints, with what the planner has others do."""
        hints = hints or (Hint(0, b"", Kind.RESCAN),)
        batch = Batch.of([Dirty(h.root, h.path, h.kind, 0, number) for number, h in enumerate(hints)])
        works = list(batch.works)
        self.found.clear()
        self.planner.looked_at = 0
        sent = self.all(batch)
        while self.planner.new_census or self.planner.missed:
            for census in self.planner.new_census:
                census.run()
                self.found += census.differing or []
            batches = [self.planner.take_up(census) for census in self.planner.new_census]
            self.planner.new_census.clear()
            missed, self.planner.missed = self.planner.missed, []
            if missed:
                batches.append(self.planner.look_for_missed(missed))
            for each in batches:
                sent += self.all(each)
        assert [work.left for work in works] == [0] * len(works)
        self.planner.note_rules()
        return sent


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MANY_PATHS", 1)
    # What was changed a moment before it was read is read again, and differs until then.
    monkeypatch.setattr(planning, "_RACY_NS", 0)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Assisted]:
    made = Assisted(tmp_path)
    for directory in ("a", "a/b", "c", "empty"):
        (made.tree / directory).mkdir()
        for name in ("one", "two") if directory != "empty" else ():
            (made.tree / directory / name).write_text(directory + name)
    made.settle()
    made.settle()
    yield made
    made.index.close()


def test_nothing_is_looked_at_when_nothing_has_changed(source: Assisted) -> None:
    assert source.settle() == []
    assert source.found == []
    assert source.planner.looked_at == 2  # the root, when it began and when it was done


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda tree: (tree / "a/b/one").write_text("x"), [b"a/b"]),
        (lambda tree: os.chmod(tree / "a/b/one", 0o600), [b"a/b"]),
        (lambda tree: os.utime(tree / "c/two", ns=(1, 1)), [b"c"]),
        # A directory's own change shows in the one that holds it; the root is looked at anyway.
        (lambda tree: (tree / "a/new").write_text("x"), [b"", b"a"]),
        (lambda tree: (tree / "a/b/two").unlink(), [b"a", b"a/b"]),
        (lambda tree: shutil.rmtree(tree / "a/b"), [b"", b"a"]),
        (lambda tree: os.rename(tree / "a/b", tree / "c/b"), [b"", b"a", b"c"]),
        (lambda tree: (tree / "empty/x").write_text("x"), [b"", b"empty"]),
        (lambda tree: os.rename(tree / "c/one", tree / "c/two"), [b"", b"c"]),
        (lambda tree: (tree / "top").symlink_to("a"), [b""]),
    ],
)
def test_just_what_differs_is_listed(source: Assisted, change: Callable[[Path], None], differing: list[bytes]) -> None:
    change(source.tree)
    assert source.settle() != []
    assert [path for path in source.found if path in differing] == differing
    assert set(source.found) <= {*differing, b"c/b"}
    assert source.settle() == []


def test_a_new_tree_is_sent_whole(source: Assisted) -> None:
    (source.tree / "new/deep/er").mkdir(parents=True)
    (source.tree / "new/deep/er/f").write_text("x")
    sent = source.settle()
    assert paths_of(sent, MakeDir) == [b"new", b"new/deep", b"new/deep/er"]
    assert paths_of(sent, Put) == [b"new/deep/er/f"]


def test_a_directory_moved_while_nobody_watched_is_moved(source: Assisted) -> None:
    os.rename(source.tree / "a", source.tree / "z")
    sent = source.settle()
    assert [(m.path, m.to) for m in sent if isinstance(m, Move)] == [(b"a", b"z")]
    assert paths_of(sent, Put) == paths_of(sent, Remove) == []


def test_sockets_and_what_is_excluded_differ_in_vain_only(tmp_path: Path) -> None:
    source = Assisted(tmp_path, exclude=("*.tmp", "/cache"))
    (source.tree / "cache/deep").mkdir(parents=True)
    (source.tree / "cache/deep/f").write_text("x")
    (source.tree / "d").mkdir()
    for name in ("keep", "x.tmp"):
        (source.tree / "d" / name).write_text("x")
    (source.tree / "s").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source.tree / "s/socket"))
        source.settle()
        source.settle()
        assert source.settle() == []
    # The root has an excluded directory, "d" an excluded file; what is excluded itself is not entered.
    assert source.found == [b"", b"d"]
    source.index.close()


def test_a_directory_that_cannot_be_read_does_not_hide_what_is_below(
    source: Assisted, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Room.sum_up

    def sum_up(self: Room, root: int, paths: list[bytes], key: int) -> object:
        return [
            (None, []) if path == b"a" else found
            for path, found in zip(paths, real(self, root, paths, key), strict=True)
        ]

    monkeypatch.setattr(Room, "sum_up", sum_up)
    (source.tree / "a/b/one").write_text("changed")
    assert paths_of(source.settle(), Put) == [b"a/b/one"]


def test_what_was_filled_below_a_directory_that_cannot_be_read_is_found(
    source: Assisted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was known as empty, so that nothing tells what lies below it."""
    real = Room.sum_up

    def sum_up(self: Room, root: int, paths: list[bytes], key: int) -> object:
        summed = real(self, root, paths, key)  # type: ignore[arg-type]
        return [(None, []) if path == b"." else found for path, found in zip(paths, summed, strict=True)]

    monkeypatch.setattr(Room, "sum_up", sum_up)
    (source.tree / "empty/new").write_text("x")
    assert paths_of(source.settle(), Put) == [b"empty/new"]


def test_all_below_what_cannot_be_listed_is_looked_at(source: Assisted, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = Room.sum_up, []

    def sum_up(self: Room, root: int, paths: list[bytes], key: int) -> object:
        summed = real(self, root, paths, key)  # type: ignore[arg-type]
        return [(None, []) if path == b"a" else found for path, found in zip(paths, summed, strict=True)]

    def scandir(path: bytes) -> object:
        refused.append(path)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Room, "sum_up", sum_up)
    monkeypatch.setattr(census_module, "os", SimpleNamespace(**{**vars(os), "scandir": scandir}))
    (source.tree / "a/b/one").write_text("changed")
    assert paths_of(source.settle(), Put) == [b"a/b/one"]
    assert refused


def test_a_census_that_is_stopped_has_no_result(source: Assisted) -> None:
    (source.tree / "a/b/one").write_text("changed")
    work = Work(Dirty(0, b"", Kind.RESCAN, 0, 0))
    census = Census(0, os.fsencode(source.tree), b"", Filter(source.root), *source.index.sums(0, b""), work)
    census.stop()
    census.run()
    assert census.differing is None


def test_what_new_rules_leave_out_is_forgotten_first(tmp_path: Path) -> None:
    source = Assisted(tmp_path)
    (source.tree / "d").mkdir()
    for name in ("a", "b"):
        (source.tree / "d" / name).write_text(name)
    source.settle()
    source.settle()
    # Only a walk forgets what is known and left out by now; sums would be equal.
    source.root = Root(source.root.path, exclude=("a",))
    source.planner = planning.Planner(source.index, [source.root], 1, assisted=True)
    assert source.settle() == []
    assert source.found == []
    assert source.index.get(0, b"d/a") is None and source.index.get(0, b"d/b") is not None
    source.settle()
    assert source.found == [b"d"]
    source.index.close()


def test_a_census_that_fails_has_everything_looked_at(source: Assisted, monkeypatch: pytest.MonkeyPatch) -> None:
    def sum_up(self: Room, root: int, paths: list[bytes], key: int) -> object:
        raise MemoryError

    monkeypatch.setattr(Room, "sum_up", sum_up)
    (source.tree / "a/b/one").write_text("changed")
    assert paths_of(source.settle(), Put) == [b"a/b/one"]


def test_many_directories_of_many_names(tmp_path: Path) -> None:
    """More names than one call has room for, of all lengths, with any bytes."""
    source = Assisted(tmp_path)
    base = os.fsencode(source.tree)
    names = [b"%d-" % i + b"\xff\n" * (i % 126) for i in range(9000)]
    for name in names:
        os.mkdir(base + b"/" + name)
    (source.tree / os.fsdecode(names[4321]) / "f").write_text("x")
    work = Work(Dirty(0, b"", Kind.RESCAN, 0, 0))
    census = Census(0, base, b"", Filter(source.root), 1, {}, work)
    # More than there is room for are those of one directory: it is looked at, and so is what is known below it.
    census._known = {b"": NOTHING._replace(entries=1), names[4321]: NOTHING._replace(entries=2)}
    census.run()
    assert census.differing == [b"", names[4321]]
    for name in names[3000:]:
        os.renames(base + b"/" + name, base + (b"/x/" if int(name.split(b"-")[0]) % 2 else b"/y/") + name)
    census = Census(0, base, b"", Filter(source.root), 1, {b"": NOTHING, b"x": NOTHING, b"y": NOTHING}, work)
    census._known = {at: NOTHING._replace(entries=1) for at in (b"", b"x", b"y")}
    census.run()
    assert census.differing == [b"", b"x", b"x/" + names[4321], b"y"]
    source.index.close()


U32, U64, I64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1), st.integers(-(1 << 63), (1 << 63) - 1)


def mark_in_words(key: int, name: bytes, *numbers: int) -> int:
    """A mark as indexes on disk have it, computed one step after the other."""
    mode, uid, gid, *others = numbers
    words = [mode, uid | gid << 32, *(number % (1 << 64) for number in others), len(name)]
    padded = name + bytes(-len(name) % 8)
    words += [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    state = key
    for word in words:
        state = (state ^ word) * 0xFF51AFD7ED558CCD % (1 << 64)
        state ^= state >> 33
        state = (state * 0xC4CEB9FE1A85EC53 + 0x9E3779B97F4A7C15) % (1 << 64)
    state ^= state >> 33
    return state - (1 << 64) if state >> 63 else state


@given(
    key=U64,
    entries=st.lists(
        st.tuples(st.binary(max_size=255), U32, U32, U32, U64, I64, I64, U64, U64),
        min_size=1,
        max_size=6,
    ),
)
def test_marks_stay_what_they_are_whatever_was_marked_before(
    key: int, entries: list[tuple[bytes, int, int, int, int, int, int, int, int]]
) -> None:
    marker = Marker(key)
    for entry in entries:
        assert marker.mark(*entry) == mark_in_words(key, *entry)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.binary(min_size=1, max_size=40).filter(lambda n: not {0, 47} & set(n) and n not in (b".", b"..")),
        unique=True,
        max_size=12,
    ),
    key=st.integers(0, (1 << 64) - 1),
    times=st.lists(st.integers(-(1 << 33), 1 << 33), min_size=12, max_size=12),
)
def test_the_kernel_sums_up_what_the_index_marks(
    tmp_path_factory: pytest.TempPathFactory, names: list[bytes], key: int, times: list[int]
) -> None:
    top = os.fsencode(tmp_path_factory.mktemp("sums"))
    for number, name in enumerate(names):
        path = top + b"/" + name
        make: list[Callable[[], object]] = [
            lambda path=path: os.mkdir(path, 0o1750),
            lambda path=path: os.mkfifo(path),
            lambda path=path: os.symlink(b"x" * 99, path),
            lambda path=path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o4711)),
        ]
        make[number % 4]()
        os.utime(path, ns=(0, times[number] * 10**9 + number), follow_symlinks=False)
    fd = os.open(top, os.O_RDONLY)
    try:
        ((found, below),) = Room().sum_up(fd, [b"."], key)
    finally:
        os.close(fd)
    expected = [0, 0, 0]
    marker = Marker(key)
    for name in names:
        if name.startswith(b".farshore-"):
            continue
        s = os.lstat(top + b"/" + name)
        one = marker.mark(
            name, s.st_mode, s.st_uid, s.st_gid, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino
        )
        expected = [expected[0] + 1, expected[1] + (one & 0xFFFFFFFF), expected[2] + ((one >> 32) & 0xFFFFFFFF)]
    assert found == tuple(expected)
    assert sorted(below) == sorted(name for name in names[::4] if not name.startswith(b".farshore-"))
    shutil.rmtree(top)
