"""What is particular to the fanotify engine: filesystems instead of directories."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from filesystems import mounted

from farshore.fmm import Hint, Kind, Root, WatchError, fan, fanotify, mounts
from farshore.fmm.fanotify import FanotifyWatcher, why_not

from .conftest import Clock, joined

LIMIT = Path("/proc/sys/fs/fanotify/max_queued_events")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def top(tmp_path: Path) -> bytes:
    if reason := why_not([Root(os.fsencode(tmp_path))]):
        pytest.skip(reason)
    (tmp_path / "top").mkdir()
    return os.fsencode(tmp_path / "top")


@contextlib.contextmanager
def watching(*paths: bytes, clock: Clock | None = None) -> Iterator[FanotifyWatcher]:
    watcher = FanotifyWatcher([Root(path) for path in paths], **({"clock": clock} if clock else {}))
    try:
        watcher.start()
        yield watcher
    finally:
        watcher.close()


def touch(path: bytes) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def test_what_happens_elsewhere_on_the_filesystem_is_not_told(top: bytes) -> None:
    os.mkdir(top + b"/../outside")
    with watching(top) as watcher:
        touch(top + b"/../outside/f")
        os.mkdir(top + b"/../outside/d")
        assert watcher.drain() == []
        # Where it is known that nothing is protected, something may be moved to.
        os.rename(top + b"/../outside", top + b"/inside")
        assert Kind.RESCAN in joined(watcher.drain())[b"inside"]
        touch(top + b"/inside/d/x")
        assert b"inside/d/x" in joined(watcher.drain())


def test_paths_follow_what_was_renamed_above(top: bytes) -> None:
    os.makedirs(top + b"/a/b/c")
    with watching(top) as watcher:
        touch(top + b"/a/b/c/1")
        watcher.drain()
        os.rename(top + b"/a", top + b"/z")
        touch(top + b"/z/b/c/2")
        assert b"z/b/c/2" in joined(watcher.drain())


def test_a_path_longer_than_the_kernel_tells(top: bytes) -> None:
    directory = os.open(top, os.O_RDONLY)
    name = b"n" * 250
    for _ in range(20):
        os.mkdir(name, dir_fd=directory)
        below = os.open(name, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    try:
        with watching(top) as watcher:
            os.close(os.open(b"f", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
            assert b"/".join([name] * 20) + b"/f" in joined(watcher.drain())
    finally:
        os.close(directory)
        subprocess.run(["rm", "-rf", top], check=True)


def test_a_filesystem_that_was_mounted_anew_is_marked_anew(top: bytes, tmp_path: Path) -> None:
    """The same device and the same inode as before: only the kernel's list of marks tells."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    clock = Clock()
    try:
        with mounted(top, device), watching(top, clock=clock) as watcher:
            identity = os.stat(top).st_dev, os.stat(top).st_ino
            subprocess.run(["umount", top], check=True)
            subprocess.run(["mount", device, top], check=True)
            assert (os.stat(top).st_dev, os.stat(top).st_ino) == identity
            assert watcher.drain() == [Hint(0, b"", Kind.RESCAN)]
            touch(top + b"/f")
            assert b"f" in joined(watcher.drain())
            assert watcher.problems() == ()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_filesystem_that_cannot_be_marked_is_scanned(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir(top + b"/m")
    real = fan.mark_filesystem

    def mark(group: int, path: bytes, mask: int) -> None:
        if path.endswith(b"/m"):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        real(group, path, mask)

    monkeypatch.setattr(fan, "mark_filesystem", mark)
    clock = Clock()
    with mounted(top + b"/m"), watching(top, clock=clock) as watcher:
        watcher.read(0)
        (problem,) = watcher.problems()
        assert "/m: not watched, looked at every 30 s instead" in problem and "let inotify watch" in problem
        assert watcher.counts().unwatched == 1
        clock.now += 2
        assert watcher.read(0) == []
        clock.now += 30
        assert watcher.read(0) == [Hint(0, b"m", Kind.RESCAN)]
        subprocess.run(["umount", top + b"/m"], check=True)
        watcher.drain()
        assert watcher.problems() == ()


def test_a_root_whose_filesystem_cannot_be_marked_is_refused(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(group: int, path: bytes, mask: int) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(fan, "mark_filesystem", mark)
    assert "subvolume" in why_not([Root(top)])
    with pytest.raises(WatchError, match="let inotify watch"), watching(top):
        pass


def test_the_same_directory_at_two_places(top: bytes) -> None:
    os.makedirs(top + b"/a/real")
    os.makedirs(top + b"/b/bound")
    with mounted(top + b"/b/bound", "--bind", os.fsdecode(top + b"/a/real")), watching(top) as watcher:
        touch(top + b"/b/bound/f")
        assert {b"a/real/f", b"b/bound/f"} <= joined(watcher.drain()).keys()


def test_an_overflow_puts_all_in_doubt_and_more_is_seen(top: bytes) -> None:
    before = LIMIT.read_text()
    LIMIT.write_text("16")
    try:
        with watching(top) as watcher:
            for number in range(100):
                touch(top + b"/%d" % number)
            assert Kind.RESCAN in joined(watcher.drain())[b""]
            assert watcher.counts().overflows == 1
            touch(top + b"/after")
            assert b"after" in joined(watcher.drain())
    finally:
        LIMIT.write_text(before)


def test_a_kernel_that_tells_nothing_is_noticed(top: bytes) -> None:
    with watching(top) as watcher:
        # Its marks are gone, as if the kernel had forgotten them.
        os.close(watcher._fd)
        watcher._fd = fan.create()
        assert watcher.drain() == [Hint(0, b"", Kind.RESCAN)]
        touch(top + b"/f")
        assert b"f" in joined(watcher.drain())


def test_without_a_place_for_cookies_it_reads_what_there_is(top: bytes) -> None:
    watcher = FanotifyWatcher([Root(top)], cookies=Path("/proc/no/such/place"))
    watcher.start()
    touch(top + b"/f")
    assert b"f" in joined(watcher.drain())
    watcher.close()


def test_what_is_mounted_is_told_with_its_own_characters(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a b\n\xff"
    os.mkdir(path)
    with mounted(path):
        assert mounts.points_below(os.fsencode(tmp_path)) == [path]
        (found,) = (mount for mount in mounts.table() if mount.point == path)
        device = os.stat(path).st_dev
        assert found == mounts.Mount((os.major(device), os.minor(device)), b"/", path, "tmpfs")
    assert mounts.points_below(os.fsencode(tmp_path)) == []


def test_events_that_are_cut_off_are_no_error() -> None:
    assert list(fan.events(b"")) == []
    assert list(fan.events(bytes(23))) == []
    assert list(fan.events(bytes(24))) == []


def test_a_missing_system_call_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan, "_init", None)
    assert "let inotify watch" in why_not([])
    assert fanotify.FanotifyWatcher.name == "fanotify"
