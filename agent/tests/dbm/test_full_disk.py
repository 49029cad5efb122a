"""Disks that are full, on either side: nothing is lost, the state is clear, and all goes on by itself."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from filesystems import mounted
from nodes import Pair, running_pair, until
from trees import differences

from farshore.config import BrakeConfig
from farshore.dbm.replica.segments import Segments
from farshore.dbm.replica.stage import Stage

MIB = 1 << 20
SIZE = 48 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small filesystem")


@pytest.fixture
async def small(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A pair of which some places lie on a small filesystem."""
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", f"size={SIZE}", "none"):
        for name in request.param:
            (place / name).mkdir()
            (tmp_path / name).symlink_to(place / name)
        async with running_pair(tmp_path) as pair:
            for node in (pair.local, pair.remote):
                config: Any = node.groups["web"].config
                object.__setattr__(config, "brake", BrakeConfig("off"))
            await pair.own("local", 1)
            yield pair


REPLICA = ("remote-tree", "remote-state")


async def same(pair: Pair) -> None:
    await pair.local.groups["web"].flush(60)
    assert differences(pair.local_tree, pair.remote_tree.resolve()) == []


@pytest.mark.parametrize("small", [REPLICA], indirect=True)
async def test_history_goes_before_anything_is_refused(small: Pair) -> None:
    path = small.local_tree / "f"
    for number in range(30):
        path.write_bytes(random.Random(number).randbytes(4 * MIB))
        await small.local.groups["web"].flush(60)
    await same(small)
    remote = small.remote.groups["web"]
    assert remote._applier is not None
    assert remote._applier.history.kept < SIZE
    assert (await small.local.groups["web"].status()).state == "replicating"


@pytest.mark.parametrize("small", [REPLICA], indirect=True)
async def test_a_full_replica_says_so_and_goes_on_when_there_is_room(small: Pair) -> None:
    local = small.local.groups["web"]
    (small.local_tree / "first").write_bytes(os.urandom(MIB))
    await same(small)
    for number in range(15):
        (small.local_tree / f"large{number}").write_bytes(os.urandom(5 * MIB))
        (small.local_tree / f"little{number}").write_text(str(number))
    await until(lambda: local._sender is not None and "No space" in local._sender.reason, "the reason is told")
    assert (small.remote_tree / "first").exists()
    assert any("No space" in text for text in [(await local.status()).reason, *(await local.status()).problems])
    # What has come is whole.
    for path in small.remote_tree.iterdir():
        assert path.read_bytes() == (small.local_tree / path.name).read_bytes()
    # Nobody touches the replica: what the source removes makes room.
    for number in range(4, 15):
        (small.local_tree / f"large{number}").unlink()
    await same(small)


@pytest.mark.parametrize("small", [REPLICA], indirect=True)
async def test_a_replica_that_was_full_at_its_restart(small: Pair) -> None:
    local = small.local.groups["web"]
    for number in range(15):
        (small.local_tree / f"large{number}").write_bytes(os.urandom(5 * MIB))
    await until(lambda: local._sender is not None and "No space" in local._sender.reason, "full")
    await small.restart("remote")
    for number in range(15):
        (small.local_tree / f"large{number}").unlink()
    (small.local_tree / "after").write_text("x")
    await same(small)


@pytest.mark.parametrize("small", [("local-state",)], indirect=True)
async def test_a_source_whose_state_is_full(small: Pair) -> None:
    filler = small.base / "small" / "filler"
    (small.local_tree / "a").write_text("a")
    await same(small)
    with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(MIB))
            file.flush()
    for number in range(300):
        (small.local_tree / f"f{number}").write_bytes(os.urandom(2000))
    local = small.local.groups["web"]
    await until(lambda: local._sender is not None and bool(local._sender.reason), "it goes on")
    filler.unlink()
    await same(small)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("small", [REPLICA], indirect=True)
async def test_at_random_times(small: Pair, code: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal, the notes of what is found, and the stage fail now and then, as a quota would have it."""
    chance = random.Random(seed)
    create, append = Stage.create, Segments.append

    def full(*_: object) -> None:
        if chance.random() < 0.1:
            raise OSError(code, os.strerror(code))

    def creating(self: Stage, *arguments: Any) -> Any:
        full()
        return create(self, *arguments)

    def appending(self: Segments, *arguments: Any) -> Any:
        full()
        return append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "create", creating)
        patch.setattr(Segments, "append", appending)
        for _ in range(60):
            path = small.local_tree / f"f{chance.randrange(8)}"
            kind = chance.randrange(3)
            if kind == 0:
                path.write_bytes(chance.randbytes(chance.choice([10, 5000, 200_000])))
            elif kind == 1:
                path.unlink(missing_ok=True)
            elif path.exists():
                path.rename(small.local_tree / f"f{chance.randrange(8)}")
    await same(small)
    assert small.remote.groups["web"]._applier is not None
    assert small.remote.groups["web"]._applier.doubts == []
