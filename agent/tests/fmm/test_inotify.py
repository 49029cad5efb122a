"""The inotify engine on a real filesystem."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from filesystems import mounted
from watches import refuse

from farshore.fmm import Counts, Hint, Kind, Root, WatchError
from farshore.fmm.inotify import InotifyWatcher

from .conftest import PARENT, Clock, Watch, covered, directories, joined, map_of, needs_root, touch, until


def test_deletion_of_a_tree(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/d/e")
    touch(top + b"/d/e/f")
    watcher = watch(top)
    shutil.rmtree(top + b"/d")
    seen = joined(watcher.drain())
    assert all(Kind.DELETED in seen[path] for path in (b"d", b"d/e", b"d/e/f"))
    assert map_of(watcher) == {b""}


def write(path: bytes) -> None:
    touch(path, b"more")


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


@needs_root
def test_another_filesystem_is_not_watched_where_one_is_enough(watch: Watch, top: bytes) -> None:
    place = top + b"/a/mnt"
    os.makedirs(place)
    with mounted(place):
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


@needs_root
def test_bind_mount_is_a_problem(watch: Watch, top: bytes) -> None:
    os.makedirs(top + b"/a/d")
    os.mkdir(top + b"/b")
    with mounted(top + b"/b", "--bind", top + b"/a"):
        watcher = watch(top)
        assert "bind mount" in watcher.problems()[0]
        touch(top + b"/a/d/x")
        seen = joined(watcher.drain())
        assert covered(b"a/d/x", seen)
        assert covered(b"b/d/x", seen)
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


def test_missing_roots(top: bytes, caplog: pytest.LogCaptureFixture) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watcher = InotifyWatcher([Root(top + b"/no"), Root(top + b"/nor")])
    for _ in range(2):
        with pytest.raises(WatchError, match="does not exist") as caught:
            watcher.start()
        assert caught.value.root == top + b"/no"
    # Whoever starts it tells of it.
    assert not caplog.records
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
    # What events are read from, and the table of mounts.
    assert len(os.listdir("/proc/self/fd")) == before - 2
    touch(top + b"/d/x")
    os.mkdir(top + b"/e")
    assert watcher.read(0) == []
    assert watcher.drain() == []
    assert watcher.resume() == [Hint(0, b"", Kind.RESCAN)]
    assert watcher.resume() == []
    touch(top + b"/e/y")
    assert b"e/y" in joined(watcher.drain())


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
