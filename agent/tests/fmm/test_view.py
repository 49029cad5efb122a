"""A snapshot tells of files what the live tree tells, and goes on telling it when the live tree has changed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filesystems import filesystem_or_skip
from msgspec.structs import replace
from trees import Mutator

from farshore.config import Consistency
from farshore.dbm.snapshots import Snapshots
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Observed, Root
from farshore.fmm.view import Live, View, changed

Take = Callable[[list[Root]], View]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with filesystem_or_skip("btrfs", tmp_path_factory.mktemp("disk")) as where:
        yield where


@pytest.fixture
def tree(disk: Path) -> Iterator[Path]:
    made = disk / "tree"
    made.mkdir()
    yield made
    shutil.rmtree(made)


@pytest.fixture(params=["btrfs", "reflink"])
def take(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Take]:
    made: list[Snapshots] = []

    def called(roots: list[Root]) -> View:
        made.append(Snapshots("web", Consistency("snapshot", request.param), roots, tmp_path))
        return made[-1].take()

    yield called
    for each in made:
        each.close()
        each.thread.shutdown()


def everything(view: View, root: Root) -> dict[bytes, tuple[Observed, bytes | None]]:
    """All that a view tells of a root, with the contents of files."""
    filter = Filter(root)
    found: dict[bytes, tuple[Observed, bytes | None]] = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        seen = view.observe(0, path)
        assert seen is not None, path
        if path:
            status = view.look(0, path)
            assert status is not None
            assert (status.st_dev, status.st_ino, status.st_ctime_ns) == (seen.dev, seen.ino, seen.ctime_ns)
        content = None
        if seen.kind is FileKind.FILE:
            handle = view.open(0, path) if path else view.open_beneath(0, path)
            again = view.open_beneath(0, path)
            try:
                content = os.read(handle, 1 << 24)
                assert content == os.read(again, 1 << 24)
                told = view.status(handle, 0, path)
                assert (told.st_dev, told.st_ino, told.st_size) == (seen.dev, seen.ino, seen.size)
                assert view.observed(told, 0, path, handle).xattrs == seen.xattrs
            finally:
                os.close(handle)
                os.close(again)
        elif seen.kind is FileKind.DIRECTORY:
            pending += [path + b"/" + name if path else name for name, _ in view.names(0, path, filter)]
        # Blocks are counted differently while they are on their way to the disk; reading sets no access time of ours.
        found[path] = replace(seen, blocks=0, atime_ns=0), content
    view.forget()
    return found


def test_a_snapshot_tells_what_the_live_tree_tells(take: Take, tree: Path) -> None:
    # Not in the root itself: what a snapshot needs there is not for a mutator.
    (tree / "random").mkdir()
    mutator = Mutator(tree / "random", 7)
    for _ in range(120):
        mutator.step()
    (tree / "one").write_text("1")
    os.link(tree / "one", tree / "two")
    os.mkfifo(tree / "fifo")
    (tree / "left out").write_text("x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    root = Root(os.fsencode(tree), exclude=("left out",))
    os.sync()
    before = everything(Live([root]), root)
    view = take([root])
    for _ in range(120):
        mutator.step()
    (tree / "one").unlink()
    after = everything(view, root)
    # What is made in the root for it changes the root's ctime and size.
    for all_of_it in (before, after):
        all_of_it[b""] = replace(all_of_it[b""][0], ctime_ns=0, size=0), None
    assert after == before
    assert b"left out" not in after


def test_what_is_not_there_is_told_as_such(take: Take, tree: Path) -> None:
    (tree / "a").write_text("1")
    view = take([Root(os.fsencode(tree))])
    assert view.look(0, b"b") is None
    assert view.observe(0, b"b") is None
    assert view.observe(0, b"a/b") is None
    for open_it in (view.open, view.open_beneath):
        with pytest.raises(FileNotFoundError):
            open_it(0, b"b")
    with pytest.raises(FileNotFoundError):
        list(view.names(0, b"b", Filter(Root(b"/"))))
    with pytest.raises(NotADirectoryError):
        list(view.names(0, b"a", Filter(Root(b"/"))))
    assert not view.is_empty(0)


def test_a_root_may_be_one_file(take: Take, tree: Path) -> None:
    (tree / "a").write_text("1")
    view = take([Root(os.fsencode(tree / "a"))])
    (tree / "a").write_text("2")
    seen = view.observe(0, b"")
    assert seen is not None and seen.ino == (tree / "a").stat().st_ino
    handle = view.open_beneath(0, b"")
    assert os.read(handle, 9) == b"1"
    os.close(handle)


def test_a_copy_that_is_gone_is_no_removed_file(disk: Path, tree: Path, tmp_path: Path) -> None:
    (tree / "a").write_text("1")
    snapshots = Snapshots("web", Consistency("snapshot", "reflink"), [Root(os.fsencode(tree))], tmp_path)
    view = snapshots.take()
    snapshots.close()
    with pytest.raises(OSError) as caught:
        view.open(0, b"a")
    assert caught.value.errno == errno.EIO
    assert view.look(0, b"a") is not None


def test_only_the_device_is_changed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    status = (tmp_path / "a").stat()
    told = changed(status, 4711)
    assert told.st_dev == 4711
    names = [name for name in dir(status) if name.startswith("st_") and name != "st_dev"]
    assert [getattr(told, name) for name in names] == [getattr(status, name) for name in names]
    with contextlib.suppress(AttributeError):
        assert told.st_mtime_ns == status.st_mtime_ns
