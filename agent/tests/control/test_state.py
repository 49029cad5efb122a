from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.control.state import GroupState, StateStore
from farshore.errors import StateError


def opened(path: Path) -> StateStore:
    store = StateStore(path)
    store.open()
    return store


def test_a_group_never_seen_is_normal(tmp_path: Path) -> None:
    assert opened(tmp_path).load("web") == GroupState("web", "normal", "local", 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.builds(GroupState, group=st.just("web"), epoch=st.integers(1, 2**60), since=st.floats(0, 1e10)))
def test_what_is_saved_is_loaded(tmp_path: Path, state: GroupState) -> None:
    store = StateStore(tmp_path)
    store.path.mkdir(exist_ok=True)
    store.save(state)
    assert store.load("web") == state


def test_one_monitor_per_directory(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(StateError, match="another farshore-monitor"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"schema": 2, "state": {"group": "web"}}',
        b'{"schema": 1, "state": {"group": "db"}}',
        b'{"schema": 1, "state": {"group": "web", "epoch": 0}}',
        b'{"schema": 1, "state": {"group": "web", "epoch": true}}',
        b'{"schema": 1, "state": {"group": "web", "phase": "asleep"}}',
        b'{"schema": 1, "state": {"group": "web", "owner": "both"}}',
        b'{"schema": 1, "state": {"group": "web"}, "more": 1}',
        b"[" * 100000,
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    store = opened(tmp_path)
    (store.path / "web.json").write_bytes(content)
    with pytest.raises(StateError, match=r"web\.json: is damaged .*move it away"):
        store.load("web")
    assert (store.path / "web.json").read_bytes() == content


@pytest.mark.parametrize("step", ["open", "fsync", "rename"])
def test_a_save_that_fails_half_way_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = opened(tmp_path)
    old = GroupState("web", epoch=3)
    store.save(old)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(StateError, match="No space left"):
            store.save(replace(old, epoch=4))
    assert store.load("web") == old
    store.save(replace(old, epoch=4))
    assert store.load("web").epoch == 4


def test_the_order_that_makes_it_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on disk before its name is, and the name before save returns."""
    store = opened(tmp_path)
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(fd: int) -> None:
        calls.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def seen_rename(old: Path, new: Path) -> None:
        calls.append(f"rename {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    store.save(GroupState("web"))
    assert calls == ["sync .web.json.new", "rename web.json", "sync monitor"]
