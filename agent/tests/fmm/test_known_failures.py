"""What programs that mirror directories are known to get wrong, with each engine: nothing of it is lost here.

Each scenario is played while watcher and sender are at work, while one of them stands still, and while both do: so each
of them looks at a tree that has moved on since what it was told of.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filesystems import mounted
from mirrored import Mirrored, can_lower, lowered

from farshore.dbm import uploads
from farshore.dbm.messages import (
    Begin,
    Commit,
    Copy,
    FromSource,
    InStep,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Move,
    Patch,
    Put,
    Remove,
    SetMeta,
    Upload,
)
from farshore.fmm import Kind, Watcher, inotify

from .conftest import Clock, Watch, covered, joined, until

Mirror = Callable[..., Mirrored]
WatchAny = Callable[..., Watcher]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, other: Path) -> None:
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        pytest.skip(f"no RENAME_EXCHANGE here: {os.strerror(ctypes.get_errno())}")


def fill(top: Path, mark: str = "") -> None:
    """A directory with something in it, three levels deep."""
    (top / "b" / "c").mkdir(parents=True)
    for path in (top / "f", top / "b" / "g", top / "b" / "c" / "h"):
        path.write_text(path.name + mark)


# --- scenarios: each changes a tree in which ``d`` and ``e`` are filled, and ``f`` and ``g`` are files

Scenario = Callable[[Path, Path], None]


def file_recreated(top: Path, out: Path) -> None:
    (top / "f").unlink()
    (top / "f").write_text("anew")


def file_recreated_as_directory(top: Path, out: Path) -> None:
    (top / "f").unlink()
    fill(top / "f")


def directory_recreated(top: Path, out: Path) -> None:
    shutil.rmtree(top / "d")
    (top / "d" / "b").mkdir(parents=True)
    (top / "d" / "b" / "new").write_text("new")


def directory_recreated_alike(top: Path, out: Path) -> None:
    shutil.rmtree(top / "d")
    fill(top / "d")


def directory_recreated_as_link(top: Path, out: Path) -> None:
    shutil.rmtree(top / "d")
    (top / "d").symlink_to(out)


def file_renamed_and_recreated(top: Path, out: Path) -> None:
    (top / "f").rename(top / "old")
    (top / "f").write_text("anew")


def directory_renamed_and_recreated(top: Path, out: Path) -> None:
    (top / "d").rename(top / "old")
    fill(top / "d", " anew")


def directory_renamed_with_work_below(top: Path, out: Path) -> None:
    (top / "d" / "b" / "g").write_text("changed")
    (top / "d" / "b" / "c" / "new").write_text("new")
    (top / "d").rename(top / "n")


def directory_renamed_twice_with_work_below(top: Path, out: Path) -> None:
    (top / "d" / "b" / "g").write_text("changed")
    (top / "d").rename(top / "n")
    (top / "n" / "b" / "c" / "new").write_text("new")
    (top / "n").rename(top / "e" / "m")
    (top / "e" / "m" / "b" / "c" / "h").write_text("last")


def directories_in_each_other(top: Path, out: Path) -> None:
    (top / "d").rename(top / "e" / "d")
    (top / "e").rename(top / "n")
    (top / "n" / "d" / "b").rename(top / "b")
    (top / "b" / "g").write_text("changed")


def directories_swapped_by_renames(top: Path, out: Path) -> None:
    (top / "d" / "f").write_text("of d")
    (top / "d").rename(top / "x")
    (top / "e").rename(top / "d")
    (top / "x").rename(top / "e")


def directories_exchanged(top: Path, out: Path) -> None:
    (top / "d" / "f").write_text("of d")
    exchange(top / "d", top / "e")
    (top / "d" / "b" / "g").write_text("was of e")


def file_and_directory_exchanged(top: Path, out: Path) -> None:
    exchange(top / "d", top / "f")
    (top / "f" / "new").write_text("new")


def moved_out(top: Path, out: Path) -> None:
    (top / "d").rename(out / "d")
    (out / "d" / "f").write_text("not ours any more")


def moved_out_and_in_again(top: Path, out: Path) -> None:
    (top / "d").rename(out / "d")
    (out / "d" / "f").write_text("changed outside")
    fill(out / "d" / "b" / "more")
    (out / "d").rename(top / "back")


def moved_in(top: Path, out: Path) -> None:
    fill(out / "n")
    (out / "n").rename(top / "n")
    (top / "n" / "b" / "new").write_text("new")


def moved_in_over_a_file(top: Path, out: Path) -> None:
    (out / "n").write_text("from outside")
    os.utime(out / "n", ns=(0, (top / "f").stat().st_mtime_ns))
    (out / "n").rename(top / "f")


def rotated(top: Path, out: Path) -> None:
    for number in range(3, 0, -1):
        (top / f"log.{number}").write_text(f"of {number}")
    for _ in range(2):
        for number in range(3, 0, -1):
            (top / f"log.{number}").rename(top / f"log.{number + 1}")
        (top / "f").rename(top / "log.1")
        (top / "f").write_text("the next")


def saved_by_renaming(top: Path, out: Path) -> None:
    for number in range(3):
        (top / ".f.swp").write_text(f"version {number}")
        (top / ".f.swp").rename(top / "f")


def edited_at_once(top: Path, out: Path) -> None:
    """Of the same size, within one tick of the clock."""
    for text in ("11", "22", "33"):
        (top / "f").write_text(text)


def edited_with_its_time_restored(top: Path, out: Path) -> None:
    status = (top / "f").stat()
    (top / "f").write_text("x" * status.st_size)
    os.utime(top / "f", ns=(status.st_atime_ns, status.st_mtime_ns))


def written_through_a_mapping(top: Path, out: Path) -> None:
    with (top / "f").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        file.close()
        mapped[0] ^= 1


def linked_and_renamed_over_each_other(top: Path, out: Path) -> None:
    os.link(top / "f", top / "l")
    # Nothing happens, as both are names of one file.
    (top / "f").rename(top / "l")
    (top / "g").rename(top / "f")
    (top / "l").write_text("still there")


def names_of_any_bytes(top: Path, out: Path) -> None:
    for name in (b"\xff\n", b"\xc3\x28 =\x01", b" ", "\u00e4\u2028".encode(), b"-\\*?[", b"x" * 255):
        path = Path(os.fsdecode(os.fsencode(top) + b"/" + name))
        path.mkdir()
        (path / path.name).write_text("1")
        path.rename(top / "n")
        path.mkdir()
        (path / path.name).write_text("2")
        shutil.rmtree(top / "n")


def removed_from_below_and_made_from_above(top: Path, out: Path) -> None:
    for _ in range(3):
        shutil.rmtree(top / "d")
        for name in ("d", "d/b", "d/b/c", "d/b/c/d"):
            (top / name).mkdir()
            (top / name / "f").write_text(name)


def metadata_only(top: Path, out: Path) -> None:
    (top / "d").chmod(0o700)
    (top / "f").chmod(0o4711)
    os.setxattr(top / "d" / "b", "user.x", b"1")
    os.utime(top / "d" / "b" / "c", (5, 5))
    if os.geteuid() == 0:
        os.chown(top / "g", 12, 13)


SCENARIOS: list[Scenario] = [
    file_recreated,
    file_recreated_as_directory,
    directory_recreated,
    directory_recreated_alike,
    directory_recreated_as_link,
    file_renamed_and_recreated,
    directory_renamed_and_recreated,
    directory_renamed_with_work_below,
    directory_renamed_twice_with_work_below,
    directories_in_each_other,
    directories_swapped_by_renames,
    directories_exchanged,
    file_and_directory_exchanged,
    moved_out,
    moved_out_and_in_again,
    moved_in,
    moved_in_over_a_file,
    rotated,
    saved_by_renaming,
    edited_at_once,
    edited_with_its_time_restored,
    written_through_a_mapping,
    linked_and_renamed_over_each_other,
    names_of_any_bytes,
    removed_from_below_and_made_from_above,
    metadata_only,
]


def begin(mirrored: Mirrored) -> tuple[Path, Path]:
    """The tree in which scenarios happen, in step with the replica, and a directory outside."""
    top, out = mirrored.sources[0], mirrored.base / "out"
    out.mkdir()
    fill(top / "d")
    fill(top / "e", " of e")
    (top / "f").write_text("f")
    (top / "g").write_text("g")
    mirrored.check()
    mirrored.listen()
    return top, out


@pytest.mark.parametrize("still", ["", "watcher", "sender", "both"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(mirror: Mirror, scenario: Scenario, still: str) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    if still in ("sender", "both"):
        mirrored.hold_sender()
    if still in ("watcher", "both"):
        mirrored.hold_watcher()
    scenario(top, out)
    mirrored.check()
    # What was scanned anew must not hide that a place is not watched any more.
    for path in sorted(path for path in top.rglob("*") if path.is_dir() and not path.is_symlink()):
        (path / "later").write_text("later")
    mirrored.check()


def test_scenarios_one_after_the_other(mirror: Mirror) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    for round_, scenario in enumerate(SCENARIOS):
        inner = top / f"{round_}"
        mirrored.hold_watcher()
        fill(inner / "d")
        fill(inner / "e")
        (inner / "f").write_text("f")
        (inner / "g").write_text("g")
        (out / f"{round_}").mkdir()
        mirrored.release_watcher()
        scenario(inner, out / f"{round_}")
    mirrored.check()


def test_a_pause_with_changes_in_it(mirror: Mirror) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    for scenario in (directory_renamed_and_recreated, moved_in, edited_with_its_time_restored):
        mirrored.pause()
        scenario(top, out)
        mirrored.resume()
        mirrored.check()
        (top / "d" / "b" / "g").write_text("after")
        mirrored.check()
        shutil.rmtree(top)
        shutil.rmtree(out)
        out.mkdir()
        top.mkdir()
        fill(top / "d")
        (top / "f").write_text("f")
        mirrored.check()


# --- new directories


def test_a_tree_that_is_filled_while_it_is_found(mirror: Mirror) -> None:
    mirrored = mirror()
    top = mirrored.sources[0]
    mirrored.check()
    for number in range(20):
        deepest = top / f"{number}/a/b/c/d/e"
        deepest.mkdir(parents=True)
        for above in (deepest, deepest.parent, deepest.parents[3]):
            (above / "f").write_text("x")
    mirrored.check()
    for number in range(20):
        (top / f"{number}/a/b/c/d/e/f").write_text("y")
        (top / f"{number}/a/b/g").write_text("y")
    mirrored.check()


def test_thousands_of_directories_moved_in(mirror: Mirror) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    for number in range(50):
        for below in range(40):
            (out / f"n/{number}/{below}").mkdir(parents=True)
    (out / "n").rename(top / "n")
    writer = threading.Thread(
        target=lambda: [(top / f"n/{number}/{number % 40}/f").write_text("x") for number in range(50)]
    )
    writer.start()
    mirrored.flush()
    writer.join()
    mirrored.check()
    (top / "n" / "49" / "39" / "g").write_text("later")
    mirrored.check()


# --- files that stay open


def test_a_file_that_is_held_open_is_seen_without_being_closed(mirror: Mirror) -> None:
    mirrored = mirror()
    top, _ = begin(mirrored)
    with (top / "f").open("ab", buffering=0) as file:
        for number in range(3):
            file.write(b"%d" % number)
            mirrored.check()
            (top / "f").rename(top / f"f{number}")
            (top / f"f{number}").rename(top / "f")
        (top / "f").rename(top / "d" / "b" / "moved")
        file.write(b"after the rename")
        mirrored.check()


# --- several names of one file


def test_links_between_two_roots_of_a_group(mirror: Mirror) -> None:
    mirrored = mirror(roots=2)
    one, other = (tree / "f" for tree in mirrored.sources)
    one.write_bytes(b"1" * 100)
    os.link(one, other)
    mirrored.check()
    for size in (100, 200_000):
        one.write_bytes(b"2" * size)
        mirrored.check()
        other.write_bytes(b"3" * size)
        mirrored.check()
    other.chmod(0o600)
    mirrored.check()
    with other.open("ab") as file:
        file.write(b"written and gone")
        other.unlink()
        mirrored.check()


def test_a_write_through_a_name_that_is_gone_before_anybody_looks_at_it(mirror: Mirror) -> None:
    mirrored = mirror()
    top, _ = begin(mirrored)
    mirrored.hold_sender()
    os.link(top / "f", top / "l")
    (top / "l").write_text("through the other name")
    mirrored.run(mirrored.group._events_are_marked())
    (top / "l").unlink()
    mirrored.check()


def test_a_write_through_a_name_outside_is_found_by_a_scan(mirror: Mirror) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    (out / "o").write_text("1")
    os.link(out / "o", top / "l")
    mirrored.check()
    mirrored.listen()
    (out / "o").write_text("2")
    mirrored.flush()
    assert not [hint for hint in mirrored.hints if hint.path == b"l"], "only the name that was used is told of"
    mirrored.pause()
    mirrored.resume()
    mirrored.check()


def test_a_write_to_a_file_that_was_opened_by_a_name_that_is_gone_is_found_by_a_scan(mirror: Mirror) -> None:
    mirrored = mirror()
    top, _ = begin(mirrored)
    os.link(top / "f", top / "l")
    with (top / "f").open("ab", buffering=0) as file:
        mirrored.check()
        (top / "f").unlink()
        mirrored.check()
        file.write(b"of the other name now")
        mirrored.flush()
        mirrored.pause()
        mirrored.resume()
        mirrored.check()


# --- the root


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_root_that_was_away_for_a_moment_only(mirror: Mirror, through_a_link: bool) -> None:
    mirrored = mirror()
    root = mirrored.sources[0]
    if through_a_link:
        mirrored.stop()
        root.rename(root.with_name("real"))
        root.symlink_to("real")
        mirrored.start()
    (root / "f").write_text("1")
    mirrored.check()
    # What is marked is looked at while the root is away; when the watcher looks, it is in its place.
    mirrored.hold_sender()
    (root / "f").write_text("2")
    mirrored.run(mirrored.group._events_are_marked())
    mirrored.hold_watcher()
    root.rename(root.with_name("away"))
    mirrored.release_sender()
    mirrored.wait_for(lambda: mirrored.sender._planner is not None and bool(mirrored.sender._planner.absent_roots))
    root.with_name("away").rename(root)
    mirrored.check()


@pytest.mark.parametrize("above", [b"/above", b"/above/root"])
def test_events_that_are_read_while_the_root_is_away(
    engine: str, watch_any: WatchAny, top: bytes, above: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened in it before has another path at that moment; when the root is looked at, it is back."""
    root = top + b"/above/root"
    os.makedirs(root + b"/d")
    watcher = watch_any(root)
    kind = type(watcher)
    look = kind._check_roots  # type: ignore[attr-defined]

    def back(self: object) -> None:
        if os.path.lexists(top + b"/away"):
            os.rename(top + b"/away", top + above)
        look(self)

    monkeypatch.setattr(kind, "_check_roots", back)
    os.close(os.open(root + b"/d/f", os.O_CREAT))
    os.rename(top + above, top + b"/away")
    assert covered(b"d/f", joined(watcher.drain()))
    assert os.path.lexists(root)


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("how", ["moved", "exchanged", "removed"])
def test_a_root_that_is_replaced(mirror: Mirror, how: str, still: bool) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    fill(out / "new", " of another root")
    if still:
        mirrored.hold_watcher()
    (top / "d" / "f").write_text("of the root before")
    if how == "exchanged":
        exchange(top, out / "new")
    else:
        if how == "moved":
            top.rename(out / "old")
        else:
            shutil.rmtree(top)
        (out / "new").rename(top)
    (top / "b" / "g").write_text("changed")
    mirrored.check()
    (top / "b" / "c" / "later").write_text("later")
    mirrored.check()


