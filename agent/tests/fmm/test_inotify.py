"""The inotify engine on a real filesystem."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from farshore.fmm import Counts, Hint, Kind, Root, WatchError
from farshore.fmm.inotify import InotifyWatcher
from farshore.fmm.protected import Protected
from farshore.fmm.types import Inode

from .conftest import Clock, Watch, covered, directories, joined, map_of, until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
PARENT = Kind.MODIFIED | Kind.ATTRIBUTES


def touch(path: bytes, data: bytes = b"") -> None:
    with open(path, "ab") as file:
        file.write(data)


# Each change that FMM promises to report.


def test_nothing_happens(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    assert watcher.read(0) == []
    assert watcher.drain() == []
    assert watcher.problems() == ()


def test_creation(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    touch(top + b"/f")
    seen = joined(watcher.drain())
    assert Kind.CREATED in seen[b"f"]
    assert seen[b""] == PARENT


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(b"nowhere", path)])
def test_creation_of_other_kinds(watch: Watch, top: bytes, make: Callable[[bytes], None]) -> None:
    watcher = watch(top)
    make(top + b"/x")
    assert joined(watcher.drain()) == {b"x": Kind.CREATED, b"": PARENT}


def test_unnamed_file_that_gets_a_name(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    fd = os.open(top, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"x")
    # Only with a dir_fd does Python make the call that follows the link.
    os.link(f"/proc/self/fd/{fd}", top + b"/f", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    assert Kind.CREATED in joined(watcher.drain())[b"f"]


def test_names_that_come_for_files_that_have_others(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    touch(top + b"/single")
    watcher = watch(top)
    os.link(top + b"/f", top + b"/g")
    os.rename(top + b"/single", top + b"/moved")
    status = os.stat(top + b"/f")
    inode = status.st_dev, status.st_ino

    def links() -> set[tuple[bytes, Inode]]:
        return {(hint.path, hint.inode) for hint in watcher.drain() if hint.inode is not None}

    assert links() == {(b"g", inode)}
    os.rename(top + b"/g", top + b"/h")
    assert links() == {(b"h", inode)}
    touch(top + b"/h")
    touch(top + b"/moved")
    assert links() == {(b"h", inode)}
    os.chmod(top + b"/f", 0o600)
    assert not links()


def test_deletion(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch(top)
    os.unlink(top + b"/f")
    assert joined(watcher.drain()) == {b"f": Kind.DELETED, b"": PARENT}


def test_deletion_of_a_tree(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/d/e")
    touch(top + b"/d/e/f")
    watcher = watch(top)
    shutil.rmtree(top + b"/d")
    seen = joined(watcher.drain())
    assert all(Kind.DELETED in seen[path] for path in (b"d", b"d/e", b"d/e/f"))
    assert map_of(watcher) == {b""}


def test_renaming(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch(top)
    os.rename(top + b"/f", top + b"/g")
    assert joined(watcher.drain()) == {b"f": Kind.MOVED_FROM, b"g": Kind.MOVED_TO, b"": PARENT}


def write(path: bytes) -> None:
    touch(path, b"more")


def fallocate(path: bytes) -> None:
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)


def write_mapped(path: bytes) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4) as mapped:
        file.close()
        mapped[0:4] = b"mmap"


@pytest.mark.parametrize("change", [write, fallocate, write_mapped, lambda path: os.truncate(path, 1)])
def test_modification_of_content_size_and_blocks(watch: Watch, top: bytes, change: Callable[[bytes], None]) -> None:
    touch(top + b"/f", b"content")
    watcher = watch(top)
    change(top + b"/f")
    assert joined(watcher.drain()) == {b"f": Kind.MODIFIED}


def test_modification_through_a_descriptor_held_since_before(watch: Watch, top: bytes) -> None:
    with open(top + b"/f", "wb", buffering=0) as file:
        watcher = watch(top)
        file.write(b"x")
        assert joined(watcher.drain()) == {b"f": Kind.MODIFIED}
        os.rename(top + b"/f", top + b"/g")
        file.write(b"x")
        assert Kind.MODIFIED in joined(watcher.drain())[b"g"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: os.chmod(path, 0o604), id="mode"),
        pytest.param(lambda path: os.chown(path, 12, -1), id="user", marks=needs_root),
        pytest.param(lambda path: os.chown(path, -1, 12), id="group", marks=needs_root),
        pytest.param(lambda path: os.utime(path, (5, 5)), id="times"),
        pytest.param(lambda path: subprocess.run(["touch", "-h", "-m", "-d", "@7", path], check=True), id="mtime"),
        pytest.param(lambda path: os.setxattr(path, "user.x", b"1"), id="xattr"),
    ],
)
@pytest.mark.parametrize("name", [b"f", b"d", b""])
def test_attributes(watch: Watch, top: bytes, name: bytes, change: Callable[[bytes], object]) -> None:
    touch(top + b"/f")
    os.mkdir(top + b"/d")
    watcher = watch(top)
    change(top + b"/" + name)
    seen = joined(watcher.drain())
    assert set(seen) == {name}
    assert seen[name] & PARENT


def test_access_time_when_reads_are_wanted(watch: Watch, top: bytes) -> None:
    touch(top + b"/f", b"x")
    with_reads, without = watch(top, reads=True), watch(top)
    # With -h, touch does not open the file for writing, which would be reported by itself.
    subprocess.run(["touch", "-h", "-a", "-d", "@7", top + b"/f"], check=True)
    assert joined(with_reads.drain()) == {b"f": Kind.ATTRIBUTES}
    with open(top + b"/f", "rb") as file:
        file.read()
    os.listdir(top)
    assert joined(with_reads.drain()) == {b"f": Kind.ATTRIBUTES}
    assert without.drain() == []


def test_type_and_inode(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    touch(top + b"/g")
    os.mkdir(top + b"/d")
    watcher = watch(top)
    os.rename(top + b"/g", top + b"/f")
    os.rmdir(top + b"/d")
    os.symlink(b"f", top + b"/d")
    seen = joined(watcher.drain())
    assert Kind.MOVED_TO in seen[b"f"]
    assert Kind.DELETED | Kind.CREATED in seen[b"d"]
    assert map_of(watcher) == {b""}


# Directories.


def test_new_directory_is_watched_and_to_be_scanned(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    os.makedirs(top + b"/a/b/c")
    touch(top + b"/a/b/c/x")
    seen = joined(watcher.drain())
    assert Kind.RESCAN in seen[b"a"]
    assert covered(b"a/b/c/x", seen)
    assert map_of(watcher) == {b"", b"a", b"a/b", b"a/b/c"}
    touch(top + b"/a/b/c/y")
    assert Kind.CREATED in joined(watcher.drain())[b"a/b/c/y"]


def test_renamed_directory_reports_the_new_path_and_keeps_its_watches(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/b/c")
    os.mkdir(top + b"/z")
    touch(top + b"/a/b/c/x")
    watcher = watch(top)
    watches = set(watcher._nodes)
    os.rename(top + b"/a", top + b"/z/n")
    touch(top + b"/z/n/b/c/x", b"1")
    seen = joined(watcher.drain())
    assert seen[b"a"] == Kind.MOVED_FROM | Kind.RESCAN
    assert Kind.MOVED_TO | Kind.RESCAN in seen[b"z/n"]
    touch(top + b"/z/n/b/c/x", b"2")
    assert joined(watcher.drain()) == {b"z/n/b/c/x": Kind.MODIFIED}
    assert set(watcher._nodes) == watches
    assert map_of(watcher) == directories(top)


def test_chain_of_renames_before_anything_is_read(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/n0/b")
    watcher = watch(top)
    for n in range(20):
        os.rename(top + b"/n%d" % n, top + b"/n%d" % (n + 1))
    os.mkdir(top + b"/n0")
    watcher.drain()
    touch(top + b"/n20/b/x")
    touch(top + b"/n0/x")
    assert {b"n20/b/x", b"n0/x"} <= set(joined(watcher.drain()))
    assert map_of(watcher) == directories(top)


def test_exchanged_directories(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/in_a")
    os.makedirs(top + b"/b/in_b")
    touch(top + b"/f")
    watcher = watch(top)
    exchange(top + b"/a", top + b"/b")
    watcher.drain()
    assert map_of(watcher) == {b"", b"a", b"a/in_b", b"b", b"b/in_a"}
    exchange(top + b"/a", top + b"/f")
    watcher.drain()
    assert map_of(watcher) == {b"", b"f", b"f/in_b", b"b", b"b/in_a"}
    touch(top + b"/b/in_a/x")
    assert Kind.CREATED in joined(watcher.drain())[b"b/in_a/x"]


def exchange(a: bytes, b: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, a, -100, b, 2):
        pytest.skip(f"no RENAME_EXCHANGE here: {os.strerror(ctypes.get_errno())}")


def test_moved_out_is_not_watched_any_more(watch: Watch, top: bytes, tmp_path: Path, clock: Clock) -> None:
    out = os.fsencode(tmp_path) + b"/out"
    os.makedirs(top + b"/a/b")
    watcher = watch(top, clock=clock)
    os.rename(top + b"/a", out)
    touch(out + b"/b/x")
    assert joined(watcher.drain()) == {b"a": Kind.MOVED_FROM | Kind.RESCAN, b"": PARENT}
    clock.now += 2
    assert watcher.read(0) == []
    assert len(watcher._nodes) == 1
    touch(out + b"/b/y")
    assert watcher.drain() == []


def test_moved_in_and_out_and_in_again(watch: Watch, top: bytes, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/out"
    os.makedirs(out + b"/b/c")
    touch(out + b"/b/c/x")
    watcher = watch(top)
    os.rename(out, top + b"/in")
    seen = joined(watcher.drain())
    assert covered(b"in/b/c/x", seen)
    os.rename(top + b"/in", out)
    watcher.drain()
    touch(out + b"/b/c/y")
    os.rename(out, top + b"/again")
    seen = joined(watcher.drain())
    assert Kind.RESCAN in seen[b"again"]
    assert map_of(watcher) == {b"", b"again", b"again/b", b"again/b/c"}


def test_moved_between_roots(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/one/d/e")
    os.makedirs(top + b"/two")
    watcher = watch(top + b"/one", top + b"/two")
    os.rename(top + b"/one/d", top + b"/two/d")
    hints = watcher.drain()
    assert Kind.RESCAN in joined(hints, 0)[b"d"]
    assert Kind.RESCAN in joined(hints, 1)[b"d"]
    touch(top + b"/two/d/e/x")
    hints = watcher.drain()
    assert b"d/e/x" in joined(hints, 1)
    assert not joined(hints, 0)


def test_symlinks_are_not_followed(watch: Watch, top: bytes, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/out"
    os.mkdir(out)
    os.symlink(out, top + b"/old")
    watcher = watch(top)
    os.symlink(out, top + b"/new")
    assert joined(watcher.drain()) == {b"new": Kind.CREATED, b"": PARENT}
    touch(out + b"/x")
    assert watcher.drain() == []
    assert len(watcher._nodes) == 1


def test_very_deep_tree(watch: Watch, top: bytes) -> None:
    name = b"d" * 100
    watcher = watch(top)
    here = os.open(top, os.O_RDONLY)
    for _ in range(100):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    watcher.drain()
    assert len(watcher._nodes) == 101
    os.close(os.open(b"x", os.O_CREAT, dir_fd=here))
    assert b"/".join([name] * 100 + [b"x"]) in joined(watcher.drain())
    os.mkdir(b"e", dir_fd=here)
    os.close(os.open(b"e/x", os.O_CREAT, dir_fd=here))
    assert covered(b"/".join([name] * 100 + [b"e", b"x"]), joined(watcher.drain()))
    assert len(watcher._nodes) == 102
    os.close(here)
    watcher.pause()
    watcher.resume()
    assert len(watcher._nodes) == 102
    shutil.rmtree(top)


@pytest.mark.parametrize("name", [b"\xff\n", b"\xc3\x28 =\x01", b" ", "ä\u2028".encode(), b"-\\*?[", b"x" * 255])
def test_names_of_any_bytes(watch: Watch, top: bytes, name: bytes) -> None:
    os.mkdir(top + b"/" + name)
    watcher = watch(top)
    touch(top + b"/" + name + b"/" + name)
    assert joined(watcher.drain())[name + b"/" + name] == Kind.CREATED | Kind.MODIFIED
    os.rename(top + b"/" + name, top + b"/d")
    os.mkdir(top + b"/" + name)
    touch(top + b"/" + name + b"/x")
    seen = joined(watcher.drain())
    assert covered(name + b"/x", seen)
    touch(top + b"/" + name + b"/x", b"1")
    assert joined(watcher.drain()) == {name + b"/x": Kind.MODIFIED}


def test_root_of_any_bytes(watch: Watch, top: bytes) -> None:
    os.mkdir(top + b"/\xff\n")
    watcher = watch(top + b"/\xff\n")
    touch(top + b"/\xff\n/\xfe")
    assert b"\xfe" in joined(watcher.drain())
    shutil.rmtree(top + b"/\xff\n")
    watcher.drain()
    assert watcher.problems()


def test_no_duplicates_in_one_read(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    for n in range(100):
        for name in (b"/a", b"/b"):
            touch(top + name, b"%d" % n)
    hints = watcher.drain()
    assert len(hints) == len({hint.path for hint in hints}) == 3


# Patterns.


def test_excluded_paths_give_no_hints_and_no_watches(watch: Watch, top: bytes) -> None:
    for name in (b"/cache/deep", b"/data/cache", b"/.farshore-1"):
        os.makedirs(top + name)
    watcher = watch(Root(top, exclude=("cache/", "*.tmp")))
    assert map_of(watcher) == {b"", b"data"}
    for name in (b"/x.tmp", b"/data/y.tmp", b"/cache/f", b"/cache/deep/f", b"/.farshore-1/f", b"/.farshore-2"):
        touch(top + name)
    os.mkdir(top + b"/data/new.tmp")
    os.makedirs(top + b"/.farshore-3/d")
    os.chmod(top + b"/cache", 0o700)
    assert joined(watcher.drain()) == {b"": PARENT, b"data": PARENT}, "their modification times have changed"
    assert map_of(watcher) == {b"", b"data"}
    touch(top + b"/data/.farshore-4")
    assert watcher.drain() == []
    touch(top + b"/data/good")
    assert b"data/good" in joined(watcher.drain())


def test_include_below_an_excluded_directory_is_watched(watch: Watch, top: bytes) -> None:
    for name in (b"/cache/keep/deep", b"/cache/other"):
        os.makedirs(top + name)
    watcher = watch(Root(top, include=("cache/keep/",), exclude=("cache/",)))
    assert map_of(watcher) == {b"", b"cache", b"cache/keep", b"cache/keep/deep"}
    touch(top + b"/cache/x")
    touch(top + b"/cache/keep/deep/x")
    seen = joined(watcher.drain())
    assert b"cache/keep/deep/x" in seen
    assert b"cache/x" not in seen


def test_directory_renamed_out_of_and_into_exclusion(watch: Watch, top: bytes, clock: Clock) -> None:
    os.makedirs(top + b"/data/cache")
    watcher = watch(Root(top, exclude=("cache/", "/off")), clock=clock)
    os.rename(top + b"/data/cache", top + b"/data/open")
    watcher.drain()
    assert map_of(watcher) == {b"", b"data", b"data/open"}
    os.rename(top + b"/data", top + b"/off")
    assert b"off" not in joined(watcher.drain())
    assert map_of(watcher) == {b""}
    clock.now += 2
    watcher.read(0)
    assert len(watcher._nodes) == 1
    touch(top + b"/off/open/x")
    assert watcher.drain() == []
    os.rename(top + b"/off", top + b"/on")
    assert Kind.RESCAN in joined(watcher.drain())[b"on"]
    assert map_of(watcher) == {b"", b"on", b"on/open"}


# Single files.


def test_file_root(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    touch(top + b"/other")
    watcher = watch(top + b"/f", top + b"/other")
    touch(top + b"/f", b"x")
    assert watcher.drain() == [Hint(0, b"", Kind.MODIFIED)]
    touch(top + b"/nobody", b"x")
    os.mkdir(top + b"/d")
    assert watcher.drain() == []
    touch(top + b"/new", b"x")
    os.rename(top + b"/new", top + b"/f")
    assert watcher.drain() == [Hint(0, b"", Kind.MOVED_TO)]
    touch(top + b"/f", b"x")
    assert watcher.drain() == [Hint(0, b"", Kind.MODIFIED)]
    os.chmod(top + b"/other", 0o600)
    assert watcher.drain() == [Hint(1, b"", Kind.ATTRIBUTES)]
    os.unlink(top + b"/f")
    touch(top + b"/f")
    assert Kind.CREATED | Kind.DELETED in joined(watcher.drain())[b""]
    assert watcher.problems() == ()


def test_file_root_missing_at_resume_is_seen_when_it_returns(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch(top + b"/f")
    watcher.pause()
    os.unlink(top + b"/f")
    assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
    touch(top + b"/f")
    assert Kind.CREATED in joined(watcher.drain())[b""]


def test_file_root_whose_directory_goes_and_returns(watch: Watch, top: bytes) -> None:
    os.mkdir(top + b"/d")
    touch(top + b"/d/f")
    watcher = watch(top + b"/d/f")
    os.rename(top + b"/d", top + b"/e")
    until(watcher, lambda hints: bool(watcher.problems()))
    os.mkdir(top + b"/d")
    touch(top + b"/d/f")
    hints = until(watcher, lambda hints: not watcher.problems())
    assert Kind.RESCAN in joined(hints)[b""]
    touch(top + b"/e/f", b"x")
    touch(top + b"/d/f", b"x")
    assert watcher.drain() == [Hint(0, b"", Kind.MODIFIED)]


def test_root_that_turns_from_file_to_directory_and_back(watch: Watch, top: bytes) -> None:
    touch(top + b"/r")
    watcher = watch(top + b"/r")
    os.unlink(top + b"/r")
    os.makedirs(top + b"/r/d")
    assert Kind.RESCAN in joined(watcher.drain())[b""]
    touch(top + b"/r/d/x")
    assert b"d/x" in joined(watcher.drain())
    shutil.rmtree(top + b"/r")
    touch(top + b"/r")
    assert Kind.RESCAN in joined(watcher.drain())[b""]
    touch(top + b"/r", b"x")
    assert watcher.drain() == [Hint(0, b"", Kind.MODIFIED)]


def test_file_root_that_is_a_symlink(watch: Watch, top: bytes) -> None:
    os.symlink(b"nowhere", top + b"/l")
    watcher = watch(top + b"/l")
    os.symlink(b"elsewhere", top + b"/new")
    os.rename(top + b"/new", top + b"/l")
    assert joined(watcher.drain()) == {b"": Kind.MOVED_TO}


# Roots that come and go.


def test_directory_root_through_a_symlink(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/one/d")
    os.makedirs(top + b"/two/d")
    os.symlink(b"one", top + b"/link")
    watcher = watch(top + b"/link")
    touch(top + b"/one/d/x")
    assert b"d/x" in joined(watcher.drain())
    os.unlink(top + b"/link")
    os.symlink(b"two", top + b"/link")
    assert Kind.RESCAN in joined(watcher.drain())[b""]
    touch(top + b"/two/d/x")
    assert b"d/x" in joined(watcher.drain())


@pytest.mark.parametrize("how", ["rmtree", "rename", "rename above"])
def test_root_that_goes_is_a_problem_until_it_returns(watch: Watch, top: bytes, how: str) -> None:
    root = top + b"/above/root"
    os.makedirs(root + b"/d")
    watcher = watch(root)
    if how == "rmtree":
        shutil.rmtree(root)
    elif how == "rename":
        os.rename(root, top + b"/gone")
    else:
        os.rename(top + b"/above", top + b"/gone")
    hints = until(watcher, lambda hints: bool(watcher.problems()))
    assert Kind.RESCAN in joined(hints)[b""]
    assert "above/root" in watcher.problems()[0]
    assert Kind.RESCAN in joined(watcher.drain())[b""], "nothing is known, so all is in doubt"
    os.makedirs(root + b"/e")
    hints = until(watcher, lambda hints: not watcher.problems())
    assert Kind.RESCAN in joined(hints)[b""]
    touch(root + b"/e/x")
    assert joined(watcher.drain())[b"e/x"] == Kind.CREATED | Kind.MODIFIED
    assert map_of(watcher) == directories(root)


@needs_root
def test_root_that_is_unmounted(watch: Watch, top: bytes) -> None:
    root = top + b"/mnt"
    os.mkdir(root)

    def mount() -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "none", root], capture_output=True)
        if done.returncode:
            pytest.skip("cannot mount here")

    mount()
    try:
        os.makedirs(root + b"/d/e")
        watcher = watch(root)
        subprocess.run(["umount", root], check=True)
        assert Kind.RESCAN in joined(until(watcher, lambda hints: bool(watcher.problems())))[b""]
        assert "another filesystem" in watcher.problems()[0]
        touch(root + b"/x")
        assert b"x" in joined(watcher.drain())
        os.unlink(root + b"/x")
        mount()
        assert Kind.RESCAN in joined(watcher.drain())[b""]
        os.mkdir(root + b"/d")
        assert b"d" in joined(watcher.drain())
    finally:
        subprocess.run(["umount", root], check=False, capture_output=True)


@needs_root
def test_another_filesystem_is_not_watched_where_one_is_enough(watch: Watch, top: bytes) -> None:
    place = top + b"/a/mnt"
    os.makedirs(place)
    if subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        os.makedirs(place + b"/x/y")
        watcher = watch(Root(top, one_filesystem=True))
        assert map_of(watcher) == {b"", b"a"}
        touch(place + b"/f")
        touch(place + b"/x/f")
        assert watcher.drain() == []
        os.makedirs(top + b"/b/c")
        until(watcher, lambda hints: covered(b"b/c", joined(hints)))
        watcher.drain()
        assert map_of(watcher) == {b"", b"a", b"b", b"b/c"}
        assert watcher.problems() == ()
        assert map_of(watch(Root(top))) == directories(top)
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
def test_unmount_below_the_root(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/mnt/hidden")
    if subprocess.run(["mount", "-t", "tmpfs", "none", top + b"/a/mnt"], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        os.makedirs(top + b"/a/mnt/d/e")
        watcher = watch(top)
        touch(top + b"/a/mnt/d/e/x")
        assert b"a/mnt/d/e/x" in joined(watcher.drain())
    finally:
        subprocess.run(["umount", top + b"/a/mnt"], check=True)
    assert Kind.RESCAN in joined(watcher.drain())[b"a/mnt"]
    assert map_of(watcher) == directories(top)
    assert watcher.problems() == ()


@needs_root
def test_bind_mount_is_a_problem(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/d")
    os.mkdir(top + b"/b")
    if subprocess.run(["mount", "--bind", top + b"/a", top + b"/b"], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        watcher = watch(top)
        assert "bind mount" in watcher.problems()[0]
        touch(top + b"/a/d/x")
        seen = joined(watcher.drain())
        assert covered(b"a/d/x", seen)
        assert covered(b"b/d/x", seen)
    finally:
        subprocess.run(["umount", top + b"/b"], check=True)
    watcher.drain()
    assert watcher.problems() == ()
    assert map_of(watcher) == directories(top)


@pytest.mark.parametrize("below", [b"", b"/", b"/d", b"/link/d"])
def test_roots_in_each_other_are_refused(top: bytes, below: bytes) -> None:
    os.mkdir(top + b"/d")
    os.symlink(top, top + b"/link")
    watcher = InotifyWatcher([Root(top), Root(top + below)])
    with pytest.raises(WatchError, match="lies in"):
        watcher.start()
    watcher.close()


def test_neighbours_are_not_in_each_other(watch: Watch, top: bytes) -> None:
    for name in (b"/a", b"/a-b", b"/ab"):
        os.mkdir(top + name)
    watch(top + b"/a", top + b"/a-b", top + b"/ab")


def test_missing_root(top: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.mkdir(top + b"/yes")
    watcher = InotifyWatcher([Root(top + b"/yes"), Root(top + b"/no")])
    with pytest.raises(WatchError, match="does not exist") as caught:
        watcher.start()
    assert caught.value.root == top + b"/no"
    watcher.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_start_can_be_tried_again(top: bytes) -> None:
    watcher = InotifyWatcher([Root(top + b"/later")])
    with pytest.raises(WatchError):
        watcher.start()
    os.mkdir(top + b"/later")
    assert watcher.start() == [Hint(0, b"", Kind.RESCAN)]
    touch(top + b"/later/x")
    assert b"x" in joined(watcher.drain())
    watcher.close()


def test_relative_root() -> None:
    with pytest.raises(WatchError, match="absolute"):
        InotifyWatcher([Root(b"relative")])


# Pause, resume, wake, close.


def test_pause_gives_back_and_resume_covers_the_gap(watch: Watch, top: bytes) -> None:
    os.mkdir(top + b"/d")
    watcher = watch(top)
    before = len(os.listdir("/proc/self/fd"))
    watcher.pause()
    watcher.pause()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    touch(top + b"/d/x")
    os.mkdir(top + b"/e")
    assert watcher.read(0) == []
    assert watcher.drain() == []
    assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
    assert watcher.resume() == []
    touch(top + b"/e/y")
    assert b"e/y" in joined(watcher.drain())


def test_resume_of_a_root_that_went_meanwhile(watch: Watch, top: bytes) -> None:
    os.mkdir(top + b"/r")
    watcher = watch(top + b"/r")
    watcher.pause()
    os.rmdir(top + b"/r")
    assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
    assert "does not exist" in watcher.problems()[0]
    os.mkdir(top + b"/r")
    assert watcher.drain() == [Hint(0, b"", Kind.RESCAN)]
    assert watcher.problems() == ()


@pytest.mark.parametrize("paused", [False, True])
def test_wake_ends_a_blocked_read(watch: Watch, top: bytes, paused: bool) -> None:
    watcher = watch(top)
    if paused:
        watcher.pause()
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(watcher.read(600)))
    reader.start()
    watcher.wake()
    reader.join(60)
    assert results == [[]]


def test_a_change_ends_a_blocked_read(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    results: list[Hint] = []
    reader = threading.Thread(target=lambda: results.extend(watcher.read(600)))
    reader.start()
    touch(top + b"/x")
    reader.join(60)
    assert b"x" in joined(results)


def test_close_releases_everything(top: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watcher = InotifyWatcher([Root(top)])
    watcher.start()
    watcher.close()
    watcher.close()
    watcher.wake()
    watcher.pause()
    assert watcher.read(5) == []
    assert watcher.drain() == []
    assert watcher.resume() == []
    with pytest.raises(ValueError, match="closed"):
        watcher.start()
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_leaks_with_use(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        os.makedirs(top + b"/a%d/b/c" % n)
        os.rename(top + b"/a%d" % n, top + b"/z%d" % n)
        watcher.drain()
        shutil.rmtree(top + b"/z%d" % n)
        watcher.read(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_drain_ends_while_changes_keep_coming(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    stop = threading.Event()

    def churn() -> None:
        with open(top + b"/a", "wb", 0) as a, open(top + b"/b", "wb", 0) as b:
            while not stop.is_set():
                a.write(b"x")
                b.write(b"x")

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        for n in range(50):
            touch(top + b"/n%d" % n)
            seen = joined(watcher.drain())
            assert b"n%d" % n in seen or Kind.RESCAN in seen[b""]
    finally:
        stop.set()
        writer.join()


# Limits.


def queue_limit() -> int:
    with open("/proc/sys/fs/inotify/max_queued_events") as file:
        return int(file.read())


def test_overflow_puts_everything_in_doubt(watch: Watch, top: bytes) -> None:
    limit = queue_limit()
    if limit > 200_000:
        pytest.skip(f"fs.inotify.max_queued_events is {limit}")
    os.mkdir(top + b"/one")
    os.mkdir(top + b"/two")
    watcher = watch(top + b"/one", top + b"/two")
    with open(top + b"/one/a", "wb", 0) as a, open(top + b"/one/b", "wb", 0) as b:
        for _ in range(limit // 2 + 10):
            a.write(b"x")
            b.write(b"x")
    os.makedirs(top + b"/one/lost/deep")
    hints = watcher.drain()
    assert Kind.RESCAN in joined(hints, 0)[b""]
    assert Kind.RESCAN in joined(hints, 1)[b""]
    watcher.drain()
    touch(top + b"/one/lost/deep/x")
    assert watcher.drain() == [Hint(0, b"lost/deep/x", Kind.CREATED | Kind.MODIFIED), Hint(0, b"lost/deep", PARENT)]
    assert map_of(watcher) == {b"", b"lost", b"lost/deep"}


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, refused: Callable[[bytes], bool]) -> None:
    """Let the kernel refuse to watch some directories."""
    real = InotifyWatcher._add_watch

    def add(self: InotifyWatcher, fd: int) -> int:
        if refused(os.readlink(b"/proc/self/fd/%d" % fd)):
            self._exhausted = self._exhausted or code == errno.ENOSPC
            raise OSError(code, os.strerror(code))
        return real(self, fd)

    monkeypatch.setattr(InotifyWatcher, "_add_watch", add)


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "sysctl -w fs.inotify.max_user_watches="), (errno.EACCES, "permission")]
)
def test_what_cannot_be_watched_is_looked_at_again_and_again(
    watch: Watch, top: bytes, clock: Clock, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    os.makedirs(top + b"/a/full/deep")
    os.makedirs(top + b"/b")
    with monkeypatch.context() as patch:
        refuse(patch, code, lambda path: b"full" in path)
        watcher = watch(top, clock=clock)
        (problem,) = watcher.problems()
        assert remedy in problem
        assert "a/full" in problem
        os.mkdir(top + b"/b/full2")
        assert Kind.RESCAN in joined(watcher.drain())[b"b/full2"]
        assert "1 more" in watcher.problems()[0]
        assert watcher.read(0) == []
        clock.now += 31
        assert joined(watcher.read(0)) == {b"a/full": Kind.RESCAN, b"b/full2": Kind.RESCAN}
        touch(top + b"/a/full/deep/x")
        assert covered(b"a/full/deep/x", joined(watcher.drain())), "a flush must not pass over it"
        os.rename(top + b"/a", top + b"/z")
        watcher.drain()
        clock.now += 31
        assert joined(watcher.read(0)) == {b"z/full": Kind.RESCAN, b"b/full2": Kind.RESCAN}
    clock.now += 31
    assert joined(watcher.read(0)) == {b"z/full": Kind.RESCAN, b"b/full2": Kind.RESCAN}
    assert watcher.problems() == ()
    assert map_of(watcher) == directories(top)
    clock.now += 31
    assert watcher.read(0) == []


def test_unwatched_directory_that_goes_is_no_problem_any_more(
    watch: Watch, top: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.makedirs(top + b"/full")
    refuse(monkeypatch, errno.ENOSPC, lambda path: b"full" in path)
    watcher = watch(top)
    assert watcher.problems()
    os.rmdir(top + b"/full")
    watcher.drain()
    assert watcher.problems() == ()


def test_root_that_cannot_be_watched(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSPC, lambda path: True)
    watcher = InotifyWatcher([Root(top)])
    with pytest.raises(WatchError, match="max_user_watches"):
        watcher.start()
    watcher.close()


def test_root_that_cannot_be_watched_any_more_is_scanned_now_and_then(
    watch: Watch, top: bytes, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch(top, clock=clock)
    watcher.pause()
    with monkeypatch.context() as patch:
        refuse(patch, errno.ENOSPC, lambda path: True)
        assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
        assert "max_user_watches" in watcher.problems()[0]
        clock.now += 2
        assert watcher.read(0) == []
        clock.now += 31
        assert watcher.read(0) == [Hint(0, b"", Kind.RESCAN)]
    clock.now += 2
    assert watcher.read(0) == [Hint(0, b"", Kind.RESCAN)]
    assert watcher.problems() == ()


def test_no_instance_left(watch: Watch, top: bytes, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = watch(top, clock=clock)
    watcher.pause()
    with monkeypatch.context() as patch:
        patch.setattr(watcher._system, "inotify_init", lambda: -1)
        patch.setattr(watcher._system, "get_errno", lambda: errno.EMFILE)
        assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
        assert "max_user_instances" in watcher.problems()[0]
        assert watcher.drain() == [Hint(0, b"", Kind.RESCAN)]
    clock.now += 2
    assert watcher.read(0) == [Hint(0, b"", Kind.RESCAN)]
    assert watcher.problems() == ()
    touch(top + b"/x")
    assert b"x" in joined(watcher.drain())


def test_directory_that_vanishes_while_it_is_added_is_no_problem(
    watch: Watch, top: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(5):
        os.makedirs(top + b"/d%d/e" % n)
    real = InotifyWatcher._subdirectories

    def listed_and_gone(self: InotifyWatcher, node: object, fd: int) -> list[bytes]:
        names = real(self, node, fd)  # type: ignore[arg-type]
        for name in names:
            shutil.rmtree(top + b"/" + name, ignore_errors=True)
        return names

    with monkeypatch.context() as patch:
        patch.setattr(InotifyWatcher, "_subdirectories", listed_and_gone)
        watcher = watch(top)
    watcher.drain()
    assert watcher.problems() == ()
    assert map_of(watcher) == {b""}


def test_roots_are_looked_at_gently(watch: Watch, top: bytes, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = watch(top, clock=clock)
    looks = []
    real = Protected.in_place

    def look(self: Protected) -> bool:
        looks.append(clock.now)
        return real(self)

    monkeypatch.setattr(Protected, "in_place", look)
    for _ in range(100):
        watcher.read(0)
        clock.now += 0.1
    assert 8 <= len(looks) <= 11
    assert all(after - before >= 0.99 for before, after in pairwise(looks))


# What is counted.


def test_what_is_seen_is_counted(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/b")
    watcher = watch(top)
    watcher.drain()
    before = watcher.counts()
    assert before == Counts("inotify", directories=3, events=before.events)
    os.mkdir(top + b"/c")
    touch(top + b"/c/f")
    watcher.drain()
    counts = watcher.counts()
    assert (counts.directories, counts.unwatched, counts.overflows) == (4, 0, 0)
    assert counts.events > before.events


def test_what_is_not_watched_is_counted(watch: Watch, top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(top + b"/ok")
    os.makedirs(top + b"/full1")
    os.makedirs(top + b"/full2")
    refuse(monkeypatch, errno.ENOSPC, lambda path: b"full" in path)
    watcher = watch(top)
    watcher.drain()
    assert (watcher.counts().directories, watcher.counts().unwatched) == (2, 2)
    monkeypatch.undo()
    watcher.drain()
    assert (watcher.counts().directories, watcher.counts().unwatched) == (4, 0)


def test_counts_survive_an_overflow_and_a_pause(watch: Watch, top: bytes) -> None:
    watcher = watch(top)
    touch(top + b"/f")
    watcher.drain()
    events = watcher.counts().events
    assert events > 0
    watcher._overflow()
    watcher.drain()
    assert seen(watcher, events) == (1, 0, 1)
    watcher.pause()
    assert seen(watcher, events) == (0, 0, 1)
    watcher.resume()
    assert seen(watcher, events) == (1, 0, 1)


def seen(watcher: InotifyWatcher, events: int) -> tuple[int, int, int]:
    """Directories, those that are not watched, and overflows; ``events`` are not forgotten."""
    counts = watcher.counts()
    assert counts.events >= events
    return counts.directories, counts.unwatched, counts.overflows


def test_a_file_is_watched_through_its_directory(watch: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch(top + b"/f")
    watcher.drain()
    assert watcher.counts().directories == 1
