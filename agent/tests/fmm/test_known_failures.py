"""What programs that mirror directories are known to get wrong, with each engine: nothing of it is lost here."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from mirrored import Mirrored

from farshore.fmm.inotify import InotifyWatcher

from .conftest import Watch

Mirror = Callable[..., Mirrored]


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


# --- the kernel's watches


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
    node = next(iter(watcher._nodes.values()))
    fd = watcher._recognise(node)
    assert fd is not None
    os.close(fd)
    in_mask_add = 0x20000000
    assert masks and all(mask & in_mask_add for mask in masks)
    assert isinstance(watcher, InotifyWatcher)
