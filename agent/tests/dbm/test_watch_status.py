"""What a node's status tells of how its groups are watched."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from nodes import Pair, until
from watches import refuse

from farshore.config import PathConfig
from farshore.control.api import WatchStatus
from farshore.daemons.node import Node
from farshore.fmm import Hint
from farshore.fmm.inotify import InotifyWatcher


async def watch(pair: Pair, side: str = "local") -> WatchStatus | None:
    return (await getattr(pair, side).status()).groups["web"].watch


async def seen(pair: Pair) -> WatchStatus:
    found = await watch(pair)
    assert found is not None
    return found


async def test_the_owner_tells_how_it_watches(pair: Pair) -> None:
    (pair.local_tree / "d").mkdir()
    assert await watch(pair) is None
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    found = await seen(pair)
    assert (found.state, found.directories, found.unwatched, found.reason) == ("watching", 2, 0, "")
    assert await watch(pair, "remote") is None
    (pair.local_tree / "f").write_text("1")
    await pair.local.groups["web"].flush(60)
    assert (await seen(pair)).events > found.events
    await pair.local.groups["web"].pause()
    assert (await seen(pair)).state == "paused"
    await pair.local.groups["web"].resume()
    assert (await seen(pair)).state == "watching"


async def test_what_is_scanned_instead_is_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSPC, lambda path: b"full" in path)
    (pair.local_tree / "full").mkdir()
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    found = await seen(pair)
    assert (found.state, found.directories, found.unwatched) == ("partial", 1, 1)
    assert "max_user_watches" in found.reason


async def test_a_group_that_cannot_be_watched_has_failed(pair: Pair) -> None:
    pair.local_tree.rmdir()
    await pair.own("local", 1)
    group = pair.local.groups["web"]
    await until(lambda: group._feed is not None and group._feed.failed, "the watcher did not fail")
    found = await seen(pair)
    assert found.state == "failed"
    assert "Cannot watch" in found.reason


async def test_a_path_that_is_missing_keeps_no_other_from_being_replicated(pair: Pair) -> None:
    for side in ("local", "remote"):
        before: Node = getattr(pair, side)
        await before.stop()
        group = before.config.groups["web"]
        more = PathConfig("/srv/more", str(pair.base / f"{side}-more"))
        node = Node(replace(before.config, groups={"web": replace(group, paths=(*group.paths, more))}))
        await node.start(None)
        setattr(pair, side, node)
    await pair.own("local", 1)
    (pair.local_tree / "f").write_text("1")
    await until(lambda: (pair.remote_tree / "f").exists(), "nothing was sent")
    found = await seen(pair)
    assert (found.state, found.unwatched) == ("partial", 1)
    assert "local-more: it does not exist" in found.reason
    (pair.local_tree / "g").write_text("seen by an event")
    await until(lambda: (pair.remote_tree / "g").exists(), "what changed was not sent")
    there = pair.base / "local-more"
    there.mkdir()
    (there / "h").write_text("3")
    await until(lambda: (pair.base / "remote-more" / "h").exists(), "the path that came was not sent")
    await pair.local.groups["web"].flush(60)
    assert (await seen(pair)).state == "watching"


def begin_late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Watchers begin when that is set."""
    may_begin = threading.Event()
    real = InotifyWatcher.start

    def start(self: InotifyWatcher) -> Sequence[Hint]:
        may_begin.wait(60)
        return real(self)

    monkeypatch.setattr(InotifyWatcher, "start", start)
    return may_begin


async def test_all_is_looked_at_once_when_a_node_begins(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher puts all in doubt when it begins; so the first look waits for it."""
    (pair.local_tree / "f").write_text("1")
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    may_begin = begin_late(monkeypatch)
    await pair.restart("local")
    group = pair.local.groups["web"]
    await until(lambda: group._feed is not None and group._sender is not None, "it did not begin")
    assert group._sender is not None
    assert not group._sender.connected and group._sender.looked_at == 0
    may_begin.set()
    await group.flush(60)
    # The root and the file.
    assert group._sender.looked_at == 2


async def test_who_watches_too_late_is_not_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    may_begin = begin_late(monkeypatch)
    monkeypatch.setattr("farshore.dbm.sender._WATCHER_SECONDS", 0.05)
    await pair.local.stop()
    (pair.local_tree / "f").write_text("made meanwhile")
    pair.local = Node(pair.local.config)
    await pair.local.start(None)
    try:
        await until(lambda: (pair.remote_tree / "f").exists(), "it was not sent")
        assert (await seen(pair)).state == "starting"
    finally:
        may_begin.set()
    await pair.local.groups["web"].flush(60)
