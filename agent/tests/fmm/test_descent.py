"""Many watches at one go: what is watched is what is there, and what is not says why."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator

import pyinotify
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.fmm import descent as module
from farshore.fmm.descent import ELSEWHERE, TOO_LARGE, Descent, Found
from farshore.fmm.inotify import InotifyWatcher
from farshore.fmm.types import Root

MASK = pyinotify.IN_CREATE | pyinotify.IN_ONLYDIR | pyinotify.IN_MASK_ADD


class Instance:
    """An inotify instance, with the directory ``top`` open."""

    def __init__(self, top: bytes) -> None:
        self.system = pyinotify.INotifyWrapper.create()
        self.inotify = self.system.inotify_init()
        self.top = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        self.top_wd = self.wd(self.top)
        self.descent = Descent(self.inotify, MASK)

    def wd(self, fd: int) -> int:
        """What the kernel calls a directory."""
        return int(self.system.inotify_add_watch(self.inotify, f"/proc/self/fd/{fd}", MASK))

    def wd_of(self, path: bytes) -> int:
        """The same by path."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return self.wd(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give all back."""
        os.close(self.top)
        os.close(self.inotify)


@pytest.fixture
def instance(top: bytes) -> Iterator[Instance]:
    made = Instance(top)
    yield made
    made.close()


def test_what_is_watched_is_what_is_there(instance: Instance, top: bytes) -> None:
    os.makedirs(top + b"/a/b/c")
    os.makedirs(top + b"/a/d\xff")
    open(top + b"/a/f", "wb").close()
    os.symlink(b"a", top + b"/l")
    ((wd, found),) = instance.descent.watch(instance.top, [(b"", instance.top_wd, [b"a", b"l", b"a/f", b"no"])], None)
    assert wd == instance.top_wd
    a, link, file, nothing = found
    assert (a.wd, a.problem, sorted(a.names)) == (instance.wd_of(top + b"/a"), 0, [b"b", b"d\xff"])
    assert link.wd in (-errno.ENOTDIR, -errno.ELOOP) and file.wd == -errno.ENOTDIR
    assert nothing == Found(-errno.ENOENT, 0, [])
    (b, nothing), (below, (d,)) = instance.descent.watch(
        instance.top, [(b"a/b", instance.wd_of(top + b"/a/b"), [b"c"]), (b"a", a.wd, [b"d\xff"])], None
    )
    assert (b, below) == (instance.wd_of(top + b"/a/b"), a.wd)
    assert nothing == [Found(instance.wd_of(top + b"/a/b/c"), 0, [])]
    assert d == Found(instance.wd_of(top + b"/a/d\xff"), 0, [])


def test_below_another_directory_than_the_one_that_is_meant_nothing_is_watched(instance: Instance, top: bytes) -> None:
    os.makedirs(top + b"/a/b")
    os.makedirs(top + b"/c/b")
    wd = instance.wd_of(top + b"/a")
    os.rename(top + b"/a", top + b"/moved")
    os.rename(top + b"/c", top + b"/a")
    ((is_wd, found),) = instance.descent.watch(instance.top, [(b"a", wd, [b"b"])], None)
    assert is_wd == instance.wd_of(top + b"/a") != wd
    assert found == []
    # The next number is the next watch's.
    assert instance.wd_of(top + b"/moved/b") == is_wd + 1
    assert instance.descent.watch(instance.top, [(b"gone", wd, [b"b"])], None) == [(-errno.ENOENT, [])]


def test_another_filesystem_is_left_alone(instance: Instance, top: bytes) -> None:
    os.makedirs(top + b"/a/b")
    parents = [(b"", instance.top_wd, [b"a"])]
    ((_, found),) = instance.descent.watch(instance.top, parents, os.makedev(4000, 123456))
    assert found == [Found(-ELSEWHERE, 0, [])]
    ((_, found),) = instance.descent.watch(instance.top, parents, os.stat(top).st_dev)
    assert found == [Found(instance.top_wd + 1, 0, [b"b"])]


def test_more_names_than_there_is_room_for(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(100):
        os.makedirs(top + b"/many/%030d/x" % n)
    os.makedirs(top + b"/few/y")
    monkeypatch.setattr(module, "_NAMES", 1000)
    instance = Instance(top)
    try:
        ((_, found),) = instance.descent.watch(instance.top, [(b"", instance.top_wd, [b"many", b"few"])], None)
        assert [(each.problem, each.names) for each in found] == [(TOO_LARGE, []), (0, [b"y"])]
    finally:
        instance.close()
    watcher = InotifyWatcher([Root(top)])
    try:
        watcher.start()
        assert watcher.counts().directories == 1 + 1 + 200 + 2
        assert watcher.problems() == ()
    finally:
        watcher.close()


def test_a_directory_of_many(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are watched at one go, and more than are listed at one go."""
    for n in range(3000):
        os.mkdir(top + b"/%040d" % n)
    os.makedirs(top + b"/z/y/x")
    watcher = InotifyWatcher([Root(top)])
    try:
        watcher.start()
        assert watcher.counts().directories == 3000 + 4
    finally:
        watcher.close()


def test_a_large_tree_where_no_thread_can_be_had(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(1500):
        os.makedirs(top + b"/%d/%d" % (n % 30, n))

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    watcher = InotifyWatcher([Root(top)])
    try:
        watcher.start()
        assert watcher.counts().directories == 1 + 30 + 1500
    finally:
        watcher.close()


names = st.binary(min_size=1, max_size=8).map(lambda raw: raw.replace(b"/", b"s").replace(b"\0", b"0"))
trees = st.recursive(
    st.just({}),
    lambda below: st.dictionaries(names.filter(lambda n: n not in (b".", b"..")), below, max_size=4),
    max_leaves=20,
)


@given(tree=trees)
def test_any_tree_is_watched_in_full(tree: dict[bytes, dict[bytes, object]]) -> None:
    top = os.fsencode(tempfile.mkdtemp())
    made = {b""}

    def make(below: dict[bytes, object], path: bytes) -> None:
        for name, rest in below.items():
            os.mkdir(top + b"/" + path + name)
            made.add(path + name)
            make(rest, path + name + b"/")  # type: ignore[arg-type]

    try:
        make(tree, b"")  # type: ignore[arg-type]
        watcher = InotifyWatcher([Root(top)])
        watcher.start()
        found = set()
        for node in watcher._nodes.values():
            assert watcher._locate(node) is not None
            found.add(node.base[:-1])
        assert found == {path for path in made if not path.split(b"/")[-1].startswith(b".farshore")}
        watcher.close()
    finally:
        shutil.rmtree(top)
