"""What every engine must see, on a real filesystem."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from filesystems import mounted

from farshore.fmm import Hint, Kind, Root
from farshore.fmm.inotify import InotifyWatcher
from farshore.fmm.protected import Protected
from farshore.fmm.types import Inode

from .conftest import PARENT, Clock, Watch, covered, directories, joined, map_of, needs_root, touch, until

# Each change that FMM promises to report.


def test_nothing_happens(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    assert watcher.read(0) == []
    assert watcher.drain() == []
    assert watcher.problems() == ()


def test_creation(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    touch(top + b"/f")
    seen = joined(watcher.drain())
    assert Kind.CREATED in seen[b"f"]
    assert seen[b""] == PARENT


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(b"nowhere", path)])
def test_creation_of_other_kinds(watch_any: Watch, top: bytes, make: Callable[[bytes], None]) -> None:
    watcher = watch_any(top)
    make(top + b"/x")
    assert joined(watcher.drain()) == {b"x": Kind.CREATED, b"": PARENT}


def test_unnamed_file_that_gets_a_name(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    fd = os.open(top, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"x")
    # Only with a dir_fd does Python make the call that follows the link.
    os.link(f"/proc/self/fd/{fd}", top + b"/f", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    assert Kind.CREATED in joined(watcher.drain())[b"f"]


def test_names_that_come_for_files_that_have_others(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f")
    touch(top + b"/single")
    watcher = watch_any(top)
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


def test_deletion(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch_any(top)
    os.unlink(top + b"/f")
    assert joined(watcher.drain()) == {b"f": Kind.DELETED, b"": PARENT}


def test_renaming(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch_any(top)
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
def test_modification_of_content_size_and_blocks(watch_any: Watch, top: bytes, change: Callable[[bytes], None]) -> None:
    touch(top + b"/f", b"content")
    watcher = watch_any(top)
    change(top + b"/f")
    assert joined(watcher.drain()) == {b"f": Kind.MODIFIED}


def test_modification_through_a_descriptor_held_since_before(watch_any: Watch, top: bytes) -> None:
    with open(top + b"/f", "wb", buffering=0) as file:
        watcher = watch_any(top)
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
def test_attributes(watch_any: Watch, top: bytes, name: bytes, change: Callable[[bytes], object]) -> None:
    touch(top + b"/f")
    os.mkdir(top + b"/d")
    watcher = watch_any(top)
    change(top + b"/" + name)
    seen = joined(watcher.drain())
    assert set(seen) == {name}
    assert seen[name] & PARENT


def test_access_time_when_reads_are_wanted(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f", b"x")
    with_reads, without = watch_any(top, reads=True), watch_any(top)
    # With -h, touch does not open the file for writing, which would be reported by itself.
    subprocess.run(["touch", "-h", "-a", "-d", "@7", top + b"/f"], check=True)
    assert joined(with_reads.drain()) == {b"f": Kind.ATTRIBUTES}
    with open(top + b"/f", "rb") as file:
        file.read()
    os.listdir(top)
    assert joined(with_reads.drain()) == {b"f": Kind.ATTRIBUTES}
    assert without.drain() == []


def test_type_and_inode(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f")
    touch(top + b"/g")
    os.mkdir(top + b"/d")
    watcher = watch_any(top)
    os.rename(top + b"/g", top + b"/f")
    os.rmdir(top + b"/d")
    os.symlink(b"f", top + b"/d")
    seen = joined(watcher.drain())
    assert Kind.MOVED_TO in seen[b"f"]
    assert Kind.DELETED | Kind.CREATED in seen[b"d"]
    assert map_of(watcher) == {b""}


# Directories.


def test_new_directory_is_watched_and_to_be_scanned(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    os.makedirs(top + b"/a/b/c")
    touch(top + b"/a/b/c/x")
    seen = joined(watcher.drain())
    assert Kind.RESCAN in seen[b"a"]
    assert covered(b"a/b/c/x", seen)
    assert map_of(watcher) == {b"", b"a", b"a/b", b"a/b/c"}
    touch(top + b"/a/b/c/y")
    assert Kind.CREATED in joined(watcher.drain())[b"a/b/c/y"]


def test_chain_of_renames_before_anything_is_read(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/n0/b")
    watcher = watch_any(top)
    for n in range(20):
        os.rename(top + b"/n%d" % n, top + b"/n%d" % (n + 1))
    os.mkdir(top + b"/n0")
    watcher.drain()
    touch(top + b"/n20/b/x")
    touch(top + b"/n0/x")
    assert {b"n20/b/x", b"n0/x"} <= set(joined(watcher.drain()))
    assert map_of(watcher) == directories(top)


def test_exchanged_directories(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/in_a")
    os.makedirs(top + b"/b/in_b")
    touch(top + b"/f")
    watcher = watch_any(top)
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


def test_moved_in_and_out_and_in_again(watch_any: Watch, top: bytes, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/out"
    os.makedirs(out + b"/b/c")
    touch(out + b"/b/c/x")
    watcher = watch_any(top)
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


def test_moved_between_roots(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/one/d/e")
    os.makedirs(top + b"/two")
    watcher = watch_any(top + b"/one", top + b"/two")
    os.rename(top + b"/one/d", top + b"/two/d")
    hints = watcher.drain()
    assert Kind.RESCAN in joined(hints, 0)[b"d"]
    assert Kind.RESCAN in joined(hints, 1)[b"d"]
    touch(top + b"/two/d/e/x")
    hints = watcher.drain()
    assert b"d/e/x" in joined(hints, 1)
    assert not joined(hints, 0)


@pytest.mark.parametrize("name", [b"\xff\n", b"\xc3\x28 =\x01", b" ", "ä\u2028".encode(), b"-\\*?[", b"x" * 255])
def test_names_of_any_bytes(watch_any: Watch, top: bytes, name: bytes) -> None:
    os.mkdir(top + b"/" + name)
    watcher = watch_any(top)
    touch(top + b"/" + name + b"/" + name)
    assert joined(watcher.drain())[name + b"/" + name] == Kind.CREATED | Kind.MODIFIED
    os.rename(top + b"/" + name, top + b"/d")
    os.mkdir(top + b"/" + name)
    touch(top + b"/" + name + b"/x")
    seen = joined(watcher.drain())
    assert covered(name + b"/x", seen)
    touch(top + b"/" + name + b"/x", b"1")
    assert joined(watcher.drain()) == {name + b"/x": Kind.MODIFIED}


def test_root_of_any_bytes(watch_any: Watch, top: bytes) -> None:
    os.mkdir(top + b"/\xff\n")
    watcher = watch_any(top + b"/\xff\n")
    touch(top + b"/\xff\n/\xfe")
    assert b"\xfe" in joined(watcher.drain())
    shutil.rmtree(top + b"/\xff\n")
    watcher.drain()
    assert watcher.problems()


def test_no_duplicates_in_one_read(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    for n in range(100):
        for name in (b"/a", b"/b"):
            touch(top + name, b"%d" % n)
    hints = watcher.drain()
    assert len(hints) == len({hint.path for hint in hints}) == 3


# Patterns.


def test_excluded_paths_give_no_hints_and_no_watches(watch_any: Watch, top: bytes) -> None:
    for name in (b"/cache/deep", b"/data/cache", b"/.farshore-1"):
        os.makedirs(top + name)
    watcher = watch_any(Root(top, exclude=("cache/", "*.tmp")))
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


def test_include_below_an_excluded_directory_is_watched(watch_any: Watch, top: bytes) -> None:
    for name in (b"/cache/keep/deep", b"/cache/other"):
        os.makedirs(top + name)
    watcher = watch_any(Root(top, include=("cache/keep/",), exclude=("cache/",)))
    assert map_of(watcher) == {b"", b"cache", b"cache/keep", b"cache/keep/deep"}
    touch(top + b"/cache/x")
    touch(top + b"/cache/keep/deep/x")
    seen = joined(watcher.drain())
    assert b"cache/keep/deep/x" in seen
    assert b"cache/x" not in seen


# Single files.


def test_file_root(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f")
    touch(top + b"/other")
    watcher = watch_any(top + b"/f", top + b"/other")
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


def test_file_root_missing_at_resume_is_seen_when_it_returns(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/f")
    watcher = watch_any(top + b"/f")
    watcher.pause()
    os.unlink(top + b"/f")
    assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
    touch(top + b"/f")
    assert Kind.CREATED in joined(watcher.drain())[b""]


def test_file_root_whose_directory_goes_and_returns(watch_any: Watch, top: bytes) -> None:
    os.mkdir(top + b"/d")
    touch(top + b"/d/f")
    watcher = watch_any(top + b"/d/f")
    os.rename(top + b"/d", top + b"/e")
    until(watcher, lambda hints: bool(watcher.problems()))
    os.mkdir(top + b"/d")
    touch(top + b"/d/f")
    hints = until(watcher, lambda hints: not watcher.problems())
    assert Kind.RESCAN in joined(hints)[b""]
    touch(top + b"/e/f", b"x")
    touch(top + b"/d/f", b"x")
    assert watcher.drain() == [Hint(0, b"", Kind.MODIFIED)]


def test_root_that_turns_from_file_to_directory_and_back(watch_any: Watch, top: bytes) -> None:
    touch(top + b"/r")
    watcher = watch_any(top + b"/r")
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


def test_file_root_that_is_a_symlink(watch_any: Watch, top: bytes) -> None:
    os.symlink(b"nowhere", top + b"/l")
    watcher = watch_any(top + b"/l")
    os.symlink(b"elsewhere", top + b"/new")
    os.rename(top + b"/new", top + b"/l")
    assert joined(watcher.drain()) == {b"": Kind.MOVED_TO}


# Roots that come and go.


def test_directory_root_through_a_symlink(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/one/d")
    os.makedirs(top + b"/two/d")
    os.symlink(b"one", top + b"/link")
    watcher = watch_any(top + b"/link")
    touch(top + b"/one/d/x")
    assert b"d/x" in joined(watcher.drain())
    os.unlink(top + b"/link")
    os.symlink(b"two", top + b"/link")
    assert Kind.RESCAN in joined(watcher.drain())[b""]
    touch(top + b"/two/d/x")
    assert b"d/x" in joined(watcher.drain())


@pytest.mark.parametrize("how", ["rmtree", "rename", "rename above"])
def test_root_that_goes_is_a_problem_until_it_returns(watch_any: Watch, top: bytes, how: str) -> None:
    root = top + b"/above/root"
    os.makedirs(root + b"/d")
    watcher = watch_any(root)
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
def test_root_that_is_unmounted(watch_any: Watch, top: bytes) -> None:
    root = top + b"/mnt"
    os.mkdir(root)
    with mounted(root):
        os.makedirs(root + b"/d/e")
        watcher = watch_any(root)
    assert Kind.RESCAN in joined(until(watcher, lambda hints: bool(watcher.problems())))[b""]
    assert "another filesystem" in watcher.problems()[0]
    touch(root + b"/x")
    assert b"x" in joined(watcher.drain())
    os.unlink(root + b"/x")
    with mounted(root):
        assert Kind.RESCAN in joined(watcher.drain())[b""]
        os.mkdir(root + b"/d")
        assert b"d" in joined(watcher.drain())


@needs_root
def test_unmount_below_the_root(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/mnt/hidden")
    with mounted(top + b"/a/mnt"):
        os.makedirs(top + b"/a/mnt/d/e")
        watcher = watch_any(top)
        touch(top + b"/a/mnt/d/e/x")
        assert b"a/mnt/d/e/x" in joined(watcher.drain())
    assert covered(b"a/mnt/x", joined(watcher.drain()))
    assert map_of(watcher) == directories(top)
    assert watcher.problems() == ()


@needs_root
def test_a_filesystem_that_is_mounted_below_belongs_to_it(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/m/hidden")
    watcher = watch_any(top)
    with mounted(top + b"/a/m"):
        assert covered(b"a/m/x", joined(watcher.drain()))
        os.mkdir(top + b"/a/m/d")
        assert b"a/m/d" in joined(watcher.drain())
        touch(top + b"/a/m/d/f")
        assert b"a/m/d/f" in joined(watcher.drain())
        assert map_of(watcher) == directories(top)
        subprocess.run(["umount", top + b"/a/m"], check=True)  # the watcher does not hold it
        assert covered(b"a/m/x", joined(watcher.drain()))
    touch(top + b"/a/m/hidden/under")
    assert b"a/m/hidden/under" in joined(watcher.drain())
    assert map_of(watcher) == directories(top)


@needs_root
def test_a_mount_is_seen_by_one_who_waits(watch_any: Watch, top: bytes) -> None:
    os.mkdir(top + b"/m")
    watcher = watch_any(top)
    watcher.drain()
    with mounted(top + b"/m"):
        assert until(watcher, lambda hints: covered(b"m/x", joined(hints)))


@needs_root
def test_a_mount_in_a_directory_that_was_renamed_in_a_storm(watch_any: Watch, top: bytes) -> None:
    """When the mount is seen, what tells where it lies may still be queued."""
    os.makedirs(top + b"/x/m")
    watcher = watch_any(top)
    for number in range(6000):
        touch(top + b"/%d" % number)
    os.rename(top + b"/x", top + b"/y")
    with mounted(top + b"/y/m"):
        os.mkdir(top + b"/y/m/d")
        until(watcher, lambda hints: covered(b"y/m/d/f", joined(hints)))
        watcher.drain()
        touch(top + b"/y/m/d/f")
        assert covered(b"y/m/d/f", joined(watcher.drain()))
        assert map_of(watcher) == directories(top)


@needs_root
def test_what_a_mount_that_is_left_alone_has_hidden_is_looked_at_again(watch_any: Watch, top: bytes) -> None:
    os.makedirs(top + b"/x/m/d")
    with mounted(top + b"/x/m"):
        watcher = watch_any(Root(top, one_filesystem=True))
        os.rename(top + b"/x", top + b"/y")
        try:
            watcher.drain()
        finally:
            subprocess.run(["umount", top + b"/y/m"], check=True)
    assert covered(b"y/m/d/f", joined(watcher.drain()))
    touch(top + b"/y/m/d/f")
    assert covered(b"y/m/d/f", joined(watcher.drain()))


@needs_root
def test_mounts_that_come_and_go_do_not_have_all_looked_at_each_time(watch: Watch, top: bytes, clock: Clock) -> None:
    for name in (b"a", b"b"):
        os.mkdir(top + b"/" + name)
    watcher = watch(top, clock=clock)
    with mounted(top + b"/a"):
        clock.now += 2
        assert covered(b"a/x", joined(watcher.read(0)))
        with mounted(top + b"/b"):
            clock.now += 2
            assert watcher.read(0) == []
            clock.now += 31
            assert covered(b"b/x", joined(watcher.read(0)))
            touch(top + b"/b/f")
            assert b"b/f" in joined(watcher.drain())
        # Who asks does not wait.
        assert covered(b"b/x", joined(watcher.drain()))


def test_neighbours_are_not_in_each_other(watch_any: Watch, top: bytes) -> None:
    for name in (b"/a", b"/a-b", b"/ab"):
        os.mkdir(top + name)
    watch_any(top + b"/a", top + b"/a-b", top + b"/ab")


def test_a_root_that_is_missing_at_the_start_does_not_keep_others_from_being_watched(
    watch_any: Watch, top: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkdir(top + b"/yes")
    watcher = watch_any(top + b"/no", top + b"/yes")
    (problem,) = watcher.problems()
    assert problem.startswith(os.fsdecode(top) + "/no: it does not exist")
    assert watcher.counts().unwatched == 1
    watcher.drain()
    watcher.drain()
    assert sum("cannot be watched" in record.getMessage() for record in caplog.records) == 1
    touch(top + b"/yes/x")
    assert (1, b"x") in {(hint.root, hint.path) for hint in watcher.drain()}
    os.mkdir(top + b"/no")
    assert Hint(0, b"", Kind.RESCAN) in watcher.drain()
    assert watcher.problems() == ()
    touch(top + b"/no/y")
    assert (0, b"y") in {(hint.root, hint.path) for hint in watcher.drain()}


def test_resume_of_a_root_that_went_meanwhile(watch_any: Watch, top: bytes) -> None:
    os.mkdir(top + b"/r")
    watcher = watch_any(top + b"/r")
    watcher.pause()
    os.rmdir(top + b"/r")
    assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
    assert "does not exist" in watcher.problems()[0]
    os.mkdir(top + b"/r")
    assert watcher.drain() == [Hint(0, b"", Kind.RESCAN)]
    assert watcher.problems() == ()


@pytest.mark.parametrize("paused", [False, True])
def test_wake_ends_a_blocked_read(watch_any: Watch, top: bytes, paused: bool) -> None:
    watcher = watch_any(top)
    if paused:
        watcher.pause()
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(watcher.read(600)))
    reader.start()
    watcher.wake()
    reader.join(60)
    assert results == [[]]


def test_a_change_ends_a_blocked_read(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    results: list[Hint] = []
    reader = threading.Thread(target=lambda: results.extend(watcher.read(600)))
    reader.start()
    touch(top + b"/x")
    reader.join(60)
    assert b"x" in joined(results)


def test_no_descriptor_leaks_with_use(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        os.makedirs(top + b"/a%d/b/c" % n)
        os.rename(top + b"/a%d" % n, top + b"/z%d" % n)
        watcher.drain()
        shutil.rmtree(top + b"/z%d" % n)
        watcher.read(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_drain_ends_while_changes_keep_coming(watch_any: Watch, top: bytes) -> None:
    watcher = watch_any(top)
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


def test_roots_are_looked_at_gently(
    watch_any: Watch, top: bytes, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch_any(top, clock=clock)
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


def seen(watcher: InotifyWatcher, events: int) -> tuple[int, int, int]:
    """Directories, those that are not watched, and overflows; ``events`` are not forgotten."""
    counts = watcher.counts()
    assert counts.events >= events
    return counts.directories, counts.unwatched, counts.overflows
