"""How ``farshore status`` tells of what is not watched."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from farshore.cli import status
from farshore.control import api

WATCH = api.WatchStatus("inotify", "watching", 1204, 0, 0, 17, 0, "")
GROUP = api.GroupStatus(
    "web", "local", "local", 1, "replicating", "bak1 has everything", True, True, 0.0, 0, 0, 0, {}, [], True
)


def lines(watch: api.WatchStatus | None) -> str:
    node = api.NodeStatus("web1", "0", 1.0, {"web": replace(GROUP, watch=watch)})
    return "\n".join(status._describe(node))


@pytest.mark.parametrize("state", ["watching", "starting", "paused"])
def test_nothing_is_said_when_all_is_well(state: str) -> None:
    assert "watched" not in lines(None)
    assert "watched" not in lines(replace(WATCH, state=state))


def test_what_is_scanned_instead_is_said() -> None:
    told = lines(replace(WATCH, state="partial", unwatched=3, reason="the limit"))
    assert "  web is watched by inotify: 1,204 directories; 3 more are scanned instead" in told


def test_a_watcher_that_fails_is_said() -> None:
    assert "  web is not watched, as inotify fails" in lines(replace(WATCH, state="failed", directories=0))


def test_overflows_are_said_with_their_remedy() -> None:
    told = lines(replace(WATCH, overflows=1))
    assert "overflowed once" in told
    assert "fs.inotify.max_queued_events" in told
    assert "overflowed 1,500 times" in lines(replace(WATCH, overflows=1500))


def test_an_engine_that_does_not_count_directories() -> None:
    told = lines(replace(WATCH, engine="fanotify", state="partial", directories=0, unwatched=1))
    assert "  web is watched by fanotify; 1 more are scanned instead" in told