@needs_root
def test_a_root_that_is_unmounted_and_mounted_again(mirror: Mirror, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mirrored = mirror()
    mirrored.stop()
    top = mirrored.sources[0]
    # One filesystem, which stays while it is not mounted at the root.
    with mounted(disk):
        with mounted(top, "--bind", str(disk)):
            mirrored.start()
            fill(top / "d")
            mirrored.check()
        (disk / "d" / "f").write_text("changed meanwhile")
        mirrored.wait_for(lambda: bool(mirrored.run(mirrored.group.status()).problems))
        assert (mirrored.replicas[0] / "d" / "f").read_text() == "f", "an unmounted root is no empty one"
        with mounted(top, "--bind", str(disk)):
            mirrored.check()
            (top / "d" / "b" / "later").write_text("later")
            mirrored.check()
            mirrored.stop()


# --- events


def test_renames_whose_events_come_apart(
    engine: str, watch_any: WatchAny, top: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One event for each read: the two of a rename never come together."""
    monkeypatch.setattr("farshore.fmm.engine._CHUNK", {"inotify": 48, "fanotify": 512}[engine])
    os.makedirs(top + b"/d0/e")
    os.mkdir(top + b"/o")
    watcher = watch_any(top)
    seen = {}
    for number in range(20):
        os.rename(top + b"/d%d" % number, top + b"/d%d" % (number + 1))
        with open(top + b"/d%d/e/f" % (number + 1), "ab") as file:
            file.write(b"x")
        if number % 3 == 0:
            seen |= joined(watcher.read(0))
    os.rename(top + b"/d20", top + b"/o/d")
    seen |= joined(watcher.drain())
    assert covered(b"o/d/e/f", seen)
    with open(top + b"/o/d/e/f", "ab") as file:
        file.write(b"x")
    assert covered(b"o/d/e/f", joined(watcher.drain()))


def test_a_pair_at_the_border_of_a_full_buffer(watch_any: WatchAny, top: bytes) -> None:
    os.mkdir(top + b"/d")
    for name in (b"/a", b"/b"):
        open(top + name, "wb").close()
    for before in range(3):
        watcher = watch_any(top)
        with open(top + b"/a", "ab", 0) as a, open(top + b"/b", "ab", 0) as b:
            # Alike events in a row are one; so these alternate. Some more than a buffer, by one event each time.
            for number in range((1 << 18) // 32 + before - 2):
                (a if number % 2 else b).write(b"x")
        os.rename(top + b"/d", top + b"/e")
        os.mkdir(top + b"/e/n")
        seen = joined(watcher.drain())
        assert covered(b"d", seen) and covered(b"e/n", seen)
        os.close(os.open(top + b"/e/n/f", os.O_CREAT))
        assert covered(b"e/n/f", joined(watcher.drain()))
        shutil.rmtree(top + b"/e")
        os.mkdir(top + b"/d")
        watcher.close()


def test_events_of_a_watch_that_is_over_are_nobodys(watch: Watch, top: bytes) -> None:
    os.mkdir(top + b"/old")
    watcher = watch(top)
    (old,) = (node.wd for node in watcher._nodes.values() if node.name == b"old")
    os.rmdir(top + b"/old")
    watcher.drain()
    os.mkdir(top + b"/new")
    watcher.drain()
    name = b"stray".ljust(16, b"\0")
    for mask in (0x100, 0x40000100, 0x200, 0x8000, 0x400):
        watcher._digest(struct.pack("iIII", old, mask, 0, len(name)) + name)
    assert watcher.drain() == []
    os.mkdir(top + b"/new/d")
    assert set(joined(watcher.drain())) == {b"new", b"new/d"}


def test_a_directory_that_is_watched_again_is_watched_all_the_time(watch: Watch, top: bytes) -> None:
    """Replacing its mask takes it back for a moment, in which the kernel loses events: one in some thousand times."""
    masks = []
    watcher = watch(top)
    system = watcher._system

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(system, name)

        def inotify_add_watch(self, fd: int, path: str, mask: int) -> int:
            masks.append(mask)
            number: int = system.inotify_add_watch(fd, path, mask)
            return number

    watcher._system = Spy()
    fd = watcher._recognise(next(iter(watcher._nodes.values())))
    assert fd is not None
    os.close(fd)
    in_mask_add = 0x20000000
    assert masks and all(mask & in_mask_add for mask in masks)


# --- the kernel's limits


@pytest.mark.skipif(not can_lower("inotify"), reason="the kernel's limits cannot be changed here")
def test_a_queue_that_overflows_has_everything_looked_at(engine: str, mirror: Mirror) -> None:
    mirrored = mirror()
    top, out = begin(mirrored)
    mirrored.pause()
    mirrored.listen()
    with lowered(engine, "max_queued_events", 5):
        mirrored.resume()
    mirrored.hold_watcher()
    for scenario in (directory_renamed_twice_with_work_below, rotated, moved_in):
        scenario(top, out)
    mirrored.check()
    assert any(hint.path == b"" and Kind.RESCAN in hint.kind for hint in mirrored.hints)
    assert mirrored.run(mirrored.group.status()).problems == []
    (top / "n" / "b" / "c" / "later").write_text("later")
    mirrored.check()


_AT_THE_LIMIT = """
import os, sys
from pathlib import Path
from farshore.fmm import Kind, Root
from farshore.fmm.inotify import InotifyWatcher
limit, top = Path("/proc/sys/user/max_inotify_watches"), os.fsencode(sys.argv[1])
now = [1000.0]
# Of this user namespace alone; it holds for the one above as well, whose limit is higher.
limit.write_text("6")
watcher = InotifyWatcher([Root(top)], clock=lambda: now[0])
watcher.start()
assert not watcher.problems(), watcher.problems()
for number in range(8):
    os.makedirs(top + b"/%d/deep" % number)
watcher.drain()
assert "max_user_watches" in watcher.problems()[0], watcher.problems()
os.close(os.open(top + b"/7/deep/f", os.O_CREAT))
told = watcher.drain()
assert any(hint.path in (b"7", b"7/deep") and Kind.RESCAN in hint.kind for hint in told), told
now[0] += 31
told = watcher.read(0)
assert any(hint.path == b"7" and Kind.RESCAN in hint.kind for hint in told), told
limit.write_text("1000")
now[0] += 31
watcher.read(0)
watcher.drain()
assert not watcher.problems(), watcher.problems()
os.close(os.open(top + b"/7/deep/g", os.O_CREAT))
assert [hint.path for hint in watcher.drain()] == [b"7/deep/g", b"7/deep"]
watcher.close()
"""


def test_no_watches_left(top: bytes) -> None:
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c"]
    if subprocess.run([*command, "open('/proc/sys/user/max_inotify_watches', 'r+').close()"], check=False).returncode:
        pytest.skip("no user namespaces here")
    subprocess.run([*command, _AT_THE_LIMIT, os.fsdecode(top)], check=True)


# --- what cannot be read


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
def test_a_directory_that_cannot_be_read_is_a_problem_until_it_can(clock: Clock) -> None:
    # An ordinary user has no fanotify.
    base = os.fsencode(tempfile.mkdtemp())
    top = base + b"/top"
    try:
        os.makedirs(top + b"/closed/deep")
        os.chmod(base, 0o755)
        os.chown(top, 65534, 65534)
        os.chmod(top + b"/closed", 0)
        with ordinary_user():
            watcher = inotify.InotifyWatcher([inotify.Root(top)], clock=clock)
            watcher.start()
            (problem,) = watcher.problems()
            assert "closed" in problem and "permission" in problem
            os.mkdir(top + b"/open")
            assert covered(b"open", joined(watcher.drain()))
            clock.now += 31
            assert joined(watcher.read(0)) == {b"closed": Kind.RESCAN}
        os.chmod(top + b"/closed", 0o755)
        with ordinary_user():
            clock.now += 31
            until(watcher, lambda hints: not watcher.problems())
        os.close(os.open(top + b"/closed/deep/f", os.O_CREAT))
        with ordinary_user():
            assert covered(b"closed/deep/f", joined(watcher.drain()))
            watcher.close()
    finally:
        shutil.rmtree(base)


@needs_root
def test_a_tree_of_an_ordinary_user(mirror: Mirror, tmp_path: Path) -> None:
    """What cannot be read is a problem; all else is on the replica, and it, too, as soon as it can be read."""
    from farshore.fmm.view import Live

    mirrored = mirror()
    top, _ = begin(mirrored)
    real_open = Live.open
    closed = {b"d/f"}

    def refuse(self: Live, root: int, path: bytes) -> int:
        if path in closed:
            raise PermissionError(13, os.strerror(13))
        return real_open(self, root, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "open", refuse)
        (top / "d" / "f").write_text("secret")
        (top / "d" / "b" / "g").write_text("seen")
        mirrored.flush()
        assert (mirrored.replicas[0] / "d" / "b" / "g").read_text() == "seen"
        assert any("ermission denied" in text for text in mirrored.run(mirrored.group.status()).problems)
        closed.clear()
        (top / "d" / "f").chmod(0o644)
        (top / "d" / "f").chmod(0o640)
        mirrored.check()
    assert mirrored.run(mirrored.group.status()).problems == []


@pytest.mark.parametrize("what", ["the root", "a directory", "the file"])
def test_a_large_file_that_is_away_when_it_is_to_be_read(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It is back when that is told, with the times that it had."""
    mirrored = mirror()
    top, _ = begin(mirrored)
    file = top / "d" / "large"
    moving = {"the root": top, "a directory": top / "d", "the file": file}[what]
    away = moving.with_name("away")
    real = uploads._Reading.__init__
    went: list[bool] = []

    def begin_to_read(self: uploads._Reading, *arguments: Any) -> None:
        if went:
            real(self, *arguments)
            return
        went.append(True)
        moving.rename(away)
        try:
            real(self, *arguments)
        finally:
            away.rename(moving)

    monkeypatch.setattr(uploads._Reading, "__init__", begin_to_read)
    file.write_bytes(os.urandom(200_000))
    mirrored.flush()
    assert went
    # The renames themselves came after that was asked for.
    mirrored.check()


@needs_root
def test_what_cannot_be_read_is_told_with_a_remedy_and_tried_again(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing tells that a disk, or a server of files, is well again."""
    from farshore.dbm import sender
    from farshore.fmm.view import Live

    monkeypatch.setattr(sender, "_UNREAD_SECONDS", 0.5)
    mirrored = mirror()
    top, _ = begin(mirrored)
    real_open, real_names = Live.open, Live.names
    ill = threading.Event()
    ill.set()

    def open_(self: Live, root: int, path: bytes) -> int:
        if ill.is_set() and path in (b"d/f", b"d/h"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_open(self, root, path)

    def names(self: Live, root: int, path: bytes, *rest: Any) -> Any:
        if ill.is_set() and path == b"d/new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_names(self, root, path, *rest)

    monkeypatch.setattr(Live, "open", open_)
    monkeypatch.setattr(Live, "names", names)
    with caplog.at_level("WARNING"):
        for name in ("f", "h"):
            (top / "d" / name).write_text("hidden")
        (top / "d" / "new").mkdir()
        (top / "d" / "new" / "below").write_text("hidden too")
        mirrored.flush()
        (problem,) = mirrored.run(mirrored.group.status()).problems
        assert "Input/output error; the disk may be failing" in problem
    told = [record for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(told) == 1 and "the disk may be failing" in str(vars(told[0]))
    replica = mirrored.replicas[0]
    ill.clear()
    mirrored.wait_for(lambda: not mirrored.run(mirrored.group.status()).problems)
    mirrored.check()
    assert (replica / "d" / "h").read_text() == "hidden"
    assert (replica / "d" / "new" / "below").read_text() == "hidden too"


def test_paths_that_no_call_can_name(watch_any: WatchAny, top: bytes) -> None:
    name = b"d" * 200
    watcher = watch_any(top)
    here = os.open(top, os.O_RDONLY)
    for _ in range(30):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    watcher.drain()
    deepest = b"/".join([name] * 30)
    assert len(deepest) > 4096
    os.close(os.open(b"f", os.O_CREAT, dir_fd=here))
    assert covered(deepest + b"/f", joined(watcher.drain()))
    os.rename(top + b"/" + name, top + b"/short")
    watcher.drain()
    os.close(os.open(b"g", os.O_CREAT, dir_fd=here))
    assert covered(b"/".join([b"short", *[name] * 29, b"g"]), joined(watcher.drain()))
    os.close(here)
    watcher.close()
    shutil.rmtree(top)


# --- what it costs


def told(mirrored: Mirrored) -> list[FromSource]:
    """The operations that were sent."""
    return [message for message in mirrored.sent if not isinstance(message, (Begin, Commit, InStep))]


def big_directory(mirrored: Mirrored) -> Path:
    """In step with the replica: 400 files, some large."""
    top, _ = begin(mirrored)
    directory = top / "many"
    for number in range(20):
        (directory / f"{number}").mkdir(parents=True)
        for below in range(20):
            (directory / f"{number}" / f"{below}").write_bytes(os.urandom(200_000 if number == below == 3 else 500))
    mirrored.check()
    mirrored.listen()
    return directory


@pytest.mark.parametrize("still", ["", "watcher", "sender", "both"])
def test_a_move_of_a_directory_is_one_operation(mirror: Mirror, still: str) -> None:
    mirrored = mirror()
    many = big_directory(mirrored)
    if still in ("sender", "both"):
        mirrored.hold_sender()
    if still in ("watcher", "both"):
        mirrored.hold_watcher()
    many.rename(many.with_name("e") / "moved")
    mirrored.check()
    operations = told(mirrored)
    assert [(each.path, each.to) for each in operations if isinstance(each, Move)] == [(b"many", b"e/moved")]
    assert not [each for each in operations if not isinstance(each, (Move, SetMeta))]
    assert mirrored.sent_bytes < 2000


@pytest.mark.parametrize("still", ["watcher", "sender", "both"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["7/7", "3/3"])
def test_a_move_of_a_directory_in_which_a_file_changes(mirror: Mirror, name: str, when: str, still: str) -> None:
    mirrored = mirror()
    many = big_directory(mirrored)
    if still in ("sender", "both"):
        mirrored.hold_sender()
    if still in ("watcher", "both"):
        mirrored.hold_watcher()
    moved = many.with_name("moved")
    if when == "after":
        many.rename(moved)
    with ((many if when == "before" else moved) / name).open("r+b") as file:
        file.write(b"changed")
    if still == "sender":
        # What waits for the sender has the name of now.
        mirrored.run(mirrored.group._events_are_marked())
    if when == "before":
        many.rename(moved)
    mirrored.check()
    operations = told(mirrored)
    path = os.fsencode(f"moved/{name}")
    assert next((each.path, each.to) for each in operations if isinstance(each, Move)) == (b"many", b"moved")
    assert {each.path for each in operations if isinstance(each, (Put, Patch, Copy, Upload))} == {path}
    # A small file may be removed before it is found where it is now: it is sent anyhow.
    removed = {each.path for each in operations if isinstance(each, Remove)}
    assert removed <= ({b"many/7/7"} if name == "7/7" else set())
    assert mirrored.sent_bytes < 12_000


# --- storms


def replayed(there: set[bytes], operations: list[FromSource]) -> set[bytes]:
    """The paths that the replica has after the operations; each must find what it needs."""
    for each in operations:
        match each:
            case Move(path=old, to=new):
                assert old in there, each
                assert not new or new.rpartition(b"/")[0] in there, each
                moved = {path for path in there if path == old or path.startswith(old + b"/")}
                there -= moved | {path for path in there if path == new or path.startswith(new + b"/")}
                there |= {new + path[len(old) :] for path in moved}
            case Remove(path=path):
                assert path in there, each
                there -= {found for found in there if found == path or found.startswith(path + b"/")}
            case SetMeta(path=path):
                assert path in there, each
            case Link(path=path, to=to):
                assert to in there and path.rpartition(b"/")[0] in there, each
                there.add(path)
            case Put(path=path) | Patch(path=path) | Copy(path=path) | MakeDir(path=path):
                assert path.rpartition(b"/")[0] in there, each
                there.add(path)
            case MakeSymlink(path=path) | MakeNode(path=path):
                assert path.rpartition(b"/")[0] in there, each
                there.add(path)
    return there


def names(top: Path) -> set[bytes]:
    return {b"", *(os.fsencode(path.relative_to(top)) for path in top.rglob("*"))}


def test_a_storm_of_new_files(mirror: Mirror) -> None:
    mirrored = mirror()
    top, _ = begin(mirrored)
    before = names(top)
    for number in range(20_000):
        if number % 200 == 0:
            (top / f"s/{number // 1000}/{number // 200}").mkdir(parents=True)
        (top / f"s/{number // 1000}/{number // 200}/{number}").write_bytes(b"%d" % number)
    mirrored.check()
    assert replayed(before, told(mirrored)) == names(top)
    mirrored.listen()
    shutil.rmtree(top / "s")
    mirrored.check()
    assert mirrored.sent_bytes < 2_000_000


@pytest.mark.parametrize("still", [False, True])
def test_a_checkout_of_another_version(mirror: Mirror, still: bool) -> None:
    """As git does it: files are removed, or removed and written anew; directories come and go."""
    mirrored = mirror()
    top, _ = begin(mirrored)

    at: dict[int, Path] = {}

    def check_out(version: int) -> None:
        for number in range(600):
            path = top / f"src{number % 7}" / f"part{(number + version) % 40}" / f"file{number}"
            old = at.get(number)
            if old == path and number % 3 == 0:
                continue
            if old is not None:
                old.unlink()
                with contextlib.suppress(OSError):
                    old.parent.rmdir()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number} in {version if number % 3 else 0}" * 20)
            at[number] = path

    check_out(0)
    mirrored.check()
    mirrored.listen()
    before = names(top)
    if still:
        mirrored.hold_watcher()
    for version in (17, 3, 30):
        check_out(version)
    mirrored.check()
    assert replayed(before, told(mirrored)) == names(top)


def test_temporary_files_are_not_sent(mirror: Mirror) -> None:
    mirrored = mirror()
    top, _ = begin(mirrored)
    mirrored.hold_watcher()
    for number in range(2000):
        path = top / "d" / f"pgsql_tmp{number}"
        path.write_bytes(b"sorted")
        if number % 10 == 0:
            (top / "d" / f"dir{number}").mkdir()
            path.rename(top / "d" / f"dir{number}" / "t")
            shutil.rmtree(top / "d" / f"dir{number}")
        else:
            path.unlink()
    (top / "d" / "result").write_text("kept")
    mirrored.check()
    operations = told(mirrored)
    assert {each.path for each in operations if not isinstance(each, SetMeta)} == {b"d/result"}  # type: ignore[union-attr]
    assert mirrored.sent_bytes < 4000


def test_a_directory_tree_that_comes_and_goes_all_the_time(mirror: Mirror) -> None:
    mirrored = mirror()
    top, _ = begin(mirrored)
    before = names(top)
    for number in range(60):
        fill(top / "build", str(number))
        if number % 3 == 0:
            (top / "build").rename(top / f"built{number}")
        else:
            shutil.rmtree(top / "build")
    fill(top / "build", "last")
    mirrored.check()
    assert replayed(before, told(mirrored)) == names(top)
    assert b"build" in {hint.path for hint in mirrored.hints}
