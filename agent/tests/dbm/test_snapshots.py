"""Snapshots: what they hold, that writers are always woken, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filesystems import filesystem_or_skip, mounted

from farshore.config import Consistency
from farshore.dbm import snapshots
from farshore.dbm.snapshots import SnapshotFailed, Snapshots
from farshore.errors import HookFailed
from farshore.fmm.types import Root


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with filesystem_or_skip("btrfs", tmp_path_factory.mktemp("disk")) as where:
        yield where


@pytest.fixture
def tree(disk: Path) -> Iterator[Path]:
    made = disk / "tree"
    subprocess.run(["btrfs", "-q", "subvolume", "create", str(made)], check=True)
    (made / "a").write_text("1")
    yield made
    for left in [*made.glob(".farshore*/0"), made]:
        if left.stat().st_ino == 256:
            subprocess.run(["btrfs", "-q", "subvolume", "delete", str(left)], check=True)


class Hooks:
    """What hooks did, in their order, and the snapshots they are of."""

    def __init__(self, tree: Path, state: Path) -> None:
        self.tree = tree
        self.state = state
        self.log = state / "hooks"

    def snapshots(self, freeze: str = "true", thaw: str = "true", **keys: Any) -> Snapshots:
        config = Consistency(
            "snapshot",
            freeze=f"echo freeze >> {self.log}; {freeze}",
            thaw=f"echo thaw >> {self.log}; {thaw}",
            **{"timeout": 5.0, **keys},
        )
        return Snapshots("web", config, [Root(os.fsencode(self.tree))], self.state)

    @property
    def done(self) -> list[str]:
        return self.log.read_text().split()

    def left(self) -> list[Path]:
        """What lies about."""
        return [*self.tree.parent.glob(".farshore*"), *self.tree.glob(".farshore*")]


@pytest.fixture
def hooks(tree: Path, tmp_path: Path) -> Hooks:
    return Hooks(tree, tmp_path)


def content(under_test: Snapshots) -> bytes:
    view = under_test.take()
    handle = view.open(0, b"a")
    try:
        return os.read(handle, 100)
    finally:
        os.close(handle)
        view.forget()


@pytest.mark.parametrize("how", ["btrfs", "reflink"])
def test_it_is_taken_between_the_hooks(hooks: Hooks, how: Any) -> None:
    under_test = hooks.snapshots(
        f"echo frozen > {hooks.tree}/a", f"echo woken > {hooks.tree}/a", snapshot=how, timeout=30.0
    )
    assert content(under_test) == b"frozen\n"
    assert (hooks.tree / "a").read_text() == "woken\n"
    assert hooks.done == ["freeze", "thaw"]
    assert content(under_test) == b"frozen\n"
    assert len(hooks.left()) == 1
    under_test.close()
    assert hooks.left() == []


def test_what_is_of_no_single_moment_is_told(hooks: Hooks, disk: Path) -> None:
    roots = [Root(os.fsencode(hooks.tree))]
    copies = Snapshots("web", Consistency("snapshot", "reflink"), roots, hooks.state)
    copies.take()
    assert "one after the other" in copies.problems()[0]
    copies.close()
    one = Snapshots("web", Consistency("snapshot"), roots, hooks.state)
    one.take()
    assert one.problems() == []
    one.close()
    (disk / "other").mkdir()
    two = Snapshots("web", Consistency("snapshot"), [*roots, Root(os.fsencode(disk / "other"))], hooks.state)
    view = two.take()
    assert "the paths lie in 2 subvolumes" in two.problems()[0]
    for number in (0, 1):
        seen = view.observe(number, b"")
        assert seen is not None
        assert seen.dev == os.stat([hooks.tree, disk / "other"][number]).st_dev
    two.close()
    (disk / "other").rmdir()
    still = hooks.snapshots(snapshot="reflink", timeout=30.0)
    still.take()
    assert still.problems() == []
    still.close()


def test_what_we_make_does_not_touch_the_directory(hooks: Hooks) -> None:
    before = hooks.tree.stat().st_mtime_ns
    for how in ("btrfs", "reflink"):
        under_test = hooks.snapshots(snapshot=how)
        under_test.take()
        under_test.close()
    assert hooks.tree.stat().st_mtime_ns == before


def test_writers_are_woken_when_the_freeze_fails(hooks: Hooks) -> None:
    with pytest.raises(HookFailed, match="freeze hook of group web failed: no such database"):
        hooks.snapshots("echo no such database; exit 3").take()
    assert hooks.done == ["freeze", "thaw"]


def test_writers_are_woken_when_the_freeze_hangs(hooks: Hooks) -> None:
    with pytest.raises(HookFailed, match=r"not done within 0\.3 s"):
        hooks.snapshots("sleep 100", timeout=0.3).take()
    assert hooks.done == ["freeze", "thaw"]


def test_writers_are_woken_when_the_snapshot_fails(hooks: Hooks) -> None:
    # The place is gone when it is to be used.
    with pytest.raises(SnapshotFailed):
        hooks.snapshots(f"rm -r {hooks.tree}/.farshore-snapshots-*").take()
    assert hooks.done == ["freeze", "thaw"]


def test_writers_are_woken_in_time(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    # A filesystem that takes for ever cannot be had otherwise.
    def slow(top: bytes, place: bytes) -> None:
        create(top, place)
        deadline = time.monotonic() + 60
        while "thaw" not in hooks.done and time.monotonic() < deadline:
            time.sleep(0.01)

    create = snapshots._create
    monkeypatch.setattr(snapshots, "_create", slow)
    with pytest.raises(SnapshotFailed, match=r"not done within the 0\.5 s that writers may stand still"):
        hooks.snapshots(timeout=0.5).take()
    assert hooks.done == ["freeze", "thaw"]


def test_a_thaw_that_fails_is_tried_again(hooks: Hooks) -> None:
    under_test = hooks.snapshots(thaw=f"test -e {hooks.state}/well")
    with pytest.raises(HookFailed, match="thaw hook"):
        under_test.take()
    assert hooks.done == ["freeze", "thaw", "thaw", "thaw"]
    assert "may still stand still" in under_test.problems()[0]
    # Nobody is frozen once more before.
    with pytest.raises(HookFailed):
        under_test.take()
    assert hooks.done.count("freeze") == 1
    (hooks.state / "well").touch()
    under_test.take()
    assert under_test.problems() == []
    assert hooks.done[-3:] == ["thaw", "freeze", "thaw"]
    under_test.close()


def test_what_a_hook_leaves_running_does_not_hold_up(hooks: Hooks) -> None:
    """A session that holds a lock, for example; and it lives on until the thaw ends it."""
    under_test = hooks.snapshots(f"sleep 100 & echo $! > {hooks.state}/pid", f"kill $(cat {hooks.state}/pid)")
    under_test.take()
    under_test.close()


def test_a_process_that_dies_leaves_nobody_frozen_and_nothing_behind(hooks: Hooks) -> None:
    code = (
        "import sys; from pathlib import Path; from farshore.config import Consistency; "
        "from farshore.dbm.snapshots import Snapshots; from farshore.fmm.types import Root; "
        "import os; log = sys.argv[3]; "
        "s = Snapshots('web', Consistency('snapshot', freeze=f'echo freeze >> {log}; kill -9 $PPID', "
        "thaw=f'echo thaw >> {log}'), [Root(os.fsencode(sys.argv[1]))], Path(sys.argv[2])); s.take()"
    )
    died = subprocess.run([sys.executable, "-c", code, str(hooks.tree), str(hooks.state), str(hooks.log)])
    assert died.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not hooks.log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hooks.done == ["freeze"]
    assert json.loads((hooks.state / "frozen.json").read_bytes())["thaw"].startswith("echo thaw")
    # What runs next need not be configured for snapshots any more.
    after = Snapshots("web", Consistency(), [Root(os.fsencode(hooks.tree))], hooks.state)
    after.recover()
    assert hooks.done == ["freeze", "thaw"]
    assert hooks.left() == []
    after.recover()
    assert hooks.done == ["freeze", "thaw"]
    assert after.problems() == []


@pytest.mark.parametrize("how", ["btrfs", "reflink"])
def test_what_was_taken_before_a_death_is_removed(hooks: Hooks, how: Any) -> None:
    hooks.snapshots(snapshot=how).take()
    assert hooks.left()
    hooks.snapshots(snapshot=how).recover()
    assert hooks.left() == []


def test_two_nodes_on_one_filesystem_do_not_meet(hooks: Hooks) -> None:
    under_test = hooks.snapshots()
    view = under_test.take()
    (hooks.state / "other").mkdir()
    other = Snapshots("web", Consistency("snapshot"), [Root(os.fsencode(hooks.tree))], hooks.state / "other")
    other.take()
    other.close()
    assert view.observe(0, b"a") is not None
    under_test.close()


def test_a_subvolume_within_is_not_taken_for_empty(hooks: Hooks) -> None:
    nested = hooks.tree / "nested"
    subprocess.run(["btrfs", "-q", "subvolume", "create", str(nested)], check=True)
    try:
        with pytest.raises(SnapshotFailed, match=r"nested is a subvolume of its own below .*tree"):
            hooks.snapshots().take()
        excluding = Snapshots(
            "web", Consistency("snapshot"), [Root(os.fsencode(hooks.tree), exclude=("nested",))], hooks.state
        )
        excluding.take()
        excluding.close()
    finally:
        subprocess.run(["btrfs", "-q", "subvolume", "delete", str(nested)], check=True)


def test_a_mount_within_is_not_taken_for_empty(hooks: Hooks) -> None:
    (hooks.tree / "with space").mkdir()
    with (
        mounted(hooks.tree / "with space"),
        pytest.raises(SnapshotFailed, match="with space is a mount of its own"),
    ):
        hooks.snapshots().take()


def test_a_filesystem_that_cannot_is_named(hooks: Hooks, tmp_path: Path) -> None:
    hooks.tree = tmp_path / "plain"
    with filesystem_or_skip("ext4", tmp_path, 64) as plain:
        hooks.tree = plain
        (plain / "a").touch()
        with pytest.raises(SnapshotFailed, match=r"ext4 can neither take snapshots nor copy"):
            hooks.snapshots().take()
        with pytest.raises(SnapshotFailed, match="is not on btrfs"):
            hooks.snapshots(snapshot="btrfs").take()


def test_a_path_that_is_missing_is_named(hooks: Hooks) -> None:
    hooks.tree = hooks.tree / "missing"
    with pytest.raises(SnapshotFailed, match="missing: No such file or directory"):
        hooks.snapshots().take()
