"""What a node's status tells of how its groups are watched."""

from __future__ import annotations

import errno

import pytest
from nodes import Pair, until
from watches import refuse

from farshore.control.api import WatchStatus


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
